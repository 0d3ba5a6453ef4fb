"""The noise scale while a run trains: after each update, for its row, the bar and the words at the end."""

from collections.abc import Sequence
from contextlib import suppress
from dataclasses import replace
from math import inf
from typing import Any

from macrobatch import GradientMoments, GradientNoiseScale, NoiseEstimate, Report, Window
from macrobatch.batch_tradeoff import in_samples
from macrobatch.tasks import Task


class Weights:
    """What updates weigh in an estimate: their squared gradients, recent ones more; and whether one outweighs all.

    An interval is from the differences between many updates. One whose gradient is a million times the others' decides
    over the sums alone, and the interval around it would have no width. The first does not count: as gradients fall
    from it, it outweighs others, and training is well.
    """

    def __init__(self, half_life: float | None) -> None:
        self._decay = 1.0 if half_life is None else 0.5 ** (1 / half_life)
        self._all = self._largest = 0.0

    def add(self, weight: float) -> None:
        """One more update, of that weight; none where it is not finite."""
        if not 0 <= weight < inf:
            return
        before, self._largest = self._all * self._decay, self._largest * self._decay
        if 0 < before < weight:
            self._largest = weight
        self._all = before + weight

    @property
    def one_outweighs_all(self) -> bool:
        """Whether one update, not the first, weighs more than all others together."""
        return self._largest > self._all / 2


class NoiseWatch:
    """Observes the updates of a run that have several micro-batches. `estimate`: None until there is one.

    Its interval is unknown, from 0 to infinity, while one update outweighs all others: when training diverges.
    """

    def __init__(self, half_life: float | None) -> None:
        self.scale = GradientNoiseScale(half_life=half_life)
        self.estimate: NoiseEstimate | None = None
        self._has_begun = False
        self._weights = Weights(half_life)

    def observe(self, report: Report) -> None:
        """The update counts, unless nothing but updates of one micro-batch came before."""
        if report.moments is not None and (self._has_begun or report.accumulation_steps > 1):
            self.scale.observe(report)
            self._estimate(report.moments)

    def observe_examples(self, task: Task, window: Any, micro_batch_size: int) -> None:
        """The samples of the window's first micro-batch count one by one."""
        batch = next(iter(window)) if isinstance(window, Window) else window
        self._estimate(self.scale.observe_examples(task.model, task.loss_fn, batch, micro_batch_size=micro_batch_size))

    def _estimate(self, moments: GradientMoments) -> None:
        self._has_begun = True
        self._weights.add(float(moments.mean_squared_norm / moments.weighted_inverse_size))
        with suppress(ValueError):  # no update was finite yet
            known = self.scale.estimate()
            self.estimate = replace(known, low=0.0, high=inf) if self._weights.one_outweighs_all else known

    @property
    def entries(self) -> dict[str, float]:
        """The estimate and its interval for a row of the log, samples; infinite where noise hides the gradient."""
        known = self.estimate
        if known is None:
            return {}
        return {"noise_scale": known.noise_scale, "noise_low": known.low, "noise_high": known.high}


def short_interval(rows: Sequence[dict[str, Any]]) -> str:
    """The noise scale of the last row for a line of progress; empty without one, or while nothing bounds it."""
    row = rows[-1]
    low, high = row.get("noise_low", 0.0), row.get("noise_high", float("inf"))
    if low == 0 and high == float("inf"):
        return ""
    return f"noise {in_samples(low)} to {in_samples(high)}" if high < float("inf") else f"noise over {in_samples(low)}"
