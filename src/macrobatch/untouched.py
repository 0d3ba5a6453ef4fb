"""Gradients that a loss_fn leaves as they are: who called it runs backward, steps and zeroes."""

from collections.abc import Callable, Sequence
from typing import TypeVar

from torch import Tensor, nn

T = TypeVar("T")


def leaving_gradients(call: Callable[[], T], parameters: Sequence[nn.Parameter], name: str) -> T:
    """What `call` returns. ValueError if the function called `name` has changed `p.grad` of any of `parameters`."""
    before = [(p.grad, None if p.grad is None else p.grad._version) for p in parameters]
    result = call()
    changed = sum(
        _has_changed(p.grad, gradient, version) for p, (gradient, version) in zip(parameters, before, strict=True)
    )
    if changed:
        raise ValueError(
            f"the {name} changed the gradients of {changed} of {len(parameters)} parameters: did it call backward() or "
            "zero_grad()? It computes the loss and nothing else: run calls backward, apply_update steps and zeroes. "
            "For a loop that calls backward itself there is macrobatch.accumulate"
        )
    return result


def _has_changed(now: Tensor | None, before: Tensor | None, version: int | None) -> bool:
    if now is None or before is None:
        return now is not before and (now is None or bool(now.any()))  # zeros where nothing was change nothing
    return now is not before or now._version != version
