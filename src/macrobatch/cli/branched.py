"""`macrobatch noise --branched`: training goes on from one point at several batch sizes; see `branches`."""

import copy
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from rich.console import Console
from torch import Tensor, nn
from torch.amp.grad_scaler import GradScaler
from torch.optim import Optimizer

from macrobatch import Accumulator, apply_update
from macrobatch.cli import setup
from macrobatch.cli.branched_figure import save_branches
from macrobatch.cli.branched_words import branch_table, branch_words
from macrobatch.cli.branches import Branch, Branches, binned, entries, smoothed_end
from macrobatch.cli.forecast import coupling_layer
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


def branched_run(run: Run, options: BranchOptions, folder: Path, console: Console) -> int:
    """The run has ended as in `noise`, and the critical batch at its end was measured; the exit code."""
    brancher = Brancher(run, options)  # complains before anything is trained
    code = noise(run, folder, console)
    if code != 0:
        return code
    with CtrlC(lambda text: say(console, text), "this branch", "what branches told") as ctrl_c:
        say(console, brancher.announcement)
        found = brancher.branches(console, ctrl_c)
    if found is None:
        say(console, "interrupted in the branches: the critical batch is not known")
        return ctrl_c.exit_code
    console.print(branch_table(found))
    words = branch_words(found)
    for line in words:
        say(console, line)
    save_branches(folder, found, run.task.name)
    write_json(folder / "branched.json", entries(found, words))
    say(console, f"branched.json, branched.png, branched.svg in {folder}")
    return 0


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
                f"--branched takes {self.samples} samples, whole batches of {self.largest} ({options.factors[-1]} "
                f"times {run.batch_size}), and {run.task.name} has {run.data_size}: give smaller --factors, "
                "--batch-size or --branch-samples"
            )
        is_free = coupling_layer(run.model) is None and run.max_memory is None  # the size changes nothing but the time
        self.micro_batch_size = max(run.micro_batch_size, run.task.micro_batch_size if is_free else 1)
        self.rule = branch_rule(run.rates.optimizer)
        trial = run.task.make_optimizer(run.model, run.rates.learning_rate)
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
            micro_batch_size=self.micro_batch_size,
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
                status = f"batch {k * run.batch_size}, repeat {repeat + 1}  loss {losses[-1]:.4g}"
                progress.advance(len(indices), status)
        held_out = validation_batches(run.task, self.micro_batch_size, MOST_VALIDATION_SAMPLES)
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
        self._optimizer = run.rates.optimizer.state_dict()
        self._scaler = {} if run.scaler is None else run.scaler.state_dict()

    def restore_model(self, model: nn.Module) -> None:
        """The model is as it was at that point."""
        model.load_state_dict(self._model)

    def restored(self, run: Run) -> tuple[Optimizer, GradScaler | None]:
        """The model is as it was, and so are these: an optimizer without a scheduler, and a scaler if there is one."""
        self.restore_model(run.model)
        optimizer = run.task.make_optimizer(run.model, run.rates.learning_rate)
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
