"""How near micro_batch_size="auto" comes to the fastest fixed size. Run it with: python benchmarks/auto.py .

Lets "auto" search on real windows, then times windows at the size it kept and at every fixed size of a grid (halves of
the largest that fits, and the sizes between), interleaved, in one run. Reported: the throughput of that size over that
of the best fixed size, medians over rounds.
"""

import json
import statistics
from functools import partial

import torch
from common import in_turns, machine, parsed, parser, write
from overhead import small_transformer, tiny_mlp
from torch.nn import functional as F

import macrobatch as mb


def loss_fn(model: torch.nn.Module, batch: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
    """Mean cross-entropy over samples."""
    return F.cross_entropy(model(batch[0]), batch[1])


def measure(case: object, samples: int, max_memory: str, rounds: int) -> dict[str, object]:
    """Auto's size, the fixed sizes' medians, and the ratio."""
    torch.manual_seed(0)
    model, (x, y) = case()  # type: ignore[operator]
    repeats = -(-samples // len(x))
    batch = x.repeat(repeats, *[1] * (x.ndim - 1))[:samples], y.repeat(repeats, *[1] * (y.ndim - 1))[:samples]
    auto = mb.Accumulator(model, loss_fn, micro_batch_size="auto", max_memory=max_memory)
    windows = 0
    while windows < 40 and not auto._limit.is_found:  # type: ignore[union-attr]
        model.zero_grad()
        auto.run(batch)
        windows += 1
    largest = mb.plan(
        model, loss_fn, batch, batch_size=samples, max_memory=max_memory, measure_speed=False
    ).micro_batch_size
    found = auto.micro_batch_size
    sizes = sorted({max(1, round(largest / 2 ** (power / 2))) for power in range(13)} | {found})
    fixed = {size: mb.Accumulator(model, loss_fn, micro_batch_size=size) for size in sizes if size}
    ways = {str(size): partial(accumulator.run, batch) for size, accumulator in fixed.items()}
    times = in_turns(ways, rounds, before=model.zero_grad)
    medians = {size: statistics.median(times[str(size)]) for size in fixed}
    best = min(medians, key=lambda size: medians[size])
    return {
        "largest that fits": largest,
        "auto": found,
        "windows of the search": windows,
        "best fixed": best,
        "throughput of auto / best fixed": round(medians[best] / medians[found], 4),
        "samples per second": {size: round(samples / value) for size, value in medians.items()},
    }


def main() -> None:
    """Measure both cases, print them, and write them if --output says where."""
    arguments = parsed(parser(__doc__, rounds=15))
    results = machine()
    for case, samples, max_memory in ((tiny_mlp, 4096, "30MB"), (small_transformer, 256, "60MB")):
        results[case.__name__] = measure(case, samples, max_memory, arguments.rounds)
        print(case.__name__, json.dumps(results[case.__name__], indent=1))
    write(results, arguments.output)


if __name__ == "__main__":
    main()
