"""How large a micro-batch may be: given, lowered by failures, and tried larger again when they stay away."""

import copy
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import torch


class Stopwatch(Protocol):
    """Times the micro-batches of a window."""

    def lap(self, num_samples: int) -> None:
        """A micro-batch of `num_samples` has ended."""


@dataclass
class SizeLimit:
    """The largest micro-batch to try, in samples.

    `start`: what was asked for, the most that will ever be tried; None for no limit. After a failure `current` is half
    of what failed. After `patience` windows without failure it is what worked before, or else twice as much; each
    such try that fails doubles the patience, so that a size that truly does not fit is tried ever more rarely.
    """

    start: int | None
    patience: int = 4
    current: int | None = None
    proven: int = 0  # the largest micro-batch of a window without failure
    quiet_windows: int = 0
    is_trying: bool = False

    def __post_init__(self) -> None:
        self.current = self.start if self.current is None else self.current

    def stopwatch(self, device: torch.device) -> Stopwatch | None:
        """What times the micro-batches of the next window: nothing, the size is given."""
        return None

    def failed(self, num_samples: int) -> None:
        """A micro-batch of `num_samples` ran out of memory: `current` is at most half of it."""
        if self.is_trying:
            self.patience *= 2
            self.proven = 0
            self.is_trying = False
        self.quiet_windows = 0
        half = -(-num_samples // 2)
        self.current = half if self.current is None else min(self.current, half)

    def window_ended(self, largest: int, retries: int) -> None:
        """A window has been run whose largest micro-batch had `largest` samples; perhaps a larger one is tried next."""
        if retries:
            return
        self.proven = max(self.proven, largest)
        self.quiet_windows += 1
        self.is_trying = False
        is_lowered = self.current is not None and (self.start is None or self.current < self.start)
        if is_lowered and self.current is not None and self.quiet_windows >= self.patience:
            larger = self.proven if self.proven > self.current else 2 * self.current
            self.current = larger if self.start is None else min(larger, self.start)
            self.quiet_windows, self.is_trying = 0, True

    def state_dict(self) -> dict[str, Any]:
        """What `load_state_dict` needs to go on from here: numbers, lists and dictionaries of them."""
        return copy.deepcopy(self.__dict__)

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from a saved state. ValueError if it is of another kind of limit."""
        if set(state) != set(self.__dict__):
            raise ValueError(
                f"this state holds {sorted(state)}, a {type(self).__name__} has {sorted(self.__dict__)}: it was saved "
                "with another kind of micro_batch_size (a number, or 'auto')"
            )
        own = self.start
        self.__dict__.update(copy.deepcopy(dict(state)))
        if own is not None and own != self.start:  # what is asked for now counts, as far as it is known to fit
            self.start, self.current = own, min(own, self.current or own)
