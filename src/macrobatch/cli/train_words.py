"""What `macrobatch train` says before and after training, as lines for the terminal."""

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from macrobatch.cli.forecast import coupling_layer, prediction_line
from macrobatch.cli.formats import bytes_text, counted, duration_text, number_text
from macrobatch.cli.guard import guard_lines
from macrobatch.cli.noise_words import watched
from macrobatch.cli.run import Run

if TYPE_CHECKING:
    from macrobatch.cli.train import Ending


def headline(run: Run, folder: Path) -> list[str]:
    """What is going to happen, in lines for the terminal."""
    options = run.options
    limit = "" if run.max_memory is None else f"; at most {bytes_text(run.max_memory)}"
    lines = [
        f"{run.task.name}: {run.task.description}" if run.task.description else f"task {run.task.name}",
        f"{counted(len(run.sizes), 'update')} of {_sizes_text(run)}, {_micro_batches_text(run)}; "
        f"{options.precision} on {run.device.type}, seed {options.seed}{limit}",
        _learning_rate_line(run),
    ]
    if run.rates.scaling is not None:
        lines += str(run.rates.scaling).splitlines()
    if run.kept_graphs is not None:
        lines.append("the loss compares all samples of an update: outputs are gathered over its micro-batches")
    lines.append(f"writing to {folder}")
    if run.why_given:
        lines.append(f"note: the micro-batch size is {_of_whom(run)}: {run.why_given}")
    if run.guard is not None and len(run.sizes) <= run.guard.min_updates:
        lines.append(
            f"note: the spike guard learns from {run.guard.min_updates} updates before it judges one, and this run has "
            f"{len(run.sizes)}: only what is not finite is caught"
        )
    if options.precision == "fp16" and run.device.type == "cpu":
        lines.append("note: fp16 on a CPU works but is slow; bf16 or fp32 is usually better there")
    return lines


def _of_whom(run: Run) -> str:
    return "the task's own, not auto" if run.given_size == run.task.micro_batch_size else f"{run.given_size}, not auto"


def _sizes_text(run: Run) -> str:
    plan, first = run.batch_plan, run.sizes[0]
    if plan.kind == "constant":
        return counted(run.batch_size, "sample")
    if plan.measures:
        return f"{counted(first, 'sample')}, doubled up to {plan.sizes[-1]} where the noise scale allows"
    return f"{first} to {counted(plan.sizes[-1], 'sample')} by {run.options.batch_schedule}"


def _micro_batches_text(run: Run) -> str:
    if run.plan is not None:
        fit = "all of them fit" if run.plan.accumulation_steps == 1 else f"up to {run.plan.micro_batch_size} fit"
        return f"in micro-batches of the fastest size that is found ({fit} at once)"
    if run.batch_plan.kind != "constant":
        return f"in micro-batches of at most {run.micro_batch_size}"
    count = -(-run.batch_size // run.micro_batch_size)
    if count == 1:
        return "each in one piece"
    even = run.batch_size % run.micro_batch_size == 0
    return f"each in {count} micro-batches of {'' if even else 'at most '}{run.micro_batch_size}"


def _learning_rate_line(run: Run) -> str:
    rate, base, first = (
        f"learning rate {run.rates.learning_rate:.3g}",
        run.rates.base_batch_size,
        run.schedule.batch_size,
    )
    if run.rates.scaling is not None:
        rate += f" ({run.rates.scaling.rule} rule: {run.rates.base_learning_rate:.3g} at batch size {base})"
    elif base != first and run.options.scaling == "none":
        rate += f" (tuned at batch size {base} and not scaled to {first}: see --scaling)"
    if run.options.warmup:
        start = (
            ""
            if run.rates.scaling is None or run.rates.scaling.lr_factor <= 1
            else f" from {run.rates.base_learning_rate:.3g}"
        )
        return f"{rate}, {run.options.schedule} after {counted(run.options.warmup, 'update')} of warmup{start}"
    return f"{rate}, {run.options.schedule}"


def closing(run: Run, ending: "Ending", folder: Path) -> list[str]:
    """What has happened, in lines for the terminal."""
    updates, samples = counted(len(run.sizes), "update"), counted(run.samples, "sample")
    tried = " tried" if ending.outcome == "no update was applied" else ""
    made = f"{run.updates} of {updates}{tried}, {samples} in {duration_text(ending.seconds)}"
    skipped = [row for row in run.rows if not row["applied"] and "spike" not in row]
    lines = [
        f"{ending.outcome_of(run)}: {made}"
        + (f" ({run.samples / ending.seconds:.0f} samples/s)" if run.samples else "")
        + _skipped_text(skipped)
        + (f"; out of memory {counted(run.retries, 'time')}: run again in smaller pieces" if run.retries else "")
        + f"; peak memory {bytes_text(ending.memory.peak_bytes)} ({ending.memory.kind})"
    ]
    line = prediction_line(ending.predicted, ending.memory.update_peak, ending.measured_row)
    if line is not None:
        lines.append(line)
    lines += [*_norm_lines(run), *_graph_lines(run), *guard_lines(run.guard, run.rows), *_growth(run)]
    if ending.validation is not None:
        metrics = "".join(f", {name} {number_text(value, 4)}" for name, value in ending.validation.metrics.items())
        lines.append(
            f"validation: loss {number_text(ending.validation.loss, 4)}{metrics} "
            f"over {counted(ending.validation.num_samples, 'sample')}"
        )
    lines += _noise_lines(run)
    written = sorted(path.name for path in folder.iterdir() if not path.name.startswith("."))
    lines.append(f"{', '.join(written)} in {folder}")
    return lines


def _skipped_text(skipped: Sequence[Mapping[str, Any]]) -> str:
    if not skipped:
        return ""
    first = skipped[0]["update"]
    which = f"update {first}" if len(skipped) == 1 else f"update {first} first"
    no_terms = [math.isfinite(row["grad_norm"]) for row in skipped]
    why = "the loss had no terms" if all(no_terms) else "the gradient was not finite"
    if any(no_terms) and not all(no_terms):
        why += ", or the loss had no terms"
    return f"; {counted(len(skipped), 'update')} skipped: {why} ({which})"


def none_applied(run: Run) -> str:
    """Why no update of the run was applied, as far as the numbers of the first one tell."""
    first = run.rows[0]
    loss, norm = first["loss"], first["grad_norm"]
    if math.isfinite(norm):
        why = "the loss had no terms to average over: look at what it counts, its loss_weight"
    elif not math.isfinite(loss):
        why = "neither is finite: look for NaN and infinities in the data, and in what the loss does"
    else:
        why = "the gradient of a finite loss is not finite: look for a root, a logarithm or a division at 0"
        if run.scaler is not None:
            why += "; or fp16 overflows, which it does until the loss scale has come down: give more --steps, or bf16"
    return (
        f"no update was applied: {counted(run.updates, 'update')} skipped, from update {first['update']} on, where the "
        f"loss was {number_text(loss)} and the gradient norm {number_text(norm)}. {why[0].upper()}{why[1:]}"
    )


def _norm_lines(run: Run) -> list[str]:
    """That a model was another one than was asked for, where memory ran out and layers see the whole micro-batch."""
    layer, size = coupling_layer(run.model), run.given_size
    if layer is None or size is None:
        return []
    lowered = [row for row in run.rows if row["micro_batches"] > -(-row["batch_size"] // size)]
    if not lowered:
        return []
    fewest = min(row["batch_size"] // row["micro_batches"] for row in lowered)
    which = "update" if len(lowered) == 1 else "first in update"
    return [
        f"note: memory ran out, and in {counted(len(lowered), 'update')} ({which} {lowered[0]['update']}) {layer} "
        f"normalised over micro-batches of as few as {fewest} instead of {size}: another model than was asked for, "
        "which more --max-memory would train"
    ]


def _graph_lines(run: Run) -> list[str]:
    """Of how many micro-batches no second forward was needed, where a loss is over all outputs."""
    if run.kept_graphs is None or not run.rows:
        return []
    last = run.rows[-1]
    return [f"graphs kept for the backward in the last update: {last['kept_graphs']} of {last['micro_batches']}"]


def _growth(run: Run) -> list[str]:
    """How the batch and the learning rate have moved, where a schedule moved them."""
    if run.batch_plan.kind == "constant" or not run.rows:
        return []
    first, last = run.rows[0], run.rows[-1]
    size = max(row["batch_size"] for row in run.rows)
    return [
        f"effective batch {first['batch_size']} to {size}, learning rate {first['lr']:.3g} to {last['lr']:.3g}"
        + ("" if run.options.scaling != "none" else " (not scaled with it: see --scaling)")
    ]


def _noise_lines(run: Run) -> list[str]:
    """What the updates told of the noise scale, as far as an interval can be given."""
    if run.options.noise != "watch":
        return []
    at_end = int(bool(run.rows) and not run.rows[-1]["applied"])
    line = watched(run.noise.estimate, is_coupled=coupling_layer(run.model) is not None, num_skipped=at_end)
    return [line] if line else []
