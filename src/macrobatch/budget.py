"""A budget in bytes: given, as a share of what the device has, or all that it has."""

import re
from collections.abc import Iterator
from pathlib import Path

import torch

from macrobatch.memory import known_device, parse_bytes, physical_memory
from macrobatch.storages import format_bytes

# Where a container's own limit and use stand: control groups, version 2 and 1.
CONTAINERS = (
    ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory.current"),
    ("/sys/fs/cgroup/memory/memory.limit_in_bytes", "/sys/fs/cgroup/memory/memory.usage_in_bytes"),
)


def budget_bytes(max_memory: int | str | None, device: torch.device, held: int = 0) -> int:
    """Bytes of `max_memory`: a number, "6GB", "80%" of what is available on `device`, or None for all of that.

    `held`: bytes that the model holds on the device already; they count as available. ValueError for what is not a
    size, and for more than the device has.
    """
    if max_memory is None:
        return available_memory(device, held)
    size = _parsed(max_memory)
    if isinstance(size, float):
        return int(available_memory(device, held) * size / 100)
    num_bytes, total = size, device_memory(device)
    if total is not None and num_bytes > total:
        raise ValueError(
            f"max_memory={format_bytes(num_bytes)} is beyond the device: {device} has {format_bytes(total)}, give at "
            "most that"
        )
    return num_bytes


def check_max_memory(max_memory: int | str | None) -> int | str | None:
    """`max_memory`, if it is a number of bytes, a share, or None. ValueError otherwise."""
    if max_memory is not None:
        _parsed(max_memory)
    return max_memory


def _parsed(max_memory: int | str) -> int | float:
    """Bytes, an integer, or a share in percent, a float."""
    share = re.fullmatch(r"\s*(-?\d+(?:\.\d+)?)\s*%\s*", max_memory) if isinstance(max_memory, str) else None
    if share is None:
        try:
            return parse_bytes(max_memory)
        except ValueError as error:
            raise ValueError(f'max_memory: {error}; or give a share of what the device has, "80%"') from None
    if not 0 < float(share.group(1)) <= 100:
        raise ValueError(f"max_memory={max_memory!r}: a share of what the device has is above 0% and at most 100%")
    return float(share.group(1))


def checked_device(device: torch.device | str) -> torch.device:
    """`device`, if plans can be made for it. ValueError otherwise."""
    checked = known_device(device)
    if checked.type not in ("cpu", "cuda"):
        raise ValueError(f"plans are made for cpu and cuda devices, got {checked}")
    if checked.type == "cuda" and not torch.cuda.is_available():
        raise ValueError(f"device {checked} was asked for, and torch sees no CUDA device here")
    if checked.type == "cuda" and checked.index is None:
        return torch.device("cuda", torch.cuda.current_device())
    return checked


def device_memory(device: torch.device) -> int | None:
    """Bytes that `device` has in all; None where the system does not say."""
    if device.type == "cuda":
        return int(torch.cuda.get_device_properties(device).total_memory)
    sizes = [size for size in (physical_memory(), *(limit for limit, _ in _container_limits())) if size is not None]
    return min(sizes, default=None)


def available_memory(device: torch.device, held: int = 0) -> int:
    """Bytes that training may use on `device` now: what is free, and what this model holds there."""
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        others = max(0, torch.cuda.memory_allocated(device) - held)
        return int(free) + torch.cuda.memory_reserved(device) - others
    sizes = [_system_available(), *(limit - used for limit, used in _container_limits())]
    known = [size for size in sizes if size is not None]
    if not known:
        raise ValueError("this system does not say how much memory is available: give max_memory in bytes")
    return max(0, min(known)) + held


def _system_available() -> int | None:
    try:
        text = Path("/proc/meminfo").read_text(encoding="ascii")
        kibibytes = re.search(r"^MemAvailable:\s+(\d+) kB", text, re.MULTILINE)
        return int(kibibytes.group(1)) * 1024 if kibibytes else physical_memory()
    except OSError:
        return physical_memory()


def _container_limits() -> Iterator[tuple[int, int]]:
    """(limit, used) in bytes of the container that this process runs in, if it has a limit."""
    for limit_path, used_path in CONTAINERS:
        try:
            limit, used = int(Path(limit_path).read_text()), int(Path(used_path).read_text())
        except (OSError, ValueError):  # no container, or "max"
            continue
        yield limit, used
