"""The gradient noise scale from the micro-batches of each window: without bias, over unequal sizes, with its interval.

Bn = S / |G|^2, where S is the trace of the covariance of one sample's gradient and G the true gradient (McCandlish et
al. 2018, B_simple). Numerator and denominator are averaged apart and divided once: the mean of each window's own ratio
has another limit, which may even be negative.
"""

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from statistics import NormalDist
from typing import Any

import numpy as np

from macrobatch import batch_tradeoff
from macrobatch.batch_tradeoff import FastestBatch, Tradeoff, counted, in_samples
from macrobatch.moment_average import MomentAverage, is_single, moments_of
from macrobatch.moments import GradientMoments
from macrobatch.per_example import per_example_moments
from macrobatch.report import Report
from macrobatch.structure import Nested

FEWEST_BLOCKS = 4  # below, no interval is honest

SINGLE = (
    "a window of one micro-batch has no variance: cut the effective batch into more (a smaller micro_batch_size), or "
    "measure example by example with observe_examples(model, loss_fn, batch)"
)


@dataclass(frozen=True)
class NoiseEstimate:
    """The gradient noise scale, and how well it is known.

    `noise_scale`: S / |G|^2, samples; infinite where no gradient was seen above the noise. `low`, `high`: the interval
    that covers it with probability `confidence`. `variance`: S. `squared_mean`: |G|^2, negative where noise hides it.
    `num_windows`: windows that count. `autocorrelation`: of successive blocks of windows; above zero they repeat one
    another, and the interval is made wider where that is more than chance.
    """

    noise_scale: float
    low: float
    high: float
    confidence: float
    variance: float
    squared_mean: float
    num_windows: int
    autocorrelation: float

    @property
    def words(self) -> str:
        """What was measured, in a sentence or two, with what it is not."""
        interval = f"between {in_samples(self.low)} and {counted(self.high)}"
        if math.isinf(self.high):
            interval = f"at least {counted(self.low)}" if self.low else "unknown"
        scale = f"The gradient noise scale is {interval} ({self.confidence:.0%}, {counted(self.num_windows, 'window')})"
        if math.isfinite(self.noise_scale):
            scale += f", best guess {in_samples(self.noise_scale)}"
        return (
            f"{scale}. An effective batch of that size takes twice the fewest updates and twice the fewest samples, if "
            "the loss is curved alike in all directions; for language models it was measured to be far too low: read "
            "its trend, and the comparison of batch sizes, not the number."
        )


class GradientNoiseScale:
    """Watches windows and knows the gradient noise scale, its interval, and which effective batch pays.

    `observe(report)` takes each window of `Accumulator(..., measure="norms")`. `half_life`: after how many windows one
    counts half; None: all count alike. Nothing waits for the device until something is read (or 256 windows passed).
    """

    def __init__(self, *, half_life: float | None = 100) -> None:
        if half_life is not None and not 1 <= half_life < math.inf:
            raise ValueError(f"half_life must be a number of windows, at least 1, or None for ever, got {half_life}")
        self.half_life = half_life
        self._average = MomentAverage(half_life)
        self._saw_several = False

    def observe(self, report: Report | GradientMoments) -> None:
        """The window counts. ValueError if nothing but windows of one micro-batch came, or norms were not measured."""
        moments = moments_of(report, "GradientNoiseScale")
        if is_single(report) and not self._saw_several:
            raise ValueError(SINGLE)
        self._saw_several = True
        self._average.add(moments)

    def observe_examples(
        self, model: Any, loss_fn: Callable[[Any, Any], Any], batch: Nested, *, micro_batch_size: int = 8
    ) -> GradientMoments:
        """The batch counts as a window of one-sample micro-batches; see `per_example_moments`. For K = 1."""
        moments = per_example_moments(model, loss_fn, batch, micro_batch_size=micro_batch_size)
        self.observe(moments)
        return moments

    def estimate(self, confidence: float = 0.95) -> NoiseEstimate:
        """What is known by now (a host sync). ValueError before the first window of several micro-batches."""
        if not 0 < confidence < 1:
            raise ValueError(f"confidence must lie between 0 and 1, got {confidence}")
        blocks = self._average.blocks()
        between, freedom, squares, samples, count = blocks.sum(0) if len(blocks) else np.zeros(5)
        if count == 0:
            ignored = self._average.num_ignored
            left_out = f" ({ignored} without terms, or not finite)" if ignored else ""
            raise ValueError(f"no window was observed yet{left_out}: call observe(report) for each")
        if freedom < 1e-6 * count:
            raise ValueError(SINGLE)
        variance = between / freedom
        squared_mean = (squares - variance * count) / samples
        signal = squared_mean / variance if variance > 0 else math.inf  # |G|^2 / S, whose denominator is well known
        error, autocorrelation = _error_of_signal(blocks, confidence)
        return NoiseEstimate(
            noise_scale=_inverse(signal),
            low=_inverse(signal + error),
            high=_inverse(signal - error),
            confidence=confidence,
            variance=float(variance),
            squared_mean=float(squared_mean),
            num_windows=self._average.num_windows,
            autocorrelation=autocorrelation,
        )

    @property
    def noise_scale(self) -> float:
        """S / |G|^2 in samples; infinite where no gradient was seen above the noise (a host sync)."""
        return self.estimate().noise_scale

    @property
    def critical_batch_size(self) -> float:
        """The batch that takes twice the fewest updates and samples: the noise scale, where curvature is isotropic."""
        return self.noise_scale

    def gain(self, from_batch_size: float, to_batch_size: float) -> float:
        """How many updates at the one size an update at the other is worth."""
        return batch_tradeoff.gain(self.noise_scale, from_batch_size, to_batch_size)

    def efficiency(self, from_batch_size: float, to_batch_size: float) -> float:
        """The progress that a sample makes at the second size, over that at the first."""
        return batch_tradeoff.efficiency(self.noise_scale, from_batch_size, to_batch_size)

    def tradeoff(self, batch_sizes: Iterable[float]) -> tuple[Tradeoff, ...]:
        """Updates and samples that training takes at each size, as multiples of the fewest."""
        return batch_tradeoff.tradeoff(self.noise_scale, batch_sizes)

    def fastest_batch_size(
        self, *, seconds_per_sample: float, seconds_per_update: float, largest_micro_batch: int
    ) -> FastestBatch:
        """The effective batch that trains fastest on this machine, with its verdict in words; see `batch_tradeoff`."""
        known = self.estimate()
        return batch_tradeoff.fastest_batch_size(
            known.noise_scale,
            seconds_per_sample=seconds_per_sample,
            seconds_per_update=seconds_per_update,
            largest_micro_batch=largest_micro_batch,
            low=known.low,
            high=known.high,
        )

    def state_dict(self) -> dict[str, Any]:
        """What was seen, as plain numbers (a host sync)."""
        return {"half_life": self.half_life, "saw_several": self._saw_several, "average": self._average.state_dict()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on as the one did whose state this is. ValueError if it forgot at another pace."""
        if state["half_life"] != self.half_life:
            raise ValueError(f"the state was kept with half_life={state['half_life']}, this one has {self.half_life}")
        self._saw_several = state["saw_several"]
        self._average.load_state_dict(state["average"])


def _inverse(signal: float) -> float:
    return math.inf if signal <= 0 else 0.0 if math.isinf(signal) else float(1 / signal)


def _error_of_signal(blocks: np.ndarray, confidence: float) -> tuple[float, float]:
    """Half the width of the interval of |G|^2 / S, infinite for too few blocks, and the blocks' autocorrelation.

    The delta method: f(sum of x) has the influence grad f . x_b from block b, and these are independent from block to
    block as far as samples are drawn afresh; successive ones that are alike, beyond chance, widen the interval by
    (1 + r) / (1 - r), the variance of the mean of a first-order autoregression.
    """
    a, d, q, n, c = blocks.sum(0)
    weights = blocks[:, 4]
    effective = weights.sum() ** 2 / (weights**2).sum()
    if effective < FEWEST_BLOCKS or a <= 0:
        return (0.0 if a <= 0 else math.inf), 0.0
    # f = q d / (n a) - c / n
    slope = np.array([-q * d / (n * a * a), q / (n * a), d / (n * a), -q * d / (n * n * a) + c / (n * n), -1 / n])
    influence = blocks @ slope
    total = float((influence**2).sum())
    r = float((influence[1:] * influence[:-1]).sum() / total) if total else 0.0
    variance = total * effective / (effective - 1)
    if r > 2 / math.sqrt(effective):
        variance *= (1 + min(r, 0.9)) / (1 - min(r, 0.9))
    return _student(confidence, effective - 1) * math.sqrt(variance), r


def _student(confidence: float, freedom: float) -> float:
    """Student's t quantile that `confidence` lies within, by Fisher's expansion: 0.7% low at 3 degrees of freedom."""
    z = NormalDist().inv_cdf((1 + confidence) / 2)
    return (
        z
        + (z**3 + z) / (4 * freedom)
        + (5 * z**5 + 16 * z**3 + 3 * z) / (96 * freedom**2)
        + (3 * z**7 + 19 * z**5 + 17 * z**3 - 15 * z) / (384 * freedom**3)
    )
