"""Random numbers and buffers after a failure are as before it, and what a loader drew meanwhile is drawn once."""

from collections.abc import Callable

import pytest
import torch
from helpers import clear
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

import macrobatch as mb
from macrobatch.state import Beginnings

LARGE = 20_000  # entries: a buffer of that size is copied only once it was seen to change


def no_memory(_: Tensor | None = None) -> None:
    raise torch.OutOfMemoryError("injected")


class Failing:
    """The sum of squares of the model's outputs; the forward or backward number `at`, counted from 1, fails once."""

    def __init__(self, at: int = 0, *, in_backward: bool = False) -> None:
        self.at = at
        self.in_backward = in_backward
        self.calls = 0

    def __call__(self, model: nn.Module, x: Tensor) -> tuple[Tensor, int]:
        self.calls += 1
        fails = self.calls == self.at  # asked before the forward: several may be under way at once
        out = model(x)
        if fails and self.in_backward:
            out.register_hook(no_memory)
        elif fails:
            no_memory()
        return out.square().sum(), len(x)

    def fail(self, at: int) -> None:
        """Call number `at` of those that follow fails."""
        self.calls, self.at = 0, at


# ---------------------------------------------------------------------------------------------------------------------
# Random numbers


class Noisy(Dataset[Tensor]):
    """Samples that are drawn when they are fetched, as an augmentation is."""

    def __len__(self) -> int:
        return 32

    def __getitem__(self, i: int) -> Tensor:
        return torch.randn(4)


def coupled() -> nn.Module:
    return nn.Sequential(nn.Linear(4, 3), nn.BatchNorm1d(3), nn.Linear(3, 1))


def mended_from_zero() -> tuple[mb.Accumulator, Failing]:
    loss = Failing(2, in_backward=True)
    return mb.Accumulator(coupled(), loss, batch_norm="micro_batch"), loss


def mended_in_place() -> tuple[mb.Accumulator, Failing]:
    loss = Failing(2, in_backward=True)
    return mb.Accumulator(nn.Linear(4, 1), loss), loss


def drawn_against_expectation() -> tuple[mb.Accumulator, Failing]:
    model, loss = nn.Linear(4, 1), Failing()
    accumulator = mb.Accumulator(model, loss)
    accumulator.run(mb.Window([torch.ones(4, 4)] * 4))  # nothing is drawn, by loader or model
    clear(model)
    loss.fail(2)
    return accumulator, loss


def in_lockstep() -> tuple[mb.Accumulator, Failing]:
    loss = Failing(2)
    return mb.Accumulator(coupled(), loss, batch_norm="exact"), loss


WAYS = [mended_from_zero, mended_in_place, drawn_against_expectation, in_lockstep]


def distinct_samples(make: Callable[[], tuple[mb.Accumulator, Failing]]) -> tuple[int, list[bool]]:
    """Of two windows of 16 samples, in the first of which a micro-batch fails; whether each has failed."""
    accumulator, _ = make()
    seen, failed = [], []
    for window in mb.windows(DataLoader(Noisy(), batch_size=4), accumulation_steps=4):
        failed.append(accumulator.run(window).retries > 0)
        clear(accumulator.model)
        seen += list(window)
    return len(torch.cat(seen).unique(dim=0)), failed


@pytest.mark.parametrize("make", WAYS)
def test_samples_that_a_loader_draws_while_the_window_fills_are_drawn_once(
    make: Callable[[], tuple[mb.Accumulator, Failing]],
) -> None:
    assert distinct_samples(make) == (32, [True, False])


@pytest.mark.parametrize("make", [mended_from_zero, drawn_against_expectation, in_lockstep])
def test_control_where_random_numbers_went_back_behind_the_loader_samples_would_repeat(
    make: Callable[[], tuple[mb.Accumulator, Failing]], monkeypatch: pytest.MonkeyPatch
) -> None:
    def go_back(self: Beginnings) -> None:
        assert self._window_random is not None
        self._window_random.restore()
        self._window.restore()

    monkeypatch.setattr(Beginnings, "return_to_window", go_back)
    assert distinct_samples(make)[0] < 32


def noisy_loss(drawn: list[Tensor], at: set[int]) -> Callable[[nn.Module, Tensor], tuple[Tensor, int]]:
    """A loss that draws a number for each sample; the backwards with the numbers `at`, counted from 1, fail."""

    def loss_fn(model: nn.Module, x: Tensor) -> tuple[Tensor, int]:
        drawn.append(torch.rand(len(x)))
        out = model(x)
        if len(drawn) in at:
            out.register_hook(no_memory)
        return (out.squeeze(1).square() * drawn[-1]).sum(), len(x)

    return loss_fn


@pytest.mark.parametrize("is_cut", [False, True])
@pytest.mark.parametrize("fills", [False, True])
def test_what_forwards_drew_is_drawn_again_where_a_filled_window_runs_again(fills: bool, is_cut: bool) -> None:
    drawn: list[Tensor] = []
    accumulator = mb.Accumulator(coupled(), noisy_loss(drawn, at={3, 8}), batch_norm="micro_batch")
    micro_batches = list(torch.randn(32, 4).split(8))
    window = mb.Window(iter(micro_batches) if fills else micro_batches)
    accumulator.run(window.cut(8) if is_cut else window)
    assert [len(d) for d in drawn] == [8] * 3 + [4] * 5 + [2] * 16
    first, second, third = torch.cat(drawn[:2]), torch.cat(drawn[3:8]), torch.cat(drawn[8:])
    assert torch.equal(first, second[:16]) is not fills
    assert torch.equal(second, third[:20]) is not fills


def test_a_window_without_draws_between_others_changes_nothing_for_them() -> None:
    """What the first window drew decides, else dropout after an evaluated window would cost a whole window's rerun."""
    model, loss = nn.Sequential(nn.Linear(4, 4), nn.Dropout(0.5)), Failing(in_backward=True)
    accumulator, x = mb.Accumulator(model, loss, micro_batch_size=4), torch.randn(16, 4)
    accumulator.run(x)
    clear(model)
    model.eval()
    accumulator.run(x)
    clear(model)
    model.train()
    loss.fail(3)
    assert accumulator.run(x).micro_batch_sizes == (4, 4, 2, 2, 2, 2)  # what was run before the failure stays


# ---------------------------------------------------------------------------------------------------------------------
# Buffers


class Counter(nn.Module):
    """A layer with a large buffer that its forward changes while `is_on`."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 1)
        self.register_buffer("table", torch.zeros(LARGE))
        self.is_on = True

    def forward(self, x: Tensor) -> Tensor:
        if self.is_on:
            self.table.add_(1)
        return self.layer(x)


def test_a_large_buffer_that_changes_in_every_second_window_stays_known_as_one_that_changes() -> None:
    model, loss = Counter(), Failing()
    accumulator, x = mb.Accumulator(model, loss, micro_batch_size=4), torch.randn(16, 4)
    for model.is_on in (True, False, True):
        loss.fail(1 if model.is_on and model.table[0] > 0 else 0)
        before = float(model.table[0])
        report = accumulator.run(x)
        assert float(model.table[0]) - before == model.is_on * len(report.micro_batch_sizes)
        clear(model)
    assert report.retries == 1


def test_large_statistics_of_a_normalisation_are_restored_from_the_first_forward_on() -> None:
    """torch does not count what a normalisation layer does to them, so that they changed would never be seen."""
    model = nn.Sequential(nn.Linear(4, LARGE), nn.BatchNorm1d(LARGE), nn.Linear(LARGE, 1))
    x = torch.randn(16, 4)
    report = mb.Accumulator(model, Failing(1), micro_batch_size=8, batch_norm="micro_batch").run(x)
    assert report.micro_batch_sizes == (4, 4, 4, 4)
    wanted = nn.BatchNorm1d(LARGE)
    for part in x.split(4):
        wanted(model[0](part))
    assert torch.allclose(model[1].running_mean, wanted.running_mean, atol=1e-6)
    assert int(model[1].num_batches_tracked) == 4


def test_a_buffer_made_in_inference_mode_has_no_count_of_changes_and_is_left_alone() -> None:
    model = Counter()
    model.is_on = False
    with torch.inference_mode():
        model.register_buffer("offset", torch.ones(1))
    report = mb.Accumulator(model, Failing(2), micro_batch_size=8).run(torch.randn(16, 4))
    assert report.micro_batch_sizes == (8, 4, 4)
    assert float(model.offset) == 1


def test_statistics_that_a_lazy_normalisation_made_in_a_failed_forward_begin_anew() -> None:
    model = nn.Sequential(nn.LazyBatchNorm1d(), nn.Linear(4, 1))
    x = 3 + torch.randn(16, 4)
    report = mb.Accumulator(model, Failing(1), micro_batch_size=4, batch_norm="micro_batch").run(x)
    assert report.micro_batch_sizes == (2,) * 8
    wanted = nn.BatchNorm1d(4)
    for part in x.split(2):
        wanted(part)
    assert torch.allclose(model[0].running_mean, wanted.running_mean)
    assert torch.allclose(model[0].running_var, wanted.running_var)
    assert int(model[0].num_batches_tracked) == 8


class LazyTable(nn.Module):
    """A layer whose buffer gets its shape in the first forward."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 1)
        self.register_buffer("table", nn.UninitializedBuffer())

    def forward(self, x: Tensor) -> Tensor:
        if nn.parameter.is_lazy(self.table):
            self.table.materialize((4,))
            self.table.zero_()
        return self.layer(x + self.table)


def test_another_lazy_buffer_cannot_be_made_anew_and_the_error_says_so() -> None:
    accumulator = mb.Accumulator(LazyTable(), Failing(1), micro_batch_size=4)
    with pytest.raises(
        RuntimeError, match=r"'table' of LazyTable got its shape in a micro-batch that ran out of memory"
    ):
        accumulator.run(torch.randn(16, 4))


class Registering(nn.Module):
    """A layer that registers a buffer in its first forward and counts samples there."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 1)

    def forward(self, x: Tensor) -> Tensor:
        if "seen" not in self._buffers:
            self.register_buffer("seen", torch.zeros(()))
        self.seen += len(x)
        return self.layer(x)


def test_limit_a_buffer_that_a_forward_registers_is_not_restored_in_that_window() -> None:
    model, loss = Registering(), Failing(2)
    accumulator, x = mb.Accumulator(model, loss, micro_batch_size=4), torch.randn(16, 4)
    accumulator.run(x)
    assert int(model.seen) == 20, "the four samples of the failed forward count twice"
    clear(model)
    loss.fail(2)
    assert accumulator.run(x).retries == 1
    assert int(model.seen) == 20 + 16, "from the next window on it is"
