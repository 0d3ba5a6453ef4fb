"""`macrobatch noise --branched`: the critical batch measured by training on from one point at several batch sizes.

Merrill et al. 2025 (2505.23971): from a checkpoint, branches with the batch k B and the rate f(k) eta, f = k for SGD and
sqrt(k) for Adam, see the same number of samples; L_k is the smoothed loss at the end, and k* the largest k with
L_k <= L_j + tolerance for all j < k. Theirs smooths over updates (EMA, alpha = 0.5). Here losses are first averaged over
the samples of the largest batch, so that all branches are smoothed over the same samples; for the largest it is theirs.
"""

import copy
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

import torch
from rich.console import Console
from torch import Tensor, nn
from torch.amp.grad_scaler import GradScaler
from torch.optim import Optimizer

from macrobatch import Accumulator, apply_update
from macrobatch.cli import setup
from macrobatch.cli.branched_figure import save_branches
from macrobatch.cli.branched_words import branch_table, branch_words
from macrobatch.cli.interrupt import CtrlC
from macrobatch.cli.noise import noise
from macrobatch.cli.progress import Progress, say
from macrobatch.cli.rescaling import rescale
from macrobatch.cli.run import Run
from macrobatch.cli.runfiles import write_json
from macrobatch.cli.sampling import take
from macrobatch.cli.validation import validate, validation_batches
from macrobatch.scaling_families import family_of
from macrobatch.scaling_rules import RuleName

ALPHA = 0.5
UPDATES_OF_LARGEST = 8
MOST_VALIDATION_SAMPLES = 512


@dataclass(frozen=True)
class BranchOptions:
    """`factors`: times the batch, 1 among them. `samples`: in each branch; None: 8 updates of the largest batch."""

    factors: tuple[int, ...]
    samples: int | None
    repeats: int
    tolerance: float

    @classmethod
    def of(
        cls,
        is_wanted: bool,
        factors: tuple[int, ...] | None,
        samples: int | None,
        repeats: int | None,
        tolerance: float | None,
    ) -> "BranchOptions | None":
        """The options with their defaults; None without --branched, and a ValueError where only parts are given."""
        given = {"--factors": factors, "--branch-samples": samples, "--repeats": repeats, "--tolerance": tolerance}
        if not is_wanted:
            named = [name for name, value in given.items() if value is not None]
            if named:
                raise ValueError(f"{', '.join(named)}: only for branches; give --branched too")
            return None
        return cls(factors or (1, 2, 4, 8), samples, repeats or 3, tolerance or 0.01)


@dataclass(frozen=True)
class Branch:
    """One batch size: each repeat's smoothed training loss at its end, and its validation loss.

    `courses`: for each repeat the samples and the mean loss over the samples of the largest batch before them.
    """

    factor: int
    batch_size: int
    learning_rate: float
    updates: int
    losses: tuple[float, ...]
    validation: tuple[float, ...]
    courses: tuple[tuple[tuple[int, float], ...], ...]

    @property
    def loss(self) -> float:
        """L_k: the mean over repeats."""
        return fmean(self.losses)


@dataclass(frozen=True)
class Branches:
    """All branches, by ascending batch size, from one point of training."""

    branches: tuple[Branch, ...]
    tolerance: float
    samples: int
    rule: str
    at_samples: int
    noise_scale: float | None

    @property
    def critical(self) -> Branch:
        """The largest batch whose loss is within the tolerance of that of every smaller one."""
        return max((each for each in self.branches if self.excess(each) <= self.tolerance), key=lambda b: b.factor)

    def best_below(self, branch: Branch) -> Branch | None:
        """The smaller batch with the lowest loss."""
        return min((b for b in self.branches if b.factor < branch.factor), key=lambda b: b.loss, default=None)

    def excess(self, branch: Branch) -> float:
        """How much higher its loss is than the lowest of the smaller ones; 0 for the smallest."""
        below = self.best_below(branch)
        return 0.0 if below is None else branch.loss - below.loss

    def error(self, branch: Branch) -> float | None:
        """The standard error of `excess`, from the differences of repeats on the same samples; None for one repeat."""
        below = self.best_below(branch)
        if below is None or len(branch.losses) < 2:
            return None
        differences = [mine - theirs for mine, theirs in zip(branch.losses, below.losses, strict=True)]
        return stdev(differences) / len(differences) ** 0.5


def branched_run(run: Run, options: BranchOptions, folder: Path, console: Console) -> int:
    """The run has ended as in `noise`, and the critical batch at its end was measured; the exit code."""
    brancher = Brancher(run, options)  # complains before anything is trained
    code = noise(run, folder, console)
    if code != 0:
        return code
    with CtrlC(lambda text: say(console, text)) as ctrl_c:
        ctrl_c.at_hand = "this branch"
        say(console, brancher.announcement)
        found = brancher.branches(console, ctrl_c)
    if found is None:
        say(console, "interrupted in the branches: the critical batch is not known")
        return 130
    console.print(branch_table(found))
    words = branch_words(found)
    for line in words:
        say(console, line)
    save_branches(folder, found, run.task.name)
    write_json(folder / "branched.json", entries(found, words))
    say(console, f"branched.json, branched.png, branched.svg in {folder}")
    return 0


def entries(found: Branches, words: Sequence[str]) -> Mapping[str, Any]:
    """Every number of the measurement."""
    table = [
        {**asdict(b), "loss": b.loss, "excess": found.excess(b), "standard_error": found.error(b)}
        for b in found.branches
    ]
    return {
        **{name: getattr(found, name) for name in ("tolerance", "samples", "rule", "at_samples", "noise_scale")},
        "critical_factor": found.critical.factor,
        "critical_batch_size": found.critical.batch_size,
        "branches": table,
        "words": list(words),
    }


class Brancher:
    """Trains on from where a run has come to, again and again. ValueError where the branches cannot be made."""

    def __init__(self, run: Run, options: BranchOptions) -> None:
        self.run, self.options = run, options
        self.largest = run.batch_size * options.factors[-1]
        uneven = [k for k in options.factors if options.factors[-1] % k]
        if uneven:
            raise ValueError(
                f"--factors: {options.factors[-1]} is not a multiple of {uneven[0]}, so that losses could not be "
                "averaged over the same samples: take multiples, such as 2,4,8"
            )
        wanted = options.samples or UPDATES_OF_LARGEST * self.largest
        self.samples = -(-wanted // self.largest) * self.largest
        if self.samples > run.data_size:
            raise ValueError(
                f"--branched takes {self.samples} samples, whole batches of {self.largest} ({options.factors[-1]} times "
                f"{run.batch_size}), and {run.task.name} has {run.data_size}: give smaller --factors, --batch-size or "
                "--branch-samples"
            )
        self.rule = branch_rule(run.optimizer)
        trial = run.task.make_optimizer(run.model, run.learning_rate)
        rescale(trial, self.rule, from_batch_size=run.batch_size, to_batch_size=self.largest)

    @property
    def announcement(self) -> str:
        """What comes, in a line."""
        factors, repeats = self.options.factors, self.options.repeats
        sizes = ", ".join(str(k * self.run.batch_size) for k in factors)
        return (
            f"branches from here: batches of {sizes}, {self.samples:,} samples each, {repeats} times: "
            f"{len(factors) * repeats * self.samples:,} samples in all"
        )

    def branches(self, console: Console, ctrl_c: CtrlC) -> Branches | None:
        """Every branch, `repeats` times each; None if Ctrl-C came first. The run's model is as it was."""
        run, options = self.run, self.options
        ends: dict[int, list[_End]] = {k: [] for k in options.factors}
        start = _Point(run)
        try:
            with Progress(console, len(options.factors) * options.repeats * self.samples) as progress:
                for repeat in range(options.repeats):
                    for k in options.factors:
                        ends[k].append(self._branch(k, repeat, start, progress))
                        if ctrl_c.wanted:
                            return None
        finally:
            start.restore_model(run.model)
        return Branches(
            tuple(self._joined(k, ends[k]) for k in options.factors),
            options.tolerance,
            self.samples,
            self.rule,
            run.samples,
            None if run.noise.estimate is None else run.noise.estimate.noise_scale,
        )

    def _branch(self, k: int, repeat: int, start: "_Point", progress: Progress) -> "_End":
        run = self.run
        optimizer, scaler = start.restored(run)
        rescale(optimizer, self.rule, from_batch_size=run.batch_size, to_batch_size=k * run.batch_size)
        rate = float(optimizer.param_groups[0]["lr"])
        accumulator = Accumulator(
            run.model,
            run.task.loss_fn,
            micro_batch_size=run.micro_batch_size,
            batch_norm="micro_batch",
            autocast=run.autocast,
            scaler=scaler,
        )
        losses = []
        with torch.random.fork_rng(devices=[run.device] if run.device.type == "cuda" else []):
            torch.manual_seed(run.options.seed + repeat)  # of dropout: the same for every batch size
            for indices in self._order(k * run.batch_size, repeat):
                report = accumulator.run(run.task.collate(take(run.task.train, indices)))
                apply_update(optimizer, report, max_norm=run.options.max_norm)
                losses.append(float(report.loss))
                progress.advance(
                    len(indices), f"batch {k * run.batch_size}, repeat {repeat + 1}  loss {losses[-1]:.4g}"
                )
        held_out = validation_batches(run.task, run.micro_batch_size, MOST_VALIDATION_SAMPLES)
        validation = validate(run.model, run.task, held_out, autocast=run.autocast).loss
        return _End(rate, tuple(binned(losses, self.options.factors[-1] // k, self.largest)), validation)

    def _order(self, batch_size: int, repeat: int) -> Iterator[list[int]]:
        """Indices of the samples of each update: the same order for every batch size, another for every repeat."""
        generator = torch.Generator().manual_seed(1000 * (self.run.options.seed + 1) + repeat)
        order = torch.randperm(self.run.data_size, generator=generator)[: self.samples].tolist()
        return (order[start : start + batch_size] for start in range(0, self.samples, batch_size))

    def _joined(self, k: int, ends: Sequence["_End"]) -> Branch:
        size = k * self.run.batch_size
        return Branch(
            factor=k,
            batch_size=size,
            learning_rate=ends[0].learning_rate,
            updates=-(-self.samples // size),
            losses=tuple(smoothed_end([loss for _, loss in end.course]) for end in ends),
            validation=tuple(end.validation for end in ends),
            courses=tuple(end.course for end in ends),
        )


@dataclass(frozen=True)
class _End:
    """How one branch ended."""

    learning_rate: float
    course: tuple[tuple[int, float], ...]
    validation: float


class _Point:
    """Where a run has come to: its model and optimizer, copied."""

    def __init__(self, run: Run) -> None:
        self._model: dict[str, Tensor] = copy.deepcopy(run.model.state_dict())
        self._optimizer = run.optimizer.state_dict()
        self._scaler = {} if run.scaler is None else run.scaler.state_dict()

    def restore_model(self, model: nn.Module) -> None:
        """The model is as it was at that point."""
        model.load_state_dict(self._model)

    def restored(self, run: Run) -> tuple[Optimizer, GradScaler | None]:
        """The model is as it was, and so are these: an optimizer without a scheduler, and a scaler if there is one."""
        self.restore_model(run.model)
        optimizer = run.task.make_optimizer(run.model, run.learning_rate)
        optimizer.load_state_dict(copy.deepcopy(self._optimizer))
        scaler = setup.scaler_for(run.options.precision, run.device)
        if scaler is not None:
            scaler.load_state_dict(dict(self._scaler))
        return optimizer, scaler


def branch_rule(optimizer: Optimizer) -> RuleName:
    """What Merrill et al. 2025 scale the rate by: linear for SGD, the square root for the Adam family and its kin."""
    auto = family_of(optimizer, None).auto
    if auto == "none":
        raise ValueError(f"--branched: no rule carries the rate of {type(optimizer).__name__} to another batch size")
    return "linear" if auto == "linear" else "invariant" if auto == "invariant" else "sqrt"


def binned(losses: Sequence[float], per_bin: int, largest: int) -> list[tuple[int, float]]:
    """The samples seen, and the mean loss of the `per_bin` updates of the last `largest` of them.

    >>> binned([4.0, 2.0, 3.0, 1.0], 2, 64)
    [(64, 3.0), (128, 2.0)]
    """
    starts = range(0, len(losses), per_bin)
    return [((i + 1) * largest, fmean(losses[start : start + per_bin])) for i, start in enumerate(starts)]


def smoothed_end(losses: Sequence[float]) -> float:
    """The last value of the exponential average with alpha = 0.5, which begins with the first loss.

    >>> smoothed_end([4.0, 2.0, 1.0])
    2.0
    """
    average = losses[0]
    for loss in losses[1:]:
        average = ALPHA * loss + (1 - ALPHA) * average
    return average
