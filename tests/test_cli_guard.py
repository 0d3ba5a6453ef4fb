"""`macrobatch train --spike-guard`: a spike is told of everywhere, and training goes on as the policy says."""

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from typer.testing import CliRunner

from macrobatch.cli import app
from macrobatch.tasks import load_task

BATCH, BAD = 8, 100  # samples in an update, and the update, from 0, that has the sample with the wrong target
SIZE = 1024
TASK = ["--task", "noise_tasks:regression", "--task-option", f"size={SIZE}", "--task-option", "noise=0.5"]
OPTIONS = ["--batch-size", BATCH, "--micro-batch-size", 2, "--lr", 0.02]


def run(*arguments: str | float | Path, code: int = 0) -> str:
    result = CliRunner().invoke(app, ["train", *map(str, arguments)])
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    assert result.exit_code == code, result.output
    return result.output


def order() -> list[list[int]]:
    """The samples of each update, in the order of seed 0."""
    drawn = torch.randperm(SIZE, generator=torch.Generator().manual_seed(0)).tolist()
    return [drawn[start : start + BATCH] for start in range(0, SIZE, BATCH)]


def spiked(folder: Path, *options: str | float, code: int = 0) -> tuple[str, list[dict[str, Any]], dict[str, Any]]:
    """What a run over one epoch says, its rows and its summary; update BAD has a target of a million."""
    said = run(*TASK, "--task-option", f"bad={order()[BAD][3]}", *OPTIONS, *options, "--output", folder, code=code)
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return said, rows, json.loads((folder / "summary.json").read_text())


def by_hand(windows: list[list[int]], rates: list[float]) -> torch.Tensor:
    """The weight after plain SGD over these windows at these rates, in float64."""
    task = load_task("noise_tasks:regression", size=SIZE, noise=0.5)
    weight = next(task.model.parameters()).detach().double()
    for window, rate in zip(windows, rates, strict=True):
        x, y = (each.double() for each in task.collate([task.train[index] for index in window]))
        weight = weight - rate * ((x @ weight.T - y) * x).mean(0, keepdim=True)
    return weight


def weight_of(folder: Path) -> torch.Tensor:
    from safetensors.torch import load_file

    return load_file(folder / "model.safetensors")["weight"].double()


def test_a_skipped_spike_is_a_window_that_training_never_saw(tmp_path: Path) -> None:
    said, rows, summary = spiked(tmp_path / "run", "--spike-guard", "skip")
    flagged = [row for row in rows if "spike" in row]
    assert [(row["update"], row["spike"], row["applied"]) for row in flagged] == [(BAD + 1, "skipped", False)]
    assert flagged[0]["spike_micro_batch"] == 1  # sample 3 of 8, in micro-batches of 2
    windows = order()
    kept = windows[:BAD] + windows[BAD + 1 :]
    assert torch.allclose(weight_of(tmp_path / "run"), by_hand(kept, [0.02] * len(kept)), rtol=1e-4)
    assert summary["updates_applied"] == len(rows) - 1
    assert summary["spike_guard"]["events"][0]["spike_why"] == flagged[0]["spike_why"]
    assert "spike guard: 1 update flagged, 1 skipped; 127 updates stand" in said
    assert said.count("spike: ") == 1  # the library's own words, once
    assert f"update {BAD + 1}: spike: loss" in said
    events = EventAccumulator(str(tmp_path / "run" / "tensorboard")).Reload().Tags()
    assert {"train/spike/text_summary", "train/spike_why/text_summary"} <= set(events["tensors"])
    assert {"train/noise_scale", "train/batch_size"} <= set(events["scalars"])
    # The control: unguarded, the sample spoils the weight.
    spiked(tmp_path / "off")
    assert float((weight_of(tmp_path / "off") - weight_of(tmp_path / "run")).norm()) > 1


def test_a_rollback_goes_on_from_the_snapshot_with_a_smaller_rate_that_warms_up(tmp_path: Path) -> None:
    said, rows, summary = spiked(tmp_path / "run", "--spike-guard", "rollback", "--snapshot-every", 30)
    (flagged,) = [row for row in rows if "spike" in row]
    back_to = flagged["spike_back_to"]
    assert (flagged["spike"], back_to) == ("rolled_back", 90)
    after = [row["lr"] for row in rows[BAD + 1 :]]
    assert after == pytest.approx([0.01 * min(k, 20) / 20 for k in range(1, len(after) + 1)])
    windows = order()
    kept = windows[:back_to] + windows[BAD + 1 :]  # all since the snapshot are dropped, and not only the bad one
    assert torch.allclose(weight_of(tmp_path / "run"), by_hand(kept, [0.02] * back_to + after), rtol=1e-4)
    all_but_one = windows[:BAD] + windows[BAD + 1 :]
    control = by_hand(all_but_one, [0.02] * BAD + after)
    assert not torch.allclose(weight_of(tmp_path / "run"), control, rtol=1e-4)
    told = summary["spike_guard"]
    assert (told["rollbacks"], told["lr_scale"], told["updates_kept"]) == (1, 0.5, len(kept))
    assert "1 rolled back; 117 updates stand; the learning rate is 0.5 times what it was" in said


def test_a_warning_changes_nothing(tmp_path: Path) -> None:
    said, rows, _ = spiked(tmp_path / "run", "--spike-guard", "warn")
    assert [row["applied"] for row in rows] == [True] * len(rows)
    assert "1 applied all the same" in said
    spiked(tmp_path / "off")
    assert torch.equal(weight_of(tmp_path / "run"), weight_of(tmp_path / "off"))


def test_after_a_rollback_the_rate_fits_the_batch_of_the_schedule(tmp_path: Path) -> None:
    # 16 from update 96 on: the snapshot is of batches of 8, what comes after it is not.
    schedule = ["--batch-schedule", "steps:8,16@768", "--scaling", "linear", "--base-batch-size", 8]
    drawn = torch.randperm(SIZE, generator=torch.Generator().manual_seed(0)).tolist()
    bad = drawn[768 + 16 * 4]  # of update 101, the fifth of 16
    options = ["--micro-batch-size", 2, "--lr", 0.02, "--spike-guard", "rollback", "--snapshot-every", 40]
    run(*TASK, "--task-option", f"bad={bad}", *schedule, *options, "--output", tmp_path / "run")
    rows = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    (flagged,) = [row for row in rows if "spike" in row]
    assert (flagged["update"], flagged["spike_back_to"]) == (101, 80)
    after = [row for row in rows if row["update"] > 101]
    assert {row["batch_size"] for row in after} == {16}
    assert [row["lr"] for row in after] == pytest.approx([0.02 * k / 20 for k in range(1, len(after) + 1)])


def test_a_guard_that_gives_up_ends_the_run_with_what_there_is(tmp_path: Path) -> None:
    bad = ["--task-option", "bad=-2", "--task-option", "badness=1e999"]  # in nearly every update
    said = run(*TASK, *bad, *OPTIONS, "--spike-guard", "skip", "--output", tmp_path / "run", code=2)
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert summary["outcome"].startswith("given up at update ")
    assert summary["validation_loss"] is None
    assert "error: 20 windows in a row were flagged" in said
    assert torch.isfinite(weight_of(tmp_path / "run")).all()


def test_what_is_not_finite_is_skipped_by_the_guard_from_the_first_update(tmp_path: Path) -> None:
    bad = ["--task-option", f"bad={order()[2][0]}", "--task-option", "badness=1e999", "--steps", "6"]
    said = run(*TASK, *bad, *OPTIONS, "--spike-guard", "skip", "--output", tmp_path / "run")
    rows = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert [row.get("spike") for row in rows] == [None, None, "skipped", None, None, None]
    assert all(math.isfinite(row["loss"]) for row in rows if row["applied"])
    assert "note: the spike guard learns from 64 updates before it judges one, and this run has 6" in said


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--spike-guard", "maybe"], "'maybe' is not one of 'off', 'warn', 'skip', 'rollback'"),
        (["--snapshot-every", "10"], "error: --snapshot-every is for --spike-guard rollback; with off nothing goes"),
        (["--spike-guard", "skip", "--snapshot-every", "10"], "with skip nothing goes back to one"),
        (["--spike-guard", "rollback", "--snapshot-every", "0"], "a whole number of at least 1 is needed; got 0"),
    ],
)
def test_a_guard_without_what_it_needs_is_refused(options: list[str], message: str, tmp_path: Path) -> None:
    said = run(*TASK, *OPTIONS, *options, "--output", tmp_path / "run", code=2)
    assert message in " ".join(said.replace("│", " ").split())
    assert not (tmp_path / "run").exists()
