"""Micro-batches on the device of the model, the next one travelling while the present one computes."""

from collections.abc import Iterable, Iterator, Sequence
from functools import cache

import torch
from torch import Tensor, nn

from macrobatch.structure import Nested, map_tensors, tensors

CPU = torch.device("cpu")  # to compare with: a device that is asked for its `type` writes a text, which takes long


def device_of(parameters: Sequence[nn.Parameter]) -> torch.device | None:
    """The device that all parameters share, None if they are spread over several. ValueError on the meta device."""
    if not parameters:
        return None
    first, shared = parameters[0].device, True
    for p in parameters:
        if p.device != first:
            shared = False
            break
    if parameters[0].is_meta if shared else any(p.is_meta for p in parameters):
        raise ValueError(
            "the model has parameters on the meta device, which hold no numbers: call model.to_empty(device=...) and "
            "load or initialise its weights first"
        )
    return first if shared else None


def is_cuda(device: torch.device) -> bool:
    """Whether it is a CUDA device, answered fast for the CPU."""
    return device != CPU and device.type == "cuda"


def on_device(
    micro_batches: Iterable[tuple[Nested, int]], device: torch.device | None
) -> Iterator[tuple[Nested, int, bool]]:
    """(micro-batch on `device`, its samples, whether it is the last) from (micro-batch, its samples), one read ahead.

    Pinned micro-batches travel to a CUDA device on a stream of their own. With `device` None they stay where they are.
    """
    transfer = _Transfer(device)
    ahead: tuple[Nested, torch.cuda.Event | None, int] | None = None  # with that yielded two are there
    for micro_batch, num_samples in micro_batches:
        copied = None
        if device is not None and not _is_on(micro_batch, device):
            micro_batch, copied = transfer.start(micro_batch)
        arriving, ahead = ahead, (micro_batch, copied, num_samples)
        del micro_batch  # or the source would keep it alive
        if arriving is not None:
            yield transfer.arrived(arriving), arriving[2], False
            del arriving
    if ahead is not None:
        yield transfer.arrived(ahead), ahead[2], True


def _is_on(node: Nested, device: torch.device) -> bool:
    """Whether all tensors of `node` are there; asked for every micro-batch, so the common leaf comes first."""
    leaves = node if type(node) is tuple else (node,)
    for leaf in leaves:  # a loop: a generator costs more than what it would ask
        if leaf.device != device if type(leaf) is Tensor else any(t.device != device for t in tensors(leaf)):
            return False
    return True


def _side_stream(device: torch.device) -> torch.cuda.Stream:
    return _stream_of(torch.cuda.current_device() if device.index is None else device.index)


@cache
def _stream_of(index: int) -> torch.cuda.Stream:
    """One for each device: what was copied on a stream, the allocator keeps for that stream when it is free again."""
    return torch.cuda.Stream(index)


class _Transfer:
    """Copies to a device; from pinned memory to CUDA on a side stream, so that they overlap with computing."""

    def __init__(self, device: torch.device | None) -> None:
        self._device = device
        self._stream = _side_stream(device) if device is not None and is_cuda(device) else None

    def start(self, micro_batch: Nested) -> tuple[Nested, torch.cuda.Event | None]:
        device, stream = self._device, self._stream
        if stream is None:
            return map_tensors(micro_batch, lambda leaf: leaf.to(device)), None

        def copy(leaf: Tensor) -> Tensor:
            if leaf.device.type != "cpu" or not leaf.is_pinned():
                return leaf.to(device)  # what another stream may still be writing must not be read from a side stream
            with torch.cuda.stream(stream):
                return leaf.to(device, non_blocking=True)

        copies = map_tensors(micro_batch, copy)
        return copies, stream.record_event()

    def arrived(self, arriving: tuple[Nested, torch.cuda.Event | None, int]) -> Nested:
        micro_batch, copied, _ = arriving
        if copied is not None:
            current = torch.cuda.current_stream(self._device)
            current.wait_event(copied)
            for leaf in tensors(micro_batch):
                leaf.record_stream(current)  # its memory belongs to the side stream's pool
        return micro_batch
