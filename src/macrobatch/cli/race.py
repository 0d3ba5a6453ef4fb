"""Several ways through the same samples, side by side: the same order, the same initial weights, timed in turn."""

import copy
import math
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from contextlib import AbstractContextManager, suppress
from dataclasses import replace
from typing import Any

import torch
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from macrobatch import GradientNoiseScale, Window, apply_update
from macrobatch.cli.comparison import Course, NoisePoint
from macrobatch.cli.learner import accumulator_of
from macrobatch.cli.measure import window_of
from macrobatch.cli.running_statistics import running_layers, taken_anew
from macrobatch.cli.sampling import UpdateIndices, take
from macrobatch.cli.validation import Validation, validate
from macrobatch.cli.way import Way, learned
from macrobatch.cli.workload import Workload
from macrobatch.measuring import Measure
from macrobatch.tasks import Task


class Racer:
    """One way in training: its own copy of the model and optimizer, and what was seen on the way.

    `prepare`, if given, sets the new optimizer, and what it returns is stepped after each update that was applied.
    `noise`, if given, watches every update; it needs several micro-batches in the first one. Validation is with running
    statistics taken anew over the micro-batches `anew`; without any, with those that training left.
    """

    def __init__(
        self,
        task: Task,
        way: Way,
        learning_rate: float,
        device: torch.device,
        prepare: Callable[[Optimizer], LRScheduler] | None = None,
        noise: GradientNoiseScale | None = None,
        anew: Sequence[Any] = (),
    ) -> None:
        self.way, self.task = way, task
        self.model = copy.deepcopy(task.model).to(device)
        self._anew = anew if running_layers(self.model) else ()
        self._optimizer = task.make_optimizer(self.model, learning_rate)
        self._scheduler = None if prepare is None else prepare(self._optimizer)
        self._noise, self._noise_points = noise, list[NoisePoint]()
        measure: Measure | None = None if noise is None else "norms"
        self._accumulator = accumulator_of(learned(task, way), self.model, measure=measure)
        self._seen = self._skipped = self._micro_batches = 0
        self._losses: list[tuple[int, float]] = []
        self._validation_losses: list[tuple[int, float]] = []
        self._update_seconds: list[float] = []
        self._window_seconds: list[float] = []
        self._window_samples: list[int] = []
        self._metrics_before: Mapping[str, float] = {}
        self._final: Validation | None = None
        self._loss_as_left: float | None = None

    def train_on(self, samples: Sequence[Any]) -> None:
        """One effective batch of samples is learned, in one update or in several; loading them is not in the time."""
        size = self.way.update_size
        windows = [
            window_of(self.task, samples[start : start + size], self.way.micro_batch_size)
            for start in range(0, len(samples), size)
        ]
        seconds = [self._update(window) for window in windows]
        self._update_seconds += seconds
        self._window_seconds.append(sum(seconds))
        self._window_samples.append(len(samples))

    def validate_on(self, micro_batches: Sequence[Any], *, with_metrics: bool) -> None:
        """The validation curve has a point at the samples seen so far."""
        task = self.task if with_metrics else replace(self.task, metrics={})
        with self.statistics_anew():
            self._final = validate(self.model, task, micro_batches)
        if self._anew and with_metrics:  # at the ends
            self._loss_as_left = validate(self.model, replace(task, metrics={}), micro_batches).loss
        if not self._seen:
            self._metrics_before = self._final.metrics
        self._validation_losses.append((self._seen, self._final.loss))
        self._read_noise()

    def statistics_anew(self) -> AbstractContextManager[None]:
        """Within it the model's running statistics are taken anew; then they are those that training left."""
        return taken_anew(self.model, self.task, self._anew)

    def _read_noise(self) -> None:
        if self._noise is not None and self._seen:
            with suppress(ValueError):  # no update was finite yet
                found = self._noise.estimate()
                self._noise_points.append(NoisePoint(self._seen, found.noise_scale, found.low, found.high))

    def _update(self, window: Window) -> float:
        started = time.perf_counter()
        report = self._accumulator.run(window)
        update = apply_update(self._optimizer, report)
        if update.applied and self._scheduler is not None:
            self._scheduler.step()
        loss = float(report.loss)  # waits for a GPU: the time ends with the update
        seconds = time.perf_counter() - started
        if self._noise is not None:
            self._noise.observe(report)
        self._skipped += not update.applied
        self._seen += report.num_samples
        self._micro_batches += report.accumulation_steps
        self._losses.append((self._seen, loss))
        return seconds

    def course(self) -> Course:
        """What was seen on the way."""
        return Course(
            losses=self._losses,
            validation_losses=self._validation_losses,
            final=self._final or Validation(math.nan, {}, [], [], 0),
            update_seconds=self._update_seconds,
            window_seconds=self._window_seconds,
            window_samples=self._window_samples,
            skipped=self._skipped,
            noise=self._noise_points,
            metrics_before=self._metrics_before,
            num_micro_batches=self._micro_batches,
            loss_as_left=self._loss_as_left,
        )


def race(
    racers: Sequence[Racer],
    indices: UpdateIndices,
    validation: Sequence[Any],
    workload: Workload,
    points: Collection[int],
    advance: Callable[[float, str], None],
) -> None:
    """Every racer has learned from every sample, an effective batch each in turn, and been validated at `points`.

    `points`: counts of effective batches. `advance(work, text)` is told of each piece of work, counted in samples
    forward and backward as `workload` does.
    """
    count = len(indices)
    for racer in racers:
        racer.validate_on(validation, with_metrics=racer is racers[0])  # all have the same weights
        advance(workload.validation, f"validating: {racer.way.name}")
    for number, batch in enumerate(indices, 1):
        samples = take(racers[0].task.train, batch)
        # Each goes first in its turn, so that a machine that slows down or speeds up does so for all alike.
        for racer in [*racers[number % len(racers) :], *racers[: number % len(racers)]]:
            racer.train_on(samples)
            advance(workload.update(racer.way, len(batch)), f"training: {racer.way.name}")
        if number in points:
            for racer in racers:
                racer.validate_on(validation, with_metrics=number == count)
                advance(workload.validation, f"validating: {racer.way.name}")


def validation_points(count: int) -> set[int]:
    """After how many of `count` effective batches to validate: every eighth of the run, and more often at the start.

    >>> sorted(validation_points(64))
    [1, 2, 4, 8, 16, 24, 32, 40, 48, 56, 64]
    """
    eighths = {round(eighth * count / 8) for eighth in range(1, 9)}
    return {point for point in eighths | {count // 16, count // 32, count // 64} if point > 0}
