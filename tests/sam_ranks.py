"""Claims about SAM for test_distributed.py; imports nothing from pytest."""

import torch
import torch.distributed as dist
from ranks import sizes_for
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.parallel import DistributedDataParallel as DDP

import macrobatch as mb


def net() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(5, 7), nn.Tanh(), nn.Linear(7, 3)).double()


def loss_fn(model: nn.Module, batch: tuple[Tensor, Tensor]) -> tuple[Tensor, int]:
    return F.cross_entropy(model(batch[0]), batch[1], reduction="sum"), len(batch[1])


def parts(sizes: list[int]) -> list[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(3)
    x, y = torch.randn(sum(sizes), 5, generator=generator).double(), torch.randint(0, 3, (sum(sizes),))
    return list(zip(x.split(sizes), y.split(sizes), strict=True))


def one_update(model: nn.Module, window: mb.Window, group: object) -> list[Tensor]:
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    accumulator = mb.Accumulator(model, loss_fn, micro_batch_size=2, process_group=group)  # type: ignore[arg-type]
    _, update = mb.SAM(accumulator, optimizer, rho=0.5).step(window)
    assert update.applied
    return [p.detach().clone() for p in model.parameters()]


def all_ranks_climb_to_the_same_point(sizes: list[int]) -> None:
    torch.manual_seed(5)
    shares = parts(sizes)
    expected = one_update(net(), mb.Window([share for share in shares if len(share[0])]), None)
    own = shares[dist.get_rank()]
    window = mb.Window([own] if len(own[0]) else [])
    for model in (DDP(net()), net()):
        mine = one_update(model, window, "auto")
        assert all(torch.allclose(a, b, rtol=0, atol=1e-12) for a, b in zip(mine, expected, strict=True))
        everyone: list[list[Tensor]] = [[] for _ in sizes]
        dist.all_gather_object(everyone, mine)
        same = [torch.equal(a, b) for other in everyone for a, b in zip(mine, other, strict=True)]
        assert all(same), "bit for bit the same on all ranks"
    if 0 not in sizes:
        alone = one_update(net(), window, None)
        apart = max(float((a - b).abs().max()) for a, b in zip(alone, expected, strict=True))
        assert apart > 1e-3, "control: a rank by itself climbs elsewhere"


def uneven_ranks(world: int) -> None:
    all_ranks_climb_to_the_same_point(sizes_for(world))


def a_rank_without_samples(world: int) -> None:
    all_ranks_climb_to_the_same_point([10, 0, 4][:world])
