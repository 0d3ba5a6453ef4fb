"""For loops that own forward and backward: the window's micro-batches, each with the share its loss sum counts for.

The same arithmetic as `Accumulator`, with the division up front: the total is counted before the first forward, and
each backward runs on `loss_sum / total`. In float16 that may underflow; there use the Accumulator.
"""

from collections.abc import Iterator, Sequence
from types import TracebackType
from typing import Any, NoReturn

import torch
from torch import nn

from macrobatch.arguments import check_count, check_group
from macrobatch.batch import Window
from macrobatch.devices import device_of, on_device
from macrobatch.distributed import AUTO, GradientReduction, GroupChoice, Ranks
from macrobatch.gradients import WindowGradients, multiply_
from macrobatch.memory import known_device
from macrobatch.modules import ddp_modules, modules_of
from macrobatch.structure import Nested
from macrobatch.tally import CountFn, count_window, ratio
from macrobatch.weighting import LOSS

Share = Any  # a number or a tensor of shape (), or {name: share} where count= names several


class accumulate:
    """`with accumulate(window, model) as steps: for micro_batch, share in steps: (loss_sum * share).backward()`.

    After the block `p.grad` of the parameters of `model` (a module or several) is the gradient of the effective batch's
    mean. `count(micro_batch)` tells the number of loss terms, or `{name: number}`, and then `share` is `{name:
    share}`; without it, samples count. DDP communicates once, in the last micro-batch. Leaving the loop early is a
    RuntimeError; after any error gradients are as before. Gradients left from before, and an empty effective batch,
    are a ValueError.
    """

    def __init__(
        self,
        window: Window,
        model: nn.Module | Sequence[nn.Module],
        count: CountFn | None = None,
        *,
        device: torch.device | str | None = None,
        process_group: GroupChoice = AUTO,
    ) -> None:
        if not isinstance(window, Window):
            raise ValueError(
                f"accumulate takes a Window, got a {type(window).__name__}: Window([micro_batch, ...]), one of "
                "windows(loader, ...), or Window([batch]).cut(micro_batch_size)"
            )
        self._window = window
        self._modules = modules_of(model)
        self._count = count
        self._device = None if device is None else known_device(device)
        if process_group is not AUTO:
            check_group(process_group)
        self._process_group = process_group
        self._finished = False

    def __enter__(self) -> Iterator[tuple[Nested, Share]]:
        replicas = ddp_modules(self._modules)
        self._ranks = Ranks.of(self._process_group, replicas)
        everyone_runs = self._ranks.all(len(self._window) > 0)
        self._gradients = WindowGradients(self._modules)
        device = self._device or device_of(self._gradients.parameters)
        home = device or torch.device("cpu")
        sizes = iter(self._window.micro_batch_sizes)
        count = self._count or (lambda _: next(sizes))
        try:
            totals, num_micro_batches = count_window(self._window, count, self._ranks, home)
        except TypeError:  # a look at it in time would cost each window more than all else here
            check_count(self._count)
            raise
        if num_micro_batches == 0:
            raise ValueError("the effective batch is empty: no rank has a sample. Skip empty windows")
        self._gradients.__enter__()
        overlaps = self._gradients.match_parameters and everyone_runs
        self._reduction = GradientReduction(replicas, self._ranks, overlaps, everyone_runs)
        self._reduction.__enter__()
        # DDP averages over ranks, so a share counts for all of them; what is summed is divided again at the end.
        shares = {name: ratio(float(self._ranks.size), total) for name, total in totals.items()}
        return self._steps(shares if list(shares) != [LOSS] else shares[LOSS], device)

    def __iter__(self) -> NoReturn:
        """TypeError: it must be entered first, since only then is it known when the loop is left."""
        raise TypeError("accumulate(...) is a context: with accumulate(window, model) as steps: for ... in steps: ...")

    def _steps(self, share: Share, device: torch.device | None) -> Iterator[tuple[Nested, Share]]:
        for micro_batch, _, is_last in on_device(self._window.sized(), device):
            self._reduction.announce(is_last)
            yield micro_batch, share
            self._gradients.absorb()
        self._finished = True

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        early = None
        if kind is None and not self._finished:
            kind = RuntimeError
            early = RuntimeError("the loop over the window was left early: gradients are as before; run all its steps")
        self._reduction.__exit__(kind, error, trace)
        if kind is None:
            sums = self._gradients.sums()
            for group, factor in self._reduction.finish(self._gradients.parameters, sums):
                multiply_(group, factor / self._ranks.size)
            self._gradients.finish(sums)
        self._gradients.__exit__(kind, error, trace)
        if early is not None:
            raise early
