"""How much there is to do in a comparison, counted in samples forward and backward."""

from collections.abc import Sequence
from dataclasses import dataclass

from macrobatch.cli.way import Way
from macrobatch.structure import even_sizes

FORWARD_SHARE = 1 / 3  # of the work of forward and backward
METER_SHARE = 1.5  # work of a sample while memory is measured


@dataclass(frozen=True, kw_only=True)
class Workload:
    """All that a comparison does. `samples`: of each run; `validations`: in the first seed's runs.

    `sharpness`: of one run, in samples. `sizes`: of the updates whose gradient is drawn. With `is_coupled` the forwards
    of gathered updates run twice but for one micro-batch.
    """

    samples: int
    validations: int
    held_out: int
    draws: int
    sizes: Sequence[int]
    micro_batch_size: int
    sharpness: float
    seeds: int
    is_coupled: bool

    @property
    def validation(self) -> float:
        """One validation."""
        return FORWARD_SHARE * self.held_out

    def memory(self, way: Way) -> float:
        """Measuring the memory of two updates."""
        return 2 * METER_SHARE * way.update_size

    def update(self, way: Way, samples: int) -> float:
        """Training on so many samples, in updates of whatever size."""
        gathers = self.is_coupled and way.key in ("accumulated", "scaled")
        return samples * (self._twice(way.update_size) if gathers else 1.0)

    def draw(self, native: bool) -> float:
        """One draw of gradients."""
        largest = self.sizes[-1]
        if not self.is_coupled:  # a larger size goes on from the one before
            return (1 + native) * largest
        return sum(size * self._twice(size) for size in self.sizes) + (1 + native) * largest

    def total(self, ways: Sequence[Way], trained: Sequence[Way], repeated: Sequence[Way]) -> float:
        """Everything: memory of `ways`, training of those that fit, and again of some with each further seed."""
        runs = sum(self.update(way, self.samples) + self.validations * self.validation for way in trained)
        again = sum(self.update(way, self.samples) + 2 * self.validation + self.sharpness for way in repeated)
        drawn = self.draws * self.draw(any(way.key == "native" for way in trained))
        probed = sum(self.memory(way) for way in ways if way.key != "scaled")
        return probed + runs + drawn + len(trained) * self.sharpness + (self.seeds - 1) * again

    def _twice(self, size: int) -> float:
        """The work of a sample whose forward runs once more, unless it is in the last of the micro-batches."""
        return 1 + FORWARD_SHARE * (size - even_sizes(size, self.micro_batch_size)[-1]) / size
