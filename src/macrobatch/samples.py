"""How many samples a batch holds, and which of its lists hold one element for each sample.

No leaf alone says which of its dimensions is that of the batch: first dimensions and lengths of lists are compared over
all of them.
"""

import warnings
from collections.abc import Iterator, Mapping

from torch import Tensor

from macrobatch.callers import first_outside
from macrobatch.containers import Nested, children, has_rows, hides_tensors, is_list, is_opaque, is_rows, leaves

_HELP = (
    "Every tensor needs the batch dimension first. For any other layout give the Accumulator "
    "cut=lambda batch, start, stop: ... and num_samples=lambda batch: ..."
)

_UNCOLLATED = (
    "a list of {} tuples with a label in each looks like samples that nobody has collated, and is read as parts of one "
    "batch, to be cut through their tensors: put them together, torch.utils.data.default_collate(batch), or give "
    "cut=lambda batch, start, stop: batch[start:stop] and num_samples=len"
)


def num_samples(batch: Nested) -> int:
    """The number of samples in `batch`: the size of the batch dimension that its tensors share.

    Raises ValueError, naming the leaves and their shapes, if they do not share one.
    """
    if (n := rows_of_record(batch)) is not None:
        return n
    if type(batch) is list and len(batch) > 2 and all(map(_is_labelled, batch)):
        warnings.warn(_UNCOLLATED.format(len(batch)), stacklevel=first_outside())
    stacked = next((n for n in _first_dimensions(batch) if fits(batch, n)), None)
    lengths = dict.fromkeys(len(node) for node in _lists(batch) if has_rows(node))
    listed = [n for n in lengths if n != stacked and fits(batch, n)]
    if stacked is None and not listed:
        raise ValueError(misfit_message(batch))
    if stacked is None:
        return listed[0]
    return _told_apart(batch, stacked, listed[0]) if listed else stacked


def rows_of_record(batch: Nested) -> int | None:
    """How many rows each leaf has in a plain tuple or dict of nothing but tensors with as many; None for any other."""
    values = batch if type(batch) is tuple else tuple(batch.values()) if type(batch) is dict else ()
    if not values or any(type(leaf) is not Tensor or not leaf.ndim or is_opaque(leaf) for leaf in values):
        return None
    n: int = len(values[0])
    return n if n and all(len(leaf) == n for leaf in values) else None


def fits(batch: Nested, n: int) -> bool:
    """Whether `batch` can be cut as n samples."""
    inner = children(batch)
    if inner is None:
        return is_rows(batch) and _fits_within(batch, n)
    if isinstance(batch, list) and len(batch) == n > 0 and _are_alike(batch):
        return True
    return all(_fits_within(child, n) for _, child in inner)


def misfit_message(batch: Nested) -> str:
    """Why `batch` cannot be cut: the first leaf that has no rows to take, or two that differ in their number."""
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


def lists_of_samples(batch: Nested, n: int) -> set[int]:
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


# ---------------------------------------------------------------------------------------------------------------------
# Where two readings fit


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


def _is_labelled(entry: Nested) -> bool:
    """Whether it is a tuple of tensors and of labels: numbers, strings, tensors without dimensions."""
    return (
        type(entry) is tuple
        and any(isinstance(x, int | float | str) or (isinstance(x, Tensor) and not x.ndim) for x in entry)
        and any(isinstance(x, Tensor) and x.ndim for x in entry)
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


# ---------------------------------------------------------------------------------------------------------------------
# Leaves and lists


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


def _fits_within(node: Nested, n: int) -> bool:
    """Whether `node`, in a batch of n samples, can be cut with them, or shared."""
    if is_rows(node):
        return not is_opaque(node) and bool(node.shape[0] == n)
    inner = children(node)
    if inner is None:
        return not hides_tensors(node)
    return (len(inner) == n > 0 and is_list(node)) or all(_fits_within(child, n) for _, child in inner)
