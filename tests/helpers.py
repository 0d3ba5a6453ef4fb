"""What several test files share: brute force in one piece, and the textbook loop that most people write."""

import importlib
from collections.abc import Callable, Sequence
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn


def gradients(modules: nn.Module | Sequence[nn.Module]) -> list[Tensor | None]:
    """A copy of every parameter's gradient."""
    modules = [modules] if isinstance(modules, nn.Module) else modules
    return [None if p.grad is None else p.grad.clone() for module in modules for p in module.parameters()]


def clear(modules: nn.Module | Sequence[nn.Module]) -> None:
    for module in [modules] if isinstance(modules, nn.Module) else modules:
        module.zero_grad(set_to_none=True)


def reference(modules: nn.Module | Sequence[nn.Module], loss: Callable[[], Tensor]) -> list[Tensor | None]:
    """The gradients of one backward over the full batch, and none left behind."""
    clear(modules)
    loss().backward()
    result = gradients(modules)
    clear(modules)
    return result


def difference(mine: Sequence[Tensor | None], theirs: Sequence[Tensor | None]) -> float:
    """The largest difference of an entry over the largest entry of the reference; infinite if a gradient is missing."""
    assert len(mine) == len(theirs)
    if any((a is None) != (b is None) for a, b in zip(mine, theirs, strict=True)):
        return float("inf")
    pairs = [(a.double(), b.double()) for a, b in zip(mine, theirs, strict=True) if a is not None and b is not None]
    largest = max(float(b.abs().max()) for _, b in pairs)
    assert largest > 0, "a reference of zeros shows nothing"
    return max(float((a - b).abs().max()) for a, b in pairs) / largest


def textbook(
    modules: nn.Module | Sequence[nn.Module], mean_loss: Callable[[Any], Tensor], micro_batches: Sequence[Any]
) -> list[Tensor | None]:
    """The control: the loop of every tutorial, `(mean_loss / K).backward()`."""
    clear(modules)
    for micro_batch in micro_batches:
        loss = mean_loss(micro_batch) / len(micro_batches)
        if torch.isfinite(loss):
            loss.backward()
    result = gradients(modules)
    clear(modules)
    return result


def benchmark(name: str) -> ModuleType:
    """benchmarks/<name>.py; its folder is importable, as when it runs as a script (see conftest.py)."""
    return importlib.import_module(name)
