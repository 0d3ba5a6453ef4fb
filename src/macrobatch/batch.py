"""The window as a value: the micro-batches of one effective batch on one rank, from any batch or loader.

Ways to a window: `Window(micro_batches)`, `windows(loader, ...)` (module `grouping`), a DataLoader with
`collate_windows(...)`, or a plain batch given to `Accumulator.run`, which is cut into one.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from itertools import accumulate, islice
from numbers import Integral
from typing import Any

import numpy as np
from torch import Tensor
from torch.utils.data import default_collate

from macrobatch import structure
from macrobatch.signatures import check_callable, given
from macrobatch.structure import Nested, even_sizes

Cut = Callable[[Nested, int, int], Nested]
NumSamples = Callable[[Nested], int]
Counted = tuple[Nested, int]  # a micro-batch and its number of samples


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
        is_batch = isinstance(micro_batches, Tensor | np.ndarray | Mapping | str) or hasattr(micro_batches, "_fields")
        if is_batch or not isinstance(micro_batches, Iterable):
            raise ValueError(
                f"a Window takes a sequence of micro-batches, not a {type(micro_batches).__name__}: "
                "give Window([micro_batch, ...]), or give the batch itself to Accumulator.run with a micro_batch_size"
            )
        if isinstance(micro_batches, Window):
            self._draw_from(micro_batches.sized())
        else:
            self._draw_from(_counted(micro_batches, num_samples))
        if isinstance(micro_batches, Sequence | Window):
            self.fill()

    def _draw_from(self, source: Iterator[Counted]) -> None:
        self._filled: list[Nested] = []
        self._sizes: list[int] = []  # in samples, of the micro-batches filled in
        self._source: Iterator[Counted] | None = source
        self._uncut: Window | None = None  # the window that the source cuts
        self._failure = ""

    @classmethod
    def of_sized(cls, micro_batches: Iterable[Counted]) -> "Window":
        """The window of `(micro-batch, its number of samples)`, drawn from while it runs for the first time."""
        window = cls.__new__(cls)
        window._draw_from(iter(micro_batches))
        return window

    @classmethod
    def of_parts(
        cls, batch: Nested, largest: int, own_cut: Cut | None = None, num_samples: NumSamples = structure.num_samples
    ) -> "Window":
        """`batch` cut into micro-batches of at most `largest` samples, sizes differing by at most one (25, 25, 25)."""
        sizes = even_sizes(num_samples(batch), check_size(largest))
        window = cls.of_sized(())
        window._filled, window._sizes, window._source = cut_batch(batch, sizes, own_cut), sizes, None
        return window

    def __iter__(self) -> Iterator[Nested]:
        return (micro_batch for micro_batch, _ in self.sized())

    def sized(self) -> Iterator[Counted]:
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

    @property
    def is_filled(self) -> bool:
        """Whether every micro-batch was drawn from the source, so that sizes cost nothing."""
        return self._source is None

    @property
    def is_loading(self) -> bool:
        """Whether micro-batches are still to come from outside, from a loader that may draw random numbers for them."""
        return self._source is not None and (self._uncut is None or self._uncut.is_loading)

    def _draw(self) -> bool:
        if self._failure:  # a generator that raised is at its end, and the window would look complete
            raise RuntimeError(f"the window is incomplete, because drawing a micro-batch failed: {self._failure}")
        if self._source is None:
            return False
        try:
            drawn = next(self._source, None)
        except BaseException as error:
            self._failure = f"{type(error).__name__}: {error}"
            raise
        if drawn is None:
            self._source = self._uncut = None
            return False
        self._filled.append(drawn[0])
        self._sizes.append(drawn[1])
        return True

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
        window = Window.of_sized(self._smaller(check_size(micro_batch_size), cut))
        window._uncut = self
        return window

    def _smaller(self, largest: int, own_cut: Cut | None) -> Iterator[Counted]:
        for micro_batch, n in self.sized():
            if n <= largest:
                yield micro_batch, n
            else:
                sizes = even_sizes(n, largest)
                yield from zip(cut_batch(micro_batch, sizes, own_cut), sizes, strict=True)

    def pin_memory(self) -> "Window":
        """A window of the same samples in page-locked memory; a DataLoader with `pin_memory=True` calls this."""
        return Window.of_sized([(structure.map_tensors(x, Tensor.pin_memory), n) for x, n in self.sized()]).fill()

    def __getstate__(self) -> dict[str, Any]:
        return self.fill().__dict__  # an iterator cannot travel between processes

    def __repr__(self) -> str:
        return f"Window({len(self._filled)} micro-batches{'' if self._source is None else ' so far'})"


def _counted(micro_batches: Iterable[Nested], num_samples: NumSamples) -> Iterator[Counted]:
    """Each micro-batch and its number of samples. What went wrong is looked for only where something did."""
    for micro_batch in micro_batches:
        try:
            n = num_samples(micro_batch)
        except (TypeError, ValueError):
            if isinstance(micro_batch, Window):
                raise ValueError("a Window holds micro-batches, and got windows: run each of them as it is") from None
            check_callable(num_samples, "num_samples", ("micro_batch",), ". It returns how many samples there are")
            raise
        yield micro_batch, n


def check_size(micro_batch_size: int, name: str = "micro_batch_size", advice: str = "") -> int:
    """`micro_batch_size`, an integer of at least 1, numpy's too, or a ValueError. `advice`: what else may be given."""
    if type(micro_batch_size) is int and micro_batch_size >= 1:  # each window is cut by one
        return micro_batch_size
    if isinstance(micro_batch_size, bool) or not isinstance(micro_batch_size, Integral) or micro_batch_size < 1:
        raise ValueError(f"{name} must be an integer of at least 1{advice}, got {given(micro_batch_size)}")
    return int(micro_batch_size)


def cut_batch(batch: Nested, sizes: Sequence[int], own_cut: Cut | None = None) -> list[Nested]:
    """`batch` as consecutive micro-batches of these sizes, which add up to it."""
    if own_cut is None:
        return structure.split(batch, sizes, n=sum(sizes))
    stops = list(accumulate(sizes))
    return [own_cut(batch, stop - size, stop) for size, stop in zip(sizes, stops, strict=True)]


class collate_windows:
    """A `collate_fn` with which a DataLoader yields windows: its workers cut, collate and so trim each micro-batch.

    `DataLoader(..., batch_size=4096, collate_fn=collate_windows(collate, micro_batch_size=8))`: each list of samples
    becomes a window of even micro-batches, each collated by `collate` (a function from a list of samples to a batch).
    `num_samples(micro_batch)` tells how many it holds where that is not the first dimension of its tensors.
    """

    def __init__(
        self,
        collate: Callable[[list[Any]], Nested] = default_collate,
        *,
        micro_batch_size: int,
        num_samples: NumSamples = structure.num_samples,
    ) -> None:
        if not isinstance(collate, type):  # `list` leaves samples of unlike size apart
            check_callable(collate, "collate", ("samples",), ". It makes a list of samples a batch")
        check_callable(num_samples, "num_samples", ("micro_batch",), ". It returns how many samples there are")
        self.collate = collate
        self.micro_batch_size = check_size(micro_batch_size)
        self.num_samples = num_samples

    def __call__(self, samples: list[Any]) -> Window:
        """The window of these samples."""
        source = iter(samples)
        sizes = even_sizes(len(samples), self.micro_batch_size)
        return Window([self.collate(list(islice(source, size))) for size in sizes], num_samples=self.num_samples)
