"""Whether a function that was handed in can be called as it will be: told before any work, in the user's words."""

import inspect
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

PLAIN = (str, int, float, list, tuple, type(None), torch.dtype, torch.device)  # shown as they were written
SHORT = 60  # letters


def check_callable(function: Callable[..., Any], name: str, arguments: tuple[str, ...], advice: str = "") -> None:
    """ValueError if `function`, the argument `name`, cannot be called with `arguments`. `advice`: what to change."""
    needed = f"{name} must be callable with ({', '.join(arguments)})"
    if isinstance(function, type):
        raise ValueError(f"{needed}, got the class {function.__name__}: give one of its objects, or a function")
    called = function.forward if isinstance(function, nn.Module) else function
    try:
        signature = inspect.signature(called)
    except ValueError:
        return  # some builtins have no signature
    except TypeError:
        of = f" {', '.join(arguments)}" if arguments else ""
        raise ValueError(
            f"{needed}, got {given(function)}, which cannot be called: give a function, {name}=lambda{of}: ..."
        ) from None
    try:
        signature.bind(*arguments)
    except TypeError as error:
        raise ValueError(f"{needed}, and {_described(function)}{signature} is not: {error}{advice}") from None


def takes(function: Callable[..., Any], num_arguments: int) -> bool:
    """Whether `function` can be called with so many positional arguments."""
    called = function.forward if isinstance(function, nn.Module) else function
    try:
        inspect.signature(called).bind(*range(num_arguments))
    except (TypeError, ValueError):
        return False
    return True


def given(value: Any) -> str:
    """What was given, in a message: a plain value as it was written, a class by its name, else what it is one of."""
    if isinstance(value, type):
        return f"the class {value.__name__}"
    text = repr(value) if isinstance(value, PLAIN) else ""
    return text if 0 < len(text) <= SHORT else f"a {type(value).__name__}"


def _described(function: Callable[..., Any]) -> str:
    return getattr(function, "__name__", type(function).__name__)
