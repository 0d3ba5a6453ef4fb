"""`macrobatch plan`: what it prints is the library's own plan, what it plans trains, and mistakes are a line each."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from own_tasks import line, squares
from rich.console import Console
from torch import nn
from typer.testing import CliRunner

import macrobatch as mb
from macrobatch.cli import app
from macrobatch.cli import plan as plan_command
from macrobatch.cli.plan_words import choices_table, lines, memory_table
from macrobatch.tasks import Task, load_task

LINE = ["--task", "own_tasks:line", "--task-option", "hidden=1000", "--batch-size", "40"]
SMALL_LM = ["--task-option", "d_model=16", "--task-option", "num_layers=2", "--task-option", "context=32"]


def run(command: str, *arguments: str | Path, code: int = 0) -> str:
    """What the command prints, both streams, its lines joined; the exit code is checked."""
    result = CliRunner().invoke(app, [command, *map(str, arguments)])
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    assert result.exit_code == code, result.output
    return " ".join(result.output.replace("│", " ").split())


def planned(folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((folder / "plan.json").read_text(), parse_constant=pytest.fail)
    return found


class Counting(nn.Module):
    """A model whose forward depends on the numbers in the data: no fake tensor gets through."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(3, 1)

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        """Twice, where the data say so."""
        once: torch.Tensor = self.linear(inputs)
        return once + self.linear(inputs) if float(inputs.sum()) > 0 else once


def counting() -> Task:
    return replace(line(), model=Counting())


def normalising(*, size: int = 128) -> Task:
    model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 1))
    return replace(line(size=size), model=model, loss_fn=squares, batch_size=size)


# ---- what it says


@pytest.fixture(scope="module")
def of_a_language_model(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Path]:
    folder = tmp_path_factory.mktemp("plan") / "run"
    sizes = ["--batch-size", "512", "--max-memory", "20MB", "--device", "cpu"]
    return run("plan", *SMALL_LM, *sizes, "--output", folder), folder


def test_what_is_printed_and_written_is_the_plan_of_the_library(of_a_language_model: tuple[str, Path]) -> None:
    said, folder = of_a_language_model
    task = load_task("code-lm", d_model=16, num_layers=2, context=32)
    sample = task.collate([task.train[index] for index in range(5)])  # another number of samples, the same plan
    by_hand = mb.plan(
        task.model,
        task.loss_fn,
        sample,
        batch_size=512,
        max_memory="20MB",
        optimizer=task.make_optimizer(task.model, 0.1),
        measure_speed=False,
    )
    found = planned(folder)
    assert found["largest"]["micro_batch_size"] == by_hand.micro_batch_size
    assert found["largest"]["memory"]["peak"] == by_hand.peak <= 20_000_000
    assert (found["method"], found["is_exact"], found["optimizer"]) == ("fake", True, "AdamW")
    assert f"samples at once {by_hand.micro_batch_size} " in said
    assert f"{by_hand.micro_batch_size + 1} samples at once were tried, too, and do not fit" in said
    assert f"accumulation steps {by_hand.accumulation_steps} " in said
    assert "predicted on fake tensors, in " in said
    assert "passes that allocate nothing" in said
    for kind in ("parameters", "gradients", "optimizer state", "inputs", "activations"):
        assert kind in said
    assert "predicted time per update" in said
    fastest = found["fastest"]["seconds_per_update"]
    assert fastest > 0
    assert "checkpointing: " in said
    assert found["checkpointing"]["seconds_per_sample"] > 0
    assert found["checkpointing"]["seconds_per_sample_without"] > 0


def test_the_curve_is_drawn_with_the_budget_as_a_line(of_a_language_model: tuple[str, Path]) -> None:
    _, folder = of_a_language_model
    assert {path.name for path in folder.iterdir()} == {"plan.json", "plan.png", "plan.svg"}
    drawn = (folder / "plan.svg").read_text()
    for text in ("budget 20.0 MB", "time per sample", "predicted peak", "largest that fits", "fastest"):
        assert text in drawn
    assert (folder / "plan.png").read_bytes().startswith(b"\x89PNG")
    points = planned(folder)["curve"]
    assert [point["micro_batch_size"] for point in points] == sorted({point["micro_batch_size"] for point in points})
    assert points[-1]["peak"] > 20_000_000 > points[0]["peak"]  # both sides of the budget


def test_what_is_planned_trains_within_the_budget_and_what_is_beyond_it_does_not_fit(tmp_path: Path) -> None:
    run("plan", *LINE, "--max-memory", "100KB", "--output", tmp_path / "plan")
    size = planned(tmp_path / "plan")["largest"]["micro_batch_size"]
    assert 1 < size < 20

    def train(micro_batch_size: int) -> dict[str, Any]:
        folder = tmp_path / str(micro_batch_size)
        sizes = ["--micro-batch-size", micro_batch_size, "--max-memory", "100KB"]
        run("train", *LINE, *sizes, "--steps", 3, "--output", folder)
        found: dict[str, Any] = json.loads((folder / "summary.json").read_text())
        return found

    fits = train(size)
    assert fits["retries"] == 0
    assert fits["peak_bytes"] <= 100_000
    assert train(2 * size)["retries"] > 0  # the control


def test_a_model_that_needs_real_numbers_is_planned_by_probes_and_it_says_so(tmp_path: Path) -> None:
    said = run("plan", "--task", "test_cli_plan:counting", "--batch-size", "32", "--output", tmp_path / "run")
    assert planned(tmp_path / "run")["method"] == "probes"
    assert "passes with real tensors: the model does not run on fake tensors" in said


def test_a_layer_that_couples_samples_is_named(tmp_path: Path) -> None:
    said = run("plan", "--task", "test_cli_plan:normalising", "--output", tmp_path / "run")
    assert "note: '1' (BatchNorm1d) normalises over the micro-batch: its size changes the result" in said


def test_bars_are_as_long_as_their_share_of_the_peak_and_what_was_not_timed_is_a_dash() -> None:
    task = line(hidden=1000)
    sample = task.collate([task.train[index] for index in range(4)])
    plan = mb.plan(task.model, task.loss_fn, sample, batch_size=40, max_memory="150KB", measure_speed=False)
    console = Console(width=100, color_system=None)
    with console.capture() as captured:
        console.print(memory_table(plan), choices_table(plan))
    rows = {row.split("│")[1].strip(): row for row in captured.get().splitlines() if row.count("│") > 2}
    for label, num_bytes in (("activations", plan.memory.activations), ("parameters", plan.memory.parameters)):
        assert rows[label].count("█") == pytest.approx(16 * num_bytes / plan.peak, abs=1)
    assert rows["time per sample"].count(" - ") == 1
    assert lines(plan, None)[-1].startswith("checkpointing: ")


def test_threads_are_those_asked_for_and_afterwards_those_of_before(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = torch.get_num_threads()
    seen: list[int] = []
    monkeypatch.setattr(plan_command, "save_curve", lambda *_: seen.append(torch.get_num_threads()))
    run("plan", *LINE, "--threads", str(before + 1), "--output", tmp_path / "run")
    assert (seen, torch.get_num_threads()) == ([before + 1], before)


# ---- mistakes


class Uncounted(list[Any]):
    """Samples without labels."""

    def __getitem__(self, index: Any) -> Any:
        return {"input": torch.ones(3)}["label"]


def unlabelled() -> Task:
    return replace(line(), train=Uncounted(range(40)))  # type: ignore[arg-type]  # a list is map-style


def test_what_a_tasks_own_code_raises_is_a_line_here_too(tmp_path: Path) -> None:
    said = run("plan", "--task", "test_cli_plan:unlabelled", "--output", tmp_path / "run", code=2)
    assert "error: the task test_cli_plan:unlabelled raised KeyError: 'label'" in said
    assert f"({__file__}, line " in said
    assert said.endswith(f"the whole traceback is in {tmp_path / 'run' / 'traceback.txt'}")
    assert [path.name for path in (tmp_path / "run").iterdir()] == ["traceback.txt"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--max-memory", "10KB"], "error: max_memory=10.00 kB is less than the model's own state"),
        (["--max-memory", "48500"], "error: one sample does not fit into max_memory=48.50 kB: it needs"),
        (["--max-memory", "6bananas"], "'6bananas' is not a number of bytes"),
        (["--max-memory", "900TB"], "error: max_memory=900.00 TB is beyond the device"),
        (["--max-memory", "0%"], "error: max_memory='0%': a share of what the device has is above 0%"),
        (["--max-memory", "many%"], "'many%' is not a number of bytes"),
        (["--batch-size", "41"], "error: --batch-size 41 is more than the 40 training samples of line"),
        (["--task", "cats"], "error: there is no task 'cats'"),
    ],
)
def test_a_plan_that_cannot_be_made_is_a_line_and_leaves_nothing(
    options: list[str], message: str, tmp_path: Path
) -> None:
    said = run("plan", *LINE, *options, "--output", tmp_path / "run", code=2)
    assert message in said
    assert "Traceback" not in said
    assert not (tmp_path / "run").exists()
