"""The gradient of an update at common parameters, over many draws of its samples: its variance, and by which way."""

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from macrobatch.cli.comparison import PlainGradient
from macrobatch.cli.estimates import Estimate
from macrobatch.cli.learner import accumulator_of
from macrobatch.cli.measure import window_of
from macrobatch.cli.sampling import take
from macrobatch.tasks import Task


class RunningVariance:
    """Mean and trace of the covariance of vectors that come one at a time, at the memory of one vector.

    The contribution of vector k is (k - 1) / k |g_k - mean of those before|^2 (Welford 1962). Each has the trace of the
    covariance as its expectation, and they are uncorrelated (Helmert's contrasts), so their mean is the sample variance
    and their spread gives its standard error.
    """

    def __init__(self) -> None:
        self.count = 0
        self._mean: Tensor | None = None
        self._contributions: list[float] = []
        self._along_mean: list[float] = []  # each vector's product with the mean of those before it

    def add(self, vector: Tensor) -> None:
        """One more vector, of shape (P,)."""
        self.count += 1
        if self._mean is None:
            self._mean = vector.clone()
            return
        self._along_mean.append(float(vector.double() @ self._mean.double()))
        difference = vector - self._mean
        squared = float(torch.linalg.vector_norm(difference, dtype=torch.float64)) ** 2
        self._contributions.append((self.count - 1) / self.count * squared)
        self._mean += difference / self.count

    @property
    def trace(self) -> Estimate:
        """The trace of the covariance of one vector."""
        return mean_of(self._contributions)

    @property
    def mean_squared(self) -> Estimate:
        """The squared norm of the true mean: that of the sample mean, less the part of it that is noise."""
        if self._mean is None:
            return Estimate(math.nan, math.nan)
        squared = float(torch.linalg.vector_norm(self._mean, dtype=torch.float64)) ** 2
        # |mean|^2 moves by 2 g . noise / n with each vector; the later products are with nearly the true mean.
        later = self._along_mean[len(self._along_mean) // 2 :]
        spread = statistics.stdev(later) if len(later) > 1 else math.nan
        return Estimate(squared - self.trace.value / self.count, 2 * spread / math.sqrt(self.count))


def mean_of(values: Sequence[float]) -> Estimate:
    """The mean of independent values and its standard error."""
    if len(values) < 2:
        return Estimate(values[0] if values else math.nan, math.nan)
    return Estimate(statistics.fmean(values), statistics.stdev(values) / math.sqrt(len(values)))


@dataclass(frozen=True)
class GradientStatistics:
    """Gradients of updates at common parameters: variance by update size, by way, and how far two ways are apart.

    `plain` and `plain_gradient`: of plain accumulation, where the loss compares the samples of an update.
    """

    by_size: Mapping[int, Estimate]
    native: Estimate | None
    gradient_squared: Estimate
    largest_difference: float | None
    plain: Estimate | None = None
    plain_gradient: PlainGradient | None = None


class Gradient:
    """Gradients of the loss of a task over effective batches, at the parameters of `model`, which stay as they are."""

    def __init__(self, task: Task, model: nn.Module) -> None:
        self._task = task
        self._parameters = [p for p in model.parameters() if p.requires_grad]
        self._accumulator = accumulator_of(task, model)

    def __call__(self, samples: Sequence[Any], micro_batch_size: int) -> tuple[Tensor, float]:
        """The gradient of the loss over the samples, shape (P,), and the loss weight that it is a mean over."""
        report = self._accumulator.run(window_of(self._task, samples, micro_batch_size))
        parts = [torch.zeros_like(p).flatten() if p.grad is None else p.grad.flatten() for p in self._parameters]
        for p in self._parameters:
            p.grad = None
        return torch.cat(parts), float(torch.as_tensor(report.loss_weight))


class GradientMeter:
    """Draws effective batches and takes their gradient at the parameters of `model`, which stay as they are.

    Each draw is a random subset of the training data, without replacement, and independent of the other draws. Smaller
    updates take its first samples, and each size goes on from the one before: the gradient of an effective batch is the
    mean of its parts' by their loss weights. The native batch takes all in one piece, so that both see the same.
    """

    def __init__(
        self, task: Task, model: nn.Module, sizes: Sequence[int], micro_batch_size: int, *, native: bool
    ) -> None:
        self._task, self._micro_batch_size = task, micro_batch_size
        self._gradient = Gradient(task, model)
        self._by_size = {size: RunningVariance() for size in sizes}
        self._native = RunningVariance() if native else None
        self._largest_difference = 0.0

    def draw(self, indices: Sequence[int]) -> None:
        """One more draw: the samples at `indices`."""
        samples = take(self._task.train, indices)
        vector, weight, start = torch.zeros(()), 0.0, 0
        for size, variance in self._by_size.items():
            part, part_weight = self._gradient(samples[start:size], self._micro_batch_size)
            weight += part_weight
            share = part_weight / weight if weight else 1.0
            vector = vector + share * (part - vector)
            variance.add(vector)
            start = size
        if self._native is not None:
            in_one_piece, _ = self._gradient(samples, len(samples))
            self._native.add(in_one_piece)
            self._largest_difference = max(self._largest_difference, relative_difference(vector, in_one_piece))

    def statistics(self) -> GradientStatistics:
        """What the draws so far say."""
        largest = list(self._by_size.values())[-1]
        return GradientStatistics(
            by_size={size: variance.trace for size, variance in self._by_size.items()},
            native=None if self._native is None else self._native.trace,
            gradient_squared=largest.mean_squared,
            largest_difference=None if self._native is None else self._largest_difference,
        )


def relative_difference(one: Tensor, other: Tensor) -> float:
    """|one - other| / |other|."""
    return float(torch.linalg.vector_norm(one - other) / torch.linalg.vector_norm(other))


def sizes_between(smallest: int, largest: int) -> list[int]:
    """From the smallest update to the largest by doubling: the sizes at which the variance is measured.

    >>> sizes_between(16, 128), sizes_between(10, 64), sizes_between(8, 8)
    ([16, 32, 64, 128], [10, 20, 40, 64], [8])
    """
    sizes = [smallest]
    while 2 * sizes[-1] < largest:
        sizes.append(2 * sizes[-1])
    return [*sizes, largest] if largest > smallest else [smallest]
