"""A batch of any structure is cut along its batch dimension, nothing lost or copied; what cannot be cut is named."""

import itertools
import re
import types
from collections import OrderedDict, UserDict, defaultdict, deque
from collections.abc import Callable, Iterator, Mapping, MutableMapping
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.utils.data import DataLoader, default_collate

import macrobatch as mb
from macrobatch.structure import cut, even_sizes, join, map_tensors, num_samples, split, tensors

N = 8
SIZES = [3, 1, 4]


def rows(n: int = N, *shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """A tensor whose entries are all different, so that a row in the wrong place shows."""
    return torch.arange(n * int(np.prod(shape, dtype=int)), dtype=dtype).reshape(n, *shape)


class Pair(NamedTuple):
    x: Any
    y: Any


@dataclass
class Sample:
    x: Tensor
    y: Tensor


@dataclass(frozen=True)
class FrozenSample:
    x: Tensor
    y: Tensor


@dataclass(frozen=True, slots=True)
class SlotSample:
    x: Tensor
    y: Tensor


@dataclass
class DerivedSample:
    x: Tensor
    y: Tensor
    doubled: Tensor = field(init=False)

    def __post_init__(self) -> None:
        self.doubled = self.y * 2


class ReadOnly(Mapping[str, Any]):
    def __init__(self, items: Mapping[str, Any]) -> None:
        self._items = dict(items)

    def __getitem__(self, key: str) -> Any:
        return self._items[key]

    def __iter__(self) -> Iterator[str]:
        return iter(self._items)

    def __len__(self) -> int:
        return len(self._items)


class Writable(ReadOnly, MutableMapping[str, Any]):
    """A copy.copy of it shares its items with the original."""

    def __setitem__(self, key: str, value: Any) -> None:
        self._items[key] = value

    def __delitem__(self, key: str) -> None:
        del self._items[key]


class Remembering(dict[str, Any]):
    source = "nowhere"


def remembering(x: Tensor, y: Tensor) -> Remembering:
    batch = Remembering(x=x, y=y)
    batch.source = "here"
    return batch


CONTAINERS: dict[str, Callable[[Tensor, Tensor], Any]] = {
    "dict": lambda x, y: {"x": x, "y": y},
    "dict with integer keys": lambda x, y: {0: x, 1: y},
    "list": lambda x, y: [x, y],
    "tuple": lambda x, y: (x, y),
    "named tuple": Pair,
    "dataclass": Sample,
    "frozen dataclass": FrozenSample,
    "frozen dataclass with slots": SlotSample,
    "dataclass with a derived field": DerivedSample,
    "OrderedDict": lambda x, y: OrderedDict(x=x, y=y),
    "defaultdict": lambda x, y: defaultdict(list, x=x, y=y),
    "dict subclass": remembering,
    "UserDict": lambda x, y: UserDict(x=x, y=y),
    "Mapping": lambda x, y: ReadOnly({"x": x, "y": y}),
    "MutableMapping": lambda x, y: Writable({"x": x, "y": y}),
    "mapping proxy": lambda x, y: types.MappingProxyType({"x": x, "y": y}),
    "nested": lambda x, y: {"in": (x, [Pair(x, Sample(x, y))]), "out": {"deep": {"deeper": y}}},
}


def same(mine: Any, theirs: Any) -> bool:
    """Whether two structures are of the same classes and hold the same values, written without the code under test."""
    if type(mine) is not type(theirs):
        return False
    if isinstance(mine, Tensor):
        return torch.equal(mine, theirs)
    if isinstance(mine, np.ndarray):
        return bool(np.array_equal(mine, theirs))
    if isinstance(mine, Mapping):
        return list(mine.keys()) == list(theirs.keys()) and all(same(mine[key], theirs[key]) for key in mine)
    if isinstance(mine, list | tuple):
        return len(mine) == len(theirs) and all(map(same, mine, theirs))
    if hasattr(mine, "__dataclass_fields__"):
        return all(same(getattr(mine, name), getattr(theirs, name)) for name in mine.__dataclass_fields__)
    return bool(mine == theirs)


# ---------------------------------------------------------------------------------------------------------------------
# Containers


@pytest.mark.parametrize("name", CONTAINERS)
def test_every_container_is_cut_into_parts_of_its_own_class(name: str) -> None:
    x, y, make = rows(N, 2, 3), rows(N, dtype=torch.int64), CONTAINERS[name]
    batch = make(x, y)
    parts = split(batch, SIZES)
    expected = [make(x[a:b], y[a:b]) for a, b in ((0, 3), (3, 4), (4, 8))]
    assert num_samples(batch) == N
    assert [num_samples(part) for part in parts] == SIZES
    assert all(map(same, parts, expected))
    assert same(batch, make(x, y)), "the batch itself must stay as it was"
    assert same(join(parts), batch)


def test_control_the_comparison_of_these_tests_sees_a_row_in_the_wrong_place_and_another_class() -> None:
    batch = {"x": rows(4, 2)}
    assert not same({"x": rows(4, 2).flip(0)}, batch)
    assert not same(OrderedDict(batch), batch)
    assert not same(split(batch, [2, 2])[0], batch)


def test_what_a_container_remembers_beside_its_items_stays() -> None:
    counting = split(defaultdict(int, x=rows(4)), [1, 3])[1]
    assert counting["missing"] == 0
    assert split(remembering(rows(4), rows(4)), [1, 3])[1].source == "here"


def test_a_field_that_no_constructor_takes_is_cut_as_well() -> None:
    part = split(DerivedSample(rows(4), rows(4)), [1, 3])[1]
    assert part.doubled.tolist() == [2, 4, 6]


def test_the_batches_of_transformers_are_cut_with_their_own_class() -> None:
    transformers = pytest.importorskip("transformers")
    encoding = transformers.BatchEncoding({"input_ids": rows(N, 5), "attention_mask": rows(N, 5)})
    parts = split(encoding, SIZES)
    assert [type(part) for part in parts] == [transformers.BatchEncoding] * 3
    assert torch.equal(parts[1].input_ids, encoding["input_ids"][3:4])
    assert torch.equal(join(parts)["attention_mask"], encoding["attention_mask"])
    assert encoding["input_ids"].shape == (N, 5)
    output = transformers.modeling_outputs.BaseModelOutput(last_hidden_state=rows(N, 2))
    part = split(output, SIZES)[2]
    assert part.last_hidden_state is part["last_hidden_state"]
    assert torch.equal(part[0], rows(N, 2)[4:])


def test_parts_are_views_so_nothing_is_copied() -> None:
    x, array = rows(N, 3), np.arange(N)
    parts = split({"x": x, "array": array}, SIZES)
    assert {part["x"].untyped_storage().data_ptr() for part in parts} == {x.untyped_storage().data_ptr()}
    assert all(np.shares_memory(part["array"], array) for part in parts)


def test_every_array_and_tensor_of_any_dtype_is_cut_along_its_first_dimension() -> None:
    batch = {
        "array": np.arange(N * 2).reshape(N, 2),
        "words": np.array([f"word {j}" for j in range(N)], dtype=object),
        "mask": rows(N) > 3,
        "half": rows(N, 1, dtype=torch.bfloat16),
        "transposed": rows(3, N).T,
        "no columns": torch.zeros(N, 0),
    }
    part = split(batch, SIZES)[2]
    assert all(len(part[key]) == 4 for key in batch)
    assert part["words"].tolist() == [f"word {j}" for j in range(4, 8)]
    assert same(join(split(batch, SIZES)), batch)


def test_parameters_and_tensors_that_require_grad_are_tensors() -> None:
    weight = nn.Parameter(rows(N))
    assert [len(part) for part in split((weight,), SIZES)[1]] == [1]
    assert split(weight, SIZES)[0].requires_grad


# ---------------------------------------------------------------------------------------------------------------------
# What is shared, and lists


def test_strings_flags_scalars_and_tensors_without_dimensions_are_shared() -> None:
    shared = {
        "split": "train",
        "long": "a string of any length",
        "flag": True,
        "temperature": 0.5,
        "scale": torch.tensor(2.0),
        "array": np.array(1.0),
        "none": None,
        "raw": b"12345678",
        "span": range(8),
        "shape": (3, 32, 32),
        "size": torch.Size(range(8)),
        "empty": [],
        "nothing": {},
        "function": len,
        "layer": nn.Linear(2, 2),
        "options": SimpleNamespace(depth=3),
    }
    for part in split({"x": rows(N), **shared}, SIZES):
        assert all(part[key] is value or part[key] == value for key, value in shared.items())
        assert part["scale"] is shared["scale"]


def test_lists_of_batch_length_are_cut_and_all_others_are_shared() -> None:
    batch = {"x": rows(N), "names": [f"n{j}" for j in range(N)], "ids": tuple(range(N)), "classes": ["cat", "dog"]}
    part = split(batch, SIZES)[2]
    assert part["names"] == ["n4", "n5", "n6", "n7"]
    assert part["ids"] == (4, 5, 6, 7)
    assert part["classes"] == batch["classes"]
    assert same(join(split(batch, SIZES)), batch)


def test_what_the_default_collation_makes_of_tuples_with_strings_is_cut() -> None:
    batch = default_collate([((torch.ones(2) * j, {"y": j}), f"file {j}") for j in range(N)])
    parts = split(batch, SIZES)
    assert list(parts[1][1]) == ["file 3"]
    assert parts[1][0][1]["y"].tolist() == [3]


@pytest.mark.parametrize("n", [1, 2, 3, 5])
@pytest.mark.parametrize("kind", [list, tuple])
def test_images_of_unlike_size_are_cut_as_a_list_also_where_their_number_equals_their_channels(
    n: int, kind: type
) -> None:
    images = kind(rows(3, 4 + j, 5) for j in range(n))
    for labels in (list(range(n)), torch.arange(n) if n != 3 else ["a", "b", "c"]):
        batch = {"images": images, "labels": labels, "ragged": [rows(2 + j) for j in range(n)]}
        assert num_samples(batch) == n
        parts = split(batch, [1] * n)
        assert [len(part["images"]) for part in parts] == [1] * n
        assert all(part["images"][0] is image for part, image in zip(parts, images, strict=True))
        assert same(join(parts, [1] * n), batch)


@pytest.mark.parametrize("n", [1, 2, 4])
def test_a_list_of_labels_tells_how_many_samples_lists_of_tensors_of_one_length_hold(n: int) -> None:
    labels = [f"label {j}" for j in range(n)]
    for tensors_ in ([rows(3, 4 + j, 5) for j in range(n)], [rows(3, 6, 6)] * n, [rows(3, dtype=torch.int64)] * n):
        batch = (tuple(tensors_), tuple(labels))
        assert num_samples(batch) == n
        assert [part[1] for part in split(batch, [1] * n)] == [(label,) for label in labels]
        assert [len(part[0]) for part in split(batch, [1] * n)] == [1] * n
    batch = {"views": [rows(8, 3), rows(8, 3)], "names": [f"sample {j}" for j in range(8)]}
    assert num_samples(batch) == 8, "control: here the labels belong to the rows"


def test_a_list_of_sequences_of_unlike_length_is_a_batch_by_itself() -> None:
    sequences = [rows(length) for length in (5, 2, 7)]
    assert num_samples(sequences) == 3
    assert [list(map(len, part)) for part in split(sequences, [2, 1])] == [[5, 2], [7]]
    assert same(join(split(sequences, [2, 1]), [2, 1]), sequences)


@pytest.mark.parametrize("boxes", [[3, 3], [2, 2], [1, 4], [0, 3], [3], [3, 3, 3], [1, 3, 2]])
def test_detection_batches_hold_as_many_samples_as_images_however_many_boxes(boxes: list[int]) -> None:
    n = len(boxes)
    images = tuple(rows(3, 6, 6 + j) for j in range(n))
    targets = tuple({"boxes": rows(k, 4), "labels": rows(k, dtype=torch.int64), "id": j} for j, k in enumerate(boxes))
    for batch in ((images, targets), [list(images), list(targets)], {"pixels": images, "labels": list(targets)}):
        assert num_samples(batch) == n
        parts = split(batch, [1] * n)
        assert [num_samples(part) for part in parts] == [1] * n
        for j, part in enumerate(parts):
            image, target = part.values() if isinstance(part, dict) else part
            assert image[0] is images[j]
            assert target[0] is targets[j]


def test_stacked_images_with_a_list_of_targets_are_cut_together() -> None:
    targets = [{"boxes": rows(2, 4)}, {"boxes": rows(2, 4)}]
    parts = split({"pixel_values": rows(2, 3, 4, 4), "labels": targets}, [1, 1])
    assert [part["pixel_values"].shape for part in parts] == [(1, 3, 4, 4)] * 2
    assert [part["labels"][0] is target for part, target in zip(parts, targets, strict=True)] == [True, True]


@pytest.mark.parametrize("n", [2, 5])
def test_views_and_features_in_lists_keep_the_batch_dimension_inside_also_where_they_are_as_many_as_samples(
    n: int,
) -> None:
    views = [rows(n, 3, 4, 4), rows(n, 3, 4, 4)]
    features = ([rows(n, 5), rows(n, 7)], [rows(n), rows(n, dtype=torch.int64)])
    pair = (rows(n, 4, 6), rows(n, 4) > 2)
    for batch in (views, {"views": views}, features, {"a": pair, "b": (rows(n), {"c": rows(n, 1)})}, [rows(n, 5)]):
        assert num_samples(batch) == n
        assert all(t.shape[0] == 1 for part in split(batch, [1] * n) for t in tensors(part))
        assert same(join(split(batch, [1] * n)), batch)


def test_crops_of_unlike_size_with_labels_are_cut_inside() -> None:
    batch = [[rows(6, 3, 4, 4), rows(6, 3, 2, 2)], rows(6)]
    assert [t.shape[0] for t in tensors(split(batch, [2, 4])[0])] == [2, 2, 2]


def test_a_list_that_may_hold_images_or_crops_is_refused_rather_than_guessed() -> None:
    images = [rows(3, 4, 4), rows(3, 5, 5)]
    with pytest.raises(ValueError, match=r"may hold 3 samples.* or 2, the length of a list.*num_samples="):
        num_samples({"images": images})
    assert num_samples({"images": images, "labels": [0, 1]}) == 2
    assert num_samples({"images": images, "names": ["a", "b", "c"]}) == 3
    three = {"images": [*images, rows(3, 6, 6)], "labels": rows(3)}
    assert num_samples(three) == 3, "both readings agree as long as nothing is cut"
    with pytest.raises(ValueError, match=r"list of 3 tensors with 3 rows each.*cut="):
        split(three, [2, 1])


def test_a_bare_list_of_records_is_refused_where_it_may_be_one_of_batches() -> None:
    assert num_samples([{"ids": rows(5)}, {"ids": rows(7)}]) == 2
    for count in (2, 5):
        with pytest.raises(ValueError, match=rf"may hold 5 samples.* or {count}, the length of a list.*{WAY_OUT}"):
            num_samples([{"ids": rows(5), "words": list("abcde")} for _ in range(count)])


# ---------------------------------------------------------------------------------------------------------------------
# Samples that were never collated

WAY_OUT = re.escape(
    "uncollated samples are put together by torch.utils.data.default_collate(batch); to keep them a list give "
    "cut=lambda batch, start, stop: batch[start:stop] and num_samples=len"
)

SAMPLES: dict[str, Callable[[Tensor, int], Any]] = {
    "tuple with a number": lambda x, j: (x, j),
    "tuple with a tensor without dimensions": lambda x, j: (x, torch.tensor(j)),
    "tuple with a string": lambda x, j: (x, f"label {j}"),
    "tuple with a label or none": lambda x, j: (x, j or None),
    "tuple with a dict": lambda x, j: (x, {"boxes": x[:, None]}),
    "tuple with a tuple": lambda x, j: ((x, j), j),
    "tuple with an array": lambda x, j: (x.numpy(), j),
    "image and token labels": lambda x, j: (x[:, None].expand(-1, 3), x.long()),
    "named tuple": Pair,
    "dataclass": lambda x, j: FrozenSample(x, x.long()),
    "dict": lambda x, j: {"x": x, "y": j},
    "list with a number": lambda x, j: [x, j],  # what DataLoader(pin_memory=True) makes of a tuple
    "list with a tensor without dimensions": lambda x, j: [x, torch.tensor(j)],
    "grey or colour image": lambda x, j: (x[:, None] if j % 2 else x[:, None, None], j),
    "number or 0-d tensor": lambda x, j: (x, torch.tensor(j) if j % 2 else j),
    "tuple with a dict or none": lambda x, j: (x, {"boxes": x[:, None]} if j % 2 else None),
    "list with a list": lambda x, j: [[x, j], x.long()],
}


@pytest.mark.parametrize("count", [1, 2, 3, 7])
@pytest.mark.parametrize("name", SAMPLES)
def test_a_list_of_samples_of_unlike_length_is_cut_between_them(name: str, count: int) -> None:
    batch = [SAMPLES[name](rows(length), j) for j, length in zip(range(count), (5, 2, 7, 4, 1, 3, 9), strict=False)]
    if count > 1:
        assert num_samples(batch) == count
        assert same(cut(batch, 1, 2), batch[1:2])
    parts = split(batch, [1] * count, n=count)
    assert same(parts, [[sample] for sample in batch])
    assert same(join(parts, [1] * count), batch)


LABELLED = [
    name
    for name, sample in SAMPLES.items()
    if name not in ("dict", "tuple with a dict", "image and token labels", "dataclass", "tuple with a dict or none")
    and name != "tuple with a label or none"
]


@pytest.mark.parametrize("count", [1, 2, 4, 6])
@pytest.mark.parametrize("name", LABELLED)
def test_a_list_of_samples_of_one_length_with_a_label_in_each_is_cut_between_them(name: str, count: int) -> None:
    batch = [SAMPLES[name](rows(6), j) for j in range(count)]
    assert num_samples(batch) == count
    parts = split(batch, [1] * count)
    assert same(parts, [[sample] for sample in batch])
    assert same(join(parts, [1] * count), batch)


@pytest.mark.parametrize("count", [3, 4, 6])
@pytest.mark.parametrize("name", [name for name in SAMPLES if name not in LABELLED])
def test_a_list_of_samples_of_one_length_is_refused_rather_than_cut_through_them(name: str, count: int) -> None:
    batch = [SAMPLES[name](rows(6), j) for j in range(count)]
    with pytest.raises(ValueError, match=rf"may hold 6 samples.* or {count}, the length of a list.*{WAY_OUT}"):
        num_samples(batch)
    if count == 6:
        with pytest.raises(ValueError, match=WAY_OUT):
            split(batch, [2, 4], n=6)
    else:
        assert same(split(batch, [1, count - 1], n=count), [batch[:1], batch[1:]]), "a number that is given decides"


def test_one_or_two_tuples_of_tensors_in_a_list_are_records_and_dicts_are_refused() -> None:
    for batch in ([(rows(5), rows(5, 2))], [(rows(5), rows(5, 2)), (rows(5), rows(5, 2))], [Pair(rows(5), rows(5, 3))]):
        assert num_samples(batch) == 5
        assert [len(t) for t in tensors(split(batch, [2, 3])[1])] == [3] * sum(1 for _ in tensors(batch))
    with pytest.raises(ValueError, match=WAY_OUT):
        num_samples([{"x": rows(5), "y": 1}, {"x": rows(5), "y": 2}])


@pytest.mark.parametrize("count", [2, 3, 4])
def test_a_list_of_pairs_of_sequences_may_be_columns_or_samples_and_is_refused(count: int) -> None:
    for kind in (list, tuple):
        pairs = [kind((rows(5 + j), rows(3 + j))) for j in range(count)]
        with pytest.raises(ValueError, match=rf"may hold 2 samples.* or {count}, the length of a list.*{WAY_OUT}"):
            num_samples(pairs)
    columns = [tuple(rows(3, 4 + j, 5) for j in range(count)), tuple(rows(2 + j, 4) for j in range(count))]
    assert num_samples(columns) == count, "images and boxes: what zip(*samples) makes of them"
    assert [len(column) for column in split(columns, [1] * count)[0]] == [1, 1]


@pytest.mark.parametrize("kind", [tuple, list])
def test_a_tuple_of_samples_is_refused(kind: type) -> None:
    for count in (2, 6):
        with pytest.raises(ValueError, match=rf"may hold 6 samples.* or {count}, the length of a tuple.*{WAY_OUT}"):
            num_samples(tuple(kind((rows(6), j)) for j in range(count)))
    with pytest.raises(ValueError, match=rf"batch\[0\]\[0\] has shape \(5,\), batch\[1\].*{WAY_OUT}"):
        num_samples(tuple(kind((rows(5 + j), j)) for j in range(3)))


def test_what_the_default_collation_makes_of_nested_samples_is_cut_inside() -> None:
    first, second = torch.ones(4), torch.zeros(4)
    nested = [((first, second), (second, first)), [[first, 1], [second, 2]], ((first, "a"), (second, "b"))]
    for sample, n in itertools.product(nested, (2, 3, 4)):
        batch = default_collate([sample] * n)
        parts = split(batch, [1] * n)
        assert num_samples(batch) == n
        assert all(len(t) == 1 for part in parts for t in tensors(part))
        assert same(join(parts), batch)
    views = ({"x": rows(4), "t": 0.5}, {"x": rows(4), "t": 1.0})
    assert num_samples(views) == 4
    flags = {"x": rows(3), "masks": (rows(2, 5), 0, rows(4, 5))}
    assert [len(part["masks"]) for part in split(flags, [1, 2])] == [1, 2], "below the root a label is an element too"
    assert num_samples(((rows(4), rows(4)), (rows(4), rows(4)))) == 4


def test_one_sample_of_one_row_is_one_sample_in_either_reading() -> None:
    assert num_samples([(rows(1), 3)]) == num_samples([{"ids": rows(1)}]) == 1
    assert same(split([(rows(1), 3)], [1]), [[(rows(1), 3)]])


def test_entries_without_a_tensor_are_no_samples() -> None:
    columns = [(rows(5), rows(7), rows(6)), (None, None, None)]
    assert num_samples(columns) == 3
    assert [len(part[0]) for part in split(columns, [1, 2])] == [1, 2]


def test_states_below_the_root_keep_their_batch_dimension_inside() -> None:
    batch = {"x": rows(4, 3), "states": [(rows(4, 2), rows(4, 2)), (rows(4, 2), rows(4, 2))]}
    assert num_samples(batch) == 4
    assert [t.shape[0] for t in tensors(split(batch, [1, 3])[1])] == [3] * 5


def test_a_bare_list_of_images_of_unlike_size_holds_samples_also_where_they_are_as_many_as_channels() -> None:
    for count in (1, 2, 3, 4):
        images = [rows(3, 4 + j, 5) for j in range(count)]
        if count > 1:
            assert num_samples(images) == count
            assert [len(part) for part in split(images, [1] * count)] == [1] * count


def test_a_bare_list_of_videos_of_unlike_size_may_be_one_of_batches_of_crops_and_is_refused() -> None:
    crops = [rows(8, 3, 4, 4), rows(8, 3, 4, 4), rows(8, 3, 2, 2)]
    with pytest.raises(ValueError, match=rf"may hold 8 samples.* or 3, the length of a list.*{WAY_OUT}"):
        num_samples(crops)
    assert num_samples([crops, rows(8)]) == 8, "labels decide"
    assert num_samples([rows(8, 3, 4, 4), rows(9, 3, 4, 4)]) == 2, "so do lengths"


def test_limit_what_a_bare_list_or_tuple_of_tensors_holds_is_not_told_by_their_shapes() -> None:
    assert num_samples([rows(3, 8, 8)] * 10) == 3, "images of one size look like ten inputs of three samples"
    assert num_samples([rows(200, 4), rows(100, 4)]) == 2, "two batches of crops look like two sequences"
    pairs = tuple((rows(5 + j), rows(3 + j)) for j in range(4))
    assert num_samples(pairs) == 2, "a tuple is a record: here of four columns"
    assert num_samples(({"x": rows(12), "y": 0}, {"x": rows(12), "y": 1})) == 12, "two dicts in a tuple are two views"
    assert num_samples([[rows(12), rows(12)]] * 10) == 12, "the default collation makes such lists of lists"


def token_loss(model: nn.Module, samples: list[tuple[Tensor, int]]) -> tuple[Tensor, int]:
    """The sum over samples of a classification of each sequence by its mean, collated inside."""
    pooled = torch.stack([model[0](ids).mean(0) for ids, _ in samples])
    labels = torch.tensor([label for _, label in samples])
    return nn.functional.cross_entropy(model[1](pooled), labels, reduction="sum"), len(samples)


def gradients(model: nn.Module, loss: Tensor) -> Tensor:
    return torch.cat([g.flatten() for g in torch.autograd.grad(loss, list(model.parameters()))])


@pytest.mark.parametrize("alike", [True, False])
@pytest.mark.parametrize("loader", [True, False])
def test_a_list_of_pairs_gives_the_gradient_of_the_full_batch(alike: bool, loader: bool) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Embedding(20, 8), nn.Linear(8, 3)).double()
    samples = [(torch.randint(20, (12 if alike else 3 + j,)), j % 3) for j in range(10)]
    loss, count = token_loss(model, samples)
    whole = gradients(model, loss / count)

    accumulator = mb.Accumulator(model, token_loss, micro_batch_size=4)
    data = DataLoader(samples, batch_size=5, collate_fn=list)
    (window,) = mb.windows(data, accumulation_steps=2) if loader else [samples]
    assert accumulator.run(window).micro_batch_sizes == ((3, 2, 3, 2) if loader else (4, 3, 3))
    mine = torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])
    assert (mine - whole).abs().max() <= 1e-12 * whole.abs().max()


def test_control_a_cut_through_time_gives_another_gradient() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Embedding(20, 8), nn.Linear(8, 3)).double()
    samples = [(torch.randint(20, (12,)), j % 3) for j in range(10)]
    loss, count = token_loss(model, samples)
    whole = gradients(model, loss / count)
    pieces = [[(ids[start : start + 4], label) for ids, label in samples] for start in (0, 4, 8)]
    losses = [token_loss(model, piece) for piece in pieces]
    other = gradients(model, sum(x for x, _ in losses) / sum(n for _, n in losses))
    assert (other - whole).norm() > 0.1 * whole.norm()


# ---------------------------------------------------------------------------------------------------------------------
# Any nesting


def nested_batches(n: int) -> st.SearchStrategy[Any]:
    """Random structures around tensors and arrays of n rows, plain lists of length n, and shared leaves."""
    row = st.lists(st.integers(0, 3), max_size=2).map(lambda shape: rows(n, *shape))
    leaf = st.one_of(
        row,
        row.map(Tensor.numpy),
        st.just([f"name {j}" for j in range(n)]),
        st.sampled_from(["text", None, 3, 0.5, torch.tensor(1.0)]),
    )
    keys = st.sampled_from("abcd")
    return st.recursive(
        leaf,
        lambda inner: st.one_of(
            st.dictionaries(keys, inner, max_size=3),
            st.dictionaries(keys, inner, max_size=3).map(UserDict),
            st.tuples(inner, inner),
            st.tuples(inner, inner).map(lambda pair: Pair(*pair)),
            st.tuples(inner, inner).map(lambda pair: FrozenSample(*pair)),
            st.lists(inner, max_size=3),
        ),
        max_leaves=8,
    )


# Parts of more samples than any container has elements: what else is a list of samples has tests of its own.
@given(st.data(), st.lists(st.integers(4, 9), min_size=1, max_size=4))
@settings(max_examples=150, deadline=None)
def test_any_nesting_survives_a_cut_and_a_join(data: st.DataObject, sizes: list[int]) -> None:
    n = sum(sizes)
    batch = {"x": rows(n), "rest": data.draw(nested_batches(n))}
    parts = split(batch, sizes)
    assert num_samples(batch) == n
    assert [num_samples(part) for part in parts] == sizes
    assert all(t.ndim == 0 or len(t) == size for part, size in zip(parts, sizes, strict=True) for t in tensors(part))
    assert same(join(parts), batch)


@given(st.integers(0, 2000), st.integers(1, 300))
def test_even_sizes_are_as_few_as_possible_and_differ_by_at_most_one(n: int, largest: int) -> None:
    sizes = even_sizes(n, largest)
    assert sum(sizes) == n
    assert len(sizes) == -(-n // largest)
    assert all(1 <= size <= largest for size in sizes)
    assert not sizes or max(sizes) - min(sizes) <= 1


def test_even_sizes_of_100_by_32_are_four_times_25_where_a_plain_cut_leaves_a_4() -> None:
    assert even_sizes(100, 32) == [25, 25, 25, 25]
    assert [len(part) for part in rows(100).split(32)] == [32, 32, 32, 4]


def test_a_cut_takes_its_samples_and_refuses_those_that_are_not_there() -> None:
    batch = (rows(N, 2), [f"n{j}" for j in range(N)])
    assert same(cut(batch, 2, 5), (rows(N, 2)[2:5], ["n2", "n3", "n4"]))
    assert len(cut(batch, 3, 3)[0]) == 0
    for start, stop in ((0, 9), (-1, 2), (5, 4)):
        with pytest.raises(ValueError, match=f"samples {start} to {stop} were asked of a batch of 8 samples"):
            cut(batch, start, stop)


@pytest.mark.parametrize("sizes", [[3, 3], [5, 5], [10, -2], []])
def test_sizes_that_do_not_divide_the_batch_are_refused(sizes: list[int]) -> None:
    with pytest.raises(ValueError, match=r"do not divide the batch, which has 8 samples"):
        split(rows(N), sizes)


@pytest.mark.parametrize("empty", [torch.zeros(0, 3), {"x": np.zeros((0, 2))}, (torch.zeros(0), ["a"], np.zeros(0))])
def test_an_empty_batch_has_no_samples_and_no_parts(empty: Any) -> None:
    assert num_samples(empty) == 0
    assert split(empty, []) == []
    assert [num_samples(part) for part in split(empty, [0, 0])] == [0, 0]


def test_mapping_tensors_leaves_structure_and_other_leaves_alone() -> None:
    array = np.zeros(2)
    batch = {"x": Pair(rows(2), [torch.tensor(1.0), "text"]), "array": array}
    doubled = map_tensors(batch, lambda t: t * 2)
    assert same(doubled, {"x": Pair(rows(2) * 2, [torch.tensor(2.0), "text"]), "array": array})
    assert [t.tolist() for t in tensors(batch)] == [[0, 1], 1.0]


# ---------------------------------------------------------------------------------------------------------------------
# What cannot be cut


def test_leaves_of_different_length_are_refused_by_name_and_shape() -> None:
    batch = {"inputs": {"ids": rows(8, 5)}, "pairs": (rows(8), Sample(rows(8), rows(7, 2)))}
    with pytest.raises(ValueError, match=r"batch\['inputs'\]\['ids'\] has shape \(8, 5\).*") as error:
        num_samples(batch)
    assert "batch['pairs'][1].y has shape (7, 2)" in str(error.value)
    assert "cut=lambda batch, start, stop" in str(error.value)
    assert "num_samples=lambda batch" in str(error.value)


class Slots:
    __slots__ = ("x",)

    def __init__(self, x: Tensor) -> None:
        self.x = x


HIDDEN: dict[str, Callable[[], Any]] = {
    "SimpleNamespace": lambda: SimpleNamespace(x=rows(4)),
    "Slots": lambda: Slots(rows(4)),
    "deque": lambda: deque([rows(4)]),
    "set": lambda: {rows(4)},
    "PackedSequence": lambda: nn.utils.rnn.pack_sequence([rows(3), rows(1)]),
}


@pytest.mark.parametrize("name", HIDDEN)
def test_tensors_in_containers_of_unknown_classes_are_refused_rather_than_shared(name: str) -> None:
    with pytest.raises(ValueError, match=rf"batch\['hidden'\] is a {name}, an unknown container.*cut="):
        num_samples({"x": rows(4), "hidden": HIDDEN[name]()})
    assert num_samples({"x": rows(4), "without tensors": SimpleNamespace(depth=2), "deque": deque([1])}) == 4


def test_a_packed_sequence_is_never_cut_through_time() -> None:
    packed = nn.utils.rnn.pack_sequence([rows(5)])  # its two tensors both have length 5
    with pytest.raises(ValueError, match="batch is a PackedSequence, an unknown container of tensors"):
        num_samples(packed)


@pytest.mark.filterwarnings("ignore:Sparse:UserWarning", "ignore:The PyTorch API of nested tensors:UserWarning")
@pytest.mark.parametrize("kind", ["sparse_coo", "sparse_csr", "nested"])
def test_sparse_and_nested_tensors_are_refused_by_name(kind: str) -> None:
    make = {
        "sparse_coo": lambda: rows(4, 4).to_sparse(),
        "sparse_csr": lambda: rows(4, 4).to_sparse_csr(),
        "nested": lambda: torch.nested.nested_tensor([rows(2), rows(3), rows(1), rows(4)]),
    }[kind]
    with pytest.raises(ValueError, match=rf"batch\['graph'\] is a .*{kind}.* tensor, which cannot be cut.*cut="):
        num_samples({"x": rows(4), "graph": make()})


@pytest.mark.parametrize(
    "batch", [None, "text", 3, {}, [], {"a": ["b", "c"]}, torch.tensor(1.0), np.array(2), object()]
)
def test_a_batch_without_a_batch_dimension_is_refused(batch: Any) -> None:
    with pytest.raises(
        ValueError, match=rf"the batch, a {type(batch).__name__}, holds no tensor with a batch dimension"
    ):
        num_samples(batch)


def test_parts_that_do_not_belong_together_are_not_joined() -> None:
    with pytest.raises(ValueError, match="nothing to join"):
        join([])
    with pytest.raises(ValueError, match=r"batch\['x'\] cannot be joined: shapes \[\(2, 3\), \(2, 4\)\]"):
        join([{"x": rows(2, 3)}, {"x": rows(2, 4)}])
    with pytest.raises(ValueError, match="batch cannot be joined: the parts differ in structure"):
        join([{"x": rows(2)}, {"y": rows(2)}])
