"""Batch-size-invariant Adam: the second moment averages the squares of gradients of a fixed number of samples.

Wang and Aitchison 2024. Adam's second moment sees the squared gradient of the whole batch, G^2 + S/N, so it shrinks as
batches grow, and rates must be scaled by a square root, if at all. Here it sees what batches of n_ref samples would
show, G^2 + S/n_ref, at any N. With gbar the window's gradient and M = sum_j w_j g_j^2, elementwise and without bias,

    v_ref = gbar^2 + (M - gbar^2) c            c = (1/n_ref - sum_j w_j^2/n_j) / (sum_j w_j/n_j - sum_j w_j^2/n_j)

which is never negative, and M itself for micro-batches of n_ref samples each. Then k times the batch goes with k times
the rate and betas to the power of k.
"""

import weakref
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from macrobatch.moment_average import moments_of
from macrobatch.report import Report

Observed = tuple["weakref.ref[Tensor]", Tensor]  # a parameter's gradient, and the mean of squares M


class InvariantAdamW(Optimizer):
    """AdamW whose second moment is that of batches of `reference_batch_size` samples, whatever the effective batch.

    Call `observe(report)` between `Accumulator(..., measure="squares").run` and `apply_update`; `step` without it is a
    ValueError. A window of one micro-batch, or of fewer samples than the reference, counts as it is: plain AdamW.
    `lr`, `betas`, `eps`, `weight_decay`: as in `torch.optim.AdamW`, whose `state_dict` it takes and gives.
    """

    def __init__(
        self,
        params: Iterable[Tensor] | Iterable[dict[str, Any]] | Iterable[tuple[str, Tensor]],
        lr: float | Tensor = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 1e-2,
        *,
        reference_batch_size: float,
    ) -> None:
        defaults = {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay}
        if not reference_batch_size > 0:
            raise ValueError(
                f"reference_batch_size must be a positive number of samples (the micro-batch, or the batch that the "
                f"rates were tuned for), got {reference_batch_size}"
            )
        self.reference_batch_size = reference_batch_size
        self._observed: dict[int, Observed] = {}  # by id of the parameter
        self._coefficient: Tensor | None = None  # c, shape ()
        self._norm: Tensor | None = None  # of this optimizer's gradients before clipping, shape ()
        super().__init__(params, defaults)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """One more group is trained. ValueError for options that are out of range."""
        super().add_param_group(param_group)
        group = self.param_groups[-1]
        least = min(float(group[name]) for name in ("lr", "eps", "weight_decay"))
        if least < 0 or not all(0 <= beta < 1 for beta in group["betas"]):
            options = {name: group[name] for name in ("lr", "betas", "eps", "weight_decay")}
            self.param_groups.pop()
            raise ValueError(f"lr, eps and weight_decay must not be negative and betas lie in [0, 1), got {options}")

    def observe(self, report: Report) -> None:
        """The next `step` uses this window's mean of squares; its gradients are in `p.grad`, not clipped yet.

        No host sync. ValueError if squares were not measured, or a gradient in `p.grad` is not this window's.
        """
        moments = moments_of(report, "InvariantAdamW")
        if not isinstance(report, Report) or report.mean_squares is None:
            raise ValueError("InvariantAdamW needs the mean of squared gradients: Accumulator(..., measure='squares')")
        squares = {id(p): m for p, m in zip(report.parameters, report.mean_squares, strict=True)}
        observed: dict[int, Observed] = {}
        for p in self._with_gradients():
            assert p.grad is not None
            square = squares.get(id(p))
            if square is None:
                raise ValueError(
                    f"a parameter of shape {tuple(p.shape)} has a gradient that this window did not make: clear "
                    "gradients before run, and train it through the accumulator's model"
                )
            observed[id(p)] = weakref.ref(p.grad), square
        between = moments.inverse_size - moments.weighted_inverse_size
        excess = 1 / self.reference_batch_size - moments.weighted_inverse_size
        self._coefficient = (excess / between).where(moments.num_micro_batches > 1, 0.0).clamp(min=0.0)
        self._norm = self._gradient_norm()
        self._observed = observed

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        """The parameters have made one step; the observed squares are used up.

        Gradients that were clipped since `observe` count in both moments, as in AdamW: M is multiplied by the square
        of what they were multiplied by. ValueError, before anything changes, without `observe` for these gradients.
        """
        if closure is not None:
            raise ValueError("InvariantAdamW takes no closure: run the window, observe its report, then step")
        self._refuse_unobserved()
        if not self._observed:
            return
        assert self._coefficient is not None
        assert self._norm is not None
        clipped = (self._gradient_norm() / self._norm).square().where(self._norm > 0, 1.0)
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is not None:
                    self._step(p, p.grad, group, self._coefficient, clipped)
        self._observed = {}

    def _step(self, p: nn.Parameter, g: Tensor, group: dict[str, Any], c: Tensor, clipped: Tensor) -> None:
        beta1, beta2 = group["betas"]
        lr, (m, v, steps) = float(group["lr"]), self._state_of(p)
        g = g.to(v.dtype)
        square = self._observed[id(p)][1].to(v)
        c, clipped = c.to(v), clipped.to(v)
        p.mul_(1 - lr * group["weight_decay"])
        m.lerp_(g, 1 - beta1)
        v_ref = g.square().mul_(1 - c).addcmul_(square, c * clipped)
        v.mul_(beta2).add_(v_ref, alpha=1 - beta2)
        denominator = v.sqrt().div_((1 - beta2**steps) ** 0.5).add_(group["eps"])
        p.addcdiv_(m, denominator, value=-lr / (1 - beta1**steps))

    def _state_of(self, p: nn.Parameter) -> tuple[Tensor, Tensor, float]:
        """Both moments, and the number of this step; kept under the names that AdamW has for them."""
        state = self.state[p]
        if not state:
            state["step"] = torch.tensor(0.0)
            state["exp_avg"], state["exp_avg_sq"] = torch.zeros_like(p), torch.zeros_like(p)
        state["step"] += 1
        return state["exp_avg"], state["exp_avg_sq"], float(state["step"])

    def _with_gradients(self) -> list[nn.Parameter]:
        return [p for group in self.param_groups for p in group["params"] if p.grad is not None]

    def _gradient_norm(self) -> Tensor:
        gradients = [p.grad for p in self._with_gradients() if p.grad is not None]
        if any(g.is_sparse for g in gradients):
            raise ValueError("InvariantAdamW takes no sparse gradients, nor does AdamW: sparse=False in the embedding")
        if not gradients:
            return torch.tensor(0.0)
        norms = torch._foreach_norm(gradients, 2)
        together: Tensor = torch.linalg.vector_norm(torch.stack([norm.double().to(norms[0].device) for norm in norms]))
        return together

    def _refuse_unobserved(self) -> None:
        for p in self._with_gradients():
            seen = self._observed.get(id(p))
            if seen is None or seen[0]() is not p.grad:
                raise ValueError(
                    "these gradients were not observed: call optimizer.observe(report) after accumulator.run(batch) "
                    "and before apply_update(optimizer, report)"
                )

    def __getstate__(self) -> dict[str, Any]:
        own = {"reference_batch_size": self.reference_batch_size, "_observed": {}, "_coefficient": None, "_norm": None}
        return super().__getstate__() | own  # nothing is observed in a copy
