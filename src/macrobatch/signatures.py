"""Whether a function that was handed in can be called as it will be: told before any work, in the user's words."""

import inspect
from collections.abc import Callable
from typing import Any

from torch import nn


def check_callable(function: Callable[..., Any], name: str, arguments: tuple[str, ...], advice: str = "") -> None:
    """ValueError if `function`, the argument `name`, cannot be called with `arguments`. `advice`: what to change."""
    called = function.forward if isinstance(function, nn.Module) else function
    try:
        signature = inspect.signature(called)
    except ValueError:
        return  # some builtins have no signature
    except TypeError:
        raise ValueError(
            f"{name} must be callable with ({', '.join(arguments)}), got {function!r}, which cannot be called"
        ) from None
    try:
        signature.bind(*arguments)
    except TypeError as error:
        raise ValueError(
            f"{name} must be callable with ({', '.join(arguments)}), and {_described(function)}{signature} is not: "
            f"{error}{advice}"
        ) from None


def takes(function: Callable[..., Any], num_arguments: int) -> bool:
    """Whether `function` can be called with so many positional arguments."""
    called = function.forward if isinstance(function, nn.Module) else function
    try:
        inspect.signature(called).bind(*range(num_arguments))
    except (TypeError, ValueError):
        return False
    return True


def _described(function: Callable[..., Any]) -> str:
    return getattr(function, "__name__", type(function).__name__)
