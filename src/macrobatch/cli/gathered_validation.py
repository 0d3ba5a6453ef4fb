"""Held-out values of losses and metrics that compare all samples, and what each group of samples does to them.

Such a value t over n samples is no mean over them, so its uncertainty is the jackknife's: with t_(-j) the value without
the m_j samples of group j the pseudo-value of that group is

    (n t - (n - m_j) t_(-j)) / m_j

and the spread of the pseudo-values over groups gives the standard error as if they were independent observations
(Quenouille 1949, Tukey 1958; Efron and Tibshirani 1993, An Introduction to the Bootstrap, 11.5; groups of unlike size:
Busing, Meijer and van der Leeden 1999). Where t is a mean over samples the pseudo-value is the mean over the group.
"""

from collections.abc import Callable, Iterable, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from macrobatch import Window
from macrobatch.cli.learner import accumulator_of
from macrobatch.gathering import Outputs, joined, outputs_of
from macrobatch.structure import Nested, even_sizes
from macrobatch.tasks import Task

MOST_GROUPS = 16

Value = Callable[[Outputs], float]


@dataclass(frozen=True)
class GatheredValidation:
    """The outputs of all held-out samples, and what is computed of them: the loss, named "", and the metrics.

    Groups are of neighbours, evenly cut: held-out samples that belong together stay together.
    """

    functions: Mapping[str, Value]
    outputs: Outputs

    @classmethod
    def of(
        cls,
        model: nn.Module,
        task: Task,
        micro_batches: Iterable[Any],
        autocast: torch.dtype | None,
        stop: Callable[[], bool],
    ) -> "GatheredValidation":
        """Every micro-batch has been encoded, without gradients; none after one at which `stop()` is true."""
        outputs = joined(list(_encoded(model, task, micro_batches, autocast, stop)))
        around = partial(_autocast, outputs.rows[0].device, autocast)
        functions: dict[str, Value] = {"": _loss(model, task, around)}
        functions |= {name: _metric(model, metric, around) for name, metric in task.metrics.items()}
        return cls(functions, outputs)

    @property
    def num_samples(self) -> int:
        """How many samples the values are over."""
        return self.outputs.num_samples

    @property
    def sizes(self) -> list[int]:
        """The samples in each group."""
        return even_sizes(self.num_samples, -(-self.num_samples // MOST_GROUPS))

    def whole(self, function: Value) -> float:
        """The value over all samples."""
        return function(self.outputs)

    def parts(self, function: Value, whole: float) -> list[float]:
        """The pseudo-value of each group, given the value over all samples; of a single sample that value."""
        n, start, found = self.num_samples, 0, list[float]()
        if n == 1:
            return [whole]
        for size in self.sizes:
            without = function(_without(self.outputs, start, start + size))
            found.append((n * whole - (n - size) * without) / size)
            start += size
        return found


def _encoded(
    model: nn.Module,
    task: Task,
    micro_batches: Iterable[Any],
    autocast: torch.dtype | None,
    stop: Callable[[], bool],
) -> Iterable[Outputs]:
    """The outputs of one micro-batch after the other, in pieces where it does not fit."""
    found: list[Outputs] = []

    def keep(model: Any, outputs: Nested, window: Window) -> Tensor:
        found.append(outputs_of(outputs, window.num_samples))
        return torch.zeros(())

    encoder = accumulator_of(replace(task, loss_fn=keep), model, autocast=autocast)
    for micro_batch in micro_batches:
        encoder.evaluate(Window([micro_batch]))
        yield found.pop()
        if stop():
            return


def _loss(model: nn.Module, task: Task, around: Callable[[], AbstractContextManager[Any]]) -> Value:
    def value(outputs: Outputs) -> float:
        nested = outputs.nested
        window = Window.of_sized([(nested, outputs.num_samples)]).fill()
        with torch.no_grad(), around():
            return float(task.loss_fn(model, nested, window))

    return value


def _metric(model: nn.Module, metric: Any, around: Callable[[], AbstractContextManager[Any]]) -> Value:
    def value(outputs: Outputs) -> float:
        with torch.no_grad(), around():
            total, count = metric(model, outputs.nested)
        return float(total) / float(count) if float(count) else float("nan")

    return value


def _autocast(device: torch.device, dtype: torch.dtype | None) -> AbstractContextManager[Any]:
    return nullcontext() if dtype is None else torch.autocast(device.type, dtype=dtype)


def _without(outputs: Outputs, start: int, stop: int) -> Outputs:
    """The outputs without those of the samples from `start` to `stop`."""
    rows = [torch.cat([row[:start], row[stop:]]) for row in outputs.rows]
    return Outputs(outputs.template, rows, outputs.num_samples - (stop - start))
