"""The mean loss and metrics of a model over held-out data, one micro-batch in memory at a time."""

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.utils.data import DataLoader, Subset

from macrobatch import Accumulator, Window
from macrobatch.tasks import Task
from macrobatch.tasks.task import num_samples


@dataclass(frozen=True)
class Validation:
    """Means over the held-out samples; `losses` and `weights`, one per micro-batch, are for paired comparisons."""

    loss: float
    metrics: Mapping[str, float]
    losses: Sequence[float]
    weights: Sequence[float]
    num_samples: int


def validation_batches(task: Task, micro_batch_size: int, most_samples: int | None = None) -> Iterable[Any]:
    """Micro-batches of held-out samples, the same every time: all, or `most_samples` spread over the data."""
    total = num_samples(task.validation, "validation")
    data = task.validation
    if most_samples is not None and most_samples < total:
        data = Subset(data, torch.linspace(0, total - 1, most_samples).long().tolist())
    return DataLoader(data, batch_size=micro_batch_size, collate_fn=task.collate)


def validate(
    model: nn.Module,
    task: Task,
    micro_batches: Iterable[Any],
    *,
    autocast: torch.dtype | None = None,
    stop: Callable[[], bool] = lambda: False,
) -> Validation:
    """The loss and the metrics of `task` for `model` in eval mode; the model's mode is put back."""
    accumulators = {
        name: Accumulator(model, loss_fn, batch_norm="micro_batch", autocast=autocast)
        for name, loss_fn in {"": task.loss_fn, **task.metrics}.items()
    }
    sums = dict.fromkeys(accumulators, 0.0)
    counts = dict.fromkeys(accumulators, 0.0)
    losses, weights, seen = [], [], 0
    was_training = model.training
    model.eval()
    try:
        for micro_batch in micro_batches:
            for name, accumulator in accumulators.items():
                report = accumulator.evaluate(Window([micro_batch]))
                weight = float(torch.as_tensor(report.loss_weight))
                sums[name] += float(report.loss) * weight if weight else 0.0
                counts[name] += weight
                if name == "":
                    losses.append(float(report.loss))
                    weights.append(weight)
                    seen += report.num_samples
            if stop():
                break
    finally:
        model.train(was_training)
    means = {name: sums[name] / counts[name] if counts[name] else math.nan for name in sums}
    return Validation(means.pop(""), means, losses, weights, seen)
