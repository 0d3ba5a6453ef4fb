"""What an update of each way of a comparison will take, before it does."""

import torch
from torch import nn
from torch.optim import Optimizer

from macrobatch.cli.forecast import Forecast
from macrobatch.cli.gathered_plan import GatheredNeeds
from macrobatch.cli.way import Way, learned
from macrobatch.tasks import Task


def predicted_peak(task: Task, way: Way, model: nn.Module, optimizer: Optimizer, device: torch.device) -> int | None:
    """Bytes at the peak of an update of `way` after the first; None where it cannot be known."""
    trained = learned(task, way)
    if trained.encode is None:
        found = Forecast(trained, model, optimizer, device).memory(way.update_size, way.micro_batch_size)
    else:
        needs = GatheredNeeds.of(trained, model, optimizer, way.update_size)
        found = needs.predicted(way.micro_batch_size, 1)
    return None if found is None else found.peak
