"""The noise scale over training with its interval, and how long training takes at other batch sizes."""

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, NullFormatter

from macrobatch.batch_tradeoff import fastest_batch_size, in_samples
from macrobatch.cli.plots import STYLE, thousands

if TYPE_CHECKING:
    from macrobatch.cli.noise import Findings

BLUE, ORANGE, GREY = "#0072b2", "#d55e00", "#6e7781"


def save_noise(folder: Path, rows: Sequence[Mapping[str, Any]], found: "Findings", task_name: str) -> None:
    """`noise.svg` and `noise.png` are in the folder."""
    with rc_context(STYLE):
        figure = Figure(figsize=(12, 4.2), layout="constrained")
        over_training, over_sizes = figure.subplots(1, 2)
        _draw_course(over_training, rows, found)
        over_training.set_title(f"{task_name}: gradient noise scale")
        _draw_times(over_sizes, found)
        for suffix in ("svg", "png"):
            figure.savefig(folder / f"noise.{suffix}", dpi=120)


def whole(rows: Sequence[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    """The updates without those that are short because a pass over the data ends: one alone, smaller than before it."""
    sizes = [row["batch_size"] for row in rows]
    return [
        row
        for row, before, size, after in zip(rows, [0, *sizes], sizes, [*sizes[1:], math.inf], strict=False)
        if not before > size < after
    ]


def _draw_course(axes: Axes, rows: Sequence[Mapping[str, Any]], found: "Findings") -> None:
    """The estimate where it is finite, its interval as a band, which goes to the edge where nothing bounds it."""
    known = [row for row in rows if row.get("noise_low", 0) > 0]
    axes.set(xlabel="samples of training", ylabel="samples", yscale="log")
    thousands(axes)
    planned = whole(rows)
    sizes = {row["batch_size"] for row in planned}
    if len(sizes) == 1 or not known:
        axes.axhline(found.batch_size, color=GREY, linestyle="--", linewidth=1.2, label="effective batch")
    else:
        x, y = [row["samples"] for row in planned], [row["batch_size"] for row in planned]
        axes.step(x, y, color=GREY, linestyle="--", linewidth=1.2, label="effective batch")
    if not known:
        axes.text(0.5, 0.7, "not known yet: train longer", transform=axes.transAxes, ha="center")
        axes.legend()
        return
    finite = [v for row in known for v in (row["noise_low"], row["noise_scale"]) if math.isfinite(v)]
    settled = [row["noise_high"] for row in known[len(known) // 4 :] if math.isfinite(row["noise_high"])]
    low, high = min([*finite, *sizes]) / 1.5, max([*finite, *settled, *sizes]) * 1.5
    x = [row["samples"] for row in known]
    ends = [min(row["noise_high"], high) for row in known]
    axes.fill_between(x, [row["noise_low"] for row in known], ends, color=BLUE, alpha=0.2, linewidth=0,
                      label=f"{found.estimate.confidence:.0%} interval")  # fmt: skip
    best = [row["noise_scale"] if math.isfinite(row["noise_scale"]) else math.nan for row in known]
    axes.plot(x, best, color=BLUE, label="noise scale", marker="o" if len(known) < 3 else None)
    axes.set_ylim(low, high)
    _plain_numbers(axes)
    axes.legend()


def _draw_times(axes: Axes, found: "Findings") -> None:
    """Time to the same loss by batch size, over the least, at the noise scale and at both ends of its interval."""
    fast = found.fastest
    axes.set_title("time to the same loss, as the noise scale tells")
    axes.set(xlabel="effective batch, samples", ylabel="times the fastest", xscale="log", yscale="log")
    if fast is None or not math.isfinite(fast.noise_scale) or fast.noise_scale <= 0 or fast.seconds_per_update <= 0:
        axes.text(0.5, 0.5, "not known yet: train longer", transform=axes.transAxes, ha="center")
        return
    known = found.estimate
    widest = max(found.batch_size, fast.batch_size) * 16  # as far as it was asked what fits
    start = max(min(found.batch_size, fast.batch_size) / 16, 1)
    sizes = [start * (widest / start) ** (step / 200) for step in range(201)]

    def slowdowns(noise_scale: float) -> list[float]:
        at = fastest_batch_size(
            noise_scale,
            seconds_per_sample=fast.seconds_per_sample,
            seconds_per_update=fast.seconds_per_update,
            largest_micro_batch=found.largest,
        )
        return [at.slowdown(size) for size in sizes]

    if known.low > 0:
        ends = slowdowns(known.low), slowdowns(known.high)
        between = [[pick(pair) for pair in zip(*ends, strict=True)] for pick in (min, max)]
        axes.fill_between(sizes, between[0], between[1], color=BLUE, alpha=0.2, linewidth=0)
    axes.plot(sizes, slowdowns(known.noise_scale), color=BLUE)
    axes.plot(fast.batch_size, 1, color=ORANGE, marker="o", markersize=8, linestyle="none",
              label=f"fastest: {in_samples(fast.batch_size)}")  # fmt: skip
    axes.plot(found.batch_size, fast.slowdown(found.batch_size), color=GREY, marker="s", markersize=7, linestyle="none",
              label=f"this run: {found.batch_size}")  # fmt: skip
    if start < found.largest < widest:
        axes.axvline(found.largest, color=GREY, linestyle=":", linewidth=1.2, label=f"{found.largest} fit at once")
    thousands(axes)
    _plain_numbers(axes)
    axes.set_ylim(0.8, None)
    axes.legend()


def _plain_numbers(axes: Axes) -> None:
    """The logarithmic y axis says 1, 2, 5, 10 and not powers of ten."""
    axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes.yaxis.set_major_formatter(lambda value, _: f"{value:g}")
    axes.yaxis.set_minor_formatter(NullFormatter())
