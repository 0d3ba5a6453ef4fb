"""One epoch of training with gradient accumulation, for plain `(inputs, targets)` loaders."""

from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor, nn
from torch.amp.grad_scaler import GradScaler
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler, ReduceLROnPlateau
from torch.utils.data import Dataset

from macrobatch.accumulator import Accumulator
from macrobatch.criteria import sum_loss
from macrobatch.grouping import windows
from macrobatch.update import apply_update, check_max_norm
from macrobatch.ways import BatchNorm


def train_epoch(
    model: nn.Module,
    dataloader: Iterable[Any],
    optimizer: Optimizer,
    criterion: nn.Module | Callable[..., Tensor],
    accumulation_steps: int = 4,
    *,
    scheduler: LRScheduler | None = None,
    max_norm: float | None = None,
    device: torch.device | str | None = None,
    autocast: torch.dtype | AbstractContextManager[Any] | None = None,
    scaler: GradScaler | None = None,
    batch_norm: BatchNorm | None = None,
) -> float:
    """The model has seen every batch of `dataloader` once, with one update for each `accumulation_steps` of them.

    `dataloader` gives (inputs, targets). Each update follows the gradient of the mean loss over all its samples (valid
    targets, class weights), also when the last micro-batch is smaller or the last window shorter. Clipping by
    `max_norm` and `scheduler.step()` happen once for each update, the latter only where it was applied. `autocast`,
    `scaler` and `batch_norm` ("exact", "pooled", "micro_batch") are those of the Accumulator. Returns the mean loss
    over the epoch. ValueError for a loader without data, a criterion whose mean is unknown, and, before anything runs,
    for arguments of another kind.
    """
    _check(model, dataloader, optimizer, scheduler, max_norm)
    model.train()
    accumulator = Accumulator(
        model, sum_loss(criterion), device=device, autocast=autocast, scaler=scaler, batch_norm=batch_norm
    )
    loss_sums, weights = [], []
    for window in windows(dataloader, accumulation_steps=accumulation_steps):
        report = accumulator.run(window)
        if apply_update(optimizer, report, max_norm=max_norm).applied and scheduler is not None:
            scheduler.step()
        assert isinstance(report.loss_weight, Tensor)
        weights.append(report.loss_weight)
        loss_sums.append((report.loss * report.loss_weight).where(report.loss_weight > 0, 0.0))
    if not weights:
        raise ValueError(
            f"the dataloader, a {type(dataloader).__name__}, gave no batch: an iterator that was used up, or an empty "
            "dataset? Give what can be iterated anew in each epoch, a DataLoader or a list, with a batch in it"
        )
    return float(torch.stack(loss_sums).sum() / torch.stack(weights).sum())


def _check(model: Any, dataloader: Any, optimizer: Any, scheduler: Any, max_norm: Any) -> None:
    """ValueError, before anything is trained, for arguments in another order, or of another kind."""
    order = "train_epoch(model, dataloader, optimizer, criterion, accumulation_steps)"
    several = isinstance(optimizer, Sequence) and all(isinstance(each, Optimizer) for each in optimizer)
    if not isinstance(model, nn.Module):
        raise ValueError(f"model must be an nn.Module, got a {type(model).__name__}. The order is {order}")
    if not (isinstance(optimizer, Optimizer) or several):
        raise ValueError(f"optimizer must be a torch optimizer, got a {type(optimizer).__name__}. The order is {order}")
    if isinstance(dataloader, Dataset) and not isinstance(dataloader, Iterable):
        raise ValueError(
            f"dataloader must give (inputs, targets) batches, got a {type(dataloader).__name__}, which gives samples: "
            "give DataLoader(dataset, batch_size=...)"
        )
    if not (isinstance(dataloader, Iterable) or hasattr(dataloader, "__getitem__")):
        raise ValueError(
            f"dataloader must give (inputs, targets) batches when it is iterated, got a {type(dataloader).__name__}, "
            f"which cannot be. The order is {order}"
        )
    if scheduler is not None and (isinstance(scheduler, type | ReduceLROnPlateau) or not hasattr(scheduler, "step")):
        what = f"the class {scheduler.__name__}" if isinstance(scheduler, type) else f"a {type(scheduler).__name__}"
        raise ValueError(
            f"scheduler must have a step() without a metric, called once for each update, got {what}. Give one such, "
            "scheduler=StepLR(optimizer, ...), or none, and step yours after the epoch: scheduler.step(loss)"
        )
    check_max_norm(max_norm)
