"""`macrobatch train`: everything is in the output folder, mistakes are a line each, and Ctrl-C keeps what is done."""

import copy
import io
import json
import logging
import math
import os
import re
import signal
import subprocess
import sys
import time
import tomllib
import warnings
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from own_tasks import line
from rich.console import Console
from torch import nn
from typer.testing import CliRunner

import macrobatch as mb
from macrobatch.cli import app, plots
from macrobatch.cli.command import _plain_warnings
from macrobatch.cli.error_places import place_in_task, steps_to
from macrobatch.cli.metric_check import check_metrics
from macrobatch.cli.preparing import prepare
from macrobatch.cli.validation import validate, validation_batches
from macrobatch.tasks import Task, load_task

TINY_LM = [
    "--task",
    "code-lm",
    "--task-option",
    "d_model=8",
    "--task-option",
    "num_layers=1",
    "--task-option",
    "num_heads=2",
]
LINE = ["--task", "own_tasks:line"]


def run(*arguments: str | Path, code: int = 0) -> str:
    """What `macrobatch train` prints, both streams, unwrapped; the exit code is checked."""
    result = CliRunner().invoke(app, ["train", *map(str, arguments)])
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    assert result.exit_code == code, result.output
    return result.output


def rows(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def summary(folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((folder / "summary.json").read_text(), parse_constant=pytest.fail)
    return found


def weights(folder: Path) -> dict[str, torch.Tensor]:
    from safetensors.torch import load_file

    return load_file(folder / "model.safetensors")


def losses(folder: Path) -> list[float]:
    return [row["loss"] for row in rows(folder)]


# ---- what a run leaves behind


def test_a_run_leaves_metrics_events_summary_plot_and_weights(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    said = run(*TINY_LM, "--batch-size", "12", "--micro-batch-size", "5", "--steps", "4", "--output", folder)
    log = rows(folder)
    assert [row["update"] for row in log] == [1, 2, 3, 4]
    assert [row["samples"] for row in log] == [12, 24, 36, 48]
    assert {(row["micro_batches"], row["largest_micro_batch"], row["applied"]) for row in log} == {(3, 4, True)}
    assert all(row["loss"] > 1 and row["grad_norm"] > 0 and row["seconds"] > 0 and row["lr"] == 2e-3 for row in log)
    ended = summary(folder)
    assert ended["outcome"] == "finished"
    assert ended["validation_samples"] == len(load_task("code-lm").validation)
    assert ended["validation_metrics"]["bits per byte"] == pytest.approx(
        ended["validation_loss"] / math.log(2), rel=1e-5
    )
    assert ended["peak_bytes"] > 1e6
    assert (folder / "loss.png").read_bytes().startswith(b"\x89PNG")
    assert "</svg>" in (folder / "loss.svg").read_text()
    assert list((folder / "tensorboard").glob("events.*"))
    assert set(weights(folder)) == set(load_task("code-lm", num_layers=1).model.state_dict())
    assert "4 updates of 12 samples, each in 3 micro-batches of at most 5" in said
    assert f"loss {ended['validation_loss']:.4g}"[:9] in said
    assert not [path.name for path in folder.iterdir() if "partial" in path.name]
    assert f" loss.png, loss.svg, metrics.jsonl, model.safetensors, summary.json, tensorboard in {folder}" in " ".join(
        ["", *said.split()]
    )


def test_training_is_that_of_the_whole_batch_by_hand_whatever_the_micro_batch(tmp_path: Path) -> None:
    for size in (8, 3):
        run(*LINE, "--micro-batch-size", size, "--epochs", 1, "--seed", 5, "--output", tmp_path / str(size))
    task = load_task("own_tasks:line", seed=5)
    order = torch.randperm(40, generator=torch.Generator().manual_seed(5)).tolist()
    by_hand = []
    for start in range(0, 40, 8):
        inputs, targets = task.collate([task.train[index] for index in order[start : start + 8]])
        loss = (task.model(inputs) - targets).pow(2).mean()
        loss.backward()
        with torch.no_grad():
            for p in task.model.parameters():
                p -= 0.05 * p.grad
                p.grad = None
        by_hand.append(loss.item())
    for size in (8, 3):
        assert losses(tmp_path / str(size)) == pytest.approx(by_hand, rel=1e-5)
        assert torch.allclose(weights(tmp_path / str(size))["weight"], task.model.weight, rtol=1e-5)


def test_another_seed_is_another_run_and_the_same_seed_the_same(tmp_path: Path) -> None:
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        run(*LINE, "--steps", 3, "--seed", seed, "--output", tmp_path / name)
    assert losses(tmp_path / "a") == losses(tmp_path / "b")
    assert losses(tmp_path / "a") != losses(tmp_path / "c")


@pytest.mark.parametrize(
    ("limit", "sizes"),
    [
        (["--epochs", "2"], [16, 16, 8, 16, 16, 8]),
        (["--steps", "4"], [16, 16, 8, 16]),
        (["--samples", "50"], [16, 16, 8, 10]),
        ([], [16, 16, 8]),
    ],
)
def test_a_run_lasts_as_long_as_asked_with_a_short_batch_at_the_end_of_an_epoch(
    limit: list[str], sizes: list[int], tmp_path: Path
) -> None:
    run(*LINE, "--batch-size", 16, *limit, "--output", tmp_path / "run")
    seen = [0, *(row["samples"] for row in rows(tmp_path / "run"))]
    assert [after - before for before, after in pairwise(seen)] == sizes


@pytest.mark.parametrize(
    ("schedule", "expected"),
    [
        ("constant", [0.2, 0.4, 0.6, 0.8, 1, 1, 1, 1]),
        ("linear", [0.2, 0.4, 0.6, 0.8, 1, 0.75, 0.5, 0.25]),
        ("cosine", [0.2, 0.4, 0.6, 0.8, 1, *((1 + math.cos(math.pi * part / 4)) / 2 for part in (1, 2, 3))]),
    ],
)
def test_the_learning_rate_warms_up_and_then_follows_its_schedule(
    schedule: str, expected: list[float], tmp_path: Path
) -> None:
    run(*LINE, "--steps", 8, "--warmup", 4, "--schedule", schedule, "--lr", 0.01, "--output", tmp_path / "run")
    assert [row["lr"] / 0.01 for row in rows(tmp_path / "run")] == pytest.approx(expected)


def test_threads_are_those_asked_for_and_afterwards_those_of_before(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = torch.get_num_threads()
    seen: list[int] = []
    monkeypatch.setattr(plots, "thousands", lambda _: seen.append(torch.get_num_threads()))
    run(*LINE, "--steps", 1, "--threads", before + 1, "--output", tmp_path / "run")
    assert (seen, torch.get_num_threads()) == ([before + 1], before)


def test_an_update_that_is_not_finite_is_skipped_and_does_not_move_the_schedule(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    said = run(*LINE, "--task-option", "bad=7", "--schedule", "linear", "--output", folder)
    log = rows(folder)
    (bad,) = [number for number, row in enumerate(log) if not row["applied"]]
    assert log[bad]["loss"] is None  # JSON knows no infinity
    rates = [row["lr"] for row in log]
    if bad + 1 < len(log):
        assert rates[bad + 1] == rates[bad]
    assert len(set(rates)) == len(rates) - (bad + 1 < len(log))
    assert summary(folder)["updates_applied"] == len(log) - 1
    assert f"; 1 update skipped: the gradient was not finite (update {bad + 1})" in said


NEVER: dict[str, tuple[Any, str]] = {
    "nan": (
        lambda model, pair: ((model(pair[0]) * math.nan).sum(), len(pair[0])),
        "the loss was nan and the gradient norm nan. Neither is finite: look for NaN",
    ),
    "root": (
        lambda model, pair: ((0 * model(pair[0])).sum().sqrt(), len(pair[0])),
        "the loss was 0 and the gradient norm nan. The gradient of a finite loss is not finite",
    ),
    "no terms": (
        lambda model, pair: (0 * model(pair[0]).sum(), 0),
        "the loss was nan and the gradient norm 0. The loss had no terms to average over",
    ),
}


def never(*, why: str = "nan") -> Task:
    """A task no update of which can be applied."""
    return replace(line(), loss_fn=NEVER[why][0])


@pytest.mark.parametrize("why", list(NEVER))
@pytest.mark.parametrize("guard", ["off", "skip"])
def test_a_run_of_which_no_update_was_applied_is_an_error_that_says_why(why: str, guard: str, tmp_path: Path) -> None:
    options = ["--task-option", f"why={why}", "--steps", 8, "--spike-guard", guard, "--output", tmp_path / "run"]
    said = run("--task", "test_cli_train:never", *options, code=2)
    assert f"error: no update was applied: 8 updates skipped, from update 1 on, where {NEVER[why][1]}" in said
    assert "no update was applied: 8 of 8 updates tried, " in said
    is_told_of = guard == "off" and why == "no terms"
    assert ("8 updates skipped: the loss had no terms (update 1 first)" in said) == is_told_of
    assert "finished" not in said
    found = summary(tmp_path / "run")
    assert (found["outcome"], found["updates"], found["updates_applied"]) == ("no update was applied", 8, 0)
    assert found["validation_loss"] is None


@pytest.mark.parametrize(
    ("options", "rate", "said"),
    [
        ([], 0.05, r"tuned at batch size 8 and not scaled to 32: see --scaling"),
        (["--scaling", "linear"], 0.2, "linear rule: 0.05 at batch size 8"),
        (["--scaling", "sqrt"], 0.1, "sqrt rule"),
        (["--scaling", "sqrt", "--lr", "0.3", "--base-batch-size", "128"], 0.15, "sqrt rule: 0.3 at batch size 128"),
        (["--lr", "0.3"], 0.3, "learning rate 0.3, constant"),
    ],
)
def test_the_learning_rate_is_scaled_only_when_asked(
    options: list[str], rate: float, said: str, tmp_path: Path
) -> None:
    text = run(*LINE, "--batch-size", 32, "--steps", 1, *options, "--output", tmp_path / "run")
    assert rows(tmp_path / "run")[0]["lr"] == pytest.approx(rate)
    assert said in text


def test_the_gradient_is_clipped_to_max_norm(tmp_path: Path) -> None:
    run(*LINE, "--steps", 1, "--max-norm", 0.01, "--lr", 1.0, "--output", tmp_path / "run")
    before, after = load_task("own_tasks:line").model.state_dict(), weights(tmp_path / "run")
    moved = math.sqrt(sum(float((after[name] - before[name]).pow(2).sum()) for name in before))
    assert moved == pytest.approx(0.01, rel=1e-3)
    assert rows(tmp_path / "run")[0]["grad_norm"] > 0.1  # before clipping


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_low_precision_trains(precision: str, tmp_path: Path) -> None:
    said = run(
        *LINE, "--precision", precision, "--epochs", 3, "--lr", 0.2, "--device", "cpu", "--output", tmp_path / "r"
    )
    assert summary(tmp_path / "r")["updates_applied"] >= 13  # the scaler of fp16 begins too high on purpose
    assert losses(tmp_path / "r")[-1] < 0.3 * losses(tmp_path / "r")[0]
    assert ("fp16 on a CPU works but is slow" in said) == (precision == "fp16")


def test_an_output_folder_with_something_in_it_is_left_alone(tmp_path: Path) -> None:
    for _ in range(3):
        said = run(*LINE, "--steps", 1, "--output", tmp_path / "run")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["run", "run-2", "run-3"]
    assert f"writing to {tmp_path / 'run-3'}" in said


def test_an_empty_folder_is_used_as_it_is(tmp_path: Path) -> None:
    run(*LINE, "--steps", 1, "--output", tmp_path)
    assert (tmp_path / "summary.json").exists()


# ---- memory


def test_a_model_beyond_the_budget_ends_in_a_line_that_says_what_to_change(tmp_path: Path) -> None:
    options = [*LINE, "--task-option", "hidden=1000", "--batch-size", "40", "--micro-batch-size", "4", "--steps", "2"]
    said = run(*options, "--max-memory", "30KB", "--output", tmp_path / "small", code=2)
    assert "error: out of memory in update 1: not even one sample at a time fits into the budget of 30.0 kB; " in said
    assert "give more --max-memory or a smaller model" in said
    assert "--micro-batch-size" not in said  # it was halved down to one sample already
    assert summary(tmp_path / "small")["outcome"] == "out of memory at update 1"  # as the error says
    assert set(weights(tmp_path / "small")) == set(load_task("own_tasks:line", hidden=3).model.state_dict())
    # The control: with more of it, it trains, and stays within.
    run(*options, "--max-memory", "150KB", "--output", tmp_path / "large")
    ended = summary(tmp_path / "large")
    assert (ended["outcome"], ended["peak_of"], ended["retries"]) == ("finished", "tensors", 0)
    assert 30_000 < ended["peak_bytes"] <= 150_000


def test_by_default_the_micro_batch_size_is_found_and_the_losses_are_the_same(tmp_path: Path) -> None:
    options = [*LINE, "--batch-size", 40, "--steps", 14]
    said = run(*options, "--output", tmp_path / "found")
    run(*options, "--micro-batch-size", 7, "--output", tmp_path / "given")
    assert "in micro-batches of the fastest size that is found (all of them fit at once)" in said
    assert [summary(tmp_path / name)["micro_batch_size_is"] for name in ("found", "given")] == ["found", "given"]
    assert len({row["largest_micro_batch"] for row in rows(tmp_path / "found")}) > 1  # sizes were tried
    assert losses(tmp_path / "found") == pytest.approx(losses(tmp_path / "given"), rel=1e-5)


def test_a_model_that_normalises_over_its_micro_batch_keeps_the_tasks_size_and_its_noise_has_a_caveat(
    tmp_path: Path,
) -> None:
    options = ["--task", "digits", "--task-option", "width=2", "--steps", "8", "--device", "cpu"]
    said = " ".join(run(*options, "--output", tmp_path / "run").split())
    assert summary(tmp_path / "run")["micro_batch_size_is"] == "task's own"
    assert "The gradient noise scale is" in said
    assert "a hint only, because BatchNorm couples them" in said


def test_a_found_size_keeps_within_the_budget(tmp_path: Path) -> None:
    options = [*LINE, "--task-option", "hidden=1000", "--batch-size", "40", "--steps", "14", "--max-memory", "150KB"]
    said = run(*options, "--output", tmp_path / "run")
    ended = summary(tmp_path / "run")
    assert (ended["outcome"], ended["retries"]) == ("finished", 0)
    assert ended["peak_bytes"] <= 150_000
    assert re.search(r"in micro-batches of the fastest size that is found \(up to \d+ fit at once\)", said)
    assert max(row["largest_micro_batch"] for row in rows(tmp_path / "run")) < 40  # the control: the limit was felt


def test_a_layer_that_couples_samples_keeps_the_tasks_own_size_and_a_line_says_so(tmp_path: Path) -> None:
    said = run("--task", "digits", "--task-option", "width=2", "--steps", "2", "--output", tmp_path / "run")
    assert "note: the micro-batch size is the task's own, not auto: '1' (BatchNorm2d) normalises over" in said
    assert summary(tmp_path / "run")["micro_batch_size"] == load_task("digits").micro_batch_size


def test_a_model_that_normalised_over_fewer_samples_than_asked_for_is_said_to_be_another(tmp_path: Path) -> None:
    options = ["--task", "digits", "--task-option", "width=2", "--steps", "3", "--device", "cpu"]
    said = run(*options, "--max-memory", "60KB", "--output", tmp_path / "small")
    log = rows(tmp_path / "small")
    assert log[0]["retries"] > 0
    fewest = min(row["batch_size"] // row["micro_batches"] for row in log)
    assert 1 <= fewest < 16
    assert (
        "note: memory ran out, and in 3 updates (first in update 1) '1' (BatchNorm2d) normalised over micro-batches of "
        f"as few as {fewest} instead of 16: another model than was asked for, which more --max-memory would train"
    ) in said
    said = run(*options, "--max-memory", "10MB", "--output", tmp_path / "large")  # the control
    assert "instead of 16" not in said


def test_what_was_predicted_is_shown_beside_what_was_measured(tmp_path: Path) -> None:
    options = [*TINY_LM, "--batch-size", "16", "--micro-batch-size", "4", "--steps", "2", "--device", "cpu"]
    said = run(*options, "--output", tmp_path / "run")
    found = summary(tmp_path / "run")
    assert found["memory_predicted_bytes"] == pytest.approx(found["memory_measured_bytes"], rel=1e-3)
    assert sum(found["memory_predicted"].values()) == found["memory_predicted_bytes"]
    assert re.search(r"memory of update 2, micro-batches of 4: predicted [\d.]+ MB, measured [\d.]+ MB", said)
    # The control: another size is another number, well outside of it.
    run(*options, "--micro-batch-size", "8", "--output", tmp_path / "eight")
    assert summary(tmp_path / "eight")["memory_measured_bytes"] > 1.5 * found["memory_predicted_bytes"]


@pytest.mark.slow
def test_the_data_set_takes_nothing_from_the_budget(tmp_path: Path) -> None:
    options = ["--batch-size", "16", "--micro-batch-size", "4", "--steps", "2", "--device", "cpu"]
    run(*options, "--max-memory", "9MB", "--output", tmp_path / "run")
    assert summary(tmp_path / "run")["retries"] == 0
    assert load_task("code-lm").train.num_bytes > 9_000_000  # type: ignore[attr-defined]  # counted, it would not fit


@pytest.mark.parametrize("name", ["code-lm", "digits"])
def test_a_sample_of_a_built_in_task_keeps_only_itself_in_memory(name: str) -> None:
    task = load_task(name)
    sample = task.train[5]
    tensors = [sample] if isinstance(sample, torch.Tensor) else list(sample)
    assert [t.untyped_storage().nbytes() for t in tensors] == [t.nbytes for t in tensors]

    def collate() -> None:
        task.collate([task.train[index] for index in range(4)])

    assert mb.peak_memory(collate) <= 3 * 4 * sum(t.nbytes for t in tensors)


def test_an_optimizer_whose_state_does_not_fit_is_named(tmp_path: Path) -> None:
    options = ["--batch-size", "1", "--micro-batch-size", "1", "--steps", "1", "--device", "cpu"]
    sizes = ["d_model=128", "context=8"]
    given = [part for size in sizes for part in ("--task-option", size)]
    said = run(*options, *given, "--max-memory", "4.5MB", "--output", tmp_path / "run", code=2)
    assert "the optimizer's state does not fit into the budget of 4.50 MB; give more --max-memory" in said


def test_micro_batches_that_did_not_fit_are_told_of(tmp_path: Path) -> None:
    options = [*LINE, "--task-option", "hidden=1000", "--batch-size", "40", "--steps", "2", "--max-memory", "150KB"]
    said = run(*options, "--micro-batch-size", "40", "--output", tmp_path / "run")
    retries = [row["retries"] for row in rows(tmp_path / "run")]
    assert retries[0] > 0
    assert summary(tmp_path / "run")["retries"] == sum(retries)
    assert f"; out of memory {sum(retries)} times: run again in smaller pieces" in said


def test_a_budget_can_be_a_share_of_what_the_device_has(tmp_path: Path) -> None:
    run(*LINE, "--steps", "1", "--max-memory", "50%", "--output", tmp_path / "run")
    assert summary(tmp_path / "run")["peak_of"] == "tensors"


# ---- mistakes


def open_question(*, flag: bool = False, text: str = "") -> Task:
    return replace(line(), description=f"{flag!r} {text!r}")


@pytest.mark.parametrize("written", ["true", "True", "TRUE", "false", "False"])
def test_a_task_option_is_true_or_false_in_any_case(written: str, tmp_path: Path) -> None:
    options = ["--task-option", f"flag={written}", "--task-option", "text='true'", "--steps", 1]
    said = run("--task", "test_cli_train:open_question", *options, "--output", tmp_path / "run")
    assert f"line: {written.capitalize()} 'true'" in said  # in quotes it is a text


def test_errors_go_to_stderr_and_what_was_found_to_stdout(tmp_path: Path) -> None:
    def both(*arguments: str) -> tuple[str, str]:
        result = CliRunner().invoke(app, ["train", *LINE, *arguments, "--output", str(tmp_path / "run")])
        assert result.exit_code == 2
        return result.stdout, result.stderr

    small = ["--task-option", "hidden=1000", "--micro-batch-size", "4", "--max-memory", "30KB"]
    for arguments in (small, ["--task", "test_cli_train:never", "--steps", "8"], ["--warmup", "99"]):
        out, error = both(*arguments)
        assert error.startswith("error: ")
        assert len(error.splitlines()) == 1
        assert "error:" not in out
    assert out == ""


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--batch-size", "0"], "'--batch-size': a whole number of at least 1 is needed; got 0"),
        (["--batch-size", "many"], "a whole number of at least 1 is needed; got many"),
        (["--micro-batch-size", "0"], "at least 1, is needed; got '0'"),
        (["--micro-batch-size", "-3"], "at least 1, is needed; got '-3'"),
        (["--task", "digits", "--micro-batch-size", "auto"], "error: --micro-batch-size auto would change the result"),
        (["--max-memory", "20B"], "error: max_memory=20 B is less than the model's own state"),
        (["--max-memory", "200B"], "error: one sample does not fit into max_memory=200 B"),
        (["--max-memory", "200%"], "error: max_memory='200%': a share of what the device has is above 0%"),
        (["--schedule", "zigzag"], "'--schedule': 'zigzag' is not one of 'constant', 'linear', 'cosine'"),
        (["--precision", "fp8"], "'fp8' is not one of 'fp32', 'bf16', 'fp16'"),
        (["--scaling", "cubic"], "'cubic' is not one of 'auto', 'linear', 'sqrt', 'adam-sde', 'half-life'"),
        (["--device", "tpu"], "'tpu' is not one of 'auto', 'cpu', 'cuda'"),
        (["--lr", "-1"], "a number above 0 is needed; got '-1'"),
        (["--lr", "nan"], "a number above 0 is needed; got 'nan'"),
        (["--max-norm", "0"], "a number above 0 is needed; got '0'"),
        (["--max-memory", "lots"], "'lots' is not a number of bytes"),
        (["--max-memory", "900TB"], "error: max_memory=900.00 TB is beyond the device"),
        (["--task-option", "size"], "a task option is written name=value"),
        (["--warmup", "-1"], "'--warmup': a whole number of at least 0 is needed; got -1"),
        (["--task", "cats"], "error: there is no task 'cats'. Built-in tasks: code-lm, digits"),
        (["--task", "no_such_module:f"], "error: cannot import 'no_such_module'"),
        (["--task-option", "colour=red"], "error: task 'own_tasks:line' has no option 'colour'; its options: size"),
        (["--batch-size", "41"], "error: --batch-size 41 is more than the 40 training samples of line"),
        (["--steps", "3", "--epochs", "2"], "error: give one of --steps, --epochs and --samples"),
        (["--steps", "3", "--warmup", "4"], "error: --warmup 4 is longer than the run of 3 updates"),
        (["--scaling", "sqrt", "--lr", "0.1"], "error: --scaling sqrt with a --lr of your own needs --base-batch-size"),
        (["--task", "own_tasks:bare_token_mean"], "error: the loss_fn returned a bare scalar"),
    ],
)
def test_a_mistake_is_named_before_any_work_and_leaves_nothing(
    options: list[str], message: str, tmp_path: Path
) -> None:
    said = run(*LINE, *options, "--output", tmp_path / "run", code=2)
    assert message in " ".join(said.replace("│", " ").split())
    assert "Traceback" not in said
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("command", "folder"),
    [("train", "line"), ("compare", "compare-line"), ("plan", "plan-line"), ("noise", "noise-line")],
)
def test_the_help_shows_what_an_option_is_where_it_is_not_given(
    command: str, folder: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("COLUMNS", "300")
    said = " ".join(CliRunner().invoke(app, [command, "--help"], terminal_width=300).output.split())
    for shown in ("[the task's]", "[torch's]", f"[runs/{folder.replace('line', 'TASK')}]"):
        assert shown in said
    assert said.count("[runs/") == 1
    monkeypatch.chdir(tmp_path)  # and there it is
    small = ["--batch-size=8", "--samples=40", "--draws=64", "--sharpness=0"] if command == "compare" else []
    assert CliRunner().invoke(app, [command, *LINE, *small]).exit_code == 0
    assert [path.name for path in (tmp_path / "runs").iterdir()] == [folder]


@pytest.mark.parametrize("command", ["", "train", "compare", "plan", "noise"])
@pytest.mark.parametrize("width", [80, 120])
def test_the_help_shows_no_value_for_an_option_that_takes_none(
    command: str, width: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", str(width))
    result = CliRunner().invoke(app, [*command.split(), "--help"], terminal_width=width)
    lines = [line.strip("│ ").split() for line in result.output.splitlines()]
    shown = {words[0]: words[1] for words in lines if words and words[0].startswith("--")}
    taking_none = {"--help": "Show", "--version": "Show", "--per-example": "Measure", "--branched": "Then"}
    assert shown.items() >= {name: word for name, word in taking_none.items() if name in shown}.items()
    assert "--help" in shown
    assert ("--version" in shown, "--branched" in shown) == (command == "", command == "noise")
    assert max(map(len, result.output.splitlines())) <= width


def test_the_version_is_that_of_the_package() -> None:
    result = CliRunner().invoke(app, ["--version"])
    assert result.exit_code == 0
    assert result.output.startswith(f"macrobatch {mb.__version__} (torch {torch.__version__}, Python ")


@pytest.mark.skipif(torch.cuda.is_available(), reason="has a CUDA device")
def test_a_device_that_is_not_there_is_named(tmp_path: Path) -> None:
    said = run(*LINE, "--device", "cuda", "--output", tmp_path / "run", code=2)
    assert "error: --device cuda: torch sees no CUDA device here; use --device cpu, or auto" in said


def test_the_learning_rate_of_the_plot_lies_below_its_top(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    drawn: list[Any] = []
    monkeypatch.setattr(plots, "thousands", drawn.append)
    plots.save_training(tmp_path, [{"samples": n, "loss": 1.0, "lr": 0.002} for n in (1, 2, 3)], "task")
    low, high = drawn[0].get_ylim()
    assert low == 0
    assert 0.0021 < high < 0.003


def test_one_update_is_told_of_in_the_singular(tmp_path: Path) -> None:
    said = run(*LINE, "--steps", 1, "--output", tmp_path / "run")
    assert "1 update of 8 samples" in said
    assert "1 updates" not in said


def test_an_output_folder_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("something")
    for output in (tmp_path / "file", tmp_path / "file" / "run"):
        said = run(*LINE, "--output", output, code=2)
        assert f"error: cannot write to the output folder {output}" in said
        assert "choose another with --output" in said
    assert (tmp_path / "file").read_text() == "something"


class Holed(list[Any]):
    """Samples of which one is missing."""

    def __getitem__(self, index: Any) -> Any:
        return super().__getitem__(index) if index != 7 else {}["label"]


class Ragged(list[Any]):
    """Samples of unequal length."""

    def __getitem__(self, index: Any) -> Any:
        return torch.ones(3 + index % 2), torch.ones(1)


class Stuck(torch.optim.SGD):
    """An optimizer that cannot step."""

    def step(self, closure: Any = None) -> Any:  # type: ignore[override]  # no closure here
        raise AttributeError("stuck")


class Narrow(nn.Linear):
    """A model that drops an entry of its input."""

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        return super().forward(inputs[:, :2])


def missing(*_: Any) -> Any:
    raise KeyError("x")


def noted(*_: Any) -> Any:
    error = RuntimeError("[not bold] bad")
    error.add_note("have you tried the other one?")
    raise error


def only_model(model: nn.Module) -> Any:
    return model


def failing(*, at: str = "loss_fn") -> Task:
    """A task whose own code fails once the run has begun."""
    changed: dict[str, Any] = {
        "loss_fn": {"loss_fn": missing},
        "dataset": {"train": Holed(line().train)},
        "collate": {"collate": missing},
        "make_optimizer": {"make_optimizer": missing},
        "prepare": {"prepare": missing},
        "step": {"make_optimizer": lambda model, lr: Stuck(model.parameters(), lr)},
        "model": {"model": Narrow(3, 1)},
        "notes": {"loss_fn": noted},
        "arguments": {"loss_fn": only_model},
        "arguments of make_optimizer": {"make_optimizer": lambda: None},
        "ragged": {"train": Ragged(line().train)},
        "torch": {"model": nn.Sequential(nn.Linear(4, 1)), "loss_fn": mb.sum_loss(nn.MSELoss())},
    }[at]
    return replace(line(), **changed)


FAILING = {
    "loss_fn": ("KeyError: 'x'", 'raise KeyError("x")'),
    "dataset": ("KeyError: 'label'", '{}["label"]'),
    "collate": ("KeyError: 'x'", 'raise KeyError("x")'),
    "make_optimizer": ("KeyError: 'x'", 'raise KeyError("x")'),
    "prepare": ("KeyError: 'x'", 'raise KeyError("x")'),
    "step": ("AttributeError: stuck", 'raise AttributeError("stuck")'),
    "model": ("RuntimeError: mat1 and mat2 shapes cannot be multiplied", "super().forward(inputs[:, :2])"),
    "notes": ("RuntimeError: [not bold] bad", "raise error"),
    "arguments": ("TypeError: only_model() takes 1 positional argument but 2 were given", ""),
    "arguments of make_optimizer": ("TypeError: failing.<locals>.<lambda>() takes 0 positional", ""),
    "ragged": ("RuntimeError: stack expects each tensor to be equal size", "collate.py, line "),
    "torch": ("RuntimeError: mat1 and mat2 shapes cannot be multiplied", "linear.py, line "),
}


@pytest.mark.parametrize("at", list(FAILING))
def test_what_a_tasks_own_code_raises_at_work_is_a_line_with_its_place_and_a_traceback_in_a_file(
    at: str, tmp_path: Path
) -> None:
    folder, (what, where) = tmp_path / "run", FAILING[at]
    options = ["--task-option", f"at={at}", "--max-memory", "1MB", "--steps", 9, "--output", folder]
    said = run("--task", "test_cli_train:failing", *options, code=2)
    error = next(each for each in said.splitlines() if each.startswith("error:"))
    assert error.startswith(f"error: the task test_cli_train:failing raised {what}")
    place, kept = error.split("; the whole traceback is in ")
    assert kept == str(folder / "traceback.txt")
    whole = (folder / "traceback.txt").read_text()
    assert whole.startswith("Traceback (most recent call last):\n")
    assert what.partition(":")[0] in whole
    if where in ("", "linear.py, line ", "collate.py, line "):
        assert where in place
    else:
        lines = Path(__file__).read_text().splitlines()
        assert f" ({__file__}, line {next(n for n, text in enumerate(lines, 1) if where in text)})" in place
    assert "Traceback" not in said
    assert ("note: loss_fn is called as loss_fn(model, micro_batch)" in said) == (
        at in ("loss_fn", "model", "notes", "arguments", "torch")
    )
    assert ("note: have you tried the other one?" in said) == (at == "notes")


def calling() -> Task:
    """A task whose loss calls this package, which fails there, and not with an error that it raises on purpose."""
    return replace(line(), loss_fn=lambda model, pair: plots.plain_number(pair))  # type: ignore[arg-type]


@pytest.mark.parametrize("task", ["own_tasks:line", "test_cli_train:calling"])
def test_a_bug_of_this_package_keeps_its_traceback(task: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(plots, "save_training", None)
    with pytest.raises(TypeError, match=r"'NoneType' object is not callable|bad operand type for abs\(\)"):
        run("--task", task, "--steps", 1, "--output", tmp_path / "run")
    assert not (tmp_path / "run" / "traceback.txt").exists()


def test_a_call_of_torch_that_this_package_looks_at_is_still_the_tasks() -> None:
    with pytest.raises(RuntimeError) as caught, mb.memory_limit("1MB"):
        torch.ones(2, 3) @ torch.ones(2, 3)
    assert any("macrobatch" in step.file and step.is_passing for step in steps_to(caught.value))
    place = place_in_task("some_tasks:task", caught.value)
    assert place is not None
    assert place.startswith(f" ({__file__}, line ")
    assert place_in_task("digits", caught.value) is None  # the control: all of a built-in task is this package


@pytest.mark.parametrize("log", ["torch._subclasses.fake_tensor"])
def test_a_model_that_fails_on_fake_tensors_logs_no_traceback_of_its_own(
    log: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    before = logging.getLogger(log).level
    run("--task", "test_cli_train:failing", "--task-option", "at=model", "--output", tmp_path / "run", code=2)
    assert [record for record in caplog.records if record.name == log] == []
    assert logging.getLogger(log).level == before
    task = failing(at="model")  # the control
    with pytest.raises(RuntimeError):
        mb.plan(task.model, task.loss_fn, (torch.ones(4, 3), torch.ones(4, 1)), batch_size=4, max_memory="1MB")
    assert [record for record in caplog.records if record.name == log]


def wrong_layer() -> Task:
    return replace(line(), model=nn.Linear(3, "1"))  # type: ignore[arg-type]  # a bug


@pytest.mark.parametrize(
    ("function", "said_of_it", "bug"),
    [
        ("own_tasks:broken", "ValueError: a bug of my own", 'raise ValueError("a bug of my own")'),
        (
            "test_cli_train:wrong_layer",
            "TypeError: empty()",
            "return replace(line(), model=nn.Linear",
        ),
    ],
)
def test_what_a_task_function_of_ones_own_raises_is_one_line_that_says_where(
    function: str, said_of_it: str, bug: str, tmp_path: Path
) -> None:
    file = Path(__file__).with_name(function.partition(":")[0] + ".py")
    number = next(j for j, text in enumerate(file.read_text().splitlines(), 1) if bug in text)
    said = run("--task", function, "--output", tmp_path / "run", code=2)
    errors = [each for each in said.splitlines() if each.startswith("error:")]
    assert len(errors) == 1
    assert errors[0].startswith(f"error: the task {function} raised {said_of_it}")
    assert errors[0].endswith(f"({file}, line {number})")
    assert "Traceback" not in said
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("text", "said_of_it"),
    [
        ("x = 1\nimport no_such_package_at_all\n", r"ModuleNotFoundError: No module named 'no_such.* line 2\)$"),
        ("x = [][3]\n", r"IndexError: list index out of range \(.*, line 1\)$"),
        ("def task(:\n", r"raised File \".*\", line 1 .* SyntaxError: invalid syntax$"),
    ],
)
def test_what_importing_ones_own_module_raises_is_one_line_too(
    text: str, said_of_it: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    name = f"imported_{tmp_path.name}"
    (tmp_path / f"{name}.py").write_text(text)
    monkeypatch.syspath_prepend(tmp_path)
    said = run("--task", f"{name}:task", "--output", tmp_path / "run", code=2)
    error = next(each for each in said.splitlines() if each.startswith("error:"))
    assert error.startswith(f"error: the task {name}:task raised ")
    assert re.search(said_of_it, error)


def test_a_task_function_that_needs_an_argument_says_which(tmp_path: Path) -> None:
    said = run("--task", "own_tasks:squares", "--output", tmp_path / "run", code=2)
    assert (
        "error: the task own_tasks:squares raised TypeError: squares() missing 2 required positional arguments" in said
    )


def test_without_an_extra_the_command_line_says_what_to_install() -> None:
    program = "import sys; sys.modules['rich'] = None; import macrobatch.cli"
    child = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False, timeout=120)
    assert child.returncode == 1
    assert child.stderr.strip() == "error: the command line needs rich: pip install -e '.[cli,tasks]'"


# ---- metrics are tried before training, and data that takes its time comes after every check


def sum_and_count(model: nn.Module, pair: Any) -> tuple[torch.Tensor, int]:
    return (model(pair[0]) - pair[1]).abs().sum(), len(pair[0])


BAD_METRICS: dict[str, tuple[Any, str]] = {
    "one argument": (
        lambda model: (1.0, 2),
        "raised TypeError: <lambda>() takes 1 positional argument but 2 were given. Mend it, so that it returns (sum,",
    ),
    "raises": (
        lambda model, pair: 1 / 0,
        r"raised ZeroDivisionError: division by zero (test_cli_train.py, line ",
    ),
    "nothing": (lambda model, pair: None, "returned None; needed is (sum, count), a sum over the micro-batch as a"),
    "a text": (lambda model, pair: ("high", 3), "returned ('high', 3); needed is (sum, count)"),
    "no count": (lambda model, pair: (model(pair[0]).sum(), "no count"), "returned (a tensor of shape (), 'no count')"),
    "no sum": (lambda model, pair: (model(pair[0]), 3), "returned (a tensor of shape (3, 1), 3); needed is (sum, coun"),
    "a list": (lambda model, pair: [1.0, 2], "returned a list of 2; needed is (sum, count)"),
}


def with_metric(name: str) -> Task:
    return replace(line(), metrics={"good": sum_and_count, name: BAD_METRICS[name][0]})


def metric_task(*, name: str = "raises") -> Task:
    return with_metric(name)


@pytest.mark.parametrize("name", list(BAD_METRICS))
def test_a_metric_that_cannot_be_taken_is_named_before_training(name: str, tmp_path: Path) -> None:
    options = ["--task", "test_cli_train:metric_task", "--task-option", f"name={name}"]
    said = " ".join(run(*options, "--output", tmp_path / "run", code=2).split())
    assert (
        f"error: task 'line': the metric '{name}', called as metric(model, micro_batch), {BAD_METRICS[name][1]}" in said
    )
    assert "or leave it out of the task's metrics. Nothing was trained" in said
    assert not (tmp_path / "run").exists()


def test_the_sum_of_a_metric_may_be_a_plain_number() -> None:
    def number(model: Any, pair: Any) -> tuple[float, int]:
        total, count = sum_and_count(model, pair)
        return float(total.detach()), count

    task = replace(line(), metrics={"tensor": sum_and_count, "number": number})
    found = validate(task.model, task, validation_batches(task, 3))
    assert found.metrics["number"] == pytest.approx(found.metrics["tensor"], rel=1e-6)
    inputs, targets = (torch.stack(column) for column in zip(*task.validation, strict=True))  # type: ignore[call-overload]
    assert found.metrics["number"] == pytest.approx(
        float((task.model(inputs) - targets).abs().mean().detach()), rel=1e-6
    )


def test_a_metric_may_be_a_scalar_tensor_the_mean_over_its_micro_batch() -> None:
    def mean(model: Any, pair: Any) -> torch.Tensor:
        total, count = sum_and_count(model, pair)
        return total / count

    task = replace(line(), metrics={"sum and count": sum_and_count, "mean": mean})
    check_metrics(task.model, task, 3)
    found = validate(task.model, task, validation_batches(task, 3))  # of 7: uneven micro-batches
    assert found.metrics["mean"] == pytest.approx(found.metrics["sum and count"], rel=1e-6)
    refused = replace(line(), metrics={"number": lambda model, pair: float(mean(model, pair))})
    with pytest.raises(ValueError, match=r"or a tensor of shape \(\), the mean over the samples of the micro-batch"):
        check_metrics(refused.model, refused, 3)


def test_a_metric_is_tried_on_one_micro_batch_and_leaves_model_and_random_numbers_alone() -> None:
    seen: list[int] = []

    def drawing(model: nn.Module, pair: Any) -> tuple[torch.Tensor, int]:
        assert not model.training
        seen.append(len(pair[0]))
        return torch.rand(()), len(pair[0])

    task = replace(line(), metrics={"drawing": drawing})
    before, state = copy.deepcopy(task.model.state_dict()), torch.get_rng_state()
    check_metrics(task.model, task, 3)
    assert seen == [3]  # of the 7 held-out samples
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(value, before[name]) for name, value in task.model.state_dict().items())
    assert task.model.training
    assert all(p.grad is None for p in task.model.parameters())
    drawing(task.model.eval(), task.train[0])  # the control
    assert not torch.equal(torch.get_rng_state(), state)


def test_a_metric_that_is_short_of_memory_is_not_called_wrong() -> None:
    def greedy(model: Any, pair: Any) -> Any:
        raise torch.OutOfMemoryError("not now")

    task = replace(line(), metrics={"greedy": greedy})
    check_metrics(task.model, task, 3)


PREPARED: list[tuple[int, int]] = []


def slow_data(*, metric: bool = False) -> Task:
    """A task whose data would take their time, which it tells of."""

    def prepare(tell: Any) -> None:
        for done in (1, 2, 3):
            PREPARED.append((done, 3))
            tell(done, 3)

    return replace(with_metric("raises") if metric else line(), prepare=prepare)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--micro-batch-size", "0"], "at least 1, is needed; got '0'"),
        (["--batch-size", "41"], "--batch-size 41 is more than the 40 training samples"),
        (["--batch-schedule", "zigzag:3"], "--batch-schedule zigzag:3 is no schedule"),
        (["--steps", "3", "--warmup", "4"], "--warmup 4 is longer than the run"),
        (["--steps", "3", "--epochs", "4"], "give one of --steps, --epochs and --samples"),
        (["--scaling", "sqrt", "--lr", "0.1"], "needs --base-batch-size"),
        (["--scaling", "adam-sde", "--batch-size", "32"], "adam-sde"),
        (["--max-memory", "20B"], "max_memory=20 B is less than"),
        (["--snapshot-every", "3"], "--snapshot-every is for --spike-guard rollback"),
        (["--task-option", "metric=True"], "the metric 'raises'"),
        (["--output", __file__], "cannot write to the output folder"),
    ],
)
def test_data_that_take_their_time_come_after_every_check(options: list[str], message: str, tmp_path: Path) -> None:
    PREPARED.clear()
    task = ["--task", "test_cli_train:slow_data"]
    said = " ".join(run(*task, "--output", tmp_path / "run", *options, code=2).replace("│", " ").split())
    assert message in said
    assert not PREPARED


def test_data_are_prepared_before_the_first_update_and_once(tmp_path: Path) -> None:
    PREPARED.clear()
    said = run("--task", "test_cli_train:slow_data", "--steps", 2, "--output", tmp_path / "run")
    assert [done for done, _ in PREPARED] == [1, 2, 3]
    assert said.index("preparing the data") < said.index("finished")


def interrupted() -> Task:
    def prepare(tell: Any) -> None:
        raise KeyboardInterrupt

    return replace(line(), prepare=prepare)


def test_ctrl_c_while_data_are_prepared_says_that_nothing_was_written(tmp_path: Path) -> None:
    said = run("--task", "test_cli_train:interrupted", "--output", tmp_path / "run", code=130)
    assert "interrupted: nothing was written" in said
    assert not (tmp_path / "run").exists()


def wrapping() -> Task:
    """Ctrl-C in a place where Python makes a RuntimeError of it."""

    class Named:
        def __set_name__(self, owner: Any, name: str) -> None:
            raise KeyboardInterrupt

    type("Owner", (), {"named": Named()})
    raise AssertionError


def test_ctrl_c_that_an_import_has_made_another_error_of_is_still_ctrl_c(tmp_path: Path) -> None:
    said = run("--task", "test_cli_train:wrapping", "--output", tmp_path / "run", code=130)
    assert said == "interrupted: nothing was written\n"


def impatient(*, stage: str = "update") -> Task:
    """Two Ctrl-C at once: in the tenth loss of training, or in the first metric over held-out samples."""
    task, calls = line(), {"update": -9, "validation": -1}  # the metric is tried once before training

    def twice(here: str) -> None:
        calls[here] += 1
        if here == stage and calls[here] == 1:
            signal.raise_signal(signal.SIGINT)
            signal.raise_signal(signal.SIGINT)

    def loss(model: nn.Module, pair: Any) -> Any:
        twice("update")
        return task.loss_fn(model, pair)

    def metric(model: nn.Module, pair: Any) -> tuple[float, int]:
        twice("validation")
        return 1.0, len(pair[0])

    return replace(task, loss_fn=loss, metrics={"m": metric})


@pytest.mark.parametrize(
    ("stage", "lost", "kept"),
    [
        ("update", "this update; Ctrl-C again to stop now, without weights, plot and summary", "metrics.jsonl"),
        (
            "validation",
            "this micro-batch; Ctrl-C again to stop now, without plot and summary",
            "metrics.jsonl, model.safetensors",
        ),
    ],
)
def test_a_second_ctrl_c_says_what_is_there(stage: str, lost: str, kept: str, tmp_path: Path) -> None:
    folder, before = tmp_path / "run", signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        options = ["--task-option", f"stage={stage}", "--output", folder]
        said = run("--task", "test_cli_train:impatient", *options, code=130)
    finally:
        signal.signal(signal.SIGINT, before)  # a process in the background may ignore it
    assert f"stopping after {lost}" in said
    there = ", ".join(sorted(path.name for path in folder.iterdir() if path.name[0] != "."))
    assert f"interrupted: {there} in {folder}" in said
    assert there.removesuffix(", tensorboard") == kept


def test_the_preparation_of_data_shows_how_far_it_is_and_how_long_it_takes() -> None:
    console = Console(force_terminal=True, width=100, file=io.StringIO())

    def prepared(tell: Any) -> None:
        tell(1, 4)
        time.sleep(0.3)  # the bar is drawn ten times a second
        tell(4, 4)

    prepare(replace(line(), prepare=prepared), console)
    shown = console.file.getvalue()  # type: ignore[attr-defined]  # a StringIO
    assert "1 of 4" in shown
    assert " 25%" in shown
    assert "left" in shown


# ---- real processes


def start(folder: Path, *arguments: str) -> subprocess.Popen[str]:
    """The installed command, in the folder of these tests, so that it finds own_tasks there."""
    command = [str(Path(sys.executable).with_name("macrobatch")), "train", *LINE, *arguments, "--output", str(folder)]
    return subprocess.Popen(
        command, cwd=Path(__file__).parent, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=os.environ
    )


def wait_for_updates(folder: Path, count: int) -> None:
    deadline = time.monotonic() + 120
    log = folder / "metrics.jsonl"
    while not log.exists() or log.read_text().count("\n") < count:
        assert time.monotonic() < deadline, "no updates"
        time.sleep(0.02)


def test_ctrl_c_keeps_what_is_done_and_ends_with_130(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    child = start(folder, "--steps", "100000", "--task-option", "seconds=0.002")
    wait_for_updates(folder, 3)
    child.send_signal(signal.SIGINT)
    said, _ = child.communicate(timeout=120)
    assert child.returncode == 130, said
    done = rows(folder)
    assert summary(folder)["outcome"] == f"interrupted at update {len(done)}"
    assert summary(folder)["updates"] == len(done) == done[-1]["update"]
    assert summary(folder)["validation_loss"] is None
    assert set(weights(folder)) == {"weight", "bias"}
    assert (folder / "loss.png").exists()
    assert "stopping after this update; Ctrl-C again to stop now, without weights, plot and summary" in said
    assert f"interrupted at update {len(done)}: {len(done)} of 100,000 updates" in said
    assert "Traceback" not in said


def test_ctrl_c_before_the_first_update_leaves_nothing_and_ends_with_130(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    child = start(folder, "--task-option", "size=100")
    deadline = time.monotonic() + 120
    while not folder.exists():
        assert time.monotonic() < deadline
        time.sleep(0.005)
    child.send_signal(signal.SIGINT)
    said, _ = child.communicate(timeout=120)
    assert child.returncode in (130, 0), said  # 0 where it was quicker than the signal
    assert "Traceback" not in said


@pytest.mark.parametrize("times", [1, 2])
def test_sigterm_ends_as_ctrl_c_does_but_with_143(times: int, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    child = start(folder, "--steps", "100000", "--task-option", "seconds=0.2")  # an update takes 1.6 s
    assert child.stdout is not None
    wait_for_updates(folder, 1)
    child.send_signal(signal.SIGTERM)
    said = ""
    with child:
        for text in child.stdout:
            said += text
            if times == 2 and text.startswith("stopping"):
                child.send_signal(signal.SIGTERM)
    assert child.returncode == 143, said
    assert "stopping after this update; SIGTERM again to stop now, without weights, plot and summary" in said
    assert ("terminated: metrics.jsonl, tensorboard in" in said) == (times == 2)
    assert (folder / "summary.json").exists() == (times == 1)
    assert "Traceback" not in said


@pytest.mark.parametrize("name", ["torch", "rich"])
@pytest.mark.parametrize("swallowed", ["", "KeyboardInterrupt"])
def test_ctrl_c_while_the_command_is_starting_is_a_word_and_130(name: str, swallowed: str, tmp_path: Path) -> None:
    signalling = "import contextlib, signal\nwith contextlib.suppress({}):\n    signal.raise_signal(signal.SIGINT)"
    (tmp_path / f"{name}.py").write_text(signalling.format(swallowed))
    project = tomllib.loads((Path(__file__).parents[1] / "pyproject.toml").read_text())["project"]
    entry = project["scripts"]["macrobatch"]
    module, _, function = entry.partition(":")
    program = (
        "import signal; signal.signal(signal.SIGINT, signal.default_int_handler)\n"  # in the background it is ignored
        f"from {module} import {function}\n{function}()"
    )
    paths = os.pathsep.join([str(tmp_path), str(Path(__file__).parents[1] / "src")])
    child = subprocess.run(
        [sys.executable, "-c", program, "train"],
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
        env={**os.environ, "PYTHONPATH": paths},
    )
    assert (child.returncode, child.stdout, child.stderr) == (130, "", "interrupted\n")


def test_ctrl_c_before_a_command_is_at_work_is_a_word_and_130(monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupting(*_: Any, **__: Any) -> Any:
        raise KeyboardInterrupt

    monkeypatch.setattr("macrobatch.cli.run_options.TrainOptions.__init__", interrupting)
    result = CliRunner().invoke(app, ["train", *LINE])
    assert (result.exit_code, result.stdout, result.stderr) == (130, "", "interrupted\n")


@pytest.mark.parametrize("module", ["macrobatch", "macrobatch.cli", "macrobatch_command"])
def test_the_command_can_be_run_as_a_module(module: str) -> None:
    command = [sys.executable, "-m", module, "--version"]
    child = subprocess.run(command, capture_output=True, text=True, check=False, timeout=120)
    assert child.returncode == 0, child.stderr
    assert child.stdout.startswith(f"macrobatch {mb.__version__} ")


def test_the_weights_are_kept_where_a_metric_fails_after_training(tmp_path: Path) -> None:
    result = CliRunner().invoke(app, ["train", "--task", "own_tasks:late_metric", "--output", str(tmp_path / "run")])
    assert result.exit_code == 2
    assert "raised ValueError: a bug that shows late" in result.output
    assert not (tmp_path / "run" / "summary.json").exists()
    trained, before = weights(tmp_path / "run"), load_task("own_tasks:line").model.state_dict()
    assert any(not torch.equal(trained[name], before[name]) for name in before)


def test_a_warning_of_the_library_is_a_line_without_the_code_it_stands_in() -> None:
    with _plain_warnings():
        assert warnings.formatwarning("so it is", UserWarning, "file.py", 3) == "warning: so it is\n"
        assert "file.py:3: RuntimeWarning: another kind" in warnings.formatwarning(
            "another kind", RuntimeWarning, "file.py", 3
        )
    assert "file.py:3" in warnings.formatwarning("so it is", UserWarning, "file.py", 3)
