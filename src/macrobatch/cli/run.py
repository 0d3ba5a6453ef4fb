"""One training run: what stays fixed from the first update to the last, and what one update does."""

import math
import time
from typing import Any

import torch
from torch.utils.data import DataLoader

from macrobatch import Accumulator, GatheredAccumulator, Report, Update, apply_update, collate_windows
from macrobatch.budget import budget_bytes
from macrobatch.cli import run_options, setup
from macrobatch.cli.guard import make_guard, verdict_entries
from macrobatch.cli.learner import accumulator_of
from macrobatch.cli.memory_use import MemoryUse
from macrobatch.cli.noise_watch import NoiseWatch
from macrobatch.cli.rates import Rates
from macrobatch.cli.run_memory import RunMemory
from macrobatch.cli.run_options import TrainOptions
from macrobatch.cli.sampling import UpdateIndices
from macrobatch.fitting import Memory
from macrobatch.spike_values import SpikeVerdict
from macrobatch.tasks import Task
from macrobatch.tasks.task import num_samples


class Run:
    """A task in training: `advance(window)` makes one update and returns its row for the log.

    `sizes`: the effective batch of every update, as known now. `rows`: what `advance` returned so far.
    """

    def __init__(self, task: Task, options: TrainOptions) -> None:
        self.task, self.options = task, options
        self.device = setup.device_named(options.device)
        self.data_size = num_samples(task.train, "train")
        self.batch_plan = run_options.batch_plan(task, options, self.data_size)
        self.batch_size = max(self.batch_plan.sizes)
        self.model = task.model.to(self.device)
        setup.place_constants(task, self.device)
        self.schedule = self.batch_plan.schedule(run_options.tokens_per_sample(task))
        self.sizes = run_options.update_sizes(self.schedule, options, self.data_size)
        self.rates = Rates.of(task, self.model, options, self.batch_plan.sizes, self.schedule, len(self.sizes))
        self.autocast = setup.autocast_dtype(options.precision)
        self.max_memory = None if options.max_memory is None else budget_bytes(options.max_memory, self.device)
        self.memory = RunMemory(
            task, self.model, self.rates.optimizer, self.device, self.batch_size, self.max_memory, self.autocast
        )
        self.given_size, self.why_given = run_options.given_size(task, options, self.batch_plan)
        self.plan = self.memory.plan() if self.given_size is None else None
        if self.given_size is not None:
            self.memory.refuse_loss(self.given_size)
        self.noise = NoiseWatch(options.noise_half_life)
        self.scaler = setup.scaler_for(options.precision, self.device)
        self.accumulator = self._accumulator()
        self.guard = make_guard(
            options.spike_guard,
            options.snapshot_every,
            model=self.model,
            optimizer=self.rates.optimizer,
            scheduler=self.rates.scheduler,
            scaler=self.scaler,
            schedule=self.schedule,
        )
        with MemoryUse(self.device, self.max_memory):
            pass  # a budget that cannot be kept is refused here, before there is anything to lose
        self.updates = self.applied = self.samples = self.retries = 0
        self.rows: list[dict[str, Any]] = []
        self.given_up: str | None = None  # why the guard ended the run
        self.has_gradient = False  # of the update at hand: from then on it is the optimizer that needs memory

    @property
    def measures(self) -> bool:
        """Whether the noise is measured between micro-batches: where the run is about it, or it costs nothing scarce.

        It takes one more copy of the gradients: not where memory is short, and a loss over all outputs has no noise.
        """
        watches = self.max_memory is None and self.options.noise == "watch" and self.task.encode is None
        return self.options.noise == "measure" or self.batch_plan.measures or watches

    def _accumulator(self) -> Accumulator:
        spends = self.given_size is None or self.task.encode is not None  # on a size that is found, or on kept graphs
        return accumulator_of(
            self.task,
            self.model,
            micro_batch_size=self.given_size or "auto",
            max_memory=self.max_memory if spends else None,
            optimizer=self.rates.optimizer,
            autocast=self.autocast,
            scaler=self.scaler,
            measure="norms" if self.measures else None,
        )

    @property
    def micro_batch_size(self) -> int:
        """The most samples in memory at once: given, or found so far."""
        return self.given_size or self.accumulator.micro_batch_size or min(self.task.micro_batch_size, self.batch_size)

    @property
    def kept_graphs(self) -> int | None:
        """Of how many micro-batches the graph is kept for the backward, where a loss is over all outputs; else None."""
        return self.accumulator.keep_graphs if isinstance(self.accumulator, GatheredAccumulator) else None

    def windows(self) -> DataLoader[Any]:
        """The effective batches of the run: cut into micro-batches before they are collated, if their size is given."""
        collate = self.task.collate
        return DataLoader(
            self.task.train,
            # One after the other: `sizes` may change while the run goes on.
            batch_sampler=UpdateIndices(self.data_size, self.sizes, self.options.seed),
            collate_fn=collate_windows(collate, micro_batch_size=self.given_size) if self.given_size else collate,
            pin_memory=self.device.type == "cuda",
        )

    def predicted(self, number: int, micro_batch_size: int) -> Memory | None:
        """What update `number`, from 1, takes in micro-batches of that size; None if it cannot be known."""
        kept = self.rows[number - 1].get("kept_graphs", 0)
        return self.memory.predicted(self.sizes[number - 1], micro_batch_size, kept, measures=self.measures)

    def too_large(self) -> str:
        """What to say when the memory was not enough: what did not fit, and what to change."""
        return self.memory.too_large(self.updates + 1, has_gradient=self.has_gradient)

    def advance(self, window: Any) -> dict[str, Any]:
        """One update is made, or skipped where the gradient was not finite; its row for the log, times in seconds."""
        rescaled = self.rates.follow(self.schedule, self.noise.estimate)
        if self.options.noise == "per example":
            self.noise.observe_examples(self.task, window, min(self.task.micro_batch_size, self.micro_batch_size))
        started = time.perf_counter()
        self.has_gradient = False
        report = self.accumulator.run(window)
        self.has_gradient = True
        ran = self._time_of_gradient()
        learning_rate, verdict, update = self._update(report)
        loss = float(report.loss)  # on a GPU the time ends here, with the numbers
        grad_norm = verdict.grad_norm if verdict is not None else float(update.grad_norm) if update else math.nan
        applied = update is not None and update.applied
        ended = time.perf_counter()
        self._count(report, applied)
        row = {
            "update": self.updates,
            "samples": self.samples,
            "loss": loss,
            "lr": learning_rate,
            "grad_norm": grad_norm,
            "applied": applied,
            "seconds": ended - started,
            "batch_size": report.num_samples,
            "micro_batches": report.accumulation_steps,
            "largest_micro_batch": max(report.micro_batch_sizes),
            "retries": report.retries,
            **({} if self.kept_graphs is None else {"kept_graphs": min(self.kept_graphs, report.accumulation_steps)}),
            **({} if ran is None else {"update_seconds": ended - ran}),
            **({} if rescaled is None else {"rescaled_by": rescaled.lr_factor}),
            **verdict_entries(verdict),
            **self.noise.entries,
            **{name: float(value) for name, value in report.metrics.items()},
        }
        self.rows.append(row)
        return row

    def _update(self, report: Report) -> tuple[float, SpikeVerdict | None, Update | None]:
        """The rate in force, what the guard said, and what became of the gradients; None where it dropped them."""
        verdict = None if self.guard is None else self.guard.check(report)
        rate = float(self.rates.optimizer.param_groups[0]["lr"])
        if verdict is not None and not verdict.accepted:
            return rate, verdict, None
        update = apply_update(self.rates.optimizer, report, max_norm=self.options.max_norm)
        if update.applied:
            self.rates.scheduler.step()
        return rate, verdict, update

    def _time_of_gradient(self) -> float | None:
        """When the gradient was there, where the run is about that; elsewhere nothing waits for the device."""
        if self.options.noise == "watch":
            return None
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        return time.perf_counter()

    def _count(self, report: Report, applied: bool) -> None:
        self.updates += 1
        self.applied += applied
        self.samples += report.num_samples
        self.retries += report.retries
        self.schedule.advance(report.num_samples)
        if applied:
            self.noise.observe(report)
        # The lower end of the interval: doubled once it is known, not guessed, that twice as much still pays.
        known = self.noise.estimate
        if self.batch_plan.measures and known is not None and self.schedule.observe(known.low):
            made = self.sizes[: self.updates]
            self.sizes[:] = run_options.update_sizes(self.schedule, self.options, self.data_size, made)
