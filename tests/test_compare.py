"""`macrobatch compare`: what it measures is right by brute force, and what it says changes with the numbers."""

import json
import math
import re
import statistics
from collections.abc import Mapping
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
import torch
from test_cli_train import PREPARED
from torch import Tensor, nn
from typer.testing import CliRunner

from macrobatch.cli import app, words
from macrobatch.cli.comparison import Comparison, Course, Memory, Result
from macrobatch.cli.estimates import Estimate, paired_difference, ratio_of
from macrobatch.cli.figures import PLOTS, inline_svg
from macrobatch.cli.gradient_meter import GradientMeter, RunningVariance
from macrobatch.cli.measure import MemoryProbe, lower_bound
from macrobatch.cli.report import page, rows
from macrobatch.cli.runfiles import all_or_nothing, new_folder, release
from macrobatch.cli.validation import Validation
from macrobatch.cli.way import Key, three_ways
from macrobatch.tasks import Task, load_task

SMALL_LM = ["--task-option", "d_model=16", "--task-option", "num_layers=1", "--task-option", "context=32"]


def run(*arguments: str | Path, code: int = 0) -> str:
    """What `macrobatch compare` prints, its lines joined; the exit code is checked."""
    result = CliRunner().invoke(app, ["compare", *map(str, arguments)])
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    assert result.exit_code == code, result.output
    return " ".join(result.output.split())


# ---- before anything is measured


def test_a_metric_that_cannot_be_taken_is_named_before_anything_is_measured(tmp_path: Path) -> None:
    said = run("--task", "test_cli_train:metric_task", "--output", tmp_path / "run", code=2)
    assert "error: task 'line': the metric 'raises', called as metric(model, micro_batch)" in said
    assert "Nothing was trained" in said
    assert not (tmp_path / "run").exists()


def test_data_that_take_their_time_are_prepared_once_and_after_every_check(tmp_path: Path) -> None:
    PREPARED.clear()
    task = ["--task", "test_cli_train:slow_data"]
    run(*task, "--samples", "3000000000", "--batch-size", "41", "--output", tmp_path / "run", code=2)
    run(*task, "--task-option", "metric=True", "--output", tmp_path / "run", code=2)
    assert not PREPARED
    small = ["--samples", "16", "--sharpness", "0"]
    assert "preparing the data" in run(*task, *small, "--output", tmp_path / "run")
    assert PREPARED == [(1, 3), (2, 3), (3, 3)]


# ---- the whole


@pytest.fixture(scope="module")
def compared(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Path]:
    folder = tmp_path_factory.mktemp("compare") / "run"
    sizes = ["--batch-size", "32", "--micro-batch-size", "4", "--samples", "256", "--device", "cpu"]
    return run(*SMALL_LM, *sizes, "--output", folder), folder


def strict_json(path: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(path.read_text(), parse_constant=pytest.fail)
    return found


def test_the_three_ways_are_compared_in_a_table_and_in_words(compared: tuple[str, Path]) -> None:
    said, folder = compared
    assert {path.name for path in folder.iterdir()} == {"report.html", "compare.json", "compare.png"}
    assert re.search(r"about \d+:\d\d \(minutes:seconds\) at the present speed on CPU, \d+ thread", said)
    for part in ("small batch", "accumulation", "native large batch", "peak memory", "gradient variance"):
        assert part in said
    assert "Accumulation equals the native large batch; it does not beat it." in said
    assert said.endswith(f"report: {folder / 'report.html'}".split()[-1])


def test_accumulation_and_the_native_batch_learn_the_same(compared: tuple[str, Path]) -> None:
    found = strict_json(compared[1] / "compare.json")
    courses = {key: result["course"] for key, result in found["results"].items()}
    accumulated, native = courses["accumulated"], courses["native"]
    assert abs(accumulated["final"]["loss"] - native["final"]["loss"]) < 1e-4
    assert found["gradient_difference"] < 1e-5
    # The control: the small batch, on the same samples, is somewhere else.
    assert abs(courses["small"]["final"]["loss"] - native["final"]["loss"]) > 0.01
    assert [len(courses[key]["losses"]) for key in courses] == [64, 8, 8, 8]
    assert courses["small"]["losses"][-1][0] == native["losses"][-1][0] == 256


def test_the_comparison_is_the_same_for_the_same_seed_but_for_time(compared: tuple[str, Path], tmp_path: Path) -> None:
    sizes = ["--batch-size", "32", "--micro-batch-size", "4", "--samples", "256", "--device", "cpu"]
    run(*SMALL_LM, *sizes, "--output", tmp_path / "again")
    one, two = (strict_json(folder / "compare.json") for folder in (compared[1], tmp_path / "again"))
    for found in (one, two):
        for result in found["results"].values():
            for seconds in ("update_seconds", "window_seconds"):
                del result["course"][seconds]
        del found["findings"]  # they speak of time, too
    assert one == two


class Links(HTMLParser):
    """Whatever in a page would make a browser ask for something else, and whether its tags are balanced."""

    VOID = frozenset({"meta", "br", "hr", "img", "link", "input"})

    def __init__(self, text: str) -> None:
        super().__init__()
        self.found: list[str] = []
        self.open: list[str] = []
        self.ids: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.open += [] if tag in self.VOID else [tag]
        self.found += [tag] if tag in {"script", "link", "img", "iframe", "object", "base"} else []
        self.found += [f"{name}={value}" for name, value in attributes if is_request(name, value or "")]
        self.ids += [value or "" for name, value in attributes if name == "id"]

    def handle_startendtag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.handle_starttag(tag, attributes)
        self.open = self.open[:-1] if tag not in self.VOID else self.open

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


def is_request(name: str, value: str) -> bool:
    return (name in {"src", "href", "srcset"} and not value.startswith("#")) or name.startswith("on")


def test_the_page_needs_nothing_but_itself(compared: tuple[str, Path]) -> None:
    text = (compared[1] / "report.html").read_text()
    links = Links(text)
    assert links.found == []
    assert links.open == []
    assert len(links.ids) == len(set(links.ids))
    assert "://" not in text
    assert "@import" not in text
    assert not re.findall(r"url\((?!#)", text)
    assert text.count("<svg") == len(PLOTS)
    assert not {*re.findall(r'href="#([^"]+)', text), *re.findall(r"url\(#([^)]+)\)", text)} - set(links.ids)
    # The control: what it looks for is found in a page that has it.
    assert Links('<img src="a.png"><a href="b"></a>').found == ["img", "src=a.png", "href=b"]


def test_the_page_has_a_light_and_a_dark_side_and_its_figures_take_part(compared: tuple[str, Path]) -> None:
    text = (compared[1] / "report.html").read_text()
    assert "prefers-color-scheme: dark" in text
    used = set(re.findall(r"var\(--([a-z]+)\)", text))
    light, dark = (
        set(re.findall(r"--([a-z]+): #", part)) for part in re.split("prefers-color-scheme", text, maxsplit=1)
    )
    assert used <= light
    assert light == dark
    assert not re.findall(r"<(?:path|text|use|g)[^>]*#[0-9a-f]{6}", text)  # every colour of a figure is a variable


def test_with_a_budget_the_native_batch_that_does_not_fit_says_so_and_the_rest_goes_on(tmp_path: Path) -> None:
    options = ["--batch-size", "64", "--micro-batch-size", "4", "--samples", "64", "--max-memory", "2MB"]
    said = run(*SMALL_LM, *options, "--device", "cpu", "--output", tmp_path / "run")
    assert "Accumulation trains a batch of 64 where it does not fit." in said
    assert "out of memory" in said
    found = strict_json(tmp_path / "run" / "compare.json")
    native, accumulated = found["results"]["native"], found["results"]["accumulated"]
    assert (native["memory"]["fits"], native["course"], native["variance"]) == (False, None, None)
    assert native["memory"]["peak_bytes"] > 2_000_000 > accumulated["memory"]["peak_bytes"]
    assert accumulated["course"]["final"]["loss"] > 0
    text = (tmp_path / "run" / "report.html").read_text()
    assert "out of memory: needs at least" in text
    assert "budget 2.00 MB" in text


def test_batch_norm_is_named_where_accumulation_differs_because_of_it(tmp_path: Path) -> None:
    options = ["--task", "digits", "--task-option", "width=4", "--batch-size", "32", "--micro-batch-size", "4"]
    said = run(*options, "--samples", "256", "--lr", "0.2", "--device", "cpu", "--output", tmp_path / "run")
    assert "Accumulation did not equal the native large batch here" in said
    assert "BatchNorm2d" in said
    assert strict_json(tmp_path / "run" / "compare.json")["gradient_difference"] > 0.05


def test_the_predicted_peaks_stand_beside_the_measured_ones(compared: tuple[str, Path]) -> None:
    said, folder = compared
    memories = {key: result["memory"] for key, result in strict_json(folder / "compare.json")["results"].items()}
    accumulated, native = memories["accumulated"], memories["native"]
    assert accumulated["predicted_bytes"] == pytest.approx(accumulated["peak_bytes"], rel=0.001)
    # In one piece gradients come into being while activations go: the prediction takes them to be there before.
    assert native["peak_bytes"] <= native["predicted_bytes"] <= 1.05 * native["peak_bytes"]
    assert "predicted peak" in said
    assert "Predicted before anything ran: " in (folder / "report.html").read_text()


def test_the_micro_batch_size_is_found_only_where_asked(tmp_path: Path) -> None:
    options = [*SMALL_LM, "--batch-size", "16", "--samples", "16", "--device", "cpu"]
    said = run(*options, "--micro-batch-size", "auto", "--output", tmp_path / "auto")
    assert 1 <= strict_json(tmp_path / "auto" / "compare.json")["micro_batch_size"] <= 8
    assert "Accumulation equals the native large batch" in said
    refused = run("--task", "digits", "--micro-batch-size", "auto", "--output", tmp_path / "digits", code=2)
    assert "error: --micro-batch-size auto would change the result: '1' (BatchNorm2d) normalises" in refused
    assert "Leave out --micro-batch-size (the task's own is 16), or give a number" in " ".join(refused.split())
    assert "batch_norm=" not in refused  # which is no option of the command


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--draws", "63"], "--draws"),
        (
            ["--batch-size", "16", "--micro-batch-size", "16"],
            "must be below --batch-size 16: otherwise there is nothing",
        ),
        (["--batch-size", "32", "--samples", "31"], "error: --samples 31 is less than one effective batch of 32"),
        (["--batch-size", "41"], "error: --batch-size 41 is more than the 40 training samples of line"),
        (
            ["--max-memory", "100"],
            "error: out of memory: not even micro-batches of 3 fit the budget 100 B; give a smaller",
        ),
        (["--task", "cats"], "error: there is no task 'cats'"),
    ],
)
def test_a_comparison_that_cannot_be_made_is_an_error_before_any_work(
    options: list[str], message: str, tmp_path: Path
) -> None:
    said = run("--task", "own_tasks:line", *options, "--output", tmp_path / "run", code=2)
    assert message in said.replace("│ ", "")
    assert not (tmp_path / "run").exists()


def test_at_the_sizes_of_the_demo_accumulation_needs_less_than_a_fifth_of_the_memory() -> None:
    task = load_task("code-lm")
    samples = [task.train[index] for index in range(128)]
    probe = MemoryProbe(task, samples, task.learning_rate, torch.device("cpu"), max_memory=None)
    small, accumulated, native = (probe.of(way).peak_bytes or 0 for way in three_ways(128, 16))
    assert accumulated <= 0.2 * native
    assert small <= accumulated <= 1.1 * small
    # Parameters, gradients, and AdamW's two moments are in it.
    assert small > 4 * 4 * sum(p.numel() for p in task.model.parameters())


def test_a_comparison_that_fails_while_it_is_written_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(*_: object) -> None:
        raise KeyboardInterrupt

    options = ["--task", "own_tasks:line", "--batch-size", "8", "--micro-batch-size", "4", "--samples", "8"]
    with monkeypatch.context() as patched:
        patched.setattr("macrobatch.cli.compare.page", interrupted)
        said = run(*options, "--device", "cpu", "--output", tmp_path / "run", code=130)
    assert "interrupted: nothing was written" in said
    assert not (tmp_path / "run").exists()


# ---- measurements against brute force


def vectors(count: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    scale = torch.linspace(0.1, 3, 12)
    return torch.randn(count, 12, generator=generator, dtype=torch.float64) * scale + 0.5


def running(values: Tensor) -> RunningVariance:
    variance = RunningVariance()
    for value in values:
        variance.add(value)
    return variance


def test_the_running_variance_is_the_trace_of_the_sample_covariance() -> None:
    values = vectors(50)
    assert running(values).trace.value == pytest.approx(float(torch.cov(values.T).trace()), rel=1e-12)


def test_its_standard_error_is_the_spread_over_repetitions() -> None:
    estimates = [running(vectors(64, seed)).trace for seed in range(300)]
    spread = statistics.stdev(estimate.value for estimate in estimates)
    assert statistics.fmean(estimate.standard_error for estimate in estimates) == pytest.approx(spread, rel=0.15)
    truth = float((torch.linspace(0.1, 3, 12) ** 2).sum())
    assert statistics.fmean(estimate.value for estimate in estimates) == pytest.approx(truth, rel=0.02)


def test_the_squared_mean_is_free_of_noise_and_knows_its_error() -> None:
    runs = [running(vectors(64, seed)) for seed in range(300)]
    values = [each.mean_squared.value for each in runs]
    assert statistics.fmean(values) == pytest.approx(12 * 0.25, abs=4 * statistics.stdev(values) / math.sqrt(300))
    error = statistics.fmean(each.mean_squared.standard_error for each in runs)
    assert error == pytest.approx(statistics.stdev(values), rel=0.35)
    # The control: the squared norm of the sample mean itself is too large by trace / n.
    naive = statistics.fmean(float(vectors(64, seed).mean(0).square().sum()) for seed in range(300))
    assert naive - 3.0 > 0.3


class Point(nn.Module):
    """A parameter that is pulled to each sample: the gradient of a sample x is p - x."""

    def __init__(self) -> None:
        super().__init__()
        self.p = nn.Parameter(torch.zeros(6))


def point_task(data: Tensor) -> Task:
    return Task(
        name="point",
        model=Point(),
        loss_fn=lambda model, x: (0.5 * (model.p - x).square().sum(), len(x)),
        train=list(data),  # type: ignore[arg-type]  # a list is map-style
        validation=list(data[:2]),  # type: ignore[arg-type]
        make_optimizer=lambda model, lr: torch.optim.SGD(model.parameters(), lr=lr),
        learning_rate=0.1,
        base_batch_size=4,
    )


def test_the_variance_of_an_update_is_that_of_a_mean_drawn_without_replacement() -> None:
    data = torch.randn(40, 6)
    task = point_task(data)
    meter = GradientMeter(task, task.model, sizes=[4, 8, 32], micro_batch_size=4, native=True)
    generator = torch.Generator().manual_seed(1)
    for _ in range(400):
        meter.draw(torch.randperm(40, generator=generator)[:32].tolist())
    found = meter.statistics()
    of_one = float(torch.cov(data.T).trace())
    for size, estimate in found.by_size.items():
        assert abs(estimate.value - of_one * (1 / size - 1 / 40)) < 4 * estimate.standard_error
    # The control: 1/B alone, as if samples were put back, is far off where the batch is most of the data.
    assert abs(found.by_size[32].value - of_one / 32) > 10 * found.by_size[32].standard_error
    assert found.native is not None
    assert found.native.value == pytest.approx(found.by_size[32].value, rel=1e-5)
    assert found.largest_difference is not None
    assert found.largest_difference < 1e-6
    assert float(task.model.p.detach().abs().sum()) == 0.0  # the parameters are as they were


def test_a_lower_bound_of_what_does_not_fit_is_below_the_truth_for_every_convex_peak() -> None:
    def peak(size: int) -> int:
        return max(1000 + 10 * size, 200 + 30 * size)

    bound = lower_bound(lambda size: peak(size) if peak(size) <= 1500 else None, 128)
    assert bound is not None
    assert 1500 < bound <= peak(128)
    assert lower_bound(lambda size: None, 128) is None


def validation(losses: list[float], weights: list[float] | None = None) -> Validation:
    weights = weights or [1.0] * len(losses)
    mean = sum(loss * w for loss, w in zip(losses, weights, strict=True)) / sum(weights)
    return Validation(mean, {"accuracy": 0.5}, losses, weights, 16 * len(losses))


def test_a_paired_difference_leaves_out_what_both_have_in_common() -> None:
    hard_and_easy = [1.0, 5.0, 2.0, 8.0, 3.0]
    gains = [0.30, 0.28, 0.31, 0.29, 0.32]
    better = validation([loss - gain for loss, gain in zip(hard_and_easy, gains, strict=True)])
    found = paired_difference(better, validation(hard_and_easy))
    assert found.value == pytest.approx(-statistics.fmean(gains))
    assert found.standard_error == pytest.approx(statistics.stdev(gains) / math.sqrt(5))


# ---- words


def course(final: float, *, updates: int, seconds: float = 0.1, jitter: float = 0.001) -> Course:
    windows = 16
    per_window = updates // windows
    times = [seconds + jitter * (number % 3 - 1) for number in range(windows)]
    curve = [(0, 5.5), (512, final + 0.5), (1024, final)]
    losses = [((number + 1) * 1024 // updates, 5.5 - (5.5 - final) * number / updates) for number in range(updates)]
    held_out = validation([final + 0.1 * (part % 3 - 1) for part in range(6)])
    return Course(
        losses, curve, held_out, [t / per_window for t in times for _ in range(per_window)], times, [64] * 16, 0
    )


def comparison(**changes: Any) -> Comparison:
    small, accumulated, native = three_ways(64, 8)
    results: Mapping[Key, Result] = {
        "small": Result(small, Memory(10_000_000, True), course(2.0, updates=128), Estimate(0.8, 0.02)),
        "accumulated": Result(accumulated, Memory(11_000_000, True), course(2.5, updates=16), Estimate(0.1, 0.004)),
        "native": Result(native, Memory(80_000_000, True), course(2.5, updates=16), Estimate(0.1, 0.004)),
    }
    base = Comparison(
        task="example",
        description="",
        device="CPU",
        num_parameters=1000,
        data_size=10**9,
        batch_size=64,
        micro_batch_size=8,
        samples=1024,
        learning_rate=0.1,
        seed=0,
        draws=64,
        max_memory=None,
        results=results,
        variances={8: Estimate(0.8, 0.02), 64: Estimate(0.1, 0.004)},
        gradient_squared=Estimate(0.5, 0.05),
        gradient_difference=1e-7,
        noisy_layers=(),
    )
    return replace(base, **changes)


def with_result(key: Key, **changes: Any) -> Comparison:
    base = comparison()
    return replace(base, results={**base.results, key: replace(base.results[key], **changes)})


def test_the_base_of_these_tests_says_what_accumulation_is() -> None:
    titles = [finding.title for finding in words.findings(comparison())]
    assert titles == [
        "Accumulation equals the native large batch; it does not beat it",
        "What accumulation buys is memory: 0.14 of the native peak, 7.3 times less",
        "The variance of an update's gradient falls as one over the batch size",
        "From the same samples at the same learning rate, the small batch learned faster",
        "A batch of 64 is larger than the gradient noise scale: its last samples add less than its first",
        "Accumulation and the native batch took the same time for the same samples",
    ]


@pytest.mark.parametrize(
    ("changed", "said", "said_no_more"),
    [
        (
            with_result("native", course=course(2.3, updates=16)),
            r"did not equal the native large batch here: its loss is 0.200 higher",
            "Accumulation equals",
        ),
        (
            with_result("native", course=course(2.8, updates=16)),
            r"did not equal the native large batch here: its loss is 0.300 lower",
            "it does not beat it",
        ),
        (
            replace(with_result("native", course=course(2.3, updates=16)), noisy_layers=["BatchNorm1d"]),
            r"depends on how a batch is cut, or is random: BatchNorm1d",
            "is not a sum over samples",
        ),
        (
            replace(comparison(), gradient_difference=0.6, noisy_layers=["Dropout"]),
            r"did not equal the native large batch here: their gradients differ by up to 60%(.|\n)*random: Dropout",
            "is the same update",
        ),
        (
            with_result("native", memory=Memory(11_200_000, True)),
            "Accumulation saved hardly any memory here: 0.98 of the native peak",
            "What accumulation buys is memory",
        ),
        (
            replace(with_result("native", memory=Memory(80_000_000, False), course=None), max_memory=20_000_000),
            r"do not fit into the budget of 20.0 MB; it needs 80.0 MB at least",
            "What accumulation buys is memory",
        ),
        (
            with_result("small", course=course(2.5, updates=128)),
            "Small and large batch learned alike from the same samples",
            "the small batch learned faster",
        ),
        (
            with_result("small", course=course(3.0, updates=128)),
            "the large batch learned better",
            "the small batch learned faster",
        ),
        (
            comparison(gradient_squared=Estimate(0.01, 0.05)),
            "The mean gradient is lost in the noise of 64 draws of 64 samples",
            "The gradient noise scale, the batch size at which",
        ),
        (
            comparison(gradient_squared=Estimate(0.003, 0.0005)),
            "one update of 64, each with its best learning rate, is worth about 7.8 updates of 8",
            "worth about 2.2 updates of 8",
        ),
        (
            comparison(variances={8: Estimate(0.8, 0.02), 64: Estimate(0.3, 0.01)}),
            "does not fall as one over the batch size here",
            "gradient falls as one over",
        ),
        (
            with_result("accumulated", course=course(2.5, updates=16, seconds=0.15)),
            "Accumulation took 1.50 times as long as the native batch",
            "the same time",
        ),
        (
            with_result("accumulated", course=course(2.5, updates=16, seconds=0.15, jitter=0.1)),
            "Which is faster, timings on this machine do not tell",  # 1.5 times, but with an uncertainty as large
            "the same time",
        ),
    ],
)
def test_the_words_change_with_the_numbers(changed: Comparison, said: str, said_no_more: str) -> None:
    def text(of: Comparison) -> str:
        return " ".join(f"{finding.title}. {finding.text}" for finding in words.findings(of))

    assert re.search(said, text(changed))
    assert said_no_more not in text(changed)
    if said_no_more != "is not a sum over samples":
        assert said_no_more in text(comparison())
    assert not re.search(said, text(comparison()))


def test_the_ratio_in_the_words_is_that_of_the_speeds_in_the_table() -> None:
    changed = with_result("accumulated", course=course(2.5, updates=16, seconds=0.15))
    speeds = dict(rows(changed))["samples per second"]
    assert speeds[1:] == ["427", "640"]
    said = words.findings(changed)[-1].text
    assert "The time of accumulation over that of the native batch is 1.50 (1.50 to 1.51, 95%), the median over" in said
    assert "By the speeds of the table" not in said


def test_the_worth_of_an_update_follows_the_gradient_noise_scale() -> None:
    base = comparison()
    # tr(Sigma) = 0.8 * 8 = 6.4 for one sample, |G|^2 = 0.5: noise scale 12.8; gain = 8 (12.8 + 8) / (12.8 + 64) = 2.17
    assert base.noise_scale.value == pytest.approx(12.8, rel=1e-6)
    said = {finding.title: finding.text for finding in words.findings(base)}
    noise = said["A batch of 64 is larger than the gradient noise scale: its last samples add less than its first"]
    assert "is 12.8 ± 1.3 samples where accumulation ended. This suggests" in noise
    assert "one update of 64, each with its best learning rate, is worth about 2.2 updates of 8" in noise
    small = said["From the same samples at the same learning rate, the small batch learned faster"]
    assert "It made 128 updates where the large batch made 16" in small


def test_ratios_carry_the_errors_of_both() -> None:
    found = ratio_of(Estimate(2.0, 0.06), Estimate(4.0, 0.16))
    assert found.value == 0.5
    assert found.standard_error == pytest.approx(0.5 * 0.05)


@pytest.mark.parametrize("plot", PLOTS, ids=[plot.name for plot in PLOTS])
def test_every_figure_can_be_drawn_with_and_without_the_native_batch(plot: Any) -> None:
    without = with_result("native", memory=Memory(None, False), course=None, variance=None)
    for each in (comparison(), replace(without, max_memory=20_000_000)):
        svg = inline_svg(plot, each)
        assert svg.startswith("<svg viewBox=")
        assert svg.rstrip().endswith("</svg>")


def test_what_was_not_measured_is_a_dash_in_the_table_and_the_page_is_made_all_the_same() -> None:
    without = with_result("native", memory=Memory(None, False), course=None, variance=None)
    table = dict(rows(without))
    assert table["validation loss"][2] == "-"
    assert table["peak memory"] == ["10.0 MB", "11.0 MB", "out of memory"]
    assert "out of memory" in page(without, words.findings(without))


def test_text_from_a_task_is_shown_as_text() -> None:
    html = page(comparison(task="<script>alert(1)</script>"), [])
    assert "<script>" not in html
    assert "&lt;script&gt;" in html


def test_a_folder_in_which_a_run_has_written_nothing_yet_is_not_given_to_another(tmp_path: Path) -> None:
    first, second = new_folder(tmp_path / "run"), new_folder(tmp_path / "run")
    assert (first.name, second.name) == ("run", "run-2")
    (first / "compare.json").write_text("{}")
    for folder in (first, second):
        release(folder)
    assert [path.name for path in first.iterdir()] == ["compare.json"]
    assert not second.exists()
    assert new_folder(tmp_path / "run") == second


def test_results_are_written_also_where_somebody_removed_the_folder_meanwhile(tmp_path: Path) -> None:
    folder = tmp_path / "runs" / "compare"
    with all_or_nothing(folder):
        (folder / "compare.json").write_text("{}")
    assert (folder / "compare.json").exists()
    with pytest.raises(ValueError, match="interrupted"), all_or_nothing(folder):
        raise ValueError("interrupted")
    assert not any(folder.iterdir())
