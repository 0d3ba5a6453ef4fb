"""One epoch of training with gradient accumulation, for plain `(inputs, targets)` loaders."""

from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor, nn
from torch.amp.grad_scaler import GradScaler
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from macrobatch.accumulator import Accumulator
from macrobatch.criteria import sum_loss
from macrobatch.grouping import windows
from macrobatch.update import apply_update
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
    over the epoch. ValueError for a loader without data or a criterion whose mean is unknown.
    """
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
        raise ValueError("the dataloader gave no batch: an iterator that was used up, or an empty dataset?")
    return float(torch.stack(loss_sums).sum() / torch.stack(weights).sum())
