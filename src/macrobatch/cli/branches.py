"""What branched training found, as values: branches, which of their batches is the critical one, and how sure that is.

Merrill et al. 2025 (2505.23971): from a checkpoint, branches with the batch k B and the rate f(k) eta, f = k for SGD
and sqrt(k) for Adam, see the same number of samples; L_k is the smoothed loss at the end, and k* the largest k with
L_k <= L_j + tolerance for all j < k. Theirs smooths over updates (EMA, alpha = 0.5). Here losses are first averaged
over the samples of the largest batch, so that all branches are smoothed over the same samples; for the largest it is
theirs.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from statistics import fmean, stdev
from typing import Any

ALPHA = 0.5


@dataclass(frozen=True)
class Branch:
    """One batch size: each repeat's smoothed training loss at its end, and its validation loss.

    `courses`: for each repeat the samples and the mean loss over the samples of the largest batch before them.
    """

    factor: int
    batch_size: int
    learning_rate: float
    updates: int
    losses: tuple[float, ...]
    validation: tuple[float, ...]
    courses: tuple[tuple[tuple[int, float], ...], ...]

    @property
    def loss(self) -> float:
        """L_k: the mean over repeats."""
        return fmean(self.losses)


@dataclass(frozen=True)
class Branches:
    """All branches, by ascending batch size, from one point of training."""

    branches: tuple[Branch, ...]
    tolerance: float
    samples: int
    rule: str
    at_samples: int
    noise_scale: float | None

    @property
    def critical(self) -> Branch:
        """The largest batch whose loss is within the tolerance of that of every smaller one."""
        return max((each for each in self.branches if self.excess(each) <= self.tolerance), key=lambda b: b.factor)

    def best_below(self, branch: Branch) -> Branch | None:
        """The smaller batch with the lowest loss."""
        return min((b for b in self.branches if b.factor < branch.factor), key=lambda b: b.loss, default=None)

    def excess(self, branch: Branch) -> float:
        """How much higher its loss is than the lowest of the smaller ones; 0 for the smallest."""
        below = self.best_below(branch)
        return 0.0 if below is None else branch.loss - below.loss

    def error(self, branch: Branch) -> float | None:
        """The standard error of `excess`, from the differences of repeats on the same samples; None for one repeat."""
        below = self.best_below(branch)
        if below is None or len(branch.losses) < 2:
            return None
        differences = [mine - theirs for mine, theirs in zip(branch.losses, below.losses, strict=True)]
        return float(stdev(differences) / math.sqrt(len(differences)))


def entries(found: Branches, words: Sequence[str]) -> Mapping[str, Any]:
    """Every number of the measurement."""
    table = [
        {**asdict(b), "loss": b.loss, "excess": found.excess(b), "standard_error": found.error(b)}
        for b in found.branches
    ]
    return {
        **{name: getattr(found, name) for name in ("tolerance", "samples", "rule", "at_samples", "noise_scale")},
        "critical_factor": found.critical.factor,
        "critical_batch_size": found.critical.batch_size,
        "branches": table,
        "words": list(words),
    }


def binned(losses: Sequence[float], per_bin: int, largest: int) -> list[tuple[int, float]]:
    """The samples seen, and the mean loss of the `per_bin` updates of the last `largest` of them.

    >>> binned([4.0, 2.0, 3.0, 1.0], 2, 64)
    [(64, 3.0), (128, 2.0)]
    """
    starts = range(0, len(losses), per_bin)
    return [((i + 1) * largest, fmean(losses[start : start + per_bin])) for i, start in enumerate(starts)]


def smoothed_end(losses: Sequence[float]) -> float:
    """The last value of the exponential average with alpha = 0.5, which begins with the first loss.

    >>> smoothed_end([4.0, 2.0, 1.0])
    2.0
    """
    average = losses[0]
    for loss in losses[1:]:
        average = ALPHA * loss + (1 - ALPHA) * average
    return average
