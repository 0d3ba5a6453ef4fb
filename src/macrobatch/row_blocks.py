"""A loss over all pairs of N outputs, computed some rows at a time, so that the N x N matrix never stands whole."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from macrobatch.batch import Window, check_size
from macrobatch.modules import modules_of
from macrobatch.replay import Beginning, Replay
from macrobatch.signatures import check_callable, takes
from macrobatch.state import RandomState, buffer_slots
from macrobatch.structure import Nested, tensors

BlockLoss = Callable[[Any, Nested, Window, slice], Tensor]

# How far shares may be from adding up, of the sum of their sizes: rounding, in bfloat16 too. Means over a block's rows
# are off by a third. Below SMALLEST a share may be what rounding left of terms that cancel.
TOLERANCE, SMALLEST = 0.05, 1e-6
LOSS_OF_ALL = (
    ". The loss of all samples at once is a loss_fn without RowBlocks; one in blocks computes the rows in the slice "
    "`rows` alone, and divides by the number of all samples"
)


class RowBlocks(nn.Module):
    """A `loss_fn(model, outputs, window)` that is the sum of `loss_fn(model, outputs, window, rows)` over blocks.

    `rows`: samples in a block. The given `loss_fn` takes a `slice` of the samples as its fourth argument and returns
    these samples' share of the loss, shape (), already divided by the number of all samples: the shares add up. Whether
    they do is looked at once, in the first window: a ValueError if not.
    GatheredAccumulator runs backward on each block before it computes the next, and divides the blocks over the ranks.
    """

    def __init__(self, loss_fn: BlockLoss, *, rows: int) -> None:
        arguments = ("model", "outputs", "window", "rows")
        check_callable(loss_fn, "block_loss", arguments, LOSS_OF_ALL if takes(loss_fn, 3) else "")
        super().__init__()
        self.loss_fn = loss_fn
        self.rows = check_size(rows, "rows")
        self._adds_up = False  # whether shares were seen to

    def forward(self, model: Any, outputs: Nested, window: Window) -> Tensor:
        """The whole loss, all blocks in one graph."""
        num_samples = next(tensors(outputs)).shape[0]
        shares = [self.loss_fn(model, outputs, window, rows) for rows in self.blocks(0, num_samples)]
        return sum(shares[1:], start=shares[0])

    def blocks(self, start: int, stop: int) -> Iterator[slice]:
        """The samples from `start` to `stop`, at most `rows` at a time."""
        return (slice(first, min(first + self.rows, stop)) for first in range(start, stop, self.rows))

    @torch.no_grad()
    def look_once(self, model: Any, outputs: Nested, window: Window, rows: slice) -> None:
        """ValueError if the shares of two parts of `rows` are not the share of both; nothing once they were seen to be.

        Random numbers and buffers are as before. Without a graph it takes less memory than the block's backward did.
        Shares near 0, and those that draw random numbers, tell nothing.
        """
        num_samples = next(tensors(outputs)).shape[0]
        parts = _parts(rows, num_samples)
        if self._adds_up or parts is None:
            return
        with _apart([*modules_of(model), self], next(tensors(outputs)).device) as random:
            shares = [float(self.loss_fn(model, outputs, window, part)) for part in parts]
            draws = not random.is_present()
        size = sum(abs(share) for share in shares)
        if draws or not SMALLEST < size < float("inf"):
            return
        if abs(shares[0] - shares[1] - shares[2]) > TOLERANCE * size:
            raise ValueError(_message(parts, shares, num_samples))
        self._adds_up = True


@contextmanager
def _apart(modules: Sequence[nn.Module], device: torch.device) -> Iterator[RandomState]:
    """What runs inside leaves random numbers and buffers as they were: it is given copies of these."""
    random, slots, replay = RandomState(device), buffer_slots(modules), Replay()
    replay.watch(slots, device)
    buffers = {i: module._buffers[name] for i, (module, name) in enumerate(slots)}
    try:
        with replay.again(Beginning(random, buffers)):
            yield random
    finally:
        random.restore()


def _parts(rows: slice, num_samples: int) -> tuple[slice, slice, slice] | None:
    """A block and its two halves; for one row it and a neighbour, and each of them. None for a single sample."""
    start, stop = rows.start, rows.stop
    if stop - start == 1:
        start = max(0, min(start, num_samples - 2))
        stop = min(start + 2, num_samples)
    middle = (start + stop) // 2
    return None if middle == start else (slice(start, stop), slice(start, middle), slice(middle, stop))


def _message(parts: Sequence[slice], shares: Sequence[float], num_samples: int) -> str:
    whole, first, second = (f"{share:.6g} for {_written(part)}" for share, part in zip(shares, parts, strict=True))
    return (
        f"the shares that block_loss returns do not add up: {whole}, but {first} and {second}. Needed is, for the rows "
        f"it is given, their share of the loss over all {num_samples} samples. Divide the sum over these rows by the "
        'number of all samples, F.cross_entropy(..., reduction="sum") / len(outputs) for instance: not by the number '
        "of these rows, which is what a mean does"
    )


def _written(rows: slice) -> str:
    return f"rows {rows.start} to {rows.stop - 1}" if rows.stop - rows.start > 1 else f"row {rows.start}"
