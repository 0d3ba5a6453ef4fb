"""`micro_batch_size="auto"`: what is tried fits, what is kept is fastest, and every window of the search is exact."""

from dataclasses import replace

import pytest
import torch
from helpers import clear, difference, gradients, reference
from torch import nn
from torch.nn import functional as F
from torch.utils.data import TensorDataset

import macrobatch as mb
from macrobatch.auto_size import AutoSize
from macrobatch.cli.run import Run
from macrobatch.cli.run_options import TrainOptions
from macrobatch.tasks import Task

Batch = tuple[torch.Tensor, torch.Tensor]
ROOM = 24  # samples


def model_and_batch(n: int = 100) -> tuple[nn.Module, Batch]:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(32, 256), nn.Tanh(), nn.Linear(256, 256), nn.Tanh(), nn.Linear(256, 1)).double()
    return model, (torch.randn(n, 32, dtype=torch.float64), torch.randn(n, 1, dtype=torch.float64))


def loss_fn(model: nn.Module, batch: Batch) -> torch.Tensor:
    return F.mse_loss(model(batch[0]), batch[1])


def budget(model: nn.Module, batch: Batch) -> int:
    """Bytes in which an AdamW step and windows of ROOM samples at once fit."""
    optimizer = torch.optim.AdamW(model.parameters(), foreach=False)
    accumulator = mb.Accumulator(model, loss_fn, micro_batch_size=ROOM)

    def train() -> None:
        for _ in range(2):
            mb.apply_update(optimizer, accumulator.run(batch))

    return mb.peak_memory(train)


def searched(accumulator: mb.Accumulator, batch: Batch, optimizer: torch.optim.Optimizer) -> tuple[list[int], int]:
    """The micro-batch sizes tried until one is found, without a failure, and the peak in bytes after planning."""
    tried = [max(accumulator.run(batch).micro_batch_sizes)]  # plans
    clear(accumulator.model)

    def search() -> None:
        while not accumulator._limit.is_found:
            report = accumulator.run(batch)
            assert report.retries == 0
            tried.append(max(report.micro_batch_sizes))
            mb.apply_update(optimizer, report)

    return tried, mb.peak_memory(search)


def test_no_window_of_the_search_needs_more_than_the_budget() -> None:
    model, batch = model_and_batch()
    max_memory = budget(*model_and_batch())
    accumulator = mb.Accumulator(model, loss_fn, micro_batch_size="auto", max_memory=max_memory)
    optimizer = torch.optim.AdamW(model.parameters(), foreach=False)
    tried, peak = searched(accumulator, batch, optimizer)
    assert peak <= max_memory
    assert max(tried) >= 20  # and it does use the room there is
    assert accumulator.micro_batch_size in tried


def test_gradients_during_the_search_are_those_of_the_full_batch() -> None:
    model, batch = model_and_batch()
    expected = reference(model, lambda: loss_fn(model, batch))
    accumulator = mb.Accumulator(model, loss_fn, micro_batch_size="auto", max_memory="50MB")
    sizes = set()
    while not accumulator._limit.is_found:
        clear(model)
        sizes.add(accumulator.run(batch).micro_batch_sizes)
        assert difference(gradients(model), expected) <= 1e-12
    assert len(sizes) >= 2


def test_a_window_of_micro_batches_is_searched_below_their_size() -> None:
    model, batch = model_and_batch()
    accumulator = mb.Accumulator(model, loss_fn, micro_batch_size="auto", max_memory="50MB")
    window = mb.Window(list(zip(batch[0].split(25), batch[1].split(25), strict=True)))
    while not accumulator._limit.is_found:
        assert max(accumulator.run(window).micro_batch_sizes) <= 25
        clear(model)


def classifier_and_images() -> tuple[nn.Module, Batch]:
    """8.4 MB of parameters, and 256 samples."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(512, 1400), nn.ReLU(), nn.Linear(1400, 980), nn.ReLU(), nn.Linear(980, 10))
    return model, (torch.randn(256, 512), torch.randint(10, (256,)))


def class_loss(model: nn.Module, batch: Batch) -> torch.Tensor:
    return F.cross_entropy(model(batch[0]), batch[1])


SMALL_BUDGET = 28_000_000  # enough for SGD without momentum, not for AdamW's two moments of 8.4 MB each


def test_auto_leaves_room_for_the_state_of_the_optimizer_that_is_given() -> None:
    model, batch = classifier_and_images()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    planned = mb.plan(model, class_loss, batch, batch_size=256, optimizer=optimizer, measure_speed=False)
    accumulator = mb.Accumulator(
        model, class_loss, micro_batch_size="auto", max_memory=SMALL_BUDGET, optimizer=optimizer
    )
    tried, peak = searched(accumulator, batch, optimizer)
    assert peak <= SMALL_BUDGET
    assert tried[0] == planned.micro_batch_size == 256
    assert planned.memory.optimizer_state == 0

    def halves() -> None:
        window = mb.Window(list(zip(batch[0].split(128), batch[1].split(128), strict=True)))
        for _ in range(2):
            mb.apply_update(optimizer, mb.Accumulator(model, class_loss).run(window))

    predicted = next(point.peak for point in planned.curve if point.micro_batch_size == 128)
    assert mb.peak_memory(halves) == pytest.approx(predicted, rel=0.01)


def outputs_of(model: nn.Module, batch: Batch) -> torch.Tensor:
    return model(batch[0])


def spread(model: nn.Module, outputs: torch.Tensor, window: mb.Window) -> torch.Tensor:
    return outputs.std(0).mean()


@pytest.mark.parametrize("size", ["auto", 32])
def test_so_do_losses_over_all_outputs_and_their_kept_graphs(size: int | str) -> None:
    model, batch = classifier_and_images()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    options = {"micro_batch_size": size, "max_memory": SMALL_BUDGET}
    made = mb.GatheredAccumulator(model, outputs_of, spread, optimizer=optimizer, **options)

    def train() -> None:
        for _ in range(4):
            report = made.run(batch)
            assert report.retries == 0
            mb.apply_update(optimizer, report)

    mb.apply_update(optimizer, made.run(batch))  # plans, and measures the loss
    assert mb.peak_memory(train) <= SMALL_BUDGET
    assert made.keep_graphs >= 1
    control = mb.GatheredAccumulator(model, outputs_of, spread, **options)
    with pytest.raises(
        ValueError,
        match=r"too small for a window of 256 samples: .* AdamW, because no .* and optimizer=, which tells wh",
    ):
        control.run(batch)


def test_a_training_run_plans_and_trains_with_its_own_optimizer() -> None:
    model, batch = classifier_and_images()
    task = Task(
        name="classes",
        model=model,
        loss_fn=class_loss,
        train=TensorDataset(*batch),
        validation=TensorDataset(*batch),
        make_optimizer=lambda model, lr: torch.optim.SGD(model.parameters(), lr=lr),
        learning_rate=0.1,
        base_batch_size=256,
        batch_size=256,
    )
    training = Run(task, TrainOptions(max_memory=SMALL_BUDGET, device="cpu", samples=512))
    assert training.plan is not None
    assert (training.plan.micro_batch_size, training.plan.optimizer) == (256, "SGD")
    assert [training.advance(window)["retries"] for window in training.windows()] == [0, 0]
    adam = replace(task, make_optimizer=lambda model, lr: torch.optim.AdamW(model.parameters(), lr=lr))
    with pytest.raises(ValueError, match=r"less than the model's own state, .* an optimizer that keeps less\.$"):
        Run(adam, TrainOptions(max_memory=SMALL_BUDGET, device="cpu", samples=512))


def test_control_without_it_adamw_is_assumed_and_the_refusal_names_the_way_out() -> None:
    model, batch = classifier_and_images()
    parameters = sum(p.nbytes for p in model.parameters())
    assert 4 * parameters > SMALL_BUDGET > 2 * parameters + batch[0].nbytes + batch[1].nbytes
    with pytest.raises(
        ValueError,
        match=r"optimizer state 16.81 MB.* AdamW, because no optimizer was given: optimizer= tells which one trains",
    ):
        mb.Accumulator(model, class_loss, micro_batch_size="auto", max_memory=SMALL_BUDGET).run(batch)


def test_an_optimizer_that_keeps_too_much_is_refused_without_the_hint_to_give_it() -> None:
    model, batch = classifier_and_images()
    pair = [
        torch.optim.Adam(model[0].parameters()),
        torch.optim.AdamW([*model[2].parameters(), *model[4].parameters()]),
    ]
    made = mb.Accumulator(model, class_loss, micro_batch_size="auto", max_memory=SMALL_BUDGET, optimizer=pair)
    with pytest.raises(ValueError, match=r"optimizer state 16.81 MB.* an optimizer that keeps less\.$"):
        made.run(batch)


def test_where_one_sample_does_not_fit_the_assumption_is_told_too() -> None:
    model, batch = model_and_batch()
    parameters = sum(p.nbytes for p in model.parameters())
    max_memory = 4 * parameters + batch[0].nbytes + batch[1].nbytes + 1000
    with pytest.raises(ValueError, match=r"one sample does not fit into .* The state is that of AdamW, because no opt"):
        mb.Accumulator(model, loss_fn, micro_batch_size="auto", max_memory=max_memory).run(batch)


def test_the_search_steps_no_optimizer_and_leaves_its_state_alone() -> None:
    model, batch = model_and_batch()
    optimizer = torch.optim.AdamW(model.parameters())
    made = mb.Accumulator(model, loss_fn, micro_batch_size="auto", max_memory="50MB", optimizer=optimizer)
    before = [p.clone() for p in model.parameters()]
    report = made.run(batch)
    assert not optimizer.state
    assert all(map(torch.equal, before, model.parameters()))
    mb.apply_update(optimizer, report)
    assert len(optimizer.state) == len(before)


def search(seconds_per_sample: dict[int, float], largest: int, n: int) -> tuple[AutoSize, list[int]]:
    """Run a search on invented times (a table by upper bounds of size) and return it with the sizes that it tried."""
    limit, tried = AutoSize(None), []
    limit.begin(largest, n)
    while not limit.is_found:
        size = limit.current
        tried.append(size)
        steps = -(-n // size)
        even = -(-n // steps)
        time_of = next(value for bound, value in sorted(seconds_per_sample.items()) if even <= bound)
        limit.laps.extend([9.0, time_of, time_of] if steps > 1 else [time_of])
        limit.window_ended(even, 0)
    return limit, tried


def test_the_fastest_size_is_kept_not_the_largest() -> None:
    limit, tried = search({4: 3.0, 8: 2.0, 16: 1.0, 64: 1.5}, largest=64, n=128)
    assert limit.current == 16
    assert tried[0] == 64


def test_where_the_largest_is_the_fastest_the_search_stops_on_the_way_down() -> None:
    limit, tried = search({1: 30.0, 2: 20.0, 4: 9.0, 8: 5.0, 16: 3.0, 32: 2.0, 64: 1.0}, largest=64, n=128)
    assert limit.current == 64
    assert min(tried) >= 16


def test_after_the_search_a_failure_halves_and_later_goes_back() -> None:
    limit, _ = search({64: 1.0}, largest=64, n=64)
    found = limit.current
    limit.failed(found)
    assert limit.current == -(-found // 2)
    for _ in range(10):
        limit.window_ended(limit.current, 0)
    assert limit.current == found


def test_batchnorm_in_train_mode_is_refused_by_name_and_in_eval_mode_accepted() -> None:
    model = nn.Sequential(nn.Linear(32, 8), nn.BatchNorm1d(8), nn.Linear(8, 1)).double()
    _, batch = model_and_batch()
    with pytest.raises(ValueError, match=r"'auto' would change the result: '1' \(BatchNorm1d, in train mode\)"):
        mb.Accumulator(model, loss_fn, micro_batch_size="auto").run(batch)
    mb.Accumulator(model.eval(), loss_fn, micro_batch_size="auto").run(batch)


@pytest.mark.parametrize(
    ("max_memory", "message"),
    [
        ("10KB", "less than the model's own state"),
        ("6 bananas", "is not a number of bytes"),
        ("0%", "above 0%"),
        (10**18, "beyond the device"),
    ],
)
def test_a_budget_that_cannot_be_kept_is_refused_before_the_first_step(max_memory: object, message: str) -> None:
    model, batch = model_and_batch()
    calls = []
    model.register_forward_hook(lambda *_: calls.append(1))
    with pytest.raises(ValueError, match=message):
        mb.Accumulator(model, loss_fn, micro_batch_size="auto", max_memory=max_memory).run(batch)
    assert all(p.grad is None for p in model.parameters())


@pytest.mark.parametrize("method", ["run", "evaluate"])
@pytest.mark.parametrize("empty", [lambda: mb.Window([]), lambda: model_and_batch(0)[1]])
def test_an_empty_batch_is_the_usual_error_and_the_search_begins_with_the_next(method: str, empty: object) -> None:
    model, batch = model_and_batch()
    accumulator = mb.Accumulator(model, loss_fn, micro_batch_size="auto", max_memory="50MB")
    for _ in range(6):
        with pytest.raises(ValueError, match=r"effective batch is empty: no rank has a sample\. Skip empty"):
            getattr(accumulator, method)(empty())
    assert not accumulator._limit.has_begun
    expected = reference(model, lambda: loss_fn(model, batch))
    accumulator.run(batch)
    assert accumulator._limit.has_begun
    assert difference(gradients(model), expected) <= 1e-12


def test_a_rank_without_samples_waits_for_the_search_and_keeps_nothing_of_the_wait() -> None:
    limit = AutoSize(None)
    for _ in range(9):
        limit.wait()
        limit.window_ended(0, 0)
    limit.begin(64, 128)
    fresh = AutoSize(None)
    fresh.begin(64, 128)
    assert limit == fresh


def test_a_budget_without_auto_is_refused() -> None:
    with pytest.raises(ValueError, match=r"max_memory='6GB' goes with micro_batch_size='auto', got 8"):
        mb.Accumulator(model_and_batch()[0], loss_fn, micro_batch_size=8, max_memory="6GB")


def test_evaluating_first_begins_the_search_too() -> None:
    model, batch = model_and_batch()
    accumulator = mb.Accumulator(model, loss_fn, micro_batch_size="auto", max_memory="50MB")
    assert abs(float(accumulator.evaluate(batch).loss) - loss_fn(model, batch).item()) < 1e-12
    accumulator.run(batch)
