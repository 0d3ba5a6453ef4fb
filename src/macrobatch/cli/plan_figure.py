"""The curve of a plan: time per sample and peak memory over the micro-batch size, with the budget as a line."""

from pathlib import Path

from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, FuncFormatter, NullLocator

from macrobatch.cli.formats import bytes_text, seconds_text
from macrobatch.cli.plots import STYLE
from macrobatch.planning import Plan

BLUE, ORANGE, INK = "#0072b2", "#d55e00", "#1b1f24"


def save_curve(folder: Path, plan: Plan, task_name: str) -> None:
    """`plan.svg` and `plan.png` are in the folder."""
    with rc_context(STYLE):
        figure = Figure(figsize=(7, 6), layout="constrained")
        time_axes, memory_axes = figure.subplots(2, 1, sharex=True, height_ratios=[2, 3])
        time_axes.set_title(f"{task_name}: an effective batch of {plan.batch_size:,} on {plan.device}")
        _draw_time(time_axes, plan)
        _draw_memory(memory_axes, plan)
        sizes = [1 << power for power in range(plan.curve[-1].micro_batch_size.bit_length())]
        memory_axes.set(xlabel="micro-batch size: samples at once", xscale="log")
        memory_axes.xaxis.set(major_locator=FixedLocator(sizes), minor_locator=NullLocator())
        memory_axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:.0f}"))
        for suffix in ("svg", "png"):
            figure.savefig(folder / f"plan.{suffix}", dpi=144)


def _draw_time(axes: Axes, plan: Plan) -> None:
    timed = [(point.micro_batch_size, point.seconds_per_sample) for point in plan.curve if point.seconds_per_sample]
    axes.set_ylabel("time per sample")
    if not timed:
        axes.text(0.5, 0.5, "not measured", transform=axes.transAxes, ha="center", va="center")
        axes.set_yticks([])
        return
    axes.plot([size for size, _ in timed], [seconds for _, seconds in timed], color=BLUE, marker="o")
    size, seconds = min(timed, key=lambda each: each[1])
    axes.plot(size, seconds, color=ORANGE, marker="o", markersize=9)
    label = f"fastest: {size}"
    axes.annotate(label, (size, seconds), xytext=(0, -18), textcoords="offset points", color=ORANGE, ha="center")
    high = 1.3 * max(slowest for _, slowest in timed)
    low = seconds / 1.3 * (seconds / high) ** 0.3  # room for the label below the lowest point
    axes.set(yscale="log", ylim=(low, high))
    _set_ticks(axes, low, high)
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: seconds_text(value)))


def _draw_memory(axes: Axes, plan: Plan) -> None:
    sizes, peaks = [point.micro_batch_size for point in plan.curve], [point.peak for point in plan.curve]
    axes.plot(sizes, peaks, color=BLUE, marker="o", markersize=4)
    axes.axhline(plan.max_memory, color=INK, linewidth=1, linestyle=":")
    budget = f"budget {bytes_text(plan.max_memory)}"
    axes.annotate(budget, (sizes[0], plan.max_memory), xytext=(0, 4), textcoords="offset points", color=INK)
    axes.plot(plan.micro_batch_size, plan.peak, color=ORANGE, marker="o", markersize=9)
    label = f"largest that fits: {plan.micro_batch_size}"
    place = ((8, -14), "left") if plan.micro_batch_size < sizes[-1] else ((-10, 4), "right")  # where no line runs
    axes.annotate(
        label,
        (plan.micro_batch_size, plan.peak),
        xytext=place[0],
        ha=place[1],
        textcoords="offset points",
        color=ORANGE,
    )
    axes.set(ylabel="predicted peak", yscale="log")
    low, high = min(peaks) / 1.5, max(*peaks, plan.max_memory) * 1.5
    _set_ticks(axes, low, high)
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: bytes_text(value)))
    axes.set_ylim(low, high)


def _set_ticks(axes: Axes, low: float, high: float) -> None:
    """The y axis has ticks at 1, 2 and 5 of each power of ten in its range."""
    ticks = [tick * 10.0**power for power in range(-9, 14) for tick in (1, 2, 5) if low < tick * 10.0**power < high]
    axes.yaxis.set(major_locator=FixedLocator(ticks), minor_locator=NullLocator())
