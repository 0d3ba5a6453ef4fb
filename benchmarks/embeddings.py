"""A real sentence encoder, fine-tuned with in-batch negatives from 256 pairs: python benchmarks/embeddings.py.

The task `embeddings` (docstring to function, held-out modules). For each seed, in turn:

- `gathered 256`: GatheredAccumulator, 256 pairs compared in micro-batches of 32;
- `native 256`: the same 256 in one forward and backward;
- `accumulated 256`: 16 losses over 16 pairs each, averaged: what plain accumulation makes of it;
- `native 16`: batches of 16, 16 times as many updates.

Two epochs, AdamW, warmup over a tenth of the updates, then linear decay to zero; learning rate 4e-4 at 256 and 1e-4 at
16 (the square root of the ratio). Recall and MRR over the held-out pairs; differences with 95% intervals from a paired
bootstrap over these queries and the seeds. Apart from that: the gradients of the first five
updates, gathered against native; and five updates within a budget that native 64 exceeds.

Every finished run is saved: started again, it goes on from there. Results with machine and versions in --output.
"""

import json
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from common import machine, parsed, parser, write
from torch import Tensor
from torch.optim import AdamW
from torch.utils.data import default_collate

import macrobatch as mb
from macrobatch.tasks.embeddings import embeddings, encode, in_batch_negatives, ranks

EPOCHS = 2
BATCH, SMALL, MICRO = 256, 16, 32
WAYS = {"gathered 256": (BATCH, 4e-4), "native 256": (BATCH, 4e-4), "accumulated 256": (BATCH, 4e-4)} | {
    "native 16": (SMALL, 1e-4)
}
PAIRS = [("gathered 256", "native 256"), ("gathered 256", "accumulated 256"), ("gathered 256", "native 16")]
PAIRS += [(way, "before") for way in WAYS]
DRAWS = 10_000  # of the bootstrap
Batch = dict[str, Tensor]


class Setting:
    """The task, its weights before training, and the samples of each update."""

    def __init__(self, max_pairs: int | None) -> None:
        with torch.random.fork_rng():
            torch.manual_seed(0)
            self.task = embeddings()
            if self.task.prepare is not None:
                self.task.prepare(lambda done, total: None)  # what is timed is training alone
        self.model = self.task.model
        self.before = {name: value.clone() for name, value in self.model.state_dict().items()}
        self.num_pairs = min(len(self.task.train), max_pairs or len(self.task.train))

    def start(self) -> AdamW:
        """The weights before training, and an optimizer for them."""
        self.model.load_state_dict(self.before)
        self.model.train().zero_grad()
        return self.task.make_optimizer(self.model, 1.0)

    def batches(self, size: int, seed: int, epochs: int = EPOCHS) -> Iterator[Batch]:
        """Every pair once in each epoch, in an order that depends on the seed and not on the size."""
        generator = torch.Generator().manual_seed(seed)
        for _ in range(epochs):
            order = torch.randperm(self.num_pairs, generator=generator).tolist()
            for start in range(0, len(order), size):
                yield default_collate([self.task.train[i] for i in order[start : start + size]])

    def places(self) -> list[int]:
        """For each held-out docstring the place of its function."""
        data, parts = self.task.validation, []
        self.model.eval()
        with torch.no_grad():
            for start in range(0, len(data), 64):
                some = range(start, min(start + 64, len(data)))
                parts.append(encode(self.model, default_collate([data[i] for i in some])))
        return ranks({side: torch.cat([part[side] for part in parts]) for side in parts[0]}).tolist()


def native(model: torch.nn.Module, batch: Batch) -> None:
    in_batch_negatives(model, encode(model, batch), None).backward()


def accumulated(model: torch.nn.Module, batch: Batch) -> None:
    parts = list(mb.Window([batch]).cut(SMALL))
    for part in parts:
        (in_batch_negatives(model, encode(model, part), None) / len(parts)).backward()


def gathered(model: torch.nn.Module, micro_batch_size: int = MICRO) -> Callable[[Any, Batch], Any]:
    accumulator = mb.GatheredAccumulator(model, encode, in_batch_negatives, micro_batch_size=micro_batch_size)
    return lambda _, batch: accumulator.run(batch)


def step_for(setting: Setting, way: str) -> Callable[[Any, Batch], Any]:
    """What leaves the gradient of a batch in `p.grad`."""
    if way.startswith("gathered"):
        return gathered(setting.model)
    return accumulated if way.startswith("accumulated") else native


def train(setting: Setting, way: str, seed: int) -> dict[str, Any]:
    """One run from the same weights: the places of all held-out queries, seconds, updates."""
    size, learning_rate = WAYS[way]
    optimizer, step = setting.start(), step_for(setting, way)
    updates = EPOCHS * -(-setting.num_pairs // size)
    warmup = max(1, updates // 10)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda u: learning_rate * min((u + 1) / warmup, (updates - u) / (updates - warmup))
    )
    start = time.perf_counter()
    for batch in setting.batches(size, seed):
        step(setting.model, batch)
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
    return {
        "way": way,
        "seed": seed,
        "updates": updates,
        "seconds": time.perf_counter() - start,
        "places": setting.places(),
    }


# ---------------------------------------------------------------------------------------------------------------------
# Gradients of the first updates, and the budget


def gradients(model: torch.nn.Module) -> list[Tensor]:
    found = [p.grad.clone() for p in model.parameters() if p.grad is not None]
    model.zero_grad()
    return found


def first_updates(setting: Setting, count: int = 5) -> list[float]:
    """For each of the first updates: norm of the difference, gathered minus native, over the norm of native."""
    optimizer, errors = setting.start(), []
    for group in optimizer.param_groups:
        group["lr"] = 4e-4
    run = gathered(setting.model)
    for _, batch in zip(range(count), setting.batches(BATCH, 0), strict=False):
        native(setting.model, batch)
        theirs = gradients(setting.model)
        run(setting.model, batch)
        pairs = list(zip([p.grad for p in setting.model.parameters() if p.grad is not None], theirs, strict=True))
        difference = sum(float((a - b).double().square().sum()) for a, b in pairs) ** 0.5
        errors.append(difference / sum(float(b.double().square().sum()) for _, b in pairs) ** 0.5)
        optimizer.step()
        optimizer.zero_grad()
    return errors


def peak(setting: Setting, size: int, step: Callable[[Any, Batch], Any]) -> int:
    """Bytes at the peak of the second update with batches of `size`: AdamW's state is there by then."""
    optimizer, batches = setting.start(), setting.batches(size, 0)
    for _ in range(2):
        batch = next(batches)
        with mb.MemoryMeter() as meter:
            step(setting.model, batch)
            optimizer.step()
            optimizer.zero_grad()
    return meter.peak


def budget(setting: Setting) -> dict[str, Any]:
    """Peaks, and five updates of each within a budget halfway between gathered 256 and native 64."""
    small = MICRO // 2
    peaks = {f"native {size}": peak(setting, size, native) for size in (16, 64, BATCH)}
    peaks[f"gathered 256, micro-batches of {small}"] = peak(setting, BATCH, gathered(setting.model, small))
    limit = (peaks["native 64"] + peaks[f"gathered 256, micro-batches of {small}"]) // 2
    outcome = {}
    for name, size, step in (("gathered 256", BATCH, gathered(setting.model, small)), ("native 64", 64, native)):
        optimizer, retries, done = setting.start(), 0, 0
        try:
            with mb.memory_limit(limit):
                for _, batch in zip(range(5), setting.batches(size, 0), strict=False):
                    report = step(setting.model, batch)
                    retries += getattr(report, "retries", 0)
                    optimizer.step()
                    optimizer.zero_grad()
                    done += 1
            outcome[name] = f"{done} updates, {retries} retries"
        except torch.OutOfMemoryError:
            outcome[name] = f"out of memory after {done} updates"
    return {"peak MB": {k: round(v / 1e6, 1) for k, v in peaks.items()}, "budget MB": round(limit / 1e6, 1)} | outcome


# ---------------------------------------------------------------------------------------------------------------------
# What the runs say

METRICS: dict[str, Callable[[np.ndarray], np.ndarray]] = {
    "recall@1": lambda places: places <= 1,
    "recall@10": lambda places: places <= 10,
    "MRR": lambda places: 1 / places,
}


def summary(before: list[int], runs: list[dict[str, Any]]) -> dict[str, Any]:
    """Means and seeds' values of each metric; differences with paired bootstrap intervals over queries and seeds."""
    places = {way: np.array([run["places"] for run in runs if run["way"] == way]) for way in WAYS}
    places = {"before": np.array([before])} | {way: p for way, p in places.items() if len(p)}
    generator, found = np.random.default_rng(0), {}
    queries = generator.integers(len(before), size=(DRAWS, len(before)))
    for metric, of in METRICS.items():
        values = {way: of(p).astype(float) for way, p in places.items()}  # (seeds, queries)
        rows: dict[str, Any] = {
            way: {"mean": round(float(v.mean()), 4), "seeds": [round(float(m), 4) for m in v.mean(1)]}
            for way, v in values.items()
        }
        for one, two in PAIRS:
            if one in values and two in values:
                difference = values[one] - values[two]  # (seeds, queries): pairs, seed by seed
                seeds = generator.multinomial(len(difference), [1 / len(difference)] * len(difference), size=DRAWS)
                of_seeds = seeds @ difference / len(difference)  # (draws, queries)
                low, high = np.quantile(np.take_along_axis(of_seeds, queries, 1).mean(1), [0.025, 0.975])
                rows[f"{one} minus {two}"] = [round(float(x), 4) for x in (difference.mean(), low, high)]
        found[metric] = rows
    return found


def table(saved: dict[str, Any]) -> str:
    """Each way in Markdown: the mean over the seeds, and in brackets the lowest and the highest of them."""

    def cell(row: dict[str, Any]) -> str:
        low, high = min(row["seeds"]), max(row["seeds"])
        return f"{row['mean']:.3f}" + (f" ({low:.3f} to {high:.3f})" if len(row["seeds"]) > 1 else "")

    lines = ["| | updates | recall@1 | recall@10 | MRR |", "|---|---|---|---|---|"]
    for way in ("before", *WAYS):
        updates = next((run["updates"] for run in saved["runs"] if run["way"] == way), 0)
        cells = [cell(saved["summary"][metric][way]) for metric in METRICS]
        lines.append(f"| {way} | {' | '.join([str(updates), *cells])} |")
    return "\n".join(lines)


def differences(saved: dict[str, Any]) -> str:
    """The differences between ways in Markdown, with their 95% intervals."""
    lines = ["| | recall@1 | recall@10 | MRR |", "|---|---|---|---|"]
    for one, two in PAIRS:
        found = [saved["summary"][metric][f"{one} minus {two}"] for metric in METRICS]
        cells = [f"{difference:+.3f} ({low:+.3f} to {high:+.3f})" for difference, low, high in found]
        lines.append(f"| {one} minus {two} | {' | '.join(cells)} |")
    return "\n".join(lines)


def main() -> None:
    """Run what is missing, save after each run, print what it says."""
    command_line = parser(__doc__, output=Path("benchmarks/results/embeddings.json"), seeds=3)
    command_line.set_defaults(threads=2)
    command_line.add_argument("--max-pairs", type=int, help="train on the first so many pairs only")
    arguments = parsed(command_line)
    saved: dict[str, Any] = json.loads(arguments.output.read_text()) if arguments.output.exists() else {}
    setting = Setting(arguments.max_pairs)
    here = machine() | {"task": setting.task.description, "pairs": setting.num_pairs}
    other = {name: saved[name] for name in here if name in saved and saved[name] != here[name]}
    if other:
        raise SystemExit(f"{arguments.output} holds runs of {other}, here it is {here}: give another --output")
    saved |= here
    runs = saved.setdefault("runs", [])

    def save() -> None:
        saved["summary"] = summary(saved["before"], runs)
        saved["seconds"] = round(sum(run["seconds"] for run in runs))
        write(saved, arguments.output, indent=None)  # thousands of places

    if "before" not in saved:
        setting.start()
        saved["before"] = setting.places()
        saved["gradient error of the first updates"] = first_updates(setting)
        saved["within a budget"] = budget(setting)
        save()
        print(saved["gradient error of the first updates"], saved["within a budget"], flush=True)
    for seed in range(arguments.seeds):
        for way in WAYS:
            if not any(run["way"] == way and run["seed"] == seed for run in runs):
                runs.append(train(setting, way, seed))
                save()
                print(way, seed, round(runs[-1]["seconds"]), "s", flush=True)
    save()
    print(table(saved), differences(saved), sep="\n\n")


if __name__ == "__main__":
    main()
