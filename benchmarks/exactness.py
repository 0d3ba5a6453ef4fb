"""How far accumulated gradients are from the full batch's, case by case: python benchmarks/exactness.py.

For each case three gradients of the same samples, in float64: one backward over all of them in one piece (the truth),
the loop of most tutorials, `(mean / K).backward()`, and macrobatch, both over the same micro-batches. Reported is the
largest difference of an entry relative to the largest entry. Data are scikit-learn's handwritten digits and lines of
source from the standard library. The last rows are what macrobatch does not make exact either. --output writes the
results as JSON; those in the README are kept in benchmarks/results/exactness.json.
"""

import gc
import inspect
import json
import multiprocessing
import os
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from common import machine, parsed, parser, write
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.parallel import DistributedDataParallel

import macrobatch as mb
from macrobatch import structure

PADDING = -100
Gradients = list[Tensor]


@dataclass(frozen=True)
class Case:
    """One comparison: `mean` is the loss of a batch as one would write it, `loss_fn` the same for macrobatch."""

    name: str
    model: nn.Module
    micro_batches: list[Any]
    mean: Callable[[nn.Module, Any], Tensor]
    loss_fn: Callable[[nn.Module, Any], Any]
    accumulation_steps: int = 0  # what the textbook divides by; 0: the number of micro-batches
    options: dict[str, Any] = field(default_factory=dict)
    encode: Callable[[nn.Module, Any], Any] | None = None  # for a loss over all outputs of the window


def gradients_of(model: nn.Module) -> Gradients:
    """The gradients of the model, which then has none."""
    found = [p.grad for p in model.parameters() if p.grad is not None]
    model.zero_grad()
    return found


def error(mine: Gradients, truth: Gradients) -> float:
    """The largest difference of an entry relative to the largest entry; NaN if any is."""
    differences = torch.stack([(a - b).abs().max() for a, b in zip(mine, truth, strict=True)])
    return float(differences.max() / max(g.abs().max() for g in truth))


def full_batch(case: Case) -> Gradients:
    case.mean(case.model, structure.join(case.micro_batches)).backward()
    return gradients_of(case.model)


def textbook(case: Case) -> Gradients:
    steps = case.accumulation_steps or len(case.micro_batches)
    for micro_batch in case.micro_batches:
        (case.mean(case.model, micro_batch) / steps).backward()
    return gradients_of(case.model)


def macrobatch(case: Case) -> Gradients:
    if case.encode is None:
        accumulator = mb.Accumulator(case.model, case.loss_fn, **case.options)
    else:
        accumulator = mb.GatheredAccumulator(case.model, case.encode, case.loss_fn)
    accumulator.run(mb.Window(case.micro_batches))
    return gradients_of(case.model)


def measure(case: Case) -> dict[str, object]:
    truth = full_batch(case)
    errors = {"textbook": error(textbook(case), truth), "macrobatch": error(macrobatch(case), truth)}
    return {"case": case.name, **errors}


# ---- data and models


def digits(sizes: Sequence[int]) -> list[tuple[Tensor, Tensor]]:
    """Micro-batches of so many digits, in the order of the data set: pixels (n, 64) in 0..1, labels (n,)."""
    data = load_digits()
    batch = (torch.tensor(data.data[: sum(sizes)] / 16), torch.tensor(data.target[: sum(sizes)]))
    return structure.split(batch, sizes)


def classifier(norm: type[nn.Module] = nn.Identity) -> nn.Module:
    return nn.Sequential(nn.Linear(64, 32), norm(32), nn.ReLU(), nn.Linear(32, 10)).double()


def lines(num_micro_batches: int, size: int = 8, sort: bool = False) -> list[dict[str, Tensor]]:
    """Micro-batches of lines of source as bytes (size, 80), and the bytes that follow, PADDING beyond the line."""
    texts = [line.encode()[:81] for line in inspect.getsource(inspect).splitlines() if len(line) > 1]
    texts = texts[200 : 200 + num_micro_batches * size]
    inputs, targets = torch.zeros(len(texts), 80, dtype=torch.long), torch.full((len(texts), 80), PADDING)
    for row, text in enumerate(sorted(texts, key=len) if sort else texts):
        inputs[row, : len(text) - 1] = torch.tensor(list(text[:-1]))
        targets[row, : len(text) - 1] = torch.tensor(list(text[1:]))
    return structure.split({"inputs": inputs, "targets": targets}, [size] * num_micro_batches)


class NextByte(nn.Module):
    """A small recurrent network: logits (B, 256, T) for the byte after each of (B, T)."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding, self.memory = nn.Embedding(256, 16), nn.GRU(16, 32, batch_first=True)
        self.head = nn.Linear(32, 256)

    def forward(self, batch: dict[str, Tensor]) -> Tensor:
        """The logits for `batch["inputs"]`."""
        return self.head(self.memory(self.embedding(batch["inputs"]))[0]).transpose(1, 2)


def next_byte() -> nn.Module:
    return NextByte().double()


# ---- losses


def token_mean(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
    return F.cross_entropy(model(batch), batch["targets"], ignore_index=PADDING)


def token_sum(model: nn.Module, batch: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
    loss_sum = F.cross_entropy(model(batch), batch["targets"], ignore_index=PADDING, reduction="sum")
    return loss_sum, mb.valid_tokens(batch["targets"], PADDING)


def two_sums(model: nn.Module, batch: dict[str, Tensor]) -> dict[str, Tensor]:
    """A mean over tokens, and a mean over lines of each line's squared log-partition function."""
    logits = model(batch)
    squares = (logits.logsumexp(1) ** 2 * (batch["targets"] != PADDING)).sum()
    loss_sum = F.cross_entropy(logits, batch["targets"], ignore_index=PADDING, reduction="sum")
    return {"tokens": loss_sum, "lines": 0.01 * squares}


def two_counts(batch: dict[str, Tensor]) -> dict[str, Tensor | int]:
    return {"tokens": mb.valid_tokens(batch["targets"], PADDING), "lines": len(batch["targets"])}


def two_means(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
    sums, counts = two_sums(model, batch), two_counts(batch)
    return sums["tokens"] / counts["tokens"] + sums["lines"] / counts["lines"]


def two_views(model: nn.Module, batch: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    """Each image twice, with different pixels left out, as unit vectors."""
    images, _ = batch
    left = F.normalize(model(images * (torch.arange(64) % 2)), dim=1)
    return left, F.normalize(model(images * (torch.arange(64) % 3 > 0)), dim=1)


def info_nce(views: tuple[Tensor, Tensor]) -> Tensor:
    """Which of the second views is of the same image as this first one."""
    left, right = views
    return F.cross_entropy(left @ right.T / 0.1, torch.arange(len(left)))


# ---- cases


def cases() -> Iterator[Case]:
    """The cases of one process; the seed is set anew for each."""
    plain, by_digit = nn.CrossEntropyLoss(), nn.CrossEntropyLoss(weight=torch.logspace(0, 1, 10, dtype=torch.float64))

    def digit_case(name: str, sizes: Sequence[int], criterion: nn.Module = plain, **others: Any) -> Case:
        torch.manual_seed(0)
        model = others.pop("model", classifier)()
        mean = others.pop("mean", lambda model, batch: criterion(model(batch[0]), batch[1]))
        return Case(name, model, digits(sizes), mean, others.pop("loss_fn", mb.sum_loss(criterion)), **others)

    def line_case(name: str, micro_batches: list[dict[str, Tensor]], **others: Any) -> Case:
        torch.manual_seed(0)
        return Case(name, next_byte(), micro_batches, **({"mean": token_mean, "loss_fn": token_sum} | others))

    masked = lines(8)
    masked[3]["targets"].fill_(PADDING)
    yield digit_case("equal micro-batches, mean over samples", [32] * 4)
    yield digit_case("smaller last micro-batch: 32, 32, 32, 4", [32, 32, 32, 4])
    yield digit_case("last window has 2 of 4 micro-batches", [32, 32], accumulation_steps=4)
    yield line_case("mean over valid tokens", lines(8))
    yield line_case("the same, one micro-batch fully masked", masked)
    yield digit_case("class-weighted cross-entropy, weights 1 to 10", [8] * 8, by_digit)
    yield line_case(
        "two denominators: tokens and lines",
        lines(8),
        mean=two_means,
        loss_fn=two_sums,
        options={"count": two_counts},
    )
    yield digit_case(
        "BatchNorm in training mode",
        [32] * 4,
        model=lambda: classifier(nn.BatchNorm1d),
        options={"batch_norm": "exact"},
    )
    yield digit_case(
        "InfoNCE with negatives in the batch",
        [32] * 4,
        mean=lambda model, batch: info_nce(two_views(model, batch)),
        loss_fn=lambda model, outputs, window: info_nce(outputs),
        encode=two_views,
    )


def rank_errors(rank: int, folder: str) -> None:
    """One of two processes with lines of its own, short ones here and long ones there; rank 0 writes the errors."""
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/start", rank=rank, world_size=2)
    errors = errors_over_ranks(rank)
    gc.collect()  # DDP goes before its group: docs/distributed.md, limits
    dist.destroy_process_group()
    if rank == 0:
        Path(folder, "errors").write_text(json.dumps(errors))


def errors_over_ranks(rank: int) -> dict[str, float]:
    torch.manual_seed(0)
    everything = lines(8, sort=True)
    model, micro_batches = next_byte(), everything[4 * rank : 4 * rank + 4]
    token_mean(model, structure.join(everything)).backward()
    truth, ddp = gradients_of(model), DistributedDataParallel(model)
    for j, micro_batch in enumerate(micro_batches):
        ddp.require_backward_grad_sync = j == 3  # what no_sync() does
        (token_mean(ddp, micro_batch) / 4).backward()
    errors = {"textbook": error(gradients_of(model), truth)}
    mb.Accumulator(ddp, token_sum).run(mb.Window(micro_batches))
    return errors | {"macrobatch": error(gradients_of(model), truth)}


def measure_two_ranks() -> dict[str, object]:
    with tempfile.TemporaryDirectory() as folder:
        start = multiprocessing.get_context("spawn")
        processes = [start.Process(target=rank_errors, args=(rank, folder)) for rank in range(2)]
        for process in processes:
            process.start()
        for process in processes:
            process.join()
        failed = [rank for rank, process in enumerate(processes) if process.exitcode]
        if failed:
            raise RuntimeError(f"rank {failed[0]} of the two failed: its error is above")
        errors = json.loads(Path(folder, "errors").read_text())
    return {"case": "two ranks (DDP), different numbers of tokens", **errors}


def measure_bfloat16() -> dict[str, object]:
    """512 micro-batches of 2 digits, powers of two: only the precision in which gradients are added up differs."""
    torch.manual_seed(0)
    model = classifier().bfloat16()
    micro_batches = [(images.bfloat16(), labels) for images, labels in digits([2] * 512)]
    mean, steps = nn.CrossEntropyLoss(), len(micro_batches)
    truth = [torch.zeros(p.shape, dtype=torch.float64) for p in model.parameters()]
    for images, labels in micro_batches:
        (mean(model(images), labels) / steps).backward()
        truth = [total + g for total, g in zip(truth, gradients_of(model), strict=True)]
    for images, labels in micro_batches:
        (mean(model(images), labels) / steps).backward()
    errors = {"textbook": error(gradients_of(model), truth)}
    mb.Accumulator(model, mb.sum_loss(mean), grad_dtype=torch.float32).run(mb.Window(micro_batches))
    errors["macrobatch"] = error(gradients_of(model), truth)
    return {"case": "bfloat16 parameters, 512 micro-batches", **errors}


def table(rows: Sequence[dict[str, Any]]) -> str:
    """The rows as a table in Markdown."""
    head = ["| case | textbook loop | macrobatch |", "|---|---|---|"]
    return "\n".join(head + [f"| {r['case']} | {r['textbook']:.2g} | {r['macrobatch']:.2g} |" for r in rows])


def main() -> None:
    """Measure all cases, print a table, and write the results if --output says where."""
    arguments = parsed(parser(__doc__))
    rows = [measure(case) for case in cases()]
    rows += [measure_two_ranks(), measure_bfloat16()]
    print(table(rows))
    write(machine() | {"rows": rows}, arguments.output)


if __name__ == "__main__":
    main()
