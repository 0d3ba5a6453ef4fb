"""What an accumulator takes: a window as it is, a collated batch cut into one, and what every rank has of it."""

from collections.abc import Callable, Iterator

from torch.utils.data import DataLoader

from macrobatch.auto_size import AutoSize
from macrobatch.batch import Cut, NumSamples, Window
from macrobatch.distributed import Ranks
from macrobatch.grouping import Windows
from macrobatch.sizing import SizeLimit
from macrobatch.structure import Nested

NO_BATCH = (DataLoader, Iterator, Windows)
EMPTY = "the effective batch is empty: no rank has a sample. Skip empty batches before run"


def refuse_loader(batch: Nested) -> None:
    """ValueError if `batch` is something that gives batches, one after another."""
    if not isinstance(batch, Window) and isinstance(batch, NO_BATCH):
        raise ValueError(
            f"run takes one effective batch at a time, got a {type(batch).__name__}: for batch in loader: "
            "run(batch), or for window in windows(loader, accumulation_steps=8): run(window)"
        )


def window_of(batch: Nested, limit: SizeLimit, cut: Cut | None, num_samples: NumSamples) -> Window:
    """A window of micro-batches within `limit`. ValueError for a batch where windows are taken as they come."""
    largest = limit.current
    if isinstance(batch, Window):
        return batch if largest is None else batch.cut(largest, cut=cut)
    if largest is None or (limit.start is None and not isinstance(limit, AutoSize)):
        raise ValueError(
            f"micro_batch_size=None takes a Window, got a {type(batch).__name__}: give the Accumulator a "
            "micro_batch_size to cut batches, or give run a Window([micro_batch, ...])"
        )
    return Window.of_parts(batch, largest, cut, num_samples)


def agree_on_window(make: Callable[[Nested], Window], batch: Nested, ranks: Ranks) -> tuple[Window, bool]:
    """The window that `make` makes of `batch`, and whether every rank has a micro-batch.

    Bad input on one rank raises on all of them.
    """
    if ranks.size == 1:
        window = make(batch)
        if next(window.sized(), None) is None:  # draws the first micro-batch
            raise ValueError(EMPTY)
        return window, True
    error: Exception | None = None
    window = Window([])
    try:
        window = make(batch)
        has_one = next(window.sized(), None) is not None
    except Exception as bad_input:
        error, has_one = bad_input, False
    failed, some_run, some_idle = ranks.any_of(error is not None, has_one, not has_one)
    if failed:
        raise error or RuntimeError("another rank could not make its window: see its error")
    if not some_run:
        raise ValueError(EMPTY)
    return window, not some_idle
