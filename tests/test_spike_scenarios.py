"""The benchmark of spikes on a smaller model: what is ruined without a guard is not with one, and skipping cannot."""

import json
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from helpers import benchmark

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def spikes() -> ModuleType:
    module = benchmark("spikes")
    module.TASK_OPTIONS = {"d_model": 32, "num_layers": 1, "num_heads": 2, "context": 32}
    return module


@pytest.fixture(scope="module")
def runs(spikes: ModuleType, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Makes a run, its loss over the clean one's, and what was flagged in the event."""
    lengths = spikes.Lengths(clean=401, end=400, event=300, lead=60)
    fork = tmp_path_factory.mktemp("forks") / "fork.pt"
    clean = spikes.clean_run(0, lengths, fork)
    assert clean["judged"] > 300
    assert clean["flagged"] == [], "a clean run is left alone"

    def run(event: str, policy: str) -> tuple[float, dict[int, str], bool]:
        found = spikes.forked_run(0, event, policy, lengths, fork)
        during = {t: kind for t, kind in found["flagged"].items() if t < spikes.EVENTS["a"]}
        return found["validation_loss"] / clean["validation_loss"], during, found["gave_up"] is not None

    return run


def test_windows_with_shuffled_labels_do_no_harm_under_a_guard(runs: Any) -> None:
    ratio, flagged, _ = runs("a", "rollback")
    assert flagged == {0: "rolled_back", **dict.fromkeys(range(1, 10), "skipped")}
    assert ratio < 1.05
    assert runs("a", "off")[0] > 1.15, "control"


def test_steps_that_are_flagged_only_afterwards_are_undone(runs: Any) -> None:
    ratio, flagged, _ = runs("b", "rollback")
    assert min(flagged) >= 1, "the first bad step could not be seen before it was made"
    first = min(flagged)
    assert "rolled_back" in (flagged[first], flagged[first + 1]), "back at the second flag in a row at the latest"
    assert ratio < 1.05
    assert runs("b", "off")[0] > 1.05, "control"


def test_control_skipping_cannot_undo_a_step_and_gives_up(runs: Any) -> None:
    ratio, _, gave_up = runs("b", "skip")
    assert ratio > 1.05
    assert gave_up


def test_the_page_shows_the_results_that_were_kept_and_all_promises_hold(spikes: ModuleType) -> None:
    found = json.loads(spikes.RESULTS.read_text(encoding="utf-8"))
    assert spikes.table(found["runs"], found["seeds"]) in (ROOT / "docs" / "spikes.md").read_text(encoding="utf-8")
    for event, policy in spikes.TARGETS:
        assert spikes.holds(event, policy, spikes.ratios(found["runs"], found["seeds"], event, policy))
    clean = [found["runs"][f"clean {seed}"] for seed in found["seeds"]]
    judged = sum(run["judged"] for run in clean)
    assert judged >= 3000
    assert 1000 * sum(len(run["flagged"]) for run in clean) / judged <= spikes.MOST_FALSE_ALARMS
