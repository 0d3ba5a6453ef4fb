"""AdaScale: each update's learning rate is the schedule's times the gain of its batch, and time runs as fast as that.

Johnson, Agrawal, Gu and Guestrin 2020 (AdaScale SGD), algorithm 1. An update at scale N / B0 makes as much progress as
r_t updates at the base batch size B0, so its rate is r_t times theirs and the schedule goes on by r_t of their updates:

    r_t = (S/B0 + |G|^2) / (S/N + |G|^2)            eta_t = r_t lr(floor(tau_t))            tau_{t+1} = tau_t + r_t
"""

import math
from collections.abc import Mapping
from typing import Any, Literal

import torch
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler, ReduceLROnPlateau

from macrobatch.batch_tradeoff import gain
from macrobatch.moment_average import moments_of
from macrobatch.moments import GradientMoments
from macrobatch.report import Report

PAPER_LEAST_VARIANCE = 1e-6
PAPER_MEMORY = 1000  # base batches that the paper's averages reach back

SINGLE = (
    "AdaScale compares micro-batches, and this window of {samples:.0f} samples has one: cut it into more (a smaller "
    "micro_batch_size)"
)


class AdaScale:
    """Sets the learning rate of each update to the schedule's times the gain, which it estimates on the way.

    `optimizer`: its rates are those that are right at `base_batch_size` samples. `scheduler`: any torch scheduler of
    that optimizer, made for updates at the base batch size; AdaScale steps it, floor(tau) times in all, nobody else.
    `clamp`: "average" keeps the averages of variance and squared mean from going below zero, "window" each window's
    own values, as in the paper, which overestimates |G|^2 where noise dominates. `memory`: base batches that averages
    reach back. Meant for SGD, with or without momentum, which stays as it is; other optimizers are a ValueError.
    """

    def __init__(
        self,
        optimizer: Optimizer,
        *,
        base_batch_size: int,
        scheduler: LRScheduler | None = None,
        clamp: Literal["average", "window"] = "average",
        memory: float = PAPER_MEMORY,
    ) -> None:
        _check(optimizer, base_batch_size, scheduler, clamp, memory)
        self.base_batch_size = base_batch_size
        self.gain = 1.0  # of the update that comes
        self.base_updates = 0.0  # tau: updates at the base batch size that those before it were worth
        self._optimizer, self._scheduler = optimizer, scheduler
        self._clamp, self._memory = clamp, memory
        self._scheduler_steps = 0
        self._set_rates: list[float] | None = None  # what the groups have been given
        self._base_rates: list[float] = []  # what the schedule says
        self._count = 0
        self._variance, self._squared_mean = 0.0, 0.0  # averages over windows

    def step(self, report: Report | GradientMoments) -> float:
        """Every group's lr is the schedule's times this window's gain, which is returned. Before `apply_update`.

        The gain comes from the windows before, so that it does not depend on this window's noise; the first is 1, or
        N / B0 for a window smaller than the base. A window that is not finite, or without terms, moves nothing.
        One host sync. ValueError where the first windows are single micro-batches larger than the base, or where
        another hand changed the rates since.
        """
        moments = moments_of(report, "AdaScale")
        read = [moments.num_micro_batches, moments.mean_squared_norm, moments.weighted_inverse_size]
        count, norms, inverse, variance, squared_mean = torch.stack(
            [each.double() for each in (*read, moments.variance, moments.squared_mean)]
        ).tolist()
        if count == 0 or not math.isfinite(norms + inverse):
            return self.gain
        samples = 1 / inverse
        scale = samples / self.base_batch_size
        if count == 1 and scale > 1 + 1e-9 and not self._count:
            raise ValueError(SINGLE.format(samples=samples))
        self._follow_schedule()
        self.gain = self._gain(samples)
        self._give([rate * self.gain for rate in self._base_rates])
        self.base_updates += self.gain
        if count > 1:
            self._average(variance, squared_mean, scale)
        return self.gain

    def _gain(self, samples: float) -> float:
        scale = samples / self.base_batch_size
        if not self._count or self._variance <= 0:
            return min(1.0, scale)
        squared_mean = max(self._squared_mean, 0.0)
        noise_scale = self._variance / squared_mean if squared_mean else math.inf
        return gain(noise_scale, self.base_batch_size, samples)

    def _average(self, variance: float, squared_mean: float, scale: float) -> None:
        if self._clamp == "window":
            variance, squared_mean = max(variance, PAPER_LEAST_VARIANCE), max(squared_mean, 0.0)
        self._count += 1
        share = max(1 / self._count, min(scale / self._memory, 1.0))  # a plain mean, until the memory is full
        self._variance += share * (variance - self._variance)
        self._squared_mean += share * (squared_mean - self._squared_mean)

    def _follow_schedule(self) -> None:
        """The groups have the schedule's rates at floor(tau)."""
        rates = _rates(self._optimizer)
        if self._set_rates is not None:
            if rates != self._set_rates:
                raise ValueError(
                    f"the learning rates are {rates}, and AdaScale had set {self._set_rates}: give it the scheduler "
                    "(AdaScale(..., scheduler=)) and do not step that yourself; to change base rates, call rebase()"
                )
            self._give(self._base_rates)
        while self._scheduler is not None and self._scheduler_steps < math.floor(self.base_updates):
            self._scheduler.step()
            self._scheduler_steps += 1
        self._base_rates = _rates(self._optimizer)

    def rebase(self) -> None:
        """The groups have the schedule's own rates, without the gain, so that they may be changed; until `step`."""
        if self._set_rates is not None:
            self._give(self._base_rates)
            self._set_rates = None

    def _give(self, rates: list[float]) -> None:
        for group, rate in zip(self._optimizer.param_groups, rates, strict=True):
            if isinstance(group["lr"], torch.Tensor):
                group["lr"].fill_(rate)
            else:
                group["lr"] = rate
        self._set_rates = _rates(self._optimizer)

    def state_dict(self) -> dict[str, Any]:
        """What goes on after a checkpoint, as plain numbers; optimizer and scheduler keep their own."""
        return {name: _copied(getattr(self, name)) for name in _STATE}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on as the one did whose state this is. ValueError if that was another kind of state."""
        if set(state) != set(_STATE):
            raise ValueError(f"AdaScale's state holds {sorted(_STATE)}, this one {sorted(state)}")
        if state["base_batch_size"] != self.base_batch_size:
            raise ValueError(
                f"the state belongs to base_batch_size={state['base_batch_size']}, this one has {self.base_batch_size}"
            )
        for name in _STATE:
            setattr(self, name, _copied(state[name]))


_STATE = (
    *("base_batch_size", "gain", "base_updates", "_scheduler_steps", "_set_rates", "_base_rates"),
    *("_count", "_variance", "_squared_mean"),
)


def _copied(value: Any) -> Any:
    return list(value) if isinstance(value, list) else value


def _rates(optimizer: Optimizer) -> list[float]:
    return [float(group["lr"]) for group in optimizer.param_groups]


def _check(
    optimizer: Optimizer, base_batch_size: float, scheduler: LRScheduler | None, clamp: str, memory: float
) -> None:
    if not isinstance(optimizer, torch.optim.SGD):
        raise ValueError(
            f"AdaScale's gain is that of SGD steps, got {type(optimizer).__name__}: for the Adam family scale "
            "hyperparameters by a rule, or use InvariantAdamW"
        )
    if not base_batch_size > 0:
        raise ValueError(
            f"base_batch_size must be the number of samples that the rates were made for, got {base_batch_size}"
        )
    if scheduler is not None and scheduler.optimizer is not optimizer:
        raise ValueError("the scheduler belongs to another optimizer: make it for the one given to AdaScale")
    if isinstance(scheduler, ReduceLROnPlateau):
        raise ValueError(
            "AdaScale steps its scheduler by updates alone, and a ReduceLROnPlateau needs a loss for each step: give "
            "another scheduler, or step it yourself, between rebase() and the next step()"
        )
    if clamp not in ("average", "window"):
        raise ValueError(f"clamp must be 'average' or 'window', got {clamp!r}")
    if not memory > 0:
        raise ValueError(f"memory must be a positive number of base batches, got {memory}")
