"""What the micro-batches' own gradients tell, measured before they add up: their norms, their mean of squares.

Every micro-batch's gradient stands alone in `p.grad` until it was measured; so one more copy of the gradients is kept.
"""

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor

from macrobatch.devices import is_cuda
from macrobatch.distributed import Ranks
from macrobatch.gradients import norm_of
from macrobatch.moments import GradientMoments
from macrobatch.sums import as_scalar, ratio
from macrobatch.weighting import Count, known

Measure = Literal["norms", "squares"]
Gradients = Sequence[Tensor | None]


def check_measure(measure: Measure | None) -> Measure | None:
    """`measure`, or a ValueError."""
    if measure not in (None, "norms", "squares"):
        raise ValueError(f"measure must be 'norms', 'squares' or None, got {measure!r}")
    return measure


class Measurement:
    """One window's micro-batch gradients r_j, as they come out of backward: of a sum over terms, times a common seed.

    Afterwards h_j = f r_j is what micro-batch j contributes to the window's gradient, w_j = W_j / sum(W) its share of
    the loss, and g_j = h_j / w_j its mean gradient.
    """

    def __init__(self, measure: Measure, ranks: Ranks, device: torch.device) -> None:
        self._ranks = ranks
        self._device = device
        self._with_squares = measure == "squares"
        self.restart()

    def restart(self) -> None:
        """Nothing has been measured yet."""
        self._norms: list[Count] = []  # ||r_j||
        self._weights: list[Count] = []  # W_j
        self._sizes: list[int] = []  # n_j
        self._squares: list[Tensor | None] = []  # sum_j |r_j|^2 / W_j, parameter by parameter

    def add(self, gradients: Gradients, weight: Count, num_samples: int) -> None:
        """The gradients of one micro-batch of `weight` loss terms and `num_samples` samples are measured."""
        norm = norm_of(gradients)
        # On the CPU a number is read without waiting, and spares the heap a small tensor between large ones.
        self._norms.append(norm.item() if norm.is_cpu else norm)
        self._weights.append(weight)
        self._sizes.append(num_samples)
        if self._with_squares and known(weight) != 0:
            self._add_squares(gradients, weight)

    def _add_squares(self, gradients: Gradients, weight: Count) -> None:
        sums = self._squares or [None] * len(gradients)
        share = ratio(1.0, weight)
        for j, g in enumerate(gradients):
            if g is not None:
                square = _squared(g.to_dense() if g.is_sparse else g).mul_(share)
                total = sums[j]
                sums[j] = square if total is None else total.add_(square)
        self._squares = sums

    def moments(self, factor: float | Tensor, loss_scale: Tensor, gradients: Gradients) -> GradientMoments:
        """The window's moments; `factor` / `loss_scale` turns r_j into h_j; `gradients`: the window's, in the end."""
        if not self._sizes:  # a rank without micro-batches
            own = weights = torch.zeros(0, dtype=torch.float64, device=self._device)
        else:
            own, weights = (self._column(column) for column in (self._norms, self._weights))
        total = self._ranks.sum(weights.sum())
        has_terms = weights > 0
        w = (weights / total).where(has_terms, 0.0)
        n = self._moved(torch.tensor(self._sizes, dtype=torch.float64))
        h = own * self._unit(factor, loss_scale)
        q = (h / w).square().where(has_terms, 0.0)
        sums = self._ranks.sum(torch.stack([has_terms.sum(), (w * q).sum(), (w / n).sum(), (w * w / n).sum()]))
        return GradientMoments(sums[0], sums[1], norm_of(gradients).to(total).square(), sums[2], sums[3], q)

    def mean_squares(
        self, factor: float | Tensor, loss_scale: Tensor, gradients: Gradients
    ) -> tuple[Tensor | None, ...] | None:
        """sum_j w_j |g_j|^2 over all ranks, elementwise, parameter by parameter; None where there is no gradient."""
        if not self._with_squares:
            return None
        weights = self._column(self._weights) if self._sizes else torch.zeros(1, dtype=torch.float64)
        total = self._ranks.sum(weights.to(self._device).sum())
        scale = self._unit(factor, loss_scale).square() * total  # h_j^2 / w_j = f^2 r_j^2 sum(W) / W_j
        own = self._squares or [None] * len(gradients)
        sums = [self._summed(mine, g) for mine, g in zip(own, gradients, strict=True)]
        self._squares = []
        return tuple(None if total is None else total.mul_(scale.to(total.device)) for total in sums)

    def _summed(self, mine: Tensor | None, gradient: Tensor | None) -> Tensor | None:
        """Summed over ranks; every rank has the window's gradient, though perhaps no micro-batch that reached it."""
        if gradient is None:
            return None
        dtype = gradient.dtype.to_real()
        zeros = torch.zeros(gradient.shape, dtype=dtype, device=gradient.device)
        return self._ranks.sum(zeros if mine is None else mine)

    def _column(self, values: Sequence[Count]) -> Tensor:
        if any(isinstance(value, Tensor) for value in values):
            return torch.stack([as_scalar(v, self._device).to(self._device).double() for v in values])
        return self._moved(torch.tensor(values, dtype=torch.float64))

    def _moved(self, values: Tensor) -> Tensor:
        """On the device, without waiting for it: a plain copy from the host would."""
        return values.pin_memory().to(self._device, non_blocking=True) if is_cuda(self._device) else values

    def _unit(self, factor: float | Tensor, loss_scale: Tensor) -> Tensor:
        return as_scalar(factor, self._device).double() / loss_scale.to(self._device).double()


def _squared(gradient: Tensor) -> Tensor:
    """|g|^2, elementwise: a real number for a complex one, too."""
    return torch.view_as_real(gradient).square().sum(-1) if gradient.is_complex() else gradient.square()
