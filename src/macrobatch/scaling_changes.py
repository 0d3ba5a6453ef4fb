"""What a rule changes in an optimizer and its schedulers: every place, before any of them is touched."""

from collections.abc import Iterator, MutableMapping
from dataclasses import dataclass
from typing import Any

from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from macrobatch.scaling_families import Family, Rule
from macrobatch.schedulers import Slot, cycled_betas, group_rates, scheduler_rates

Group = MutableMapping[str, Any]
ROUNDING = 1e-9  # 10 * (1 - 0.9) is 1, and not 0.9999999999999998
# What counts updates, and the power of k with which it counts the same samples: exact from the first update on only.
CLOCKS = {"lr_decay": 1, "momentum_decay": 1, "t0": -1}


@dataclass(frozen=True)
class Change:
    """One number that was changed: of which parameter group (None: of all), before, after, why, and on whose word."""

    group: int | None
    name: str
    before: float
    after: float
    why: str
    source: str

    def __str__(self) -> str:
        place = "all groups" if self.group is None else f"group {self.group}"
        return f"{place}: {self.name} {self.before:.6g} -> {self.after:.6g}"


Planned = tuple[Slot, Change]


@dataclass(frozen=True)
class Scaler:
    """A rule for a family at one ratio k of batch sizes: old numbers to new ones."""

    family: Family
    rule: Rule
    k: float

    @property
    def lr_factor(self) -> float:
        """What every learning rate is multiplied by."""
        return float(self.k**self.rule.lr_power)

    @property
    def weight_decay_factor(self) -> float:
        """Weights forget lr * weight_decay in an update: k times as much, over k times the samples."""
        return 1.0 if self.rule.name == "none" else self.k / self.lr_factor

    def changes(self, optimizer: Optimizer, schedulers: tuple[LRScheduler, ...]) -> Iterator[Planned]:
        """Every place to change in the groups and schedulers, with the number before and after."""
        is_fresh = not any(float(state.get("step", 0)) > 0 for state in optimizer.state.values())
        for number, group in enumerate(optimizer.param_groups):
            if group.get("lr") is None:
                raise ValueError(f"parameter group {number} of {type(optimizer).__name__} has no lr to scale")
            for slot in group_rates(group):
                yield self._rate(slot, slot.key, number)
            yield from self._decay_rates(group, number, schedulers)
            yield from self._others(group, number, is_fresh)
        for scheduler in schedulers:
            for slot in scheduler_rates(scheduler):
                yield self._rate(slot, f"{type(scheduler).__name__}.{slot.key}", slot.part)

    def _rate(self, slot: Slot, name: str, group: int | None) -> Planned:
        before = slot.get()
        return slot, Change(group, name, before, before * self.lr_factor, self.rule.why, self.rule.source)

    def _decay_rates(self, group: Group, number: int, schedulers: tuple[LRScheduler, ...]) -> Iterator[Planned]:
        knobs = {"beta1": self.family.first} if self.rule.averages != "beta2**k" else {}
        for name, knob in (knobs | {"beta2": self.family.second}).items():
            if knob is None or knob[0] not in group or self.rule.averages == "as given":
                continue
            slots = {name if knob[1] is not None else knob[0]: Slot(group, *knob)}
            if name == "beta1":
                cycled = [slot for scheduler in schedulers for slot in cycled_betas(scheduler, number)]
                slots |= {f"{slot.key} {position}": slot for position, slot in enumerate(cycled)}
            for label, slot in slots.items():
                before = slot.get()
                yield slot, Change(number, label, before, self._decay_rate(before, label), *self._about_averages())

    def _decay_rate(self, beta: float, name: str) -> float:
        if self.rule.averages != "1-k(1-beta)":
            return float(beta**self.k)
        if self.k * (1 - beta) > 1 - ROUNDING:
            raise ValueError(
                f"adam-sde sets 1 - {name} to k(1 - {name}) = {self.k:g} x {1 - beta:g}, which must stay below 1: "
                f"at most {1 / (1 - beta):g} times the batch, or rule='sqrt-half-life', which holds for every k"
            )
        return 1 - self.k * (1 - beta)

    def _about_averages(self) -> tuple[str, str]:
        if self.rule.averages == "1-k(1-beta)":
            return "1 - beta times k: the average spans the same samples", self.rule.source
        return "beta to the power k: the half-life in samples stays", self.rule.source

    def _others(self, group: Group, number: int, is_fresh: bool) -> Iterator[Planned]:
        if self.family.has_noise_eps and self.rule.eps_power and isinstance(group.get("eps"), float):
            slot = Slot(group, "eps")
            why = "the noise that eps is compared with shrinks by the root of k"
            yield (
                slot,
                Change(number, "eps", slot.get(), slot.get() * self.k**self.rule.eps_power, why, self.rule.source),
            )
        if self._is_decoupled(group) and group.get("weight_decay"):
            slot = Slot(group, "weight_decay")
            why = "lr x weight_decay x updates stays: the weights keep their time scale in samples"
            after = slot.get() * self.weight_decay_factor
            yield slot, Change(number, "weight_decay", slot.get(), after, why, "Wang and Aitchison 2024 (2405.13698)")
        for key, power in CLOCKS.items():
            if is_fresh and self.rule.name != "none" and group.get(key):
                slot = Slot(group, key)
                yield slot, Change(number, key, slot.get(), slot.get() * self.k**power, "it counts updates", "")

    def _is_decoupled(self, group: Group) -> bool:
        of_family = self.family.is_decoupled
        return bool(group.get("decoupled_weight_decay", False)) if of_family is None else of_family


def check_decay(planned: list[Planned]) -> None:
    """ValueError where decoupled weight decay would turn weights around in a single update."""
    after = {(change.group, change.name): change.after for _, change in planned}
    for (group, name), weight_decay in after.items():
        if name == "weight_decay" and weight_decay * after[group, "lr"] >= 1:
            raise ValueError(
                f"lr {after[group, 'lr']:g} x weight_decay {weight_decay:g} in group {group} would be at least 1, so "
                "that an update turns the weights around: their time scale is shorter than one batch of this size. "
                "Give a smaller to_batch_size, or less weight_decay"
            )
