"""The noise scale: unbiased for unequal micro-batches, with an interval that covers it, and what follows from it."""

import copy
import itertools
import math
from collections.abc import Sequence
from fractions import Fraction

import pytest
import torch
from moments_by_hand import float64, moments_of_gradients, report_of
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

import macrobatch as mb
from macrobatch.batch_tradeoff import efficiency, fastest_batch_size, gain, tradeoff
from macrobatch.distributed import Ranks
from macrobatch.moment_average import MOST_BLOCKS
from macrobatch.noise import _student
from macrobatch.per_example import _moments, _one_at_a_time, _vectorised

SIZES = [1, 3, 8, 20]


def gaussian_windows(
    sizes: Sequence[int], mean: Tensor, deviations: Tensor, count: int, seed: int = 0
) -> mb.GradientMoments:
    """Moments of `count` windows at once, each field of shape (count,); per-sample gradients mean + deviations * z."""
    generator = torch.Generator().manual_seed(seed)
    n = float64(torch.tensor(sizes))
    w = n / n.sum()
    q = torch.zeros(count, dtype=torch.float64)
    whole = torch.zeros(count, len(mean), dtype=torch.float64)
    for nj, wj in zip(n, w, strict=True):
        g = mean + deviations * torch.randn(count, len(mean), generator=generator, dtype=torch.float64) / nj.sqrt()
        q += wj * g.square().sum(1)
        whole += wj * g
    each = torch.ones(count, dtype=torch.float64)
    return mb.GradientMoments(
        len(n) * each, q, whole.square().sum(1), (w / n).sum() * each, (w * w / n).sum() * each, q[:, None]
    )


def one_of(windows: mb.GradientMoments, t: int) -> mb.GradientMoments:
    return mb.GradientMoments(**{name: getattr(windows, name)[t] for name in windows.__dataclass_fields__})


def z_of(values: Tensor, expected: float) -> float:
    return float((values.mean() - expected) / (values.std() / math.sqrt(len(values))))


# ---- the estimates of one window


def test_variance_and_squared_mean_are_unbiased_over_unequal_micro_batches() -> None:
    mean, deviations = torch.linspace(-0.5, 0.5, 20).double(), torch.linspace(0.5, 2, 20).double()
    windows = gaussian_windows(SIZES, mean, deviations, 100_000)
    s, g = float(deviations.square().sum()), float(mean.square().sum())
    assert abs(z_of(windows.variance, s)) < 4
    assert abs(z_of(windows.squared_mean, g)) < 4


def test_control_the_formula_for_equal_micro_batches_is_biased_over_unequal_ones() -> None:
    mean, deviations = torch.linspace(-0.5, 0.5, 20).double(), torch.linspace(0.5, 2, 20).double()
    generator = torch.Generator().manual_seed(0)
    n = float64(torch.tensor(SIZES))
    g = mean + deviations * torch.randn(20_000, 4, 20, generator=generator, dtype=torch.float64) / n.sqrt()[:, None]
    whole = (g * (n / n.sum())[:, None]).sum(1)
    as_if_equal = n.sum() / 3 * (g.square().sum(2).mean(1) - whole.square().sum(1))
    assert abs(z_of(as_if_equal, float(deviations.square().sum()))) > 100


@pytest.mark.parametrize("sizes", [SIZES, [8, 8, 8, 8]])
def test_the_estimates_vary_as_much_as_the_formulas_say_however_the_window_was_cut(sizes: list[int]) -> None:
    mean, deviations = torch.linspace(-0.5, 0.5, 20).double(), torch.linspace(0.5, 2, 20).double()
    windows, k, n = gaussian_windows(sizes, mean, deviations, 100_000), len(sizes), sum(sizes)
    fourth, mixed = float(deviations.pow(4).sum()), float((mean * deviations).square().sum())
    of_variance = 2 * fourth / (k - 1)
    of_squared_mean = 4 * mixed / n + 2 * fourth * k / (n * n * (k - 1))
    assert abs(float(windows.variance.var()) / of_variance - 1) < 0.02
    assert abs(float(windows.squared_mean.var()) / of_squared_mean - 1) < 0.02


def test_any_shares_of_the_loss_are_unbiased() -> None:
    generator = torch.Generator().manual_seed(0)
    n, weights = float64(torch.tensor(SIZES)), float64(torch.tensor([4.0, 1.0, 2.0, 3.0]))
    found = [
        moments_of_gradients(
            0.3 + torch.randn(4, 20, generator=generator, dtype=torch.float64) / n.sqrt()[:, None], SIZES, weights
        )
        for _ in range(2000)
    ]
    assert abs(z_of(torch.stack([each.variance for each in found]), 20.0)) < 4
    assert abs(z_of(torch.stack([each.squared_mean for each in found]), 20 * 0.09)) < 4


def test_the_variance_is_that_between_groups() -> None:
    g, n = torch.randn(4, 7, dtype=torch.float64), float64(torch.tensor(SIZES))
    whole = (n[:, None] * g).sum(0) / n.sum()
    anova = (n * (g - whole).square().sum(1)).sum() / 3
    torch.testing.assert_close(moments_of_gradients(g, SIZES).variance, anova, rtol=1e-12, atol=0)


def test_the_ratio_of_a_window_is_biased_exactly_as_enumeration_says() -> None:
    """Gradients 1 or 3 with equal chance, two samples: E[S] = 1, E[|G|^2] = 4, and yet the ratios average to 1/3."""
    found = [
        moments_of_gradients(float64(torch.tensor([[a], [b]])), [1, 1]) for a, b in itertools.product([1, 3], repeat=2)
    ]
    s = [Fraction(float(each.variance)) for each in found]
    g = [Fraction(float(each.squared_mean)) for each in found]
    assert (sum(s) / 4, sum(g) / 4) == (1, 4)
    assert abs(sum(a / b for a, b in zip(s, g, strict=True)) / 4 - Fraction(1, 3)) < Fraction(1, 10**15)
    assert sum(s) / sum(g) == Fraction(1, 4)  # averaged apart, divided once: the true ratio


def test_the_ratio_from_one_small_norm_averages_to_minus_nineteen_sevenths() -> None:
    """The two-batch form, |g_small|^2 from the first sample alone (probe weights 1 and 0): exact in fractions."""
    ratios, variances, squares = [], [], []
    for a, b in itertools.product([1, 3], repeat=2):
        q, whole = Fraction(a) ** 2, Fraction(a + b, 2) ** 2
        s = (q - whole) / (1 - Fraction(1, 2))
        g = whole - s / 2
        ratios.append(s / g)
        variances.append(s)
        squares.append(g)
    assert (sum(variances) / 4, sum(squares) / 4, sum(ratios) / 4) == (1, 4, Fraction(-19, 7))
    noise = mb.GradientNoiseScale(half_life=None)
    for a, b in itertools.product([1, 3], repeat=2):
        noise.observe(moments_of_gradients(float64(torch.tensor([[a], [b]])), [1, 1]))
    assert noise.noise_scale == 0.25


# ---- averaging


def linear_regression(d: int, distance: float, sizes: Sequence[int], generator: torch.Generator) -> mb.GradientMoments:
    """Gradients of (x . delta - e)^2 / 2 for x, e ~ N(0, 1) at |delta| = distance, averaged over micro-batches."""
    n = sum(sizes)
    delta = torch.full((d,), distance / math.sqrt(d), dtype=torch.float64)
    x = torch.randn(n, d, generator=generator, dtype=torch.float64)
    e = torch.randn(n, generator=generator, dtype=torch.float64)
    each = x * ((x @ delta) - e)[:, None]
    return moments_of_gradients(torch.stack([part.mean(0) for part in each.split(list(sizes))]), sizes)


def test_the_noise_scale_of_linear_regression_is_its_closed_form_within_five_percent() -> None:
    """B_simple = d + 1 + d s^2 / |delta|^2 for isotropic inputs; b = 2, K = 4."""
    d, distance = 12, 1.4
    expected = d + 1 + d / distance**2
    generator = torch.Generator().manual_seed(0)
    noise = mb.GradientNoiseScale(half_life=None)
    ratios = []
    for _ in range(6000):
        moments = linear_regression(d, distance, [2, 2, 2, 2], generator)
        noise.observe(moments)
        ratios.append(float(moments.variance / moments.squared_mean))
    estimate = noise.estimate()
    assert abs(estimate.noise_scale / expected - 1) < 0.05
    assert estimate.low < expected < estimate.high
    assert estimate.high / estimate.low < 1.2
    assert abs(sum(ratios) / len(ratios) / expected - 1) > 0.2, "the control: the mean of the windows' own ratios"


def test_streaming_averages_settle_within_a_quarter_and_say_so() -> None:
    d, distance = 12, 1.4
    expected = d + 1 + d / distance**2
    generator = torch.Generator().manual_seed(1)
    noise = mb.GradientNoiseScale(half_life=200)
    for _ in range(2000):
        noise.observe(linear_regression(d, distance, [5, 6, 5], generator))
    estimate = noise.estimate()
    assert estimate.low < expected < estimate.high
    assert abs(estimate.noise_scale / expected - 1) < 0.25


def test_windows_of_unlike_sizes_and_cuts_average_without_bias() -> None:
    """Sizes and numbers of micro-batches that follow a pattern; among them windows of a single micro-batch."""
    mean, deviations = torch.full((10,), 0.4).double(), torch.ones(10).double()
    cuts = [SIZES, [4, 4], [7], [1] * 6, [30, 2, 2]]
    windows = [gaussian_windows(cut, mean, deviations, 800, seed=i) for i, cut in enumerate(cuts)]
    noise = mb.GradientNoiseScale(half_life=None)
    for t in range(800):
        for each in windows:
            noise.observe(one_of(each, t))
    estimate = noise.estimate()
    assert abs(estimate.variance / 10 - 1) < 0.02
    assert abs(estimate.squared_mean / 1.6 - 1) < 0.06
    assert estimate.low < 10 / 1.6 < estimate.high


def test_the_interval_covers_the_truth_as_often_as_it_says() -> None:
    """95 % of 400 runs, give or take 3.5 %, at 40 windows of three unequal micro-batches each."""
    mean, deviations = torch.full((40,), 0.25).double(), torch.linspace(0.5, 1.5, 40).double()
    truth = float(deviations.square().sum() / mean.square().sum())
    windows = gaussian_windows([4, 6, 9], mean, deviations, 400 * 40)
    covered = wide = narrow = 0
    for run in range(400):
        noise = mb.GradientNoiseScale(half_life=None)
        for t in range(40):
            noise.observe(one_of(windows, 40 * run + t))
        estimate, half = noise.estimate(), noise.estimate(0.5)
        covered += estimate.low <= truth <= estimate.high
        narrow += half.low <= truth <= half.high
        wide += math.isinf(estimate.high)
    assert abs(covered / 400 - 0.95) < 0.035
    assert abs(narrow / 400 - 0.5) < 0.08, "the control: an interval made for 50 % covers half of the runs"
    assert wide < 40


def test_the_interval_covers_the_truth_after_four_windows_where_a_normal_one_would_not() -> None:
    """95 % of 600 runs, give or take 3 %: of three degrees of freedom Student's quantile is 3.2, the normal's 1.96."""
    mean, deviations = torch.full((200,), 0.25).double(), torch.linspace(0.5, 1.5, 200).double()
    truth = float(deviations.square().sum() / mean.square().sum())
    windows = gaussian_windows([4, 6, 9, 5, 8, 7, 3, 6], mean, deviations, 600 * 4)
    covered = as_if_normal = 0
    for run in range(600):
        noise = mb.GradientNoiseScale(half_life=None)
        for t in range(4):
            noise.observe(one_of(windows, 4 * run + t))
        estimate = noise.estimate()
        covered += estimate.low <= truth <= estimate.high
        error = 1 / estimate.low - 1 / estimate.noise_scale  # of |G|^2 / S, in which the interval is symmetric
        as_if_normal += abs(1 / truth - 1 / estimate.noise_scale) <= error * 1.95996 / 3.1824
    assert abs(covered / 600 - 0.95) < 0.03
    assert as_if_normal / 600 < 0.9, "the control"


def test_the_interval_still_covers_where_windows_forget() -> None:
    mean, deviations = torch.full((40,), 0.25).double(), torch.linspace(0.5, 1.5, 40).double()
    truth = float(deviations.square().sum() / mean.square().sum())
    windows = gaussian_windows([4, 6, 9], mean, deviations, 100 * 150)
    covered = 0
    for run in range(100):
        noise = mb.GradientNoiseScale(half_life=20)
        for t in range(150):
            noise.observe(one_of(windows, 150 * run + t))
        estimate = noise.estimate()
        covered += estimate.low <= truth <= estimate.high
    assert covered >= 88


def test_repeating_windows_widen_the_interval_and_show_as_autocorrelation() -> None:
    mean, deviations = torch.full((40,), 0.25).double(), torch.ones(40).double()
    windows = gaussian_windows([4, 6, 9], mean, deviations, 64)
    fresh, repeated = mb.GradientNoiseScale(half_life=None), mb.GradientNoiseScale(half_life=None)
    for t in range(64):
        fresh.observe(one_of(windows, t))
        repeated.observe(one_of(windows, t // 8))
    assert abs(fresh.estimate().autocorrelation) < 0.3
    assert repeated.estimate().autocorrelation > 0.5
    width = [1 / each.estimate().low - 1 / each.estimate().high for each in (fresh, repeated)]
    assert width[1] > 1.3 * width[0]


def test_blocks_stay_few_and_their_sum_is_the_plain_average() -> None:
    mean, deviations = torch.full((4,), 0.5).double(), torch.ones(4).double()
    windows = gaussian_windows([2, 3], mean, deviations, 1000)
    noise, forgetting = mb.GradientNoiseScale(half_life=None), mb.GradientNoiseScale(half_life=16)
    decay, s, k = 0.5 ** (1 / 16), 0.0, 0.0
    for t in range(1000):
        noise.observe(one_of(windows, t))
        forgetting.observe(one_of(windows, t))
        s, k = decay * s + float(windows.variance[t]), decay * k + 1
        assert len(noise._average._blocks) <= MOST_BLOCKS
    assert noise.estimate().variance == pytest.approx(float(windows.variance.mean()), rel=1e-12)
    assert forgetting.estimate().variance == pytest.approx(s / k, rel=1e-12)


def test_after_a_change_the_average_forgets_at_its_half_life() -> None:
    quiet, loud = (
        moments_of_gradients(float64(torch.tensor([[1.0 + a], [1.0 - a]])), [2, 2]) for a in (0.1, 0.2)
    )  # S = 0.04 and 0.16
    noise = mb.GradientNoiseScale(half_life=10)
    for _ in range(500):
        noise.observe(quiet)
    for _ in range(10):
        noise.observe(loud)
    assert noise.estimate().variance == pytest.approx((0.04 + 0.16) / 2, rel=1e-6)


def test_too_few_windows_have_no_interval_and_noise_without_signal_is_infinite() -> None:
    noise = mb.GradientNoiseScale()
    noise.observe(moments_of_gradients(float64(torch.tensor([[1.0], [-1.1]])), [1, 1]))
    estimate = noise.estimate()
    assert (estimate.noise_scale, estimate.low, estimate.high) == (math.inf, 0.0, math.inf)
    assert estimate.squared_mean < 0
    assert "is unknown" in estimate.words
    assert "language models" in estimate.words
    assert noise.gain(8, 64) == 8
    assert noise.efficiency(8, 64) == 1


def test_samples_that_are_all_alike_have_no_noise() -> None:
    noise = mb.GradientNoiseScale()
    for _ in range(6):
        noise.observe(moments_of_gradients(torch.ones(3, 2), [1, 2, 1]))
    assert noise.estimate().noise_scale == 0


def test_windows_that_are_not_finite_or_empty_are_left_out() -> None:
    mean, deviations = torch.full((4,), 0.5).double(), torch.ones(4).double()
    windows = gaussian_windows([2, 3], mean, deviations, 30)
    clean, dirty = mb.GradientNoiseScale(), mb.GradientNoiseScale()
    for t in range(30):
        clean.observe(one_of(windows, t))
        dirty.observe(one_of(windows, t))
        for bad in (math.nan, math.inf):
            dirty.observe(moments_of_gradients(torch.tensor([[1.0], [bad]]), [1, 1]))
        zero = float64(0.0)
        dirty.observe(mb.GradientMoments(float64(2), zero, zero, zero, zero, zero[None]))
    assert dirty.estimate() == clean.estimate()


def test_students_quantile_is_close_from_three_degrees_of_freedom_on() -> None:
    for freedom, quantile in ((3, 3.1824), (5, 2.5706), (10, 2.2281), (30, 2.0423), (1000, 1.9623)):
        assert abs(_student(0.95, freedom) / quantile - 1) < 0.008


# ---- what follows from it


def test_gain_rate_ratio_and_efficiency_are_one_formula_exactly() -> None:
    for scale, start, goal in itertools.product([1, 7, 1000], [1, 8, 32], [1, 64, 5000]):
        s, b0, b = Fraction(scale), Fraction(start), Fraction(goal)
        adascale = (s / b0 + 1) / (s / b + 1)  # sigma^2 = S / B0 at |G|^2 = 1
        rates = (1 + s / b0) / (1 + s / b)
        pollux = b / b0 * efficiency(s, b0, b)  # type: ignore[arg-type]
        assert gain(s, b0, b) == adascale == rates == pollux  # type: ignore[arg-type, comparison-overlap]


def test_updates_and_samples_lie_on_the_hyperbola_and_double_at_the_critical_batch() -> None:
    points = tradeoff(100.0, [1, 10, 100, 10_000])
    for point in points:
        assert (point.updates - 1) * (point.samples - 1) == pytest.approx(1, rel=1e-12)
    assert (points[2].updates, points[2].samples) == (2, 2)


def test_a_noisy_quadratic_takes_twice_the_fewest_updates_and_samples_at_its_critical_batch() -> None:
    """Expected loss h x^2 / 2 by its exact recursion, at a fiftieth of the best rate for each batch size."""
    h, c = 2.0, 16.0  # curvature, and the variance of a sample's gradient

    def updates(b: float) -> int:
        x2, count = 1.0, 0  # E[x^2]; the noise scale c / (h^2 x2) grows from 4 to 800
        while x2 > 0.005:
            rate = 0.02 / h / (1 + c / (h * h * x2) / b)
            x2, count = (1 - rate * h) ** 2 * x2 + rate**2 * c / b, count + 1
        return count

    fewest_updates, fewest_samples = updates(1e9), updates(0.5) * 0.5
    critical = fewest_samples / fewest_updates
    assert 4 < critical < 800
    for b in (critical / 4, critical, critical * 4):
        (expected,) = tradeoff(critical, [b])
        assert updates(b) / fewest_updates == pytest.approx(expected.updates, rel=0.02)
        assert updates(b) * b / fewest_samples == pytest.approx(expected.samples, rel=0.02)


def test_the_fastest_batch_is_where_time_is_least() -> None:
    found = fastest_batch_size(400.0, seconds_per_sample=0.01, seconds_per_update=0.25, largest_micro_batch=16)
    assert found.batch_size == pytest.approx(math.sqrt(0.25 * 400 / 0.01))
    seconds = {b: (0.25 + 0.01 * b) * (1 + 400 / b) for b in range(1, 2000)}
    best = min(seconds, key=seconds.__getitem__)
    assert abs(best - found.batch_size) <= 1
    assert found.slowdown(best) == pytest.approx(1, abs=1e-6)
    assert found.slowdown(1000) == pytest.approx(seconds[1000] / seconds[best], rel=1e-6)
    assert found.accumulate
    assert found.verdict == "accumulate: 100 samples train fastest, 7 micro-batches of up to 16"


def test_where_an_update_costs_little_the_answer_is_not_to_accumulate() -> None:
    found = fastest_batch_size(400.0, seconds_per_sample=0.01, seconds_per_update=0.001, largest_micro_batch=16)
    assert not found.accumulate
    assert found.verdict.startswith("do not accumulate: 6 samples train fastest, and 16 fit into a micro-batch")
    free = fastest_batch_size(400.0, seconds_per_sample=0.01, seconds_per_update=0, largest_micro_batch=1)
    assert (free.batch_size, free.accumulate) == (1, False)
    assert free.verdict == "do not accumulate: 1 sample trains fastest, and 1 fits into a micro-batch"


@pytest.mark.parametrize(
    ("best", "m", "said"),
    [
        (98.8, 16, "99 samples train fastest, 7 micro"),
        (16.2, 16, "17 samples"),
        (7.4, 7, "8 samples"),
        (1234, 9, "1230 s"),
    ],
)
def test_the_batch_that_is_said_is_whole_and_agrees_with_the_answer(best: float, m: int, said: str) -> None:
    found = fastest_batch_size(best**2, seconds_per_sample=1, seconds_per_update=1, largest_micro_batch=m)
    assert found.batch_size == pytest.approx(best)
    assert found.verdict.startswith(f"accumulate: {said}")


def test_an_interval_with_both_answers_is_not_settled() -> None:
    options = {"seconds_per_sample": 0.01, "seconds_per_update": 0.25, "largest_micro_batch": 100}
    found = fastest_batch_size(500.0, low=300.0, high=900.0, **options)
    assert not found.is_settled
    assert "between 87 and 150" in found.verdict
    assert found.verdict.endswith("measure more windows")
    assert fastest_batch_size(900.0, low=600.0, high=1000.0, **options).is_settled
    unseen = fastest_batch_size(math.inf, low=900.0, high=math.inf, **options)
    assert "at least 150 samples" in unseen.verdict
    assert unseen.slowdown(25) == 2


def test_the_estimator_gives_all_of_it_with_its_interval() -> None:
    windows = gaussian_windows([4, 6, 9], torch.full((40,), 0.25).double(), torch.ones(40).double(), 500)
    noise = mb.GradientNoiseScale(half_life=None)
    for t in range(500):
        noise.observe(one_of(windows, t))
    estimate = noise.estimate()
    assert noise.critical_batch_size == noise.noise_scale == estimate.noise_scale
    assert noise.gain(19, 190) == gain(estimate.noise_scale, 19, 190)
    assert noise.efficiency(19, 190) == efficiency(estimate.noise_scale, 19, 190)
    assert noise.tradeoff([19]) == tradeoff(estimate.noise_scale, [19])
    found = noise.fastest_batch_size(seconds_per_sample=1, seconds_per_update=4, largest_micro_batch=2)
    assert found.low == pytest.approx(2 * math.sqrt(estimate.low))
    assert found.high == pytest.approx(2 * math.sqrt(estimate.high))
    assert f"{500} windows" in estimate.words


# ---- with real windows


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(11, 6)
        self.mix = nn.Linear(6, 6)
        self.head = nn.Linear(6, 11)
        self.head.weight = nn.Parameter(self.embedding.weight.detach().T.contiguous().T.clone())

    def forward(self, tokens: Tensor) -> Tensor:
        return self.head(self.mix(self.embedding(tokens)).tanh())


def token_sum(model: nn.Module, batch: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
    scores = model(batch["tokens"]).transpose(1, 2)
    return F.cross_entropy(scores, batch["labels"], reduction="sum"), mb.valid_tokens(batch["labels"])


def tokens(n: int) -> dict[str, Tensor]:
    labels = torch.randint(0, 11, (n, 5))
    for i in range(n):
        labels[i, 1 + i % 5 :] = -100
    return {"tokens": torch.randint(0, 11, (n, 5)), "labels": labels}


def brute_force(
    model: nn.Module, loss: object, micro_batches: Sequence[object], sizes: Sequence[int]
) -> mb.GradientMoments:
    """By definition: one backward for each micro-batch, through no code of the library."""
    gradients, weights = [], []
    for each in micro_batches:
        total, weight = loss(model, each)  # type: ignore[operator]
        grads = torch.autograd.grad(total / weight, list(model.parameters()))
        gradients.append(torch.cat([g.flatten() for g in grads]))
        weights.append(float(weight))
    return moments_of_gradients(torch.stack(gradients), sizes, float64(torch.tensor(weights)))


def assert_same(mine: mb.GradientMoments, theirs: mb.GradientMoments) -> None:
    for name in mine.__dataclass_fields__:
        torch.testing.assert_close(getattr(mine, name), getattr(theirs, name), rtol=1e-10, atol=1e-14)


def test_a_real_window_has_the_moments_of_brute_force_and_the_estimator_takes_its_report() -> None:
    model, batch = Net().double(), tokens(13)
    window = mb.Window([batch]).cut(4)
    report = mb.Accumulator(model, token_sum, measure="norms").run(window)
    assert report.moments is not None
    assert_same(report.moments, brute_force(model, token_sum, list(window), report.micro_batch_sizes))
    noise = mb.GradientNoiseScale()
    noise.observe(report)
    assert noise.estimate().variance == pytest.approx(float(report.moments.variance))


@pytest.mark.parametrize("micro_batch_size", [1, 4, 13])
def test_example_by_example_equals_brute_force(micro_batch_size: int) -> None:
    model, batch = Net().double(), tokens(13)
    mine = mb.per_example_moments(model, token_sum, batch, micro_batch_size=micro_batch_size)
    assert_same(mine, brute_force(model, token_sum, list(mb.Window([batch]).cut(1)), [1] * 13))
    assert all(p.grad is None and p.requires_grad for p in model.parameters())


def test_both_ways_example_by_example_agree() -> None:
    model, batch = Net().double(), tokens(9)
    vectorised = _moments(*_vectorised([model], model, token_sum, batch, 4), Ranks(None))
    assert_same(vectorised, _one_at_a_time(model, token_sum, batch))


class Counting(nn.Module):
    """A model that torch.func cannot run over samples at once: it looks at its numbers and writes into a buffer."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Linear(3, 1)
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        return self.net(x) if x.sum().item() > 0 else self.net(x).tanh()


def squares(model: nn.Module, batch: tuple[Tensor, Tensor]) -> tuple[Tensor, int]:
    return (model(batch[0])[:, 0] - batch[1]).square().sum(), len(batch[1])


def test_a_model_that_cannot_be_vectorised_runs_one_sample_at_a_time_and_is_left_as_it_was() -> None:
    model, batch = Counting().double(), (torch.randn(7, 3).double(), torch.randn(7).double())
    with pytest.raises(RuntimeError):
        _vectorised([model], model, squares, batch, 4)
    model.calls.zero_()
    before = [torch.full_like(p, 3.0) for p in model.parameters()]
    for p, g in zip(model.parameters(), before, strict=True):
        p.grad = g.clone()
    state = torch.get_rng_state()
    mine = mb.per_example_moments(model, squares, batch)
    assert model.calls == 0
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(p.grad, g) for p, g in zip(model.parameters(), before, strict=True) if p.grad is not None)
    micro_batches = [(batch[0][i : i + 1], batch[1][i : i + 1]) for i in range(7)]
    assert_same(mine, brute_force(model, squares, micro_batches, [1] * 7))


class Criterion(nn.Module):
    """A loss with a parameter of its own, over a batch with a list of samples and a shared leaf."""

    def __init__(self) -> None:
        super().__init__()
        self.log_scale = nn.Parameter(torch.tensor(0.3))

    def forward(self, model: nn.Module, batch: dict[str, object]) -> Tensor:
        x = torch.stack(batch["x"]) if isinstance(batch["x"], list) else batch["x"]
        errors = model(x)[:, 0] * self.log_scale.exp() - batch["y"] - batch["shift"]  # type: ignore[operator]
        return errors.square().mean()


@pytest.mark.parametrize("is_list", [False, True])
def test_parameters_of_the_loss_lists_and_shared_leaves_are_taken_along(is_list: bool) -> None:
    model, criterion = nn.Linear(3, 1).double(), Criterion().double()
    x = torch.randn(6, 3).double()
    y = torch.zeros(6).double()
    batch = {"x": list(x) if is_list else x, "y": y, "shift": torch.tensor(0.7).double()}
    mine = mb.per_example_moments(model, criterion, batch)
    both = nn.ModuleList([model, criterion])
    singles = [{"x": x[i : i + 1], "y": y[i : i + 1], "shift": batch["shift"]} for i in range(6)]
    loss = lambda _, each: (criterion(model, each), 1)  # noqa: E731
    assert_same(mine, brute_force(both, loss, singles, [1] * 6))


def test_a_window_of_one_micro_batch_is_refused_and_example_by_example_takes_it() -> None:
    model, batch = Net().double(), tokens(8)
    accumulator = mb.Accumulator(model, token_sum, micro_batch_size=8, measure="norms")
    noise = mb.GradientNoiseScale()
    report = accumulator.run(batch)
    with pytest.raises(ValueError, match=r"one micro-batch has no variance.*observe_examples"):
        noise.observe(report)
    found = noise.observe_examples(model, token_sum, batch)
    assert noise.estimate().variance == pytest.approx(float(found.variance))
    noise.observe(report)  # a short last window after others is fine: it still tells of |G|^2
    alone = mb.GradientNoiseScale()
    alone._saw_several = True  # as where the number of micro-batches lives on the device
    alone.observe(report)
    with pytest.raises(ValueError, match="one micro-batch has no variance"):
        alone.estimate()


def test_the_value_does_not_depend_on_how_the_window_was_cut_beyond_its_interval() -> None:
    generator = torch.Generator().manual_seed(0)
    model = nn.Linear(10, 1).double()
    noises = {size: mb.GradientNoiseScale(half_life=None) for size in (1, 3, 8)}
    for _ in range(60):
        x = torch.randn(24, 10, generator=generator, dtype=torch.float64)
        batch = (x, x.sum(1) + torch.randn(24, generator=generator, dtype=torch.float64))
        for size, noise in noises.items():
            model.zero_grad()
            noise.observe(mb.Accumulator(model, squares, micro_batch_size=size, measure="norms").run(batch))
    delta = model.weight.detach()[0] - 1
    distance = float(delta.square().sum() + model.bias.detach().square().sum())
    # as linear regression in (x, 1): tr Sigma = E|x|^2 r^2 - |G|^2, whose closed form needs E|x|^4 of x and a constant
    estimates = {size: noise.estimate() for size, noise in noises.items()}
    for a, b in itertools.combinations(estimates.values(), 2):
        assert a.low < b.noise_scale < a.high
        assert a.low < b.high
        assert b.low < a.high
    assert distance > 0
    assert estimates[1].noise_scale == pytest.approx(11 + 10 / distance, rel=0.35)


class NoReading(TorchDispatchMode):
    """Raises where a number is read from a tensor."""

    def __torch_dispatch__(self, func: object, types: object, args: object = (), kwargs: object = None) -> object:
        assert "_local_scalar_dense" not in str(func), "a tensor was read"
        return func(*args, **(kwargs or {}))  # type: ignore[operator]


def test_observing_a_report_reads_nothing_from_the_device() -> None:
    model, batch = Net().double(), tokens(8)
    report = mb.Accumulator(model, token_sum, micro_batch_size=3, measure="norms").run(batch)
    noise = mb.GradientNoiseScale()
    with NoReading():
        noise.observe(report)
    with pytest.raises(AssertionError, match="a tensor was read"), NoReading():
        torch.ones(()).item()


# ---- state and errors


def test_an_estimator_that_was_saved_and_loaded_goes_on_as_if_nothing_had_happened() -> None:
    windows = gaussian_windows([2, 3, 4], torch.full((6,), 0.5).double(), torch.ones(6).double(), 300)
    whole, first = mb.GradientNoiseScale(half_life=30), mb.GradientNoiseScale(half_life=30)
    for t in range(300):
        whole.observe(one_of(windows, t))
        if t < 170:
            first.observe(one_of(windows, t))
    state = copy.deepcopy(first.state_dict())
    second = mb.GradientNoiseScale(half_life=30)
    second.load_state_dict(state)
    for t in range(170, 300):
        second.observe(one_of(windows, t))
    assert second.estimate() == whole.estimate()
    with pytest.raises(ValueError, match="kept with half_life=30"):
        mb.GradientNoiseScale().load_state_dict(state)


@pytest.mark.parametrize("half_life", [0, -1, math.inf, math.nan])
def test_a_half_life_that_is_no_number_of_windows_is_refused(half_life: float) -> None:
    with pytest.raises(ValueError, match="half_life must be a number of windows"):
        mb.GradientNoiseScale(half_life=half_life)


def test_what_is_missing_is_said() -> None:
    noise = mb.GradientNoiseScale()
    with pytest.raises(ValueError, match="no window was observed yet: call"):
        noise.estimate()
    with pytest.raises(ValueError, match=r"measure='norms'"):
        noise.observe(report_of([]))
    with pytest.raises(ValueError, match=r"takes the Report of Accumulator.run, got a float"):
        noise.observe(3.0)  # type: ignore[arg-type]
    noise.observe(moments_of_gradients(torch.ones(2, 2), [1, 1]))
    with pytest.raises(ValueError, match="confidence must lie between 0 and 1"):
        noise.estimate(95)


def test_sizes_times_and_scales_that_make_no_sense_are_refused() -> None:
    for wrong in (0, -4, math.inf, math.nan):
        with pytest.raises(ValueError, match="batch size must be a positive number"):
            gain(10.0, wrong, 8)
    with pytest.raises(ValueError, match="noise_scale must be a number of samples"):
        gain(-1.0, 4, 8)
    with pytest.raises(ValueError, match="finite, got inf: measure more windows"):
        tradeoff(math.inf, [4])
    with pytest.raises(ValueError, match="seconds_per_sample must be a positive number of seconds"):
        fastest_batch_size(10.0, seconds_per_sample=0, seconds_per_update=1, largest_micro_batch=4)
    options = {"seconds_per_sample": 1, "seconds_per_update": 1, "largest_micro_batch": 4}
    for wrong in (-1.0, math.nan):
        with pytest.raises(ValueError, match="noise_scale must be a number of samples, at least 0, or infinite"):
            fastest_batch_size(wrong, **options)
        with pytest.raises(ValueError, match="low must be a number of samples"):
            fastest_batch_size(10.0, low=wrong, **options)
        with pytest.raises(ValueError, match="high must be a number of samples"):
            fastest_batch_size(10.0, high=wrong, **options)
