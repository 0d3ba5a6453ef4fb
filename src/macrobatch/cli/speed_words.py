"""What a comparison says of time: a ratio with its interval, and no more than both estimates of it agree to."""

import math
import statistics
from dataclasses import dataclass

from macrobatch.cli.comparison import Comparison, Course, steady
from macrobatch.cli.finding import Finding, accumulation, course_of
from macrobatch.cli.formats import seconds_text

EQUAL_TIME = 0.03  # ratios known to be closer to one than this are called equal
CLOSE = 0.1  # how far, relative to a ratio, the truth may be from it for the ratio to be said and not only a bound
ONE_IN = 20  # intervals that may miss: 95%


@dataclass(frozen=True)
class Ratio:
    """The median of `count` ratios, and the interval that it lies in with 95%."""

    value: float
    low: float
    high: float
    count: int

    def holds(self, value: float) -> bool:
        """Whether a value is within the interval, to the two digits that are said of it."""
        return round(self.low, 2) <= round(value, 2) <= round(self.high, 2) if math.isfinite(self.high) else True

    def __str__(self) -> str:
        known = f" ({self.low:.2f} to {self.high:.2f}, 95%)" if math.isfinite(self.high) else ""
        return f"{self.value:.2f}{known}"


def time_ratio(one: Course, other: Course) -> Ratio:
    """The time of `one` over that of `other` for the same samples: the median over effective batches, the first apart.

    Its interval is between two of the ratios, the k-th from below and from above: for independent ratios of any
    distribution it misses the median with 2 P(Bin(n, 1/2) < k) (Thompson 1936, the sign test turned around). Of fewer
    than six it is everything.
    """
    ratios = sorted(steady([a / b for a, b in zip(one.window_seconds, other.window_seconds, strict=True)]))
    k = _rank(len(ratios))
    low, high = (ratios[k - 1], ratios[-k]) if k else (0.0, math.inf)
    return Ratio(statistics.median(ratios), low, high, len(ratios))


def _rank(count: int) -> int:
    """The largest k with 2 P(Bin(count, 1/2) < k) of at most 5%; 0 where there is none."""
    missed = 0.0
    for k in range(count):
        ways = math.lgamma(count + 1) - math.lgamma(k + 1) - math.lgamma(count - k + 1)
        missed += 2 * math.exp(ways - count * math.log(2))
        if missed > 1 / ONE_IN:
            return k
    return 0


def speed(comparison: Comparison) -> Finding | None:
    """Samples per second, and what a piece costs."""
    small, accumulated = course_of(comparison, "small"), course_of(comparison, "accumulated")
    native = course_of(comparison, "native")
    if small is None or accumulated is None:
        return None
    rates = f"{accumulated.samples_per_second:,.0f} samples per second by {accumulation(comparison).lower()}"
    others = [f"{small.samples_per_second:,.0f} by the small batch"]
    if native is not None:
        others.insert(0, f"{native.samples_per_second:,.0f} by the native large batch")
    text = (
        f"{rates}, {', '.join(others)}; an update takes {seconds_text(accumulated.seconds_per_update)} and "
        f"{seconds_text(small.seconds_per_update)} for accumulation and the small batch."
    )
    if native is None:
        return Finding("Speed: the native large batch was not timed", text)
    paired, of_medians = time_ratio(accumulated, native), native.samples_per_second / accumulated.samples_per_second
    text += (
        f" The time of {accumulation(comparison).lower()} over that of the native batch is {paired}, the median over "
        f"pairs of effective batches.{_table_disagrees(paired, of_medians)}"
    )
    if comparison.is_coupled:
        text += " Gathered accumulation runs the forward of every micro-batch but the last a second time."
    return judged(paired, of_medians, text, accumulation(comparison))


def _table_disagrees(paired: Ratio, of_medians: float) -> str:
    """Why the speeds of the table have another ratio, where it is not within the interval."""
    if paired.holds(of_medians):
        return ""
    return (
        f" By the speeds of the table it would be {of_medians:.2f}: these are medians of each way by itself, and a "
        "pair is of two that ran one after the other. That the two disagree shows that the speed of the machine "
        "changed meanwhile, and not for both alike."
    )


def judged(paired: Ratio, of_medians: float, text: str, name: str = "Accumulation") -> Finding:
    """As much as holds over the whole interval and the other estimate: a ratio, a bound or a range."""
    if not math.isfinite(paired.high):
        title = f"Too few effective batches were timed to compare {name.lower()} and the native batch: {paired.count}"
        return Finding(title, text)
    low, high = min(paired.low, of_medians), max(paired.high, of_medians)
    if low >= 1 - EQUAL_TIME and high <= 1 + EQUAL_TIME:
        return Finding(f"{name} and the native batch took the same time for the same samples", text)
    known = paired.holds(of_medians) and max(high - paired.value, paired.value - low) <= CLOSE * paired.value
    if known and not low <= 1 <= high:
        title = f"{name} took {paired.value:.2f} times as long as the native batch for the same samples"
        return Finding(f"{title}, on this machine", text)
    return Finding(
        _bound(low, high, name),
        f"{text} Speeds in the table and the figures are no more certain than that; "
        "other programs at work, or too few samples, make them so.",
    )


def _bound(low: float, high: float, name: str) -> str:
    """What an interval says that is too wide for a number."""
    at_least, at_most = math.floor(100 * low) / 100, math.ceil(100 * high) / 100
    if low > 1:
        longer = f"more than {at_least:.2f} times as long as" if at_least > 1 else "longer than"
        return f"{name} took {longer} the native batch for the same samples, on this machine"
    if high < 1:
        shorter = f"less than {at_most:.2f} of the time of" if at_most < 1 else "less time than"
        return f"{name} took {shorter} the native batch for the same samples, on this machine"
    between = f"{name.lower()} took between {at_least:.2f} and {at_most:.2f} times as long as the native batch"
    return f"Which is faster, timings on this machine do not tell: {between}"
