"""The benchmark of exactness: its cases hold, and the README shows the numbers that were kept."""

import importlib.util
import json
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks" / "results" / "exactness.json"
EASY = "equal micro-batches, mean over samples"  # the one case that the textbook loop gets right


@pytest.fixture(scope="module")
def benchmark() -> ModuleType:
    pytest.importorskip("sklearn")
    spec = importlib.util.spec_from_file_location("benchmark_exactness", ROOT / "benchmarks" / "exactness.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # its dataclass looks itself up there
    spec.loader.exec_module(module)
    return module


def check(row: dict[str, Any]) -> None:
    """Exact, where the textbook loop is not."""
    assert row["macrobatch"] <= (1e-5 if "bfloat16" in row["case"] else 1e-12)
    assert (row["textbook"] <= 1e-12) if row["case"] == EASY else (row["textbook"] > 0.01)


def test_every_case_of_one_process_is_exact(benchmark: ModuleType) -> None:
    rows = [benchmark.measure(case) for case in benchmark.cases()]
    for row in [*rows, benchmark.measure_bfloat16()]:
        check(row)
    assert EASY in [row["case"] for row in rows]


def test_the_kept_results_say_the_same(benchmark: ModuleType) -> None:
    rows = json.loads(RESULTS.read_text(encoding="utf-8"))["rows"]
    for row in rows:
        check(row)
    names = {row["case"] for row in rows}
    assert names >= {case.name for case in benchmark.cases()}
    assert any("two ranks" in name for name in names)


def test_the_readme_shows_the_kept_results(benchmark: ModuleType) -> None:
    rows = json.loads(RESULTS.read_text(encoding="utf-8"))["rows"]
    assert benchmark.table(rows) in (ROOT / "README.md").read_text(encoding="utf-8")
