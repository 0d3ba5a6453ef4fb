"""A window holds its samples once and in order, as often as it runs, wherever its micro-batches come from."""

import pickle
from collections import namedtuple
from collections.abc import Iterable, Iterator
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence
from torch.utils.data import DataLoader, IterableDataset, TensorDataset

import macrobatch as mb
from macrobatch.batch import cut_batch


class Counting:
    """An iterable of micro-batches that counts how many were drawn from it."""

    def __init__(self, micro_batches: Iterable[Any]) -> None:
        self.micro_batches = list(micro_batches)
        self.drawn = 0

    def __iter__(self) -> Iterator[Any]:
        for micro_batch in self.micro_batches:
            self.drawn += 1
            yield micro_batch


def numbered(*sizes: int) -> list[Tensor]:
    """Micro-batches of these sizes that number their samples 0, 1, 2, ... throughout."""
    return list(torch.arange(sum(sizes)).split(list(sizes)))


def samples_in(window: Iterable[Any]) -> list[int]:
    return [number for micro_batch in window for number in micro_batch.tolist()]


def failing(micro_batches: Iterable[Any], error: BaseException) -> Iterator[Any]:
    yield from micro_batches
    raise error


# ---------------------------------------------------------------------------------------------------------------------
# Window


@pytest.mark.parametrize("as_iterator", [False, True])
def test_a_window_knows_its_samples_and_can_be_run_again(as_iterator: bool) -> None:
    micro_batches = numbered(3, 1, 2)
    window = mb.Window(iter(micro_batches) if as_iterator else micro_batches)
    first, second = list(window), list(window)
    assert all(a is b is c for a, b, c in zip(first, second, micro_batches, strict=True))
    assert (len(window), window.num_samples, window.micro_batch_sizes) == (3, 6, (3, 1, 2))


def test_control_a_bare_iterator_has_neither_a_length_nor_a_second_run() -> None:
    bare = iter(numbered(3, 1, 2))
    assert len(list(bare)) == 3
    assert list(bare) == []
    assert not hasattr(bare, "__len__")


def test_two_loops_over_one_window_that_is_filling_see_the_same() -> None:
    window = mb.Window(iter(numbered(2, 1, 3)))
    pairs = [(int(a[0]), int(b[0])) for a in window for b in window]
    assert pairs == [(a, b) for a in (0, 2, 3) for b in (0, 2, 3)]


def test_an_iterator_is_drawn_from_only_as_the_window_is_read() -> None:
    source = Counting(numbered(1, 1, 1, 1))
    window = mb.Window(iter(source))
    assert source.drawn == 0
    reader = iter(window)
    for expected in (1, 2, 3):
        next(reader)
        assert source.drawn == expected
    assert repr(window) == "Window(3 micro-batches so far)"
    assert len(window) == 4
    assert repr(window) == "Window(4 micro-batches)"
    assert (samples_in(window), source.drawn) == ([0, 1, 2, 3], 4)


@pytest.mark.parametrize("micro_batch_size", [None, 5, 2])
def test_a_window_fills_while_it_runs_exactly_one_micro_batch_ahead(micro_batch_size: int | None) -> None:
    source = Counting([torch.ones(5, 2) for _ in range(6)])
    drawn_at_forward = []

    def loss_fn(model: nn.Module, x: Tensor) -> Tensor:
        drawn_at_forward.append(source.drawn)
        return model(x).mean()

    model = nn.Linear(2, 1)
    accumulator = mb.Accumulator(model, loss_fn, micro_batch_size=micro_batch_size)
    window = mb.Window(iter(source))
    accumulator.run(window)
    parts = 1 if micro_batch_size != 2 else 3  # of each micro-batch
    expected = [min(step // parts + 1, 6) for step in range(1, 6 * parts + 1)]
    assert drawn_at_forward == expected
    model.zero_grad()
    accumulator.run(window)
    assert drawn_at_forward[6 * parts :] == [6] * (6 * parts), "the second run draws nothing"


def test_a_window_of_a_window_keeps_sizes_that_only_its_maker_knows() -> None:
    window = mb.Window(iter(["abc", "d"]), num_samples=len)
    assert mb.Window(window).is_filled
    assert window.is_filled
    assert mb.Window(window).micro_batch_sizes == (3, 1)
    assert list(mb.Window(window)) == ["abc", "d"]


@pytest.mark.parametrize("micro_batches", [[], (), iter([])])
def test_a_window_may_be_empty(micro_batches: Iterable[Any]) -> None:
    window = mb.Window(micro_batches)
    assert (len(window), window.num_samples, window.micro_batch_sizes, list(window)) == (0, 0, (), [])


@pytest.mark.parametrize(
    ("batch", "name"),
    [
        (torch.ones(3), "Tensor"),
        (np.ones(3), "ndarray"),
        ({"x": torch.ones(3)}, "dict"),
        (namedtuple("Pair", "x y")(torch.ones(3), torch.ones(3)), "Pair"),
        ("text", "str"),
        (3, "int"),
        (SimpleNamespace(x=torch.ones(3)), "SimpleNamespace"),
    ],
)
def test_a_batch_given_as_a_window_is_refused_with_what_to_do(batch: Any, name: str) -> None:
    with pytest.raises(ValueError, match=rf"sequence of micro-batches, not a {name}: give Window\(\[micro_batch"):
        mb.Window(batch)


def test_a_micro_batch_that_does_not_fit_together_is_refused_by_name() -> None:
    with pytest.raises(ValueError, match=r"batch\['y'\] has shape \(2,\)"):
        mb.Window([{"x": torch.ones(3), "y": torch.ones(2)}])


@pytest.mark.parametrize("error", [OSError("disk gone"), KeyboardInterrupt("stop")])
def test_a_window_whose_source_failed_never_passes_for_a_complete_one(error: BaseException) -> None:
    window = mb.Window(failing(numbered(2, 2), error))
    with pytest.raises(type(error), match=str(error)):
        list(window)
    for read in (list, len, lambda window: window.num_samples, pickle.dumps, lambda window: list(window.cut(1))):
        with pytest.raises(RuntimeError, match=rf"window is incomplete.*{type(error).__name__}: {error}"):
            read(window)


def test_a_micro_batch_that_cannot_be_counted_does_not_vanish_from_its_window() -> None:
    bad = {"x": torch.ones(3), "y": torch.ones(2)}
    window = mb.Window(iter([{"x": torch.ones(2)}, bad, {"x": torch.ones(1)}]))
    with pytest.raises(ValueError, match="differ in their number of samples"):
        len(window)
    with pytest.raises(RuntimeError, match=r"window is incomplete.*differ in their number of samples"):
        len(window)


def test_a_filled_window_travels_between_processes_whatever_counted_its_samples() -> None:
    window = mb.Window(iter(numbered(3, 1)), num_samples=lambda x: 10 * len(x))  # a lambda cannot travel
    copy = pickle.loads(pickle.dumps(window))
    assert samples_in(copy) == [0, 1, 2, 3]
    assert copy.micro_batch_sizes == (30, 10)


def test_a_cut_window_has_the_same_samples_in_even_parts_and_joins_nothing() -> None:
    window = mb.Window(numbered(10, 2, 4, 1))
    cut = window.cut(4)
    assert cut.micro_batch_sizes == (4, 3, 3, 2, 4, 1)
    assert samples_in(cut) == list(range(17))
    assert window.micro_batch_sizes == (10, 2, 4, 1), "the window itself is as before"
    assert next(iter(window.cut(10))) is next(iter(window)), "what fits is passed on as it is"


def test_a_window_is_cut_while_it_fills() -> None:
    source = Counting(numbered(4, 4, 4))
    reader = iter(mb.Window(iter(source)).cut(2))
    next(reader), next(reader)
    assert source.drawn == 1
    next(reader)
    assert source.drawn == 2


def test_parts_of_a_list_of_sequences_are_counted_as_cut_though_a_part_alone_looks_like_a_tensor() -> None:
    sequences = {"ids": [torch.ones(length) for length in (5, 2, 7)]}
    window = mb.Window([sequences]).cut(1)
    assert window.micro_batch_sizes == (1, 1, 1)
    assert mb.Window([next(iter(window))]).micro_batch_sizes == (5,), "control: counted anew it is another number"


def columns(batch: Tensor, start: int, stop: int) -> Tensor:
    return batch[:, start:stop]


def test_an_own_cut_and_an_own_count_serve_a_batch_dimension_in_second_place() -> None:
    batch = torch.arange(14).reshape(2, 7)
    window = mb.Window([batch], num_samples=lambda x: x.shape[1])
    parts = list(window.cut(3, cut=columns))
    assert [part.tolist() for part in parts] == [part.tolist() for part in batch.split([3, 2, 2], dim=1)]
    assert [x.shape for x in cut_batch(batch, [6, 1], columns)] == [(2, 6), (2, 1)]
    assert [x.shape for x in mb.Window.of_parts(batch, 4, columns, lambda x: x.shape[1])] == [(2, 4), (2, 3)]


@pytest.mark.parametrize("size", [0, -1, 2.5, True, "4", None])
def test_a_micro_batch_size_must_be_an_integer_of_at_least_one(size: Any) -> None:
    message = rf"micro_batch_size must be an integer of at least 1, got {size!r}"
    with pytest.raises(ValueError, match=message):
        mb.Window(numbered(3)).cut(size)
    with pytest.raises(ValueError, match=message):
        mb.collate_windows(micro_batch_size=size)


@pytest.mark.gpu
def test_a_pinned_window_lies_in_page_locked_memory_and_keeps_everything_else() -> None:
    window = mb.Window([{"x": torch.ones(2, 3), "names": ["a", "b"]}, {"x": torch.ones(1, 3), "names": ["c"]}])
    pinned = window.pin_memory()
    assert all(micro_batch["x"].is_pinned() for micro_batch in pinned)
    assert [micro_batch["names"] for micro_batch in pinned] == [["a", "b"], ["c"]]
    assert pinned.micro_batch_sizes == (2, 1)
    assert not next(iter(window))["x"].is_pinned()


@pytest.mark.gpu
def test_a_loader_that_pins_memory_pins_windows() -> None:
    loader = DataLoader(
        TensorDataset(torch.arange(5)),
        batch_size=5,
        collate_fn=mb.collate_windows(micro_batch_size=2),
        pin_memory=True,
    )
    (window,) = loader
    assert all(micro_batch[0].is_pinned() for micro_batch in window)


# ---------------------------------------------------------------------------------------------------------------------
# windows(loader)


@pytest.mark.parametrize("steps", [1, 2, 3, 4, 100])
def test_micro_batches_are_grouped_by_number_and_the_last_window_is_as_short_as_it_is(steps: int) -> None:
    loader = numbered(3, 3, 3, 3, 3, 3, 2)
    grouped = mb.windows(loader, accumulation_steps=steps)
    assert [len(window) for window in grouped] == [min(steps, 7 - start) for start in range(0, 7, steps)]
    assert [number for window in grouped for number in samples_in(window)] == list(range(20))
    assert len(grouped) == len(list(grouped)) == -(-7 // steps)
    assert all(a is b for a, b in zip((x for window in grouped for x in window), loader, strict=True)), "nothing is cut"


def test_a_window_is_loading_until_what_it_is_cut_from_is_filled() -> None:
    data = [torch.ones(4, 2), torch.ones(4, 2)]
    whole, coming = mb.Window(data), mb.Window(iter(data))
    assert [w.is_loading for w in (whole, whole.cut(2), coming, coming.cut(2), coming.cut(3).cut(2))] == [
        *(False, False),
        *(True, True, True),
    ]
    cut = coming.cut(2)
    next(iter(cut))
    assert cut.is_loading
    coming.fill()
    assert not cut.is_loading
    assert not cut.is_filled
    assert cut.fill().is_filled
    assert cut._uncut is None, "what it was cut from is let go"


@given(st.lists(st.integers(1, 17), max_size=12), st.integers(1, 40))
@settings(max_examples=150, deadline=None)
def test_windows_hold_exactly_batch_size_samples_the_last_one_the_rest_all_samples_once_and_in_order(
    sizes: list[int], batch_size: int
) -> None:
    total = sum(sizes)
    grouped = mb.windows(numbered(*sizes), batch_size=batch_size)
    for _ in range(2):
        filled = list(grouped)
        assert [number for window in filled for number in samples_in(window)] == list(range(total))
        rest = [total % batch_size] if total % batch_size else []
        assert [window.num_samples for window in filled] == [batch_size] * (total // batch_size) + rest
        parts = [size for window in filled for size in window.micro_batch_sizes]
        assert parts == [len(micro_batch) for window in filled for micro_batch in window]
        borders = np.cumsum(parts).tolist()
        needed = {*np.cumsum(sizes).tolist(), *range(batch_size, total, batch_size)}
        assert set(borders) == needed, "cut where a window ends, and nowhere else; never joined"


def test_control_grouping_by_a_fixed_number_of_micro_batches_gives_windows_of_other_sizes() -> None:
    grouped = mb.windows(numbered(3, 5, 2, 4), accumulation_steps=2)
    assert [window.num_samples for window in grouped] == [8, 6]
    assert [window.num_samples for window in mb.windows(numbered(3, 5, 2, 4), batch_size=7)] == [7, 7]


def test_a_micro_batch_larger_than_a_window_is_cut_into_several() -> None:
    batch = {"x": torch.arange(23), "names": [str(j) for j in range(23)]}
    filled = list(mb.windows([batch], batch_size=5))
    assert [window.micro_batch_sizes for window in filled] == [(5,), (5,), (5,), (5,), (3,)]
    assert [name for window in filled for part in window for name in part["names"]] == batch["names"]


def test_lists_of_sequences_are_cut_at_the_border_and_their_rests_counted_as_cut() -> None:
    loader = [{"ids": [torch.ones(length) for length in lengths]} for lengths in ((4, 2, 9), (3, 5))]
    filled = list(mb.windows(loader, batch_size=2))
    assert [window.micro_batch_sizes for window in filled] == [(2,), (1, 1), (1,)]
    assert [len(ids) for window in filled for part in window for ids in part["ids"]] == [4, 2, 9, 3, 5]


def test_own_cut_and_own_count_serve_windows_too() -> None:
    batches = list(torch.arange(20).reshape(2, 10).split([6, 4], dim=1))
    grouped = mb.windows(batches, batch_size=4, cut=columns, num_samples=lambda x: x.shape[1])
    assert [window.micro_batch_sizes for window in grouped] == [(4,), (2, 2), (2,)]


@pytest.mark.parametrize("read", [0, 1, 2, 3])
@pytest.mark.parametrize("grouping", [{"accumulation_steps": 3}, {"batch_size": 6}])
def test_what_a_user_leaves_undrawn_belongs_to_its_window_not_to_the_next(read: int, grouping: dict[str, int]) -> None:
    kept, first = [], []
    for window in mb.windows(Counting(numbered(2, 2, 2, 2, 2, 2, 1)), **grouping):
        kept.append(window)
        for position, micro_batch in enumerate(window):
            if position == read:
                break  # early, or never begun
            first.append(int(micro_batch[0]))
    assert [number for window in kept for number in samples_in(window)] == list(range(13))
    assert first == [number for window in ([0, 2, 4], [6, 8, 10], [12]) for number in window[:read]]


def test_windows_read_one_micro_batch_ahead_of_what_is_asked() -> None:
    source = Counting(numbered(1, 1, 1, 1, 1))
    reader = iter(mb.windows(source, accumulation_steps=2))
    assert source.drawn == 0
    window = next(reader)
    assert source.drawn == 1
    assert len(window) == 2
    assert source.drawn == 2
    next(reader)
    assert source.drawn == 3


def test_windows_of_an_iterator_have_one_pass_and_no_length() -> None:
    for grouping in ({"accumulation_steps": 2}, {"batch_size": 3}):
        grouped = mb.windows(iter(numbered(2, 2, 1)), **grouping)
        with pytest.raises(TypeError, match=r"the loader, a list_iterator, (has no length|does not tell its samples)"):
            len(grouped)
        assert sum(window.num_samples for window in grouped) == 5
        with pytest.raises(ValueError, match=r"a list_iterator, was used up in an earlier pass: give what can be iter"):
            list(grouped)


def test_a_pass_that_was_left_goes_on_where_an_iterator_stands() -> None:
    grouped = mb.windows(iter(numbered(2, 2, 1)), accumulation_steps=1)
    assert next(iter(grouped)).num_samples == 2
    assert sum(window.num_samples for window in grouped) == 3


def test_a_loader_that_fails_in_the_middle_raises_its_own_error_and_leaves_no_window_that_looks_complete() -> None:
    grouped = mb.windows(failing(numbered(2, 2, 2), OSError("disk gone")), accumulation_steps=2)
    seen: list[mb.Window] = []

    def run_all() -> None:
        for window in grouped:
            seen.append(window)
            window.fill()

    with pytest.raises(OSError, match="disk gone"):
        run_all()
    assert len(seen[0]) == 2
    with pytest.raises(RuntimeError, match=r"window is incomplete.*OSError: disk gone"):
        len(seen[1])


def test_after_an_error_that_the_user_catches_the_next_window_is_refused_too() -> None:
    grouped = iter(mb.windows(failing(numbered(2, 2), OSError("disk gone")), accumulation_steps=3))
    window = next(grouped)
    with pytest.raises(OSError, match="disk gone"):
        window.fill()
    with pytest.raises(RuntimeError, match="window is incomplete"):
        next(grouped)


def test_an_empty_loader_gives_no_window() -> None:
    for grouping in ({"accumulation_steps": 2}, {"batch_size": 3}):
        assert list(mb.windows([], **grouping)) == []
    assert len(mb.windows([], accumulation_steps=2)) == 0


@pytest.mark.parametrize("drop_last", [False, True])
@pytest.mark.parametrize("batch_size", [1, 4, 6, 7, 100])
def test_windows_of_a_data_loader_know_their_number(batch_size: int, drop_last: bool) -> None:
    loader = DataLoader(TensorDataset(torch.arange(23)), batch_size=4, shuffle=True, drop_last=drop_last)
    grouped = mb.windows(loader, batch_size=batch_size)
    seen = [sorted(number for window in grouped for x in window for number in x[0].tolist()) for _ in range(2)]
    assert len(grouped) == len(list(grouped))
    assert len(seen[0]) == (20 if drop_last else 23)
    assert all(len(set(numbers)) == len(numbers) for numbers in seen)
    assert len(mb.windows(loader, accumulation_steps=4)) == 2


class Endless(IterableDataset[Tensor]):
    def __iter__(self) -> Iterator[Tensor]:
        yield from torch.arange(7)


def test_a_loader_that_does_not_know_its_samples_gives_windows_without_a_length() -> None:
    loader = DataLoader(Endless(), batch_size=2)
    assert [window.num_samples for window in mb.windows(loader, batch_size=3)] == [3, 3, 1]
    with pytest.raises(TypeError, match="DataLoader, does not tell its samples, so its windows have no length"):
        len(mb.windows(loader, batch_size=3))
    with pytest.raises(TypeError):
        len(mb.windows(loader, accumulation_steps=3))
    with pytest.raises(TypeError, match="list, does not tell its samples"):
        len(mb.windows(numbered(2, 2), batch_size=3))


@pytest.mark.parametrize(
    ("grouping", "message"),
    [
        ({}, r"either accumulation_steps or batch_size, got accumulation_steps=None, batch_size=None"),
        ({"accumulation_steps": 2, "batch_size": 3}, r"either accumulation_steps or batch_size, got"),
        ({"accumulation_steps": 0}, r"accumulation_steps must be an integer of at least 1, got 0"),
        ({"accumulation_steps": 2.0}, r"accumulation_steps must be an integer of at least 1, got 2.0"),
        ({"batch_size": -4}, r"batch_size must be an integer of at least 1, got -4"),
        ({"batch_size": True}, r"batch_size must be an integer of at least 1, got True"),
    ],
)
def test_windows_refuse_a_grouping_that_means_nothing(grouping: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        mb.windows(numbered(2), **grouping)


@pytest.mark.parametrize(
    ("loader", "message"),
    [
        (None, "gives micro-batches when it is iterated, got None: give a DataLoader, or a list of micro-batches"),
        (7, "got 7: give a DataLoader"),
        ("data.bin", "got 'data.bin': give a DataLoader"),
        (torch.nn.Sequential(), "got a Sequential: give a DataLoader"),
        (TensorDataset(torch.arange(3)), r"got a TensorDataset, which gives samples: give DataLoader\(dataset, batch_"),
        (torch.arange(3), r"got a Tensor, a batch: give it to Accumulator.run .*, or give \[batch\]"),
        ({"x": torch.arange(3)}, "got a dict, a batch: give it to Accumulator.run"),
        (mb.windows([torch.arange(3)], 1), "got a Windows, which gives windows already: run them as they come"),
    ],
)
def test_what_is_no_loader_is_refused_before_it_is_iterated(loader: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        mb.windows(loader, accumulation_steps=2)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"batch_size": lambda: 8},
            r"batch_size must be callable with \(samples\), and .* is not: too many .* It tells",
        ),
        ({"batch_size": mb.BatchSchedule}, "got the class BatchSchedule: give one of its objects, or a function"),
        (
            {"batch_size": 3, "cut": 3},
            r"cut must be callable with \(batch, start, stop\), got 3, which cannot be called",
        ),
        ({"batch_size": 3, "num_samples": 4}, r"num_samples must be callable with \(batch\), got 4"),
        ({"batch_size": 3, "process_group": "gloo"}, "process_group must be 'auto', None .*, got 'gloo'"),
        ({"accumulation_steps": numbered}, "accumulation_steps must be an integer of at least 1, got a function"),
    ],
)
def test_windows_refuse_what_they_could_not_use_when_they_are_made(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        mb.windows(numbered(2), **options)


def test_sizes_may_be_integers_of_numpy() -> None:
    grouped = mb.windows(DataLoader(TensorDataset(torch.arange(10)), batch_size=4), batch_size=np.int64(5))
    assert [window.num_samples for window in grouped] == [5, 5]
    assert len(grouped) == 2
    assert mb.Window(numbered(5)).cut(np.int32(2)).micro_batch_sizes == (2, 2, 1)


def test_a_window_of_windows_and_a_count_that_is_no_function_are_refused() -> None:
    for windows in ([mb.Window(numbered(2))], mb.windows(numbered(2, 2), accumulation_steps=1)):
        with pytest.raises(
            ValueError, match="a Window holds micro-batches, and got windows: run each of them as it is"
        ):
            mb.Window(windows).fill()
    with pytest.raises(ValueError, match=r"num_samples must be callable with \(micro_batch\), got 2, which cannot be"):
        mb.Window(numbered(2), num_samples=2)
    with pytest.raises(
        ValueError, match=r"and <lambda>\(\) is not: too many .*\. It returns how many samples there are"
    ):
        mb.Window(numbered(2), num_samples=lambda: 2)


def test_an_error_inside_an_own_count_stays_its_own() -> None:
    def broken(micro_batch: Any) -> int:
        return len(None)

    with pytest.raises(TypeError, match="object of type 'NoneType' has no len"):
        mb.Window(numbered(2), num_samples=broken)


@pytest.mark.parametrize(
    ("collate", "options", "message"),
    [
        (
            8,
            {},
            r"collate must be callable with \(samples\), got 8, which cannot be called: give a function, collate=l",
        ),
        (None, {}, r"collate must be callable with \(samples\), got None"),
        (lambda x, y: x, {}, r"missing a required argument: 'y'. It makes a list of samples a batch"),
        (list, {"num_samples": 3}, r"num_samples must be callable with \(micro_batch\), got 3"),
    ],
)
def test_a_collation_that_cannot_work_is_refused_before_workers_start(
    collate: Any, options: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        mb.collate_windows(collate, micro_batch_size=8, **options)


def test_a_class_may_collate() -> None:
    window = mb.collate_windows(list, micro_batch_size=2, num_samples=len)(sentences(3))
    assert (window.micro_batch_sizes, [type(micro_batch) for micro_batch in window]) == ((2, 1), [list, list])


def test_a_loader_that_yields_windows_is_not_grouped_again() -> None:
    loader = DataLoader(TensorDataset(torch.arange(8)), batch_size=4, collate_fn=mb.collate_windows(micro_batch_size=2))
    with pytest.raises(ValueError, match=r"the loader yields windows already .*: run them as they come"):
        list(mb.windows(loader, accumulation_steps=2))


# ---------------------------------------------------------------------------------------------------------------------
# collate_windows


def sentences(n: int = 10) -> list[Tensor]:
    """Sentence j has 1 + (7 j mod 5) tokens, all of them j + 1, so that no token looks like padding."""
    return [torch.full((1 + 7 * j % 5,), j + 1) for j in range(n)]


def padded(samples: list[Tensor]) -> dict[str, Tensor]:
    return {"ids": pad_sequence(samples, batch_first=True), "lengths": torch.tensor([len(s) for s in samples])}


def test_a_loader_yields_windows_of_even_micro_batches() -> None:
    loader = DataLoader(
        TensorDataset(torch.arange(25)), batch_size=10, collate_fn=mb.collate_windows(micro_batch_size=4)
    )
    filled = list(loader)
    assert [window.micro_batch_sizes for window in filled] == [(4, 3, 3), (4, 3, 3), (3, 2)]
    assert [n for window in filled for part in window for n in part[0].tolist()] == list(range(25))


def test_each_micro_batch_is_padded_to_its_own_longest_sample_only() -> None:
    samples = sentences()
    window = mb.collate_windows(padded, micro_batch_size=3)(samples)
    assert window.micro_batch_sizes == (3, 3, 2, 2)
    widths = [part["ids"].shape[1] for part in window]
    assert widths == [int(part["lengths"].max()) for part in window]
    cells = sum(part["ids"].numel() for part in window)
    assert cells < padded(samples)["ids"].numel(), "control: one padding for the whole batch is larger"
    for j, part in zip((0, 3, 6, 8), window, strict=True):
        assert all(torch.equal(row[: len(s)], s) for row, s in zip(part["ids"], samples[j:], strict=False))


def test_worker_processes_cut_and_collate_windows() -> None:
    loader = DataLoader(
        sentences(25), batch_size=10, num_workers=2, collate_fn=mb.collate_windows(padded, micro_batch_size=4)
    )
    for _ in range(2):
        filled = list(loader)
        assert [window.micro_batch_sizes for window in filled] == [(4, 3, 3), (4, 3, 3), (3, 2)]
        first_tokens = [int(row[0]) for window in filled for part in window for row in part["ids"]]
        assert first_tokens == list(range(1, 26))


def test_spawned_worker_processes_cut_and_collate_windows() -> None:
    loader = DataLoader(
        TensorDataset(torch.arange(5)),
        batch_size=5,
        num_workers=1,
        multiprocessing_context="spawn",
        collate_fn=mb.collate_windows(micro_batch_size=2),
    )
    (window,) = loader
    assert [part[0].tolist() for part in window] == [[0, 1], [2, 3], [4]]


def test_windows_of_a_loader_run_to_the_full_batchs_gradient() -> None:
    torch.manual_seed(0)
    model = nn.Linear(3, 1).double()
    x, y = torch.randn(11, 3, dtype=torch.float64), torch.randn(11, 1, dtype=torch.float64)
    loader = DataLoader(TensorDataset(x, y), batch_size=11, collate_fn=mb.collate_windows(micro_batch_size=4))
    accumulator = mb.Accumulator(model, lambda model, batch: nn.functional.mse_loss(model(batch[0]), batch[1]))
    (window,) = loader
    accumulator.run(window)
    assert model.weight.grad is not None
    mine = model.weight.grad.clone()
    (expected,) = torch.autograd.grad(nn.functional.mse_loss(model(x), y), [model.weight])
    assert torch.allclose(mine, expected, rtol=0, atol=1e-12)


def test_a_collation_into_objects_of_an_own_class_says_how_many_samples_they_hold() -> None:
    def graphs(samples: list[int]) -> SimpleNamespace:
        return SimpleNamespace(nodes=torch.zeros(5 * len(samples), 2), graphs=len(samples))

    with pytest.raises(ValueError, match="SimpleNamespace, an unknown container of tensors"):
        mb.collate_windows(graphs, micro_batch_size=2)([1, 2, 3])
    window = mb.collate_windows(graphs, micro_batch_size=2, num_samples=lambda batch: batch.graphs)([1, 2, 3])
    assert window.micro_batch_sizes == (2, 1)


def test_no_samples_are_an_empty_window() -> None:
    assert len(mb.collate_windows(padded, micro_batch_size=2)([])) == 0
