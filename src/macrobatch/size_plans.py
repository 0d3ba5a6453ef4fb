"""Effective batch sizes over training as values: pure functions of the samples before a batch."""

import math
from bisect import bisect_right
from dataclasses import dataclass

from macrobatch.batch import check_size


@dataclass(frozen=True)
class Steps:
    """`sizes[i]` from `starts[i]` samples on; the last one for good, or up to `end`."""

    starts: tuple[int, ...]
    sizes: tuple[int, ...]
    end: int | None = None

    def __call__(self, samples: int) -> int:
        """The size of the batch that comes after `samples`."""
        if self.end is not None and samples >= self.end:
            raise ValueError(f"the batch schedule ends at {self.end} samples, and training has come to {samples}")
        return self.sizes[bisect_right(self.starts, samples) - 1]

    @property
    def last_start(self) -> int:
        """Samples before the last size begins."""
        return self.starts[-1]

    def then(self, start: int, size: int) -> "Steps":
        """These steps, and `size` from `start` samples on."""
        kept = [(n, b) for n, b in zip(self.starts, self.sizes, strict=True) if n < start]
        starts, sizes = zip(*kept, (start, size), strict=True)
        return Steps(starts, sizes)


@dataclass(frozen=True)
class Ramp:
    """From `first` to `last` in steps of `multiple_of`, evenly over `over` samples."""

    first: int
    last: int
    over: int
    multiple_of: int
    end: int | None = None

    def __call__(self, samples: int) -> int:
        """The size of the batch that comes after `samples`."""
        if samples >= self.over:
            return self.last
        way = abs(self.last - self.first) * samples // self.over // self.multiple_of * self.multiple_of
        return self.first + way if self.last >= self.first else self.first - way

    @property
    def last_start(self) -> int:
        """Samples before the last size begins."""
        return self.over


def in_samples(count: int, tokens_per_sample: float | None, name: str) -> int:
    """`count`, which is samples or with `tokens_per_sample` tokens, in samples, rounded up."""
    check_size(count, name)
    if tokens_per_sample is None:
        return count
    if not tokens_per_sample > 0:
        raise ValueError(f"tokens_per_sample must be positive, got {tokens_per_sample}")
    return math.ceil(count / tokens_per_sample)
