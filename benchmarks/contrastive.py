"""What a loss over all outputs of a window costs with m of K graphs kept: python benchmarks/contrastive.py.

Two-tower InfoNCE on a small transformer, K = 8 micro-batches. All contestants run the same window in turn, in an order
drawn anew for each round:

- `parts`: K forward-backwards, and apart from them K forwards without graphs, and the loss with its gradients;
- `by hand`: cached gradients as published, every forward twice;
- `m = 0, 1, 2, 4, 8`: GatheredAccumulator with that many graphs kept;
- `full batch`: the same samples in one forward and backward;
- `plain accumulation`: K losses over one micro-batch each, whose gradient is wrong (it is shown how much).

Expected for m: K forward-backwards + (K - m) forwards + the loss, each as measured in the same round. Reported are the
medians over rounds, quartiles of the ratio to the expectation, peaks of memory by the meter (measured apart), and the
error of the gradient against the full batch. Results with machine and versions: benchmarks/results/.
"""

import statistics
from collections.abc import Callable
from typing import Any

import torch
from common import in_turns, machine, parsed, parser, quartiles, write
from torch import Tensor, nn
from torch.nn import functional as F

import macrobatch as mb

K = 8
KEEPS = (0, 1, 2, 4, 8)
Batch = tuple[Tensor, Tensor]


class Towers(nn.Module):
    """Two encoders over bytes, mean-pooled, and a temperature."""

    def __init__(self, width: int, layers: int) -> None:
        super().__init__()
        self.left, self.right = self.tower(width, layers), self.tower(width, layers)
        self.log_scale = nn.Parameter(torch.tensor(2.0))

    @staticmethod
    def tower(width: int, layers: int) -> nn.ModuleList:
        """A byte embedding and an encoder."""
        layer = nn.TransformerEncoderLayer(width, 4, 4 * width, dropout=0.1, batch_first=True, norm_first=True)
        return nn.ModuleList(
            [nn.Embedding(256, width), nn.TransformerEncoder(layer, layers, enable_nested_tensor=False)]
        )

    def embed(self, tower: nn.ModuleList, tokens: Tensor) -> Tensor:
        """Tokens (B, T) to vectors of length 1 (B, width)."""
        return F.normalize(tower[1](tower[0](tokens)).mean(1), dim=-1)


def encode(model: Towers, batch: Batch) -> Batch:
    return model.embed(model.left, batch[0]), model.embed(model.right, batch[1])


def info_nce(model: Towers, outputs: Batch, window: Any) -> Tensor:
    logits = outputs[0] @ outputs[1].T * model.log_scale.exp()
    targets = torch.arange(len(logits))
    return (F.cross_entropy(logits, targets) + F.cross_entropy(logits.T, targets)) / 2


class Case:
    """A model, its window, and every way to run it; each leaves gradients in `p.grad`."""

    def __init__(self, micro_batch_size: int, width: int, layers: int, length: int) -> None:
        torch.manual_seed(0)
        self.model = Towers(width, layers)
        self.batch = tuple(torch.randint(0, 256, (K * micro_batch_size, length)) for _ in range(2))
        self.parts = list(zip(*(side.split(micro_batch_size) for side in self.batch), strict=True))
        self.outputs = [F.normalize(torch.randn(K * micro_batch_size, width), dim=-1) for _ in range(2)]
        self.gradients = list(zip(*(torch.randn_like(o).split(micro_batch_size) for o in self.outputs), strict=True))
        self.accumulators = {
            m: mb.GatheredAccumulator(self.model, encode, info_nce, micro_batch_size=micro_batch_size, keep_graphs=m)
            for m in KEEPS
        }

    def forward_backwards(self) -> None:
        """K forward-backwards from given gradients of the outputs."""
        for part, gradients in zip(self.parts, self.gradients, strict=True):
            torch.autograd.backward(encode(self.model, part), list(gradients))

    def forwards(self) -> None:
        """K forwards without graphs."""
        with torch.no_grad():
            for part in self.parts:
                encode(self.model, part)

    def loss(self) -> None:
        """The loss and its gradients by given outputs."""
        leaves = tuple(output.detach().requires_grad_() for output in self.outputs)
        info_nce(self.model, leaves, None).backward()

    def by_hand(self) -> None:
        """Cached gradients as published, with dropout drawn again."""
        states, outputs = [], []
        with torch.no_grad():
            for part in self.parts:
                states.append(torch.get_rng_state())
                outputs.append(encode(self.model, part))
        leaves = tuple(torch.cat(side).requires_grad_() for side in zip(*outputs, strict=True))
        info_nce(self.model, leaves, None).backward()
        size = len(outputs[0][0])
        for j, (part, state) in enumerate(zip(self.parts, states, strict=True)):
            torch.set_rng_state(state)
            rows = slice(j * size, (j + 1) * size)
            torch.autograd.backward(encode(self.model, part), [leaf.grad[rows] for leaf in leaves])

    def full_batch(self) -> None:
        """All samples in one piece."""
        info_nce(self.model, encode(self.model, self.batch), None).backward()

    def plain_accumulation(self) -> None:
        """The textbook loop: K losses over one micro-batch each."""
        for part in self.parts:
            (info_nce(self.model, encode(self.model, part), None) / K).backward()

    def contestants(self) -> dict[str, Callable[[], Any]]:
        """Every way by its name."""
        ways: dict[str, Callable[[], Any]] = {
            "forward-backwards": self.forward_backwards,
            "forwards": self.forwards,
            "loss": self.loss,
            "by hand": self.by_hand,
            "full batch": self.full_batch,
            "plain accumulation": self.plain_accumulation,
        }
        for m, accumulator in self.accumulators.items():
            ways[f"m = {m}"] = lambda accumulator=accumulator: accumulator.run(self.batch)
        return ways


def peaks(case: Case) -> dict[str, int]:
    """For each contestant the bytes at its peak, parameters and gradients included."""
    found = {}
    for name, way in case.contestants().items():
        case.model.zero_grad()
        with mb.MemoryMeter() as meter:
            way()
        found[name] = meter.peak
    case.model.zero_grad()
    return found


def errors(case: Case) -> dict[str, float]:
    """The largest difference to the full batch's gradient over its largest entry; in float64, without dropout."""
    model, found = case.model.double().eval(), {}
    ways = case.contestants()
    expected: list[Tensor] = []
    for name in ("full batch", "by hand", "plain accumulation", *(f"m = {m}" for m in KEEPS)):
        model.zero_grad()
        ways[name]()
        mine = [p.grad for p in model.parameters() if p.grad is not None]
        expected = expected or [g.clone() for g in mine]
        largest = max(float(g.abs().max()) for g in expected)
        found[name] = max(float((a - b).abs().max()) for a, b in zip(mine, expected, strict=True)) / largest
    return found


def of_expected(taken: dict[str, list[float]], m: int) -> list[float]:
    """Quartiles over rounds of the time with m graphs over what it should take."""
    columns = zip(taken["forward-backwards"], taken["forwards"], taken["loss"], strict=True)
    return quartiles(taken[f"m = {m}"], [both + (K - m) / K * forward + loss for both, forward, loss in columns])


ROWS = {"full batch": "full batch", "plain accumulation (wrong)": "plain accumulation"}
ROWS |= {"cached gradients by hand": "by hand"} | {f"m = {m}": f"m = {m}" for m in KEEPS}


def table(results: dict[str, Any]) -> str:
    """Time, expected time, peak and error of each way, in Markdown."""
    expected, found = results["over the expected time"], []
    for name, way in ROWS.items():
        time_ratio = results["milliseconds"][way] / results["milliseconds"]["by hand"]
        low, middle, high = expected.get(way, [0, 0, 0])
        of_expected = f"{middle:.3f} ({low:.2f} to {high:.2f})" if middle else ""
        peak, error = results["peak MB"][way], results["gradient error"][way]
        found.append(f"| {name} | {time_ratio:.2f} | {of_expected} | {peak:.1f} MB | {error:.0e} |")
    head = "| way | time, of cached gradients by hand | of the expected | peak | error of the gradient |"
    return "\n".join([head, "|---|---|---|---|---|", *found])


def main() -> None:
    """Measure, print, and write with machine and versions if --output says where."""
    arguments = parsed(parser(__doc__, rounds=40, micro_batch_size=16, width=64, layers=2, length=48))
    case = Case(arguments.micro_batch_size, arguments.width, arguments.layers, arguments.length)
    taken = in_turns(case.contestants(), arguments.rounds, before=case.model.zero_grad, warmup=2)
    bytes_ = peaks(case)
    results = machine() | {
        "case": {key: value for key, value in vars(arguments).items() if key != "output"} | {"K": K},
        "milliseconds": {name: round(statistics.median(s) * 1e3, 2) for name, s in taken.items()},
        "over the expected time": {f"m = {m}": of_expected(taken, m) for m in KEEPS},
        "over by hand": {f"m = {m}": quartiles(taken[f"m = {m}"], taken["by hand"])[1] for m in KEEPS},
        "peak MB": {name: round(num_bytes / 1e6, 3) for name, num_bytes in bytes_.items()},
        "gradient error": {name: float(f"{error:.2g}") for name, error in errors(case).items()},
    }
    for name, value in results.items():
        print(f"{name}: {value}")
    print(table(results))
    write(results, arguments.output)


if __name__ == "__main__":
    main()
