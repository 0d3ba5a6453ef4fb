"""What a larger effective batch buys, as pure functions of the gradient noise scale: updates, samples, time, gain.

At batch size B an update makes 1 / (1 + Bn/B) of the progress that it would make without noise (McCandlish et al. 2018,
eq. 2.7), where Bn = tr(Sigma) / |G|^2 is the noise scale. Everything here follows from that one ratio.
"""

import math
from collections.abc import Iterable
from dataclasses import dataclass


def gain(noise_scale: float, from_batch_size: float, to_batch_size: float) -> float:
    """How many updates at `from_batch_size` one update at `to_batch_size` is worth, between 1 and their ratio.

    (B/B0) (Bn + B0) / (Bn + B), with B0 and B the two sizes: AdaScale's gain (Johnson et al. 2020, eq. 3), the ratio
    of the best learning rates (McCandlish et al. 2018, eq. 2.6) and (B/B0) times Pollux's efficiency (Qiao et al.
    2021, eq. 7) are this one formula. `noise_scale` may be infinite. ValueError for sizes or scales below zero.

    >>> gain(100.0, 10, 1000)
    10.0
    """
    ratio = _size(to_batch_size) / _size(from_batch_size)
    return ratio * efficiency(noise_scale, from_batch_size, to_batch_size)


def efficiency(noise_scale: float, from_batch_size: float, to_batch_size: float) -> float:
    """The progress that a sample makes at `to_batch_size`, over that at `from_batch_size`: (Bn + B0) / (Bn + B).

    Qiao et al. 2021 (Pollux), eq. 7. ValueError for sizes or scales below zero.
    """
    start, goal = _size(from_batch_size), _size(to_batch_size)
    _check_scale(noise_scale, "noise_scale")
    return 1.0 if math.isinf(noise_scale) else (noise_scale + start) / (noise_scale + goal)


@dataclass(frozen=True)
class Tradeoff:
    """At `batch_size`: `updates` and `samples` that training takes, as multiples of the fewest of each."""

    batch_size: float
    updates: float
    samples: float


def tradeoff(noise_scale: float, batch_sizes: Iterable[float]) -> tuple[Tradeoff, ...]:
    """For each size B its 1 + Bn/B times the fewest updates, and 1 + B/Bn times the fewest samples.

    McCandlish et al. 2018, eq. 2.11: (updates - 1) (samples - 1) = 1. ValueError for sizes or scales below zero.

    >>> tradeoff(100.0, [100, 300])[0]
    Tradeoff(batch_size=100, updates=2.0, samples=2.0)
    """
    if not 0 < noise_scale < math.inf:
        raise ValueError(f"a trade-off needs a noise scale above 0 and finite, got {noise_scale}: measure more windows")
    return tuple(Tradeoff(b, 1 + noise_scale / _size(b), 1 + b / noise_scale) for b in batch_sizes)


@dataclass(frozen=True)
class FastestBatch:
    """The effective batch that trains fastest on this machine, as far as the noise scale tells.

    `batch_size`: B*, samples. `low`, `high`: B* at the ends of the noise scale's interval. `accumulate`: whether B* is
    more than one micro-batch. `is_settled`: whether both ends of the interval say so, too. `verdict`: the answer in
    words.
    """

    batch_size: float
    low: float
    high: float
    accumulate: bool
    is_settled: bool
    verdict: str
    seconds_per_sample: float
    seconds_per_update: float
    noise_scale: float

    def slowdown(self, batch_size: float) -> float:
        """How much longer training takes at `batch_size` than at B*: 1 there, more anywhere else.

        (gamma + c B) (1 + Bn/B) / (sqrt(gamma) + sqrt(c Bn))^2, with gamma seconds for an update and c for a sample.
        """
        gamma, c, b = self.seconds_per_update, self.seconds_per_sample, _size(batch_size)
        if math.isinf(self.noise_scale):
            return 1 + gamma / (c * b)
        return (gamma + c * b) * (1 + self.noise_scale / b) / (math.sqrt(gamma) + math.sqrt(c * self.noise_scale)) ** 2


def fastest_batch_size(
    noise_scale: float,
    *,
    seconds_per_sample: float,
    seconds_per_update: float,
    largest_micro_batch: int,
    low: float | None = None,
    high: float | None = None,
) -> FastestBatch:
    """The batch B* = sqrt(gamma Bn / c) that minimises time to a loss: updates (1 + Bn/B) times seconds (gamma + c B).

    `seconds_per_sample`: c, of forward and backward. `seconds_per_update`: gamma, what an update costs besides its
    samples (optimizer step, communication, logging). `largest_micro_batch`: samples that fit into one forward and
    backward. `low`, `high`: the interval of the noise scale. ValueError for times or sizes that are not positive.
    Derived; the cost model is Qiao et al. 2021, eq. 8 to 10, with micro-batches one after the other.
    """
    for name, value in (("seconds_per_sample", seconds_per_sample), ("seconds_per_update", seconds_per_update)):
        if not (value > 0 or (value == 0 and name == "seconds_per_update")) or math.isinf(value):
            raise ValueError(f"{name} must be a positive number of seconds, got {value}: measure it on a few windows")
    ends = {"noise_scale": noise_scale, "low": low, "high": high}
    for name, scale in ends.items():
        _check_scale(noise_scale if scale is None else scale, name)
    m = _size(largest_micro_batch)
    best, least, most = (
        math.sqrt(seconds_per_update * scale / seconds_per_sample) if seconds_per_update else 0.0
        for scale in (noise_scale, noise_scale if low is None else low, noise_scale if high is None else high)
    )
    best, least, most = max(best, 1.0), max(least, 1.0), max(most, 1.0)  # a batch has at least one sample
    is_settled = (least > m) == (best > m) == (most > m)
    words = _verdict(best, least, most, int(m), is_settled)
    return FastestBatch(
        best, least, most, best > m, is_settled, words, seconds_per_sample, seconds_per_update, noise_scale
    )


def _verdict(best: float, least: float, most: float, m: int, is_settled: bool) -> str:
    low, high = (in_samples(_whole(each)) for each in (least, most))
    between = f" (between {low} and {high})" if low != high else ""
    if best > m and math.isinf(best):
        words = f"accumulate: no signal was seen above the noise yet, so at least {counted(_whole(least))}"
    elif best > m:
        size = max(_whole(best), m + 1)  # as it is said, so that the micro-batches fit the words
        words = f"accumulate: {size} samples{between} train fastest, {math.ceil(size / m)} micro-batches of up to {m}"
    else:
        size = min(_whole(best), m)
        verb = "trains" if size == 1 else "train"
        fits = "1 fits" if m == 1 else f"{m} fit"
        words = f"do not accumulate: {counted(size)}{between} {verb} fastest, and {fits} into a micro-batch"
    return words if is_settled else f"{words}; the other answer is within the interval, so measure more windows"


def _whole(batch_size: float) -> float:
    """The size to give a loader: whole, of three digits."""
    return batch_size if math.isinf(batch_size) else int(float(f"{round(batch_size):.3g}"))


def in_samples(value: float) -> str:
    """A number of samples in words: two or three digits are all that such an estimate has, and no part of a sample.

    >>> in_samples(1234.5), in_samples(98.8), in_samples(0.25), in_samples(float("inf"))
    ('1230', '99', '0.25', 'any number')
    """
    if math.isinf(value):
        return "any number"
    return f"{value:.2g}" if value < 9.95 else f"{float(f'{value:.3g}'):.0f}"


def counted(value: float, unit: str = "sample") -> str:
    """A number of something in words, in the plural but for one.

    >>> counted(1, "window"), counted(98.8)
    ('1 window', '99 samples')
    """
    text = in_samples(value)
    return f"{text} {unit}{'' if text == '1' else 's'}"


def _check_scale(noise_scale: float, name: str) -> None:
    if math.isnan(noise_scale) or noise_scale < 0:
        raise ValueError(f"{name} must be a number of samples, at least 0, or infinite, got {noise_scale}")


def _size(batch_size: float) -> float:
    if not 0 < batch_size < math.inf:
        raise ValueError(f"a batch size must be a positive number of samples, got {batch_size}")
    return batch_size
