"""Micro-batches travel to another device one ahead of the present one, and no more than two of them are there."""

import weakref
from collections.abc import Callable, Iterator
from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn

import macrobatch as mb
from macrobatch.devices import on_device

META = torch.device("meta")  # another device that every machine has; its tensors hold no numbers
SIZES = (3, 1, 4, 2, 5)


class Drawn:
    """Micro-batches as a loader gives them; counts, at each draw, those that were run and still are on the device."""

    def __init__(self) -> None:
        self.run: list[weakref.ref[Tensor]] = []
        self.alive: list[int] = []

    def __iter__(self) -> Iterator[Tensor]:
        for size in SIZES:
            self.alive.append(sum(reference() is not None for reference in self.run))
            yield torch.ones(size, 2)


def test_micro_batches_arrive_in_order_with_their_sizes_and_the_last_one_is_known() -> None:
    source = [((torch.ones(size, 2), "shared"), size) for size in SIZES]
    arrived = list(on_device(source, META))
    assert all(micro_batch[0].device == META and micro_batch[1] == "shared" for micro_batch, _, _ in arrived)
    assert [len(micro_batch[0]) for micro_batch, _, _ in arrived] == list(SIZES)
    assert [size for _, size, _ in arrived] == list(SIZES)
    assert [is_last for _, _, is_last in arrived] == [False] * 4 + [True]


@pytest.mark.parametrize("device", [None, torch.device("cpu")])
def test_what_is_there_already_is_not_copied(device: torch.device | None) -> None:
    source = [((torch.ones(size, 2), torch.ones(size)), size) for size in SIZES]
    arrived = [leaf for x, _, _ in on_device(source, device) for leaf in x]
    assert all(a is b for a, b in zip(arrived, [leaf for x, _ in source for leaf in x], strict=True))


def test_nothing_is_drawn_of_a_window_without_micro_batches() -> None:
    assert list(on_device([], META)) == []


@pytest.mark.parametrize("evaluates", [False, True])
@pytest.mark.parametrize(("holds", "most"), [(False, 0), (True, len(SIZES) - 2)])
def test_the_next_micro_batch_is_fetched_when_the_one_that_was_run_is_gone(
    evaluates: bool, holds: bool, most: int
) -> None:
    """`holds`: the control, a loss_fn that keeps what it is given."""
    drawn, kept, model = Drawn(), [], nn.Linear(2, 1)

    def loss_fn(model: nn.Module, x: Tensor) -> Tensor:
        assert x.device == META
        drawn.run.append(weakref.ref(x))
        kept.extend([x] * holds)
        return model.weight.square().sum()

    accumulator = mb.Accumulator(model, loss_fn)
    accumulator._recipe = replace(accumulator._recipe, device=META)  # which is refused as a device to train on
    action: Callable[[mb.Window], mb.Report] = accumulator.evaluate if evaluates else accumulator.run
    action(mb.Window(iter(drawn)))
    assert len(drawn.run) == len(SIZES)
    assert max(drawn.alive) == most


@pytest.mark.gpu
@pytest.mark.parametrize("pins", [False, True])
@pytest.mark.parametrize("device", [None, "cuda", "cuda:0"])
def test_micro_batches_in_host_memory_reach_a_model_on_the_gpu(pins: bool, device: str | None) -> None:
    torch.manual_seed(0)
    model, x, y = nn.Linear(5, 3).double(), torch.randn(22, 5).double(), torch.randint(0, 3, (22,))
    criterion = nn.CrossEntropyLoss()
    expected = torch.autograd.grad(criterion(model(x), y), list(model.parameters()))
    model.cuda()
    window = mb.Window([(x, y)]).cut(4)
    accumulator = mb.Accumulator(model, mb.sum_loss(criterion), device=device)
    for _ in range(2):
        model.zero_grad()
        report = accumulator.run(window.pin_memory() if pins else window)
    for p, g in zip(model.parameters(), expected, strict=True):
        assert p.grad is not None
        assert float((p.grad.cpu() - g).abs().max()) <= 1e-12
    assert report.loss.is_cuda
    assert report.num_samples == 22


@pytest.mark.gpu
def test_windows_from_pinned_memory_reserve_no_more_from_one_to_the_next() -> None:
    """Copies travel on one stream for each device: the allocator keeps what each stream has used apart."""
    model = nn.Linear(1024, 1).cuda()
    window = mb.Window([torch.ones(4096, 1024).pin_memory() for _ in range(3)])
    accumulator = mb.Accumulator(model, lambda m, x: m(x).square().mean())
    reserved = []
    for _ in range(40):
        model.zero_grad()
        accumulator.run(window)
        torch.cuda.synchronize()
        reserved.append(torch.cuda.memory_reserved())
    assert reserved[-1] == reserved[1]
