"""`macrobatch compare`: small batch, accumulation and native large batch on the same samples, in one report."""

import copy
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal

import torch
from rich.console import Console
from rich.markup import escape
from torch import nn

from macrobatch.auto_size import refuse_coupled
from macrobatch.budget import budget_bytes
from macrobatch.cli import setup
from macrobatch.cli.comparison import Comparison, Key, Memory, Result, Way, three_ways
from macrobatch.cli.figures import save_main_picture
from macrobatch.cli.forecast import Forecast, sample_batch
from macrobatch.cli.formats import bytes_text, duration_text
from macrobatch.cli.measure import GradientMeter, GradientStatistics, MemoryProbe, sizes_between
from macrobatch.cli.progress import Progress, say
from macrobatch.cli.race import Racer, race, validation_points
from macrobatch.cli.report import page, terminal_table
from macrobatch.cli.runfiles import all_or_nothing, write_json, write_text
from macrobatch.cli.sampling import UpdateIndices, take, update_sizes
from macrobatch.cli.validation import validation_batches
from macrobatch.cli.words import findings
from macrobatch.planning import plan
from macrobatch.tasks import Task
from macrobatch.tasks.task import num_samples

MOST_VALIDATION_SAMPLES = 512
FORWARD_SHARE = 1 / 3  # of the work of forward and backward
METER_SHARE = 1.5  # work of a sample while memory is measured


@dataclass(frozen=True, kw_only=True)
class CompareOptions:
    """What the command line said; None where the task's own value is meant, or no budget."""

    batch_size: int | None = None
    micro_batch_size: int | Literal["auto"] | None = None
    max_memory: int | str | None = None
    learning_rate: float | None = None
    samples: int = 8192
    draws: int = 64
    device: setup.Device = "auto"
    seed: int = 0


class Comparer:
    """One comparison in the making: its settings, checked, and its steps, which report their progress."""

    def __init__(self, task: Task, options: CompareOptions) -> None:
        self.task, self.options = task, options
        self.device = setup.device_named(options.device)
        self.data_size = num_samples(task.train, "train")
        self.batch_size = options.batch_size or min(task.batch_size, self.data_size)
        self.max_memory = None if options.max_memory is None else budget_bytes(options.max_memory, self.device)
        self.micro_batch_size = self._micro_batch_size()
        self._check_sizes()
        self.learning_rate = options.learning_rate or task.learning_rate
        self.ways = three_ways(self.batch_size, self.micro_batch_size)
        # Whole effective batches, so that no way sees a sample that another does not.
        whole = options.samples // self.batch_size * self.batch_size
        self.indices = UpdateIndices(
            self.data_size, update_sizes(self.data_size, self.batch_size, samples=whole), options.seed
        )
        self.samples = whole
        self.validation = list(validation_batches(task, self.micro_batch_size, MOST_VALIDATION_SAMPLES))
        self.validation_work = FORWARD_SHARE * min(MOST_VALIDATION_SAMPLES, num_samples(task.validation, "validation"))
        self.points = validation_points(len(self.indices))
        self.sizes = sizes_between(self.micro_batch_size, self.batch_size)

    def _micro_batch_size(self) -> int:
        """The size given, the task's own, or with "auto" the fastest that fits, of those that leave two for a batch."""
        given, most = self.options.micro_batch_size, self.batch_size // 2
        if given is None:
            return min(self.task.micro_batch_size, most)
        if given != "auto":
            return given
        refuse_coupled([self.task.model])
        model = copy.deepcopy(self.task.model).to(self.device)
        found = plan(
            model,
            self.task.loss_fn,
            sample_batch(self.task),
            batch_size=self.batch_size,
            max_memory=self.max_memory,
            optimizer=self.task.make_optimizer(model, self.task.learning_rate),
        )
        return min((found.fastest or found.largest).micro_batch_size, most)

    def _check_sizes(self) -> None:
        batch_size, samples = self.batch_size, self.options.samples
        if batch_size > self.data_size:
            raise ValueError(
                f"--batch-size {batch_size} is more than the {self.data_size} training samples of {self.task.name}"
            )
        if not 1 <= self.micro_batch_size < batch_size:
            raise ValueError(
                f"--micro-batch-size {self.micro_batch_size} must be below --batch-size {batch_size}: "
                "otherwise there is nothing to accumulate"
            )
        if samples < batch_size:
            raise ValueError(f"--samples {samples} is less than one effective batch of {batch_size}")

    def work(self, ways: Sequence[Way]) -> float:
        """All that is to do if these ways fit, in samples forward and backward."""
        probing = METER_SHARE * sum(2 * way.update_size for way in self.ways)
        training = len(ways) * (self.samples + (len(self.points) + 1) * self.validation_work)
        return probing + training + self.options.draws * self._drawn(any(way.key == "native" for way in ways))

    def seconds(self) -> float:
        """What all of it takes at the present speed, by one micro-batch after another one that warms up."""
        racer = Racer(self.task, self.ways[0], self.learning_rate, self.device)
        for _ in range(2):
            racer.train_on(take(self.task.train, range(self.micro_batch_size)))
        return self.work(self.ways) * racer.course().window_seconds[-1] / self.micro_batch_size

    def _drawn(self, native: bool) -> int:
        return sum(self.sizes) + native * self.batch_size

    def memories(self, progress: Progress) -> dict[Key, Memory]:
        """The peak memory of each way. ValueError where not even accumulation fits the budget."""
        first = next(iter(self.indices))
        samples = take(self.task.train, first)
        probe = MemoryProbe(self.task, samples, self.learning_rate, self.device, self.max_memory)
        forecast = self._forecast()
        memories: dict[Key, Memory] = {}
        for way in self.ways:
            progress.advance(0, f"measuring memory: {way.name}")
            predicted = forecast.memory(way.update_size, way.micro_batch_size)
            memories[way.key] = replace(probe.of(way), predicted_bytes=None if predicted is None else predicted.peak)
            progress.advance(2 * METER_SHARE * way.update_size, f"measuring memory: {way.name}")
        if not (memories["small"].fits and memories["accumulated"].fits):
            budget = bytes_text(self.max_memory) if self.max_memory else "of the device"
            raise ValueError(
                f"out of memory: not even micro-batches of {self.micro_batch_size} fit the budget {budget}; give a "
                "smaller --micro-batch-size, or more --max-memory"
            )
        return memories

    def _forecast(self) -> Forecast:
        model = copy.deepcopy(self.task.model).to(self.device)
        return Forecast(self.task, model, self.task.make_optimizer(model, self.learning_rate), self.device)

    def train(self, ways: Sequence[Way], progress: Progress) -> dict[Key, Racer]:
        """Every way has been trained on the samples."""
        racers = [Racer(self.task, way, self.learning_rate, self.device) for way in ways]
        race(racers, self.indices, self.validation, self.validation_work, self.points, progress.advance)
        return {racer.way.key: racer for racer in racers}

    def gradients(self, model: nn.Module, native: bool, progress: Progress) -> GradientStatistics:
        """Variances of the gradient at the parameters of `model`, over draws from the training data."""
        meter = GradientMeter(self.task, model, self.sizes, self.micro_batch_size, native=native)
        generator = torch.Generator().manual_seed(self.options.seed + 1)
        for number in range(self.options.draws):
            meter.draw(torch.randperm(self.data_size, generator=generator)[: self.batch_size].tolist())
            progress.advance(self._drawn(native), f"gradient variance: draw {number + 1}/{self.options.draws}")
        return meter.statistics()


def compare(task: Task, options: CompareOptions, folder: Path, console: Console) -> Comparison:
    """The three ways are measured, and the table, the words and the report are on the terminal and in `folder`."""
    comparer = Comparer(task, options)
    for line in headline(comparer, folder):
        say(console, line)
    comparison = measure(comparer, console)
    said = findings(comparison)
    with all_or_nothing(folder):
        write_json(folder / "compare.json", {**asdict(comparison), "findings": [asdict(each) for each in said]})
        save_main_picture(folder / "compare.png", comparison)
        write_text(folder / "report.html", page(comparison, said))
    console.print(terminal_table(comparison))
    for finding in said:
        console.print(f"\n[bold]{escape(finding.title)}.[/]\n{escape(finding.text)}")
    console.print(f"\nreport: {escape(str(folder / 'report.html'))}", soft_wrap=True)
    return comparison


def headline(comparer: Comparer, folder: Path) -> list[str]:
    """What is going to happen, in lines for the terminal."""
    task = comparer.task
    budget = "" if comparer.max_memory is None else f"; budget {bytes_text(comparer.max_memory)}"
    return [
        f"{task.name}: {task.description}" if task.description else task.name,
        f"three times the same {comparer.samples:,} samples in the same order, from the same weights, at learning rate "
        f"{comparer.learning_rate:.3g}{budget}:",
        *(
            f"  {way.name}: updates of {way.update_size}, {way.micro_batch_size} in memory at once"
            for way in comparer.ways
        ),
        f"about {duration_text(comparer.seconds())} (minutes:seconds) at the present speed on "
        f"{_device_text(comparer.device)}; other programs at work slow it down",
        f"writing to {folder}",
    ]


def measure(comparer: Comparer, console: Console) -> Comparison:
    """Memory, training and gradient variance, one after the other."""
    with Progress(console, comparer.work(comparer.ways)) as progress:
        memories = comparer.memories(progress)
        fitting = [way for way in comparer.ways if memories[way.key].fits]
        progress.expect(comparer.work(fitting))
        racers = comparer.train(fitting, progress)
        # Where accumulation ended: further than the start from where gradients all point the same way.
        gradients = comparer.gradients(racers["accumulated"].model, "native" in racers, progress)
    variances = {
        "small": gradients.by_size[comparer.micro_batch_size],
        "accumulated": gradients.by_size[comparer.batch_size],
        "native": gradients.native,
    }
    results: dict[Key, Result] = {
        way.key: Result(
            way,
            memories[way.key],
            racers[way.key].course() if way.key in racers else None,
            variances[way.key],
        )
        for way in comparer.ways
    }
    return _comparison(comparer, results, gradients)


def _comparison(comparer: Comparer, results: dict[Key, Result], gradients: GradientStatistics) -> Comparison:
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
        draws=options.draws,
        max_memory=comparer.max_memory,
        results=results,
        variances=gradients.by_size,
        gradient_squared=gradients.gradient_squared,
        gradient_difference=gradients.largest_difference,
        noisy_layers=noisy_layers(task.model),
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
