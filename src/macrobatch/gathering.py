"""The outputs of micro-batches as those of one batch: checked, joined over micro-batches, gathered over ranks."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from macrobatch.containers import is_opaque, leaves
from macrobatch.distributed import Ranks
from macrobatch.structure import Nested, map_tensors, tensors


@dataclass(frozen=True)
class Outputs:
    """Outputs of several samples: `rows`, the tensors with one row for each, and the structure that they stand in.

    `template`: the structure with tensors of zero rows; None for a rank without samples.
    """

    template: Nested
    rows: list[Tensor]
    num_samples: int

    @property
    def nested(self) -> Nested:
        """The structure with these rows in it."""
        rows = iter(self.rows)
        return map_tensors(self.template, lambda _: next(rows))

    def detached(self) -> "Outputs":
        """The same without a graph."""
        return Outputs(self.template, [row.detach() for row in self.rows], self.num_samples)


def outputs_of(returned: Nested, num_samples: int) -> Outputs:
    """What `encode` returned for a micro-batch of `num_samples`, checked: every tensor has one row for each sample."""
    for path, leaf in leaves(returned, "outputs"):
        if isinstance(leaf, np.ndarray) or is_opaque(leaf):
            kind = "an array" if isinstance(leaf, np.ndarray) else f"a tensor of layout {leaf.layout}"
            raise ValueError(f"{path} is {kind}: encode returns plain tensors with one row for each sample")
        if isinstance(leaf, Tensor) and (not leaf.ndim or leaf.shape[0] != num_samples):
            raise ValueError(
                f"{path} has shape {tuple(leaf.shape)} for a micro-batch of {num_samples} samples: every output has "
                "one row for each sample. A scalar such as a temperature belongs into the loss_fn, which is given "
                "the model; what compares samples (logits of all pairs) is computed there, too"
            )
    rows = list(tensors(returned))
    if not rows:
        raise ValueError(f"encode returned a {type(returned).__name__} without a tensor: return the model's outputs")
    return Outputs(map_tensors(returned, lambda row: row.new_empty((0, *row.shape[1:]))), rows, num_samples)


def joined(parts: Sequence[Outputs]) -> Outputs:
    """The outputs of all parts in order. ValueError where they differ in structure, shape or dtype."""
    for part in parts[1:]:
        if _signature(part) != _signature(parts[0]):
            raise ValueError(
                f"the outputs of two micro-batches differ: {_signature(parts[0])} and {_signature(part)} (shape "
                "without the batch dimension, dtype). Pad them to one length, pool them, or return what they share"
            )
    rows = [torch.cat([part.rows[j] for part in parts]) for j in range(len(parts[0].rows))]
    return Outputs(parts[0].template, rows, sum(part.num_samples for part in parts))


def gathered(own: Outputs, ranks: Ranks) -> tuple[Outputs, slice]:
    """The outputs of all ranks in order of rank, and which rows are this rank's. The same on every rank.

    A rank without samples has an `Outputs` without rows. One exchange of sizes and shapes, one of rows for each tensor.
    """
    if ranks.size == 1:
        return own, slice(0, own.num_samples)
    theirs: list[tuple[int, Nested]] = [(0, None)] * ranks.size
    dist.all_gather_object(theirs, (own.num_samples, map_tensors(own.template, lambda t: t.cpu())), group=ranks.group)
    counts = [n for n, _ in theirs]
    with_rows = [template for n, template in theirs if n]
    signatures = [_signature(Outputs(template, list(tensors(template)), 0)) for template in with_rows]
    if any(signature != signatures[0] for signature in signatures):
        raise ValueError(f"the outputs of two ranks differ: {signatures} (shape without the batch dimension, dtype)")
    template, device = with_rows[0], own.rows[0].device if own.rows else ranks.device
    rows = [_all_rows(j, row, own, counts, ranks).to(device) for j, row in enumerate(tensors(template))]
    start = sum(counts[: ranks.rank])
    return Outputs(template, rows, sum(counts)), slice(start, start + own.num_samples)


def _all_rows(j: int, like: Tensor, own: Outputs, counts: list[int], ranks: Ranks) -> Tensor:
    """Tensor j of every rank, one after the other. Travels as bytes: every dtype is exact on every backend."""
    num_bytes = like.element_size() * math.prod(like.shape[1:])
    padded = torch.zeros(max(counts) * num_bytes, dtype=torch.uint8, device=ranks.device)
    if own.rows:
        padded[: own.num_samples * num_bytes] = own.rows[j].detach().contiguous().flatten().view(torch.uint8)
    everyone = [torch.empty_like(padded) for _ in counts]
    dist.all_gather(everyone, padded, group=ranks.group)
    parts = [theirs[: n * num_bytes] for theirs, n in zip(everyone, counts, strict=True)]
    return torch.cat(parts).view(like.dtype).view(sum(counts), *like.shape[1:])


def _signature(outputs: Outputs) -> list[tuple[tuple[int, ...], torch.dtype]]:
    return [(tuple(row.shape[1:]), row.dtype) for row in outputs.rows]
