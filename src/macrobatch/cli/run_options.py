"""What the command line asks of a training run, and what follows from it for a task: checked before any work."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

from macrobatch import BatchSchedule, Window
from macrobatch.cli import setup
from macrobatch.cli.batch_plan import BatchPlan, parse_batch_plan, planned_sizes
from macrobatch.cli.forecast import coupling_layer, refuse_auto, sample_batch
from macrobatch.cli.guard import Guarding
from macrobatch.cli.learner import accumulator_of
from macrobatch.scaling_rules import RuleName
from macrobatch.tasks import Task

Noise = Literal["watch", "measure", "per example"]
# Micro-batches in an update that is there to measure noise: the variance of the estimate goes as 1 / (K - 1).
FEWEST_PIECES = 8


@dataclass(frozen=True, kw_only=True)
class TrainOptions:
    """What the command line said; None where the task's own value is meant, or no limit.

    `micro_batch_size`: None is "auto" where that changes nothing but memory and time, else the task's own. Of
    `updates`, `epochs` and `samples` at most one is given; none means one epoch. `noise`: the noise scale is watched
    where that costs no memory that is short, or measured because the run is about it. `noise_half_life`: after how
    many updates one counts half for it; None: all alike.
    """

    batch_size: int | None = None
    batch_schedule: str | None = None
    micro_batch_size: int | Literal["auto"] | None = None
    max_memory: int | str | None = None
    learning_rate: float | None = None
    base_batch_size: int | None = None
    scaling: RuleName = "none"
    schedule: setup.Schedule = "constant"
    warmup: int = 0
    updates: int | None = None
    epochs: int | None = None
    samples: int | None = None
    max_norm: float | None = None
    precision: setup.Precision = "fp32"
    device: setup.Device = "auto"
    seed: int = 0
    spike_guard: Guarding = "off"
    snapshot_every: int | None = None
    noise: Noise = "watch"
    noise_half_life: float | None = 100


def batch_plan(task: Task, options: TrainOptions, data_size: int) -> BatchPlan:
    """The effective batch sizes asked for: by schedule, or one for the whole run."""
    if options.batch_schedule is None:
        plan = BatchPlan("constant", (options.batch_size or min(task.batch_size, data_size),))
    else:
        plan = parse_batch_plan(options.batch_schedule)
        if options.batch_size not in (None, plan.sizes[-1]):
            raise ValueError(
                f"--batch-size {options.batch_size} is not the last size of --batch-schedule {options.batch_schedule}, "
                f"{plan.sizes[-1]}: leave one of them out, or let them agree"
            )
    if max(plan.sizes) > data_size:
        what = "--batch-size" if options.batch_schedule is None else "a size of --batch-schedule,"
        raise ValueError(f"{what} {max(plan.sizes)} is more than the {data_size} training samples of {task.name}")
    return plan


def tokens_per_sample(task: Task) -> Callable[[], float]:
    """A function that counts the loss terms of a sample: as many as the task's first samples have on average."""

    def terms_per_sample() -> float:
        batch, was_training = sample_batch(task), task.model.training
        task.model.eval()
        try:
            report = accumulator_of(task, task.model).evaluate(Window([batch]))
        finally:
            task.model.train(was_training)
        if isinstance(report.loss_weight, dict):
            raise ValueError(
                f"--batch-schedule in tokens: the loss of {task.name} counts {', '.join(report.loss_weight)}"
            )
        return float(report.loss_weight) / report.num_samples  # type: ignore[arg-type]  # not a mapping

    return terms_per_sample


def given_size(task: Task, options: TrainOptions, plan: BatchPlan) -> tuple[int | None, str]:
    """The micro-batch size, None where it is to be found, and why it is not found where nobody gave one."""
    smallest, largest, given = min(plan.sizes), max(plan.sizes), options.micro_batch_size
    if task.encode is not None:
        _refuse_noise_of_pairs(task, options, plan)
    if options.noise == "measure" or plan.measures:
        return _size_to_measure(task, options, smallest)
    if options.noise == "per example":
        _refuse_coupled_examples(task)
    if given == "auto":
        refuse_auto(task)
        return None, ""
    if given is not None:
        return min(given, largest), ""
    why = _why_not_auto(task)
    return (min(task.micro_batch_size, largest), why) if why else (None, "")


def _size_to_measure(task: Task, options: TrainOptions, smallest: int) -> tuple[int, str]:
    """A size that leaves several micro-batches in every update. ValueError for one that does not."""
    given = options.micro_batch_size
    reason = "the noise scale is measured between the micro-batches of an update"
    if smallest == 1:
        raise ValueError(f"{reason}, and one of 1 sample has only one: give a --batch-size of at least 2")
    if given == "auto":
        raise ValueError(f"{reason}, and --micro-batch-size auto may make them one: give a number below {smallest}")
    if given is None:
        coupled = coupling_layer(task.model) is not None  # then the size is part of the model
        size = task.micro_batch_size if coupled else min(task.micro_batch_size, max(smallest // FEWEST_PIECES, 1))
        given = size if size < smallest else None
        if given is None:
            raise ValueError(f"{reason}: give --micro-batch-size, a number below {smallest}")
        return given, reason
    if given >= smallest:
        instead = "" if options.noise == "watch" else ", or --per-example, which measures the gradient of each sample"
        raise ValueError(
            f"{reason}, and with --micro-batch-size {given} an update of {smallest} samples is one: give a size below "
            f"{smallest}{instead}"
        )
    return given, ""


def _refuse_noise_of_pairs(task: Task, options: TrainOptions, plan: BatchPlan) -> None:
    """ValueError where the noise scale is asked for of a loss that compares all samples of an update."""
    reason = (
        f"the loss of {task.name} compares all samples of an update, so that neither a sample nor a micro-batch has a "
        "gradient of its own, and the gradient noise scale is not defined"
    )
    if plan.measures:
        raise ValueError(
            f"--batch-schedule {options.batch_schedule}: {reason}. Say yourself when the batch grows: steps:SIZES or "
            "ramp:SIZES"
        )
    if options.noise != "watch":
        raise ValueError(
            f"macrobatch noise: {reason}; nor are losses at two batch sizes comparable. Compare the validation "
            f"metrics of macrobatch train at several --batch-size instead"
        )


def _refuse_coupled_examples(task: Task) -> None:
    layer = coupling_layer(task.model)
    if layer is not None:
        raise ValueError(
            f"--per-example takes the samples one by one, and {layer} normalises over several: leave it out, and the "
            "noise is measured between micro-batches"
        )


def _why_not_auto(task: Task) -> str:
    layer = coupling_layer(task.model)
    if layer is not None:
        return f"{layer} normalises over the micro-batch, so that another size would be another model"
    try:
        list(Window.of_parts(sample_batch(task), 1))
    except ValueError:
        return "its collated batches cannot be cut"
    return ""


def base_batch_size(task: Task, options: TrainOptions, batch_size: int) -> int:
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


def update_sizes(schedule: BatchSchedule, options: TrainOptions, data_size: int, made: Sequence[int] = ()) -> list[int]:
    """The effective batch of every update, as known now; ValueError where the schedule does not fit the run."""
    given = {"updates": options.updates, "epochs": options.epochs, "samples": options.samples}
    found = {name: value for name, value in given.items() if value is not None}
    if len(found) > 1:
        raise ValueError("give one of --steps, --epochs and --samples, not several")
    limit = found or {"epochs": 1}
    total = limit.get("samples", limit.get("epochs", 0) * data_size)
    if options.batch_schedule is not None and total:
        schedule.check(total)
    sizes = planned_sizes(schedule, data_size, **limit, before=made)
    if options.batch_schedule is not None:
        schedule.check(sum(sizes))
    return sizes
