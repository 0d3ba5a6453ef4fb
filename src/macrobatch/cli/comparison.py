"""What `macrobatch compare` measures, as values: the ways through the same samples, and everything known of each."""

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from macrobatch.cli.estimates import Estimate, relative_error
from macrobatch.cli.scaled_rate import RateScaling
from macrobatch.cli.validation import Validation
from macrobatch.cli.way import Key, Way
from macrobatch.sharpness import Sharpness

SAME_GRADIENT = 1e-3  # relative differences above it are no rounding: dropout's masks, statistics of a micro-batch


@dataclass(frozen=True)
class Memory:
    """Peak bytes of tensors in two updates: parameters, gradients, optimizer state, activations and input.

    `fits` is False where that is more than the budget or the device has; `peak_bytes` is then a lower bound, or None.
    `predicted_bytes`: what was to be expected before anything ran; None where the model does not run on fake tensors.
    """

    peak_bytes: int | None
    fits: bool
    predicted_bytes: int | None = None


@dataclass(frozen=True)
class NoisePoint:
    """The gradient noise scale after `samples` of a run, and its 95% interval, in samples."""

    samples: int
    noise_scale: float
    low: float
    high: float


@dataclass(frozen=True)
class Course:
    """The training of one way. Curves are pairs of samples seen and loss; seconds are of computing, without loading.

    `window_seconds` and `window_samples`: per effective batch, whatever number of updates it was for this way. `noise`:
    the gradient noise scale along the way, where it was watched. `metrics_before`: those of the initial weights, where
    measured. `loss_as_left`: the validation loss at the end by the running statistics that training left, updated
    `num_micro_batches` times; None where there are none, else all others are by statistics taken anew.
    """

    losses: Sequence[tuple[int, float]]
    validation_losses: Sequence[tuple[int, float]]
    final: Validation
    update_seconds: Sequence[float]
    window_seconds: Sequence[float]
    window_samples: Sequence[int]
    skipped: int
    noise: Sequence[NoisePoint] = ()
    metrics_before: Mapping[str, float] = field(default_factory=dict)
    num_micro_batches: int = 0
    loss_as_left: float | None = None

    @property
    def broke_down(self) -> bool:
        """Whether updates were skipped or the loss at the end is not finite."""
        return self.skipped > 0 or not math.isfinite(self.final.loss)

    @property
    def seconds_per_update(self) -> float:
        """The median, the first window apart."""
        return statistics.median(steady(self.update_seconds))

    @property
    def samples_per_second(self) -> float:
        """The median over effective batches, the first apart."""
        rates = [n / seconds for n, seconds in zip(self.window_samples, self.window_seconds, strict=True)]
        return statistics.median(steady(rates))


@dataclass(frozen=True)
class Result:
    """One way, measured; without `course`, `variance` and `sharpness` where it does not fit, or was not asked for."""

    way: Way
    memory: Memory
    course: Course | None = None
    variance: Estimate | None = None
    sharpness: Sharpness | None = None


@dataclass(frozen=True)
class Repeat:
    """The end of the ways at one more seed: validation loss, sharpness and metrics of each that was run."""

    seed: int
    losses: Mapping[Key, float]
    sharpness: Mapping[Key, float]
    metrics: Mapping[Key, Mapping[str, float]] = field(default_factory=dict)


@dataclass(frozen=True)
class PlainGradient:
    """The gradient of plain accumulation g against the one that it stands for, h, over draws: |g - h| / |h|, and cos.

    h: of the same samples at the same parameters, by gathered accumulation. Each the mean over draws.
    """

    difference: Estimate
    cosine: Estimate


@dataclass(frozen=True)
class Comparison:
    """Everything measured, with the settings it was measured at.

    `variances`: update size to the trace of the covariance of an update's gradient at common parameters.
    `gradient_squared`: the squared norm of the mean gradient there, without bias. `gradient_difference`: the largest
    relative difference between accumulated and native gradient of the same samples; None where not measured.
    `plain_gradient`: only for losses that compare the samples of an update, and then not None.
    `noisy_layers`: modules whose result depends on how a batch is cut (BatchNorm), or is random (dropout). `scaling`:
    what the fourth way's rate was; None where there is none, `not_scaled` says why. `sharpness_samples`: that the
    Hessian is over. `repeats`: the other seeds. `coupling_layer`: one in which samples of a micro-batch see each other,
    None without one. `statistics_samples`: training samples that running statistics are taken anew over.
    """

    task: str
    description: str
    device: str
    num_parameters: int
    data_size: int
    batch_size: int
    micro_batch_size: int
    samples: int
    learning_rate: float
    seed: int
    draws: int
    max_memory: int | None
    results: Mapping[Key, Result]
    variances: Mapping[int, Estimate]
    gradient_squared: Estimate
    gradient_difference: float | None
    noisy_layers: Sequence[str]
    scaling: RateScaling | None = None
    not_scaled: str = ""
    sharpness_samples: int = 0
    repeats: Sequence[Repeat] = ()
    plain_gradient: PlainGradient | None = None
    coupling_layer: str | None = None
    statistics_samples: int = 0

    @property
    def repeats_samples(self) -> bool:
        """Whether the last eighth of the run is of samples that were all seen before."""
        return 7 / 8 * self.samples >= self.data_size

    @property
    def is_coupled(self) -> bool:
        """Whether the loss compares the samples of an update: each size of it has another loss and gradient."""
        return "plain" in self.results

    @property
    def has_other_gradient(self) -> bool:
        """Whether accumulation and native batch were seen to have gradients that differ by more than rounding."""
        return self.gradient_difference is not None and self.gradient_difference > SAME_GRADIENT

    @property
    def is_predicted(self) -> bool:
        """Whether the memory of some way was known before it ran."""
        return any(result.memory.predicted_bytes is not None for result in self.results.values())

    def losses(self, key: Key) -> list[float]:
        """The validation loss at the end of a way, at every seed that it was run with."""
        course = self.results[key].course if key in self.results else None
        mine = [] if course is None else [course.final.loss]
        return mine + [repeat.losses[key] for repeat in self.repeats if key in repeat.losses]

    def metrics(self, name: str, key: Key) -> list[float]:
        """That metric at the end of a way, at every seed that it was run with."""
        course = self.results[key].course if key in self.results else None
        mine = [] if course is None else [course.final.metrics[name]]
        return mine + [repeat.metrics[key][name] for repeat in self.repeats if key in repeat.metrics]

    @property
    def metric_names(self) -> Sequence[str]:
        """The metrics of the task."""
        courses = [result.course for result in self.results.values() if result.course is not None]
        return list(courses[0].final.metrics) if courses else []

    @property
    def metrics_before(self) -> Mapping[str, float]:
        """The metrics of the initial weights, which all ways share."""
        courses = [result.course for result in self.results.values() if result.course is not None]
        return next((course.metrics_before for course in courses if course.metrics_before), {})

    def sharpnesses(self, key: Key) -> list[float]:
        """The top eigenvalue of the Hessian at the end of a way, at every seed at which it was measured."""
        found = self.results[key].sharpness if key in self.results else None
        mine = [] if found is None else [found.top]
        return mine + [repeat.sharpness[key] for repeat in self.repeats if key in repeat.sharpness]

    def expected_variance_ratio(self, size: int, base: int) -> float:
        """Variance at `size` over that at `base`, drawn without replacement from N: (1/size - 1/N) / (1/base - 1/N)."""
        n = self.data_size
        return (1 / size - 1 / n) / (1 / base - 1 / n) if base < n else math.nan

    @property
    def noise_scale(self) -> Estimate:
        """The gradient noise scale tr(Sigma) / |G|^2 in samples (McCandlish et al. 2018), at the common parameters."""
        base = self.micro_batch_size
        small, squared = self.variances[base], self.gradient_squared
        factor = 1 / (1 / base - 1 / self.data_size) if base < self.data_size else math.nan
        if squared.value <= 0:
            return Estimate(math.inf, math.nan)
        value = factor * small.value / squared.value
        return Estimate(value, abs(value) * relative_error(small, squared))


def steady(values: Sequence[float]) -> Sequence[float]:
    """Without the first, which also warms up caches and allocators, where enough others remain."""
    return values[1:] if len(values) > 4 else values
