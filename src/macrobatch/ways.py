"""Ways to run the micro-batches of a window: one after the other, or in lockstep where a layer couples them."""

import gc
import warnings
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import partial
from operator import attrgetter
from typing import Literal, NamedTuple, Protocol

import torch
from torch import nn

from macrobatch.alignment import Random, Rng, Rows, drawn_anew, random_of
from macrobatch.arguments import limit_of
from macrobatch.batch import Cut, Window
from macrobatch.budget import budget_bytes
from macrobatch.callers import first_outside
from macrobatch.coupling import coupled_layers, coupling_message
from macrobatch.devices import on_device
from macrobatch.distributed import GradientReduction, GroupChoice
from macrobatch.gradients import WindowGradients
from macrobatch.lockstep import Together, run_in_lockstep
from macrobatch.measuring import Measure
from macrobatch.memory import memory_limit
from macrobatch.offload import Offload
from macrobatch.pooled_norm import pooled
from macrobatch.recovery import Recovery, RunAgain, is_out_of_memory
from macrobatch.sizing import SizeLimit
from macrobatch.structure import Nested, tensors
from macrobatch.substitution import held_tensors
from macrobatch.weighting import Terms
from macrobatch.window_pass import WindowPass

BatchNorm = Literal["exact", "pooled", "micro_batch"]
Size = int | Literal["auto"] | None
WHOLE = 2**31  # samples: a first micro-batch size without a bound


class Running(NamedTuple):
    """A window on its way, and all that takes part in it."""

    window: Window
    pass_: WindowPass
    gradients: WindowGradients
    reduction: GradientReduction
    recovery: Recovery
    limit: SizeLimit
    cut: Cut | None


class Way(Protocol):
    """How the micro-batches of a window are run. `overlaps`: whether DDP may reduce in a backward.

    `offloaded_bytes`: the most that lay in host memory during the last window.
    """

    @property
    def overlaps(self) -> bool: ...  # noqa: D102

    @property
    def offloaded_bytes(self) -> int: ...  # noqa: D102

    def limit(self, micro_batch_size: Size, max_memory: int | str | None) -> SizeLimit:
        """How large micro-batches may be."""

    def around(self, modules: Sequence[nn.Module], process_group: GroupChoice) -> AbstractContextManager[None]:
        """A context for the whole window."""

    def run(self, running: Running) -> None:
        """Every micro-batch is run and tallied, its gradient added. RunAgain: the window must start again from zero."""

    def evaluate(self, window: Window, pass_: WindowPass) -> None:
        """Every micro-batch is tallied, without gradients."""


@dataclass(frozen=True)
class OneByOne:
    """One micro-batch after the other; with `pools` running statistics are those of the whole window.

    `random`: what random numbers its forwards draw.
    """

    pools: bool = False
    random: Random = drawn_anew
    overlaps: bool = True
    offloaded_bytes: int = 0

    def limit(self, micro_batch_size: Size, max_memory: int | str | None) -> SizeLimit:
        """As given, or searched for."""
        return limit_of(micro_batch_size, max_memory)

    def around(self, modules: Sequence[nn.Module], process_group: GroupChoice) -> AbstractContextManager[None]:
        """Where statistics are pooled, if they are."""
        return pooled(modules, process_group=process_group) if self.pools else nullcontext()

    def run(self, running: Running) -> None:
        """Forward and backward of each micro-batch, in parts where memory demands it."""
        pass_, recovery, gradients = running.pass_, running.recovery, running.gradients
        rows = self._rows(running.window, pass_)
        step = rows.in_order(partial(pass_.forward_backward, running.reduction), attrgetter("num_samples"))
        stopwatch = running.limit.stopwatch(pass_.home)
        for micro_batch, num_samples, is_last in on_device(running.window.sized(), pass_.device):
            recovery.run(micro_batch, num_samples, is_last, step)
            pass_.micro_batch_ended(gradients)
            if stopwatch is not None:
                stopwatch.lap(num_samples)
            del micro_batch  # or three of them would be on the device at once

    def evaluate(self, window: Window, pass_: WindowPass) -> None:
        """The forward of each micro-batch."""
        forward = self._rows(window, pass_).in_order(pass_.forward, lambda micro_batch, num_samples: num_samples)
        for micro_batch, num_samples, _ in on_device(window.sized(), pass_.device):
            forward(micro_batch, num_samples)
            del micro_batch

    def _rows(self, window: Window, pass_: WindowPass) -> Rows:
        return self.random(pass_.recipe, pass_.recipe.loss_fn, window, pass_.device)


class InLockstep:
    """All micro-batches together, their graphs in host memory: batch normalisation over the whole window.

    A micro-batch that holds the whole window is the full batch with its saved tensors offloaded: with "auto" the first
    to be tried. After an out-of-memory error the window is run again in halves. `max_memory`: enforced meanwhile.
    """

    overlaps = False  # the layers' own sums over ranks come in between

    def __init__(self) -> None:
        self._max_memory: int | str | None = None
        self._has_run = False
        self._offload = Offload()

    @property
    def offloaded_bytes(self) -> int:
        """Of the graphs of all forwards together."""
        return self._offload.peak

    def limit(self, micro_batch_size: Size, max_memory: int | str | None) -> SizeLimit:
        """As given; "auto" begins with the whole window."""
        if micro_batch_size != "auto":
            return limit_of(micro_batch_size, max_memory)
        self._max_memory = max_memory
        return SizeLimit(WHOLE)

    def around(self, modules: Sequence[nn.Module], process_group: GroupChoice) -> AbstractContextManager[None]:
        """Nothing: the forwards take care of themselves."""
        return nullcontext()

    def run(self, running: Running) -> None:
        """The forwards of all micro-batches, then one backward."""
        window, pass_ = running.window, running.pass_
        _refuse_idle_ranks(window, pass_)
        if running.limit.current is not None:
            window = window.cut(running.limit.current, cut=running.cut)
        micro_batches = [(micro_batch, n) for micro_batch, n, _ in on_device(window.sized(), pass_.device)]
        # All forwards begin before one ends, so DDP would broadcast buffers in each: as in a retry, in none.
        running.reduction.announce(is_last=False, is_retry=True)
        message = self._try(running, micro_batches)
        if message is not None:
            largest = max(n for _, n in micro_batches)
            del micro_batches
            _run_again(running, largest, message)
        self._has_run = True

    def _try(self, running: Running, micro_batches: list[tuple[Nested, int]]) -> str | None:
        """None if the window has been run, else what the allocator said."""
        pass_ = running.pass_
        kept = [*held_tensors(pass_.recipe.everything), *(leaf for m, _ in micro_batches for leaf in tensors(m))]
        self._offload = Offload(kept)
        try:
            with self._memory(pass_.home):
                pass_.forward_backward_together(micro_batches, partial(self._forwards, pass_))
            running.gradients.absorb()
            pass_.refuse_strays()
        except RuntimeError as error:
            if not is_out_of_memory(error):
                raise
            return str(error).splitlines()[0]
        return None

    def _forwards(self, pass_: WindowPass, forwards: Sequence[Callable[[], Terms]]) -> Together[Terms]:
        return run_in_lockstep(
            forwards,
            pass_.recipe.everything,
            ranks=pass_.ranks,
            offload=self._offload if torch.is_grad_enabled() else None,
            look_closely=not self._has_run,
        )

    def _memory(self, device: torch.device) -> AbstractContextManager[None]:
        if self._max_memory is None:
            return nullcontext()
        return memory_limit(budget_bytes(self._max_memory, device), device=device)

    def evaluate(self, window: Window, pass_: WindowPass) -> None:
        """The forwards, in lockstep, too: a layer in train mode sees the whole window."""
        if coupled_layers(pass_.recipe.everything):
            _refuse_idle_ranks(window, pass_)
        micro_batches = [(micro_batch, n) for micro_batch, n, _ in on_device(window.sized(), pass_.device)]
        pass_.forward_together(micro_batches, partial(self._forwards, pass_))


def _refuse_idle_ranks(window: Window, pass_: WindowPass) -> None:
    if pass_.ranks.any(next(window.sized(), None) is None):
        raise ValueError(
            'batch_norm="exact" sums statistics over ranks, and some rank has no micro-batch: give samples to all'
        )


def _run_again(running: Running, num_samples: int, message: str) -> None:
    """RunAgain with smaller micro-batches; torch.OutOfMemoryError where that is no way out."""
    gc.collect()  # the error is gone, and with its traceback the graphs
    if running.pass_.home.type == "cuda":
        torch.cuda.empty_cache()
    running.recovery.retries += 1
    if running.pass_.ranks.size > 1:
        raise torch.OutOfMemoryError(
            f"out of memory in a window that several ranks normalise together: {message}. Give a smaller "
            "micro_batch_size; on one rank alone such errors are recovered"
        )
    if num_samples == 1:
        raise torch.OutOfMemoryError(
            f"a window in lockstep does not fit, one sample at a time: {message}. What grows with the window is what "
            "its forwards hold while they wait, about two layers' outputs: give a smaller effective batch, a lower "
            "precision (autocast=torch.bfloat16), or a larger memory budget"
        )
    running.limit.failed(num_samples)
    raise RunAgain


def way_of(batch_norm: BatchNorm | None, measure: Measure | None, rng: Rng | None, cut: Cut | None) -> Way:
    """The way that `batch_norm` and `rng` ask for. ValueError for anything else, and where it cannot be measured."""
    if batch_norm not in (None, "exact", "pooled", "micro_batch"):
        raise ValueError(f"batch_norm must be 'exact', 'pooled', 'micro_batch' or None, got {batch_norm!r}")
    random = random_of(rng, cut)
    if rng is not None and batch_norm in ("exact", "pooled"):
        raise ValueError(
            f'rng="aligned" is for micro-batches that run one by one, and batch_norm={batch_norm!r} looks into their '
            "forwards: leave one of the two out, or convert the BatchNorm layers (macrobatch.batchnorm.convert)"
        )
    if batch_norm != "exact":
        return OneByOne(pools=batch_norm == "pooled", random=random)
    if measure is not None:
        raise ValueError(
            f'batch_norm="exact" has one backward for the whole window, in which no micro-batch has a gradient of its '
            f"own, so measure={measure!r} has nothing to measure: leave it out, or convert the BatchNorm layers"
        )
    return InLockstep()


def warn_of_coupling(modules: Sequence[nn.Module], choices: str) -> bool:
    """A UserWarning that names the layers which couple samples, and the choices; whether there are any."""
    layers = coupled_layers(modules)
    if layers:
        warnings.warn(coupling_message(layers, choices), stacklevel=first_outside())
    return bool(layers)
