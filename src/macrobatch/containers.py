"""Nested containers of tensors: walked, mapped, and rebuilt with other contents, whatever those contents mean.

Containers are mappings, dataclasses, named tuples, lists and tuples; everything else is a leaf.
"""

import copy
import dataclasses
from collections import UserDict, deque
from collections.abc import Callable, Iterator, Mapping, Set
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn.utils.rnn import PackedSequence

Nested = Any  # a batch or a part of one: no type can say more


def map_tensors(batch: Nested, function: Callable[[Tensor], Tensor]) -> Nested:
    """The same structure with `function(tensor)` for each tensor and every other leaf as it is."""
    if isinstance(batch, Tensor):
        return function(batch)
    inner = children(batch)
    if not inner:
        return batch
    return rebuild(batch, [map_tensors(child, function) for _, child in inner])


def tensors(batch: Nested) -> Iterator[Tensor]:
    """The tensors of `batch`, in the order of the structure."""
    if isinstance(batch, Tensor):
        yield batch
        return
    for _, child in children(batch) or ():
        yield from tensors(child)


def children(node: Nested) -> list[tuple[Any, Nested]] | None:
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
    if isinstance(node, list | tuple) and kind is not PackedSequence:  # a named tuple of one single value
        return list(enumerate(node))
    if dataclasses.is_dataclass(node) and not isinstance(node, type):
        return [(field.name, getattr(node, field.name)) for field in dataclasses.fields(node)]
    return None


def rebuild(node: Nested, values: list[Nested]) -> Nested:
    """A container like `node` with other children; `node` itself is as before."""
    if type(node) in (list, tuple):
        return type(node)(values)
    if isinstance(node, Mapping):
        return _rebuild_mapping(node, dict(zip(node.keys(), values, strict=True)))
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
    if not isinstance(node, dict | UserDict):  # a copy of an unknown mapping may share its items
        return type(node)(items)  # type: ignore[call-arg]
    clone = copy.copy(node)  # keeps what a subclass remembers beside its items (defaultdict, BatchEncoding)
    for key, value in items.items():
        clone[key] = value
    return clone


def leaves(node: Nested, path: str = "") -> Iterator[tuple[str, Nested]]:
    """(path, leaf), the paths only where one is given to begin with."""
    inner = children(node)
    if inner is None:
        yield path, node
        return
    by_attribute = not isinstance(node, Mapping | list | tuple)
    for key, child in inner:
        yield from leaves(child, path and (f"{path}.{key}" if by_attribute else f"{path}[{key!r}]"))


def is_list(node: Nested) -> bool:
    """Whether `node` is a list or a plain tuple, whose elements may be samples: not a named tuple, not a torch.Size."""
    return isinstance(node, list) or type(node) is tuple


def is_rows(leaf: Nested) -> bool:
    """Whether `leaf` is a tensor or an array with a first dimension."""
    return isinstance(leaf, (Tensor, np.ndarray)) and leaf.ndim > 0


def has_rows(node: Nested) -> bool:
    """Whether there is a tensor with a first dimension in `node`."""
    inner = children(node)
    return is_rows(node) if inner is None else any(has_rows(child) for _, child in inner)


def is_opaque(leaf: Nested) -> bool:
    """Whether `leaf` is a tensor without plain rows: nested, or of a sparse layout."""
    return isinstance(leaf, Tensor) and (leaf.is_nested or leaf.layout != torch.strided)


def hides_tensors(leaf: Nested) -> bool:
    """Whether an object of an unknown class holds tensors, which sharing it between parts would leave uncut."""
    if isinstance(leaf, str | int | float | None) or callable(leaf):
        return False
    slots = [name for kind in type(leaf).__mro__ for name in getattr(kind, "__slots__", ()) if hasattr(leaf, name)]
    values = [*getattr(leaf, "__dict__", {}).values(), *(getattr(leaf, name) for name in slots)]
    elements = leaf if isinstance(leaf, PackedSequence | deque | Set) else ()
    return any(map(has_rows, [*values, *elements]))
