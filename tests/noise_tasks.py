"""Small tasks whose gradient noise is known, for the tests of the command line: `--task noise_tasks:regression`."""

from typing import Any, Literal

import torch
from torch import Tensor, nn

from macrobatch.tasks import Task

Pair = tuple[Tensor, Tensor]


def squares(model: nn.Module, micro_batch: Pair) -> tuple[Tensor, int]:
    inputs, targets = micro_batch
    return (model(inputs) - targets).pow(2).sum() / 2, len(inputs)


class Unknown(torch.optim.Optimizer):
    """An optimizer that no rule knows."""

    def __init__(self, parameters: Any, lr: float) -> None:
        super().__init__(parameters, {"lr": lr})

    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            for p in group["params"]:
                p.data.sub_(p.grad, alpha=group["lr"])


def regression(
    *,
    size: int = 512,
    noise: float = 1.0,
    optimizer: Literal["sgd", "adamw", "rprop", "unknown"] = "sgd",
    learning_rate: float = 0.05,
    bad: int = -1,
    badness: float = 1000.0,
) -> Task:
    """Linear regression with noise in the targets, in 4 dimensions.

    `bad`: a sample whose target is `badness`; with -2 three of four are.
    """
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(size, 4, generator=generator)
    y = x @ torch.tensor([[1.0], [-1.0], [0.5], [2.0]]) + noise * torch.randn(size, 1, generator=generator)
    if bad >= 0:
        y[bad] = badness
    elif bad == -2:
        y[torch.arange(size) % 4 > 0] = badness
    kinds: dict[str, Any] = {
        "sgd": torch.optim.SGD,
        "adamw": torch.optim.AdamW,
        "rprop": torch.optim.Rprop,
        "unknown": Unknown,
    }
    data: Any = list(zip(x, y, strict=True))
    return Task(
        name="regression",
        model=nn.Linear(4, 1, bias=False),
        loss_fn=squares,
        train=data,
        validation=data[:64],
        make_optimizer=lambda model, lr: kinds[optimizer](model.parameters(), lr=lr),
        learning_rate=learning_rate,
        base_batch_size=8,
        batch_size=32,
        micro_batch_size=8,
    )


def true_noise_scale(task: Task, weight: Tensor) -> float:
    """S / |G|^2 at `weight` over all samples of a `regression`, from the gradient of each, in float64."""
    x, y = (torch.cat([sample[i].reshape(1, -1) for sample in task.train]).double() for i in (0, 1))  # type: ignore[attr-defined]
    gradients = (x @ weight.double().T - y) * x
    mean = gradients.mean(0)
    return float((gradients - mean).square().sum(1).mean() / mean.square().sum())
