"""Sharpness-aware minimisation over a window: the gradient is taken where the loss is highest nearby.

e = rho g(w) / |g(w)|            w ← step along g(w + e)            (Foret et al. 2021, eq. 2 and algorithm 1)
"""

import math

import torch
from torch import nn
from torch.optim import Optimizer

from macrobatch.accumulator import Accumulator
from macrobatch.gradients import modules_of, norm_of, submodules
from macrobatch.report import Report
from macrobatch.state import RandomState
from macrobatch.structure import Nested
from macrobatch.update import Update, apply_update


class SAM:
    """Makes updates of `optimizer` along the gradient at the highest point within `rho`, by two passes over a window.

    `accumulator`: runs the windows, so the two gradients are those of the effective batch. `optimizer`: any of torch's,
    with any scheduler; it is neither wrapped nor changed.
    """

    def __init__(self, accumulator: Accumulator, optimizer: Optimizer, *, rho: float = 0.05) -> None:
        if not isinstance(accumulator, Accumulator):
            raise ValueError(f"SAM takes an Accumulator, got a {type(accumulator).__name__}")
        if not isinstance(optimizer, Optimizer):
            raise ValueError(f"SAM takes a torch optimizer, got a {type(optimizer).__name__}")
        if not 0 < rho < math.inf:
            raise ValueError(f"rho must be a distance above 0, got {rho!r}")
        self.accumulator = accumulator
        self.optimizer = optimizer
        self.rho = rho

    def step(self, batch: Nested, *, max_norm: float | None = None) -> tuple[Report, Update]:
        """The parameters have made one step along the gradient of the highest point nearby; gradients are None.

        `batch`: what `Accumulator.run` takes. The Report is that of the first pass, at the weights themselves. Both
        passes draw the same random numbers (dropout); buffers change once, as in the first pass. If the first gradient
        is not finite or zero, there is no second pass. `max_norm` and the rest as for `apply_update`. After an error
        weights are, bit for bit, as before. Costs twice the time, one copy of the parameters and one of the buffers.
        """
        random = RandomState(self._device())
        report = self.accumulator.run(batch)
        parameters = [p for p in report.parameters if p.grad is not None]
        norm = norm_of(p.grad for p in parameters)
        if not bool(torch.isfinite(norm) & (norm > 0)):
            return report, apply_update(self.optimizer, report, max_norm=max_norm)
        before = [p.detach().clone() for p in parameters]
        buffers = [(b, b.clone()) for module in self._modules() for b in module._buffers.values() if b is not None]
        try:
            with torch.no_grad():
                for p in parameters:
                    gradient, p.grad = p.grad, None
                    assert gradient is not None
                    p.add_(((gradient.to_dense() if gradient.is_sparse else gradient) * (self.rho / norm)).to(p.dtype))
            random.restore()
            highest = self.accumulator.run(batch)
        except BaseException:
            for p in parameters:
                p.grad = None
            raise
        finally:
            with torch.no_grad():
                for tensor, held in [*zip(parameters, before, strict=True), *buffers]:
                    tensor.copy_(held)
        return report, apply_update(self.optimizer, highest, max_norm=max_norm)

    def _modules(self) -> list[nn.Module]:
        own = [self.accumulator.loss_fn] if isinstance(self.accumulator.loss_fn, nn.Module) else []
        return list(submodules([*modules_of(self.accumulator.model), *own]))

    def _device(self) -> torch.device | None:
        held = (p.device for module in self._modules() for p in module._parameters.values() if p is not None)
        return next(held, None)
