"""What the pages say that losses over all outputs cost and bring is what was measured, and keeps its promises."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import benchmark

ROOT = Path(__file__).parents[1]
PAGE = ROOT / "docs" / "contrastive.md"


def kept(name: str) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((ROOT / "benchmarks" / "results" / f"{name}.json").read_text(encoding="utf-8"))
    return found


def check_peaks_and_errors(peak: dict[str, float], error: dict[str, float]) -> None:
    """One kept graph costs no memory, each further one does; only plain accumulation has another gradient.

    By hand the states of random numbers, 5 kB each, are in no operation, so that the meter does not see them.
    """
    assert peak["m = 1"] == peak["m = 0"] <= 1.01 * peak["by hand"]
    assert peak["m = 1"] < 0.25 * peak["full batch"]
    assert peak["m = 1"] < peak["m = 2"] < peak["m = 4"] < peak["m = 8"]
    assert all(error[f"m = {m}"] <= 1e-12 for m in (0, 1, 2, 4, 8))
    assert error["plain accumulation"] > 0.05


def test_each_kept_graph_saves_a_forward_and_one_is_free_as_measured_and_as_the_page_says() -> None:
    results = kept("contrastive")
    assert benchmark("contrastive").table(results) in PAGE.read_text(encoding="utf-8")
    assert all(0.95 <= middle <= 1.05 for _, middle, _ in results["over the expected time"].values())
    assert results["over by hand"]["m = 1"] < 1
    check_peaks_and_errors(results["peak MB"], results["gradient error"])


@pytest.fixture
def one_thread() -> Any:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.mark.usefixtures("one_thread")
def test_the_benchmark_of_kept_graphs_counts_the_same_on_any_machine() -> None:
    module = benchmark("contrastive")
    torch.manual_seed(0)
    case = module.Case(8, 32, 2, 32)
    bytes_ = module.peaks(case)
    check_peaks_and_errors(bytes_, module.errors(case))


def check_intervals(summary: dict[str, Any]) -> None:
    """Gathered and native cannot be told apart in any metric; nothing better is claimed than what the page says."""
    for rows in summary.values():
        _, low, high = rows["gathered 256 minus native 256"]
        assert low <= 0 <= high


def test_the_fine_tuned_encoder_is_as_the_page_says_with_intervals() -> None:
    module, results, page = benchmark("embeddings"), kept("embeddings"), PAGE.read_text(encoding="utf-8")
    assert {(run["way"], run["seed"]) for run in results["runs"]} == {(way, s) for way in module.WAYS for s in range(3)}
    assert module.table(results) in page
    assert module.differences(results) in page
    assert all(error < 1e-4 for error in results["gradient error of the first updates"])
    assert len(results["gradient error of the first updates"]) == 5
    check_intervals(results["summary"])
    places = {(run["way"], run["seed"]): run["places"] for run in results["runs"]}
    assert all(places["gathered 256", seed] == places["native 256", seed] for seed in range(3))
    assert results["seconds"] <= 45 * 60
    within = results["within a budget"]
    assert within["gathered 256"] == "5 updates, 0 retries"
    assert within["native 64"] == "out of memory after 0 updates"
    for name, peak in within["peak MB"].items():
        assert f"| {peak} |" in page, name


def test_the_bootstrap_finds_a_difference_that_is_there_and_none_that_is_not() -> None:
    module, generator = benchmark("embeddings"), torch.Generator().manual_seed(0)
    before = torch.randint(1, 20, (400,), generator=generator).tolist()
    runs = [
        {"way": way, "seed": seed, "places": [max(1, p - gain) for p in before]}
        for way, gain in (("gathered 256", 3), ("native 256", 3), ("accumulated 256", 0))
        for seed in range(3)
    ]
    found = module.summary(before, runs)["recall@1"]
    assert found["gathered 256 minus native 256"] == [0, 0, 0]
    difference, low, high = found["gathered 256 minus accumulated 256"]
    expected = sum(p in (2, 3, 4) for p in before) / len(before)
    assert difference == pytest.approx(expected, abs=1e-4)
    standard_error = (expected * (1 - expected) / len(before)) ** 0.5
    assert (high - low) / 2 == pytest.approx(1.96 * standard_error, rel=0.1)
