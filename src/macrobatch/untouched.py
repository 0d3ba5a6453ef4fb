"""Gradients that a loss_fn leaves as they are: who called it runs backward, steps and zeroes."""

from collections.abc import Callable, Sequence
from typing import TypeVar

from torch import nn

T = TypeVar("T")


def leaving_gradients(call: Callable[[], T], parameters: Sequence[nn.Parameter], name: str) -> T:
    """What `call` returns. ValueError if the function called `name` has changed `p.grad` of any of `parameters`."""
    before = [(p.grad, None if p.grad is None else p.grad._version) for p in parameters]
    result = call()
    changed = sum(
        p.grad is not gradient or (gradient is not None and gradient._version != version)
        for p, (gradient, version) in zip(parameters, before, strict=True)
    )
    if changed:
        raise ValueError(
            f"the {name} changed the gradients of {changed} of {len(parameters)} parameters: did it call backward() or "
            "zero_grad()? It computes the loss and nothing else: run calls backward, apply_update steps and zeroes. "
            "For a loop that calls backward itself there is macrobatch.accumulate"
        )
    return result
