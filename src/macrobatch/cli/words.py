"""The reading of a comparison in words, every one of them drawn from the numbers and their uncertainty."""

from macrobatch.cli import coupled_words
from macrobatch.cli.comparison import Comparison
from macrobatch.cli.course_words import overfitting, past_best
from macrobatch.cli.finding import EQUAL_LOSS, Finding, accumulation, course_of, loss_difference
from macrobatch.cli.formats import bytes_text, number_text, share_text
from macrobatch.cli.scale_words import noise, scaled_rate
from macrobatch.cli.sharpness_words import sharpness
from macrobatch.cli.speed_words import speed
from macrobatch.cli.variance_words import variance

RANDOM_STATE = 5056  # bytes: what torch's random numbers on the CPU are drawn from
COPIES = 3  # of it at once: where a window began, where a micro-batch began, and the next one
NEAR = 0.05  # of a measured peak: a prediction that is further below it than this is explained


def findings(comparison: Comparison) -> list[Finding]:
    """What the comparison says: accumulation and native, what it buys, why, the learning rate, minima, and speed."""
    if comparison.is_coupled:
        parts = [equality(comparison), coupled_words.plain_accumulation(comparison), memory(comparison)]
        parts += [coupled_words.small_batch(comparison), past_best(comparison), scaled_rate(comparison)]
        parts += [coupled_words.variance(comparison), speed(comparison), coupled_words.not_measured(comparison)]
    else:
        parts = [equality(comparison), memory(comparison), variance(comparison), small_batch(comparison)]
        parts += [
            past_best(comparison),
            scaled_rate(comparison),
            noise(comparison),
            sharpness(comparison),
            speed(comparison),
        ]
    return [part for part in parts if part is not None]


# ------------------------------------------------------------------------------------------------ accumulation
def equality(comparison: Comparison) -> Finding | None:
    """Whether accumulation and the native large batch learned the same."""
    accumulated, native = course_of(comparison, "accumulated"), course_of(comparison, "native")
    if native is None or accumulated is None:
        return None
    difference = accumulated.final.loss - native.final.loss
    along = max(abs(a[1] - b[1]) for a, b in zip(accumulated.validation_losses, native.validation_losses, strict=True))
    losses = (
        f"After {comparison.samples:,} samples their validation losses are {accumulated.final.loss:.4f} and "
        f"{native.final.loss:.4f}, {number_text(abs(difference), 2)} apart; the largest difference on the way was "
        f"{number_text(along, 2)}.{_statistics(comparison)}"
        f"{coupled_words.metrics_of_native(comparison) if comparison.is_coupled else ''}"
    )
    gradients = (
        ""
        if comparison.gradient_difference is None
        else f" For the same {comparison.batch_size} samples at the same parameters their gradients differ by at most "
        f"{share_text(comparison.gradient_difference)} of their length."
    )
    name, apart = accumulation(comparison), []
    if not abs(difference) <= EQUAL_LOSS:
        apart.append(f"its loss is {abs(difference):.3f} {'lower' if difference < 0 else 'higher'}")
    if comparison.has_other_gradient and comparison.gradient_difference is not None:
        apart.insert(0, f"their gradients differ by up to {share_text(comparison.gradient_difference)}")
    if apart:
        title = f"{name} did not equal the native large batch here: {', and '.join(apart)}"
        return Finding(title, losses + gradients + _why_not_equal(comparison))
    reason = (
        " It is the same update, computed in pieces: it cannot learn better or worse, "
        "it only needs other memory and time."
    )
    return Finding(f"{name} equals the native large batch; it does not beat it", losses + gradients + reason)


def _statistics(comparison: Comparison) -> str:
    """That running statistics were taken anew, and what the losses are by those that training left."""
    accumulated, native = course_of(comparison, "accumulated"), course_of(comparison, "native")
    if accumulated is None or native is None or accumulated.loss_as_left is None or native.loss_as_left is None:
        return ""
    return (
        " These are by running statistics of BatchNorm that were taken anew for each, over the same "
        f"{comparison.statistics_samples:,} training samples. By those that training left the losses are "
        f"{accumulated.loss_as_left:.4f} and {native.loss_as_left:.4f}: training moves them once for each micro-batch, "
        f"{accumulated.num_micro_batches:,} times by accumulation and {native.num_micro_batches:,} times by the native "
        "batch."
    )


def _why_not_equal(comparison: Comparison) -> str:
    if comparison.noisy_layers:
        return (
            f" The model has layers whose result depends on how a batch is cut, or is random: "
            f"{', '.join(comparison.noisy_layers)}. With them accumulation in micro-batches of "
            f"{comparison.micro_batch_size} trains another model, neither better nor worse by rule."
        )
    if comparison.gradient_difference is not None and comparison.gradient_difference < 1e-4:
        return " The gradients agree, so rounding has grown along the way: a sign that this training is not stable."
    if comparison.is_coupled:
        return " Something in the model or the loss is random, or depends on how a batch is cut: look there first."
    return (
        " The loss of this task is not a sum over samples, or something in it is random: look there first "
        "(docs/weighting.md says what to return for which loss)."
    )


def memory(comparison: Comparison) -> Finding | None:
    """What accumulation bought: memory."""
    accumulated, native = comparison.results["accumulated"].memory, comparison.results["native"].memory
    if accumulated.peak_bytes is None:
        return None
    needs = f"{bytes_text(accumulated.peak_bytes)} at its peak"
    if not native.fits:
        at_least = "" if native.peak_bytes is None else f"; it needs {bytes_text(native.peak_bytes)} at least"
        budget = "the device" if comparison.max_memory is None else f"the budget of {bytes_text(comparison.max_memory)}"
        return Finding(
            f"{accumulation(comparison)} trains a batch of {comparison.batch_size} where it does not fit",
            f"In one piece {comparison.batch_size} samples do not fit into {budget}{at_least}. In micro-batches of "
            f"{comparison.micro_batch_size} the same update takes {needs}.{_predictions(comparison)}",
        )
    if native.peak_bytes is None:
        return None
    share = accumulated.peak_bytes / native.peak_bytes
    beside = ", and the outputs of all" if comparison.is_coupled else ""
    parts = (
        f"The update of {comparison.batch_size} samples takes {needs} in micro-batches of "
        f"{comparison.micro_batch_size}, and {bytes_text(native.peak_bytes)} in one piece. Parameters, gradients and "
        f"optimizer state are in both; activations are those of one micro-batch{beside}.{_predictions(comparison)}"
    )
    if share >= 0.95:
        return Finding(
            f"{accumulation(comparison)} saved hardly any memory here: {share:.2f} of the native peak", parts
        )
    return Finding(f"What {accumulation(comparison).lower()} buys is memory: {_part_of_native(share)}", parts)


def _part_of_native(share: float) -> str:
    return f"{share:.2f} of the native peak, {number_text(1 / share, 2)} times less"


def _predictions(comparison: Comparison) -> str:
    """Prediction against measurement for accumulation and the native batch; nothing where nothing was predicted."""
    said = [
        f"{bytes_text(memory.predicted_bytes)} for {result.way.name}, measured "
        + (bytes_text(memory.peak_bytes) if memory.fits else "nothing, it does not fit")
        for key, result in comparison.results.items()
        if (memory := result.memory).predicted_bytes is not None and key in ("accumulated", "native")
    ]
    return f" Predicted before anything ran: {'; '.join(said)}.{_not_predicted(comparison)}" if said else ""


def _not_predicted(comparison: Comparison) -> str:
    """What is in no prediction, where training takes so little that it is seen."""
    memories = [result.memory for result in comparison.results.values()]
    more = [
        (memory.peak_bytes - memory.predicted_bytes) / memory.peak_bytes
        for memory in memories
        if memory.peak_bytes
        and memory.predicted_bytes is not None
        and memory.fits
        and 0 < memory.peak_bytes - memory.predicted_bytes <= COPIES * RANDOM_STATE
    ]
    if max(more, default=0.0) <= NEAR:
        return ""
    return (
        f" Not in them are copies of the state of the random numbers, {bytes_text(RANDOM_STATE)} each and at most "
        f"{COPIES} at once, from which a window can be run again: in a peak as small as this they are seen."
    )


# ------------------------------------------------------------------------------------------------ small batch
def small_batch(comparison: Comparison) -> Finding | None:
    """Whether the small batch learned faster from the same samples, and why."""
    small, large = course_of(comparison, "small"), course_of(comparison, "accumulated")
    if small is None or large is None:
        return None
    difference = loss_difference(comparison, "small", "accumulated")
    samples_then = small.losses[min(len(large.losses), len(small.losses)) - 1][0]
    at_equal_updates = dict(small.validation_losses).get(samples_then)
    losses = (
        f"Validation loss {small.final.loss:.3f} against {large.final.loss:.3f} after the same {comparison.samples:,} "
        f"samples at the same learning rate {comparison.learning_rate:.3g} (difference {difference.text}). "
    )
    updates = f"It made {len(small.update_seconds):,} updates where the large batch made {len(large.update_seconds):,}"
    if difference.is_none:
        return Finding("Small and large batch learned alike from the same samples", f"{losses}{updates}.")
    if difference.sign == 0:
        title = "Whether the small or the large batch learned more from the same samples, the losses do not tell"
        return Finding(title, f"{losses}{updates}. The small batch's loss is not clearly apart{difference.range}.")
    if difference.sign < 0:
        title = "From the same samples at the same learning rate, the small batch learned faster"
        after = (
            ""
            if at_equal_updates is None
            else f" (after its first {len(large.update_seconds):,} it stood at {at_equal_updates:.3f})"
        )
        return Finding(title, f"{losses}{updates}{after}. {_advice(comparison)}")
    title = "From the same samples at the same learning rate, the large batch learned better"
    overfitted = overfitting(comparison, small)
    reason = "this learning rate is large for its noise"
    if overfitted is not None:
        reason = f"it overfitted: its lowest loss was {overfitted.loss:.3f}, after {overfitted.samples:,} samples"
    return Finding(title, f"{losses}{updates}, which suggests that {reason}.")


def _advice(comparison: Comparison) -> str:
    return (
        f"Where an update of {comparison.micro_batch_size} samples is enough, do not accumulate; accumulate where the "
        "recipe, its learning rate or the noise asks for the larger batch."
    )
