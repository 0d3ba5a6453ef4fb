"""The batch sampler of a BatchSchedule: the indices of a sampler in batches of its sizes, each rank's share of them."""

import math
from collections.abc import Iterable, Iterator, Sized
from itertools import islice
from typing import Protocol

from macrobatch.distributed import GroupChoice, Ranks
from macrobatch.grouping import share
from macrobatch.size_plans import Ramp, Steps


class Schedule(Protocol):
    """What the sampler reads of a BatchSchedule, and tells it: how far it has drawn."""

    _sizes: Steps | Ramp
    _pass_start: int
    _drawn: int
    _is_resumed: bool

    @property
    def samples(self) -> int:
        """Samples in all batches that have arrived."""

    def _begin_pass(self) -> None: ...


class ScheduledBatches:
    """What `BatchSchedule.batch_sampler` returns: re-iterable, with a length where the sampler has one."""

    def __init__(self, schedule: Schedule, sampler: Iterable[int], drop_last: bool, process_group: GroupChoice) -> None:
        self.schedule = schedule
        self.sampler = sampler
        self.drop_last = drop_last
        self._process_group = process_group

    def __iter__(self) -> Iterator[list[int]]:
        ranks, schedule = Ranks.of(self._process_group), self.schedule
        drawn = self._used(ranks)
        if drawn == 0:
            schedule._begin_pass()
        self._refuse_early_end(ranks)
        schedule._is_resumed = False
        indices = islice(iter(self.sampler), _own(drawn, ranks), None)
        for end in self._ends(drawn, ranks):
            schedule._drawn = schedule._pass_start + end
            wanted = _own(end, ranks) - _own(drawn, ranks)
            batch, drawn = list(islice(indices, wanted)), end
            if len(batch) == wanted or (batch and not self.drop_last):
                yield batch
            if len(batch) < wanted:  # the sampler had no length, and this is its end
                return

    def __len__(self) -> int:
        """Batches in the pass to come, as known now. TypeError where the sampler has no length."""
        if not isinstance(self.sampler, Sized):
            raise TypeError(f"the sampler, a {type(self.sampler).__name__}, has no length, so its batches have none")
        ranks = Ranks.of(self._process_group)
        return sum(1 for _ in self._ends(self._used(ranks), ranks))

    def _total(self, ranks: Ranks) -> float:
        """Samples of a pass over all ranks."""
        if isinstance(self.sampler, Sized):
            return len(self.sampler) * ranks.size
        if ranks.size > 1:
            raise ValueError(
                f"the sampler, a {type(self.sampler).__name__}, has no length, so {ranks.size} ranks cannot tell when "
                "to end together: give one with a length, the same on every rank, such as DistributedSampler"
            )
        return math.inf

    def _refuse_early_end(self, ranks: Ranks) -> None:
        """ValueError, before its first batch, for a pass in which the schedule would end."""
        end, start, total = self.schedule._sizes.end, self.schedule._pass_start, self._total(ranks)
        if end is not None and end < start + total < math.inf:
            raise ValueError(
                f"the batch schedule ends at {end} samples, and the pass over the data that begins at {start} takes "
                f"{total} more: give it no end, or one of at least {start + total}, or a sampler of fewer samples"
            )

    def _ends(self, drawn: int, ranks: Ranks) -> Iterator[int]:
        """The samples of this pass, over all ranks, at the end of each batch from `drawn` samples on."""
        # A pass that is not resumed begins at the samples used by now: len asks before it has begun.
        start, total = self.schedule._pass_start if drawn else self.schedule.samples, self._total(ranks)
        while drawn < total:
            size = self.schedule._sizes(start + drawn)
            share(size, ranks)  # each rank gets something
            left = min(size, total - drawn)
            # Where fewer samples are left than ranks, some rank would wait for the others without a batch.
            if left < (size if self.drop_last else ranks.size):
                return
            drawn += int(left)
            yield drawn

    def _used(self, ranks: Ranks) -> int:
        """Samples that a pass which is resumed has used, over all ranks; 0 where a new one begins."""
        schedule = self.schedule
        used = schedule.samples - schedule._pass_start
        if not schedule._is_resumed or used == 0:
            return 0
        return used if any(True for _ in self._ends(used, ranks)) else 0


def _own(samples: int, ranks: Ranks) -> int:
    """How many of the first `samples` of a pass are this rank's: they go around, so no rank runs out before others."""
    return (samples + ranks.size - 1 - ranks.rank) // ranks.size
