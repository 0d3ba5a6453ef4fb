"""Moments and reports from gradients that a test made itself, by the definitions, in float64."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from macrobatch.moments import GradientMoments
from macrobatch.report import Report
from macrobatch.tally import Means, Record


def float64(value: float | Tensor) -> Tensor:
    return torch.as_tensor(value, dtype=torch.float64)


def moments_of_gradients(gradients: Tensor, sizes: Sequence[float], weights: Tensor | None = None) -> GradientMoments:
    """`gradients`: (K, d), the mean gradient of each micro-batch; shares of the loss as the sizes, unless given."""
    n = float64(torch.tensor(sizes))
    w = n / n.sum() if weights is None else weights / weights.sum()
    q = gradients.double().square().sum(1)
    whole = (w[:, None] * gradients.double()).sum(0)
    return GradientMoments(
        float64(len(n)), (w * q).sum(), whole.square().sum(), (w / n).sum(), (w * w / n).sum(), squared_norms=q
    )


def report_of(
    parameters: Sequence[nn.Parameter],
    moments: GradientMoments | None = None,
    mean_squares: Sequence[Tensor | None] | None = None,
    micro_batch_sizes: Sequence[int] = (1, 1),
) -> Report:
    """A window's Report that holds no more than these."""
    return Report(
        records=[Record(n, {}, 1, {}, n) for n in micro_batch_sizes],
        means=lambda: Means(0.0, 1.0, {}, sum(micro_batch_sizes), torch.device("cpu")),
        parameters=tuple(parameters),
        moments=moments,
        mean_squares=None if mean_squares is None else tuple(mean_squares),
    )
