"""Memory: how many bytes of tensors were alive at once, and a limit that they must not pass."""

import os
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from decimal import Decimal
from typing import Any

import torch
from torch.utils._python_dispatch import _get_current_dispatch_mode_stack

from macrobatch.signatures import check_callable, given
from macrobatch.storages import LiveStorages, format_bytes

__all__ = ["MemoryMeter", "format_bytes", "memory_limit", "parse_bytes", "peak_memory"]

Device = torch.device | str | None
UNITS = {"B": 1} | {
    f"{prefix}{kind}": base ** (power + 1)
    for kind, base in (("B", 1000), ("iB", 1024))
    for power, prefix in enumerate("KMGT")
}


def peak_memory(fn: Callable[[], object], *, device: Device = None) -> int:
    """The most bytes of tensor storage alive at once while `fn()` runs. What `fn` returns is dropped.

    On the CPU (`device` None) storages made before count from the first operation of `fn` that touches them. On a CUDA
    device everything that is allocated there counts.

    >>> x, w = torch.ones(8, 16), torch.ones(16, 4)
    >>> peak_memory(lambda: (x @ w).relu())  # x, w, their product, and relu of it: 4 bytes each
    1024
    """
    check_callable(fn, "fn", (), ". Write peak_memory(lambda: ...)")
    with MemoryMeter(device) as meter:
        fn()
    return meter.peak


class MemoryMeter:
    """Within the context `live` is the bytes of tensor storage alive now, and `peak` the most there were so far.

    After the context both stay as they were at its end. `device`: None and "cpu" count what operations of this thread
    touch; a CUDA device reads its allocator's statistics, for the whole process, and resets their peak on entry.
    """

    def __init__(self, device: Device = None) -> None:
        self._device = _checked_device(device)
        self._counter: LiveStorages | _CudaStatistics | None = None

    @property
    def live(self) -> int:
        """Bytes alive now; 0 before the context."""
        return self._counter.live if self._counter is not None else 0

    @property
    def peak(self) -> int:
        """The largest `live` since the context was entered."""
        return self._counter.peak if self._counter is not None else 0

    def __enter__(self) -> "MemoryMeter":
        self._counter = LiveStorages() if self._device.type == "cpu" else _CudaStatistics(self._device)
        self._counter.__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        if self._counter is not None:
            self._counter.__exit__(*error)


@contextmanager
def memory_limit(max_bytes: int | str, *, device: Device = None) -> Iterator[None]:
    """Within the context no operation makes tensors larger than `max_bytes` in all: it raises torch.OutOfMemoryError.

    `max_bytes`: a number, or a text such as "500MB", "6GB" or "1.5GiB" (MB = 10**6, MiB = 2**20 bytes). On the CPU
    (`device` None) it simulates a small device: the bytes are those of `MemoryMeter`, and after the error they are what
    they were before the operation, so that it can be caught and training can go on. On a CUDA device it is the
    allocator's own fraction. Within another limit the tighter one holds. ValueError for a limit that is not a positive
    number of bytes, is below what is live already, or is beyond the device.
    """
    num_bytes, where = parse_bytes(max_bytes), _checked_device(device)
    limit = _cpu_limit(num_bytes) if where.type == "cpu" else _cuda_limit(num_bytes, where)
    with limit:
        yield


def parse_bytes(text: int | str) -> int:
    """A number of bytes, at least 1, from a text such as "500MB"; a bare number is bytes.

    MB = 10**6 bytes, MiB = 2**20; parts of a byte are dropped. ValueError for anything else.

    >>> parse_bytes("6GB"), parse_bytes("1.5 GiB"), parse_bytes("4096")
    (6000000000, 1610612736, 4096)
    """
    if isinstance(text, int) and not isinstance(text, bool):
        num_bytes = text
    else:
        match = re.fullmatch(r"(-?\d+(?:\.\d+)?)\s*([A-Za-z]*)", text.strip()) if isinstance(text, str) else None
        unit = _unit(match.group(2)) if match else None
        if match is None or unit is None or (not match.group(2) and "." in match.group(1)):
            raise ValueError(
                f'{text!r} is not a number of bytes: write 500000000, "500MB", "6GB" or "1.5GiB" (KB, MB, GB, TB in '
                "steps of 1000; KiB, MiB, GiB, TiB in steps of 1024)"
            )
        num_bytes = int(Decimal(match.group(1)) * unit)
    if num_bytes < 1:
        raise ValueError(f"a memory size must be at least 1 byte, got {text!r}")
    return num_bytes


def _unit(name: str) -> int | None:
    """Bytes in a unit, whatever its case. A bare K, M, G or T is none: some read it as 1000, some as 1024."""
    return {unit.lower(): size for unit, size in UNITS.items()}.get(name.lower() or "b")


def known_device(device: torch.device | str) -> torch.device:
    """`device` as torch's value. ValueError for what torch does not know."""
    try:
        return torch.device(device)
    except (RuntimeError, TypeError):
        raise ValueError(f"device={given(device)} is no device of torch's: give 'cpu' or 'cuda'") from None


def _checked_device(device: Device) -> torch.device:
    checked = known_device("cpu" if device is None else device)
    if checked.type not in ("cpu", "cuda"):
        raise ValueError(f"memory is measured on cpu and cuda devices, got {checked}: leave device out for the CPU's")
    if checked.type == "cuda" and not torch.cuda.is_available():
        raise ValueError(
            f"device {checked} was asked for, and torch sees no CUDA device here: leave device out for the CPU's"
        )
    if checked.type == "cuda" and (checked.index or 0) >= torch.cuda.device_count():
        last = torch.cuda.device_count() - 1
        raise ValueError(
            f"device {checked} was asked for, and the last that torch sees is cuda:{last}: give that or less"
        )
    if checked.type == "cuda":
        torch.cuda.init()  # without it the allocator has no statistics yet
        checked = torch.device("cuda", torch.cuda.current_device() if checked.index is None else checked.index)
    return checked


def _check_limit(num_bytes: int, live: int, total: int | None, device: torch.device) -> None:
    if total is not None and num_bytes > total:
        raise ValueError(
            f"a limit of {format_bytes(num_bytes)} is beyond the device: {device} has {format_bytes(total)}, give at "
            "most that"
        )
    if num_bytes < live:
        raise ValueError(
            f"a limit of {format_bytes(num_bytes)} is below what is live on {device} already, {format_bytes(live)}: "
            "free tensors first, or give more"
        )


# ---------------------------------------------------------------------------------------------------------------------
# CPU


@contextmanager
def _cpu_limit(num_bytes: int) -> Iterator[None]:
    storages = LiveStorages(limit=num_bytes)
    for outer in _get_current_dispatch_mode_stack():  # an operation passes the outer limits too: the tighter one raises
        if isinstance(outer, LiveStorages) and outer.limit is not None:
            storages.adopt(outer)
    _check_limit(num_bytes, storages.live, physical_memory(), torch.device("cpu"))
    with storages:
        yield


def physical_memory() -> int | None:
    """Bytes of main memory of this machine; None where the system does not say."""
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (AttributeError, ValueError, OSError):
        return None


# ---------------------------------------------------------------------------------------------------------------------
# CUDA


class _CudaStatistics:
    """What the caching allocator says of a device, frozen at the end of the context."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._at_end: tuple[int, int] | None = None

    @property
    def live(self) -> int:
        return self._at_end[0] if self._at_end else torch.cuda.memory_allocated(self._device)

    @property
    def peak(self) -> int:
        return self._at_end[1] if self._at_end else torch.cuda.max_memory_allocated(self._device)

    def __enter__(self) -> None:
        torch.cuda.reset_peak_memory_stats(self._device)

    def __exit__(self, *_: object) -> None:
        self._at_end = self.live, self.peak


@contextmanager
def _cuda_limit(num_bytes: int, device: torch.device) -> Iterator[None]:
    total = torch.cuda.get_device_properties(device).total_memory
    _check_limit(num_bytes, torch.cuda.memory_allocated(device), total, device)
    previous = torch.cuda.get_per_process_memory_fraction(device)
    torch.cuda.set_per_process_memory_fraction(min(previous, num_bytes / total), device)
    try:
        yield
    finally:
        torch.cuda.set_per_process_memory_fraction(previous, device)
