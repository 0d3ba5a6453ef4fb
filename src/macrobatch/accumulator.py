"""Run a window: leave in `p.grad` the gradient of the effective batch's mean loss, computed micro-batch by micro-batch.

Why it is exact: the loss of a micro-batch is a sum over its terms, so the gradients of all micro-batches add up to the
gradient of the sum over the effective batch. Only then are they divided, once, by the number of terms in all of it:

    seed = a power of two near 1 / (terms in a micro-batch)        # exact in any dtype; keeps float16 in range
    for micro_batch in window:
        backward(loss_sum, seed)                                   # p.grad += seed * d loss_sum / dp
    p.grad *= 1 / (seed * total)                                   # total: over all micro-batches and ranks
"""

import math
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.amp.grad_scaler import GradScaler

from macrobatch import structure
from macrobatch.batch import Cut, NumSamples, Window, check_size
from macrobatch.devices import device_of, on_device
from macrobatch.distributed import AUTO, GradientReduction, GroupChoice, Ranks, is_distributed
from macrobatch.gradients import Frozen, WindowGradients, ddp_modules, modules_of, multiply_
from macrobatch.leaves import StrayLeaves
from macrobatch.report import Report
from macrobatch.structure import Nested
from macrobatch.tally import CountFn, Tally, count_window, denominator, ratio
from macrobatch.unscaling import Unscaler
from macrobatch.weighting import LOSS, Terms, checked_count, refuse_bare_token_mean, terms_of

LossFn = Callable[[Any, Nested], Any]


class Accumulator:
    """Runs windows through `loss_fn(model, micro_batch)`: the effective batch's gradient in a micro-batch's memory.

    `model`: a module or a sequence of modules, handed to `loss_fn` as it is; trained are its parameters and those of
    `loss_fn`, if that is a module. `loss_fn` returns `(loss_sum, loss_weight)`, a scalar mean over samples, a
    `macrobatch.Loss`, or with `count=` a sum or `{name: sum}`; see the page on weighting.

    `micro_batch_size`: the most samples in one forward and backward; None takes windows as they come.
    `count`: micro-batch to number of loss terms, or `{name: number}` for several denominators.
    `frozen`: modules that the loss passes through untrained (the discriminator in a generator's turn).
    `autocast`: a dtype, or a context manager that can be entered again, around each call of `loss_fn`.
    `scaler`: a GradScaler; scaled and unscaled inside `run`, updated by `apply_update`.
    `device`: where micro-batches travel; None is where the parameters are.
    `grad_dtype`: see `gradients.WindowGradients`; None sums low precision in float32, ends in the parameter's dtype.
    `cut(batch, start, stop)` and `num_samples(batch)`: for batches that are not nested tensors, batch dimension first.
    `process_group`: "auto" is that of the DDP modules, else all processes; None is this process alone.
    """

    def __init__(
        self,
        model: nn.Module | Sequence[nn.Module],
        loss_fn: LossFn,
        *,
        micro_batch_size: int | None = None,
        count: CountFn | None = None,
        frozen: Sequence[nn.Module] = (),
        autocast: torch.dtype | AbstractContextManager[Any] | None = None,
        scaler: GradScaler | None = None,
        device: torch.device | str | None = None,
        grad_dtype: torch.dtype | None = None,
        cut: Cut | None = None,
        num_samples: NumSamples | None = None,
        process_group: GroupChoice = AUTO,
    ) -> None:
        self.model = model
        self.loss_fn = loss_fn
        self.micro_batch_size = None if micro_batch_size is None else check_size(micro_batch_size)
        self._modules = modules_of(model) + ([loss_fn] if isinstance(loss_fn, nn.Module) else [])
        self._frozen = modules_of(frozen)
        self._count = count
        self._autocast = autocast
        self._unscaler = Unscaler(scaler)
        self._device = None if device is None else torch.device(device)
        self._grad_dtype = grad_dtype
        self._cut = cut
        self._num_samples = num_samples or structure.num_samples
        self._process_group = process_group
        self._names: tuple[str, ...] | None = None  # of sums and metrics; agreed in the first window
        self._exponent: int | None = None  # of the seed; agreed in the first window
        self._knows_leaves = False  # whether a loss graph was searched for trainable tensors outside of the model

    def run(self, batch: Nested, *, add: bool = False) -> Report:
        """`p.grad` is the gradient of the effective batch's mean loss; nothing else changed but buffers and RNG.

        `batch`: a Window, or a collated batch that is cut by `micro_batch_size`. With `add` the gradient is added to
        what `p.grad` holds; otherwise gradients left from before are a ValueError. Under a process group every rank
        calls it, with its own samples, or with `Window([])`. If it raises, gradients are as before.
        """
        with Frozen(self._frozen), WindowGradients(self._modules, self._grad_dtype, add) as gradients:
            pass_ = _Pass(self, gradients.parameters)
            window, everyone_runs = self._agree_on_window(batch, pass_.ranks)
            pass_.count(window)
            overlaps = gradients.match_parameters and everyone_runs
            with GradientReduction(pass_.replicas, pass_.ranks, overlaps, everyone_runs) as reduction:
                for micro_batch, num_samples, is_last in on_device(window.sized(), pass_.device):
                    if is_last:
                        reduction.announce_last()
                    pass_.forward_backward(micro_batch, num_samples, reduction)
                    gradients.absorb()
                pass_.agree_on_exponent()
                pass_.settle()
                sums = gradients.sums()
                for group, share in reduction.finish(gradients.parameters, sums):
                    self._unscaler.unscale_(group)
                    multiply_(group, pass_.factor(share))
            gradients.finish(sums)
            return pass_.report()

    def evaluate(self, batch: Nested) -> Report:
        """The Report that `run` would give, without gradients; the model's mode (train or eval) stays the caller's."""
        with torch.no_grad():
            pass_ = _Pass(self, [p for module in self._modules for p in module.parameters()])
            window, _ = self._agree_on_window(batch, pass_.ranks)
            pass_.count(window)
            with GradientReduction(pass_.replicas, pass_.ranks, overlaps=False, everyone_runs=False):
                for micro_batch, num_samples, _ in on_device(window.sized(), pass_.device):
                    pass_.forward(micro_batch, num_samples)
            pass_.settle()
            return pass_.report()

    def _agree_on_window(self, batch: Nested, ranks: Ranks) -> tuple[Window, bool]:
        """The window to run, and whether every rank has a micro-batch. Bad input on one rank raises on all of them."""
        error: Exception | None = None
        window = Window([])
        try:
            window = self._window(batch)
            has_one = any(True for _ in window)  # draws the first micro-batch
        except Exception as bad_input:
            if ranks.size == 1:
                raise
            error, has_one = bad_input, False
        failed, some_run, some_idle = ranks.any_of(error is not None, has_one, not has_one)
        if failed:
            raise error or RuntimeError("another rank could not make its window: see its error")
        if not some_run:
            raise ValueError("the effective batch is empty: no rank has a sample. Skip empty batches before run")
        return window, not some_idle

    def _window(self, batch: Nested) -> Window:
        if isinstance(batch, Window):
            return batch if self.micro_batch_size is None else batch.cut(self.micro_batch_size, cut=self._cut)
        if self.micro_batch_size is None:
            raise ValueError(
                f"micro_batch_size=None takes a Window, got a {type(batch).__name__}: give the Accumulator a "
                "micro_batch_size to cut batches, or give run a Window([micro_batch, ...])"
            )
        return Window.of_parts(batch, self.micro_batch_size, self._cut, self._num_samples)

    def _around_forward(self, device: torch.device) -> AbstractContextManager[Any]:
        if isinstance(self._autocast, torch.dtype):
            return torch.autocast(device.type, dtype=self._autocast)
        return self._autocast or nullcontext()


class _Pass:
    """One window's way through an accumulator: what is known of it, and what has been added up so far."""

    def __init__(self, accumulator: Accumulator, parameters: Sequence[nn.Parameter]) -> None:
        if not parameters:
            raise ValueError("the model has no parameter that requires a gradient")
        self.accumulator = accumulator
        self.parameters = parameters
        self.replicas = ddp_modules(accumulator._modules) if is_distributed() else []
        self.ranks = Ranks.of(accumulator._process_group, self.replicas)
        self.device = accumulator._device or device_of(parameters)
        self.home = self.device or parameters[0].device  # where sums are kept
        self._autocast = accumulator._around_forward(self.home)
        self._is_first = accumulator._names is None
        self._tally = Tally()
        self._counts: dict[str, Tensor] | None = None
        self._seeds: dict[Any, Tensor] = {}

    def count(self, window: Window) -> None:
        """With `count=`, every denominator is known from here on."""
        count = self.accumulator._count
        if count is not None:
            self._counts, num_micro_batches = count_window(window, count, self.ranks, self.home)
            self._num_micro_batches = 2.0 ** round(math.log2(max(num_micro_batches, 1)))

    def forward(self, micro_batch: Nested, num_samples: int) -> Terms:
        """The loss of one micro-batch in normal form, tallied."""
        if num_samples == 0:
            raise ValueError("a micro-batch of the window holds no samples: leave it out")
        with self._autocast:
            output = self.accumulator.loss_fn(self.accumulator.model, micro_batch)
        terms = terms_of(output, num_samples, self._counts is not None)
        if self._is_first and terms.is_mean:
            refuse_bare_token_mean(micro_batch)
        self._tally.add(terms, num_samples)
        return terms

    def forward_backward(self, micro_batch: Nested, num_samples: int, reduction: GradientReduction) -> None:
        """The gradient of the micro-batch's sum, times the seed, is added to `p.grad`."""
        terms = self.forward(micro_batch, num_samples)
        if terms.is_empty:  # its backward would give 0, or NaN
            if self.ranks.size > 1:
                self.agree_on_exponent()  # in step with the ranks that have terms
            reduction.join_without_terms()
            return
        for name, loss_sum in terms.sums.items():
            if not loss_sum.requires_grad:
                raise ValueError(
                    f"the {name} does not depend on any trainable parameter (it requires no gradient): was it "
                    "detached, or computed under torch.no_grad()? For a micro-batch without terms return (0, 0)"
                )
        self.agree_on_exponent(terms)
        losses = list(terms.sums.values())
        strays = None
        if not self.accumulator._knows_leaves:
            strays = StrayLeaves(losses, self.parameters, self.accumulator.loss_fn)
        torch.autograd.backward(losses, [self._seed(name, terms) for name in terms.sums])
        if strays is not None:
            del terms, losses, loss_sum  # the graph must be gone
            strays.refuse_survivors()
            self.accumulator._knows_leaves = True

    def agree_on_exponent(self, terms: Terms | None = None) -> None:
        """The accumulator's seed is fixed, on all ranks alike: 2**-exponent is near 1 / (terms in a micro-batch)."""
        if self.accumulator._exponent is None:
            size = 1.0 if terms is None or terms.weight is None else float(terms.weight)  # the one read of a weight
            exponent = round(math.log2(max(size, 1.0)))
            self.accumulator._exponent = int(self.ranks.maximum(torch.tensor(exponent)))

    def _seed(self, name: str, terms: Terms) -> Tensor:
        loss_sum = terms.sums[name]
        key = (name, terms.multiplier, loss_sum.dtype, loss_sum.device)
        if key not in self._seeds:
            self._seeds[key] = self.accumulator._unscaler.scale(self._seed_value(name, terms).to(loss_sum))
        return self._seeds[key]

    def _seed_value(self, name: str, terms: Terms) -> Tensor:
        if self._counts is not None:
            share = ratio(self._num_micro_batches, denominator(name, self._counts))
            return torch.as_tensor(share, dtype=torch.float64)
        assert self.accumulator._exponent is not None
        return torch.tensor(terms.multiplier * 2.0**-self.accumulator._exponent, dtype=torch.float64)

    def settle(self) -> None:
        """The totals over the window and over ranks are known."""
        accumulator = self.accumulator
        if self._is_first:  # weights on the device are looked at this once; those on the CPU always are
            for weight in self._tally.weights:
                checked_count(weight.cpu() if isinstance(weight, Tensor) else weight, "loss_weight")
        if accumulator._names is None or self.ranks.size == 1:
            expected = [f"sum {name}" for name in self._counts or [LOSS]]
            accumulator._names = self.ranks.union([*self._tally.columns, *expected])
        self._totals = self._tally.totals(self.ranks, accumulator._names, self.home)

    def factor(self, share: int) -> float | Tensor:
        """What turns a gradient times the seed, times `share`, into that of the mean."""
        if self._counts is not None:
            return share / self._num_micro_batches
        assert self.accumulator._exponent is not None
        return ratio(share * 2.0**self.accumulator._exponent, self._totals.weight)

    def report(self) -> Report:
        """What the window was, with every sum divided by its total."""
        counts = self._counts or {LOSS: self._totals.weight}
        means = {name: value / denominator(name, counts) for name, value in self._totals.kind("sum").items()}
        by_default = next(iter(counts.values())) if len(counts) == 1 else self._totals.num_samples
        metrics = {name: value / counts.get(name, by_default) for name, value in self._totals.kind("metric").items()}
        return Report(
            loss=torch.stack(list(means.values())).sum(),
            loss_weight=counts if len(counts) > 1 else next(iter(counts.values())),
            metrics={name: mean for name, mean in means.items() if name != LOSS} | metrics,
            sample_count=self._totals.num_samples,
            micro_batch_sizes=tuple(self._tally.sizes),
            loss_weights=tuple(self._tally.weights),
            parameters=tuple(self.parameters),
            scaler=self.accumulator._unscaler.scaler,
            process_group=self.ranks.group,
        )
