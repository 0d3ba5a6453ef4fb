"""The precision of forwards: a dtype to autocast to, or a context manager of the user's own."""

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch

from macrobatch.structure import Nested

Autocast = torch.dtype | AbstractContextManager[Any] | None
LossFn = Callable[[Any, Nested], Any]


def entered(autocast: Autocast, device: torch.device) -> AbstractContextManager[Any]:
    """The context that was asked for, to be entered for each forward."""
    if isinstance(autocast, torch.dtype):
        return torch.autocast(device.type, dtype=autocast)
    return autocast or nullcontext()


def under(autocast: Autocast, loss_fn: LossFn, device: torch.device) -> LossFn:
    """`loss_fn` in the precision that was asked for; itself where none was, which spares each micro-batch two calls."""
    if autocast is None:
        return loss_fn
    context = entered(autocast, device)

    def under_autocast(model: Any, micro_batch: Nested) -> Any:
        with context:
            return loss_fn(model, micro_batch)

    return under_autocast
