"""Backward by torch's engine: the gradients of the public function, to the bit, and that function wherever needed."""

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.autograd import graph

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


def takes_other_arguments(outputs: Any, seeds: Any) -> None:
    raise AssertionError("never reached: the arguments do not fit")


def does_nothing(*arguments: Any, **options: Any) -> None:
    """An engine that was moved elsewhere."""


@pytest.mark.parametrize("engine", [None, takes_other_arguments, does_nothing])
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
