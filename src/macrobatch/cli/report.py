"""A comparison as rows of a table, and as one HTML page that needs nothing else."""

import math
from collections.abc import Callable, Sequence
from importlib import resources
from typing import Any

import jinja2

import macrobatch
from macrobatch.batch_tradeoff import in_samples
from macrobatch.cli.comparison import Comparison, Course, Result
from macrobatch.cli.figures import inline_svg, plots_of
from macrobatch.cli.finding import Finding, accumulation, is_clear
from macrobatch.cli.formats import NONE, bytes_text, number_text, seconds_text, with_error
from macrobatch.cli.scale_words import least_noise_scale
from macrobatch.cli.seeds import interval_of
from macrobatch.cli.way import Key, Way

Row = tuple[str, Callable[[Comparison, Result], str]]


def _of_course(text: Callable[[Course], str]) -> Callable[[Comparison, Result], str]:
    return lambda _, result: NONE if result.course is None else text(result.course)


def _memory(_: Comparison, result: Result) -> str:
    if result.memory.fits:
        return bytes_text(result.memory.peak_bytes)
    if result.memory.peak_bytes is None:
        return "out of memory"
    return f"out of memory: needs at least {bytes_text(result.memory.peak_bytes)}"


def _update_size(comparison: Comparison, result: Result) -> str:
    """Of the small batch the last of an effective batch may be smaller."""
    sizes = updates_of(result.way, comparison.batch_size)
    return f"{sizes[0]}" if sizes[-1] == sizes[0] else f"{sizes[0]}, last {sizes[-1]}"


def updates_of(way: Way, batch_size: int) -> list[int]:
    """The samples of the updates that a way makes of an effective batch."""
    return [min(way.update_size, batch_size - start) for start in range(0, batch_size, way.update_size)]


def _predicted(_: Comparison, result: Result) -> str:
    return bytes_text(result.memory.predicted_bytes)


def _variance(_: Comparison, result: Result) -> str:
    return NONE if result.variance is None else with_error(result.variance.value, result.variance.standard_error)


def _expected_variance(comparison: Comparison, result: Result) -> str:
    base = comparison.micro_batch_size
    expected = comparison.expected_variance_ratio(result.way.update_size, base) * comparison.variances[base].value
    return NONE if result.way.update_size == base or result.way.key == "scaled" else number_text(expected)


def _learning_rate(comparison: Comparison, result: Result) -> str:
    factor = comparison.scaling.lr_factor if comparison.scaling is not None and result.way.key == "scaled" else 1.0
    return f"{factor * comparison.learning_rate:.3g}"


def _noise_scale(comparison: Comparison, result: Result) -> str:
    """Its 95% interval: by draws where accumulation ended, by windows in the run with the scaled rate."""
    if result.way.key == "accumulated" and is_clear(comparison.gradient_squared):
        scale = comparison.noise_scale
        return _between(scale.value - 2 * scale.standard_error, scale.value + 2 * scale.standard_error)
    if result.way.key == "accumulated":
        least = least_noise_scale(comparison)
        return NONE if least is None else _between(least, math.inf)
    if result.course is None or not result.course.noise or result.course.broke_down:
        return NONE
    return _between(result.course.noise[-1].low, result.course.noise[-1].high)


def _between(low: float, high: float) -> str:
    return f"{in_samples(low)} to {in_samples(high)}" if math.isfinite(high) else f"over {in_samples(low)}"


def _over_seeds(values: Callable[[Comparison, Key], list[float]]) -> Callable[[Comparison, Result], str]:
    def text(comparison: Comparison, result: Result) -> str:
        found = values(comparison, result.way.key)
        return str(interval_of(found)) if len(found) > 1 else NONE

    return text


def rows(comparison: Comparison) -> list[tuple[str, list[str]]]:
    """What is measured, and its value for each way."""
    table: list[Row] = [
        ("samples per update", _update_size),
        ("samples at once", lambda _, result: str(result.way.micro_batch_size)),
        ("learning rate", _learning_rate),
        *([("predicted peak", _predicted)] if comparison.is_predicted else []),
        ("peak memory", _memory),
        ("updates", _of_course(lambda course: f"{len(course.update_seconds):,}")),
        ("time per update", _of_course(lambda course: seconds_text(course.seconds_per_update))),
        ("samples per second", _of_course(lambda course: f"{course.samples_per_second:,.0f}")),
        ("gradient variance", _variance),
    ]
    if comparison.is_coupled:
        table.append((f"gradient off {_reference(comparison)}", _off))
    else:
        table += [("expected by 1/B", _expected_variance), ("noise scale, 95%", _noise_scale)]
    table.append(("validation loss", _of_course(lambda course: f"{course.final.loss:.4f}")))
    if comparison.statistics_samples:
        table.append(("statistics as left", _of_course(lambda course: number_text(course.loss_as_left, 4))))
    table += [(name, _of_course(_metric(name))) for name in comparison.metric_names]
    table += _rows_of_the_end(comparison)
    return [(label, [text(comparison, result) for result in comparison.results.values()]) for label, text in table]


def _rows_of_the_end(comparison: Comparison) -> list[Row]:
    """Sharpness, other seeds and skipped updates, where there are any."""
    table: list[Row] = []
    if comparison.sharpness_samples:
        table.append(("sharpness", lambda _, result: number_text(result.sharpness.top if result.sharpness else None)))
    if comparison.repeats:
        seeds = f"{1 + len(comparison.repeats)} seeds, 95%"
        table.append((f"loss, {seeds}", _over_seeds(Comparison.losses)))
        if comparison.is_coupled:
            table += [(f"{name}, {seeds}", _over_seeds(_metric_over_seeds(name))) for name in comparison.metric_names]
        else:
            table.append((f"sharpness, {seeds}", _over_seeds(Comparison.sharpnesses)))
    if any(result.course and result.course.skipped for result in comparison.results.values()):
        table.append(("updates skipped", _of_course(lambda course: str(course.skipped))))
    return table


def _reference(comparison: Comparison) -> str:
    return "gathered" if comparison.gradient_difference is None else "native"


def _off(comparison: Comparison, result: Result) -> str:
    """How far a gradient is from that of the native batch, or of gathered accumulation where there is none."""
    if result.way.key == "plain" and comparison.plain_gradient is not None:
        found = comparison.plain_gradient.difference
        return with_error(found.value, found.standard_error)
    if result.way.key == "accumulated" and comparison.gradient_difference is not None:
        return f"{comparison.gradient_difference:.1g}"
    return NONE


def _metric(name: str) -> Callable[[Course], str]:
    return lambda course: number_text(course.final.metrics[name], 4)


def _metric_over_seeds(name: str) -> Callable[[Comparison, Key], list[float]]:
    return lambda comparison, key: comparison.metrics(name, key)


def page(comparison: Comparison, findings: Sequence[Finding]) -> str:
    """The report: one HTML page with its style and its figures inside, light and dark, for narrow and wide screens."""
    environment = jinja2.Environment(
        autoescape=True, trim_blocks=True, lstrip_blocks=True, undefined=jinja2.StrictUndefined
    )
    source = resources.files("macrobatch.cli").joinpath("templates/report.html.j2").read_text(encoding="utf-8")
    content: dict[str, Any] = {
        "comparison": comparison,
        "findings": findings,
        "names": [(key, result.way.name) for key, result in comparison.results.items()],
        "rows": rows(comparison),
        "figures": [(plot.caption, inline_svg(plot, comparison)) for plot in plots_of(comparison)],
        "budget": None if comparison.max_memory is None else bytes_text(comparison.max_memory),
        "accumulation": accumulation(comparison).lower(),
        "small_updates": updates_of(comparison.results["small"].way, comparison.batch_size),
        "left_out": comparison.data_size % comparison.batch_size,
        "version": macrobatch.__version__,
    }
    return environment.from_string(source).render(content)
