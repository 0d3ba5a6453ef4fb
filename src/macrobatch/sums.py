"""Sums and means of scalars that may live on a device: as numbers wherever that costs no host sync."""

import math
from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

from macrobatch.weighting import Count, known

Part = tuple[Count, int]  # a value and how often it counts


def total(parts: Iterable[Part], device: torch.device) -> Count:
    """The sum of value times multiplier: a number if all values can be read without a sync, else of shape ()."""
    numbers: list[float] = []
    scalars: list[tuple[Tensor, int]] = []
    for value, times in parts:
        if isinstance(value, Tensor) and not value.is_cpu:
            scalars.append((value.to(device), times))
        else:
            numbers.append(float(value) * times)
    return _sum(numbers) + _sum_of_scalars(scalars, device) if scalars else _sum(numbers)


def _sum_of_scalars(scalars: Sequence[tuple[Tensor, int]], device: torch.device) -> Tensor:
    if any(value.dtype != scalars[0][0].dtype for value, _ in scalars):
        scalars = [(value.double(), times) for value, times in scalars]
    summands = torch.stack([value for value, _ in scalars]).double()
    if any(times != 1 for _, times in scalars):
        summands = summands * torch.tensor([times for _, times in scalars], dtype=torch.float64, device=device)
    return summands.sum()


def _sum(numbers: Sequence[float]) -> float:
    try:
        return math.fsum(numbers)
    except (ValueError, OverflowError):  # infinities of both signs
        return float(sum(numbers))


def as_scalar(value: Count, device: torch.device) -> Tensor:
    """The value as a tensor of shape (), float64 unless it was one already."""
    return value if isinstance(value, Tensor) else torch.scalar_tensor(value, dtype=torch.float64, device=device)


def mean(total_: Count, divisor: Count) -> Count:
    """`total_ / divisor`: NaN where there was nothing to average."""
    if isinstance(total_, Tensor) or isinstance(divisor, Tensor):
        return total_ / divisor
    return total_ / divisor if divisor else math.nan


def ratio(numerator: float | Tensor, divisor: Count) -> float | Tensor:
    """`numerator / divisor`, 0 where the divisor is 0; as a number where reading it costs no sync."""
    value = known(divisor)
    if value is not None and not isinstance(numerator, Tensor):
        return numerator / value if value else 0.0
    divisor = torch.as_tensor(divisor)
    return torch.as_tensor(numerator / divisor).where(divisor != 0, 0.0)
