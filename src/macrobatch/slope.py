"""The derivative of a loss along a direction of the weights, in the form that the loss has: a loss like any other.

    s_j = g_j · v           ∂s_j/∂w = H_j v

g_j and H_j: gradient and Hessian of micro-batch j's loss_sum. So a backward over the window adds up H v by the weights
of the loss itself, whether these are samples, valid tokens or several denominators.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from macrobatch.leaves import has_nested_backward
from macrobatch.structure import Nested
from macrobatch.weighting import LOSS, Loss, terms_of


class Slope:
    """The slope of `loss_fn(model, micro_batch)` along `direction`, tensors in the shapes of `parameters`.

    `has_count`: the loss has the form {name: loss_sum}. `has_custom_functions`: one of its graphs had functions written
    in Python, whose second derivative may be wrong without an error.
    """

    def __init__(
        self,
        loss_fn: Callable[[Any, Any], Any],
        model: nn.Module | Sequence[nn.Module],
        parameters: Sequence[nn.Parameter],
        direction: Sequence[Tensor],
        *,
        has_count: bool,
    ) -> None:
        self._loss_fn = loss_fn
        self._model = model
        self._parameters = parameters
        self._direction = direction
        self._has_count = has_count
        self.has_custom_functions = False

    def loss(self, _: Any, micro_batch: Nested) -> Any:
        """What an Accumulator takes as its loss_fn."""
        terms = terms_of(self._loss_fn(self._model, micro_batch), 1, self._has_count)
        if terms.is_empty:
            return Loss(0.0, terms.weight)  # type: ignore[arg-type]
        slopes = {name: self._along(loss_sum) for name, loss_sum in terms.sums.items()}
        if self._has_count:
            return slopes
        return slopes[LOSS] if terms.is_mean else (slopes[LOSS], terms.weight)

    def _along(self, loss_sum: Tensor) -> Tensor:
        if not loss_sum.requires_grad:
            return loss_sum  # the Accumulator says what is wrong with it
        self.has_custom_functions |= has_nested_backward([loss_sum])
        gradient = torch.autograd.grad(loss_sum, self._parameters, create_graph=True, allow_unused=True)
        pairs = zip(gradient, self._direction, strict=True)
        slope = torch.stack([(g * part).sum() for g, part in pairs if g is not None]).sum()
        if slope.requires_grad:
            return slope
        return slope + 0.0 * torch.stack([p.sum() for p in self._parameters]).sum()  # linear in the weights
