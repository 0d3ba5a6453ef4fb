"""What a comparison says of the variance of an update's gradient: the law of means, where every ratio bears it."""

from macrobatch.cli.comparison import Comparison
from macrobatch.cli.estimates import Estimate, ratio_of
from macrobatch.cli.finding import Finding, is_clear
from macrobatch.cli.formats import with_error

AGREES = 2.0  # standard errors that a ratio may be from the law for the law to be said; beyond CLEAR it does not hold


def variance(comparison: Comparison) -> Finding | None:
    """Whether the variance of an update's gradient falls as 1/B, by accumulation and by the native batch."""
    small_size, large_size = comparison.micro_batch_size, comparison.batch_size
    small, large = comparison.variances.get(small_size), comparison.variances.get(large_size)
    if small is None or large is None:
        return None
    native = comparison.results["native"].variance
    expected = comparison.expected_variance_ratio(large_size, small_size)
    ratios = [ratio_of(each, small) for each in (large, native) if each is not None]
    is_other = native is not None and is_clear(ratio_of(native, large), 1.0)
    fails = any(is_clear(ratio, expected) for ratio in ratios)
    return Finding(
        "The variance of an update's gradient does not fall as one over the batch size here"
        if fails
        else "How the variance of an update's gradient falls with the batch size, the draws do not tell"
        if is_other or not all(_bears(ratio, expected) for ratio in ratios)
        else "The variance of an update's gradient falls as one over the batch size",
        f"From {small_size} to {large_size} samples it becomes {_of_what_it_was(ratios, is_other)}; expected is "
        f"{expected:.4f} (1/{large_size / small_size:.3g}, corrected for drawing without replacement from "
        f"{comparison.data_size:,}).{_native(native, large)}{_why_not(comparison) if fails or is_other else ''}",
    )


def _bears(ratio: Estimate, expected: float) -> bool:
    """Whether a ratio is where the law puts it, and known well enough to tell that from none."""
    return abs(ratio.value - expected) <= AGREES * ratio.standard_error and is_clear(ratio, 1.0)


def _of_what_it_was(ratios: list[Estimate], is_other: bool) -> str:
    said = [with_error(ratio.value, ratio.standard_error) for ratio in ratios]
    if is_other:
        return f"{said[0]} of what it was by accumulation, and {said[1]} by the native batch"
    return f"{said[0]} of what it was"


def _native(native: Estimate | None, large: Estimate) -> str:
    if native is None:
        return ""
    return (
        f" The native batch has {with_error(native.value, native.standard_error)}, accumulation "
        f"{with_error(large.value, large.standard_error)}, on the same draws."
    )


def _why_not(comparison: Comparison) -> str:
    if comparison.noisy_layers:
        return f" Layers that see the whole micro-batch, or are random, add to it: {comparison.noisy_layers[0]}."
    if comparison.has_other_gradient:
        return (
            " The law is one of means over independent parts. By accumulation an update is the mean of its "
            "micro-batches, whatever the loss is; the native batch has another gradient."
        )
    return " Either the terms of the loss are weighted unevenly over samples, or the draws are too few."
