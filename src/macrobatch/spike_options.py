"""Checks what a spike guard is given, before training starts."""

from collections.abc import Sequence
from pathlib import Path
from typing import Literal, Protocol, get_args

import torch
import torch.distributed as dist
from torch import nn
from torch.amp.grad_scaler import GradScaler
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from macrobatch.batch import check_size
from macrobatch.distributed import is_distributed
from macrobatch.modules import modules_of, trainable
from macrobatch.report import Report
from macrobatch.saving import InMemory, OnDisk, check_storable
from macrobatch.snapshots import Run, Stateful
from macrobatch.spike_values import Seen

Policy = Literal["rollback", "skip", "warn"]


class Options(Protocol):
    """The numbers of a guard."""

    policy: Policy
    snapshot_every: int | None
    window: int
    min_updates: int
    threshold: float
    lr_factor: float
    warmup_updates: int
    max_rollbacks: int
    max_flags_in_a_row: int


def check_options(options: Options, folder: object, snapshot_device: object) -> None:
    """ValueError for a number out of range, or a policy that lacks what it needs."""
    policies = get_args(Policy)
    if options.policy not in policies:
        raise ValueError(f"policy must be one of {', '.join(map(repr, policies))}, got {options.policy!r}")
    if options.policy == "rollback" and options.snapshot_every is None:
        raise ValueError(
            "policy='rollback' needs snapshots to go back to: give snapshot_every, in updates, or policy='skip', which "
            "only leaves windows out"
        )
    if options.policy != "rollback" and (folder is not None or snapshot_device is not None):
        raise ValueError(f"folder and snapshot_device are for policy='rollback', got policy={options.policy!r}")
    if folder is not None and snapshot_device is not None:
        raise ValueError("snapshots are kept in folder or on snapshot_device: give one of them")
    if options.snapshot_every is not None:
        check_size(options.snapshot_every, "snapshot_every")
    _check_numbers(options)


def _check_numbers(options: Options) -> None:
    for name in ("window", "min_updates", "max_rollbacks", "max_flags_in_a_row"):
        check_size(getattr(options, name), name)
    if options.min_updates > options.window:
        raise ValueError(
            f"min_updates must be at most window, the updates that are remembered, got {options.min_updates} and "
            f"{options.window}"
        )
    if options.warmup_updates != 0:
        check_size(options.warmup_updates, "warmup_updates")
    if not options.threshold > 0:
        raise ValueError(f"threshold must be above 0, in standard deviations, got {options.threshold}")
    if not 0 < options.lr_factor <= 1:
        raise ValueError(f"lr_factor must be above 0 and at most 1, got {options.lr_factor}")


def run_of(
    model: nn.Module | Sequence[nn.Module],
    optimizer: Optimizer | Sequence[Optimizer],
    scheduler: LRScheduler | Sequence[LRScheduler] | None,
    scaler: GradScaler | None,
    stateful: Sequence[Stateful],
) -> Run:
    """What is trained, as a value; ValueError where the parts do not belong together."""
    modules = modules_of(model)
    optimizers = list(optimizer) if isinstance(optimizer, Sequence) else [optimizer]
    schedulers = [] if scheduler is None else list(scheduler) if isinstance(scheduler, Sequence) else [scheduler]
    for each in optimizers:
        if not isinstance(each, Optimizer):
            raise ValueError(f"optimizer must be a torch optimizer, or several, got a {type(each).__name__}")
    for each_scheduler in schedulers:
        owner = getattr(each_scheduler, "optimizer", None)
        if not any(owner is each for each in optimizers):
            raise ValueError(f"the {type(each_scheduler).__name__} given belongs to none of the optimizers given")
    for thing in stateful:
        if not (hasattr(thing, "state_dict") and hasattr(thing, "load_state_dict")):
            raise ValueError(f"stateful things have state_dict and load_state_dict, a {type(thing).__name__} has not")
        if hasattr(thing, "rebase") and hasattr(thing, "gain"):
            raise ValueError(
                f"an {type(thing).__name__} sets every rate anew and takes a rate that went back for another hand's: "
                "guard it with policy='skip', and without it in stateful"
            )
    run = Run(modules, optimizers, schedulers, scaler, tuple(stateful))
    if any(hasattr(p, "full_tensor") for p in run.parameters):
        raise ValueError(
            "parameters sharded over ranks (FSDP2, DTensor) are not guarded yet: a shard's gradient is not the "
            "whole, so that ranks would judge differently"
        )
    held = {id(p) for module in modules for p in module.parameters()}
    strangers = [p for p in run.parameters if id(p) not in held]
    if strangers or not run.parameters:
        raise ValueError(
            f"the optimizer holds {len(run.parameters)} parameters, {len(strangers)} of them not of the model, which "
            f"trains {len(trainable(modules))}: give the guard the model of this optimizer, with all modules that it "
            "trains as a list"
        )
    return run


def store_of(run: Run, folder: str | Path | None, device: torch.device | str | None) -> InMemory | OnDisk:
    """Where snapshots are kept: files are one for each rank. ValueError for a folder that cannot be written."""
    if folder is None:
        return InMemory(device)
    check_storable(run)
    rank = dist.get_rank() if is_distributed() else 0
    try:
        store = OnDisk(Path(folder) / f"snapshot-{rank}.pt")
        probe = Path(folder) / f"probe-{rank}"
        probe.touch()
        probe.unlink()
    except OSError as error:
        raise ValueError(f"snapshots cannot be written to the folder {folder}: {error}") from error
    return store


def check_report(report: object, run: Run, policy: Policy) -> None:
    """ValueError for anything but a Report, and for one with a scaler that would not go back with the rest."""
    if not isinstance(report, Report):
        raise ValueError(f"check takes the Report that Accumulator.run returned, got a {type(report).__name__}")
    if policy == "rollback" and report.scaler is not None and report.scaler is not run.scaler:
        raise ValueError(
            "the Accumulator has a GradScaler that the guard was not given, so that it would not go back with the "
            "rest: SpikeGuard(..., scaler=scaler)"
        )


def refuse_missing(seen: Seen, run: Run) -> None:
    """ValueError if the window had a loss, and there are no gradients of it any more."""
    if seen.has_terms and all(p.grad is None for p in run.parameters):
        raise ValueError(
            "none of the parameters has a gradient: call check(report) after accumulator.run and before apply_update, "
            "which drops them"
        )
