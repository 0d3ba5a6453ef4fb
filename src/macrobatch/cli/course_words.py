"""What a comparison says of the way to the end: whether the best validation loss was passed before it."""

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass, replace

from macrobatch.cli.comparison import Comparison, Course
from macrobatch.cli.estimates import paired_difference
from macrobatch.cli.finding import EQUAL_LOSS, Finding

SURE = 2.0  # standard errors of the loss at the end; a rise over the same samples is as a rule better known than that


@dataclass(frozen=True)
class Peak:
    """The lowest validation loss of a way and the samples it was seen after, well below the one at the end.

    `training_fell`: whether the training loss went on falling from there, in means over an eighth of the run.
    """

    samples: int
    loss: float
    end: float
    training_fell: bool


def peak_of(course: Course) -> Peak | None:
    """Where a way was best; None where that was at the end, or not clearly before it."""
    samples, loss = min(course.validation_losses, key=lambda point: point[1] if math.isfinite(point[1]) else math.inf)
    end = course.final
    nothing = replace(end, loss=0.0, losses=[0.0] * len(end.losses))
    least = max(EQUAL_LOSS, SURE * paired_difference(end, nothing).standard_error)
    if not end.loss - loss > least:  # nor where one of them is not a number
        return None
    return Peak(samples, loss, end.loss, _around(course, samples) > _around(course, course.losses[-1][0]))


def _around(course: Course, samples: int) -> float:
    """The mean training loss of the eighth of the run that ends there, or of the first one."""
    span = max(course.losses[-1][0] / 8, course.losses[0][0])
    until = max(samples, span)
    return statistics.fmean(loss for n, loss in course.losses if until - span < n <= until)


def past_best(comparison: Comparison) -> Finding | None:
    """Which ways were best before the end, as overfitting makes them, and what their ends then do not compare."""
    trained = {each.way.name: each.course for each in comparison.results.values() if each.course is not None}
    peaks = {name: peak for name, course in trained.items() if (peak := peak_of(course)) is not None}
    if not peaks:
        return None
    who = "Every way had its" if len(peaks) == len(trained) else f"{len(peaks)} of {len(trained)} ways had their"
    first = " in the run of the first seed" if comparison.repeats else ""
    return Finding(
        f"{who} lowest validation loss before the end, not at it",
        f"Lowest{first}: {'; '.join(f'{name} {_text(peak)}' for name, peak in peaks.items())}. "
        f"{_cause(list(peaks.values()))} All else that is said of losses is of those at the end, not of the best that "
        "a way reached: for that, compare the lowest ones, or give fewer --samples.",
    )


def _text(peak: Peak) -> str:
    when = f"after {peak.samples:,} samples" if peak.samples else "before training"
    return f"{peak.loss:.3f} {when}, {peak.end:.3f} at the end"


def _cause(peaks: Sequence[Peak]) -> str:
    fell = [peak.training_fell for peak in peaks]
    if all(fell):
        return (
            "The training loss went on falling meanwhile: what was learned of the training samples after that does "
            "not hold for others, which is overfitting."
        )
    if any(fell):
        return "The training loss went on falling meanwhile for some of them, which is overfitting, and not for others."
    return "The training loss did not fall either: this is no overfitting; the learning rate may be too large."
