"""What a gradient costs at the size that it is computed at: micro-batches timed, and the batch that this favours."""

import copy
import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from statistics import median

import numpy as np
import torch
from torch import nn

from macrobatch import FastestBatch, Window
from macrobatch.batch_tradeoff import fastest_batch_size
from macrobatch.cli.learner import accumulator_of
from macrobatch.cli.measure import quiet
from macrobatch.cli.run import Run
from macrobatch.cli.sampling import take
from macrobatch.speed import measure
from macrobatch.state import RandomState

REPEATS = 5
LIMIT_S = 10.0  # for all sizes together


@dataclass(frozen=True)
class Costs:
    """Times in seconds. `seconds`: of the gradient of so many samples in one micro-batch; `update`: of all besides.

    `largest`: samples that fit into one micro-batch.
    """

    seconds: Mapping[int, float]
    update: float
    largest: int

    def of_gradient(self, batch_size: float) -> float:
        """Of the gradient of `batch_size` samples, in one micro-batch where it fits, else in those of `largest`."""
        if batch_size > self.largest:
            return batch_size * self.of_gradient(self.largest) / self.largest
        measured = self.seconds.get(int(batch_size)) if batch_size == int(batch_size) else None
        alpha, beta, _ = self._line()
        return alpha + beta * batch_size if measured is None else measured

    def fastest(self, noise_scale: float, low: float, high: float) -> FastestBatch:
        """The fastest batch; its interval holds what is not known of the noise scale and of a sample's seconds."""
        alpha, beta, error = self._line()
        per_update, per_sample = self._straight(noise_scale, alpha, beta)
        best = math.sqrt(per_update * noise_scale / per_sample)
        ends = low, high
        if 0 < best < math.inf:  # as noise scales with which the same costs would give these batches
            least = self._best(low, alpha, beta + 2 * error)
            most = self._best(high, alpha, max(beta - 2 * error, 0.0))
            ends = noise_scale * min(least / best, 1.0) ** 2, noise_scale * max(most / best, 1.0) ** 2
        return fastest_batch_size(
            noise_scale,
            seconds_per_sample=per_sample,
            seconds_per_update=per_update,
            largest_micro_batch=self.largest,
            low=ends[0],
            high=ends[1],
        )

    def _best(self, noise_scale: float, alpha: float, beta: float) -> float:
        per_update, per_sample = self._straight(noise_scale, alpha, beta)
        return math.sqrt(per_update * noise_scale / per_sample) if per_update else 0.0

    def _straight(self, noise_scale: float, alpha: float, beta: float) -> tuple[float, float]:
        """(seconds for an update, for a sample): the straight cost that touches the true one at the fastest batch.

        With alpha + beta b for a micro-batch, gamma besides and at most m samples in one, an update of B takes
        gamma + alpha + beta B up to m, and gamma + (beta + alpha/m) B beyond: a kink, where the best B may lie.
        """
        gamma, m = self.update, self.largest
        if (gamma + alpha) * noise_scale <= m**2 * beta:
            return gamma + alpha, beta
        if alpha == 0 or math.isinf(noise_scale) or gamma * noise_scale >= m**2 * (beta + alpha / m):
            return gamma, beta + alpha / m
        share = (m**2 * beta + m * alpha - gamma * noise_scale) / (alpha * (noise_scale + m))
        return (gamma + share * alpha) * (1 - 1e-9), beta + (1 - share) * alpha / m  # not above m by rounding

    def _line(self) -> tuple[float, float, float]:
        """alpha, beta and the standard error of beta: the line nearest to the times in relative terms, both >= 0."""
        sizes, times = np.array(list(self.seconds), dtype=float), np.array(list(self.seconds.values()))
        rates = times / sizes
        if len(sizes) < 3:
            return 0.0, float(rates.mean()), 0.0
        rows = np.stack([np.ones_like(sizes), sizes], 1) / times[:, None]
        (alpha, beta), *_ = np.linalg.lstsq(rows, np.ones_like(sizes), rcond=None)
        variance = ((rows @ (alpha, beta) - 1) ** 2).sum() / (len(sizes) - 2)
        error = float(np.sqrt(variance * np.linalg.inv(rows.T @ rows)[1, 1]))
        if alpha < 0:
            return 0.0, float(rates.mean()), error
        return (float(alpha), float(beta), error) if beta > 0 else (float(times.mean()), 0.0, error)


def sizes_up_to(largest: int, *others: int) -> list[int]:
    """The doublings from 1 to `largest`, that, and those of `others` that are no larger; ascending.

    >>> sizes_up_to(10, 6, 20)
    [1, 2, 4, 6, 8, 10]
    """
    return sorted({*(1 << j for j in range(largest.bit_length())), largest, *(b for b in others if 0 < b <= largest)})


def time_sizes(run: Run, sizes: Sequence[int]) -> dict[int, float]:
    """Seconds of the gradient of so many training samples in one micro-batch; the run is as before, a copy computes.

    Ascending, until all would take longer than `LIMIT_S` or a size does not run.
    """
    model, loss_fn = copy.deepcopy((run.model, run.task.loss_fn))
    modules = [each for each in (model, loss_fn) if isinstance(each, nn.Module)]
    accumulator = accumulator_of(replace(run.task, loss_fn=loss_fn), model, autocast=run.autocast)
    found: dict[int, float] = {}

    def seconds(size: int) -> float:
        window = Window([run.task.collate(take(run.task.train, range(size)))])
        durations = []
        for _ in range(1 + REPEATS):
            for module in modules:
                module.zero_grad()
            started = _now(run.device)
            if accumulator.run(window).retries:
                raise torch.OutOfMemoryError("it only fits in smaller pieces")
            durations.append(_now(run.device) - started)
        found[size] = median(durations[1:])
        return found[size]

    random = RandomState(run.device)
    try:
        with quiet():
            measure(seconds, sizes, LIMIT_S)
    except (RuntimeError, ValueError):  # out of memory, or a model for batches of some sizes only: what ran is known
        pass
    finally:
        random.restore()
    return found


def _now(device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()
