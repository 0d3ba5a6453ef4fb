"""A loss over all pairs of N outputs, computed some rows at a time, so that the N x N matrix never stands whole."""

from collections.abc import Callable, Iterator
from typing import Any

from torch import Tensor, nn

from macrobatch.batch import Window, check_size
from macrobatch.structure import Nested, tensors

BlockLoss = Callable[[Any, Nested, Window, slice], Tensor]


class RowBlocks(nn.Module):
    """A `loss_fn(model, outputs, window)` that is the sum of `loss_fn(model, outputs, window, rows)` over blocks.

    `rows`: samples in a block. The given `loss_fn` takes a `slice` of the samples as its fourth argument and returns
    these samples' share of the loss, shape (), already divided by the number of all samples: the shares add up.
    GatheredAccumulator runs backward on each block before it computes the next, and divides the blocks over the ranks.
    """

    def __init__(self, loss_fn: BlockLoss, *, rows: int) -> None:
        super().__init__()
        self.loss_fn = loss_fn
        self.rows = check_size(rows, "rows")

    def forward(self, model: Any, outputs: Nested, window: Window) -> Tensor:
        """The whole loss, all blocks in one graph."""
        num_samples = next(tensors(outputs)).shape[0]
        shares = [self.loss_fn(model, outputs, window, rows) for rows in self.blocks(0, num_samples)]
        return sum(shares[1:], start=shares[0])

    def blocks(self, start: int, stop: int) -> Iterator[slice]:
        """The samples from `start` to `stop`, at most `rows` at a time."""
        return (slice(first, min(first + self.rows, stop)) for first in range(start, stop, self.rows))
