"""One window with a loss over all its outputs, from the first forward to the Report: the order of the three phases."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import TypeVar

import torch
from torch import Tensor

from macrobatch.alignment import Random
from macrobatch.batch import Cut, Window
from macrobatch.distributed import GradientReduction, Ranks
from macrobatch.gathered_backward import Backwards, StartOver, rows_of
from macrobatch.gathered_forward import Encode, Encoder, FirstForwards
from macrobatch.gathered_loss import GatheredLoss, WindowLoss
from macrobatch.gathered_pairs import refuse_pairs
from macrobatch.gathering import Outputs, gathered
from macrobatch.gradients import WindowGradients
from macrobatch.measuring import Gradients, Measure, Measurement
from macrobatch.moments import GradientMoments
from macrobatch.recovery import Recovery, RunAgain
from macrobatch.replay import Replay
from macrobatch.report import Report
from macrobatch.sizing import SizeLimit
from macrobatch.state import Beginnings, RandomState, buffer_slots
from macrobatch.tally import Means, Record
from macrobatch.window_pass import WindowPass

T = TypeVar("T")


@dataclass(frozen=True)
class GatheredRecipe:
    """How every window of a gathered accumulator is run. `beginnings`: where its recovery remembers each attempt."""

    encode: Encode
    loss_fn: GatheredLoss
    measure: Measure | None
    cut: Cut | None
    limit: SizeLimit
    beginnings: Beginnings
    replay: Replay
    random: Random


class GatheredWindow:
    """One window on its way. `num_let_go`: how often kept graphs had to make room."""

    def __init__(
        self, recipe: GatheredRecipe, pass_: WindowPass, recovery: Recovery, reduction: GradientReduction, keep: int
    ) -> None:
        self._recipe = recipe
        self._pass = pass_
        self._ranks = pass_.ranks
        self._recovery = recovery
        self._reduction = reduction
        self._keep = keep
        self._encoder = Encoder(pass_.recipe, recipe.encode, pass_.home, is_first=not pass_.learned.has_run)
        self._first = FirstForwards(self._encoder, recipe.replay, recipe.random, recipe.beginnings, pass_.device)
        self._loss: WindowLoss | None = None
        self._measurement = None if recipe.measure is None else Measurement(recipe.measure, pass_.ranks, pass_.home)
        self._measured: list[int] = []  # positions of the pieces in the order in which they were measured
        self._retries = 0  # of backwards
        recipe.replay.watch(buffer_slots(pass_.recipe.everything), pass_.device)

    @property
    def num_let_go(self) -> int:
        """How often kept graphs had to make room for something else."""
        return self._first.num_let_go

    def evaluate(self, window: Window) -> None:
        """The loss is known."""
        self._together(lambda: self._first.run(window, 0, self._recovery, self._reduction))
        outputs, _ = self._gather(window)
        self._loss = loss = self._window_loss()
        self._together(lambda: loss.evaluate(window, outputs))
        loss.sum_value()

    def has_run(self, window: Window, gradients: WindowGradients) -> bool:
        """Every rank's part of the gradient is in `p.grad`; False if the window must run again from zero, on all."""
        self._together(lambda: self._first.run(window, self._keep, self._recovery, self._reduction))
        self._loss = loss = self._window_loss()
        self._loss_gradients(loss, window, gradients)
        start_over = self._together(lambda: self._must_start_over(window, gradients, loss))
        return not self._ranks.any(start_over)

    def _gather(self, window: Window) -> tuple[Outputs, slice]:
        """The outputs of the effective batch, and which of its rows are this rank's."""
        return gathered(self._together(lambda: self._own(window)), self._ranks)

    def _own(self, window: Window) -> Outputs:
        """The outputs of this rank's samples; in the first window it is seen whether they compare samples."""
        first = self._first
        if not self._pass.learned.has_run and first.pieces and (len(first.pieces) > 1 or self._ranks.size > 1):
            self._reduction.announce(False, is_retry=True)  # a forward that not every rank runs
            refuse_pairs(first, window, self._recipe.cut, self._pass.device)
        return first.own()

    def _window_loss(self) -> WindowLoss:
        return WindowLoss(self._encoder, self._recipe.loss_fn, self._pass.learned, self._pass.parameters, self._ranks)

    def _loss_gradients(self, loss: WindowLoss, window: Window, gradients: WindowGradients) -> None:
        """The loss knows its gradients by this rank's outputs; those by its own parameters are in `p.grad`."""
        outputs, own = self._gather(window)
        before = loss.versions()
        self._together(lambda: self._loss_backward(loss, window, outputs, gradients))
        loss.settle(outputs, own, before)
        gradients.absorb()

    def _loss_backward(self, loss: WindowLoss, window: Window, outputs: Outputs, gradients: WindowGradients) -> None:
        random = RandomState(self._pass.device)
        while (message := loss.backward(window, outputs)) is not None:
            if not self._first.holds_graphs:
                raise torch.OutOfMemoryError(_loss_message(message, outputs.num_samples))
            self._first.let_graphs_go()
            gradients.restart()
            random.restore()

    def _must_start_over(self, window: Window, gradients: WindowGradients, loss: WindowLoss) -> bool:
        """Run all backwards; True where a micro-batch would have to be cut that cannot be."""
        after = RandomState(self._pass.device)
        try:
            while not self._have_backwards_run(window, gradients, loss):
                loss.begin_again(gradients)
        except StartOver:
            return True
        after.restore()
        return False

    def _have_backwards_run(self, window: Window, gradients: WindowGradients, loss: WindowLoss) -> bool:
        """False if what was added up so far cannot be told apart, and all backwards must run again."""
        self._forget_measurements()
        backwards = Backwards(
            self._first, loss.gradients, self._pass.learned, self._pass.parameters, self._reduction, self._recipe.cut
        )
        device, limit = self._pass.device, self._recipe.limit
        recovery = Recovery(self._pass.parameters, [], Beginnings(), limit, device, backwards.cut)
        step = self._first.rows.around(backwards.step, rows_of)
        stopwatch = limit.stopwatch(self._pass.home)
        try:
            for job in backwards.jobs(window, device):
                recovery.run(job, job.num_samples, False, step)
                self._measure(self._first.pieces.index(job.piece), job.num_samples)
                gradients.absorb()
                backwards.refuse_strays()
                if stopwatch is not None:
                    stopwatch.lap(job.num_samples)
        except RunAgain:
            return False
        finally:
            self._retries += recovery.retries
            recovery.log()
        return True

    def _measure(self, position: int, num_samples: int) -> None:
        if self._measurement is not None:
            self._measurement.add([p.grad for p in self._pass.parameters], num_samples, num_samples)
            self._measured.append(position)

    def _forget_measurements(self) -> None:
        if self._measurement is not None:
            self._measurement.restart()
            self._measured = []

    def _moments(self, sums: Gradients) -> tuple[GradientMoments | None, tuple[Tensor | None, ...] | None]:
        if self._measurement is None or not sums:
            return None, None
        scale = self._pass.recipe.unscaler.scale(torch.ones((), device=self._pass.home))
        moments = self._measurement.moments(1.0, scale, sums)
        order = sorted(range(len(self._measured)), key=self._measured.__getitem__)
        moments = replace(moments, squared_norms=moments.squared_norms[order])
        return moments, self._measurement.mean_squares(1.0, scale, sums)

    def report(self, sums: Gradients) -> Report:
        """What the window was. `sums`: the window's gradients; none for one that was evaluated."""
        assert self._loss is not None
        moments, mean_squares = self._moments(sums)
        sizes = [size for piece in self._first.pieces for size in piece.sizes or [piece.num_samples]]
        n = self._loss.num_samples
        return Report(
            records=[Record(size, {}, 1, {}, float(size)) for size in sizes],
            means=partial(Means, self._loss.value, float(n), {}, n, self._pass.home),
            parameters=tuple(self._pass.parameters),
            retries=self._recovery.retries + self._retries + self._first.num_let_go,
            moments=moments,
            mean_squares=mean_squares,
            scaler=self._pass.recipe.unscaler.scaler,
            process_group=self._ranks.group,
            modules=self._pass.recipe.modules,
        )

    def _together(self, action: Callable[[], T]) -> T:
        """What `action` returns; where it fails on one rank it fails on all, so that none waits for another."""
        return _together(action, self._ranks)


def _together(action: Callable[[], T], ranks: Ranks) -> T:
    result, error = None, None
    try:
        result = action()
    except Exception as failure:
        if ranks.size == 1:
            raise
        error = failure
    if ranks.any(error is not None):
        raise error or RuntimeError("another rank could not run its window: see its error")
    return result  # type: ignore[return-value]  # set where there is no error


def _loss_message(message: str, num_samples: int) -> str:
    return (
        f"the loss over the outputs of all {num_samples} samples does not fit: {message}. What would help: the same "
        "loss in blocks (RowBlocks(block_loss, rows=...)), outputs of fewer dimensions, a larger memory budget. "
        "Smaller micro-batches would not"
    )
