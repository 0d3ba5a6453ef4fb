"""A batch of any structure is cut along its batch dimension, nothing lost or copied; what cannot be cut is named."""

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
    with pytest.raises(ValueError, match=r"may hold 5 samples.* or 2, the length of a list"):
        num_samples([{"ids": rows(5)}, {"ids": rows(5)}])


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


# ---------------------------------------------------------------------------------------------------------------------
# Samples that were never collated


@pytest.mark.parametrize("lengths", [(12,) * 10, (5, 7, 6, 4)])
@pytest.mark.parametrize("label", [int, float, str, torch.tensor])
def test_a_list_of_tensors_with_labels_is_warned_of(lengths: tuple[int, ...], label: Any) -> None:
    batch = [(rows(length), label(j)) for j, length in enumerate(lengths)]
    with pytest.warns(UserWarning, match=rf"a list of {len(lengths)} tuples with a label in each looks like samples"):
        num_samples(batch)


def test_two_pairs_with_a_setting_each_are_two_tasks_of_one_batch() -> None:
    for batch in ([(rows(8), "a"), (rows(8), "b")], ((rows(8), 0.5),), [[rows(8), 1]] * 4):
        assert num_samples(batch) == 8
        assert [len(t) for t in tensors(split(batch, [3, 5])[0])] == [3] * len(batch)


def test_known_limit_samples_that_nobody_collated_are_read_as_a_batch() -> None:
    assert num_samples([(rows(12), rows(12)) for _ in range(10)]) == 12
    with pytest.warns(UserWarning, match="looks like samples that nobody has collated"):
        assert num_samples([(rows(12), j) for j in range(10)]) == 12


def token_loss(model: nn.Module, samples: list[tuple[Tensor, int]]) -> tuple[Tensor, int]:
    """The sum over samples of a classification of each sequence by its mean, collated inside."""
    pooled = torch.stack([model[0](ids).mean(0) for ids, _ in samples])
    labels = torch.tensor([label for _, label in samples])
    return nn.functional.cross_entropy(model[1](pooled), labels, reduction="sum"), len(samples)


def gradient_of(model: nn.Module, loss: Tensor) -> Tensor:
    return torch.cat([g.flatten() for g in torch.autograd.grad(loss, list(model.parameters()))])


@pytest.mark.parametrize("alike", [True, False])
@pytest.mark.parametrize("loader", [True, False])
def test_a_list_said_to_be_one_of_samples_gives_the_gradient_of_the_full_batch(alike: bool, loader: bool) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Embedding(20, 8), nn.Linear(8, 3)).double()
    samples = [(torch.randint(20, (12 if alike else 3 + j,)), j % 3) for j in range(10)]
    loss, count = token_loss(model, samples)
    whole = gradient_of(model, loss / count)
    data = DataLoader(samples, batch_size=5, collate_fn=list)
    own: dict[str, Any] = {"cut": lambda batch, start, stop: batch[start:stop], "num_samples": len}
    (window,) = mb.windows(data, accumulation_steps=2, **own) if loader else [samples]
    report = mb.Accumulator(model, token_loss, micro_batch_size=4, **own).run(window)
    assert report.micro_batch_sizes == ((3, 2, 3, 2) if loader else (4, 3, 3))
    mine = torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])
    assert (mine - whole).abs().max() <= 1e-12 * whole.abs().max()


def test_control_a_cut_through_time_gives_another_gradient() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Embedding(20, 8), nn.Linear(8, 3)).double()
    samples = [(torch.randint(20, (12,)), j % 3) for j in range(10)]
    loss, count = token_loss(model, samples)
    whole = gradient_of(model, loss / count)
    pieces = [[(ids[start : start + 4], label) for ids, label in samples] for start in (0, 4, 8)]
    losses = [token_loss(model, piece) for piece in pieces]
    other = gradient_of(model, sum(x for x, _ in losses) / sum(n for _, n in losses))
    assert (other - whole).norm() > 0.1 * whole.norm()
