"""How every window of an accumulator is run, as a value."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import nn

from macrobatch.autocasting import Autocast, LossFn
from macrobatch.distributed import GroupChoice
from macrobatch.tally import CountFn
from macrobatch.unscaling import Unscaler


@dataclass(frozen=True)
class Recipe:
    """What an accumulator was made of, for those that run its windows."""

    model: nn.Module | Sequence[nn.Module]
    modules: list[nn.Module]  # whose parameters are trained
    everything: list[nn.Module]  # and those that the loss passes through frozen
    loss_fn: LossFn
    count: CountFn | None
    autocast: Autocast
    unscaler: Unscaler
    device: torch.device | None
    process_group: GroupChoice
