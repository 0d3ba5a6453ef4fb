"""apply_update makes the optimizer's own step once, or none at all, and leaves no gradient behind either way."""

import copy
import functools
import logging
import math
import re
import warnings
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from helpers import difference, reference
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim import SGD, Adam, AdamW, Optimizer

import macrobatch as mb
from macrobatch.gradients import norm_of

N = 11


class Net(nn.Module):
    """Matrices only where an optimizer takes nothing else."""

    def __init__(self, bias: bool = True) -> None:
        super().__init__()
        self.inner, self.outer = nn.Linear(3, 5, bias=bias), nn.Linear(5, 2, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        return self.outer(torch.tanh(self.inner(x)))


def net(bias: bool = True) -> Net:
    torch.manual_seed(0)
    return Net(bias).double()


def data(n: int = N) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(n, 3, dtype=torch.float64, generator=generator)
    return x, torch.randn(n, 2, dtype=torch.float64, generator=generator)


def mean_square(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    return F.mse_loss(model(batch[0]), batch[1])


def accumulator(model: nn.Module, **options: Any) -> mb.Accumulator:
    return mb.Accumulator(model, mean_square, micro_batch_size=4, **options)


def values(model: nn.Module) -> list[Tensor]:
    return [p.detach().clone() for p in model.parameters()]


def same_state(mine: Any, theirs: Any) -> bool:
    if isinstance(mine, Tensor):
        return torch.equal(mine, theirs)
    if isinstance(mine, dict):
        return mine.keys() == theirs.keys() and all(same_state(mine[key], theirs[key]) for key in mine)
    if isinstance(mine, list | tuple):
        return len(mine) == len(theirs) and all(map(same_state, mine, theirs))
    return bool(mine == theirs)


# ---------------------------------------------------------------------------------------------------------------------
# Every optimizer of torch

OPTIMIZERS: dict[str, list[dict[str, Any]]] = {
    "Adadelta": [{}, {"foreach": True, "maximize": True}],
    "Adafactor": [{}],
    "Adagrad": [{}, {"fused": True}],
    "Adam": [{}, {"fused": True, "amsgrad": True}, {"foreach": True, "weight_decay": 0.1}],
    "AdamW": [{}, {"fused": True}, {"foreach": False, "maximize": True}],
    "Adamax": [{}, {"foreach": True}],
    "ASGD": [{}],
    "Muon": [{}],
    "NAdam": [{}, {"decoupled_weight_decay": True, "weight_decay": 0.1}],
    "RAdam": [{}],
    "RMSprop": [{}, {"momentum": 0.9, "centered": True}],
    "Rprop": [{}],
    "SGD": [{}, {"momentum": 0.9, "nesterov": True}, {"fused": True, "weight_decay": 0.1}],
}
ONLY_MATRICES = ("Muon",)
TESTED_ELSEWHERE = {"SparseAdam": "takes sparse gradients only", "LBFGS": "is refused: it needs a closure"}
EVERY = [
    pytest.param(name, options, id=f"{name}-{j}") for name in OPTIMIZERS for j, options in enumerate(OPTIMIZERS[name])
]


def test_every_optimizer_of_torch_is_tested() -> None:
    optimizers = {n for n, kind in vars(torch.optim).items() if isinstance(kind, type) and issubclass(kind, Optimizer)}
    assert optimizers - {"Optimizer"} <= OPTIMIZERS.keys() | TESTED_ELSEWHERE.keys()


@pytest.mark.parametrize(("name", "options"), EVERY)
def test_an_update_is_the_optimizers_own_step(name: str, options: dict[str, Any]) -> None:
    if not hasattr(torch.optim, name):
        pytest.skip(f"this torch has no {name}")
    make = functools.partial(getattr(torch.optim, name), lr=0.05, **options)
    mine, theirs = net(name not in ONLY_MATRICES), net(name not in ONLY_MATRICES)
    my_optimizer, their_optimizer = make(mine.parameters()), make(theirs.parameters())
    start = values(mine)
    for step in range(4):
        generator = torch.Generator().manual_seed(step)
        for p, q in zip(mine.parameters(), theirs.parameters(), strict=True):
            p.grad = torch.randn(p.shape, dtype=p.dtype, generator=generator)
            q.grad = p.grad.clone()
        assert mb.apply_update(my_optimizer).applied
        their_optimizer.step()
        their_optimizer.zero_grad()
    assert same_state(values(mine), values(theirs))
    assert same_state(my_optimizer.state_dict(), their_optimizer.state_dict())
    assert not same_state(values(mine), start), "control: it moved"


@pytest.mark.parametrize("max_norm", [None, 0.01, 100.0])
def test_sparse_adam_steps_along_accumulated_sparse_gradients(max_norm: float | None) -> None:
    tokens = torch.tensor([[1, 2], [2, 2], [5, 1], [0, 2], [5, 5]])

    def train(update: Callable[[nn.Embedding, Optimizer], None]) -> Tensor:
        torch.manual_seed(0)
        embedding = nn.Embedding(8, 3, sparse=True, dtype=torch.float64)
        optimizer = torch.optim.SparseAdam(embedding.parameters(), lr=0.1)
        for _ in range(3):
            update(embedding, optimizer)
        return embedding.weight.detach()

    def loss(model: nn.Module, batch: Tensor) -> Tensor:
        return model(batch).square().mean()

    def by_hand(embedding: nn.Embedding, optimizer: Optimizer) -> None:
        optimizer.zero_grad()
        loss(embedding, tokens).backward()
        gradient = embedding.weight.grad
        assert gradient is not None
        if max_norm is not None:
            norm = gradient.to_dense().norm()
            embedding.weight.grad = gradient * min(1.0, max_norm / (float(norm) + 1e-6))
        optimizer.step()

    def by_window(embedding: nn.Embedding, optimizer: Optimizer) -> None:
        report = mb.Accumulator(embedding, loss, micro_batch_size=2).run(tokens)
        assert embedding.weight.grad is not None
        assert embedding.weight.grad.is_sparse
        norm = embedding.weight.grad.to_dense().norm()
        update = mb.apply_update(optimizer, report, max_norm=max_norm)
        assert torch.isclose(update.grad_norm, norm, rtol=1e-12), "rows that came twice are one row"

    mine, theirs = train(by_window), train(by_hand)
    assert torch.allclose(mine, theirs, rtol=0, atol=1e-12)


def test_lbfgs_is_refused_with_a_recipe_and_the_recipe_is_lbfgs_on_the_full_batch() -> None:
    mine, theirs, batch = net(), net(), data()
    make = functools.partial(torch.optim.LBFGS, lr=0.5, max_iter=5, line_search_fn="strong_wolfe")
    optimizer, other = make(mine.parameters()), make(theirs.parameters())
    with pytest.raises(
        ValueError, match=r"needs a closure: optimizer.step\(closure\) with def closure\(\): optimizer.z"
    ):
        mb.apply_update(optimizer)
    windows = accumulator(mine)

    def closure() -> Tensor:
        optimizer.zero_grad()
        return windows.run(batch).loss

    def full_batch() -> Tensor:
        other.zero_grad()
        loss = mean_square(theirs, batch)
        loss.backward()
        return loss

    start = float(mean_square(mine, batch).detach())
    for _ in range(3):
        optimizer.step(closure)
        other.step(full_batch)
    assert all(torch.allclose(p, q, rtol=1e-9, atol=1e-9) for p, q in zip(values(mine), values(theirs), strict=True))
    assert float(mean_square(mine, batch).detach()) < 0.8 * start


# ---------------------------------------------------------------------------------------------------------------------
# Clipping, several optimizers


@pytest.mark.parametrize("max_norm", [1e-3, 0.1, 1e6, math.inf])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_clipping_is_that_of_torch_and_reports_the_norm_before_it(max_norm: float, dtype: torch.dtype) -> None:
    mine, theirs = net().to(dtype), net().to(dtype)
    for model in (mine, theirs):
        x, y = (t.to(dtype) for t in data())
        mean_square(model, (x, y)).backward()
    expected = nn.utils.clip_grad_norm_(theirs.parameters(), max_norm)
    SGD(theirs.parameters(), lr=0.1).step()
    update = mb.apply_update(SGD(mine.parameters(), lr=0.1), max_norm=max_norm)
    assert torch.equal(update.grad_norm, expected)
    assert (update.grad_norm.ndim, update.applied) == (0, True)
    assert same_state(values(mine), values(theirs))


def test_an_accumulated_window_clips_as_the_full_batch_does_and_micro_batch_clipping_does_not() -> None:
    batch, max_norm = data(), 0.05
    model = net()
    expected = reference(model, lambda: mean_square(model, batch))
    norm = torch.cat([g.flatten() for g in expected if g is not None]).norm()
    clipped = [g * max_norm / (norm + 1e-6) for g in expected if g is not None]
    start = values(model)
    report = accumulator(model).run(batch)
    update = mb.apply_update(SGD(model.parameters(), lr=1.0), report, max_norm=max_norm)
    assert torch.isclose(update.grad_norm, norm, rtol=1e-12)
    steps = [a - b for a, b in zip(start, values(model), strict=True)]
    assert difference(steps, clipped) < 1e-12

    control = net()
    for part in zip(batch[0].split(4), batch[1].split(4), strict=True):
        (mean_square(control, part) * len(part[0]) / N).backward()
        nn.utils.clip_grad_norm_(control.parameters(), max_norm)  # in every micro-batch, as it is often written
    assert difference([p.grad for p in control.parameters()], clipped) > 0.01


def test_several_optimizers_are_clipped_by_one_norm_and_stepped_once_each() -> None:
    batch, max_norm = data(), 0.05
    mine, theirs = net(), net()
    report = accumulator(mine).run(batch)
    optimizers = [SGD(mine.inner.parameters(), lr=0.5), AdamW(mine.outer.parameters(), lr=0.5)]
    update = mb.apply_update(optimizers, report, max_norm=max_norm)

    mean_square(theirs, batch).backward()
    norm = nn.utils.clip_grad_norm_(theirs.parameters(), max_norm)
    SGD(theirs.inner.parameters(), lr=0.5).step()
    AdamW(theirs.outer.parameters(), lr=0.5).step()
    assert torch.isclose(update.grad_norm, norm, rtol=1e-12)
    assert all(torch.allclose(a, b, rtol=0, atol=1e-9) for a, b in zip(values(mine), values(theirs), strict=True))
    assert all(p.grad is None for p in mine.parameters())


def test_one_bad_gradient_stops_all_optimizers() -> None:
    model = net()
    mean_square(model, data()).backward()
    model.outer.bias.grad = torch.full((2,), math.inf, dtype=torch.float64)
    start = values(model)
    update = mb.apply_update((SGD(model.inner.parameters(), lr=0.5), SGD(model.outer.parameters(), lr=0.5)))
    assert not update.applied
    assert same_state(values(model), start)


def test_parameters_that_two_optimizers_share_are_clipped_once() -> None:
    model = net()
    mean_square(model, data()).backward()
    norm = torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None]).norm()
    start = values(model)
    optimizers = [SGD(model.parameters(), lr=1.0), SGD(model.parameters(), lr=1.0)]
    update = mb.apply_update(optimizers, max_norm=float(norm) / 2)
    assert torch.isclose(update.grad_norm, norm)
    moved = torch.cat([(a - b).flatten() for a, b in zip(start, values(model), strict=True)]).norm()
    assert torch.isclose(moved, norm, rtol=1e-5), "two steps of half the norm"


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_the_norm_of_low_precision_gradients_is_exact_to_float32(dtype: torch.dtype) -> None:
    gradients = [torch.randn(999).to(dtype), torch.randn(7), torch.randn(30).to(dtype)]
    parameters = [nn.Parameter(torch.zeros_like(g)) for g in gradients]
    for p, g in zip(parameters, gradients, strict=True):
        p.grad = g.clone()
    expected = torch.cat([g.double() for g in gradients]).norm()
    assert torch.isclose(norm_of(p.grad for p in parameters).double(), expected, rtol=1e-6)
    rounded = nn.utils.get_total_norm([g for g in gradients if g.dtype == dtype])
    exact = torch.cat([g.double() for g in gradients if g.dtype == dtype]).norm()
    assert not torch.isclose(rounded.double(), exact, rtol=1e-5), "control: torch rounds it to the gradients' dtype"
    update = mb.apply_update(SGD(parameters, lr=1.0), max_norm=1.0)
    moved = torch.cat([p.detach().double() for p in parameters]).norm()
    assert update.applied
    assert torch.isclose(moved, torch.tensor(1.0).double(), rtol=1e-2)


def test_finite_float16_gradients_are_no_overflow_however_many_they_are() -> None:
    parameter = nn.Parameter(torch.zeros(400, dtype=torch.float16))
    parameter.grad = torch.full((400,), 60000.0, dtype=torch.float16)
    update = mb.apply_update(SGD([parameter], lr=1.0), max_norm=2.0)
    assert update.applied
    assert torch.isclose(update.grad_norm, torch.tensor(60000.0 * 20), rtol=1e-3)
    assert torch.allclose(parameter.detach().float(), torch.tensor(-0.1), rtol=1e-2)


# ---------------------------------------------------------------------------------------------------------------------
# No update


@pytest.mark.parametrize("bad", [math.inf, -math.inf, math.nan])
@pytest.mark.parametrize("max_norm", [None, 1.0])
def test_non_finite_gradients_change_nothing_in_parameters_moments_and_step_counts(
    bad: float, max_norm: float | None
) -> None:
    model, batch = net(), data()
    optimizer = Adam(model.parameters(), lr=0.1, amsgrad=True)
    runner = accumulator(model)
    mb.apply_update(optimizer, runner.run(batch))
    before, state = values(model), copy.deepcopy(optimizer.state_dict())
    x = batch[0].clone()
    x[7, 1] = bad
    update = mb.apply_update(optimizer, runner.run((x, batch[1])), max_norm=max_norm)
    assert not update.applied
    assert not torch.isfinite(update.grad_norm)
    assert same_state(values(model), before)
    assert same_state(optimizer.state_dict(), state)
    assert all(p.grad is None for p in model.parameters())
    assert mb.apply_update(optimizer, runner.run(batch)).applied, "the next window is a new one"
    assert not same_state(optimizer.state_dict(), state), "control: an update does change it"


def test_a_step_that_is_not_made_is_one_line_in_the_log_that_says_why(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "macrobatch")

    def said(loss: Callable[[nn.Module], Tensor], scaler: Any = None, weight: float = 1.0) -> list[tuple[int, str]]:
        caplog.clear()
        model = nn.Linear(2, 1)
        runner = mb.Accumulator(model, lambda m, b: (loss(m), weight), micro_batch_size=2, scaler=scaler)
        mb.apply_update(SGD(model.parameters(), lr=0.1), runner.run(torch.ones(2, 2)))
        return [(record.levelno, record.getMessage()) for record in caplog.records]

    def of_ones(model: nn.Module) -> Tensor:
        return model(torch.ones(2)).sum()

    assert said(lambda m: of_ones(m) * math.nan) == [(logging.WARNING, "update skipped: the gradient norm is nan")]
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**16)
    [(level, text)] = said(lambda m: of_ones(m) * 1e35, scaler)
    assert level == logging.INFO
    assert text.startswith("update skipped: the gradient norm is inf, the loss scale 65536 too large")
    assert said(lambda m: of_ones(m) * 0, weight=0.0) == [
        (logging.INFO, "update skipped: the loss of its window had no terms to average over")
    ]
    assert said(of_ones) == []  # the control


def test_with_ignore_the_step_is_made_whatever_the_gradients_are() -> None:
    model = net()
    mean_square(model, data()).backward()
    model.outer.bias.grad = torch.full((2,), math.nan, dtype=torch.float64)
    update = mb.apply_update(SGD(model.parameters(), lr=0.1), nonfinite="ignore")
    assert update.applied
    assert model.outer.bias.isnan().all()
    assert all(p.grad is None for p in model.parameters())


def classified(model: nn.Module, labels: Tensor) -> mb.Report:
    runner = mb.Accumulator(model, mb.sum_loss(nn.CrossEntropyLoss()), micro_batch_size=4)
    return runner.run((data()[0], labels))


def test_a_window_without_terms_changes_nothing_where_zero_gradients_would_still_move_adamw() -> None:
    model = net()
    optimizer = AdamW(model.parameters(), lr=0.1)
    assert mb.apply_update(optimizer, classified(model, torch.arange(N) % 2)).applied
    before, state = values(model), copy.deepcopy(optimizer.state_dict())
    report = classified(model, torch.full((N,), -100))
    for p in model.parameters():
        p.grad = torch.zeros_like(p)  # as after a reduction over ranks
    update = mb.apply_update(optimizer, report)
    assert (update.applied, float(update.grad_norm)) == (False, 0.0)
    assert same_state(values(model), before)
    assert same_state(optimizer.state_dict(), state)
    for p in model.parameters():
        p.grad = torch.zeros_like(p)
    assert mb.apply_update(optimizer).applied
    assert not same_state(values(model), before), "control: without the report the step along zero moves"


def test_of_several_denominators_one_that_counts_is_enough() -> None:
    model, (x, y) = net(), data()
    counts = {"a": 0, "b": 4}

    def losses(model: nn.Module, batch: tuple[Tensor, Tensor]) -> dict[str, Tensor]:
        total = (model(batch[0]) - batch[1]).square().sum()
        return {name: total * (count > 0) for name, count in counts.items()}

    runner = mb.Accumulator(model, losses, micro_batch_size=4, count=lambda _: dict(counts))
    assert mb.apply_update(SGD(model.parameters(), lr=0.1), runner.run((x, y))).applied
    counts["b"] = 0
    assert not mb.apply_update(SGD(model.parameters(), lr=0.1), runner.run((x, y))).applied


def test_a_window_without_terms_leaves_the_scaler_as_it_is() -> None:
    model = net().float()
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0, growth_interval=1)
    optimizer = SGD(model.parameters(), lr=0.1)
    runner = mb.Accumulator(model, mb.sum_loss(nn.CrossEntropyLoss()), micro_batch_size=4, scaler=scaler)
    x, masked = data()[0].float(), torch.full((N,), -100)
    for labels, applied, scale in ((masked, False, 1024), (torch.arange(N) % 2, True, 2048), (masked, False, 2048)):
        assert mb.apply_update(optimizer, runner.run((x, labels))).applied == applied
        assert scaler.get_scale() == scale


def test_hooks_of_the_optimizer_run_once_for_each_applied_update() -> None:
    model, steps = net(), []
    optimizer = SGD(model.parameters(), lr=0.1)
    optimizer.register_step_post_hook(lambda *_: steps.append(1))
    runner = accumulator(model)
    for _ in range(3):
        mb.apply_update(optimizer, runner.run(data()))
    mb.apply_update(optimizer, runner.run((data()[0] * math.nan, data()[1])))
    assert len(steps) == 3


# ---------------------------------------------------------------------------------------------------------------------
# Gradients afterwards


@pytest.mark.parametrize("skipped", [False, True])
def test_all_gradients_of_the_model_are_none_afterwards_those_no_optimizer_owns_too(skipped: bool) -> None:
    model = net()
    x, y = data()
    report = accumulator(model).run((x * math.nan if skipped else x, y))
    assert model.inner.weight.grad is not None
    with pytest.warns(UserWarning, match="2 of the 4 parameters .* are in no optimizer"):
        update = mb.apply_update(SGD(model.outer.parameters(), lr=0.1), report)
    assert update.applied != skipped
    assert all(p.grad is None for p in model.parameters())
    accumulator(model).run(data())  # nothing is left over that it would refuse


def test_without_a_report_only_gradients_of_the_optimizer_are_known() -> None:
    model = net()
    accumulator(model).run(data())
    mb.apply_update(SGD(model.outer.parameters(), lr=0.1))
    assert model.outer.weight.grad is None
    with pytest.raises(ValueError, match=r"hold a gradient from before, the first of them 'inner.weight'"):
        accumulator(model).run(data())


class Tempered(nn.Module):
    """A loss with a parameter of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.log_scale = nn.Parameter(torch.zeros(1, 1, dtype=torch.float64))

    def forward(self, model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
        return F.mse_loss(model(batch[0]) * self.log_scale.exp(), batch[1])


def test_a_temperature_in_no_optimizer_stays_as_it_is_and_is_warned_of_once_for_each_place() -> None:
    model, loss_fn = net(), Tempered()
    runner = mb.Accumulator(model, loss_fn, micro_batch_size=4)
    optimizer = SGD(model.parameters(), lr=0.1)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("default")
        for _ in range(3):
            mb.apply_update(optimizer, runner.run(data()))
    (warning,) = caught
    assert warning.filename == __file__, "it names the line that calls apply_update"
    assert re.search(
        r"^1 of the 5 parameters that .* are in no optimizer given \('log_scale' of Tempered, shape \(1, 1\)\): they "
        r"stay .* apply_update\(\[first, second\], report\), .* or frozen= of the Accumulator$",
        str(warning.message),
    )
    assert loss_fn.log_scale.detach() == 0
    optimizer.add_param_group({"params": loss_fn.parameters()})
    mb.apply_update(optimizer, runner.run(data()))  # where a warning would be an error
    assert loss_fn.log_scale.detach() != 0, "the control: held by the optimizer it is trained"


def test_of_many_parameters_in_no_optimizer_the_first_three_are_named_as_the_model_names_them() -> None:
    model = torch.nn.Sequential(
        torch.nn.Linear(3, 2), torch.nn.Sequential(torch.nn.Linear(2, 2), torch.nn.Linear(2, 1))
    )
    report = mb.Accumulator(model, lambda m, b: m(b).mean(), micro_batch_size=2).run(torch.ones(4, 3))
    told = (
        r"^4 of the 6 parameters .* in no optimizer given \('1\.0\.weight' of Linear, shape \(2, 2\); '1\.0\.bias' of "
        r"Linear, shape \(2,\); '1\.1\.weight' of Linear, shape \(1, 2\); \.\.\.\): they stay"
    )
    with pytest.warns(UserWarning, match=told):
        mb.apply_update(SGD(model[0].parameters(), lr=0.1), report)


def test_the_warning_comes_before_anything_is_changed() -> None:
    model = net()
    start, report = values(model), accumulator(model).run(data())
    with pytest.raises(UserWarning, match="2 of the 4"):
        mb.apply_update(SGD(model.outer.parameters(), lr=0.1), report)  # warnings are errors here
    assert same_state(values(model), start)
    assert mb.apply_update(SGD(model.parameters(), lr=0.1), report).applied


def test_one_optimizer_after_the_other_with_one_report_trains_the_first_and_says_so() -> None:
    model = net()
    start, report = values(model), accumulator(model).run(data())
    with pytest.warns(UserWarning, match="give all optimizers in one call"):
        first = mb.apply_update(SGD(model.inner.parameters(), lr=0.1), report)
    with pytest.warns(UserWarning, match="no parameter of the optimizer has a gradient.* An update before it"):
        second = mb.apply_update(SGD(model.outer.parameters(), lr=0.1), report)
    assert (first.applied, second.applied) == (True, False)
    moved = [not torch.equal(a, b) for a, b in zip(start, values(model), strict=True)]
    assert moved == [True, True, False, False]


def test_turns_with_an_accumulator_and_an_optimizer_each_are_not_warned_of() -> None:
    generator, critic = nn.Linear(3, 3).double(), nn.Linear(3, 1).double()
    x = data()[0]
    fool = mb.Accumulator(generator, lambda g, b: critic(g(b)).mean(), micro_batch_size=4, frozen=[critic])
    judge = mb.Accumulator(critic, lambda c, b: c(b).mean(), micro_batch_size=4, frozen=[generator])
    for _ in range(2):
        reports = fool.run(x), judge.run(x)  # both before either update
        for model, report in zip((generator, critic), reports, strict=True):
            assert mb.apply_update(SGD(model.parameters(), lr=0.1), report).applied


def test_parameters_that_the_window_has_no_gradient_for_are_not_missed() -> None:
    model = net()
    model.unused = nn.Linear(2, 2)
    report = accumulator(model).run(data())
    optimizer = SGD([*model.inner.parameters(), *model.outer.parameters()], lr=0.1)
    assert len(report.parameters) == 6
    assert mb.apply_update(optimizer, report).applied


def test_frozen_modules_and_frozen_parameters_stay_without_gradient() -> None:
    model, frozen = net(), net()
    model.inner.bias.requires_grad_(False)

    def loss(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
        return F.mse_loss(frozen(model(batch[0]) @ torch.ones(2, 3, dtype=torch.float64)), batch[1])

    report = mb.Accumulator(model, loss, micro_batch_size=4, frozen=[frozen]).run(data())
    mb.apply_update(SGD([*model.parameters(), *frozen.parameters()], lr=0.1), report)
    assert all(p.grad is None for p in (*model.parameters(), *frozen.parameters()))
    assert same_state(values(frozen), values(net()))


def test_parameters_without_a_gradient_are_left_alone() -> None:
    model = net()
    start = values(model)
    with pytest.warns(UserWarning, match="no parameter of the optimizer has a gradient"):
        update = mb.apply_update(AdamW(model.parameters(), lr=0.1), max_norm=1.0)
    assert float(update.grad_norm) == 0
    assert same_state(values(model), start)


# ---------------------------------------------------------------------------------------------------------------------
# Refusals


@pytest.mark.parametrize(
    ("optimizer", "name"),
    [(None, "None"), (3, "3"), (nn.Linear(2, 2), "a Linear"), ("sgd", "'sgd'"), ([None], "None"), ([[]], r"\[\]")],
)
def test_what_is_no_optimizer_is_refused(optimizer: Any, name: str) -> None:
    message = rf"takes a torch optimizer, or several, got {name}\. The order is apply_update\(optimizer, report\)"
    with pytest.raises(ValueError, match=message):
        mb.apply_update(optimizer)


def test_a_loader_given_as_optimizer_is_refused_and_not_read() -> None:
    class Unread(torch.utils.data.Dataset[Tensor]):
        def __len__(self) -> int:
            return 3

        def __getitem__(self, index: int) -> Tensor:
            raise AssertionError("it was read")

    with pytest.raises(ValueError, match="or several, got a DataLoader"):
        mb.apply_update(torch.utils.data.DataLoader(Unread()))  # type: ignore[arg-type]


def test_what_belongs_to_an_optimizer_is_refused_with_what_to_give() -> None:
    optimizer = SGD(net().parameters(), lr=0.1)
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 1)
    with pytest.raises(ValueError, match=r"got a StepLR: a scheduler is stepped by you, .*\. Give scheduler.optimizer"):
        mb.apply_update(scheduler)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"got a dict: give its values, list\(optimizers.values\(\)\)"):
        mb.apply_update({"adam": optimizer})  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"got the class SGD: give SGD\(model.parameters\(\), ...\), made once"):
        mb.apply_update(SGD)  # type: ignore[arg-type]


def test_several_optimizers_come_in_any_collection() -> None:
    for several in (tuple, set, iter, lambda made: dict(enumerate(made)).values()):
        model = net()
        report = accumulator(model).run(data())
        optimizers = [SGD(part.parameters(), lr=0.1) for part in (model.inner, model.outer)]
        assert mb.apply_update(several(optimizers), report).applied  # type: ignore[operator]


def test_no_optimizer_at_all_is_refused_and_one_given_twice() -> None:
    for nothing in ([], iter(())):
        with pytest.raises(
            ValueError, match="apply_update got no optimizer, but an empty sequence or an iterator that"
        ):
            mb.apply_update(nothing)  # type: ignore[arg-type]
    optimizer = SGD(net().parameters(), lr=0.1)
    with pytest.raises(ValueError, match="got an optimizer twice, which would make two steps: give each once"):
        mb.apply_update([optimizer, optimizer])


@pytest.mark.parametrize(
    ("max_norm", "shown"),
    [(0, "0"), (-1.0, "-1.0"), (math.nan, "nan"), (True, "True"), ("1", "'1'"), (torch.tensor(1.0), "a Tensor")],
)
def test_a_norm_to_clip_to_must_be_a_positive_number(max_norm: Any, shown: str) -> None:
    message = f"max_norm must be positive, or None for no clipping, got {shown}: give a number above 0"
    with pytest.raises(ValueError, match=message):
        mb.apply_update(SGD(net().parameters(), lr=0.1), max_norm=max_norm)


def test_a_norm_to_clip_to_may_be_a_number_of_numpy() -> None:
    model = net()
    report = accumulator(model).run(data())
    assert mb.apply_update(SGD(model.parameters(), lr=0.1), report, max_norm=np.float32(0.5)).applied


def test_an_unknown_answer_to_non_finite_gradients_is_refused() -> None:
    with pytest.raises(ValueError, match="nonfinite must be 'skip' or 'ignore', got 'raise'"):
        mb.apply_update(SGD(net().parameters(), lr=0.1), nonfinite="raise")  # type: ignore[arg-type]


def test_a_refusal_leaves_gradients_and_parameters_alone() -> None:
    model = net()
    accumulator(model).run(data())
    start, gradient = values(model), model.inner.weight.grad
    with pytest.raises(ValueError, match="max_norm"):
        mb.apply_update(SGD(model.parameters(), lr=0.1), max_norm=-1)
    assert same_state(values(model), start)
    assert model.inner.weight.grad is gradient


def test_an_optimizer_of_other_parameters_is_refused() -> None:
    model, other = torch.nn.Linear(3, 1), torch.nn.Linear(3, 1)
    report = mb.Accumulator(model, lambda m, b: m(b).mean(), micro_batch_size=2).run(torch.ones(4, 3))
    with pytest.raises(
        ValueError,
        match=r"the optimizer holds 2 parameters, none of the 2 that this window has gradients for "
        r"\('weight' of Linear, shape \(1, 3\); 'bias' of Linear, shape \(1,\)\): it would change nothing",
    ):
        mb.apply_update(torch.optim.SGD(other.parameters(), lr=0.1), report)


def test_overflows_of_a_grad_scaler_cannot_be_ignored() -> None:
    model = torch.nn.Linear(3, 1)
    accumulator = mb.Accumulator(
        model, lambda m, b: m(b).mean(), micro_batch_size=2, scaler=torch.amp.GradScaler("cpu")
    )
    report = accumulator.run(torch.ones(4, 3))
    with pytest.raises(ValueError, match="nonfinite='ignore' would step on the overflows"):
        mb.apply_update(torch.optim.SGD(model.parameters(), lr=0.1), report, nonfinite="ignore")


def test_without_any_gradient_nothing_is_applied() -> None:
    model = torch.nn.Linear(3, 1)
    optimizer = torch.optim.AdamW(model.parameters(), weight_decay=0.5)
    report = mb.Accumulator(model, lambda m, b: m(b).mean(), micro_batch_size=2).run(torch.ones(4, 3))
    assert mb.apply_update(optimizer, report).applied
    start = values(model)
    with pytest.warns(UserWarning, match=r"no step is made: apply each report once, right after the run that returned"):
        assert not mb.apply_update(optimizer, report).applied
    with pytest.warns(
        UserWarning, match=r"no step is made: run a window before each update, with accumulator.run\(bat"
    ):
        assert not mb.apply_update(optimizer).applied
    assert same_state(values(model), start)


def test_the_report_of_evaluate_is_none_to_update_with() -> None:
    model = net()
    report = accumulator(model).evaluate(data())
    with pytest.warns(UserWarning, match="has dropped the gradients, and evaluate makes none") as warned:
        assert not mb.apply_update(SGD(model.parameters(), lr=0.1), report).applied
    assert [warning.filename for warning in warned] == [__file__]


def test_what_is_no_report_is_refused() -> None:
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.ones(1))], lr=0.1)
    with pytest.raises(ValueError, match=r"report must be what Accumulator.run returned, got a Window"):
        mb.apply_update(optimizer, mb.Window([]))
    runner = accumulator(net())
    for other, name in ((runner, "Accumulator"), (runner.run, "method")):
        with pytest.raises(ValueError, match=rf"got a {name}: give report=accumulator.run\(batch\)"):
            mb.apply_update(optimizer, other)  # type: ignore[arg-type]
