"""The families of optimizers, as data: which knobs each has, which rule fits it, and why."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch.optim import Optimizer

from macrobatch.rule_table import RULES, Rule

__all__ = ["BY_NAME", "FAMILIES", "Family", "Knob", "Rule", "family_of", "rule_for"]

Knob = tuple[str, int | None]  # the key in a parameter group, and the entry of a tuple there


@dataclass(frozen=True)
class Family:
    """Optimizers that answer to a larger batch alike.

    `optimizers`: class names in lower case. `auto`: the rule that "auto" picks. `fits`: the rules that have a source
    for this family; others warn. `first`, `second`: decay rates of the averages of gradients and of their squares.
    `has_noise_eps`: eps is added to the root of the squares' average. `is_decoupled`: whether weight decay multiplies
    the weights by 1 - lr * weight_decay; None where a flag of the group says so.
    """

    name: str
    optimizers: tuple[str, ...]
    auto: str
    fits: tuple[str, ...]
    why: str
    first: Knob | None = None
    second: Knob | None = None
    has_noise_eps: bool = False
    is_decoupled: bool | None = False

    def keeps_order(self, group: Mapping[str, Any], k: float) -> bool:
        """Whether beta1**2 stays below beta2**k. A small gradient after large ones makes a step of any size else.

        By Cauchy's inequality |m| / sqrt(v) is at most (1 - beta1) / sqrt((1 - beta2) (1 - beta1**2 / beta2)) while
        the last bracket is positive; otherwise nothing bounds it.
        """
        if self.first is None or self.second is None or self.first[0] not in group:
            return True
        beta1, beta2 = (float(beta) for beta in group[self.first[0]][:2])
        return beta1**2 < beta2**k or beta1**2 >= beta2  # what was so before is not of our making


_BY_NOISE = ("sqrt", "adam-sde", "half-life", "sqrt-half-life")
_NORMALISED = "the update is the gradient over its own size, which is mostly noise"

FAMILIES = (
    Family(
        name="sgd",
        optimizers=("sgd", "asgd"),
        auto="linear",
        fits=("linear",),
        why="the update is proportional to the gradient",
    ),
    Family(
        name="adam",
        optimizers=("adam", "nadam", "radam", "sparseadam", "adam8bit", "pagedadam", "pagedadam8bit"),
        auto="sqrt-half-life",
        fits=_BY_NOISE,
        why=_NORMALISED,
        first=("betas", 0),
        second=("betas", 1),
        has_noise_eps=True,
        is_decoupled=None,
    ),
    Family(
        name="adamw",
        optimizers=("adamw", "nadamw", "adamw8bit", "pagedadamw", "pagedadamw8bit", "stableadamw"),
        auto="sqrt-half-life",
        fits=_BY_NOISE,
        why=_NORMALISED,
        first=("betas", 0),
        second=("betas", 1),
        has_noise_eps=True,
        is_decoupled=True,
    ),
    Family(
        name="adamax",
        optimizers=("adamax",),
        auto="sqrt",
        fits=("sqrt",),
        why="the update is the gradient over the largest of late, which is mostly noise and falls with fewer draws",
        first=("betas", 0),
        second=("betas", 1),
        has_noise_eps=True,
    ),
    Family(
        name="invariant",
        optimizers=("invariantadamw",),
        auto="invariant",
        fits=("invariant",),
        why="the squares are those of micro-batch gradients, which a larger batch does not change",
        first=("betas", 0),
        second=("betas", 1),
        is_decoupled=True,
    ),
    Family(
        name="rmsprop",
        optimizers=("rmsprop",),
        auto="sqrt-half-life",
        fits=_BY_NOISE,
        why=_NORMALISED,
        second=("alpha", None),
        has_noise_eps=True,
    ),
    Family(
        name="adadelta",
        optimizers=("adadelta",),
        auto="sqrt",
        fits=("sqrt",),
        why="the update is a step size that grows with the updates, times the gradient over its own size",
        second=("rho", None),
    ),
    Family(
        name="adagrad",
        optimizers=("adagrad",),
        auto="half-life",
        fits=("half-life",),
        why="fewer squares are summed, each smaller: both together make up for the larger batch",
    ),
    Family(
        name="adafactor",
        optimizers=("adafactor",),
        auto="sqrt",
        fits=("sqrt",),
        why=f"{_NORMALISED}; its memory of squares lengthens with the updates by itself",
        is_decoupled=True,
    ),
    Family(
        name="lion",
        optimizers=("lion", "lion8bit", "pagedlion", "pagedlion8bit"),
        auto="sqrt",
        fits=("sqrt",),
        why="the update is a sign, which is mostly noise",
        is_decoupled=True,
    ),
    Family(
        name="muon",
        optimizers=("muon",),
        auto="sqrt",
        fits=("sqrt",),
        why="the update has a size of its own, and a direction that is mostly noise",
        is_decoupled=True,
    ),
    Family(
        name="layerwise",
        optimizers=("lamb", "lars", "fusedlamb", "lamb8bit", "lars8bit"),
        auto="sqrt",
        fits=("sqrt",),
        why="each layer's update has the size of its weights, and a direction that is mostly noise",
    ),
    Family(
        name="rprop",
        optimizers=("rprop",),
        auto="none",
        fits=(),
        why="it finds its own step sizes from signs, and is meant for the full batch",
    ),
)
BY_NAME = {family.name: family for family in FAMILIES}
_OF_CLASS = {optimizer: family for family in FAMILIES for optimizer in family.optimizers}


def family_of(optimizer: Optimizer, named: str | None) -> Family:
    """The family of `optimizer`, by the names of its classes, or the one `named`; ValueError if there is none."""
    classes = [cls.__name__ for cls in type(optimizer).__mro__]
    if "LBFGS" in classes:
        raise ValueError(
            "LBFGS searches along a line of the full batch's loss, so no rule carries its lr to another batch size"
        )
    if named is not None and named not in BY_NAME:
        raise ValueError(f"unknown family {named!r}: give one of {', '.join(BY_NAME)}")
    if named is not None:
        return BY_NAME[named]
    known = [_OF_CLASS[name.lower()] for name in classes if name.lower() in _OF_CLASS]
    if not known:
        raise ValueError(
            f"no rule is known for the optimizer {classes[0]}: name the family that it behaves like, family=, "
            f"one of {', '.join(BY_NAME)}"
        )
    return known[0]


def rule_for(name: str, family: Family, optimizer: Optimizer, k: float) -> Rule:
    """The rule of that name, or with "auto" the one that fits; ValueError if unknown or without anything to set."""
    if name == "auto":
        automatic = RULES[family.auto]
        is_bounded = all(family.keeps_order(group, k) for group in optimizer.param_groups)
        return automatic if automatic.averages != "beta2**k" or is_bounded else RULES["sqrt"]
    if name not in RULES:
        raise ValueError(f"unknown rule {name!r}: give one of auto, {', '.join(RULES)}")
    rule = RULES[name]
    if rule.averages != "as given" and family.second is None and rule.name not in family.fits:
        raise ValueError(
            f"rule={rule.name!r} sets the memory of an average of squared gradients, which the {family.name} family "
            f"has not: give rule={family.auto!r}, or one of linear, sqrt, none"
        )
    return rule
