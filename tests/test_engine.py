"""Backward by torch's engine: the gradients of the public function, to the bit, and that function wherever needed."""

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.autograd import graph
from torch.overrides import TorchFunctionMode
from torch.utils.checkpoint import checkpoint

import macrobatch as mb
from macrobatch.engine import backward, direct_engine

Engine = Callable[..., Any]


@pytest.fixture(autouse=True)
def _asked_anew() -> Iterator[None]:
    direct_engine.cache_clear()
    yield
    direct_engine.cache_clear()


class Recorded:
    """A function that counts its calls."""

    def __init__(self, function: Callable[..., Any]) -> None:
        self.function = function
        self.calls = 0

    def __call__(self, *arguments: Any, **options: Any) -> Any:
        self.calls += 1
        return self.function(*arguments, **options)


@pytest.fixture
def public(monkeypatch: pytest.MonkeyPatch) -> Recorded:
    """`torch.autograd.backward`, counted."""
    recorded = Recorded(torch.autograd.backward)
    monkeypatch.setattr(torch.autograd, "backward", recorded)
    return recorded


def two_losses() -> tuple[nn.Module, list[Tensor], list[Tensor]]:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(5, 7), nn.Tanh(), nn.Linear(7, 2))
    outputs = model(torch.randn(3, 5))
    return model, [outputs[:, 0].sum(), outputs[:, 1].square().sum()], [torch.tensor(0.37), torch.tensor(1 / 3)]


def gradients(model: nn.Module) -> list[Tensor]:
    return [p.grad.clone() for p in model.parameters() if p.grad is not None]


def window(model: nn.Module) -> mb.Report:
    accumulator = mb.Accumulator(model, lambda m, b: m(b).square().mean(), micro_batch_size=2)
    return accumulator.run(torch.linspace(-1, 1, 35).reshape(7, 5))


def test_gradients_are_those_of_the_public_function_to_the_bit(public: Recorded) -> None:
    model, losses, seeds = two_losses()
    backward(losses, seeds)
    assert public.calls == 0
    mine = gradients(model)
    model, losses, seeds = two_losses()
    torch.autograd.backward(losses, seeds)
    assert len(mine) == 4
    assert all(torch.equal(a, b) for a, b in zip(mine, gradients(model), strict=True))


def test_a_window_asks_the_engine_alone(public: Recorded) -> None:
    window(two_losses()[0])
    assert public.calls == 0


def test_subclasses_and_chosen_inputs_go_the_public_way(public: Recorded) -> None:
    class Own(Tensor):
        """A loss with a `__torch_function__` of its own."""

    model, losses, seeds = two_losses()
    backward([losses[0].as_subclass(Own), losses[1]], seeds)
    assert public.calls > 0  # twice: it asks the subclass
    assert len(gradients(model)) == 4
    before = public.calls
    model, losses, seeds = two_losses()
    backward(losses, seeds, [model[2].bias])
    assert public.calls == before + 1
    assert [p.grad is None for p in model.parameters()] == [True, True, True, False]


class Seen(TorchFunctionMode):
    """Counts the calls of `torch.tanh` that are made within."""

    def __init__(self) -> None:
        self.calls = 0

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.calls += func is torch.tanh
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_a_function_mode_does_not_see_what_a_checkpoint_computes_again(use_reentrant: bool, public: Recorded) -> None:
    model = nn.Linear(5, 5)

    def loss_fn(m: nn.Module, x: Tensor) -> Tensor:
        return checkpoint(torch.tanh, m(x), use_reentrant=use_reentrant).square().mean()

    with Seen() as seen:
        mb.Accumulator(model, loss_fn, micro_batch_size=2).run(torch.ones(4, 5))
    assert seen.calls == 2
    assert public.calls >= 2
    direct, x = direct_engine(), torch.ones(2, 5)
    assert direct is not None
    with Seen() as seen:  # the control: the engine alone stays within the mode
        direct((loss_fn(model, x),), (torch.ones(()),), False, False, (), allow_unreachable=True, accumulate_grad=True)
    assert seen.calls == 2


def test_saved_tensors_are_let_go_as_the_backward_passes_them() -> None:
    def peak(step: Callable[[nn.Module, Tensor], None]) -> int:
        torch.manual_seed(0)
        model, x = (
            nn.Sequential(*(nn.Sequential(nn.Linear(128, 128), nn.Tanh()) for _ in range(6))),
            torch.ones(64, 128),
        )
        step(model, x)
        model.zero_grad()
        return mb.peak_memory(lambda: step(model, x))

    def mine(model: nn.Module, x: Tensor) -> None:
        loss = model(x).square().mean()
        backward([loss], [torch.ones(())])

    usual = peak(lambda model, x: model(x).square().mean().backward())
    keeping = peak(lambda model, x: model(x).square().mean().backward(retain_graph=True))
    assert peak(mine) <= usual + 64
    assert keeping > usual + 3 * 64 * 128 * 4  # the control


def test_the_engine_is_asked_for_by_the_first_window_and_not_by_what_may_be_built_before_a_fork() -> None:
    known: list[int] = []

    def loss_fn(m: nn.Module, b: Tensor) -> Tensor:
        known.append(direct_engine.cache_info().misses)
        return m(b).square().mean()

    accumulator = mb.Accumulator(nn.Linear(5, 1), loss_fn, micro_batch_size=2)
    assert direct_engine.cache_info().misses == 0, "a backward starts threads, which a forked process is without"
    for _ in range(2):
        accumulator.model.zero_grad()
        accumulator.run(torch.ones(4, 5))
    assert known == [1, 1, 1, 1]


def takes_other_arguments(outputs: Any, seeds: Any) -> None:
    raise AssertionError("never reached: the arguments do not fit")


def does_nothing(*arguments: Any, **options: Any) -> None:
    """An engine that was moved elsewhere."""


def takes_no_seeds(outputs: Any, seeds: Any, *arguments: Any, **options: Any) -> Any:
    """An engine whose second argument means something else."""
    return torch.autograd.backward(outputs)


@pytest.mark.parametrize("engine", [None, takes_other_arguments, does_nothing, takes_no_seeds])
def test_without_the_engine_that_is_known_the_public_function_does_it(
    engine: Engine | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = two_losses()[0]
    window(model)
    expected = gradients(model)
    model = two_losses()[0]
    if engine is None:
        monkeypatch.delattr(graph, "_engine_run_backward")
    else:
        monkeypatch.setattr(graph, "_engine_run_backward", engine)
    direct_engine.cache_clear()
    assert direct_engine() is None
    monkeypatch.undo()  # the public function itself needs it
    monkeypatch.setattr(torch.autograd, "backward", public := Recorded(torch.autograd.backward))
    window(model)
    assert public.calls == 4  # one for each micro-batch
    assert all(torch.equal(a, b) for a, b in zip(expected, gradients(model), strict=True))


def test_where_gradients_are_switched_off_it_is_known_all_the_same() -> None:
    with torch.no_grad():
        assert direct_engine() is not None
    direct_engine.cache_clear()
    with torch.inference_mode():
        assert direct_engine() is not None


def test_a_loss_without_a_graph_is_refused_by_name() -> None:
    model = nn.Linear(5, 1)
    accumulator = mb.Accumulator(model, lambda m, b: m(b).square().mean().detach(), micro_batch_size=2)
    with pytest.raises(ValueError, match=r"the loss does not depend on any trainable parameter.*return \(0, 0\)"):
        accumulator.run(torch.ones(4, 5))
    assert all(p.grad is None for p in model.parameters())


def test_a_complex_loss_is_refused_with_what_to_return() -> None:
    model = nn.Linear(5, 1)
    accumulator = mb.Accumulator(model, lambda m, b: m(b).square().mean() * (1 + 1j), micro_batch_size=2)
    with pytest.raises(
        ValueError, match=r"the loss is complex, torch.complex64: return a real number, such as loss.real"
    ):
        accumulator.run(torch.ones(4, 5))
    assert all(p.grad is None for p in model.parameters())
