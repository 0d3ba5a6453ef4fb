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
from matplotlib.ticker import FixedLocator, NullLocator

from macrobatch.cli.bars import memory_bars, metric_bars, sharpness_bars, speed_bars, variance_by_way
from macrobatch.cli.comparison import Comparison, Course, Result
from macrobatch.cli.finding import is_clear
from macrobatch.cli.palette import COLOR, FAINT, INK, VARIABLES
from macrobatch.cli.plots import STYLE, few_ticks, legend_below, log_ticks, smoothed, thousands
from macrobatch.cli.way import Key

LINE: Mapping[Key, Any] = {"small": "-", "plain": (0, (1, 1)), "accumulated": "-", "native": (0, (4, 3)), "scaled": "-"}


@dataclass(frozen=True)
class Plot:
    """A figure with its name in the page, what it shows in a sentence, and how to draw it."""

    name: str
    caption: str
    draw: Callable[[Axes, Comparison], None]


def loss_over_samples(axes: Axes, comparison: Comparison) -> None:
    """Validation loss, and the training loss behind it, over the samples seen."""
    _losses(axes, comparison, lambda _: float, "samples")


def loss_over_updates(axes: Axes, comparison: Comparison) -> None:
    """The same losses over the number of updates."""

    def updates_of(course: Course) -> Callable[[int], float]:
        numbers: dict[int, float] = {n: number for number, (n, _) in enumerate(course.losses, 1)}
        return {0: 0.0, **numbers}.__getitem__

    _losses(axes, comparison, updates_of, "updates")


def loss_over_seconds(axes: Axes, comparison: Comparison) -> None:
    """The same losses over the seconds of computing that the samples take at the median speed."""
    _losses(axes, comparison, lambda course: lambda n: n / course.samples_per_second, "seconds of computing")


def _losses(
    axes: Axes, comparison: Comparison, scale_of: Callable[[Course], Callable[[int], float]], xlabel: str
) -> None:
    """The curves of every way over what `scale_of` makes of the samples that were seen."""
    for result in comparison.results.values():
        if result.course is not None:
            _loss_curves(axes, comparison, result, result.course, scale_of(result.course))
    axes.set(xlabel=xlabel, ylabel="loss")
    few_ticks(axes)
    legend_below(axes)


def _loss_curves(
    axes: Axes, comparison: Comparison, result: Result, course: Course, x_of: Callable[[int], float]
) -> None:
    key = result.way.key
    if not comparison.is_coupled:  # else the training losses are different functions
        training = smoothed([loss for _, loss in course.losses], max(1, len(course.losses) // 32))
        axes.plot([x_of(n) for n, _ in course.losses], training, color=COLOR[key], linewidth=0.8, alpha=0.35)
    # Where native and accumulation coincide, both show: open squares on a dashed line around dots on a solid one.
    look: dict[str, Any] = {"marker": {"scaled": "^", "plain": "v"}.get(key, "o"), "markersize": 4}
    if key == "native":
        look = {"marker": "s", "markersize": 7, "markerfacecolor": "none"}
    x, losses = [x_of(n) for n, _ in course.validation_losses], [loss for _, loss in course.validation_losses]
    axes.plot(x, losses, color=COLOR[key], linestyle=LINE[key], label=result.way.name, **look)


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
    log_ticks(axes)
    legend_below(axes)


def noise_over_samples(axes: Axes, comparison: Comparison) -> None:
    """The gradient noise scale along the run with the scaled rate, and where accumulation ended; and the batch size."""
    course = comparison.results["scaled"].course if "scaled" in comparison.results else None
    watched = () if course is None or course.broke_down else course.noise
    points = [point for point in watched if math.isfinite(point.noise_scale)]
    scales = [point.noise_scale for point in points]
    axes.plot([point.samples for point in points], scales, color=COLOR["scaled"], marker="^", markersize=4,
              label="lr scaled, by windows")  # fmt: skip
    ends = [end for point in points for end in (point.low, point.high) if 0 < end < math.inf]
    end, seen = comparison.noise_scale, [*scales, *ends, comparison.batch_size]
    if math.isfinite(end.value) and is_clear(comparison.gradient_squared):
        seen.append(end.value)
        axes.errorbar(comparison.samples, end.value, yerr=2 * end.standard_error, color=COLOR["accumulated"],
                      marker="o", capsize=3, ls="none", label="accumulation, by draws")  # fmt: skip
    bottom, top = min(seen) / 2, max(seen) * 2
    # An interval without an end on one side goes to the edge.
    low, high = [max(point.low, bottom) for point in points], [min(point.high, top) for point in points]
    axes.fill_between([point.samples for point in points], low, high, color=COLOR["scaled"], alpha=0.2, linewidth=0)
    axes.axhline(comparison.batch_size, color=INK, linewidth=1, ls=":", label=f"batch size {comparison.batch_size}")
    axes.set(xlabel="samples", ylabel="noise scale in samples", yscale="log", ylim=(bottom, top))
    log_ticks(axes)
    few_ticks(axes)
    legend_below(axes)


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


# Where the loss compares samples: training losses are different functions, and there is no law of the variance.
COUPLED_PLOTS: Sequence[Plot] = (
    Plot("loss-samples", "Validation loss over samples seen, the same held-out samples for all", loss_over_samples),
    Plot("metrics", "Metrics over the held-out samples at the end", metric_bars),
    Plot("loss-updates", "The same losses over updates", loss_over_updates),
    Plot("loss-seconds", "The same losses over time, at the median speed", loss_over_seconds),
    *(plot for plot in PLOTS if plot.name in ("speed", "memory")),
    Plot("variance", "Variance of an update's gradient where gathered accumulation ended", variance_by_way),
)
MAIN = {
    "loss-samples": "Loss",
    "metrics": "Metrics",
    "memory": "Memory",
    "variance": "Gradient noise",
}


def plots_of(comparison: Comparison) -> list[Plot]:
    """The figures that there is something to draw in."""
    if comparison.is_coupled:
        return [plot for plot in COUPLED_PLOTS if plot.name != "metrics" or comparison.metric_names]
    has_sharpness = any(comparison.sharpnesses(key) for key in comparison.results)
    return [plot for plot in PLOTS if plot.name != "sharpness" or has_sharpness]


def inline_svg(plot: Plot, comparison: Comparison) -> str:
    """The plot as an SVG element for a page: no header, no addresses, its own ids, colours by the page's variables."""
    with rc_context({**STYLE, **_ink(), "font.size": 12}):
        figure = Figure(figsize=(5.2, 4.0), layout="constrained")
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
    """Loss, memory and gradient variance, or metrics, side by side in one picture, on white."""
    with rc_context({**STYLE, **_ink()}):
        figure = Figure(figsize=(14, 4.6), layout="constrained", facecolor="white")
        chosen = [plot for plot in plots_of(comparison) if plot.name in MAIN][:3]
        for part, plot in zip(figure.subfigures(1, len(chosen), squeeze=False)[0], chosen, strict=True):
            axes = part.subplots()
            plot.draw(axes, comparison)
            axes.set_title(MAIN[plot.name])
        figure.savefig(path, dpi=120)


def _ink() -> dict[Any, Any]:
    names = ("text.color", "axes.labelcolor", "axes.edgecolor", "xtick.color", "ytick.color", "axes.titlecolor")
    return dict.fromkeys(names, INK) | {"grid.color": FAINT}
