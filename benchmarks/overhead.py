"""What macrobatch costs over the hand-written loop, per window of K = 8 micro-batches: python benchmarks/overhead.py.

The cost is a time, not a share: about the same for every model, so it is measured from micro-batches of under a
millisecond (a perceptron) to those of the built-in task `code-lm` at its defaults.

Three contestants run the same windows in turn, in an order drawn anew for each round: the loop everybody writes by hand
(`(loss / K).backward()`), the same loop again (the floor: what noise alone shows), and `Accumulator.run`. Each runs
two windows and the second is timed, as in training a window follows one of its own kind. The reported
ratio is the median over rounds of time / time of the hand-written loop in the same round, with its quartiles.
The optimizer's step is not timed: it is the same for all. The C library is told to keep the memory that is freed:
otherwise page faults, which depend on what lies where in the heap, move every contestant by several percent.
Results with machine and versions: benchmarks/results/.
"""

import os
import statistics
import sys
from collections.abc import Callable
from functools import partial

import torch
from common import in_turns, machine, parsed, parser, quartiles, write
from torch import nn
from torch.nn import functional as F

import macrobatch as mb

K = 8
KEEP_MEMORY = {
    "MALLOC_TRIM_THRESHOLD_": str(2**30),
    "MALLOC_MMAP_THRESHOLD_": str(2**30),
    "MALLOC_TOP_PAD_": str(2**27),
}


def tiny_mlp(num_samples: int = 32) -> tuple[nn.Module, tuple[torch.Tensor, torch.Tensor]]:
    """A three-layer perceptron: about a millisecond for a micro-batch of 32."""
    model = nn.Sequential(nn.Linear(256, 512), nn.ReLU(), nn.Linear(512, 512), nn.ReLU(), nn.Linear(512, 10))
    return model, (torch.randn(num_samples * K, 256), torch.randint(0, 10, (num_samples * K,)))


class SmallTransformer(nn.Module):
    """Two encoder layers of width 64, as in the built-in task `code-lm`; one class for each token."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(256, 64)
        layer = nn.TransformerEncoderLayer(64, 4, 256, dropout=0.0, batch_first=True, norm_first=True)
        self.encoder = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
        self.head = nn.Linear(64, 256)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        """Tokens (B, T) to scores."""
        return self.head(self.encoder(self.embedding(tokens))).transpose(1, 2)  # (B, 256, T), as cross_entropy wants


def small_transformer(
    num_sequences: int = 16, num_tokens: int = 128
) -> tuple[nn.Module, tuple[torch.Tensor, torch.Tensor]]:
    """The size of `code-lm` at its defaults: micro-batches of 16 sequences of 128 tokens."""
    tokens = torch.randint(0, 256, (num_sequences * K, num_tokens + 1))
    return SmallTransformer(), (tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous())


CASES: dict[str, Callable[[], tuple[nn.Module, tuple[torch.Tensor, torch.Tensor]]]] = {
    "tiny MLP, 32 samples": tiny_mlp,
    "tiny MLP, 64 samples": partial(tiny_mlp, 64),
    "tiny MLP, 128 samples": partial(tiny_mlp, 128),
    "small transformer, 8 x 64 tokens": partial(small_transformer, 8, 64),
    "small transformer, 16 x 128 tokens": small_transformer,
}


def hand_written(model: nn.Module, batch: tuple[torch.Tensor, torch.Tensor]) -> Callable[[], None]:
    """The loop of every tutorial, over micro-batches cut beforehand."""
    micro_batches = list(zip(batch[0].chunk(K), batch[1].chunk(K), strict=True))

    def window() -> None:
        for inputs, targets in micro_batches:
            (F.cross_entropy(model(inputs), targets) / K).backward()

    return window


def macrobatch(model: nn.Module, batch: tuple[torch.Tensor, torch.Tensor]) -> Callable[[], None]:
    """The same micro-batches by `Accumulator.run`, counting terms, recovery and reporting included."""
    accumulator = mb.Accumulator(model, lambda model, b: F.cross_entropy(model(b[0]), b[1]))
    window = mb.Window(list(zip(batch[0].chunk(K), batch[1].chunk(K), strict=True)))
    return lambda: accumulator.run(window) and None


def measure(case: Callable[[], tuple[nn.Module, tuple[torch.Tensor, torch.Tensor]]], rounds: int) -> dict[str, object]:
    """Ratios to the hand-written loop: median and quartiles over the rounds."""
    torch.manual_seed(0)
    model, batch = case()
    contestants = {
        "hand-written": hand_written(model, batch),
        "hand-written again": hand_written(model, batch),
        "macrobatch": macrobatch(model, batch),
    }
    # Each runs twice and the first is not timed: in training, a window follows one of its own kind.
    seconds = in_turns(contestants, rounds, before=model.zero_grad, warmup=5, untimed=1)
    base = seconds["hand-written"]
    result: dict[str, object] = {"ms per micro-batch": round(statistics.median(base) / K * 1e3, 3)}
    return result | {name: quartiles(seconds[name], base) for name in ("hand-written again", "macrobatch")}


def keep_memory() -> None:
    """The process, begun anew if need be, keeps what is freed: page faults come only once."""
    if sys.platform == "linux" and "MALLOC_TRIM_THRESHOLD_" not in os.environ:
        os.execve(sys.executable, [sys.executable, *sys.argv], os.environ | KEEP_MEMORY)


def main() -> None:
    """Measure both cases, print them, and write them with machine and versions if --output says where."""
    arguments = parsed(parser(__doc__, rounds=200))
    keep_memory()
    results = machine() | {"K": K, "rounds": arguments.rounds}
    for name, case in CASES.items():
        results[name] = measure(case, arguments.rounds)
        print(name, results[name], "(quartiles of the ratio)", flush=True)
    write(results, arguments.output)


if __name__ == "__main__":
    main()
