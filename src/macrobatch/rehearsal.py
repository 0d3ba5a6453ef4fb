"""Run one micro-batch's forward and backward only to see what it takes: on fake tensors, or measured; nothing is left.

A fake tensor has a shape, a dtype and a device, and no numbers, so that a run at any size allocates nothing and takes
as long as its operations take to be named. What it needs is counted as `memory.peak_memory` counts a real run.
"""

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.parallel import DistributedDataParallel

from macrobatch import structure
from macrobatch.autocasting import Autocast, entered
from macrobatch.batch import Cut, NumSamples
from macrobatch.leaves import StrayLeaves
from macrobatch.modules import modules_of, submodules
from macrobatch.prediction import Trace
from macrobatch.recording import Recorder, blocks_of
from macrobatch.structure import Nested, map_tensors, tensors
from macrobatch.substitution import Stage, allocate_gradients, held_tensors
from macrobatch.weighting import Loss, terms_of


class Rehearsal:
    """Forward and backward of `loss_fn(model, micro_batch)` at any micro-batch size, and what memory they take.

    Arguments are those of the Accumulator; `sample_batch` tells shapes and dtypes, any number of samples will do unless
    there is an own `cut`, which can only make smaller ones. Gradients exist before the forward, as in the second
    micro-batch of a window. The model is run in the mode that it is in (train or eval), hooks and all; afterwards it,
    its buffers and gradients, and the state of the random number generators are as before. A DistributedDataParallel
    is run as the module inside.
    """

    def __init__(
        self,
        model: nn.Module | Sequence[nn.Module],
        loss_fn: Callable[[Any, Nested], Any],
        sample_batch: Nested,
        *,
        autocast: Autocast = None,
        frozen: Sequence[nn.Module] = (),
        grad_dtype: torch.dtype | None = None,
        device: torch.device | None = None,
        cut: Cut | None = None,
        num_samples: NumSamples | None = None,
    ) -> None:
        inner = [_inner(module) for module in modules_of(model)]
        modules = inner + ([loss_fn] if isinstance(loss_fn, nn.Module) else [])
        self.stage = Stage(modules, loss_fn, modules_of(frozen), grad_dtype, device)
        self.device = self.stage.device
        self.num_samples = (num_samples or structure.num_samples)(sample_batch)
        self.largest = self.num_samples if cut is not None else None  # the most samples a micro-batch can be made with
        self._model = inner[0] if isinstance(model, nn.Module) else inner
        self._loss_fn = loss_fn
        self._sample_batch = sample_batch
        self._autocast = autocast
        self._cut = cut
        self._blocks = blocks_of(inner)

    def fake(self, micro_batch_size: int) -> Trace:
        """The trace of a run on fake tensors: nothing is allocated. Raises whatever the model raises on them."""
        if self.device.type == "cpu" and any(isinstance(module, nn.LSTM) for module in submodules(self.stage.modules)):
            raise NotImplementedError("nn.LSTM runs as one operation on a CPU, and as many on fake tensors")
        with self.stage.fakes() as (parameters, fake):
            micro_batch = self._micro_batch(map_tensors(self._sample_batch, fake), micro_batch_size)
            return self._record(parameters, micro_batch, micro_batch_size, Recorder(fake=fake))

    def real(self, micro_batch_size: int, max_bytes: int | None = None) -> Trace:
        """The trace of a real run. torch.OutOfMemoryError where it would need more than `max_bytes`."""
        with self.stage.copies() as parameters:
            micro_batch = self._micro_batch(self._sample_batch, micro_batch_size)
            return self._record(parameters, micro_batch, micro_batch_size, Recorder(self.device.type, max_bytes))

    def seconds(self, micro_batch_size: int, *, repeats: int = 3) -> float:
        """The time of one real forward and backward: the shortest of `repeats`, after one to warm up."""
        durations = []
        with self.stage.copies() as parameters:
            micro_batch = self._micro_batch(self._sample_batch, micro_batch_size)
            allocate_gradients(parameters)
            for _ in range(1 + repeats):
                start = self._now()
                torch.autograd.backward(self._losses(micro_batch, micro_batch_size))
                durations.append(self._now() - start)
        return min(durations[1:])

    def input_bytes(self, num_samples: int) -> int:
        """The bytes of a batch of `num_samples` samples."""
        size = min(num_samples, self.largest or num_samples)
        with FakeTensorMode(allow_non_fake_inputs=True) as mode:  # a batch of unknown structure stays real
            batch = self._micro_batch(map_tensors(self._sample_batch, mode.from_tensor), size)
            with Recorder(fake=mode.from_tensor) as recorder:
                return recorder.hold(tensors(batch)) * num_samples // size

    def _micro_batch(self, batch: Nested, size: int) -> Nested:
        """`size` samples made of those of `batch`, with storages of their own, on the device."""
        own = None if self._cut is None else self._cut(batch, 0, size)
        part = _repeated(batch, self.num_samples, size) if own is None else own
        return map_tensors(part, lambda leaf: leaf.to(self.device))

    def _record(
        self, parameters: list[nn.Parameter], micro_batch: Nested, num_samples: int, recorder: Recorder
    ) -> Trace:
        with self._watched(parameters, recorder) as reached, recorder:
            parameter_bytes = recorder.hold(held_tensors(self.stage.modules))
            allocate_gradients(parameters)
            input_bytes = recorder.hold(tensors(micro_batch))
            recorder.start()
            losses = self._losses(micro_batch, num_samples)
            strays = StrayLeaves(losses, parameters, self._loss_fn)
            recorder.start_backward()
            torch.autograd.backward(losses)
            del losses
            strays.refuse_survivors()
        idle = {j: p.grad.nbytes for j, p in enumerate(parameters) if id(p) not in reached and p.grad is not None}
        live = recorder.live_since_start()
        return Trace(
            num_samples,
            parameters=parameter_bytes,
            gradients=recorder.held - parameter_bytes - input_bytes - sum(idle.values()),
            inputs=input_bytes,
            live=live,
            saved=recorder.saved,
            idle=frozenset(idle),
            checkpointed=recorder.checkpointed(live),
            num_blocks=len(self._blocks),
        )

    @contextmanager
    def _watched(self, parameters: list[nn.Parameter], recorder: Recorder) -> Iterator[set[int]]:
        """Yields the ids of the parameters that get a gradient within the context; blocks are recorded."""
        reached: set[int] = set()
        handles: list[Any] = [p.register_post_accumulate_grad_hook(lambda p: reached.add(id(p))) for p in parameters]
        handles += [handle for block in self._blocks for handle in recorder.watch(block)]
        try:
            yield reached
        finally:
            for handle in handles:
                handle.remove()

    def _losses(self, micro_batch: Nested, num_samples: int) -> list[Tensor]:
        with entered(self._autocast, self.device):
            output = self._loss_fn(self._model, micro_batch)
        losses = list(_sums(output, num_samples))
        if not losses or not all(loss.requires_grad for loss in losses):
            raise ValueError(
                "the loss of the sample batch does not depend on any trainable parameter, or has no terms: give a "
                "sample batch like those of training"
            )
        return losses

    def _now(self) -> float:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        return time.perf_counter()


def _inner(module: nn.Module) -> nn.Module:
    return module.module if isinstance(module, DistributedDataParallel) else module


def _repeated(batch: Nested, num_samples: int, size: int) -> Nested:
    """`size` samples: those of `batch` in order, again and again. Nothing is shared with `batch` but uncut leaves."""
    have = num_samples
    while have < size:
        batch, have = structure.join([batch, batch], [have, have]), 2 * have
    part, _ = structure.split(batch, [size, have - size], n=have)
    return structure.join([part], [size])


def _sums(output: Any, num_samples: int) -> Sequence[Tensor]:
    """The losses to run backward on; weights, which a fake tensor cannot tell, and metrics are left out."""
    if isinstance(output, Loss):
        output = replace(output, weight=_known(output.weight), metrics={})
    elif isinstance(output, tuple) and len(output) == 2:
        output = output[0], _known(output[1])
    has_count = isinstance(output, Mapping) or (isinstance(output, Loss) and output.weight is None)
    return list(terms_of(output, num_samples, has_count).sums.values())


def _known(weight: Any) -> Any:
    return 1 if isinstance(weight, Tensor) else weight
