"""One window on its way: forward, backward with the seed, and in the end the totals, the factor and the Report."""

from collections.abc import Callable, Sequence
from functools import partial

import torch
from torch import Tensor, nn

from macrobatch.autocasting import under
from macrobatch.batch import Window
from macrobatch.call_notes import note_call
from macrobatch.devices import CPU, device_of
from macrobatch.distributed import GradientReduction, Ranks, is_distributed
from macrobatch.engine import backward
from macrobatch.gradients import WindowGradients
from macrobatch.leaves import StrayLeaves, has_nested_backward
from macrobatch.lockstep import Together
from macrobatch.measuring import Measure, Measurement
from macrobatch.modules import ddp_modules
from macrobatch.moments import GradientMoments
from macrobatch.recipe import Recipe
from macrobatch.recovery import Attempt
from macrobatch.reductions import refuse_ignored_labels, warn_of_mixed_means
from macrobatch.report import Report
from macrobatch.seeds import Learned, Seeds
from macrobatch.state import coupled_layer
from macrobatch.structure import Nested
from macrobatch.tally import Means, Tally, count_window, means_of
from macrobatch.untouched import leaving_gradients
from macrobatch.weighting import LOSS, Count, Terms, checked_count, refuse_bare_token_mean, terms_of

RunTogether = Callable[[Sequence[Callable[[], Terms]]], Together[Terms]]


class WindowPass:
    """One window's way through an accumulator: what is known of it, and what has been added up so far."""

    def __init__(
        self, recipe: Recipe, learned: Learned, parameters: Sequence[nn.Parameter], measure: Measure | None = None
    ) -> None:
        if not parameters:
            raise ValueError("the model has no parameter that requires a gradient")
        self.recipe = recipe
        self.learned = learned
        self.parameters = parameters
        several = is_distributed()
        self.replicas = ddp_modules(recipe.modules) if several else []
        self.ranks = Ranks.of(recipe.process_group, self.replicas) if several else Ranks(None)
        self.device = recipe.device or device_of(parameters)
        self.home = self.device or parameters[0].device  # where sums are kept
        self._loss_fn = under(recipe.autocast, recipe.loss_fn, self.home)
        self._is_first = not learned.has_run
        self._tally = Tally()
        self._counts: dict[str, Count] | None = None
        self._terms_each: dict[str, Count] | None = None  # on average, in a micro-batch
        self._label_counts: dict[int, set[int]] = {}  # in the first window, of samples, for each cross-entropy
        self._seeds = Seeds(learned, self.ranks, recipe.unscaler)
        self._strays: StrayLeaves | None = None
        self._measurement = None if measure is None else Measurement(measure, self.ranks, self.home)
        self._moments: GradientMoments | None = None
        self._mean_squares: tuple[Tensor | None, ...] | None = None

    def count(self, window: Window) -> None:
        """With `count=`, every denominator is known from here on; else perhaps the number of samples."""
        count = self.recipe.count
        if count is None and window.is_filled and self.ranks.size == 1:
            self._seeds.know_samples(window.num_samples)
        if count is not None:
            self._counts, num_micro_batches = count_window(window, count, self.ranks, self.home)
            self._seeds.know_counts(self._counts, num_micro_batches)
            self._terms_each = {name: total / max(num_micro_batches, 1) for name, total in self._counts.items()}

    def restart(self) -> None:
        """Nothing has been added up yet."""
        self._tally = Tally()
        if self._measurement is not None:
            self._measurement.restart()

    def forward(self, micro_batch: Nested, num_samples: int) -> Terms:
        """The loss of one micro-batch in normal form, tallied."""
        terms = self._terms(micro_batch, num_samples)
        self._tally.add(terms, num_samples)
        return terms

    def _terms(self, micro_batch: Nested, num_samples: int) -> Terms:
        if num_samples == 0:
            raise ValueError("a micro-batch of the window holds no samples: leave it out")
        if self._is_first:
            return self._first_terms(micro_batch, num_samples)
        output = self._loss_fn(self.recipe.model, micro_batch)
        return terms_of(output, num_samples, self._counts is not None)

    def _first_terms(self, micro_batch: Nested, num_samples: int) -> Terms:
        """In the first window the loss is looked at more closely, so that what is wrong shows before it trains."""
        try:
            output = leaving_gradients(
                partial(self._loss_fn, self.recipe.model, micro_batch), self.parameters, "loss_fn"
            )
        except Exception as error:
            note_call(error, "loss_fn", micro_batch)
            raise
        terms = terms_of(output, num_samples, self._counts is not None)
        if terms.is_mean:
            refuse_bare_token_mean(micro_batch)
            refuse_ignored_labels(terms.sums[LOSS], num_samples, self._label_counts)
        if not self.learned.has_warned:
            self.learned.has_warned = warn_of_mixed_means(terms, num_samples, self._terms_each)
        return terms

    def forward_backward(self, reduction: GradientReduction, attempt: Attempt) -> None:
        """The gradient of the micro-batch's sum, times the seed, is added to `p.grad`, and its loss is tallied."""
        if self.replicas:
            reduction.announce(False, is_retry=attempt.is_retry)  # not before its backward, see `prepare`
        terms = self._terms(attempt.micro_batch, attempt.num_samples)
        try:
            if not terms.is_empty:
                self._backward([terms], attempt, reduction=reduction)
            elif self.ranks.size > 1:  # a backward without terms would give 0, or NaN
                self.agree_on_exponent()  # in step with the ranks that have terms
                if attempt.is_last:
                    reduction.join_without_terms()
            self._tally.add(terms, attempt.num_samples)
        except RuntimeError:
            couples = coupled_layer(self.recipe.everything) is not None
            nested = has_nested_backward(list(terms.sums.values()))
            attempt.can_mend = not (couples or nested)
            attempt.has_communicated = attempt.started_backward and reduction.is_communicating
            raise

    def forward_together(self, micro_batches: Sequence[tuple[Nested, int]], run: RunTogether) -> Together[Terms]:
        """The losses of all micro-batches, tallied; `run` makes their forwards, as it sees fit."""
        together = run([partial(self._terms, micro_batch, n) for micro_batch, n in micro_batches])
        for terms, (_, n) in zip(together.results, micro_batches, strict=True):
            self._tally.add(terms, n)
        return together

    def forward_backward_together(self, micro_batches: Sequence[tuple[Nested, int]], run: RunTogether) -> None:
        """As `forward_backward` of each, but `run` makes all the forwards, and their graphs have one backward."""
        together = self.forward_together(micro_batches, run)
        all_terms = [terms for terms in together.results if not terms.is_empty]
        someone_waits = self.ranks.size > 1 and self.ranks.any(not all_terms)  # for ranks without a loss
        chain = together.chain if someone_waits else None
        chains = [chain] if chain is not None and chain.requires_grad else []
        if all_terms or chains:
            self._backward(all_terms, Attempt(None, 0, is_last=True), chains)

    def _backward(
        self,
        all_terms: Sequence[Terms],
        attempt: Attempt,
        chains: Sequence[Tensor] = (),
        reduction: GradientReduction | None = None,
    ) -> None:
        if self.learned.exponent is None:
            self._seeds.agree(all_terms[0].weight if all_terms else None)
        losses, seeds = [], []
        for terms in all_terms:
            for name, loss_sum in terms.sums.items():
                losses.append(loss_sum)
                seeds.append(self._seeds.of(name, terms))
        if chains:
            losses, seeds = [*chains, *losses], [*map(torch.zeros_like, chains), *seeds]
        if not self.learned.knows_leaves and self._strays is None:
            self._strays = StrayLeaves(losses, self.parameters, self.recipe.loss_fn)
        if attempt.inputs == []:
            return  # every parameter has its gradient from before the micro-batch ran out of memory
        if self.replicas and attempt.is_last and reduction is not None:
            reduction.prepare(losses)
        attempt.started_backward = True
        try:
            backward(losses, seeds, attempt.inputs)
        except RuntimeError:
            _refuse_detached(all_terms)  # asked only now, since a backward refuses them, too
            raise

    def micro_batch_ended(self, gradients: WindowGradients) -> None:
        """After each micro-batch, in however many parts: what is its own is measured, and it joins the window's sum."""
        if self._measurement is not None:
            self.measure(gradients)
        if gradients.adds_up_itself:
            gradients.absorb()
        if self._strays is not None:
            self.refuse_strays()

    def refuse_strays(self) -> None:
        """ValueError if the first loss graph, gone by now, had leaves outside of the model that live on."""
        if self._strays is not None:
            self._strays.refuse_survivors()
            self._strays, self.learned.knows_leaves = None, True

    def agree_on_exponent(self) -> None:
        """Every rank has taken part in agreeing on the seed, also one without a backward."""
        self._seeds.agree(None)

    def measure(self, gradients: WindowGradients) -> None:
        """After each micro-batch: its own gradients are measured, if that was asked for; parts of it count as one."""
        if self._measurement is not None:
            parts = self._tally.since_last()
            num_samples = sum(part.num_samples for part in parts)
            weights = [num_samples] if self._counts is not None else [part.weight for part in parts]
            weight = sum(weight for weight in weights if weight is not None)
            self._measurement.add([p.grad for p in gradients.parameters], weight, num_samples)

    def measured(self, gradients: Sequence[Tensor | None]) -> None:
        """What was measured is known for the whole window, whose gradients these are; before they change dtype."""
        if self._measurement is not None:
            factor, scale = self.factor(1), self.recipe.unscaler.scale(torch.ones((), device=self.home))
            self._moments = self._measurement.moments(factor, scale, gradients)
            self._mean_squares = self._measurement.mean_squares(factor, scale, gradients)

    def settle(self, *, can_wait: bool = False) -> None:
        """The totals over the window and over ranks are known; those that nothing depends on, when they are asked for.

        `can_wait`: which holds for the losses of one process on the CPU, where they are numbers.
        """
        if self._is_first:  # weights on the device are looked at this once; those on the CPU always are
            for weight in self._tally.weights:
                checked_count(weight.cpu() if isinstance(weight, Tensor) else weight, "loss_weight")
        if can_wait and self.ranks.size == 1 and self.home == CPU:
            self._weight = self._tally.weight(self.home)
            self._means: Callable[[], Means] = partial(self._tally.means, self._counts, self.home)
        else:
            totals = self._tally.totals(self._counts or (LOSS,), self.home)
            if self.ranks.size > 1:
                trains = torch.is_grad_enabled()  # metrics may be given in the one case only
                known = self.learned.names.get(trains)  # asking for names costs a message
                totals = totals.over(self.ranks, known, self.home)
                self.learned.names[trains] = tuple(totals.columns)
            self._weight = totals.weight
            self._means = partial(Means, *means_of(totals, self._counts, self.home))
        if self.ranks.size == 1 and (self._is_first or self.home == CPU):
            self._seeds.relearn(float(self._weight), len(self._tally.records))

    def factor(self, share: int) -> float | Tensor:
        """What turns a gradient times the seed, times `share`, into that of the mean."""
        return self._seeds.factor(share, self._weight)

    def report(self, retries: int) -> Report:
        """What the window was, with every sum divided by its total."""
        self._seeds.window_ended()
        return Report(
            records=self._tally.records,
            means=self._means,
            parameters=tuple(self.parameters),
            retries=retries,
            moments=self._moments,
            mean_squares=self._mean_squares,
            scaler=self.recipe.unscaler.scaler,
            process_group=self.ranks.group,
            modules=self.recipe.modules,
        )


def _refuse_detached(all_terms: Sequence[Terms]) -> None:
    for terms in all_terms:
        for name, loss_sum in terms.sums.items():
            if not loss_sum.requires_grad:
                raise ValueError(
                    f"the {name} does not depend on any trainable parameter (it requires no gradient): was it "
                    "detached, or computed under torch.no_grad()? For a micro-batch without terms return (0, 0)"
                ) from None
