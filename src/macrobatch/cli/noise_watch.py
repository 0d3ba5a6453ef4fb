"""The noise scale while a run trains: after each update, for its row, the bar and the words at the end."""

from collections.abc import Sequence
from contextlib import suppress
from typing import Any

from macrobatch import GradientNoiseScale, NoiseEstimate, Report, Window
from macrobatch.batch_tradeoff import in_samples
from macrobatch.tasks import Task


class NoiseWatch:
    """Observes the updates of a run that have several micro-batches. `estimate`: None until there is one."""

    def __init__(self, half_life: float | None) -> None:
        self.scale = GradientNoiseScale(half_life=half_life)
        self.estimate: NoiseEstimate | None = None
        self._has_begun = False

    def observe(self, report: Report) -> None:
        """The update counts, unless nothing but updates of one micro-batch came before."""
        if report.moments is not None and (self._has_begun or report.accumulation_steps > 1):
            self.scale.observe(report)
            self._estimate()

    def observe_examples(self, task: Task, window: Any, micro_batch_size: int) -> None:
        """The samples of the window's first micro-batch count one by one."""
        batch = next(iter(window)) if isinstance(window, Window) else window
        self.scale.observe_examples(task.model, task.loss_fn, batch, micro_batch_size=micro_batch_size)
        self._estimate()

    def _estimate(self) -> None:
        self._has_begun = True
        with suppress(ValueError):  # no update was finite yet
            self.estimate = self.scale.estimate()

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
