"""Means over seeds with their intervals, by Student's t: few seeds, wide intervals."""

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass

from macrobatch.cli.formats import number_text


@dataclass(frozen=True)
class Interval:
    """A mean and half the width of its interval."""

    mean: float
    half: float

    def __str__(self) -> str:
        if not (math.isfinite(self.half) and self.half > 0):
            return number_text(self.mean)
        decimals = max(1 - math.floor(math.log10(self.half)), 0)  # two digits of the width
        return f"{self.mean:.{decimals}f} ± {self.half:.{decimals}f}"


def interval_of(values: Sequence[float], confidence: float = 0.95) -> Interval:
    """The mean of independent values, and what it is known to with this confidence; of one value, infinite.

    >>> print(interval_of([1.0, 2.0, 3.0]))
    2.0 ± 2.5
    """
    mean, n = statistics.fmean(values), len(values)
    if n < 2 or not math.isfinite(mean):
        return Interval(mean, math.inf)
    return Interval(mean, student(confidence, n - 1) * statistics.stdev(values) / math.sqrt(n))


def student(confidence: float, freedom: int) -> float:
    """The t that |T| stays below with this probability, for Student's T with so many degrees of freedom.

    >>> [round(student(0.95, n), 3) for n in (1, 2, 9)]
    [12.706, 4.303, 2.262]
    """
    low, high = 0.0, math.pi / 2  # of the angle atan(t / sqrt(freedom))
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if _covered(middle, freedom) < confidence else (low, middle)
    return math.sqrt(freedom) * math.tan(low)


def _covered(angle: float, freedom: int) -> float:
    """P(|T| < sqrt(freedom) tan(angle)): the finite sums of Abramowitz and Stegun 26.7.3 and 26.7.4."""
    term, total = 1.0, 0.0
    if freedom % 2:
        term = math.cos(angle)
        for j in range(1, freedom - 1, 2):
            total += term
            term *= (j + 1) / (j + 2) * math.cos(angle) ** 2
        return 2 / math.pi * (angle + math.sin(angle) * total)
    for j in range(0, freedom - 1, 2):
        total += term
        term *= (j + 1) / (j + 2) * math.cos(angle) ** 2
    return math.sin(angle) * total
