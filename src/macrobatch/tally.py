"""What the micro-batches of a window add up to: losses, their weights and metrics, over the window and over ranks."""

import math
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from macrobatch.distributed import Ranks
from macrobatch.structure import Nested
from macrobatch.weighting import LOSS, Count, Terms, checked_count, known

Part = tuple[
    Count, int
]  # a value and how often it counts: micro-batch means are multiplied at the end, not in the loop
CountFn = Callable[[Nested], Count | Mapping[str, Count]]


@dataclass
class Tally:
    """The records of one window on one rank; `add` keeps a few scalars for each micro-batch."""

    sizes: list[int] = field(default_factory=list)
    weights: list[Count] = field(default_factory=list)
    _sums: dict[str, list[Part]] = field(default_factory=partial(defaultdict, list))
    _metrics: dict[str, list[Part]] = field(default_factory=partial(defaultdict, list))
    _seen: int = 0

    def add(self, terms: Terms, num_samples: int) -> None:
        """One micro-batch of `num_samples` samples is counted; if an allocation here fails, nothing of it is."""
        sums: dict[str, Count] = {}
        for name, value in terms.sums.items():
            sums[name] = 0.0 if terms.is_empty else _kept(value)  # where there are no terms, their sum may be NaN
        metrics = {name: _kept(value) for name, value in terms.metrics.items()} if terms.metrics else {}
        for name, kept in sums.items():
            self._sums[name].append((kept, terms.multiplier))
        for name, kept in metrics.items():
            self._metrics[name].append((kept, 1))
        self.sizes.append(num_samples)
        if terms.weight is not None:
            self.weights.append(terms.weight)

    def since_last(self) -> tuple[list[int], list[Count]]:
        """Sizes and weights of what was added since this was called last."""
        since, self._seen = self._seen, len(self.sizes)
        return self.sizes[since:], self.weights[since:]

    def totals(
        self, ranks: Ranks, names: Sequence[str] | None, expected: Iterable[str], device: torch.device
    ) -> "Totals":
        """Everything summed over the window and over ranks: numbers where that costs no host sync, else of shape ().

        `names`, for several ranks: the columns that any of them has, the same on every rank, and a ValueError for one
        beside them; None asks for all. The `expected` sums are there in any case.
        """
        own = Totals(
            {name: total(self._sums[name], device) for name in dict.fromkeys([*self._sums, *expected])},
            {name: total(parts, device) for name, parts in self._metrics.items()},
            total([(w, 1) for w in self.weights], device),
            sum(self.sizes),
        )
        return own if ranks.size == 1 else own.over(ranks, names, device)


def _kept(value: Count) -> Count:
    """The value without its graph, and without the storage of what it may be a view into.

    On the CPU as a number: reading it waits for nothing, and small tensors kept between the large ones of each
    micro-batch make the heap slower, measurably.
    """
    if not isinstance(value, Tensor):
        return value
    if value.is_cpu:
        return float(value.item())
    value = value.detach()
    return value if value.untyped_storage().nbytes() == value.nbytes else value.clone()


class Totals(NamedTuple):  # made for each window, as a tuple in a fifth of the time of a frozen dataclass
    """Sums over the effective batch: of the losses and of the metrics by name; every tensor is float64 of shape ()."""

    sums: dict[str, Count]
    metrics: dict[str, Count]
    weight: Count
    num_samples: Count

    @property
    def columns(self) -> dict[str, Count]:
        """Sums and metrics under names that tell them apart."""
        sums = {f"sum {name}": value for name, value in self.sums.items()}
        return sums | {f"metric {name}": value for name, value in self.metrics.items()}

    def over(self, ranks: Ranks, names: Sequence[str] | None, device: torch.device) -> "Totals":
        """The totals of all ranks together; `names` as in `Tally.totals`."""
        own = self.columns
        names = ranks.union(own) if names is None else names
        for name in own:
            if name not in names:
                kind, short = name.split(" ", 1)
                raise ValueError(
                    f"the {kind} {short!r} is new: a loss_fn names the same sums and metrics in every window, "
                    f"here {[n.split(' ', 1)[1] for n in names]}"
                )
        everything = [*(own.get(name, 0.0) for name in names), self.weight, self.num_samples]
        *values, weight, num_samples = ranks.sum(torch.stack([as_scalar(part, device) for part in everything]))
        columns: dict[str, dict[str, Count]] = {"sum": {}, "metric": {}}
        for name, value in zip(names, values, strict=True):
            kind, short = name.split(" ", 1)
            columns[kind][short] = value
        return Totals(columns["sum"], columns["metric"], weight, num_samples)


class Means(NamedTuple):
    """What a Report says of an effective batch; every tensor of shape ()."""

    loss: Tensor
    loss_weight: Tensor | dict[str, Tensor]
    metrics: dict[str, Tensor]


def means_of(totals: Totals, counts: Mapping[str, Count] | None, device: torch.device) -> Means:
    """Every sum divided by its total: by its own of `counts`, where these were given, else by the loss weights."""
    counts = counts or {LOSS: totals.weight}
    by_default = next(iter(counts.values())) if len(counts) == 1 else totals.num_samples
    losses, metrics = [], {}
    for name, value in totals.sums.items():
        divisor = denominator(name, counts)
        losses.append((mean(value, divisor), divisor))
        if name != LOSS:
            metrics[name] = as_scalar(losses[-1][0], device)
    for name, value in totals.metrics.items():
        metrics[name] = as_scalar(mean(value, counts.get(name, by_default)), device)
    loss = as_scalar(_sum_of_means(losses, device), device)
    if len(counts) == 1:
        return Means(loss, as_scalar(by_default, device), metrics)
    return Means(loss, {name: as_scalar(value, device) for name, value in counts.items()}, metrics)


def _sum_of_means(losses: Sequence[tuple[Count, Count]], device: torch.device) -> Count:
    """The sum of those means, given with their divisors, that average over anything; NaN if none does."""
    there: list[float] = []
    for value, divisor in losses:
        if isinstance(value, Tensor) or isinstance(divisor, Tensor):
            break
        if divisor:
            there.append(value)
    else:
        return sum(there) if there else math.nan
    parts = torch.stack([as_scalar(value, device).to(device) for value, _ in losses])
    has_terms = torch.stack([as_scalar(divisor, device).to(device) != 0 for _, divisor in losses])
    return parts.where(has_terms, 0.0).sum().where(has_terms.any(), torch.nan)


def total(parts: Sequence[Part], device: torch.device) -> Count:
    """The sum of value times multiplier: a number if all values can be read without a sync, else of shape ()."""
    numbers, scalars = [], []
    for value, times in parts:
        if isinstance(value, Tensor) and not value.is_cpu:
            scalars.append((value.to(device), times))
        else:
            numbers.append(float(value) * times)
    if not scalars:
        return _sum(numbers)
    if any(value.dtype != scalars[0][0].dtype for value, _ in scalars):
        scalars = [(value.double(), times) for value, times in scalars]
    summands = torch.stack([value for value, _ in scalars]).double()
    if any(times != 1 for _, times in scalars):
        summands = summands * torch.tensor([times for _, times in scalars], dtype=torch.float64, device=device)
    return summands.sum() + _sum(numbers)


def _sum(numbers: Sequence[float]) -> float:
    try:
        return math.fsum(numbers)
    except (ValueError, OverflowError):  # infinities of both signs
        return float(sum(numbers))


def as_scalar(value: Count, device: torch.device) -> Tensor:
    """The value as a tensor of shape (), float64 unless it was one already."""
    return value if isinstance(value, Tensor) else torch.scalar_tensor(value, dtype=torch.float64, device=device)


def mean(total_: Count, divisor: Count) -> Count:
    """`total_ / divisor`: NaN where there was nothing to average."""
    if isinstance(total_, Tensor) or isinstance(divisor, Tensor):
        return total_ / divisor
    return total_ / divisor if divisor else math.nan


def count_window(
    window: Iterable[Nested], count: CountFn, ranks: Ranks, device: torch.device
) -> tuple[dict[str, Count], int]:
    """Each denominator over the window and over ranks, and the number of micro-batches in all.

    Called before the first forward, so that every loss can be divided by its own total.
    """
    columns: dict[str, list[Part]] = {}
    num_micro_batches = 0
    for micro_batch in window:
        num_micro_batches += 1
        counted = count(micro_batch)
        for name, value in (counted if isinstance(counted, Mapping) else {LOSS: counted}).items():
            columns.setdefault(name, []).append((checked_count(value, f"count of {name!r}"), 1))
    names = ranks.union(columns)
    parts = [total(columns.get(name, []), device) for name in names]
    if ranks.size == 1:
        return dict(zip(names, parts, strict=True)), num_micro_batches
    everything = [as_scalar(part, device) for part in (*parts, num_micro_batches)]
    *summed, everywhere = ranks.sum(torch.stack(everything)).unbind()
    return dict(zip(names, summed, strict=True)), int(everywhere)


def denominator(name: str, totals: Mapping[str, Count]) -> Count:
    """The total that the loss called `name` is divided by: its own, or the only one there is."""
    if name in totals:
        return totals[name]
    if list(totals) == [LOSS]:
        return totals[LOSS]
    raise ValueError(f"the loss {name!r} has no count: count= gave {sorted(totals)}, the loss_fn must use these names")


def ratio(numerator: float | Tensor, divisor: Count) -> float | Tensor:
    """`numerator / divisor`, 0 where the divisor is 0; as a number where reading it costs no sync."""
    value = known(divisor)
    if value is not None and not isinstance(numerator, Tensor):
        return numerator / value if value else 0.0
    divisor = torch.as_tensor(divisor)
    return torch.as_tensor(numerator / divisor).where(divisor != 0, 0.0)
