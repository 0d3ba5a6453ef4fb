"""What a comparison says of a loss that compares the samples of an update, drawn from the numbers."""

from collections.abc import Callable, Mapping

from macrobatch.cli.comparison import Comparison, Course
from macrobatch.cli.estimates import Estimate, ratio_of
from macrobatch.cli.finding import Finding, course_of, is_clear, loss_difference, metrics_text
from macrobatch.cli.formats import number_text, share_text, with_error
from macrobatch.cli.way import Key

Text = Callable[[Comparison, Course, Course, str], str]

PLAIN_TITLES = {
    -1: "Plain accumulation optimises another loss; its held-out loss came out lower here",
    0: "Plain accumulation optimises another loss; which one learned more, this comparison does not tell",
    1: "Plain accumulation optimises another loss; its held-out loss came out higher here",
}
SMALL_TITLES = {
    -1: "From the same samples at the same learning rate, the small batch reached the lower held-out loss",
    0: "From the same samples at the same learning rate, small and large batch are not clearly apart",
    1: "From the same samples at the same learning rate, the large batch reached the lower held-out loss",
}


def plain_accumulation(comparison: Comparison) -> Finding | None:
    """That plain accumulation has another loss and gradient, and what came of it."""
    return _against_gathered(comparison, "plain", PLAIN_TITLES, _of_plain)


def small_batch(comparison: Comparison) -> Finding | None:
    """What the small batch learned from the same samples, of which it compares few."""
    return _against_gathered(comparison, "small", SMALL_TITLES, _of_small)


def _against_gathered(comparison: Comparison, key: Key, titles: Mapping[int, str], text: Text) -> Finding | None:
    """The title for a held-out loss that is lower, not apart or higher than by gathered accumulation, and the text."""
    one, gathered = course_of(comparison, key), course_of(comparison, "accumulated")
    if one is None or gathered is None:
        return None
    difference = loss_difference(comparison, key, "accumulated")
    losses = f"{one.final.loss:.4f} against {gathered.final.loss:.4f} (difference {difference.text}"
    losses += f"){difference.range}." if not difference.sign else ")."
    losses += metrics_text(comparison, key, "accumulated")
    return Finding(titles[difference.sign], text(comparison, one, gathered, losses))


def _of_plain(comparison: Comparison, _: Course, gathered: Course, losses: str) -> str:
    return (
        f"It takes the mean of the losses of micro-batches, in each of which {_compared(comparison, 'plain')} samples "
        f"are compared with one another; gathered accumulation compares the {comparison.batch_size} of the whole "
        f"update, as the native batch does."
        f"{_gradient(comparison)} Held-out loss over {gathered.final.num_samples:,} samples at once after the same "
        f"{comparison.samples:,}: {losses}{_before(comparison)}"
    )


def _of_small(comparison: Comparison, small: Course, large: Course, losses: str) -> str:
    return (
        f"Small batch against gathered accumulation: held-out loss {losses} It made {len(small.update_seconds):,} "
        f"updates for {len(large.update_seconds):,}, each of a loss that compares {_compared(comparison, 'small')} "
        f"samples instead of {comparison.batch_size}. The two differ in their loss, in their number of updates and in "
        "the rate that suits them; which of these it was, one rate does not tell."
    )


def _compared(comparison: Comparison, key: Key) -> str:
    """How many samples the losses of a way compare with one another: from the fewest to the most."""
    sizes = comparison.results[key].way.compared(comparison.batch_size)
    return f"{max(sizes)}" if min(sizes) == max(sizes) else f"{min(sizes)} to {max(sizes)}"


def _before(comparison: Comparison) -> str:
    said = [f"{name} {number_text(value)}" for name, value in comparison.metrics_before.items()]
    return f" Before training: {', '.join(said)}." if said else ""


def _gradient(comparison: Comparison) -> str:
    found = comparison.plain_gradient
    if found is None:
        return ""
    right = (
        ""
        if comparison.gradient_difference is None
        else f" Gathered accumulation differs from the native batch by at most "
        f"{share_text(comparison.gradient_difference)} of its length."
    )
    return (
        f" Where gathered accumulation ended, the gradient of plain accumulation is off by "
        f"{with_error(found.difference.value, found.difference.standard_error)} of the right one's length for the same "
        f"samples (cosine {with_error(found.cosine.value, found.cosine.standard_error)}).{right}"
    )


def variance(comparison: Comparison) -> Finding | None:
    """How the variance of the gradient goes with the batch, of which no law is claimed."""
    base, size = comparison.micro_batch_size, comparison.batch_size
    small, large = comparison.variances.get(base), comparison.variances.get(size)
    plain = comparison.results["plain"].variance
    if small is None or large is None or plain is None:
        return None
    measured = ratio_of(large, small)
    return Finding(
        "One over the batch size is no law for the variance of this gradient",
        f"From {base} to {size} samples it becomes {with_error(measured.value, measured.standard_error)} of what it "
        f"was, by gathered accumulation. The law is one of means over independent parts, and so of plain accumulation: "
        f"{_variance_of_plain(comparison, ratio_of(plain, small))}. Where a sample is compared with all others, a "
        "larger update has another loss, another mean gradient and another variance: nothing is expected of it.",
    )


def _variance_of_plain(comparison: Comparison, found: Estimate) -> str:
    """The variance of a mean over parts against that of the small batch, of which the law speaks if they are alike."""
    base, size, parts = comparison.micro_batch_size, comparison.batch_size, _compared(comparison, "plain")
    said = with_error(found.value, found.standard_error)
    if parts != str(base):
        return f"{said}, which says nothing of it here, because its parts are of {parts} samples and not of {base}"
    expected = comparison.expected_variance_ratio(size, base)
    agrees = "does not agree" if is_clear(found, expected) else "agrees"
    return (
        f"{said}, which {agrees} with {expected:.4f} (1/{size / base:.3g}, corrected for drawing without replacement "
        f"from {comparison.data_size:,})"
    )


def not_measured(comparison: Comparison) -> Finding:
    """Why there is no noise scale and no sharpness."""
    return Finding(
        "The gradient noise scale and the sharpness are left out for this loss",
        "Both belong to a loss that is a mean over samples, each with a gradient of its own that does not depend on "
        "the batch. Here the samples of an update are compared with one another: what is minimised is another function "
        "at each batch size, so that neither says what a larger batch would be worth. Read the held-out metrics.",
    )


def metrics_of_native(comparison: Comparison) -> str:
    """The metrics of accumulation and native batch side by side."""
    accumulated, native = course_of(comparison, "accumulated"), course_of(comparison, "native")
    if accumulated is None or native is None:
        return ""
    said = [
        f"{name} {number_text(accumulated.final.metrics[name], 4)} and {number_text(native.final.metrics[name], 4)}"
        for name in comparison.metric_names
    ]
    return f" {', '.join(said)}." if said else ""
