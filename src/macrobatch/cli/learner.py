"""From a task to the accumulator that fits its loss: one that sees all samples of a window, or any other."""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any, Literal, TypedDict, Unpack

from torch import Tensor, nn
from torch.amp.grad_scaler import GradScaler
from torch.optim import Optimizer

from macrobatch import Accumulator, GatheredAccumulator, Window
from macrobatch.autocasting import Autocast
from macrobatch.measuring import Measure
from macrobatch.structure import Nested
from macrobatch.tasks import Task


class Options(TypedDict, total=False):
    """Of Accumulator and GatheredAccumulator alike: those that the commands use."""

    micro_batch_size: int | Literal["auto"] | None
    max_memory: int | str | None
    optimizer: Optimizer | Sequence[Optimizer] | None
    autocast: Autocast
    scaler: GradScaler | None
    measure: Measure | None


def accumulator_of(task: Task, model: nn.Module, **options: Unpack[Options]) -> Accumulator:
    """The gradient of the task's own loss over a whole effective batch; options as in Accumulator.

    Layers that couple samples normalise over the micro-batch, without a warning: the task says what it is made of.
    """
    if task.encode is None:
        return Accumulator(model, task.loss_fn, batch_norm="micro_batch", **options)
    return GatheredAccumulator(model, task.encode, task.loss_fn, batch_norm="micro_batch", **options)


def accumulated_plainly(task: Task) -> Task:
    """The task as accumulation without gathering trains it: its loss is over the samples of one micro-batch."""
    if task.encode is None:
        return task
    return replace(task, encode=None, metrics={}, loss_fn=_MeanOverMicroBatches(task))


class _MeanOverMicroBatches(nn.Module):
    """The loss among the samples of a micro-batch, times how many they are: the mean over micro-batches."""

    def __init__(self, task: Task) -> None:
        super().__init__()
        self.encode, self.loss_fn = task.encode, task.loss_fn  # as submodules, where they are modules

    def forward(self, model: nn.Module, micro_batch: Nested) -> tuple[Tensor, int]:
        """The share of this micro-batch."""
        window, encode = Window([micro_batch]), self.encode
        assert encode is not None
        loss: Any = self.loss_fn(model, encode(model, micro_batch), window)
        return loss * window.num_samples, window.num_samples
