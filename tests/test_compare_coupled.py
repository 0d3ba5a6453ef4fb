"""`macrobatch compare` on a loss that compares the samples of an update: gathered, plain, small and native."""

import math
import re
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from own_towers import encode, info_nce, towers
from rich.console import Console
from test_compare import Links, comparison, course, run, strict_json
from torch import Tensor

from macrobatch.cli import words
from macrobatch.cli.compare import measure
from macrobatch.cli.compare_options import CompareOptions
from macrobatch.cli.comparer import Comparer
from macrobatch.cli.comparison import Comparison, Course, Memory, PlainGradient, Repeat, Result
from macrobatch.cli.coupled_meter import CoupledMeter
from macrobatch.cli.estimates import Estimate
from macrobatch.cli.figures import inline_svg, plots_of, save_main_picture
from macrobatch.cli.forecasts import predicted_peak
from macrobatch.cli.gradient_meter import GradientMeter
from macrobatch.cli.measure import MemoryProbe
from macrobatch.cli.progress import Progress
from macrobatch.cli.race import Racer
from macrobatch.cli.report import page, rows
from macrobatch.cli.scaled_rate import RateScaling
from macrobatch.cli.way import Key, coupled_ways, scaled_way
from macrobatch.cli.workload import Workload
from macrobatch.tasks import Task, load_task

TOWERS = ["--task", "own_towers:towers", "--device", "cpu"]
CPU = torch.device("cpu")


# ---- the whole


@pytest.fixture(scope="module")
def compared(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, dict[str, Any], str]:
    folder = tmp_path_factory.mktemp("coupled") / "run"
    said = run(*TOWERS, "--samples", "60", "--draws", "8", "--output", folder)
    assert {path.name for path in folder.iterdir()} == {"report.html", "compare.json", "compare.png"}
    return said, strict_json(folder / "compare.json"), (folder / "report.html").read_text()


def test_gathered_accumulation_learns_what_the_native_batch_learns_and_plain_accumulation_does_not(
    compared: tuple[str, dict[str, Any], str],
) -> None:
    said, found, _ = compared
    assert list(found["results"]) == ["small", "plain", "accumulated", "native", "scaled"]
    losses = {
        key: [loss for _, loss in result["course"]["validation_losses"]] for key, result in found["results"].items()
    }
    assert losses["accumulated"] == pytest.approx(losses["native"], rel=1e-5)
    # The control: it does not hold for plain accumulation, which sees the same samples in the same updates.
    assert losses["plain"][0] == losses["native"][0]
    assert abs(losses["plain"][-1] - losses["native"][-1]) > 1e-3
    assert "Gathered accumulation equals the native large batch; it does not beat it." in said
    assert [len(result["course"]["losses"]) for result in found["results"].values()] == [15, 5, 5, 5, 5]


def log_scale(model: Any) -> float:
    return float(model.log_scale.detach())


def test_each_way_learns_a_temperature_of_its_own_from_the_same_start() -> None:
    """It is the model's: one that all ways shared would be trained by all of them in turn."""
    task = towers(dtype="float64")
    comparer = Comparer(task, CompareOptions(samples=60, device="cpu"))
    progress = Progress(Console(quiet=True), comparer.work(comparer.ways))
    begun: dict[str, float] = {}

    class Watched(Racer):
        def train_on(self, samples: Sequence[Any]) -> None:
            begun.setdefault(self.way.key, log_scale(self.model))
            super().train_on(samples)

    with pytest.MonkeyPatch.context() as patch, progress:
        patch.setattr("macrobatch.cli.comparer.Racer", Watched)
        racers = comparer.train(comparer.ways, progress)
    assert begun == dict.fromkeys(["small", "plain", "accumulated", "native", "scaled"], 1.0)
    ended = {key: log_scale(racer.model) for key, racer in racers.items()}
    assert ended["accumulated"] == pytest.approx(ended["native"], rel=1e-10)
    for key in ("small", "plain", "scaled"):  # the control
        assert abs(ended[key] - ended["native"]) > 1e-4
    assert log_scale(task.model) == 1.0


def test_the_gradient_of_plain_accumulation_is_another_one_and_the_gathered_one_is_the_native_one(
    compared: tuple[str, dict[str, Any], str],
) -> None:
    said, found, _ = compared
    assert found["gradient_difference"] < 1e-5
    assert found["plain_gradient"]["difference"]["value"] > 0.2
    assert found["plain_gradient"]["cosine"]["value"] < 0.99
    assert "the gradient of plain accumulation is off by" in said


def test_metrics_are_in_the_table_and_on_the_page_and_what_is_not_defined_is_in_neither(
    compared: tuple[str, dict[str, Any], str],
) -> None:
    said, found, text = compared
    assert all("recall@1" in result["course"]["final"]["metrics"] for result in found["results"].values())
    assert "recall@1" in said
    assert re.search(r"<th scope=\"row\">recall@1</th>(<td>[\d.]+</td>){5}", text)
    for absent in ("expected by 1/B", "noise scale, 95%", 'scope="row">sharpness'):
        assert absent not in said
        assert absent not in text
    assert "The gradient noise scale and the sharpness are left out for this loss" in said
    assert [result["sharpness"] for result in found["results"].values()] == [None] * 5
    assert [list(result["course"]["noise"]) for result in found["results"].values()] == [[]] * 5


def test_the_page_is_whole_and_has_a_colour_for_every_way_in_light_and_dark(
    compared: tuple[str, dict[str, Any], str],
) -> None:
    _, _, text = compared
    links = Links(text)
    assert (links.found, links.open) == ([], [])
    assert len(links.ids) == len(set(links.ids))
    used = set(re.findall(r"var\(--([a-z]+)\)", text))
    light, dark = (set(re.findall(r"--([a-z]+): #", part)) for part in text.split("prefers-color-scheme", 1))
    assert {"plain", *used} <= light
    assert light == dark
    assert not re.findall(r"<(?:path|text|use|g)[^>]*#[0-9a-f]{6}", text)


def test_the_work_that_is_announced_is_the_work_that_is_done(monkeypatch: pytest.MonkeyPatch) -> None:
    ended: list[tuple[float, float]] = []

    class Recorded(Progress):
        def __exit__(self, *error: Any) -> None:
            ended.append((self.done, self._total))
            super().__exit__(*error)

    monkeypatch.setattr("macrobatch.cli.compare.Progress", Recorded)
    options = CompareOptions(samples=24, draws=8, device="cpu", seeds=2)
    comparer = Comparer(load_task("own_towers:towers"), options)
    measure(comparer, lambda seed: load_task("own_towers:towers", seed=seed), Console(quiet=True))
    ((done, total),) = ended
    assert done == pytest.approx(total, rel=1e-9)
    assert total == pytest.approx(comparer.work(comparer.ways))


@pytest.mark.parametrize("micro_batch_size", [4, 5, 12])
def test_the_work_of_an_update_is_that_of_its_forwards_and_backwards(micro_batch_size: int) -> None:
    """A forward is a third of the work of both, and gathered updates run all but one micro-batch forward twice."""
    seen: list[int] = []

    def watched(model: Any, micro_batch: Any) -> Any:
        seen.append(len(micro_batch[0]))
        return encode(model, micro_batch)

    task = replace(towers(), encode=watched)
    samples = [task.train[index] for index in range(24)]
    workload = Workload(
        samples=24,
        validations=3,
        held_out=12,
        draws=8,
        sizes=[micro_batch_size, 12],
        micro_batch_size=micro_batch_size,
        sharpness=0.0,
        seeds=2,
        is_coupled=True,
    )
    work: dict[Key, float] = {}
    for way in coupled_ways(12, micro_batch_size):
        racer = Racer(task, way, 0.01, CPU)
        racer.train_on(samples[:12])  # in the first update outputs are also checked, on two samples
        seen.clear()
        racer.train_on(samples[:12])
        racer.train_on(samples[12:])
        work[way.key] = sum(seen) / 3 + 24 * 2 / 3
        assert workload.update(way, 24) == pytest.approx(work[way.key])
    assert work["native"] == work["plain"] == pytest.approx(24)
    again = {4: 16, 5: 16, 12: 0}[micro_batch_size]  # of 12: all but the last 4, and none where it is one
    assert work["accumulated"] == pytest.approx(24 + again / 3)


def test_the_work_of_a_whole_comparison_is_what_it_is_by_hand() -> None:
    workload = Workload(
        samples=24,
        validations=3,
        held_out=12,
        draws=8,
        sizes=[4, 12],
        micro_batch_size=4,
        sharpness=0.0,
        seeds=2,
        is_coupled=True,
    )
    ways = coupled_ways(12, 4)
    memory = 2 * 1.5 * (4 + 12 + 12 + 12)
    trained = 24 * (1 + 1 + (1 + 2 / 9) + 1) + 4 * 3 * 12 / 3
    drawn = 8 * (4 + 12 * (1 + 2 / 9) + 12 + 12)  # both sizes gathered, the larger one plainly and natively
    repeated = 24 * (1 + 1 + (1 + 2 / 9)) + 3 * 2 * 12 / 3  # all but the native batch, validated twice
    assert workload.total(ways, ways, ways[:3]) == pytest.approx(memory + trained + drawn + repeated)


def test_a_native_batch_that_does_not_fit_says_so_and_plain_accumulation_is_held_against_the_gathered_one(
    tmp_path: Path,
) -> None:
    wide = {"hidden": 256, "size": 150}
    task = load_task("own_towers:towers", **wide)
    samples = [task.train[index] for index in range(96)]
    probe = MemoryProbe(task, samples, task.learning_rate, CPU, max_memory=None)
    _, plain, gathered, native = (probe.of(way).peak_bytes or 0 for way in coupled_ways(96, 8))
    assert max(plain, gathered) < 0.75 * native
    budget = (gathered + native) // 2
    options = [f"--task-option={name}={value}" for name, value in wide.items()]
    options += ["--batch-size", "96", "--micro-batch-size", "8", "--samples", "96", "--draws", "8"]
    said = run(*TOWERS, *options, "--max-memory", str(budget), "--output", tmp_path / "run")
    assert "Gathered accumulation trains a batch of 96 where it does not fit." in said
    assert "out of memory: needs at least" in (tmp_path / "run" / "report.html").read_text()
    found = strict_json(tmp_path / "run" / "compare.json")
    left_out = found["results"]["native"]
    assert (left_out["memory"]["fits"], left_out["course"], left_out["variance"]) == (False, None, None)
    assert native >= left_out["memory"]["peak_bytes"] > budget
    assert found["gradient_difference"] is None
    assert found["plain_gradient"]["difference"]["value"] > 0.1
    assert "gradient off gathered" in said
    assert "equals the native" not in said


def test_what_an_update_takes_is_predicted_for_every_way() -> None:
    task = load_task("own_towers:towers", hidden=256, size=150)
    samples = [task.train[index] for index in range(96)]
    probe = MemoryProbe(task, samples, task.learning_rate, CPU, max_memory=None)
    for way in coupled_ways(96, 8):
        optimizer = task.make_optimizer(task.model, 0.1)
        predicted = predicted_peak(task, way, task.model, optimizer, CPU)
        measured = probe.of(way).peak_bytes
        assert predicted is not None
        assert measured is not None
        # In one piece gradients come into being while activations go: then the prediction is above, by them at most.
        gradients = sum(p.nbytes for p in task.model.parameters())
        assert 0.98 * measured <= predicted <= 1.02 * measured + gradients * (way.update_size == way.micro_batch_size)


# ---- what is asked


def test_samples_and_draws_have_defaults_of_their_own_for_such_a_loss() -> None:
    coupled = Comparer(towers(), CompareOptions(device="cpu"))
    assert (coupled.samples, coupled.draws, coupled.sizes) == (4092, 16, [5, 12])
    plain = Comparer(load_task("own_tasks:line"), CompareOptions(device="cpu"))
    assert (plain.samples, plain.draws) == (8192, 64)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            ["--micro-batch-size", "auto"],
            "error: --micro-batch-size auto would change the result: the loss of towers compares the samples of an "
            "update, so that the small batch and plain accumulation have another loss at each size. Leave out "
            "--micro-batch-size (the task's own is 5), or give a number",
        ),
        (["--draws", "7"], "--draws"),
        (["--micro-batch-size", "12"], "must be below --batch-size 12: otherwise there is nothing to accumulate"),
    ],
)
def test_what_cannot_be_asked_of_such_a_loss_is_an_error_before_any_work(
    options: list[str], message: str, tmp_path: Path
) -> None:
    assert message in run(*TOWERS, *options, "--output", tmp_path / "run", code=2)
    assert not (tmp_path / "run").exists()


def test_sixteen_draws_are_too_few_for_the_noise_scale_of_any_other_loss(tmp_path: Path) -> None:
    said = run("--task", "own_tasks:line", "--draws", "16", "--output", tmp_path / "run", code=2)
    assert "error: --draws 16 of the gradient of line do not tell its variance: at least 64" in said


# ---- gradients against brute force


def gradient(task: Task, indices: Sequence[int]) -> Tensor:
    """Of the loss that compares these samples, in one piece, shape (P,)."""
    batch = task.collate([task.train[index] for index in indices])
    loss = info_nce(task.model, encode(task.model, batch), None)
    return torch.cat([g.flatten() for g in torch.autograd.grad(loss, list(task.model.parameters()))])


def test_each_size_has_its_own_gradient_and_plain_accumulation_that_of_the_mean_over_micro_batches() -> None:
    torch.manual_seed(0)
    task = towers(size=100, dtype="float64")
    meter = CoupledMeter(task, task.model, [5, 12, 23], 5, native=True)
    generator = torch.Generator().manual_seed(1)
    drawn = [torch.randperm(80, generator=generator)[:23].tolist() for _ in range(12)]
    for indices in drawn:
        meter.draw(indices)
    found = meter.statistics()
    for size, estimate in found.by_size.items():
        own = torch.stack([gradient(task, indices[:size]) for indices in drawn])
        assert estimate.value == pytest.approx(float(torch.cov(own.T).trace()), rel=1e-9)
    whole = torch.stack([gradient(task, indices) for indices in drawn])
    parts = torch.stack([mean_of_parts(task, indices) for indices in drawn])
    assert found.plain is not None
    assert found.plain.value == pytest.approx(float(torch.cov(parts.T).trace()), rel=1e-9)
    differences = (parts - whole).norm(dim=1) / whole.norm(dim=1)
    cosines = torch.nn.functional.cosine_similarity(parts, whole)
    assert found.plain_gradient is not None
    assert found.plain_gradient.difference.value == pytest.approx(float(differences.mean()), rel=1e-9)
    assert found.plain_gradient.difference.standard_error == pytest.approx(float(differences.std()) / math.sqrt(12))
    assert found.plain_gradient.cosine.value == pytest.approx(float(cosines.mean()), rel=1e-9)
    assert found.largest_difference is not None
    assert found.largest_difference < 1e-12
    assert found.plain_gradient.difference.value > 0.2  # the control: plain accumulation is far off
    # A larger update that went on from the smaller one, as for means over samples, would be plain accumulation.
    assert abs(found.by_size[23].value / found.plain.value - 1) > 0.02


def mean_of_parts(task: Task, indices: Sequence[int]) -> Tensor:
    """The gradients of even micro-batches of at most 5, weighted by their samples."""
    sizes = [5, 5, 5, 4, 4]
    parts = [indices[start : start + size] for start, size in zip([0, 5, 10, 15, 19], sizes, strict=True)]
    return sum((len(part) * gradient(task, part) for part in parts), start=torch.zeros(())) / len(indices)


def test_of_a_loss_that_is_a_mean_over_samples_both_meters_say_the_same() -> None:
    """So that what the meter says of other losses is theirs."""
    torch.manual_seed(0)
    base = load_task("own_tasks:line")
    as_outputs = replace(
        base,
        encode=lambda model, pair: {"error": model(pair[0]) - pair[1]},
        loss_fn=lambda model, outputs, window: outputs["error"].square().mean(),
        metrics={},
    )
    one = CoupledMeter(as_outputs, base.model, [4, 12], 4, native=True)
    other = GradientMeter(base, base.model, [4, 12], 4, native=True)
    for seed in range(10):
        indices = torch.randperm(40, generator=torch.Generator().manual_seed(seed))[:12].tolist()
        one.draw(indices)
        other.draw(indices)
    coupled, plain = one.statistics(), other.statistics()
    for size in (4, 12):
        assert coupled.by_size[size].value == pytest.approx(plain.by_size[size].value, rel=1e-4)
    assert coupled.plain_gradient is not None
    assert coupled.plain_gradient.difference.value < 1e-5


# ---- words


def ended(final: float, recall: float, *, updates: int) -> Course:
    made = course(final, updates=updates)
    parts = {"recall@1": [recall * (1 + 0.1 * (part % 3 - 1)) for part in range(6)]}
    final = replace(made.final, metrics={"recall@1": recall}, parts_of_metrics=parts)
    return replace(made, final=final, metrics_before={"recall@1": 0.3})


def coupled(*, native: bool = True, scaled: bool = False, **changes: Any) -> Comparison:
    small, plain, gathered, whole = coupled_ways(64, 8)
    in_one_piece = Result(whole, Memory(80_000_000, True), ended(2.5, 0.5, updates=16), Estimate(0.2, 0.02))
    if not native:
        in_one_piece = Result(whole, Memory(80_000_000, False))
    results: dict[Key, Result] = {
        "small": Result(small, Memory(10_000_000, True), ended(2.7, 0.4, updates=128), Estimate(0.8, 0.02)),
        "plain": Result(plain, Memory(10_000_000, True), ended(2.8, 0.45, updates=16), Estimate(0.1, 0.004)),
        "accumulated": Result(gathered, Memory(11_000_000, True), ended(2.5, 0.5, updates=16), Estimate(0.2, 0.02)),
        "native": in_one_piece,
    }
    scaling = None
    if scaled:
        scaling = RateScaling("sqrt", "adamw", "why it is so", 8, 64, 2.8, 2, ["group 0: lr 0.1 -> 0.28"], [])
        results["scaled"] = Result(scaled_way(gathered), Memory(11_000_000, True), ended(2.9, 0.3, updates=16))
    made = comparison(
        results=results,
        variances={8: Estimate(0.8, 0.02), 64: Estimate(0.2, 0.02)},
        gradient_squared=Estimate(math.nan, math.nan),
        gradient_difference=3e-7 if native else None,
        plain_gradient=PlainGradient(Estimate(0.8, 0.02), Estimate(0.6, 0.01)),
        scaling=scaling,
    )
    return replace(made, **changes)


def with_course(key: Key, its_course: Course) -> Comparison:
    base = coupled()
    return replace(base, results={**base.results, key: replace(base.results[key], course=its_course)})


def said_of(of: Comparison) -> str:
    return " ".join(f"{finding.title}. {finding.text}" for finding in words.findings(of))


def test_the_words_of_such_a_loss_claim_what_the_numbers_show() -> None:
    titles = [finding.title for finding in words.findings(coupled(scaled=True))]
    assert titles == [
        "Gathered accumulation equals the native large batch; it does not beat it",
        "Plain accumulation optimises another loss; its held-out loss came out higher here",
        "What gathered accumulation buys is memory: 0.14 of the native peak, 7.3 times less",
        "From the same samples at the same learning rate, the large batch reached the lower held-out loss",
        "Scaling the learning rate did not help in this run: it made the loss higher",
        "One over the batch size is no law for the variance of this gradient",
        "Gathered accumulation and the native batch took the same time for the same samples",
        "The gradient noise scale and the sharpness are left out for this loss",
    ]
    text = said_of(coupled(scaled=True))
    assert "is off by 0.800 ± 0.020 of the right one's length for the same samples (cosine 0.600 ± 0.010)" in text
    assert "Gathered accumulation differs from the native batch by at most 3e-07" in text
    assert "recall@1 0.450 against 0.500 (difference -0.0500 ± 0.0018; one seed)" in text
    assert "and so of plain accumulation: 0.125 ± 0.006, which agrees with 0.1250 (1/8" in text
    assert "Caution: rules are derived for losses that are means over samples; this one changes with the batch" in text
    assert "A rule is a first guess: try rates in between." in text
    assert "Clearly apart: recall@1." in text
    assert "Before training: recall@1 0.300." in text


@pytest.mark.parametrize(
    ("changed", "said", "said_no_more"),
    [
        (with_course("plain", ended(2.2, 0.5, updates=16)), "came out lower here", "came out higher here"),
        (
            with_course("plain", ended(2.5, 0.5, updates=16)),
            "which one learned more, this comparison does not tell",
            "came out higher here",
        ),
        (
            with_course("small", ended(2.5, 0.5, updates=128)),
            "small and large batch are not clearly apart",
            "the large batch reached",
        ),
        (with_course("plain", ended(2.8, 0.5, updates=16)), "No metric is clearly apart", "-0.0500 ± 0.0018"),
        (with_course("small", ended(2.2, 0.5, updates=128)), "the small batch reached", "the large batch reached"),
        (
            with_course("native", ended(2.2, 0.5, updates=16)),
            "Gathered accumulation did not equal the native large batch here: its loss is 0.300 higher",
            "it does not beat it",
        ),
        (coupled(native=False), "trains a batch of 64 where it does not fit", "equals the native"),
        (
            coupled(variances={8: Estimate(0.2, 0.004), 64: Estimate(0.2, 0.02)}),
            "plain accumulation: 0.500",
            "which agrees with",
        ),
    ],
)
def test_the_words_change_with_the_numbers(changed: Comparison, said: str, said_no_more: str) -> None:
    if "0.500" in said:
        small = changed.results["small"]
        results = {**changed.results, "small": replace(small, variance=Estimate(0.2, 0.004))}
        changed = replace(changed, results=results)
    assert said in said_of(changed)
    assert said_no_more not in said_of(changed)
    assert said not in said_of(coupled())
    assert said_no_more in said_of(coupled())


@pytest.mark.parametrize(
    ("batch_size", "micro_batch_size", "of_plain", "of_small"),
    [(12, 5, [4, 4, 4], [5, 5, 2]), (12, 4, [4, 4, 4], [4, 4, 4]), (13, 5, [5, 4, 4], [5, 5, 3])],
)
def test_the_words_name_as_many_samples_as_the_losses_compare(
    batch_size: int, micro_batch_size: int, of_plain: list[int], of_small: list[int]
) -> None:
    seen: list[int] = []

    def watched(model: Any, outputs: Any, window: Any) -> Tensor:
        seen.append(len(outputs["left"]))
        return info_nce(model, outputs, window)

    task = replace(towers(), loss_fn=watched)
    ways = coupled_ways(batch_size, micro_batch_size)
    for way, sizes in zip(ways, (of_small, of_plain, [batch_size], [batch_size]), strict=True):
        seen.clear()
        Racer(task, way, 0.01, CPU).train_on([task.train[index] for index in range(batch_size)])
        assert way.compared(batch_size) == seen == sizes
    base = coupled()
    results = {way.key: replace(base.results[way.key], way=way) for way in ways}
    variances = {micro_batch_size: Estimate(0.8, 0.02), batch_size: Estimate(0.2, 0.02)}
    text = said_of(
        replace(base, batch_size=batch_size, micro_batch_size=micro_batch_size, results=results, variances=variances)
    )
    plain, small = (f"{min(n)} to {max(n)}" if min(n) < max(n) else f"{n[0]}" for n in (of_plain, of_small))
    assert f"in each of which {plain} samples are compared with one another" in text
    assert f"each of a loss that compares {small} samples instead of {batch_size}." in text
    # The law of means is held against plain accumulation only where its parts are small batches.
    assert ("agrees with" in text or "does not agree with" in text) == (batch_size % micro_batch_size == 0)
    assert (f"its parts are of {plain} samples and not of {micro_batch_size}" in text) != ("agree" in text)


def test_over_seeds_the_differences_of_loss_and_metrics_have_intervals() -> None:
    def repeat(seed: int, recall: float) -> Repeat:
        keys: tuple[Key, ...] = ("small", "plain", "accumulated")
        values = {"small": 2.7, "plain": 2.8, "accumulated": 2.5}
        recalls = {"small": 0.4, "plain": recall, "accumulated": 0.5 + 0.01 * seed}
        return Repeat(seed, {k: values[k] for k in keys}, {}, {k: {"recall@1": recalls[k]} for k in keys})

    repeated = coupled(repeats=[repeat(1, 0.45), repeat(2, 0.47)])
    assert "recall@1 0.450 against 0.500 (difference -0.053 ± 0.014; 3 seeds, 95%)" in said_of(repeated)
    table = dict(rows(repeated))
    assert table["recall@1, 3 seeds, 95%"][2] == "0.510 ± 0.025"
    assert "sharpness, 3 seeds, 95%" not in table


@pytest.mark.parametrize("native", [True, False])
def test_every_figure_and_the_page_can_be_made_with_and_without_the_native_batch(native: bool, tmp_path: Path) -> None:
    made = coupled(native=native, scaled=native)
    names = [plot.name for plot in plots_of(made)]
    assert names == ["loss-samples", "metrics", "loss-updates", "loss-seconds", "speed", "memory", "variance"]
    for plot in plots_of(made):
        assert inline_svg(plot, made).rstrip().endswith("</svg>")
    save_main_picture(tmp_path / "picture.png", made)
    html = page(made, words.findings(made))
    assert "plain and gathered accumulation" in html
    assert ("gradient off native" if native else "gradient off gathered") in html


def test_the_metrics_before_training_are_those_of_the_initial_weights(
    compared: tuple[str, dict[str, Any], str],
) -> None:
    said, found, _ = compared
    task = load_task("own_towers:towers")
    outputs = encode(task.model, task.collate(list(task.validation)))  # type: ignore[call-overload]
    hits, count = task.metrics["recall@1"](task.model, outputs)
    before = found["results"]["small"]["course"]["metrics_before"]
    assert before == {"recall@1": pytest.approx(float(hits) / float(count))}
    assert "Before training: recall@1" in said


def test_what_was_not_predicted_has_no_row() -> None:
    assert "predicted peak" not in dict(rows(coupled()))
    base = coupled()
    predicted = replace(base.results["small"], memory=Memory(10_000_000, True, 10_000_001))
    table = dict(rows(replace(base, results={**base.results, "small": predicted})))
    assert table["predicted peak"] == ["10.0 MB", "-", "-", "-"]


def test_the_row_of_gradients_says_how_far_each_is_from_the_native_one() -> None:
    assert dict(rows(coupled()))["gradient off native"] == ["-", "0.800 ± 0.020", "3e-07", "-"]
    assert dict(rows(coupled(native=False)))["gradient off gathered"] == ["-", "0.800 ± 0.020", "-", "-"]
    assert "expected by 1/B" in dict(rows(comparison()))
