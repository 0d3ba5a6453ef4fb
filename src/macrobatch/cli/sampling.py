"""Which samples each update sees: one shuffled pass over the data after the other, cut into effective batches."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.utils.data import Dataset


@dataclass(frozen=True)
class UpdateIndices:
    """The sample indices of each update, the same for the same seed; a batch_sampler for a DataLoader.

    `sizes`: the effective batch sizes, as `update_sizes` gives them.
    """

    data_size: int
    sizes: Sequence[int]
    seed: int

    def __len__(self) -> int:
        return len(self.sizes)

    def __iter__(self) -> Iterator[list[int]]:
        generator = torch.Generator().manual_seed(self.seed)
        order: list[int] = []
        for size in self.sizes:
            if not order:
                order = torch.randperm(self.data_size, generator=generator).tolist()
            yield order[:size]
            order = order[size:]


def update_sizes(
    data_size: int,
    batch_size: int,
    *,
    updates: int | None = None,
    epochs: int | None = None,
    samples: int | None = None,
) -> list[int]:
    """Effective batch sizes until one of the limits: `batch_size` each, less at the end of an epoch and of the samples.

    >>> update_sizes(10, 4, epochs=2), update_sizes(10, 4, updates=2), update_sizes(10, 4, samples=7)
    ([4, 4, 2, 4, 4, 2], [4, 4], [4, 3])
    """
    if (updates, epochs, samples).count(None) != 2:
        raise ValueError("give one of updates, epochs and samples")
    remaining = samples if samples is not None else data_size * epochs if epochs is not None else None
    sizes: list[int] = []
    left_in_epoch = data_size
    while len(sizes) < updates if updates is not None else remaining:
        size = min(batch_size, left_in_epoch, batch_size if remaining is None else remaining)
        sizes.append(size)
        left_in_epoch = left_in_epoch - size or data_size
        remaining = None if remaining is None else remaining - size
    return sizes


def take(dataset: Dataset[Any], indices: Sequence[int]) -> list[Any]:
    """The samples at `indices`, in that order."""
    return [dataset[index] for index in indices]
