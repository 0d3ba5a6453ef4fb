"""The last accepted windows: what is usual in them, and how far above it a new window lies."""

import math
from collections import deque
from collections.abc import Mapping
from statistics import median

from macrobatch.outliers import spike_score
from macrobatch.spike_values import Seen

HISTORIES = ("losses", "norms", "sizes", "variances", "squared_means")


class History:
    """Remembers the losses, gradient norms, samples and, where measured, gradient noise of `length` windows."""

    def __init__(self, length: int) -> None:
        self.losses, self.norms, self.sizes = (deque[float](maxlen=length) for _ in range(3))
        self.variances, self.squared_means = (deque[float](maxlen=length) for _ in range(2))

    def add(self, seen: Seen) -> None:
        """A window was accepted."""
        self.losses.append(seen.loss)
        self.norms.append(seen.grad_norm)
        self.sizes.append(seen.num_samples)
        if math.isfinite(seen.variance):
            self.variances.append(seen.variance)
            self.squared_means.append(seen.squared_mean)

    def scores(self, seen: Seen, *, min_updates: int) -> tuple[float | None, float | None]:
        """Deviations of loss and gradient norm above the usual; None before `min_updates` windows, or if not finite.

        A window of few samples, such as the last of an epoch, may deviate as its noise. With 1/e^2 of the usual samples
        that is e times the deviation, and at most e times the norm: its square is |G|^2 + S/n.
        """
        if len(self.losses) < min_updates or not seen.is_finite:
            return None, None
        e = math.sqrt(max(1.0, median(self.sizes) / max(seen.num_samples, 1.0)))
        return spike_score(seen.loss, self.losses) / e, spike_score(seen.grad_norm / e, self.norms) / e

    def typical(self) -> tuple[float, float]:
        """The usual loss and gradient norm, NaN without any window."""
        return _median(self.losses, math.nan), _median(self.norms, math.nan)

    def noise(self) -> tuple[float, float]:
        """The usual S and |G|^2 of the gradient: 1 and 0, noise alone, where nothing measured them."""
        return _median(self.variances, 1.0), _median(self.squared_means, 0.0)

    def clear(self) -> None:
        """No window is remembered."""
        for name in HISTORIES:
            getattr(self, name).clear()

    def state_dict(self) -> dict[str, list[float]]:
        """All numbers, by name."""
        return {name: list(getattr(self, name)) for name in HISTORIES}

    def load_state_dict(self, state: Mapping[str, list[float]]) -> None:
        """The windows remembered are those of the history whose state this is, in the same deques as before."""
        self.clear()
        for name in HISTORIES:
            getattr(self, name).extend(state[name])


def _median(values: deque[float], otherwise: float) -> float:
    return median(values) if values else otherwise
