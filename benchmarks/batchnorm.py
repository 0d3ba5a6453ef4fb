"""What batch normalisation over a whole window costs, in time and memory: python benchmarks/batchnorm.py.

Every contestant trains the same ResNet on the same batch; all but the first two have the gradient of the full batch:

    full batch          one forward and backward, as torch does it
    micro-batches       K micro-batches, each normalised by itself (`batch_norm="micro_batch"`): the wrong gradient
    pooled              the same with running statistics of the whole window (`batch_norm="pooled"`)
    exact, one piece    `batch_norm="exact"`, the window in one micro-batch, its saved tensors in host memory
    exact, K            `batch_norm="exact"` with K micro-batches, in lockstep

Peaks are by the meter (`macrobatch.peak_memory`: what a device would hold), in a run of their own; host memory is what
lies offloaded beside it. Times are medians over rounds, in each of which every contestant runs once in a random order,
of the ratio to the micro-batches of the same round, with quartiles. Results with machine and versions:
benchmarks/results/batchnorm.json, from which the table in docs/batchnorm.md is made.
"""

import random
import statistics
from collections.abc import Callable
from dataclasses import dataclass

import torch
from common import in_turns, machine, parsed, parser, quartiles, write
from torch import Tensor, nn
from torch.nn import functional as F

import macrobatch as mb

K = 8
Batch = tuple[Tensor, Tensor]


class Block(nn.Module):
    """Two 3 x 3 convolutions, each normalised, and a way around them; `stride` halves height and width."""

    def __init__(self, channels: int, out: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(channels, out, 3, stride, padding=1, bias=False)
        self.norm1 = nn.BatchNorm2d(out)
        self.conv2 = nn.Conv2d(out, out, 3, padding=1, bias=False)
        self.norm2 = nn.BatchNorm2d(out)
        self.around = nn.Sequential()
        if stride > 1:
            self.around = nn.Sequential(nn.Conv2d(channels, out, 1, stride, bias=False), nn.BatchNorm2d(out))

    def forward(self, x: Tensor) -> Tensor:
        """x: (N, channels, H, W) to (N, out, H / stride, W / stride)."""
        y = F.relu(self.norm1(self.conv1(x)), inplace=True)
        return F.relu(self.norm2(self.conv2(y)) + self.around(x), inplace=True)


def resnet20(width: int) -> nn.Module:
    """The ResNet-20 for small images: 3 stages of 3 blocks, 21 normalisations; `width` channels in the first stage."""
    layers: list[nn.Module] = [nn.Conv2d(3, width, 3, padding=1, bias=False), nn.BatchNorm2d(width), nn.ReLU(True)]
    channels = width
    for stage in range(3):
        for i in range(3):
            out = width * 2**stage
            layers.append(Block(channels, out, 2 if stage and i == 0 else 1))
            channels = out
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(channels, 10))


def loss_fn(model: nn.Module, batch: Batch) -> Tensor:
    """The mean cross-entropy over samples."""
    return F.cross_entropy(model(batch[0]), batch[1])


@dataclass
class Contestant:
    """A way to the gradient of a batch, and what lay on the host meanwhile."""

    name: str
    run: Callable[[], object]
    offloaded: Callable[[], int]


def contestants(model: nn.Module, batch: Batch) -> list[Contestant]:
    """All of them, on one model."""
    n = len(batch[1])

    def full() -> None:
        loss_fn(model, batch).backward()

    def accumulated(name: str, size: int, batch_norm: mb.accumulator.BatchNorm) -> Contestant:
        accumulator = mb.Accumulator(model, loss_fn, micro_batch_size=size, batch_norm=batch_norm)
        return Contestant(name, lambda: accumulator.run(batch), lambda: accumulator.offloaded_bytes)

    return [
        Contestant("full batch", full, lambda: 0),
        accumulated("micro-batches", n // K, "micro_batch"),
        accumulated("pooled", n // K, "pooled"),
        accumulated("exact, one piece", n, "exact"),
        *(accumulated(f"exact, {k}", n // k, "exact") for k in (2, 4, 8, 16)),
    ]


def peaks(model: nn.Module, all_of_them: list[Contestant]) -> dict[str, dict[str, int]]:
    """Bytes by the meter and on the host, after a first run that allocates gradients."""
    found = {}
    for contestant in all_of_them:
        model.zero_grad()
        contestant.run()
        model.zero_grad()
        found[contestant.name] = {"peak": mb.peak_memory(contestant.run), "host": contestant.offloaded()}
    return found


def measure(batch_size: int, width: int, side: int, rounds: int) -> list[dict[str, object]]:
    """One row for each contestant."""
    torch.manual_seed(0)
    random.seed(0)
    model = resnet20(width)
    batch = torch.randn(batch_size, 3, side, side), torch.randint(0, 10, (batch_size,))
    all_of_them = contestants(model, batch)
    memory = peaks(model, all_of_them)
    seconds = in_turns({c.name: c.run for c in all_of_them}, rounds, before=model.zero_grad)
    native, rows = memory["full batch"]["peak"], []
    for name, measured in memory.items():
        rows.append(
            {
                "name": name,
                "peak": measured["peak"],
                "peak of full batch": round(measured["peak"] / native, 3),
                "host": measured["host"],
                "time": quartiles(seconds[name], seconds["micro-batches"]),
                "seconds": round(statistics.median(seconds[name]), 3),
            }
        )
    return rows


def table(rows: list[dict[str, object]]) -> str:
    """The rows for people, in Markdown."""
    lines = ["| way | peak | of the full batch's | on the host | time, of micro-batches |", "|---|---|---|---|---|"]
    for row in rows:
        low, middle, high = row["time"]  # type: ignore[misc]
        peak, host = (f"{row[key] / 1e6:.0f} MB" for key in ("peak", "host"))  # type: ignore[operator]
        share, speed = f"{100 * row['peak of full batch']:.0f}%", f"{middle:.2f} ({low:.2f} to {high:.2f})"  # type: ignore[operator]
        lines.append(f"| {row['name']} | {peak} | {share} | {host} | {speed} |")
    return "\n".join(lines)


def main() -> None:
    """Measure, print the table, and write the rows with machine and versions if --output says where."""
    arguments = parsed(parser(__doc__, batch_size=128, width=16, side=32, rounds=15))
    rows = measure(arguments.batch_size, arguments.width, arguments.side, arguments.rounds)
    print(table(rows))
    model = f"ResNet-20, width {arguments.width}, {arguments.batch_size} x 3 x {arguments.side}^2, float32"
    write(machine() | {"model": model, "rounds": arguments.rounds, "rows": rows}, arguments.output)


if __name__ == "__main__":
    main()
