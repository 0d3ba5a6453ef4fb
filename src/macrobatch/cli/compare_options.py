"""What the command line may ask of a comparison, and the errors of what cannot be."""

from dataclasses import dataclass
from typing import Literal

from macrobatch.cli import setup
from macrobatch.tasks import Task
from macrobatch.tasks.task import num_samples

SAMPLES = 8192
DRAWS = 64  # at least: the noise scale is a ratio of two that are noisy
# Where the loss compares samples there is one way more, forwards run twice, and no noise scale.
COUPLED_SAMPLES = 4096
COUPLED_DRAWS = 16
FEWEST_COUPLED_DRAWS = 8


@dataclass(frozen=True, kw_only=True)
class CompareOptions:
    """What the command line said; None where the task's own value is meant, or no budget."""

    batch_size: int | None = None
    micro_batch_size: int | Literal["auto"] | None = None
    max_memory: int | str | None = None
    learning_rate: float | None = None
    samples: int | None = None
    draws: int | None = None
    sharpness_samples: int = 32
    seeds: int = 1
    device: setup.Device = "auto"
    seed: int = 0


def checked_samples(task: Task, options: CompareOptions, batch_size: int, micro_batch_size: int) -> int:
    """How many samples to train on. ValueError for sizes that leave nothing to compare."""
    data_size = num_samples(task.train, "train")
    if batch_size > data_size:
        raise ValueError(f"--batch-size {batch_size} is more than the {data_size} training samples of {task.name}")
    if not 1 <= micro_batch_size < batch_size:
        raise ValueError(
            f"--micro-batch-size {micro_batch_size} must be below --batch-size {batch_size}: "
            "otherwise there is nothing to accumulate"
        )
    if options.samples is None:
        return max(SAMPLES if task.encode is None else COUPLED_SAMPLES, batch_size)
    if options.samples < batch_size:
        raise ValueError(f"--samples {options.samples} is less than one effective batch of {batch_size}")
    return options.samples


def checked_draws(task: Task, options: CompareOptions) -> int:
    """How many gradients to draw. ValueError for too few."""
    default, fewest = (DRAWS, DRAWS) if task.encode is None else (COUPLED_DRAWS, FEWEST_COUPLED_DRAWS)
    if options.draws is not None and options.draws < fewest:
        raise ValueError(
            f"--draws {options.draws} of the gradient of {task.name} do not tell its variance: at least {fewest}"
        )
    return options.draws or default


def refuse_auto_among_samples(task: Task) -> None:
    """ValueError where a size that is found would decide over the loss of some of the ways."""
    if task.encode is not None:
        raise ValueError(
            f"--micro-batch-size auto would change the result: the loss of {task.name} compares the samples of an "
            "update, so that the small batch and plain accumulation have another loss at each size. Leave out "
            f"--micro-batch-size (the task's own is {task.micro_batch_size}), or give a number"
        )
