"""`macrobatch train`: a model is trained with an effective batch of any size, in micro-batches that fit."""

import time
from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from rich.console import Console
from rich.markup import escape

from macrobatch.cli import plots
from macrobatch.cli.forecast import Forecast, prediction_line
from macrobatch.cli.formats import bytes_text, counted, duration_text, number_text
from macrobatch.cli.interrupt import CtrlC
from macrobatch.cli.memory_use import MemoryUse, uncounted
from macrobatch.cli.progress import Progress, say
from macrobatch.cli.run import Run
from macrobatch.cli.runfiles import UpdateLog, save_weights, write_json
from macrobatch.cli.validation import Validation, validate, validation_batches
from macrobatch.fitting import Memory

Outcome = Literal["finished", "interrupted", "out of memory"]
LONGEST_SEARCH = 12  # windows in which the accumulator tries sizes, two for each of six at most
EXIT_CODE: dict[Outcome, int] = {"finished": 0, "interrupted": 130, "out of memory": 2}


@dataclass(frozen=True)
class Ending:
    """How a run ended. `seconds`: of training alone. `validation`: None where it did not come to that.

    `predicted`: the memory of the update that was measured; None where there was none, or it could not be predicted.
    """

    outcome: Outcome
    seconds: float
    validation: Validation | None
    memory: MemoryUse
    predicted: Memory | None
    measured_row: dict[str, Any] | None


def train(run: Run, folder: Path, console: Console) -> int:
    """The run has ended, and everything about it is in `folder`; returns the exit code of the process."""
    for line in headline(run, folder):
        say(console, line)
    rows: list[dict[str, Any]] = []
    memory = MemoryUse(run.device, run.max_memory)
    with CtrlC(lambda text: say(console, text)) as ctrl_c:
        with UpdateLog(folder) as log:
            started = time.monotonic()
            outcome = _all_updates(run, log, rows, ctrl_c, memory, console)
            seconds = time.monotonic() - started
            validation = _validate(run, log, ctrl_c, console) if outcome == "finished" else None
        ending = Ending(outcome, seconds, validation, memory, *_predicted(run, rows))
        _write(run, ending, rows, folder)
    for line in closing(run, ending, folder):
        say(console, line)
    if outcome == "out of memory":
        console.print(f"[bold red]error:[/] {escape(run.too_large())}", soft_wrap=True)
    return EXIT_CODE[outcome]


def _all_updates(
    run: Run, log: UpdateLog, rows: list[dict[str, Any]], ctrl_c: CtrlC, memory: MemoryUse, console: Console
) -> Outcome:
    """Every update is made and logged, or as many as Ctrl-C and the memory allow."""
    try:
        with memory, Progress(console, sum(run.sizes)) as progress:
            measured = measured_update(run)
            for window in _windows(run):
                with memory.of_update(run.held()) if run.updates + 1 == measured else nullcontext():
                    row = run.advance(window)
                del window  # before the next one is collated: only one is in memory
                rows.append(row)
                log.write(row)
                progress.advance(row["samples"] - progress.done, _status(run, rows[-10:], memory))
                if ctrl_c.wanted:
                    return "finished" if run.updates == len(run.sizes) else "interrupted"
    except torch.OutOfMemoryError:
        return "out of memory"
    return "finished"


def _windows(run: Run) -> Iterator[Any]:
    """The run's windows, loaded without counting; none is kept."""
    windows = iter(run.windows())
    for _ in run.sizes:
        with uncounted():
            window = next(windows)
        yield window
        del window


def measured_update(run: Run) -> int:
    """The number of the update, from 1, whose memory is measured apart: a whole one, after the search for a size."""
    earliest = 2 if run.given_size else LONGEST_SEARCH + 1
    largest = max(run.sizes)
    whole = [number for number, size in enumerate(run.sizes, 1) if size == largest]
    return next((number for number in whole if number >= earliest), whole[-1])


def _predicted(run: Run, rows: list[dict[str, Any]]) -> tuple[Memory | None, dict[str, Any] | None]:
    """What was to be expected of the update that was measured, and its row; None for both without that update."""
    measured = measured_update(run)
    if len(rows) < measured:
        return None, None
    row = rows[measured - 1]
    forecast = Forecast(run.task, run.model, run.optimizer, run.device, run.autocast)
    return forecast.memory(run.sizes[measured - 1], row["largest_micro_batch"]), row


def _validate(run: Run, log: UpdateLog, ctrl_c: CtrlC, console: Console) -> Validation:
    console.print("validating")
    ctrl_c.at_hand = "this micro-batch"
    batches = validation_batches(run.task, run.micro_batch_size)
    validation = validate(run.model, run.task, batches, autocast=run.autocast, stop=lambda: ctrl_c.wanted)
    log.write_validation(run.updates, {"loss": validation.loss, **validation.metrics})
    return validation


def _status(run: Run, latest: list[dict[str, Any]], memory: MemoryUse) -> str:
    row = latest[-1]
    rate = sum(run.sizes[row["update"] - 1] for row in latest) / sum(row["seconds"] for row in latest)
    return (
        f"update {row['update']}/{len(run.sizes)}  loss {number_text(row['loss'], 4)}  lr {row['lr']:.2g}  "
        f"{rate:.0f} samples/s  {bytes_text(memory.peak_bytes)}" + (f"  {run.retries} run again" if run.retries else "")
    )


def headline(run: Run, folder: Path) -> list[str]:
    """What is going to happen, in lines for the terminal."""
    options = run.options
    limit = "" if run.max_memory is None else f"; at most {bytes_text(run.max_memory)}"
    lines = [
        f"{run.task.name}: {run.task.description}" if run.task.description else run.task.name,
        f"{counted(len(run.sizes), 'update')} of {counted(run.batch_size, 'sample')}, {_micro_batches_text(run)}; "
        f"{options.precision} on {run.device.type}, seed {options.seed}{limit}",
        _learning_rate_line(run),
        f"writing to {folder}",
    ]
    if run.why_given:
        lines.append(f"note: the micro-batch size is the task's own, not auto: {run.why_given}")
    if options.precision == "fp16" and run.device.type == "cpu":
        lines.append("note: fp16 on a CPU works but is slow; bf16 or fp32 is usually better there")
    return lines


def _micro_batches_text(run: Run) -> str:
    if run.plan is not None:
        fit = "all of them fit" if run.plan.accumulation_steps == 1 else f"up to {run.plan.micro_batch_size} fit"
        return f"in micro-batches of the fastest size that is found ({fit} at once)"
    count = -(-run.batch_size // run.micro_batch_size)
    if count == 1:
        return "each in one piece"
    even = run.batch_size % run.micro_batch_size == 0
    return f"each in {count} micro-batches of {'' if even else 'at most '}{run.micro_batch_size}"


def _learning_rate_line(run: Run) -> str:
    rate, base = f"learning rate {run.learning_rate:.3g}", run.base_batch_size
    schedule = f"{run.options.schedule} after {counted(run.options.warmup, 'update')} of warmup"
    if run.options.scaling != "none":
        rate += f" ({run.options.scaling} rule: {run.base_learning_rate:.3g} at batch size {base})"
    elif base != run.batch_size:
        rate += f" (tuned at batch size {base} and not scaled to {run.batch_size}: see --scaling)"
    return f"{rate}, {schedule if run.options.warmup else run.options.schedule}"


def closing(run: Run, ending: Ending, folder: Path) -> list[str]:
    """What has happened, in lines for the terminal."""
    updates, samples = counted(len(run.sizes), "update"), counted(run.samples, "sample")
    made = f"{run.updates} of {updates}, {samples} in {duration_text(ending.seconds)}"
    skipped = run.updates - run.applied
    lines = [
        f"{_outcome_text(run, ending)}: {made}"
        + (f" ({run.samples / ending.seconds:.0f} samples/s)" if run.samples else "")
        + (f"; {counted(skipped, 'update')} skipped: the gradient was not finite" if skipped else "")
        + (f"; out of memory {counted(run.retries, 'time')}: run again in smaller pieces" if run.retries else "")
        + f"; peak memory {bytes_text(ending.memory.peak_bytes)} ({ending.memory.kind})"
    ]
    line = prediction_line(ending.predicted, ending.memory.update_peak, ending.measured_row)
    if line is not None:
        lines.append(line)
    if ending.validation is not None:
        metrics = "".join(f", {name} {number_text(value, 4)}" for name, value in ending.validation.metrics.items())
        lines.append(
            f"validation: loss {number_text(ending.validation.loss, 4)}{metrics} "
            f"over {counted(ending.validation.num_samples, 'sample')}"
        )
    lines.append(f"{', '.join(sorted(path.name for path in folder.iterdir()))} in {folder}")
    return lines


def _outcome_text(run: Run, ending: Ending) -> str:
    return ending.outcome if ending.outcome == "finished" else f"{ending.outcome} at update {run.updates}"


def _write(run: Run, ending: Ending, rows: list[dict[str, Any]], folder: Path) -> None:
    """The weights, the plot and the summary are in the folder; the summary last, so that it stands for all of them."""
    save_weights(folder, run.model)
    if rows:
        plots.save_training(folder, rows, run.task.name)
    validation = ending.validation
    write_json(
        folder / "summary.json",
        {
            "outcome": _outcome_text(run, ending),
            "task": run.task.name,
            "updates": run.updates,
            "updates_applied": run.applied,
            "samples": run.samples,
            "retries": run.retries,
            "seconds": ending.seconds,
            "samples_per_second": run.samples / ending.seconds if ending.seconds else None,
            "peak_bytes": ending.memory.peak_bytes,
            **_memory_entries(ending),
            "peak_of": ending.memory.kind.removeprefix("of "),
            "train_loss": rows[-1]["loss"] if rows else None,
            "validation_loss": validation.loss if validation else None,
            "validation_metrics": dict(validation.metrics) if validation else None,
            "validation_samples": validation.num_samples if validation else 0,
            "batch_size": run.batch_size,
            "micro_batch_size": run.micro_batch_size,
            "micro_batch_size_is": "given" if run.given_size else "found",
            "learning_rate": run.learning_rate,
            "base_learning_rate": run.base_learning_rate,
            "base_batch_size": run.base_batch_size,
            "options": asdict(run.options),
        },
    )


def _memory_entries(ending: Ending) -> dict[str, Any]:
    """Prediction and measurement of one update for the summary; bytes, by kind where predicted."""
    row, predicted = ending.measured_row, ending.predicted
    return {
        "memory_of_update": None if row is None else row["update"],
        "memory_micro_batch_size": None if row is None else row["largest_micro_batch"],
        "memory_predicted_bytes": None if predicted is None else predicted.peak,
        "memory_measured_bytes": ending.memory.update_peak,
        "memory_predicted": None if predicted is None else asdict(predicted),
    }
