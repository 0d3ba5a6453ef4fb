"""The figures of a comparison: as files, and as SVG whose colours follow the page it stands in."""

import io
import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, FuncFormatter, NullLocator

from macrobatch.cli.comparison import Comparison, Course, Key, Result
from macrobatch.cli.finding import is_clear
from macrobatch.cli.formats import bytes_text, number_text
from macrobatch.cli.plots import STYLE, smoothed, thousands
from macrobatch.cli.seeds import interval_of

COLOR: Mapping[Key, str] = {"small": "#d55e00", "accumulated": "#0072b2", "native": "#009e73", "scaled": "#a6438a"}
INK, FAINT, PANEL = "#1b1f24", "#8b949e", "#fefefe"
# What stands for each of these colours in a page: its style sheet has a light and a dark value.
VARIABLES = {
    INK: "var(--ink)",
    FAINT: "var(--faint)",
    PANEL: "var(--panel)",
    **{color: f"var(--{key})" for key, color in COLOR.items()},
}
LINE: Mapping[Key, Any] = {"small": "-", "accumulated": "-", "native": (0, (4, 3)), "scaled": "-"}


@dataclass(frozen=True)
class Plot:
    """A figure with its name in the page, what it shows in a sentence, and how to draw it."""

    name: str
    caption: str
    draw: Callable[[Axes, Comparison], None]


def loss_over_samples(axes: Axes, comparison: Comparison) -> None:
    """Validation loss, and the training loss behind it, over the samples seen."""
    for result in comparison.results.values():
        if result.course is not None:
            _loss_curves(axes, result, result.course, lambda samples: samples)
    axes.set(xlabel="samples", ylabel="loss")
    thousands(axes)
    axes.legend()


def loss_over_updates(axes: Axes, comparison: Comparison) -> None:
    """The same losses over the number of updates."""
    for result in comparison.results.values():
        if result.course is not None:
            updates = {n: number for number, (n, _) in enumerate(result.course.losses, 1)} | {0: 0}
            _loss_curves(axes, result, result.course, updates.__getitem__)
    axes.set(xlabel="updates", ylabel="loss")
    thousands(axes)
    axes.legend()


def loss_over_seconds(axes: Axes, comparison: Comparison) -> None:
    """The same losses over the seconds of computing that the samples take at the median speed."""
    for result in comparison.results.values():
        if result.course is not None:
            rate = result.course.samples_per_second
            seconds = {n: n / rate for n, _ in [(0, 0.0), *result.course.losses]}
            _loss_curves(axes, result, result.course, seconds.__getitem__)
    axes.set(xlabel="seconds of computing", ylabel="loss")
    axes.legend()


def _loss_curves(axes: Axes, result: Result, course: Course, x_of: Callable[[int], float]) -> None:
    key = result.way.key
    training = smoothed([loss for _, loss in course.losses], max(1, len(course.losses) // 32))
    axes.plot([x_of(n) for n, _ in course.losses], training, color=COLOR[key], linewidth=0.8, alpha=0.35)
    # Where native and accumulation coincide, both show: open squares on a dashed line around dots on a solid one.
    look: dict[str, Any] = {"marker": "^" if key == "scaled" else "o", "markersize": 4}
    if key == "native":
        look = {"marker": "s", "markersize": 7, "markerfacecolor": "none"}
    x, losses = [x_of(n) for n, _ in course.validation_losses], [loss for _, loss in course.validation_losses]
    axes.plot(x, losses, color=COLOR[key], linestyle=LINE[key], label=result.way.name, **look)


def memory_bars(axes: Axes, comparison: Comparison) -> None:
    """Peak bytes by way, and the budget where there is one."""
    unit, results = 1e6, _three(comparison)
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


def _three(comparison: Comparison) -> Mapping[Key, Result]:
    """Without the scaled rate, which changes neither memory nor time."""
    return {key: result for key, result in comparison.results.items() if key != "scaled"}


def _memory_label(result: Result) -> str:
    at_least = "" if result.memory.fits or result.memory.peak_bytes is None else "≥ "
    return at_least + bytes_text(result.memory.peak_bytes)


def variance_by_size(axes: Axes, comparison: Comparison) -> None:
    """Gradient variance by update size on two logarithmic axes, with the line it should follow."""
    sizes = list(comparison.variances)
    base = comparison.variances[sizes[0]].value
    line = [base * comparison.expected_variance_ratio(size, sizes[0]) for size in sizes]
    axes.plot(sizes, line, color=FAINT, linestyle="--", linewidth=1.2, label="expected: 1/B")
    for size, estimate in comparison.variances.items():
        key: Key = "small" if size == comparison.micro_batch_size else "accumulated"
        label = {sizes[0]: "small batch", sizes[-1]: "accumulation"}.get(size)
        error = 2 * estimate.standard_error
        axes.errorbar(size, estimate.value, yerr=error, color=COLOR[key], marker="o", capsize=3, ls="none", label=label)
    native = comparison.results["native"]
    if native.variance is not None:
        axes.plot(native.way.update_size, native.variance.value, color=COLOR["native"], marker="s", markersize=10,
                  markerfacecolor="none", linestyle="none", label=native.way.name)  # fmt: skip
    axes.set(xlabel="samples in an update", ylabel="variance of the gradient", xscale="log", yscale="log")
    axes.xaxis.set(major_locator=FixedLocator(sizes), minor_locator=NullLocator())
    thousands(axes)
    axes.set_ylim(min(line) / 2, max(line) * 2)
    _plain_ticks(axes)
    axes.legend()


def _plain_ticks(axes: Axes) -> None:
    """Numbers in place of powers of ten on a logarithmic y axis: 1, 2, 5, 10."""
    low, high = axes.get_ylim()
    ticks = [tick * 10.0**power for power in range(-12, 12) for tick in (1, 2, 5) if low <= tick * 10.0**power <= high]
    axes.yaxis.set(major_locator=FixedLocator(ticks), minor_locator=NullLocator())
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:.3g}"))


def speed_bars(axes: Axes, comparison: Comparison) -> None:
    """Samples per second by way."""
    rates = {
        key: result.course.samples_per_second if result.course else 0 for key, result in _three(comparison).items()
    }
    labels = {key: number_text(rate) if rate else "not run" for key, rate in rates.items()}
    _bars(axes, comparison, rates, labels)
    axes.set(xlabel="samples per second")


def noise_over_samples(axes: Axes, comparison: Comparison) -> None:
    """The gradient noise scale along the run with the scaled rate, and where accumulation ended; and the batch size."""
    course = comparison.results["scaled"].course if "scaled" in comparison.results else None
    points = [] if course is None else [point for point in course.noise if math.isfinite(point.noise_scale)]
    scales = [point.noise_scale for point in points]
    axes.plot([point.samples for point in points], scales, color=COLOR["scaled"], marker="^", markersize=4,
              label="lr scaled, by windows")  # fmt: skip
    known = [point for point in points if point.low > 0 and math.isfinite(point.high)]
    low, high = [point.low for point in known], [point.high for point in known]
    axes.fill_between([point.samples for point in known], low, high, color=COLOR["scaled"], alpha=0.2, linewidth=0)
    end, seen = comparison.noise_scale, [*scales, *low, *high, comparison.batch_size]
    if math.isfinite(end.value) and is_clear(comparison.gradient_squared):
        seen.append(end.value)
        axes.errorbar(comparison.samples, end.value, yerr=2 * end.standard_error, color=COLOR["accumulated"],
                      marker="o", capsize=3, ls="none", label="accumulation, by draws")  # fmt: skip
    axes.axhline(comparison.batch_size, color=INK, linewidth=1, ls=":", label=f"batch size {comparison.batch_size}")
    axes.set(xlabel="samples", ylabel="noise scale in samples", yscale="log", ylim=(min(seen) / 2, max(seen) * 2))
    _plain_ticks(axes)
    thousands(axes)
    axes.legend(loc="lower right")


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


def _bar_name(result: Result) -> str:
    name = result.way.name.replace("native ", "native\n").replace(", ", ",\n")
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


PLOTS: Sequence[Plot] = (
    Plot(
        "loss-samples", "Loss over samples seen: lines with marks validation, faint lines training", loss_over_samples
    ),
    Plot("loss-updates", "The same losses over updates", loss_over_updates),
    Plot("loss-seconds", "The same losses over time, at the median speed", loss_over_seconds),
    Plot("speed", "Speed of computing, median over effective batches", speed_bars),
    Plot("memory", "Peak memory: parameters, gradients, optimizer state, activations, input", memory_bars),
    Plot(
        "variance", "Variance of an update's gradient at common parameters, bars of 2 standard errors", variance_by_size
    ),
    Plot("noise", "Gradient noise scale along the way, with its 95% interval", noise_over_samples),
    Plot("sharpness", "Sharpness at the end: the Hessian's largest eigenvalue", sharpness_bars),
)


def plots_of(comparison: Comparison) -> list[Plot]:
    """The figures that there is something to draw in."""
    has_sharpness = any(comparison.sharpnesses(key) for key in comparison.results)
    return [plot for plot in PLOTS if plot.name != "sharpness" or has_sharpness]


def inline_svg(plot: Plot, comparison: Comparison) -> str:
    """The plot as an SVG element for a page: no header, no addresses, its own ids, colours by the page's variables."""
    with rc_context({**STYLE, **_ink(), "font.size": 12}):
        figure = Figure(figsize=(5.2, 3.6), layout="constrained")
        plot.draw(figure.subplots(), comparison)
        buffer = io.StringIO()
        no_metadata = dict.fromkeys(("Creator", "Date", "Format", "Type"))
        figure.savefig(buffer, format="svg", transparent=True, metadata=no_metadata)
    svg = buffer.getvalue()
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r' xmlns(:xlink)?="[^"]*"', "", svg)
    svg = re.sub(r"xlink:href", "href", svg)
    svg = re.sub(r'((?: id|href)="#?|url\(#)', rf"\g<1>{plot.name}-", svg)
    svg = re.sub(
        r"<svg [^>]*?(viewBox=\"[^\"]*\")[^>]*>", rf'<svg \1 role="img" aria-label="{plot.caption}">', svg, count=1
    )
    svg = re.sub(r"font: (\d+(?:\.\d+)?px) [^;\"]*", r"font-size: \1", svg)
    for color, variable in VARIABLES.items():
        svg = svg.replace(color, variable)
    return svg


def save_main_picture(path: Path, comparison: Comparison) -> None:
    """Loss, memory and gradient variance side by side in one picture, on white."""
    with rc_context({**STYLE, **_ink()}):
        figure = Figure(figsize=(14, 4.2), layout="constrained", facecolor="white")
        chosen = [plot for plot in PLOTS if plot.name in ("loss-samples", "memory", "variance")]
        for axes, plot in zip(figure.subplots(1, 3), chosen, strict=True):
            plot.draw(axes, comparison)
            axes.set_title({"loss-samples": "Loss", "memory": "Memory", "variance": "Gradient noise"}[plot.name])
        figure.savefig(path, dpi=120)


def _ink() -> dict[Any, Any]:
    names = ("text.color", "axes.labelcolor", "axes.edgecolor", "xtick.color", "ytick.color", "axes.titlecolor")
    return dict.fromkeys(names, INK) | {"grid.color": FAINT}
