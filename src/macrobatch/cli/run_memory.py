"""What the updates of a run take: planned before the first, predicted for any, and in words where it is too much."""

from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from macrobatch.cli.forecast import Forecast, sample_batch
from macrobatch.cli.formats import bytes_text
from macrobatch.cli.gathered_plan import GatheredNeeds, gathered_plan
from macrobatch.fitting import Memory
from macrobatch.planning import Plan, plan
from macrobatch.tasks import Task


@dataclass(frozen=True)
class RunMemory:
    """What there is to know of a run's memory. `batch_size`: of its largest update; `max_memory`: in bytes."""

    task: Task
    model: nn.Module
    optimizer: Optimizer
    device: torch.device
    batch_size: int
    max_memory: int | None
    autocast: torch.dtype | None

    def plan(self) -> Plan:
        """What fits. ValueError, before anything is trained or written, where not even one sample does."""
        if self.task.encode is not None:
            return gathered_plan(self._needs(self.batch_size))
        return plan(
            self.model,
            self.task.loss_fn,
            sample_batch(self.task),
            batch_size=self.batch_size,
            max_memory=self.max_memory,
            optimizer=self.optimizer,
            measure_speed=False,
            autocast=self.autocast,
        )

    def refuse_loss(self, micro_batch_size: int) -> None:
        """ValueError where a loss over all outputs does not fit the budget beside micro-batches of that size."""
        if self.task.encode is not None and self.max_memory is not None:
            self._needs(self.batch_size).graphs(micro_batch_size)

    def predicted(self, batch_size: int, micro_batch_size: int, kept_graphs: int, *, measures: bool) -> Memory | None:
        """What an update takes; None if it cannot be known. `measures`: that micro-batches' gradients stand apart."""
        if self.task.encode is not None:
            return self._needs(batch_size).predicted(micro_batch_size, kept_graphs)
        forecast = Forecast(self.task, self.model, self.optimizer, self.device, self.autocast)
        found = forecast.memory(batch_size, micro_batch_size)
        if found is None or not measures:
            return found
        # A micro-batch's own gradients come into being while its activations go.
        return replace(found, activations=max(found.activations, found.gradients))

    def _needs(self, batch_size: int) -> GatheredNeeds:
        """What updates of so many samples need whose loss is over all outputs. ValueError if the loss does not fit."""
        return GatheredNeeds.of(self.task, self.model, self.optimizer, batch_size, self.max_memory, self.autocast)

    def held(self) -> Iterator[Tensor]:
        """The tensors that stay from update to update: parameters, buffers and the optimizer's state."""
        yield from self.model.parameters()
        yield from self.model.buffers()
        for state in self.optimizer.state.values():
            yield from (value for value in state.values() if isinstance(value, Tensor))

    def too_large(self, update: int, *, has_gradient: bool) -> str:
        """What to say when the memory was not enough: what did not fit, and what to change.

        A micro-batch that fails is halved until it is one sample, so a smaller --micro-batch-size is never the remedy.
        """
        budget = "the device" if self.max_memory is None else f"the budget of {bytes_text(self.max_memory)}"
        if has_gradient:
            what = "the optimizer's state does not fit"
        elif self.task.encode is None:
            what = "not even one sample at a time fits"
        else:
            what = "the loss over all outputs does not fit, or not even one sample at a time,"
        more = "" if self.max_memory is None else "more --max-memory or "
        return f"out of memory in update {update}: {what} into {budget}; give {more}a smaller model"
