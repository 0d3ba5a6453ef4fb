"""A GradScaler around a window: its scale goes into the seed of backward and is gone before `run` returns."""

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
        # The scaler knows carriers by id until its next update, also those that are gone: a new one needs a new id.
        known, carriers = getattr(self.scaler, "_per_optimizer_states", {}), [torch.optim.SGD(leaves, lr=0.0)]
        while id(carriers[-1]) in known:
            carriers.append(torch.optim.SGD(leaves, lr=0.0))
        self.scaler.unscale_(carriers[-1])
        for leaf in leaves:
            leaf.grad = None
