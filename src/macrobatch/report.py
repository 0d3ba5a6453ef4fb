"""What a window was, as a value: the Report that `Accumulator.run` returns and `apply_update` takes."""

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch.distributed as dist
from torch import Tensor, nn
from torch.amp.grad_scaler import GradScaler

from macrobatch.moments import GradientMoments
from macrobatch.weighting import Count


@dataclass(frozen=True)
class Report:
    """One window in numbers: sums over all ranks, except what is per micro-batch, which is this rank's.

    `loss`: shape (), the mean over the effective batch, on the device (reading it is the host sync); NaN without terms.
    `loss_weight`: what the sum was divided by, shape (), or `{name: shape ()}` for several denominators.
    `metrics`: `{name: mean}`, each of shape (). `micro_batch_sizes`: samples in each. `loss_weights`: as the loss_fn
    gave them. `retries`: micro-batches that were run again. `moments` (with `measure="norms"`): squared norms of the
    micro-batches' gradients. `mean_squares` (with "squares"): parameter by parameter the elementwise mean of their
    squares. `parameters`, `scaler` and `process_group` are what `apply_update` needs.
    """

    loss: Tensor
    loss_weight: Tensor | Mapping[str, Tensor]
    metrics: Mapping[str, Tensor]
    sample_count: Count = field(repr=False)
    micro_batch_sizes: tuple[int, ...]
    loss_weights: tuple[Count, ...] = field(repr=False)
    parameters: tuple[nn.Parameter, ...] = field(repr=False)
    retries: int = 0
    moments: GradientMoments | None = field(default=None, repr=False)
    mean_squares: tuple[Tensor | None, ...] | None = field(default=None, repr=False)
    scaler: GradScaler | None = field(default=None, repr=False)
    process_group: dist.ProcessGroup | None = field(default=None, repr=False)

    @property
    def num_samples(self) -> int:
        """Samples in the effective batch, over all ranks (a host sync under NCCL)."""
        return int(self.sample_count)

    @property
    def accumulation_steps(self) -> int:
        """Micro-batches in the window, on this rank."""
        return len(self.micro_batch_sizes)

    @property
    def has_terms(self) -> Tensor:
        """Whether the loss averaged over anything, shape (), bool, on the device: if not, there is no step to make."""
        weights = self.loss_weight.values() if isinstance(self.loss_weight, Mapping) else [self.loss_weight]
        return sum(weight.abs() for weight in weights) > 0  # type: ignore[return-value]
