"""The commands and their options: what is asked for is checked here, before any work."""

import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Annotated, Any, get_args

import torch
import typer
from rich.console import Console
from rich.markup import escape

from macrobatch.cli import setup
from macrobatch.cli.errors import short_errors
from macrobatch.cli.guard import Guarding
from macrobatch.cli.preparing import busy
from macrobatch.cli.runfiles import new_folder, release
from macrobatch.memory import parse_bytes
from macrobatch.scaling_rules import RuleName
from macrobatch.tasks import Task, load_task, parse_task_option, task_names

app = typer.Typer(
    name="macrobatch",
    help="Any effective batch size on any memory budget, with the gradient of the full batch.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)


def _micro_batch_size(text: str) -> int | str:
    if text == "auto":
        return "auto"
    if not text.isdecimal() or int(text) < 1:
        raise typer.BadParameter(f"auto, or a number of samples of at least 1, is needed; got {text!r}")
    return int(text)


def _memory(text: str) -> int | str:
    if text.endswith("%"):
        return text  # of what the device has: known once the device is
    try:
        return parse_bytes(text)
    except ValueError as error:
        raise typer.BadParameter(str(error)) from None


def _at_least(least: int) -> Callable[[Any], int]:
    def number(text: Any) -> int:
        with suppress(ValueError):
            if int(text) >= least:
                return int(text)
        raise typer.BadParameter(f"a whole number of at least {least} is needed; got {text}")

    return number


def _one_of(kind: Any) -> Callable[[str], str]:
    def choice(text: str) -> str:
        if text in get_args(kind):
            return text
        raise typer.BadParameter(f"{text!r} is not one of {', '.join(map(repr, get_args(kind)))}")

    return choice


def _option(help_text: str, *names: str, parser: Callable[[str], Any] | None = None, metavar: str | None = None) -> Any:
    """An option whose help is shown as it is written: `[the task's]` would be a style to rich, and not be seen."""
    return typer.Option(*names, parser=parser, metavar=metavar, help=escape(help_text))


def _choice(kind: Any, help_text: str) -> Any:
    return _option(help_text, parser=_one_of(kind), metavar="|".join(get_args(kind)))


def _count(least: int, help_text: str) -> Any:
    return _option(help_text, parser=_at_least(least), metavar="N")


def _above_zero(text: str) -> float:
    with suppress(ValueError):
        if 0 < float(text) < float("inf"):
            return float(text)
    raise typer.BadParameter(f"a number above 0 is needed; got {text!r}")


def _task_option(text: str) -> tuple[str, Any]:
    try:
        return parse_task_option(text)
    except ValueError as error:
        raise typer.BadParameter(str(error)) from None


# The options that both commands have, each with its one explanation.
TaskName = Annotated[
    str, typer.Option("--task", help=f"{', '.join(task_names())}, or package.module:function of your own.")
]
TaskOptions = Annotated[
    list[Any] | None,
    typer.Option("--task-option", parser=_task_option, metavar="NAME=VALUE", help="An option of the task; repeatable."),
]
BatchSize = Annotated[int | None, _count(1, "Samples in an update: the effective batch.  [the task's]")]
MaxMemory = Annotated[
    Any,
    typer.Option(parser=_memory, metavar="BYTES", help="The most memory for tensors, such as 6GB, 500MB or 80%."),
]
PrecisionName = Annotated[setup.Precision, _choice(setup.Precision, "Of matrix products; weights stay fp32.")]
LearningRate = Annotated[
    float | None, _option("Learning rate.  [the task's]", "--lr", parser=_above_zero, metavar="RATE")
]
Samples = Annotated[int | None, _count(1, "Train on this many samples.")]
Seed = Annotated[int, _count(0, "Of initial weights and of the order of samples.")]
DeviceName = Annotated[setup.Device, _choice(setup.Device, "Where to compute.")]
Threads = Annotated[int | None, _count(1, "Threads of a CPU; fewer where other programs are at work.  [torch's]")]
Output = Annotated[
    Path | None,
    _option("A new folder for the results; if it holds something, NAME-2 and so on.  [runs/TASK]"),
]


# Those of commands that train.
BatchSchedule = Annotated[
    str | None,
    typer.Option(metavar="SIZES", help="Over the run: steps:32,128@5k or ramp:32:512:20k or doubling:32:512."),
]
MicroBatchSize = Annotated[
    Any,
    _option("Samples in memory at once.  [auto: the fastest that fits]", parser=_micro_batch_size, metavar="N|auto"),
]
BaseBatchSize = Annotated[int | None, _count(1, "The batch size that the learning rate was tuned for.")]
ScalingRule = Annotated[RuleName, _choice(RuleName, "How hyperparameters follow the batch; auto fits the optimizer.")]
LearningRateSchedule = Annotated[setup.Schedule, _choice(setup.Schedule, "Learning rate over the run.")]
Warmup = Annotated[int, _count(0, "Updates in which the learning rate rises to its value.")]
Steps = Annotated[int | None, _count(1, "Train for this many updates.")]
Epochs = Annotated[int | None, _count(1, "Passes over the data.  [1]")]
MaxNorm = Annotated[
    float | None, typer.Option(parser=_above_zero, metavar="NORM", help="Clip the gradient of the update to this.")
]
SpikeGuarding = Annotated[Guarding, _choice(Guarding, "What becomes of an update whose loss or gradient is a spike.")]
SnapshotEvery = Annotated[int | None, _count(1, "Updates between snapshots to roll back to.  [25]")]


@app.command()
def train(
    task: TaskName = "code-lm",
    task_option: TaskOptions = None,
    batch_size: BatchSize = None,
    batch_schedule: BatchSchedule = None,
    micro_batch_size: MicroBatchSize = None,
    max_memory: MaxMemory = None,
    lr: LearningRate = None,
    base_batch_size: BaseBatchSize = None,
    scaling: ScalingRule = "none",
    schedule: LearningRateSchedule = "constant",
    warmup: Warmup = 0,
    steps: Steps = None,
    epochs: Epochs = None,
    samples: Samples = None,
    max_norm: MaxNorm = None,
    spike_guard: SpikeGuarding = "off",
    snapshot_every: SnapshotEvery = None,
    precision: PrecisionName = "fp32",
    device: DeviceName = "auto",
    threads: Threads = None,
    seed: Seed = 0,
    output: Output = None,
) -> None:
    """Train a task with an effective batch of any size, in micro-batches that fit into memory."""
    from macrobatch.cli.run import Run
    from macrobatch.cli.run_options import TrainOptions
    from macrobatch.cli.train import train as train_run

    options = TrainOptions(
        batch_size=batch_size,
        batch_schedule=batch_schedule,
        micro_batch_size=micro_batch_size,
        max_memory=max_memory,
        learning_rate=lr,
        base_batch_size=base_batch_size,
        scaling=scaling,
        schedule=schedule,
        warmup=warmup,
        updates=steps,
        epochs=epochs,
        samples=samples,
        max_norm=max_norm,
        spike_guard=spike_guard,
        snapshot_every=snapshot_every,
        precision=precision,
        device=device,
        seed=seed,
    )
    with _command(output or Path("runs") / _folder_name(task), threads) as (console, folder):
        loaded = _loaded(console, task, task_option, seed)
        with busy(console, "planning"):
            run = Run(loaded, options)
        code = train_run(run, folder, console)
    raise typer.Exit(code)


@app.command()
def compare(
    task: TaskName = "code-lm",
    task_option: TaskOptions = None,
    batch_size: BatchSize = None,
    micro_batch_size: Annotated[
        Any,
        _option("Samples in memory at once.  [the task's]", parser=_micro_batch_size, metavar="N|auto"),
    ] = None,
    max_memory: MaxMemory = None,
    lr: LearningRate = None,
    samples: Annotated[
        int | None, _count(1, "Train each way on so many.  [8192; 4096 where the loss compares samples]")
    ] = None,
    draws: Annotated[
        int | None,
        _count(1, "Gradients drawn to measure their variance.  [64; 16 where the loss compares samples]"),
    ] = None,
    sharpness: Annotated[int, _count(0, "Training samples that the sharpness at the end is over; 0: none.")] = 32,
    seeds: Annotated[int, _count(1, "Repeat with so many seeds, for intervals.")] = 1,
    device: DeviceName = "auto",
    threads: Threads = None,
    seed: Seed = 0,
    output: Output = None,
) -> None:
    """Small batch, accumulation, native large batch and a scaled learning rate on the same samples, in one report."""
    from macrobatch.cli.compare import compare as compare_ways
    from macrobatch.cli.compare_options import CompareOptions

    options = CompareOptions(
        batch_size=batch_size,
        micro_batch_size=micro_batch_size,
        max_memory=max_memory,
        learning_rate=lr,
        samples=samples,
        draws=draws,
        sharpness_samples=sharpness,
        seeds=seeds,
        device=device,
        seed=seed,
    )
    with _command(output or Path("runs") / f"compare-{_folder_name(task)}", threads) as (console, folder):
        compare_ways(lambda each: load_task(task, seed=each, **dict(task_option or [])), options, folder, console)


@app.command()
def plan(
    task: TaskName = "code-lm",
    task_option: TaskOptions = None,
    batch_size: BatchSize = None,
    max_memory: MaxMemory = None,
    precision: PrecisionName = "fp32",
    device: DeviceName = "auto",
    threads: Threads = None,
    seed: Seed = 0,
    output: Output = None,
) -> None:
    """Which micro-batch size fits into the memory, which is fastest, and what takes the memory: nothing is trained."""
    from macrobatch.cli.plan import PlanOptions
    from macrobatch.cli.plan import plan as plan_task

    options = PlanOptions(batch_size=batch_size, max_memory=max_memory, precision=precision, device=device, seed=seed)
    with _command(output or Path("runs") / f"plan-{_folder_name(task)}", threads) as (console, folder):
        plan_task(_loaded(console, task, task_option, seed), options, folder, console)


def _loaded(console: Console, name: str, options: list[Any] | None, seed: int) -> Task:
    with busy(console, f"loading {name}"):
        return load_task(name, seed=seed, **dict(options or []))


def _folder_name(task: str) -> str:
    return task.rpartition(":")[2] or "task"


@contextmanager
def _command(wanted: Path, threads: int | None = None) -> Iterator[tuple[Console, Path]]:
    """A console and a new output folder; mistakes and Ctrl-C end in a line and an exit code; no empty folder stays."""
    console, mistakes = Console(highlight=False), Console(stderr=True, highlight=False)
    with short_errors(mistakes):
        folder = new_folder(wanted)
        threads_before = torch.get_num_threads()
        torch.set_num_threads(threads or threads_before)
        before = signal.signal(signal.SIGTERM, signal.default_int_handler)  # as Ctrl-C
        try:
            yield console, folder
        except KeyboardInterrupt:
            written = any(not path.name.startswith(".") for path in folder.iterdir())  # all but the mark of its run
            kept = f"what was written is in {folder}" if written else "nothing was written"
            mistakes.print(f"interrupted: {escape(kept)}", soft_wrap=True)
            raise typer.Exit(130) from None
        finally:
            signal.signal(signal.SIGTERM, before)
            torch.set_num_threads(threads_before)
            release(folder)
