"""How far a value lies above its recent past, by median and MAD of its logarithm; norms over what to expect."""

import math
from collections.abc import Iterable, Sequence

import numpy as np

NORMAL = 1.4826  # the MAD of a normal distribution, times this, is its standard deviation
LEAST_SCALE = 0.01  # of a value that hardly varies: 6 deviations are then 6%


def spike_score(value: float, accepted: Iterable[float], *, least_scale: float = LEAST_SCALE) -> float:
    """How many robust deviations `value` lies above the median of `accepted`; negative below, 0 without any.

    z = (log value - median) / (1.4826 MAD), both of the logarithms; of the values themselves where one is not positive.
    The deviation counts as at least `least_scale`, so that a constant past does not make everything a spike.

    >>> round(spike_score(1.06, [1.0] * 64), 2), spike_score(1.0, [0.9, 1.0, 1.1])
    (5.83, 0.0)
    """
    past = np.fromiter(accepted, dtype=np.float64)
    if not past.size:
        return 0.0
    if value > 0 and past.min() > 0:
        past, value = np.log(past), math.log(value)
    else:
        least_scale *= float(np.median(np.abs(past))) or 1.0
    center = float(np.median(past))
    scale = NORMAL * float(np.median(np.abs(past - center)))
    return (value - center) / max(scale, least_scale)


def norm_ratios(
    squared_norms: Sequence[float], sizes: Sequence[int], *, variance: float, squared_mean: float
) -> list[float]:
    """Each micro-batch's squared gradient norm over its expectation |G|^2 + S / n_j; 0 for one without terms.

    `variance` S and `squared_mean` |G|^2 are those of windows before; negative estimates count as 0. Without them
    (NaN, or both 0) each is taken over 1 / n_j, as if all were noise.
    """
    s, g = max(variance, 0.0), max(squared_mean, 0.0)
    if not (math.isfinite(s) and math.isfinite(g) and s + g > 0):
        s, g = 1.0, 0.0
    return [q / (g + s / n) if q else 0.0 for q, n in zip(squared_norms, sizes, strict=True)]
