"""Forwards of several micro-batches in lockstep: they meet at each batch normalisation, which then sees them all.

Each forward runs in a strand. Where it normalises over its batch it hands out its part's moments and waits; when every
forward has come to the same call, the moments are merged and each goes on, normalised with those of all. The graphs
hang together through the normalisations, so backward is one call on all losses, and exact. What a graph saves lies on
the host: on the device stand one micro-batch's work and what the waiting forwards hold.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any, Generic, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.overrides import TorchFunctionMode

from macrobatch.distributed import Ranks
from macrobatch.joint_norm import Arrive, Normalise, Part
from macrobatch.meeting import Instances, MeetingPlace
from macrobatch.modules import submodules
from macrobatch.norm_calls import (
    BatchNormCall,
    InstanceNormCall,
    RefuseHidden,
    norm_call,
    refuse_recomputed,
)
from macrobatch.offload import Offload
from macrobatch.strands import Meet, Strand, strands

T = TypeVar("T")


@dataclass(frozen=True)
class Together(Generic[T]):
    """What forwards in lockstep returned, in order.

    `chain`: shape (), hangs together with every meeting. Where some rank has no loss, it is a further root of backward
    on every rank, with a gradient of 0, so that all ranks take part in all sums.
    """

    results: list[T]
    chain: Tensor | None


def run_in_lockstep(
    forwards: Sequence[Callable[[], T]],
    modules: Sequence[nn.Module],
    *,
    ranks: Ranks | None = None,
    offload: Offload | None = None,
    look_closely: bool = True,
) -> Together[T]:
    """What the forwards return, as if each batch normalisation in them had seen all of their samples at once.

    The forwards run in turns, each in a thread of its own with torch's settings of this one; afterwards no thread is
    alive. Running statistics are updated once for each call. Run backward once, on all results together.

    `modules`: where the layers are. `ranks`: over which statistics are summed, too; a SyncBatchNorm has its own group.
    `offload`: where saved tensors go. `look_closely` also finds normalisations that are called past torch's Python
    functions; it costs some microseconds for each operation.

    ValueError where forwards take different ways, for a single value per channel, for a checkpointed normalisation,
    and for a function that normalises over a batch and cannot be taken part in.
    """
    place = MeetingPlace(modules, ranks or Ranks(None))
    functions = [partial(_take_part, forward, place, offload, look_closely) for forward in forwards]
    with torch.compiler.set_stance("force_eager"), _sync_layers(modules, place), strands(functions) as parties:
        answers: Sequence[Any] = [None] * len(parties)
        while True:
            for party, answer in zip(parties, answers, strict=True):
                party.advance(answer)
            if all(party.has_ended for party in parties):
                place.is_over = True
                return Together([party.result for party in parties], place.chain)  # type: ignore[misc]
            answers = place.hold([_request(party) for party in parties])


def _request(party: Strand[Any]) -> Any:
    request, party.request = (None if party.has_ended else party.request), None
    return request


def _take_part(
    forward: Callable[[], T], place: MeetingPlace, offload: Offload | None, look_closely: bool, meet: Meet
) -> T:
    hidden = RefuseHidden() if look_closely else None
    with (
        nullcontext() if offload is None else offload.hooks(),
        nullcontext() if hidden is None else hidden,
        TakePart(place, offload, hidden, meet),
    ):
        try:
            return forward()
        except RuntimeError:
            if hidden is not None and hidden.refused is not None:
                raise ValueError(hidden.refused) from None
            raise


class TakePart(TorchFunctionMode):
    """Within the context a normalisation over the batch is computed together with the other forwards."""

    def __init__(self, place: MeetingPlace, offload: Offload | None, hidden: RefuseHidden | None, meet: Meet) -> None:
        self._place, self._hidden, self._meet = place, hidden, meet
        self._put: Callable[[Tensor], Any] = torch.Tensor.detach if offload is None else offload.put
        self._get: Callable[[Any], Tensor] = _same if offload is None else offload.get

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Take part in what couples samples, make every other call as it is."""
        call = norm_call(func, args, kwargs or {})
        if call is None:
            return func(*args, **(kwargs or {}))
        refuse_recomputed()
        return self._batch_norm(call) if isinstance(call, BatchNormCall) else self._instance_norm(call)

    def _batch_norm(self, call: BatchNormCall) -> Tensor:
        part = Part(call.x, self._put, self._get)
        token = Arrive.apply(call.x, call.weight, part)  # type: ignore[no-untyped-call]
        token = self._meet(self._place.arrival(call, part, token))
        return Normalise.apply(token, call.weight, call.bias, call.x.detach(), part)  # type: ignore[no-any-return,no-untyped-call]

    def _instance_norm(self, call: InstanceNormCall) -> Tensor:
        if self._hidden is not None:
            self._hidden.allowed = True
        try:
            y = nn.functional.instance_norm(call.x, None, None, call.weight, call.bias, True, 0.0, call.eps)
        finally:
            if self._hidden is not None:
                self._hidden.allowed = False
        self._meet(Instances.of(call))
        return y


def _same(tensor: Any) -> Tensor:
    return tensor  # type: ignore[no-any-return]


@contextmanager
def _sync_layers(modules: Sequence[nn.Module], place: MeetingPlace) -> Iterator[None]:
    """Within the context a SyncBatchNorm calls F.batch_norm, as other layers do, and its process group is known."""
    layers = [m for m in submodules(modules) if isinstance(m, nn.SyncBatchNorm)]
    before = [(layer, layer.__dict__.get("forward")) for layer in layers]

    def forward(layer: nn.SyncBatchNorm, x: Tensor) -> Tensor:
        group = layer.process_group or (dist.group.WORLD if dist.is_available() and dist.is_initialized() else None)
        place.next_ranks = Ranks(group)
        try:
            return _BatchNorm.forward(layer, x)
        finally:
            place.next_ranks = None

    try:
        for layer in layers:
            layer.forward = partial(forward, layer)  # type: ignore[method-assign]
        yield
    finally:
        for layer, own in before:
            if own is None:
                del layer.forward
            else:
                layer.forward = own  # type: ignore[method-assign]
