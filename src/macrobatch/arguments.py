"""What an Accumulator is given, checked before any work: the loss_fn, and how large a micro-batch may be."""

import inspect
from collections.abc import Callable
from typing import Any, Literal

from torch import nn
from torch.nn.modules.loss import _Loss

from macrobatch.auto_size import AutoSize
from macrobatch.batch import check_size
from macrobatch.sizing import SizeLimit


def check_loss_fn(loss_fn: Callable[[Any, Any], Any]) -> None:
    """ValueError if `loss_fn` cannot be called with (model, micro_batch)."""
    if isinstance(loss_fn, _Loss):
        raise ValueError(
            f"a loss_fn takes (model, micro_batch), a {type(loss_fn).__name__} takes (outputs, targets): give "
            "macrobatch.sum_loss(criterion), which makes it one for (inputs, targets) batches"
        )
    called = loss_fn.forward if isinstance(loss_fn, nn.Module) else loss_fn
    try:
        inspect.signature(called).bind("model", "micro_batch")
    except TypeError as error:
        raise ValueError(
            f"loss_fn must be callable with (model, micro_batch), and a {type(loss_fn).__name__} is not: {error}. "
            "Were model and loss_fn swapped?"
        ) from None
    except ValueError:
        pass  # some builtins have no signature


def limit_of(micro_batch_size: int | Literal["auto"] | None, max_memory: int | str | None) -> SizeLimit:
    """The limit that `micro_batch_size` asks for. ValueError for what is no size, or a budget beside a given one."""
    if micro_batch_size == "auto":
        return AutoSize()
    if max_memory is not None:
        raise ValueError(
            f"max_memory={max_memory!r} goes with micro_batch_size='auto', got {micro_batch_size!r}; to enforce one "
            "run inside memory_limit(...)"
        )
    if isinstance(micro_batch_size, str):
        raise ValueError(f"micro_batch_size must be an integer of at least 1, 'auto' or None, got {micro_batch_size!r}")
    return SizeLimit(None if micro_batch_size is None else check_size(micro_batch_size))
