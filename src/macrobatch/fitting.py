"""The largest micro-batch size whose training keeps within so many bytes: everything that takes memory is in the sum.

peak(b) = parameters + gradients + inputs(b) + max(optimizer state + activations(b) + kept(b), optimizer step)
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from torch.nn.modules.batchnorm import _NormBase
from torch.optim import Optimizer

from macrobatch.call_notes import note_call
from macrobatch.modules import submodules
from macrobatch.prediction import Fit, Trace, activations_at, largest_predicted, largest_that_fits
from macrobatch.recovery import is_out_of_memory
from macrobatch.rehearsal import Rehearsal
from macrobatch.state import SMALL
from macrobatch.storages import format_bytes
from macrobatch.structure import Nested
from macrobatch.update_memory import UpdateMemory, update_memory

MAX_FAKE_RUNS, MAX_PROBES = 4, 8
TOLERANCE = 0.01  # how far a fake run may be from a real one
FIRST_PROBES = 4  # samples in the second probe: enough to tell a line, few enough to be safe


@dataclass(frozen=True)
class Memory:
    """Bytes at the peak of an update, by what takes them.

    `parameters`: with buffers. `inputs`: the samples that lie on the device: on the CPU those of the whole window, on a
    GPU the micro-batch and the next one. `activations`: all else that forward and backward hold at once, or the step of
    the optimizer where that takes more.
    """

    parameters: int
    gradients: int
    optimizer_state: int
    inputs: int
    activations: int

    @property
    def peak(self) -> int:
        """All of it."""
        return self.parameters + self.gradients + self.optimizer_state + self.inputs + self.activations


class Account:
    """What windows of `num_samples` samples take with these optimizers (none: AdamW is assumed), within `max_bytes`.

    `sample`: the batch that is rehearsed, for the note on an error of the loss_fn.
    """

    def __init__(
        self,
        rehearsal: Rehearsal,
        optimizers: Sequence[Optimizer],
        num_samples: int,
        max_bytes: int,
        sample: Nested = None,
    ) -> None:
        self.rehearsal = rehearsal
        self.num_samples = num_samples
        self.max_bytes = max_bytes
        self._sample = sample
        self.optimizers = optimizers
        self._updates: dict[frozenset[int], UpdateMemory] = {}
        self._one, self._two = rehearsal.input_bytes(1), rehearsal.input_bytes(2 if rehearsal.largest != 1 else 1)
        self._window = rehearsal.input_bytes(num_samples)
        buffers = [(module, b) for module in submodules(rehearsal.stage.modules) for b in module.buffers(recurse=False)]
        self._copied = sum(b.nbytes for module, b in buffers if b.nbytes <= SMALL or isinstance(module, _NormBase))

    def update(self, idle: frozenset[int] = frozenset()) -> UpdateMemory:
        """What the optimizers take, if the parameters at the positions `idle` get no gradients."""
        if idle not in self._updates:
            self._updates[idle] = update_memory(self.rehearsal.stage, self.optimizers, idle)
        return self._updates[idle]

    def inputs(self, size: int) -> int:
        """Bytes of the samples that lie on the device at once."""
        if self.rehearsal.device.type == "cpu":
            return self._window
        return self._one + (min(2 * size, self.num_samples) - 1) * (self._two - self._one)

    def kept(self, size: int) -> int:
        """Bytes that the Accumulator keeps for a window: copies of buffers to recover with, sums and counts."""
        return 2 * self._copied + 8 * -(-self.num_samples // size) + 64

    def memory(self, size: int, traces: Sequence[Trace]) -> Memory:
        """What training at this micro-batch size takes, predicted from traces at other sizes."""
        update, first = self.update(traces[0].idle), traces[0]
        activations = max(activations_at(size, traces) + self.kept(size), update.peak - update.state)
        return Memory(first.parameters, first.gradients, update.state, self.inputs(size), activations)

    def room(self, size: int, trace: Trace) -> int:
        """Bytes left for the activations of `size` samples; negative if not even the optimizer's step fits."""
        update = self.update(trace.idle)
        left = self.max_bytes - trace.parameters - trace.gradients - self.inputs(size)
        return left - update.state - self.kept(size) if update.peak <= left else -1

    def search(self, *, check: bool) -> "Fitting":
        """The largest size up to the window's that keeps within the bytes, by fake runs, or measured where these fail.

        With `check` one real micro-batch of two samples tells whether the fake ones can be believed. ValueError, before
        any real run if fake ones are possible, where not even one sample fits.
        """
        largest = min(self.num_samples, self.rehearsal.largest or self.num_samples)
        try:
            fit = largest_that_fits(self.rehearsal.fake, self.room, largest, max_runs=MAX_FAKE_RUNS)
        except Exception as error:
            message = str(error).strip().splitlines()
            doubt = f"the model does not run on fake tensors: {type(error).__name__}, {message[0] if message else ''}"[
                :200
            ]
        else:
            doubt = self._difference(fit) if check and fit.size else ""
        if doubt:
            fit = largest_that_fits(self._probe, self.room, largest, max_runs=MAX_PROBES, second=FIRST_PROBES)
        if fit.size == 0:
            raise ValueError(_refusal(self, list(fit.traces.values())))
        return Fitting(fit, "probes", doubt) if doubt else Fitting(fit, "fake", "every operation runs on fake tensors")

    def _difference(self, fit: Fit) -> str:
        """What is wrong with the fake runs; empty if a real one takes the same."""
        size = min(fit.traces)
        real, fake = self._probe(size), fit.traces[size]
        if size > fit.size or (real is not None and _agree(real.saved, fake.saved) and _agree(real.peak, fake.peak)):
            return ""
        took = "more than the budget" if real is None else f"{format_bytes(real.saved)} and {format_bytes(real.peak)}"
        return (
            f"for {size} samples fake tensors predict {format_bytes(fake.saved)} after the forward and a peak of "
            f"{format_bytes(fake.peak)}, and a real run took {took}"
        )

    def _probe(self, size: int) -> Trace | None:
        """The trace of a real run that keeps within the bytes, together with what does not exist yet; None if none."""
        own = self.rehearsal.input_bytes(size)
        limit = self.max_bytes - self.update().state - self.kept(size) - (self.inputs(size) - own)
        try:
            return self.rehearsal.real(size, limit)
        except Exception as error:
            if not is_out_of_memory(error):
                if self._sample is not None:
                    note_call(error, "loss_fn", self._sample, "was made of")
                raise
            return None


@dataclass(frozen=True, eq=False)
class Fitting:
    """A fit, how it was found, and why so."""

    fit: Fit
    method: Literal["fake", "probes"]
    reason: str

    @property
    def traces(self) -> list[Trace]:
        """Of the runs that ended."""
        return list(self.fit.traces.values())


def _agree(real: int, fake: int) -> bool:
    return abs(real - fake) <= max(TOLERANCE * real, 64)


_REMEDIES = (
    "What would help: recomputing activations (torch.utils.checkpoint), lower precision (autocast=torch.bfloat16), "
    "shorter or smaller samples, a larger budget."
)

_ASSUMED = " The state is that of AdamW, because no optimizer was given: optimizer= tells which one trains."


def _refusal(account: Account, traces: Sequence[Trace]) -> str:
    """Why not even one sample fits, and what would help."""
    budget = f"max_memory={format_bytes(account.max_bytes)}"
    if not traces:
        return f"one sample does not fit into {budget}: a real micro-batch of one ran out of memory. {_REMEDIES}"
    needed = account.memory(1, traces)
    state = needed.peak - needed.activations
    kinds = (
        f"parameters {format_bytes(needed.parameters)}, gradients {format_bytes(needed.gradients)}, optimizer state "
        f"{format_bytes(needed.optimizer_state)}, inputs {format_bytes(needed.inputs)}"
    )
    assumed = "" if account.optimizers else _ASSUMED
    if state > account.max_bytes:
        return (
            f"{budget} is less than the model's own state, {format_bytes(state)} ({kinds}): no micro-batch size helps. "
            f"Give more, train fewer parameters, or use an optimizer that keeps less.{assumed}"
        )
    recomputing = [trace.with_checkpointing() for trace in traces if trace.checkpointed is not None]
    fits = largest_predicted(recomputing, account.room, 0, account.num_samples) if recomputing else 0
    checkpointed = f" With its {traces[0].num_blocks} blocks checkpointed about {fits} would fit." if fits else ""
    return (
        f"one sample does not fit into {budget}: it needs {format_bytes(needed.peak)} ({kinds}, activations "
        f"{format_bytes(needed.activations)}). {_REMEDIES}{checkpointed}{assumed}"
    )
