"""The loss and the metrics of a model over held-out data: over micro-batches, or over the outputs of all samples."""

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from numbers import Real
from typing import Any

import torch
from torch import nn
from torch.utils.data import DataLoader, Subset

from macrobatch import Accumulator, Window
from macrobatch.cli.gathered_validation import GatheredValidation
from macrobatch.tasks import Task
from macrobatch.tasks.task import num_samples


@dataclass(frozen=True)
class Validation:
    """Means over the held-out samples; `losses` and `weights`, one for each part of them, are for paired comparisons.

    A part is a micro-batch, with its own mean loss. Where the loss is over the outputs of all samples, a part is a
    group of them with its pseudo-value of the jackknife, and `parts_of_metrics` has those of the metrics.
    """

    loss: float
    metrics: Mapping[str, float]
    losses: Sequence[float]
    weights: Sequence[float]
    num_samples: int
    parts_of_metrics: Mapping[str, Sequence[float]] = field(default_factory=dict)


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
    """The loss and the metrics of `task` for `model` in eval mode; the mode of each of its modules is put back.

    Of the samples seen before `stop()` is true, which is asked after each micro-batch.
    """
    modes = [(module, module.training) for module in model.modules()]  # some layers may be frozen in eval mode
    model.eval()
    try:
        if task.encode is None:
            return _over_micro_batches(model, task, micro_batches, autocast, stop)
        return _over_all_outputs(GatheredValidation.of(model, task, micro_batches, autocast, stop))
    finally:
        for module, mode in modes:
            module.training = mode


def _over_micro_batches(
    model: nn.Module,
    task: Task,
    micro_batches: Iterable[Any],
    autocast: torch.dtype | None,
    stop: Callable[[], bool],
) -> Validation:
    accumulators = {
        name: Accumulator(model, loss_fn, batch_norm="micro_batch", autocast=autocast)
        for name, loss_fn in {"": task.loss_fn, **{name: _summed(each) for name, each in task.metrics.items()}}.items()
    }
    sums = dict.fromkeys(accumulators, 0.0)
    counts = dict.fromkeys(accumulators, 0.0)
    losses, weights, seen = [], [], 0
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
    means = {name: sums[name] / counts[name] if counts[name] else math.nan for name in sums}
    return Validation(means.pop(""), means, losses, weights, seen)


def _summed(metric: Callable[..., Any]) -> Callable[[Any, Any], Any]:
    """A metric as a loss function, whose sum is a tensor: it may have returned a plain number."""

    def terms(model: Any, micro_batch: Any) -> Any:
        found = metric(model, micro_batch)
        if isinstance(found, tuple) and len(found) == 2 and isinstance(found[0], Real):
            return torch.tensor(float(found[0]), dtype=torch.float64), found[1]
        return found

    return terms


def _over_all_outputs(held_out: GatheredValidation) -> Validation:
    wholes = {name: held_out.whole(function) for name, function in held_out.functions.items()}
    parts = {name: held_out.parts(function, wholes[name]) for name, function in held_out.functions.items()}
    losses = parts.pop("")
    sizes = [float(size) for size in held_out.sizes]
    return Validation(wholes.pop(""), wholes, losses, sizes, held_out.num_samples, parts)
