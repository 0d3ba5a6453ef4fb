"""Whether the loss and every metric of a task work on held-out samples: found out before training, not after it."""

import traceback
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from macrobatch.cli.memory_use import uncounted
from macrobatch.cli.validation import validate, validation_batches
from macrobatch.tasks import Task


def check_metrics(model: nn.Module, task: Task, micro_batch_size: int, autocast: torch.dtype | None = None) -> None:
    """The loss and the metrics have been taken once, of the first held-out micro-batch; random numbers are as before.

    A metric over the outputs of all samples may need more of them than a micro-batch has: one that fails is tried again
    on all. ValueError for a metric that cannot be taken of what it will be given after training, either.
    """
    batches = validation_batches(task, micro_batch_size)
    devices = sorted({p.device.index for p in model.parameters() if p.device.type == "cuda"})
    # What is short of memory is not wrong: how much there is later, with another micro-batch size, is not known here.
    with torch.random.fork_rng(devices), uncounted(), suppress(torch.OutOfMemoryError):
        first = list(islice(batches, 1))
        validate(model, replace(task, metrics={}), first, autocast=autocast)
        for name in task.metrics:
            error = _failure(model, task, name, first, autocast)
            if error is not None and task.encode is not None:
                error = _failure(model, task, name, batches, autocast)
            if error is not None:
                raise error


def _failure(
    model: nn.Module, task: Task, name: str, batches: Iterable[Any], autocast: torch.dtype | None
) -> ValueError | None:
    """What to say of a metric that fails; None where it works."""
    watched = _Watched(task.metrics[name])
    try:
        validate(model, replace(task, metrics={name: watched}), batches, autocast=autocast)
    except torch.OutOfMemoryError:
        raise
    except Exception as error:
        failure = ValueError(_what_failed(task, name, watched, error))
        failure.__cause__ = error
        return failure
    return None


class _Watched:
    """A metric that remembers what it returned last: nothing, if it did not come to that."""

    def __init__(self, metric: Callable[..., Any]) -> None:
        self._metric = metric
        self.returned: list[Any] = []

    def __call__(self, *given: Any) -> Any:
        """What the metric returns."""
        self.returned.clear()
        self.returned.append(self._metric(*given))
        return self.returned[0]


def _what_failed(task: Task, name: str, watched: _Watched, error: Exception) -> str:
    given, over = ("outputs", "samples") if task.encode is not None else ("micro_batch", "micro-batch")
    needed = f"(sum, count), a sum over the {over} as a number or a tensor of shape (), and how many terms it has"
    if task.encode is None:
        needed += "; or a tensor of shape (), the mean over the samples of the micro-batch"
    called = f"task {task.name!r}: the metric {name!r}, called as metric(model, {given})"
    if watched.returned:
        said = f"{called}, returned {_described(watched.returned[0])}; needed is {needed}. Let it return that"
    else:
        said = f"{called}, raised {type(error).__name__}: {error}{_where(error)}. Mend it, so that it returns {needed}"
    return f"{said}, or leave it out of the task's metrics. Nothing was trained"


def _described(value: Any) -> str:
    """A value in few words: its type, and the shape of a tensor."""
    if isinstance(value, Tensor):
        return f"a tensor of shape {tuple(value.shape)}"
    if isinstance(value, tuple) and len(value) <= 4:
        return f"({', '.join(map(_described, value))})"
    if isinstance(value, Sequence) and not isinstance(value, str):
        return f"a {type(value).__name__} of {len(value)}"
    return repr(value)[:60] if isinstance(value, str | int | float | None) else f"a {type(value).__name__}"


def _where(error: Exception) -> str:
    """File and line that raised it, in brackets; empty where the call itself failed, for its arguments."""
    last = traceback.extract_tb(error.__traceback__)[-1]
    return "" if last.filename == __file__ else f" ({Path(last.filename).name}, line {last.lineno})"
