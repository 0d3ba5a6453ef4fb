"""What training will take, in bytes, before it does: predicted for a task, in words for the terminal."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.optim import Optimizer

from macrobatch.cli.formats import bytes_text
from macrobatch.cli.sampling import take
from macrobatch.fitting import Account, Memory
from macrobatch.rehearsal import Rehearsal
from macrobatch.tasks import Task

MOST_SAMPLES = 16  # in the batch that shows what samples look like; plans repeat them where they need more
NO_LIMIT = 2**62

KINDS = {
    "parameters": "parameters",
    "gradients": "gradients",
    "optimizer_state": "optimizer state",
    "inputs": "inputs",
    "activations": "activations",
}


def sample_batch(task: Task) -> Any:
    """A batch like those of training: the task's first samples, collated."""
    return task.collate(take(task.train, range(min(MOST_SAMPLES, len(task.train)))))  # type: ignore[arg-type]


def coupling_layer(model: nn.Module) -> str | None:
    """A layer of `model` in which the samples of a micro-batch see each other, by name and class; None without one."""
    for name, layer in model.named_modules():
        if isinstance(layer, _BatchNorm) and layer.training:
            return f"{name} ({type(layer).__name__})"
    return None


@dataclass(frozen=True)
class Forecast:
    """Predicts the peak of training at micro-batch sizes that are given. `autocast`: as for the Accumulator."""

    task: Task
    model: nn.Module
    optimizer: Optimizer
    device: torch.device
    autocast: torch.dtype | None = None

    def memory(self, batch_size: int, micro_batch_size: int) -> Memory | None:
        """Bytes by kind, of updates of `batch_size` samples after the first; None if no fake tensor gets through."""
        try:
            rehearsal = Rehearsal(
                self.model, self.task.loss_fn, sample_batch(self.task), autocast=self.autocast, device=self.device
            )
            trace = rehearsal.fake(micro_batch_size)
            return Account(rehearsal, [self.optimizer], batch_size, NO_LIMIT).memory(micro_batch_size, [trace])
        except Exception:  # whatever a model of one's own raises on tensors without numbers: training will tell
            return None


def prediction_line(predicted: Memory | None, measured: int | None, sizes: Sequence[int]) -> str | None:
    """Prediction and measurement of the peak in a line; None where there is neither."""
    if predicted is None and measured is None:
        return None
    said = "not predicted (the model does not run on fake tensors)" if predicted is None else _predicted_text(predicted)
    seen = "not measured" if measured is None else f"measured {bytes_text(measured)}"
    return f"memory with micro-batches of {max(sizes)}: {said}, {seen}" if sizes else f"memory: {said}, {seen}"


def _predicted_text(predicted: Memory) -> str:
    return f"predicted {bytes_text(predicted.peak)}"
