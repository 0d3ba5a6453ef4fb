"""How many samples a batch holds, and which of its lists hold one element for each sample.

No leaf alone says which of its dimensions is that of the batch: first dimensions and lengths of lists are compared over
all of them.
"""

from collections.abc import Iterator, Mapping

from torch import Tensor

from macrobatch.containers import (
    Nested,
    are_entries,
    are_of_one_kind,
    are_records,
    children,
    first_dimensions,
    has_rows,
    hides_tensors,
    is_labelled,
    is_list,
    is_opaque,
    is_rows,
    kind_of,
    leaves,
    lists_within,
)

_HELP = (
    "Every tensor needs the batch dimension first. For any other layout give the Accumulator "
    "cut=lambda batch, start, stop: ... and num_samples=lambda batch: ..."
)
_UNCOLLATED = (
    "uncollated samples are put together by torch.utils.data.default_collate(batch); to keep them a list give "
    "cut=lambda batch, start, stop: batch[start:stop] and num_samples=len"
)


def num_samples(batch: Nested) -> int:
    """The number of samples in `batch`: the size of the batch dimension that its tensors share.

    Raises ValueError, naming the leaves and their shapes, if they do not share one, and where nothing tells a list of
    samples that were never collated from a batch.
    """
    if (n := rows_of_record(batch)) is not None:
        return n
    if (n := _number_of_entries(batch)) is not None:
        return n
    stacked = next((n for n in first_dimensions(batch) if fits(batch, n)), None)
    lengths = dict.fromkeys(len(node) for node in lists_within(batch) if has_rows(node))
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
    if _may_be_samples(batch):
        if isinstance(batch, list) and len(batch) == n:
            return True
        if not _are_columns(batch):
            return all(_fits_within(item, n) for item in _contents(batch))
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
    hint = f"; {_UNCOLLATED}" if _may_be_samples(batch) else ""
    return (
        f"the leaves of the batch differ in their number of samples: {first_path} has shape {tuple(first.shape)}, "
        f"{path} has shape {tuple(leaf.shape)}. {_HELP}{hint}"
    )


def lists_of_samples(batch: Nested, n: int) -> set[int]:
    """The lists (by id) that are cut between their elements: those of length n, unless their elements have n rows each.

    Where they have, the list is one of batches (two views of two samples); it is one of samples all the same if it
    holds records, or if its tensors are of one kind and stand beside a list of samples. Raises ValueError where that is
    open: for more than two of them, and for images of unlike size.
    """
    if isinstance(batch, list) and len(batch) == n and _may_be_samples(batch):
        shared, is_collated = _shared(batch), _is_collated(batch)
        if n == shared and n > 1 and not is_collated and not _are_labelled(batch):
            raise ValueError(_open_message(batch))
        if n != shared or not is_collated:
            return {id(batch)}
    lists = [node for node in lists_within(batch) if len(node) == n > 0]
    doubtful = [x for x in lists if has_rows(x) and not are_records(x) and all(_fits_within(item, n) for item in x)]
    sure = [x for x in lists if not any(x is other for other in doubtful)]
    beside = [x for x in doubtful if are_of_one_kind(x)]
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

    Two images (3, H, W) with three boxes in each look like three samples. A list of records holds samples; else a list
    of labels decides by its length. Raises ValueError if nothing decides and there may be images of unlike size.
    """
    lists = [node for node in lists_within(batch) if len(node) == listed and has_rows(node)]
    if not all(map(_are_alike, lists)):
        return stacked
    if any(map(are_records, lists)):
        return listed
    labels = {len(node) for node in lists_within(batch) if not has_rows(node)} & {stacked, listed}
    if len(labels) == 1:
        return labels.pop()
    if not any(map(_may_be_images, lists)):
        return stacked
    raise ValueError(
        f"the batch may hold {stacked} samples, the first dimension of all its tensors, or {listed}, the length of a "
        f"list in it: no leaf decides. {_HELP}"
    )


def _are_alike(items: Nested) -> bool:
    return are_of_one_kind(items) or are_records(items)


def _may_be_images(items: Nested) -> bool:
    """Whether the tensors of a list are of unlike shapes, and have too many dimensions for plain features (n, d)."""
    return are_of_one_kind(items) and items[0].ndim > 2 and any(x.shape != items[0].shape for x in items)


# ---------------------------------------------------------------------------------------------------------------------
# Samples that were never collated: the entries of a list at the root


def _number_of_entries(batch: Nested) -> int | None:
    """The length of a list that can only be one of samples. Raises ValueError where another reading fits as well."""
    if not _may_be_samples(batch) or _is_collated(batch):
        return None
    shared = _shared(batch)
    if shared is None or shared == len(batch) == 1 or _are_labelled(batch):
        return len(batch)
    raise ValueError(_open_message(batch))


def _open_message(batch: Nested) -> str:
    by = "the length of its entries" if _stacked(batch) is None else "the first dimension of all its tensors"
    return (
        f"the batch may hold {_shared(batch)} samples, {by}, or {len(batch)}, the length of a {type(batch).__name__} "
        f"of samples: no leaf decides; {_UNCOLLATED}"
    )


def _may_be_samples(batch: Nested) -> bool:
    """Whether `batch` is a list of records or of tensors of one kind, or a list or tuple of entries alike."""
    if not is_list(batch) or not batch:
        return False
    if isinstance(batch, list) and _are_alike(batch):
        return has_rows(batch)
    return are_entries(batch)


def _contents(entries: Nested) -> Iterator[Nested]:
    """What the entries hold. A pair (tensor, label) in one of them is no list of two samples, and is opened too."""
    for entry in entries:
        for x in [entry] if isinstance(entry, Tensor) else [x for _, x in children(entry) or ()]:
            yield from _contents([x]) if is_labelled(x) else (x,)


def _shared(batch: Nested) -> int | None:
    """The number of samples if the entries share them: as rows, or because each is a list of samples of one kind."""
    stacked = _stacked(batch)
    return len(batch[0]) if stacked is None and _are_columns(batch) else stacked


def _stacked(batch: Nested) -> int | None:
    """The number of rows that all tensors in the entries have."""
    if _may_be_images(batch) and batch[0].ndim == 3:  # (channels, height, width)
        return None
    return next((n for n in first_dimensions(batch) if all(_fits_within(x, n) for x in _contents(batch))), None)


def _are_columns(batch: Nested) -> bool:
    return is_list(batch[0]) and len({kind_of(x) for x in batch[0]}) == 1


def _is_collated(batch: Nested) -> bool:
    """Whether a collation makes such a batch: torch's own makes lists of tensors, and lists of lists of tensors.

    It leaves no label a number or a tensor without dimensions. A tuple is a record, unless it holds such labels, and
    so is a list of at most two (two views, two tasks).
    """
    if are_of_one_kind(batch):
        return _stacked(batch) is not None and not _may_be_images(batch)
    if type(batch) is tuple:
        return not any(map(is_labelled, batch)) or _stacked(batch) is None
    may_be = isinstance(batch[0], list) or (len(batch) <= 2 and not isinstance(batch[0], Mapping))
    return may_be and not any(map(is_labelled, batch)) and _stacked(batch) is not None


def _are_labelled(batch: Nested) -> bool:
    """Whether it is a list of tuples, lists or dataclasses with a label in each; that in a dict may be of a batch."""
    return isinstance(batch, list) and all(is_labelled(x) and not isinstance(x, Mapping) for x in batch)


# ---------------------------------------------------------------------------------------------------------------------
# Leaves and lists


def _fits_within(node: Nested, n: int) -> bool:
    """Whether `node`, in a batch of n samples, can be cut with them, or shared."""
    if is_rows(node):
        return not is_opaque(node) and bool(node.shape[0] == n)
    inner = children(node)
    if inner is None:
        return not hides_tensors(node)
    return (len(inner) == n > 0 and is_list(node)) or all(_fits_within(child, n) for _, child in inner)
