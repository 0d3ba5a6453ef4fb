"""One training run: what stays fixed from the first update to the last, and what one update does."""

import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal

from torch import Tensor
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler
from torch.utils.data import DataLoader

from macrobatch import Accumulator, Window, apply_update, collate_windows
from macrobatch.auto_size import refuse_coupled
from macrobatch.budget import budget_bytes
from macrobatch.cli import setup
from macrobatch.cli.forecast import coupling_layer, sample_batch
from macrobatch.cli.formats import bytes_text
from macrobatch.cli.memory_use import MemoryUse
from macrobatch.cli.sampling import UpdateIndices, update_sizes
from macrobatch.planning import Plan, plan
from macrobatch.tasks import Task
from macrobatch.tasks.task import num_samples


@dataclass(frozen=True, kw_only=True)
class TrainOptions:
    """What the command line said; None where the task's own value is meant, or no limit.

    `micro_batch_size`: None is "auto" where that changes nothing but memory and time, else the task's own. Of
    `updates`, `epochs` and `samples` at most one is given; none means one epoch.
    """

    batch_size: int | None = None
    micro_batch_size: int | Literal["auto"] | None = None
    max_memory: int | str | None = None
    learning_rate: float | None = None
    base_batch_size: int | None = None
    scaling: setup.Scaling = "none"
    schedule: setup.Schedule = "constant"
    warmup: int = 0
    updates: int | None = None
    epochs: int | None = None
    samples: int | None = None
    max_norm: float | None = None
    precision: setup.Precision = "fp32"
    device: setup.Device = "auto"
    seed: int = 0


class Run:
    """A task in training: `advance(window)` makes one update and returns its row for the log."""

    def __init__(self, task: Task, options: TrainOptions) -> None:
        self.task, self.options = task, options
        self.device = setup.device_named(options.device)
        self.data_size = num_samples(task.train, "train")
        self.batch_size = _batch_size(task, options, self.data_size)
        self.base_batch_size = _base_batch_size(task, options, self.batch_size)
        self.base_learning_rate = options.learning_rate or task.learning_rate
        self.learning_rate = setup.scaled_learning_rate(
            self.base_learning_rate, self.base_batch_size, self.batch_size, options.scaling
        )
        self.sizes = _sizes(self.data_size, self.batch_size, options)
        self.model = task.model.to(self.device)
        self.optimizer: Optimizer = task.make_optimizer(self.model, self.learning_rate)
        self.scheduler: LRScheduler = setup.make_scheduler(
            self.optimizer, options.schedule, options.warmup, len(self.sizes)
        )
        self.autocast = setup.autocast_dtype(options.precision)
        self.max_memory = None if options.max_memory is None else budget_bytes(options.max_memory, self.device)
        self.given_size, self.why_given = _given_size(task, options, self.batch_size)
        self.plan = None if self.given_size is not None else self._plan()
        self.accumulator = Accumulator(
            self.model,
            task.loss_fn,
            micro_batch_size=self.given_size or "auto",
            max_memory=None if self.given_size else self.max_memory,
            batch_norm="micro_batch",  # the task says what its micro-batches normalise over
            autocast=self.autocast,
            scaler=setup.scaler_for(options.precision, self.device),
        )
        with MemoryUse(self.device, self.max_memory):
            pass  # a budget that cannot be kept is refused here, before there is anything to lose
        self.updates = self.applied = self.samples = self.retries = 0
        self.has_gradient = False  # of the update at hand: from then on it is the optimizer that needs memory

    @property
    def micro_batch_size(self) -> int:
        """The most samples in memory at once: given, or found so far."""
        return self.given_size or self.accumulator.micro_batch_size or min(self.task.micro_batch_size, self.batch_size)

    def windows(self) -> DataLoader[Any]:
        """The effective batches of the run: cut into micro-batches before they are collated, if their size is given."""
        collate = self.task.collate
        return DataLoader(
            self.task.train,
            batch_sampler=UpdateIndices(self.data_size, self.sizes, self.options.seed),
            collate_fn=collate_windows(collate, micro_batch_size=self.given_size) if self.given_size else collate,
            pin_memory=self.device.type == "cuda",
        )

    def _plan(self) -> Plan:
        """What fits. ValueError, before anything is trained or written, where not even one sample does."""
        return plan(
            self.model,
            self.task.loss_fn,
            sample_batch(self.task),
            batch_size=self.batch_size,
            max_memory=self.max_memory,
            measure_speed=False,
            autocast=self.autocast,
        )

    def advance(self, window: Any) -> dict[str, Any]:
        """One update is made, or skipped where the gradient was not finite; its row for the log, times in seconds."""
        started = time.perf_counter()
        learning_rate = self.optimizer.param_groups[0]["lr"]
        self.has_gradient = False
        report = self.accumulator.run(window)
        self.has_gradient = True
        update = apply_update(self.optimizer, report, max_norm=self.options.max_norm)
        if update.applied:
            self.scheduler.step()
        loss, grad_norm = float(report.loss), float(update.grad_norm)  # on a GPU the time ends here, with the numbers
        self.updates += 1
        self.applied += update.applied
        self.samples += report.num_samples
        self.retries += report.retries
        return {
            "update": self.updates,
            "samples": self.samples,
            "loss": loss,
            "lr": learning_rate,
            "grad_norm": grad_norm,
            "applied": update.applied,
            "seconds": time.perf_counter() - started,
            "micro_batches": report.accumulation_steps,
            "largest_micro_batch": max(report.micro_batch_sizes),
            "retries": report.retries,
            **{name: float(value) for name, value in report.metrics.items()},
        }

    def held(self) -> Iterator[Tensor]:
        """The tensors that stay from update to update: parameters, buffers and the optimizer's state."""
        yield from self.model.parameters()
        yield from self.model.buffers()
        for state in self.optimizer.state.values():
            yield from (value for value in state.values() if isinstance(value, Tensor))

    def too_large(self) -> str:
        """What to say when the memory was not enough: what did not fit, and what to change.

        A micro-batch that fails is halved until it is one sample, so a smaller --micro-batch-size is never the remedy.
        """
        budget = "the device" if self.max_memory is None else f"the budget of {bytes_text(self.max_memory)}"
        what = "the optimizer's state does not fit" if self.has_gradient else "not even one sample at a time fits"
        more = "" if self.max_memory is None else "more --max-memory or "
        return f"out of memory in update {self.updates + 1}: {what} into {budget}; give {more}a smaller model"


def _batch_size(task: Task, options: TrainOptions, data_size: int) -> int:
    batch_size = options.batch_size or min(task.batch_size, data_size)
    if batch_size > data_size:
        raise ValueError(f"--batch-size {batch_size} is more than the {data_size} training samples of {task.name}")
    return batch_size


def _given_size(task: Task, options: TrainOptions, batch_size: int) -> tuple[int | None, str]:
    """The micro-batch size, None where it is to be found, and why it is not found where nobody gave one."""
    given = options.micro_batch_size
    if given == "auto":
        refuse_coupled([task.model])
        return None, ""
    if given is not None:
        return min(given, batch_size), ""
    why = _why_not_auto(task)
    return (min(task.micro_batch_size, batch_size), why) if why else (None, "")


def _why_not_auto(task: Task) -> str:
    layer = coupling_layer(task.model)
    if layer is not None:
        return f"{layer} normalises over the micro-batch, so that another size would be another model"
    try:
        list(Window.of_parts(sample_batch(task), 1))
    except ValueError:
        return "its collated batches cannot be cut"
    return ""


def _base_batch_size(task: Task, options: TrainOptions, batch_size: int) -> int:
    """The batch size that the learning rate was tuned for: given, or the task's own with its own learning rate."""
    if options.base_batch_size is not None:
        return options.base_batch_size
    if options.learning_rate is None:
        return task.base_batch_size
    if options.scaling != "none":
        raise ValueError(
            f"--scaling {options.scaling} with a --lr of your own needs --base-batch-size, the batch size that the "
            "learning rate was tuned for"
        )
    return batch_size


def _sizes(data_size: int, batch_size: int, options: TrainOptions) -> list[int]:
    given = {"updates": options.updates, "epochs": options.epochs, "samples": options.samples}
    limits = {name: value for name, value in given.items() if value is not None}
    if len(limits) > 1:
        raise ValueError("give one of --steps, --epochs and --samples, not several")
    return update_sizes(data_size, batch_size, **(limits or {"epochs": 1}))
