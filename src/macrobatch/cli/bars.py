"""The bars among the figures of a comparison: what is one number for each way."""

import math
from collections.abc import Mapping, Sequence

from matplotlib.axes import Axes

from macrobatch.cli.comparison import Comparison, Result
from macrobatch.cli.formats import bytes_text, bytes_unit, number_text, with_error
from macrobatch.cli.palette import COLOR, FAINT, INK
from macrobatch.cli.plots import few_ticks, legend_below
from macrobatch.cli.seeds import interval_of
from macrobatch.cli.way import Key


def memory_bars(axes: Axes, comparison: Comparison) -> None:
    """Peak bytes by way, and the budget where there is one."""
    results = _measured(comparison)
    values = {key: float(result.memory.peak_bytes or 0) for key, result in results.items()}
    unit, name = bytes_unit(max(*values.values(), comparison.max_memory or 0))
    values = {key: value / unit for key, value in values.items()}
    labels = {key: _memory_label(result) for key, result in results.items()}
    if comparison.max_memory is not None:
        axes.axvline(comparison.max_memory / unit, color=INK, linewidth=1, linestyle=":", zorder=0.5)
        budget = f"dotted: budget {bytes_text(comparison.max_memory)}"
        axes.set_title(budget, fontsize="small", fontweight="normal", loc="right")
    _bars(axes, comparison, values, labels)
    for bar, result in zip(axes.patches, results.values(), strict=True):
        if not result.memory.fits:
            bar.set(facecolor="none", edgecolor=COLOR[result.way.key], linestyle="--")
    axes.set(xlabel=f"peak memory in {name}")


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
    labels = {key: f"{rate:,.0f}" if rate else "not run" for key, rate in rates.items()}
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
    axes.set(xlabel="largest eigenvalue of the Hessian")
    axes.set_xlim(left=0)


def metric_bars(axes: Axes, comparison: Comparison) -> None:
    """Each metric before training and at the end, by way."""
    names, before = comparison.metric_names, comparison.metrics_before
    bars = [("before training", FAINT, [before.get(name, math.nan) for name in names])] if before else []
    for result in comparison.results.values():
        if result.course is not None:
            metrics = result.course.final.metrics
            bars.append((result.way.name, COLOR[result.way.key], [metrics[name] for name in names]))
    height = 0.84 / len(bars)
    for place, (label, color, values) in enumerate(bars):
        rows = [row + (place - (len(bars) - 1) / 2) * height for row in range(len(values))]
        axes.barh(rows, values, height * 0.9, color=color, label=label)
        _numbers(axes, rows, [number_text(value) for value in values], size="x-small" if len(names) > 1 else "small")
    axes.set_yticks(range(len(names)), list(names))
    axes.invert_yaxis()
    axes.grid(visible=False, axis="y")
    few_ticks(axes)
    legend_below(axes)


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
    axes.barh(names, list(values.values()), color=[COLOR[key] for key in values], height=0.6)
    _numbers(axes, range(len(names)), list(labels.values()))
    axes.invert_yaxis()
    axes.grid(visible=False, axis="y")
    few_ticks(axes)
    axes.set_xlim(left=0)


def _numbers(axes: Axes, rows: Sequence[float], labels: Sequence[str], size: str = "medium") -> None:
    """A column of numbers to the right of the axes, where no bar, grid or budget runs through them."""
    for row, label in zip(rows, labels, strict=True):
        axes.text(1.02, row, label, transform=axes.get_yaxis_transform(), va="center", color=INK, fontsize=size)
