"""`macrobatch compare`: small batch, accumulation, native large batch and a scaled rate on the same samples."""

from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.markup import escape
from torch import nn

from macrobatch.cli.compare_options import CompareOptions
from macrobatch.cli.comparer import Comparer
from macrobatch.cli.comparison import Comparison, Result
from macrobatch.cli.estimates import Estimate
from macrobatch.cli.figures import save_main_picture
from macrobatch.cli.forecast import coupling_layer
from macrobatch.cli.formats import bytes_text, counted, duration_text
from macrobatch.cli.gradient_meter import GradientStatistics
from macrobatch.cli.metric_check import check_metrics
from macrobatch.cli.preparing import prepare
from macrobatch.cli.progress import Progress, say
from macrobatch.cli.report import page
from macrobatch.cli.runfiles import all_or_nothing, write_json, write_text
from macrobatch.cli.terminal_table import terminal_table
from macrobatch.cli.way import Key, Way
from macrobatch.cli.words import findings
from macrobatch.tasks import Task


def compare(make_task: Callable[[int], Task], options: CompareOptions, folder: Path, console: Console) -> Comparison:
    """The ways are measured, and the table, the words and the report are on the terminal and in `folder`.

    `make_task`: from a seed to the task with the initial weights of that seed.
    """
    comparer = Comparer(make_task(options.seed), options)
    check_metrics(comparer.task.model.to(comparer.device), comparer.task, comparer.micro_batch_size)
    for line in headline(comparer, folder):
        say(console, line)
    prepare(comparer.task, console)
    comparison = measure(comparer, make_task, console)
    said = findings(comparison)
    with all_or_nothing(folder):
        write_json(folder / "compare.json", {**asdict(comparison), "findings": [asdict(each) for each in said]})
        save_main_picture(folder / "compare.png", comparison)
        write_text(folder / "report.html", page(comparison, said))
    console.print(terminal_table(comparison, console.width))
    for finding in said:
        console.print(f"\n[bold]{escape(finding.title)}.[/]\n{escape(finding.text)}")
    console.print(f"\nreport: {escape(str(folder / 'report.html'))}", soft_wrap=True)
    return comparison


def headline(comparer: Comparer, folder: Path) -> list[str]:
    """What is going to happen, in lines for the terminal."""
    task, more = comparer.task, comparer.options.seeds - 1
    budget = "" if comparer.max_memory is None else f"; budget {bytes_text(comparer.max_memory)}"
    seeds = f", and all but the native batch at {counted(more, 'more seed')}" if more else ""
    seconds = comparer.seconds()
    hours = "hours:" if seconds >= 3600 else ""
    return [
        f"{task.name}: {task.description}" if task.description else f"task {task.name}",
        f"the same {comparer.samples:,} samples ({comparer.num_batches:,} × {comparer.batch_size}) in the same order, "
        f"from the same weights, at learning rate "
        f"{comparer.learning_rate:.3g}{budget}{seeds}:",
        *(_way_line(comparer, way) for way in comparer.ways),
        f"about {duration_text(seconds)} ({hours}minutes:seconds) at the present speed on "
        f"{_device_text(comparer.device)}; other programs at work slow it down",
        f"writing to {folder}",
    ]


def _way_line(comparer: Comparer, way: Way) -> str:
    line = f"  {way.name}: updates of {way.update_size}, {way.micro_batch_size} in memory at once"
    if comparer.scaling is None or way.key != "scaled":
        return line
    return f"{line}, learning rate {comparer.learning_rate * comparer.scaling.lr_factor:.3g}"


def measure(comparer: Comparer, make_task: Callable[[int], Task], console: Console) -> Comparison:
    """Memory, training, gradient variance, sharpness and the other seeds, one after the other."""
    options = comparer.options
    with Progress(console, comparer.work(comparer.ways)) as progress:
        memories = comparer.memories(progress)
        fitting = [way for way in comparer.ways if memories[way.key].fits]
        progress.expect(comparer.work(fitting))
        racers = comparer.train(fitting, progress)
        # Where accumulation ended: further than the start from where gradients all point the same way.
        gradients = comparer.gradients(racers["accumulated"].model, "native" in racers, progress)
        sharp = comparer.sharpness(racers, progress)
        seeds = range(options.seed + 1, options.seed + options.seeds)
        repeats = [comparer.repeat(make_task(seed), seed, fitting, progress) for seed in seeds]
    variances: dict[Key, Estimate | None] = {
        "small": gradients.by_size[comparer.micro_batch_size],
        "accumulated": gradients.by_size[comparer.batch_size],
        "native": gradients.native,
        "plain": gradients.plain,
    }
    results: dict[Key, Result] = {
        way.key: Result(
            way,
            memories[way.key],
            racers[way.key].course() if way.key in racers else None,
            variances.get(way.key),
            sharp.get(way.key),
        )
        for way in comparer.ways
    }
    return _comparison(comparer, gradients, results=results, repeats=repeats)


def _comparison(comparer: Comparer, gradients: GradientStatistics, **measured: Any) -> Comparison:
    task, options = comparer.task, comparer.options
    return Comparison(
        task=task.name,
        description=task.description,
        device=_device_text(comparer.device),
        num_parameters=sum(p.numel() for p in task.model.parameters()),
        data_size=comparer.data_size,
        batch_size=comparer.batch_size,
        micro_batch_size=comparer.micro_batch_size,
        samples=comparer.samples,
        learning_rate=comparer.learning_rate,
        seed=options.seed,
        draws=comparer.draws,
        max_memory=comparer.max_memory,
        variances=gradients.by_size,
        gradient_squared=gradients.gradient_squared,
        gradient_difference=gradients.largest_difference,
        plain_gradient=gradients.plain_gradient,
        noisy_layers=noisy_layers(task.model),
        scaling=comparer.scaling,
        not_scaled=comparer.not_scaled,
        sharpness_samples=comparer.sharpness_samples,
        coupling_layer=coupling_layer(task.model),
        statistics_samples=comparer.statistics_samples,
        **measured,
    )


def _device_text(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    threads = torch.get_num_threads()
    return f"CPU, {threads} thread{'s' if threads > 1 else ''}"


def noisy_layers(model: nn.Module) -> list[str]:
    """Kinds of layers through which a batch's cut, or chance, changes the result: BatchNorm and dropout."""
    from torch.nn.modules.batchnorm import _BatchNorm
    from torch.nn.modules.dropout import _DropoutNd

    modules: list[Any] = list(model.modules())
    kinds = {type(m).__name__ for m in modules if isinstance(m, _BatchNorm) or (isinstance(m, _DropoutNd) and m.p > 0)}
    return sorted(kinds)
