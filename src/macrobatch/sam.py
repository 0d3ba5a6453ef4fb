"""Sharpness-aware minimisation over a window: the gradient is taken where the loss is highest nearby.

e = rho g(w) / |g(w)|            w ← step along g(w + e)            (Foret et al. 2021, eq. 2 and algorithm 1)
"""

import math

import torch
from torch import nn
from torch.optim import Optimizer

from macrobatch.accumulator import Accumulator
from macrobatch.gradients import LOW_PRECISION, norm_of
from macrobatch.modules import modules_of, name_of, submodules, trainable
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
        weights, buffers and random numbers are, bit for bit, as before. Costs twice the time, one copy
        of the parameters and two of the buffers.
        """
        modules = self._modules()
        _refuse_low_precision(modules)
        random, start = RandomState(self._device()), _Buffers(modules)
        report = self.accumulator.run(batch)
        parameters = [p for p in report.parameters if p.grad is not None]
        norm = norm_of(p.grad for p in parameters)
        if not bool(torch.isfinite(norm) & (norm > 0)):
            return report, apply_update(self.optimizer, report, max_norm=max_norm)
        before = [p.detach().clone() for p in parameters]
        after = _Buffers(modules)
        try:
            with torch.no_grad():
                for p in parameters:
                    gradient, p.grad = p.grad, None
                    assert gradient is not None
                    p.add_(((gradient.to_dense() if gradient.is_sparse else gradient) * (self.rho / norm)).to(p.dtype))
            random.restore()
            start.restore()  # the second pass begins where the first did
            highest = self.accumulator.run(batch)
        except BaseException:
            for p in parameters:
                p.grad = None
            random.restore()
            start.restore()
            raise
        finally:
            with torch.no_grad():
                for p, held in zip(parameters, before, strict=True):
                    p.copy_(held)
        after.restore()
        return report, apply_update(self.optimizer, highest, max_norm=max_norm)

    def _modules(self) -> list[nn.Module]:
        own = [self.accumulator.loss_fn] if isinstance(self.accumulator.loss_fn, nn.Module) else []
        return list(submodules([*modules_of(self.accumulator.model), *own]))

    def _device(self) -> torch.device | None:
        held = (p.device for module in self._modules() for p in module._parameters.values() if p is not None)
        return next(held, None)


class _Buffers:
    """What buffers hold now, also those that a forward assigns anew."""

    def __init__(self, modules: list[nn.Module]) -> None:
        held = ((m._buffers, name, b) for m in modules for name, b in m._buffers.items())
        self._held = [(buffers, name, b, None if b is None else b.clone()) for buffers, name, b in held]

    def restore(self) -> None:
        """Each module has the buffers it had, with the contents they had."""
        with torch.no_grad():
            for buffers, name, buffer, value in self._held:
                buffers[name] = buffer
                if buffer is not None and value is not None:
                    buffer.copy_(value)


def _refuse_low_precision(modules: list[nn.Module]) -> None:
    for p in trainable(modules):
        if p.dtype in LOW_PRECISION:
            raise ValueError(
                f"parameter {name_of(p, modules)!r} is {p.dtype}, in which most of a step of length rho is lost to "
                "rounding: keep float32 parameters and give the Accumulator autocast="
            )
