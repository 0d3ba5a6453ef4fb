"""Out of memory in a micro-batch: undo it, run it in halves, and let the window's gradient be what it would have been.

An error in the middle of a backward leaves some parameters with the micro-batch's gradient added and others without.
No copy of the gradients is needed to mend that: which parameters are done can be seen (torch counts the changes of
`p.grad`), and the halves are run for the others only. What was accumulated before stays.
"""

import gc
import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from macrobatch.batch import Cut, cut_batch
from macrobatch.gradients import shares_storage
from macrobatch.sizing import SizeLimit
from macrobatch.state import Beginnings, Slot, coupled_layer
from macrobatch.structure import Nested, even_sizes

logger = logging.getLogger("macrobatch")


class RunAgain(Exception):
    """A micro-batch failed in a way that cannot be mended in place."""


@dataclass(slots=True)
class Attempt:
    """One try at a micro-batch, or at a part of one that failed.

    `inputs`: the parameters whose gradients are still wanted, None for all. `is_retry`: whether anything of this window
    has failed before. Set by who runs it: `started_backward`,
    gradients may have changed; `can_mend`, a half-done backward can be completed for the rest; `has_communicated`,
    other ranks are waiting for the rest of this backward.
    """

    micro_batch: Nested
    num_samples: int
    is_last: bool
    inputs: list[nn.Parameter] | None = None
    is_retry: bool = False
    started_backward: bool = False
    can_mend: bool = True
    has_communicated: bool = False


class Recovery:
    """Runs the micro-batches of one window, each in as many parts as memory demands.

    `limit` tells the largest micro-batch to try and learns from failures. `fills`: whether the window does, while it
    runs. `retries` counts failures.
    """

    def __init__(
        self,
        parameters: Sequence[nn.Parameter],
        slots: list[Slot],
        beginnings: Beginnings,
        limit: SizeLimit,
        device: torch.device | None,
        own_cut: Cut | None,
        fills: bool = False,
    ) -> None:
        self._parameters = parameters
        self._beginnings = beginnings
        self._limit = limit
        self._device = device
        self._own_cut = own_cut
        self._slots = slots
        self._message = ""  # what the allocator said last
        self._couples = False  # whether a layer normalised over a micro-batch that failed
        self.retries = 0
        beginnings.window(slots, device, fills)

    def run(self, micro_batch: Nested, num_samples: int, is_last: bool, step: Callable[[Attempt], None]) -> None:
        """The micro-batch has been run, whole or in parts: `step` has succeeded for each part.

        torch.OutOfMemoryError if not even one sample fits, or it cannot be cut; RunAgain if it cannot be mended in
        place.
        """
        pending = [Attempt(micro_batch, num_samples, is_last)]
        while pending:
            attempt = pending.pop()
            attempt.is_retry = self.retries > 0
            if self._limit.current is not None and attempt.num_samples > self._limit.current:
                pending.extend(self._parts(attempt, self._limit.current))
                continue
            before = [(g := p.grad, None if g is None else g._version) for p in self._parameters]
            self._beginnings.micro_batch()
            message = ""
            try:
                step(attempt)
            except RuntimeError as error:
                if not is_out_of_memory(error):
                    raise
                message = str(error).split("\n")[0] or "no memory left"
            if not message:
                continue
            is_undone = self._undo_forward()  # the error is gone, and with its traceback the graph: memory is free
            self.retries += 1
            self._message = message
            if attempt.has_communicated:
                raise torch.OutOfMemoryError(_communicating_message(message)) from None
            if attempt.num_samples == 1:
                raise torch.OutOfMemoryError(_single_sample_message(message)) from None
            self._limit.failed(attempt.num_samples)
            self._couples = coupled_layer([module for module, _ in self._slots]) is not None
            if not is_undone:
                raise RunAgain
            attempt.inputs = self._undone(attempt, before)
            pending.append(attempt)

    def _undo_forward(self) -> bool:
        """What was freed can be used again, and random numbers and buffers are as before; False if they cannot be."""
        gc.collect()
        if self._device is not None and self._device.type == "cuda":
            torch.cuda.empty_cache()
        return self._beginnings.return_to_micro_batch()

    def _undone(self, attempt: Attempt, before: list[tuple[Tensor | None, int | None]]) -> list[nn.Parameter] | None:
        """The parameters that the failed backward has not reached; None if it did not start, RunAgain if unknown."""
        if not attempt.started_backward:
            return attempt.inputs
        if not attempt.can_mend or any(shares_storage(p.grad) for p in self._parameters):
            raise RunAgain  # the limit is lower now
        done = {
            id(p)
            for p, (gradient, version) in zip(self._parameters, before, strict=True)
            if p.grad is not None and (p.grad is not gradient or p.grad._version != version)
        }
        wanted = self._parameters if attempt.inputs is None else attempt.inputs
        return [p for p in wanted if id(p) not in done]

    def _parts(self, attempt: Attempt, largest: int) -> list[Attempt]:
        """The attempt in even parts of at most `largest` samples, the first one at the end of the list."""
        n = attempt.num_samples
        if n <= largest:
            return [attempt]
        sizes = even_sizes(n, largest)
        try:
            pieces = cut_batch(attempt.micro_batch, sizes, self._own_cut)
        except ValueError as error:
            if not self._message:
                raise
            raise torch.OutOfMemoryError(
                f"out of memory: {self._message.rstrip('.')}. It would go on with smaller micro-batches, but this one "
                f"cannot be cut: {error}"
            ) from error
        parts = [Attempt(piece, size, False, attempt.inputs) for piece, size in zip(pieces, sizes, strict=True)]
        parts[-1].is_last = attempt.is_last
        return parts[::-1]

    def restart(self) -> None:
        """Buffers are as before the window's first micro-batch; random numbers too, unless it fills while it runs."""
        self._beginnings.return_to_window()

    def log(self) -> None:
        """One line, if anything failed: what, and with what size it goes on."""
        if self.retries:
            largest = self._limit.current
            message = f"out of memory {self.retries} time(s) in this window: recovered, no sample lost"
            message += f"; micro-batches now have at most {largest}"
            if self._couples:
                message += f"; BatchNorm now normalises over at most {largest} samples, which is another model than "
                message += "before"
            logger.warning("%s", message)


def is_out_of_memory(error: BaseException) -> bool:
    """Whether `error` is a failed allocation: torch's own type, or the CPU allocator's, which has none but its text.

    Errors that CUDA reports later than they happened are not: after them nothing on the device can be trusted.
    """
    return isinstance(error, torch.OutOfMemoryError) or (
        type(error) is RuntimeError and "DefaultCPUAllocator: can't allocate memory" in str(error)
    )


def _single_sample_message(message: str) -> str:
    message = message.split(" Use a smaller")[0].rstrip(".")  # advice that is of no use here
    return (
        f"a single sample does not fit: {message}. What would help: recompute activations "
        "(torch.utils.checkpoint), a lower precision (autocast=torch.bfloat16), shorter or smaller samples, or a "
        "larger memory budget"
    )


def _communicating_message(message: str) -> str:
    return (
        f"out of memory in the backward in which DDP communicates, which other ranks are part of: {message}. Give a "
        "smaller micro_batch_size, or overlap=False, with which DDP's gradients are reduced after the last backward, "
        "and such errors are recovered everywhere"
    )
