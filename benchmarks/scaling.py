"""What scaling the learning rate buys when the batch grows, at equal samples: python benchmarks/scaling.py.

`digits` with SGD: a rate at a small batch; the same rate at 8 times the batch; and there what
`scale_hyperparameters(rule="auto")` makes of it, with a warmup from the old rate. Once from a rate far below the
largest useful one, and once from the task's own, which is near it.

`code-lm` with AdamW: a grid of rates at batches of 16; one of them, near the best, at batches of 128 as it is; and
there a grid around what the rule makes of it, each with the rule's beta2, eps and weight decay and with a warmup.

Each run is written when it ends and is not made again: what was stopped goes on. --report makes none, and prints the
tables and the words, which are drawn from the numbers. Results: benchmarks/results/scaling.json.
"""

import statistics
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from common import kept_runs, make_missing, parsed, parser
from torch.utils.data import DataLoader

import macrobatch as mb
from macrobatch.tasks import Task, load_task

RESULTS = Path(__file__).parent / "results" / "scaling.json"
SEEDS = (0, 1, 2)
WARMUP_SHARE = 1 / 8  # of the updates, from the rate of the small batch
T_95 = {2: 4.303, 3: 3.182, 4: 2.776, 5: 2.571, 7: 2.365, 9: 2.262}  # Student's t by degrees of freedom, two-sided


@dataclass(frozen=True)
class Case:
    """A run: `learning_rate` at `batch_size`, scaled from `from_batch_size` if given, then times `factor`."""

    task: str
    seed: int
    samples: int
    batch_size: int
    learning_rate: float
    from_batch_size: int | None = None
    factor: float = 1.0

    @property
    def name(self) -> str:
        """The key of the run in the results."""
        scaled = "" if self.from_batch_size is None else f" scaled from {self.from_batch_size} x{self.factor:g}"
        return f"{self.task} {self.samples}: {self.batch_size} at {self.learning_rate:g}{scaled}, seed {self.seed}"


TIMES = 8  # the large batch over the small one
DIGITS = ((16, 0.002, 4), (64, 0.05, 10))  # batch, rate, epochs
DIGITS_SIZE = 1437  # samples in an epoch
CODE_BATCH, CODE_RATE, CODE_SAMPLES = 16, 3e-3, 8192
CODE_RATES = (1.5e-3, 3e-3, 6e-3)  # at batches of 16
CODE_FACTORS = (0.25, 0.5, 1.0, 2.0)  # of the rule's choice, at batches of 128


def cases(seeds: Sequence[int] = SEEDS) -> Iterator[Case]:
    """Every run of the benchmark, seed by seed."""
    for seed in seeds:
        for batch, rate, epochs in DIGITS:
            yield from digits_cases(seed, batch, rate, epochs)
    for seed in seeds:
        for rate in CODE_RATES:
            yield Case("code-lm", seed, CODE_SAMPLES, CODE_BATCH, rate)
        yield Case("code-lm", seed, CODE_SAMPLES, TIMES * CODE_BATCH, CODE_RATE)
        for factor in CODE_FACTORS:
            yield Case("code-lm", seed, CODE_SAMPLES, TIMES * CODE_BATCH, CODE_RATE, CODE_BATCH, factor)


def digits_cases(seed: int, batch: int, rate: float, epochs: int) -> tuple[Case, Case, Case]:
    """The small batch, the large one at the same rate, and the large one at the scaled rate."""
    samples = epochs * DIGITS_SIZE
    return (
        Case("digits", seed, samples, batch, rate),
        Case("digits", seed, samples, TIMES * batch, rate),
        Case("digits", seed, samples, TIMES * batch, rate, from_batch_size=batch),
    )


def train(case: Case) -> dict[str, Any]:
    """The run's validation loss and what it took."""
    started = time.perf_counter()
    task = load_task(case.task, seed=case.seed)
    optimizer = task.make_optimizer(task.model, case.learning_rate)
    batches = list(index_batches(len(task.train), case))  # type: ignore[arg-type]
    scheduler = scaling = None
    if case.from_batch_size is not None:
        scaling = mb.scale_hyperparameters(
            optimizer, from_batch_size=case.from_batch_size, to_batch_size=case.batch_size
        )
        for group in optimizer.param_groups:
            group["lr"] *= case.factor
            group.pop("initial_lr", None)
        start = case.learning_rate / optimizer.param_groups[0]["lr"]
        scheduler = mb.warmup(optimizer, factor=min(1.0, start), num_updates=round(WARMUP_SHARE * len(batches)))
    collate = mb.collate_windows(task.collate, micro_batch_size=16)  # the statistics of BatchNorm are over 16, always
    accumulator = mb.Accumulator(task.model, task.loss_fn, batch_norm="micro_batch")
    for window in DataLoader(task.train, batch_sampler=batches, collate_fn=collate):
        if mb.apply_update(optimizer, accumulator.run(window)).applied and scheduler is not None:
            scheduler.step()
    return {
        **asdict(case),
        "updates": len(batches),
        "final_lr": optimizer.param_groups[0]["lr"],
        "rule": None if scaling is None else scaling.rule,
        "validation_loss": validation_loss(task),
        "seconds": round(time.perf_counter() - started, 1),
    }


def index_batches(size: int, case: Case) -> Iterator[list[int]]:
    """The same order of samples for every batch size: one shuffled pass after the other, `case.samples` in all."""
    generator = torch.Generator().manual_seed(case.seed)
    order: list[int] = []
    while len(order) < case.samples:
        order += torch.randperm(size, generator=generator).tolist()
    order = order[: case.samples]
    for start in range(0, case.samples, case.batch_size):
        yield order[start : start + case.batch_size]


@torch.no_grad()
def validation_loss(task: Task) -> float:
    """The mean loss over up to 1024 held-out samples, in evaluation mode."""
    count = len(task.validation)  # type: ignore[arg-type]
    chosen = torch.linspace(0, count - 1, min(count, 1024)).long().tolist()
    evaluator = mb.Accumulator(task.model.eval(), task.loss_fn, batch_norm="micro_batch")
    loader = DataLoader(task.validation, batch_size=64, sampler=chosen, collate_fn=task.collate)
    reports = [evaluator.evaluate(mb.Window([batch])) for batch in loader]
    weights = [float(torch.as_tensor(report.loss_weight)) for report in reports]
    return sum(float(r.loss) * w for r, w in zip(reports, weights, strict=True)) / sum(weights)


# ---------------------------------------------------------------------------------------------------------------------
# tables and words


@dataclass(frozen=True)
class Interval:
    """A mean over seeds and half the width of its 95% interval, by Student's t."""

    mean: float
    half: float

    @classmethod
    def of(cls, values: Sequence[float]) -> "Interval":
        """Of at least two values."""
        error = statistics.stdev(values) / len(values) ** 0.5
        return cls(statistics.fmean(values), T_95[len(values) - 1] * error)

    def __str__(self) -> str:
        return f"{self.mean:.3f} ± {self.half:.3f}"


Runs = Mapping[str, Mapping[str, Any]]


def losses(runs: Runs, seeds: Sequence[int], case: Case) -> list[float]:
    """The validation losses of a case, by seed."""
    return [runs[replace(case, seed=seed).name]["validation_loss"] for seed in seeds]


def digits_text(runs: Runs, seeds: Sequence[int]) -> str:
    """A table of the runs on `digits`, and a sentence on each base rate."""
    table = [
        "| from | small batch | 8 times the batch, lr as it was | 8 times the batch, lr scaled |",
        "|---|---|---|---|",
    ]
    words = []
    for batch, rate, epochs in DIGITS:
        small, unscaled, scaled = (losses(runs, seeds, case) for case in digits_cases(0, batch, rate, epochs))
        columns = " | ".join(str(Interval.of(values)) for values in (small, unscaled, scaled))
        table.append(f"| batches of {batch} at lr {rate:g}, {epochs} epochs | {columns} |")
        ratios = [one / other for one, other in zip(scaled, unscaled, strict=True)]
        verdict = "helped" if max(ratios) < 1 else "did not help" if min(ratios) > 1 else "helped in some runs only"
        words.append(
            f"From lr {rate:g} scaling {verdict}: the loss is {min(ratios):.2f} to {max(ratios):.2f} times that of the "
            "unscaled runs."
        )
    return "\n".join([*table, "", *words])


def code_text(runs: Runs, seeds: Sequence[int]) -> str:
    """A table of the runs on `code-lm`, and whether the rule's choice was better than the rate as it was."""
    code = [case for case in cases((0,)) if case.task == "code-lm"]
    found = {case: losses(runs, seeds, case) for case in code}
    table = ["| batch | lr | | validation loss |", "|---|---|---|---|"]
    for case, values in found.items():
        rate = runs[replace(case, seed=seeds[0]).name]["final_lr"]
        table.append(f"| {case.batch_size} | {rate:.3g} | {_what(case) or '-'} | {Interval.of(values)} |")
    unscaled = next(case for case in code if case.batch_size > CODE_BATCH and case.from_batch_size is None)
    grid = [case for case in code if case.from_batch_size is not None]
    rule = next(case for case in grid if case.factor == 1)
    best = min(grid, key=lambda case: statistics.fmean(found[case]))
    best_small = min((c for c in code if c.batch_size == CODE_BATCH), key=lambda case: statistics.fmean(found[case]))
    words = [
        _against("The rule's choice", found[rule], "the rate as it was", found[unscaled]),
        f"The best of the grid is {best.factor:g} times the rule's choice."
        if best is not rule
        else "The rule's choice is the best of the grid.",
        _against("The best of the grid", found[best], "the rate as it was", found[unscaled]),
        _against("The large batch at its best rate", found[best], "the small one at its best", found[best_small]),
    ]
    return "\n".join([*table, "", *words])


def _what(case: Case) -> str:
    if case.from_batch_size is None:
        return "" if case.batch_size == CODE_BATCH else "as it was"
    return "scaled, the rule's choice" if case.factor == 1 else f"scaled, {case.factor:g} times the rule's choice"


def _against(name: str, values: Sequence[float], other_name: str, others: Sequence[float]) -> str:
    """Whether one case is better than the other, by pairs of the same seed."""
    interval = Interval.of([one - other for one, other in zip(values, others, strict=True)])
    verdict = "about as good as"
    if abs(interval.mean) > interval.half:
        verdict = "better than" if interval.mean < 0 else "worse than"
    return f"{name} is {verdict} {other_name}: {interval.mean:+.3f} ± {interval.half:.3f}."


def report(found: Mapping[str, Any]) -> str:
    """Both tables and their words; a part whose runs are not complete is left out."""
    seeds, runs = found["seeds"], found["runs"]
    parts = []
    for task, text in (("digits", digits_text), ("code-lm", code_text)):
        if all(case.name in runs for case in cases(seeds) if case.task == task):
            parts.append(
                f"{task}: validation loss, mean over {len(seeds)} seeds and its 95% interval\n\n{text(runs, seeds)}"
            )
    return "\n\n".join(parts)


def main() -> None:
    """Make the runs that are missing, and print tables and words."""
    command_line = parser(__doc__, output=RESULTS, seeds=len(SEEDS))  # at least 2 seeds: intervals are over them
    command_line.add_argument("--report", action="store_true", help="print what there is, make no runs")
    arguments = parsed(command_line)
    found: dict[str, Any] = {"seeds": list(range(arguments.seeds)), "runs": kept_runs(arguments.output)}
    by_name = {} if arguments.report else {case.name: case for case in cases(found["seeds"])}
    make_missing(found, by_name, lambda name: train(by_name[name]), arguments.output)
    print(report(found))


if __name__ == "__main__":
    main()
