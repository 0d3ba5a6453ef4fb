"""`macrobatch noise` and its options: what is asked for is checked here, before any work."""

from pathlib import Path
from typing import Annotated, Any

import typer

from macrobatch.cli import options as cli
from macrobatch.cli.app import app
from macrobatch.cli.command import command, folder_name, loaded


def _factors(text: str) -> tuple[int, ...]:
    parts = text.split(",")
    if all(part.isdecimal() and int(part) > 0 for part in parts):
        factors = tuple(sorted({1, *map(int, parts)}))
        if len(factors) > 1:
            return factors
    raise typer.BadParameter(f"whole numbers above 1 are needed, as in 2,4,8; got {text!r}")


PerExample = Annotated[
    bool, cli.flag("--per-example", "Measure the gradient of each sample, for updates of one micro-batch.")
]
HalfLife = Annotated[int, cli.count(1, "Updates after which one counts half: training moves on.")]
Branched = Annotated[
    bool, cli.flag("--branched", "Then measure the critical batch itself: train on at several batch sizes.")
]
Factors = Annotated[
    Any, typer.Option(parser=_factors, metavar="K,K,...", help="Of --branched: times the batch.  [2,4,8]")
]
BranchSamples = Annotated[
    int | None, cli.count(1, "Of --branched: samples in each branch.  [8 updates of the largest batch]")
]
Repeats = Annotated[int | None, cli.count(1, "Of --branched: branches of each size, on other samples.  [3]")]
Tolerance = Annotated[
    float | None,
    typer.Option(parser=cli.above_zero, metavar="LOSS", help="Of --branched: what counts as no worse.  [0.01]"),
]


@app.command(cls=cli.Command)
def noise(
    task: cli.TaskName = "code-lm",
    task_option: cli.TaskOptions = None,
    batch_size: cli.BatchSize = None,
    micro_batch_size: Annotated[
        int | None, cli.count(1, "Samples in memory at once.  [an eighth of the batch, at most the task's]")
    ] = None,
    max_memory: cli.MaxMemory = None,
    lr: cli.LearningRate = None,
    base_batch_size: cli.BaseBatchSize = None,
    scaling: cli.ScalingRule = "none",
    warmup: cli.Warmup = 0,
    steps: cli.Steps = None,
    epochs: cli.Epochs = None,
    samples: cli.Samples = None,
    max_norm: cli.MaxNorm = None,
    precision: cli.PrecisionName = "fp32",
    device: cli.DeviceName = "auto",
    threads: cli.Threads = None,
    seed: cli.Seed = 0,
    per_example: PerExample = False,
    half_life: HalfLife = 100,
    branched: Branched = False,
    factors: Factors = None,
    branch_samples: BranchSamples = None,
    repeats: Repeats = None,
    tolerance: Tolerance = None,
    output: Annotated[Path | None, cli.output_folder("runs/noise-TASK")] = None,
) -> None:
    """Train a task and measure its gradient noise: which batch pays, which is fastest here, and how sure that is."""
    from macrobatch.cli.branched import BranchOptions, branched_run
    from macrobatch.cli.noise import noise as noise_run
    from macrobatch.cli.run import Run
    from macrobatch.cli.run_options import TrainOptions

    options = TrainOptions(
        batch_size=batch_size,
        micro_batch_size=micro_batch_size,
        max_memory=max_memory,
        learning_rate=lr,
        base_batch_size=base_batch_size,
        scaling=scaling,
        warmup=warmup,
        updates=steps,
        epochs=epochs,
        samples=samples,
        max_norm=max_norm,
        precision=precision,
        device=device,
        seed=seed,
        noise="per example" if per_example else "measure",
        noise_half_life=half_life,
    )
    with command(output or Path("runs") / f"noise-{folder_name(task)}", task, threads) as (console, folder):
        branches = BranchOptions.of(branched, factors, branch_samples, repeats, tolerance)
        run = Run(loaded(console, task, task_option, seed), options)
        code = branched_run(run, branches, folder, console) if branches else noise_run(run, folder, console)
    raise typer.Exit(code)
