"""`macrobatch train`: a model is trained with an effective batch of any size, in micro-batches that fit."""

import time
from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from rich.console import Console

from macrobatch.cli import plots
from macrobatch.cli.errors import print_error
from macrobatch.cli.formats import bytes_text, number_text
from macrobatch.cli.guard import guard_entry, log_lines
from macrobatch.cli.interrupt import CtrlC
from macrobatch.cli.memory_use import MemoryUse, uncounted
from macrobatch.cli.metric_check import check_metrics
from macrobatch.cli.noise_watch import short_interval
from macrobatch.cli.preparing import prepare
from macrobatch.cli.progress import Progress, say
from macrobatch.cli.rescaling import scaling_entry
from macrobatch.cli.run import Run
from macrobatch.cli.runfiles import UpdateLog, save_weights, write_json
from macrobatch.cli.train_words import closing, headline, none_applied
from macrobatch.cli.validation import Validation, validate, validation_batches
from macrobatch.fitting import Memory
from macrobatch.spike_values import SpikeError

Outcome = Literal["finished", "no update was applied", "interrupted", "out of memory", "given up"]
LONGEST_SEARCH = 12  # windows in which the accumulator tries sizes, two for each of six at most
# Of a run that a signal has interrupted, the signal says it.
EXIT_CODE: dict[Outcome, int] = {"finished": 0, "no update was applied": 2, "out of memory": 2, "given up": 2}


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

    def outcome_of(self, run: Run) -> str:
        """The outcome, and where it came to an end before its time: the last update made, or the one that was not."""
        last = {"interrupted": run.updates, "out of memory": run.updates + 1, "given up": run.updates + 1}
        return f"{self.outcome} at update {last[self.outcome]}" if self.outcome in last else self.outcome


def train(run: Run, folder: Path, console: Console) -> int:
    """The run has ended, and everything about it is in `folder`; returns the exit code of the process."""
    check_metrics(run.model, run.task, run.micro_batch_size, run.autocast)
    for line in headline(run, folder):
        say(console, line)
    prepare(run.task, console)
    measured = measured_update(run)
    memory = MemoryUse(run.device, run.max_memory)
    with CtrlC(lambda text: say(console, text), "this update", "weights, plot and summary") as ctrl_c:
        with UpdateLog(folder) as log:
            started = time.monotonic()
            outcome = _all_updates(run, measured, log, ctrl_c, memory, console)
            seconds = time.monotonic() - started
            save_weights(folder, run.model)  # before the held-out samples: a metric of one's own may fail
            ctrl_c.unwritten = "plot and summary"
            validation = _validate(run, log, ctrl_c, console) if outcome == "finished" else None
        ending = Ending(outcome, seconds, validation, memory, *_predicted(run, measured))
        _write(run, ending, folder)
    for line in closing(run, ending, folder):
        say(console, line)
    if outcome == "out of memory":
        print_error(run.too_large())
    if run.given_up is not None:
        print_error(run.given_up)
    if outcome == "no update was applied":
        print_error(none_applied(run))
    return ctrl_c.exit_code if outcome == "interrupted" else EXIT_CODE[outcome]


def _all_updates(
    run: Run, measured: int, log: UpdateLog, ctrl_c: CtrlC, memory: MemoryUse, console: Console
) -> Outcome:
    """Every update is made and logged, or as many as Ctrl-C and the memory allow."""
    try:
        with memory, _logging(run, console), Progress(console, sum(run.sizes)) as progress:
            for window in _windows(run):
                with memory.of_update(run.memory.held()) if run.updates + 1 == measured else nullcontext():
                    row = run.advance(window)
                del window  # before the next one is collated: only one is in memory
                log.write(row)
                progress.expect(sum(run.sizes))  # which a doubled batch may move
                progress.advance(row["samples"] - progress.done, _status(run, run.rows[-10:], memory))
                if ctrl_c.wanted and run.updates < len(run.sizes):
                    return "interrupted"
    except torch.OutOfMemoryError:
        return "out of memory"
    except SpikeError as error:
        run.given_up = str(error)
        return "given up"
    return "finished" if run.applied else "no update was applied"


def _logging(run: Run, console: Console) -> AbstractContextManager[None]:
    """Within it, what the library logs is a line that says of which update."""
    return log_lines(lambda text: say(console, f"update {run.updates + 1}: {text}"))


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


def _predicted(run: Run, measured: int) -> tuple[Memory | None, dict[str, Any] | None]:
    """What was to be expected of the update that was measured, and its row; None for both without that update."""
    if len(run.rows) < measured:
        return None, None
    row = run.rows[measured - 1]
    return run.predicted(measured, row["largest_micro_batch"]), row


def _validate(run: Run, log: UpdateLog, ctrl_c: CtrlC, console: Console) -> Validation:
    console.print("validating")
    ctrl_c.at_hand = "this micro-batch"
    batches = validation_batches(run.task, run.micro_batch_size)
    validation = validate(run.model, run.task, batches, autocast=run.autocast, stop=lambda: ctrl_c.wanted)
    log.write_validation(run.updates, {"loss": validation.loss, **validation.metrics})
    return validation


def _status(run: Run, latest: list[dict[str, Any]], memory: MemoryUse) -> str:
    row = latest[-1]
    rate = sum(row["batch_size"] for row in latest) / sum(row["seconds"] for row in latest)
    parts = [
        f"update {row['update']}/{len(run.sizes)}",
        f"loss {number_text(row['loss'], 4)}",
        f"lr {row['lr']:.2g}",
        f"batch {row['batch_size']}" if run.batch_plan.kind != "constant" else "",
        short_interval(latest),
        f"{rate:.0f} samples/s",
        bytes_text(memory.peak_bytes),
        f"{run.retries} run again" if run.retries else "",
    ]
    return "  ".join(part for part in parts if part)


def _write(run: Run, ending: Ending, folder: Path) -> None:
    """The weights, the plot and the summary are in the folder; the summary last, so that it stands for all of them."""
    if run.rows:
        plots.save_training(folder, run.rows, run.task.name)
    validation = ending.validation
    write_json(
        folder / "summary.json",
        {
            "outcome": ending.outcome_of(run),
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
            "train_loss": run.rows[-1]["loss"] if run.rows else None,
            "validation_loss": validation.loss if validation else None,
            "validation_metrics": dict(validation.metrics) if validation else None,
            "validation_samples": validation.num_samples if validation else 0,
            "batch_size": run.batch_size,
            "micro_batch_size": run.micro_batch_size,
            "micro_batch_size_is": _size_is(run),
            "kept_graphs": run.kept_graphs,
            "learning_rate": run.rates.learning_rate,
            "base_learning_rate": run.rates.base_learning_rate,
            "base_batch_size": run.rates.base_batch_size,
            "scaling": scaling_entry(run.rates.scaling),
            "batch_sizes": [run.sizes[0], max(run.sizes)],
            "spike_guard": guard_entry(run.guard, run.rows),
            "noise": None if run.noise.estimate is None else asdict(run.noise.estimate),
            "options": asdict(run.options),
        },
    )


def _size_is(run: Run) -> str:
    """Where the micro-batch size is from."""
    if run.given_size is None:
        return "found"
    if run.options.micro_batch_size is not None:
        return "given"
    return "task's own" if run.given_size == run.task.micro_batch_size else "made to fit the batch"


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
