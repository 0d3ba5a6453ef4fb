"""Branches of several batch sizes: their losses over the samples they share, and where they end."""

from pathlib import Path
from statistics import fmean
from typing import TYPE_CHECKING

from matplotlib import colormaps, rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, NullLocator

from macrobatch.cli.plots import STYLE, few_ticks, thousands

if TYPE_CHECKING:
    from macrobatch.cli.branches import Branches

INK, GREY, ORANGE = "#1b1f24", "#6e7781", "#d55e00"


def save_branches(folder: Path, found: "Branches", task_name: str) -> None:
    """`branched.svg` and `branched.png` are in the folder."""
    with rc_context(STYLE):
        figure = Figure(figsize=(12, 4.2), layout="constrained")
        courses, ends = figure.subplots(1, 2)
        _draw_courses(courses, found)
        courses.set_title(f"{task_name}: branches after {found.at_samples:,} samples")
        _draw_ends(ends, found)
        for suffix in ("svg", "png"):
            figure.savefig(folder / f"branched.{suffix}", dpi=120)


def _draw_courses(axes: Axes, found: "Branches") -> None:
    colors = colormaps["viridis"]
    for number, branch in enumerate(found.branches):
        samples = [n for n, _ in branch.courses[0]]
        losses = [fmean(course[i][1] for course in branch.courses) for i in range(len(samples))]
        color = colors(0.9 * number / max(len(found.branches) - 1, 1))
        axes.plot(samples, losses, color=color, marker="o", markersize=4, label=f"batch {branch.batch_size:,}")
    axes.set(xlabel="samples in the branch", ylabel=f"loss over the last {found.branches[-1].batch_size:,} samples")
    few_ticks(axes)
    axes.legend()


def _draw_ends(axes: Axes, found: "Branches") -> None:
    """How far each branch ends above the best smaller one, with two standard errors, and what is allowed."""
    sizes = [branch.batch_size for branch in found.branches]
    for branch in found.branches:
        color = ORANGE if branch is found.critical else INK
        error = found.error(branch)
        axes.errorbar(branch.batch_size, found.excess(branch), yerr=None if error is None else 2 * error, color=color,
                      marker="o", capsize=3, linestyle="none")  # fmt: skip
    label = "critical" if found.critical is not found.branches[-1] else "critical: at least"
    axes.plot([], [], color=ORANGE, marker="o", linestyle="none", label=f"{label} {found.critical.batch_size:,}")
    axes.axhline(found.tolerance, color=GREY, linestyle="--", linewidth=1.2, label=f"allowed: {found.tolerance:g}")
    axes.axhline(0, color=GREY, linewidth=0.8)
    axes.set(title="end above the best smaller batch", xlabel="effective batch, samples", ylabel="loss", xscale="log")
    axes.xaxis.set(major_locator=FixedLocator(sizes), minor_locator=NullLocator())
    thousands(axes)
    axes.legend()
