"""The effective batch over training: how large the next one is, how large the one that arrives, and the lr with it."""

import math
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, Protocol, TypeVar

from macrobatch.batch import check_size
from macrobatch.distributed import AUTO, GroupChoice
from macrobatch.scheduled_batches import ScheduledBatches
from macrobatch.size_plans import Ramp, Steps, in_samples

Result = TypeVar("Result", covariant=True)


class Scale(Protocol[Result]):
    """What moves hyperparameters to another batch size, as `partial(scale_hyperparameters, optimizer)` does."""

    def __call__(self, *, from_batch_size: int, to_batch_size: int) -> Result:
        """Hyperparameters that fitted the one size fit the other."""


class BatchSchedule:
    """The effective batch size over training, as a function of the samples that updates have used.

    Made by `constant`, `steps`, `ramp` or `doubling`. It gives its sizes to `windows(loader, batch_size=schedule)`, or
    to `DataLoader(dataset, batch_sampler=schedule.batch_sampler(sampler))`. The training loop tells it what arrived:

        for batch in loader:
            schedule.rescale(scale)                # the rate that goes with this batch
            report = accumulator.run(batch)
            apply_update(optimizer, report)
            schedule.advance(report.num_samples)   # also where the update was skipped

    However far ahead a loader draws, `batch_size` is the size of the batch that is next to arrive: both sides compute
    it from the samples before it. One schedule belongs to one loader. Sizes are over all ranks, the same on each.
    """

    def __init__(self, sizes: Steps | Ramp, *, largest: int | None = None) -> None:
        self._sizes = sizes
        self._largest = largest  # of a schedule that doubles
        self._lr_batch_size = sizes(0)  # the size that the learning rate fits
        self._samples = 0  # in the batches that arrived
        self._drawn = 0  # in the batches that the loader has drawn
        self._pass_start = 0  # samples before this pass over the data
        self._is_resumed = False

    @classmethod
    def constant(cls, batch_size: int) -> "BatchSchedule":
        """Always `batch_size`."""
        return cls(Steps((0,), (check_size(batch_size, "batch_size"),)))

    @classmethod
    def steps(
        cls, sizes: Mapping[int, int], *, tokens_per_sample: float | None = None, end: int | None = None
    ) -> "BatchSchedule":
        """`{samples before it: size}`, beginning with 0; with `tokens_per_sample` the keys and `end` count tokens.

        The last size stays, or ends at `end`, which `check` then compares with the training.
        """
        starts = list(sizes)
        if not starts or starts[0] != 0 or starts != sorted(starts):
            raise ValueError(f"steps begin at 0 and rise, as in {{0: 256, 100_000: 512}}, got them at {starts}")
        checked = tuple(check_size(size, f"the batch size from {start} on") for start, size in sizes.items())
        borders = [0, *(in_samples(start, tokens_per_sample, "a step") for start in starts[1:])]
        last = None if end is None else in_samples(end, tokens_per_sample, "end")
        if last is not None and last <= borders[-1]:
            raise ValueError(f"end={end} comes before the last step, at {starts[-1]}: that size would never be used")
        return cls(Steps(tuple(borders), checked, last))

    @classmethod
    def ramp(
        cls,
        from_batch_size: int,
        to_batch_size: int,
        *,
        over: int,
        multiple_of: int = 1,
        tokens_per_sample: float | None = None,
    ) -> "BatchSchedule":
        """From one size to the other, evenly over the samples (with `tokens_per_sample`, the tokens) `over`.

        from + floor((to - from) * n / over / multiple_of) * multiple_of after n samples, then `to_batch_size`.
        """
        first, last = check_size(from_batch_size, "from_batch_size"), check_size(to_batch_size, "to_batch_size")
        samples = in_samples(over, tokens_per_sample, "over")
        return cls(Ramp(first, last, samples, check_size(multiple_of, "multiple_of")))

    @classmethod
    def doubling(cls, batch_size: int, *, largest: int) -> "BatchSchedule":
        """`batch_size`, doubled whenever `observe` is told that twice as much still pays, never above `largest`."""
        if check_size(largest, "largest") < check_size(batch_size, "batch_size"):
            raise ValueError(f"largest={largest} is below the first batch size {batch_size}")
        return cls(Steps((0,), (batch_size,)), largest=largest)

    # ------------------------------------------------------------------------------------------- what training asks
    @property
    def samples(self) -> int:
        """Samples in all batches that have arrived, over all ranks."""
        return self._samples

    @property
    def batch_size(self) -> int:
        """The size of the batch that arrives next, or of the one that has arrived and was not yet counted.

        The last batch of an epoch may hold fewer samples; the size that it was meant to have is still this.
        """
        return self._sizes(self._samples)

    def advance(self, num_samples: int) -> None:
        """A batch of `num_samples` over all ranks has been used: `report.num_samples`."""
        if isinstance(num_samples, bool) or not isinstance(num_samples, int) or num_samples < 0:
            raise ValueError(f"num_samples must be an integer of at least 0, got {num_samples!r}")
        self._samples += num_samples

    @property
    def rate(self) -> "RateSize":
        """Which batch size the learning rate fits, to go back with it: `SpikeGuard(stateful=[schedule.rate])`."""
        return RateSize(self)

    def rescale(self, scale: Scale[Result]) -> Result | None:
        """The hyperparameters fit the batch that has arrived: `scale` was called if its size is not that of the last.

        `scale(from_batch_size=, to_batch_size=)`, such as `partial(scale_hyperparameters, optimizer, scheduler)`; what
        it returns is returned, or None. The first size is what the optimizer was made for.
        """
        before, now = self._lr_batch_size, self.batch_size
        if before == now:
            return None
        result = scale(from_batch_size=before, to_batch_size=now)
        self._lr_batch_size = now
        return result

    def observe(self, critical_batch_size: float) -> bool:
        """Whether the size was doubled: 2B where the critical batch size is above 2B. Merrill et al. 2025.

        Batches already drawn keep their size, and until the first doubled one arrives nothing is doubled again. An
        estimate that is not finite counts as none. Every rank must be told the same number. ValueError for a schedule
        that does not double.
        """
        if self._largest is None or not isinstance(self._sizes, Steps):
            raise ValueError("this schedule is fixed: make it by BatchSchedule.doubling to let it observe")
        size, is_pending = self._sizes.sizes[-1], self._sizes.last_start > self._samples
        pays = math.isfinite(critical_batch_size) and critical_batch_size > 2 * size
        if is_pending or not pays or 2 * size > self._largest:
            return False
        self._sizes = self._sizes.then(max(self._drawn, self._samples), 2 * size)
        return True

    def check(self, num_samples: int) -> None:
        """ValueError unless the schedule fits a training of `num_samples`: it neither ends before nor outlasts it."""
        check_size(num_samples, "num_samples")
        if self._sizes.end is not None and self._sizes.end < num_samples:
            raise ValueError(
                f"the batch schedule ends at {self._sizes.end} samples, before the training of {num_samples}: give it "
                "no end, or a later one"
            )
        if self._sizes.last_start >= num_samples:
            raise ValueError(
                f"the training of {num_samples} samples ends before the batch schedule, which reaches its last size "
                f"after {self._sizes.last_start}: train longer, or shorten the schedule"
            )

    def batch_sizes(self, num_samples: int) -> Iterator[int]:
        """The sizes of all batches from here to `num_samples` more, as known now; their number is that of updates."""
        samples, end = self._samples, self._samples + num_samples
        while samples < end:
            size = min(self._sizes(samples), end - samples)
            yield size
            samples += size

    # ------------------------------------------------------------------------------------------- what a loader asks
    def __call__(self, grouped: int) -> int:
        """The size of the window that comes after `grouped` samples of this pass; 0 begins a pass. For `windows`."""
        if grouped == 0:
            self._begin_pass()
        return self._draw(self._pass_start + grouped)

    def batch_sampler(
        self, sampler: Iterable[int], *, drop_last: bool = False, process_group: GroupChoice = AUTO
    ) -> ScheduledBatches:
        """A batch sampler for a DataLoader: the indices of `sampler` in batches of these sizes, this rank's share."""
        return ScheduledBatches(self, sampler, drop_last, process_group)

    def _begin_pass(self) -> None:
        self._pass_start, self._is_resumed = self._samples, False

    def _draw(self, samples: int) -> int:
        size = self._sizes(samples)
        self._drawn = samples + size
        return size

    # ------------------------------------------------------------------------------------------- saving
    def state_dict(self) -> dict[str, Any]:
        """What `load_state_dict` needs to go on: numbers and lists of them. Batches drawn ahead are not counted."""
        state: dict[str, Any] = {
            "samples": self._samples,
            "pass_start": self._pass_start,
            "lr_batch_size": self._lr_batch_size,
        }
        if self._largest is not None and isinstance(self._sizes, Steps):
            state |= {"starts": list(self._sizes.starts), "sizes": list(self._sizes.sizes)}
        return state

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Sizes go on where they were; a batch sampler leaves out what this pass over the data has used.

        Load it together with the optimizer, whose learning rate fits the size of the last batch used.
        """
        expected = self.state_dict().keys()
        if state.keys() != expected:
            raise ValueError(
                f"this batch schedule's state holds {', '.join(sorted(expected))}, got {', '.join(sorted(state))}: it "
                "was saved with another kind of schedule"
            )
        self._samples, self._pass_start = int(state["samples"]), int(state["pass_start"])
        self._lr_batch_size, self._drawn, self._is_resumed = int(state["lr_batch_size"]), self._samples, True
        if "starts" in state:
            self._sizes = Steps(tuple(state["starts"]), tuple(state["sizes"]))


class RateSize:
    """The batch size that the learning rate fits, as a state of its own; samples and sizes are no part of it."""

    def __init__(self, schedule: BatchSchedule) -> None:
        self._schedule = schedule

    def state_dict(self) -> dict[str, int]:
        """The size alone."""
        return {"lr_batch_size": self._schedule._lr_batch_size}

    def load_state_dict(self, state: Mapping[str, int]) -> None:
        """The rate is that of this size, so that the next `rescale` starts from it; samples used are as they were."""
        if state.keys() != {"lr_batch_size"}:
            raise ValueError(f"the state of schedule.rate holds lr_batch_size, got {', '.join(sorted(state))}")
        self._schedule._lr_batch_size = int(state["lr_batch_size"])
