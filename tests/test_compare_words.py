"""What `macrobatch compare` says is what the numbers bear: whole batches, bounds, overfitting; no number is broken."""

import math
import random
import re
from collections.abc import Sequence
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.collections import PolyCollection
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from own_tasks import line
from rich.console import Console
from test_compare import comparison, course, run, strict_json, validation, with_result
from test_compare_coupled import coupled
from test_compare_scaling import scaled, with_sharpness

from macrobatch.cli import course_words, scale_words, words
from macrobatch.cli.compare_options import CompareOptions
from macrobatch.cli.comparer import Comparer
from macrobatch.cli.comparison import Comparison, Course, Memory, NoisePoint
from macrobatch.cli.estimates import Estimate
from macrobatch.cli.figures import COUPLED_PLOTS, PLOTS, Plot, plots_of
from macrobatch.cli.plots import STYLE, few_ticks, log_ticks
from macrobatch.cli.report import page, rows
from macrobatch.cli.sampling import UpdateIndices
from macrobatch.cli.speed_words import Ratio, judged, time_ratio
from macrobatch.cli.terminal_table import terminal_table

# ---- whole effective batches


def test_every_effective_batch_is_whole_and_no_sample_comes_twice_in_a_pass() -> None:
    batches = list(UpdateIndices(40, [12] * 7, seed=0))
    assert [len(batch) for batch in batches] == [12] * 7
    passes = [batches[:3], batches[3:6], batches[6:]]
    assert [len({index for batch in each for index in batch}) for each in passes] == [36, 36, 12]
    assert batches[0] != batches[3]
    # Over passes every sample is seen, those left out of one in another.
    assert {index for batch in UpdateIndices(40, [12] * 60, seed=0) for index in batch} == set(range(40))
    # The control: batches that go on to the end of a pass are not all whole.
    assert [len(batch) for batch in UpdateIndices(40, [12, 12, 12, 4], seed=0)] == [12, 12, 12, 4]


def test_the_updates_of_several_passes_are_as_many_and_as_large_as_is_said(tmp_path: Path) -> None:
    options = ["--task", "own_tasks:line", "--batch-size", "12", "--micro-batch-size", "5", "--samples", "130"]
    said = run(*options, "--device", "cpu", "--sharpness", "0", "--output", tmp_path / "run")
    found = strict_json(tmp_path / "run" / "compare.json")
    assert (found["samples"], found["data_size"]) == (120, 40)
    courses = {key: result["course"] for key, result in found["results"].items()}
    assert [len(each["losses"]) for each in courses.values()] == [30, 10, 10, 10]
    assert all(each["window_samples"] == [12] * 10 for each in courses.values())
    assert "the same 120 samples (10 × 12) in the same order" in said
    assert "samples per update 5, last 2 12 12 12" in said
    text = " ".join((tmp_path / "run" / "report.html").read_text().split())
    assert "10 effective batches of 12, all of them whole, from the 40 training samples" in text
    assert "the last 4 of a pass are too few for one and left out" in text
    assert "an update of every 5 samples (of the last 2 of each 12)" in text


def test_the_page_speaks_of_samples_left_out_only_where_there_are_some() -> None:
    even = replace(comparison(), data_size=640)
    assert "too few for one" not in page(even, [])
    assert "last" not in dict(rows(even))["samples per update"][0]
    assert "the last 5 of a pass are too few for one" in page(replace(even, data_size=645), [])


def test_the_small_batch_is_held_against_the_large_one_after_as_many_updates() -> None:
    """Of 5, 5 and 2 samples for each 12: after ten updates it has seen 41, and not 50."""
    task = line()
    comparer = Comparer(task, CompareOptions(batch_size=12, micro_batch_size=5, samples=120, device="cpu"))
    assert (comparer.samples, comparer.num_batches) == (120, 10)
    small = course(2.0, updates=128)
    curve = [(0, 5.5), (128, 3.25), (144, 3.0), (1024, 2.0)]
    # Sixteen updates that see nine samples each: 144, where 16 times the micro-batch of 8 is 128.
    seen = [(9 * number, 3.0) for number in range(1, 129)]
    changed = with_result("small", course=replace(small, losses=seen, validation_losses=curve))
    (said,) = [each.text for each in words.findings(changed) if "the small batch learned faster" in each.title]
    assert "(after its first 16 it stood at 3.000)" in said


# ---- time


@pytest.mark.parametrize(
    ("low", "value", "high", "of_medians", "said"),
    [
        (1.005, 1.01, 1.015, 0.99, "took the same time"),
        (0.98, 1.00, 1.02, 1.00, "took the same time"),
        (0.97, 1.01, 1.05, 1.00, "do not tell: accumulation took between 0.97 and 1.05 times as long"),
        (1.015, 1.02, 1.025, 1.04, "took more than 1.01 times as long"),  # clear, but the table has another number
        (0.83, 0.86, 0.88, 0.78, "took less than 0.88 of the time of"),
        (0.83, 0.86, 0.88, 0.831, "took 0.86 times as long"),
        (0.93, 0.95, 0.97, 0.94, "took 0.95 times as long"),
        (0.91, 0.95, 0.99, 0.81, "took less than 0.99 of the time of"),  # the two disagree on how much, not on which
        (0.91, 0.95, 0.99, 1.20, "do not tell: accumulation took between 0.91 and 1.20"),
        (1.19, 1.82, 2.45, 1.58, "took more than 1.19 times as long"),  # far from one, though uncertain
        (1.002, 1.5, 2.45, 1.58, "took longer than the native batch"),
        (0.4, 0.7, 0.998, 0.7, "took less time than the native batch"),
        (0.4, 1.5, 2.6, 1.5, "do not tell: accumulation took between 0.40 and 2.60"),
        (1.22, 1.30, 1.38, 1.28, "took 1.30 times as long"),
        (0.0, 1.8, math.inf, 1.8, "Too few effective batches were timed"),
    ],
)
def test_the_words_on_time_say_what_holds_over_the_whole_interval_and_the_other_estimate(
    low: float, value: float, high: float, of_medians: float, said: str
) -> None:
    assert said in judged(Ratio(value, low, high, 31), of_medians, "").title


def paced(ratios: Sequence[float]) -> Comparison:
    """Accumulation at so many times the native batch's time: 1 s for the first 8 pairs, 2 s for the others."""
    base, results = course(2.5, updates=16), comparison().results
    native = [1.0] * 8 + [2.0] * 8
    times = {"native": native, "accumulated": [r * t for r, t in zip(ratios, native, strict=True)]}
    paced = {
        key: replace(result, course=replace(base, window_seconds=times[key])) if key in times else result
        for key, result in results.items()
    }
    return replace(comparison(), results=paced)


def test_one_ratio_of_times_is_said_and_where_the_table_has_another_why() -> None:
    agrees = words.findings(paced([0.86] * 16))[-1]
    assert agrees.title.startswith("Accumulation took 0.86 times as long")
    assert "is 0.86 (0.86 to 0.86, 95%), the median over pairs of effective batches." in agrees.text
    assert "By the speeds of the table" not in agrees.text
    # Three pairs of another ratio: no more of the median over pairs, but of medians of each way by itself.
    other = words.findings(paced([0.86] * 8 + [0.5] * 3 + [0.86] * 5))[-1]
    assert "is 0.86 (0.86 to 0.86, 95%)" in other.text
    assert "By the speeds of the table it would be 0.50: these are medians of each way by itself" in other.text
    assert other.title.startswith("Accumulation took less than 0.86 of the time of the native batch")


def timed(ratios: Sequence[float]) -> Ratio:
    base = course(2.0, updates=16)
    first = [9.9]  # warms up
    one = replace(base, window_seconds=[*first, *ratios], window_samples=[64] * (1 + len(ratios)))
    return time_ratio(one, replace(one, window_seconds=[1.0] * (1 + len(ratios))))


def test_the_interval_of_a_time_ratio_is_between_the_ranks_of_the_sign_test() -> None:
    for n in range(4, 60):
        missed = [2 * sum(math.comb(n, i) for i in range(k)) / 2**n for k in range(n)]
        k = max(k for k in range(n) if missed[k] <= 0.05)
        found = timed([float(number) for number in range(n, 0, -1)])
        assert (found.low, found.high) == ((k, n + 1 - k) if k else (0.0, math.inf))
    many = timed([float(number) for number in range(1, 4002)])
    assert many.low == pytest.approx(2001 - 1.96 * math.sqrt(4001) / 2, abs=2)


def test_the_interval_covers_the_median_as_often_as_it_says_also_where_times_have_outliers() -> None:
    generator = random.Random(0)
    covered, naive = 0, 0
    for _ in range(400):
        values = [math.exp(generator.gauss(0, 0.1)) * (5 if generator.random() < 0.3 else 1) for _ in range(15)]
        found = timed(values)
        truth = math.exp(0.1 * 0.566)  # the median: 0.5 = 0.7 P(Z < z), z = 0.566
        covered += found.low <= truth <= found.high
        mean = sum(values) / 15
        half = 1.96 * math.sqrt(sum((v - mean) ** 2 for v in values) / 14 / 15)
        naive += abs(mean - truth) <= half
    assert covered >= 0.93 * 400
    assert naive < 0.8 * 400  # the control: a mean and its standard errors


def test_a_bound_is_rounded_so_that_it_still_holds() -> None:
    assert "more than 1.19 times" in judged(Ratio(1.8, 1.1999, 2.4, 31), 1.8, "").title
    assert "less than 0.84 of" in judged(Ratio(0.6, 0.3, 0.8301, 31), 0.6, "").title


# ---- losses, variance and noise that are not known well


def held_out(final: float, spread: float) -> Course:
    base = course(final, updates=16)
    losses = [final + spread * (part % 3 - 1) for part in range(6)]
    return replace(base, final=validation(losses))


def text_of(of: Comparison) -> str:
    return " ".join(f"{finding.title}. {finding.text}" for finding in words.findings(of))


def test_a_difference_that_is_not_clear_is_not_called_alike_but_said_with_its_bounds() -> None:
    unclear = with_result("small", course=replace(held_out(2.4, 0.6), losses=course(2.4, updates=128).losses))
    text = text_of(unclear)
    assert "Whether the small or the large batch learned more from the same samples, the losses do not tell" in text
    # 2.4 less 2.5, paired: 0.5 (-1, 0, 1) around it, whose standard error is 0.5 sqrt(4/5) / sqrt(6) = 0.18
    assert "not clearly apart, that is between 0.65 lower and 0.45 higher." in text
    assert "learned alike" not in text
    alike = with_result("small", course=course(2.501, updates=128))
    assert "Small and large batch learned alike from the same samples" in text_of(alike)


def test_of_the_scaled_rate_bounds_are_said_where_it_is_not_clear() -> None:
    base = scaled(2.4)
    result = replace(base.results["scaled"], course=held_out(2.4, 0.6))
    found = scale_words.scaled_rate(replace(base, results={**base.results, "scaled": result}))
    assert found is not None
    assert "not clearly apart, that is between 0.65 lower and 0.45 higher." in found.text
    alike = scale_words.scaled_rate(scaled(2.5))
    assert alike is not None
    assert "not clearly apart" not in alike.text


def test_draws_that_bear_no_law_are_not_said_to_follow_one() -> None:
    few = comparison(variances={8: Estimate(0.8, 0.3), 64: Estimate(0.1, 0.3)})
    assert "How the variance of an update's gradient falls with the batch size, the draws do not tell" in text_of(few)
    assert "falls as one over" not in text_of(few)


def test_the_law_of_the_variance_is_said_only_where_the_native_batch_bears_it_too() -> None:
    law = "falls as one over the batch size"
    assert law in text_of(comparison())
    # The native batch has more than the small one, where 0.1 is expected.
    up = replace(with_result("native", variance=Estimate(3.3, 0.3)), gradient_difference=0.84)
    assert law not in text_of(up)
    assert "The variance of an update's gradient does not fall as one over the batch size here" in text_of(up)
    assert "becomes 0.125 ± 0.006 of what it was by accumulation, and 4.1 ± 0.4 by the native batch" in text_of(up)
    assert "the native batch has another gradient" in text_of(up)
    # Apart from accumulation, and from the law by less than is clear.
    apart = with_result("native", variance=Estimate(0.105, 0.001))
    noisy = replace(apart, variances={8: Estimate(0.8, 0.02), 64: Estimate(0.1, 0.001)})
    assert "the draws do not tell" in text_of(noisy)
    assert law not in text_of(noisy)


@pytest.mark.parametrize(("of_large", "is_law"), [(0.1, True), (0.108, True), (0.1125, False), (0.0875, False)])
def test_the_law_of_the_variance_is_within_two_standard_errors_of_the_ratio(of_large: float, is_law: bool) -> None:
    of = comparison(variances={8: Estimate(0.8, 0.001), 64: Estimate(of_large, 0.005)})
    assert ("falls as one over the batch size" in text_of(of)) is is_law


def test_gradients_that_differ_stand_in_the_headline_and_nothing_is_called_equal_or_near() -> None:
    of = comparison(gradient_difference=0.84)
    titles = [found.title for found in words.findings(of)]
    assert titles[0] == "Accumulation did not equal the native large batch here: their gradients differ by up to 84%"
    for sentence in ("equals the native", "ended near", "is the same update", "is worth about"):
        assert sentence not in text_of(of)
    assert "gradients depend on how a batch is cut" in text_of(of)
    both = replace(with_result("native", course=course(2.3, updates=16)), gradient_difference=0.84)
    assert "their gradients differ by up to 84%, and its loss is 0.200 higher" in text_of(both)
    # The controls: rounding; and a noise scale with dropout, whose samples do not see each other.
    assert "equals the native large batch" in text_of(comparison(gradient_difference=9e-4))
    assert "is worth about" in text_of(comparison(gradient_difference=0.84, noisy_layers=["Dropout"]))


def test_what_is_in_no_prediction_is_said_where_it_is_seen() -> None:
    def predicted(peak: int, more: int) -> str:
        base = with_result("accumulated", memory=Memory(peak, True, peak - more))
        return text_of(base)

    said = "Not in them are copies of the state of the random numbers, 5.06 kB each"
    assert said in predicted(25_600, 5_100)
    assert said not in predicted(11_000_000, 5_100)  # a part that is not seen
    assert said not in predicted(25_600, 24_000)  # more than they are
    assert said not in predicted(25_600, -2_000)


def test_the_state_of_the_random_numbers_is_as_large_as_is_said() -> None:
    assert torch.get_rng_state().nbytes == words.RANDOM_STATE


def test_the_noise_scale_along_a_run_that_broke_down_is_not_said() -> None:
    points = [NoisePoint(128, 27.0, 27.0, 27.1), NoisePoint(1024, 27.0, 27.0, 27.1)]
    base = scaled(2.2, noise=points)
    made = base.results["scaled"].course
    assert made is not None
    broken = replace(base.results["scaled"], course=replace(made, skipped=3))
    of = replace(base, results={**base.results, "scaled": broken})
    assert "by the micro-batches of its windows" in scale_words.noise(base).text
    assert "by the micro-batches of its windows" not in scale_words.noise(of).text
    assert dict(rows(base))["noise scale, 95%"][-1] == "27 to 27"
    assert dict(rows(of))["noise scale, 95%"][-1] == "-"
    (plot,) = [each for each in PLOTS if each.name == "noise"]
    assert [len(drawn(plot, each)[1].lines[0].get_xydata()) for each in (base, of)] == [2, 0]  # type: ignore[arg-type]


def test_the_numbers_stand_before_the_words_in_the_page() -> None:
    text = page(comparison(), words.findings(comparison()))
    assert text.index("<table>") < text.index("What the numbers say") < text.index("The pictures")


def test_a_noise_scale_whose_gradient_is_lost_is_known_from_below() -> None:
    # tr(Sigma) = 6.4 at least 6.4 - 3 * 0.16 = 5.92; |G|^2 at most 0.01 + 3 * 0.01 = 0.04: more than 148 samples
    lost = comparison(gradient_squared=Estimate(0.01, 0.01))
    said = scale_words.noise(lost)
    assert said.title == "Gradients are mostly noise, even of 64 samples"
    assert "the noise scale is more than 148 samples where accumulation ended" in said.text
    assert dict(rows(lost))["noise scale, 95%"][1] == "over 148"
    weak = scale_words.noise(comparison(gradient_squared=Estimate(0.01, 0.05)))
    assert weak.title == "The gradient noise scale is more than 37: how much more, the draws do not tell"
    none = scale_words.noise(comparison(gradient_squared=Estimate(-0.2, 0.01)))
    assert none.title == "The gradient noise scale is not known"


def test_a_noise_scale_with_a_wide_interval_is_not_about_anything() -> None:
    wide = comparison(gradient_squared=Estimate(0.1, 0.032))
    assert (
        scale_words.noise(wide).title == "Whether the noise scale is above the batch size of 64, the draws do not tell"
    )


def test_of_a_model_with_batchnorm_the_noise_scale_is_said_to_be_a_hint_and_nothing_follows_from_it() -> None:
    plain, coupled_model = comparison(), comparison(coupling_layer="'1' (BatchNorm2d)")
    found = scale_words.noise(coupled_model)
    assert "'1' (BatchNorm2d) couples samples" in found.title
    assert "take these numbers as a hint, of this micro-batch size only." in found.text
    assert "BatchNorm couples samples: the number is a hint" in page(scaled_with(coupled_model), [])
    lost = scale_words.noise(replace(coupled_model, gradient_squared=Estimate(0.01, 0.01)))
    assert lost.title == found.title
    assert "as a hint" in lost.text
    for sentence in ("is worth about", "larger than the gradient noise scale"):
        assert sentence not in f"{found.title}. {found.text}"
        assert sentence in f"{scale_words.noise(plain).title}. {scale_words.noise(plain).text}"  # the control
    # Nor is it a reason for what a scaled rate did.
    behind = scaled(2.9)
    known, hint = (scale_words.scaled_rate(replace(behind, coupling_layer=layer)) for layer in (None, "'1' (B)"))
    assert known is not None
    assert hint is not None
    assert "the noise scale of 13 samples" in known.text
    assert "noise scale" not in hint.text


def scaled_with(other: Comparison) -> Comparison:
    return replace(scaled(2.2), coupling_layer=other.coupling_layer)


def watched(*points: tuple[int, float, float]) -> str:
    base = scaled(2.2)
    made = base.results["scaled"].course
    assert made is not None
    noise = [NoisePoint(samples, low, low, high) for samples, low, high in points]
    result = replace(base.results["scaled"], course=replace(made, noise=noise))
    return scale_words.noise(replace(base, results={**base.results, "scaled": result})).text


def test_points_whose_interval_has_no_upper_end_are_said_beside_the_two_that_are_quoted() -> None:
    nothing = math.inf
    said = watched((128, 10, 20), (256, 30, nothing), (512, 30, nothing), (1024, 40, 60))
    assert "between 10 and 20 after 128 samples, between 40 and 60 at the end" in said
    assert "Its interval had no upper end after 256 and 512 samples." in said
    many = watched(*[(64 * n, 0, nothing) for n in range(1, 8)], (1024, 40, 60))
    assert "no upper end at 7 of 8 points, the first after 64 and the last after 448 samples." in many
    last = watched((128, 10, 20), (512, 40, 60), (1024, 40, nothing))
    assert "between 40 and 60 after 512 samples (95%)" in last
    assert "Its interval had no upper end after 1,024 samples." in last
    assert "no upper end" not in watched((128, 10, 20), (1024, 40, 60))


# ---- the best before the end


def risen(lowest: float, final: float, *, updates: int, training: float) -> Course:
    """A way that was best in the middle; `training`: the training loss at the end."""
    base = course(final, updates=updates)
    losses = [(n, 5.5 + (training - 5.5) * n / 1024) for n, _ in base.losses]
    return replace(base, losses=losses, validation_losses=[(0, 5.5), (512, lowest), (1024, final)])


def all_risen(rise: float, training: float = 1.0, data_size: int = 128) -> Comparison:
    base = comparison(data_size=data_size)  # of 1,024 samples in all
    results = {
        key: replace(result, course=risen(2.0, 2.0 + rise, updates=128 if key == "small" else 16, training=training))
        for key, result in base.results.items()
    }
    return replace(base, results=results)


def test_that_every_way_was_best_before_the_end_is_said_with_where_and_how_good() -> None:
    found = course_words.past_best(all_risen(0.5))
    assert found is not None
    assert found.title == "Every way had its lowest validation loss before the end, not at it"
    assert "small batch 2.000 after 512 samples, 2.500 at the end; accumulation 2.000 after 512 samples" in found.text
    assert "which is overfitting" in found.text
    assert found in words.findings(all_risen(0.5))
    # The controls: a course that only falls, and a rise that chance explains (its error is 0.037).
    assert course_words.past_best(comparison()) is None
    assert course_words.past_best(all_risen(0.05)) is None


def test_a_rise_without_a_training_loss_that_falls_is_no_overfitting() -> None:
    found = course_words.past_best(all_risen(0.5, training=6.5))
    assert found is not None
    assert "no overfitting; the learning rate may be too large" in found.text
    assert "which is overfitting" not in found.text


# The course of a run at a learning rate that is too large, through 512 of 1,438 samples.
DIVERGED = [(0, 2.3), (64, 2.5), (128, 9.3), (192, 17.3), (256, 12.3), (320, 5.9), (896, 1.8), (1024, 2.2)]


@pytest.mark.parametrize(("data_size", "seen"), [(1438, "No"), (1024, "No"), (1000, "Hardly a")])
def test_where_no_sample_was_seen_twice_nothing_is_called_overfitting(data_size: int, seen: str) -> None:
    diverged = replace(risen(1.8, 2.2, updates=16, training=1.0), validation_losses=DIVERGED)
    base = replace(scaled(2.2), data_size=data_size)
    fell = replace(course(1.5, updates=16), validation_losses=[(n, 2.3 - 0.8 * n / 1024) for n, _ in DIVERGED])
    results = {key: replace(result, course=fell) for key, result in base.results.items()}
    results["scaled"] = replace(base.results["scaled"], course=diverged)
    text = text_of(replace(base, results=results))
    assert f"{seen} training sample was seen twice, so that this is" in text
    assert "an unsteady course, as near the largest rate that trains: accumulated, lr scaled rose to 17.300" in text
    assert "Its course was unsteady: its loss rose to 17.300 after 192 samples and fell again" in text
    assert "which is overfitting" not in text
    assert "overfitted" not in text
    # The control: of few samples, seen again and again.
    again = text_of(replace(base, results=results, data_size=128))
    assert "which is overfitting" in again
    assert "It overfitted: its lowest loss was 1.800" in again


def test_a_small_batch_that_saw_each_sample_once_did_not_overfit() -> None:
    once = with_result("small", course=risen(1.9, 3.0, updates=128, training=1.0))
    text = text_of(once)
    assert "overfitted" not in text
    assert "so that this is no overfitting. The losses do not tell why" in text
    assert "unsteady" not in text  # it fell, and then rose: nowhere did it fall again


def test_a_course_that_only_falls_or_moves_by_little_is_not_unsteady() -> None:
    assert course_words.rise_of(course(2.0, updates=16)) is None
    little = [(0, 2.0), (64, 2.1), (1024, 1.0)]
    assert course_words.rise_of(replace(course(1.0, updates=16), validation_losses=little)) is None
    steep = [(0, 2.0), (64, 2.3), (1024, 1.0)]
    assert course_words.rise_of(replace(course(1.0, updates=16), validation_losses=steep)) == (64, 2.3)


def test_how_many_ways_were_best_before_the_end_is_said() -> None:
    one = replace(with_result("small", course=risen(1.9, 3.0, updates=128, training=1.0)), data_size=512)
    found = course_words.past_best(one)
    assert found is not None
    assert found.title.startswith("1 of 3 ways had their lowest")
    # A small batch that overfitted is not said to have had too large a rate.
    text = text_of(one)
    assert "which suggests that it overfitted: its lowest loss was 1.900, after 512 samples" in text
    assert "large for its noise" not in text
    assert "large for its noise" in text_of(with_result("small", course=course(3.0, updates=128)))


def test_a_scaled_rate_that_overfitted_is_not_said_to_be_too_large() -> None:
    base = scaled(2.9)
    result = replace(base.results["scaled"], course=risen(2.3, 2.9, updates=16, training=1.0))
    found = scale_words.scaled_rate(replace(base, results={**base.results, "scaled": result}, data_size=512))
    control = scale_words.scaled_rate(base)
    assert found is not None
    assert control is not None
    assert "It overfitted: its lowest loss was 2.300, after 512 samples." in found.text
    assert "largest useful value already" not in found.text
    assert "largest useful value already" in control.text


def test_weights_that_were_best_before_training_are_said_to_be() -> None:
    made = replace(risen(2.0, 3.0, updates=16, training=1.0), validation_losses=[(0, 1.5), (1024, 3.0)])
    found = course_words.past_best(with_result("accumulated", course=made))
    assert found is not None
    assert "accumulation 1.500 before training, 3.000 at the end" in found.text


def test_a_course_that_broke_down_has_no_best() -> None:
    broken = replace(course(math.nan, updates=16), validation_losses=[(0, 5.5), (1024, math.nan)])
    assert course_words.peak_of(broken) is None


# ---- the table on the terminal


def printed(of: Comparison, width: int) -> list[str]:
    console = Console(width=width)
    with console.capture() as captured:
        console.print(terminal_table(of, width))
    return [text.rstrip() for text in captured.get().splitlines()]


@pytest.mark.parametrize("width", [60, 80, 100, 120])
@pytest.mark.parametrize("of", [coupled(scaled=True), scaled(2.2), with_sharpness([3.0, 3.2, 2.9], [5.0, 5.1, 5.0])])
def test_every_value_of_the_table_stands_in_one_piece_at_any_width(of: Comparison, width: int) -> None:
    lines = printed(of, width)
    assert max(map(len, lines)) <= width
    for label, values in rows(of):
        own = re.compile(re.escape(label) + r"\s+[\d-]")
        found = [" ".join(text[len(label) :].split()) for text in lines if own.match(text)]
        assert " ".join(found) == " ".join(values), label


def test_the_ways_stand_side_by_side_where_there_is_room_and_below_one_another_where_not() -> None:
    of = coupled(scaled=True)
    count = {width: sum(text.startswith("learning rate") for text in printed(of, width)) for width in (40, 80, 100)}
    assert (count[100], count[80]) == (1, 2)
    assert count[40] == 5


def test_a_way_that_does_not_fit_takes_no_more_room_than_a_number() -> None:
    base = scaled(2.2)
    native = replace(base.results["native"], course=None, variance=None)
    native = replace(native, memory=replace(native.memory, fits=False))
    of = replace(base, results={**base.results, "native": native}, max_memory=20_000_000)
    assert dict(rows(of))["peak memory"][2] == "out of memory: needs at least 80.0 MB"
    lines = printed(of, 80)
    assert sum(text.startswith("learning rate") for text in lines) == 1
    assert any(re.search(r"10\.0 MB +11\.0 MB +80\.0 MB +11\.0 MB", text) for text in lines)


# ---- the pictures


def drawn(plot: Plot, of: Comparison) -> tuple[Figure, Axes]:
    with rc_context({**STYLE, "font.size": 12}):
        figure = Figure(figsize=(5.2, 4.0), layout="constrained")
        axes = figure.subplots()
        plot.draw(axes, of)
        figure.draw_without_rendering()
    return figure, axes


def times_as_large(of: Comparison, factor: int) -> Comparison:
    """The same over so many times the samples, memory and speed."""

    def longer(made: Course) -> Course:
        losses = [(factor * n, loss) for n, loss in made.losses]
        curve = [(factor * n, loss) for n, loss in made.validation_losses]
        noise = [replace(point, samples=factor * point.samples) for point in made.noise]
        windows = [factor * n for n in made.window_samples]
        return replace(made, losses=losses, validation_losses=curve, noise=noise, window_samples=windows)

    results = {
        key: replace(
            result,
            course=None if result.course is None else longer(result.course),
            memory=replace(result.memory, peak_bytes=factor * (result.memory.peak_bytes or 0)),
        )
        for key, result in of.results.items()
    }
    budget = None if of.max_memory is None else factor * of.max_memory
    return replace(of, samples=factor * of.samples, results=results, max_memory=budget)


def noisy_comparison() -> Comparison:
    points = [
        NoisePoint(128, 20.0, 0.0, math.inf),
        NoisePoint(512, 90.0, 30.0, 9000.0),
        NoisePoint(1024, 300.0, 90.0, math.inf),
    ]
    small, large = with_sharpness([3.0, 3.2, 2.9], [5.0, 5.1, 5.0]), scaled(2.2, noise=points)
    results = {**small.results, "scaled": large.results["scaled"]}
    return replace(small, results=results, scaling=large.scaling, max_memory=12_000_000)


COMPARISONS = [noisy_comparison(), replace(coupled(scaled=True), max_memory=12_000_000)]
ALL_PLOTS = [
    (plot, times_as_large(of, factor)) for of in COMPARISONS for plot in plots_of(of) for factor in (1, 8, 1000)
]


@pytest.mark.parametrize(("plot", "of"), ALL_PLOTS, ids=lambda each: getattr(each, "name", ""))
def test_no_label_of_a_picture_runs_into_another_or_into_a_line(plot: Plot, of: Comparison) -> None:
    figure, axes = drawn(plot, of)
    ticks = [label.get_window_extent() for label in axes.get_xticklabels() if label.get_text()]
    inside = [box for box in ticks if axes.bbox.x0 - 1 <= (box.x0 + box.x1) / 2 <= axes.bbox.x1 + 1]
    assert 2 <= len(inside) <= 8
    for one, other in pairwise(sorted(inside, key=lambda box: box.x0)):
        assert one.x1 + 4 < other.x0
    assert [text.get_text() for text in axes.texts if text.get_window_extent().x0 < axes.bbox.x1] == []
    assert [legend for legend in figure.legends if legend.get_window_extent().y1 > axes.get_tightbbox().y0] == []
    assert axes.get_legend() is None
    assert not any("e+" in label.get_text() for label in [*axes.get_xticklabels(), *axes.get_yticklabels()])
    boxes = [text.get_window_extent() for text in axes.texts]
    assert max([box.x1 for box in boxes], default=0) <= figure.bbox.x1


def test_ticks_that_would_run_into_one_another_are_found() -> None:
    """The control: the ticks that an axis has without its locator."""
    plot, of = next(each for each in ALL_PLOTS if each[0].name == "speed" and each[1].samples > 10**6)
    _, axes = drawn(plot, of)
    axes.xaxis.set_major_locator(MaxNLocator(14))
    axes.figure.draw_without_rendering()  # type: ignore[union-attr]
    boxes = [label.get_window_extent() for label in axes.get_xticklabels()]
    assert any(one.x1 + 4 >= other.x0 for one, other in pairwise(boxes))


def test_what_metrics_were_before_training_is_a_bar_of_its_own_and_no_line() -> None:
    plot = next(each for each in COUPLED_PLOTS if each.name == "metrics")
    _, axes = drawn(plot, coupled())
    assert axes.lines == [] or not list(axes.lines)
    assert axes.get_legend_handles_labels()[1][0] == "before training"
    assert [round(bar.get_width(), 3) for bar in axes.patches] == [0.3, 0.4, 0.45, 0.5, 0.5]  # type: ignore[attr-defined]
    assert [text.get_text() for text in axes.texts] == ["0.300", "0.400", "0.450", "0.500", "0.500"]


@pytest.mark.parametrize(("factor", "unit"), [(1, "MB"), (1000, "GB")])
def test_the_axis_of_memory_is_in_the_unit_of_its_largest_bar(factor: int, unit: str) -> None:
    plot = next(each for each in PLOTS if each.name == "memory")
    _, axes = drawn(plot, times_as_large(comparison(), factor))
    assert axes.get_xlabel() == f"peak memory in {unit}"
    assert max(bar.get_width() for bar in axes.patches) == pytest.approx(80)  # type: ignore[attr-defined]


@pytest.mark.parametrize(
    ("low", "high", "ticks"),
    [
        (0.3, 12, ["0.5", "1", "2", "5", "10"]),
        (4, 3000, ["10", "30", "100", "300", "1,000", "3,000"]),
        (0.004, 3000, ["0.01", "0.1", "1", "10", "100", "1,000"]),
    ],
)
def test_a_logarithmic_axis_has_few_plain_numbers(low: float, high: float, ticks: list[str]) -> None:
    axes = Figure().subplots()
    axes.set(yscale="log", ylim=(low, high))
    log_ticks(axes)
    axes.figure.draw_without_rendering()
    assert [label.get_text() for label in axes.get_yticklabels()] == ticks


def test_an_interval_of_the_noise_scale_without_an_end_goes_to_the_edge() -> None:
    plot = next(each for each in PLOTS if each.name == "noise")
    _, axes = drawn(plot, noisy_comparison())
    (band,) = [each for each in axes.collections if isinstance(each, PolyCollection)]
    corners = {(float(x), round(float(y))) for x, y in band.get_paths()[0].vertices}
    bottom, top = (round(end) for end in axes.get_ylim())
    assert corners >= {(128.0, bottom), (128.0, top), (512.0, 30), (512.0, 9000), (1024.0, 90), (1024.0, top)}


def test_a_long_axis_counts_in_thousands_or_millions() -> None:
    labels = {}
    for largest in (90_000, 200_000, 3_000_000):
        axes = Figure().subplots()
        axes.plot([0, largest], [0, 1])
        few_ticks(axes)
        axes.figure.draw_without_rendering()
        labels[largest] = axes.get_xticklabels()[-2].get_text()
    assert labels == {90_000: "80,000", 200_000: "200k", 3_000_000: "3M"}
