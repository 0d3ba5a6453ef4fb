"""One training run: what stays fixed from the first update to the last, and what one update does."""

import time
from dataclasses import dataclass
from typing import Any

from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler
from torch.utils.data import DataLoader

from macrobatch import Accumulator, apply_update, collate_windows
from macrobatch.cli import setup
from macrobatch.cli.memory_use import MemoryUse
from macrobatch.cli.sampling import UpdateIndices, update_sizes
from macrobatch.tasks import Task
from macrobatch.tasks.task import num_samples


@dataclass(frozen=True, kw_only=True)
class TrainOptions:
    """What the command line said; None where the task's own value is meant, or no limit.

    Of `updates`, `epochs` and `samples` at most one is given; none means one epoch.
    """

    batch_size: int | None = None
    micro_batch_size: int | None = None
    max_memory: int | None = None
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
        self.micro_batch_size = min(options.micro_batch_size or task.micro_batch_size, self.batch_size)
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
        self.accumulator = Accumulator(
            self.model,
            task.loss_fn,
            micro_batch_size=self.micro_batch_size,
            autocast=self.autocast,
            scaler=setup.scaler_for(options.precision, self.device),
        )
        with MemoryUse(self.device, options.max_memory):
            pass  # a budget beyond the device is refused here, before there is anything to lose
        self.updates = self.applied = self.samples = self.retries = 0

    def windows(self) -> DataLoader[Any]:
        """The effective batches of the run, each cut into micro-batches before it is collated."""
        return DataLoader(
            self.task.train,
            batch_sampler=UpdateIndices(self.data_size, self.sizes, self.options.seed),
            collate_fn=collate_windows(self.task.collate, micro_batch_size=self.micro_batch_size),
            pin_memory=self.device.type == "cuda",
        )

    def advance(self, window: Any) -> dict[str, Any]:
        """One update is made, or skipped where the gradient was not finite; its row for the log, times in seconds."""
        started = time.perf_counter()
        learning_rate = self.optimizer.param_groups[0]["lr"]
        report = self.accumulator.run(window)
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

    def too_large(self) -> str:
        """What to say when the memory was not enough: what was tried, and what to change."""
        limit = self.options.max_memory
        budget = "the device's memory" if limit is None else f"the budget of {limit:,} bytes"
        change = "a smaller model" if self.micro_batch_size == 1 else "a smaller --micro-batch-size (the same gradient)"
        more = "" if limit is None else " or more --max-memory"
        return (
            f"out of memory in update {self.updates + 1}: micro-batches of {self.micro_batch_size} do not fit into "
            f"{budget}; give {change}{more}"
        )


def _batch_size(task: Task, options: TrainOptions, data_size: int) -> int:
    batch_size = options.batch_size or min(task.batch_size, data_size)
    if batch_size > data_size:
        raise ValueError(f"--batch-size {batch_size} is more than the {data_size} training samples of {task.name}")
    return batch_size


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
