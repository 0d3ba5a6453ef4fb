"""Windows from an existing loader: its micro-batches grouped by their number, or by the samples in them."""

from collections.abc import Iterable, Iterator, Sized
from itertools import islice

from macrobatch import structure
from macrobatch.batch import Counted, Cut, NumSamples, Window, check_size, cut_batch
from macrobatch.distributed import AUTO, GroupChoice, Ranks
from macrobatch.structure import Nested


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
    return Windows(loader, accumulation_steps, batch_size, cut, num_samples, process_group)


class Windows:
    """What `windows` returns: re-iterable, with a length where the loader has one."""

    def __init__(
        self,
        loader: Iterable[Nested],
        accumulation_steps: int | None,
        batch_size: int | None,
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

    def __iter__(self) -> Iterator[Window]:
        ranks = Ranks.of(self._process_group)
        source = _PushBack(self._sized_micro_batches())
        while ranks.any(not source.is_exhausted()):
            window = Window.of_sized(self._take(source, ranks))
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

    def _sized_micro_batches(self) -> Iterator[Counted]:
        for micro_batch in self.loader:
            if isinstance(micro_batch, Window):
                raise ValueError("the loader yields windows already (collate_windows): run them as they come")
            yield micro_batch, self._num_samples(micro_batch)

    def _take(self, source: "_PushBack", ranks: Ranks) -> Iterator[Counted]:
        if self.accumulation_steps is not None:
            return islice(source, self.accumulation_steps)
        return self._take_samples(source, self._share(ranks))

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
