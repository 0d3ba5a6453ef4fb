"""Would recomputing activations beat smaller micro-batches? Both numbers.

A micro-batch of b samples takes alpha + beta b seconds. Recomputing the forward makes it alpha + 4/3 beta b, because a
backward takes twice a forward, and lets b' > b samples fit. Per sample that is beta (1 + h / b) against beta (4/3 + h /
b') with h = alpha / beta, so checkpointing pays where h (1 / b - 1 / b') > 1/3: only if b is very small, or nothing.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from macrobatch.fitting import Account
from macrobatch.prediction import Trace, largest_predicted
from macrobatch.speed import even_size, fixed_and_per_sample

RECOMPUTING = 4 / 3  # forward, backward and forward again over forward and backward


@dataclass(frozen=True)
class Checkpointing:
    """The largest micro-batch with the model's blocks checkpointed, the seconds per sample of both ways, a verdict.

    `micro_batch_size`: predicted from the plain run, an estimate on the safe side; None where there is nothing to
    compare. `pays`: None where that is not known: the seconds were not measured.
    """

    num_blocks: int
    verdict: str
    micro_batch_size: int | None = None
    seconds_per_sample: float | None = None
    seconds_per_sample_without: float | None = None
    pays: bool | None = None


def compare_checkpointing(
    account: Account, traces: Sequence[Trace], plain_size: int, seconds: Mapping[int, float]
) -> Checkpointing:
    """Checkpointing of the blocks against micro-batches of `plain_size`. `seconds`: measured, by micro-batch size."""
    num_blocks = traces[0].num_blocks
    if num_blocks == 0:
        return Checkpointing(0, "not compared: the model has no list or sequence of layers of one class")
    recomputing = [trace.with_checkpointing() for trace in traces if trace.checkpointed is not None]
    if not recomputing:
        return Checkpointing(num_blocks, f"its {num_blocks} blocks keep nothing to recompute: checkpointed already?")
    if plain_size >= account.num_samples:
        return Checkpointing(num_blocks, "not needed: the whole batch fits in one micro-batch")
    size = largest_predicted(recomputing, account.room, 0, account.num_samples)
    fits = f"with its {num_blocks} blocks checkpointed about {size} samples fit, without {plain_size}"
    if not seconds:
        return Checkpointing(num_blocks, f"{fits}; the speed was not measured", size)
    alpha, beta = fixed_and_per_sample(seconds)
    run = even_size(account.num_samples, max(size, 1))
    with_, without = alpha / run + RECOMPUTING * beta, min(time / b for b, time in seconds.items())
    pays = with_ < without
    better = "checkpointing is faster" if pays else "smaller micro-batches are faster"
    numbers = f"{1e3 * with_:.3g} ms per sample against {1e3 * without:.3g} ms"
    return Checkpointing(num_blocks, f"{better}: {numbers}; {fits}", size, with_, without, pays)
