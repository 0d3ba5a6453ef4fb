"""From the words of the command line to torch's own objects: device, precision, learning rate, schedule."""

import math
from typing import Literal

import torch
from torch.amp.grad_scaler import GradScaler
from torch.optim import Optimizer
from torch.optim.lr_scheduler import ConstantLR, CosineAnnealingLR, LinearLR, LRScheduler, SequentialLR

Precision = Literal["fp32", "bf16", "fp16"]
Schedule = Literal["constant", "linear", "cosine"]
Scaling = Literal["none", "linear", "sqrt"]
Device = Literal["auto", "cpu", "cuda"]


def device_named(name: Device) -> torch.device:
    """The device of that name; "auto" is the GPU where there is one."""
    if name == "cuda" and not torch.cuda.is_available():
        raise ValueError("--device cuda: torch sees no CUDA device here; use --device cpu, or auto")
    return torch.device("cuda" if name == "cuda" or (name == "auto" and torch.cuda.is_available()) else "cpu")


def autocast_dtype(precision: Precision) -> torch.dtype | None:
    """What matrix products are computed in; parameters and the gradient sum stay in float32."""
    return {"fp32": None, "bf16": torch.bfloat16, "fp16": torch.float16}[precision]


def scaler_for(precision: Precision, device: torch.device) -> GradScaler | None:
    """A GradScaler for fp16, whose gradients would otherwise vanish; none for the others."""
    return GradScaler(device.type) if precision == "fp16" else None


def scaled_learning_rate(learning_rate: float, base_batch_size: int, batch_size: int, scaling: Scaling) -> float:
    """The learning rate for `batch_size` of one that was tuned at `base_batch_size`.

    With k = batch_size / base_batch_size: `linear` k (Goyal et al. 2017, for SGD), `sqrt` the root of k (Malladi et al.
    2022, for Adam), `none` leaves it alone.

    >>> [scaled_learning_rate(0.1, 64, 256, scaling) for scaling in ("none", "sqrt", "linear")]
    [0.1, 0.2, 0.4]
    """
    k = batch_size / base_batch_size
    return learning_rate * {"none": 1.0, "sqrt": math.sqrt(k), "linear": k}[scaling]


def make_scheduler(optimizer: Optimizer, schedule: Schedule, warmup: int, updates: int) -> LRScheduler:
    """Schedulers of torch for a run of `updates`: `warmup` up to the learning rate, then the schedule down to 0.

    The warmup takes equal steps, from 1 / warmup of the learning rate at the first update to all of it at the last.
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
    start = LinearLR(optimizer, start_factor=1 / warmup, total_iters=max(warmup - 1, 1))
    return SequentialLR(optimizer, [start, after], milestones=[warmup])
