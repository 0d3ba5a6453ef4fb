"""What measuring the gradient noise costs, and that its value does not depend on the cut: python benchmarks/noise.py.

Cost: the same window of the small transformer of overhead.py (K = 8 micro-batches of 16 sequences) with `measure=None`,
the same again (the floor: what noise alone shows), "norms" with `GradientNoiseScale.observe`, and "squares", in an
order drawn anew for each round; the ratio to `measure=None` of the same round, its median and quartiles. The target for
"norms" is at most 1.03. Cut: the same windows of 64 sequences at the same parameters, cut into 2 to 64 micro-batches;
noise scale and 95% interval of each. Results with machine and versions: benchmarks/results/.
"""

import json
import statistics
from collections.abc import Callable

import torch
from common import in_turns, machine, parsed, parser, quartiles, write
from overhead import K, SmallTransformer, keep_memory, small_transformer
from torch import nn
from torch.nn import functional as F

import macrobatch as mb
from macrobatch.measuring import Measure

CUTS = (32, 16, 8, 4, 1)  # samples in a micro-batch


def loss_fn(model: nn.Module, batch: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
    """The mean over samples, all of one length."""
    return F.cross_entropy(model(batch[0]), batch[1])


def contestant(
    model: nn.Module, batch: tuple[torch.Tensor, torch.Tensor], measure: Measure | None
) -> Callable[[], None]:
    """A window, and the estimator's part in it."""
    accumulator = mb.Accumulator(model, loss_fn, micro_batch_size=len(batch[0]) // K, measure=measure)
    noise = mb.GradientNoiseScale()

    def window() -> None:
        report = accumulator.run(batch)
        if measure is not None:
            noise.observe(report)

    return window


def cost(rounds: int) -> dict[str, object]:
    """Ratios to the window without measuring: quartiles over the rounds."""
    torch.manual_seed(0)
    model, batch = small_transformer()
    contestants = {
        "none": contestant(model, batch, None),
        "none again": contestant(model, batch, None),
        "norms": contestant(model, batch, "norms"),
        "squares": contestant(model, batch, "squares"),
    }
    seconds = in_turns(contestants, rounds, before=model.zero_grad, warmup=5)
    base = seconds["none"]
    result: dict[str, object] = {"ms per micro-batch": round(statistics.median(base) / K * 1e3, 3)}
    return result | {name: quartiles(seconds[name], base) for name in ("none again", "norms", "squares")}


def sequences(n: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Each token is 3 times the one before plus 1 or, every fourth time, anything: (n, 64) inputs and targets."""
    tokens = torch.randint(0, 256, (n, 65))
    for t in range(1, 65):
        follows = torch.rand(n) < 0.75
        tokens[follows, t] = (3 * tokens[follows, t - 1] + 1) % 256
    return tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous()


def by_cut(num_windows: int) -> dict[str, object]:
    """After 40 updates the parameters stay, and the same windows are measured in every cut."""
    torch.manual_seed(0)
    model = SmallTransformer()
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    accumulator = mb.Accumulator(model, loss_fn, micro_batch_size=16)
    for _ in range(40):
        mb.apply_update(optimizer, accumulator.run(sequences(64)))
    noises = {size: mb.GradientNoiseScale(half_life=None) for size in CUTS}
    for _ in range(num_windows):
        batch = sequences(64)
        for size, noise in noises.items():
            model.zero_grad()
            noise.observe(mb.Accumulator(model, loss_fn, micro_batch_size=size, measure="norms").run(batch))
    estimates = {size: noise.estimate() for size, noise in noises.items()}
    table = {
        f"K = {64 // size}": {
            "noise scale": round(e.noise_scale, 2),
            "interval": [round(e.low, 2), round(e.high, 2)],
            "variance": round(e.variance, 5),
            "squared mean": round(e.squared_mean, 6),
        }
        for size, e in estimates.items()
    }
    agree = all(a.low <= b.high and b.low <= a.high for a in estimates.values() for b in estimates.values())
    return {"windows": num_windows, "cuts": table, "all intervals overlap": agree}


def main() -> None:
    """Measure both, print them, and write them with machine and versions if --output says where."""
    arguments = parsed(parser(__doc__, rounds=200, windows=40))
    keep_memory()
    results = machine() | {
        "K": K,
        "rounds": arguments.rounds,
        "cost": cost(arguments.rounds),
        "by cut": by_cut(arguments.windows),
    }
    print("cost", results["cost"], "(quartiles of the ratio)")
    print("by cut", json.dumps(results["by cut"], indent=2))
    write(results, arguments.output)


if __name__ == "__main__":
    main()
