"""What a measured noise scale recommends, in words that follow from the numbers."""

import math
from typing import TYPE_CHECKING

from macrobatch.batch_tradeoff import counted, in_samples
from macrobatch.cli.formats import number_text, seconds_text

if TYPE_CHECKING:
    from macrobatch import NoiseEstimate
    from macrobatch.cli.noise import Findings

CLOSE = 1.1  # training that takes so much longer than the fastest is as good: times and noise are not known better


COUPLED = (
    "The model normalises over its micro-batch (BatchNorm in training mode), so that a sample's gradient depends on "
    "the others in it: its noise scale is not that of independent samples, and neither is what follows from it; take "
    "these numbers as a hint, of this micro-batch size only"
)


def watched(estimate: "NoiseEstimate | None", *, is_coupled: bool, num_skipped: int = 0) -> str:
    """A line on the noise scale for the end of a training that was not about it; empty where it is not known.

    `num_skipped`: updates without a finite gradient at the end of the run, after which it is not that of training.
    """
    if estimate is None or estimate.low == 0 or num_skipped:
        return ""
    interval = f"at least {counted(estimate.low)}"
    if math.isfinite(estimate.high):
        interval = f"between {in_samples(estimate.low)} and {counted(estimate.high)}"
    hint = ", a hint only, because BatchNorm couples them" if is_coupled else ""
    return (
        f"The gradient noise scale is {interval} ({estimate.confidence:.0%}){hint}: macrobatch noise says what follows "
        "from it, docs/noise.md how to read it"
    )


def recommendation(found: "Findings") -> list[str]:
    """The noise scale, what the present batch makes of it, what trains fastest here, and what all of it is not."""
    return [found.estimate.words, _present(found), *_fastest(found), *_coupled(found), _caution(found)]


def _present(found: "Findings") -> str:
    b, known = found.batch_size, found.estimate
    if math.isinf(known.noise_scale):
        return (
            f"The present batch of {b}: no gradient was seen above the noise, so every sample counts in full, and so "
            "would those of any larger batch, as far as this tells. Measure longer for an upper end"
        )
    share = number_text(100 * found.efficiency, 2)
    words = (
        f"The present batch of {b}: a sample makes {share}% of the progress that it makes in the smallest batches. An "
        f"update of {2 * b} is worth {number_text(found.gain(2))} of {b}"
    )
    return words + (f", one of {b // 2} is worth {number_text(found.gain(0.5))}" if b > 1 else "")


def _fastest(found: "Findings") -> list[str]:
    fast = found.fastest
    if fast is None:
        return ["Which batch trains fastest here is not known: no update was timed. Train for more of them"]
    lines = [f"{_times(found)}: {fast.verdict}{_as_good(found)}"]
    if found.is_coupled:
        lines[0] += f". {found.largest} is the model's own micro-batch: it normalises over it"
    slowdown, as_run = found.slowdown(), found.slowdown(found.seconds_as_run)
    if slowdown is not None and as_run is not None:
        lines[0] += f". Training at {found.batch_size} {_longer(slowdown)}"
        at_once = min(found.batch_size, found.largest)
        if found.micro_batch_size < at_once and as_run > CLOSE * slowdown:
            lines[0] += f" with {at_once} in a micro-batch, and in those of {found.micro_batch_size}, as here, "
            lines[0] += _longer(as_run)
    return lines


def _longer(slowdown: float) -> str:
    return f"takes {number_text(slowdown)} times as long to the same loss" if slowdown > CLOSE else "is as fast"


def _times(found: "Findings") -> str:
    """What was timed, at which sizes, and what it comes to where training is fastest."""
    fast, costs = found.fastest, found.costs
    assert fast is not None
    words = f"a sample takes {seconds_text(fast.seconds_per_sample)}"
    besides = f"an update {seconds_text(fast.seconds_per_update)} besides, whatever its size"
    if costs is None or len(costs.seconds) < 2:
        return f"On this machine {words}, and {besides}"
    return (
        f"On this machine, timed in micro-batches of {min(costs.seconds)} to {max(costs.seconds)}, {words} around the "
        f"size that trains fastest, and {besides}"
    )


def _as_good(found: "Findings") -> str:
    """The sizes that training takes hardly longer with, (gamma + c B) (1 + Bn/B) <= CLOSE times the least, in words."""
    fast, bound = found.fastest, float(found.largest)
    if fast is None or not math.isfinite(fast.batch_size) or fast.seconds_per_update <= 0:
        return ""
    gamma, c, scale = fast.seconds_per_update, fast.seconds_per_sample, fast.noise_scale
    half = (CLOSE * (math.sqrt(gamma) + math.sqrt(c * scale)) ** 2 - gamma - c * scale) / (2 * c)
    apart = math.sqrt(max(half**2 - gamma * scale / c, 0.0))
    low, high = max(half - apart, 1.0), half + apart if fast.accumulate else min(half + apart, bound)
    low, high = math.ceil(low), math.floor(high)
    if high <= low:
        return ""
    return f"; any from {in_samples(low)} to {in_samples(high)} is within {CLOSE - 1:.0%} of that"


def _coupled(found: "Findings") -> list[str]:
    return [COUPLED] if found.is_coupled else []


def _caution(found: "Findings") -> str:
    return (
        "What this is not: the critical batch of a language model. Merrill et al. 2025 measured that to be orders of "
        "magnitude above the noise scale, with another trend; macrobatch noise --branched measures it directly, by "
        f"training on at several batch sizes. And it is that of {counted(found.estimate.num_windows, 'update')}: early "
        "in training it is small, and grows"
    )
