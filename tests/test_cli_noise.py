"""`macrobatch noise`: the noise scale that is known, a recommendation that follows from it, and branches as by hand."""

import io
import json
import math
import warnings
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from noise_tasks import true_noise_scale
from rich.console import Console
from typer.testing import CliRunner

from macrobatch import NoiseEstimate, gain
from macrobatch.batch_tradeoff import fastest_batch_size
from macrobatch.cli import app
from macrobatch.cli.branched import Brancher, BranchOptions
from macrobatch.cli.branched_words import branch_words
from macrobatch.cli.branches import Branch, Branches
from macrobatch.cli.costs import Costs, time_sizes
from macrobatch.cli.interrupt import CtrlC
from macrobatch.cli.noise import Findings
from macrobatch.cli.noise_words import CLOSE, recommendation
from macrobatch.cli.run import Run
from macrobatch.cli.run_options import TrainOptions
from macrobatch.tasks import Task, load_task

TASK = ["--task", "noise_tasks:regression"]
STILL = ["--lr", "1e-9"]  # parameters that stay where they are, so that the noise scale is one number


def run(*arguments: str | float | Path, code: int = 0) -> str:
    result = CliRunner().invoke(app, ["noise", *map(str, arguments)])
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    assert result.exit_code == code, result.output
    return result.output


def read(folder: Path, name: str = "noise.json") -> dict[str, Any]:
    found: dict[str, Any] = json.loads((folder / name).read_text(), parse_constant=pytest.fail)
    return found


def weight_of(folder: Path) -> torch.Tensor:
    from safetensors.torch import load_file

    return load_file(folder / "model.safetensors")["weight"].double()


# ---- the noise scale


def test_the_noise_scale_is_that_of_every_samples_gradient(tmp_path: Path) -> None:
    said = run(*TASK, *STILL, "--epochs", 8, "--output", tmp_path / "run")
    found, task = read(tmp_path / "run"), load_task("noise_tasks:regression")
    true = true_noise_scale(task, next(task.model.parameters()).detach())
    assert found["low"] < true < found["high"]
    assert found["noise_scale"] == pytest.approx(true, rel=0.15)
    elsewhere = true_noise_scale(task, torch.tensor([[0.9, -0.9, 0.4, 1.9]]))
    assert not found["low"] < elsewhere < found["high"]  # the control: near the solution it is another number
    rows = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert rows[-1]["noise_scale"] == found["noise_scale"]
    assert all(row["update_seconds"] < row["seconds"] for row in rows)
    assert {row["micro_batches"] for row in rows} == {8}
    for name in ("noise", "loss"):
        assert (tmp_path / "run" / f"{name}.png").read_bytes().startswith(b"\x89PNG")
        assert "</svg>" in (tmp_path / "run" / f"{name}.svg").read_text()
    assert "note: the micro-batch size is 4, not auto: the noise scale is measured between the micro-batches" in said
    assert all(line[:60] in said.replace("\n", " ") for line in found["words"])


def test_an_update_of_one_micro_batch_is_measured_sample_by_sample(tmp_path: Path) -> None:
    options = [*TASK, *STILL, "--batch-size", 16, "--micro-batch-size", 16]
    said = run(*options, "--output", tmp_path / "refused", code=2)
    assert "an update of 16 samples is one: give a size below 16, or --per-example" in " ".join(said.split())
    assert not (tmp_path / "refused").exists()
    run(*options, "--per-example", "--epochs", 8, "--output", tmp_path / "run")
    found, task = read(tmp_path / "run"), load_task("noise_tasks:regression")
    true = true_noise_scale(task, next(task.model.parameters()).detach())
    assert found["low"] < true < found["high"]


@pytest.mark.slow
def test_measuring_sample_by_sample_lets_no_warning_of_torch_through(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    small = [f"--task-option={name}" for name in ("d_model=16", "num_layers=1", "context=16")]
    options = ["--task", "code-lm", *small, "--batch-size", 4, "--micro-batch-size", 4, "--per-example", "--steps", 2]
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        said = run(*options, "--device", "cpu", "--output", tmp_path / "run")
    assert not [each for each in seen if "performance drop" in str(each.message)]
    assert "performance drop" not in said + "".join(capfd.readouterr())


def test_numbers_of_the_recommendation_are_those_of_the_formulas(tmp_path: Path) -> None:
    run(*TASK, *STILL, "--epochs", 2, "--output", tmp_path / "run")
    found = read(tmp_path / "run")
    scale, b = found["noise_scale"], found["batch_size"]
    assert b == 32
    assert found["efficiency"] == pytest.approx(1 / (1 + b / scale))
    assert found["gain_of_twice"] == pytest.approx(gain(scale, b, 2 * b))
    fast = found["fastest"]
    star = math.sqrt(fast["seconds_per_update"] * scale / fast["seconds_per_sample"])
    assert fast["batch_size"] == pytest.approx(max(star, 1.0))
    assert fast["low"] <= fast["batch_size"] <= fast["high"]
    largest, timed = found["largest_micro_batch"], [int(size) for size in found["seconds_by_micro_batch"]]
    assert largest >= 32
    assert timed == sorted({*(2**j for j in range(largest.bit_length())), largest})  # at what is recommended, too
    assert fast["verdict"].startswith("do not accumulate" if star <= largest else "accumulate")
    assert found["slowdown_as_run"] >= 1 <= found["slowdown"]


@pytest.mark.parametrize(
    ("alpha", "beta", "update", "noise_scale"),
    [
        (5.0, 0.05, 2.0, 10.0),  # within a micro-batch of 64
        (50.0, 0.05, 2.0, 100.0),  # at the kink: a sample more would take a second micro-batch
        (5.0, 0.05, 100.0, 1000.0),  # beyond
    ],
)
def test_the_fastest_batch_is_the_one_that_trains_fastest_at_its_own_cost(
    alpha: float, beta: float, update: float, noise_scale: float
) -> None:
    seconds = {2**j: alpha + beta * 2**j for j in range(7)}
    costs = Costs(seconds, update, 64)
    fast = costs.fastest(noise_scale, noise_scale / 2, noise_scale * 2)

    def time(b: float, scale: float) -> float:
        gradient = alpha + beta * b if b <= 64 else b * (alpha / 64 + beta)
        return (1 + scale / b) * (update + gradient)

    def best(scale: float) -> int:
        return min(range(1, 20_000), key=lambda b: time(b, scale))

    assert fast.batch_size == pytest.approx(best(noise_scale), abs=1)
    assert (fast.low, fast.high) == pytest.approx((best(noise_scale / 2), best(noise_scale * 2)), abs=1)
    assert fast.accumulate == (best(noise_scale) > 64)
    assert costs.of_gradient(48) == pytest.approx(alpha + 48 * beta)
    assert costs.of_gradient(128) == pytest.approx(2 * seconds[64])
    if alpha == 5.0 and update == 2.0:  # the control: as if a sample cost what it does in micro-batches of 8
        by_eights = fastest_batch_size(
            noise_scale, seconds_per_sample=seconds[8] / 8, seconds_per_update=update, largest_micro_batch=64
        )
        assert by_eights.batch_size < 0.2 * fast.batch_size


def test_times_that_hide_the_cost_of_a_sample_leave_the_interval_open_up_to_what_fits() -> None:
    flat = Costs({1: 1.00, 2: 0.97, 4: 1.03, 8: 0.98, 16: 1.02, 32: 0.99, 64: 1.0}, 0.1, 64)
    fast = flat.fastest(5.0, 4.0, 6.0)
    assert fast.low < 64
    assert fast.high == pytest.approx(64)
    assert not fast.accumulate
    clear = Costs({2**j: 1.0 + 0.5 * 2**j for j in range(7)}, 0.1, 64)  # the control
    assert clear.fastest(5.0, 4.0, 6.0).high < 5


def test_timing_other_sizes_leaves_the_run_as_it_was() -> None:
    trained = Run(load_task("noise_tasks:regression"), TrainOptions(batch_size=8, updates=3, noise="measure"))
    for window in trained.windows():
        trained.advance(window)
    before = {name: value.clone() for name, value in trained.model.state_dict().items()}
    random, gradients = torch.get_rng_state(), [p.grad for p in trained.model.parameters()]
    assert list(time_sizes(trained, [1, 2, 4])) == [1, 2, 4]
    assert all(torch.equal(value, before[name]) for name, value in trained.model.state_dict().items())
    assert torch.equal(random, torch.get_rng_state())
    assert all(p.grad is g for p, g in zip(trained.model.parameters(), gradients, strict=True))


def findings(
    noise_scale: float,
    *,
    seconds_per_update: float = 1e-3,
    largest: int = 64,
    batch_size: int = 128,
    as_run: float = 1e-3,
) -> Findings:
    estimate = NoiseEstimate(noise_scale, noise_scale / 2, noise_scale * 2, 0.95, 1.0, 1.0, 100, 0.0)
    costs = Costs({b: 1e-3 * b for b in (1, 8, 16, largest)}, seconds_per_update, largest)
    fast = costs.fastest(noise_scale, noise_scale / 2, noise_scale * 2)
    return Findings(estimate, batch_size, 16, largest, False, fast, costs, as_run)


def test_the_words_follow_from_the_numbers() -> None:
    few = " ".join(recommendation(findings(100.0)))
    assert "do not accumulate: 10 samples" in few
    assert "Training at 128 takes 1.90 times as long to the same loss" in few
    assert "An update of 256 is worth 1.28 of 128, one of 64 is worth 0.695" in few
    assert "timed in micro-batches of 1 to 64, a sample takes 1.00 ms around the size that trains fastest" in few
    assert "(between 7 and 14) train fastest, and 64 fit into a micro-batch; any from 4 to 28 is within 10%" in few
    assert [j for j in range(1, 99) if (1 + j) * (1 + 100 / j) <= CLOSE * (1 + 10) ** 2] == list(range(4, 29))
    small = " ".join(recommendation(findings(100.0, as_run=3e-3)))
    assert "with 64 in a micro-batch, and in those of 16, as here, takes 5.67 times as long" in small
    many = " ".join(recommendation(findings(1e4, seconds_per_update=10.0)))
    assert "accumulate: 10000 samples" in many
    assert "do not accumulate" not in many
    best = " ".join(recommendation(findings(16384.0)))
    assert "Training at 128 is as fast" in best
    hidden = " ".join(recommendation(findings(math.inf)))
    assert "no gradient was seen above the noise" in hidden
    assert "BatchNorm" not in few
    coupled = " ".join(recommendation(replace(findings(100.0), is_coupled=True)))
    assert "its noise scale is not that of independent samples" in coupled
    assert "Merrill et al. 2025" in few
    assert "--branched" in few


def test_what_cannot_be_measured_is_refused_before_any_work(tmp_path: Path) -> None:
    digits = ["--task", "digits", "--task-option", "width=2"]
    two = ["--branched", "--factors", "2", "--task-option"]
    for options, message in [
        ([*TASK, "--batch-size", 1], "one of 1 sample has only one: give a --batch-size of at least 2"),
        ([*TASK, "--micro-batch-size", 0], "a whole number of at least 1 is needed; got 0"),
        ([*digits, "--per-example"], "--per-example takes the samples one by one, and '1' (BatchNorm2d) normalises"),
        ([*digits, "--batch-size", 16], "give --micro-batch-size, a number below 16"),
        ([*TASK, "--repeats", 2], "--repeats: only for branches; give --branched too"),
        ([*TASK, "--branched", "--factors", "0,2"], "whole numbers above 1 are needed, as in 2,4,8; got '0,2'"),
        ([*TASK, "--branched", "--factors", "2,3"], "3 is not a multiple of 2"),
        ([*TASK, "--branched"], "--branched takes 2048 samples, whole batches of 256 (8 times 32), and regression has"),
        ([*TASK, *two, "optimizer=rprop"], "error: --branched: no rule carries the rate of Rprop to another batch"),
        ([*TASK, *two, "optimizer=unknown"], "error: no rule is known for the optimizer Unknown"),
    ]:  # fmt: skip
        said = run(*options, "--output", tmp_path / "run", code=2)
        assert message in " ".join(said.replace("│", " ").split())
        assert "Traceback" not in said
        assert not (tmp_path / "run").exists()


def unprepared() -> Task:
    """A task whose metric fails, and whose data would take their time."""

    def metric(model: Any, micro_batch: Any) -> Any:
        raise KeyError("no such column")

    def prepare(tell: Any) -> None:
        raise AssertionError("prepared before the metric was tried")

    return replace(load_task("noise_tasks:regression"), metrics={"late": metric}, prepare=prepare)


def test_metrics_are_tried_before_data_are_prepared(tmp_path: Path) -> None:
    said = run("--task", "test_cli_noise:unprepared", "--output", tmp_path / "run", code=2)
    assert "the metric 'late', called as metric(model, micro_batch), raised KeyError: 'no such column'" in said
    assert not (tmp_path / "run").exists()


def test_data_are_prepared_once_before_training(tmp_path: Path) -> None:
    PREPARED.clear()
    run("--task", "test_cli_noise:prepared", "--batch-size", 16, "--steps", 4, "--output", tmp_path / "run")
    assert PREPARED == [1]


PREPARED: list[int] = []


def prepared() -> Task:
    return replace(load_task("noise_tasks:regression"), prepare=lambda tell: PREPARED.append(1))


def test_what_a_tasks_own_code_raises_is_a_line_here_too(tmp_path: Path) -> None:
    said = run("--task", "test_cli_noise:late_failure", "--batch-size", 16, "--output", tmp_path / "run", code=2)
    assert "error: the task test_cli_noise:late_failure raised ZeroDivisionError: " in said
    assert f"({__file__}, line " in said
    assert "Traceback" in (tmp_path / "run" / "traceback.txt").read_text()


def late_failure() -> Task:
    task, calls = load_task("noise_tasks:regression"), [5]

    def loss(model: Any, micro_batch: Any) -> Any:
        calls[0] -= 1
        return task.loss_fn(model, micro_batch) if 1 / calls[0] else None

    return replace(task, loss_fn=loss)


def test_a_run_without_an_applied_update_has_nothing_to_say_of_noise(tmp_path: Path) -> None:
    said = run(
        "--task", "test_cli_noise:nowhere", "--batch-size", 16, "--steps", 3, "--output", tmp_path / "run", code=2
    )
    assert "error: no update was applied: 3 updates skipped, from update 1 on" in said
    assert "noise scale" not in said.partition("no update was applied")[2]


def nowhere() -> Task:
    task = load_task("noise_tasks:regression")
    return replace(task, loss_fn=lambda model, pair: ((model(pair[0]) * math.nan).sum(), len(pair[0])))


def test_watching_the_noise_takes_at_most_the_gradients_more_than_predicted(tmp_path: Path) -> None:
    options = ["--task", "digits", "--micro-batch-size", "8", "--steps", "2", "--device", "cpu"]
    assert CliRunner().invoke(app, ["train", *options, "--output", str(tmp_path / "run")]).exit_code == 0
    found = read(tmp_path / "run", "summary.json")
    more = found["memory_measured_bytes"] - found["memory_predicted_bytes"]
    assert found["noise"] is not None
    assert 0 < more <= found["memory_predicted"]["gradients"]


# ---- branches


def branch_by_hand(start: torch.Tensor, k: int, rate: float, repeat: int) -> float:
    """The smoothed loss at the end of a branch of plain SGD, in float64: batches of 8 k, 128 samples, bins of 32."""
    task = load_task("noise_tasks:regression")
    generator = torch.Generator().manual_seed(1000 + repeat)
    order = torch.randperm(512, generator=generator)[:128].tolist()
    weight, losses = start, []
    for begin in range(0, 128, 8 * k):
        x, y = (each.double() for each in task.collate([task.train[i] for i in order[begin : begin + 8 * k]]))
        residual = x @ weight.T - y
        losses.append(float(residual.square().mean() / 2))
        weight = weight - rate * (residual * x).mean(0, keepdim=True)
    bins = torch.tensor(losses).reshape(-1, 4 // k).mean(1).tolist()
    smoothed = bins[0]
    for each in bins[1:]:
        smoothed = (smoothed + each) / 2
    return smoothed


def test_branches_are_training_by_hand_from_where_the_run_has_come_to(tmp_path: Path) -> None:
    options = ["--branched", "--factors", "2,4", "--branch-samples", 100, "--repeats", 2, "--tolerance", 0.05]
    said = run(*TASK, "--batch-size", 8, "--lr", 0.02, "--steps", 20, *options, "--output", tmp_path / "run")
    found = read(tmp_path / "run", "branched.json")
    assert (found["samples"], found["rule"], found["at_samples"]) == (128, "linear", 160)
    start = weight_of(tmp_path / "run")
    for branch in found["branches"]:
        k = branch["factor"]
        assert (branch["batch_size"], branch["updates"]) == (8 * k, 16 // k)
        assert branch["learning_rate"] == pytest.approx(0.02 * k)
        by_hand = [branch_by_hand(start, k, 0.02 * k, repeat) for repeat in (0, 1)]
        assert branch["losses"] == pytest.approx(by_hand, rel=1e-5)
    unscaled = branch_by_hand(start, 4, 0.02, 0)
    assert found["branches"][-1]["losses"][0] != pytest.approx(unscaled, rel=1e-3)  # the control
    assert (
        f"The critical batch after 160 samples of training is {'at ' if found['critical_factor'] != 2 else ''}" in said
    )
    assert "branches from here: batches of 8, 16, 32, 128 samples each, 2 times: 768 samples in all" in said
    assert (tmp_path / "run" / "branched.png").read_bytes().startswith(b"\x89PNG")


def test_adam_branches_have_the_square_root_and_leave_the_run_as_it_was() -> None:
    task = load_task("noise_tasks:regression", optimizer="adamw")
    options = TrainOptions(batch_size=8, updates=5, noise="measure", learning_rate=0.01)
    trained = Run(task, options)
    for window in trained.windows():
        trained.advance(window)
    before = {name: value.clone() for name, value in trained.model.state_dict().items()}
    brancher = Brancher(trained, BranchOptions((1, 4), 64, 1, 0.01))
    ctrl_c = CtrlC(lambda _: None, "this branch", "what branches told")
    found = brancher.branches(_quiet(), ctrl_c)
    assert found is not None
    assert [branch.learning_rate for branch in found.branches] == pytest.approx([0.01, 0.02])
    assert all(torch.equal(value, before[name]) for name, value in trained.model.state_dict().items())
    assert all(int(state["step"]) == 5 for state in trained.rates.optimizer.state.values())
    ctrl_c.wanted = True
    assert brancher.branches(_quiet(), ctrl_c) is None
    assert all(torch.equal(value, before[name]) for name, value in trained.model.state_dict().items())


def _quiet() -> Console:
    return Console(file=io.StringIO())


def branches(losses: dict[int, tuple[float, ...]], noise_scale: float | None = None) -> Branches:
    each = tuple(Branch(k, 32 * k, 0.1 * k, 8, values, values, ()) for k, values in losses.items())
    return Branches(each, 0.01, 1024, "linear", 5000, noise_scale)


def test_the_critical_batch_is_the_largest_within_the_tolerance_of_all_smaller_ones() -> None:
    found = branches({1: (1.0, 1.1), 2: (0.99, 1.08), 4: (0.995, 1.085), 8: (1.2, 1.3)}, noise_scale=8.0)
    assert found.critical.factor == 4  # within 0.01 of 2, the best of the smaller ones
    assert found.excess(found.branches[3]) == pytest.approx(0.215)
    words = " ".join(branch_words(found))
    assert "The critical batch after 5,000 samples of training is 128: batches of 256 end" in words
    assert "The noise scale there is 8: 16 times less than what branches can take, so it is no critical batch" in words
    assert "Not settled" not in words
    unsure = branches({1: (1.0, 1.1), 2: (1.05, 1.06)})
    assert "Not settled: for 64 the other answer is within 2 standard errors" in " ".join(branch_words(unsure))
    all_fit = branches({1: (1.0,), 2: (1.0,), 4: (1.005,)})
    assert "is at least 128: the largest that was tried" in " ".join(branch_words(all_fit))
    assert "one repeat does not tell" in " ".join(branch_words(all_fit))
    none_fits = branches({1: (1.0, 1.0), 2: (1.1, 1.1)})
    assert "is at most 32: batches of 64 end" in " ".join(branch_words(none_fits))
