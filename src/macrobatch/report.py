"""What a window was, as a value: the Report that `Accumulator.run` returns and `apply_update` takes."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import groupby

import torch.distributed as dist
from torch import Tensor, nn
from torch.amp.grad_scaler import GradScaler

from macrobatch.moments import GradientMoments
from macrobatch.sums import as_scalar
from macrobatch.tally import Means, Record
from macrobatch.weighting import Count


@dataclass(frozen=True, repr=False)
class Report:
    """One window in numbers: sums over all ranks, except what is per micro-batch, which is this rank's.

    `retries`: micro-batches that were run again. `moments` (with `measure="norms"`): squared norms of the
    micro-batches' gradients. `mean_squares` (with "squares"): parameter by parameter the elementwise mean of their
    squares. `parameters`, `scaler`, `process_group` and `modules`, which know names, are what `apply_update` needs;
    `records` and `means` what the properties read.
    """

    records: Sequence[Record]
    means: Callable[[], Means]  # called once, if anybody asks
    parameters: tuple[nn.Parameter, ...]
    retries: int = 0
    moments: GradientMoments | None = None
    mean_squares: tuple[Tensor | None, ...] | None = None
    scaler: GradScaler | None = None
    process_group: dist.ProcessGroup | None = None
    modules: Sequence[nn.Module] = ()

    @cached_property
    def loss(self) -> Tensor:
        """The mean over the effective batch, shape (); reading it is the host sync of a GPU. NaN without terms."""
        return self._scalar(self._means.loss)

    @cached_property
    def loss_weight(self) -> Tensor | Mapping[str, Tensor]:
        """What the sum was divided by, shape (), or `{name: shape ()}` for several denominators."""
        weight = self._means.loss_weight
        if isinstance(weight, dict):
            return {name: self._scalar(value) for name, value in weight.items()}
        return self._scalar(weight)

    @cached_property
    def metrics(self) -> Mapping[str, Tensor]:
        """`{name: mean}`, each of shape ()."""
        return {name: self._scalar(value) for name, value in self._means.metrics.items()}

    @cached_property
    def micro_batch_sizes(self) -> tuple[int, ...]:
        """Samples in each micro-batch, on this rank."""
        return tuple(record.num_samples for record in self.records)

    @cached_property
    def loss_weights(self) -> tuple[Count, ...]:
        """Terms in each micro-batch, on this rank, as the loss_fn gave them; none where `count=` tells."""
        return tuple(record.weight for record in self.records if record.weight is not None)

    @property
    def sample_count(self) -> Count:
        """`num_samples`, without a host sync."""
        return self._means.num_samples

    @cached_property
    def _means(self) -> Means:
        return self.means()

    def _scalar(self, value: Count) -> Tensor:
        return as_scalar(value, self._means.device)

    def __repr__(self) -> str:
        return (
            f"Report(loss={self.loss}, loss_weight={self.loss_weight}, metrics={self.metrics}, "
            f"micro_batch_sizes={_in_short(self.micro_batch_sizes)}, retries={self.retries})"
        )

    @property
    def num_samples(self) -> int:
        """Samples in the effective batch, over all ranks (a host sync under NCCL)."""
        return int(self.sample_count)

    @property
    def accumulation_steps(self) -> int:
        """Micro-batches in the window, on this rank."""
        return len(self.records)

    @property
    def has_terms(self) -> Tensor:
        """Whether the loss averaged over anything, shape (), bool, on the device: if not, there is no step to make."""
        weights = self.loss_weight.values() if isinstance(self.loss_weight, Mapping) else [self.loss_weight]
        return sum(weight.abs() for weight in weights) > 0  # type: ignore[return-value]


def _in_short(sizes: tuple[int, ...]) -> str:
    """Equal neighbours together: (32 x 100, 31)."""
    runs = [(size, len(list(equal))) for size, equal in groupby(sizes)]
    return f"({', '.join(f'{size} x {n}' if n > 1 else f'{size}' for size, n in runs)})"
