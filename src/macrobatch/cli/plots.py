"""Figures without pyplot: nothing global, a file or a string at the end."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, FuncFormatter, MaxNLocator, NullLocator

STYLE: dict[Any, Any] = {
    "font.size": 10,
    "axes.titlesize": 11,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.linewidth": 0.6,
    "grid.alpha": 0.35,
    "legend.frameon": False,
    "lines.linewidth": 1.8,
    "svg.fonttype": "none",
}


def smoothed(values: Sequence[float], span: int) -> list[float]:
    """The mean of the last `span` values at each point, of fewer at the start."""
    window = [values[max(0, end - span) : end] for end in range(1, len(values) + 1)]
    return [sum(part) / len(part) for part in window]


def save_training(folder: Path, rows: Sequence[Mapping[str, Any]], task_name: str) -> None:
    """`loss.svg` and `loss.png`: loss and learning rate over the samples of a run."""
    with rc_context(STYLE):
        figure = Figure(figsize=(7, 5), layout="constrained")
        loss_axes, rate_axes = figure.subplots(2, 1, sharex=True, height_ratios=[3, 1])
        samples, losses = [row["samples"] for row in rows], [row["loss"] for row in rows]
        span = max(1, len(rows) // 50)
        marker = "o" if len(rows) < 3 else None
        if span > 1:
            loss_axes.plot(samples, losses, color="#9ab8d3", linewidth=0.8, label="each update")
            loss_axes.plot(samples, smoothed(losses, span), color="#0072b2", label=f"mean of {span} updates")
            loss_axes.legend()
        else:
            loss_axes.plot(samples, losses, color="#0072b2", marker=marker)
        loss_axes.set(title=f"{task_name}: training loss", ylabel="loss")
        rate_axes.plot(samples, [row["lr"] for row in rows], color="#d55e00", marker=marker)
        rate_axes.set(xlabel="samples", ylabel="learning rate")
        rate_axes.set_ylim(0, 1.1 * max(row["lr"] for row in rows) or 1)  # a constant rate lies well below the top
        thousands(rate_axes)
        rate_axes.yaxis.set_major_locator(MaxNLocator(3, steps=[1, 2, 5, 10]))
        rate_axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: plain_number(value)))
        for suffix in ("svg", "png"):
            figure.savefig(folder / f"loss.{suffix}", dpi=144)


def thousands(axes: Axes) -> None:
    """The x axis counts 1,000s with a comma instead of a power of ten."""
    axes.xaxis.set_major_formatter(lambda value, _: f"{value:,.0f}")


def legend_below(axes: Axes) -> None:
    """The legend is below the axes, where it hides nothing; for a figure, or a part of one, that lays itself out."""
    handles, labels = axes.get_legend_handles_labels()
    figure = axes.get_figure()
    assert figure is not None
    figure.legend(handles, labels, loc="outside lower center", ncols=2, fontsize="small")


def few_ticks(axes: Axes, most: int = 6) -> None:
    """The x axis has at most so many round numbers, with commas; a long one counts in thousands (k) or millions (M)."""
    axes.xaxis.set_major_locator(MaxNLocator(most, steps=[1, 2, 5, 10]))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: _in_unit(value, axes.get_xlim()[1])))


def _in_unit(value: float, largest: float) -> str:
    """A tick of an axis up to `largest`, no longer than six characters."""
    for unit, letter in ((1e6, "M"), (1e3, "k")):
        if largest >= max(unit, 1e5) and value:
            return f"{plain_number(value / unit)}{letter}"
    return plain_number(value)


def log_ticks(axes: Axes, most: int = 7) -> None:
    """A logarithmic y axis has numbers in place of powers of ten: 1, 2, 5, 10, fewer of them where it is long."""
    low, high = axes.get_ylim()
    for steps, every in (((1, 2, 5), 1), ((1, 3), 1), ((1,), 1), ((1,), 2), ((1,), 4)):
        powers = [tick * 10.0**power for power in range(-12, 13, every) for tick in steps]
        ticks = [tick for tick in powers if low <= tick <= high]
        if len(ticks) <= most:
            break
    axes.yaxis.set(major_locator=FixedLocator(ticks), minor_locator=NullLocator())
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: plain_number(value)))


def plain_number(value: float) -> str:
    """A tick without an exponent where it is of everyday size.

    >>> plain_number(12500), plain_number(0.05), plain_number(2e-6), plain_number(0)
    ('12,500', '0.05', '2e-06', '0')
    """
    return f"{value:,.0f}" if abs(value) >= 1 and value == round(value) else f"{value:.3g}"
