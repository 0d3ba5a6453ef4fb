"""The loss over all outputs of a window: its value, its gradient by outputs, and by the parameters of its own."""

from collections.abc import Callable, Iterator, Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn

from macrobatch.batch import Window
from macrobatch.distributed import Ranks
from macrobatch.gathered_forward import Encoder
from macrobatch.gathering import Outputs
from macrobatch.gradients import WindowGradients
from macrobatch.leaves import StrayLeaves
from macrobatch.recovery import is_out_of_memory
from macrobatch.row_blocks import RowBlocks
from macrobatch.seeds import Learned
from macrobatch.structure import Nested

GatheredLoss = Callable[[Any, Nested, Window], Tensor]


class WindowLoss:
    """The loss of one window. `value`: shape (), float64, over all ranks; `gradients`: of this rank's outputs.

    Every rank computes the loss over the outputs of all ranks; its own parameters get their gradient on the first rank
    only, because gradients are summed over ranks. A loss in blocks of rows is divided among the ranks instead.
    """

    def __init__(
        self,
        encoder: Encoder,
        loss_fn: GatheredLoss,
        learned: Learned,
        parameters: Sequence[nn.Parameter],
        ranks: Ranks,
    ) -> None:
        self.value = torch.zeros((), dtype=torch.float64, device=encoder.home)
        self.num_samples = 0
        self.gradients: list[Tensor | None] = []
        self._encoder = encoder
        self._loss_fn = loss_fn
        self._learned = learned
        self._parameters = parameters
        self._ranks = ranks
        self._is_divided = isinstance(loss_fn, RowBlocks) and ranks.size > 1
        self._own_gradients: list[tuple[nn.Parameter, Tensor]] = []  # of parameters, as the loss alone left them

    def evaluate(self, window: Window, outputs: Outputs) -> None:
        """This rank's part of the loss is in `value`."""
        self.num_samples = outputs.num_samples
        for share in self._shares(window, outputs):
            self.value += share.detach().to(self.value)

    def sum_value(self) -> None:
        """`value` is that of all ranks."""
        if self._is_divided:
            self.value = self._ranks.sum(self.value)

    def backward(self, window: Window, outputs: Outputs) -> str | None:
        """This rank's part of the loss is in `value`, its gradients in the rows of `outputs` and in `p.grad`.

        If it ran out of memory, what the error said; then `p.grad` may hold a part of it.
        """
        self.num_samples = outputs.num_samples
        for row in outputs.rows:
            row.grad = None
            row.requires_grad_(row.is_floating_point() or row.is_complex())
        try:
            self.value.zero_()
            for share in self._shares(window, outputs):
                self._share_backward(share, outputs)
                del share
        except RuntimeError as error:
            if not is_out_of_memory(error):
                raise
            return str(error).splitlines()[0]
        return None

    def settle(self, outputs: Outputs, own: slice, before: list[tuple[Tensor | None, int]]) -> None:
        """Summed over ranks where it was divided; `gradients` are this rank's. `before`: from `versions`."""
        self.sum_value()
        if self._is_divided:
            for row in outputs.rows:
                if row.requires_grad:
                    row.grad = self._ranks.sum(torch.zeros_like(row) if row.grad is None else row.grad)
        elif self._ranks.size > 1 and not self._learned.has_run:
            self._refuse_differing_losses()
        self.gradients = [None if row.grad is None else row.grad[own] for row in outputs.rows]
        if all(g is None for g in self.gradients):
            raise ValueError("the loss depends on no output of encode: was it detached in the loss_fn?")
        self._own_gradients = [
            (p, p.grad.clone())
            for p, (gradient, version) in zip(self._parameters, before, strict=True)
            if p.grad is not None and (p.grad is not gradient or p.grad._version != version)
        ]

    def versions(self) -> list[tuple[Tensor | None, int]]:
        """The gradients of all parameters, and how often each was changed."""
        return [(p.grad, 0 if p.grad is None else p.grad._version) for p in self._parameters]

    def begin_again(self, gradients: WindowGradients) -> None:
        """`p.grad` holds what the loss alone gave to its own parameters, and nothing else."""
        gradients.restart()
        for p, gradient in self._own_gradients:
            if p.grad is None:
                p.grad = gradient.clone()
            else:
                p.grad.copy_(gradient)
        gradients.absorb()

    def _shares(self, window: Window, outputs: Outputs) -> Iterator[Tensor]:
        """The summands of the loss that this rank computes: all of it, or its blocks of rows."""
        model, nested = self._encoder.recipe.model, outputs.nested
        if not isinstance(self._loss_fn, RowBlocks):
            with self._encoder.around_forward():
                loss = self._loss_fn(model, nested, window)
            yield checked_loss(loss)
            return
        n, size, rank = outputs.num_samples, self._ranks.size, self._ranks.rank
        for rows in self._loss_fn.blocks(n * rank // size, n * (rank + 1) // size):
            with self._encoder.around_forward():
                loss = self._loss_fn.loss_fn(model, nested, window, rows)
            yield checked_loss(loss)
            del loss
            if not self._learned.has_run:
                with self._encoder.around_forward():
                    self._loss_fn.look_once(model, nested, window, rows)

    def _share_backward(self, share: Tensor, outputs: Outputs) -> None:
        self.value += share.detach().to(self.value)
        if not share.requires_grad:
            raise ValueError("the loss depends on no output of encode: was it detached in the loss_fn?")
        rows = [row for row in outputs.rows if row.requires_grad]
        strays = None
        if not self._learned.knows_leaves:
            strays = StrayLeaves([share], cast(Sequence[nn.Parameter], [*self._parameters, *rows]), self._loss_fn)
        is_repeated = self._ranks.rank > 0 and not self._is_divided
        seed = self._encoder.recipe.unscaler.scale(torch.ones_like(share))
        torch.autograd.backward(share, seed, inputs=rows if is_repeated else None)
        if strays is not None:
            del share
            strays.refuse_survivors()

    def _refuse_differing_losses(self) -> None:
        ends = self._ranks.maximum(torch.stack([self.value, -self.value]))
        largest, smallest = float(ends[0]), -float(ends[1])
        if largest - smallest > 1e-3 * max(abs(largest), abs(smallest)):
            raise ValueError(
                f"the loss over all outputs is {smallest:.6g} on one rank and {largest:.6g} on another: a loss_fn "
                "draws no random numbers, and takes what it needs of the samples (labels, say) from outputs, which "
                "are those of all ranks; the window holds this rank's samples only"
            )


def checked_loss(loss: Any) -> Tensor:
    """`loss`, a tensor of shape (), or a ValueError."""
    if not isinstance(loss, Tensor) or loss.ndim:
        what = f"a tensor of shape {tuple(loss.shape)}" if isinstance(loss, Tensor) else f"a {type(loss).__name__}"
        raise ValueError(f"the loss_fn returned {what}: a loss over the outputs of a window is one tensor of shape ()")
    return loss
