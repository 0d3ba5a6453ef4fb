"""The optimizer of a run and its learning rate: scaled for the first batch, scheduled, and moved with the batch."""

from collections.abc import Sequence
from dataclasses import dataclass

from torch import nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from macrobatch import BatchSchedule, NoiseEstimate, Scaling
from macrobatch.cli import run_options, setup
from macrobatch.cli.rescaling import one_rule, refuse_unreachable, rescale
from macrobatch.cli.run_options import TrainOptions
from macrobatch.scaling_rules import RuleName
from macrobatch.tasks import Task


@dataclass(frozen=True)
class Rates:
    """`learning_rate`: at the first batch. `scaling`: what came of the base rate there; None if it is as it was."""

    optimizer: Optimizer
    scheduler: LRScheduler
    rule: RuleName
    scaling: Scaling | None
    learning_rate: float
    base_learning_rate: float
    base_batch_size: int

    @classmethod
    def of(
        cls,
        task: Task,
        model: nn.Module,
        options: TrainOptions,
        batch_sizes: Sequence[int],
        schedule: BatchSchedule,
        updates: int,
    ) -> "Rates":
        """The task's optimizer for the first size. ValueError where the rule cannot reach a later one."""
        first = schedule.batch_size
        base = run_options.base_batch_size(task, options, first)
        base_rate = options.learning_rate or task.learning_rate
        trial = task.make_optimizer(model, base_rate)
        rule = one_rule(trial, options.scaling, base, batch_sizes)
        refuse_unreachable(trial, rule, base, batch_sizes)
        optimizer = task.make_optimizer(model, base_rate)
        scaling = rescale(optimizer, rule, from_batch_size=base, to_batch_size=first)
        rate = float(optimizer.param_groups[0]["lr"])
        factor = 1.0 if scaling is None else scaling.lr_factor
        scheduler = setup.make_scheduler(optimizer, options.schedule, options.warmup, updates, lr_factor=factor)
        return cls(optimizer, scheduler, rule, scaling, rate, base_rate, base)

    def follow(self, schedule: BatchSchedule, known: NoiseEstimate | None) -> Scaling | None:
        """The hyperparameters fit the batch that has arrived; what changed, if anything did."""

        def scale(*, from_batch_size: int, to_batch_size: int) -> Scaling | None:
            return rescale(
                self.optimizer,
                self.rule,
                scheduler=self.scheduler,
                from_batch_size=from_batch_size,
                to_batch_size=to_batch_size,
                noise_scale=None if known is None or known.noise_scale == 0 else known.noise_scale,
            )

        return schedule.rescale(scale)
