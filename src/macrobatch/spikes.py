"""Loss spikes: notice them before the step, skip or roll back to a snapshot, and go on with a smaller learning rate."""

import logging
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.amp.grad_scaler import GradScaler
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from macrobatch.distributed import Ranks
from macrobatch.gradients import norm_of
from macrobatch.report import Report
from macrobatch.snapshots import BeforeWindow, Stateful, capture, restore
from macrobatch.spike_history import History
from macrobatch.spike_options import Policy, check_options, check_report, refuse_missing, run_of, store_of
from macrobatch.spike_rates import RateScale
from macrobatch.spike_values import HOPELESS, Seen, SpikeError, SpikeVerdict, culprit, describe, see
from macrobatch.update import apply_update

logger = logging.getLogger("macrobatch")

SPARED = 1  # flags in a row that only skip, unless the loss is a spike: the window may be at fault, and not the run
POSITION = ("num_accepted", "since_snapshot")  # goes back with the run
COUNTS = ("flags_in_a_row", "rollbacks", "lr_scale", "warmed_up")  # stay when it does


class SpikeGuard:
    """Judges each window before its update: applied, skipped, or the run goes back to a snapshot.

    A window is flagged where the logarithm of its loss or of its gradient norm lies more than `threshold` robust
    standard deviations above the last `window` accepted ones (median and MAD), once there are `min_updates`, or where
    it is not finite. `model`: one or several modules, that hold all that `optimizer` (one or several) trains.

    `policy`: "warn" says so; "skip" drops the gradients of the window; "rollback" also goes back to the last snapshot
    where the loss is a spike, and where other windows are flagged twice in a row. One is made every `snapshot_every`
    accepted updates, of the parameters trained, buffers, optimizers, `scheduler` (one or several, all that there are),
    `scaler`, `stateful` things (anything with `state_dict` and `load_state_dict`, but not the data: that goes on) and
    torch's random numbers, unless `restore_random` is False, for loops that draw their batches from torch's own
    generator. Then every learning rate is `lr_factor` times what it was, for good, and is reached again over
    `warmup_updates`. Snapshots stay in memory on `snapshot_device` (None: where the tensors are), or in files in
    `folder`, one for each rank. `max_rollbacks` in all, or `max_flags_in_a_row`, and `check` raises `SpikeError`; with
    "warn" so many in a row are the new normal. ValueErrors before training starts.
    """

    def __init__(
        self,
        model: nn.Module | Sequence[nn.Module],
        optimizer: Optimizer | Sequence[Optimizer],
        *,
        scheduler: LRScheduler | Sequence[LRScheduler] | None = None,
        scaler: GradScaler | None = None,
        stateful: Sequence[Stateful] = (),
        policy: Policy = "rollback",
        snapshot_every: int | None = 25,
        folder: str | Path | None = None,
        snapshot_device: torch.device | str | None = None,
        restore_random: bool = True,
        window: int = 128,
        min_updates: int = 64,
        threshold: float = 6.0,
        lr_factor: float = 0.5,
        warmup_updates: int = 20,
        max_rollbacks: int = 10,
        max_flags_in_a_row: int = 20,
    ) -> None:
        self.policy, self.snapshot_every = policy, snapshot_every
        self.window, self.min_updates, self.threshold = window, min_updates, threshold
        self.lr_factor, self.warmup_updates = lr_factor, warmup_updates
        self.max_rollbacks, self.max_flags_in_a_row = max_rollbacks, max_flags_in_a_row
        check_options(self, folder, snapshot_device)
        self._run = run_of(model, optimizer, scheduler, scaler, stateful)
        self._rates = RateScale(self._run.optimizers, self._run.schedulers) if policy == "rollback" else None
        self._store = store_of(self._run, folder, snapshot_device)
        self._before = BeforeWindow(self._run)
        self._snapshot_of: list[int] | None = None  # ids of the parameters in the snapshot, None without one
        self._mark = 0.0  # the norm of the parameters in the snapshot, to know it by; the same on every rank
        self._restore_random = restore_random
        self._history = History(window)
        self.losses, self.norms = self._history.losses, self._history.norms  # of the last accepted windows
        self.num_accepted = 0
        self.since_snapshot = 0  # accepted updates that a rollback would undo
        self.flags_in_a_row = self.rollbacks = 0
        self.lr_scale = 1.0  # what rates are multiplied by, once warmed up
        self.warmed_up = 0  # updates since the last rollback, at most warmup_updates

    def check(self, report: Report) -> SpikeVerdict:
        """The verdict on the window that `report` and `p.grad` hold, between `run` and `apply_update`.

        Unless `verdict.accepted` its gradients are dropped and parameters, buffers, moments, step counts, schedule and
        random numbers are those of a run that never saw it. Every rank calls it, and gets the same kind. One host
        sync. `SpikeError` when it gives up.
        """
        check_report(report, self._run, self.policy)
        seen = see(report, self._run.parameters)
        scores = self._history.scores(seen, min_updates=self.min_updates)
        ranks = Ranks(report.process_group)
        overflows = seen.has_terms and report.scaler is not None and report.scaler.is_enabled()
        overflows = overflows and math.isfinite(seen.loss) and not math.isfinite(seen.grad_norm)
        # Below 1 no scale is to blame. It is on the host only where it was asked for, so only then.
        overflows = overflows and report.scaler is not None and report.scaler.get_scale() > 1.0
        high = [score is not None and score > self.threshold for score in scores]
        refuse_missing(seen, self._run)
        empty, overflow, broken, high_loss, high_norm = ranks.any_of(
            not seen.has_terms, overflows, not seen.is_finite, *high
        )
        told = (seen.loss, seen.grad_norm, *scores)
        if empty or overflow:
            why = "no loss terms" if empty else "the loss scale was too large"
            verdict = SpikeVerdict("skipped", why, *told)
            apply_update(self._run.optimizers, report)  # which makes no step, and lowers the loss scale
            self._before.restore(random_numbers=self._restore_random)
        elif broken or high_loss or high_norm:
            verdict = self._flag(report, seen, scores, broken, high_loss, ranks)
        else:
            self._accept(seen)
            verdict = SpikeVerdict("accepted", "", *told)
        self._before.remember()
        return verdict

    # ---- accepted

    def _accept(self, seen: Seen) -> None:
        self.flags_in_a_row = 0
        if self.policy == "rollback" and self._is_snapshot_due():
            self._take_snapshot()
        self._history.add(seen)
        self.num_accepted += 1
        self.since_snapshot += 1
        self.warmed_up = min(self.warmed_up + 1, self.warmup_updates)
        self._set_rates()

    def _is_snapshot_due(self) -> bool:
        assert self.snapshot_every is not None
        return self.since_snapshot >= self.snapshot_every or not self._can_go_back()

    def _take_snapshot(self) -> None:
        """Of the state before this window: its loss has just shown that state to be sound."""
        self.since_snapshot = 0
        self._mark = float(norm_of(p.detach() for p in self._run.parameters))
        snapshot = capture(self._run, self._store.device, forward=None if self._before.is_outdated else self._before)
        self._snapshot_of = [id(p) for p in self._run.parameters]
        self._store.keep(snapshot | {"guard": self.state_dict()})

    def _set_rates(self) -> None:
        """Rates are `lr_scale` times those without rollbacks, and k/n of that for the k-th of n updates of warmup."""
        if self._rates is not None:
            share = max(self.warmed_up, 1) / self.warmup_updates if self.rollbacks and self.warmup_updates else 1.0
            self._rates.set(self.lr_scale * share)

    # ---- flagged

    def _flag(
        self,
        report: Report,
        seen: Seen,
        scores: tuple[float | None, float | None],
        broken: bool,
        high_loss: bool,
        ranks: Ranks,
    ) -> SpikeVerdict:
        self.flags_in_a_row += 1
        why = describe(seen, scores, self.threshold, self._history.typical())
        rank, micro_batch = culprit(report, *self._history.noise(), ranks) or (None, None)
        told = why, seen.loss, seen.grad_norm, *scores, micro_batch, rank
        saved = self._can_go_back()
        if self.policy == "warn" and not broken:
            self._warn()
            logger.warning("spike: %s; applied all the same", why)
            return SpikeVerdict("warned", *told)
        self._drop(report)
        is_lasting = high_loss or self.flags_in_a_row > SPARED
        if self.policy == "rollback" and is_lasting and self.since_snapshot and not ranks.any(not saved):
            self._roll_back()
            verdict = SpikeVerdict("rolled_back", *told, back_to=self.num_accepted)
            done = f"rolled back, rates are now {self.lr_scale:g} of what they were at first"
        else:
            self._before.restore(random_numbers=self._restore_random)
            verdict, done = SpikeVerdict("skipped", *told), "skipped"
        logger.warning("spike: %s; %s", why, done)
        self._give_up_if_hopeless(why)
        return verdict

    def _warn(self) -> None:
        self.num_accepted += 1
        if self.flags_in_a_row >= self.max_flags_in_a_row:  # that is no spike but the new normal
            self.flags_in_a_row = 0
            self._history.clear()

    def _drop(self, report: Report) -> None:
        """The window's gradients are gone, and the scaler has forgotten them without counting a step."""
        for p in (*self._run.parameters, *report.parameters):
            p.grad = None
        if report.scaler is not None and report.scaler.is_enabled():
            report.scaler.update(report.scaler.get_scale())

    def _roll_back(self) -> None:
        snapshot = self._store.recall()
        assert snapshot is not None
        restore(self._run, snapshot, random_numbers=self._restore_random)
        self._load(snapshot["guard"], POSITION)
        self.rollbacks += 1
        self.lr_scale *= self.lr_factor
        self.warmed_up = 0
        self._set_rates()

    def _give_up_if_hopeless(self, why: str) -> None:
        if self.rollbacks <= self.max_rollbacks and self.flags_in_a_row < self.max_flags_in_a_row:
            return
        what = f"{self.flags_in_a_row} windows in a row were flagged"
        if self.rollbacks > self.max_rollbacks:
            what = f"a spike came back after {self.max_rollbacks} rollbacks"
        raise SpikeError(f"{what}, the last because {why}. {HOPELESS.format(self.num_accepted)}")

    def _can_go_back(self) -> bool:
        return self._snapshot_of == [id(p) for p in self._run.parameters]

    # ---- saved and loaded

    def state_dict(self) -> dict[str, Any]:
        """History and counters as plain numbers, for any checkpoint. The snapshot is not in it: it is in `folder`."""
        counts = {name: getattr(self, name) for name in POSITION + COUNTS}
        scale = 1.0 if self._rates is None else self._rates.scale
        return {**self._history.state_dict(), **counts, "applied_lr_scale": scale, "mark": self._mark}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Goes on as the guard did whose state this is. Load model, optimizer, scheduler and scaler beforehand.

        It goes back to the file in `folder`, if that is the one which that guard had; else a new snapshot is taken at
        the first window, before whose update there is none to go back to. ValueError for another kind of state.
        """
        if state.keys() != (own := self.state_dict()).keys():
            raise ValueError(f"a spike guard's state holds {sorted(own)}, this one {sorted(state)}")
        self._load(state, POSITION + COUNTS)
        self._mark = state["mark"]
        self._before = BeforeWindow(self._run)
        self._snapshot_of = None
        kept = self._store.recall() if self._store.survives else None
        before = self.num_accepted - self.since_snapshot
        if kept and (kept["guard"]["mark"], kept["guard"]["num_accepted"]) == (self._mark, before):
            self._snapshot_of = [id(p) for p in self._run.parameters]

    def _load(self, state: Mapping[str, Any], counts: Sequence[str]) -> None:
        self._history.load_state_dict(state)
        for name in counts:
            setattr(self, name, state[name])
        if self._rates is not None:
            self._rates.restored(state["applied_lr_scale"])
