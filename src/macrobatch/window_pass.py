"""One window on its way: forward, backward with the seed, and in the end the totals, the factor and the Report."""

import math
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from macrobatch.batch import Window
from macrobatch.devices import device_of
from macrobatch.distributed import GradientReduction, GroupChoice, Ranks, is_distributed
from macrobatch.gradients import LOW_PRECISION, ddp_modules
from macrobatch.leaves import StrayLeaves, has_nested_backward
from macrobatch.recovery import Attempt
from macrobatch.report import Report
from macrobatch.state import coupled_layer
from macrobatch.structure import Nested
from macrobatch.tally import CountFn, Tally, count_window, denominator, ratio
from macrobatch.unscaling import Unscaler
from macrobatch.weighting import LOSS, Terms, checked_count, refuse_bare_token_mean, terms_of

LossFn = Callable[[Any, Nested], Any]
Autocast = torch.dtype | AbstractContextManager[Any] | None


@dataclass(frozen=True)
class Recipe:
    """How every window of an accumulator is run."""

    model: nn.Module | Sequence[nn.Module]
    modules: list[nn.Module]  # whose parameters are trained
    everything: list[nn.Module]  # and those that the loss passes through frozen
    loss_fn: LossFn
    count: CountFn | None
    autocast: Autocast
    unscaler: Unscaler
    device: torch.device | None
    process_group: GroupChoice


@dataclass
class Learned:
    """What the first windows of an accumulator told about the loss."""

    names: tuple[str, ...] | None = None  # of sums and metrics, the same on every rank
    exponent: int | None = None  # of the seed, the same on every rank
    has_run: bool = False  # whether a window went through `run`: the first one is looked at more closely
    knows_leaves: bool = False  # whether a loss graph was searched for trainable tensors outside of the model


class WindowPass:
    """One window's way through an accumulator: what is known of it, and what has been added up so far."""

    def __init__(self, recipe: Recipe, learned: Learned, parameters: Sequence[nn.Parameter]) -> None:
        if not parameters:
            raise ValueError("the model has no parameter that requires a gradient")
        self.recipe = recipe
        self.learned = learned
        self.parameters = parameters
        self.replicas = ddp_modules(recipe.modules) if is_distributed() else []
        self.ranks = Ranks.of(recipe.process_group, self.replicas)
        self.device = recipe.device or device_of(parameters)
        self.home = self.device or parameters[0].device  # where sums are kept
        self._autocast = _around_forward(recipe.autocast, self.home)
        self._is_first = not learned.has_run
        self._tally = Tally()
        self._counts: dict[str, Tensor] | None = None
        self._seeds: dict[Any, Tensor] = {}
        self._num_samples = 0  # of the effective batch, where known beforehand
        self._next_exponent: int | None = None
        self._unit = 0.0  # what one term counts for in the seeds, from the first backward on
        self._strays: StrayLeaves | None = None

    def count(self, window: Window) -> None:
        """With `count=`, every denominator is known from here on; else perhaps the number of samples."""
        count = self.recipe.count
        if count is None and window.is_filled and self.ranks.size == 1:
            self._num_samples = window.num_samples
        if count is not None:
            self._counts, num_micro_batches = count_window(window, count, self.ranks, self.home)
            self._num_micro_batches = 2.0 ** round(math.log2(max(num_micro_batches, 1)))

    def restart(self) -> None:
        """Nothing has been added up yet."""
        self._tally = Tally()

    def forward(self, micro_batch: Nested, num_samples: int) -> Terms:
        """The loss of one micro-batch in normal form, tallied."""
        terms = self._terms(micro_batch, num_samples)
        self._tally.add(terms, num_samples)
        return terms

    def _terms(self, micro_batch: Nested, num_samples: int) -> Terms:
        if num_samples == 0:
            raise ValueError("a micro-batch of the window holds no samples: leave it out")
        with self._autocast:
            output = self.recipe.loss_fn(self.recipe.model, micro_batch)
        terms = terms_of(output, num_samples, self._counts is not None)
        if self._is_first and terms.is_mean:
            refuse_bare_token_mean(micro_batch)
        return terms

    def forward_backward(self, attempt: Attempt, reduction: GradientReduction) -> None:
        """The gradient of the micro-batch's sum, times the seed, is added to `p.grad`, and its loss is tallied."""
        terms = self._terms(attempt.micro_batch, attempt.num_samples)
        try:
            if not terms.is_empty:
                self._backward(terms, attempt)
            elif self.ranks.size > 1:  # a backward without terms would give 0, or NaN
                self.agree_on_exponent()  # in step with the ranks that have terms
                reduction.join_without_terms()
            self._tally.add(terms, attempt.num_samples)
        except RuntimeError:
            couples = coupled_layer(self.recipe.everything) is not None
            nested = has_nested_backward(list(terms.sums.values()))
            attempt.can_mend = not (couples or nested)
            attempt.has_communicated = attempt.started_backward and reduction.is_communicating
            raise

    def _backward(self, terms: Terms, attempt: Attempt) -> None:
        for name, loss_sum in terms.sums.items():
            if not loss_sum.requires_grad:
                raise ValueError(
                    f"the {name} does not depend on any trainable parameter (it requires no gradient): was it "
                    "detached, or computed under torch.no_grad()? For a micro-batch without terms return (0, 0)"
                )
        self.agree_on_exponent(terms)
        losses = list(terms.sums.values())
        if not self.learned.knows_leaves and self._strays is None:
            self._strays = StrayLeaves(losses, self.parameters, self.recipe.loss_fn)
        if attempt.inputs == []:
            return  # every parameter has its gradient from before the micro-batch ran out of memory
        seeds = [self._seed(name, terms) for name in terms.sums]
        attempt.started_backward = True
        torch.autograd.backward(losses, seeds, inputs=attempt.inputs)

    def refuse_strays(self) -> None:
        """ValueError if the first loss graph, gone by now, had leaves outside of the model that live on."""
        if self._strays is not None:
            self._strays.refuse_survivors()
            self._strays, self.learned.knows_leaves = None, True

    def agree_on_exponent(self, terms: Terms | None = None) -> None:
        """The seed is known, on all ranks alike: 2**-exponent is near 1 / (terms in a micro-batch)."""
        if self.learned.exponent is None:
            size = 1.0 if terms is None or terms.weight is None else float(terms.weight)  # the one read of a weight
            exponent = round(math.log2(max(size, 1.0)))
            self.learned.exponent = int(self.ranks.maximum(torch.tensor(exponent)))

    def _seed(self, name: str, terms: Terms) -> Tensor:
        loss_sum = terms.sums[name]
        key = (name, terms.multiplier, loss_sum.dtype, loss_sum.device)
        if key not in self._seeds:
            self._seeds[key] = self.recipe.unscaler.scale(self._seed_value(name, terms).to(loss_sum))
        return self._seeds[key]

    def _seed_value(self, name: str, terms: Terms) -> Tensor:
        if self._counts is not None:
            share = ratio(self._num_micro_batches, denominator(name, self._counts))
            return torch.as_tensor(share, dtype=torch.float64)
        if not self._unit:
            assert self.learned.exponent is not None
            # A mean over samples whose number is known is divided right here, and needs no multiplication at the end;
            # not in low precision, where only a power of two keeps the seed exact.
            divides = terms.is_mean and self._num_samples and terms.sums[name].dtype not in LOW_PRECISION
            self._unit = 1 / self._num_samples if divides else 2.0**-self.learned.exponent
        return torch.tensor(terms.multiplier * self._unit, dtype=torch.float64)

    def settle(self) -> None:
        """The totals over the window and over ranks are known."""
        if self._is_first:  # weights on the device are looked at this once; those on the CPU always are
            for weight in self._tally.weights:
                checked_count(weight.cpu() if isinstance(weight, Tensor) else weight, "loss_weight")
        if self.learned.names is None or self.ranks.size == 1:
            expected = [f"sum {name}" for name in self._counts or [LOSS]]
            self.learned.names = self.ranks.union([*self._tally.columns, *expected])
        self._totals = self._tally.totals(self.ranks, self.learned.names, self.home)
        self._relearn_exponent()

    def _relearn_exponent(self) -> None:
        """The next window's seed fits a typical micro-batch; the first of all may have been masked almost wholly."""
        if self.ranks.size == 1 and (self._is_first or self.home.type == "cpu") and self._counts is None:
            weight = float(self._totals.weight)
            if weight > 0 and math.isfinite(weight):
                self._next_exponent = round(math.log2(max(weight / len(self._tally.sizes), 1.0)))

    def factor(self, share: int) -> float | Tensor:
        """What turns a gradient times the seed, times `share`, into that of the mean."""
        if self._counts is not None:
            return share / self._num_micro_batches
        weight = self._totals.weight if self._totals.known_weight is None else self._totals.known_weight
        assert self.learned.exponent is not None
        unit = self._unit or 2.0**-self.learned.exponent  # a rank that had no backward reduces what the others had
        return ratio(share / unit, weight)

    def report(self, retries: int) -> Report:
        """What the window was, with every sum divided by its total."""
        if self._next_exponent is not None and self.learned.exponent is not None:
            self.learned.exponent = self._next_exponent
        counts = self._counts or {LOSS: self._totals.weight}
        sums = self._totals.kind("sum")
        divisors = {name: denominator(name, counts) for name in sums}
        means = {name: value / divisors[name] for name, value in sums.items()}  # NaN where there was nothing to average
        parts = torch.stack([mean.where(divisors[name] != 0, 0.0) for name, mean in means.items()])
        has_terms = torch.stack([divisor != 0 for divisor in divisors.values()]).any()
        by_default = next(iter(counts.values())) if len(counts) == 1 else self._totals.num_samples
        metrics = {name: value / counts.get(name, by_default) for name, value in self._totals.kind("metric").items()}
        return Report(
            loss=parts.sum().where(has_terms, torch.nan),
            loss_weight=counts if len(counts) > 1 else next(iter(counts.values())),
            metrics={name: mean for name, mean in means.items() if name != LOSS} | metrics,
            sample_count=self._totals.num_samples,
            micro_batch_sizes=tuple(self._tally.sizes),
            loss_weights=tuple(self._tally.weights),
            parameters=tuple(self.parameters),
            retries=retries,
            scaler=self.recipe.unscaler.scaler,
            process_group=self.ranks.group,
        )


def _around_forward(autocast: Autocast, device: torch.device) -> AbstractContextManager[Any]:
    if isinstance(autocast, torch.dtype):
        return torch.autocast(device.type, dtype=autocast)
    return autocast or nullcontext()
