"""The gradients of a window: in what dtype they add up and end, and what an error on the way leaves."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from helpers import clear, difference, gradients, reference
from torch import Tensor, nn

import macrobatch as mb
from macrobatch import gradients as gradients_module

LOW = torch.bfloat16
needs_grad_dtype = pytest.mark.skipif(not gradients_module.HAS_GRAD_DTYPE, reason="this torch has no Tensor.grad_dtype")


def mean_square(model: nn.Module, x: Tensor) -> Tensor:
    return model(x).float().square().mean()


def net(dtype: torch.dtype = torch.float32) -> nn.Module:
    return nn.Sequential(nn.Linear(4, 3), nn.Linear(3, 1)).to(dtype)


def no_memory(*_: Any) -> None:
    raise torch.OutOfMemoryError("injected")


# ---------------------------------------------------------------------------------------------------------------------
# Errors on the way


@pytest.mark.parametrize("dtype", [torch.float32, LOW])
def test_an_error_while_gradients_are_added_to_those_from_before_leaves_these_as_they_were(
    dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, x = net(dtype), torch.randn(16, 4, dtype=dtype)
    accumulator = mb.Accumulator(model, mean_square, micro_batch_size=4)
    accumulator.run(x)
    before, plus, calls = gradients(model), gradients_module._plus, []

    def fails_at_the_third(*pair: Any) -> Any:
        calls.append(pair)
        return plus(*pair) if len(calls) < 3 else no_memory()

    with monkeypatch.context() as patch:
        patch.setattr(gradients_module, "_plus", fails_at_the_third)
        with pytest.raises(torch.OutOfMemoryError, match="injected"):
            accumulator.run(x, add=True)
    assert len(calls) == 3
    assert all(torch.equal(a, b) for a, b in zip(gradients(model), before, strict=True))
    accumulator.run(x, add=True)
    assert difference(gradients(model), [2 * g for g in before]) <= (1e-6 if dtype is torch.float32 else 1e-2)


def coupled(dtype: torch.dtype) -> nn.Module:
    return nn.Sequential(nn.Linear(4, 3), nn.BatchNorm1d(3), nn.Linear(3, 1)).to(dtype)


def failing_at(number: int) -> Callable[[nn.Module, Tensor], Tensor]:
    """`mean_square`, of which backward `number` runs out of memory when the last layer has its gradient."""
    calls = []

    def loss_fn(model: nn.Module, x: Tensor) -> Tensor:
        calls.append(len(x))
        hidden = model[:2](x)
        if len(calls) == number:
            hidden.register_hook(no_memory)
        return mean_square(model[2], hidden)

    return loss_fn


@pytest.mark.parametrize("measure", [None, "norms"])
def test_a_window_that_starts_over_forgets_what_was_added_up_apart(measure: Any) -> None:
    model, x = coupled(torch.float64), torch.randn(16, 4, dtype=torch.float64)
    accumulator = mb.Accumulator(model, failing_at(3), micro_batch_size=4, batch_norm="micro_batch", measure=measure)
    assert accumulator.run(x).micro_batch_sizes == (2,) * 8
    mine = gradients(model)
    expected = reference(model, lambda: torch.stack([model(part).square().mean() for part in x.split(2)]).mean())
    assert difference(mine, expected) <= 1e-6  # the loss is in float32


@needs_grad_dtype
def test_bf16_gradients_that_were_zeroed_start_over_in_float32() -> None:
    model, x = coupled(LOW), torch.randn(8, 4, dtype=LOW)
    for p in model.parameters():
        p.grad = torch.zeros_like(p)
    accumulator = mb.Accumulator(model, failing_at(2), micro_batch_size=4, batch_norm="micro_batch")
    assert accumulator.run(x).micro_batch_sizes == (2,) * 4
    assert all(p.grad is not None and p.grad.dtype == p.grad_dtype == LOW for p in model.parameters())


def test_a_refused_leaf_outside_of_the_model_keeps_the_gradient_that_it_had() -> None:
    outside = torch.tensor(2.0, requires_grad=True)
    outside.grad = torch.tensor(7.0)
    accumulator = mb.Accumulator(nn.Linear(4, 1), lambda m, b: (outside * m(b)).square().mean(), micro_batch_size=4)
    with pytest.raises(ValueError, match="depends on a trainable tensor outside of the model"):
        accumulator.run(torch.randn(8, 4))
    assert float(outside.grad) == 7.0


# ---------------------------------------------------------------------------------------------------------------------
# Dtypes


@needs_grad_dtype
def test_adding_in_float32_to_gradients_in_bf16_ends_in_float32() -> None:
    model, x = net(LOW), torch.randn(16, 4, dtype=LOW)
    mb.Accumulator(model, mean_square, micro_batch_size=4).run(x)
    once = gradients(model)
    mb.Accumulator(model, mean_square, micro_batch_size=4, grad_dtype=torch.float32).run(x, add=True)
    twice = gradients(model)
    clear(model)
    mb.Accumulator(model, mean_square, micro_batch_size=4, grad_dtype=torch.float32).run(x)
    assert all(g is not None and g.dtype == torch.float32 for g in twice)
    wanted = [a.float() + b for a, b in zip(once, gradients(model), strict=True) if a is not None and b is not None]
    assert all(torch.equal(mine, theirs) for mine, theirs in zip(twice, wanted, strict=True) if mine is not None)


@needs_grad_dtype
@pytest.mark.parametrize(
    ("dtype", "own"), [(torch.float32, torch.float64), (torch.float32, LOW), (LOW, torch.float32), (LOW, torch.float64)]
)
def test_a_grad_dtype_that_the_user_set_on_a_parameter_is_the_one_that_adds_up_and_stays(
    dtype: torch.dtype, own: torch.dtype
) -> None:
    model, x = net(dtype), torch.randn(16, 4, dtype=dtype)
    for p in model.parameters():
        p.grad_dtype = own
    expected = reference(model, lambda: torch.stack([mean_square(model, part) for part in x.split(4)]).mean())
    mb.Accumulator(model, mean_square, micro_batch_size=4).run(x)
    assert all(p.grad is not None and p.grad.dtype == p.grad_dtype == own for p in model.parameters())
    assert difference(gradients(model), expected) <= (1e-6 if LOW not in (dtype, own) else 2e-2)


@needs_grad_dtype
@pytest.mark.parametrize("fails", [False, True])
def test_a_parameter_that_allows_any_grad_dtype_does_so_afterwards(fails: bool) -> None:
    model = net(LOW)
    for p in model.parameters():
        p.grad_dtype = None
    try:
        mb.Accumulator(model, no_memory if fails else mean_square, micro_batch_size=1).run(torch.ones(2, 4, dtype=LOW))
    except torch.OutOfMemoryError:
        assert fails
    assert all(p.grad_dtype is None for p in model.parameters())
    assert all(fails if p.grad is None else p.grad.dtype == LOW for p in model.parameters())


@needs_grad_dtype
@pytest.mark.parametrize("grad_dtype", [None, torch.float32, torch.float64, LOW])
@pytest.mark.filterwarnings("error")
def test_complex_gradients_stay_complex_whatever_dtype_is_asked_for(grad_dtype: torch.dtype | None) -> None:
    model, x = nn.Linear(4, 2, dtype=torch.complex64), torch.randn(8, 4, dtype=torch.complex64)
    expected = reference(model, lambda: model(x).abs().square().mean())
    accumulator = mb.Accumulator(
        model, lambda m, b: m(b).abs().square().mean(), micro_batch_size=3, grad_dtype=grad_dtype
    )
    accumulator.run(x)
    assert all(p.grad is not None and p.grad.is_complex() for p in model.parameters())
    wider = torch.complex128 if grad_dtype is torch.float64 else torch.complex64
    assert all(p.grad is not None and p.grad.dtype == wider for p in model.parameters())
    for p, wanted in zip(model.parameters(), expected, strict=True):
        assert torch.allclose(p.grad.to(torch.complex64), wanted, rtol=1e-5, atol=1e-6)  # type: ignore[arg-type,union-attr]
        assert float(wanted.imag.abs().max()) > 0.01, "control: a real gradient would be another"  # type: ignore[union-attr]


# ---------------------------------------------------------------------------------------------------------------------
# Of which modules


@pytest.mark.parametrize(
    ("models", "message"),
    [
        (lambda m: iter([m]), r"got a list_iterator: give a list, to be read again"),
        (lambda m: (each for each in [m]), r"got a generator: give a list, to be read again"),
        (lambda m: {"net": m}, r"got a dict: give its values, list\(models.values\(\)\)"),
        (lambda m: {}, r"got a dict: give its values"),
    ],
)
def test_modules_that_can_be_read_once_or_by_name_are_refused(models: Callable[[Any], Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        mb.Accumulator(models(net()), mean_square, micro_batch_size=2)


def test_no_modules_at_all_are_refused_by_the_first_window() -> None:
    with pytest.raises(ValueError, match="the model has no parameter that requires a gradient"):
        mb.Accumulator([], mean_square, micro_batch_size=2).run(torch.ones(4, 4))


def test_limit_a_gradient_left_on_a_parameter_that_was_frozen_later_is_not_looked_at() -> None:
    """As without a window: the optimizer steps along it, so drop gradients when you freeze."""
    model, x = net(), torch.randn(8, 4)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    mean_square(model, x).backward()
    model[0].requires_grad_(False)
    model[1].zero_grad()
    start = model[0].weight.detach().clone()
    mb.apply_update(optimizer, mb.Accumulator(model, mean_square, micro_batch_size=4).run(x))
    assert not torch.equal(model[0].weight, start)
    assert model[0].weight.grad is None  # one step, not more
