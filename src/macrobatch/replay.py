"""A forward run a second time as it was the first time: same random numbers, same buffers, nothing counted twice.

Cached gradients run each micro-batch's forward twice. Dropout must draw the same masks again, a layer that keeps
statistics must begin from the same ones, and yet count each sample once.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.modules.batchnorm import _NormBase

from macrobatch.state import SMALL, RandomState, Slot


@dataclass(eq=False)
class Beginning:
    """What a forward began from. `draws`: it drew random numbers.

    `buffers`: copies, by position of the slot; the same copy for modules that share a buffer, so that they go on to.
    """

    random: RandomState
    buffers: dict[int, Tensor | None]
    draws: bool = True


class Replay:
    """Remembers the beginnings of forwards, and runs forwards from them again.

    Small buffers and normalisation statistics are copied for each forward. Larger ones are copied for each forward once
    they were seen to change, by torch's count of changes: not through `.data`. Random numbers are torch's own, on the
    CPU and on `device`: neither numpy's, nor those of a torch.Generator.
    """

    def __init__(self) -> None:
        self._slots: list[Slot] = []
        self._device: torch.device | None = None
        self._changing: set[int] | None = None  # positions of larger buffers that change; None: not known yet
        self._last: RandomState | None = None

    def watch(self, slots: list[Slot], device: torch.device | None) -> None:
        """These are the buffers, from `state.buffer_slots`, and the device of the random numbers beside the CPU's."""
        if slots != self._slots:
            self._slots, self._changing = slots, None
        self._device, self._last = device, None

    @contextmanager
    def first(self) -> Iterator[Beginning]:
        """What the forward inside begins from is remembered."""
        before = self._now()
        copied = {i: b for i, (b, _) in enumerate(before) if b is not None and self._is_copied(i, b)}
        copies = {id(b): b.detach().clone() for b in {id(b): b for b in copied.values()}.values()}
        beginning = Beginning(self._random(), {i: copies[id(b)] for i, b in copied.items()})
        yield beginning
        changed = {i for i, (old, new) in enumerate(zip(before, self._now(), strict=True)) if _differ(old, new)}
        self._changing = (self._changing or set()) | {i for i in changed if not self._is_small(i, before[i][0])}
        for i, (buffer, _) in enumerate(before):
            if i in changed and buffer is None:
                beginning.buffers[i] = None
            elif i not in changed and not self._is_small(i, buffer):
                beginning.buffers.pop(i, None)
        beginning.draws = not beginning.random.is_present()

    @contextmanager
    def again(self, beginning: Beginning) -> Iterator[None]:
        """The forward inside begins from `beginning`; afterwards every buffer is the tensor that it was, untouched.

        The forward works on copies, so that no count of changes moves that some other graph may rely on.
        """
        beginning.random.restore()
        held = {i: self._slots[i][0]._buffers.get(self._slots[i][1]) for i in beginning.buffers}
        stand_ins = {id(copy): None if copy is None else copy.clone() for copy in beginning.buffers.values()}
        for i, copy in beginning.buffers.items():
            module, name = self._slots[i]
            module._buffers[name] = stand_ins[id(copy)]
        try:
            yield
        finally:
            for i, buffer in held.items():
                module, name = self._slots[i]
                module._buffers[name] = buffer

    def _is_copied(self, i: int, buffer: Tensor) -> bool:
        return self._changing is None or i in self._changing or self._is_small(i, buffer)

    def _is_small(self, i: int, buffer: Tensor | None) -> bool:
        return buffer is None or buffer.nbytes <= SMALL or isinstance(self._slots[i][0], _NormBase)

    def _now(self) -> list[tuple[Tensor | None, int]]:
        buffers = [module._buffers.get(name) for module, name in self._slots]
        return [(b, 0 if b is None or b.is_inference() else b._version) for b in buffers]

    def _random(self) -> RandomState:
        """The present random state; one object for as long as nothing is drawn."""
        if self._last is None or not self._last.is_present():
            self._last = RandomState(self._device)
        return self._last


def _differ(old: tuple[Tensor | None, int], new: tuple[Tensor | None, int]) -> bool:
    return old[0] is not new[0] or old[1] != new[1]
