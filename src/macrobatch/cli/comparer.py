"""One comparison in the making: its settings, checked, and its steps."""

import copy
from collections.abc import Sequence
from dataclasses import replace
from itertools import islice
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from macrobatch import GradientNoiseScale
from macrobatch.budget import budget_bytes
from macrobatch.cli import setup
from macrobatch.cli.compare_options import CompareOptions, checked_draws, checked_samples, refuse_auto_among_samples
from macrobatch.cli.comparison import Memory, Repeat
from macrobatch.cli.coupled_meter import CoupledMeter
from macrobatch.cli.curvature import WORK, sharpness_of, sharpness_samples
from macrobatch.cli.forecast import refuse_auto, sample_batch
from macrobatch.cli.forecasts import predicted_peak
from macrobatch.cli.formats import bytes_text
from macrobatch.cli.gradient_meter import GradientMeter, GradientStatistics, sizes_between
from macrobatch.cli.measure import MemoryProbe, window_of
from macrobatch.cli.progress import Progress
from macrobatch.cli.race import Racer, race, validation_points
from macrobatch.cli.running_statistics import running_layers
from macrobatch.cli.sampling import UpdateIndices, take
from macrobatch.cli.scaled_rate import RateScaling, scale_with_warmup
from macrobatch.cli.validation import validation_batches
from macrobatch.cli.way import Key, Way, scaled_way, ways_of
from macrobatch.cli.workload import Workload
from macrobatch.planning import plan
from macrobatch.sharpness import Sharpness
from macrobatch.tasks import Task
from macrobatch.tasks.task import num_samples

MOST_VALIDATION_SAMPLES = 512
MOST_STATISTICS_SAMPLES = 512  # training samples that running statistics are taken anew over
SHORTEST_HALF_LIFE = 4.0  # of the noise scale, in windows; else an eighth of the run


class Comparer:
    """The settings of a comparison and its steps, which report their progress, counted in samples of training."""

    def __init__(self, task: Task, options: CompareOptions) -> None:
        self.task, self.options = task, options
        self.device = setup.device_named(options.device)
        setup.place_constants(task, self.device)
        self.data_size, self.is_coupled = num_samples(task.train, "train"), task.encode is not None
        self.batch_size = options.batch_size or min(task.batch_size, self.data_size)
        self.max_memory = None if options.max_memory is None else budget_bytes(options.max_memory, self.device)
        self.micro_batch_size = self._micro_batch_size()
        asked = checked_samples(task, options, self.batch_size, self.micro_batch_size)
        self.draws = checked_draws(task, options)
        self.learning_rate = options.learning_rate or task.learning_rate
        # Whole ones, so that every update is of the size that is said, and its loss and noise of that size.
        self.num_batches = asked // self.batch_size
        self.samples = self.num_batches * self.batch_size
        self.scaling, self.not_scaled = self._scaling()
        self.ways = ways_of(task, self.batch_size, self.micro_batch_size)
        if self.scaling is not None:
            self.ways += [scaled_way(way) for way in self.ways if way.key == "accumulated"]
        self.points = validation_points(self.num_batches)
        # A noise scale and a Hessian are those of a mean over samples.
        self.sizes = sizes_between(self.micro_batch_size, self.batch_size)
        self.sharpness_samples = min(options.sharpness_samples, self.data_size)
        if self.is_coupled:
            self.sizes, self.sharpness_samples = [self.micro_batch_size, self.batch_size], 0
        self.statistics_samples = self._statistics_samples()
        self.workload = self._workload()

    def _micro_batch_size(self) -> int:
        """The size given, the task's own, or with "auto" the fastest that fits, of those that leave two for a batch."""
        given, most = self.options.micro_batch_size, self.batch_size // 2
        if given is None:
            return min(self.task.micro_batch_size, most)
        if given != "auto":
            return given
        refuse_auto_among_samples(self.task)
        refuse_auto(self.task)
        model, optimizer = self._model_and_optimizer(self.task.learning_rate)
        found = plan(
            model,
            self.task.loss_fn,
            sample_batch(self.task),
            batch_size=self.batch_size,
            max_memory=self.max_memory,
            optimizer=optimizer,
        )
        return min((found.fastest or found.largest).micro_batch_size, most)

    def _model_and_optimizer(self, learning_rate: float) -> tuple[nn.Module, Optimizer]:
        model = copy.deepcopy(self.task.model).to(self.device)
        return model, self.task.make_optimizer(model, learning_rate)

    # ------------------------------------------------------------------------------------------ the scaled rate
    def _scale(self, optimizer: Optimizer) -> tuple[LRScheduler, RateScaling]:
        return scale_with_warmup(
            optimizer,
            from_batch_size=self.micro_batch_size,
            to_batch_size=self.batch_size,
            updates=self.num_batches,
        )

    def _scaling(self) -> tuple[RateScaling | None, str]:
        """What the rule makes of the task's optimizer; or None, and why."""
        _, optimizer = self._model_and_optimizer(self.learning_rate)
        try:
            _, scaling = self._scale(optimizer)
        except ValueError as error:  # no rule for it, or none that reaches so far
            return None, str(error)
        return (scaling, "") if scaling.changes else (None, f"for this optimizer nothing changes: {scaling.why}")

    def _statistics_samples(self) -> int:
        if not running_layers(self.task.model):
            return 0
        return max(min(self.samples, MOST_STATISTICS_SAMPLES) // self.batch_size, 1) * self.batch_size

    def _anew(self, task: Task, seed: int) -> list[Any]:
        """The first effective batches of the run in micro-batches: running statistics are taken anew over these."""
        batches = islice(self._indices(seed), self.statistics_samples // self.batch_size)
        windows = [window_of(task, take(task.train, batch), self.micro_batch_size) for batch in batches]
        return [micro_batch for window in windows for micro_batch in window]

    def _racer(self, way: Way, task: Task, anew: Sequence[Any] = ()) -> Racer:
        if way.key != "scaled":
            return Racer(task, way, self.learning_rate, self.device, anew=anew)
        noise = None
        if not self.is_coupled:
            noise = GradientNoiseScale(half_life=max(SHORTEST_HALF_LIFE, self.num_batches / 8))
        return Racer(task, way, self.learning_rate, self.device, lambda o: self._scale(o)[0], noise, anew)

    # ------------------------------------------------------------------------------------------ how long it takes
    def _workload(self) -> Workload:
        return Workload(
            samples=self.samples,
            validations=len(self.points) + 1,
            held_out=min(MOST_VALIDATION_SAMPLES, num_samples(self.task.validation, "validation"))
            + self.statistics_samples,
            draws=self.draws,
            sizes=self.sizes,
            micro_batch_size=self.micro_batch_size,
            sharpness=WORK * self.sharpness_samples,
            seeds=self.options.seeds,
            is_coupled=self.is_coupled,
        )

    def work(self, ways: Sequence[Way]) -> float:
        """All that is to do if these ways fit, in samples forward and backward."""
        return self.workload.total(self.ways, ways, self.repeated(ways))

    def seconds(self) -> float:
        """What all of it takes at the present speed, by one micro-batch after another one that warms up."""
        racer = self._racer(self.ways[0], self.task)
        for _ in range(2):
            racer.train_on(take(self.task.train, range(self.micro_batch_size)))
        return self.work(self.ways) * racer.course().window_seconds[-1] / self.micro_batch_size

    # ------------------------------------------------------------------------------------------ the steps
    def memories(self, progress: Progress) -> dict[Key, Memory]:
        """The peak memory of each way. ValueError where not even accumulation fits the budget."""
        samples = take(self.task.train, next(iter(self._indices(self.options.seed))))
        probe = MemoryProbe(self.task, samples, self.learning_rate, self.device, self.max_memory)
        memories: dict[Key, Memory] = {}
        for way in self.ways:
            if way.key == "scaled":
                memories["scaled"] = memories["accumulated"]  # the same update at another rate
                continue
            progress.advance(0, f"measuring memory: {way.name}")
            predicted = predicted_peak(self.task, way, *self._model_and_optimizer(self.learning_rate), self.device)
            memories[way.key] = replace(probe.of(way), predicted_bytes=predicted)
            progress.advance(self.workload.memory(way), f"measuring memory: {way.name}")
        if not (memories["small"].fits and memories["accumulated"].fits):
            budget = bytes_text(self.max_memory) if self.max_memory else "of the device"
            raise ValueError(
                f"out of memory: not even micro-batches of {self.micro_batch_size} fit the budget {budget}; give a "
                "smaller --micro-batch-size, or more --max-memory"
            )
        return memories

    def _indices(self, seed: int) -> UpdateIndices:
        return UpdateIndices(self.data_size, [self.batch_size] * self.num_batches, seed)

    def train(self, ways: Sequence[Way], progress: Progress) -> dict[Key, Racer]:
        """Every way has been trained on the samples."""
        return self._race(self.task, ways, self.options.seed, self.points, progress, "")

    def _race(
        self, task: Task, ways: Sequence[Way], seed: int, points: set[int], progress: Progress, note: str
    ) -> dict[Key, Racer]:
        anew = self._anew(task, seed)
        racers = [self._racer(way, task, anew) for way in ways]
        validation = list(validation_batches(task, self.micro_batch_size, MOST_VALIDATION_SAMPLES))
        race(
            racers,
            self._indices(seed),
            validation,
            self.workload,
            points,
            lambda work, text: progress.advance(work, text + note),
        )
        return {racer.way.key: racer for racer in racers}

    def gradients(self, model: nn.Module, native: bool, progress: Progress) -> GradientStatistics:
        """Variances of the gradient at the parameters of `model`, over draws from the training data."""
        kind = CoupledMeter if self.is_coupled else GradientMeter
        meter = kind(self.task, model, self.sizes, self.micro_batch_size, native=native)
        generator = torch.Generator().manual_seed(self.options.seed + 1)
        for number in range(self.draws):
            meter.draw(torch.randperm(self.data_size, generator=generator)[: self.batch_size].tolist())
            progress.advance(self.workload.draw(native), f"gradient variance: draw {number + 1}/{self.draws}")
        return meter.statistics()

    def sharpness(self, racers: dict[Key, Racer], progress: Progress, note: str = "") -> dict[Key, Sharpness]:
        """The sharpness where each racer ended, over the same samples; without those whose loss is not finite."""
        found: dict[Key, Sharpness] = {}
        if not self.sharpness_samples:
            return found
        samples = sharpness_samples(self.task, self.data_size, self.sharpness_samples, self.options.seed)
        for key, racer in racers.items():
            progress.advance(0, f"sharpness: {racer.way.name}{note}")
            with racer.statistics_anew():
                sharp = sharpness_of(racer, samples)
            if sharp is not None:
                found[key] = sharp
            progress.advance(self.workload.sharpness, f"sharpness: {racer.way.name}{note}")
        return found

    def repeated(self, ways: Sequence[Way]) -> list[Way]:
        """The ways that are run with every seed: all but the native batch, which accumulation stands for."""
        return [way for way in ways if way.key != "native"]

    def repeat(self, task: Task, seed: int, ways: Sequence[Way], progress: Progress) -> Repeat:
        """The end of `ways` with another seed, of the weights of `task` and of the order of samples."""
        setup.place_constants(task, self.device)
        note = f", seed {seed}"
        racers = self._race(task, self.repeated(ways), seed, {self.num_batches}, progress, note)
        sharp = self.sharpness(racers, progress, note)
        ends = {key: racer.course().final for key, racer in racers.items()}
        return Repeat(
            seed,
            {key: end.loss for key, end in ends.items()},
            {key: found.top for key, found in sharp.items()},
            {key: end.metrics for key, end in ends.items()},
        )
