"""Spikes are found before they do harm, and the run after a rollback is one that never saw them."""

import json
import math
from collections.abc import Callable
from pathlib import Path
from statistics import NormalDist
from typing import Any

import numpy as np
import pytest
import torch
from spiking import QUICK, UNCHANGED_LR, Batch, Training, assert_same, squared_error, windows
from test_scaling_rules import EVERY_OPTIMIZER, EVERY_SCHEDULER, groups, move, rates
from torch import Tensor, nn
from torch.optim import SGD, AdamW, Optimizer
from torch.optim.lr_scheduler import ExponentialLR, LambdaLR

import macrobatch as mb
from macrobatch.outliers import norm_ratios

# ---- the score


def test_the_score_is_the_distance_from_the_median_in_robust_deviations_of_the_logarithm() -> None:
    past = [math.exp(v) for v in (0.0, 0.1, 0.2, 0.4, 1.0)]  # median 0.2, distances 0.2, 0.1, 0, 0.2, 0.8: MAD 0.2
    assert mb.spike_score(math.exp(0.5), past) == pytest.approx(0.3 / (1.4826 * 0.2))
    assert mb.spike_score(math.exp(-5.0), past) < 0, "a fall is no spike"
    assert mb.spike_score(1.0, []) == 0


def test_the_deviation_is_that_of_normal_noise() -> None:
    noise = np.exp(np.random.default_rng(0).normal(2.0, 0.12, 100_000))
    assert mb.spike_score(math.exp(2.0 + 6 * 0.12), noise) == pytest.approx(6, rel=0.02)
    assert NormalDist().inv_cdf(0.75) * 1.4826 == pytest.approx(1, abs=1e-4)


def test_a_constant_past_does_not_make_everything_a_spike() -> None:
    assert mb.spike_score(2.1, [2.0] * 64) < 6 < mb.spike_score(2.2, [2.0] * 64)


@pytest.mark.parametrize("past", [[-3.0, -2.9, -3.2, -3.1], [0.0, 0.0, 0.1, -0.1], [0.0, 0.0, 0.0]])
def test_losses_that_are_not_positive_are_scored_as_they_are(past: list[float]) -> None:
    assert mb.spike_score(max(past), past) < 6 < mb.spike_score(max(past) + 3, past)


Detector = Callable[
    [list[float], list[float]], float
]  # of all values so far, and of those not flagged: what is flagged


def synthetic(heavy: bool, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """30 000 values with 12% noise in the logarithm, and where spikes of 1 to 3 updates by 3 to 10 times are."""
    generator = np.random.default_rng(seed)
    n = 30_000
    noise = generator.standard_t(4, n) / math.sqrt(2) if heavy else generator.normal(size=n)
    values, spikes = np.exp(0.12 * noise), np.zeros(n, dtype=bool)
    for start in range(300, n - 10, 200):
        length = int(generator.integers(1, 4))
        values[start : start + length] *= np.exp(generator.uniform(math.log(3), math.log(10), length))
        spikes[start : start + length] = True
    return values, spikes


def rolling_sigma(values: np.ndarray) -> np.ndarray:
    """The control of other libraries: 6 standard deviations from the mean of the last 128 values, flagged or not."""
    flags = np.zeros(len(values), dtype=bool)
    for t in range(128, len(values)):
        past = values[t - 128 : t]
        flags[t] = values[t] - past.mean() > 6 * past.std(ddof=1)
    return flags


def zclip(values: np.ndarray) -> np.ndarray:
    """The control of ZClip: 2.5 deviations from exponential averages, which take in the clipped value."""
    flags = np.zeros(len(values), dtype=bool)
    mean, variance = values[:25].mean(), values[:25].var()
    for t in range(25, len(values)):
        value, deviation = values[t], math.sqrt(variance) + 1e-6
        z = (value - mean) / deviation
        if z > 2.5:
            flags[t] = True
            value = mean + 2.5**2 / z * deviation
        mean = 0.97 * mean + 0.03 * value
        variance = 0.97 * variance + 0.03 * (value - mean) ** 2
    return flags


def median_and_mad(values: np.ndarray) -> np.ndarray:
    flags, accepted = np.zeros(len(values), dtype=bool), list(values[:64])
    for t in range(64, len(values)):
        flags[t] = mb.spike_score(values[t], accepted[-128:]) > 6
        if not flags[t]:
            accepted.append(values[t])
    return flags


def false_alarms_and_recall(find: Callable[[np.ndarray], np.ndarray], heavy: bool) -> tuple[float, float]:
    """False alarms for each 1000 values without a spike, and the share of spiked values that were flagged."""
    values, spikes = synthetic(heavy, seed=1)
    flags = find(values)
    return 1000 * float(flags[~spikes].mean()), float(flags[spikes].mean())


def test_the_table_of_detectors() -> None:
    alarms, recall = false_alarms_and_recall(median_and_mad, heavy=False)
    assert alarms == 0
    assert recall > 0.99
    alarms, recall = false_alarms_and_recall(median_and_mad, heavy=True)
    assert alarms < 2
    assert recall > 0.99
    # The controls: one fires far too often, the other is blinded by the spikes that it has taken in.
    for heavy, least in ((False, 10), (True, 20)):
        alarms, recall = false_alarms_and_recall(zclip, heavy)
        assert alarms > least
        assert recall > 0.99
    for heavy, most in ((False, 0), (True, 2)):
        alarms, recall = false_alarms_and_recall(rolling_sigma, heavy)
        assert alarms <= most
        assert recall < 0.9


# ---- what a rollback brings back

BAD = 34  # the snapshot before it holds 30 updates
DROPPED = slice(30, 35)


def without(batches: list[Batch], dropped: slice) -> list[Batch]:
    return [*batches[: dropped.start], *batches[dropped.stop :]]


@pytest.mark.parametrize("in_files", [False, True])
@pytest.mark.parametrize("measure", [None, "norms"])
def test_after_a_rollback_the_run_is_bit_for_bit_one_that_never_saw_the_windows(
    in_files: bool, measure: str | None, tmp_path: Path
) -> None:
    batches = windows(60, bad=[BAD])
    mine = Training(measure=measure)
    guard = mine.guard(folder=tmp_path if in_files else None, **UNCHANGED_LR)
    mine.train(batches, guard)
    assert [t for t, kind in enumerate(mine.kinds) if kind != "accepted"] == [BAD]
    assert (mine.verdicts[BAD].kind, mine.verdicts[BAD].back_to) == ("rolled_back", 30)
    assert_same(mine.state(), Training(measure=measure).train(without(batches, DROPPED)).state())


def test_control_without_the_rollback_it_is_another_run() -> None:
    batches = windows(60, bad=[BAD])
    never_saw = Training().train(without(batches, DROPPED)).state()
    unguarded, skipped = Training(), Training()
    unguarded.train(batches)
    skipped.train(batches, skipped.guard(policy="skip", **UNCHANGED_LR))
    for other in (unguarded, skipped):
        with pytest.raises(AssertionError):
            assert_same(other.state(), never_saw)
    assert skipped.kinds[BAD] == "skipped"


def test_a_guard_that_flags_nothing_changes_no_bit() -> None:
    mine = Training()
    mine.train(windows(40), mine.guard())
    assert set(mine.kinds) == {"accepted"}
    assert_same(mine.state(), Training().train(windows(40)).state())


@pytest.mark.parametrize("policy", ["skip", "rollback", "warn"])
def test_a_window_that_is_not_finite_leaves_nothing_behind_not_even_in_batchnorm(policy: str) -> None:
    batches = windows(40, bad=[5, 31], by=math.nan)  # also before there is anything to compare with
    batches[31] = batches[31][0] / 0, batches[31][1]
    mine = Training()
    mine.train(batches, mine.guard(policy=policy, **UNCHANGED_LR))
    assert [mine.kinds[t] for t in (5, 31)] == ["skipped", "skipped"]
    assert "not finite" in mine.verdicts[5].why
    assert_same(mine.state(), Training().train([b for t, b in enumerate(batches) if t not in (5, 31)]).state())
    control = Training().train(batches)  # apply_update alone keeps parameters, but not statistics
    assert not control.model[1].running_mean.isfinite().all()


def test_a_window_that_is_not_finite_twice_in_a_row_is_one_to_go_back_from() -> None:
    mine = Training()
    mine.train(windows(40, bad=[34, 35, 36], by=math.nan), mine.guard(**UNCHANGED_LR))
    assert mine.kinds[34:38] == ["skipped", "rolled_back", "skipped", "accepted"]
    assert_same(mine.state(), Training().train([*windows(40)[:30], *windows(40)[37:]]).state())


class Drawn(nn.Module):
    """Its gradient is the mean of the batch's first column, its loss that of the second."""

    def __init__(self) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.zeros((), dtype=torch.float64))


def as_drawn(model: Drawn, batch: Tensor) -> tuple[Tensor, int]:
    return ((model.w - model.w.detach()) * batch[:, 0] + batch[:, 1]).sum(), len(batch)


def test_a_large_gradient_at_a_normal_loss_is_left_out_and_gone_back_from_only_if_the_next_is_flagged_too() -> None:
    def kinds(steep: list[int]) -> list[str]:
        model = Drawn()
        accumulator = mb.Accumulator(model, as_drawn, micro_batch_size=4)
        optimizer = SGD(model.parameters(), lr=0.1)
        guard = mb.SpikeGuard(model, optimizer, **QUICK)
        found = []
        for t, (x, _) in enumerate(windows(40)):
            batch = 3 + 0.1 * x[:, :2]
            batch[:, 0] *= 100 if t in steep else 1
            verdict = guard.check(report := accumulator.run(batch))
            found.append(verdict.kind)
            if verdict.accepted:
                mb.apply_update(optimizer, report)
        return found[34:38]

    assert kinds([34]) == ["skipped", "accepted", "accepted", "accepted"]
    assert kinds([34, 35, 36]) == ["skipped", "rolled_back", "skipped", "accepted"]


def test_windows_flagged_after_a_rollback_only_are_skipped_for_the_state_is_the_snapshot() -> None:
    batches = windows(60, bad=range(34, 44))
    mine = Training()
    guard = mine.guard(**UNCHANGED_LR)
    mine.train(batches, guard)
    assert mine.kinds[33:45] == ["accepted", "rolled_back", *["skipped"] * 9, "accepted"]
    assert guard.rollbacks == 1
    assert_same(mine.state(), Training().train(without(batches, slice(30, 44))).state())


@pytest.mark.parametrize("name", [name for name in EVERY_OPTIMIZER if name not in ("LBFGS", "SparseAdam", "Muon")])
def test_every_optimizer_of_torch_goes_back_bit_for_bit(name: str) -> None:
    def make(model: nn.Module) -> Optimizer:
        return getattr(torch.optim, name)(model.parameters(), lr=0.003)

    batches = windows(50, bad=[BAD])
    mine = Training(make)
    mine.train(batches, mine.guard(**UNCHANGED_LR))
    assert mine.kinds[BAD] == "rolled_back"
    assert_same(mine.state(), Training(make).train(without(batches, DROPPED)).state())


def test_everything_given_goes_back_and_the_data_goes_on() -> None:
    class Counter:
        def __init__(self) -> None:
            self.updates = 0

        def state_dict(self) -> dict[str, int]:
            return {"updates": self.updates}

        def load_state_dict(self, state: dict[str, int]) -> None:
            self.updates = state["updates"]

    given, not_given, mine = Counter(), Counter(), Training()
    guard = mine.guard(stateful=[given])
    for batch in windows(40, bad=[BAD]):
        mine.train([batch], guard)
        given.updates += mine.verdicts[-1].accepted
        not_given.updates += mine.verdicts[-1].accepted
    assert (given.updates, not_given.updates) == (35, 39)


def test_what_refers_to_tensors_of_the_run_still_refers_to_them_after_a_rollback() -> None:
    def capturable(model: nn.Module) -> Optimizer:
        return AdamW(model.parameters(), lr=torch.tensor(0.01))

    mine = Training(capturable, lambda o: ExponentialLR(o, 0.99))
    guard = mine.guard()
    mine.train(windows(BAD), guard)
    held = [*mine.model.parameters(), *mine.model.buffers(), mine.optimizer.param_groups[0]["lr"]]
    held += [tensor for state in mine.optimizer.state.values() for tensor in state.values()]
    group = mine.optimizer.param_groups[0]
    places = [tensor.data_ptr() for tensor in held]
    mine.train(windows(60, bad=[BAD])[BAD:], guard)
    assert mine.kinds[BAD] == "rolled_back"
    now = [*mine.model.parameters(), *mine.model.buffers(), mine.optimizer.param_groups[0]["lr"]]
    now += [tensor for state in mine.optimizer.state.values() for tensor in state.values()]
    assert all(a is b for a, b in zip(held, now, strict=True))
    assert places == [tensor.data_ptr() for tensor in now]
    assert group is mine.optimizer.param_groups[0]


# ---- a run that is ruined by its own step, and seen only afterwards


def ruined(policy: str, **options: Any) -> tuple[Training, float]:
    """Correct windows, but four updates with 3000 times the rate; and the loss of clean windows at the end."""
    mine = Training(lambda model: AdamW(model.parameters(), lr=0.01), lambda o: None, micro_batch_size=8)
    guard = mine.guard(policy=policy, **options) if policy else None
    for t, batch in enumerate(windows(160)):
        mine.train([batch], guard, factor=3000 if t in range(60, 64) else 1)
    return mine, mine.loss()


def test_going_back_recovers_from_steps_that_were_flagged_only_afterwards() -> None:
    clean = Training(make_scheduler=lambda o: None, micro_batch_size=8).train(windows(160))
    mine, guarded = ruined("rollback", **UNCHANGED_LR)
    assert mine.kinds[60] == "accepted", "nothing shows before the first bad step"
    assert "rolled_back" in mine.kinds[61:63]
    assert guarded < 1.1 * clean.loss()
    _, unguarded = ruined("")
    assert unguarded > 3 * clean.loss()


def test_control_skipping_alone_never_recovers_from_them() -> None:
    with pytest.raises(mb.SpikeError, match="20 windows in a row were flagged"):
        ruined("skip")


# ---- giving up


def test_the_guard_gives_up_after_so_many_flags_in_a_row() -> None:
    mine = Training()
    guard = mine.guard(max_flags_in_a_row=6)
    with pytest.raises(
        mb.SpikeError, match=r"6 windows in a row were flagged, the last because loss .* after 30 accepted"
    ):
        mine.train(windows(80, bad=range(34, 80)), guard)
    assert mine.kinds[34:] == ["rolled_back", *["skipped"] * 4]
    assert_same(mine.model.state_dict(), Training().train(windows(30)).model.state_dict())


def test_the_guard_gives_up_after_so_many_rollbacks() -> None:
    mine = Training()
    guard = mine.guard(max_rollbacks=2)
    with pytest.raises(mb.SpikeError, match=r"came back after 2 rollbacks.*look at the data"):
        mine.train(windows(200, bad=range(34, 200, 12)), guard)
    assert mine.kinds.count("rolled_back") == 2


def test_a_warning_guard_applies_what_it_flags_and_takes_a_lasting_level_for_the_new_normal() -> None:
    batches = windows(120, bad=range(40, 120))
    mine = Training()
    mine.train(batches, mine.guard(policy="warn"))
    assert set(mine.kinds[:40]) == {"accepted"}
    assert mine.kinds[40:60] == ["warned"] * 20
    assert set(mine.kinds[60:]) == {"accepted"}
    assert_same(mine.state(), Training().train(batches).state())


# ---- the learning rate


class Constant(nn.Module):
    """Its gradient is that of the batch, whatever its parameters are."""

    def __init__(self, like: Optimizer) -> None:
        super().__init__()
        self.weights = nn.ParameterList(p for group in like.param_groups for p in group["params"])


def inner_product(model: Constant, batch: Tensor) -> tuple[Tensor, int]:
    return sum(((p - p.detach() + 1) * batch.mean()).sum() for p in model.weights), 1  # type: ignore[return-value]


@pytest.mark.parametrize("tensor_lr", [False, True])
@pytest.mark.parametrize("name", EVERY_SCHEDULER)
def test_after_a_rollback_every_schedule_goes_on_lower_and_warms_up(name: str, tensor_lr: bool) -> None:
    if tensor_lr and name in ("OneCycleLR", "CyclicLR", "SWALR"):
        pytest.skip("torch's own do not take a tensor as lr, or lose it")
    optimizer, twin = (SGD(groups(SGD, tensor_lr=tensor_lr).param_groups, momentum=0.9) for _ in range(2))
    scheduler, other = (EVERY_SCHEDULER[name](each) for each in (optimizer, twin))
    model = Constant(optimizer)
    accumulator = mb.Accumulator(model, inner_product, micro_batch_size=1)
    guard = mb.SpikeGuard(
        model,
        optimizer,
        scheduler=scheduler,
        window=4,
        min_updates=2,
        snapshot_every=3,
        lr_factor=0.25,
        warmup_updates=4,
    )
    seen, step = [], 0
    for t in range(12):
        verdict = guard.check(accumulator.run(torch.tensor([[1e6 if t == 5 else 1.0]])))
        if verdict.accepted:
            seen.append(rates(optimizer))
            move(optimizer, scheduler, step)
            step += 1
        else:
            step = 3
        model.zero_grad()
    shares = [1, 1, 1, 1, 1, *(0.25 * k / 4 for k in (1, 2, 3, 4, 4, 4))]
    schedule = [rates(twin)]
    for step in range(9):
        move(twin, other, step)
        schedule.append(rates(twin))
    steps = [*range(5), *range(3, 9)]  # back to the snapshot
    expected = [[rate * share for rate in schedule[step]] for step, share in zip(steps, shares, strict=True)]
    assert len(seen) == len(expected) == 11
    for mine, theirs in zip(seen, expected, strict=True):
        assert mine == pytest.approx(theirs, rel=1e-6 if tensor_lr else 1e-12)


def rates_in_use(set_by_hand: Callable[[int], float] | None) -> list[float]:
    mine = Training(lambda model: AdamW(model.parameters(), lr=0.01), lambda o: None)
    guard, seen = mine.guard(lr_factor=0.5, warmup_updates=2), []
    for t, batch in enumerate(windows(44, bad=[BAD])):
        if set_by_hand is not None:
            mine.optimizer.param_groups[0]["lr"] = set_by_hand(t)
        mine.train([batch], guard)
        if mine.verdicts[-1].accepted:
            seen.append(mine.optimizer.param_groups[0]["lr"])
    return seen


def test_a_rate_that_nobody_changes_stays_lower() -> None:
    assert rates_in_use(None) == pytest.approx([0.01] * 34 + [0.0025] + [0.005] * 8, rel=1e-12)


def test_rates_that_the_loop_sets_by_hand_are_lowered_each_time() -> None:
    def schedule(t: int) -> float:
        return 0.01 * (1 - t / 100)

    expected = [schedule(t) for t in range(34)] + [0.25 * schedule(35)] + [0.5 * schedule(t) for t in range(36, 44)]
    assert rates_in_use(schedule) == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("tensor_lr", [False, True])
def test_a_rate_that_follows_the_batch_size_without_a_scheduler_stays_lowered_once(tensor_lr: bool) -> None:
    lr = torch.tensor(0.01) if tensor_lr else 0.01
    mine = Training(lambda model: AdamW(model.parameters(), lr=lr, foreach=False), lambda o: None)
    guard, seen = mine.guard(lr_factor=0.5, warmup_updates=2), []
    for t, batch in enumerate(windows(50, bad=[BAD])):
        if t in (38, 42, 46):
            change = mb.scale_hyperparameters(mine.optimizer, from_batch_size=8, to_batch_size=32, rule="sqrt")
            assert [c.name for c in change.changes if "lr" in c.name] == ["lr"]
        mine.train([batch], guard)
        if mine.verdicts[-1].accepted:
            seen.append(float(mine.optimizer.param_groups[0]["lr"]))
    expected = [0.01] * 34 + [0.0025] + [0.005] * 2 + [0.01] * 4 + [0.02] * 4 + [0.04] * 4
    assert seen == pytest.approx(expected, rel=1e-6)


def test_control_multiplying_the_group_alone_is_undone_by_the_next_step_of_a_scheduler() -> None:
    optimizer = SGD([nn.Parameter(torch.ones(1))], lr=1.0)
    scheduler = LambdaLR(optimizer, lambda step: 1.0)
    optimizer.param_groups[0]["lr"] *= 0.5
    move(optimizer, scheduler, 0)
    assert rates(optimizer) == [1.0]


# ---- whose fault it is


def uneven(outlier: int | None, by: float) -> mb.Window:
    """Micro-batches of 1, 2, 4, 8 and 9 samples."""
    x, y = windows(1, n=24)[0]
    parts = list(zip(x.split([1, 2, 4, 8, 9]), y.split([1, 2, 4, 8, 9]), strict=True))
    if outlier is not None:
        parts[outlier] = parts[outlier][0], parts[outlier][1] * by
    return mb.Window(parts)


@pytest.mark.parametrize("by", [60.0, math.nan, math.inf])
@pytest.mark.parametrize("outlier", range(5))
def test_the_micro_batch_that_did_it_is_named(outlier: int, by: float) -> None:
    mine = Training(measure="norms", plain=True, micro_batch_size=9)
    guard = mine.guard(policy="skip")
    mine.train([uneven(None, 1)] * 20, guard)
    mine.train([uneven(outlier, by)], guard)
    assert mine.kinds[-1] == "skipped"
    assert (mine.verdicts[-1].rank, mine.verdicts[-1].micro_batch) == (0, outlier)


def test_no_micro_batch_is_named_where_all_are_alike_and_where_norms_were_not_measured() -> None:
    everything = mb.Window([(x, y * 300) for x, y in windows(5, n=24)])
    broken = mb.Window([(x, y * math.nan) for x, y in uneven(None, 1)])
    for measure, spiked in (("norms", everything), ("norms", broken), (None, uneven(3, 60.0))):
        mine = Training(measure=measure, plain=True, micro_batch_size=24)
        guard = mine.guard(policy="skip")
        mine.train([uneven(None, 1)] * 20, guard)
        mine.train([spiked], guard)
        assert mine.kinds[-1] == "skipped"
        assert mine.verdicts[-1].micro_batch is None


def test_control_the_largest_norm_may_be_that_of_the_smallest_micro_batch() -> None:
    norms = [4 + 100 / 1, 4 + 100 / 2, 5 * (4 + 100 / 50)]  # |G|^2 = 4, S = 100; the last is five times too large
    assert max(norms) == norms[0]
    assert norm_ratios(norms, [1, 2, 50], variance=100, squared_mean=4) == [1, 1, 5]


# ---- what is no spike


def test_the_short_last_window_of_an_epoch_is_no_spike() -> None:
    def score_of_tails(corrected: bool) -> list[str]:
        mine = Training(lambda model: SGD(model.parameters(), lr=0.0), lambda o: None, micro_batch_size=64)
        guard = mine.guard(policy="skip", window=64, min_updates=32, threshold=6.0)
        full = windows(200, n=256)
        for t, (x, y) in enumerate(full):
            mine.train([(x[:2], y[:2]) if t % 10 == 9 else (x, y)], guard)
            if not corrected:
                guard._history.sizes.clear()
                guard._history.sizes.append(2)
        return mine.kinds

    assert score_of_tails(corrected=True).count("skipped") == 0
    assert score_of_tails(corrected=False).count("skipped") > 3


def verdict_on(num_samples: int, norm: float, loss: float, past: list[tuple[float, float]]) -> mb.SpikeVerdict:
    """Of a window with this gradient norm and loss, after windows of 8 samples with those of `past`."""
    model = Drawn()
    accumulator = mb.Accumulator(model, as_drawn, micro_batch_size=8)
    guard = mb.SpikeGuard(model, SGD(model.parameters(), lr=0.1), policy="skip", window=16, min_updates=8)
    for n, pair in [*((8, pair) for pair in past), (num_samples, (norm, loss))]:
        verdict = guard.check(accumulator.run(torch.tensor([pair] * n, dtype=torch.float64)))
        model.zero_grad()
    return verdict


def test_a_quarter_of_the_samples_may_have_twice_the_norm_and_deviates_twice_as_much() -> None:
    past = [(math.exp(0.05 * (t % 5)), math.exp(0.03 * (t % 7))) for t in range(16)]
    norms, losses = zip(*past, strict=True)
    center, deviation = math.log(np.median(norms)), mb.spike_score(math.e * np.median(norms), norms)
    norm, loss = math.exp(center + math.log(2) + 9 / deviation), float(np.median(losses))
    for n, e in ((2, 2.0), (4, math.sqrt(2)), (8, 1.0), (32, 1.0)):
        verdict = verdict_on(n, norm, 1.1 * loss, past)
        assert verdict.norm_score == pytest.approx(mb.spike_score(norm / e, norms) / e, rel=1e-9)
        assert verdict.loss_score == pytest.approx(mb.spike_score(1.1 * loss, losses) / e, rel=1e-9)
        assert verdict.kind == ("accepted" if n == 2 else "skipped")
    # The controls: with either half of the correction alone the window of 2 would be a spike.
    assert mb.spike_score(norm / 2, norms) == pytest.approx(9, rel=1e-6)
    assert mb.spike_score(norm, norms) / 2 > 6


def test_an_overflow_of_the_loss_scale_is_the_scalers_and_goes_on() -> None:
    def run(guarded: bool, bad: int | None = None, scale: float = 2.0**127) -> tuple[list[Any], list[str]]:
        torch.manual_seed(0)
        model = nn.Linear(4, 1)
        optimizer = SGD(model.parameters(), lr=0.01)
        scaler = torch.amp.GradScaler("cpu", init_scale=scale, growth_interval=5)
        accumulator = mb.Accumulator(model, squared_error, micro_batch_size=4, scaler=scaler)
        options = QUICK | UNCHANGED_LR | {"snapshot_every": 5}
        guard = mb.SpikeGuard(model, optimizer, scaler=scaler, **options) if guarded else None
        kinds = []
        for t, (x, y) in enumerate(windows(40)):
            report = accumulator.run((x.float(), y.float() * (1e4 if t == bad else 1)))
            verdict = guard.check(report) if guard else None
            kinds.append(verdict.kind if verdict else "")
            if verdict is None or verdict.accepted:
                mb.apply_update(optimizer, report)
        return [model.state_dict(), scaler.state_dict()], kinds

    mine, kinds = run(guarded=True)
    assert kinds[0] == "skipped"
    assert set(kinds[4:]) <= {"accepted", "skipped"}
    assert_same(mine, run(guarded=False)[0])
    assert mine[1]["scale"] < 2.0**127
    assert "rolled_back" in run(guarded=True, bad=35, scale=2.0**16)[1]


def test_gradients_that_no_loss_scale_makes_finite_are_given_up_on() -> None:
    def broken(model: nn.Module, batch: Batch) -> tuple[Tensor, int]:
        output = model(batch[0])
        output.register_hook(lambda gradient: gradient * math.inf)  # at a finite loss
        return (output - batch[1]).square().sum(), len(batch[0])

    model = nn.Linear(4, 1)
    optimizer, scaler = SGD(model.parameters(), lr=0.01), torch.amp.GradScaler("cpu", init_scale=2.0**10)
    accumulator = mb.Accumulator(model, broken, micro_batch_size=4, scaler=scaler)
    guard, kinds = mb.SpikeGuard(model, optimizer, scaler=scaler, max_flags_in_a_row=5), []

    def train() -> None:
        for x, y in windows(100):
            kinds.append(guard.check(accumulator.run((x.float(), y.float()))).why)

    with pytest.raises(mb.SpikeError, match=r"5 windows in a row were flagged, .* gradient norm not finite"):
        train()
    assert kinds == ["the loss scale was too large"] * 10 + ["gradient norm not finite"] * 4
    assert scaler.get_scale() == 1.0


def test_a_window_without_terms_is_no_spike_and_no_update() -> None:
    mine = Training()

    def nothing(model: nn.Module, batch: Batch) -> tuple[int, int]:
        return 0, 0

    guard = mine.guard()
    mine.train(windows(20), guard)
    before = [p.clone() for p in mine.model.parameters()]
    verdict = guard.check(
        mb.Accumulator(mine.model, nothing, micro_batch_size=8, batch_norm="micro_batch").run(windows(1)[0])
    )
    assert (verdict.kind, verdict.why, guard.flags_in_a_row) == ("skipped", "no loss terms", 0)
    assert_same(before, [p.detach() for p in mine.model.parameters()])


def test_batches_that_torch_draws_itself_come_again_after_going_back_unless_its_numbers_go_on() -> None:
    def kinds(**options: Any) -> list[str]:
        mine = Training()
        guard = mine.guard(policy="skip", **options)
        for t in range(40):
            x = torch.randn(8, 4, dtype=torch.float64)
            scale = math.nan if t >= 20 and float(x[0, 0]) > 0 else 1.0
            mine.train([(x, x.sum(1, keepdim=True) * scale)], guard)
        return mine.kinds

    assert kinds(restore_random=False)[20:].count("skipped") < 16
    with pytest.raises(mb.SpikeError, match="restore_random=False"):
        kinds()


# ---- saved and loaded


@pytest.mark.parametrize("midpoint", [3, 12, 32])
@pytest.mark.parametrize("policy", ["rollback", "skip"])
def test_a_guard_that_was_saved_and_loaded_goes_on_as_if_nothing_had_happened(
    policy: str, midpoint: int, tmp_path: Path
) -> None:
    batches = windows(70, bad=[BAD, 57])
    folder = {"folder": tmp_path / "a"} if policy == "rollback" else {}
    whole = Training()
    whole.train(batches, whole.guard(policy=policy, **folder))
    folder = {"folder": tmp_path / "b"} if policy == "rollback" else {}
    first = Training()
    guard = first.guard(policy=policy, **folder)
    first.train(batches[:midpoint], guard)
    parts = {"model": first.model, "optimizer": first.optimizer, "scheduler": first.scheduler, "guard": guard}
    torch.save({name: part.state_dict() for name, part in parts.items()}, tmp_path / "checkpoint.pt")
    random = torch.get_rng_state()
    second = Training()
    again = second.guard(policy=policy, **folder)
    state = torch.load(tmp_path / "checkpoint.pt", weights_only=True)
    for name, part in {**parts, "model": second.model, "optimizer": second.optimizer}.items():
        {"scheduler": second.scheduler, "guard": again}.get(name, part).load_state_dict(state[name])
    assert json.loads(json.dumps(again.state_dict())) == guard.state_dict()
    torch.set_rng_state(random)
    second.train(batches[midpoint:], again)
    assert second.kinds == whole.kinds[midpoint:]
    assert_same(second.state(), whole.state())


def test_a_guard_made_before_a_checkpoint_was_loaded_never_goes_back_to_before_it() -> None:
    trained = Training().train(windows(100))
    mine = Training()
    guard = mine.guard(min_updates=2, snapshot_every=50)
    mine.model.load_state_dict(trained.model.state_dict())
    mine.train(windows(6, bad=[4]), guard)
    assert mine.kinds[4] == "rolled_back"
    for name, buffer in mine.model.named_buffers():
        assert not name.endswith("num_batches_tracked") or int(buffer) > 200


def test_a_state_of_another_kind_is_refused() -> None:
    with pytest.raises(ValueError, match=r"a spike guard's state holds .*'losses'.*, this one \['step'\]"):
        Training().guard().load_state_dict({"step": 1})


# ---- errors before training starts


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"policy": "pray"}, "policy must be one of 'rollback', 'skip', 'warn', got 'pray'"),
        ({"snapshot_every": None}, "needs snapshots to go back to: give snapshot_every"),
        ({"snapshot_every": 0}, "snapshot_every must be an integer of at least 1, got 0"),
        ({"policy": "skip", "folder": "here"}, "folder and snapshot_device are for policy='rollback'"),
        ({"folder": "here", "snapshot_device": "cpu"}, "give one of them"),
        ({"window": 0}, "window must be an integer of at least 1"),
        ({"min_updates": 0}, "min_updates must be an integer of at least 1"),
        ({"min_updates": 500}, "min_updates must be at most window, .* got 500 and 16"),
        ({"threshold": 0}, "threshold must be above 0"),
        ({"threshold": math.nan}, "threshold must be above 0"),
        ({"lr_factor": 0.0}, "lr_factor must be above 0 and at most 1, got 0.0"),
        ({"lr_factor": 2.0}, "lr_factor must be above 0 and at most 1, got 2.0"),
        ({"warmup_updates": -1}, "warmup_updates must be an integer of at least 1, got -1"),
        ({"max_rollbacks": 0}, "max_rollbacks must be an integer of at least 1"),
        ({"max_flags_in_a_row": 0}, "max_flags_in_a_row must be an integer of at least 1"),
        ({"stateful": [3]}, "stateful things have state_dict and load_state_dict, a int has not"),
    ],
)
def test_options_that_make_no_sense_are_refused_before_training(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Training().guard(**options)


def test_parts_that_do_not_belong_together_are_refused() -> None:
    mine, other = Training(), Training()
    with pytest.raises(ValueError, match="holds 6 parameters, 6 of them not of the model, which trains 6"):
        mb.SpikeGuard(mine.model, other.optimizer, scheduler=other.scheduler)
    with pytest.raises(ValueError, match="StepLR given belongs to none of the optimizers"):
        mb.SpikeGuard(mine.model, mine.optimizer, scheduler=other.scheduler)
    with pytest.raises(ValueError, match="a StepLR attached that was not given"):
        mb.SpikeGuard(mine.model, mine.optimizer)
    with pytest.raises(ValueError, match="optimizer must be a torch optimizer, or several, got a Sequential"):
        mb.SpikeGuard(mine.model, mine.model)  # type: ignore[arg-type]


def test_an_adascale_is_guarded_by_skipping_and_never_goes_back() -> None:
    def guarded(policy: str, adas: bool = False) -> list[str]:
        mine = Training(lambda model: SGD(model.parameters(), lr=0.01), lambda o: None, measure="norms", plain=True)
        mine.accumulator = mb.Accumulator(mine.model, squared_error, micro_batch_size=4, measure="norms")
        adascale = mb.AdaScale(mine.optimizer, base_batch_size=4)
        guard = mine.guard(policy=policy, stateful=[adascale] if adas else [])
        kinds = []
        for batch in windows(44, bad=[BAD]):
            report = mine.accumulator.run(batch)
            kinds.append(guard.check(report).kind)
            if kinds[-1] == "accepted":
                adascale.step(report)
                mb.apply_update(mine.optimizer, report)
        return kinds

    with pytest.raises(ValueError, match=r"an AdaScale sets every rate anew .* policy='skip'"):
        guarded("rollback", adas=True)
    assert guarded("skip").count("skipped") == 1
    with pytest.raises(ValueError, match="AdaScale had set"):  # the limit that the pages tell of
        guarded("rollback")


def test_check_has_its_place_between_run_and_apply_update() -> None:
    mine = Training()
    guard = mine.guard()
    report = mine.accumulator.run(windows(1)[0])
    mb.apply_update(mine.optimizer, report)
    with pytest.raises(ValueError, match=r"call check\(report\) after accumulator.run and before apply_update"):
        guard.check(report)
    with pytest.raises(ValueError, match=r"takes the Report that Accumulator.run returned, got a float"):
        guard.check(0.3)  # type: ignore[arg-type]
    scaler = torch.amp.GradScaler("cpu")
    scaled = mb.Accumulator(mine.model, squared_error, micro_batch_size=8, scaler=scaler, batch_norm="micro_batch")
    with pytest.raises(ValueError, match="GradScaler that the guard was not given"):
        guard.check(scaled.run(windows(1)[0]))
