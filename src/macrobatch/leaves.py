"""Trainable tensors that a loss depends on unknown to the accumulator: their gradient would be an undivided sum."""

import inspect
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from torch import Tensor, nn
from torch.autograd.function import BackwardCFunction
from torch.utils.weak import TensorWeakRef


class StrayLeaves:
    """The leaves of a loss graph that are not among `parameters`.

    A parameter is refused before backward. Any other leaf may be temporary, made by the loss_fn itself (a gradient
    penalty does that): it is refused by `refuse_survivors` if it outlives the graph.
    """

    def __init__(
        self, losses: Sequence[Tensor], parameters: Sequence[nn.Parameter], loss_fn: Callable[..., Any]
    ) -> None:
        self._loss_fn = loss_fn
        own = {id(p) for p in parameters}
        strays = [leaf for leaf in _graph_leaves(losses) if id(leaf) not in own]
        for leaf in strays:
            if isinstance(leaf, nn.Parameter):
                raise ValueError(_message(leaf, loss_fn))
        self._gradients = [(TensorWeakRef(leaf), None if leaf.grad is None else leaf.grad.clone()) for leaf in strays]

    def refuse_survivors(self) -> None:
        """ValueError for a leaf that lives on after backward, when the graph is gone; its gradient is put back."""
        for reference, gradient in self._gradients:
            leaf = reference()
            if leaf is not None:
                leaf.grad = gradient
                raise ValueError(_message(leaf, self._loss_fn))


def has_nested_backward(losses: Sequence[Tensor]) -> bool:
    """Whether the graph has functions written in Python, which may run backwards of their own (reentrant checkpoints).

    Then some parameters get their gradients in several parts, and a half-done backward does not tell which.
    """
    return any(isinstance(node, BackwardCFunction) for node in _nodes(losses))


def _graph_leaves(losses: Sequence[Tensor]) -> Iterator[Tensor]:
    for node in _nodes(losses):
        if (leaf := getattr(node, "variable", None)) is not None:
            yield leaf


def _nodes(losses: Sequence[Tensor]) -> Iterator[Any]:
    pending = [loss.grad_fn for loss in losses]
    seen = set()
    while pending:
        node = pending.pop()
        if node is not None and node not in seen:
            seen.add(node)
            yield node
            pending.extend(following for following, _ in node.next_functions)


def _message(leaf: Tensor, loss_fn: Callable[..., Any]) -> str:
    name = _name_in(loss_fn, leaf)
    which = f"{name!r}, " if name else ""
    return (
        f"the loss depends on a trainable tensor outside of the model: {which}shape {tuple(leaf.shape)}. Its gradient "
        "would be a raw sum. Make it part of the model, or give Accumulator([model, other], ...) a list, or make "
        "the loss_fn an nn.Module that owns it, or, if it is not to be trained here, name its module in frozen=[...]"
    )


def _name_in(loss_fn: Callable[..., Any], leaf: Tensor) -> str | None:
    """What the user's code calls `leaf`: a variable of the loss_fn, or a parameter of a module that it uses."""
    for name, value in _variables(loss_fn):
        if value is leaf:
            return name
        if isinstance(value, nn.Module):
            for inner, p in value.named_parameters():
                if p is leaf:
                    return f"{name}.{inner}"
    return None


def _variables(loss_fn: Callable[..., Any]) -> Iterator[tuple[str, Any]]:
    function = inspect.unwrap(getattr(loss_fn, "func", loss_fn))
    owner = getattr(function, "__self__", function)
    yield from ((f"self.{name}", value) for name, value in getattr(owner, "__dict__", {}).items())
    function = getattr(function, "__func__", function)
    if inspect.isfunction(function):
        variables = inspect.getclosurevars(function)
        yield from variables.nonlocals.items()
        yield from variables.globals.items()
