"""Averages of many windows' moments, without bias where windows differ in size, and what is known of their error.

Window t has the moments A = sum_j w_j |g_j|^2 and Q = |gbar|^2, and N = 1 / sum_j w_j^2/n_j samples. Kept are sums over
windows, weighted by how recent they are, of five numbers x_t, so that with S and |G|^2 the same in all of them

    x = [N (A - Q), N (sum_j w_j/n_j) - 1, N Q, N, 1]         E[x_1] = S E[x_2]       E[x_3] = |G|^2 E[x_4] + S E[x_5]

The weight of a window is thus its K - 1 in S, the inverse of that estimate's variance, and its N in |G|^2. A window of
one micro-batch tells nothing about S, and still something about |G|^2.
"""

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

from macrobatch.distributed import Ranks
from macrobatch.moments import GradientMoments
from macrobatch.report import Report

MOST_BLOCKS = 64
BLOCKS_PER_HALF_LIFE = 8
MOST_PENDING = 256  # windows between two host syncs, at most


def moments_of(report: Report | GradientMoments, reader: str) -> GradientMoments:
    """The moments in `report`; ValueError, saying what `reader` needs, if they were not measured."""
    if isinstance(report, GradientMoments):
        return report
    if not isinstance(report, Report):
        raise ValueError(f"{reader} takes the Report of Accumulator.run, got a {type(report).__name__}")
    if report.moments is None:
        raise ValueError(f"{reader} needs the micro-batches' gradient norms: Accumulator(..., measure='norms')")
    return report.moments


def is_single(report: Report | GradientMoments) -> bool:
    """Whether the window had one micro-batch or none over all ranks, as far as can be told without a host sync."""
    if isinstance(report, Report):
        return report.accumulation_steps <= 1 and Ranks(report.process_group).size == 1
    return report.num_micro_batches.device.type == "cpu" and int(report.num_micro_batches) <= 1


class MomentAverage:
    """Weighted sums of x over windows, in blocks of consecutive ones; a window's weight halves every `half_life`.

    At most 64 blocks are kept. While all of them are in use, pairs are joined and blocks become twice as long; once an
    eighth of the half-life is in each, the two oldest are joined instead. Windows that are not finite are left out.
    `add` does not wait for the device; reading does.
    """

    def __init__(self, half_life: float | None) -> None:
        self._decay = 1.0 if half_life is None else 0.5 ** (1 / half_life)
        self._longest = float("inf") if half_life is None else half_life / BLOCKS_PER_HALF_LIFE
        self._pending: list[Tensor] = []
        self._blocks = np.zeros((0, 5))
        self._length, self._filled = 1, 0  # windows in a full block, and in the last one
        self._count, self._ignored = 0, 0

    def add(self, moments: GradientMoments) -> None:
        """One more window counts."""
        n = 1 / moments.weighted_inverse_size
        between = moments.mean_squared_norm - moments.squared_norm
        terms = [n * between, n * moments.inverse_size - 1, n * moments.squared_norm, n, torch.ones_like(n)]
        self._pending.append(torch.stack(terms))
        if len(self._pending) >= MOST_PENDING:
            self._fold_pending()

    def blocks(self) -> np.ndarray:
        """The sums of x in each block, the oldest first: shape (blocks, 5)."""
        self._fold_pending()
        return self._blocks

    @property
    def num_windows(self) -> int:
        """How many windows count."""
        self._fold_pending()
        return self._count

    @property
    def num_ignored(self) -> int:
        """How many windows were left out because they were not finite, or had no terms."""
        self._fold_pending()
        return self._ignored

    def _fold_pending(self) -> None:
        if not self._pending:
            return
        rows = torch.stack(self._pending).double().cpu().numpy()
        self._pending = []
        for row in rows:
            if np.isfinite(row).all():
                self._fold(row)
            else:
                self._ignored += 1

    def _fold(self, row: np.ndarray) -> None:
        self._count += 1
        self._blocks = self._blocks * self._decay
        if not len(self._blocks) or self._filled >= self._length:
            self._make_room()
            self._blocks = np.vstack([self._blocks, np.zeros((1, 5))])
            self._filled = 0
        self._blocks[-1] += row
        self._filled += 1

    def _make_room(self) -> None:
        if len(self._blocks) < MOST_BLOCKS:
            return
        if self._length < self._longest:
            self._blocks = self._blocks.reshape(-1, 2, 5).sum(1)
            self._length *= 2
        else:
            self._blocks = np.vstack([self._blocks[:2].sum(0), self._blocks[2:]])

    def state_dict(self) -> dict[str, Any]:
        """The sums, as plain numbers."""
        return {
            "blocks": self.blocks().tolist(),
            "length": self._length,
            "filled": self._filled,
            "count": self._count,
            "ignored": self._ignored,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """The sums are those of `state`."""
        self._pending = []
        self._blocks = np.array(state["blocks"], dtype=np.float64).reshape(-1, 5)
        self._length, self._filled = state["length"], state["filled"]
        self._count, self._ignored = state["count"], state["ignored"]
