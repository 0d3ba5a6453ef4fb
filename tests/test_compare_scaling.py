"""`macrobatch compare` on the scaled rate, the noise scale, sharpness and several seeds: the numbers and the words."""

import json
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import benchmark
from own_tasks import line
from test_compare import comparison, course, run, strict_json, validation
from torch import Tensor, nn

from macrobatch import GradientNoiseScale
from macrobatch.cli import scale_words, sharpness_words, words
from macrobatch.cli.comparison import Comparison, Memory, NoisePoint, Repeat, Result
from macrobatch.cli.curvature import sharpness_of
from macrobatch.cli.estimates import Estimate
from macrobatch.cli.figures import PLOTS, inline_svg
from macrobatch.cli.gradient_meter import GradientMeter
from macrobatch.cli.race import Racer
from macrobatch.cli.report import page, rows
from macrobatch.cli.scaled_rate import RateScaling, scale_with_warmup
from macrobatch.cli.seeds import interval_of, student
from macrobatch.cli.way import Key, Way, scaled_way
from macrobatch.sharpness import Sharpness
from macrobatch.tasks import Task

ROOT = Path(__file__).parents[1]
LINE = ["--task", "own_tasks:line", "--batch-size", "8", "--micro-batch-size", "2", "--device", "cpu"]
CPU = torch.device("cpu")

# ---- the runs


@pytest.fixture(scope="module")
def compared(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, dict[str, Any], Path]:
    folder = tmp_path_factory.mktemp("scaled") / "run"
    said = run(*LINE, "--samples", "64", "--seeds", "3", "--sharpness", "40", "--output", folder)
    return said, strict_json(folder / "compare.json"), folder


def test_the_scaled_rate_is_that_of_the_rule_for_the_batch_after_a_warmup(
    compared: tuple[str, dict[str, Any], Path],
) -> None:
    said, found, _ = compared
    scaling = found["scaling"]
    assert (scaling["rule"], scaling["lr_factor"], scaling["warmup_updates"]) == ("linear", 4.0, 1)
    assert (scaling["from_batch_size"], scaling["to_batch_size"]) == (2, 8)
    assert "accumulated, lr scaled: updates of 8, 2 in memory at once, learning rate 0.2" in said
    assert "The rule linear" in said


def test_a_racer_with_a_scaled_rate_makes_the_updates_of_a_loop_by_hand() -> None:
    task = line()
    task.model.double()
    samples = [(x.double(), y.double()) for x, y in task.train]  # type: ignore[attr-defined]  # a list is map-style
    seen: list[float] = []

    def prepare(optimizer: torch.optim.Optimizer) -> Any:
        scheduler, _ = scale_with_warmup(optimizer, from_batch_size=2, to_batch_size=8, updates=16)
        optimizer.register_step_post_hook(lambda o, *_: seen.append(o.param_groups[0]["lr"]))
        return scheduler

    racer = Racer(task, Way("scaled", "", 8, 3), 0.01, CPU, prepare)
    model = line().model.double()
    model.load_state_dict(task.model.state_dict())
    for start in (0, 8, 16, 24):
        racer.train_on(samples[start : start + 8])
        inputs, targets = (torch.stack(each) for each in zip(*samples[start : start + 8], strict=True))
        gradients = torch.autograd.grad((model(inputs) - targets).pow(2).mean(), list(model.parameters()))
        rate = 0.01 + 0.03 * min(start // 8, 2) / 2  # two of sixteen updates are an eighth
        with torch.no_grad():
            for p, g in zip(model.parameters(), gradients, strict=True):
                p -= rate * g
    assert seen == pytest.approx([0.01, 0.025, 0.04, 0.04])
    for mine, theirs in zip(racer.model.parameters(), model.parameters(), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-12, atol=1e-14)
    # The control: without the scaling it is somewhere else.
    control = Racer(task, Way("accumulated", "", 8, 3), 0.01, CPU)
    control.train_on(samples[:8])
    control.train_on(samples[8:16])
    assert float((next(control.model.parameters()) - next(racer.model.parameters())).detach().abs().max()) > 1e-3


def test_only_the_run_with_the_scaled_rate_is_watched_for_noise(compared: tuple[str, dict[str, Any], Path]) -> None:
    results = compared[1]["results"]
    assert [key for key, result in results.items() if result["course"]["noise"]] == ["scaled"]
    points = results["scaled"]["course"]["noise"]
    assert [point["samples"] for point in points] == [8, 16, 24, 32, 40, 48, 56, 64]
    assert all(point["low"] <= point["noise_scale"] for point in points if point["noise_scale"] is not None)


def test_the_noise_of_a_racer_is_that_of_its_windows() -> None:
    task, watch = line(), GradientNoiseScale(half_life=None)
    racer = Racer(task, Way("scaled", "", 8, 2), 0.0, CPU, noise=watch)
    samples = list(task.train)  # type: ignore[call-overload]  # a list is map-style
    for start in range(0, 40, 8):
        racer.train_on(samples[start : start + 8])
    racer.validate_on([task.collate(samples[:4])], with_metrics=False)
    between, within = [], []
    for start in range(0, 40, 8):  # equal micro-batches of 2: the textbook's two norms
        parts = [gradient(task, samples[n : n + 2]) for n in range(start, start + 8, 2)]
        mean = torch.stack(parts).mean(0)
        s = (torch.stack([g @ g for g in parts]).mean() - mean @ mean) / (1 / 2 - 1 / 8)
        within.append(float(s))
        between.append(float(mean @ mean - s / 8))
    expected = sum(within) / sum(between)
    assert racer.course().noise[-1].noise_scale == pytest.approx(expected, rel=1e-4)


def gradient(task: Task, samples: Sequence[Any]) -> Tensor:
    loss, weight = task.loss_fn(task.model, task.collate(list(samples)))
    return torch.cat([g.flatten() for g in torch.autograd.grad(loss / weight, list(task.model.parameters()))]).double()


# ---- gradients of all sizes from one pass


class Weighted(nn.Module):
    """A parameter that is pulled to each sample by as much as the sample counts."""

    def __init__(self) -> None:
        super().__init__()
        self.p = nn.Parameter(torch.zeros(4, dtype=torch.float64))


def test_a_larger_update_s_gradient_goes_on_from_the_smaller_one_s_with_the_weights_of_the_loss() -> None:
    generator = torch.Generator().manual_seed(0)
    data = torch.randn(30, 5, generator=generator, dtype=torch.float64)
    data[:, 0] = torch.arange(30) % 4  # how much a sample counts; some not at all

    def loss_fn(model: Any, x: Tensor) -> tuple[Tensor, Tensor]:
        return (0.5 * x[:, :1] * (model.p - x[:, 1:]).square()).sum(), x[:, 0].sum()

    task = replace(line(), model=Weighted(), loss_fn=loss_fn, train=list(data))  # type: ignore[arg-type]
    meter = GradientMeter(task, task.model, sizes=[5, 10, 23], micro_batch_size=5, native=True)
    drawn = [torch.randperm(30, generator=generator)[:23].tolist() for _ in range(40)]
    for indices in drawn:
        meter.draw(indices)
    found = meter.statistics()
    for size, estimate in found.by_size.items():
        means = torch.stack([weighted_mean(data[indices[:size]]) for indices in drawn])
        assert estimate.value == pytest.approx(float(torch.cov(means.T).trace()), rel=1e-9)
        # The control: the mean over samples that all count alike has another variance.
        plain = torch.stack([data[indices[:size], 1:].mean(0) for indices in drawn])
        assert abs(estimate.value / float(torch.cov(plain.T).trace()) - 1) > 0.05
    assert found.largest_difference is not None
    assert found.largest_difference < 1e-12


def weighted_mean(samples: Tensor) -> Tensor:
    return (samples[:, :1] * samples[:, 1:]).sum(0) / samples[:, 0].sum()


# ---- sharpness and seeds


def test_the_sharpness_of_a_racer_is_the_top_eigenvalue_of_the_exact_hessian() -> None:
    task = line()
    racer = Racer(task, Way("small", "", 3, 3), 0.05, CPU)
    samples = list(task.train)  # type: ignore[call-overload]  # a list is map-style
    racer.validate_on([task.collate(samples[:4])], with_metrics=False)
    inputs = torch.cat([torch.stack([x for x, _ in samples]), torch.ones(len(samples), 1)], dim=1).double()
    exact = float(torch.linalg.eigvalsh(2 * inputs.T @ inputs / len(samples))[-1])
    found = sharpness_of(racer, samples)
    assert found is not None
    assert found.top == pytest.approx(exact, rel=1e-4)
    # The control: of samples far from zero it is another one.
    other = sharpness_of(racer, samples[:5])
    assert other is not None
    assert abs(other.top / exact - 1) > 0.5


def test_where_the_loss_is_not_finite_there_is_no_sharpness() -> None:
    task = line(bad=0)
    racer = Racer(task, Way("small", "", 3, 3), 0.05, CPU)
    racer.validate_on([task.collate([task.train[0]])], with_metrics=False)
    assert sharpness_of(racer, [task.train[1]]) is None


def test_every_way_has_its_sharpness_and_every_seed_its_end(compared: tuple[str, dict[str, Any], Path]) -> None:
    said, found, folder = compared
    tops = {key: result["sharpness"]["eigenvalues"][0] for key, result in found["results"].items()}
    # A linear model has the same Hessian everywhere; it is over all 40 samples.
    assert list(tops) == ["small", "accumulated", "native", "scaled"]
    assert max(tops.values()) == pytest.approx(min(tops.values()), rel=1e-3)
    assert [repeat["seed"] for repeat in found["repeats"]] == [1, 2]
    assert all(list(repeat["losses"]) == ["small", "accumulated", "scaled"] for repeat in found["repeats"])
    ends = [
        found["results"]["small"]["course"]["final"]["loss"],
        *(each["losses"]["small"] for each in found["repeats"]),
    ]
    assert len(set(ends)) == 3  # other seeds are other runs
    assert "over 3 seeds" in said
    text = (folder / "report.html").read_text()
    said_of_ends = str(interval_of(ends)).replace("± ", "±\u00a0")
    assert f'<th scope="row">loss, 3 seeds, 95%</th><td>{said_of_ends}</td>' in text
    assert "3 seeds, of the initial weights and the order of samples" in text


def test_a_repeat_is_the_run_that_a_comparison_of_that_seed_makes(
    compared: tuple[str, dict[str, Any], Path], tmp_path: Path
) -> None:
    run(*LINE, "--samples", "64", "--seed", "2", "--sharpness", "0", "--output", tmp_path / "run")
    alone, repeat = strict_json(tmp_path / "run" / "compare.json"), compared[1]["repeats"][1]
    losses = {key: result["course"]["final"]["loss"] for key, result in alone["results"].items() if key != "native"}
    assert repeat["losses"] == pytest.approx(losses, rel=1e-6)
    assert {result["sharpness"] for result in alone["results"].values()} == {None}
    assert alone["repeats"] == []


def test_student_s_quantiles_are_those_of_the_tables() -> None:
    table = {1: 12.706, 2: 4.303, 3: 3.182, 4: 2.776, 5: 2.571, 10: 2.228, 30: 2.042}
    assert {n: round(student(0.95, n), 3) for n in table} == table
    assert round(student(0.99, 7), 3) == 3.499


def test_an_interval_over_few_seeds_covers_as_often_as_it_says() -> None:
    draws = torch.randn(2000, 3, generator=torch.Generator().manual_seed(0)).tolist()
    intervals = [interval_of(values) for values in draws]
    covered = sum(abs(interval.mean) < interval.half for interval in intervals) / len(intervals)
    assert covered == pytest.approx(0.95, abs=4 * math.sqrt(0.95 * 0.05 / 2000))
    # The control: 1.96 standard errors of three values cover far less.
    naive = sum(abs(i.mean) < i.half * 1.96 / student(0.95, 2) for i in intervals) / len(intervals)
    assert naive < 0.87
    assert interval_of([1.0]).half == math.inf


def test_an_optimizer_without_a_rule_is_compared_without_a_scaled_rate(tmp_path: Path) -> None:
    said = run("--task", "own_tasks:own_optimizer", *LINE[2:], "--samples", "16", "--output", tmp_path / "run")
    assert "The learning rate was not scaled." in said
    assert "no rule is known for the optimizer Halving" in said.replace("No rule", "no rule")
    assert list(strict_json(tmp_path / "run" / "compare.json")["results"]) == ["small", "accumulated", "native"]


# ---- the words


def scaled(final: float, *, skipped: int = 0, noise: Sequence[NoisePoint] = (), **changes: Any) -> Comparison:
    base = comparison(**changes)
    scaling = RateScaling("linear", "sgd", "why it is so", 8, 64, 8.0, 2, ["group 0: lr 0.1 -> 0.8"], [])
    its_course = replace(course(final, updates=16), skipped=skipped, noise=noise)
    result = Result(scaled_way(base.results["accumulated"].way), Memory(11_000_000, True), its_course)
    return replace(base, results={**base.results, "scaled": result}, scaling=scaling)


def repeats(*losses: Mapping[Key, float]) -> list[Repeat]:
    return [Repeat(seed, each, {}) for seed, each in enumerate(losses, 1)]


@pytest.mark.parametrize(
    ("changed", "title", "text"),
    [
        (scaled(2.2), "Scaling the learning rate helped in this run", "does not catch up with the small batch"),
        (
            scaled(2.0),
            "Scaling the learning rate helped in this run",
            "learned as well as the small one",
        ),
        (scaled(1.8), "Scaling the learning rate helped in this run", "the large batch learned better than the small"),
        (scaled(2.5), "Scaling the learning rate made no clear difference in this run", "one seed"),
        (
            scaled(2.9),
            "Scaling the learning rate did not help in this run: it made the loss higher",
            "rates in between",
        ),
        (scaled(math.nan), "At the scaled learning rate training broke down in this run", "its loss is not finite"),
        (scaled(2.2, skipped=3), "At the scaled learning rate training broke down", "3 updates had no finite gradient"),
        (comparison(not_scaled="there is no rule"), "The learning rate was not scaled", "There is no rule."),
    ],
)
def test_the_words_on_the_scaled_rate_change_with_the_numbers(changed: Comparison, title: str, text: str) -> None:
    found = scale_words.scaled_rate(changed)
    assert found is not None
    assert found.title.startswith(title)
    assert text in found.text


def test_over_seeds_a_difference_counts_if_its_interval_leaves_out_zero() -> None:
    steady: list[Mapping[Key, float]] = [
        {"small": 2.0, "accumulated": 2.52, "scaled": 2.21},
        {"small": 2.0, "accumulated": 2.49, "scaled": 2.2},
    ]
    found = scale_words.scaled_rate(scaled(2.2, repeats=repeats(*steady)))
    assert found is not None
    assert found.title == "Scaling the learning rate helped over 3 seeds"
    assert "difference -0.300 ± 0.025; 3 seeds, 95%" in found.text
    # The control: with seeds that disagree the same first seed says nothing, however clear it was alone.
    spread = scaled(2.2, repeats=repeats({"accumulated": 2.5, "scaled": 2.9}, {"accumulated": 2.5, "scaled": 2.3}))
    found = scale_words.scaled_rate(spread)
    assert found is not None
    assert found.title == "Scaling the learning rate made no clear difference over 3 seeds"


def test_a_caveat_of_the_rule_is_said() -> None:
    base = scaled(2.2)
    assert base.scaling is not None
    found = scale_words.scaled_rate(replace(base, scaling=replace(base.scaling, caveats=["too far"])))
    assert found is not None
    assert found.text.endswith("Caution: too far.")


@pytest.mark.parametrize(
    ("squared", "title"),
    [
        (0.05, "Gradients are mostly noise, even of 64 samples"),
        (0.5, "A batch of 64 is larger than the gradient noise scale"),
        (0.1, "The noise scale is about the batch size of 64"),
        (5.0, "Gradients are mostly signal, even of 8 samples"),
    ],
)
def test_the_words_on_the_noise_scale_set_it_against_the_batch(squared: float, title: str) -> None:
    changed = comparison(gradient_squared=Estimate(squared, squared / 20))
    assert scale_words.noise(changed).title.startswith(title)


def test_the_trend_of_the_noise_scale_is_said_if_its_intervals_are_apart() -> None:
    early, late = NoisePoint(100, 5.0, 4.0, 6.0), NoisePoint(1024, 12.0, 10.0, 15.0)
    assert "it rose: between 4 and 6 after 100 samples" in scale_words.noise(scaled(2.2, noise=[early, late])).text
    assert "it fell: between 10 and 15" in scale_words.noise(scaled(2.2, noise=[late, early])).text
    wide = replace(late, low=5.0)
    assert "with no clear trend" in scale_words.noise(scaled(2.2, noise=[early, wide])).text
    unknown = replace(early, high=math.inf)
    assert "by the micro-batches" not in scale_words.noise(scaled(2.2, noise=[unknown])).text


def with_sharpness(small: Sequence[float], large: Sequence[float]) -> Comparison:
    base = comparison(sharpness_samples=32)
    firsts = {"small": small[0], "accumulated": large[0]}
    results: dict[Key, Result] = {
        key: replace(result, sharpness=Sharpness((firsts[key],), (0.0,), -1.0, 9, "double-backward", ""))
        if key in firsts
        else result
        for key, result in base.results.items()
    }
    more = [
        Repeat(seed, {"small": 2.0, "accumulated": 2.5}, {"small": one, "accumulated": other})
        for seed, (one, other) in enumerate(zip(small[1:], large[1:], strict=True), 1)
    ]
    return replace(base, results=results, repeats=more)


@pytest.mark.parametrize(
    ("small", "large", "title", "text"),
    [
        ([3.0], [5.0], "one run of each does not say", "ended at a lower sharpness than accumulation, once"),
        ([6.0], [5.0], "one run of each does not say", "ended at a higher sharpness than accumulation, once"),
        ([3.0, 3.2, 2.9], [5.0, 5.1, 5.0], "Over 3 seeds the small batch ended in a flatter place", "here they did"),
        ([6.0, 6.2, 5.9], [5.0, 5.1, 5.0], "Over 3 seeds the small batch ended in a sharper place", "other way around"),
        ([3.0, 6.2, 5.9], [5.0, 5.1, 5.0], "not clearly of another sharpness", "here that cannot be told"),
    ],
)
def test_the_words_on_flat_minima_claim_no_more_than_the_seeds_show(
    small: list[float], large: list[float], title: str, text: str
) -> None:
    found = sharpness_words.sharpness(with_sharpness(small, large))
    assert found is not None
    assert title in found.title
    assert text in found.text
    assert "have not come equally far" in found.text


@pytest.mark.parametrize(
    ("loss", "spread", "said"),
    [
        (2.0, 0.0, "The runs have not come equally far (validation losses 2.000 and 2.500)"),
        (
            2.4,
            0.6,
            "Whether the runs have come equally far, the losses do not tell (validation losses 2.400 and 2.500)",
        ),
        (2.501, 0.0, "The runs have come equally far (validation losses 2.501 and 2.500)"),
    ],
)
def test_that_the_runs_have_not_come_equally_far_is_said_only_where_it_is_known(
    loss: float, spread: float, said: str
) -> None:
    base = with_sharpness([3.0], [5.0])
    one = course(loss, updates=128)
    if spread:
        losses = [loss + spread * (part % 3 - 1) for part in range(6)]
        one = replace(one, final=validation(losses))
    found = sharpness_words.sharpness(
        replace(base, results={**base.results, "small": replace(base.results["small"], course=one)})
    )
    assert found is not None
    assert said in found.text
    assert ("how sharp a place is changes along the way" in found.text) == ("not come equally far" in said)


def test_without_sharpness_there_are_no_words_no_row_and_no_figure_of_it() -> None:
    assert sharpness_words.sharpness(comparison()) is None
    assert "sharpness" not in dict(rows(comparison()))
    assert page(comparison(), words.findings(comparison())).count("<svg") == len(PLOTS) - 1


def test_the_table_has_the_new_rows_and_the_figures_are_drawn_over_seeds() -> None:
    points = [
        NoisePoint(64, 5.0, 0.0, math.inf),
        NoisePoint(512, 5.0, 3.0, 9.0),
        NoisePoint(1024, math.inf, 90.0, math.inf),
    ]
    base = with_sharpness([3.0, 3.2, 2.9], [5.0, 5.1, 5.0])
    full = scaled(2.2, noise=points, sharpness_samples=32, repeats=base.repeats)
    full = replace(full, results={**base.results, "scaled": full.results["scaled"]})
    table = dict(rows(full))
    assert table["learning rate"] == ["0.1", "0.1", "0.1", "0.8"]
    assert table["noise scale, 95%"] == ["-", "10 to 15", "-", "over 90"]
    assert table["sharpness"] == ["3.00", "5.00", "-", "-"]
    assert table["sharpness, 3 seeds, 95%"] == ["3.03 ± 0.38", "5.03 ± 0.14", "-", "-"]
    for plot in PLOTS:
        assert inline_svg(plot, full).rstrip().endswith("</svg>")


# ---- what scaling buys


def test_on_digits_scaling_brings_the_loss_of_eight_times_the_batch_to_a_quarter() -> None:
    scaling = benchmark("scaling")
    found = json.loads((ROOT / "benchmarks" / "results" / "scaling.json").read_text())["runs"]
    batch, rate, epochs = scaling.DIGITS[0]
    for seed in scaling.SEEDS:
        _, unscaled, with_rule = scaling.digits_cases(seed, batch, rate, epochs)
        losses = [found[case.name]["validation_loss"] for case in (unscaled, with_rule)]
        assert losses[1] <= losses[0] / 4
        # The short form: half as long, once more.
        short = [replace(case, samples=case.samples // 2) for case in (unscaled, with_rule)]
        unscaled_loss, scaled_loss = (scaling.train(case)["validation_loss"] for case in short)
        assert scaled_loss <= unscaled_loss / 4


@pytest.mark.parametrize(("name", "page_name"), [("scaling", "scaling_rules"), ("sharpness_seeds", "compare")])
def test_the_tables_of_the_docs_are_those_of_the_results(name: str, page_name: str) -> None:
    module = benchmark(name)
    found = json.loads((ROOT / "benchmarks" / "results" / f"{name}.json").read_text())
    page_text = (ROOT / "docs" / f"{page_name}.md").read_text()
    said = module.report(found)
    table = [line for line in said.splitlines() if line.startswith("|")]
    assert len(table) > 6
    assert [line for line in table if line not in page_text] == []
    # And every difference that the words rest on.
    differences = re.findall(r"[+-]?(\d[\d.]* ± [\d.]*\d)\.$", said, flags=re.MULTILINE)
    assert [each for each in differences if each not in " ".join(page_text.split())] == []


def test_why_scaling_did_not_help_is_said_as_far_as_the_numbers_show_it() -> None:
    behind = scale_words.scaled_rate(scaled(2.9))
    noisy = scale_words.scaled_rate(scaled(2.9, gradient_squared=Estimate(0.01, 0.0005)))
    assert behind is not None
    assert noisy is not None
    assert "of 64 samples was mostly signal: the two are equal at the noise scale of 13 samples" in behind.text
    assert "mostly noise" not in noisy.text
    assert "On the way it was ahead" not in behind.text
    early = replace(scaled(2.9).results["scaled"].course, validation_losses=[(0, 5.5), (512, 2.4), (1024, 2.9)])  # type: ignore[type-var]
    base = scaled(2.9)
    ahead = replace(base, results={**base.results, "scaled": replace(base.results["scaled"], course=early)})
    found = scale_words.scaled_rate(ahead)
    assert found is not None
    assert "On the way it was ahead, by 0.600 after 512 samples." in found.text
