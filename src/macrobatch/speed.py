"""How long a micro-batch takes, measured on a few real ones, and what that says of other sizes."""

import time
from collections.abc import Callable, Mapping, Sequence

import numpy as np


def sizes_to_measure(num_samples: int, largest: int, count: int = 6) -> list[int]:
    """Micro-batch sizes from `largest` down by halves, as they would be cut from `num_samples`: even, ascending.

    >>> sizes_to_measure(128, 100, 3), sizes_to_measure(128, 3)
    ([22, 43, 64], [1, 3])
    """
    return sorted({even_size(num_samples, max(1, largest >> halvings)) for halvings in range(count)})


def even_size(num_samples: int, largest: int) -> int:
    """The size of the largest micro-batch when `num_samples` are cut evenly into parts of at most `largest`."""
    steps = -(-num_samples // largest)
    return -(-num_samples // steps)


def measure(seconds: Callable[[int], float], sizes: Sequence[int], limit_s: float) -> dict[int, float]:
    """Micro-batch size to seconds, for `sizes` in order until the next is likely to end later than `limit_s` from now.

    At least the first is measured.
    """
    found: dict[int, float] = {}
    start, pace = time.perf_counter(), 0.0  # seconds that measuring takes for each sample of a size
    for size in sizes:
        begun = time.perf_counter()
        if found and begun - start + pace * size > limit_s:
            break
        found[size] = seconds(size)
        pace = (time.perf_counter() - begun) / size
    return found


def fixed_and_per_sample(seconds: Mapping[int, float]) -> tuple[float, float]:
    """(alpha, beta) of the line alpha + beta b nearest to the seconds of micro-batches of b samples; alpha >= 0.

    Nearest in relative terms, so that small sizes, where alpha shows, count as much as large ones.

    >>> [round(x, 6) for x in fixed_and_per_sample({1: 3.0, 10: 12.0})]
    [2.0, 1.0]
    """
    sizes, times = np.array(list(seconds), dtype=float), np.array(list(seconds.values()))
    if len(sizes) > 1:
        beta, alpha = np.polyfit(sizes, times, 1, w=1 / times)
        if alpha >= 0 and beta > 0:
            return float(alpha), float(beta)
    return 0.0, float(np.mean(times / sizes))
