"""A small task of one's own whose loss compares all samples of an update: `--task own_towers:towers`."""

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from macrobatch.tasks import Task

Pair = tuple[Tensor, Tensor]
Outputs = dict[str, Tensor]


class Towers(nn.Module):
    """Two linear towers, with hidden units in between where asked for, and a temperature that is learned."""

    def __init__(self, hidden: int, norm: bool) -> None:
        super().__init__()
        self.left, self.right = _tower(6, hidden, norm), _tower(9, hidden, norm)
        self.log_scale = nn.Parameter(torch.tensor(1.0))


def _tower(width: int, hidden: int, norm: bool) -> nn.Module:
    if not hidden:
        return nn.Linear(width, 4)
    between = [nn.BatchNorm1d(hidden)] if norm else []
    return nn.Sequential(nn.Linear(width, hidden), *between, nn.Tanh(), nn.Linear(hidden, 4))


def encode(model: Any, micro_batch: Pair) -> Outputs:
    left, right = micro_batch
    return {"left": F.normalize(model.left(left), dim=-1), "right": F.normalize(model.right(right), dim=-1)}


def info_nce(model: Any, outputs: Outputs, window: Any) -> Tensor:
    logits = outputs["left"] @ outputs["right"].T * model.log_scale.exp()
    own = torch.arange(len(logits), device=logits.device)
    return F.cross_entropy(logits, own)


def first(model: nn.Module, outputs: Outputs) -> tuple[Tensor, int]:
    """How often a sample's own partner is the nearest of all."""
    scores = outputs["left"] @ outputs["right"].T
    return (scores.argmax(1) == torch.arange(len(scores))).sum(), len(scores)


def towers(
    *, size: int = 60, hidden: int = 0, norm: bool = False, dtype: str = "float32", base_batch_size: int = 12
) -> Task:
    """Pairs (6,) and (9,) that share four numbers; InfoNCE over all pairs of an update."""
    generator = torch.Generator().manual_seed(3)
    numeric: torch.dtype = getattr(torch, dtype)
    shared, noise = (torch.randn(size, 4, generator=generator, dtype=numeric) for _ in range(2))
    left = torch.cat([shared, noise[:, :2]], 1)
    right = torch.cat([shared @ torch.ones(4, 4, dtype=numeric).triu(), noise, noise[:, 3:]], 1)
    pairs: Any = [(a.clone(), b.clone()) for a, b in zip(left, right, strict=True)]
    return Task(
        name="towers",
        model=Towers(hidden, norm).to(numeric),
        encode=encode,
        loss_fn=info_nce,
        train=pairs[: size * 4 // 5],
        validation=pairs[size * 4 // 5 :],
        make_optimizer=lambda model, lr: torch.optim.AdamW(model.parameters(), lr=lr),
        learning_rate=0.01,
        base_batch_size=base_batch_size,
        batch_size=12,
        micro_batch_size=5,
        metrics={"recall@1": first},
    )
