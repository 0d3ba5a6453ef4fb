"""The gradient that each backward begins with, and what is left to multiply at the end of the window.

    seed = multiplier * unit                      # unit: what one loss term counts for, the same on every rank
    p.grad = sum_j seed_j d loss_j / dp           # in the window
    p.grad *= 1 / (unit * total)                  # at its end; the total over all micro-batches and ranks

The unit is a power of two near 1 / (terms in a micro-batch): exact in any dtype, and it keeps float16 in range. For a
mean over samples whose number is known beforehand it is 1 / total, which leaves nothing to multiply.
"""

import math
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from macrobatch.distributed import Ranks
from macrobatch.gradients import LOW_PRECISION
from macrobatch.sums import ratio
from macrobatch.tally import denominator
from macrobatch.unscaling import Unscaler
from macrobatch.weighting import Count, Terms


@dataclass
class Learned:
    """What the first windows of an accumulator told about the loss."""

    # Of sums and metrics, over all ranks: of windows with gradients, and of those without.
    names: dict[bool, tuple[str, ...]] = field(default_factory=dict)
    exponent: int | None = None  # the unit is 2**-exponent, the same on every rank
    has_run: bool = False  # whether a window went through `run`: the first one is looked at more closely
    has_warned: bool = False  # of a loss that is almost surely not what it counts as
    knows_leaves: bool = False  # whether a loss graph was searched for trainable tensors outside of the model


class Seeds:
    """The seeds of one window, from the first backward on."""

    def __init__(self, learned: Learned, ranks: Ranks, unscaler: Unscaler) -> None:
        self._learned = learned
        self._ranks = ranks
        self._unscaler = unscaler
        self._num_samples = 0  # of the effective batch, where known beforehand
        self._counts: dict[str, Count] | None = None
        self._num_micro_batches = 1.0
        self._unit = 0.0
        self._made: dict[Any, Tensor] = {}
        self._next_exponent: int | None = None

    def know_samples(self, num_samples: int) -> None:
        """The effective batch will have `num_samples` samples."""
        self._num_samples = num_samples

    def know_counts(self, counts: dict[str, Count], num_micro_batches: int) -> None:
        """Every sum has its denominator already: each seed divides by it, but for a common power of two."""
        self._counts = counts
        self._num_micro_batches = 2.0 ** round(math.log2(max(num_micro_batches, 1)))

    def agree(self, weight: Count | None) -> None:
        """The exponent is known, on all ranks alike; `weight`: the terms of this rank's first micro-batch."""
        if self._learned.exponent is None:
            size = 1.0 if weight is None else float(weight)  # the one read of a weight
            exponent = round(math.log2(max(size, 1.0)))
            self._learned.exponent = int(self._ranks.maximum(torch.tensor(exponent)))

    def of(self, name: str, terms: Terms) -> Tensor:
        """The seed for one of the losses of a micro-batch: shape (), in its dtype, times the loss scale."""
        loss_sum = terms.sums[name]
        key = (name, terms.multiplier, loss_sum.dtype, loss_sum.device)
        seed = self._made.get(key)
        if seed is None:
            if loss_sum.is_complex():
                raise ValueError(f"the {name} is complex, {loss_sum.dtype}: return a real number, such as {name}.real")
            value = self._value(name, terms)
            if not isinstance(value, Tensor):
                value = torch.scalar_tensor(value, dtype=loss_sum.dtype, device=loss_sum.device)
            seed = self._unscaler.scale(value.to(loss_sum))
            self._made[key] = seed
        return seed

    def _value(self, name: str, terms: Terms) -> float | Tensor:
        if self._counts is not None:
            return ratio(self._num_micro_batches, denominator(name, self._counts))
        if not self._unit:
            assert self._learned.exponent is not None
            # In low precision only a power of two keeps the seed exact.
            divides = terms.is_mean and self._num_samples and terms.sums[name].dtype not in LOW_PRECISION
            self._unit = 1 / self._num_samples if divides else 2.0**-self._learned.exponent
        return terms.multiplier * self._unit

    def factor(self, share: int, weight: Count) -> float | Tensor:
        """What turns a gradient times its seed, times `share`, into that of the mean over `weight` terms."""
        if self._counts is not None:
            return share / self._num_micro_batches
        assert self._learned.exponent is not None
        unit = self._unit or 2.0**-self._learned.exponent  # a rank that had no backward reduces what the others had
        return ratio(share / unit, weight)

    def relearn(self, weight: float, num_micro_batches: int) -> None:
        """The next window's seed fits a typical micro-batch; the first of all may have been masked almost wholly."""
        if not self._made:
            return  # no backward: a window that was evaluated tells nothing of those that train
        if self._counts is None and weight > 0 and math.isfinite(weight) and self._learned.exponent is not None:
            self._next_exponent = round(math.log2(max(weight / num_micro_batches, 1.0)))

    def window_ended(self) -> None:
        """What was relearned counts from now on."""
        if self._next_exponent is not None:
            self._learned.exponent = self._next_exponent
