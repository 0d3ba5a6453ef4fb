"""What the comparison says about the scaled rate, the gradient noise scale and sharpness, drawn from the numbers."""

import math

from macrobatch.batch_tradeoff import gain, in_samples
from macrobatch.cli.comparison import Comparison, Course
from macrobatch.cli.course_words import overfitting, rise_of
from macrobatch.cli.finding import (
    CLEAR,
    EQUAL_LOSS,
    Difference,
    Finding,
    course_of,
    is_clear,
    loss_difference,
)
from macrobatch.cli.formats import counted, listed, with_error
from macrobatch.cli.noise_words import COUPLED

WITHIN = 4.0  # an interval of the noise scale whose ends are further apart, as a ratio, is not called "about" anything

FEW = 4  # points that are named one by one


# ------------------------------------------------------------------------------------------------ the scaled rate
def scaled_rate(comparison: Comparison) -> Finding | None:
    """Whether the rate that the rule gives for the large batch helped in this run."""
    scaling, scaled, unscaled = (
        comparison.scaling,
        course_of(comparison, "scaled"),
        course_of(comparison, "accumulated"),
    )
    if scaling is None:
        why = comparison.not_scaled
        return Finding("The learning rate was not scaled", f"{why[:1].upper()}{why[1:]}.") if why else None
    if scaled is None or unscaled is None:
        return None
    rates = (
        f"The rule {scaling.rule} ({scaling.why}) takes lr {comparison.learning_rate:.3g} from updates of "
        f"{scaling.from_batch_size} to {comparison.learning_rate * scaling.lr_factor:.3g} for {scaling.to_batch_size}; "
        f"{counted(scaling.warmup_updates, 'update')} of warmup. "
    )
    caveats = "".join(f" Caution: {caveat}." for caveat in [*scaling.caveats, *_of_coupled(comparison)])
    if scaled.skipped or not all(map(math.isfinite, comparison.losses("scaled"))):
        what = "its loss is not finite"
        if scaled.skipped:
            what = f"{counted(scaled.skipped, 'update')} had no finite gradient"
        text = f"{rates}With it {what}; with the rate as it was the loss is {unscaled.final.loss:.3f}.{caveats}"
        return Finding("At the scaled learning rate training broke down in this run", text)
    difference = loss_difference(comparison, "scaled", "accumulated")
    losses = (
        f"From the same samples the validation loss is {scaled.final.loss:.3f} with it and {unscaled.final.loss:.3f} "
        f"without (difference {difference.text}). "
    )
    title, reason = _verdict(comparison, difference)
    return Finding(title, f"{rates}{losses}{reason}{caveats}")


def _of_coupled(comparison: Comparison) -> list[str]:
    of_means = "rules are derived for losses that are means over samples; this one changes with the batch"
    return [of_means] if comparison.is_coupled else []


def _verdict(comparison: Comparison, difference: Difference) -> tuple[str, str]:
    sign = difference.sign
    where = "in this run" if not comparison.repeats else f"over {1 + len(comparison.repeats)} seeds"
    if sign == 0:
        return f"Scaling the learning rate made no clear difference {where}", (
            f"{_unclear(difference)}A rule is a first guess: try half and twice its rate."
        )
    if sign > 0:
        return f"Scaling the learning rate did not help {where}: it made the loss higher", (
            f"{_lead(comparison)}{_why_not(comparison)}A rule is a first guess: try rates in between."
        )
    behind = loss_difference(comparison, "scaled", "small")
    catches_up = {
        1: "It does not catch up with the small batch, which made more updates. ",
        0: "With it the large batch learned as well as the small one, in fewer updates. ",
        -1: "With it the large batch learned better than the small one. ",
    }[behind.sign]
    return f"Scaling the learning rate helped {where}", (
        f"{catches_up}That says that the rate was too small for the large batch, not that the rule's is the best: try "
        "half and twice."
    )


def _unclear(difference: Difference) -> str:
    if difference.is_none or not difference.range:
        return ""
    return f"The loss with it is not clearly apart{difference.range}. "


def _lead(comparison: Comparison) -> str:
    """By how much the scaled rate was ahead on the way, in the first run, before it fell behind."""
    scaled, unscaled = course_of(comparison, "scaled"), course_of(comparison, "accumulated")
    assert scaled is not None
    assert unscaled is not None
    pairs = zip(scaled.validation_losses, unscaled.validation_losses, strict=True)
    lead, samples = max((other - loss, samples) for (samples, loss), (_, other) in pairs)
    return f"On the way it was ahead, by {lead:.3f} after {samples:,} samples. " if lead > EQUAL_LOSS else ""


def _why_not(comparison: Comparison) -> str:
    scaled = course_of(comparison, "scaled")
    overfitted = None if scaled is None else overfitting(comparison, scaled)
    if overfitted is not None:
        return f"It overfitted: its lowest loss was {overfitted.loss:.3f}, after {overfitted.samples:,} samples. "
    rise = None if scaled is None else rise_of(scaled)
    if rise is not None:
        return (
            f"Its course was unsteady: its loss rose to {rise[1]:.3f} after {rise[0]:,} samples and fell again, as "
            "near the largest rate that trains. "
        )
    if comparison.is_coupled:
        return ""  # what is to be said is among the cautions
    scale, large = comparison.noise_scale, comparison.batch_size
    is_known = not _is_hint(comparison) and is_clear(comparison.gradient_squared)
    if is_known and scale.value + 2 * scale.standard_error < large:
        return (
            "The rule is for updates whose gradient is mostly noise. Where accumulation ended, that of an update of "
            f"{large} samples was mostly signal: the two are equal at the noise scale of {in_samples(scale.value)} "
            "samples. Or the rate was near its largest useful value already. "
        )
    return "The rate was near its largest useful value already. "


# ------------------------------------------------------------------------------------------------ the noise scale
def noise(comparison: Comparison) -> Finding:
    """The gradient noise scale at the end and along the way, and what it says about the batch size."""
    scale, small, large = comparison.noise_scale, comparison.micro_batch_size, comparison.batch_size
    along = _along_the_way(comparison)
    if comparison.gradient_squared.value <= 0 or not is_clear(comparison.gradient_squared):
        return _noise_from_below(comparison, along)
    if _is_hint(comparison):
        return _noise_as_a_hint(comparison, along)
    low, high = scale.value - 2 * scale.standard_error, scale.value + 2 * scale.standard_error
    if low > large:
        title = f"Gradients are mostly noise, even of {large} samples"
    elif high < small:
        title = f"Gradients are mostly signal, even of {small} samples: a larger batch hardly pays"
    elif high < large:
        title = f"A batch of {large} is larger than the gradient noise scale: its last samples add less than its first"
    elif high < WITHIN * max(low, 1):
        title = f"The noise scale is about the batch size of {large}"
    else:
        title = f"Whether the noise scale is above the batch size of {large}, the draws do not tell"
    worth = gain(scale.value, small, large)
    return Finding(
        title,
        "The gradient noise scale, the batch size at which noise and gradient are equally large, is "
        f"{with_error(scale.value, scale.standard_error)} samples where accumulation ended. This "
        f"suggests that there one update of {large}, each with its best learning rate, is worth about {worth:.1f} "
        f"updates of {small}, at the cost of {large / small:.3g}. {along}It is no absolute critical batch size: read "
        "its trend, and the losses.",
    )


def _noise_as_a_hint(comparison: Comparison, along: str) -> Finding:
    """The number, and why nothing is concluded from it, where samples of a micro-batch see each other."""
    scale = comparison.noise_scale
    return Finding(
        _title_of_a_hint(comparison),
        f"By its formula it is {with_error(scale.value, scale.standard_error)} samples where accumulation ended. "
        f"{along}{_why_a_hint(comparison)}",
    )


def _is_hint(comparison: Comparison) -> bool:
    """Whether a sample's gradient depends on the others: by a layer, or by a loss that is no sum over samples."""
    by_loss = comparison.has_other_gradient and not comparison.noisy_layers
    return comparison.coupling_layer is not None or by_loss


def _title_of_a_hint(comparison: Comparison) -> str:
    layer = comparison.coupling_layer
    why = "gradients depend on how a batch is cut" if layer is None else f"{layer} couples samples"
    return f"What a larger batch is worth, the gradient noise scale does not tell here: {why}"


def _why_a_hint(comparison: Comparison) -> str:
    if comparison.coupling_layer is not None:
        return f"{COUPLED}."
    return "It is a number of losses that are sums over samples; this one has another gradient for each cut of a batch."


def _noise_from_below(comparison: Comparison, along: str) -> Finding:
    """What is known where the mean gradient is not: that the noise scale is large."""
    large, least = comparison.batch_size, least_noise_scale(comparison)
    is_hint = _is_hint(comparison)
    lost = f"The mean gradient is lost in the noise of {comparison.draws} draws of {large} samples"
    if least is None:
        return Finding("The gradient noise scale is not known", f"{lost}. {along}")
    title = f"The gradient noise scale is more than {in_samples(least)}: how much more, the draws do not tell"
    if is_hint:
        title = _title_of_a_hint(comparison)
    elif least > large:
        title = f"Gradients are mostly noise, even of {large} samples"
    text = f"{lost}: the noise scale is more than {in_samples(least)} samples where accumulation ended. {along}"
    return Finding(title, text + (_why_a_hint(comparison) if is_hint else ""))


def least_noise_scale(comparison: Comparison) -> float | None:
    """What the noise scale is surely above, by both of its parts; None where the draws do not even tell that."""
    small, squared = comparison.variances[comparison.micro_batch_size], comparison.gradient_squared
    noise, signal = small.value - CLEAR * small.standard_error, squared.value + CLEAR * squared.standard_error
    if not (noise > 0 and 0 < signal < math.inf and comparison.micro_batch_size < comparison.data_size):
        return None
    return noise / (1 / comparison.micro_batch_size - 1 / comparison.data_size) / signal


def _along_the_way(comparison: Comparison) -> str:
    scaled = course_of(comparison, "scaled")
    if scaled is None or scaled.broke_down:
        return ""
    known = [point for point in scaled.noise if math.isfinite(point.high)]
    if not known:
        return ""
    first, last = known[0], known[-1]
    when = "at the end" if last is scaled.noise[-1] else f"after {last.samples:,} samples"
    if first is last or (first.low <= last.high and last.low <= first.high):
        trend = f"lies between {in_samples(last.low)} and {in_samples(last.high)} {when} (95%), with no clear trend"
    else:
        trend = (
            f"{'rose' if last.low > first.high else 'fell'}: between {in_samples(first.low)} and "
            f"{in_samples(first.high)} after {first.samples:,} samples, between {in_samples(last.low)} and "
            f"{in_samples(last.high)} {when} (95%)"
        )
    return f"In the run with the scaled rate, by the micro-batches of its windows, it {trend}. {_open_points(scaled)}"


def _open_points(course: Course) -> str:
    """Where on the way the interval had no upper end, which the two that are quoted do not show."""
    without = [point.samples for point in course.noise if not math.isfinite(point.high)]
    if not without:
        return ""
    where = f"at {len(without)} of {len(course.noise)} points, the first after {without[0]:,} and the last after "
    where += f"{without[-1]:,} samples"
    if len(without) <= FEW:
        where = f"after {listed([f'{samples:,}' for samples in without])} samples"
    return f"Its interval had no upper end {where}. "
