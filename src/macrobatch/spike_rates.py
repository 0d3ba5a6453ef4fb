"""A smaller learning rate under any torch scheduler, or under rates that the training loop sets by hand."""

import math
from collections.abc import Sequence

from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from macrobatch.schedulers import UNGUARDED, checked, group_rates, scheduler_rates

SAME = 1e-6  # between a rate in float32 and the number it was set to


def schedulers_of(optimizer: Optimizer, given: Sequence[LRScheduler]) -> tuple[LRScheduler, ...]:
    """Those of `given` that belong to `optimizer`, with those inside; ValueError if it has one that was not given."""
    return checked([each for each in given if each.optimizer is optimizer], optimizer)


class RateScale:
    """All learning rates of some optimizers and their schedulers, times `scale` of what they would be.

    With a scheduler it multiplies the present rates and everything that the next ones are computed from (base, lowest
    and highest rates), so that it holds for schedulers with a closed form and for those that go on from the present
    rate. Without one each group also holds the rate that its own is `scale` times of, and another batch size moves both
    (`scale_hyperparameters`). A rate that no longer is that share was set by hand, and is multiplied anew.
    """

    def __init__(self, optimizers: Sequence[Optimizer], schedulers: Sequence[LRScheduler]) -> None:
        of_each = {id(o): schedulers_of(o, schedulers) for o in optimizers}
        self._schedulers = [each for found in of_each.values() for each in found]
        self._scheduled = [o for o in optimizers if of_each[id(o)]]
        self._by_hand = [o for o in optimizers if not of_each[id(o)]]
        self.scale = 1.0

    def restored(self, scale: float) -> None:
        """Rates were put back to what they were at this `scale`."""
        self.scale = scale

    def set(self, scale: float) -> None:
        """Rates are `scale` times what they would be without this; scale 1 changes no bit, if it was 1 before."""
        if scale != self.scale:
            self._set_scheduled(scale)
        if not scale == self.scale == 1.0:
            self._set_by_hand(scale)
        self.scale = scale

    def _set_by_hand(self, scale: float) -> None:
        for group in (group for o in self._by_hand for group in o.param_groups):
            slot, rate = group_rates(group)[0], group_rates(group)[0].get()
            base = group.get(UNGUARDED, rate / self.scale)
            if not math.isclose(rate, base * self.scale, rel_tol=SAME):
                base = rate
            group[UNGUARDED] = base
            slot.set(base * scale)

    def _set_scheduled(self, scale: float) -> None:
        slots = [slot for o in self._scheduled for group in o.param_groups for slot in group_rates(group)]
        slots += [slot for scheduler in self._schedulers for slot in scheduler_rates(scheduler)]
        rates = [slot.get() * (scale / self.scale) for slot in slots]  # all of them first: places may share a tensor
        for slot, rate in zip(slots, rates, strict=True):
            slot.set(rate)
