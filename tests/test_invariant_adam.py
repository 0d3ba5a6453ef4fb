"""AdamW whose second moment does not depend on the batch size: by definition, as plain AdamW, and as it trains."""

import copy
import gc
from collections.abc import Callable, Sequence

import pytest
import torch
from moments_by_hand import float64, moments_of_gradients, report_of
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

import macrobatch as mb

OPTIONS = {"lr": 0.01, "betas": (0.8, 0.95), "eps": 1e-6, "weight_decay": 0.1}


def net(seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(5, 7), nn.Tanh(), nn.Linear(7, 3)).double()


def batch_of(n: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(n, 5, generator=generator, dtype=torch.float64)
    return x, torch.randint(0, 3, (n,), generator=generator)


def loss_fn(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    return F.cross_entropy(model(batch[0]), batch[1])


def gradients_of(model: nn.Module, batch: tuple[Tensor, Tensor]) -> list[Tensor]:
    return list(torch.autograd.grad(loss_fn(model, batch), list(model.parameters())))


def brute_force_adamw(
    start: Sequence[Tensor], first: Sequence[Sequence[Tensor]], second: Sequence[Sequence[Tensor]]
) -> list[Tensor]:
    """Where AdamW arrives from `start`, given for each update the gradient, and what its second moment averages."""
    lr, (beta1, beta2) = OPTIONS["lr"], OPTIONS["betas"]
    places = [p.clone() for p in start]
    m, v = ([torch.zeros_like(p) for p in start] for _ in range(2))
    for t, (gs, squares) in enumerate(zip(first, second, strict=True), 1):
        for i, p in enumerate(places):
            m[i] = beta1 * m[i] + (1 - beta1) * gs[i]
            v[i] = beta2 * v[i] + (1 - beta2) * squares[i]
            step = (m[i] / (1 - beta1**t)) / ((v[i] / (1 - beta2**t)).sqrt() + OPTIONS["eps"])
            places[i] = p * (1 - lr * OPTIONS["weight_decay"]) - lr * step
    return places


def assert_close(mine: Sequence[Tensor], theirs: Sequence[Tensor]) -> None:
    for a, b in zip(mine, theirs, strict=True):
        torch.testing.assert_close(a.detach(), b.detach(), rtol=1e-11, atol=1e-13)


def distance(mine: Sequence[Tensor], theirs: Sequence[Tensor]) -> float:
    return max(float((a.detach() - b.detach()).abs().max()) for a, b in zip(mine, theirs, strict=True))


# ---- by definition


def test_equal_micro_batches_of_the_reference_size_give_the_mean_of_squares() -> None:
    model, batches = net(), [batch_of(12, seed) for seed in range(4)]
    start = [p.detach().clone() for p in model.parameters()]
    optimizer = mb.InvariantAdamW(model.parameters(), **OPTIONS, reference_batch_size=3)
    accumulator = mb.Accumulator(model, loss_fn, micro_batch_size=3, measure="squares")
    first, second = [], []
    for batch in batches:
        parts = [gradients_of(model, part) for part in mb.Window([batch]).cut(3)]
        first.append([torch.stack(gs).mean(0) for gs in zip(*parts, strict=True)])
        second.append([torch.stack(gs).square().mean(0) for gs in zip(*parts, strict=True)])
        report = accumulator.run(batch)
        optimizer.observe(report)
        assert mb.apply_update(optimizer, report).applied
    assert_close(list(model.parameters()), brute_force_adamw(start, first, second))
    plain = brute_force_adamw(start, first, [[g.square() for g in gs] for gs in first])
    assert distance(list(model.parameters()), plain) > 1e-3, "the control: plain AdamW arrives elsewhere"


@pytest.mark.parametrize("reference", [1, 5, 20])
def test_uneven_micro_batches_are_unbiased_for_any_reference(reference: float) -> None:
    """v_ref = gbar^2 + S (1/n_ref - 1/N), S = N/(K-1) (sum w g^2 - gbar^2), elementwise."""
    model, batch = net(), batch_of(20)
    start = [p.detach().clone() for p in model.parameters()]
    window = mb.Window([batch]).cut(7)
    sizes = float64(torch.tensor([len(part[0]) for part in window]))
    parts = [gradients_of(model, part) for part in window]
    w = sizes / sizes.sum()
    whole = [sum(a * g for a, g in zip(w, gs, strict=True)) for gs in zip(*parts, strict=True)]
    mean = [sum(a * g * g for a, g in zip(w, gs, strict=True)) for gs in zip(*parts, strict=True)]
    variance = [20 / 2 * (m - g * g) for m, g in zip(mean, whole, strict=True)]
    second = [g * g + s * (1 / reference - 1 / 20) for g, s in zip(whole, variance, strict=True)]
    assert all(bool((each >= 0).all()) for each in second)
    optimizer = mb.InvariantAdamW(model.parameters(), **OPTIONS, reference_batch_size=reference)
    report = mb.Accumulator(model, loss_fn, measure="squares").run(window)
    optimizer.observe(report)
    mb.apply_update(optimizer, report)
    assert_close(list(model.parameters()), brute_force_adamw(start, [whole], [second]))


def test_the_second_moment_expects_what_batches_of_the_reference_size_show() -> None:
    """20 000 coordinates of mean 0.5 and variance 4, sizes 1, 3, 8: E[v_ref] = 0.25 + 4 / n_ref."""
    n = float64(torch.tensor([1.0, 3.0, 8.0]))
    g = 0.5 + 2 * torch.randn(3, 20_000, dtype=torch.float64) / n.sqrt()[:, None]
    w = n / n.sum()
    p = nn.Parameter(torch.zeros(20_000, dtype=torch.float64))
    p.grad = (w[:, None] * g).sum(0)
    mean_squares = (w[:, None] * g.square()).sum(0)
    for reference in (2.0, 4.0):
        optimizer = mb.InvariantAdamW([p], betas=(0.9, 0.0), reference_batch_size=reference)
        optimizer.observe(report_of([p], moments_of_gradients(g, n.tolist()), [mean_squares]))
        optimizer.step()
        v = optimizer.state[p]["exp_avg_sq"]
        assert abs(float((v.mean() - 0.25 - 4 / reference) / (v.std() / 20_000**0.5))) < 4
    assert abs(float((mean_squares.mean() - 0.25 - 4 / 2) / (mean_squares.std() / 20_000**0.5))) > 10, (
        "the control: M is that of one size, N / K = 4"
    )


# ---- as plain AdamW


def train(
    make: Callable[[list[dict[str, object]]], torch.optim.Optimizer], n: int, size: int, max_norm: float | None
) -> list[Tensor]:
    """Six updates with two groups; observes where the optimizer can."""
    model = net()
    groups: list[dict[str, object]] = [
        {"params": list(model[0].parameters())},
        {"params": list(model[2].parameters()), "lr": 0.03, "weight_decay": 0.0},
    ]
    optimizer = make(groups)
    accumulator = mb.Accumulator(model, loss_fn, micro_batch_size=size, measure="squares")
    for seed in range(6):
        report = accumulator.run(batch_of(n, seed))
        if isinstance(optimizer, mb.InvariantAdamW):
            optimizer.observe(report)
        mb.apply_update(optimizer, report, max_norm=max_norm)
    return [p.detach() for p in model.parameters()]


def invariant(reference: float) -> Callable[[list[dict[str, object]]], torch.optim.Optimizer]:
    return lambda groups: mb.InvariantAdamW(groups, **OPTIONS, reference_batch_size=reference)


def plain(groups: list[dict[str, object]]) -> torch.optim.Optimizer:
    return torch.optim.AdamW(groups, **OPTIONS)


@pytest.mark.parametrize("max_norm", [None, 0.05])
@pytest.mark.parametrize(("size", "reference"), [(8, 8), (8, 3), (3, 8), (3, 50)])
def test_it_is_adamw_for_one_micro_batch_and_where_the_batch_is_the_reference(
    size: int, reference: float, max_norm: float | None
) -> None:
    mine, theirs = train(invariant(reference), 8, size, max_norm), train(plain, 8, size, max_norm)
    for a, b in zip(mine, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)


def test_control_with_several_micro_batches_it_is_not_adamw() -> None:
    assert distance(train(invariant(2), 8, 2, None), train(plain, 8, 2, None)) > 1e-3


def test_clipping_multiplies_both_moments_as_in_adamw() -> None:
    model, batch = net(), batch_of(12)
    start = [p.detach().clone() for p in model.parameters()]
    parts = [gradients_of(model, part) for part in mb.Window([batch]).cut(3)]
    whole = [torch.stack(gs).mean(0) for gs in zip(*parts, strict=True)]
    norm = torch.cat([g.flatten() for g in whole]).norm()
    factor = 0.01 / (norm + 1e-6)
    first = [[factor * g for g in whole]]
    second = [[torch.stack(gs).mul(factor).square().mean(0) for gs in zip(*parts, strict=True)]]
    optimizer = mb.InvariantAdamW(model.parameters(), **OPTIONS, reference_batch_size=3)
    report = mb.Accumulator(model, loss_fn, micro_batch_size=3, measure="squares").run(batch)
    optimizer.observe(report)
    mb.apply_update(optimizer, report, max_norm=0.01)
    assert_close(list(model.parameters()), brute_force_adamw(start, first, second))


# ---- as it trains


def losses_on_a_noisy_quadratic(k: int, noise: float, updates: int, lr: float, way: str) -> list[float]:
    """E[x^2] at half time and at the end over 4000 coordinates; k samples for each update, updates / k of them."""
    torch.manual_seed(0)
    p, count = nn.Parameter(torch.ones(4000, dtype=torch.float64)), updates // k
    betas = (0.9**k, 0.99**k)
    if way == "invariant":
        optimizer = mb.InvariantAdamW([p], lr * k, betas, weight_decay=0.0, reference_batch_size=1)
    elif way == "sqrt":
        optimizer = torch.optim.AdamW([p], lr * k**0.5, (1 - k * 0.1, 1 - k * 0.01), weight_decay=0.0)
    else:
        optimizer = torch.optim.AdamW([p], lr * k, betas, weight_decay=0.0)
    found = []
    for t in range(1, count + 1):
        g = p.detach() + noise * torch.randn(k, 4000, dtype=torch.float64)
        p.grad = g.mean(0)
        if isinstance(optimizer, mb.InvariantAdamW):
            optimizer.observe(report_of([p], moments_of_gradients(g, [1] * k), [g.square().mean(0)]))
        optimizer.step()
        if t in (count // 2, count):
            found.append(float(p.detach().square().mean()))
    return found


@pytest.mark.parametrize(("noise", "updates", "lr"), [(10.0, 800, 0.005), (1.0, 800, 0.003), (0.1, 400, 0.005)])
def test_training_is_the_same_at_eight_times_the_batch_whether_noise_or_signal_dominates(
    noise: float, updates: int, lr: float
) -> None:
    base = losses_on_a_noisy_quadratic(1, noise, updates, lr, "plain")
    for k in (4, 8):
        mine = losses_on_a_noisy_quadratic(k, noise, updates, lr, "invariant")
        assert all(abs(a / b - 1) < 0.04 for a, b in zip(mine, base, strict=True)), (mine, base)


def test_control_plain_adamw_keeps_pace_by_the_square_root_rule_only_where_noise_dominates() -> None:
    base, noisy = (losses_on_a_noisy_quadratic(k, 10.0, 800, 0.005, "sqrt") for k in (1, 8))
    assert all(abs(a / b - 1) < 0.1 for a, b in zip(noisy, base, strict=True))
    base, clear = (losses_on_a_noisy_quadratic(k, 1.0, 800, 0.003, "sqrt") for k in (1, 8))
    assert clear[1] > 5 * base[1]
    linear = losses_on_a_noisy_quadratic(8, 10.0, 800, 0.005, "plain")
    assert linear[1] < 0.5 * losses_on_a_noisy_quadratic(1, 10.0, 800, 0.005, "plain")[1]


# ---- errors, before anything changes


def observed(size: int = 2) -> tuple[nn.Module, mb.InvariantAdamW, mb.Report]:
    model = net()
    optimizer = mb.InvariantAdamW(model.parameters(), **OPTIONS, reference_batch_size=2)
    report = mb.Accumulator(model, loss_fn, micro_batch_size=size, measure="squares").run(batch_of(8))
    optimizer.observe(report)
    return model, optimizer, report


def assert_untouched(model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), net().parameters(), strict=True))
    assert not optimizer.state


def test_a_step_without_observe_changes_nothing_and_says_what_to_call() -> None:
    model = net()
    optimizer = mb.InvariantAdamW(model.parameters(), reference_batch_size=2)
    report = mb.Accumulator(model, loss_fn, micro_batch_size=2, measure="squares").run(batch_of(8))
    with pytest.raises(ValueError, match=r"not observed: call optimizer.observe\(report\)"):
        mb.apply_update(optimizer, report)
    assert_untouched(model, optimizer)


def test_squares_of_another_window_are_not_used() -> None:
    model, optimizer, _ = observed()
    model.zero_grad()
    gc.collect()
    report = mb.Accumulator(model, loss_fn, micro_batch_size=2, measure="squares").run(batch_of(8, seed=1))
    with pytest.raises(ValueError, match="were not observed"):
        mb.apply_update(optimizer, report)
    assert_untouched(model, optimizer)


def test_an_observation_is_used_once() -> None:
    model, optimizer, _ = observed()
    optimizer.step()
    with pytest.raises(ValueError, match="were not observed"):
        optimizer.step()
    model.zero_grad()
    optimizer.step()  # without gradients there is nothing to do


def test_a_skipped_update_leaves_it_as_it_was() -> None:
    model, optimizer, report = observed()
    next(model.parameters()).grad.fill_(float("nan"))  # type: ignore[union-attr]
    assert not mb.apply_update(optimizer, report).applied
    assert_untouched(model, optimizer)


def test_a_gradient_from_elsewhere_is_refused() -> None:
    model = net()
    other = nn.Parameter(torch.ones(2))
    other.grad = torch.ones(2)
    optimizer = mb.InvariantAdamW([*model.parameters(), other], reference_batch_size=2)
    report = mb.Accumulator(model, loss_fn, micro_batch_size=2, measure="squares").run(batch_of(8))
    with pytest.raises(ValueError, match=r"parameter of shape \(2,\) has a gradient that this window did not make"):
        optimizer.observe(report)


def test_what_it_needs_is_said() -> None:
    model, optimizer, report = observed()
    for measure, said in ((None, "measure='norms'"), ("norms", "measure='squares'")):
        model.zero_grad()
        report = mb.Accumulator(model, loss_fn, micro_batch_size=2, measure=measure).run(batch_of(8))  # type: ignore[arg-type]
        with pytest.raises(ValueError, match=said):
            optimizer.observe(report)
    with pytest.raises(ValueError, match="takes no closure"):
        optimizer.step(lambda: 0.0)
    with pytest.raises(ValueError, match="reference_batch_size must be a positive number"):
        mb.InvariantAdamW(model.parameters(), reference_batch_size=0)
    for wrong in ({"lr": -1.0}, {"betas": (1.0, 0.9)}, {"eps": -1e-8}, {"weight_decay": -0.1}):
        with pytest.raises(ValueError, match="must not be negative and betas lie in"):
            mb.InvariantAdamW(model.parameters(), reference_batch_size=2, **wrong)  # type: ignore[arg-type]


def test_sparse_gradients_are_refused_as_by_adamw() -> None:
    model = nn.Embedding(5, 3, sparse=True)
    optimizer = mb.InvariantAdamW(model.parameters(), reference_batch_size=2)
    accumulator = mb.Accumulator(model, lambda m, x: m(x).square().mean(), micro_batch_size=2, measure="squares")
    with pytest.raises(ValueError, match="takes no sparse gradients"):
        optimizer.observe(accumulator.run(torch.tensor([0, 1, 2, 3])))


# ---- state


def test_saved_and_loaded_it_goes_on_as_if_nothing_had_happened_and_adamw_reads_its_state() -> None:
    model, optimizer, report = observed()
    mb.apply_update(optimizer, report)
    twin = copy.deepcopy(model)
    other = mb.InvariantAdamW(twin.parameters(), reference_batch_size=2)
    other.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    for mine, its in ((model, optimizer), (twin, other)):
        for seed in (1, 2):
            accumulator = mb.Accumulator(mine, loss_fn, micro_batch_size=2, measure="squares")
            report = accumulator.run(batch_of(8, seed))
            its.observe(report)
            mb.apply_update(its, report)
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), twin.parameters(), strict=True))
    adamw = torch.optim.AdamW(twin.parameters())
    adamw.load_state_dict(other.state_dict())
    loss_fn(twin, batch_of(8)).backward()
    adamw.step()
    copied = copy.deepcopy(other)
    assert copied.reference_batch_size == 2
    assert copied.state_dict()["param_groups"] == other.state_dict()["param_groups"]


def test_a_rate_that_is_a_tensor_and_a_scheduler_work_as_with_adamw() -> None:
    model, report = net(), None
    optimizer = mb.InvariantAdamW(model.parameters(), torch.tensor(0.1), reference_batch_size=2)
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 1, 0.5)
    accumulator = mb.Accumulator(model, loss_fn, micro_batch_size=2, measure="squares")
    for _ in range(2):
        report = accumulator.run(batch_of(8))
        optimizer.observe(report)
        assert mb.apply_update(optimizer, report).applied
        scheduler.step()
    assert float(optimizer.param_groups[0]["lr"]) == pytest.approx(0.025)


class NoReading(TorchDispatchMode):
    """Raises where a number is read from a tensor that may live on a device: the step counts of AdamW do not."""

    def __torch_dispatch__(self, func: object, types: object, args: object = (), kwargs: object = None) -> object:
        assert "_local_scalar_dense" not in str(func), "a tensor was read"
        return func(*args, **(kwargs or {}))  # type: ignore[operator]


def test_observing_reads_nothing_from_the_device() -> None:
    model = net()
    optimizer = mb.InvariantAdamW(model.parameters(), reference_batch_size=2)
    report = mb.Accumulator(model, loss_fn, micro_batch_size=2, measure="squares").run(batch_of(8))
    with NoReading():
        optimizer.observe(report)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_low_precision_parameters_take_the_squares_of_their_float32_sums(dtype: torch.dtype) -> None:
    model = net().to(dtype)
    optimizer = mb.InvariantAdamW(model.parameters(), reference_batch_size=2)
    accumulator = mb.Accumulator(model, loss_fn, micro_batch_size=2, measure="squares")
    x, y = batch_of(8)
    report = accumulator.run((x.to(dtype), y))
    optimizer.observe(report)
    assert mb.apply_update(optimizer, report).applied
    assert all(
        state["exp_avg_sq"].dtype == dtype and bool((state["exp_avg_sq"] >= 0).all())
        for state in optimizer.state.values()
    )
