"""From a task to the accumulator that fits its loss: one that sees all samples of a window, or any other."""

from typing import Literal

from torch import nn
from torch.amp.grad_scaler import GradScaler

from macrobatch import Accumulator, GatheredAccumulator
from macrobatch.measuring import Measure
from macrobatch.tasks import Task
from macrobatch.window_pass import Autocast


def accumulator_of(
    task: Task,
    model: nn.Module,
    *,
    micro_batch_size: int | Literal["auto"] | None = None,
    max_memory: int | str | None = None,
    autocast: Autocast = None,
    scaler: GradScaler | None = None,
    measure: Measure | None = None,
) -> Accumulator:
    """The gradient of the task's own loss over a whole effective batch; options as in Accumulator.

    Layers that couple samples normalise over the micro-batch, without a warning: the task says what it is made of.
    """
    if task.encode is None:
        return Accumulator(
            model,
            task.loss_fn,
            micro_batch_size=micro_batch_size,
            max_memory=max_memory,
            batch_norm="micro_batch",
            autocast=autocast,
            scaler=scaler,
            measure=measure,
        )
    return GatheredAccumulator(
        model,
        task.encode,
        task.loss_fn,
        micro_batch_size=micro_batch_size,
        max_memory=max_memory,
        batch_norm="micro_batch",
        autocast=autocast,
        scaler=scaler,
        measure=measure,
    )
