"""The bars among the figures of a comparison: what is one number for each way."""

import math
from collections.abc import Mapping

from matplotlib.axes import Axes

from macrobatch.cli.comparison import Comparison, Result
from macrobatch.cli.formats import bytes_text, number_text, with_error
from macrobatch.cli.palette import COLOR, INK, PANEL
from macrobatch.cli.seeds import interval_of
from macrobatch.cli.way import Key


def memory_bars(axes: Axes, comparison: Comparison) -> None:
    """Peak bytes by way, and the budget where there is one."""
    unit, results = 1e6, _measured(comparison)
    values = {key: (result.memory.peak_bytes or 0) / unit for key, result in results.items()}
    labels = {key: _memory_label(result) for key, result in results.items()}
    if comparison.max_memory is not None:
        axes.axvline(comparison.max_memory / unit, color=INK, linewidth=1, linestyle=":", zorder=0.5)
        budget = f"dotted: budget {bytes_text(comparison.max_memory)}"
        axes.set_title(budget, fontsize="small", fontweight="normal", loc="right")
    _bars(axes, comparison, values, labels)
    for bar, result in zip(axes.patches, results.values(), strict=True):
        if not result.memory.fits:
            bar.set(facecolor="none", edgecolor=COLOR[result.way.key], linestyle="--")
    axes.set(xlabel="peak memory in MB")


def _measured(comparison: Comparison) -> Mapping[Key, Result]:
    """Without the scaled rate, which changes neither memory nor time."""
    return {key: result for key, result in comparison.results.items() if key != "scaled"}


def _memory_label(result: Result) -> str:
    at_least = "" if result.memory.fits or result.memory.peak_bytes is None else "≥ "
    return at_least + bytes_text(result.memory.peak_bytes)


def speed_bars(axes: Axes, comparison: Comparison) -> None:
    """Samples per second by way."""
    rates = {
        key: result.course.samples_per_second if result.course else 0 for key, result in _measured(comparison).items()
    }
    labels = {key: number_text(rate) if rate else "not run" for key, rate in rates.items()}
    _bars(axes, comparison, rates, labels)
    axes.set(xlabel="samples per second")


def sharpness_bars(axes: Axes, comparison: Comparison) -> None:
    """The top eigenvalue of the Hessian where each way ended; over seeds the mean and its 95% interval."""
    found = {key: comparison.sharpnesses(key) for key in comparison.results}
    measured = {key: interval_of(values) for key, values in found.items() if values}
    labels: dict[Key, str] = {
        key: str(interval) if math.isfinite(interval.half) else number_text(interval.mean)
        for key, interval in measured.items()
    }
    _bars(axes, comparison, {key: interval.mean for key, interval in measured.items()}, labels)
    for row, interval in enumerate(measured.values()):
        if math.isfinite(interval.half):
            axes.errorbar(interval.mean, row + 0.22, xerr=interval.half, color=INK, capsize=2, linewidth=1)
    ends = [interval.mean + (interval.half if math.isfinite(interval.half) else 0) for interval in measured.values()]
    axes.set(xlabel="largest eigenvalue of the Hessian", xlim=(0, 1.4 * max(ends, default=0) or 1))


def metric_bars(axes: Axes, comparison: Comparison) -> None:
    """Each metric at the end, by way, and dotted what it was before training."""
    trained = [result for result in comparison.results.values() if result.course is not None]
    height = 0.8 / len(trained)
    for place, result in enumerate(trained):
        assert result.course is not None
        values = [result.course.final.metrics[name] for name in comparison.metric_names]
        rows = [row + (place - (len(trained) - 1) / 2) * height for row in range(len(values))]
        bars = axes.barh(rows, values, height * 0.9, color=COLOR[result.way.key], label=result.way.name)
        axes.bar_label(bars, [number_text(value) for value in values], padding=3, color=INK, fontsize="x-small")
    for row, name in enumerate(comparison.metric_names):
        if name in comparison.metrics_before:
            before = [comparison.metrics_before[name]] * 2
            label = None if row else "before training"
            axes.plot(before, [row - 0.45, row + 0.45], color=INK, linestyle=":", linewidth=1.2, label=label)
    axes.set_yticks(range(len(comparison.metric_names)), comparison.metric_names)
    axes.invert_yaxis()
    axes.grid(visible=False, axis="y")
    axes.margins(x=0.15)
    axes.legend(fontsize="x-small", loc="upper center", bbox_to_anchor=(0.5, -0.12), ncols=2)


def variance_by_way(axes: Axes, comparison: Comparison) -> None:
    """Gradient variance of each way's update, bars of two standard errors; no law is drawn."""
    measured = {key: result.variance for key, result in comparison.results.items() if result.variance is not None}
    labels = {key: with_error(found.value, found.standard_error) for key, found in measured.items()}
    _bars(axes, comparison, {key: found.value for key, found in measured.items()}, labels)
    axes.set(xlabel="variance of the gradient")


def _bar_name(result: Result) -> str:
    name = result.way.name.replace("native ", "native\n").replace(", ", ",\n").replace(" acc", "\nacc")
    return name if result.memory.fits else f"{name}\n(does not fit)"


def _bars(axes: Axes, comparison: Comparison, values: Mapping[Key, float], labels: Mapping[Key, str]) -> None:
    names = [_bar_name(comparison.results[key]) for key in values]
    bars = axes.barh(names, list(values.values()), color=[COLOR[key] for key in values], height=0.6)
    behind = {"facecolor": PANEL, "edgecolor": "none", "pad": 1}  # no line runs through the numbers
    axes.bar_label(bars, list(labels.values()), padding=4, color=INK, bbox=behind)
    axes.invert_yaxis()
    axes.grid(visible=False, axis="y")
    axes.margins(x=0.35)
    axes.set_xlim(left=0)
