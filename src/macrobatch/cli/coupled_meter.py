"""The gradient of an update whose loss compares its samples, by draws: each size has its own."""

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from macrobatch.cli.comparison import PlainGradient
from macrobatch.cli.estimates import Estimate
from macrobatch.cli.gradient_meter import Gradient, GradientStatistics, RunningVariance, mean_of, relative_difference
from macrobatch.cli.learner import accumulated_plainly
from macrobatch.cli.sampling import take
from macrobatch.tasks import Task


class CoupledMeter:
    """Draws effective batches and takes their gradients at the parameters of `model`, which stay as they are.

    Draws are as in GradientMeter. The gradient of a larger update is not the mean of those of its parts, so each size
    is computed from the first samples of the draw, all of them compared; and the largest also by plain accumulation,
    which is that mean, and in one piece if `native`.
    """

    def __init__(
        self, task: Task, model: nn.Module, sizes: Sequence[int], micro_batch_size: int, *, native: bool
    ) -> None:
        self._task, self._micro_batch_size = task, micro_batch_size
        self._gathered, self._plain = Gradient(task, model), Gradient(accumulated_plainly(task), model)
        self._by_size = {size: RunningVariance() for size in sizes}
        self._of_plain, self._native = RunningVariance(), RunningVariance() if native else None
        self._differences: list[float] = []
        self._cosines: list[float] = []
        self._largest_difference = 0.0

    def draw(self, indices: Sequence[int]) -> None:
        """One more draw: the samples at `indices`."""
        samples = take(self._task.train, indices)
        vector = torch.zeros(())
        for size, variance in self._by_size.items():
            vector, _ = self._gathered(samples[:size], self._micro_batch_size)
            variance.add(vector)
        if self._native is not None:
            in_one_piece, _ = self._gathered(samples, len(samples))
            self._native.add(in_one_piece)
            self._largest_difference = max(self._largest_difference, relative_difference(vector, in_one_piece))
        plain, _ = self._plain(samples, self._micro_batch_size)
        self._of_plain.add(plain)
        self._differences.append(relative_difference(plain, vector))
        self._cosines.append(_cosine(plain, vector))

    def statistics(self) -> GradientStatistics:
        """What the draws so far say. No `gradient_squared`: there is no one mean gradient that all sizes share."""
        return GradientStatistics(
            by_size={size: variance.trace for size, variance in self._by_size.items()},
            native=None if self._native is None else self._native.trace,
            gradient_squared=Estimate(math.nan, math.nan),
            largest_difference=None if self._native is None else self._largest_difference,
            plain=self._of_plain.trace,
            plain_gradient=PlainGradient(mean_of(self._differences), mean_of(self._cosines)),
        )


def _cosine(one: Tensor, other: Tensor) -> float:
    return float(one @ other / (torch.linalg.vector_norm(one) * torch.linalg.vector_norm(other)))
