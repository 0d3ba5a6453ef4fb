"""What a spike guard sees of a window, and what it decides, as values."""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from macrobatch.distributed import Ranks
from macrobatch.gradients import norm_of
from macrobatch.outliers import norm_ratios
from macrobatch.report import Report

HOPELESS = (
    "Parameters are those after {} accepted updates, and training from there does not recover: look at the data, start "
    "from an older checkpoint with a lower learning rate, or raise threshold if such values are normal here. Where "
    "batches are drawn from torch's own generator, going back draws the same ones again: give the loader its own, or "
    "restore_random=False"
)
BLAMED = 4.0  # times the mean of the window's other micro-batches


class SpikeError(RuntimeError):
    """The guard gave up: training does not recover by itself. The run is at its last good state."""


@dataclass(frozen=True)
class SpikeVerdict:
    """What is to become of a window. `accepted`: apply it; otherwise its gradients are gone, and there is no update.

    `kind`: "accepted", "warned" (a spike, and applied all the same), "skipped", or "rolled_back" (the run is as it was
    after `back_to` accepted updates). `why`: in words, empty if accepted. `loss`, `grad_norm`: of the window, before
    clipping. `loss_score`, `norm_score`: standard deviations above the updates before, None as long as there are too
    few. `micro_batch`, `rank`: which micro-batch stands out by its own gradient, and on which rank; None without
    `Accumulator(measure="norms")`, and where none does.
    """

    kind: Literal["accepted", "warned", "skipped", "rolled_back"]
    why: str
    loss: float
    grad_norm: float
    loss_score: float | None = None
    norm_score: float | None = None
    micro_batch: int | None = None
    rank: int | None = None
    back_to: int | None = None

    @property
    def accepted(self) -> bool:
        """Whether the update is to be made."""
        return self.kind in ("accepted", "warned")


@dataclass(frozen=True)
class Seen:
    """A window in numbers on the host. `variance`, `squared_mean`: of its gradient, NaN where nothing measured them."""

    loss: float
    grad_norm: float
    num_samples: float
    has_terms: bool
    variance: float
    squared_mean: float

    @property
    def is_finite(self) -> bool:
        """Whether loss and gradients are."""
        return math.isfinite(self.loss) and math.isfinite(self.grad_norm)


def see(report: Report, parameters: Iterable[nn.Parameter]) -> Seen:
    """What a report and the gradients of `parameters` say: one host sync."""
    norm = norm_of(p.grad for p in parameters)
    moments = report.moments
    samples = report.sample_count
    told = [report.loss, norm, samples if isinstance(samples, Tensor) else torch.tensor(samples), report.has_terms]
    told += [] if moments is None else [moments.variance, moments.squared_mean]
    device = report.loss.device
    wide = torch.float32 if device.type == "mps" else torch.float64
    loss, grad_norm, num_samples, has_terms, *noise = torch.stack(
        [each.detach().to(device, wide) for each in told]
    ).tolist()
    return Seen(loss, grad_norm, num_samples, bool(has_terms), *(noise or (math.nan, math.nan)))


def culprit(report: Report, variance: float, squared_mean: float, ranks: Ranks) -> tuple[int, int] | None:
    """(rank, micro-batch) of the one whose squared gradient norm is at least 4 times what the others' are, or None.

    Each is taken relative to its expectation |G|^2 + S/n_j, with `variance` S and `squared_mean` |G|^2 of the windows
    before, so that micro-batches of few samples are not blamed for their size. One that is not finite comes first; if
    all are not, none is to blame. Communicates if there are several ranks, and reads the host.
    """
    if report.moments is None:
        return None
    norms: list[float] = report.moments.squared_norms.tolist()
    ratios = norm_ratios(norms, report.micro_batch_sizes, variance=variance, squared_mean=squared_mean)
    sound = [ratio for ratio in ratios if 0 < ratio < math.inf]  # 0: without terms
    total, count = ranks.sum(torch.tensor([sum(sound), float(len(sound))], dtype=torch.float64)).tolist()
    scores = [_against_others(ratio, total, count) for ratio in ratios]
    best = max(range(len(scores)), key=scores.__getitem__, default=None)
    everyones = torch.zeros(ranks.size, dtype=torch.float64)
    everyones[ranks.rank] = -1.0 if best is None else min(scores[best], 1e300)
    highest = ranks.maximum(everyones)
    rank = int(highest.argmax())
    index = ranks.maximum(torch.tensor([best if rank == ranks.rank and best is not None else 0]))
    return (rank, int(index)) if float(highest[rank]) >= BLAMED else None


def _against_others(ratio: float, total: float, count: float) -> float:
    if not math.isfinite(ratio):
        return math.inf if count else 0.0
    if count < 2:
        return 0.0
    others = (total - ratio) / (count - 1)
    return ratio / others if others > 0 else 0.0


def describe(seen: Seen, scores: Sequence[float | None], threshold: float, typical: Sequence[float]) -> str:
    """The reason in words: what is not finite, or what lies how far above what."""
    if not seen.is_finite:
        names = [name for name, value in _named(seen) if not math.isfinite(value)]
        return f"{' and '.join(names)} not finite"
    parts = [
        f"{name} {value:.4g} is {score:.1f} standard deviations above its median of {usual:.4g}"
        for (name, value), score, usual in zip(_named(seen), scores, typical, strict=True)
        if score is not None and score > threshold
    ]
    return ", ".join(parts)


def _named(seen: Seen) -> tuple[tuple[str, float], tuple[str, float]]:
    return ("loss", seen.loss), ("gradient norm", seen.grad_norm)
