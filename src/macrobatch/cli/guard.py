"""`--spike-guard`: a run under a SpikeGuard, and what it flagged as entries for the log and the summary."""

import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, Literal

from torch import nn
from torch.amp.grad_scaler import GradScaler
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from macrobatch import BatchSchedule
from macrobatch.cli.formats import counted
from macrobatch.spike_values import SpikeVerdict
from macrobatch.spikes import SpikeGuard

Guarding = Literal["off", "warn", "skip", "rollback"]
SNAPSHOT_EVERY = 25


def make_guard(
    guarding: Guarding,
    snapshot_every: int | None,
    *,
    model: nn.Module,
    optimizer: Optimizer,
    scheduler: LRScheduler,
    scaler: GradScaler | None,
    schedule: BatchSchedule,
) -> SpikeGuard | None:
    """The guard asked for; None for "off". ValueError for snapshots that nothing would go back to."""
    if snapshot_every is not None and guarding != "rollback":
        raise ValueError(f"--snapshot-every is for --spike-guard rollback; with {guarding} nothing goes back to one")
    if guarding == "off":
        return None
    goes_back = guarding == "rollback"
    return SpikeGuard(
        model,
        optimizer,
        scheduler=scheduler,
        scaler=scaler,
        stateful=[schedule.rate] if goes_back else [],
        policy=guarding,
        snapshot_every=snapshot_every or SNAPSHOT_EVERY,
    )


def verdict_entries(verdict: SpikeVerdict | None) -> dict[str, Any]:
    """What the guard did with an update, for its row; empty where it let it pass."""
    if verdict is None or verdict.kind == "accepted":
        return {}
    found = {
        "spike": verdict.kind,
        "spike_why": verdict.why,
        "spike_micro_batch": verdict.micro_batch,
        "spike_back_to": verdict.back_to,
    }
    return {name: value for name, value in found.items() if value is not None}


def guard_entry(guard: SpikeGuard | None, rows: list[dict[str, Any]]) -> dict[str, Any] | None:
    """What the guard did in the whole run, for the summary; None without one."""
    if guard is None:
        return None
    names = ("update", "loss", "grad_norm", "spike", "spike_why", "spike_micro_batch", "spike_back_to")
    return {
        "policy": guard.policy,
        "rollbacks": guard.rollbacks,
        "lr_scale": guard.lr_scale,
        "updates_kept": guard.num_accepted,
        "events": [{name: row[name] for name in names if name in row} for row in rows if "spike" in row],
    }


def guard_lines(guard: SpikeGuard | None, rows: list[dict[str, Any]]) -> list[str]:
    """What the guard did, in a line for the terminal."""
    if guard is None:
        return []
    kinds = [row["spike"] for row in rows if "spike" in row]
    if not kinds:
        judged = max(len(rows) - guard.min_updates, 0)
        learned = f"after {guard.min_updates} to learn from"
        return [f"spike guard: nothing flagged ({counted(judged, 'update')} judged, {learned})"]
    words = {"warned": "applied all the same", "skipped": "skipped", "rolled_back": "rolled back"}
    told = ", ".join(f"{kinds.count(kind)} {word}" for kind, word in words.items() if kind in kinds)
    rate = f"; the learning rate is {guard.lr_scale:g} times what it was" if guard.rollbacks else ""
    return [f"spike guard: {counted(len(kinds), 'update')} flagged, {told}; {guard.num_accepted} updates stand{rate}"]


@contextmanager
def log_lines(say: Callable[[str], None]) -> Iterator[None]:
    """Within it, what the library logs as a warning is a line of the terminal, above the bar and not through it."""
    logger, handler = logging.getLogger("macrobatch"), _Saying(say)
    logger.addHandler(handler)
    try:
        yield
    finally:
        logger.removeHandler(handler)


class _Saying(logging.Handler):
    def __init__(self, say: Callable[[str], None]) -> None:
        super().__init__(logging.WARNING)
        self._say = say

    def emit(self, record: logging.LogRecord) -> None:
        """A line for each record."""
        self._say(record.getMessage())
