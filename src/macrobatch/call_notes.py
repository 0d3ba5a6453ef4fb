"""What is added to an error of the user's own function: how it was called, and what it was called with."""

from collections.abc import Mapping
from typing import Any

import numpy as np
from torch import Tensor

from macrobatch.recovery import is_out_of_memory
from macrobatch.signatures import given

SHOWN, DEPTH = 3, 3  # entries of a container, and containers in one another, that are spelled out


def note_call(error: Exception, name: str, micro_batch: Any, was: str = "was") -> None:
    """`error`, raised in the function `name`, has a note that shows the micro-batch; not if memory ran out."""
    if is_out_of_memory(error):
        return
    error.add_note(
        f"{name} is called as {name}(model, micro_batch); here micro_batch {was} {described(micro_batch)}"
        + _advice(micro_batch)
    )


def described(value: Any, depth: int = DEPTH) -> str:
    """A nested structure by its kinds and shapes: "a tuple of (Tensor of shape (8, 2), Tensor of shape (8,))"."""
    if isinstance(value, Tensor | np.ndarray):
        kind = "Tensor" if isinstance(value, Tensor) else "numpy array"
        return f"{kind} of shape {tuple(value.shape)}"
    if isinstance(value, Mapping):
        entries = [f"{key!r}: {described(entry, depth - 1)}" for key, entry in list(value.items())[:SHOWN]]
        ends = "{}"
    elif isinstance(value, list | tuple):
        entries, ends = [described(entry, depth - 1) for entry in value[:SHOWN]], "()"
    else:
        return given(value)
    if depth == 0:
        return f"a {type(value).__name__}"
    more = [f"and {len(value) - SHOWN} more"] if len(value) > SHOWN else []
    return f"a {type(value).__name__} of {ends[0]}{', '.join(entries + more)}{ends[1]}"


def _advice(micro_batch: Any) -> str:
    if (
        isinstance(micro_batch, list)
        and micro_batch
        and all(isinstance(e, list | tuple | Mapping) for e in micro_batch)
    ):
        return (
            ". A list is one batch. If its entries are the micro-batches of a window, give run a "
            "Window([micro_batch, ...])"
        )
    entries = micro_batch.values() if isinstance(micro_batch, Mapping) else micro_batch
    if isinstance(micro_batch, np.ndarray) or (
        isinstance(micro_batch, list | tuple | Mapping) and any(isinstance(e, np.ndarray) for e in entries)
    ):
        return ". Arrays stay arrays: give tensors, torch.from_numpy(array)"
    return ""
