"""Random numbers and buffers as they were: what a micro-batch that failed must not leave changed."""

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm, _NormBase
from torch.nn.parameter import is_lazy

from macrobatch.devices import is_cuda
from macrobatch.modules import submodules

Slot = tuple[nn.Module, str]  # a module and the name of a buffer of it
SMALL = 2**16  # bytes: larger buffers are copied only once they were seen to change


class RandomState:
    """torch's random numbers on the CPU and, for a CUDA `device`, there; without a host sync."""

    def __init__(self, device: torch.device | None = None) -> None:
        self._cuda = device if device is not None and is_cuda(device) else None
        self._cpu_state = torch.default_generator.get_state()
        self._cuda_state = None if self._cuda is None else torch.cuda.get_rng_state(self._cuda)

    def is_present(self) -> bool:
        """Whether the next random numbers are those that followed when this was made."""
        if not torch.equal(self._cpu_state, torch.default_generator.get_state()):
            return False
        if self._cuda is None or self._cuda_state is None:
            return True
        return torch.equal(self._cuda_state, torch.cuda.get_rng_state(self._cuda))

    def restore(self) -> None:
        """The next random numbers are those that followed when this was made."""
        torch.set_rng_state(self._cpu_state)
        if self._cuda is not None and self._cuda_state is not None:
            torch.cuda.set_rng_state(self._cuda_state, self._cuda)


class Beginnings:
    """Where a window and its present micro-batch began: random numbers and buffers, to return to.

    Random numbers take 5 kB for each micro-batch. A forward that draws none leaves them as the window found them, so
    once a window was seen to draw none (`learn`) they are remembered for windows only.

    What a loader draws while the window fills belongs to samples that are kept: behind that random numbers do not go
    back, or other samples would be drawn from the same ones again.
    """

    def __init__(self) -> None:
        self._window, self._micro_batch = Buffers(), Buffers()
        self._window_random: RandomState | None = None
        self._micro_batch_random: RandomState | None = None
        self._device: torch.device | None = None
        self._draws = True
        self._fills = False

    def window(self, slots: list[Slot], device: torch.device | None, fills: bool = False) -> None:
        """A window begins here; its buffers are those of `slots`, from `buffer_slots`. `fills`: while it runs."""
        self._device, self._fills = device, fills
        self._window_random, self._micro_batch_random = RandomState(device), None
        self._window.watch(slots)
        self._micro_batch.watch(slots)
        if slots:
            self._window.remember()

    def micro_batch(self) -> None:
        """A micro-batch begins here."""
        if self._draws:
            self._micro_batch_random = RandomState(self._device)
        if self._micro_batch.slots:
            self._micro_batch.remember()

    def learn(self) -> None:
        """The window is at its end: whether it drew random numbers is known for those that follow."""
        self._draws = self._window_random is None or not self._window_random.is_present()

    def return_to_micro_batch(self) -> bool:
        """All is as where the micro-batch began; False if random numbers were drawn against expectation."""
        if self._micro_batch_random is not None:
            self._micro_batch_random.restore()
        elif self._window_random is not None and not self._window_random.is_present():
            self._draws = True
            return False
        self._micro_batch.restore()
        return True

    def return_to_window(self) -> None:
        """Buffers are as where the window began; random numbers too, unless it fills while it runs."""
        if self._window_random is not None and not self._fills:
            self._window_random.restore()
        self._window.restore()


class Buffers:
    """The buffers of modules, remembered again and again at little cost.

    Small ones are always copied. Larger ones (masks, position tables) only if they were seen to change: torch counts
    the changes of a tensor in `_version`, but neither those that a normalisation layer makes to its statistics, which
    are always copied, nor those through `.data`, which are not seen. A buffer that is replaced, set to None or deleted
    is put back as the tensor that it was.
    """

    def __init__(self) -> None:
        self.slots: list[Slot] = []
        self._held: list[tuple[Tensor | None, int | None]] = []  # each slot's tensor and its version, when remembered
        self._copies: dict[int, Tensor] = {}  # by position of the slot
        self._changing: set[int] = set()  # positions of larger ones that were seen to change

    def watch(self, slots: list[Slot]) -> None:
        """These buffers are those to remember."""
        if slots != self.slots:
            self.slots, self._copies, self._changing, self._held = slots, {}, set(), []

    def remember(self) -> None:
        """What the buffers hold now is what `restore` brings back."""
        now = self._now()
        if self._held:
            pairs = enumerate(zip(self._held, now, strict=True))
            self._changing |= {i for i, (old, new) in pairs if old[0] is not new[0] or old[1] != new[1]}
        copied = {i: tensor for i, (tensor, _) in enumerate(now) if tensor is not None and self._is_copied(i, tensor)}
        reused = [i for i, tensor in copied.items() if _are_alike(self._copies.get(i), tensor)]
        if reused:
            torch._foreach_copy_([self._copies[i] for i in reused], [copied[i].detach() for i in reused])
        old, self._copies = self._copies, {}
        for i, tensor in copied.items():
            self._copies[i] = old[i] if _are_alike(old.get(i), tensor) else tensor.detach().clone()
        self._held = now

    def _is_copied(self, i: int, tensor: Tensor) -> bool:
        if not _is_countable(tensor):
            return False
        return tensor.nbytes <= SMALL or i in self._changing or isinstance(self.slots[i][0], _NormBase)

    def restore(self) -> None:
        """Every buffer holds what it held when last remembered. RuntimeError for one that was too large to copy."""
        for i, (tensor, version) in enumerate(self._held):
            module, name = self.slots[i]
            module._buffers[name] = tensor
            if tensor is None or not _is_countable(tensor):
                continue
            if version is None:  # it had no values yet
                _make_anew(module, name)
            elif i in self._copies:
                with torch.no_grad():
                    tensor.copy_(self._copies[i])
            elif tensor._version != version:
                raise RuntimeError(
                    f"buffer {name!r} of {type(module).__name__}, {tensor.nbytes} bytes, was changed by a micro-batch "
                    "that ran out of memory, and had never changed before, so no copy was kept. Start with a smaller "
                    "micro_batch_size"
                )

    def _now(self) -> list[tuple[Tensor | None, int | None]]:
        buffers = [module._buffers.get(name) for module, name in self.slots]
        return [(b, b._version if b is not None and _is_countable(b) else None) for b in buffers]


def _make_anew(module: nn.Module, name: str) -> None:
    """A lazy layer's buffer is as its first forward makes it. RuntimeError where it is not known how."""
    if not isinstance(module, _NormBase):
        raise RuntimeError(
            f"buffer {name!r} of {type(module).__name__} got its shape in a micro-batch that ran out of memory, so "
            "there is nothing to return to. Run the model once on a small batch before training"
        )
    module.reset_running_stats()


def buffer_slots(modules: Sequence[nn.Module]) -> list[Slot]:
    """Where the modules, and those below, keep buffers at present."""
    return buffer_slots_of(submodules(modules))


def buffer_slots_of(walked: Iterable[nn.Module]) -> list[Slot]:
    """Where these modules themselves keep buffers at present."""
    return [(module, name) for module in walked for name in module._buffers]


def coupled_layer(modules: Sequence[nn.Module]) -> nn.Module | None:
    """A layer that normalises over the batch it sees (BatchNorm in train mode), if there is one."""
    return next((m for m in submodules(modules) if isinstance(m, _BatchNorm) and m.training), None)


def _is_countable(buffer: Tensor) -> bool:
    return not is_lazy(buffer) and not buffer.is_inference()


def _are_alike(copy: Tensor | None, tensor: Tensor) -> bool:
    return copy is not None and (copy.shape, copy.dtype, copy.device) == (tensor.shape, tensor.dtype, tensor.device)
