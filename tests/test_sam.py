"""SAM makes the update that two passes by hand over the full batch make, and leaves nothing else behind."""

import math

import pytest
import torch
from helpers import difference, gradients
from torch import Tensor, nn
from torch.amp.grad_scaler import GradScaler
from torch.nn import functional as F

import macrobatch as mb

Batch = tuple[Tensor, Tensor]
SIZES = (7, 1, 4)


def net(dropout: float = 0.0, norm: bool = False) -> nn.Sequential:
    torch.manual_seed(0)
    middle = nn.BatchNorm1d(7) if norm else nn.Identity()
    return nn.Sequential(nn.Linear(5, 7), middle, nn.Tanh(), nn.Dropout(dropout), nn.Linear(7, 3)).double()


def window() -> mb.Window:
    generator = torch.Generator().manual_seed(3)
    x, y = torch.randn(sum(SIZES), 5, generator=generator).double(), torch.randint(0, 3, (12,), generator=generator)
    return mb.Window(list(zip(x.split(SIZES), y.split(SIZES), strict=True)))


def whole() -> Batch:
    inputs, targets = zip(*window(), strict=True)
    return torch.cat(inputs), torch.cat(targets)


def cross_entropy(model: nn.Module, batch: Batch) -> Tensor:
    return F.cross_entropy(model(batch[0]), batch[1])


def by_hand(model: nn.Module, rho: float) -> list[Tensor | None]:
    """The gradient at w + rho g / |g|, over the full batch in one piece; the weights end where they began."""
    parameters, batch = list(model.parameters()), whole()
    gradient = torch.autograd.grad(cross_entropy(model, batch), parameters)
    length = torch.stack([g.norm() for g in gradient]).norm()
    before = [p.detach().clone() for p in parameters]
    with torch.no_grad():
        for p, g in zip(parameters, gradient, strict=True):
            p.add_(rho * g / length)
    highest = torch.autograd.grad(cross_entropy(model, batch), parameters)
    with torch.no_grad():
        for p, b in zip(parameters, before, strict=True):
            p.copy_(b)
    return list(highest)


def taken(model: nn.Module, before: list[Tensor], lr: float) -> list[Tensor | None]:
    """The gradient that one step of plain SGD went along."""
    return [(b - p.detach()) / lr for p, b in zip(model.parameters(), before, strict=True)]


@pytest.mark.parametrize("rho", [0.05, 1.0])
def test_the_step_goes_along_the_gradient_of_the_highest_point_nearby(rho: float) -> None:
    model = net()
    expected, plain = by_hand(model, rho), by_hand(model, 0.0)
    before = [p.detach().clone() for p in model.parameters()]
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    report, update = mb.SAM(mb.Accumulator(model, cross_entropy), optimizer, rho=rho).step(window())
    assert update.applied
    assert difference(taken(model, before, 0.5), expected) <= 1e-12
    assert difference(taken(model, before, 0.5), plain) > 0.01, "control: plain SGD takes another step"
    assert all(p.grad is None for p in model.parameters())
    for p, b in zip(model.parameters(), before, strict=True):
        p.data.copy_(b)
    assert float(report.loss) == pytest.approx(cross_entropy(model, whole()).item(), rel=1e-12), (
        "at the weights themselves"
    )


def test_both_passes_draw_the_same_dropout_masks() -> None:
    drawn: list[Tensor] = []
    model = net(dropout=0.5)
    model[3].register_forward_hook(lambda module, args, output: drawn.append(output.detach() == 0))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    sam = mb.SAM(mb.Accumulator(model, cross_entropy), optimizer)
    torch.manual_seed(5)
    sam.step(window())
    after = torch.rand(3)
    first, second = drawn[: len(SIZES)], drawn[len(SIZES) :]
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    model = net(dropout=0.5)
    torch.manual_seed(5)
    mb.Accumulator(model, cross_entropy).run(window())
    assert torch.equal(torch.rand(3), after), "random numbers go on as after one pass"


def test_buffers_change_once_as_in_a_single_pass() -> None:
    model, single = net(norm=True), net(norm=True)
    accumulators = [
        mb.Accumulator(m, cross_entropy, micro_batch_size=4, batch_norm="micro_batch") for m in (model, single)
    ]
    mb.SAM(accumulators[0], torch.optim.SGD(model.parameters(), lr=0.1)).step(whole())
    accumulators[1].run(whole())
    for mine, theirs in zip(model.buffers(), single.buffers(), strict=True):
        assert torch.equal(mine, theirs)
    assert int(model[1].num_batches_tracked) == 3


def test_an_error_in_the_second_pass_leaves_the_weights_bit_for_bit() -> None:
    model, calls = net(), [0]

    def failing(model: nn.Module, batch: Batch) -> Tensor:
        calls[0] += 1
        if calls[0] == len(SIZES) + 2:
            raise KeyError("lost")
        return cross_entropy(model, batch)

    before = [p.detach().clone() for p in model.parameters()]
    sam = mb.SAM(mb.Accumulator(model, failing), torch.optim.SGD(model.parameters(), lr=0.1))
    with pytest.raises(KeyError, match="lost"):
        sam.step(window())
    assert all(torch.equal(p, b) for p, b in zip(model.parameters(), before, strict=True))
    assert all(p.grad is None for p in model.parameters())
    assert sam.step(window())[1].applied


def test_a_first_gradient_that_is_not_finite_skips_the_update() -> None:
    model = net()
    before = [p.detach().clone() for p in model.parameters()]

    def infinite(model: nn.Module, batch: Batch) -> Tensor:
        return cross_entropy(model, batch) * math.inf

    _, update = mb.SAM(mb.Accumulator(model, infinite), torch.optim.SGD(model.parameters(), lr=0.1)).step(window())
    assert not update.applied
    assert all(torch.equal(p, b) for p, b in zip(model.parameters(), before, strict=True))
    assert gradients(model) == [None] * len(before)


def test_a_grad_scaler_and_clipping_act_on_the_second_gradient() -> None:
    model = net()
    expected = by_hand(model, 0.05)
    length = torch.stack([g.norm() for g in expected if g is not None]).norm()
    before = [p.detach().clone() for p in model.parameters()]
    scaler = GradScaler("cpu", init_scale=2.0**8, growth_interval=1)
    accumulator = mb.Accumulator(model, cross_entropy, scaler=scaler)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    _, update = mb.SAM(accumulator, optimizer).step(window(), max_norm=0.1)
    assert float(update.grad_norm) == pytest.approx(float(length), rel=1e-6)
    assert difference(taken(model, before, 0.5), [None if g is None else 0.1 * g / length for g in expected]) <= 1e-4
    assert scaler.get_scale() == 2.0**9, "updated once"


def test_bad_input_is_refused() -> None:
    model = net()
    accumulator, optimizer = mb.Accumulator(model, cross_entropy), torch.optim.SGD(model.parameters(), lr=0.1)
    with pytest.raises(ValueError, match="rho must be a distance above 0, got 0"):
        mb.SAM(accumulator, optimizer, rho=0)
    with pytest.raises(ValueError, match="SAM takes an Accumulator, got a Sequential"):
        mb.SAM(model, optimizer)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="SAM takes a torch optimizer, got a list"):
        mb.SAM(accumulator, [optimizer])  # type: ignore[arg-type]
