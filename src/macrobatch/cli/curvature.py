"""How sharp the place is where a run ended: the top eigenvalue of the Hessian over some training samples."""

import math
from collections.abc import Sequence
from typing import Any

import torch

from macrobatch.cli.measure import window_of
from macrobatch.cli.race import Racer
from macrobatch.sharpness import Sharpness, sharpness
from macrobatch.tasks import Task

MOST_PRODUCTS = 10
TOLERANCE = 0.01  # of the eigenvalue: runs differ by far more
WORK = 1 + MOST_PRODUCTS * 2.5  # samples forward and backward for each; a product is one forward and two backwards


def sharpness_samples(task: Task, data_size: int, count: int, seed: int) -> list[Any]:
    """The training samples that every run is measured on: `count` at random, the same for the same seed."""
    generator = torch.Generator().manual_seed(seed + 2)
    return [task.train[index] for index in torch.randperm(data_size, generator=generator)[:count].tolist()]


def sharpness_of(racer: Racer, samples: Sequence[Any]) -> Sharpness | None:
    """The sharpness where the racer is; None where its loss is not finite, so that there is no curvature."""
    if not math.isfinite(racer.course().final.loss):
        return None
    return sharpness(
        racer.model,
        racer.task.loss_fn,
        window_of(racer.task, samples, racer.way.micro_batch_size),
        max_products=MOST_PRODUCTS,
        tolerance=TOLERANCE,
    )
