"""`macrobatch train --scaling --warmup --batch-schedule`: what is said is stored, and trained."""

import json
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

from macrobatch.cli import app
from macrobatch.cli.batch_plan import parse_batch_plan, planned_sizes
from macrobatch.cli.rescaling import one_rule, rescale
from macrobatch.cli.run_options import tokens_per_sample
from macrobatch.scaling_rules import RuleName
from macrobatch.tasks import load_task

TASK = ["--task", "noise_tasks:regression"]


def run(*arguments: str | float | Path, code: int = 0, command: str = "train") -> str:
    """What the command prints, both streams; the exit code is checked."""
    result = CliRunner().invoke(app, [command, *map(str, arguments)])
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    assert result.exit_code == code, result.output
    return result.output


def rows(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def summary(folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((folder / "summary.json").read_text(), parse_constant=pytest.fail)
    return found


def rates(folder: Path) -> list[float]:
    return [row["lr"] for row in rows(folder)]


def trained_by_hand(sizes: list[int], rates: list[float], seed: int = 0) -> torch.Tensor:
    """The weight after plain SGD on the task's samples, in the order of the seed, whole batches at once."""
    task = load_task("noise_tasks:regression", seed=seed)
    order = torch.randperm(512, generator=torch.Generator().manual_seed(seed)).tolist()
    weight = next(task.model.parameters()).detach().double()
    for size, rate in zip(sizes, rates, strict=True):
        x, y = task.collate([task.train[index] for index in order[:size]])
        order = order[size:]
        weight = weight - rate * ((x.double() @ weight.T - y.double()) * x.double()).mean(0, keepdim=True)
    return weight


def weight_of(folder: Path) -> torch.Tensor:
    from safetensors.torch import load_file

    return load_file(folder / "model.safetensors")["weight"].double()


# ---- scaling and warmup


def test_the_rate_warms_up_from_that_of_the_base_batch_to_the_scaled_one(tmp_path: Path) -> None:
    said = run(
        *TASK, "--lr", 0.01, "--base-batch-size", 8, "--batch-size", 32, "--scaling", "auto", "--warmup", 4,
        "--steps", 6, "--output", tmp_path / "run",
    )  # fmt: skip
    expected = [0.01, 0.0175, 0.025, 0.0325, 0.04, 0.04]
    assert rates(tmp_path / "run") == pytest.approx(expected)
    assert (
        "learning rate 0.04 (linear rule: 0.01 at batch size 8), constant after 4 updates of warmup from 0.01" in said
    )
    assert "    group 0: lr 0.01 -> 0.04" in said
    kept = summary(tmp_path / "run")["scaling"]
    assert (kept["rule"], kept["from_batch_size"], kept["to_batch_size"], kept["lr_factor"]) == ("linear", 8, 32, 4.0)
    assert [(each["name"], each["after"]) for each in kept["changes"]] == [("lr", 0.04)]
    assert all(each["why"] and each["source"] for each in kept["changes"])
    # What was said is what was trained; the control is the rate as it was given.
    by_hand = trained_by_hand([32] * 6, expected)
    assert torch.allclose(weight_of(tmp_path / "run"), by_hand, rtol=1e-5)
    assert not torch.allclose(weight_of(tmp_path / "run"), trained_by_hand([32] * 6, [0.01] * 6), rtol=1e-2)


@pytest.mark.parametrize(
    ("rule", "after"),
    [
        ("auto", {"lr": 2e-3, "beta2": 0.999**4, "eps": 5e-9, "weight_decay": 0.02}),
        ("adam-sde", {"lr": 2e-3, "beta1": 0.6, "beta2": 0.996, "eps": 5e-9, "weight_decay": 0.02}),
        ("half-life", {"beta2": 0.999**4, "weight_decay": 0.04}),
        ("sqrt", {"lr": 2e-3, "weight_decay": 0.02}),
    ],
)
def test_every_rule_changes_what_it_says(rule: str, after: dict[str, float], tmp_path: Path) -> None:
    options = ["--task-option", "optimizer=adamw", "--lr", 1e-3, "--base-batch-size", 8, "--batch-size", 32]
    run(*TASK, *options, "--scaling", rule, "--steps", 1, "--output", tmp_path / "run")
    changes = summary(tmp_path / "run")["scaling"]["changes"]
    assert {each["name"]: each["after"] for each in changes} == pytest.approx(after)


def test_beyond_its_validity_a_rule_says_so_and_goes_on(tmp_path: Path) -> None:
    said = run(*TASK, "--scaling", "sqrt", "--steps", 1, "--output", tmp_path / "run")
    assert "caution: rule='sqrt' has no source for the sgd family" in said
    assert len(summary(tmp_path / "run")["scaling"]["caveats"]) == 1


def test_without_a_rule_nothing_is_scaled_and_a_warmup_rises_from_nearly_nothing(tmp_path: Path) -> None:
    run(*TASK, "--warmup", 3, "--steps", 4, "--output", tmp_path / "run")
    assert rates(tmp_path / "run") == pytest.approx([0.0125, 0.025, 0.0375, 0.05])
    assert summary(tmp_path / "run")["scaling"] is None


# ---- the batch over training


def test_a_batch_that_grows_is_trained_as_by_hand_with_the_rate_of_its_size(tmp_path: Path) -> None:
    options = ["--batch-schedule", "steps:8,16@24,32@56", "--samples", 120, "--scaling", "linear", "--lr", 0.01]
    said = run(*TASK, *options, "--base-batch-size", 8, "--micro-batch-size", 5, "--output", tmp_path / "run")
    sizes, expected = [8, 8, 8, 16, 16, 32, 32], [0.01] * 3 + [0.02] * 2 + [0.04] * 2
    assert [row["batch_size"] for row in rows(tmp_path / "run")] == sizes
    assert rates(tmp_path / "run") == pytest.approx(expected)
    assert torch.allclose(weight_of(tmp_path / "run"), trained_by_hand(sizes, expected), rtol=1e-5)
    assert not torch.allclose(weight_of(tmp_path / "run"), trained_by_hand(sizes, [0.01] * 7), rtol=1e-2)  # the control
    assert "7 updates of 8 to 32 samples by steps:8,16@24,32@56" in said
    assert "effective batch 8 to 32, learning rate 0.01 to 0.04" in said
    assert [row.get("rescaled_by") for row in rows(tmp_path / "run")] == [None] * 3 + [2.0, None] + [2.0, None]


@pytest.mark.parametrize(
    ("schedule", "sizes"),
    [
        ("ramp:4:12:32", [4, 4, 4, 4, 8, 8, 12, 12, 8]),  # in multiples of the smaller size
        ("ramp:12:4:32", [12, 12, 8, 4, 4, 4, 4, 4, 4, 4, 4]),
        ("steps:4,20@8tokens", [4, 4, 20, 20, 16]),  # a term for each sample: as many tokens as samples
    ],
)
def test_schedules_give_their_sizes(schedule: str, sizes: list[int], tmp_path: Path) -> None:
    run(*TASK, "--batch-schedule", schedule, "--samples", 64, "--micro-batch-size", 4, "--output", tmp_path / "run")
    seen = [row["batch_size"] for row in rows(tmp_path / "run")]
    assert sum(seen) == 64
    assert seen == sizes


def test_tokens_are_the_terms_of_the_loss() -> None:
    terms = tokens_per_sample(load_task("code-lm", d_model=8, num_layers=1, num_heads=2, context=16))
    assert terms() == 16
    schedule = parse_batch_plan("steps:2,4@0.1ktokens").schedule(terms)
    assert planned_sizes(schedule, 1000, samples=16) == [2, 2, 2, 2, 4, 4]  # 100 tokens are 7 samples


def test_the_batch_doubles_when_the_noise_that_was_measured_allows_and_only_then(tmp_path: Path) -> None:
    options = ["--batch-schedule", "doubling:8:64", "--batch-size", 64, "--micro-batch-size", 2, "--samples", 1500]
    # Far more noise than signal, so that the first sizes are too small.
    said = run(
        *TASK,
        *options,
        "--task-option",
        "noise=20",
        "--lr",
        0.02,
        "--base-batch-size",
        8,
        "--scaling",
        "linear",
        "--output",
        tmp_path / "run",
    )
    log = rows(tmp_path / "run")
    assert sum(row["batch_size"] for row in log) == 1500
    intended, ends = 8, 0
    for row, following in pairwise(log):
        ends = (row["samples"] // 512 + 1) * 512  # an epoch's last batch is as short as it is
        allowed = row["noise_low"] is not None and row["noise_low"] > 2 * intended and 2 * intended <= 64
        intended *= 2 if allowed else 1
        left = min(ends, 1500) - row["samples"]
        assert following["batch_size"] == min(intended, left)
        assert following["lr"] == pytest.approx(0.02 * intended / 8)
    assert log[-1]["lr"] > 0.02  # it did double
    assert "of 8 samples, doubled up to 64 where the noise scale allows" in said
    assert summary(tmp_path / "run")["updates"] == len(log)
    # The control: without noise twice the batch is not allowed.
    run(*TASK, *options, "--task-option", "noise=0", "--lr", 0.02, "--output", tmp_path / "quiet")
    assert max(row["batch_size"] for row in rows(tmp_path / "quiet")) < max(row["batch_size"] for row in log)


def test_the_noise_scale_is_watched_where_memory_is_not_short(tmp_path: Path) -> None:
    said = run(*TASK, "--micro-batch-size", 4, "--steps", 40, "--output", tmp_path / "free")
    assert all(row["noise_scale"] is None or row["noise_scale"] > 0 for row in rows(tmp_path / "free"))
    assert "The gradient noise scale is " in said
    assert summary(tmp_path / "free")["noise"]["num_windows"] == 40
    run(*TASK, "--micro-batch-size", 4, "--steps", 4, "--max-memory", "100MB", "--output", tmp_path / "short")
    run(*TASK, "--micro-batch-size", 32, "--steps", 4, "--output", tmp_path / "one")
    for name in ("short", "one"):  # no copy of the gradients to spare; and nothing to compare
        assert "noise_scale" not in rows(tmp_path / name)[-1]
        assert summary(tmp_path / name)["noise"] is None


# ---- mistakes


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--batch-size", "-8"], "'--batch-size': a whole number of at least 1 is needed; got -8"),
        (["--base-batch-size", "0"], "'--base-batch-size': a whole number of at least 1 is needed; got 0"),
        (["--scaling", "cubic"], "'cubic' is not one of 'auto', 'linear'"),
        (["--scaling", "adam-sde"], "--scaling adam-sde from batch size 8 to 32: rule='adam-sde' sets the memory"),
        (["--task-option", "optimizer=unknown", "--scaling", "auto"], "no rule is known for the optimizer Unknown"),
        (["--task-option", "optimizer=adamw", "--scaling", "adam-sde", "--batch-size", "128"], "must stay below 1"),
        (["--scaling", "auto", "--lr", "0.1"], "error: --scaling auto with a --lr of your own needs --base-batch-size"),
        (["--batch-schedule", "cosine:3"], "error: --batch-schedule cosine:3 is no schedule; write steps:32,128@5k"),
        (["--batch-schedule", "constant:3"], "is no schedule; --batch-size alone stays constant; write"),
        (["--batch-schedule", "ramp:0:32:64"], "a batch size is a whole number of at least 1, got '0'"),
        (["--batch-schedule", "ramp:8:32"], "error: --batch-schedule ramp:8:32 is no schedule"),
        (["--batch-schedule", "ramp:8:32:soon"], "a length is a number such as 20000, 20k, 1.5M or 20Mtokens, got"),
        (["--batch-schedule", "steps:8@3,16"], "the first size stands alone, got '8@3'"),
        (["--batch-schedule", "steps:8,16"], "every size after the first says when it begins"),
        (["--batch-schedule", "steps:8,16@9tokens,32@20"], "lengths are all in samples or all in tokens"),
        (["--batch-schedule", "steps:8,16@64,32@32"], "error: steps begin at 0 and rise"),
        (["--batch-schedule", "steps:8,16@64,end@32"], "error: end=32 comes before the last step"),
        (["--batch-schedule", "steps:8,16@64,end@500"], "error: the batch schedule ends at 500 samples, before the"),
        (["--batch-schedule", "steps:8,16@64,end@99", "--steps", "20"], "error: the batch schedule ends at 99 samples"),
        (["--batch-schedule", "ramp:8:16:9k"], "error: the training of 512 samples ends before the batch schedule"),
        (["--batch-schedule", "ramp:8:1024:64"], "--batch-schedule, 1024 is more than the 512 training samples"),
        (["--batch-schedule", "ramp:8:16:64", "--batch-size", "32"], "--batch-size 32 is not the last size of"),
        (["--batch-schedule", "doubling:64:8"], "error: largest=8 is below the first batch size 64"),
        (["--batch-schedule", "doubling:8:64", "--micro-batch-size", "8"], "update of 8 samples is one: give a size"),
        (["--batch-schedule", "doubling:8:64", "--micro-batch-size", "auto"], "auto may make them one: give a number"),
        (["--batch-schedule", "doubling:1:64"], "one of 1 sample has only one"),
    ],
)  # fmt: skip
def test_a_mistake_is_named_before_any_work_and_leaves_nothing(
    options: list[str], message: str, tmp_path: Path
) -> None:
    said = run(*TASK, *options, "--output", tmp_path / "run", code=2)
    assert message in " ".join(said.replace("│", " ").split())
    assert "Traceback" not in said
    assert not (tmp_path / "run").exists()


def test_a_rule_that_only_a_later_size_breaks_is_refused_before_the_first_update(tmp_path: Path) -> None:
    options = ["--task-option", "optimizer=adamw", "--scaling", "adam-sde", "--batch-schedule"]
    run(*TASK, *options, "ramp:8:64:256", "--output", tmp_path / "fits")  # 8 (1 - 0.9) is below 1
    said = run(*TASK, *options, "ramp:8:128:256", "--output", tmp_path / "run", code=2)
    assert "error: --scaling adam-sde from batch size 8 to 128" in said
    assert "With --scaling none the learning rate stays as given" in " ".join(said.split())
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("named", ["auto", "sqrt"])
def test_the_rule_for_every_step_is_the_one_that_fits_the_whole_way(named: RuleName) -> None:
    def moved(betas: tuple[float, float], sizes: list[int], rule: RuleName) -> tuple[str, float, float]:
        optimizer = torch.optim.AdamW([torch.ones(2)], lr=1e-3, betas=betas)
        for before, after in pairwise(sizes):
            rescale(optimizer, rule, from_batch_size=before, to_batch_size=after)
        return rule, optimizer.param_groups[0]["lr"], optimizer.param_groups[0]["betas"][1]

    low, usual, steps = (0.9, 0.95), (0.9, 0.999), [32, 64, 128, 256]
    for betas, expected in ((low, 0.95), (usual, 0.999**8 if named == "auto" else 0.999)):
        rule = one_rule(torch.optim.AdamW([torch.ones(2)], betas=betas), named, 32, steps)
        for sizes in (steps, [32, 256]):
            assert moved(betas, sizes, rule) == (rule, pytest.approx(1e-3 * 8**0.5), pytest.approx(expected))
    assert moved(low, steps, "auto")[2] == pytest.approx(0.95**4), "the control: chosen anew at each step"


def test_a_plan_reads_numbers_as_people_write_them() -> None:
    assert parse_batch_plan("ramp:32:512:1.5M").lengths == (1_500_000,)
    assert parse_batch_plan("steps:32,64@1_000").lengths == (0, 1000)
    assert parse_batch_plan("ramp:32:512:2Gtokens").in_tokens
