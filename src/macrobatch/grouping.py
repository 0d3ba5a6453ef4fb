"""Windows from an existing loader: its micro-batches grouped by their number, or by the samples in them."""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sized
from itertools import islice
from typing import Any

import numpy as np
from torch import Tensor, nn
from torch.utils.data import Dataset

from macrobatch import structure
from macrobatch.arguments import check_cut, check_group, check_num_samples
from macrobatch.batch import Counted, Cut, NumSamples, Window, check_size, cut_batch
from macrobatch.distributed import AUTO, GroupChoice, Ranks
from macrobatch.signatures import check_callable, given
from macrobatch.structure import Nested

BatchSize = int | Callable[[int], int]  # one size, or that of the next window by the samples in those before it


def windows(
    loader: Iterable[Nested],
    accumulation_steps: int | None = None,
    *,
    batch_size: BatchSize | None = None,
    cut: Cut | None = None,
    num_samples: NumSamples = structure.num_samples,
    process_group: GroupChoice = AUTO,
) -> "Windows":
    """The micro-batches of `loader`, grouped into windows of `accumulation_steps` each or of `batch_size` samples.

    `batch_size` is the effective batch over all ranks; each rank takes its share, and a micro-batch that crosses the
    border of a window is cut there. `batch_size(n)`, a `BatchSchedule` for one, is the size of the window that comes
    after n samples of this pass, the same on every rank. The last window is as short as the data. Under a process group
    every rank yields equally many windows: a rank whose loader ended yields empty ones. ValueError unless one of the
    two is given, for what gives no micro-batches, and for a second pass over an iterator that was used up.
    """
    _check_loader(loader)
    if (accumulation_steps is None) == (batch_size is None):
        raise ValueError(
            f"give either accumulation_steps or batch_size, got accumulation_steps={accumulation_steps}, "
            f"batch_size={batch_size}"
        )
    if accumulation_steps is not None:
        accumulation_steps = check_size(accumulation_steps, "accumulation_steps")
    if callable(batch_size):
        check_callable(
            batch_size, "batch_size", ("samples",), ". It tells the size of the window after so many samples"
        )
    elif batch_size is not None:
        batch_size = check_size(batch_size, "batch_size")
    num_samples = check_num_samples(num_samples) or structure.num_samples
    return Windows(loader, accumulation_steps, batch_size, check_cut(cut), num_samples, check_group(process_group))


class Windows:
    """What `windows` returns: re-iterable, with a length where the loader has one."""

    def __init__(
        self,
        loader: Iterable[Nested],
        accumulation_steps: int | None,
        batch_size: BatchSize | None,
        cut: Cut | None,
        num_samples: NumSamples,
        process_group: GroupChoice,
    ) -> None:
        self.loader = loader
        self.accumulation_steps = accumulation_steps
        self.batch_size = batch_size
        self._cut = cut
        self._num_samples = num_samples
        self._process_group = process_group
        self._was_used_up = False  # an iterator that has been read to its end

    def __iter__(self) -> Iterator[Window]:
        ranks = Ranks.of(self._process_group)
        source = _PushBack(self._sized_micro_batches())
        grouped, is_empty = 0, True  # samples in the windows so far, over all ranks
        while ranks.any(not source.is_exhausted()):
            size = self._size_after(grouped)
            window = Window.of_sized(self._take(source, size, ranks))
            grouped, is_empty = grouped + size, False
            yield window
            window.fill()  # what the user left undrawn belongs to this window, not to the next
        if is_empty and self._was_used_up:
            raise ValueError(
                f"the loader, a {type(self.loader).__name__}, was used up in an earlier pass: give what can be "
                "iterated anew in each epoch, a DataLoader or a list"
            )
        self._was_used_up = isinstance(self.loader, Iterator)

    def __len__(self) -> int:
        """Windows on this rank. TypeError where the loader has no length, or does not tell its samples."""
        if self.accumulation_steps is not None:
            return -(-len(_sized(self.loader)) // self.accumulation_steps)
        if not isinstance(self.batch_size, int):
            raise TypeError("windows whose batch_size changes have no length beforehand")
        return -(-_samples_in(self.loader) // share(self.batch_size, Ranks.of(self._process_group)))

    def _size_after(self, grouped: int) -> int:
        if self.batch_size is None:
            return 0
        return check_size(self.batch_size(grouped) if callable(self.batch_size) else self.batch_size, "batch_size")

    def _sized_micro_batches(self) -> Iterator[Counted]:
        for micro_batch in self.loader:
            if isinstance(micro_batch, Window):
                raise ValueError("the loader yields windows already (collate_windows): run them as they come")
            yield micro_batch, self._num_samples(micro_batch)

    def _take(self, source: "_PushBack", batch_size: int, ranks: Ranks) -> Iterator[Counted]:
        if self.accumulation_steps is not None:
            return islice(source, self.accumulation_steps)
        return self._take_samples(source, share(batch_size, ranks))

    def _take_samples(self, source: "_PushBack", missing: int) -> Iterator[Counted]:
        for micro_batch, n in source:
            if n > missing:
                micro_batch, rest = cut_batch(micro_batch, [missing, n - missing], self._cut)
                source.push_back((rest, n - missing))
                n = missing
            yield micro_batch, n
            missing -= n
            if missing == 0:
                return


def _check_loader(loader: Any) -> None:
    """ValueError for what gives no micro-batches when it is iterated."""
    needed = f"windows takes a loader, which gives micro-batches when it is iterated, got {given(loader)}"
    if isinstance(loader, Windows):
        raise ValueError(f"{needed}, which gives windows already: run them as they come")
    if isinstance(loader, Dataset) and not isinstance(loader, Iterable):
        raise ValueError(f"{needed}, which gives samples: give DataLoader(dataset, batch_size=...)")
    if isinstance(loader, Tensor | np.ndarray | Mapping):
        raise ValueError(f"{needed}, a batch: give it to Accumulator.run with a micro_batch_size, or give [batch]")
    is_other = isinstance(loader, nn.Module | str)
    if is_other or not (isinstance(loader, Iterable) or hasattr(loader, "__getitem__")):
        raise ValueError(f"{needed}: give a DataLoader, or a list of micro-batches")


def share(batch_size: int, ranks: Ranks) -> int:
    """Samples of an effective batch that are this rank's; ValueError where some rank would get none."""
    if batch_size < ranks.size:
        raise ValueError(f"batch_size={batch_size} is less than one sample for each of {ranks.size} ranks")
    return batch_size // ranks.size + (ranks.rank < batch_size % ranks.size)


class _PushBack:
    """An iterator into which one item can be put back."""

    def __init__(self, items: Iterator[Counted]) -> None:
        self._iterator = items
        self._ahead: list[Counted] = []

    def __iter__(self) -> Iterator[Counted]:
        return self

    def __next__(self) -> Counted:
        return self._ahead.pop() if self._ahead else next(self._iterator)

    def push_back(self, item: Counted) -> None:
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
