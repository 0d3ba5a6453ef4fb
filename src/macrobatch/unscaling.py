"""A GradScaler around a window: its scale goes into the seed of backward and is gone before `run` returns."""

from collections import deque
from collections.abc import Sequence

import torch
from torch import Tensor
from torch.amp.grad_scaler import GradScaler


class Unscaler:
    """What the accumulator needs of a GradScaler; without one, or with a disabled one, nothing happens.

    torch's scaler unscales the gradients of an optimizer and remembers for it whether they were finite; `update` then
    reads that. Here an optimizer that is never stepped carries the gradients, so that both stay torch's own code.
    """

    def __init__(self, scaler: GradScaler | None) -> None:
        self.scaler = scaler if scaler is not None and scaler.is_enabled() else None
        # The scaler knows carriers by id until its next update: they must live that long, at most this many windows.
        self._carriers: deque[torch.optim.Optimizer] = deque(maxlen=64)

    def scale(self, seed: Tensor) -> Tensor:
        """The seed of backward times the loss scale, without a host sync."""
        return seed if self.scaler is None else self.scaler.scale(seed)

    def unscale_(self, gradients: Sequence[Tensor]) -> None:
        """`gradients` without the loss scale; the scaler knows whether they were finite."""
        if self.scaler is None or not gradients:
            return
        leaves = [torch.nn.Parameter(gradient.detach(), requires_grad=True) for gradient in gradients]
        for leaf in leaves:
            leaf.grad = leaf.detach()
        carrier = torch.optim.SGD(leaves, lr=0.0)
        self._carriers.append(carrier)
        self.scaler.unscale_(carrier)
        for leaf in leaves:
            leaf.grad = None
