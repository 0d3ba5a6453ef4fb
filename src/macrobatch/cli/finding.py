"""What a comparison says as a value, and when a difference is taken for real."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

from macrobatch.cli.comparison import Comparison, Course
from macrobatch.cli.estimates import Estimate, paired_difference, paired_metric
from macrobatch.cli.formats import number_text, with_error
from macrobatch.cli.seeds import interval_of
from macrobatch.cli.way import Key

CLEAR = 3.0  # standard errors beyond which a difference is taken for real

EQUAL_LOSS = 0.01  # validation losses closer than this are called equal


@dataclass(frozen=True)
class Finding:
    """A sentence to remember, and the numbers behind it."""

    title: str
    text: str


@dataclass(frozen=True)
class Difference:
    """A difference in words, and what it lies between, as far as is known."""

    text: str
    low: float = -math.inf
    high: float = math.inf

    @property
    def sign(self) -> int:
        """-1 or 1 where the difference is real, else 0."""
        return int(self.low > 0) - int(self.high < 0)

    @property
    def is_none(self) -> bool:
        """Whether it is known to be too small to matter."""
        return self.low >= -EQUAL_LOSS and self.high <= EQUAL_LOSS

    @property
    def range(self) -> str:
        """What can be said where it is not known to be real: ", that is between 0.155 lower and 0.025 higher"."""
        if not math.isfinite(self.high - self.low):
            return ""
        return f", that is between {_towards(self.low)} and {_towards(self.high)}"


def _towards(value: float) -> str:
    return f"{number_text(abs(value), 2)} {'lower' if value < 0 else 'higher'}"


def is_clear(estimate: Estimate, against: float = 0.0) -> bool:
    """Whether a value lies further from `against` than its uncertainty explains."""
    return abs(estimate.value - against) > CLEAR * estimate.standard_error


def course_of(comparison: Comparison, key: Key) -> Course | None:
    """The training of a way; None where it was not trained."""
    return comparison.results[key].course if key in comparison.results else None


def loss_difference(comparison: Comparison, one: Key, other: Key) -> Difference:
    """The validation loss of `one` less that of `other`: by pairs over seeds, or of one seed over held-out samples."""
    if comparison.repeats:
        return seed_difference(comparison.losses(one), comparison.losses(other))
    courses = course_of(comparison, one), course_of(comparison, other)
    if courses[0] is None or courses[1] is None:
        return Difference("not known")
    return _of_one_seed(paired_difference(courses[0].final, courses[1].final))


def metric_difference(comparison: Comparison, name: str, one: Key, other: Key) -> Difference:
    """The same of a metric."""
    if comparison.repeats:
        return seed_difference(comparison.metrics(name, one), comparison.metrics(name, other))
    courses = course_of(comparison, one), course_of(comparison, other)
    if courses[0] is None or courses[1] is None:
        return Difference("not known")
    return _of_one_seed(paired_metric(courses[0].final, courses[1].final, name))


def metrics_text(comparison: Comparison, one: Key, other: Key) -> str:
    """Every metric of `one` against that of `other`, of the first seed, with their difference."""
    courses = course_of(comparison, one), course_of(comparison, other)
    if courses[0] is None or courses[1] is None:
        return ""
    ends = [course.final.metrics for course in courses if course is not None]
    said = [
        f"{name} {number_text(ends[0][name])} against {number_text(ends[1][name])} "
        f"(difference {metric_difference(comparison, name, one, other).text})"
        for name in comparison.metric_names
    ]
    clear = [name for name in comparison.metric_names if metric_difference(comparison, name, one, other).sign]
    judged = f"Clearly apart: {', '.join(clear)}." if clear else "No metric is clearly apart."
    return f" {', '.join(said)}. {judged}" if said else ""


def accumulation(comparison: Comparison) -> str:
    """What accumulation is called that equals the native batch."""
    return "Gathered accumulation" if comparison.is_coupled else "Accumulation"


def _of_one_seed(found: Estimate) -> Difference:
    return _within(
        f"{with_error(found.value, found.standard_error)}; one seed", found.value, CLEAR * found.standard_error
    )


def seed_difference(ones: Sequence[float], others: Sequence[float]) -> Difference:
    """The mean difference by pairs of the same seed; real where its 95% interval leaves out zero."""
    found = interval_of([one - other for one, other in zip(ones, others, strict=True)])
    return _within(f"{found}; {len(ones)} seeds, 95%", found.mean, found.half)


def _within(text: str, value: float, half: float) -> Difference:
    if not (math.isfinite(value) and math.isfinite(half)):
        return Difference(text)
    return Difference(text, value - half, value + half)
