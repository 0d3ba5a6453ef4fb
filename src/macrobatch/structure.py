"""Nested structures of tensors: how many samples they hold, cut along the batch dimension, joined again, mapped.

A batch is any nesting of mappings, dataclasses, named tuples, lists and tuples around tensors with the batch dimension
first. What is neither a tensor nor a list of batch length (strings, flags, 0-d tensors) is shared by all parts.
"""

import copy
import dataclasses
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

Nested = Any  # a batch or a part of one: no type can say more

_HELP = (
    "Every tensor needs the batch dimension first. For any other layout give the Accumulator "
    "cut=lambda batch, start, stop: ... and num_samples=lambda batch: ..."
)


def num_samples(batch: Nested) -> int:
    """The number of samples in `batch`: the size of the batch dimension that its tensors share.

    Raises ValueError, naming the leaves and their shapes, if they do not share one.
    """
    for n in _candidate_sizes(batch):
        if _fits(batch, n, is_root=True):
            return n
    raise ValueError(_misfit_message(batch))


def split(batch: Nested, sizes: Sequence[int], *, n: int | None = None) -> list[Nested]:
    """`len(sizes)` consecutive parts of `batch`, part j with `sizes[j]` samples; tensors are views, nothing is copied.

    Each leaf is split once. `n` is `num_samples(batch)`, where that is known already. Raises ValueError if the sizes do
    not add up to the batch.
    """
    n = num_samples(batch) if n is None else n
    if sum(sizes) != n:
        raise ValueError(f"sizes {list(sizes)} add up to {sum(sizes)}, but the batch has {n} samples")
    return _split(batch, n, sizes, is_root=True)


def cut(batch: Nested, start: int, stop: int) -> Nested:
    """Samples `start` to `stop` (exclusive) of `batch`."""
    n = num_samples(batch)
    return split(batch, [start, stop - start, n - stop])[1]


def join(parts: Sequence[Nested]) -> Nested:
    """One batch with the samples of all parts in order: the inverse of `split`. Shared leaves are those of the first.

    Raises ValueError if the parts differ in structure or, their batch dimension apart, in shape.
    """
    if not parts:
        raise ValueError("nothing to join: give at least one part")
    return _join(list(parts), [num_samples(part) for part in parts], "batch", is_root=True)


def even_sizes(n: int, largest: int) -> list[int]:
    """`ceil(n / largest)` sizes that add up to `n` and differ by at most one, the larger ones first.

    >>> even_sizes(100, 32)
    [25, 25, 25, 25]
    """
    count = -(-n // largest)
    return [n // count + (j < n % count) for j in range(count)]


def map_tensors(batch: Nested, function: Callable[[Tensor], Tensor]) -> Nested:
    """The same structure with `function(tensor)` for each tensor and every other leaf as it is."""
    if isinstance(batch, Tensor):
        return function(batch)
    children = _children(batch)
    if not children:
        return batch
    return _rebuild(batch, [map_tensors(child, function) for _, child in children])


def tensors(batch: Nested) -> Iterator[Tensor]:
    """The tensors of `batch`, in the order of the structure."""
    if isinstance(batch, Tensor):
        yield batch
        return
    for _, child in _children(batch) or ():
        yield from tensors(child)


# ---------------------------------------------------------------------------------------------------------------------
# Containers


def _children(node: Nested) -> list[tuple[Any, Nested]] | None:
    """(key, child) of a container, None for a leaf."""
    kind = type(node)
    if kind is Tensor or kind is str:  # the common leaves and containers first: this runs for every micro-batch
        return None
    if kind is dict:
        return list(node.items())
    if kind is list or kind is tuple:
        return list(enumerate(node))
    if isinstance(node, Mapping):
        return list(node.items())
    if isinstance(node, list | tuple):
        return list(enumerate(node))
    if dataclasses.is_dataclass(node) and not isinstance(node, type):
        return [(field.name, getattr(node, field.name)) for field in dataclasses.fields(node)]
    return None


def _rebuild(node: Nested, values: list[Nested]) -> Nested:
    """A container like `node` with other children."""
    if type(node) in (list, tuple):
        return type(node)(values)
    if isinstance(node, Mapping):
        return _rebuild_mapping(node, dict(zip(node, values, strict=True)))
    if isinstance(node, tuple) and hasattr(node, "_fields"):
        return type(node)(*values)
    if isinstance(node, list | tuple):
        return type(node)(values)
    clone = copy.copy(node)  # a dataclass: fields with init=False and frozen ones are set too
    for field, value in zip(dataclasses.fields(node), values, strict=True):
        object.__setattr__(clone, field.name, value)
    return clone


def _rebuild_mapping(node: Mapping[Any, Nested], items: dict[Any, Nested]) -> Nested:
    if type(node) is dict:
        return items
    if not hasattr(node, "__setitem__"):
        return type(node)(items)  # type: ignore[call-arg]
    clone = copy.copy(node)  # keeps what a subclass remembers beside its items (defaultdict, BatchEncoding)
    for key, value in items.items():
        clone[key] = value
    return clone


def _leaves(node: Nested, path: str = "") -> Iterator[tuple[str, Nested]]:
    """(path, leaf), the paths only where one is given to begin with."""
    children = _children(node)
    if children is None:
        yield path, node
        return
    by_attribute = not isinstance(node, Mapping | list | tuple)
    for key, child in children:
        yield from _leaves(child, path and (f"{path}.{key}" if by_attribute else f"{path}[{key!r}]"))


# ---------------------------------------------------------------------------------------------------------------------
# Which leaves carry the batch dimension


def _is_rows(leaf: Nested) -> bool:
    return isinstance(leaf, (Tensor, np.ndarray)) and leaf.ndim > 0


def _has_rows(node: Nested) -> bool:
    children = _children(node)
    return _is_rows(node) if children is None else any(_has_rows(child) for _, child in children)


def _candidate_sizes(batch: Nested) -> Iterator[int]:
    """First dimensions of the tensors, then lengths of lists that hold tensors (images of unlike size)."""
    seen = set()
    for _, leaf in _leaves(batch):
        if _is_rows(leaf) and not _is_opaque(leaf) and leaf.shape[0] not in seen:
            seen.add(leaf.shape[0])
            yield leaf.shape[0]
    yield from (n for n in _list_lengths(batch) if n not in seen)


def _list_lengths(node: Nested) -> list[int]:
    children = _children(node) or []
    own = [len(node)] if isinstance(node, list | tuple) and _has_rows(node) else []
    return own + [n for _, child in children for n in _list_lengths(child)]


def _fits(node: Nested, n: int, is_root: bool = False) -> bool:
    """Whether `node` can be cut as n samples, or shared."""
    if _is_rows(node):
        return not _is_opaque(node) and node.shape[0] == n
    children = _children(node)
    if children is None:
        return not _hides_tensors(node)
    return _is_list_of_samples(node, n, is_root) or all(_fits(child, n) for _, child in children)


def _is_list_of_samples(node: Nested, n: int, is_root: bool) -> bool:
    """Whether a list is cut between its elements rather than inside them.

    A tuple at the root is a record (inputs, targets), whatever its length, and so is a list there whose tensors are
    not all of one kind.
    """
    if not isinstance(node, list | tuple) or hasattr(node, "_fields") or len(node) != n or n == 0:
        return False
    if not _has_rows(node):
        return not is_root
    if all(_fits(child, n) for child in node):
        return False  # every element carries the batch dimension itself
    return not is_root or (isinstance(node, list) and _of_one_kind(node))


def _of_one_kind(items: list[Nested]) -> bool:
    return all(isinstance(x, Tensor) and (x.ndim, x.dtype) == (items[0].ndim, items[0].dtype) for x in items)


def _is_opaque(leaf: Nested) -> bool:
    return isinstance(leaf, Tensor) and (leaf.is_nested or leaf.layout != torch.strided)


def _hides_tensors(leaf: Nested) -> bool:
    """Whether an object of an unknown class holds tensors, which sharing it would leave uncut."""
    return any(_has_rows(value) for value in getattr(leaf, "__dict__", {}).values()) and not callable(leaf)


def _misfit_message(batch: Nested) -> str:
    for path, leaf in _leaves(batch, "batch"):
        if _is_opaque(leaf):
            kind = "nested" if leaf.is_nested else str(leaf.layout)
            return f"{path} is a {kind} tensor, which cannot be cut. {_HELP}"
        if not _is_rows(leaf) and _hides_tensors(leaf):
            return f"{path} is a {type(leaf).__name__}, an unknown container of tensors, which cannot be cut. {_HELP}"
    rows = [(path, leaf) for path, leaf in _leaves(batch, "batch") if _is_rows(leaf)]
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


def _split(node: Nested, n: int, sizes: Sequence[int], is_root: bool = False) -> list[Nested]:
    if isinstance(node, Tensor) and node.ndim:
        return list(torch.split(node, list(sizes)))
    if _is_rows(node):
        return list(np.split(node, np.cumsum(sizes)[:-1]))
    children = _children(node)
    if not children:
        return [node] * len(sizes)
    if _is_list_of_samples(node, n, is_root):
        stops = np.cumsum(sizes).tolist()
        return [type(node)(node[stop - size : stop]) for size, stop in zip(sizes, stops, strict=True)]
    columns = [_split(child, n, sizes) for _, child in children]
    return [_rebuild(node, list(row)) for row in zip(*columns, strict=True)]


def _join(nodes: list[Nested], ns: list[int], path: str, is_root: bool = False) -> Nested:
    first = nodes[0]
    if isinstance(first, Tensor) and first.ndim:
        if any(node.shape[1:] != first.shape[1:] for node in nodes):
            raise ValueError(f"{path} cannot be joined: shapes {[tuple(node.shape) for node in nodes]}")
        return torch.cat(nodes)
    if _is_rows(first):
        return np.concatenate(nodes)
    children = _children(first)
    if not children:
        return first
    if all(_is_list_of_samples(node, n, is_root) for node, n in zip(nodes, ns, strict=True)):
        return type(first)(element for node in nodes for element in node)
    others = [_children(node) or [] for node in nodes]
    if any([key for key, _ in other] != [key for key, _ in children] for other in others):
        raise ValueError(f"{path} cannot be joined: the parts differ in structure")
    columns = zip(*([child for _, child in other] for other in others), strict=True)
    keys = [key for key, _ in children]
    return _rebuild(first, [_join(list(col), ns, f"{path}[{key!r}]") for key, col in zip(keys, columns, strict=True)])
