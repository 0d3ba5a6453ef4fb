"""What a measured noise scale recommends, in words that follow from the numbers."""

import math
from typing import TYPE_CHECKING

from macrobatch.batch_tradeoff import counted
from macrobatch.cli.formats import number_text, seconds_text

if TYPE_CHECKING:
    from macrobatch.cli.noise import Findings

CLOSE = 1.1  # training that takes so much longer than the fastest is as good: times and noise are not known better


COUPLED = (
    "The model normalises over its micro-batch (BatchNorm in training mode), so that a sample's gradient depends on "
    "the others in it: its noise scale is not that of independent samples, and neither is what follows from it; take "
    "these numbers as a hint, of this micro-batch size only"
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
    times = (
        f"On this machine a sample takes {seconds_text(fast.seconds_per_sample)} in micro-batches of "
        f"{found.micro_batch_size}, and an update {seconds_text(fast.seconds_per_update)} besides"
    )
    lines = [f"{times}: {fast.verdict}"]
    if found.is_coupled:
        lines[0] += f". {found.largest} is the model's own micro-batch: it normalises over it"
    slowdown = fast.slowdown(found.batch_size)
    if math.isfinite(slowdown) and math.isfinite(fast.batch_size):
        longer = f"takes {number_text(slowdown)} times as long to the same loss" if slowdown > CLOSE else "is as fast"
        lines[0] += f". Training at {found.batch_size} {longer}"
    return lines


def _coupled(found: "Findings") -> list[str]:
    return [COUPLED] if found.is_coupled else []


def _caution(found: "Findings") -> str:
    return (
        "What this is not: the critical batch of a language model. Merrill et al. 2025 measured that to be orders of "
        "magnitude above the noise scale, with another trend; macrobatch noise --branched measures it directly, by "
        f"training on at several batch sizes. And it is that of {counted(found.estimate.num_windows, 'update')}: early "
        "in training it is small, and grows"
    )
