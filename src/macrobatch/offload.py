"""What autograd saves for backward, in host memory instead of on the device, and how many bytes lie there.

On the CPU the host is the same memory, but what lies there is no tensor: the meter of `macrobatch.memory` counts what a
device would hold, and `Offload.peak` what its host would hold beside it.
"""

import ctypes
import weakref
from collections.abc import Iterable
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

SHARED = 2.0  # a storage at most this many times as large as the tensor that views it is moved whole, once


class Offload:
    """`hooks()` is a context in which saved tensors go to the host; `put` and `get` do the same by hand.

    `live`: bytes on the host now; `peak`: the most there were. `kept`: tensors that stay anyhow, such as parameters,
    buffers and inputs; views of them are not copied. Views of one storage share one copy of it. Storages of up to
    `small` bytes stay as well: moving them costs more than it saves.
    """

    def __init__(self, kept: Iterable[Tensor] = (), *, small: int = 2048) -> None:
        self._small = small
        self.live = 0
        self.peak = 0
        self._kept = {t.untyped_storage()._cdata for t in kept if t.layout is torch.strided and not _is_opaque(t)}
        self._copies: weakref.WeakValueDictionary[tuple[int, int], _HostStorage] = weakref.WeakValueDictionary()

    def hooks(self) -> torch.autograd.graph.saved_tensors_hooks:
        """A context, of one thread: what autograd saves in it lies on the host until backward asks for it."""
        return torch.autograd.graph.saved_tensors_hooks(self.put, self.get)

    def put(self, tensor: Tensor) -> Any:
        """A ticket for `tensor` as it is now, which keeps nothing of it on the device."""
        if isinstance(tensor, nn.Parameter):
            return tensor
        if _is_opaque(tensor) or tensor.layout is not torch.strided:
            return tensor.detach()  # not itself: saved for the node that made it, it would never be freed
        storage = tensor.untyped_storage()
        if storage._cdata in self._kept or storage.nbytes() <= self._small:
            return tensor.detach()
        if storage.nbytes() > SHARED * tensor.nbytes:
            tensor = tensor.detach().clone()
            return _View(self._moved(tensor.untyped_storage()), tensor)
        return _View(self._shared(tensor, storage), tensor)

    def get(self, ticket: Any) -> Tensor:
        """The tensor that was put, on its device."""
        return ticket.tensor() if isinstance(ticket, _View) else ticket

    def _shared(self, tensor: Tensor, storage: torch.UntypedStorage) -> "_HostStorage":
        if tensor.is_inference():
            return self._moved(storage)
        key = storage._cdata, tensor._version  # an address is another storage's only once this one is freed
        copy = self._copies.get(key)
        if copy is None or copy.source() is None:
            copy = self._copies[key] = self._moved(storage)
        return copy

    def _moved(self, storage: torch.UntypedStorage) -> "_HostStorage":
        copy = _HostStorage(storage)
        self.live += copy.num_bytes
        self.peak = max(self.peak, self.live)
        weakref.finalize(copy, self._freed, copy.num_bytes).atexit = False
        return copy

    def _freed(self, num_bytes: int) -> None:
        self.live -= num_bytes


class _HostStorage:
    """The bytes of a storage, on the host. `source()` is the storage that they came from, None once it is freed."""

    def __init__(self, storage: torch.UntypedStorage) -> None:
        self.source = weakref.ref(storage)
        self.num_bytes = storage.nbytes()
        self._device = storage.device
        self._on_host: np.ndarray[Any, np.dtype[np.uint8]] | Tensor
        if self._device.type == "cpu":
            self._on_host = np.empty(self.num_bytes, np.uint8)
            ctypes.memmove(self._on_host.ctypes.data, storage.data_ptr(), self.num_bytes)
        else:
            pinned = self._device.type == "cuda"
            self._on_host = torch.empty(self.num_bytes, dtype=torch.uint8, pin_memory=pinned)
            self._on_host.copy_(_bytes_of(storage), non_blocking=pinned)

    def storage(self) -> torch.UntypedStorage:
        """The same bytes in a new storage on the device."""
        storage = torch.UntypedStorage(self.num_bytes, device=self._device)
        if isinstance(self._on_host, Tensor):
            _bytes_of(storage).copy_(self._on_host, non_blocking=self._on_host.is_pinned())
        else:
            ctypes.memmove(storage.data_ptr(), self._on_host.ctypes.data, self.num_bytes)
        return storage


class _View:
    """How a tensor looks at a storage on the host."""

    def __init__(self, copy: _HostStorage, tensor: Tensor) -> None:
        self._copy = copy
        self._device, self._dtype = tensor.device, tensor.dtype
        self._view = tensor.storage_offset(), tensor.size(), tensor.stride()

    def tensor(self) -> Tensor:
        empty = torch.empty(0, dtype=self._dtype, device=self._device)
        return empty.set_(self._copy.storage(), *self._view)


def _bytes_of(storage: torch.UntypedStorage) -> Tensor:
    return torch.empty(0, dtype=torch.uint8, device=storage.device).set_(storage)


def _is_opaque(tensor: Tensor) -> bool:
    """Whether its numbers do not simply lie in its storage: a subclass, or with a conjugation or sign still to do."""
    return type(tensor) not in (Tensor, nn.Parameter, nn.Buffer) or tensor.is_conj() or tensor.is_neg()
