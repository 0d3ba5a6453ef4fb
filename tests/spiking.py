"""A small run with everything that an update changes: dropout, BatchNorm, AdamW, a schedule; and windows that spike."""

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import AdamW, Optimizer
from torch.optim.lr_scheduler import LRScheduler

import macrobatch as mb

Batch = tuple[Tensor, Tensor]
# So few updates are compared with that the threshold must be higher, or chance would flag one.
QUICK: dict[str, Any] = {"window": 16, "min_updates": 8, "snapshot_every": 10, "threshold": 10.0}
UNCHANGED_LR: dict[str, Any] = {"lr_factor": 1.0, "warmup_updates": 0}


def windows(count: int, *, bad: Iterable[int] = (), by: float = 300.0, n: int = 8) -> list[Batch]:
    """`count` windows of n samples; in those at `bad` every target is multiplied by `by`."""
    generator = torch.Generator().manual_seed(5)
    made = []
    for t in range(count):
        x = torch.randn(n, 4, generator=generator, dtype=torch.float64)
        y = x.sum(1, keepdim=True) + 0.3 * torch.randn(n, 1, generator=generator, dtype=torch.float64)
        made.append((x, y * by if t in set(bad) else y))
    return made


def squared_error(model: nn.Module, batch: Batch) -> tuple[Tensor, int]:
    x, y = batch
    return (model(x) - y).square().sum(), len(x)


class Training:
    """A model that draws and remembers, its optimizer and scheduler, and what the guard said of each window."""

    def __init__(
        self,
        make_optimizer: Callable[[nn.Module], Optimizer] = lambda model: AdamW(model.parameters(), lr=0.01),
        make_scheduler: Callable[[Optimizer], LRScheduler | None] = lambda o: torch.optim.lr_scheduler.StepLR(
            o, 7, 0.9
        ),
        measure: Any = None,
        micro_batch_size: int = 4,
        plain: bool = False,
    ) -> None:
        torch.manual_seed(0)
        between = [nn.Tanh()] if plain else [nn.BatchNorm1d(6), nn.Dropout(0.1)]
        self.model = nn.Sequential(nn.Linear(4, 6), *between, nn.Linear(6, 1)).double()
        self.optimizer = make_optimizer(self.model)
        self.scheduler = make_scheduler(self.optimizer)
        self.accumulator = mb.Accumulator(
            self.model, squared_error, micro_batch_size=micro_batch_size, measure=measure, batch_norm="micro_batch"
        )
        self.verdicts: list[mb.SpikeVerdict] = []

    def guard(self, **options: Any) -> mb.SpikeGuard:
        return mb.SpikeGuard(self.model, self.optimizer, scheduler=self.scheduler, **(QUICK | options))

    def train(self, batches: Iterable[Batch], guard: mb.SpikeGuard | None = None, *, factor: float = 1) -> "Training":
        """Updates with `factor` times the rate, which nobody knows of but the step itself."""
        for batch in batches:
            report = self.accumulator.run(batch)
            if guard is not None:
                self.verdicts.append(guard.check(report))
                if not self.verdicts[-1].accepted:
                    continue
            rate = self.optimizer.param_groups[0]["lr"]
            self.optimizer.param_groups[0]["lr"] = rate * factor
            applied = mb.apply_update(self.optimizer, report).applied
            self.optimizer.param_groups[0]["lr"] = rate
            if applied and self.scheduler is not None:
                self.scheduler.step()
        return self

    @property
    def kinds(self) -> list[str]:
        return [verdict.kind for verdict in self.verdicts]

    def loss(self) -> float:
        """Of 100 clean windows, without dropout; afterwards it trains on as before."""
        self.model.eval()
        report = self.accumulator.evaluate(mb.Window(windows(300)[200:]))
        self.model.train()
        return float(report.loss)

    def state(self) -> list[Any]:
        """Every number that training has come to, and the random numbers that come next."""
        scheduler = {} if self.scheduler is None else self.scheduler.state_dict()
        optimizer = self.optimizer.state_dict()
        return [self.model.state_dict(), optimizer, scheduler, torch.get_rng_state()]


def assert_same(mine: Any, theirs: Any) -> None:
    """Equal in every bit."""
    if isinstance(mine, Tensor):
        assert torch.equal(mine, theirs)
    elif isinstance(mine, dict):
        assert mine.keys() == theirs.keys()
        for key in mine:
            assert_same(mine[key], theirs[key])
    elif isinstance(mine, list | tuple):
        assert len(mine) == len(theirs)
        for a, b in zip(mine, theirs, strict=True):
            assert_same(a, b)
    else:
        assert mine == theirs
