"""Bytes of live tensor storage on the CPU: counted around every operation, refused where they would pass a limit."""

import weakref
from collections import deque
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode, is_traceable_wrapper_subclass


class LiveStorages(TorchDispatchMode):
    """Within the context `live` is the bytes of storage that this thread's operations have touched, `peak` its maximum.

    A storage counts whole and once, however many tensors view it, from the first operation that touches it until it is
    freed. An operation that would make `live` larger than `limit` bytes raises torch.OutOfMemoryError: its outputs are
    released and `live` is what it was. `device_type`: where a storage must lie to count; "meta" counts fake tensors.
    An instance is entered once; another thread may read it.
    """

    supports_higher_order_operators = True  # torch.cond and the like count as one operation

    def __init__(self, limit: int | None = None, device_type: str = "cpu") -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.limit = limit
        self.peak = 0
        self._device_type = device_type
        self._touched = 0  # bytes of what stands in _counted or still in _freed
        self._counted: dict[int, _Counted] = {}  # by address of the storage, in the order of the first touch
        self._freed: deque[_Counted] = deque()  # whichever thread frees a storage appends; only operations take out
        self._resized: list[tuple[_Counted, int]] = []  # by the present operation, with the bytes before

    @property
    def live(self) -> int:
        """Bytes of storage alive now; after the context, what they were at its end."""
        return self._touched - sum(counted.num_bytes for counted in tuple(self._freed))

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Count what goes in, run the operation, count what comes out. torch.OutOfMemoryError past the limit.

        The error's traceback holds this frame: before it is raised the frame lets go of every tensor.
        """
        kwargs = kwargs or {}
        self._subtract_freed()
        before, num_known = self._touched, len(self._counted)
        self._count(args)
        self._count(kwargs.values())
        needed = self._touched - before
        if self._touched > self.peak and self._passes_limit():
            del args, kwargs
            self._forget_latest(len(self._counted) - num_known)
            raise self._out_of_memory(func, needed)

        self._resized.clear()
        before = self._touched
        outputs = func(*args, **kwargs)
        self._subtract_freed()
        self._count((outputs,))
        needed = self._touched - before
        if self._touched > self.peak and self._passes_limit():
            del args, kwargs, outputs
            self._shrink_resized()
            self._subtract_freed()
            raise self._out_of_memory(func, needed)
        return outputs

    def __enter__(self) -> "LiveStorages":
        """Count from here on. Compiled functions run uncompiled: what they allocate is no operation that could be seen.

        Left to itself torch runs a compiled function uncompiled under a mode, too, but then for good.
        """
        self._uncompiled = torch.compiler.set_stance("force_eager")
        super().__enter__()  # type: ignore[no-untyped-call]
        return self

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        """False: no wrapper of torch.compile around each operation: it costs 1 us and holds tensors in tracebacks."""
        return False

    def __exit__(self, *error: Any) -> None:
        """Forget every storage; `live` and `peak` stay readable."""
        super().__exit__(*error)  # type: ignore[no-untyped-call]
        self._uncompiled.__exit__(None, None, None)
        self._subtract_freed()
        self._counted.clear()

    def adopt(self, other: "LiveStorages") -> None:
        """What `other` counts, counts here too."""
        for counted in list(other._counted.values()):
            storage = counted()
            if storage is not None:
                self._see(storage)
        self.peak = self._touched

    def _count(self, values: Iterable[Any]) -> None:
        for value in values:
            if isinstance(value, Tensor):
                for storage in storages_of(value):
                    self._see(storage)
            elif isinstance(value, (list, tuple)):
                self._count(value)

    def _see(self, storage: torch.UntypedStorage) -> None:
        counted = self._counted.get(storage._cdata)
        if counted is None:
            if storage.device.type == self._device_type:
                counted = _Counted(storage, self._freed.append)
                counted.address, counted.num_bytes = storage._cdata, storage.nbytes()
                self._counted[counted.address] = counted
                self._touched += counted.num_bytes
        elif counted.num_bytes != storage.nbytes():
            self._resized.append((counted, counted.num_bytes))
            self._set_size(counted, storage.nbytes())

    def _set_size(self, counted: "_Counted", num_bytes: int) -> None:
        self._touched += num_bytes - counted.num_bytes
        counted.num_bytes = num_bytes

    def _subtract_freed(self) -> None:
        while self._freed:
            counted = self._freed.popleft()
            self._touched -= counted.num_bytes
            if self._counted.get(counted.address) is counted:
                del self._counted[counted.address]

    def _passes_limit(self) -> bool:
        """Whether `live`, which has passed the peak, passes the limit too. If not it is the new peak."""
        for counted in list(self._counted.values()):  # storage.resize_ is no operation: what it shrank shows only here
            storage = counted()
            if storage is not None and storage.nbytes() != counted.num_bytes:
                self._set_size(counted, storage.nbytes())
        if self.limit is not None and self._touched > self.limit:
            return True
        self.peak = max(self.peak, self._touched)
        return False

    def _forget_latest(self, num_storages: int) -> None:
        for _ in range(num_storages):
            _, counted = self._counted.popitem()
            self._touched -= counted.num_bytes

    def _shrink_resized(self) -> None:
        """As on a device: after a failed resize_ the tensor has its new shape, and its storage the old size."""
        for counted, before in self._resized:
            storage = counted()
            if storage is not None and before < counted.num_bytes:
                storage.resize_(before)
                self._set_size(counted, before)

    def _out_of_memory(self, func: Any, needed: int) -> torch.OutOfMemoryError:
        limit, live = self.limit or 0, self._touched
        return torch.OutOfMemoryError(
            f"memory_limit: out of memory. {func} needed {format_bytes(needed)} more; {format_bytes(live)} are live, "
            f"so {format_bytes(limit - live)} of the limit of {format_bytes(limit)} are free. Use a smaller "
            "micro_batch_size, recompute activations (torch.utils.checkpoint), or raise the limit"
        )


class _Counted(weakref.ref[torch.UntypedStorage]):
    """A storage, weakly, with the size it counts for."""

    __slots__ = ("address", "num_bytes")
    address: int
    num_bytes: int


def storages_of(tensor: Tensor) -> tuple[torch.UntypedStorage, ...]:
    """The storages that hold the numbers of `tensor`: one, or several if it is sparse or a subclass made of tensors."""
    if type(tensor) not in (Tensor, nn.Parameter) and is_traceable_wrapper_subclass(tensor):
        inner = (getattr(tensor, name) for name in tensor.__tensor_flatten__()[0])
        parts = [part for part in inner if isinstance(part, Tensor)]
    elif tensor.layout is torch.strided:
        return (tensor.untyped_storage(),)
    elif tensor.layout is torch.sparse_coo:
        parts = [tensor._indices(), tensor._values()]
    elif tensor.layout in (torch.sparse_csr, torch.sparse_bsr):
        parts = [tensor.crow_indices(), tensor.col_indices(), tensor.values()]
    elif tensor.layout in (torch.sparse_csc, torch.sparse_bsc):
        parts = [tensor.ccol_indices(), tensor.row_indices(), tensor.values()]
    else:
        parts = []  # opaque to torch itself, such as oneDNN's own layout
    return tuple(storage for part in parts for storage in storages_of(part))


def format_bytes(num_bytes: int) -> str:
    """`num_bytes` for people, in units of 1000 as disks and GPUs are sold.

    >>> format_bytes(999), format_bytes(1_500_000), format_bytes(6_000_000_000)
    ('999 B', '1.50 MB', '6.00 GB')
    """
    for unit, size in (("TB", 10**12), ("GB", 10**9), ("MB", 10**6), ("kB", 10**3)):
        if abs(num_bytes) >= size:
            return f"{num_bytes / size:.2f} {unit}"
    return f"{num_bytes} B"
