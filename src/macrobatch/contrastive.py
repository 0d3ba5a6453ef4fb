"""Losses over all outputs of a window, in a micro-batch's memory: in-batch negatives, mined triplets, correlations.

Plain accumulation gives such a loss only the samples of one micro-batch to compare. With outputs z_j = encode(x_j; p)
of the micro-batches j and the loss L(z_1, ..., z_K; p) the chain rule gives instead

    dL/dp = ∂L/∂p + Σ_j (∂z_j/∂p)ᵀ g_j,        g_j = ∂L/∂z_j

in three phases: all z_j, without graphs but for the last m; L and all g_j; then for each j its graph again, unless it
was kept, and a backward from z_j with g_j. 2K - m forwards. Cached gradients (Gao et al. 2021, arXiv 2101.06983) are
m = 0.
"""

import logging
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.amp.grad_scaler import GradScaler
from torch.optim import Optimizer

from macrobatch.accumulator import Accumulator
from macrobatch.alignment import random_of, without_ddp
from macrobatch.auto_size import AutoSize, refuse_coupled
from macrobatch.autocasting import Autocast
from macrobatch.batch import Cut, NumSamples, Window, cut_batch
from macrobatch.coupling import GATHERED_CHOICES
from macrobatch.distributed import AUTO, GradientReduction, GroupChoice, Ranks
from macrobatch.gathered_forward import Encode, Encoder
from macrobatch.gathered_loss import GatheredLoss
from macrobatch.gathered_options import check_batch_norm, check_budget, check_functions, graph_limit
from macrobatch.gathered_window import GatheredRecipe, GatheredWindow
from macrobatch.gradients import WindowGradients
from macrobatch.graph_budget import SAMPLES, Needs, needs_of
from macrobatch.intake import NO_BATCH, agree_on_window
from macrobatch.measuring import Measure
from macrobatch.modules import Frozen
from macrobatch.rehearsal import Rehearsal
from macrobatch.replay import Replay
from macrobatch.report import Report
from macrobatch.sizing import SizeLimit
from macrobatch.structure import Nested, map_tensors, tensors
from macrobatch.window_pass import WindowPass

logger = logging.getLogger("macrobatch")


class GatheredAccumulator(Accumulator):
    """Runs windows whose loss compares all their samples: the effective batch's gradient in a micro-batch's memory.

    `encode(model, micro_batch)` returns any nested structure of tensors with one row for each sample; what the loss
    needs of the samples beside (labels) may be among them. `loss_fn(model, outputs, window)` returns a tensor of shape
    (), a loss of any form over those of the whole effective batch; its own parameters (a temperature in `model`, or in
    `loss_fn`, if that is a module) get their gradient once. `RowBlocks` computes it some rows at a time.

    `keep_graphs`: of how many micro-batches, the last ones, the graph is kept instead of being made a second time.
    "auto" keeps one, which takes no more memory than none unless the loss is large, and with `max_memory` as many as
    there is room for.
    `max_memory`: bytes, "6GB", "80%"; goes with `keep_graphs="auto"`, `micro_batch_size="auto"`, or both.
    `optimizer`: one or several, whose state it leaves room for; None assumes AdamW's.
    `batch_norm`: None warns of layers that couple samples, "micro_batch" does not: they see one micro-batch at a time.
    All else is as in `Accumulator`; `measure` sees each micro-batch's part of the gradient, without the loss's own.
    """

    _choices = GATHERED_CHOICES

    def __init__(
        self,
        model: nn.Module | Sequence[nn.Module],
        encode: Encode,
        loss_fn: GatheredLoss,
        *,
        micro_batch_size: int | Literal["auto"] | None = None,
        keep_graphs: int | Literal["auto"] = "auto",
        max_memory: int | str | None = None,
        optimizer: Optimizer | Sequence[Optimizer] | None = None,
        frozen: Sequence[nn.Module] = (),
        autocast: Autocast = None,
        scaler: GradScaler | None = None,
        measure: Measure | None = None,
        batch_norm: Literal["micro_batch"] | None = None,
        device: torch.device | str | None = None,
        grad_dtype: torch.dtype | None = None,
        cut: Cut | None = None,
        num_samples: NumSamples | None = None,
        rng: Literal["aligned"] | None = None,
        process_group: GroupChoice = AUTO,
    ) -> None:
        check_functions(encode, loss_fn)
        check_batch_norm(batch_norm)
        super().__init__(
            model,
            _SumOfOutputs(encode, loss_fn),
            micro_batch_size=micro_batch_size,
            max_memory=max_memory if micro_batch_size == "auto" else None,
            optimizer=optimizer,
            frozen=frozen,
            autocast=autocast,
            scaler=scaler,
            measure=measure,
            batch_norm=batch_norm,
            device=device,
            grad_dtype=grad_dtype,
            cut=cut,
            num_samples=num_samples,
            process_group=process_group,
        )
        self._gathered = GatheredRecipe(
            encode, loss_fn, self._measure, cut, self._limit, self._beginnings, Replay(), random_of(rng, cut)
        )
        self._graphs = graph_limit(keep_graphs)
        self._budget = check_budget(max_memory, keep_graphs, micro_batch_size)
        self._has_room_for_graphs = max_memory is not None and keep_graphs == "auto"  # how much will be seen

    @property
    def keep_graphs(self) -> int:
        """How many micro-batches' graphs are kept at present: m of 2K - m forwards."""
        return (self._graphs.current or 1) - 1

    def run(self, batch: Nested, *, add: bool = False) -> Report:
        """`p.grad` is the gradient of the loss over all outputs; nothing else changed but buffers and RNG, once.

        `batch` and `add`: as in `Accumulator.run`. Under a process group the loss is over the outputs of all ranks.
        """
        if not self._learned.has_run:
            self._look_first()
        apart = self._measure is not None
        fills = isinstance(batch, Window) and batch.is_loading
        with Frozen(self._frozen), WindowGradients(self._modules, self._grad_dtype, add, apart) as gradients:
            pass_ = WindowPass(self._recipe, self._learned, gradients.parameters)
            window, everyone_runs = agree_on_window(self._window, batch, pass_.ranks)
            recovery = self._recovery(pass_, fills)
            with GradientReduction(pass_.replicas, pass_.ranks, False, everyone_runs) as reduction:
                turn = GatheredWindow(self._gathered, pass_, recovery, reduction, self.keep_graphs)
                while not turn.has_run(window, gradients):
                    gradients.restart()
                    recovery.restart()
                sums = gradients.sums()
                for group, _ in reduction.finish(gradients.parameters, sums):
                    self._unscaler.unscale_(group)
            report = turn.report(sums)
            gradients.finish(sums)
        self._learned.has_run = True
        self._limit.window_ended(max(report.micro_batch_sizes, default=0), report.retries)
        if turn.num_let_go:
            self._graphs.failed(self.keep_graphs + 1)
            logger.warning("out of memory: kept graphs were let go and made again; at most %d now", self.keep_graphs)
        self._graphs.window_ended(self.keep_graphs + 1, turn.num_let_go)
        recovery.log()
        return report

    def evaluate(self, batch: Nested) -> Report:
        """The Report that `run` would give, without gradients; the model's mode (train or eval) stays the caller's."""
        fills = isinstance(batch, Window) and batch.is_loading
        with torch.no_grad():
            pass_ = WindowPass(self._recipe, self._learned, [p for m in self._modules for p in m.parameters()])
            window, _ = agree_on_window(self._window, batch, pass_.ranks)
            recovery = self._recovery(pass_, fills)
            with GradientReduction(pass_.replicas, pass_.ranks, False, False) as reduction:
                turn = GatheredWindow(self._gathered, pass_, recovery, reduction, keep=0)
                turn.evaluate(window)
                return turn.report([])

    def _window(self, batch: Nested) -> Window:
        """As of any accumulator; with a budget the loss takes its part of it first, and graphs what is left at last."""
        search = self._limit if isinstance(self._limit, AutoSize) else None
        begins = search is not None and not search.has_begun
        is_settled = search is None or search.is_found
        looks = (begins or (self._has_room_for_graphs and is_settled)) and not isinstance(batch, NO_BATCH)
        needs = self.needs(batch) if looks else None
        if search is not None and begins and needs is not None:
            refuse_coupled(self._everything)
            samples = max(batch.micro_batch_sizes) if isinstance(batch, Window) else needs.account.num_samples
            search.begin(needs.largest(samples), samples)
        window = super()._window(batch)
        if self._has_room_for_graphs and is_settled and needs is not None:
            self._graphs = SizeLimit(1 + needs.graphs(max(window.micro_batch_sizes), len(window)))
            self._has_room_for_graphs = False
        return window

    def needs(self, batch: Nested) -> Needs | None:
        """What a window such as `batch` needs beside its micro-batches; None on a rank without samples."""
        window = batch if isinstance(batch, Window) else Window([batch], num_samples=self._num_samples)
        if window.num_samples == 0:
            return None
        recipe, (sample, n) = self._recipe, max(window.sized(), key=lambda sized: sized[1])
        rehearsal = Rehearsal(
            self.model,
            self.loss_fn,
            sample,
            autocast=recipe.autocast,
            frozen=self._frozen,
            grad_dtype=self._grad_dtype,
            device=recipe.device,
            cut=self._cut,
            num_samples=self._num_samples,
        )
        few = min(n, SAMPLES)
        part = map_tensors(cut_batch(sample, [few, n - few], self._cut)[0], lambda leaf: leaf.to(rehearsal.device))
        encode, needed = self._gathered.encode, (part, few)
        encoder = Encoder(replace(recipe, model=without_ddp(self.model)), encode, rehearsal.device, is_first=True)
        num_samples = window.num_samples * Ranks.of(recipe.process_group).size
        return needs_of(
            rehearsal, encoder, self._gathered.loss_fn, needed, num_samples, window, self._budget, self._optimizers
        )

    def state_dict(self) -> dict[str, Any]:
        """What was learned on the way: sizes that fit and are fast, and how many graphs. For any checkpoint."""
        return super().state_dict() | {"graphs": None if self._has_room_for_graphs else self._graphs.state_dict()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on as the accumulator went on whose `state_dict` this is."""
        if "graphs" not in state:
            raise ValueError(f"a gathered accumulator's state holds 'graphs', this one {sorted(state)}")
        super().load_state_dict({key: value for key, value in state.items() if key != "graphs"})
        if state["graphs"] is not None:
            if self._has_room_for_graphs:  # the budget was looked at already
                self._graphs, self._has_room_for_graphs = SizeLimit(state["graphs"]["start"]), False
            self._graphs.load_state_dict(state["graphs"])


class _SumOfOutputs(nn.Module):
    """What stands for the loss where one micro-batch is rehearsed; it owns the parameters of the real one."""

    def __init__(self, encode: Encode, loss_fn: GatheredLoss) -> None:
        super().__init__()
        self.encode, self.loss_fn = encode, loss_fn  # as submodules, where they are modules

    def forward(self, model: Any, micro_batch: Nested) -> Tensor:
        """The sum of all outputs: its backward takes what that of any other loss takes."""
        rows = [row for row in tensors(self.encode(model, micro_batch)) if row.requires_grad]
        if not rows:
            raise ValueError("no output of encode depends on a trainable parameter: was it detached?")
        return torch.stack([row.sum().float() for row in rows]).sum()
