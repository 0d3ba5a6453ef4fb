"""Small tasks of one's own for the tests of the command line: `--task own_tasks:line`."""

import time
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from macrobatch.tasks import Task

Pair = tuple[Tensor, Tensor]


def squares(model: nn.Module, micro_batch: Pair) -> tuple[Tensor, int]:
    inputs, targets = micro_batch
    return (model(inputs) - targets).pow(2).sum(), len(inputs)


def line(*, size: int = 40, slope: float = 2.0, bad: int = -1, hidden: int = 0, seconds: float = 0.0) -> Task:
    """Least squares on a line.

    `bad`: a sample with an infinite target; `hidden`: units in between; `seconds`: that a sample takes.
    """
    x = torch.linspace(-1, 1, size)[:, None].expand(size, 3)
    y = slope * x[:, :1]
    if bad >= 0:
        y = y.index_fill(0, torch.tensor([bad]), torch.inf)
    samples: Any = Slow(list(zip(x, y, strict=True)), seconds)
    return Task(
        name="line",
        model=nn.Sequential(nn.Linear(3, hidden), nn.Tanh(), nn.Linear(hidden, 1)) if hidden else nn.Linear(3, 1),
        loss_fn=squares,
        train=samples,
        validation=list(zip(x[:7], slope * x[:7, :1], strict=True)),  # type: ignore[arg-type]  # a list is map-style
        make_optimizer=lambda model, lr: torch.optim.SGD(model.parameters(), lr=lr),
        learning_rate=0.05,
        base_batch_size=8,
        batch_size=8,
        micro_batch_size=3,
        metrics={"absolute error": lambda model, pair: ((model(pair[0]) - pair[1]).abs().sum(), len(pair[0]))},
    )


class Slow(list[Pair]):
    """Samples that take their time."""

    def __init__(self, samples: list[Pair], seconds: float) -> None:
        super().__init__(samples)
        self.seconds = seconds

    def __getitem__(self, index: Any) -> Any:
        time.sleep(self.seconds)
        return super().__getitem__(index)


class Halving(torch.optim.Optimizer):
    """An optimizer of one's own, for which there is no scaling rule: it halves the weights."""

    def __init__(self, parameters: Any) -> None:
        super().__init__(parameters, {"lr": 1.0})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]  # no closure here
        for group in self.param_groups:
            for p in group["params"]:
                p *= 0.5


def own_optimizer() -> Task:
    return replace(line(), make_optimizer=lambda model, lr: Halving(model.parameters()))


def late_metric() -> Task:
    """A metric that works once and never again: what no look at it before training can find."""
    calls: list[int] = []

    def metric(model: nn.Module, pair: Pair) -> tuple[float, int]:
        calls.append(1)
        if len(calls) > 1:
            raise ValueError("a bug that shows late")
        return 1.0, len(pair[0])

    return replace(line(), metrics={"late": metric})


def broken() -> Task:
    raise ValueError("a bug of my own")


def bare_token_mean() -> Task:
    """A loss that the accumulator refuses: a bare scalar with ignore labels in the batch."""
    labels = torch.tensor([1, -100, 2])
    data: Any = [(torch.ones(3, 4), labels) for _ in range(8)]
    return Task(
        name="bare",
        model=nn.Linear(4, 5),
        loss_fn=lambda model, pair: nn.functional.cross_entropy(model(pair[0]).flatten(0, 1), pair[1].flatten()),
        train=data,
        validation=data,
        make_optimizer=lambda model, lr: torch.optim.SGD(model.parameters(), lr=lr),
        learning_rate=0.1,
        base_batch_size=4,
        batch_size=4,
        micro_batch_size=2,
    )
