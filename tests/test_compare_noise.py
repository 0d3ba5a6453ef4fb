"""What is said and drawn of the gradient noise of a run: nothing of one update that outweighs all others."""

import math
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from matplotlib.figure import Figure
from test_cli_noise import findings
from test_cli_train import rows, run, summary

from macrobatch import NoiseEstimate
from macrobatch.cli.noise_figure import _draw_course, whole
from macrobatch.cli.noise_watch import NoiseWatch, Weights, short_interval
from macrobatch.cli.noise_words import watched
from macrobatch.cli.run import Run
from macrobatch.cli.run_options import TrainOptions
from macrobatch.tasks import load_task

# ---- one update that outweighs all others


def outweighed(weights: Sequence[float], half_life: float | None = None) -> list[bool]:
    seen = Weights(half_life)
    found = []
    for weight in weights:
        seen.add(weight)
        found.append(seen.one_outweighs_all)
    return found


def test_one_update_outweighs_all_others_until_they_weigh_as_much() -> None:
    assert outweighed([1, 1, 8, 1, 1, 1, 1, 1, 1]) == [False, False] + 6 * [True] + [False]
    assert outweighed([1, 1, 1, 2]) == [False] * 4
    # Gradients that fall from the first update on are those of training that is well.
    assert outweighed([1e6, 1, 1, 1]) == [False] * 4
    assert outweighed([1, math.inf, math.nan, 1]) == [False] * 4
    # With a half-life of one update it is 4 of 4.5, 2 of 3.25 and 1 of 2.6 that it weighs.
    assert outweighed([1, 4, 1, 1, 1], half_life=1) == [False, True, True, False, False]


def test_of_training_that_diverged_no_interval_of_the_noise_scale_is_given(tmp_path: Path) -> None:
    options = ["--task", "digits", "--task-option", "width=4", "--batch-size", "64", "--steps", "12", "--device", "cpu"]
    said = run(*options, "--lr", "1e6", "--output", tmp_path / "diverged")
    assert "noise scale" not in said
    last = rows(tmp_path / "diverged")[-1]
    assert (last["noise_low"], last["noise_high"]) == (0, None)
    assert short_interval([{**last, "noise_high": math.inf}]) == ""
    # The control: at a rate that trains there is one.
    assert "noise scale" in run(*options, "--lr", "0.05", "--output", tmp_path / "well")
    assert rows(tmp_path / "well")[-1]["noise_low"] > 0
    assert summary(tmp_path / "well")["noise"]["low"] > 0


def test_the_interval_that_one_update_decides_over_would_have_no_width() -> None:
    """The control: what the estimate alone says of training that diverged."""
    trained = Run(
        load_task("digits", width=4), TrainOptions(batch_size=64, updates=12, learning_rate=1e6, device="cpu")
    )
    for window in trained.windows():
        trained.advance(window)
    alone, known = trained.noise.scale.estimate(), trained.noise.estimate
    assert known is not None
    assert alone.high - alone.low < 0.1 * alone.noise_scale
    assert (known.low, known.high, known.noise_scale) == (0, math.inf, alone.noise_scale)


def test_updates_sample_by_sample_are_watched_alike() -> None:
    task = load_task("noise_tasks:regression")
    watch = NoiseWatch(None)
    micro_batch = task.collate([task.train[index] for index in range(8)])
    for scale in (1.0, 1.0, 1.0, 1.0, 1.0, 1e6):
        with torch.no_grad():
            next(task.model.parameters()).mul_(0).add_(scale)
        watch.observe_examples(task, micro_batch, 8)
    assert watch.estimate is not None
    assert (watch.estimate.low, watch.estimate.high) == (0, math.inf)


# ---- the line at the end of training


def estimate(low: float, high: float) -> NoiseEstimate:
    return NoiseEstimate(55.0, low, high, 0.95, 1.0, 1.0, 40, 0.0)


def test_a_training_that_was_not_about_noise_says_one_line_of_it() -> None:
    plain, hint = (watched(estimate(44.0, 74.0), is_coupled=each) for each in (False, True))
    assert plain == (
        "The gradient noise scale is between 44 and 74 samples (95%): macrobatch noise says what follows from it, "
        "docs/noise.md how to read it"
    )
    assert "(95%), a hint only, because BatchNorm couples them: macrobatch noise" in hint
    assert len(hint) < 200
    assert "is at least 44 samples (95%)" in watched(estimate(44.0, math.inf), is_coupled=False)


@pytest.mark.parametrize(("known", "skipped"), [(None, 0), (estimate(0, math.inf), 0), (estimate(44, 74), 1)])
def test_a_noise_scale_that_is_not_known_has_no_line(known: NoiseEstimate | None, skipped: int) -> None:
    assert watched(known, is_coupled=False, num_skipped=skipped) == ""


# ---- the figure


def log_of(sizes: Sequence[int]) -> list[dict[str, float]]:
    samples = [sum(sizes[: number + 1]) for number in range(len(sizes))]
    noise = {"noise_low": 20.0, "noise_scale": 30.0, "noise_high": 50.0}
    return [{"samples": n, "batch_size": size, **noise} for n, size in zip(samples, sizes, strict=True)]


def test_the_short_update_at_the_end_of_a_pass_is_not_drawn_as_an_effective_batch() -> None:
    axes = Figure().subplots()
    _draw_course(axes, log_of([64, 64, 30, 64, 64, 30]), replace(findings(30.0), batch_size=64))
    (batch,) = [each for each in axes.lines if each.get_label() == "effective batch"]
    assert list(batch.get_ydata()) == [64, 64]
    # The control: one that grows is a staircase.
    grows = Figure().subplots()
    _draw_course(grows, log_of([32, 32, 20, 32, 64, 64, 30]), replace(findings(30.0), batch_size=64))
    (batch,) = [each for each in grows.lines if each.get_label() == "effective batch"]
    assert list(batch.get_ydata()) == [32, 32, 32, 64, 64]


def test_updates_are_whole_unless_one_alone_is_smaller_than_that_before_it() -> None:
    assert [row["batch_size"] for row in whole(log_of([64, 36, 64, 36]))] == [64, 64]
    assert [row["batch_size"] for row in whole(log_of([64, 64, 32, 32]))] == [64, 64, 32, 32]
    assert [row["batch_size"] for row in whole(log_of([5]))] == [5]
