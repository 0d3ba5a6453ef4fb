"""From the words of the command line to torch's own objects: device, precision, learning rate, schedule."""

from typing import Literal

import torch
from torch.amp.grad_scaler import GradScaler
from torch.optim import Optimizer
from torch.optim.lr_scheduler import ConstantLR, CosineAnnealingLR, LinearLR, LRScheduler

from macrobatch import warmup as rising_from
from macrobatch.tasks import Task

Precision = Literal["fp32", "bf16", "fp16"]
Schedule = Literal["constant", "linear", "cosine"]
Device = Literal["auto", "cpu", "cuda"]


def device_named(name: Device) -> torch.device:
    """The device of that name; "auto" is the GPU where there is one."""
    if name == "cuda" and not torch.cuda.is_available():
        raise ValueError("--device cuda: torch sees no CUDA device here; use --device cpu, or auto")
    return torch.device("cuda" if name == "cuda" or (name == "auto" and torch.cuda.is_available()) else "cpu")


def place_constants(task: Task, device: torch.device) -> None:
    """What a task's loss, `encode` and metrics hold, class weights for instance, is on the device; not the model."""
    for module in task.modules.values():
        module.to(device)


def autocast_dtype(precision: Precision) -> torch.dtype | None:
    """What matrix products are computed in; parameters and the gradient sum stay in float32."""
    return {"fp32": None, "bf16": torch.bfloat16, "fp16": torch.float16}[precision]


def scaler_for(precision: Precision, device: torch.device) -> GradScaler | None:
    """A GradScaler for fp16, whose gradients would otherwise vanish; none for the others."""
    return GradScaler(device.type) if precision == "fp16" else None


def make_scheduler(
    optimizer: Optimizer, schedule: Schedule, warmup: int, updates: int, *, lr_factor: float = 1.0
) -> LRScheduler:
    """Schedulers of torch for a run of `updates`: `warmup` up to the learning rate, then the schedule down to 0.

    The warmup begins at the rate before scaling, 1 / `lr_factor`, where that is lower, and else at 1 / (warmup + 1);
    it rises by equal amounts, and update `warmup` (from 0) has all of it.
    """
    if warmup > updates:
        raise ValueError(f"--warmup {warmup} is longer than the run of {updates} updates")
    rest = max(updates - warmup, 1)
    after: LRScheduler
    if schedule == "cosine":
        after = CosineAnnealingLR(optimizer, T_max=rest)
    elif schedule == "linear":
        after = LinearLR(optimizer, start_factor=1.0, end_factor=0.0, total_iters=rest)
    else:
        after = ConstantLR(optimizer, factor=1.0)
    if warmup == 0:
        return after
    factor = 1 / lr_factor if lr_factor > 1 else 1 / (warmup + 1)
    return rising_from(optimizer, after, factor=factor, num_updates=warmup)
