"""What an optimizer keeps, and what its step takes, found by one step on fake tensors."""

from collections import defaultdict
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import DataDependentOutputException
from torch.optim import AdamW, Optimizer
from torch.utils._python_dispatch import TorchDispatchMode

from macrobatch.recording import Recorder
from macrobatch.substitution import Stage, allocate_gradients, held_tensors, unchanged


@dataclass(frozen=True)
class UpdateMemory:
    """Bytes beside parameters and gradients: `state` is kept, `peak` is the most during a step. `assumption`: whose."""

    state: int
    peak: int
    assumption: str


def update_memory(stage: Stage, optimizers: Sequence[Optimizer], idle: frozenset[int] = frozenset()) -> UpdateMemory:
    """What one step of `optimizers` from their first state on would take; they are not changed. Without any: AdamW.

    `idle`: positions of the trainable parameters that get no gradient. Where an optimizer cannot step on fake tensors,
    two numbers in float32 for each parameter are assumed, and `assumption` says so.
    """
    try:
        return _step(stage, optimizers, idle)
    except Exception as error:
        with stage.fakes() as (parameters, _):
            numbers = sum(p.numel() for j, p in enumerate(parameters) if j not in idle)
        why = f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"[:200]
        name = " and ".join(type(each).__name__ for each in optimizers)
        return UpdateMemory(
            8 * numbers, 8 * numbers, f"{name} cannot step on fake tensors ({why}): two float32 assumed"
        )


def _step(stage: Stage, optimizers: Sequence[Optimizer], idle: frozenset[int]) -> UpdateMemory:
    with stage.fakes() as (parameters, fake), ExitStack() as stack:
        stepping = list(optimizers) or [AdamW(parameters)]
        stack.enter_context(unchanged(optimizers))
        for optimizer in optimizers:
            _put_on_stage(optimizer, fake, stage.device.type == "cuda")
        recorder = stack.enter_context(Recorder(fake=fake))
        recorder.hold(held_tensors(stage.modules))
        allocate_gradients(parameters, idle)
        recorder.start()
        stack.enter_context(_AnyValue())  # type: ignore[no-untyped-call]
        for optimizer in stepping:
            optimizer.step()
        state = recorder.live - recorder.held
        peak = recorder.peak - recorder.held
    if optimizers:
        return UpdateMemory(state, peak, " and ".join(type(each).__name__ for each in optimizers))
    return UpdateMemory(state, peak, "AdamW, because no optimizer was given: two moments for each parameter")


def _put_on_stage(optimizer: Optimizer, fake: Callable[[Tensor], Tensor], is_cuda: bool) -> None:
    """The optimizer has fake parameters, no state and no hooks."""
    for group in optimizer.param_groups:
        group["params"] = [fake(p) for p in group["params"]]
        group.update((key, fake(value)) for key, value in group.items() if isinstance(value, Tensor))
        if is_cuda and group.get("foreach", False) is None and not group.get("fused"):
            group["foreach"] = True  # what torch chooses for real parameters on CUDA, and not for fake ones
    vars(optimizer).update(
        state=defaultdict(dict),
        _optimizer_step_pre_hooks={},
        _optimizer_step_post_hooks={},  # fakes are not for hooks
    )


class _AnyValue(TorchDispatchMode):
    """A number read from a fake tensor is 1: what an optimizer keeps does not depend on it."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        try:
            return func(*args, **(kwargs or {}))
        except DataDependentOutputException:
            if func is not torch.ops.aten._local_scalar_dense.default:
                raise
            return 1.0 if args[0].is_floating_point() else 1
