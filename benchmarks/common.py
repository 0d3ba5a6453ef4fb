"""What the benchmarks share: their options, turns in random order, and results in a file that is never half written."""

import argparse
import json
import os
import platform
import random
import statistics
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

import macrobatch as mb


def parser(doc: str | None, *, output: Path | None = None, **numbers: int) -> argparse.ArgumentParser:
    """A command line with `--threads`, `--output`, and for each of `numbers` an option with that default."""
    made = argparse.ArgumentParser(description=(doc or "").splitlines()[0])
    for name, number in numbers.items():
        made.add_argument(f"--{name.replace('_', '-')}", type=int, default=number)
    made.add_argument("--threads", type=int, default=1)
    made.add_argument("--output", type=Path, default=output, help="a JSON file for the results")
    return made


def parsed(command_line: argparse.ArgumentParser) -> argparse.Namespace:
    """What was asked for; torch computes with that many threads from here on."""
    arguments = command_line.parse_args()
    torch.set_num_threads(arguments.threads)
    return arguments


def machine() -> dict[str, Any]:
    """Where and with what is measured."""
    return {
        "machine": f"{platform.machine()}, {torch.get_num_threads()} thread(s)",
        "versions": f"Python {platform.python_version()}, torch {torch.__version__}, macrobatch {mb.__version__}",
    }


def write(results: Mapping[str, Any], path: Path | None, indent: int | None = 2) -> None:
    """The file holds the results, whole: a run that is stopped leaves the one before. Nothing without a path."""
    if path is None:
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = path.with_name(f"{path.name}.{os.getpid()}.part")
    beside.write_text(json.dumps(results, indent=indent) + "\n", encoding="utf-8")
    beside.replace(path)


def kept_runs(path: Path) -> dict[str, Any]:
    """What a file of runs holds already, by name."""
    return dict(json.loads(path.read_text(encoding="utf-8"))["runs"]) if path.exists() else {}


def make_missing(found: dict[str, Any], names: Iterable[str], make: Callable[[str], Any], path: Path) -> None:
    """`found["runs"]` has every name; each run that it lacked is made, written and told at once."""
    for name in names:
        if name not in found["runs"]:
            found["runs"][name] = make(name)
            found |= {"python": platform.python_version(), "torch": torch.__version__}
            found["threads"] = torch.get_num_threads()
            write(found, path)
            print(name, json.dumps(found["runs"][name]), flush=True)


def in_turns(
    ways: Mapping[str, Callable[[], object]],
    rounds: int,
    *,
    before: Callable[[], object],
    warmup: int = 1,
    untimed: int = 0,
) -> dict[str, list[float]]:
    """For each way the seconds of each round, after `warmup` more; all run in each round, in an order drawn anew.

    `before` comes before each run, out of the time. A way runs `untimed` times more right before it is timed.
    """
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    for round_ in range(-warmup, rounds):
        for name in random.sample(sorted(ways), len(ways)):
            for _ in range(untimed + 1):
                before()
                start = time.perf_counter()
                ways[name]()
                elapsed = time.perf_counter() - start
            if round_ >= 0:
                seconds[name].append(elapsed)
    return seconds


def quartiles(mine: Sequence[float], theirs: Sequence[float]) -> list[float]:
    """Quartiles over rounds of the one time over the other of the same round; of one round its ratio, three times."""
    ratios = [a / b for a, b in zip(mine, theirs, strict=True)]
    return [round(q, 4) for q in (statistics.quantiles(ratios, n=4) if len(ratios) > 1 else ratios * 3)]
