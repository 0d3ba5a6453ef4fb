"""Which samples each update sees: one shuffled pass over the data after the other, cut into effective batches."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.utils.data import Dataset


@dataclass(frozen=True)
class UpdateIndices:
    """The sample indices of each update, the same for the same seed; a batch_sampler for a DataLoader.

    `sizes`: the effective batch sizes. What is left of a pass and too little for the next of them is not drawn.
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
            if len(order) < size:
                order = torch.randperm(self.data_size, generator=generator).tolist()
            yield order[:size]
            order = order[size:]


def take(dataset: Dataset[Any], indices: Sequence[int]) -> list[Any]:
    """The samples at `indices`, in that order."""
    return [dataset[index] for index in indices]
