"""What a comparison says of the way to the end: whether the best validation loss was passed before it."""

import math
import statistics
from collections.abc import Mapping
from dataclasses import dataclass, replace

from macrobatch.cli.comparison import Comparison, Course
from macrobatch.cli.estimates import paired_difference
from macrobatch.cli.finding import EQUAL_LOSS, Finding

SURE = 2.0  # standard errors of the loss at the end; a rise over the same samples is as a rule better known than that

STEEP = 0.1  # of a loss: what it rises by on the way for the course to be called unsteady


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
    least = max(EQUAL_LOSS, SURE * _error_at_the_end(course))
    if not end.loss - loss > least:  # nor where one of them is not a number
        return None
    return Peak(samples, loss, end.loss, _around(course, samples) > _around(course, course.losses[-1][0]))


def overfitting(comparison: Comparison, course: Course) -> Peak | None:
    """Where a way was best that overfitted after it: training losses of samples seen before fell, and others rose."""
    peak = peak_of(course)
    return peak if peak is not None and peak.training_fell and comparison.repeats_samples else None


def rise_of(course: Course) -> tuple[int, float] | None:
    """The samples and the loss of the highest point of a validation curve, where it rose to it and fell again."""
    curve = [point for point in course.validation_losses if math.isfinite(point[1])]
    if not curve:
        return None
    samples, top = max(curve, key=lambda point: point[1])
    before, after = [loss for n, loss in curve if n < samples], [loss for n, loss in curve if n > samples]
    if not (before and after):
        return None
    least = max(EQUAL_LOSS, SURE * _error_at_the_end(course), STEEP * abs(min(before)))
    return (samples, top) if top - min(before) > least and top - min(after) > least else None


def _error_at_the_end(course: Course) -> float:
    """The standard error of the loss at the end over the held-out samples; 0 where it is not known."""
    nothing = replace(course.final, loss=0.0, losses=[0.0] * len(course.final.losses))
    error = paired_difference(course.final, nothing).standard_error
    return error if math.isfinite(error) else 0.0


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
        f"{_cause(comparison, peaks, trained)} All else that is said of losses is of those at the end, not of the best "
        "that a way reached: for that, compare the lowest ones, or give fewer --samples.",
    )


def _unsteady(comparison: Comparison, courses: Mapping[str, Course]) -> str:
    """What is known of a rise where hardly a sample was seen twice."""
    seen = "Hardly a training sample was seen twice, so that this is hardly"
    if comparison.samples <= comparison.data_size:
        seen = "No training sample was seen twice, so that this is no"
    rises = {name: rise for name, course in courses.items() if (rise := rise_of(course)) is not None}
    said = [
        f"{name} rose to {loss:.3f} after {samples:,} samples and fell again" for name, (samples, loss) in rises.items()
    ]
    if not said:
        return f"{seen} overfitting. The losses do not tell why; a rate near the largest that trains is one reason."
    return f"{seen} overfitting, but an unsteady course, as near the largest rate that trains: {'; '.join(said)}."


def _text(peak: Peak) -> str:
    when = f"after {peak.samples:,} samples" if peak.samples else "before training"
    return f"{peak.loss:.3f} {when}, {peak.end:.3f} at the end"


def _cause(comparison: Comparison, peaks: Mapping[str, Peak], trained: Mapping[str, Course]) -> str:
    fell = [peak.training_fell for peak in peaks.values()]
    if not comparison.repeats_samples:
        return _unsteady(comparison, {name: trained[name] for name in peaks})
    if all(fell):
        return (
            "The training loss went on falling meanwhile: what was learned of the training samples after that does "
            "not hold for others, which is overfitting."
        )
    if any(fell):
        return "The training loss went on falling meanwhile for some of them, which is overfitting, and not for others."
    return "The training loss did not fall either: this is no overfitting; the learning rate may be too large."
