"""The benchmark of exactness: its cases hold, and the README shows the numbers that were kept."""

import json
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from helpers import benchmark

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks" / "results" / "exactness.json"
EASY = "equal micro-batches, mean over samples"  # the one case that the textbook loop gets right


@pytest.fixture(scope="module")
def exactness() -> ModuleType:
    pytest.importorskip("sklearn")
    return benchmark("exactness")


def check(row: dict[str, Any]) -> None:
    """Exact, where the textbook loop is not."""
    assert row["macrobatch"] <= (1e-5 if "bfloat16" in row["case"] else 1e-12)
    assert (row["textbook"] <= 1e-12) if row["case"] == EASY else (row["textbook"] > 0.01)


def test_every_case_of_one_process_is_exact(exactness: ModuleType) -> None:
    rows = [exactness.measure(case) for case in exactness.cases()]
    for row in [*rows, exactness.measure_bfloat16()]:
        check(row)
    assert EASY in [row["case"] for row in rows]


def test_the_kept_results_say_the_same(exactness: ModuleType) -> None:
    rows = json.loads(RESULTS.read_text(encoding="utf-8"))["rows"]
    for row in rows:
        check(row)
    names = {row["case"] for row in rows}
    assert names >= {case.name for case in exactness.cases()}
    assert any("two ranks" in name for name in names)


def test_the_readme_shows_the_kept_results(exactness: ModuleType) -> None:
    rows = json.loads(RESULTS.read_text(encoding="utf-8"))["rows"]
    assert exactness.table(rows) in (ROOT / "README.md").read_text(encoding="utf-8")
