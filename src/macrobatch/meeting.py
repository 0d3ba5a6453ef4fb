"""Where the forwards of a window meet at a normalisation: their moments are merged, running statistics updated once."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase

from macrobatch.distributed import Ranks
from macrobatch.joint_norm import (
    Join,
    Part,
    exact_dtype,
    merged,
    merged_over_ranks,
    normalise_together,
    update_running,
)
from macrobatch.modules import submodules
from macrobatch.norm_calls import BatchNormCall, InstanceNormCall


@dataclass(frozen=True)
class Arrival:
    """A forward at a batch normalisation: the call, its part of it, its token in the graph.

    `tracked`: what the layer has counted as batches, this call included. `ranks`: a SyncBatchNorm's own.
    """

    call: BatchNormCall
    part: Part
    token: Tensor
    tracked: Tensor | None
    ranks: Ranks | None


@dataclass(frozen=True)
class Instances:
    """A forward at an instance normalisation that tracks statistics.

    `sums`: shape (2 C + 1,): over its samples the sum of the instances' means, of their unbiased variances, and of 1.
    """

    call: InstanceNormCall
    sums: Tensor

    @classmethod
    def of(cls, call: InstanceNormCall) -> "Instances":
        """The sums over the samples of the call."""
        wide = call.x.detach().to(exact_dtype(call.x.device)).flatten(2)  # (N, C, positions)
        variance, mean = torch.var_mean(wide, 2)
        return cls(call, torch.cat([mean.sum(0), variance.sum(0), mean.new_full((1,), len(wide))]))


class MeetingPlace:
    """Holds the meetings of one window, in order. `is_over`: every forward has ended, backward may run.

    `chain`: shape (), the last link of what strings the meetings up; None before the first. `next_ranks`: set around a
    call of a layer that sums its statistics over ranks of its own.
    """

    def __init__(self, modules: Sequence[nn.Module], ranks: Ranks) -> None:
        self.is_over = False
        self.next_ranks: Ranks | None = None
        self._ranks = ranks
        self._layers = {id(m.running_mean): m for m in submodules(modules) if isinstance(m, _NormBase)}
        self._layers.pop(id(None), None)
        self.chain: Tensor | None = None

    def arrival(self, call: BatchNormCall, part: Part, token: Tensor) -> Arrival:
        """What a forward brings to the meeting."""
        counter = self._counter(call)
        ranks, self.next_ranks = self.next_ranks, None  # for this call; the forward will wait inside of it
        return Arrival(call, part, token, None if counter is None else counter.clone(), ranks)

    def hold(self, present: Sequence[Any]) -> Sequence[Any]:
        """Each forward's answer, in order. `present`: what each brought, None for one that has ended.

        ValueError if they have not come to the same call.
        """
        first = present[0]
        for other in present:
            if first is None or other is None or not first.call.is_like(other.call):
                raise ValueError(_parting_message(first, other))
        if isinstance(first, Instances):
            self._track_instances(present)
            return [None] * len(present)
        return self._batch_norm(present)

    def _batch_norm(self, present: Sequence[Arrival]) -> Sequence[Tensor]:
        first, parts = present[0], [arrival.part for arrival in present]
        call, ranks = first.call, first.ranks or self._ranks
        with torch.no_grad():
            moments = merged_over_ranks(merged([part.moments for part in parts]), ranks)
            if ranks.size == 1 and sum(len(a.call.x) * a.call.x[0, 0].numel() for a in present) == 1:
                raise ValueError(
                    f"{call.describe()}: a single value per channel in the whole window has no variance to train with"
                )
            normalise_together(parts, moments, call.eps, call.x.dtype)
            update_running(call.running_mean, call.running_var, moments, call.momentum)
            counter = self._counter(call)
            if counter is not None and first.tracked is not None:
                counter.copy_(first.tracked)  # each forward has counted, and a batch is counted once
        if self.chain is None:
            self.chain = first.token.detach().clone()
        check, tokens = self._refuse_early_backward, [arrival.token for arrival in present]
        self.chain, *tokens = Join.apply(parts, ranks, check, self.chain, *tokens)  # type: ignore[no-untyped-call]
        return list(tokens)

    def _track_instances(self, present: Sequence[Instances]) -> None:
        call = present[0].call
        sums = self._ranks.sum(torch.stack([instances.sums for instances in present]).sum(0))
        mean, variance = (sums[:-1] / sums[-1]).chunk(2)
        with torch.no_grad():
            for running, now in ((call.running_mean, mean), (call.running_var, variance)):
                running.copy_((1 - call.momentum) * running.to(now.dtype) + call.momentum * now)

    def _counter(self, call: BatchNormCall) -> Tensor | None:
        layer = self._layers.get(id(call.running_mean))
        return None if layer is None else layer.num_batches_tracked

    def _refuse_early_backward(self) -> None:
        if not self.is_over:
            raise RuntimeError(
                "a loss_fn ran backward through batch_norm by itself (a gradient penalty, or a backward of its own), "
                "while other micro-batches, which its statistics depend on, were not through yet. Exact batch "
                "normalisation has one backward, at the end of the window"
            )


def _parting_message(first: Arrival | Instances | None, other: Arrival | Instances | None) -> str:
    one, another = ("at its end" if at is None else f"at {at.call.describe()}" for at in (first, other))
    return (
        "micro-batches took different ways through the model: the first stands "
        f"{one}, another one {another}. Exact batch normalisation needs each micro-batch to call the same layers in "
        "the same order: the way must not depend on what is in a micro-batch, or on chance"
    )
