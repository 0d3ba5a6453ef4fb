"""Nested structures of tensors: how many samples they hold, cut along the batch dimension, joined again.

A batch is any nesting of mappings, dataclasses, named tuples, lists and tuples around tensors with the batch dimension
first. Lists of batch length are cut between their elements (strings, images of unlike size, records). Every other leaf
(a string, a flag, a 0-d tensor) is shared by all parts.
"""

from collections.abc import Iterator, Mapping, Sequence

import numpy as np
import torch
from torch import Tensor

from macrobatch.containers import (
    Nested,
    children,
    has_rows,
    hides_tensors,
    is_list,
    is_opaque,
    is_rows,
    leaves,
    map_tensors,
    rebuild,
    tensors,
)

__all__ = ["Nested", "cut", "even_sizes", "join", "map_tensors", "num_samples", "split", "tensors"]

_HELP = (
    "Every tensor needs the batch dimension first. For any other layout give the Accumulator "
    "cut=lambda batch, start, stop: ... and num_samples=lambda batch: ..."
)


def num_samples(batch: Nested) -> int:
    """The number of samples in `batch`: the size of the batch dimension that its tensors share.

    Raises ValueError, naming the leaves and their shapes, if they do not share one.
    """
    if (n := _rows_of_record(batch)) is not None:
        return n
    stacked = next((n for n in _first_dimensions(batch) if _fits(batch, n)), None)
    lengths = dict.fromkeys(len(node) for node in _lists(batch) if has_rows(node))
    listed = [n for n in lengths if n != stacked and _fits(batch, n)]
    if stacked is None and not listed:
        raise ValueError(_misfit_message(batch))
    if stacked is None:
        return listed[0]
    return _told_apart(batch, stacked, listed[0]) if listed else stacked


def split(batch: Nested, sizes: Sequence[int], *, n: int | None = None) -> list[Nested]:
    """`len(sizes)` consecutive parts of `batch`, part j with `sizes[j]` samples; tensors are views, nothing is copied.

    Each leaf is split once. `n` is `num_samples(batch)`, where that is known already. Raises ValueError if the sizes do
    not add up to the batch.
    """
    if n is None:
        n = num_samples(batch)
    elif _rows_of_record(batch) != n and not _fits(batch, n):
        raise ValueError(f"{_misfit_message(batch)} (num_samples= says {n}; own batches need cut= too)")
    if sum(sizes) != n or min(sizes, default=0) < 0:
        raise ValueError(f"sizes {list(sizes)} do not divide the batch, which has {n} samples")
    if not sizes:
        return []
    return _split(batch, sizes, _lists_of_samples(batch, n) if _rows_of_record(batch) is None else set())


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
    lists = [_lists_of_samples(part, n) for part, n in zip(parts, sizes, strict=True)]
    return _join(list(parts), set().union(*lists), "batch")


def even_sizes(n: int, largest: int) -> list[int]:
    """`ceil(n / largest)` sizes that add up to `n` and differ by at most one, the larger ones first.

    >>> even_sizes(100, 32)
    [25, 25, 25, 25]
    """
    count = -(-n // largest)
    return [n // count + (j < n % count) for j in range(count)]


# ---------------------------------------------------------------------------------------------------------------------
# How many samples


def _rows_of_record(batch: Nested) -> int | None:
    """How many rows each leaf has in a plain tuple or dict of nothing but tensors with as many; None for any other."""
    values = batch if type(batch) is tuple else tuple(batch.values()) if type(batch) is dict else ()
    if not values or any(type(leaf) is not Tensor or not leaf.ndim or is_opaque(leaf) for leaf in values):
        return None
    n: int = len(values[0])
    return n if n and all(len(leaf) == n for leaf in values) else None


def _first_dimensions(batch: Nested) -> Iterator[int]:
    seen = set()
    for _, leaf in leaves(batch):
        if is_rows(leaf) and not is_opaque(leaf) and leaf.shape[0] not in seen:
            seen.add(leaf.shape[0])
            yield leaf.shape[0]


def _lists(batch: Nested) -> Iterator[Nested]:
    """The lists and tuples in `batch` that may be lists of samples.

    At the root a tuple is a record (inputs, targets), whatever its length, and so is a list, unless it holds records
    or tensors of one kind.
    """
    if isinstance(batch, list) and _are_alike(batch):
        yield batch
    yield from _lists_within(batch)


def _lists_within(node: Nested) -> Iterator[Nested]:
    for _, child in children(node) or ():
        if type(child) is Tensor:  # most of them: this runs for every micro-batch
            continue
        if is_list(child):
            yield child
        yield from _lists_within(child)


def _fits(batch: Nested, n: int) -> bool:
    """Whether `batch` can be cut as n samples."""
    inner = children(batch)
    if inner is None:
        return is_rows(batch) and _fits_within(batch, n)
    if isinstance(batch, list) and len(batch) == n > 0 and _are_alike(batch):
        return True
    return all(_fits_within(child, n) for _, child in inner)


def _fits_within(node: Nested, n: int) -> bool:
    """Whether `node`, in a batch of n samples, can be cut with them, or shared."""
    if is_rows(node):
        return not is_opaque(node) and bool(node.shape[0] == n)
    inner = children(node)
    if inner is None:
        return not hides_tensors(node)
    return (len(inner) == n > 0 and is_list(node)) or all(_fits_within(child, n) for _, child in inner)


def _told_apart(batch: Nested, stacked: int, listed: int) -> int:
    """The number of samples where every tensor has `stacked` rows, and yet lists of length `listed` may hold samples.

    Two images (3, H, W) with three boxes in each look like three samples. A bare list of images of unlike size holds
    samples, and so does a list of records; else a list of labels decides by its length. Raises ValueError if nothing
    decides and there may be images of unlike size.
    """
    if isinstance(batch, list) and len(batch) == listed and _may_be_images(batch):
        return listed
    lists = [node for node in _lists(batch) if len(node) == listed and has_rows(node) and node is not batch]
    if not all(map(_are_alike, lists)):
        return stacked
    if any(map(_are_records, lists)):
        return listed
    labels = {len(node) for node in _lists(batch) if not has_rows(node)} & {stacked, listed}
    if len(labels) == 1:
        return labels.pop()
    if not any(map(_may_be_images, lists)) and not _are_records(batch):
        return stacked
    raise ValueError(
        f"the batch may hold {stacked} samples, the first dimension of all its tensors, or {listed}, the length of a "
        f"list in it: no leaf decides. {_HELP}"
    )


def _are_alike(items: Nested) -> bool:
    return _of_one_kind(items) or _are_records(items)


def _are_records(items: Nested) -> bool:
    """Whether `items` is a list of mappings that have the same keys."""
    return is_list(items) and all(isinstance(x, Mapping) and x.keys() == items[0].keys() for x in items) and bool(items)


def _of_one_kind(items: Nested) -> bool:
    return all(isinstance(x, Tensor) and (x.ndim, x.dtype) == (items[0].ndim, items[0].dtype) for x in items)


def _may_be_images(items: Nested) -> bool:
    """Whether the tensors of a list are of unlike shapes, and have too many dimensions for plain features (n, d)."""
    return _of_one_kind(items) and items[0].ndim > 2 and any(x.shape != items[0].shape for x in items)


def _misfit_message(batch: Nested) -> str:
    for path, leaf in leaves(batch, "batch"):
        if is_opaque(leaf):
            kind = "nested" if leaf.is_nested else str(leaf.layout)
            return f"{path} is a {kind} tensor, which cannot be cut. {_HELP}"
        if not is_rows(leaf) and hides_tensors(leaf):
            return f"{path} is a {type(leaf).__name__}, an unknown container of tensors, which cannot be cut. {_HELP}"
    rows = [(path, leaf) for path, leaf in leaves(batch, "batch") if is_rows(leaf)]
    if not rows:
        return f"the batch, a {type(batch).__name__}, holds no tensor with a batch dimension. {_HELP}"
    first_path, first = rows[0]
    path, leaf = next(((p, x) for p, x in rows if x.shape[0] != first.shape[0]), rows[-1])
    return (
        f"the leaves of the batch differ in their number of samples: {first_path} has shape {tuple(first.shape)}, "
        f"{path} has shape {tuple(leaf.shape)}. {_HELP}"
    )


# ---------------------------------------------------------------------------------------------------------------------
# Split and join


def _lists_of_samples(batch: Nested, n: int) -> set[int]:
    """The lists (by id) that are cut between their elements: those of length n, unless their elements have n rows each.

    Where they have, the list is one of batches (two views of two samples); it is one of samples all the same if it
    holds records, or if its tensors are of one kind and stand beside a list of samples. Raises ValueError where that is
    open: for more than two of them, and for images of unlike size.
    """
    lists = [node for node in _lists(batch) if len(node) == n > 0]
    doubtful = [x for x in lists if has_rows(x) and not _are_records(x) and all(_fits_within(item, n) for item in x)]
    sure = [x for x in lists if not any(x is other for other in doubtful)]
    beside = [x for x in doubtful if x is not batch and _of_one_kind(x)]
    if any(map(has_rows, sure)):
        sure += beside
    elif any(_may_be_images(x) or n > 2 for x in beside):
        raise ValueError(
            f"a list of {n} tensors with {n} rows each, in a batch of {n} samples, may hold samples or batches: no "
            f"leaf decides. {_HELP}"
        )
    return set(map(id, sure))


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
