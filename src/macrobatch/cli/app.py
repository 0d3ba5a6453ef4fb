"""The commands: what each is asked for, and what it calls; imports that take long come once it is clear what to do."""

import platform
from pathlib import Path
from typing import Annotated, Any

import torch
import typer

from macrobatch import __version__
from macrobatch.cli.command import command, folder_name, loaded, task_of
from macrobatch.cli.options import (
    BaseBatchSize,
    BatchSchedule,
    BatchSize,
    Command,
    Commands,
    DeviceName,
    Epochs,
    LearningRate,
    LearningRateSchedule,
    MaxMemory,
    MaxNorm,
    MicroBatchSize,
    PrecisionName,
    Samples,
    ScalingRule,
    Seed,
    SnapshotEvery,
    SpikeGuarding,
    Steps,
    TaskName,
    TaskOptions,
    Threads,
    Warmup,
    count,
    flag,
    micro_batch_size_of,
    option,
    output_folder,
)
from macrobatch.cli.preparing import busy

app = typer.Typer(
    name="macrobatch",
    cls=Commands,
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)


def _say_version(is_wanted: bool) -> None:
    if is_wanted:
        print(f"macrobatch {__version__} (torch {torch.__version__}, Python {platform.python_version()})")
        raise typer.Exit


@app.callback()
def macrobatch(
    version: Annotated[
        bool, flag("--version", "Show the version and exit.", callback=_say_version, is_eager=True)
    ] = False,
) -> None:
    """Any effective batch size on any memory budget, with the gradient of the full batch."""


@app.command(cls=Command)
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
    output: Annotated[Path | None, output_folder("runs/TASK")] = None,
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
    with command(output or Path("runs") / folder_name(task), task, threads) as (console, folder):
        to_train = loaded(console, task, task_option, seed)
        with busy(console, "planning"):
            run = Run(to_train, options)
        code = train_run(run, folder, console)
    raise typer.Exit(code)


@app.command(cls=Command)
def compare(
    task: TaskName = "code-lm",
    task_option: TaskOptions = None,
    batch_size: BatchSize = None,
    micro_batch_size: Annotated[
        Any,
        option("Samples in memory at once.  [the task's]", parser=micro_batch_size_of, metavar="N|auto"),
    ] = None,
    max_memory: MaxMemory = None,
    lr: LearningRate = None,
    samples: Annotated[
        int | None, count(1, "Train each way on so many.  [8192; 4096 where the loss compares samples]")
    ] = None,
    draws: Annotated[
        int | None,
        count(1, "Gradients drawn to measure their variance.  [64; 16 where the loss compares samples]"),
    ] = None,
    sharpness: Annotated[int, count(0, "Training samples that the sharpness at the end is over; 0: none.")] = 32,
    seeds: Annotated[int, count(1, "Repeat with so many seeds, for intervals.")] = 1,
    device: DeviceName = "auto",
    threads: Threads = None,
    seed: Seed = 0,
    output: Annotated[Path | None, output_folder("runs/compare-TASK")] = None,
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
    with command(output or Path("runs") / f"compare-{folder_name(task)}", task, threads) as (console, folder):
        compare_ways(lambda each: task_of(task, task_option, each), options, folder, console)


@app.command(cls=Command)
def plan(
    task: TaskName = "code-lm",
    task_option: TaskOptions = None,
    batch_size: BatchSize = None,
    max_memory: MaxMemory = None,
    precision: PrecisionName = "fp32",
    device: DeviceName = "auto",
    threads: Threads = None,
    seed: Seed = 0,
    output: Annotated[Path | None, output_folder("runs/plan-TASK")] = None,
) -> None:
    """Which micro-batch size fits into the memory, which is fastest, and what takes the memory: nothing is trained."""
    from macrobatch.cli.plan import PlanOptions
    from macrobatch.cli.plan import plan as plan_task

    options = PlanOptions(batch_size=batch_size, max_memory=max_memory, precision=precision, device=device, seed=seed)
    with command(output or Path("runs") / f"plan-{folder_name(task)}", task, threads) as (console, folder):
        plan_task(loaded(console, task, task_option, seed), options, folder, console)
