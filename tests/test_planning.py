"""A plan keeps its word: training takes the bytes it says, the next size does not fit, and errors come first."""

from functools import cache
from typing import Any

import pytest
import torch
from memory_models import CASES, Case, Decoder, class_loss, conv_net, image_batch, token_batch, token_loss
from torch import Tensor, nn

import macrobatch as mb
from macrobatch import budget, fitting, speed, structure
from macrobatch.checkpointing import compare_checkpointing
from macrobatch.fitting import Account
from macrobatch.memory import MemoryMeter, physical_memory
from macrobatch.planning import Plan, plan
from macrobatch.rehearsal import Rehearsal

FAST = ["transformer", "conv net with BatchNorm"]


def planned(case: Case, max_memory: int | str, batch_size: int = 48, **options: Any) -> Plan:
    options = {"measure_speed": False} | options
    return plan(case.model(), case.loss_fn, case.batch(2), batch_size=batch_size, max_memory=max_memory, **options)


def training_peak(case: Case, micro_batch_size: int, batch_size: int) -> int:
    """The meter's peak over two updates: micro-batches of exactly that size, and one for what is left."""
    torch.manual_seed(0)
    model, batch = case.build(), case.batch(batch_size)
    optimizer = torch.optim.AdamW(model.parameters())
    accumulator = mb.Accumulator(model, case.loss_fn, batch_norm="micro_batch")
    whole, rest = divmod(batch_size, micro_batch_size)

    def train() -> None:
        for _ in range(2):
            window = mb.Window(structure.split(batch, [micro_batch_size] * whole + [rest] * (rest > 0)))
            mb.apply_update(optimizer, accumulator.run(window))

    return mb.peak_memory(train)


# ---- the plan is kept


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_two_updates_of_training_take_what_the_plan_says(case: Case) -> None:
    one, whole = planned(case, "4GB", batch_size=1).peak, planned(case, "4GB").peak
    found = planned(case, one + (whole - one) // 4)
    assert 2 <= found.micro_batch_size <= 24  # several micro-batches, the last one smaller
    peak = training_peak(case, found.micro_batch_size, 48)
    assert found.peak == pytest.approx(peak, rel=1e-3)
    assert peak <= found.peak <= found.max_memory
    assert (found.method, found.is_exact, found.num_passes <= 4) == ("fake", True, True)


BUDGETS = 12  # for each of two models; three of them here, the others in `make check`
SHARES = [pytest.param(share, marks=[pytest.mark.slow] if share % 4 else []) for share in range(BUDGETS)]


@cache
def peak_of_batch(name: str, batch_size: int) -> int:
    return planned(CASES[name], "4GB", batch_size).peak


@pytest.mark.parametrize("share", SHARES)
@pytest.mark.parametrize("name", FAST)
def test_the_planned_size_trains_within_the_budget_and_one_sample_more_does_not(name: str, share: int) -> None:
    case, batch_size = CASES[name], 64
    low, high = peak_of_batch(name, 4), peak_of_batch(name, 30)
    found = planned(case, low + (high - low) * share // BUDGETS + 12_345, batch_size)
    assert training_peak(case, found.micro_batch_size, batch_size) <= found.max_memory
    assert training_peak(case, found.micro_batch_size + 1, batch_size) > found.max_memory


def test_the_budget_of_a_plan_is_enough_under_a_simulated_limit_and_a_byte_less_is_not() -> None:
    case = CASES["transformer"]
    exact = planned(case, "12MB").peak
    again = planned(case, exact)
    assert (again.peak, again.micro_batch_size) == (exact, planned(case, "12MB").micro_batch_size)
    assert planned(case, exact - 1).micro_batch_size == again.micro_batch_size - 1
    model, batch = case.build(), case.batch(48)
    optimizer = torch.optim.AdamW(model.parameters())
    accumulator = mb.Accumulator(model, case.loss_fn, micro_batch_size=again.micro_batch_size, batch_norm="micro_batch")
    with mb.memory_limit(exact):
        for _ in range(2):
            report = accumulator.run(batch)
            mb.apply_update(optimizer, report)
            assert report.retries == 0


def test_a_whole_batch_that_fits_is_one_micro_batch_and_takes_two_passes() -> None:
    found = planned(CASES["transformer"], "1GB", batch_size=20)
    assert (found.micro_batch_size, found.accumulation_steps, found.num_passes, found.is_exact) == (20, 1, 2, True)
    assert planned(CASES["transformer"], "1GB", batch_size=1).micro_batch_size == 1


def test_twelve_layers_take_four_passes_and_no_number() -> None:
    model, calls = Decoder(layers=12, width=64), [0]

    def count(*_: Any) -> None:
        calls[0] += 1

    model.register_forward_pre_hook(count)
    with MemoryMeter() as meter:
        found = plan(model, token_loss, token_batch(2), batch_size=512, max_memory="100MB", measure_speed=False)
        assert meter.peak < 10**5
    assert calls == [found.num_passes] == [4]
    assert (found.is_exact, found.checkpointing.num_blocks) == (True, 12)
    assert 1 < found.micro_batch_size < 512


def test_the_kinds_of_memory_add_up_and_are_what_they_are_called() -> None:
    model = nn.Linear(1000, 10)  # 40,040 bytes
    found = plan(
        model,
        lambda m, x: (m(x).sum(), len(x)),
        torch.zeros(3, 1000),
        batch_size=8,
        max_memory="10MB",
        measure_speed=False,
    )
    memory = found.memory
    assert (memory.parameters, memory.gradients, memory.optimizer_state) == (40_040, 40_040, 2 * 40_040 + 8)
    assert memory.inputs == 8 * 4000
    assert memory.peak == found.peak == 3 * 40_040 + 40_040 + 8 + memory.inputs + memory.activations
    momentum = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    with_sgd = plan(model, lambda m, x: (m(x).sum(), len(x)), torch.zeros(3, 1000), batch_size=8, optimizer=momentum)
    assert (with_sgd.memory.optimizer_state, with_sgd.optimizer) == (40_040, "SGD")
    assert "AdamW, because no optimizer was given" in found.optimizer


def test_the_step_of_the_optimizer_counts_where_it_takes_more_than_forward_and_backward() -> None:
    model, x = nn.Linear(1000, 100), torch.zeros(2, 1000)
    optimizer = torch.optim.AdamW(model.parameters(), foreach=True)  # makes a copy of all parameters at once
    found = plan(model, lambda m, x: (m(x).sum(), len(x)), x, batch_size=4, optimizer=optimizer, measure_speed=False)
    assert found.memory.activations >= 400_400  # far above the outputs, 400 bytes for each sample

    def train() -> None:
        mb.apply_update(optimizer, mb.Accumulator(model, lambda m, x: (m(x).sum(), len(x)), micro_batch_size=2).run(x))

    assert found.peak == pytest.approx(mb.peak_memory(train), rel=0.01)


# ---- how fast


def test_the_fastest_of_a_few_measured_sizes_is_named_and_nothing_is_left_behind() -> None:
    case = CASES["conv net with BatchNorm"]
    before = {name: value.clone() for name, value in case.model().state_dict().items()}
    random_state = torch.get_rng_state()
    found = planned(case, "8MB", measure_speed=True)
    measured = {p.micro_batch_size: p.seconds_per_sample for p in found.curve if p.seconds_per_sample is not None}
    assert len(measured) >= 3
    assert max(measured) <= found.micro_batch_size
    assert found.fastest is not None
    assert found.fastest.micro_batch_size == min(measured, key=lambda b: measured[b])
    assert found.seconds_per_update == pytest.approx(48 * min(measured.values()))
    assert found.largest.seconds_per_update is not None
    assert found.largest.seconds_per_update >= found.fastest.seconds_per_update
    assert found.fastest.memory.peak <= found.peak
    assert all(torch.equal(value, before[name]) for name, value in case.model().state_dict().items())
    assert torch.equal(torch.get_rng_state(), random_state)
    assert all(p.grad is None for p in case.model().parameters())


def test_without_measuring_nothing_real_is_run_and_no_size_is_called_fastest() -> None:
    found = planned(CASES["transformer"], "8MB")
    assert (found.fastest, found.seconds_per_update, found.largest.seconds_per_update) == (None, None, None)
    assert all(point.seconds_per_sample is None for point in found.curve)


def test_the_curve_rises_with_the_size_and_passes_through_the_plan() -> None:
    found = planned(CASES["transformer"], "8MB")
    sizes, peaks = [p.micro_batch_size for p in found.curve], [p.peak for p in found.curve]
    assert sizes == sorted({1, 2, 4, 8, 16, 32, found.micro_batch_size})
    assert peaks == sorted(peaks)
    assert dict(zip(sizes, peaks, strict=True))[found.micro_batch_size] == found.peak


def test_measuring_ends_before_a_size_that_would_take_too_long() -> None:
    clock, asked = [0.0], []

    def seconds(size: int) -> float:
        asked.append(size)
        clock[0] += size
        return float(size)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(speed.time, "perf_counter", lambda: clock[0])
        found = speed.measure(seconds, [5, 10, 20], limit_s=16)
    assert asked == [5, 10]
    assert found == {5: 5.0, 10: 10.0}


# ---- checkpointing or smaller micro-batches


@pytest.mark.parametrize(("alpha", "pays"), [(0.0, False), (0.5, False), (4.0, True)])
def test_checkpointing_pays_only_where_what_is_fixed_in_a_micro_batch_outweighs_a_third_more_computing(
    alpha: float, pays: bool
) -> None:
    rehearsal = Rehearsal(Decoder(layers=6), token_loss, token_batch(2))
    account = Account(rehearsal, [], 64, 11_000_000)
    fit = account.search(check=False)
    b, beta = fit.fit.size, 1.0
    seconds = {size: alpha + beta * size for size in range(1, b + 1)}
    found = compare_checkpointing(account, fit.traces, b, seconds)
    assert found.micro_batch_size is not None
    b_checkpointed = speed.even_size(64, found.micro_batch_size)
    assert b_checkpointed >= 2 * b
    assert (found.pays, alpha * (1 / b - 1 / b_checkpointed) > 1 / 3) == (pays, pays)  # the rule with h = alpha / beta
    assert found.seconds_per_sample == pytest.approx(4 / 3 + alpha / b_checkpointed)
    assert found.seconds_per_sample_without == pytest.approx(1 + alpha / b)
    expected = "checkpointing is faster" if pays else "smaller micro-batches are faster"
    assert found.verdict.startswith(expected)
    assert "ms per sample against" in found.verdict


@pytest.mark.parametrize("checkpointed", [False, True])
def test_the_size_that_checkpointing_is_said_to_allow_is_near_the_one_it_allows(checkpointed: bool) -> None:
    budget = "6MB"
    plain = plan(Decoder(layers=4), token_loss, token_batch(2), batch_size=64, max_memory=budget, measure_speed=False)
    model = Decoder(layers=4, reentrant=False)
    truth = plan(model, token_loss, token_batch(2), batch_size=64, max_memory=budget, measure_speed=False)
    assert plain.checkpointing.micro_batch_size is not None
    assert truth.micro_batch_size > 1.5 * plain.micro_batch_size
    assert plain.checkpointing.micro_batch_size == pytest.approx(truth.micro_batch_size, rel=0.1)


def test_where_there_is_nothing_to_compare_the_plan_says_why() -> None:
    verdicts = {
        "no list or sequence of layers of one class": planned(CASES["conv net with BatchNorm"], "4MB"),
        "checkpointed already": planned(CASES["transformer, reentrant checkpointing"], "8MB"),
        "not needed: the whole batch fits": planned(CASES["transformer"], "1GB"),
        "the speed was not measured": planned(CASES["transformer"], "8MB"),
    }
    for words, found in verdicts.items():
        assert words in found.checkpointing.verdict
        assert found.checkpointing.pays is None


# ---- models that fake tensors cannot tell


def looks_at_its_loss(model: Any, batch: Any) -> tuple[Tensor, int]:
    loss_sum, count = token_loss(model, batch)
    return (loss_sum if loss_sum.item() >= 0 else -loss_sum), count


def test_a_model_that_looks_at_its_numbers_is_measured_within_the_budget_and_the_plan_says_why() -> None:
    budget, sizes = 8_000_000, []

    def loss_fn(model: Any, batch: Any) -> tuple[Tensor, int]:
        sizes.append(len(batch["tokens"]))
        return looks_at_its_loss(model, batch)

    with MemoryMeter() as meter:
        found = plan(Decoder(), loss_fn, token_batch(2), batch_size=48, max_memory=budget, measure_speed=False)
    assert found.method == "probes"
    assert "does not run on fake tensors: DataDependentOutputException, aten._local_scalar_dense" in found.reason
    assert sizes[1] <= 2  # the first real one, after the fake one: small sizes first
    assert meter.peak <= budget
    truth = planned(CASES["transformer"], budget)
    assert (found.micro_batch_size, found.is_exact) == (truth.micro_batch_size, True)
    assert found.peak == pytest.approx(truth.peak, rel=1e-3)


def test_an_lstm_is_measured_because_fake_tensors_take_another_kernel() -> None:
    lstm = nn.LSTM(16, 32, batch_first=True)
    found = plan(
        lstm,
        lambda model, x: (model(x)[0].sum(), len(x)),
        torch.zeros(2, 50, 16),
        batch_size=64,
        max_memory="2MB",
        measure_speed=False,
    )
    assert found.method == "probes"
    assert "nn.LSTM runs as one operation on a CPU" in found.reason
    assert 1 < found.micro_batch_size < 64


class TakesAShortcut(nn.Module):
    """Needs more on real tensors than on fake ones, as a kernel might."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(64, 64)

    def forward(self, x: Tensor) -> Tensor:
        y = self.layer(x)
        for _ in range(3 if type(x) is Tensor else 1):
            y = y.exp()
        return y


@pytest.mark.parametrize("checks", [True, False])
def test_fake_runs_that_a_real_micro_batch_contradicts_are_not_believed(checks: bool) -> None:
    found = plan(
        TakesAShortcut(),
        lambda model, x: (model(x).sum(), len(x)),
        torch.zeros(2, 64),
        batch_size=512,
        max_memory="600KB",
        measure_speed=checks,
    )
    assert found.method == ("probes" if checks else "fake")
    assert ("and a real run took" in found.reason) == checks


# ---- what else a plan needs to know


def test_batches_may_be_nested_cut_by_a_function_and_smaller_or_larger_than_needed() -> None:
    class Pairs:  # of no known structure
        def __init__(self, x: Tensor) -> None:
            self.x = x

        def to(self, device: torch.device) -> "Pairs":
            return self

    def loss_fn(model: Any, batch: Any) -> tuple[Tensor, int]:
        return model(batch.x).square().sum(), len(batch.x)

    found = plan(
        nn.Linear(8, 8),
        loss_fn,
        Pairs(torch.zeros(6, 8)),
        batch_size=100,
        cut=lambda batch, start, stop: Pairs(batch.x[start:stop]),
        num_samples=lambda batch: len(batch.x),
        measure_speed=False,
    )
    assert found.micro_batch_size == 6  # no more samples can be made than the sample batch has
    nested = {"x": (torch.zeros(3, 8), {"names": ["a", "b", "c"], "flag": True})}
    for max_memory in ("2KB", "20KB"):
        found = plan(
            nn.Linear(8, 8),
            lambda model, batch: (model(batch["x"][0]).square().sum(), len(batch["x"][1]["names"])),
            nested,
            batch_size=10,
            max_memory=max_memory,
            measure_speed=False,
        )
        assert found.method == "fake"


def test_precision_frozen_parts_and_the_dtype_of_gradients_are_those_of_the_accumulator() -> None:
    def at(**options: Any) -> fitting.Memory:
        return planned(CASES["transformer"], "1GB", batch_size=16, **options).memory

    plain, autocast = at(), at(autocast=torch.bfloat16)
    assert autocast.activations < plain.activations
    model = CASES["transformer"].model()
    frozen = at(frozen=[model.blocks])  # type: ignore[attr-defined]
    assert frozen.gradients < 0.5 * plain.gradients
    assert frozen.optimizer_state < 0.5 * plain.optimizer_state
    assert all(p.requires_grad for p in model.parameters())
    half = Decoder().bfloat16()
    sums = [
        plan(half, token_loss, token_batch(2), batch_size=8, grad_dtype=dtype, measure_speed=False).memory.gradients
        for dtype in (None, torch.bfloat16)
    ]
    assert sums[0] == 2 * sums[1] == plain.gradients


@pytest.mark.gpu
def test_on_a_gpu_a_plan_is_verified_by_a_real_step() -> None:
    found = plan(Decoder().cuda(), token_loss, token_batch(2), batch_size=256, max_memory="500MB")
    assert found.device.type == "cuda"
    assert found.peak <= 500_000_000
    assert found.fastest is not None


# ---- budgets


def test_a_budget_is_bytes_a_size_a_share_or_all_that_is_available(monkeypatch: pytest.MonkeyPatch) -> None:
    cpu = torch.device("cpu")
    monkeypatch.setattr(budget, "_system_available", lambda: 10**9)
    monkeypatch.setattr(budget, "_container_limits", lambda: iter(()))
    assert budget.budget_bytes(12345, cpu) == 12345
    assert budget.budget_bytes("1.5MB", cpu) == 1_500_000
    assert budget.budget_bytes("80%", cpu, held=500) == 800_000_400  # what the model holds is training's already
    assert budget.budget_bytes(None, cpu, held=500) == 10**9 + 500
    monkeypatch.setattr(budget, "_container_limits", lambda: iter([(3 * 10**8, 10**8)]))
    assert budget.budget_bytes(None, cpu) == 2 * 10**8  # a container's own limit is tighter
    with pytest.raises(ValueError, match=r"beyond the device: cpu has 300\.00 MB"):
        budget.budget_bytes("400MB", cpu)


def test_available_memory_is_part_of_what_the_machine_has() -> None:
    available, total = budget.available_memory(torch.device("cpu")), physical_memory()
    assert total is not None
    assert 0 < available <= total


# ---- errors, before any real step


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"batch_size": 0}, "batch_size must be a whole number of samples, at least 1, got 0"),
        ({"batch_size": -4}, "at least 1, got -4"),
        ({"batch_size": 2.5}, r"whole number of samples, at least 1, got 2\.5"),
        ({"max_memory": "6 parsecs"}, "'6 parsecs' is not a number of bytes"),
        ({"max_memory": "6G"}, "'6G' is not a number of bytes"),
        ({"max_memory": 0}, "at least 1 byte, got 0"),
        ({"max_memory": "0%"}, "above 0% and at most 100%"),
        ({"max_memory": "120%"}, "above 0% and at most 100%"),
        ({"max_memory": "900TB"}, r"900\.00 TB is beyond the device: cpu has"),
        ({"max_memory": "1MB"}, r"1\.00 MB is less than the model's own state, 1\.\d\d MB \(parameters .*, gradients"),
        (
            {"max_memory": "1.9MB"},
            r"one sample does not fit into max_memory=1\.90 MB: it needs \d\.\d\d MB \(parameters",
        ),
        ({"max_memory": "1.9MB"}, "recomputing activations .*lower precision .*a larger budget"),
        ({"device": "cuda"}, "torch sees no CUDA device here"),
        ({"device": "xpu"}, "plans are made for cpu and cuda devices, got xpu"),
    ],
)
def test_what_cannot_be_planned_is_an_error_before_any_real_step(options: dict[str, Any], message: str) -> None:
    if options.get("device") == "cuda" and torch.cuda.is_available():
        pytest.skip("there is a CUDA device")
    real: list[bool] = []

    def loss_fn(model: Any, batch: Any) -> tuple[Tensor, int]:
        real.append(type(batch["tokens"]) is Tensor)
        return token_loss(model, batch)

    with pytest.raises(ValueError, match=message):
        plan(Decoder(), loss_fn, token_batch(2), **{"batch_size": 16, "max_memory": "1GB"} | options)
    assert not any(real)


def test_a_sample_that_does_not_fit_is_told_what_checkpointing_would_do() -> None:
    one = planned(CASES["transformer"], "1GB", batch_size=1).peak
    with pytest.raises(ValueError, match="With its 2 blocks checkpointed about 1 would fit"):
        planned(CASES["transformer"], one - 1000, batch_size=1)
    with pytest.raises(ValueError, match="does not fit") as refusal:
        planned(CASES["conv net with BatchNorm"], planned(CASES["conv net with BatchNorm"], "1GB", 1).peak - 1000, 1)
    assert "blocks checkpointed" not in str(refusal.value)


def test_a_model_that_can_only_be_measured_and_does_not_fit_is_an_error_too() -> None:
    with pytest.raises(ValueError, match=r"does not fit into max_memory=2\.00 MB: a real micro-batch of one ran out"):
        plan(Decoder(), looks_at_its_loss, token_batch(2), batch_size=8, max_memory="2MB", measure_speed=False)


def test_an_error_of_the_users_own_comes_through_as_it_is() -> None:
    with pytest.raises(ValueError, match="Expected more than 1 value per channel when training"):
        plan(
            nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4)),
            lambda m, x: (m(x).sum(), 1),
            torch.zeros(2, 4),
            batch_size=1,
        )
    with pytest.raises(RuntimeError, match="mat1 and mat2 shapes cannot be multiplied"):
        plan(nn.Linear(5, 5), lambda m, x: (m(x).sum(), len(x)), torch.zeros(2, 4), batch_size=4)
    with pytest.raises(ValueError, match="differ in their number of samples"):
        plan(conv_net(), class_loss, image_batch(2) | {"classes": torch.zeros(3)}, batch_size=4)
