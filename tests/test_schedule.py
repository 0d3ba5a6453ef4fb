"""The batch that arrives has the size that the schedule says, however far ahead it was drawn, and the lr to fit it."""

import io
import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import schedule_ranks
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.optim import SGD, AdamW
from torch.utils.data import DataLoader, RandomSampler, SequentialSampler, TensorDataset

import macrobatch as mb

SAMPLES = 100
Make = Callable[[], mb.BatchSchedule]
MAKERS: dict[str, Make] = {
    "constant": lambda: mb.BatchSchedule.constant(7),
    "steps": lambda: mb.BatchSchedule.steps({0: 3, 20: 8, 130: 16}),
    "ramp": lambda: mb.BatchSchedule.ramp(2, 12, over=150, multiple_of=2),
    "doubling": lambda: mb.BatchSchedule.doubling(3, largest=24),
}


def dataset() -> TensorDataset:
    return TensorDataset(torch.arange(SAMPLES))


def critical(samples: int) -> float:
    """What a measurement might say: the critical batch grows with training."""
    return 1 + samples / 5


def observed(schedule: mb.BatchSchedule) -> None:
    if schedule._largest is not None:
        schedule.observe(critical(schedule.samples))


def by_formula(schedule_name: str, samples: int) -> int:
    """The size after so many samples, written down a second time."""
    if schedule_name == "constant":
        return 7
    if schedule_name == "steps":
        return 3 if samples < 20 else 8 if samples < 130 else 16
    return 12 if samples >= 150 else 2 + 2 * ((12 - 2) * samples // 150 // 2)


# ---------------------------------------------------------------------------------------------------------------------
# sizes


@pytest.mark.parametrize("name", ["constant", "steps", "ramp"])
def test_sizes_are_those_of_the_formula(name: str) -> None:
    schedule = MAKERS[name]()
    seen = 0
    for size in schedule.batch_sizes(400):
        assert size == min(by_formula(name, seen), 400 - seen)
        seen += size
    assert seen == 400


@given(st.integers(1, 60), st.integers(1, 60), st.integers(1, 500), st.integers(1, 9))
@settings(max_examples=100, deadline=None)
def test_a_ramp_goes_from_one_size_to_the_other_without_turning_back(first: int, last: int, over: int, by: int) -> None:
    schedule = mb.BatchSchedule.ramp(first, last, over=over, multiple_of=by)
    sizes = [schedule._sizes(samples) for samples in range(over + 2)]
    assert (sizes[0], sizes[-1], sizes[-2]) == (first, last, last)
    assert sizes == sorted(sizes, reverse=last < first)
    assert all((size - first) % by == 0 for size in sizes[:-2])
    exact = [first + (last - first) * samples / over for samples in range(over)]
    assert all(abs(size - wanted) < by + 1e-9 for size, wanted in zip(sizes, exact, strict=False))


def test_tokens_count_as_samples_of_their_length() -> None:
    schedule = mb.BatchSchedule.steps({0: 4, 1000: 8}, tokens_per_sample=128)
    assert list(schedule.batch_sizes(24)) == [4, 4, 8, 8], "1000 tokens are 7.8 samples, so the third batch is larger"
    ramp = mb.BatchSchedule.ramp(4, 8, over=1280, tokens_per_sample=128)
    assert list(ramp.batch_sizes(27)) == [4, 5, 7, 8, 3], "after 0, 4, 9 and 16 of 10 samples"


# ---------------------------------------------------------------------------------------------------------------------
# loaders


def arrivals(batches: Any, schedule: mb.BatchSchedule) -> Iterator[tuple[list[int], int]]:
    """Each batch as its samples, with the size that the schedule says it was meant to have; then it is counted."""
    for batch in batches:
        parts = list(batch) if isinstance(batch, mb.Window) else [batch]
        samples = [number for part in parts for number in part[0].tolist()]
        yield samples, schedule.batch_size
        schedule.advance(len(samples))
        observed(schedule)


def check_pass(batches: Any, schedule: mb.BatchSchedule, left: int = SAMPLES) -> list[int]:
    """One pass over the data: every batch has the size it was meant to have, but for the last. Their sizes."""
    seen, meant, sizes = [], [], []
    for samples, size in arrivals(batches, schedule):
        seen += samples
        meant.append(size)
        sizes.append(len(samples))
    assert len(seen) == len(set(seen)) == left
    assert sizes[:-1] == meant[:-1]
    assert sizes[-1] <= meant[-1]
    return sizes


@pytest.mark.parametrize("name", MAKERS)
def test_windows_take_their_sizes_from_a_schedule_over_several_passes(name: str) -> None:
    schedule = MAKERS[name]()
    windows = mb.windows(DataLoader(dataset(), batch_size=4), batch_size=schedule)
    sizes = [check_pass(windows, schedule) for _ in range(3)]
    assert schedule.samples == 3 * SAMPLES
    if name != "constant":
        assert max(sizes[2]) > 2 * sizes[0][0], "the second and third pass go on where the first had come"
    with pytest.raises(TypeError, match="windows whose batch_size changes have no length"):
        len(windows)


def test_windows_take_their_sizes_from_any_function_and_check_them() -> None:
    loader = DataLoader(dataset(), batch_size=10)
    sizes = [window.num_samples for window in mb.windows(loader, batch_size=lambda n: 5 + n)]
    assert sizes == [5, 10, 20, 40, 25], "n: 0, 5, 15, 35, 75"
    with pytest.raises(ValueError, match="batch_size must be an integer of at least 1, got 0"):
        list(mb.windows(loader, batch_size=lambda n: 0))


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("name", MAKERS)
def test_a_batch_sampler_draws_ahead_and_both_sides_agree_on_every_size(name: str, workers: int) -> None:
    schedule = MAKERS[name]()
    sampler = schedule.batch_sampler(RandomSampler(dataset()))
    ahead = {"prefetch_factor": 3, "persistent_workers": True} if workers else {}
    loader = DataLoader(dataset(), batch_sampler=sampler, num_workers=workers, **ahead)
    passes = [check_pass(loader, schedule) for _ in range(2)]
    if name == "doubling":
        assert {3, 6} < set(passes[0] + passes[1]), "it doubled, while batches were drawn ahead"


def test_control_a_size_that_changes_when_it_is_decided_is_not_that_of_the_batch_that_arrives() -> None:
    schedule = MAKERS["doubling"]()
    loader = DataLoader(
        dataset(), batch_sampler=schedule.batch_sampler(SequentialSampler(dataset())), num_workers=1, prefetch_factor=3
    )
    decided, wrong = 3, 0
    for (batch,) in loader:
        wrong += len(batch) != decided and schedule.samples + len(batch) < SAMPLES
        schedule.advance(len(batch))
        decided *= 1 + schedule.observe(critical(schedule.samples))
    assert wrong > 0


@pytest.mark.parametrize("drop_last", [False, True])
@pytest.mark.parametrize("name", MAKERS)
def test_a_loader_knows_how_many_batches_a_pass_has(name: str, drop_last: bool) -> None:
    schedule = MAKERS[name]()
    loader = DataLoader(dataset(), batch_sampler=schedule.batch_sampler(range(SAMPLES), drop_last=drop_last))
    for _ in range(2):
        expected, sizes = len(loader), []
        for (batch,) in loader:
            sizes.append((len(batch), schedule.batch_size))
            schedule.advance(len(batch))
        assert len(sizes) == expected
        assert all(size == meant for size, meant in sizes) or not drop_last
    with pytest.raises(TypeError, match="the sampler, a generator, has no length, so its batches have none"):
        len(schedule.batch_sampler(number for number in range(3)))


# ---------------------------------------------------------------------------------------------------------------------
# resuming


def training(schedule: mb.BatchSchedule, workers: int, epochs: range) -> Iterator[tuple[list[int], int]]:
    """Batches of several epochs, each in an order of its own that depends on its number."""
    for epoch in epochs:
        generator = torch.Generator().manual_seed(epoch)
        order = torch.randperm(SAMPLES, generator=generator).tolist()
        sampler = schedule.batch_sampler(order)
        yield from arrivals(DataLoader(dataset(), batch_sampler=sampler, num_workers=workers), schedule)


def through_a_file(state: dict[str, Any]) -> dict[str, Any]:
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    loaded: dict[str, Any] = torch.load(file, weights_only=True)
    assert json.loads(json.dumps(loaded)) == state
    return loaded


@pytest.mark.parametrize(("workers", "stops"), [(0, range(1, 40, 3)), (2, (2, 9))])
@pytest.mark.parametrize("name", MAKERS)
def test_a_resumed_training_sees_the_same_batches_as_one_that_never_stopped(
    name: str, workers: int, stops: Any
) -> None:
    whole = list(training(MAKERS[name](), workers, range(2)))
    for stop in stops:
        if stop >= len(whole):
            continue
        schedule, seen, state, epoch = MAKERS[name](), [], {}, 0
        for batch in training(schedule, workers, range(2)):
            seen.append(batch)
            if len(seen) == stop + 1:
                break
            # What arrivals does when it is asked for the next: counted here, to save between two batches.
            state = _state_after(schedule, len(batch[0]))
            epoch = int(state["samples"] >= SAMPLES)
        resumed = MAKERS[name]()
        resumed.load_state_dict(through_a_file(state))
        assert seen[:stop] == whole[:stop]
        assert list(training(resumed, workers, range(epoch, 2))) == whole[stop:]


def _state_after(schedule: mb.BatchSchedule, num_samples: int) -> dict[str, Any]:
    """The state as it will be once the batch at hand was counted, without touching the schedule."""
    later = object.__new__(mb.BatchSchedule)
    vars(later).update(vars(schedule))
    later.advance(num_samples)
    observed(later)
    return later.state_dict()


def test_control_without_the_state_a_pass_begins_anew() -> None:
    whole = [samples for samples, _ in training(MAKERS["steps"](), 0, range(1))]
    assert [samples for samples, _ in training(MAKERS["steps"](), 0, range(1))] == whole
    assert whole[3:] != whole[: len(whole) - 3]


def test_a_state_of_another_kind_of_schedule_is_refused() -> None:
    with pytest.raises(ValueError, match=r"state holds lr_batch_size, pass_start, samples, got .*starts.*another kind"):
        MAKERS["ramp"]().load_state_dict(MAKERS["doubling"]().state_dict())


# ---------------------------------------------------------------------------------------------------------------------
# doubling


def test_the_batch_doubles_when_the_critical_one_is_more_than_twice_as_large() -> None:
    schedule = mb.BatchSchedule.doubling(4, largest=16)
    told = []
    for estimate in (3.0, 8.0, float("nan"), float("inf"), -5.0, 8.1, 8.1, 16.5, 1e9):
        told.append((schedule.observe(estimate), schedule.batch_size))
        schedule.advance(schedule.batch_size)
    assert told == [(False, 4)] * 5 + [(True, 8), (False, 8), (True, 16), (False, 16)]


def test_a_doubling_that_has_not_arrived_yet_is_not_doubled_again() -> None:
    schedule = mb.BatchSchedule.doubling(4, largest=64)
    batches = iter(schedule.batch_sampler(range(200)))
    drawn = [len(next(batches)) for _ in range(3)]  # a loader is two ahead of the first batch
    schedule.advance(4)
    assert schedule.observe(1000.0)
    assert not schedule.observe(1000.0)
    drawn.append(len(next(batches)))
    meant = []
    for size in drawn[1:]:
        meant.append(schedule.batch_size)
        schedule.advance(size)
    assert (drawn, meant) == ([4, 4, 4, 8], [4, 4, 8])
    assert schedule.observe(1000.0)


# ---------------------------------------------------------------------------------------------------------------------
# the learning rate


@pytest.mark.parametrize(("betas", "rule"), [((0.9, 0.999), "auto"), ((0.9, 0.95), "sqrt")])
def test_the_rate_moves_with_the_batch_that_arrives_and_ends_where_one_step_would_have_brought_it(
    betas: tuple[float, float], rule: Any
) -> None:
    weights = nn.Parameter(torch.zeros(1, dtype=torch.float64))
    optimizer = AdamW([weights], lr=1e-3, betas=betas, weight_decay=0.1)
    decay = torch.optim.lr_scheduler.ConstantLR(optimizer, 1.0)
    schedule = mb.BatchSchedule.doubling(3, largest=24)
    loader = DataLoader(
        dataset(), batch_sampler=schedule.batch_sampler(range(SAMPLES)), num_workers=2, prefetch_factor=2
    )
    scale = partial(mb.scale_hyperparameters, optimizer, decay, rule=rule)
    told = []
    for _ in range(3):
        for (batch,) in loader:
            meant = schedule.batch_size
            told.append(schedule.rescale(scale))
            assert optimizer.param_groups[0]["lr"] == pytest.approx(1e-3 * (meant / 3) ** 0.5)
            assert len(batch) in (meant, SAMPLES % 3, schedule._pass_start + SAMPLES - schedule.samples)
            schedule.advance(len(batch))
            observed(schedule)
    scalings = [scaling for scaling in told if scaling is not None]
    assert [(s.from_batch_size, s.to_batch_size) for s in scalings] == [(3, 6), (6, 12), (12, 24)]
    once = AdamW([weights], lr=1e-3, betas=betas, weight_decay=0.1)
    mb.scale_hyperparameters(once, from_batch_size=3, to_batch_size=24, rule=rule)
    for name in ("lr", "betas", "eps", "weight_decay"):
        assert optimizer.param_groups[0][name] == pytest.approx(once.param_groups[0][name], rel=1e-12)


def test_the_short_last_batch_of_an_epoch_does_not_move_the_rate() -> None:
    optimizer = SGD([nn.Parameter(torch.zeros(1))], lr=0.1)
    schedule = mb.BatchSchedule.constant(64)
    for (batch,) in DataLoader(dataset(), batch_sampler=schedule.batch_sampler(range(SAMPLES))):
        assert schedule.rescale(partial(mb.scale_hyperparameters, optimizer)) is None
        schedule.advance(len(batch))
    assert len(batch) == 36
    assert optimizer.param_groups[0]["lr"] == 0.1


def test_a_rule_that_refuses_leaves_the_rate_to_be_moved() -> None:
    optimizer = SGD([nn.Parameter(torch.zeros(1))], lr=0.1)
    schedule = mb.BatchSchedule.steps({0: 4, 4: 8})
    schedule.advance(4)
    with pytest.raises(ValueError, match="sgd family has not"):
        schedule.rescale(partial(mb.scale_hyperparameters, optimizer, rule="adam-sde"))
    assert schedule.rescale(partial(mb.scale_hyperparameters, optimizer)) is not None
    assert optimizer.param_groups[0]["lr"] == 0.2


def test_a_resumed_schedule_knows_which_size_the_rate_fits() -> None:
    optimizer = SGD([nn.Parameter(torch.zeros(1))], lr=0.1)
    schedule = mb.BatchSchedule.steps({0: 4, 4: 8})
    schedule.advance(4)
    schedule.rescale(partial(mb.scale_hyperparameters, optimizer))
    resumed = mb.BatchSchedule.steps({0: 4, 4: 8})
    resumed.load_state_dict(schedule.state_dict())
    assert resumed.rescale(partial(mb.scale_hyperparameters, optimizer)) is None
    assert optimizer.param_groups[0]["lr"] == 0.2


def test_gradients_of_a_scheduled_training_are_those_of_batches_cut_by_hand() -> None:
    x = torch.randn(SAMPLES, 3, dtype=torch.float64)

    def squares(model: nn.Module, batch: tuple[Tensor]) -> tuple[Tensor, int]:
        return model(batch[0]).square().sum(), len(batch[0])

    models = [nn.Linear(3, 1).double() for _ in range(2)]
    models[1].load_state_dict(models[0].state_dict())
    optimizers = [SGD(model.parameters(), lr=0.01) for model in models]
    schedule = MAKERS["steps"]()
    accumulator = mb.Accumulator(models[0], squares, micro_batch_size=5)
    for batch in mb.windows(DataLoader(TensorDataset(x), batch_size=7), batch_size=schedule):
        schedule.rescale(partial(mb.scale_hyperparameters, optimizers[0]))
        report = accumulator.run(batch)
        mb.apply_update(optimizers[0], report)
        schedule.advance(report.num_samples)
    start = 0
    while start < SAMPLES:
        size = by_formula("steps", start)
        optimizers[1].param_groups[0]["lr"] = 0.01 * size / 3
        optimizers[1].zero_grad()
        models[1](x[start : start + size]).square().mean().backward()
        optimizers[1].step()
        start += size
    assert models[0].weight.detach() == pytest.approx(models[1].weight.detach(), rel=1e-10)


# ---------------------------------------------------------------------------------------------------------------------
# bad input, before training starts


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: mb.BatchSchedule.constant(0), "batch_size must be an integer of at least 1, got 0"),
        (lambda: mb.BatchSchedule.constant(-4), "batch_size must be an integer of at least 1, got -4"),
        (lambda: mb.BatchSchedule.steps({}), r"steps begin at 0 and rise.*got them at \[\]"),
        (lambda: mb.BatchSchedule.steps({10: 4}), r"steps begin at 0 and rise.*got them at \[10\]"),
        (lambda: mb.BatchSchedule.steps({0: 4, 9: 8, 5: 16}), r"steps begin at 0 and rise.*\[0, 9, 5\]"),
        (lambda: mb.BatchSchedule.steps({0: 4, 9: 0}), "batch size from 9 on must be an integer of at least 1, got 0"),
        (lambda: mb.BatchSchedule.steps({0: 4, 9.5: 8}), "a step must be an integer of at least 1, got 9.5"),
        (lambda: mb.BatchSchedule.steps({0: 4, 9: 8}, end=9), "end=9 comes before the last step, at 9"),
        (
            lambda: mb.BatchSchedule.steps({0: 4, 9: 8}, tokens_per_sample=0),
            "tokens_per_sample must be positive, got 0",
        ),
        (lambda: mb.BatchSchedule.ramp(0, 8, over=10), "from_batch_size must be an integer of at least 1, got 0"),
        (lambda: mb.BatchSchedule.ramp(4, 8.0, over=10), "to_batch_size must be an integer of at least 1, got 8.0"),
        (lambda: mb.BatchSchedule.ramp(4, 8, over=0), "over must be an integer of at least 1, got 0"),
        (lambda: mb.BatchSchedule.ramp(4, 8, over=9, multiple_of=0), "multiple_of must be an integer of at least 1"),
        (lambda: mb.BatchSchedule.doubling(8, largest=4), "largest=4 is below the first batch size 8"),
        (lambda: mb.BatchSchedule.constant(8).observe(100.0), r"this schedule is fixed: make it by BatchSchedule.doub"),
        (lambda: mb.BatchSchedule.constant(8).advance(-1), "num_samples must be an integer of at least 0, got -1"),
        (lambda: mb.BatchSchedule.constant(8).check(0), "num_samples must be an integer of at least 1, got 0"),
    ],
)
def test_a_schedule_that_means_nothing_is_refused(make: Callable[[], object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()


def test_a_schedule_that_ends_before_training_does_or_after_it_is_found_before_it_starts() -> None:
    ending = mb.BatchSchedule.steps({0: 4, 100: 8}, end=200)
    ending.check(200)
    with pytest.raises(ValueError, match="schedule ends at 200 samples, before the training of 201"):
        ending.check(201)
    for outlasting in (ending, mb.BatchSchedule.ramp(4, 8, over=100)):
        with pytest.raises(
            ValueError, match=r"training of 100 samples ends before .* its last size after 100: train longer"
        ):
            outlasting.check(100)
    mb.BatchSchedule.ramp(4, 8, over=100).check(101)
    ending.advance(200)
    with pytest.raises(ValueError, match="the batch schedule ends at 200 samples, and training has come to 200"):
        list(mb.windows(DataLoader(dataset(), batch_size=4), batch_size=ending))


def test_a_pass_in_which_the_schedule_would_end_is_refused_before_its_first_batch() -> None:
    short = mb.BatchSchedule.steps({0: 8, 16: 16}, end=SAMPLES - 1)
    with pytest.raises(ValueError, match=r"ends at 99 samples, .* begins at 0 takes 100 more: .* at least 100"):
        next(iter(short.batch_sampler(range(SAMPLES))))
    exact = mb.BatchSchedule.steps({0: 8, 16: 16}, end=SAMPLES)
    sampler = exact.batch_sampler(range(SAMPLES))
    for batch in sampler:
        exact.advance(len(batch))
    assert exact.samples == SAMPLES
    with pytest.raises(ValueError, match=r"begins at 100 takes 100 more"):
        next(iter(sampler))


@pytest.mark.parametrize("stateful", [True, False])
def test_after_a_rollback_over_a_change_of_size_the_rate_fits_the_batch_at_hand(stateful: bool) -> None:
    # 16 from window 44 on: the snapshot, of window 40, has the rate of batches of 8.
    optimizer = SGD([weights := nn.Parameter(torch.zeros(2))], lr=0.1)
    schedule = mb.BatchSchedule.steps({0: 8, 352: 16})
    model = nn.ParameterList([weights])
    decay = torch.optim.lr_scheduler.ConstantLR(optimizer, 1.0)
    accumulator = mb.Accumulator(model, lambda m, x: ((m[0] - x).square().sum(), len(x)), micro_batch_size=8)
    guard = mb.SpikeGuard(
        model,
        optimizer,
        scheduler=decay,
        window=32,
        min_updates=16,
        snapshot_every=20,
        threshold=12.0,
        warmup_updates=0,
        stateful=[schedule.rate] if stateful else [],
    )
    scale, generator, told = partial(mb.scale_hyperparameters, optimizer, decay), torch.Generator().manual_seed(0), []
    for window in range(52):
        schedule.rescale(scale)
        x = torch.randn(schedule.batch_size, 2, generator=generator) + (1e4 if window == 47 else 0)
        report = accumulator.run(x)
        verdict = guard.check(report)
        told.append((verdict.kind, verdict.back_to, schedule.batch_size, optimizer.param_groups[0]["lr"]))
        if verdict.accepted:
            mb.apply_update(optimizer, report)
            decay.step()
        schedule.advance(report.num_samples)
    assert told[46] == ("accepted", None, 16, 0.2)
    assert told[47][:3] == ("rolled_back", 40, 16)
    assert schedule.samples == 352 + 8 * 16, "the data goes on"
    assert told[-1][1:] == (None, 16, pytest.approx(0.2 * 0.5 if stateful else 0.1 * 0.5))
    with pytest.raises(ValueError, match=r"state of schedule.rate holds lr_batch_size, got samples"):
        schedule.rate.load_state_dict({"samples": 3})


# ---------------------------------------------------------------------------------------------------------------------
# several processes


@pytest.mark.distributed
def test_ranks_share_each_batch_of_a_schedule(tmp_path: Path) -> None:
    script, world = Path(schedule_ranks.__file__), 2
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    processes = [
        subprocess.Popen(
            [sys.executable, script, str(rank), str(world), str(tmp_path)],
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(world)
    ]
    try:
        outputs = [process.communicate(timeout=120) for process in processes]
    finally:
        for process in processes:
            process.kill()
    assert [process.returncode for process in processes] == [0] * world, outputs
