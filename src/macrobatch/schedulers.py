"""torch's learning rate schedulers from outside: which belong to an optimizer, and where they and it keep rates."""

import gc
from collections.abc import Iterator, MutableMapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler, ReduceLROnPlateau

Schedulers = LRScheduler | Sequence[LRScheduler] | None

UNGUARDED = "unguarded_lr"  # what "lr" is a share of, where a spike guard lowered it without any scheduler
GROUP_RATES = ("lr", "initial_lr", "max_lr", "min_lr", "swa_lr", UNGUARDED)  # OneCycleLR, SWALR keep theirs there too
RATES_PER_GROUP = ("base_lrs", "max_lrs", "min_lrs", "_last_lr")
SINGLE_RATES = ("eta_min", "min_lr", "max_lr", "default_min_lr")
CYCLED_MOMENTUMS = ("base_momentum", "max_momentum")


@dataclass(frozen=True)
class Slot:
    """A place for a number: `holder[key]`, or its entry `part`. Tensors are changed in place, tuples are replaced."""

    holder: MutableMapping[str, Any]
    key: str
    part: int | None = None

    def get(self) -> float:
        """The number as a float; a host sync where it is a tensor on a device."""
        value = self._value()
        return float(value.detach() if isinstance(value, Tensor) else value)

    def set(self, number: float) -> None:
        """The place holds `number`."""
        value = self._value()
        if isinstance(value, Tensor):
            with torch.no_grad():
                value.fill_(number)
        elif self.part is None:
            self.holder[self.key] = number
        else:
            entries = self.holder[self.key]
            self.holder[self.key] = type(entries)([*entries[: self.part], number, *entries[self.part + 1 :]])

    def _value(self) -> Any:
        value = self.holder[self.key]
        return value if self.part is None else value[self.part]


def checked(scheduler: Schedulers, optimizer: Optimizer) -> tuple[LRScheduler, ...]:
    """The schedulers given, each once, with those inside them; ValueError unless they are all that `optimizer` has.

    torch keeps no way from an optimizer to its schedulers, so they are looked for among the living objects: a
    scheduler that was dropped does not count, and a ReduceLROnPlateau does.
    """
    given = () if scheduler is None else tuple(scheduler) if isinstance(scheduler, Sequence) else (scheduler,)
    for each in given:
        if not isinstance(each, LRScheduler):
            raise ValueError(f"scheduler must be a torch LRScheduler, or several, got a {type(each).__name__}")
        if each.optimizer is not optimizer:
            raise ValueError(f"the {type(each).__name__} given belongs to another optimizer: give the one of this")
    known = tuple({id(inner): inner for each in given for inner in _with_nested(each)}.values())
    strangers = _attached_besides(optimizer, known)
    if strangers:
        gc.collect()  # one that only a cycle of references keeps is no stranger
        strangers = _attached_besides(optimizer, known)
    if strangers:
        raise ValueError(
            f"this {type(optimizer).__name__} has a {' and a '.join(strangers)} attached that was not given, and "
            "would put the old rates back when it steps: give it as scheduler=, several as a list, or delete it"
        )
    return known


def _with_nested(scheduler: LRScheduler) -> Iterator[LRScheduler]:
    yield scheduler
    for inner in vars(scheduler).get("_schedulers", ()):  # of SequentialLR and ChainedScheduler
        yield from _with_nested(inner)


def _attached_besides(optimizer: Optimizer, known: Sequence[LRScheduler]) -> list[str]:
    """Names of the other schedulers that refer to `optimizer`, without those inside others; one pass over the heap."""
    passed = {id(each) for each in known} | {id(vars(each)) for each in known}
    holders = [each for each in gc.get_referrers(optimizer) if id(each) not in passed]
    dicts = [each for each in holders if type(each) is dict and "_last_lr" in each]  # the vars of a scheduler
    holders += gc.get_referrers(*dicts) if dicts else []
    found = {id(each): each for each in holders if issubclass(type(each), LRScheduler)}
    inner = {id(nested) for each in found.values() for nested in _with_nested(each) if nested is not each}
    return sorted(type(each).__name__ for each in found.values() if id(each) not in inner)


def group_rates(group: MutableMapping[str, Any]) -> list[Slot]:
    """Where a parameter group keeps learning rates, the current one first."""
    return [Slot(group, key) for key in GROUP_RATES if group.get(key) is not None]


def scheduler_rates(scheduler: LRScheduler) -> list[Slot]:
    """Where a scheduler keeps learning rates of its own: base, lowest, highest and last ones."""
    own = vars(scheduler)
    singles = SINGLE_RATES + (("eps",) if isinstance(scheduler, ReduceLROnPlateau) else ())
    slots = []
    for key in RATES_PER_GROUP + singles:
        value = own.get(key)
        if isinstance(value, list | tuple):
            slots += [Slot(own, key, part) for part in range(len(value))]
        elif value is not None:
            slots.append(Slot(own, key))
    return slots


def cycled_betas(scheduler: LRScheduler, group: int) -> list[Slot]:
    """Where a scheduler that moves beta1 up and down (CyclicLR, OneCycleLR) keeps its bounds for one group."""
    own = vars(scheduler)
    if not own.get("use_beta1"):
        return []
    listed = [Slot(own, f"{key}s", group) for key in CYCLED_MOMENTUMS if f"{key}s" in own]
    of_group = scheduler.optimizer.param_groups[group]
    return listed + [Slot(of_group, key) for key in CYCLED_MOMENTUMS if key in of_group]
