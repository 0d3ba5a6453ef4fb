"""Nested structures of tensors, cut along the batch dimension and joined again.

A batch is any nesting of mappings, dataclasses, named tuples, lists and tuples around tensors with the batch dimension
first. Lists of batch length are cut between their elements (strings, images of unlike size, records). Every other leaf
(a string, a flag, a 0-d tensor) is shared by all parts.
"""

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from macrobatch.containers import Nested, children, is_rows, map_tensors, rebuild, tensors
from macrobatch.samples import fits, lists_of_samples, misfit_message, num_samples, rows_of_record

__all__ = ["Nested", "cut", "even_sizes", "join", "map_tensors", "num_samples", "split", "tensors"]


def split(batch: Nested, sizes: Sequence[int], *, n: int | None = None) -> list[Nested]:
    """`len(sizes)` consecutive parts of `batch`, part j with `sizes[j]` samples; tensors are views, nothing is copied.

    Each leaf is split once. `n` is `num_samples(batch)`, where that is known already. Raises ValueError if the sizes do
    not add up to the batch.
    """
    if n is None:
        n = num_samples(batch)
    elif rows_of_record(batch) != n and not fits(batch, n):
        raise ValueError(f"{misfit_message(batch)} (num_samples= says {n}; own batches need cut= too)")
    if sum(sizes) != n or min(sizes, default=0) < 0:
        raise ValueError(f"sizes {list(sizes)} do not divide the batch, which has {n} samples")
    if not sizes:
        return []
    return _split(batch, sizes, lists_of_samples(batch, n) if rows_of_record(batch) is None else set())


def cut(batch: Nested, start: int, stop: int) -> Nested:
    """Samples `start` to `stop` (exclusive) of `batch`. Raises ValueError if it does not have them."""
    n = num_samples(batch)
    if not 0 <= start <= stop <= n:
        raise ValueError(f"samples {start} to {stop} were asked of a batch of {n} samples")
    return split(batch, [start, stop - start, n - stop], n=n)[1]


def join(parts: Sequence[Nested], sizes: Sequence[int] | None = None) -> Nested:
    """One batch with the samples of all parts in order: the inverse of `split`. Shared leaves are those of the first.

    `sizes`: the samples in each part, where they are known already. Raises ValueError if the parts differ in structure
    or, their batch dimension apart, in shape.
    """
    if not parts:
        raise ValueError("nothing to join: give at least one part")
    sizes = [num_samples(part) for part in parts] if sizes is None else sizes
    lists = [lists_of_samples(part, n) for part, n in zip(parts, sizes, strict=True)]
    return _join(list(parts), set().union(*lists), "batch")


def even_sizes(n: int, largest: int) -> list[int]:
    """`ceil(n / largest)` sizes that add up to `n` and differ by at most one, the larger ones first.

    >>> even_sizes(100, 32)
    [25, 25, 25, 25]
    """
    count = -(-n // largest)
    return [n // count + (j < n % count) for j in range(count)]


def _split(node: Nested, sizes: Sequence[int], lists: set[int]) -> list[Nested]:
    if isinstance(node, Tensor) and node.ndim:
        return list(torch.split_with_sizes(node, list(sizes)))
    if is_rows(node):
        return list(np.split(node, np.cumsum(sizes)[:-1]))
    inner = children(node)
    if not inner:
        return [node] * len(sizes)
    if id(node) in lists:
        stops = np.cumsum(sizes).tolist()
        return [type(node)(node[stop - size : stop]) for size, stop in zip(sizes, stops, strict=True)]
    columns = [_split(child, sizes, lists) for _, child in inner]
    return [rebuild(node, list(row)) for row in zip(*columns, strict=True)]


def _join(nodes: list[Nested], lists: set[int], path: str) -> Nested:
    first = nodes[0]
    if isinstance(first, Tensor) and first.ndim:
        if any(node.shape[1:] != first.shape[1:] for node in nodes):
            raise ValueError(f"{path} cannot be joined: shapes {[tuple(node.shape) for node in nodes]}")
        return torch.cat(nodes)
    if is_rows(first):
        return np.concatenate(nodes)
    if any(id(node) in lists for node in nodes):
        return type(first)(element for node in nodes for element in node)
    inner = children(first)
    if not inner:
        return first
    others = [children(node) or [] for node in nodes]
    if any([key for key, _ in other] != [key for key, _ in inner] for other in others):
        raise ValueError(f"{path} cannot be joined: the parts differ in structure")
    columns = zip(*([child for _, child in other] for other in others), strict=True)
    keys = [key for key, _ in inner]
    return rebuild(first, [_join(list(col), lists, f"{path}[{key!r}]") for key, col in zip(keys, columns, strict=True)])
