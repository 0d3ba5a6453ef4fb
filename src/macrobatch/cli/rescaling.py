"""`--scaling`: hyperparameters tuned at one batch size for another; tried before training, then said and stored."""

import warnings
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any, cast

from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from macrobatch import Scaling, ScalingWarning, scale_hyperparameters
from macrobatch.scaling_families import family_of, rule_for
from macrobatch.scaling_rules import RuleName


def rescale(
    optimizer: Optimizer,
    rule: RuleName,
    *,
    from_batch_size: int,
    to_batch_size: int,
    scheduler: LRScheduler | None = None,
    noise_scale: float | None = None,
) -> Scaling | None:
    """What the rule changed, with its caveats as values instead of warnings; None where there is nothing to do.

    ValueError that names the option, where the rule does not fit the optimizer or the sizes.
    """
    if rule == "none" or from_batch_size == to_batch_size:
        return None
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", ScalingWarning)  # they are in the result
            return scale_hyperparameters(
                optimizer,
                scheduler,
                from_batch_size=from_batch_size,
                to_batch_size=to_batch_size,
                rule=rule,
                noise_scale=noise_scale,
            )
    except ValueError as error:
        raise ValueError(
            f"--scaling {rule} from batch size {from_batch_size} to {to_batch_size}: {error}. With --scaling none the "
            "learning rate stays as given"
        ) from None


def one_rule(optimizer: Optimizer, rule: RuleName, base_batch_size: int, sizes: Sequence[int]) -> RuleName:
    """The rule for all changes of size: "auto" is what fits the whole way to the largest, however many steps it takes.

    For each step by itself it may choose another, and where the run arrives would depend on the way.
    """
    try:
        family = family_of(optimizer, None)
    except ValueError:  # which `rescale` tells of where it matters
        return rule
    whole_way = rule_for(rule, family, optimizer, max(sizes) / base_batch_size).name if rule == "auto" else rule
    return rule if whole_way == family.auto else cast(RuleName, whole_way)


def refuse_unreachable(optimizer: Optimizer, rule: RuleName, base_batch_size: int, sizes: Sequence[int]) -> None:
    """ValueError if the rule cannot take this optimizer, which is used up, to the smallest or the largest of `sizes`.

    What a rule allows at both ends it allows between them: each bound is monotone in the batch size.
    """
    before = base_batch_size
    for size in (min(sizes), max(sizes)):
        rescale(optimizer, rule, from_batch_size=before, to_batch_size=size)
        before = size


def scaling_entry(scaling: Scaling | None) -> dict[str, Any] | None:
    """The scaling as numbers and words for a summary: rule, reason, every change and caveat."""
    if scaling is None:
        return None
    return asdict(scaling)
