"""From what one micro-batch needed at two sizes to what it needs at any size, and to the largest size that fits.

Each storage of a forward and backward has a size a + m b for b samples, so after each operation t the live bytes are
live_t(b) = a_t + m_t b, and the peak is max over t of it: convex and piecewise linear in b. Two runs tell every a_t and
m_t, hence the peak at every size; the peaks of two runs alone would not (they may stand at different operations).
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

Bytes = NDArray[np.int64]


@dataclass(frozen=True, eq=False)
class Trace:
    """What one forward and backward of `micro_batch_size` samples held, in bytes.

    `parameters`: with buffers. `gradients`: of the parameters that the loss reaches, allocated before the forward, as
    in the second micro-batch of a window. `inputs`: the micro-batch itself. `live`: what was live beside these three
    after each operation, shape (operations,); `saved`: after the forward. `idle`: positions of the parameters that
    the loss does not reach.
    `checkpointed`: `live` as it would be if the model's `num_blocks` blocks recomputed their activations in backward;
    None for a model whose blocks could not be found, or have nothing to recompute.
    """

    micro_batch_size: int
    parameters: int
    gradients: int
    inputs: int
    live: Bytes
    saved: int = 0
    idle: frozenset[int] = frozenset()
    checkpointed: Bytes | None = None
    num_blocks: int = 0

    @property
    def activations(self) -> int:
        """The most that was live beside parameters, gradients and inputs."""
        return int(self.live.max(initial=0))

    @property
    def peak(self) -> int:
        """The most that was live at once."""
        return self.parameters + self.gradients + self.inputs + self.activations

    def with_checkpointing(self) -> "Trace":
        """The trace of the model with its blocks checkpointed. ValueError without blocks."""
        if self.checkpointed is None:
            raise ValueError("the model has no blocks that could be checkpointed")
        return replace(self, live=self.checkpointed)


Run = Callable[[int], Trace | None]  # None where it did not fit
Room = Callable[[int, Trace], int]  # bytes that a micro-batch of so many samples may have for activations


@dataclass(frozen=True, eq=False)
class Fit:
    """The largest micro-batch size that fits, as far as was searched.

    `size`: 0 if none fits. `exact`: whether one more sample was run, too, and did not fit, or none was asked for.
    `traces`: of every run that ended, by micro-batch size. `num_runs`: forwards and backwards, failed ones included.
    """

    size: int
    exact: bool
    traces: dict[int, Trace]
    num_runs: int


def activations_at(size: int, traces: Sequence[Trace]) -> int:
    """The most bytes of activations at `size` samples, from traces at two or more sizes (one is scaled up).

    Uses the two sizes around `size`, else the two nearest. If they ran other operations, only their peaks are known:
    the line through these is then an upper bound between them.
    """
    by_size = sorted(traces, key=lambda trace: trace.micro_batch_size)
    known = [trace for trace in by_size if trace.micro_batch_size == size]
    if known:
        return known[0].activations
    if len(by_size) == 1:
        return -(-by_size[0].activations * size // by_size[0].micro_batch_size)
    above = next((j for j, trace in enumerate(by_size) if trace.micro_batch_size > size), len(by_size))
    low, high = by_size[max(0, min(above - 1, len(by_size) - 2)) :][:2]
    start, stop = low.live, high.live
    if len(start) != len(stop):
        start, stop = np.array([low.activations]), np.array([high.activations])
    share = (size - low.micro_batch_size) / (high.micro_batch_size - low.micro_batch_size)
    return int(np.ceil((start + (stop - start) * share - 1e-3).max(initial=0.0)))


def largest_predicted(traces: Sequence[Trace], room: Room, low: int, high: int) -> int:
    """The largest size from `low` to `high` predicted to fit; `low` if none is."""
    while low < high:
        middle = (low + high + 1) // 2
        if activations_at(middle, traces) <= room(middle, traces[0]):
            low = middle
        else:
            high = middle - 1
    return low


def largest_that_fits(run: Run, room: Room, largest: int, *, max_runs: int, second: int | None = None) -> Fit:
    """The largest size up to `largest` whose run keeps within the room, found with at most `max_runs` runs.

    The first run has two samples (one is a special case for many operations), the next `second`; from there on sizes
    are predicted, and the last two runs are those of the result and of one sample more. Where runs are spent before
    that, because the bytes are not linear in b, the result is the largest size that was run and fitted: not `exact`.
    """
    search = _Search(run, room, largest)
    search.try_size(min(2, largest))
    if search.fits == 0 and largest > 1:
        search.try_size(1)
        return search.result()
    if search.fits and search.is_open:
        search.try_size(min(second or largest, largest))
    while search.is_open and search.num_runs < max_runs:
        search.try_size(search.next_size())
    return search.result()


class _Search:
    """Sizes known to fit, and known not to."""

    def __init__(self, run: Run, room: Room, largest: int) -> None:
        self._run, self._room = run, room
        self.fits, self._fails = 0, largest + 1
        self.num_runs = 0
        self._traces: dict[int, Trace] = {}

    @property
    def is_open(self) -> bool:
        return self._fails - self.fits > 1

    def try_size(self, size: int) -> None:
        trace = self._run(size)
        self.num_runs += 1
        if trace is not None:
            self._traces[size] = trace
        if trace is not None and trace.activations <= self._room(size, trace):
            self.fits = size
        else:
            self._fails = size

    def next_size(self) -> int:
        predicted = largest_predicted(list(self._traces.values()), self._room, self.fits, self._fails - 1)
        return max(predicted, self.fits + 1)

    def result(self) -> Fit:
        return Fit(self.fits, not self.is_open, self._traces, self.num_runs)
