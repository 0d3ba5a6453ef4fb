"""What is live after each operation of a forward and backward, and what it would be with checkpointed blocks."""

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from macrobatch.prediction import Bytes
from macrobatch.storages import LiveStorages, storages_of
from macrobatch.structure import tensors


class Recorder(LiveStorages):
    """A meter that remembers `live` after each operation from `start` on, and what each block saves for backward.

    Counts as LiveStorages does. With `fake`, which makes a real tensor fake, it counts fake tensors instead, and real
    ones that an operation is given (a tensor the loss_fn knows from elsewhere) as if they were.
    """

    def __init__(
        self, device_type: str = "cpu", limit: int | None = None, fake: Callable[[Tensor], Tensor] | None = None
    ) -> None:
        super().__init__(limit, device_type if fake is None else "meta")
        self._fake = fake
        self.start()

    def __enter__(self) -> "Recorder":
        super().__enter__()
        return self

    def start(self) -> None:
        """The record is empty; what is live now is held throughout."""
        self._subtract_freed()
        self.held = self._touched
        self.saved = 0  # live beside `held` after the forward
        self._live: list[int] = []
        self._blocks: list[_Block] = []
        self._owners: dict[int, _Block] = {}  # by id of what counts a storage
        self._is_backward = False

    def start_backward(self) -> None:
        """From here on the first use of what a block saved is where checkpointing would recompute it."""
        self._is_backward = True
        self._subtract_freed()
        self.saved = self._touched - self.held

    def hold(self, values: Iterable[Tensor]) -> int:
        """`values` count from here on. Returns the bytes that this added."""
        before = self.live
        for value in values:
            value.detach()
        return self.live - before

    def watch(self, block: nn.Module) -> list[Any]:
        """From here on each forward of `block` is recorded as one. Returns handles to remove."""

        def before(*_: Any) -> None:
            if not self._is_backward:
                self._subtract_freed()
                self._blocks.append(_Block(len(self._live), self._touched, list(self._counted.values())))

        def after(_: nn.Module, __: Any, output: Any) -> None:
            if not self._is_backward:
                self._end_block(output)

        return [block.register_forward_pre_hook(before), block.register_forward_hook(after)]

    def live_since_start(self) -> Bytes:
        """Shape (operations,): what was live after each, beside what was held at the start."""
        return np.array(self._live, dtype=np.int64) - self.held

    def checkpointed(self, live: Bytes) -> Bytes | None:
        """`live` as it would be if each block kept its inputs and outputs only and ran its forward again in backward.

        Shape (operations + blocks,): the added ones are the peaks of these forwards. None without blocks, or if blocks
        save nothing.
        """
        blocks = [block for block in self._blocks if block.saved and block.stop is not None]
        if not blocks:
            return None
        result = live.copy()
        for block in blocks:
            result[block.stop : block.used] -= block.saved
        again = [self._again(block, live, result) for block in blocks]
        return np.concatenate([result, np.array(again, dtype=np.int64)])

    def _again(self, block: "_Block", live: Bytes, checkpointed: Bytes) -> int:
        """Live at most while `block` recomputes: what it added in its first forward, on top of what is live then."""
        forward = live[block.start : block.stop]
        added = int(forward.max(initial=0)) - int(live[block.start - 1] if block.start else 0)
        before = len(live) - 1 if block.used is None else block.used - 1
        return int(checkpointed[before]) + added

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.prim.device.default:  # two thirds of all calls: where a fake tensor lies is no operation
            return func(*args)
        if self._fake is not None and func is not torch.ops.aten.lift_fresh.default:  # which makes a constant fake
            args, kwargs = self._all_fake(args), {name: self._all_fake(value) for name, value in (kwargs or {}).items()}
        outputs = super().__torch_dispatch__(func, types, args, kwargs)
        self._live.append(self._touched)
        return outputs

    def _all_fake(self, value: Any) -> Any:
        if type(value) in (Tensor, nn.Parameter):
            return self._fake(value) if self._fake is not None else value
        if type(value) in (list, tuple):
            return type(value)(map(self._all_fake, value))
        return value

    def _see(self, storage: torch.UntypedStorage) -> None:
        super()._see(storage)
        if self._is_backward and self._owners:
            block = self._owners.get(id(self._counted.get(storage._cdata)))
            if block is not None and block.used is None:
                block.used = len(self._live)

    def _end_block(self, output: Any) -> None:
        block = next((block for block in reversed(self._blocks) if block.stop is None), None)
        if block is None:
            return
        self._subtract_freed()
        block.stop = len(self._live)
        kept = {storage._cdata for tensor in tensors(output) for storage in storages_of(tensor)}
        old = set(map(id, block.before))
        saved = [each for each in self._counted.values() if id(each) not in old and each.address not in kept]
        block.before = saved  # keeps their ids from being given to others
        block.saved = sum(each.num_bytes for each in saved)
        self._owners.update((id(each), block) for each in saved)


class _Block:
    """One forward of a block: operations `start` to `stop`, the bytes it saves, the operation that first uses them."""

    def __init__(self, start: int, live: int, before: list[Any]) -> None:
        self.start, self.before = start, before
        self.stop: int | None = None
        self.used: int | None = None
        self.saved = 0


def blocks_of(modules: Sequence[nn.Module]) -> list[nn.Module]:
    """The repeated layers of a model: the children, all of one class, of the list or sequence with most parameters."""
    candidates = [
        list(module.children())
        for root in modules
        for module in root.modules()
        if isinstance(module, nn.ModuleList | nn.Sequential) and _are_alike(list(module.children()))
    ]
    return max(candidates, key=_num_parameters, default=[])


def _are_alike(layers: list[nn.Module]) -> bool:
    has_own = all(next(layer.children(), None) is not None for layer in layers)  # a single Linear is no block
    return len(layers) > 1 and has_own and len({type(layer) for layer in layers}) == 1


def _num_parameters(layers: list[nn.Module]) -> int:
    return sum(p.numel() for layer in layers for p in layer.parameters())
