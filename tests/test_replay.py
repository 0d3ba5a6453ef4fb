"""A forward run again begins from the buffers and random numbers of the first, also where modules share a buffer."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from helpers import clear, difference, gradients, reference
from test_contrastive_recovery import run_with_failures
from torch import Tensor, nn

import macrobatch as mb
from macrobatch import gathered_forward
from macrobatch.replay import Replay
from macrobatch.state import buffer_slots

SIZES = (4, 4, 3)


class Counter(nn.Module):
    """Counts the samples that went through it; `replaces`: by another tensor instead of in place."""

    def __init__(self, seen: Tensor, replaces: bool = False) -> None:
        super().__init__()
        self.register_buffer("seen", seen)
        self.replaces = replaces

    def forward(self, x: Tensor) -> Tensor:
        if self.replaces:
            self.seen = self.seen + len(x)
        else:
            self.seen.add_(len(x))
        return x * self.seen[:1].log()


class Sharing(nn.Module):
    """Two layers that count in one buffer, which the output depends on after each of them, and a reader of it."""

    def __init__(self, size: int = 1, replaces: bool = False) -> None:
        super().__init__()
        seen = torch.full((size,), 2.0, dtype=torch.float64)
        self.first, self.second = nn.Linear(5, 6, dtype=torch.float64), nn.Linear(6, 4, dtype=torch.float64)
        self.before, self.after = Counter(seen), Counter(seen, replaces)
        self.register_buffer("reader", seen)

    def forward(self, x: Tensor) -> Tensor:
        return self.second(self.before(self.first(x)).tanh() * self.reader[:1].clone()) + self.after(x)[:, :4]


def spread(model: nn.Module, outputs: Tensor, window: Any) -> Tensor:
    return torch.pdist(outputs).square().mean()


def in_order(model: nn.Module, x: Tensor) -> list[Tensor | None]:
    """The gradient of one graph over all micro-batches, whose forwards follow one another."""
    return reference(model, lambda: spread(model, torch.cat([model(part) for part in x.split(list(SIZES))]), None))


def encode(model: nn.Module, x: Tensor) -> Tensor:
    return model(x)


@pytest.mark.parametrize("keep", [0, 1, 3])
@pytest.mark.parametrize("replaces", [False, True])
@pytest.mark.parametrize("size", [1, 9000])
def test_modules_that_share_a_buffer_share_it_in_the_second_forward_and_after(
    size: int, replaces: bool, keep: int
) -> None:
    torch.manual_seed(0)
    model, x = Sharing(size, replaces), torch.randn(sum(SIZES), 5, dtype=torch.float64)
    torch.manual_seed(0)
    twin = Sharing(size, replaces)
    accumulator = mb.GatheredAccumulator(model, encode, spread, micro_batch_size=4, keep_graphs=keep)
    held = model.before.seen
    for _ in range(3):  # of a large buffer the first window learns that it changes
        clear(model)
        expected = in_order(twin, x)
        accumulator.run(x)
        assert difference(gradients(model), expected) <= 1e-12
        assert all(torch.equal(a, b) for a, b in zip(model.buffers(), twin.buffers(), strict=True))
        assert model.before.seen is held is model.reader
        assert (model.after.seen is held) is not replaces


def test_control_in_buffers_of_their_own_modules_would_count_otherwise() -> None:
    torch.manual_seed(0)
    model, x = Sharing(), torch.randn(sum(SIZES), 5, dtype=torch.float64)
    torch.manual_seed(0)
    apart = Sharing()
    apart.after.seen, apart.reader = apart.after.seen.clone(), apart.reader.clone()
    assert difference(in_order(apart, x), in_order(model, x)) > 0.01


@pytest.mark.parametrize("size", [1, 9000])
def test_a_shared_buffer_is_copied_once_and_put_back_everywhere(size: int) -> None:
    model, x = Sharing(size), torch.randn(4, 5, dtype=torch.float64)
    replay, held = Replay(), model.reader
    replay.watch(buffer_slots([model]), None)
    with replay.first() as beginning:
        model(x)
    assert len(beginning.buffers) == 3
    assert len({id(copy) for copy in beginning.buffers.values()}) == 1
    assert all(float(copy[0]) == 2 for copy in beginning.buffers.values() if copy is not None)
    version = held._version
    for _ in range(2):
        with replay.again(beginning):
            assert model.before.seen is model.after.seen is model.reader is not held
            assert float(model.reader[0]) == 2
            model(x)
        assert model.before.seen is model.after.seen is model.reader is held
        assert (float(held[0]), held._version) == (10, version)
    with pytest.raises(RuntimeError, match="stop"), replay.again(beginning):
        raise RuntimeError("stop")
    assert model.before.seen is model.after.seen is model.reader is held


def test_each_micro_batch_has_a_beginning_of_its_own() -> None:
    model, x = Sharing(), torch.randn(4, 5, dtype=torch.float64)
    replay, beginnings, outputs = Replay(), [], []
    replay.watch(buffer_slots([model]), None)
    for _ in range(3):
        with replay.first() as beginning:
            outputs.append(model(x))
        beginnings.append(beginning)
    for j in (2, 0, 1):
        with replay.again(beginnings[j]):
            assert torch.equal(model(x), outputs[j])
    assert float(model.reader[0]) == 2 + 3 * 2 * 4


class Dropping(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(5, 6), nn.Dropout(0.4), nn.Tanh(), nn.Linear(6, 4)).double()

    def forward(self, x: Tensor) -> Tensor:
        return self.layers(x)


def noisy(model: nn.Module, outputs: Tensor, window: Any) -> Tensor:
    return torch.pdist(outputs + torch.randn_like(outputs)).mean() + (outputs * torch.rand_like(outputs)).sum()


@pytest.mark.parametrize("make", [Dropping, Sharing])
@pytest.mark.parametrize("keep", [1, 2, 3])
def test_a_loss_that_runs_out_of_memory_draws_the_same_numbers_again(
    make: Callable[[], nn.Module], keep: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """At any operation of it: the gradient, and the random numbers that follow, are those without a failure."""
    monkeypatch.setattr(gathered_forward.gc, "collect", lambda: 0)
    torch.manual_seed(0)
    x = torch.randn(sum(SIZES), 5, dtype=torch.float64)

    def run(points: set[int]) -> tuple[list[Tensor | None], Tensor, Any]:
        torch.manual_seed(0)
        model = make()
        accumulator = mb.GatheredAccumulator(model, encode, noisy, micro_batch_size=4, keep_graphs=keep)
        torch.manual_seed(7)
        report, mode = run_with_failures(accumulator, x, points, monkeypatch, "loss")
        assert report.retries == mode.failures == len(points)
        return gradients(model), torch.rand(4), mode

    expected, following, clean = run(set())
    for point in range(1, clean.count + 1):
        mine, then, _ = run({point})
        assert difference(mine, expected) <= 1e-12, point
        assert torch.equal(then, following), point
