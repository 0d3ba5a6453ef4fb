"""How many graphs fit into a budget beside everything else: what the loss takes is measured, the rest is rehearsed.

peak(m) = parameters + gradients + optimizer state + inputs + max(m graph + loss, (m - 1) graph + backward + outputs)
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch.optim import Optimizer

from macrobatch.batch import Window
from macrobatch.budget import budget_bytes
from macrobatch.distributed import Ranks
from macrobatch.fitting import Account
from macrobatch.gathered_forward import Encoder
from macrobatch.gathered_loss import GatheredLoss, WindowLoss
from macrobatch.gathering import Outputs
from macrobatch.memory import MemoryMeter
from macrobatch.modules import trainable
from macrobatch.planning import CUDA_MARGIN
from macrobatch.prediction import Trace
from macrobatch.rehearsal import Rehearsal
from macrobatch.seeds import Learned
from macrobatch.storages import format_bytes
from macrobatch.structure import Nested
from macrobatch.substitution import held_tensors

LESS_LOSS = "the same loss in blocks, or in smaller ones (RowBlocks(block_loss, rows=...)), outputs of fewer dimensions"
LESS_ACTIVATIONS = "recomputing activations (torch.utils.checkpoint), lower precision (autocast=torch.bfloat16)"
LESS_STATE = "training fewer parameters (requires_grad_(False), frozen=)"
WHICH_OPTIMIZER = "; and optimizer=, which tells which one trains"
SAMPLES = 8  # whose outputs stand for all, where the loss is measured


@dataclass(frozen=True)
class Peak:
    """What a window takes at one `moment` of its update. `parts`: in bytes, by name; `advice`: what lowers it."""

    moment: str
    parts: dict[str, int]
    advice: str

    @property
    def num_bytes(self) -> int:
        """All of it."""
        return sum(self.parts.values())


class _BesideOutputs(Account):
    """The account of micro-batches that run while the outputs of the whole window stand beside them."""

    def __init__(self, account: Account, outputs: int) -> None:
        super().__init__(account.rehearsal, account.optimizers, account.num_samples, account.max_bytes)
        self._outputs = outputs

    def room(self, size: int, trace: Trace) -> int:
        """What the outputs leave."""
        return super().room(size, trace) - self._outputs


@dataclass(frozen=True)
class Needs:
    """What a window needs beside its micro-batches, in bytes.

    `outputs`: all of them; `loss`: forward and backward of the loss, outputs included. `has_gradients`: parameters have
    gradients before the window, zeros. `budget`: in the user's words; `margin`: the share of it that is not counted on.
    """

    account: Account
    outputs: int
    loss: int
    has_gradients: bool
    budget: str
    margin: float = 0.0

    def largest(self, samples: int) -> int:
        """The largest micro-batch of at most so many samples that fits beside the outputs. ValueError if none does."""
        self.refuse_too_little(self.trace(1))
        fitting = _BesideOutputs(self.account, self.outputs).search(check=False)
        return min(fitting.fit.size, samples)

    def graphs(self, micro_batch_size: int, num_micro_batches: int) -> int:
        """The most graphs of micro-batches of this size that can be kept, at most all.

        Costs a forward and backward on fake tensors, or a real one where these fail. ValueError if the window has no
        room even without.
        """
        trace = self.trace(micro_batch_size)
        self.refuse_too_little(trace)
        room, graph = self.account.room(micro_batch_size, trace), max(trace.saved, 1)
        # While the loss is computed there are no gradients, unless they were zeroed in place.
        beside_loss = (room + (0 if self.has_gradients else trace.gradients) - self.loss) // graph
        beside_backward = 1 + (room - self.outputs - trace.activations) // graph
        return max(0, min(beside_loss, beside_backward, num_micro_batches))

    def trace(self, micro_batch_size: int) -> Trace:
        """What a micro-batch takes, on fake tensors, or in a real run where these fail."""
        try:
            return self.account.rehearsal.fake(micro_batch_size)
        except Exception:
            return self.account.rehearsal.real(micro_batch_size)

    def refuse_too_little(self, trace: Trace) -> None:
        """ValueError if the budget does not hold a window in micro-batches of the trace's size, no graph kept."""
        peak = max(self.peaks(trace), key=lambda peak: peak.num_bytes)
        if peak.num_bytes <= self.account.max_bytes:
            return
        size, least = trace.micro_batch_size, format_bytes(_rounded_up(peak.num_bytes / (1 - self.margin)))
        cut = "even in micro-batches of one sample" if size == 1 else f"in micro-batches of {size} samples"
        parts = ", ".join(f"{name} {format_bytes(num_bytes)}" for name, num_bytes in peak.parts.items())
        raise ValueError(
            f"{self.budget} is too small for a window of {self.account.num_samples} samples: {cut} it needs at least "
            f"{least}, most of all {peak.moment}: {parts} (optimizer: "
            f"{self.account.update(trace.idle).assumption}). Give {least} or more, or a smaller effective batch. What "
            f"would also help: {peak.advice}{'' if self.account.optimizers else WHICH_OPTIMIZER}"
        )

    def peaks(self, trace: Trace) -> list[Peak]:
        """What a window takes in each phase, in micro-batches of the trace's size, without kept graphs."""
        account, update = self.account, self.account.update(trace.idle)
        inputs, kept = account.inputs(trace.micro_batch_size), account.kept(trace.micro_batch_size)
        state = {"optimizer state": update.state, "inputs": inputs}
        before = {"parameters": trace.parameters} | ({"gradients": trace.gradients} if self.has_gradients else {})
        held = {"parameters": trace.parameters, "gradients": trace.gradients} | state
        smaller = "" if trace.micro_batch_size == 1 else 'a smaller micro_batch_size, or "auto", '
        backward = {"outputs of all samples": self.outputs, "activations": trace.activations + kept}
        return [
            Peak("while the loss is computed", before | state | {"outputs and loss": self.loss + kept}, LESS_LOSS),
            Peak("in the backward of a micro-batch", held | backward, smaller + LESS_ACTIVATIONS),
            Peak("in the optimizer's step", held | {"the step itself": update.peak - update.state}, LESS_STATE),
        ]


def needs_of(
    rehearsal: Rehearsal,
    encoder: Encoder,
    loss_fn: GatheredLoss,
    sample: tuple[Nested, int],
    num_samples: int,
    window: Window,
    max_memory: int | str | None,
    optimizers: Sequence[Optimizer] = (),
) -> Needs:
    """What `window`, of an effective batch of `num_samples`, needs within `max_memory` (without `optimizers`: AdamW).

    Runs the loss once, forward and backward, on the outputs of `sample`, a micro-batch and its size, again and again.
    The model is left as it was. torch.OutOfMemoryError if the loss does not fit into what there is.
    """
    stage, (micro_batch, n) = rehearsal.stage, sample
    with stage.copies() as parameters, torch.enable_grad():
        with torch.no_grad():
            part = encoder(micro_batch, n).detached()
        with MemoryMeter(rehearsal.device) as meter:
            live = meter.live
            outputs = _repeated(part, num_samples)
            output_bytes = sum(row.nbytes for row in outputs.rows)
            message = WindowLoss(encoder, loss_fn, Learned(), parameters, Ranks(None)).backward(window, outputs)
            if message is not None:  # what was measured is only a part of it
                raise torch.OutOfMemoryError(
                    f"the loss over {num_samples} samples does not fit: {message}. What would help: {LESS_LOSS}, more "
                    "memory"
                )
        loss_bytes = meter.peak - live
    held = sum(tensor.nbytes for tensor in held_tensors(stage.modules))
    max_bytes = budget_bytes(max_memory, rehearsal.device, held)
    margin = CUDA_MARGIN if rehearsal.device.type == "cuda" else 0.0
    account = Account(rehearsal, optimizers, window.num_samples, int(max_bytes * (1 - margin)))
    has_gradients = any(p.grad is not None for p in trainable(stage.modules))
    budget = _in_words(max_memory, max_bytes, rehearsal.device)
    return Needs(account, output_bytes, loss_bytes, has_gradients, budget, margin)


def _rounded_up(num_bytes: float) -> int:
    """So that what is read off the formatted number, two digits after the point, is enough."""
    unit = 1
    while num_bytes >= 1000 * unit:
        unit *= 1000
    step = max(1, unit // 100)
    return math.ceil(num_bytes / step) * step


def _in_words(max_memory: int | str | None, max_bytes: int, device: torch.device) -> str:
    if max_memory is None:
        return f"what is available on {device}, {format_bytes(max_bytes)},"
    if isinstance(max_memory, str) and "%" in max_memory:
        return f"max_memory={max_memory!r}, here {format_bytes(max_bytes)},"
    return f"max_memory={format_bytes(max_bytes)}"


def _repeated(part: Outputs, num_samples: int) -> Outputs:
    """Outputs of `num_samples` samples: those of `part` in order, again and again."""
    index = torch.arange(num_samples) % part.num_samples
    rows = [row.index_select(0, index.to(row.device)) for row in part.rows]
    return Outputs(part.template, rows, num_samples)
