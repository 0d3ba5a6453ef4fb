"""The micro-batch size found while training: what fits is predicted, what is fastest is measured on real windows.

No work is thrown away: each window of the search is trained on like any other, cut in another size. The largest size is
often not the fastest, on a CPU almost never.
"""

import logging
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from statistics import median
from typing import Any

import torch
from torch import nn

from macrobatch.sizing import SizeLimit
from macrobatch.speed import even_size, sizes_to_measure
from macrobatch.state import coupled_layer

logger = logging.getLogger("macrobatch")

CLOSE = 1.1  # sizes within this factor of the fastest are measured ROUNDS times: one window's time is noisy
ROUNDS = 3
HOPELESS = 1.3  # a size slower than the fastest by this factor ends the way down


@dataclass
class AutoSize(SizeLimit):
    """A limit that finds its start: first the largest size that fits, then the fastest of a few below it.

    `seconds`: for each size tried, the seconds per sample of its micro-batches; the first one of a window is left out
    (compiling, allocating), unless it is the only one.
    """

    start: int | None = None
    to_try: list[int] = field(default_factory=list)
    seconds: dict[int, list[float]] = field(default_factory=dict)
    num_samples: int = 0
    is_refined: bool = False
    is_found: bool = False
    laps: list[float] = field(default_factory=list)

    @property
    def has_begun(self) -> bool:
        """Whether it is known what fits."""
        return self.num_samples > 0

    def wait(self) -> None:
        """There is no sample yet to plan for: what has none is cut into no micro-batch, whatever the size."""
        self.current = 1

    def begin(self, largest: int, num_samples: int) -> None:
        """`largest` samples fit; windows have about `num_samples` on this rank."""
        self.start = self.current = largest
        self.num_samples = num_samples
        self.to_try = sizes_to_measure(num_samples, largest)  # ascending: tried from the end
        self._next()

    def stopwatch(self, device: torch.device) -> "Stopwatch | None":
        """What times the micro-batches of the next window; None once the size is found."""
        self.laps.clear()
        return None if self.is_found else Stopwatch(device, self.laps.append)

    def window_ended(self, largest: int, retries: int) -> None:
        """A window has been run: in the search, its time is noted and another size comes next."""
        if not self.has_begun:  # an idle rank
            return
        if self.is_found:
            super().window_ended(largest, retries)
            return
        laps, self.laps = self.laps, []
        if retries:
            self.start = self.current
            self.to_try = [size for size in self.to_try if self.current is None or size <= self.current]
        elif laps:
            size = self.current or largest
            self.seconds.setdefault(size, []).append(median(laps[1:] or laps))
            self._leave_out_the_hopeless(size)
        self._next()

    def state_dict(self) -> dict[str, Any]:
        """As of any limit; the times as pairs, so that it survives a journey through JSON."""
        return super().state_dict() | {"seconds": [[size, times] for size, times in self.seconds.items()]}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from a saved state. ValueError if it is of another kind of limit."""
        super().load_state_dict(state)
        self.seconds = {int(size): list(times) for size, times in state["seconds"]}

    def _leave_out_the_hopeless(self, latest: int) -> None:
        """On the way down: sizes below one that is much slower than the best will be slower still."""
        if self._time(latest) > HOPELESS * self._time(self._best()):
            self.to_try = [size for size in self.to_try if size > latest]

    def _next(self) -> None:
        """The next size to try: halves on the way down, the best one's neighbours, then again all that are close."""
        if not self.to_try and not self.is_refined and self.seconds:
            best, self.is_refined = self._best(), True
            sizes = [even_size(self.num_samples, round(best * step)) for step in (2**-0.5, 2**0.5) if best > 1]
            self.to_try = [size for size in sizes if size not in self.seconds and size <= (self.start or size)]
        if not self.to_try and self.seconds:
            bound = CLOSE * self._time(self._best())
            close = [size for size in self.seconds if self._time(size) <= bound]
            self.to_try = sorted(size for size in close if len(close) > 1 and len(self.seconds[size]) < ROUNDS)
        if self.to_try:
            self.current = self.to_try.pop()
            return
        if self.seconds:
            self.start = self.current = self._best()
        self.is_found = True
        logger.info("micro_batch_size='auto': %s, the fastest of %s", self.current, sorted(self.seconds))

    def _time(self, size: int) -> float:
        return median(self.seconds[size])

    def _best(self) -> int:
        return min(self.seconds, key=self._time)


class Stopwatch:
    """Times the micro-batches of a window: `lap(n)` notes the seconds per sample since the last one."""

    def __init__(self, device: torch.device, note: Callable[[float], None]) -> None:
        self._device = device
        self._note = note
        self._last = self._now()

    def lap(self, num_samples: int) -> None:
        """A micro-batch of `num_samples` has ended; on CUDA this waits for it."""
        now = self._now()
        self._note((now - self._last) / num_samples)
        self._last = now

    def _now(self) -> float:
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)
        return time.perf_counter()


def refuse_coupled(modules: Sequence[nn.Module]) -> None:
    """ValueError for BatchNorm in train mode: a size that is found would decide over what it normalises."""
    layer = coupled_layer(modules)
    if layer is None:
        return
    name = next((name for module in modules for name, other in module.named_modules() if other is layer), "")
    raise ValueError(
        f"micro_batch_size='auto' would change the result: {name!r} ({type(layer).__name__}, in train mode) normalises "
        'over the micro-batch. Give batch_norm="exact", for which every size gives the same, or a number, put the '
        "layer into eval mode, or replace it (macrobatch.batchnorm.convert)"
    )
