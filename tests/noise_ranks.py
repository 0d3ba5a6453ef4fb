"""Claims about the noise scale for test_distributed.py; imports nothing from pytest.

Each rank has its own number of samples and micro-batches; everything is compared with one process on all of them.
"""

import torch
import torch.distributed as dist
from moments_by_hand import float64, moments_of_gradients
from torch import Tensor, nn

import macrobatch as mb

SIZES = [7, 3, 0]  # samples of each rank


class Reading(nn.Module):
    """Cannot be run over several samples at once by torch.func."""

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = net

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x) if x.sum().item() > -1e9 else x


def loss_fn(model: nn.Module, batch: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    x, weight = batch
    return (model(x)[:, 0].square() * weight).sum(), weight.sum()


def net() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 1)).double()


def everything(n: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    return (
        torch.randn(n, 4, generator=generator, dtype=torch.float64),
        torch.randint(1, 5, (n,), generator=generator).double(),
    )


def parts(world: int) -> list[tuple[Tensor, Tensor]]:
    x, weight = everything(sum(SIZES[:world]))
    return list(zip(x.split(SIZES[:world]), weight.split(SIZES[:world]), strict=True))


def by_definition(model: nn.Module, micro_batches: list[tuple[Tensor, Tensor]]) -> mb.GradientMoments:
    gradients = []
    for each in micro_batches:
        total, weight = loss_fn(model, each)
        gradients.append(
            torch.cat([g.flatten() for g in torch.autograd.grad(total / weight, list(model.parameters()))])
        )
    weights = float64(torch.tensor([float(weight.sum()) for _, weight in micro_batches]))
    return moments_of_gradients(torch.stack(gradients), [len(x) for x, _ in micro_batches], weights)


def compare(mine: mb.GradientMoments, theirs: mb.GradientMoments) -> None:
    for name in mine.__dataclass_fields__:
        if name != "squared_norms":
            torch.testing.assert_close(getattr(mine, name), getattr(theirs, name), rtol=1e-10, atol=1e-14)


def windows_of_all_ranks_make_one_estimate(world: int) -> None:
    model, mine = net(), parts(world)[dist.get_rank()]
    cuts = [mb.Window([part]).cut(2) for part in parts(world) if len(part[0])]
    expected = by_definition(model, [each for window in cuts for each in window])
    window = mb.Window([mine] if len(mine[0]) else []).cut(2)
    report = mb.Accumulator(model, loss_fn, measure="squares").run(window)
    compare(report.moments, expected)
    noise = mb.GradientNoiseScale()
    noise.observe(report)
    assert abs(noise.estimate().variance / float(expected.variance) - 1) < 1e-9
    optimizer = mb.InvariantAdamW(model.parameters(), lr=0.1, reference_batch_size=2)
    optimizer.observe(report)
    assert mb.apply_update(optimizer, report).applied
    everyone: list[list[Tensor]] = [[] for _ in range(world)]
    dist.all_gather_object(everyone, [p.detach() for p in model.parameters()])
    assert all(torch.equal(a, b) for other in everyone for a, b in zip(everyone[0], other, strict=True))


def examples_of_all_ranks_make_one_batch(world: int) -> None:
    if world > 2:
        return  # a rank without samples has no batch to give
    mine = parts(world)[dist.get_rank()]
    x, weight = everything(sum(SIZES[:world]))
    for model in (net(), Reading(net()) if dist.get_rank() == 0 else net()):  # one rank cannot vectorise: none does
        expected = by_definition(model, [(x[i : i + 1], weight[i : i + 1]) for i in range(len(x))])
        compare(mb.per_example_moments(model, loss_fn, mine), expected)
