"""The most memory a training run has used, as far as it can be known without slowing the run down."""

import sys
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager
from types import TracebackType

import torch
from torch import Tensor
from torch.utils._python_dispatch import _disable_current_modes

from macrobatch.memory import MemoryMeter, memory_limit


class MemoryUse:
    """A context with the budget, if there is one, and with a peak that can be read in it and after it.

    On a GPU, and under a budget, the peak is of tensors alive at once. On a CPU without a budget it is the most memory
    the whole process ever had: counting tensors there costs time in every operation.
    """

    def __init__(self, device: torch.device, max_memory: int | None) -> None:
        self._device, self._max_memory = device, max_memory
        self._meter = MemoryMeter(device) if device.type == "cuda" or max_memory is not None else None
        self._contexts = ExitStack()
        self._earlier = 0  # bytes at the peak before a measurement of one update reset it, on a GPU
        self.update_peak: int | None = None

    def __enter__(self) -> "MemoryUse":
        if self._max_memory is not None:
            self._contexts.enter_context(memory_limit(self._max_memory, device=self._device))
        if self._meter is not None:
            self._contexts.enter_context(self._meter)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._contexts.__exit__(kind, error, trace)

    @contextmanager
    def of_update(self, held: Iterable[Tensor]) -> Iterator[None]:
        """After the context `update_peak` is the most bytes of tensors alive within it, `held` included."""
        self._earlier = 0 if self._meter is None else self._meter.peak
        with MemoryMeter(self._device) as meter:
            for tensor in held:
                tensor.detach()  # an operation: from here on it counts
            yield
        self.update_peak = meter.peak

    @property
    def peak_bytes(self) -> int | None:
        """The peak so far; None where the system does not say."""
        return _process_peak() if self._meter is None else max(self._earlier, self._meter.peak)

    @property
    def kind(self) -> str:
        """What it is the peak of."""
        return "of the process" if self._meter is None else "of tensors"


@contextmanager
def uncounted() -> Iterator[None]:
    """Within the context nothing counts and nothing is refused: samples are loaded in main memory, not on the device.

    Without it a data set that is one large tensor would count as soon as a sample is sliced off.
    """
    with _disable_current_modes():
        yield


def _process_peak() -> int | None:
    try:
        import resource  # not on every system
    except ModuleNotFoundError:
        return None
    largest = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return largest if sys.platform == "darwin" else 1024 * largest
