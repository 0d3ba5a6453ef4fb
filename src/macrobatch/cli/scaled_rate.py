"""The rate of the small batch carried over to the large one: by the rule that fits the optimizer, and with a warmup."""

import warnings
from collections.abc import Sequence
from dataclasses import dataclass

from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from macrobatch.scaling_rules import ScalingWarning, scale_hyperparameters
from macrobatch.warmup import warmup

WARMUP_SHARE = 1 / 8  # of the updates


@dataclass(frozen=True)
class RateScaling:
    """What `scale_hyperparameters(rule="auto")` made of the optimizer, and how long its warmup is."""

    rule: str
    family: str
    why: str
    from_batch_size: int
    to_batch_size: int
    lr_factor: float
    warmup_updates: int
    changes: Sequence[str]
    caveats: Sequence[str]


def scale_with_warmup(
    optimizer: Optimizer, *, from_batch_size: int, to_batch_size: int, updates: int
) -> tuple[LRScheduler, RateScaling]:
    """The optimizer is set for `to_batch_size`; step the scheduler after each of its `updates`.

    In the first eighth of them the rate rises from what it was. ValueError where no rule is known for the optimizer.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ScalingWarning)  # it is in `caveats`, for the words of the report
        scaling = scale_hyperparameters(optimizer, from_batch_size=from_batch_size, to_batch_size=to_batch_size)
    length = max(1, round(WARMUP_SHARE * updates))
    scheduler = warmup(optimizer, factor=min(1.0, 1 / scaling.lr_factor), num_updates=length)
    return scheduler, RateScaling(
        rule=scaling.rule,
        family=scaling.family,
        why=scaling.why,
        from_batch_size=from_batch_size,
        to_batch_size=to_batch_size,
        lr_factor=scaling.lr_factor,
        warmup_updates=length,
        changes=[str(change) for change in scaling.changes],
        caveats=list(scaling.caveats),
    )
