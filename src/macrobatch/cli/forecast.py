"""What training will take, in bytes, before it does: predicted for a task, in words for the terminal."""

from collections.abc import Mapping
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
            return f"{name!r} ({type(layer).__name__})"
    return None


def refuse_auto(task: Task) -> None:
    """ValueError, in the words of the command line, where a size that is found would decide over the result."""
    layer = coupling_layer(task.model)
    if layer is not None:
        raise ValueError(
            f"--micro-batch-size auto would change the result: {layer} normalises over the micro-batch. Leave out "
            f"--micro-batch-size (the task's own is {task.micro_batch_size}), or give a number"
        )


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


def prediction_line(predicted: Memory | None, measured: int | None, row: Mapping[str, Any] | None) -> str | None:
    """Prediction against measurement of the update whose row of the log is given; None without one."""
    if row is None or measured is None:
        return None
    said = "not predicted: the model does not run on fake tensors" if predicted is None else bytes_text(predicted.peak)
    return (
        f"memory of update {row['update']}, micro-batches of {row['largest_micro_batch']}: predicted {said}, measured "
        f"{bytes_text(measured)}"
    ).replace("predicted not", "not")
