"""How many graphs fit into a budget beside everything else: what the loss takes is measured, the rest is rehearsed.

peak(m) = parameters + gradients + optimizer state + inputs + max(m graph + loss, (m - 1) graph + backward + outputs)
"""

from dataclasses import dataclass

import torch

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
from macrobatch.rehearsal import Rehearsal
from macrobatch.seeds import Learned
from macrobatch.storages import format_bytes
from macrobatch.structure import Nested
from macrobatch.substitution import held_tensors

ADVICE = (
    "What would help: the same loss in blocks (RowBlocks(block_loss, rows=...)), outputs of fewer dimensions, or more "
    "memory"
)
SAMPLES = 8  # whose outputs stand for all, where the loss is measured


@dataclass(frozen=True)
class Needs:
    """What a window needs beside its micro-batches, in bytes.

    `outputs`: all of them; `loss`: forward and backward of the loss, outputs included. `has_gradients`: parameters have
    gradients before the window, zeros.
    """

    account: Account
    outputs: int
    loss: int
    has_gradients: bool

    @property
    def left(self) -> int:
        """Bytes that are left for micro-batches, whose outputs' gradients stay beside them."""
        return self.account.max_bytes - self.outputs

    def graphs(self, micro_batch_size: int, num_micro_batches: int) -> int:
        """The most graphs of micro-batches of this size that can be kept, at most all.

        Costs a forward and backward on fake tensors, or a real one where these fail. ValueError if not even the loss
        has room.
        """
        try:
            trace = self.account.rehearsal.fake(micro_batch_size)
        except Exception:
            trace = self.account.rehearsal.real(micro_batch_size)
        room, graph = self.account.room(micro_batch_size, trace), max(trace.saved, 1)
        if room < 0:
            raise ValueError(
                f"max_memory={format_bytes(self.account.max_bytes)} does not hold what every update takes beside its "
                f"activations: parameters, gradients, optimizer state and {num_micro_batches} micro-batches of inputs. "
                "Give a larger budget, or a smaller effective batch"
            )
        # While the loss is computed there are no gradients, unless they were zeroed in place.
        room_for_loss = room + (0 if self.has_gradients else trace.gradients)
        if self.loss > room_for_loss:
            raise ValueError(
                f"max_memory={format_bytes(self.account.max_bytes)} leaves {format_bytes(max(room_for_loss, 0))} for "
                f"the loss over all outputs, which takes {format_bytes(self.loss)}. {ADVICE}"
            )
        beside_loss = (room_for_loss - self.loss) // graph
        beside_backward = 1 + (room - self.outputs - trace.activations) // graph
        return max(0, min(beside_loss, beside_backward, num_micro_batches))


def needs_of(
    rehearsal: Rehearsal,
    encoder: Encoder,
    loss_fn: GatheredLoss,
    sample: tuple[Nested, int],
    num_samples: int,
    window: Window,
    max_memory: int | str | None,
) -> Needs:
    """What `window`, of an effective batch of `num_samples`, needs within `max_memory`.

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
                raise torch.OutOfMemoryError(f"the loss over {num_samples} samples does not fit: {message}. {ADVICE}")
        loss_bytes = meter.peak - live
    held = sum(tensor.nbytes for tensor in held_tensors(stage.modules))
    max_bytes = budget_bytes(max_memory, rehearsal.device, held)
    usable = int(max_bytes * (1 - CUDA_MARGIN)) if rehearsal.device.type == "cuda" else max_bytes
    has_gradients = any(p.grad is not None for p in trainable(stage.modules))
    return Needs(Account(rehearsal, [], window.num_samples, usable), output_bytes, loss_bytes, has_gradients)


def _repeated(part: Outputs, num_samples: int) -> Outputs:
    """Outputs of `num_samples` samples: those of `part` in order, again and again."""
    index = torch.arange(num_samples) % part.num_samples
    rows = [row.index_select(0, index.to(row.device)) for row in part.rows]
    return Outputs(part.template, rows, num_samples)
