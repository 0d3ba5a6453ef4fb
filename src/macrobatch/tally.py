"""What the micro-batches of a window add up to: losses, their weights and metrics, over the window and over ranks."""

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field

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
    """The records of one window on one rank; `add` keeps a few scalars for each micro-batch and reads none of them."""

    sizes: list[int] = field(default_factory=list)
    weights: list[Count] = field(default_factory=list)
    columns: dict[str, list[Part]] = field(default_factory=dict)

    def add(self, terms: Terms, num_samples: int) -> None:
        """One micro-batch of `num_samples` samples is counted; if an allocation here fails, nothing of it is."""
        columns: dict[str, Part] = {f"metric {name}": (_kept(value), 1) for name, value in terms.metrics.items()}
        for name, value in terms.sums.items():  # where there are no terms, their sum may be NaN
            columns[f"sum {name}"] = (0.0 if terms.is_empty else _kept(value), terms.multiplier)
        self.sizes.append(num_samples)
        if terms.weight is not None:
            self.weights.append(terms.weight)
        for name, part in columns.items():
            self.columns.setdefault(name, []).append(part)

    def totals(self, ranks: Ranks, names: Iterable[str], device: torch.device) -> "Totals":
        """Everything summed over the window and over ranks, as float64 of shape () on `device`; no host sync.

        `names`: the columns that any rank has, the same on every rank. ValueError for a column beside them.
        """
        names = list(names)
        for name in self.columns:
            if name not in names:
                kind, short = name.split(" ", 1)
                raise ValueError(
                    f"the {kind} {short!r} is new: a loss_fn names the same sums and metrics in every window, "
                    f"here {[n.split(' ', 1)[1] for n in names]}"
                )
        parts = [total(self.columns.get(name, []), device) for name in names]
        parts += [
            total([(w, 1) for w in self.weights], device),
            torch.tensor(float(sum(self.sizes)), dtype=torch.float64, device=device),
        ]
        summed = ranks.sum(torch.stack(parts)).unbind() if ranks.size > 1 else parts
        *columns, weight, num_samples = summed
        alone = ranks.size == 1
        known_weight = None
        if alone and not any(isinstance(w, Tensor) for w in self.weights):
            known_weight = math.fsum(w for w in self.weights if not isinstance(w, Tensor))
        by_name = dict(zip(names, columns, strict=True))
        return Totals(by_name, weight, known_weight, sum(self.sizes) if alone else num_samples)


def _kept(value: Count) -> Count:
    """The value without its graph, and without the storage of what it may be a view into.

    On the CPU as a number: reading it waits for nothing, and small tensors kept between the large ones of each
    micro-batch make the heap slower, measurably.
    """
    if not isinstance(value, Tensor):
        return value
    value = value.detach()
    if value.device.type == "cpu":
        return float(value.item())
    return value if value.untyped_storage().nbytes() == value.nbytes else value.clone()


@dataclass(frozen=True)
class Totals:
    """Sums over the effective batch; every tensor has shape (). `known_weight`: the weight, where it took no tensor."""

    columns: dict[str, Tensor]
    weight: Tensor
    known_weight: float | None
    num_samples: int | Tensor

    def kind(self, kind: str) -> dict[str, Tensor]:
        """The columns of one kind ("sum" or "metric") by their own names."""
        return {name.split(" ", 1)[1]: value for name, value in self.columns.items() if name.startswith(f"{kind} ")}


def total(parts: Sequence[Part], device: torch.device) -> Tensor:
    """The sum of value times multiplier, in float64, shape () on `device`; values are numbers or of shape ()."""
    numbers = math.fsum(value * times for value, times in parts if not isinstance(value, Tensor))
    scalars = [(value.to(device), times) for value, times in parts if isinstance(value, Tensor)]
    if not scalars:
        return torch.tensor(numbers, dtype=torch.float64, device=device)
    if any(value.dtype != scalars[0][0].dtype for value, _ in scalars):
        scalars = [(value.double(), times) for value, times in scalars]
    summands = torch.stack([value for value, _ in scalars]).double()
    if any(times != 1 for _, times in scalars):
        summands = summands * torch.tensor([times for _, times in scalars], dtype=torch.float64, device=device)
    return summands.sum() + numbers


def count_window(
    window: Iterable[Nested], count: CountFn, ranks: Ranks, device: torch.device
) -> tuple[dict[str, Tensor], int]:
    """Each denominator over the window and over ranks, shape () on `device`, and the number of micro-batches in all.

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
    parts.append(torch.tensor(float(num_micro_batches), dtype=torch.float64))
    if ranks.size == 1:
        return dict(zip(names, parts, strict=False)), num_micro_batches
    *summed, everywhere = ranks.sum(torch.stack([part.to(device) for part in parts])).unbind()
    return dict(zip(names, summed, strict=True)), int(everywhere)


def denominator(name: str, totals: Mapping[str, Tensor]) -> Tensor:
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
