"""Benchmarks keep what they measured: results are written whole, runs are made once, turns are counted."""

import json
import re
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import benchmark

common = benchmark("common")


def test_a_run_that_is_stopped_leaves_those_before_and_only_what_is_missing_is_made_again(tmp_path: Path) -> None:
    path, made = tmp_path / "new" / "results.json", []

    def make(name: str) -> dict[str, int]:
        made.append(name)
        if name == "c" and len(made) == 3:
            raise KeyboardInterrupt
        return {"length": len(made)}

    for _ in range(2):
        found: dict[str, Any] = {"seeds": [0], "runs": common.kept_runs(path)}
        try:
            common.make_missing(found, ["a", "b", "c", "d"], make, path)
        except KeyboardInterrupt:
            assert list(json.loads(path.read_text())["runs"]) == ["a", "b"]
    assert made == ["a", "b", "c", "c", "d"]
    kept = json.loads(path.read_text())
    assert {name: run["length"] for name, run in kept["runs"].items()} == {"a": 1, "b": 2, "c": 4, "d": 5}
    assert (kept["seeds"], kept["torch"], kept["threads"]) == ([0], torch.__version__, torch.get_num_threads())


def test_results_that_cannot_be_written_leave_the_file_as_it_was(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "results.json"
    common.write({"rows": [1]}, path)
    with pytest.raises(TypeError):
        common.write({"rows": object()}, path)

    def stopped(*_: object) -> None:
        raise OSError("stopped")

    with monkeypatch.context() as patch:
        patch.setattr(Path, "replace", stopped)
        with pytest.raises(OSError, match="stopped"):
            common.write({"rows": [2]}, path)
    assert json.loads(path.read_text()) == {"rows": [1]}
    common.write({"rows": [2]}, path)
    assert json.loads(path.read_text()) == {"rows": [2]}, "control: written"
    common.write({"rows": [3]}, None)


def test_all_take_a_turn_in_each_round_and_only_what_is_asked_for_is_timed() -> None:
    ran: list[str] = []
    ways = {name: (lambda name=name: ran.append(name)) for name in "xyz"}
    seconds = common.in_turns(ways, 4, before=lambda: ran.append("-"), warmup=2, untimed=1)
    assert {name: len(times) for name, times in seconds.items()} == {"x": 4, "y": 4, "z": 4}
    rounds = [ran[12 * k : 12 * k + 12] for k in range(6)]
    assert len(ran) == 72
    for each in rounds:
        assert each[::2] == ["-"] * 6
        assert each[1::4] == each[3::4], "twice in a row, the second timed"
        assert sorted(each[1::4]) == ["x", "y", "z"]


def test_quartiles_are_of_ratios_in_the_same_round() -> None:
    assert common.quartiles([1.0, 4.0, 9.0], [1.0, 2.0, 3.0]) == [1.0, 2.0, 3.0]
    assert common.quartiles([3.0], [2.0]) == [1.5] * 3


def test_options_are_those_of_the_benchmark_and_the_threads(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(sys, "argv", ["x", "--micro-batch-size", "4", "--output", str(tmp_path / "a.json")])
    arguments = common.parsed(common.parser("What it is.\n\nMore.", micro_batch_size=16, rounds=3))
    assert vars(arguments) == {"micro_batch_size": 4, "rounds": 3, "threads": 1, "output": tmp_path / "a.json"}
    assert common.machine()["machine"].endswith("1 thread(s)")


def test_the_page_says_the_overhead_that_was_measured() -> None:
    root = Path(__file__).parents[1]
    results = json.loads((root / "benchmarks" / "results" / "overhead.json").read_text(encoding="utf-8"))
    page = (root / "docs" / "accumulator.md").read_text(encoding="utf-8")
    said = page[page.index("**Time over the hand-written loop**") : page.index("## When not to use it")]
    for name in benchmark("overhead").CASES:
        assert f"{results[name]['macrobatch'][1]:.2f}" in said, name
        assert re.search(
            rf"\b{results[name]['ms per micro-batch']:.1f} ms|\b{results[name]['ms per micro-batch']:.0f} ms", said
        )
    readme = (root / "README.md").read_text(encoding="utf-8")
    slow = {f"{row['macrobatch'][1]:.2f}" for row in rows_of(results) if row["ms per micro-batch"] >= 3}
    [fast] = [f"{row['macrobatch'][1]:.2f}" for row in rows_of(results) if row["ms per micro-batch"] < 1.5]
    assert len(slow) == 1
    assert f"{slow.pop()} times as long for micro-batches of 3 ms and more, {fast} at 1 ms" in readme


def rows_of(results: dict[str, Any]) -> list[dict[str, Any]]:
    return [row for row in results.values() if isinstance(row, dict)]


def test_the_decision_on_backward_says_what_was_measured() -> None:
    root = Path(__file__).parents[1]
    results = json.loads((root / "benchmarks" / "results" / "backward.json").read_text(encoding="utf-8"))
    [page] = [path.read_text(encoding="utf-8") for path in (root / "docs" / "decisions").glob("0006-*.md")]
    said = re.findall(r"^\| .* \| (0\.\d+) \|$", page, re.MULTILINE)
    assert said == [f"{results[name][1]:.3f}" for name in benchmark("backward").WAYS]
    assert float(said[1]) < float(said[0])  # which is why
