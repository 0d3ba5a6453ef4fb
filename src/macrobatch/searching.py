"""How the search for a micro-batch size begins: with the largest that fits, as planned for a first batch."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer

from macrobatch.auto_size import AutoSize
from macrobatch.batch import Cut, NumSamples, Window
from macrobatch.distributed import AUTO, Ranks
from macrobatch.planning import plan
from macrobatch.structure import Nested


def begin_search(
    limit: AutoSize,
    model: nn.Module | Sequence[nn.Module],
    loss_fn: Callable[[Any, Any], Any],
    batch: Nested,
    *,
    max_memory: int | str | None,
    optimizers: Sequence[Optimizer],
    device: torch.device | None,
    autocast: Any,
    frozen: Sequence[nn.Module],
    grad_dtype: torch.dtype | None,
    cut: Cut | None,
    num_samples: NumSamples,
) -> None:
    """The search has a largest size to begin with, if this rank has a sample to plan for; else the next window tells.

    `batch`: a collated batch, or a window, of which the largest micro-batch stands for all. `optimizers`: whose state
    stands beside; none: AdamW's is assumed.
    """
    sample = batch
    if isinstance(batch, Window):
        sample, n = max(batch.fill().sized(), key=lambda sized: sized[1], default=(None, 0))
    else:
        n = num_samples(batch)
    if n == 0:
        limit.wait()
        return
    with torch.enable_grad():
        found = plan(
            model,
            loss_fn,
            sample,
            batch_size=n * Ranks.of(AUTO).size,
            max_memory=max_memory,
            optimizer=optimizers or None,
            device=device,
            measure_speed=False,
            autocast=autocast,
            frozen=frozen,
            grad_dtype=grad_dtype,
            cut=cut,
            num_samples=num_samples,
        )
    limit.begin(found.micro_batch_size, n)
