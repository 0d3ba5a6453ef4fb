"""The most memory a training run has used, as far as it can be known without slowing the run down."""

import sys
from contextlib import ExitStack
from types import TracebackType

import torch

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

    @property
    def peak_bytes(self) -> int | None:
        """The peak so far; None where the system does not say."""
        return _process_peak() if self._meter is None else self._meter.peak

    @property
    def kind(self) -> str:
        """What it is the peak of."""
        return "of the process" if self._meter is None else "of tensors"


def _process_peak() -> int | None:
    try:
        import resource  # not on every system
    except ModuleNotFoundError:
        return None
    largest = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return largest if sys.platform == "darwin" else 1024 * largest
