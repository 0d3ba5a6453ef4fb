"""The state of a training run at one moment, bit for bit: taken, and put back in place."""

from collections import OrderedDict
from collections.abc import Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.amp.grad_scaler import GradScaler
from torch.nn.modules.batchnorm import _NormBase
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from macrobatch.state import SMALL, Slot, buffer_slots

Snapshot = dict[str, Any]  # tensors and plain Python: torch.load(weights_only=True) reads it


class Stateful(Protocol):
    """Anything with torch's pair of methods."""

    def state_dict(self) -> Any:
        """What it remembers."""

    def load_state_dict(self, state_dict: Any, /) -> Any:
        """It remembers this."""


@dataclass(frozen=True)
class Run:
    """What a training run consists of. Parameters are those of the optimizers, buffers those of the modules."""

    modules: Sequence[nn.Module]
    optimizers: Sequence[Optimizer]
    schedulers: Sequence[LRScheduler] = ()
    scaler: GradScaler | None = None
    stateful: Sequence[Stateful] = ()

    @property
    def parameters(self) -> list[nn.Parameter]:
        """Each parameter that the optimizers train, once, in their order."""
        groups = [group for optimizer in self.optimizers for group in optimizer.param_groups]
        return list({id(p): p for group in groups for p in group["params"]}.values())

    @property
    def with_state(self) -> list[Stateful]:
        """What is saved by its own pair of methods: schedulers, scaler and the rest, in this order."""
        return [*self.schedulers, *([] if self.scaler is None else [self.scaler]), *self.stateful]

    @property
    def devices(self) -> list[torch.device]:
        """Where its parameters are."""
        return sorted({p.device for p in self.parameters}, key=str)


def capture(run: Run, device: torch.device | str | None = None, *, forward: "BeforeWindow | None" = None) -> Snapshot:
    """A copy of everything that the run may change, on `device`, or where each tensor is; nothing has changed.

    Buffers and random numbers are those before the window at hand if `forward` remembers them.
    """
    return {
        "parameters": [copied(p, device) for p in run.parameters],
        "optimizers": [_optimizer_state(optimizer, device) for optimizer in run.optimizers],
        "stateful": [copied(each.state_dict(), device) for each in run.with_state],
        **(capture_forward(run, device) if forward is None else copied(forward.snapshot(), device)),
    }


def restore(run: Run, snapshot: Snapshot, *, random_numbers: bool = True) -> None:
    """The run is as it was when captured: tensors are filled in place, so whatever refers to them sees it.

    Without `random_numbers` torch's random numbers go on.
    ValueError, with nothing changed, if parameters or buffers were added, taken away or reshaped since.
    """
    parameters = run.parameters
    slots = buffer_slots(run.modules)
    shapes = [p.shape for p in parameters], len(slots)
    kept = [p.shape for p in snapshot["parameters"]], len(snapshot["buffers"])
    if shapes != kept:
        raise ValueError(
            f"the snapshot holds {len(kept[0])} parameters and {kept[1]} buffers, the run now has {len(shapes[0])} and "
            f"{shapes[1]}, or other shapes: take a new snapshot after changing the model"
        )
    for p, values in zip(parameters, snapshot["parameters"], strict=True):
        _placed(p, values, p.device)
    for optimizer, state in zip(run.optimizers, snapshot["optimizers"], strict=True):
        _restore_optimizer(optimizer, state)
    for each, state in zip(run.with_state, snapshot["stateful"], strict=True):
        each.load_state_dict(copied(state))
    restore_forward(run, snapshot, random_numbers=random_numbers)


def capture_forward(run: Run, device: torch.device | str | None = None) -> Snapshot:
    """What a forward changes: buffers, and torch's random numbers on the CPU and where the parameters are."""
    buffers = [module._buffers[name] for module, name in buffer_slots(run.modules)]
    return {"buffers": [copied(b, device) for b in buffers], "random": _random_numbers(run)}


def restore_forward(run: Run, snapshot: Snapshot, *, random_numbers: bool = True) -> None:
    """Buffers are as when captured, and random numbers, unless those are to go on."""
    for slot, values in zip(buffer_slots(run.modules), snapshot["buffers"], strict=True):
        _put_buffer(slot, values, run.devices[0])
    for device, state in snapshot["random"].items() if random_numbers else ():
        if device == "cpu":
            torch.set_rng_state(state.cpu())
        else:
            torch.cuda.set_rng_state(state.cpu(), device)


class BeforeWindow:
    """Buffers and random numbers before the window at hand, which has changed them: `remember` after each window.

    A buffer above 64 KiB is copied again only when torch counted a change of it, so that masks cost nothing.
    """

    def __init__(self, run: Run) -> None:
        self._run = run
        self._copies: dict[Slot, tuple[Tensor, Tensor, int]] = {}  # a buffer, its copy, and its version then
        self.remember()
        self._unseen: list[int] | None = _versions(run)  # until the first window: something may yet be loaded

    def remember(self) -> None:
        """The present is what `restore` and `snapshot` bring back."""
        slots = buffer_slots(self._run.modules)
        buffers = {slot: b for slot in slots if (b := slot[0]._buffers[slot[1]]) is not None}
        self._copies = {slot: _followed(slot, b, self._copies.get(slot)) for slot, b in buffers.items()}
        self._slots, self._random = slots, _random_numbers(self._run)
        self._unseen = None

    @property
    def is_outdated(self) -> bool:
        """Whether parameters changed before the first window, as by loading a checkpoint."""
        return self._unseen is not None and self._unseen != _versions(self._run)

    def snapshot(self) -> Snapshot:
        """What `capture_forward` would have given then, as views: copy it to keep it."""
        copies = [self._copies[slot][1] if slot in self._copies else None for slot in self._slots]
        return {"buffers": copies, "random": self._random}

    def restore(self, *, random_numbers: bool = True) -> None:
        """Buffers and, if asked for, random numbers are as then; nothing happens if it is outdated."""
        if not self.is_outdated and self._slots == buffer_slots(self._run.modules):
            restore_forward(self._run, self.snapshot(), random_numbers=random_numbers)


def copied(value: Any, device: torch.device | str | None = None) -> Any:
    """A deep copy, tensors on `device`; a scalar stays where it is, as optimizers keep their counts on the CPU."""
    if isinstance(value, Tensor):
        copy = value.detach().clone()
        return copy if device is None or not copy.dim() else copy.to(device)
    if type(value) in (dict, OrderedDict):
        return type(value)((key, copied(each, device)) for key, each in value.items())
    if type(value) in (list, tuple):
        return type(value)(copied(each, device) for each in value)
    return deepcopy(value)


def _optimizer_state(optimizer: Optimizer, device: torch.device | str | None) -> Snapshot:
    if type(optimizer).state_dict is not Optimizer.state_dict:  # it keeps its state elsewhere
        return {"own": copied(optimizer.state_dict(), device)}
    groups = [{key: value for key, value in g.items() if key != "params"} for g in optimizer.param_groups]
    states = [optimizer.state.get(p, {}) for g in optimizer.param_groups for p in g["params"]]
    return {"groups": copied(groups), "states": [copied(dict(state), device) for state in states]}


def _restore_optimizer(optimizer: Optimizer, saved: Snapshot) -> None:
    if "own" in saved:
        optimizer.load_state_dict(copied(saved["own"]))
        return
    for group, options in zip(optimizer.param_groups, saved["groups"], strict=True):
        _put_entries(group, options, None, spared="params")
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    for p, state in zip(parameters, saved["states"], strict=True):
        if state:
            _put_entries(optimizer.state[p], state, p.device)
        else:
            optimizer.state.pop(p, None)


def _put_entries(
    current: dict[str, Any], saved: Mapping[str, Any], device: torch.device | None, spared: str | None = None
) -> None:
    for key in current.keys() - saved.keys() - {spared}:
        del current[key]
    for key, value in saved.items():
        current[key] = _placed(current.get(key), value, device)


def _placed(current: Any, saved: Any, device: torch.device | None) -> Any:
    """`saved` as a copy; in the tensor `current` itself where that fits."""
    if isinstance(saved, Tensor):
        if isinstance(current, Tensor) and (current.shape, current.dtype) == (saved.shape, saved.dtype):
            with torch.no_grad():
                current.detach().copy_(saved)
            return current
        return saved.to(device, copy=True) if saved.dim() else saved.clone()
    return copied(saved)


def _put_buffer(slot: Slot, saved: Tensor | None, device: torch.device) -> None:
    module, name = slot
    module._buffers[name] = None if saved is None else _placed(module._buffers[name], saved, device)


def _followed(slot: Slot, buffer: Tensor, old: tuple[Tensor, Tensor, int] | None) -> tuple[Tensor, Tensor, int]:
    """The buffer with a copy of what it holds: the old copy where nothing changed."""
    version = -1 if buffer.is_inference() else buffer._version
    counts = version >= 0 and buffer.nbytes > SMALL and not isinstance(slot[0], _NormBase)  # whose kernels do not count
    if old is not None and counts and old[0] is buffer and old[2] == version:
        return old
    return buffer, buffer.detach().clone(), version


def _random_numbers(run: Run) -> dict[str, Tensor]:
    on_devices = {str(d): torch.cuda.get_rng_state(d) for d in run.devices if d.type == "cuda"}
    return {"cpu": torch.get_rng_state(), **on_devices}


def _versions(run: Run) -> list[int]:
    return [p._version for p in run.parameters]
