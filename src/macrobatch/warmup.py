"""Warmup from the rate of the small batch to that of the large one, made of torch's own schedulers."""

from torch.optim import Optimizer
from torch.optim.lr_scheduler import (
    ChainedScheduler,
    LinearLR,
    LRScheduler,
    MultiplicativeLR,
    ReduceLROnPlateau,
    SequentialLR,
)
from torch.optim.swa_utils import SWALR

from macrobatch.batch import check_size
from macrobatch.schedulers import checked

# SequentialLR starts the next scheduler by its closed form at 0, which these have not got, or have not right.
_CANNOT_FOLLOW = {
    ReduceLROnPlateau: "it steps on a metric: make the warmup without it, and step both",
    ChainedScheduler: "torch cannot start it at 0: chain a LinearLR with its parts instead",
    SWALR: "it anneals from the rate that it finds: step it alone, after the warmup and the schedule",
    MultiplicativeLR: "torch starts it from the rate in the middle of the warmup: give a LambdaLR with the product",
}


def warmup(
    optimizer: Optimizer,
    scheduler: LRScheduler | None = None,
    *,
    factor: float,
    num_updates: int | None = None,
    num_samples: int | None = None,
    batch_size: int | None = None,
) -> LRScheduler:
    """A torch scheduler whose rate rises from `factor` times the base rate by equal amounts, then follows `scheduler`.

    Update u = 0, 1, ... of the warmup has the rate base * (factor + (1 - factor) * u / num_updates); then `scheduler`
    begins, from its own update 0. `factor` is `1 / scaling.lr_factor` to start from the rate before scaling, as Goyal
    et al. 2017, section 2.2, do. Its length: `num_updates`, or `num_samples` with the effective `batch_size`, rounded
    up. Step what is returned once for each update, and `scheduler` itself no more. Make it before the first update;
    to resume, make it again and load its state_dict. ValueError for a factor outside (0, 1] and for schedulers that
    torch's SequentialLR cannot start, or that are attached and not given.
    """
    if not 0 < factor <= 1:
        raise ValueError(
            f"factor must be above 0 and at most 1, the first rate over the base rate, got {factor}: a rate that was "
            "scaled down needs no warmup"
        )
    length = _length(num_updates, num_samples, batch_size)
    followers = _followers(scheduler)
    checked(scheduler, optimizer)
    rising = LinearLR(optimizer, start_factor=factor, total_iters=length)
    if scheduler is None:
        return rising
    borders = [length, *(length + border for border in _borders(scheduler))]
    return SequentialLR(optimizer, [rising, *followers], borders)


def _followers(scheduler: LRScheduler | None) -> list[LRScheduler]:
    """What comes after the warmup; a SequentialLR, which torch cannot put into another, is opened."""
    if scheduler is None:
        return []
    if vars(scheduler).get("last_epoch", 0) > 0:
        raise ValueError(
            f"the {type(scheduler).__name__} has made {scheduler.last_epoch} steps: make the warmup before the first "
            "update, and load its state_dict to resume"
        )
    followers = list(scheduler._schedulers) if isinstance(scheduler, SequentialLR) else [scheduler]
    for each in followers:
        for kind, why in _CANNOT_FOLLOW.items():
            if isinstance(each, kind):
                raise ValueError(f"a {kind.__name__} cannot follow a warmup: {why}")
    return followers


def _borders(scheduler: LRScheduler) -> list[int]:
    return list(scheduler._milestones) if isinstance(scheduler, SequentialLR) else []


def _length(num_updates: int | None, num_samples: int | None, batch_size: int | None) -> int:
    if (num_updates is None) == (num_samples is None) or (num_samples is None) != (batch_size is None):
        raise ValueError(
            "give the length of the warmup as num_updates, or as num_samples with batch_size, got "
            f"num_updates={num_updates}, num_samples={num_samples}, batch_size={batch_size}"
        )
    if num_samples is not None and batch_size is not None:
        return -(-check_size(num_samples, "num_samples") // check_size(batch_size, "batch_size"))
    assert num_updates is not None
    return check_size(num_updates, "num_updates")
