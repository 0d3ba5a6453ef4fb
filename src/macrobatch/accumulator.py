"""Run a window: leave in `p.grad` the gradient of the effective batch's mean loss, computed micro-batch by micro-batch.

Why it is exact: the loss of a micro-batch is a sum over its terms, so the gradients of all micro-batches add up to the
gradient of the sum over the effective batch. Only then are they divided, once, by the number of terms in all of it:

    seed = a power of two near 1 / (terms in a micro-batch)        # exact in any dtype; keeps float16 in range
    for micro_batch in window:
        backward(loss_sum, seed)                                   # p.grad += seed * d loss_sum / dp
    p.grad *= 1 / (seed * total)                                   # total: over all micro-batches and ranks

For a mean over samples whose number is known beforehand the seed is 1 / total itself, and the last line is left out.
"""

from collections.abc import Mapping, Sequence
from typing import Any, Literal

import torch
from torch import nn
from torch.amp.grad_scaler import GradScaler
from torch.optim import Optimizer

from macrobatch import arguments, structure
from macrobatch.auto_size import AutoSize, refuse_coupled
from macrobatch.autocasting import Autocast, LossFn
from macrobatch.batch import Cut, NumSamples, Window
from macrobatch.budget import check_max_memory
from macrobatch.coupling import CHOICES
from macrobatch.distributed import AUTO, GradientReduction, GroupChoice
from macrobatch.engine import direct_engine
from macrobatch.gradients import WindowGradients, multiply_
from macrobatch.intake import agree_on_window, refuse_loader, window_of
from macrobatch.measuring import Measure, check_measure
from macrobatch.modules import Frozen, modules_of, submodules, trainable, trainable_of
from macrobatch.recipe import Recipe
from macrobatch.recovery import Recovery, RunAgain
from macrobatch.report import Report
from macrobatch.searching import begin_search
from macrobatch.seeds import Learned
from macrobatch.state import Beginnings, buffer_slots, buffer_slots_of
from macrobatch.structure import Nested
from macrobatch.tally import CountFn
from macrobatch.unscaling import Unscaler
from macrobatch.ways import BatchNorm, Running, warn_of_coupling, way_of
from macrobatch.window_pass import WindowPass


class Accumulator:
    """Runs windows through `loss_fn(model, micro_batch)`: the effective batch's gradient in a micro-batch's memory.

    `model`: a module or a sequence of modules, handed to `loss_fn` as it is; trained are its parameters and those of
    `loss_fn`, if that is a module. `loss_fn` returns `(loss_sum, loss_weight)`, a scalar mean over samples, a
    `macrobatch.Loss`, or with `count=` a sum or `{name: sum}`; see the page on weighting.

    `micro_batch_size`: the most samples in one forward and backward; None takes windows as they come; "auto" finds the
    fastest that fits into `max_memory` (bytes, "6GB", "80%", None for what the device has) during the first windows.
    `optimizer`: one or several, whose state "auto" leaves room for, as `plan` does; None assumes AdamW's. Not stepped.
    `count`: micro-batch to number of loss terms, or `{name: number}` for several denominators.
    `batch_norm`: "exact" normalises over the whole window, "pooled" gathers its running statistics, "micro_batch" does
    neither, on purpose; None does neither and warns of the layers that this concerns. See the page on batchnorm.
    `frozen`: modules that the loss passes through untrained (the discriminator in a generator's turn).
    `autocast`: a dtype, or a context manager that can be entered again, around each call of `loss_fn`.
    `scaler`: a GradScaler; scaled and unscaled inside `run`, updated by `apply_update`.
    `measure`: "norms" of each micro-batch's own gradient, as `Report.moments`; "squares" adds `Report.mean_squares`.
    `device`: where micro-batches travel; None is where the parameters are.
    `grad_dtype`: see `gradients.WindowGradients`; None sums low precision in float32, ends in the parameter's dtype.
    `cut(batch, start, stop)` and `num_samples(batch)`: for batches that are not nested tensors, batch dimension first.
    `rng`: "aligned" draws for each micro-batch its rows of what the full batch would draw: its dropout, exactly, where
    rows are the samples in their order; others are refused as far as they are seen. See the page on aligned_random.
    `process_group`: "auto" is that of the DDP modules, else all processes; None is this process alone.
    `overlap`: DDP reduces in the last backward; False: after it, and out of memory is recovered in that one too.
    """

    _choices = CHOICES  # where layers couple samples

    def __init__(
        self,
        model: nn.Module | Sequence[nn.Module],
        loss_fn: LossFn,
        *,
        micro_batch_size: int | Literal["auto"] | None = None,
        max_memory: int | str | None = None,
        optimizer: Optimizer | Sequence[Optimizer] | None = None,
        count: CountFn | None = None,
        batch_norm: BatchNorm | None = None,
        frozen: Sequence[nn.Module] = (),
        autocast: Autocast = None,
        scaler: GradScaler | None = None,
        measure: Measure | None = None,
        device: torch.device | str | None = None,
        grad_dtype: torch.dtype | None = None,
        cut: Cut | None = None,
        num_samples: NumSamples | None = None,
        rng: Literal["aligned"] | None = None,
        process_group: GroupChoice = AUTO,
        overlap: bool = True,
    ) -> None:
        arguments.check_loss_fn(loss_fn)
        self.model = model
        self.loss_fn = loss_fn
        self._measure = check_measure(measure)
        self._way = way_of(batch_norm, measure, rng, cut)
        self._limit = self._way.limit(micro_batch_size, max_memory)
        self._max_memory = check_max_memory(max_memory)
        self._optimizers = arguments.check_optimizer(optimizer)
        self._modules = modules_of(model) + ([loss_fn] if isinstance(loss_fn, nn.Module) else [])
        self._beginnings = Beginnings()
        self._frozen = arguments.check_frozen(frozen)
        self._unscaler = Unscaler(arguments.check_scaler(scaler))
        self._grad_dtype = arguments.check_grad_dtype(grad_dtype)
        self._overlap = arguments.check_flag(overlap, "overlap")
        self._cut = arguments.check_cut(cut)
        self._num_samples = arguments.check_num_samples(num_samples) or structure.num_samples
        arguments.check_autocast(autocast)
        arguments.check_count(count)
        where, group = arguments.check_device(device), arguments.check_group(process_group)
        self._everything = self._modules + self._frozen
        # "auto" refuses such layers. A model may come in eval mode, so the first window is looked at once more.
        self._may_warn = batch_norm is None and not isinstance(self._limit, AutoSize)
        self._may_warn = self._may_warn and not warn_of_coupling(self._everything, self._choices)
        self._recipe = Recipe(
            model, self._modules, self._everything, loss_fn, count, autocast, self._unscaler, where, group
        )
        self._learned = Learned()

    def run(self, batch: Nested, *, add: bool = False) -> Report:
        """`p.grad` is the gradient of the effective batch's mean loss; nothing else changed but buffers and RNG.

        `batch`: a Window, or a collated batch that is cut by `micro_batch_size`. With `add` the gradient is added to
        what `p.grad` holds; otherwise gradients left from before are a ValueError. Under a process group every rank
        calls it, with its own samples, or with `Window([])`. If it raises, gradients are as before.
        """
        if not self._learned.has_run:
            self._look_first()
        apart = self._measure is not None
        fills = isinstance(batch, Window) and batch.is_loading  # while it runs
        walked = list(submodules(self._everything))  # anew for each window: nothing can go stale
        with (
            Frozen(self._frozen),
            self._way.around(self._everything, self._recipe.process_group),
            WindowGradients(self._modules, self._grad_dtype, add, apart, self._trainable(walked)) as gradients,
        ):
            pass_ = WindowPass(self._recipe, self._learned, gradients.parameters, self._measure)
            window, everyone_runs = agree_on_window(self._window, batch, pass_.ranks)
            pass_.count(window)
            recovery = self._recovery(pass_, fills, walked)
            overlaps = self._overlap and self._way.overlaps and bool(pass_.replicas) and gradients.match_parameters
            with GradientReduction(pass_.replicas, pass_.ranks, overlaps, everyone_runs) as reduction:
                running = Running(window, pass_, gradients, reduction, recovery, self._limit, self._cut)
                while not self._has_run(running):
                    pass_.restart()
                    gradients.restart()
                    recovery.restart()
                reduction.complete()
                pass_.agree_on_exponent()
                pass_.settle(can_wait=True)
                sums = gradients.sums()
                for group, share in reduction.finish(gradients.parameters, sums):
                    self._unscaler.unscale_(group)
                    multiply_(group, pass_.factor(share))
            pass_.measured(sums)
            gradients.finish(sums)
            report = pass_.report(recovery.retries)
        if not self._learned.has_run:
            self._beginnings.learn()
        self._learned.has_run = True
        self._limit.window_ended(max((record.num_samples for record in report.records), default=0), report.retries)
        recovery.log()
        return report

    def _look_first(self) -> None:
        """What shows only where gradients are wanted: a model in train mode, a backward without a scaler."""
        direct_engine()  # known before anything runs
        if self._may_warn:
            warn_of_coupling(self._everything, self._choices)
        if self._unscaler.scaler is None:
            arguments.warn_of_underflow(self._recipe.autocast)

    def _has_run(self, running: Running) -> bool:
        """Run every micro-batch of the window; False if it must be run again from zero, on this rank alone."""
        try:
            self._way.run(running)
        except RunAgain:
            return False
        return True

    def evaluate(self, batch: Nested) -> Report:
        """The Report that `run` would give, without gradients; the model's mode (train or eval) stays the caller's."""
        with torch.no_grad(), self._way.around(self._everything, self._recipe.process_group):
            pass_ = WindowPass(self._recipe, self._learned, [p for m in self._modules for p in m.parameters()])
            window, _ = agree_on_window(self._window, batch, pass_.ranks)
            pass_.count(window)
            with GradientReduction(pass_.replicas, pass_.ranks, overlaps=False, everyone_runs=False):
                self._way.evaluate(window, pass_)
            pass_.settle()
            return pass_.report(0)

    def _trainable(self, walked: list[nn.Module]) -> list[nn.Parameter]:
        return trainable(self._modules) if self._frozen else trainable_of(walked)

    def _recovery(self, pass_: WindowPass, fills: bool, walked: list[nn.Module] | None = None) -> Recovery:
        slots = buffer_slots(self._everything) if walked is None else buffer_slots_of(walked)
        return Recovery(pass_.parameters, slots, self._beginnings, self._limit, pass_.device, self._cut, fills)

    def _window(self, batch: Nested) -> Window:
        refuse_loader(batch)
        if isinstance(self._limit, AutoSize):
            refuse_coupled(self._everything)
            if not self._limit.has_begun:
                begin_search(
                    self._limit,
                    self.model,
                    self.loss_fn,
                    batch,
                    max_memory=self._max_memory,
                    optimizers=self._optimizers,
                    device=self._recipe.device,
                    autocast=self._recipe.autocast,
                    frozen=self._frozen,
                    grad_dtype=self._grad_dtype,
                    cut=self._cut,
                    num_samples=self._num_samples,
                )
        return window_of(batch, self._limit, self._cut, self._num_samples)

    def state_dict(self) -> dict[str, Any]:
        """What was learned on the way: sizes that fit and are fast, the seed. Plain numbers, for any checkpoint."""
        return {"limit": self._limit.state_dict(), "exponent": self._learned.exponent}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on as the accumulator went on whose `state_dict` this is; the first window is checked as any first one."""
        if set(state) != {"limit", "exponent"}:
            raise ValueError(f"an accumulator's state holds 'limit' and 'exponent', this one {sorted(state)}")
        self._limit.load_state_dict(state["limit"])
        self._learned.exponent = state["exponent"]

    @property
    def micro_batch_size(self) -> int | None:
        """The most samples in one forward and backward at present; None takes windows as they come."""
        return self._limit.current

    @property
    def offloaded_bytes(self) -> int:
        """The most that the last window kept in host memory for its backward; 0 unless `batch_norm="exact"`."""
        return self._way.offloaded_bytes
