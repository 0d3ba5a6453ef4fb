"""Do small batches find flatter minima? `digits` with SGD, over seeds: python benchmarks/sharpness_seeds.py.

Three ways through the same 30 epochs: batches of 16; of 128 at the same rate; of 128 at the rate that
`scale_hyperparameters(rule="auto")` makes of it, with a warmup. Sharpness is the top eigenvalue of the Hessian of the
mean loss over 512 training images, the same for all, in evaluation mode: at the end, and when the training loss over
them was first down to 0.03 (looked at every 128 samples), because cross-entropy flattens wherever it gets small.

Each run is written when it ends and is not made again. --report prints the table and the words, drawn from the numbers.
Results: benchmarks/results/sharpness_seeds.json.
"""

import statistics
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from common import kept_runs, make_missing, parsed, parser
from torch.utils.data import DataLoader, default_collate

import macrobatch as mb
from macrobatch.tasks import Task, load_task

RESULTS = Path(__file__).parent / "results" / "sharpness_seeds.json"
RATE, SMALL, LARGE, EPOCHS = 0.01, 16, 128, 30
LEVEL = 0.03  # nats, of the training loss
CURVATURE_SAMPLES = 512
WARMUP_SHARE = 1 / 8
WAYS = {
    "small": f"batches of {SMALL}",
    "large": f"batches of {LARGE}, lr as it was",
    "scaled": f"batches of {LARGE}, lr scaled",
}
T_95 = {1: 12.706, 2: 4.303, 3: 3.182, 4: 2.776, 5: 2.571, 6: 2.447, 7: 2.365, 8: 2.306, 9: 2.262}  # Student's t


def train(way: str, seed: int) -> dict[str, Any]:
    """Sharpness, training and validation loss of a run at its end and at the level."""
    task = load_task("digits", seed=seed)
    size = len(task.train)  # type: ignore[arg-type]
    batch_size = SMALL if way == "small" else LARGE
    updates = -(-size // batch_size) * EPOCHS
    optimizer = task.make_optimizer(task.model, RATE)
    scheduler = None
    if way == "scaled":
        scaling = mb.scale_hyperparameters(optimizer, from_batch_size=SMALL, to_batch_size=LARGE)
        scheduler = mb.warmup(optimizer, factor=1 / scaling.lr_factor, num_updates=round(WARMUP_SHARE * updates))
    accumulator = mb.Accumulator(task.model, task.loss_fn, batch_norm="micro_batch")
    chosen = torch.linspace(0, size - 1, CURVATURE_SAMPLES).long().tolist()
    seen = default_collate([task.train[index] for index in chosen])
    held_out = default_collate(list(task.validation))  # type: ignore[call-overload]
    at_level = None
    done = 0
    for epoch in range(EPOCHS):
        for window in windows(task, batch_size, seed * EPOCHS + epoch):
            if mb.apply_update(optimizer, accumulator.run(window)).applied and scheduler is not None:
                scheduler.step()
            done, before = done + window.num_samples, done
            is_time = at_level is None and done // LARGE > before // LARGE
            if is_time and mean_loss(task, seen) <= LEVEL:
                at_level = {"samples": done, **place(task, seen, held_out)}
    return {"way": way, "seed": seed, "level": at_level, "end": place(task, seen, held_out)}


def windows(task: Task, batch_size: int, seed: int) -> Iterator[mb.Window]:
    """One epoch, in an order that is the same for every batch size."""
    order = torch.Generator().manual_seed(seed)
    collate = mb.collate_windows(task.collate, micro_batch_size=16)  # the statistics of BatchNorm are over 16, always
    yield from DataLoader(task.train, batch_size=batch_size, shuffle=True, generator=order, collate_fn=collate)


def place(task: Task, seen: Any, held_out: Any) -> dict[str, float]:
    """Where the model is."""
    found = mb.sharpness(task.model, task.loss_fn, seen, micro_batch_size=128, max_products=30)
    return {
        "sharpness": found.top,
        "training_loss": mean_loss(task, seen),
        "validation_loss": mean_loss(task, held_out),
    }


def mean_loss(task: Task, batch: Any) -> float:
    """In evaluation mode."""
    task.model.eval()
    with torch.no_grad():
        loss_sum, count = task.loss_fn(task.model, batch)
    task.model.train()
    return float(loss_sum) / count


# ---------------------------------------------------------------------------------------------------------------------
# table and words


def interval(values: Sequence[float]) -> tuple[float, float]:
    """The mean over seeds and half the width of its 95% interval."""
    return statistics.fmean(values), T_95[len(values) - 1] * statistics.stdev(values) / len(values) ** 0.5


def of(runs: Mapping[str, Any], way: str, seeds: Sequence[int], where: str, what: str) -> list[float] | None:
    """A number of every seed; None if a run did not get to the level."""
    places = [runs[f"{way}, seed {seed}"][where] for seed in seeds]
    return None if None in places else [found[what] for found in places]


def report(found: Mapping[str, Any]) -> str:
    """The table over all seeds, and what it says about small and large batches."""
    runs, seeds = found["runs"], found["seeds"]
    columns = ("sharpness", "training_loss", "validation_loss")
    lines = ["| | at | sharpness | training loss | validation loss |", "|---|---|---|---|---|"]
    for where, said in (("level", f"training loss {LEVEL}"), ("end", f"{EPOCHS} epochs")):
        for way, name in WAYS.items():
            values = [of(runs, way, seeds, where, column) for column in columns]
            cells = ["not reached" if each is None else "{:.3g} ± {:.2g}".format(*interval(each)) for each in values]
            lines.append(f"| {name} | {said} | {' | '.join(cells)} |")
    lines.append("")
    for where, said in (("level", f"At a training loss of {LEVEL}"), ("end", f"After {EPOCHS} epochs")):
        for other in ("large", "scaled"):
            ones, others = (of(runs, way, seeds, where, "sharpness") for way in ("small", other))
            if ones is not None and others is not None:
                lines.append(f"{said} {verdict(ones, others, WAYS[other])}")
    return "\n".join(lines)


def verdict(ones: Sequence[float], others: Sequence[float], name: str) -> str:
    """The sharpness of the small batch against that of another way, by pairs of the same seed."""
    mean, half = interval([one - other for one, other in zip(ones, others, strict=True)])
    word = "is not clearly of another sharpness than"
    if abs(mean) > half:
        word = "is flatter than" if mean < 0 else "is sharper than"
    return f"the place that {WAYS['small']} found {word} that of {name}: {mean:+.3g} ± {half:.2g}."


def main() -> None:
    """Make the runs that are missing, and print table and words."""
    command_line = parser(__doc__, output=RESULTS, seeds=6)  # 2 to 10: intervals are over seeds
    command_line.add_argument("--report", action="store_true", help="print what there is, make no runs")
    arguments = parsed(command_line)
    found: dict[str, Any] = {"seeds": list(range(arguments.seeds)), "runs": kept_runs(arguments.output)}
    runs = {} if arguments.report else {f"{way}, seed {seed}": (way, seed) for seed in found["seeds"] for way in WAYS}
    make_missing(found, runs, lambda name: train(*runs[name]), arguments.output)
    print(report(found))


if __name__ == "__main__":
    main()
