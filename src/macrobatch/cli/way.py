"""The ways through the same samples that `macrobatch compare` sets side by side: update size, pieces, loss."""

from dataclasses import dataclass, replace
from typing import Literal

from macrobatch.cli.learner import accumulated_plainly
from macrobatch.structure import even_sizes
from macrobatch.tasks import Task

Key = Literal["small", "plain", "accumulated", "native", "scaled"]


@dataclass(frozen=True)
class Way:
    """A way through the samples: how many make an update, and how many of them are in memory at once."""

    key: Key
    name: str
    update_size: int
    micro_batch_size: int

    def compared(self, num_samples: int) -> list[int]:
        """How many samples each loss compares with one another while so many are learned, if it does compare them."""
        starts = range(0, num_samples, self.update_size)
        updates = [min(self.update_size, num_samples - start) for start in starts]
        if self.key != "plain":
            return updates
        return [n for update in updates for n in even_sizes(update, self.micro_batch_size)]


def three_ways(batch_size: int, micro_batch_size: int) -> tuple[Way, Way, Way]:
    """Small batch, accumulation, native large batch: the second has the first's memory and the third's update."""
    return (
        Way("small", "small batch", micro_batch_size, micro_batch_size),
        Way("accumulated", "accumulation", batch_size, micro_batch_size),
        Way("native", "native large batch", batch_size, batch_size),
    )


def coupled_ways(batch_size: int, micro_batch_size: int) -> tuple[Way, Way, Way, Way]:
    """The same for a loss that compares the samples of an update, and plain accumulation, which has another loss."""
    small, accumulated, native = three_ways(batch_size, micro_batch_size)
    plain = Way("plain", "plain accumulation", batch_size, micro_batch_size)
    return small, plain, replace(accumulated, name="gathered accumulation"), native


def scaled_way(accumulated: Way) -> Way:
    """That way once more, at a learning rate that is scaled for its update."""
    name = "gathered, lr scaled" if accumulated.name.startswith("gathered") else "accumulated, lr scaled"
    return replace(accumulated, key="scaled", name=name)


def ways_of(task: Task, batch_size: int, micro_batch_size: int) -> list[Way]:
    """Those that there are for the loss of this task, at one learning rate."""
    return [*(three_ways if task.encode is None else coupled_ways)(batch_size, micro_batch_size)]


def learned(task: Task, way: Way) -> Task:
    """What a way trains: the task, but for plain accumulation."""
    return accumulated_plainly(task) if way.key == "plain" else task
