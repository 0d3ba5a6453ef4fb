"""Random numbers and buffers as they were: what a micro-batch that failed must not leave changed."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase

from macrobatch.gradients import submodules

Slot = tuple[nn.Module, str]  # a module and the name of a buffer of it
SMALL = 2**20  # bytes: larger buffers (masks, position tables) are copied only once they were seen to change


class RandomState:
    """torch's random numbers on the CPU and, for a CUDA `device`, there; without a host sync."""

    def __init__(self, device: torch.device | None = None) -> None:
        self._cuda = device if device is not None and device.type == "cuda" else None
        self._cpu_state = torch.get_rng_state()
        self._cuda_state = None if self._cuda is None else torch.cuda.get_rng_state(self._cuda)

    def restore(self) -> None:
        """The next random numbers are those that followed when this was made."""
        torch.set_rng_state(self._cpu_state)
        if self._cuda is not None and self._cuda_state is not None:
            torch.cuda.set_rng_state(self._cuda_state, self._cuda)


class Moment:
    """Random numbers and buffers at one moment: `remember` it, as often as wanted, then `restore` the last one."""

    def __init__(self) -> None:
        self._buffers = Buffers()
        self._random: RandomState | None = None

    def watch(self, slots: list[Slot]) -> None:
        """These buffers are those to remember, from `buffer_slots`; called once for each window."""
        self._buffers.watch(slots)

    def remember(self, device: torch.device | None) -> None:
        """The present is what `restore` brings back."""
        self._random = RandomState(device)
        self._buffers.remember()

    def restore(self) -> None:
        """Random numbers and buffers are as when last remembered."""
        if self._random is not None:
            self._random.restore()
            self._buffers.restore()


class Buffers:
    """The buffers of modules, remembered again and again at little cost: copied are only those seen to change.

    Which ones change is seen in the first micro-batch (by content) and later (torch counts the changes of a tensor in
    `_version`, but not those that a normalisation layer makes to its statistics: those always count as changing). A
    buffer that is replaced by another tensor is put back as the tensor that it was.
    """

    def __init__(self) -> None:
        self._slots: list[Slot] = []
        self._held: list[tuple[Tensor, int]] = []  # each slot's tensor and its version, when remembered
        self._copies: dict[int, Tensor] = {}  # by position of the slot
        self._changing: set[int] | None = None  # positions; None until one micro-batch was seen

    def watch(self, slots: list[Slot]) -> None:
        """These buffers are those to remember."""
        if slots != self._slots:
            self._slots, self._copies, self._changing, self._held = slots, {}, None, []

    def remember(self) -> None:
        """What the buffers hold now is what `restore` brings back."""
        now = self._now()
        if not self._held:
            wanted = {i for i, (tensor, _) in enumerate(now) if tensor.nbytes <= SMALL}
        else:
            wanted = self._changing = self._seen_to_change(now)
        self._copies = {i: copy for i, copy in self._copies.items() if i in wanted}
        if self._copies:
            torch._foreach_copy_(list(self._copies.values()), [now[i][0] for i in self._copies])
        self._copies |= {i: now[i][0].clone() for i in wanted - set(self._copies)}
        self._held = now

    def _seen_to_change(self, now: list[tuple[Tensor, int]]) -> set[int]:
        pairs = enumerate(zip(self._held, now, strict=True))
        counted = {i for i, (old, new) in pairs if old[0] is not new[0] or old[1] != new[1]}
        statistics = {i for i, (module, _) in enumerate(self._slots) if isinstance(module, _NormBase)}
        if self._changing is None:
            counted |= {i for i, copy in self._copies.items() if not torch.equal(copy, now[i][0])}
        return counted | statistics | (self._changing or set())

    def restore(self) -> None:
        """Every buffer holds what it held when last remembered. RuntimeError for one that was too large to copy."""
        for i, (tensor, version) in enumerate(self._held):
            module, name = self._slots[i]
            module._buffers[name] = tensor
            if i in self._copies:
                with torch.no_grad():
                    tensor.copy_(self._copies[i])
            elif tensor._version != version:
                raise RuntimeError(
                    f"buffer {name!r} of {type(module).__name__}, {tensor.nbytes} bytes, was changed by a micro-batch "
                    "that ran out of memory, and had never changed before, so no copy was kept. Start with a smaller "
                    "micro_batch_size"
                )
        self._held = self._now()

    def _now(self) -> list[tuple[Tensor, int]]:
        buffers = [module._buffers[name] for module, name in self._slots]
        return [(b, b._version) for b in buffers if b is not None]


def buffer_slots(modules: Sequence[nn.Module]) -> list[Slot]:
    """Where the modules keep buffers at present."""
    slots = [(module, name) for module in submodules(modules) for name in module._buffers]
    return [(module, name) for module, name in slots if _is_countable(module._buffers[name])]


def _is_countable(buffer: Tensor | None) -> bool:
    return buffer is not None and not buffer.is_inference()
