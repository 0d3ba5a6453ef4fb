"""What the micro-batches of a window add up to: losses, their weights and metrics, over the window and over ranks."""

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from macrobatch.distributed import Ranks
from macrobatch.structure import Nested
from macrobatch.sums import Part, as_scalar, mean, total
from macrobatch.weighting import LOSS, Count, Terms, checked_count

CountFn = Callable[[Nested], Count | Mapping[str, Count]]


class Record(NamedTuple):
    """What is kept of one micro-batch: `Terms` without their graph."""

    num_samples: int
    sums: dict[str, Count]
    multiplier: int
    metrics: Mapping[str, Count]
    weight: Count | None


class Tally:
    """The records of one window on one rank; `add` keeps a few scalars for each micro-batch."""

    def __init__(self) -> None:
        self._records: list[Record] = []
        self._seen = 0

    def add(self, terms: Terms, num_samples: int) -> None:
        """One micro-batch of `num_samples` samples is counted; if an allocation here fails, nothing of it is."""
        sums: dict[str, Count] = {}
        for name, value in terms.sums.items():
            sums[name] = 0.0 if terms.is_empty else _kept(value)  # where there are no terms, their sum may be NaN
        metrics = {name: _own(value) for name, value in terms.metrics.items()} if terms.metrics else {}
        weight = _own(terms.weight) if isinstance(terms.weight, Tensor) else terms.weight
        self._records.append(Record(num_samples, sums, terms.multiplier, metrics, weight))

    @property
    def records(self) -> Sequence[Record]:
        """One for each micro-batch, in the order in which they were run."""
        return self._records

    @property
    def weights(self) -> list[Count]:
        """Terms in each micro-batch, as the loss_fn gave them; none where `count=` tells."""
        return [record.weight for record in self._records if record.weight is not None]

    def since_last(self) -> Sequence[Record]:
        """What was added since this was called last."""
        since, self._seen = self._seen, len(self._records)
        return self._records[since:]

    def weight(self, device: torch.device) -> Count:
        """The terms of the window on this rank."""
        return total([(weight, 1) for weight in self.weights], device)

    def totals(self, expected: Iterable[str], device: torch.device) -> "Totals":
        """The window's sums on this rank; the `expected` ones are there in any case."""
        sums: dict[str, list[Part]] = {name: [] for name in expected}
        metrics: dict[str, list[Part]] = {}
        for record in self._records:
            for name, value in record.sums.items():
                sums.setdefault(name, []).append((value, record.multiplier))
            for name, value in record.metrics.items():
                metrics.setdefault(name, []).append((value, 1))
        return Totals(
            {name: total(parts, device) for name, parts in sums.items()},
            {name: total(parts, device) for name, parts in metrics.items()},
            self.weight(device),
            sum(record.num_samples for record in self._records),
        )

    def means(self, counts: Mapping[str, Count] | None, device: torch.device) -> "Means":
        """`means_of` the window on this rank alone."""
        return means_of(self.totals(counts or (LOSS,), device), counts, device)


def _kept(value: Count) -> Count:
    """The value without its graph, and without the storage of what it may be a view into.

    On the CPU as a number: reading it waits for nothing, and small tensors kept between the large ones of each
    micro-batch make the heap slower, measurably.
    """
    if not isinstance(value, Tensor):
        return value
    if value.is_cpu:
        return value.item()
    value = value.detach()
    return value if value.untyped_storage().nbytes() == value.nbytes else value.clone()


def _own(value: Count) -> Count:
    """As `_kept`, of a tensor that the loss_fn may write the next value into."""
    return value.detach().clone() if isinstance(value, Tensor) and not value.is_cpu else _kept(value)


class Totals(NamedTuple):
    """Sums over micro-batches of losses and metrics, by name: numbers where that costs no sync, else of shape ()."""

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
        """The totals of all ranks together.

        `names`: the columns that any rank has, the same on every rank, and a ValueError for one beside them; None asks
        for all.
        """
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
    """What a Report says of an effective batch: numbers where they are known without a host sync, else of shape ()."""

    loss: Count
    loss_weight: Count | dict[str, Count]
    metrics: dict[str, Count]
    num_samples: Count
    device: torch.device  # of what is made a tensor


def means_of(totals: Totals, counts: Mapping[str, Count] | None, device: torch.device) -> Means:
    """Every sum divided by its total: by its own of `counts`, where these were given, else by the loss weights."""
    counts = counts or {LOSS: totals.weight}
    by_default = next(iter(counts.values())) if len(counts) == 1 else totals.num_samples
    losses, metrics = [], {}
    for name, value in totals.sums.items():
        divisor = denominator(name, counts)
        losses.append((mean(value, divisor), divisor))
        if name != LOSS:
            metrics[name] = losses[-1][0]
    for name, value in totals.metrics.items():
        metrics[name] = mean(value, counts.get(name, by_default))
    loss_weight = by_default if len(counts) == 1 else dict(counts)
    return Means(_sum_of_means(losses, device), loss_weight, metrics, totals.num_samples, device)


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
