"""AdaScale: the gain by its formula, the schedule in its own time, and the same loss at any batch size."""

import copy
import math

import pytest
import torch
from moments_by_hand import float64, moments_of_gradients, report_of
from torch import Tensor, nn
from torch.optim.lr_scheduler import CosineAnnealingLR, ExponentialLR, LambdaLR, ReduceLROnPlateau

import macrobatch as mb


def sgd(lr: float = 0.1, **options: float) -> torch.optim.SGD:
    return torch.optim.SGD([nn.Parameter(torch.zeros(3))], lr=lr, **options)


def windows(count: int, k: int = 4, b: int = 2, seed: int = 0) -> list[mb.GradientMoments]:
    """Gradients of mean 0.5 in each of 6 coordinates and variance 1 for a sample."""
    generator = torch.Generator().manual_seed(seed)
    draws = 0.5 + torch.randn(count, k, 6, generator=generator, dtype=torch.float64) / math.sqrt(b)
    return [moments_of_gradients(g, [b] * k) for g in draws]


# ---- the gain


def test_the_gain_is_the_papers_from_averages_of_the_windows_before() -> None:
    """sigma^2 and mu^2 of base batches by equations of the paper, plain means while few were seen, r_0 = 1."""
    adascale, k, b = mb.AdaScale(sgd(), base_batch_size=2), 4, 2
    sigma2, mu2 = [], []
    for t, moments in enumerate(windows(20, k, b)):
        if t:
            s, m = sum(sigma2) / t, max(sum(mu2) / t, 0.0)
            expected = (s + m) / (s / k + m)
        else:
            expected = 1.0
        assert adascale.step(moments) == pytest.approx(expected, rel=1e-12)
        q, whole = float(moments.squared_norms.sum()), float(moments.squared_norm)
        sigma2.append(q / (k - 1) - k / (k - 1) * whole)
        mu2.append(whole - sigma2[-1] / k)
    assert 1 < adascale.gain < k


def test_averages_reach_back_as_far_as_the_memory() -> None:
    adascale, k = mb.AdaScale(sgd(), base_batch_size=2, memory=20), 4
    theta, s, m = 1 - k / 20, 0.0, 0.0
    for t, moments in enumerate(windows(30, k)):
        share = max(1 / (t + 1), 1 - theta)
        s, m = s + share * (float(moments.variance) - s), m + share * (float(moments.squared_mean) - m)
        adascale.step(moments)
    assert adascale.step(windows(1)[0]) == pytest.approx((s / 2 + max(m, 0)) / (s / 8 + max(m, 0)), rel=1e-12)


def test_clamping_each_window_as_in_the_paper_sees_signal_where_there_is_none() -> None:
    generator = torch.Generator().manual_seed(0)
    found = {}
    for clamp in ("average", "window"):
        adascale = mb.AdaScale(sgd(), base_batch_size=1, clamp=clamp)
        for _ in range(400):
            g = 0.02 + torch.randn(8, 50, generator=generator, dtype=torch.float64)  # S / |G|^2 = 2500
            adascale.step(moments_of_gradients(g, [1] * 8))
        found[clamp] = adascale._squared_mean
    assert found["window"] > 10 * 0.02
    assert abs(found["average"] - 0.02) < 0.15


def test_at_the_base_batch_size_the_gain_is_one_even_for_a_window_in_one_piece() -> None:
    adascale = mb.AdaScale(sgd(), base_batch_size=8)
    for moments in windows(5, k=4, b=2):
        assert adascale.step(moments) == pytest.approx(1, abs=1e-12)
    alone = mb.AdaScale(sgd(), base_batch_size=8)
    assert alone.step(moments_of_gradients(torch.ones(1, 3), [8])) == 1


def test_a_smaller_window_than_the_base_gets_a_smaller_rate() -> None:
    optimizer = sgd(0.1)
    adascale = mb.AdaScale(optimizer, base_batch_size=16)
    assert adascale.step(moments_of_gradients(torch.ones(1, 3), [4])) == 0.25
    assert optimizer.param_groups[0]["lr"] == pytest.approx(0.025)
    for moments in windows(20):
        gain = adascale.step(moments)
    assert 0.5 < gain < 1


def test_uneven_micro_batches_and_windows_give_the_same_gain_on_average() -> None:
    even, uneven = mb.AdaScale(sgd(), base_batch_size=2), mb.AdaScale(sgd(), base_batch_size=2)
    generator = torch.Generator().manual_seed(0)
    n = torch.tensor([1.0, 2.0, 5.0, 8.0], dtype=torch.float64)
    for moments in windows(300, k=8, b=2):
        even.step(moments)
        g = 0.5 + torch.randn(4, 6, generator=generator, dtype=torch.float64) / n.sqrt()[:, None]
        uneven.step(moments_of_gradients(g, n.tolist()))
    truth = (6 / 2 + 1.5) / (6 / 16 + 1.5)
    assert even.gain == pytest.approx(truth, rel=0.1)
    assert uneven.gain == pytest.approx(truth, rel=0.1)


# ---- rates and the schedule


def test_the_rate_is_the_gain_times_the_schedule_at_floor_tau() -> None:
    optimizer = torch.optim.SGD([{"params": [nn.Parameter(torch.zeros(2))], "lr": 0.4}, {"params": []}], lr=0.1)
    scheduler = LambdaLR(optimizer, lambda t: 0.9**t)
    adascale, tau, halves = mb.AdaScale(optimizer, base_batch_size=2, scheduler=scheduler), 0.0, 0
    for moments in windows(25):
        gain = adascale.step(moments)
        for group, base in zip(optimizer.param_groups, (0.4, 0.1), strict=True):
            assert group["lr"] == pytest.approx(gain * base * 0.9 ** math.floor(tau), rel=1e-12)
        optimizer.step()
        tau += gain
        halves += math.floor(tau) - math.floor(tau - gain) > 1
        assert adascale.base_updates == pytest.approx(tau)
    assert halves > 5, "several steps of the schedule fell into one update"


@pytest.mark.parametrize("make", [lambda o: ExponentialLR(o, 0.9), lambda o: CosineAnnealingLR(o, 200)])
def test_schedulers_that_build_on_the_present_rate_see_it_without_the_gain(make: object) -> None:
    optimizer, alone = sgd(0.1), sgd(0.1)
    adascale = mb.AdaScale(optimizer, base_batch_size=2, scheduler=make(optimizer))  # type: ignore[operator]
    reference = make(alone)  # type: ignore[operator]
    steps = 0
    for moments in windows(12):
        while steps < math.floor(adascale.base_updates):
            alone.step()
            reference.step()
            steps += 1
        gain = adascale.step(moments)
        assert optimizer.param_groups[0]["lr"] == pytest.approx(gain * alone.param_groups[0]["lr"], rel=1e-12)
        optimizer.step()


def test_rates_that_are_tensors_are_changed_in_place() -> None:
    rate = torch.tensor(0.1, dtype=torch.float64)
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(3))], lr=rate, foreach=False)
    adascale = mb.AdaScale(optimizer, base_batch_size=2)
    for moments in windows(3):
        gain = adascale.step(moments)
    assert optimizer.param_groups[0]["lr"] is rate
    assert float(rate) == pytest.approx(0.1 * gain)


def test_a_hand_that_changes_the_rates_between_is_noticed_unless_it_asks_for_the_base_rates() -> None:
    optimizer = sgd(0.1)
    scheduler = ExponentialLR(optimizer, 0.5)
    adascale = mb.AdaScale(optimizer, base_batch_size=2)
    first, second, third = windows(3)
    adascale.step(first)
    adascale.step(second)
    optimizer.step()
    adascale.rebase()
    assert optimizer.param_groups[0]["lr"] == 0.1
    optimizer.param_groups[0]["lr"] = 0.05
    assert optimizer.param_groups[0]["lr"] * adascale.step(third) > 0.05
    assert adascale._base_rates == [0.05]
    scheduler.step()
    with pytest.raises(ValueError, match=r"the learning rates are .* and AdaScale had set"):
        adascale.step(third)


def test_windows_that_are_not_finite_or_empty_move_nothing() -> None:
    optimizer = sgd(0.1)
    adascale = mb.AdaScale(optimizer, base_batch_size=2)
    for moments in windows(4):
        adascale.step(moments)
    before, rate = adascale.state_dict(), optimizer.param_groups[0]["lr"]
    zero = float64(0.0)
    for bad in (
        moments_of_gradients(torch.tensor([[1.0], [math.nan]]), [1, 1]),
        moments_of_gradients(torch.tensor([[1.0], [math.inf]]), [1, 1]),
        mb.GradientMoments(zero, zero, zero, zero, zero, zero[None]),
    ):
        assert adascale.step(bad) == adascale.gain
    assert adascale.state_dict() == before
    assert optimizer.param_groups[0]["lr"] == rate


# ---- training


def excess_loss(
    scale: int, seed: int, way: str, updates: int = 2000, d: int = 20, b: int = 2, lr: float = 0.03
) -> float:
    """Linear regression from |delta|^2 = d, unit noise, a tenth of the rate after 60% of the time; infinite if lost."""
    generator = torch.Generator().manual_seed(seed)
    w = nn.Parameter(torch.ones(d, dtype=torch.float64))  # delta: the optimum is 0
    optimizer = torch.optim.SGD([w], lr=lr * (scale if way == "linear" else 1))
    scheduler = LambdaLR(optimizer, lambda t: 1.0 if t < 0.6 * updates else 0.1)
    adascale = mb.AdaScale(optimizer, base_batch_size=b, scheduler=scheduler) if way == "adascale" else None
    done = 0.0
    while done < updates:
        x = torch.randn(scale, b, d, generator=generator, dtype=torch.float64)
        e = torch.randn(scale, b, generator=generator, dtype=torch.float64)
        g = (x * ((x @ w.detach()) - e)[..., None]).mean(1)
        w.grad = g.mean(0)
        if adascale is not None:
            done += adascale.step(moments_of_gradients(g, [b] * scale))
            optimizer.step()
        else:
            optimizer.step()
            done += scale
            for _ in range(scale):
                scheduler.step()
        if not bool(w.detach().abs().max() < 1e6):
            return math.inf
    return 0.5 * float(w.detach().square().sum())


def mean_excess_loss(scale: int, way: str, seeds: int) -> float:
    return sum(excess_loss(scale, seed, way) for seed in range(seeds)) / seeds


def test_on_linear_regression_the_loss_stays_where_the_linear_rule_diverges() -> None:
    base = mean_excess_loss(1, "adascale", 2)
    for scale in (16, 64):
        assert mean_excess_loss(scale, "adascale", 3) < 1.5 * base
    assert mean_excess_loss(16, "linear", 3) < 1.5 * base
    assert mean_excess_loss(64, "linear", 3) > 100 * base


@pytest.mark.slow
def test_on_linear_regression_the_loss_is_the_same_from_scale_1_to_128() -> None:
    base = mean_excess_loss(1, "adascale", 12)
    for scale in (4, 16, 32, 64, 128):
        assert 0.4 < mean_excess_loss(scale, "adascale", 12) / base < 1.25, scale
    for scale in (4, 16, 32):
        assert mean_excess_loss(scale, "linear", 12) < 1.4 * base, scale
    for scale in (64, 128):
        assert mean_excess_loss(scale, "linear", 6) > 100 * base, scale


def test_with_real_windows_it_goes_between_run_and_update() -> None:
    torch.manual_seed(0)
    model = nn.Linear(4, 1).double()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    adascale = mb.AdaScale(optimizer, base_batch_size=2)

    def loss_fn(m: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
        return (m(batch[0])[:, 0] - batch[1]).square().mean()

    accumulator = mb.Accumulator(model, loss_fn, micro_batch_size=3, measure="norms")
    for _ in range(40):
        x = torch.randn(14, 4, dtype=torch.float64)
        report = accumulator.run((x, x.sum(1) + 0.5 * torch.randn(14, dtype=torch.float64)))
        gain = adascale.step(report)
        assert 1 <= gain <= 7
        assert mb.apply_update(optimizer, report).applied
    assert gain > 2
    assert float((model.weight.detach() - 1).abs().max()) < 0.5


# ---- state and errors


def test_saved_and_loaded_it_goes_on_as_if_nothing_had_happened() -> None:
    def fresh() -> tuple[torch.optim.SGD, ExponentialLR, mb.AdaScale]:
        optimizer = sgd(0.1)
        scheduler = ExponentialLR(optimizer, 0.9)
        return optimizer, scheduler, mb.AdaScale(optimizer, base_batch_size=2, scheduler=scheduler)

    seen = windows(30)
    whole, first, second = fresh(), fresh(), fresh()
    for moments in seen:
        whole[2].step(moments)
        whole[0].step()
    for moments in seen[:13]:
        first[2].step(moments)
        first[0].step()
    for mine, its in zip(second, first, strict=True):
        mine.load_state_dict(copy.deepcopy(its.state_dict()))
    for moments in seen[13:]:
        second[2].step(moments)
        second[0].step()
    assert second[2].state_dict() == whole[2].state_dict()
    assert second[0].param_groups[0]["lr"] == whole[0].param_groups[0]["lr"]
    with pytest.raises(ValueError, match="belongs to base_batch_size=2"):
        mb.AdaScale(sgd(), base_batch_size=4).load_state_dict(first[2].state_dict())
    with pytest.raises(ValueError, match="AdaScale's state holds"):
        second[2].load_state_dict({"gain": 1.0})


def test_what_it_needs_is_said() -> None:
    with pytest.raises(ValueError, match="gain is that of SGD steps, got AdamW"):
        mb.AdaScale(torch.optim.AdamW([nn.Parameter(torch.zeros(1))]), base_batch_size=2)
    with pytest.raises(ValueError, match="base_batch_size must be the number of samples"):
        mb.AdaScale(sgd(), base_batch_size=0)
    with pytest.raises(ValueError, match="scheduler belongs to another optimizer"):
        mb.AdaScale(sgd(), base_batch_size=2, scheduler=ExponentialLR(sgd(), 0.9))
    optimizer = sgd()
    with pytest.raises(ValueError, match="a ReduceLROnPlateau needs a loss for each step"):
        mb.AdaScale(optimizer, base_batch_size=2, scheduler=ReduceLROnPlateau(optimizer))
    with pytest.raises(ValueError, match="clamp must be 'average' or 'window'"):
        mb.AdaScale(sgd(), base_batch_size=2, clamp="never")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="memory must be a positive number"):
        mb.AdaScale(sgd(), base_batch_size=2, memory=0)
    adascale = mb.AdaScale(sgd(), base_batch_size=2)
    with pytest.raises(ValueError, match="measure='norms'"):
        adascale.step(report_of([]))
    with pytest.raises(ValueError, match="this window of 8 samples has one: cut it into more"):
        adascale.step(moments_of_gradients(torch.ones(1, 3), [8]))
