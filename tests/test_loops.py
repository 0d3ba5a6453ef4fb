"""`accumulate`: loops that own forward and backward get each micro-batch's share, and an error when they stop early."""

import pytest
import torch
from helpers import clear, difference, gradients, reference
from test_accumulator import (
    both_means,
    count_two,
    mean_square,
    parts,
    points,
    regressor,
    tagger,
    token_mean,
    token_sum,
    tokens_and_labels,
    two_losses,
)
from torch.nn import functional as F

import macrobatch as mb


def test_shares_of_counted_tokens_give_the_full_batchs_gradient() -> None:
    model, batch = tagger(), tokens_and_labels()
    expected = reference(model, lambda: token_mean(model, batch))
    window = mb.Window(parts(batch, [4, 1, 5, 3]))
    with mb.accumulate(window, model, count=lambda b: mb.valid_tokens(b["labels"])) as steps:
        for micro_batch, share in steps:
            (token_sum(model, micro_batch)[0] * share).backward()
    assert difference(gradients(model), expected) <= 1e-12


def test_without_count_samples_are_counted() -> None:
    model, batch = regressor(), points()
    expected = reference(model, lambda: mean_square(model, batch))
    with mb.accumulate(mb.Window([batch]).cut(4), model) as steps:
        for (x, y), share in steps:
            (F.mse_loss(model(x), y, reduction="sum") * share).backward()
    assert difference(gradients(model), expected) <= 1e-12


def test_several_counts_give_several_shares() -> None:
    model, batch = tagger(), tokens_and_labels()
    expected = reference(model, lambda: both_means(model, batch))
    with mb.accumulate(mb.Window(parts(batch, [4, 9])), model, count=count_two) as steps:
        for micro_batch, share in steps:
            losses = two_losses(model, micro_batch)
            for name in losses:
                (losses[name] * share[name]).backward(retain_graph=name == "tokens")
    assert difference(gradients(model), expected) <= 1e-12


def test_bf16_parameters_accumulate_in_float32() -> None:
    model, (x, y) = regressor().bfloat16(), points(300)
    x, y = x.bfloat16(), y.bfloat16()
    with mb.accumulate(mb.Window([(x, y)]).cut(1), model) as steps:
        for micro_batch, share in steps:
            (mean_square(model, micro_batch) * share).backward()
    mine = gradients(model)
    assert mine[0].dtype == torch.bfloat16
    clear(model)
    expected = [torch.zeros(p.shape, dtype=torch.float64) for p in model.parameters()]
    for micro_batch in mb.Window([(x, y)]).cut(1):
        clear(model)
        (mean_square(model, micro_batch) / 300).backward()
        for total, p in zip(expected, model.parameters(), strict=True):
            total += p.grad.double()
    assert difference(mine, expected) <= 1e-2


def run_loop(model: torch.nn.Module, batch: object, after_first: str) -> None:
    with mb.accumulate(mb.Window([batch]).cut(4), model) as steps:
        for micro_batch, share in steps:
            (mean_square(model, micro_batch) * share).backward()
            if after_first == "break":
                break
            raise ZeroDivisionError


def test_leaving_early_is_an_error_and_gradients_are_as_before() -> None:
    model, batch = regressor(), points()
    with pytest.raises(RuntimeError, match="the loop over the window was left early"):
        run_loop(model, batch, "break")
    assert all(p.grad is None for p in model.parameters())


def test_an_exception_passes_through_and_gradients_are_as_before() -> None:
    model, batch = regressor(), points()
    with pytest.raises(ZeroDivisionError):
        run_loop(model, batch, "raise")
    assert all(p.grad is None for p in model.parameters())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"count": 13},
            r"count must be callable with \(micro_batch\), got 13, which cannot be called: give a function",
        ),
        (
            {"count": lambda model, batch: 1},
            r"missing a required argument: 'batch'. It tells the loss terms of one micro",
        ),
        ({"device": "gpu"}, "device='gpu' is no device of torch's: give 'cpu' or 'cuda'"),
        ({"process_group": "gloo"}, "process_group must be 'auto', None for this process alone, .* got 'gloo'"),
    ],
)
def test_options_that_mean_nothing_are_refused_before_the_loop(options: dict[str, object], message: str) -> None:
    model, batch = regressor(), points()
    with pytest.raises(ValueError, match=message), mb.accumulate(mb.Window([batch]), model, **options):
        pass
    assert all(p.grad is None for p in model.parameters())


def test_an_error_inside_an_own_count_stays_its_own() -> None:
    def broken(micro_batch: object) -> int:
        return len(None)

    context = mb.accumulate(mb.Window([points()]), regressor(), broken)
    with pytest.raises(TypeError, match="object of type 'NoneType' has no len"), context:
        pass


def test_a_loop_over_it_without_with_says_how_to_write_it() -> None:
    with pytest.raises(TypeError, match=r"is a context: with accumulate\(window, model\) as steps: for ... in steps"):
        list(mb.accumulate(mb.Window([points()]), regressor()))


def test_bad_input_is_refused_before_the_loop() -> None:
    model, batch = regressor(), points()
    with pytest.raises(ValueError, match="accumulate takes a Window, got a tuple"):
        mb.accumulate(batch, model)
    with pytest.raises(ValueError, match="the effective batch is empty"), mb.accumulate(mb.Window([]), model):
        pass
    mean_square(model, batch).backward()
    window = mb.Window([batch])
    with pytest.raises(ValueError, match="hold a gradient from before"), mb.accumulate(window, model):
        pass
    assert all(p.grad is not None for p in model.parameters())
