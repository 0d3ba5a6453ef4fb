"""From one effective batch size to another: learning rate, betas, eps, weight decay, weight averages and clipping."""

import math
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

from torch.optim import Optimizer

from macrobatch.batch import check_size
from macrobatch.scaling_changes import Change, Scaler, check_decay
from macrobatch.scaling_families import family_of, rule_for
from macrobatch.schedulers import UNGUARDED, Schedulers, checked

RuleName = Literal["auto", "linear", "sqrt", "adam-sde", "half-life", "sqrt-half-life", "invariant", "none"]

SHOWN_UP_TO = 32  # times the batch: ResNet-50 from 256 to 8192 (Goyal et al. 2017)


class ScalingWarning(UserWarning):
    """A rule was used where its source does not vouch for it; the message says why and what to do."""


@dataclass(frozen=True)
class Scaling:
    """What `scale_hyperparameters` did, by which rule and why. `lr_factor`: what every learning rate was multiplied by.

    `caveats` are the warnings that it gave. `str(scaling)` is a table to read or log.
    """

    rule: str
    family: str
    why: str
    from_batch_size: int
    to_batch_size: int
    lr_factor: float
    changes: tuple[Change, ...]
    caveats: tuple[str, ...]

    def __str__(self) -> str:
        lines = [f"batch size {self.from_batch_size} -> {self.to_batch_size}, rule {self.rule}: {self.why}"]
        reasons = dict.fromkeys((change.why, change.source) for change in self.changes)
        for why, source in reasons:
            lines.append(f"  {why}{f' ({source})' if source else ''}")
            lines += [f"    {change}" for change in self.changes if (change.why, change.source) == (why, source)]
        lines += [f"  caution: {caveat}" for caveat in self.caveats]
        return "\n".join(lines if self.changes else [*lines, "  nothing changes"])


def scale_hyperparameters(
    optimizer: Optimizer,
    scheduler: Schedulers = None,
    *,
    from_batch_size: int,
    to_batch_size: int,
    rule: RuleName = "auto",
    noise_scale: float | None = None,
    family: str | None = None,
) -> Scaling:
    """The optimizer, and every scheduler on it, are set for `to_batch_size`; what changed and why is returned.

    The hyperparameters given are those that work at `from_batch_size` (both over all ranks, in the same unit). By
    `rule` change, in each parameter group, learning rates (tensors in place), betas and eps; decoupled weight decay
    keeps its time scale in samples. `scheduler`: one or several; every one attached must be given. `noise_scale`, in
    the unit of the batch sizes, lets the rule tell whether it is still valid. `family` names the behaviour of an
    optimizer that is not known. ScalingWarning beyond the validity of the rule; ValueError, before anything is
    changed, for a decay rate that leaves [0, 1), for what the optimizer lacks, and for schedulers left out.

    >>> import torch
    >>> optimizer = torch.optim.SGD([torch.ones(1)], lr=0.1)
    >>> print(scale_hyperparameters(optimizer, from_batch_size=256, to_batch_size=1024).lr_factor)
    4.0
    """
    check_size(from_batch_size, "from_batch_size")
    check_size(to_batch_size, "to_batch_size")
    its_family = family_of(optimizer, family)
    k = to_batch_size / from_batch_size
    scaler = Scaler(its_family, rule_for(rule, its_family, optimizer, k), k)
    schedulers = checked(scheduler, optimizer)
    planned = list(scaler.changes(optimizer, schedulers))
    check_decay(planned)
    caveats = (
        *_beyond_the_family(scaler),
        *_beyond_the_size(scaler, from_batch_size, to_batch_size, noise_scale),
        *_beyond_the_averages(scaler, optimizer),
    )
    for caveat in caveats:
        warnings.warn(caveat, ScalingWarning, stacklevel=2)
    for slot, change in planned:
        slot.set(change.after)
    return Scaling(
        rule=scaler.rule.name,
        family=its_family.name,
        why=_why_automatic(scaler) if rule == "auto" else scaler.rule.why,
        from_batch_size=from_batch_size,
        to_batch_size=to_batch_size,
        lr_factor=scaler.lr_factor,
        changes=tuple(
            change
            for _, change in planned
            if change.after != change.before and not change.name.endswith(("_last_lr", UNGUARDED))
        ),
        caveats=caveats,
    )


# ---------------------------------------------------------------------------------------------------------------------
# where rules are valid


def _why_automatic(scaler: Scaler) -> str:
    """Why "auto" took its rule, and why not the family's usual one where that is another."""
    usual, taken = scaler.family.auto, scaler.rule.name
    if taken == usual:
        return scaler.family.why
    return (
        f"{scaler.family.why}; not {usual}, because beta2**{scaler.k:g} would fall to beta1**2 or below, where a small "
        "gradient after large ones makes a step of any size: betas and eps stay as given"
    )


def _beyond_the_family(scaler: Scaler) -> Iterator[str]:
    rule, family = scaler.rule, scaler.family
    if rule.name not in (*family.fits, "none"):
        shown = "; at 32 times the batch it was 2.5 points of error worse (Goyal et al. 2017, table 2a)"
        yield (
            f"rule={rule.name!r} has no source for the {family.name} family, where {family.why}"
            f"{shown if (family.name, rule.name) == ('sgd', 'sqrt') else ''}: the rule that fits is {family.auto!r}"
        )


def _beyond_the_size(scaler: Scaler, before: int, after: int, noise_scale: float | None) -> Iterator[str]:
    power = scaler.rule.lr_power
    if noise_scale is None:
        if scaler.rule.name == "linear" and scaler.k > SHOWN_UP_TO:
            yield (
                f"the linear rule was shown to hold up to {SHOWN_UP_TO} times the batch, and this is "
                f"{scaler.k:g} times: at 64 times the error had risen by 1.2 points (Goyal et al. 2017). "
                "Measure the noise scale and give it as noise_scale="
            )
        elif power == 0.5 and scaler.k > SHOWN_UP_TO:
            yield (
                f"the {scaler.rule.name} rule holds while gradients are mostly noise, and at {scaler.k:g} times the "
                f"batch (above {SHOWN_UP_TO}) they may no longer be: the best rate then grows slower, and may even "
                "fall (Li et al. 2024). Measure the noise scale and give it as noise_scale="
            )
        return
    if not noise_scale > 0:
        raise ValueError(
            f"noise_scale must be positive, in samples or whatever the batch sizes count, got {noise_scale}"
        )
    larger = max(before, after)
    if power and larger > noise_scale:
        gain = scaler.k * (noise_scale + before) / (noise_scale + after)
        yield (
            f"batch size {larger} is beyond the noise scale {noise_scale:.4g}, where gradients are no longer mostly "
            f"noise: the rule multiplies lr by {scaler.lr_factor:.4g}, while {scaler.k:.4g} times the batch is worth "
            f"only {gain:.4g} updates (McCandlish et al. 2018)"
        )


def _beyond_the_averages(scaler: Scaler, optimizer: Optimizer) -> Iterator[str]:
    if scaler.rule.averages == "beta2**k":
        loose = [n for n, g in enumerate(optimizer.param_groups) if not scaler.family.keeps_order(g, scaler.k)]
        if loose:
            yield (
                f"beta2 falls to beta1**2 or below in the groups {loose}, so that a small gradient after large ones "
                "makes a step of any size: lower beta1, or give rule='sqrt', which leaves beta2 as it is"
            )


# ---------------------------------------------------------------------------------------------------------------------
# what is not in the optimizer


def scale_ema(decay: float, *, from_batch_size: int, to_batch_size: int) -> float:
    """The decay with which an average of weights spans as many samples at `to_batch_size`: decay**k.

    For weight averages and for the teachers of BYOL and DINO, beside the optimizer's own rule. ValueError for a decay
    outside [0, 1]. Busbridge et al. 2023.

    >>> scale_ema(0.99, from_batch_size=256, to_batch_size=512)
    0.9801
    """
    if not 0 <= decay <= 1:
        raise ValueError(f"decay must lie between 0 and 1, got {decay}")
    return float(decay ** (check_size(to_batch_size, "to_batch_size") / check_size(from_batch_size, "from_batch_size")))


def scale_clip(max_norm: float, *, from_batch_size: int, to_batch_size: int, noise_scale: float) -> float:
    """The `max_norm` that clips as often at `to_batch_size`: max_norm * sqrt((1 + Bn / B') / (1 + Bn / B)).

    The mean squared norm of a gradient over B samples is |G|**2 + S / B, and `noise_scale` Bn = S / |G|**2, in the
    unit of the batch sizes: `math.inf` where noise is all (max_norm / sqrt(k)), 0 where there is none (max_norm).
    ValueError for numbers that are negative or not numbers.

    >>> scale_clip(1.0, from_batch_size=64, to_batch_size=256, noise_scale=math.inf)
    0.5
    """
    if not max_norm > 0:
        raise ValueError(f"max_norm must be positive, got {max_norm}")
    if not noise_scale >= 0:
        raise ValueError(
            f"noise_scale must be S / |G|**2, at least 0, got {noise_scale}: where the estimate of |G|**2 is not "
            "positive, noise is all, which is math.inf"
        )
    before, after = check_size(from_batch_size, "from_batch_size"), check_size(to_batch_size, "to_batch_size")
    if math.isinf(noise_scale):
        return max_norm * math.sqrt(before / after)
    return max_norm * math.sqrt((1 + noise_scale / after) / (1 + noise_scale / before))
