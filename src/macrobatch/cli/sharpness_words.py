"""What the comparison says of flat minima, drawn from the sharpness at the ends and from how far the runs have come."""

from macrobatch.cli.comparison import Comparison
from macrobatch.cli.finding import Finding, loss_difference, seed_difference
from macrobatch.cli.formats import number_text
from macrobatch.cli.seeds import interval_of
from macrobatch.cli.way import Key

SAYING = "Small batches are said to find flatter minima (Keskar et al. 2017)"


def sharpness(comparison: Comparison) -> Finding | None:
    """Which run ended in the flatter place, if the seeds are enough to say so."""
    measured: dict[Key, list[float]] = {key: comparison.sharpnesses(key) for key in comparison.results}
    small, large = measured["small"], measured["accumulated"]
    if not small or not large:
        return None
    values = ", ".join(
        f"{interval_of(found) if len(found) > 1 else number_text(found[0])} ({comparison.results[key].way.name})"
        for key, found in measured.items()
        if found and len(found) == len(small)
    )
    what = (
        f"The largest eigenvalue of the Hessian of the training loss, over {comparison.sharpness_samples} samples in "
        f"evaluation mode, is at the end {values}"
    )
    levels = _levels(comparison)
    if len(small) < 2 or len(small) != len(large):
        lower = "a lower" if small[0] < large[0] else "a higher"
        return Finding(
            "Whether small batches find flatter minima, one run of each does not say",
            f"{SAYING}; here the small batch ended at {lower} sharpness than accumulation, once. {what}.{levels} With "
            "--seeds 3 there are intervals.",
        )
    difference = seed_difference(small, large)
    n = len(small)
    title = {
        -1: f"Over {n} seeds the small batch ended in a flatter place than the large one",
        0: f"Over {n} seeds small and large batch ended in places that are not clearly of another sharpness",
        1: f"Over {n} seeds the small batch ended in a sharper place than the large one",
    }[difference.sign]
    here = {
        -1: "here they did, at the same samples and the same learning rate",
        0: "here that cannot be told",
        1: "here it is the other way around",
    }[difference.sign]
    return Finding(title, f"{SAYING}; {here} (small less large: {difference.text}). {what} (95%).{levels}")


def _levels(comparison: Comparison) -> str:
    """Whether the two have come equally far, as far as is known: it has its part in how sharp a place is."""
    difference = loss_difference(comparison, "small", "accumulated")
    losses = f"(validation losses {_mean_loss(comparison, 'small')} and {_mean_loss(comparison, 'accumulated')})"
    if difference.is_none:
        return f" The runs have come equally far {losses}."
    if difference.sign == 0:
        return f" Whether the runs have come equally far, the losses do not tell {losses}."
    return f" The runs have not come equally far {losses}, and how sharp a place is changes along the way."


def _mean_loss(comparison: Comparison, key: Key) -> str:
    values = comparison.losses(key)
    return f"{sum(values) / len(values):.3f}"
