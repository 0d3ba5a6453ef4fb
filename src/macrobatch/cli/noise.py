"""`macrobatch noise`: a task is trained while its gradient noise is measured; it ends with the batch that pays."""

import math
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median
from typing import Any

from rich.console import Console

from macrobatch import FastestBatch, NoiseEstimate
from macrobatch.batch_tradeoff import efficiency, gain
from macrobatch.cli.costs import Costs, sizes_up_to, time_sizes
from macrobatch.cli.forecast import coupling_layer, sample_batch
from macrobatch.cli.noise_figure import save_noise
from macrobatch.cli.noise_words import recommendation
from macrobatch.cli.preparing import busy
from macrobatch.cli.progress import say
from macrobatch.cli.run import Run
from macrobatch.cli.runfiles import write_json
from macrobatch.cli.train import EXIT_CODE, train
from macrobatch.planning import plan

FAR = 16  # times the sizes in question: up to there it is asked what fits, and drawn how long training takes
STARTING_UP = 2  # updates whose time does not count: caches and allocators are empty


@dataclass(frozen=True)
class Findings:
    """What a run told of its noise. `batch_size`: that of its last whole update. `largest`: samples that fit at once.

    `fastest`, `costs`: None where too few updates were timed. `seconds_as_run`: of a sample's gradient in this run.
    """

    estimate: NoiseEstimate
    batch_size: int
    micro_batch_size: int
    largest: int
    is_coupled: bool
    fastest: FastestBatch | None
    costs: Costs | None = None
    seconds_as_run: float | None = None

    def gain(self, factor: float) -> float:
        """How many present updates one of `factor` times the batch is worth."""
        return gain(self.estimate.noise_scale, self.batch_size, factor * self.batch_size)

    @property
    def efficiency(self) -> float:
        """The progress that a sample makes, over that in the smallest of batches: 1 / (1 + B / Bn)."""
        return efficiency(self.estimate.noise_scale, 1e-9, self.batch_size)

    def slowdown(self, seconds_per_sample: float | None = None) -> float | None:
        """How much longer training takes at the present batch than at the fastest; None where that is not known.

        In as large micro-batches as fit, or at so many seconds for the gradient of a sample.
        """
        fast, costs, b = self.fastest, self.costs, self.batch_size
        if fast is None or costs is None or not math.isfinite(fast.batch_size):
            return None
        of_gradient = costs.of_gradient(b) if seconds_per_sample is None else seconds_per_sample * b
        best = fast.seconds_per_update + fast.seconds_per_sample * fast.batch_size
        steps = (1 + fast.noise_scale / b) / (1 + fast.noise_scale / fast.batch_size)
        return max((costs.update + of_gradient) / best * steps, 1.0)


def noise(run: Run, folder: Path, console: Console) -> int:
    """The run has ended as in `train`, and what it told of its noise is said, drawn and written; the exit code."""
    code = train(run, folder, console)
    if code == EXIT_CODE["out of memory"]:  # or given up: what there is to say, has been
        return code
    with busy(console, "timing micro-batches of other sizes"):
        found = findings(run)
    if found is None:
        say(console, "the noise scale is not known: no update had a finite gradient")
        return code
    words = recommendation(found)
    for line in words:
        say(console, line)
    save_noise(folder, run.rows, found, run.task.name)
    write_json(folder / "noise.json", {**entries(found), "words": words})
    say(console, f"noise.json, noise.png, noise.svg in {folder}")
    return code


def findings(run: Run) -> Findings | None:
    """What the run's updates told; None where they told nothing."""
    known = run.noise.estimate
    if known is None:
        return None
    batch_size = max(row["batch_size"] for row in run.rows[-10:])
    timed = [row for row in run.rows[STARTING_UP:] if row["batch_size"] == batch_size and row["retries"] == 0]
    is_coupled = coupling_layer(run.model) is not None
    per_sample = median((row["seconds"] - row["update_seconds"]) / row["batch_size"] for row in timed) if timed else 0.0
    per_update = median(row["update_seconds"] for row in timed) if timed else 0.0
    wanted = math.sqrt(per_update * known.noise_scale / per_sample) if per_sample else math.inf
    largest = run.micro_batch_size if is_coupled else _fits(run, FAR * max(batch_size, wanted))
    costs = fastest = None
    if per_sample > 0:
        # A model that normalises over its micro-batch has one size of it: that of the run, which has been timed.
        seconds = {largest: per_sample * largest} if is_coupled else time_sizes(run, sizes_up_to(largest, batch_size))
        costs = Costs(seconds, per_update, min(largest, max(seconds))) if seconds else None
    if costs is not None:
        largest = costs.largest
        fastest = costs.fastest(known.noise_scale, known.low, known.high)
    return Findings(
        known, batch_size, run.micro_batch_size, largest, is_coupled, fastest, costs, per_sample if costs else None
    )


def _fits(run: Run, wanted: float) -> int:
    """The most samples up to `wanted`, and up to the data, that fit into one forward and backward."""
    size = int(min(math.ceil(wanted) if math.isfinite(wanted) else run.data_size, run.data_size))
    try:
        found = plan(
            run.model,
            run.task.loss_fn,
            sample_batch(run.task),
            batch_size=size,
            max_memory=run.max_memory,
            optimizer=run.rates.optimizer,
            measure_speed=False,
            autocast=run.autocast,
        )
    except ValueError:  # batches that cannot be cut, or a budget that is full: what has run is known to fit
        return run.micro_batch_size
    return max(found.micro_batch_size, run.micro_batch_size)


def entries(found: Findings) -> dict[str, Any]:
    """Everything that was found, as numbers."""
    return {
        **asdict(found.estimate),
        "batch_size": found.batch_size,
        "micro_batch_size": found.micro_batch_size,
        "largest_micro_batch": found.largest,
        "efficiency": found.efficiency,
        "gain_of_twice": found.gain(2),
        "gain_of_half": found.gain(0.5),
        "fastest": None if found.fastest is None else asdict(found.fastest),
        "slowdown": found.slowdown(),
        "slowdown_as_run": None if found.seconds_as_run is None else found.slowdown(found.seconds_as_run),
        "seconds_by_micro_batch": None if found.costs is None else dict(found.costs.seconds),
        "seconds_per_update": None if found.costs is None else found.costs.update,
    }
