"""Batch normalisation in parts: every part of a batch is normalised with the mean and variance of all parts together.

For part k with x_k of shape (N_k, C, ...), n = the elements per channel of all parts:

    mu    = mu_0 + sum_k n_k (mu_k - mu_0) / n                                   law of total variance
    M     = sum_k M_k + sum_k n_k (mu_k - mu)^2                                  never E[x^2] - mu^2
    y_k   = w (x_k - mu) r + b                r = 1 / sqrt(M / n + eps)
    dL/db = sum_k s_k,  s_k = sum dL/dy_k        dL/dw = sum_k t_k,  t_k = sum dL/dy_k (x_k - mu) r
    dL/dx_k = w r (dL/dy_k - s / n - (x_k - mu) r t / n)        s, t: summed over all parts

So parts only need each other's (n_k, mu_k, M_k) on the way forward and (s_k, t_k) on the way back. In the autograd
graph `Arrive` leads from x_k to a token of shape (), `Join` from all tokens to as many, and `Normalise` from a token to
y_k: backward cannot reach any `Arrive` before every `Normalise` has given its sums. mu is kept as the sum of a rounded
number and a small rest, and x - mu computed in two steps: in float32 at mu / std = 10^4 that keeps all digits.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from macrobatch.distributed import Ranks
from macrobatch.gradients import LOW_PRECISION

Put = Callable[[Tensor], Any]
Get = Callable[[Any], Tensor]


@dataclass(frozen=True)
class Moments:
    """How many elements per channel, shape (); their mean and their summed squared deviations from it, shape (C,)."""

    count: Tensor
    mean: Tensor
    deviations: Tensor


def moments_of(x: Tensor) -> Moments:
    """The moments of x: (N, C, ...), in float64 where the device has it. Two passes, about a value near the mean."""
    wide = torch.float32 if x.dtype in LOW_PRECISION else x.dtype
    exact = exact_dtype(x.device)
    pivot = x[0].to(wide).flatten(1).mean(1) if x.ndim > 2 else x[0].to(wide)
    shifted = x.to(wide) - per_channel(pivot, x)
    if x.device.type == "cpu":  # four times as fast there as var_mean over all dimensions but one
        mean, variance = torch.batch_norm_update_stats(shifted, None, None, 0.0)
    else:
        variance, mean = torch.var_mean(shifted, _all_but_channels(x), correction=0)
    count = x.numel() // x.shape[1]
    return Moments(
        torch.tensor(count, dtype=exact, device=x.device), pivot.to(exact) + mean.to(exact), variance.to(exact) * count
    )


def merged(parts: Sequence[Moments]) -> Moments:
    """The moments of all parts together: law of total variance, about the first part's mean."""
    count = torch.stack([part.count for part in parts])  # (K,)
    means = torch.stack([part.mean for part in parts])  # (K, C)
    total = count.sum()
    mean = means[0] + (count[:, None] * (means - means[0])).sum(0) / total
    within = torch.stack([part.deviations for part in parts]).sum(0)
    return Moments(total, mean, within + (count[:, None] * (means - mean) ** 2).sum(0))


def merged_over_ranks(own: Moments, ranks: Ranks) -> Moments:
    """The moments of all ranks' parts together; one sum over ranks, of 2 C + 1 numbers for each rank."""
    if ranks.size == 1:
        return own
    rows = torch.zeros(ranks.size, 1 + 2 * len(own.mean), dtype=own.mean.dtype, device=own.mean.device)
    rows[ranks.rank] = torch.cat([own.count[None], own.mean, own.deviations])
    return merged([Moments(row[0], *row[1:].chunk(2)) for row in ranks.sum(rows)])


def update_running(
    running_mean: Tensor | None, running_var: Tensor | None, moments: Moments, momentum: float | Tensor
) -> None:
    """One step of the running statistics, as torch makes it for a batch with these moments; the variance unbiased."""
    unbiased = moments.deviations / (moments.count - 1)
    for running, now in ((running_mean, moments.mean), (running_var, unbiased)):
        if running is not None:
            with torch.no_grad():
                running.copy_((1 - momentum) * running.to(now.dtype) + momentum * now)


class Part:
    """One part's way through one normalisation: what it gives to the others, and what it gets from them."""

    def __init__(self, x: Tensor, put: Put, get: Get) -> None:
        self.moments = moments_of(x.detach())
        self.put, self.get = put, get
        self.statistics: Statistics | None = None
        self.sums: tuple[Tensor, Tensor] | None = None  # s_k, t_k
        self.output_gradient: Any = None  # dL/dy_k, put away until the sums of all are known
        self.all_sums: tuple[Tensor, Tensor] | None = None  # s, t


@dataclass(frozen=True)
class Statistics:
    """Of all parts: mu as `high` (in the dtype of the computation) + `low`, and r; each of shape (C,). n: shape ()."""

    high: Tensor
    low: Tensor
    inverse_std: Tensor
    count: Tensor

    @classmethod
    def of(cls, moments: Moments, eps: float, dtype: torch.dtype) -> "Statistics":
        """In `dtype`, from moments in float64."""
        high = moments.mean.to(dtype)
        low = (moments.mean - high.to(moments.mean.dtype)).to(dtype)
        r = (moments.deviations / moments.count + eps).rsqrt().to(dtype)
        return cls(high, low, r, moments.count.to(dtype))

    def centred(self, x: Tensor) -> Tensor:
        """X - mu but for `low`, a new tensor in the dtype of the computation."""
        return x.to(self.high.dtype) - per_channel(self.high, x)


def normalise_together(parts: Sequence[Part], moments: Moments, eps: float, dtype: torch.dtype) -> None:
    """Each part knows the statistics of all."""
    statistics = Statistics.of(moments, eps, torch.float32 if dtype in LOW_PRECISION else dtype)
    for part in parts:
        part.statistics = statistics


class Arrive(torch.autograd.Function):
    """x_k to a token of shape (); backward, when the sums of all parts are known, gives dL/dx_k."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor | None, part: Part) -> Tensor:
        """x: (N_k, C, ...); weight: (C,), not differentiated here."""
        ctx.save_for_backward(x, weight)
        ctx.part = part
        return torch.zeros((), device=x.device)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, _: Tensor) -> tuple[Tensor | None, None, None]:
        """dL/dx_k = w r (dL/dy_k - s / n - (x_k - mu) r t / n), constants first: one number per channel each."""
        part, statistics = ctx.part, ctx.part.statistics
        if part.all_sums is None:
            return None, None, None
        x, weight = ctx.saved_tensors
        s, t = part.all_sums
        r, n = statistics.inverse_std, statistics.count
        scale = r if weight is None else r * weight.to(r.dtype)
        slope = -scale * r * t / n
        constant = -scale * s / n - slope * statistics.low
        gradient = statistics.centred(x).mul_(per_channel(slope, x)).add_(per_channel(constant, x))
        if part.output_gradient is not None:
            gradient.addcmul_(part.get(part.output_gradient).to(r.dtype), per_channel(scale, x))
            part.output_gradient = None
        return gradient.to(x.dtype), None, None


class Join(torch.autograd.Function):
    """All parts' tokens to as many; backward sums what the parts have given, over ranks too.

    `chain` and its successor string the normalisations of a pass up, so that every rank sums them in the same order.
    """

    @staticmethod
    def forward(
        ctx: Any, parts: Sequence[Part], ranks: Ranks, check: Callable[[], None], chain: Tensor, *tokens: Tensor
    ) -> tuple[Tensor, ...]:
        """chain: shape (); tokens: K of shape (). `check` is called before backward sums anything, and may raise."""
        ctx.parts, ctx.ranks, ctx.check = parts, ranks, check
        return chain.clone(), *(token.clone() for token in tokens)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        """Every `Normalise` that the loss depends on has been here before."""
        ctx.check()
        like = ctx.parts[0].statistics.high
        given = [torch.stack([*part.sums, torch.ones_like(like)]) for part in ctx.parts if part.sums is not None]
        s, t, times = ctx.ranks.sum(torch.stack(given or [like.new_zeros(3, len(like))]).sum(0)).unbind()
        if not given and not (ctx.ranks.size > 1 and bool(times[0])):
            return (None,) * 3 + (None,) * len(gradients)  # only the chain led here: no loss depends on this
        for part in ctx.parts:
            part.all_sums, part.sums = (s, t), None
        return None, None, None, *gradients


class Normalise(torch.autograd.Function):
    """A token to y_k = w (x_k - mu) r + b; backward gives s_k and t_k."""

    @staticmethod
    def forward(ctx: Any, token: Tensor, weight: Tensor | None, bias: Tensor | None, x: Tensor, part: Part) -> Tensor:
        """x: (N_k, C, ...), detached: its gradient takes the way through `Arrive`."""
        statistics = part.statistics
        assert statistics is not None
        ctx.save_for_backward(x)
        ctx.part = part
        ctx.dtypes = tuple(None if p is None else p.dtype for p in (weight, bias))
        r = statistics.inverse_std
        scale = r if weight is None else r * weight.to(r.dtype)
        constant = -statistics.low * scale
        if bias is not None:
            constant = constant + bias.to(r.dtype)
        y = statistics.centred(x).mul_(per_channel(scale, x)).add_(per_channel(constant, x))
        return y.to(x.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, output_gradient: Tensor) -> tuple[Tensor | None, ...]:
        """Sums over the part, in the dtype of the computation."""
        (x,) = ctx.saved_tensors
        part, statistics, dims = ctx.part, ctx.part.statistics, _all_but_channels(x)
        wide = output_gradient.to(statistics.high.dtype)
        s = wide.sum(dims)
        t = (statistics.centred(x).mul_(wide).sum(dims) - statistics.low * s) * statistics.inverse_std
        if ctx.needs_input_grad[0]:
            part.sums = s, t
            part.output_gradient = part.put(output_gradient)
        of_weight, of_bias = (
            sums.to(dtype) if needed else None
            for sums, dtype, needed in zip((t, s), ctx.dtypes, ctx.needs_input_grad[1:3], strict=True)
        )
        return torch.zeros((), device=x.device), of_weight, of_bias, None, None


def per_channel(values: Tensor, x: Tensor) -> Tensor:
    """`values`, of shape (C,), so that they broadcast over x: (N, C, ...)."""
    return values.view(1, -1, *[1] * (x.ndim - 2))


def _all_but_channels(x: Tensor) -> list[int]:
    return [d for d in range(x.ndim) if d != 1]


def exact_dtype(device: torch.device) -> torch.dtype:
    """In which statistics are merged: float64, where the device has it."""
    return torch.float32 if device.type == "mps" else torch.float64
