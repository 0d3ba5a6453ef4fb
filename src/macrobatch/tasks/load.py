"""From a name to a task: the built-in ones, and `package.module:function` of your own."""

import ast
import difflib
import importlib
import inspect
from collections.abc import Callable, Mapping
from typing import Any

import torch

from macrobatch.tasks.code_lm import code_lm
from macrobatch.tasks.digits import digits
from macrobatch.tasks.embeddings import embeddings
from macrobatch.tasks.task import Task

_BUILT_IN: Mapping[str, Callable[..., Task]] = {"code-lm": code_lm, "digits": digits, "embeddings": embeddings}


def task_names() -> tuple[str, ...]:
    """The names of the built-in tasks."""
    return tuple(_BUILT_IN)


def load_task(name: str, /, *, seed: int = 0, **options: Any) -> Task:
    """The task of that name, the same for the same seed and options; the caller's random numbers are left alone.

    `name` is a built-in task or `package.module:function`, a function that returns a `Task`. `options` are its
    arguments. A name, a function or an option that does not exist is an error that lists what does.
    """
    function = _find(name)
    _check_options(name, function, options)
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        task = function(**options)
    if not isinstance(task, Task):
        raise ValueError(f"{name} returned a value of type {type(task).__name__}; a macrobatch.tasks.Task is needed")
    return task


def parse_task_option(text: str) -> tuple[str, Any]:
    """The name and the value in `name=value`: numbers, True, False, None and lists as in Python, the rest as text.

    >>> parse_task_option("d_model=64"), parse_task_option("root=src")
    (('d_model', 64), ('root', 'src'))
    """
    name, equals, value = text.partition("=")
    if not (equals and name.isidentifier()):
        raise ValueError(f"a task option is written name=value, such as d_model=64; got {text!r}")
    try:
        return name, ast.literal_eval(value)
    except (ValueError, SyntaxError):
        return name, value


def _find(name: str) -> Callable[..., Any]:
    if name in _BUILT_IN:
        return _BUILT_IN[name]
    module_name, colon, function_name = name.partition(":")
    if not (colon and module_name and function_name):
        close = difflib.get_close_matches(name, _BUILT_IN, n=1)
        hint = f" Did you mean {close[0]}?" if close else ""
        raise ValueError(
            f"there is no task {name!r}.{hint} Built-in tasks: {', '.join(_BUILT_IN)}; "
            "your own is written package.module:function"
        )
    return _own_function(module_name, function_name)


def _own_function(module_name: str, function_name: str) -> Callable[..., Any]:
    try:
        module = importlib.import_module(module_name)
    except ModuleNotFoundError as missing:
        # Only the named module itself: a package that the task's own code lacks is reported by that code.
        if missing.name is None or not f"{module_name}.".startswith(f"{missing.name}."):
            raise
        raise ModuleNotFoundError(
            f"cannot import {module_name!r}: no module {missing.name!r} on the Python path. "
            "Run from the folder that holds it, or install the package",
            name=missing.name,
        ) from None
    function = getattr(module, function_name, None)
    if function is None or not callable(function):
        there = [each for each, value in vars(module).items() if inspect.isfunction(value) and each[0] != "_"]
        raise ValueError(
            f"{module_name} has no function {function_name!r}; it has: {', '.join(sorted(there)) or 'none at all'}"
        )
    return function  # type: ignore[no-any-return]  # whatever a user's module holds under that name


def _check_options(name: str, function: Callable[..., Any], options: Mapping[str, Any]) -> None:
    parameters = inspect.signature(function).parameters
    takes_any = any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters.values())
    for option, value in options.items():
        if option not in parameters and not takes_any:
            there = ", ".join(parameters) or "none"
            raise ValueError(f"task {name!r} has no option {option!r}; its options: {there}")
        default = parameters[option].default if option in parameters else None
        if isinstance(default, (int, float)) and not _fits(value, default):
            raise ValueError(
                f"task {name!r}: option {option} takes a value such as {default!r}, got {value!r} "
                f"({type(value).__name__})"
            )


def _fits(value: Any, default: float) -> bool:
    if isinstance(default, bool) or isinstance(value, bool):
        return isinstance(default, bool) and isinstance(value, bool)
    return isinstance(value, (int, float) if isinstance(default, float) else int)
