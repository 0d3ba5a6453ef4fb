"""The peak memory of an update, measured apart from training."""

import copy
import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn

from macrobatch import Window, apply_update, collate_windows
from macrobatch.cli.comparison import Memory
from macrobatch.cli.learner import accumulator_of
from macrobatch.cli.way import Way, learned
from macrobatch.memory import memory_limit, peak_memory
from macrobatch.tasks import Task


def window_of(task: Task, samples: Sequence[Any], micro_batch_size: int) -> Window:
    """The samples as a window of even micro-batches."""
    return collate_windows(task.collate, micro_batch_size=micro_batch_size)(list(samples))


@dataclass(frozen=True)
class MemoryProbe:
    """Peaks of two updates of a task, under a budget in bytes if one is given.

    The model is a copy of its own, which counts from the first forward on. Gradients and optimizer state come into
    being inside of what is measured: the second update is there because optimizers make their state in the first.
    """

    task: Task
    samples: Sequence[Any]
    learning_rate: float
    device: torch.device
    max_memory: int | None

    def of(self, way: Way) -> Memory:
        """The peak of `way`; where it does not fit, a lower bound of what it needs."""
        peak = self.peak(way)
        if peak is not None:
            return Memory(peak, fits=True)

        def of_size(size: int) -> int | None:
            return self.peak(replace(way, update_size=size, micro_batch_size=size))

        return Memory(lower_bound(of_size, way.micro_batch_size), fits=False)

    def peak(self, way: Way) -> int | None:
        """The peak in bytes, or None where the memory is not enough for micro-batches of this size."""
        window = window_of(self.task, self.samples[: way.update_size], way.micro_batch_size)
        model = copy.deepcopy(self.task.model).to(self.device)  # outside: the one that it is copied from does not count
        try:
            with (
                quiet(),
                nullcontext() if self.max_memory is None else memory_limit(self.max_memory, device=self.device),
            ):
                return peak_memory(
                    lambda: self._two_updates(learned(self.task, way), model, window), device=self.device
                )
        except torch.OutOfMemoryError:
            return None

    def _two_updates(self, task: Task, model: nn.Module, window: Window) -> None:
        optimizer, accumulator = task.make_optimizer(model, self.learning_rate), accumulator_of(task, model)
        for _ in range(2):
            report = accumulator.run(window)
            if report.retries:
                raise torch.OutOfMemoryError("a micro-batch only fits in smaller pieces")
            apply_update(optimizer, report)


@contextmanager
def quiet() -> Iterator[None]:
    """The library says nothing: running out of memory is what is being measured."""
    logger = logging.getLogger("macrobatch")
    before, logger.disabled = logger.disabled, True
    try:
        yield
    finally:
        logger.disabled = before


def lower_bound(peak: Callable[[int], int | None], size: int) -> int | None:
    """What one micro-batch of `size` samples needs at least, by the two largest of its halvings that fit, or None.

    The peak is a maximum over time of a + m size, so it is convex: beyond two sizes it is above the line through them.

    >>> lower_bound(lambda size: 100 + 10 * size if size <= 30 else None, 128)
    1380
    """
    fitting: list[tuple[int, int]] = []
    smaller = size // 2
    while smaller >= 1 and len(fitting) < 2:
        num_bytes = peak(smaller)
        if num_bytes is not None:
            fitting.append((smaller, num_bytes))
        smaller //= 2
    if len(fitting) < 2:
        return None
    (large, more), (small, less) = fitting
    return more + (more - less) * (size - large) // (large - small)
