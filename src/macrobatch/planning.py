"""From a budget to a micro-batch size, before anything runs: what fits, what takes the memory, how long it takes."""

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import nn
from torch.optim import Optimizer

from macrobatch.arguments import check_optimizer
from macrobatch.batch import Cut, NumSamples
from macrobatch.budget import budget_bytes, checked_device
from macrobatch.checkpointing import Checkpointing, compare_checkpointing
from macrobatch.distributed import AUTO, Ranks
from macrobatch.fitting import Account, Fitting, Memory
from macrobatch.rehearsal import Rehearsal
from macrobatch.speed import even_size, measure, sizes_to_measure
from macrobatch.structure import Nested
from macrobatch.substitution import held_tensors

CUDA_MARGIN = 0.08  # of the budget: workspaces of kernels, fragmentation
SPEED_LIMIT_S = 10.0  # for all measured micro-batches together, as far as can be told beforehand


@dataclass(frozen=True)
class Choice:
    """A micro-batch size, and what training with it takes.

    `memory`: predicted bytes, by kind. `seconds_per_update`: of forward and backward of the rank's share of the
    effective batch, without the optimizer's step; None where it was not measured.
    """

    micro_batch_size: int
    accumulation_steps: int
    memory: Memory
    seconds_per_update: float | None


@dataclass(frozen=True)
class Point:
    """One point of the curve over micro-batch sizes. `peak`: bytes. `seconds_per_sample`: None where not measured."""

    micro_batch_size: int
    peak: int
    seconds_per_sample: float | None


@dataclass(frozen=True)
class Plan:
    """What `plan` found.

    `largest`: the largest micro-batch size that fits; `is_exact` if one sample more was tried and did not fit, or the
    whole batch fits. `fastest`: the fastest of the measured sizes; None if none was measured. `method`: "fake" or
    "probes", and `reason` why. `num_passes`: forwards and backwards run to find the size. `optimizer`: whose state was
    counted. `curve`: ascending sizes, beyond the budget too. `checkpointing`: whether it would be faster.
    """

    batch_size: int
    max_memory: int
    device: torch.device
    largest: Choice
    fastest: Choice | None
    is_exact: bool
    method: Literal["fake", "probes"]
    reason: str
    num_passes: int
    optimizer: str
    curve: tuple[Point, ...]
    checkpointing: Checkpointing

    @property
    def micro_batch_size(self) -> int:
        """The largest that fits."""
        return self.largest.micro_batch_size

    @property
    def accumulation_steps(self) -> int:
        """Micro-batches in a window, on each rank, with the largest micro-batch size."""
        return self.largest.accumulation_steps

    @property
    def memory(self) -> Memory:
        """Bytes by kind, with the largest micro-batch size."""
        return self.largest.memory

    @property
    def peak(self) -> int:
        """Bytes at once, with the largest micro-batch size."""
        return self.memory.peak

    @property
    def seconds_per_update(self) -> float | None:
        """Of the fastest choice, else unknown."""
        return None if self.fastest is None else self.fastest.seconds_per_update


def plan(
    model: nn.Module | Sequence[nn.Module],
    loss_fn: Callable[[Any, Nested], Any],
    sample_batch: Nested,
    *,
    batch_size: int,
    max_memory: int | str | None = None,
    optimizer: Optimizer | Sequence[Optimizer] | None = None,
    device: torch.device | str | None = None,
    measure_speed: bool = True,
    autocast: torch.dtype | AbstractContextManager[Any] | None = None,
    frozen: Sequence[nn.Module] = (),
    grad_dtype: torch.dtype | None = None,
    cut: Cut | None = None,
    num_samples: NumSamples | None = None,
) -> Plan:
    """The micro-batch size with which an effective batch of `batch_size` samples trains within `max_memory`.

    `model`, `loss_fn` and from `autocast` on: as for the Accumulator; they are left as they were. `sample_batch`: a
    batch like those of training, in shape and dtype; as long as the longest, where lengths vary. `batch_size`: over all
    ranks. `max_memory`: bytes, "6GB", "80%" of what `device` has, or None for all of that. `optimizer`: one or several;
    None assumes AdamW. `device`: where training runs, by default where the model is. `measure_speed`: run a few real
    micro-batches, of sizes that fit, to find the fastest.

    Costs at most four forwards and backwards on fake tensors, which allocate nothing. Where the model cannot run on
    them, up to eight real ones within the budget. ValueError, before any real step, if the budget is not a size, is
    beyond the device or below the model's own state, or if one sample does not fit.
    """
    if isinstance(batch_size, bool) or not isinstance(batch_size, int) or batch_size < 1:
        raise ValueError(f"batch_size must be a whole number of samples, at least 1, got {batch_size!r}")
    optimizers = check_optimizer(optimizer)
    where = None if device is None else checked_device(device)
    rehearsal = Rehearsal(
        model,
        loss_fn,
        sample_batch,
        autocast=autocast,
        frozen=frozen,
        grad_dtype=grad_dtype,
        device=where,
        cut=cut,
        num_samples=num_samples,
    )
    checked_device(rehearsal.device)
    max_bytes = budget_bytes(max_memory, rehearsal.device, _bytes_on_device(rehearsal))
    share = -(-batch_size // Ranks.of(AUTO).size)
    usable = int(max_bytes * (1 - CUDA_MARGIN)) if rehearsal.device.type == "cuda" else max_bytes
    planner = _Planner(Account(rehearsal, optimizers, share, usable, sample_batch))
    return planner.plan(batch_size, max_bytes, measure_speed and rehearsal.stage.home == rehearsal.device)


class _Planner:
    """The steps from an account to a plan: what fits, how fast it is, what else could be done."""

    def __init__(self, account: Account) -> None:
        self._account = account
        self._rehearsal = account.rehearsal

    def plan(self, batch_size: int, max_bytes: int, measures: bool) -> Plan:
        fitting = self._account.search(check=measures)
        size = fitting.fit.size
        if measures and self._rehearsal.device.type == "cuda":
            size = self._verified(size, fitting)
        seconds: dict[int, float] = {}
        if measures:
            sizes = sizes_to_measure(self._account.num_samples, size)
            seconds = measure(self._rehearsal.seconds, sizes, SPEED_LIMIT_S)
        fastest = min(seconds, key=lambda b: seconds[b] / b, default=None)
        return Plan(
            batch_size=batch_size,
            max_memory=max_bytes,
            device=self._rehearsal.device,
            largest=self._choice(size, fitting, seconds),
            fastest=None if fastest is None else self._choice(fastest, fitting, seconds),
            is_exact=fitting.fit.exact and size == fitting.fit.size,
            method=fitting.method,
            reason=fitting.reason,
            num_passes=fitting.fit.num_runs,
            optimizer=self._account.update(fitting.traces[0].idle).assumption,
            curve=self._curve(fitting, seconds),
            checkpointing=compare_checkpointing(self._account, fitting.traces, size, seconds),
        )

    def _choice(self, size: int, fitting: Fitting, seconds: dict[int, float]) -> Choice:
        n = self._account.num_samples
        even = even_size(n, size)
        per_update = seconds[even] / even * n if even in seconds else None
        return Choice(size, -(-n // size), self._account.memory(size, fitting.traces), per_update)

    def _curve(self, fitting: Fitting, seconds: dict[int, float]) -> tuple[Point, ...]:
        n = self._account.num_samples
        sizes = {1 << power for power in range(n.bit_length())} | {fitting.fit.size} | seconds.keys()
        return tuple(
            Point(b, self._account.memory(b, fitting.traces).peak, seconds[b] / b if b in seconds else None)
            for b in sorted(sizes)
        )

    def _verified(self, size: int, fitting: Fitting) -> int:
        """`size`, or a smaller one, that a real micro-batch on the GPU showed to fit: all that is reserved counts."""
        kept = self._account.update(fitting.traces[0].idle).state
        while size > 1:
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats(self._rehearsal.device)
            try:
                self._rehearsal.seconds(size, repeats=1)
                if torch.cuda.max_memory_reserved(self._rehearsal.device) + kept <= self._account.max_bytes:
                    break
            except torch.OutOfMemoryError:
                pass
            size = size * 9 // 10
        return size


def _bytes_on_device(rehearsal: Rehearsal) -> int:
    held = held_tensors(rehearsal.stage.modules)
    storages = {s.data_ptr(): s.nbytes() for s in (t.untyped_storage() for t in held if t.device == rehearsal.device)}
    return sum(storages.values())
