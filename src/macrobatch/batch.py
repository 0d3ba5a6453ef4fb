"""The window as a value: the micro-batches of one effective batch on one rank, from any batch or loader.

Ways to a window: `Window(micro_batches)`, `windows(loader, ...)`, a DataLoader with `collate_windows(...)`, or a plain
batch given to `Accumulator.run`, which is cut into one.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence, Sized
from itertools import accumulate, islice
from typing import Any

from torch import Tensor
from torch.utils.data import default_collate

from macrobatch import structure
from macrobatch.distributed import AUTO, GroupChoice, Ranks
from macrobatch.structure import Nested, even_sizes

Cut = Callable[[Nested, int, int], Nested]
NumSamples = Callable[[Nested], int]


class Window:
    """The micro-batches of one effective batch on this rank: iterable as often as wanted, with a length and a size.

    `micro_batches`: a sequence, or an iterator that is drawn from while the window runs for the first time, so that
    loading overlaps computing; once filled, the window can run again. An empty window is a rank without samples.

    >>> import torch
    >>> window = Window([torch.ones(3, 2), torch.ones(1, 2)])
    >>> len(window), window.num_samples, window.micro_batch_sizes
    (2, 4, (3, 1))
    """

    def __init__(self, micro_batches: Iterable[Nested], *, num_samples: NumSamples = structure.num_samples) -> None:
        if isinstance(micro_batches, Tensor | Mapping | str) or not isinstance(micro_batches, Iterable):
            raise ValueError(
                f"a Window takes a sequence of micro-batches, not a {type(micro_batches).__name__}: "
                "give Window([micro_batch, ...]), or give the batch itself to Accumulator.run with a micro_batch_size"
            )
        self._filled: list[Nested] = []
        self._sizes: list[int] = []  # in samples, of the micro-batches filled in
        self._source: Iterator[Nested] | None = iter(micro_batches)
        self._num_samples = num_samples
        if isinstance(micro_batches, Sequence | Window):
            self.fill()

    def __iter__(self) -> Iterator[Nested]:
        return (micro_batch for micro_batch, _ in self.sized())

    def sized(self) -> Iterator[tuple[Nested, int]]:
        """Each micro-batch and its number of samples."""
        position = 0
        while position < len(self._filled) or self._draw():
            yield self._filled[position], self._sizes[position]
            position += 1

    def __len__(self) -> int:
        """The number of micro-batches (`accumulation_steps`); fills the window."""
        return len(self.fill()._filled)

    def fill(self) -> "Window":
        """The window itself, with every micro-batch drawn from its source."""
        while self._draw():
            pass
        return self

    def _draw(self) -> bool:
        if self._source is None:
            return False
        for micro_batch in self._source:
            self._sizes.append(self._num_samples(micro_batch))
            self._filled.append(micro_batch)
            return True
        self._source = None
        return False

    @classmethod
    def of_parts(
        cls, batch: Nested, largest: int, own_cut: Cut | None = None, num_samples: NumSamples = structure.num_samples
    ) -> "Window":
        """`batch` cut into micro-batches of at most `largest` samples whose sizes differ by at most one."""
        window = cls([], num_samples=num_samples)
        window._sizes = even_sizes(num_samples(batch), check_size(largest))
        window._filled = cut_batch(batch, window._sizes, own_cut)
        return window

    @property
    def micro_batch_sizes(self) -> tuple[int, ...]:
        """Samples in each micro-batch; fills the window."""
        return tuple(self.fill()._sizes)

    @property
    def num_samples(self) -> int:
        """Samples in the window, on this rank; fills the window."""
        return sum(self.micro_batch_sizes)

    def cut(self, micro_batch_size: int, *, cut: Cut | None = None) -> "Window":
        """A window of the same samples in which no micro-batch is larger than `micro_batch_size`.

        Larger micro-batches are cut into parts whose sizes differ by at most one; smaller ones are never joined.
        """
        return Window(self._smaller(check_size(micro_batch_size), cut), num_samples=self._num_samples)

    def _smaller(self, largest: int, own_cut: Cut | None) -> Iterator[Nested]:
        for micro_batch, n in self.sized():
            yield from [micro_batch] if n <= largest else cut_batch(micro_batch, even_sizes(n, largest), own_cut)

    def pin_memory(self) -> "Window":
        """A window of the same samples in page-locked memory; a DataLoader with `pin_memory=True` calls this."""
        pinned = [structure.map_tensors(micro_batch, Tensor.pin_memory) for micro_batch in self]
        return Window(pinned, num_samples=self._num_samples)

    def __getstate__(self) -> dict[str, Any]:
        return self.fill().__dict__  # an iterator cannot travel between processes

    def __repr__(self) -> str:
        return f"Window({len(self._filled)} micro-batches{'' if self._source is None else ' so far'})"


def check_size(micro_batch_size: int, name: str = "micro_batch_size") -> int:
    """`micro_batch_size`, an integer of at least 1, or a ValueError."""
    if isinstance(micro_batch_size, bool) or not isinstance(micro_batch_size, int) or micro_batch_size < 1:
        raise ValueError(f"{name} must be an integer of at least 1, got {micro_batch_size!r}")
    return micro_batch_size


def cut_batch(batch: Nested, sizes: Sequence[int], own_cut: Cut | None = None) -> list[Nested]:
    """`batch` as consecutive micro-batches of these sizes, which add up to it."""
    if own_cut is None:
        return structure.split(batch, sizes, n=sum(sizes))
    stops = list(accumulate(sizes))
    return [own_cut(batch, stop - size, stop) for size, stop in zip(sizes, stops, strict=True)]


def windows(
    loader: Iterable[Nested],
    accumulation_steps: int | None = None,
    *,
    batch_size: int | None = None,
    cut: Cut | None = None,
    num_samples: NumSamples = structure.num_samples,
    process_group: GroupChoice = AUTO,
) -> "Windows":
    """The micro-batches of `loader`, grouped into windows of `accumulation_steps` each or of `batch_size` samples.

    `batch_size` is the effective batch over all ranks; each rank takes its share, and a micro-batch that crosses the
    border of a window is cut there. The last window is as short as the data. Under a process group every rank yields
    equally many windows: a rank whose loader ended yields empty ones. Raises ValueError unless exactly one is given.
    """
    if (accumulation_steps is None) == (batch_size is None):
        raise ValueError(
            f"give either accumulation_steps or batch_size, got accumulation_steps={accumulation_steps}, "
            f"batch_size={batch_size}"
        )
    if accumulation_steps is not None:
        check_size(accumulation_steps, "accumulation_steps")
    if batch_size is not None:
        check_size(batch_size, "batch_size")
    return Windows(loader, accumulation_steps, batch_size, cut or structure.cut, num_samples, process_group)


class Windows:
    """What `windows` returns: re-iterable, with a length where the loader has one."""

    def __init__(
        self,
        loader: Iterable[Nested],
        accumulation_steps: int | None,
        batch_size: int | None,
        cut: Cut,
        num_samples: NumSamples,
        process_group: GroupChoice,
    ) -> None:
        self.loader = loader
        self.accumulation_steps = accumulation_steps
        self.batch_size = batch_size
        self._cut = cut
        self._num_samples = num_samples
        self._process_group = process_group

    def __iter__(self) -> Iterator[Window]:
        ranks = Ranks.of(self._process_group)
        source = _PushBack(self.loader)
        while ranks.any(not source.is_exhausted()):
            window = Window(self._take(source, ranks), num_samples=self._num_samples)
            yield window
            window.fill()  # what the user left undrawn belongs to this window, not to the next

    def __len__(self) -> int:
        """Windows on this rank. TypeError where the loader has no length, or does not tell its samples."""
        if self.accumulation_steps is not None:
            return -(-len(_sized(self.loader)) // self.accumulation_steps)
        assert self.batch_size is not None
        return -(-_samples_in(self.loader) // self._share(Ranks.of(self._process_group)))

    def _share(self, ranks: Ranks) -> int:
        assert self.batch_size is not None
        if self.batch_size < ranks.size:
            raise ValueError(f"batch_size={self.batch_size} is less than one sample for each of {ranks.size} ranks")
        return self.batch_size // ranks.size + (ranks.rank < self.batch_size % ranks.size)

    def _take(self, source: "_PushBack", ranks: Ranks) -> Iterator[Nested]:
        if self.accumulation_steps is not None:
            return islice(source, self.accumulation_steps)
        return self._take_samples(source, self._share(ranks))

    def _take_samples(self, source: "_PushBack", missing: int) -> Iterator[Nested]:
        for micro_batch in source:
            n = self._num_samples(micro_batch)
            if n > missing:
                source.push_back(self._cut(micro_batch, missing, n))
                micro_batch, n = self._cut(micro_batch, 0, missing), missing
            yield micro_batch
            missing -= n
            if missing == 0:
                return


class _PushBack:
    """An iterator into which one item can be put back."""

    def __init__(self, items: Iterable[Nested]) -> None:
        self._iterator = iter(items)
        self._ahead: list[Nested] = []

    def __iter__(self) -> Iterator[Nested]:
        return self

    def __next__(self) -> Nested:
        return self._ahead.pop() if self._ahead else next(self._iterator)

    def push_back(self, item: Nested) -> None:
        self._ahead.append(item)

    def is_exhausted(self) -> bool:
        try:
            self.push_back(next(self))
        except StopIteration:
            return True
        return False


def _sized(loader: Iterable[Nested]) -> Sized:
    if not isinstance(loader, Sized):
        raise TypeError(f"the loader, a {type(loader).__name__}, has no length, so its windows have none")
    return loader


def _samples_in(loader: Iterable[Nested]) -> int:
    """Samples that a DataLoader will yield on this rank."""
    sampler, size = getattr(loader, "sampler", None), getattr(loader, "batch_size", None)
    if not isinstance(sampler, Sized) or size is None:
        raise TypeError(
            f"the loader, a {type(loader).__name__}, does not tell its samples, so its windows have no length"
        )
    return len(_sized(loader)) * size if getattr(loader, "drop_last", False) else len(sampler)


class collate_windows:
    """A `collate_fn` with which a DataLoader yields windows: its workers cut, collate and so trim each micro-batch.

    `DataLoader(..., batch_size=4096, collate_fn=collate_windows(collate, micro_batch_size=8))`: each list of samples
    becomes a window of even micro-batches, each collated by `collate` (a function from a list of samples to a batch).
    """

    def __init__(self, collate: Callable[[list[Any]], Nested] = default_collate, *, micro_batch_size: int) -> None:
        self.collate = collate
        self.micro_batch_size = check_size(micro_batch_size)

    def __call__(self, samples: list[Any]) -> Window:
        """The window of these samples."""
        if not samples:
            return Window([])
        sizes = even_sizes(len(samples), self.micro_batch_size)
        source = iter(samples)
        return Window([self.collate(list(islice(source, size))) for size in sizes])
