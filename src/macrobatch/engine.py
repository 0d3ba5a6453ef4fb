"""Backward with a seed for each loss, at the cost of torch's engine alone.

`torch.autograd.backward` asks of every call what arguments from anywhere may need: shapes, subclasses, nested tensors.
Of losses that were checked already this tells nothing new, and takes time with each micro-batch: decision 0006.
"""

from collections.abc import Callable, Sequence
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd import graph
from torch.overrides import has_torch_function


def backward(losses: Sequence[Tensor], seeds: Sequence[Tensor], inputs: Sequence[nn.Parameter] | None = None) -> None:
    """`p.grad` of every leaf, or of `inputs` alone, has taken up `sum_i seeds[i] * d losses[i] / dp`.

    Each loss of shape (), each seed of its shape, dtype and device; as with `torch.autograd.backward`, whose errors
    these are, and which is called wherever there is more to ask: of subclasses of Tensor, for `inputs`, and within a
    TorchFunctionMode, which that function leaves for as long as the backward runs (a checkpoint's second forward must
    not be seen by it).
    """
    engine = direct_engine() if inputs is None and not has_torch_function(losses) else None
    if engine is None:
        torch.autograd.backward(losses, seeds, inputs=inputs)
    else:
        engine(tuple(losses), tuple(seeds), False, False, (), allow_unreachable=True, accumulate_grad=True)


@cache
def direct_engine() -> Callable[..., Any] | None:
    """What `torch.autograd.backward` calls in the end, if this torch has it and it does what is expected; else None."""
    engine: Callable[..., Any] | None = getattr(graph, "_engine_run_backward", None)
    if engine is None:
        return None
    try:
        with torch.inference_mode(False), torch.enable_grad():
            leaf = torch.ones((), requires_grad=True, device="cpu")  # whatever the default device is
            seed = torch.tensor(3.0, device="cpu")
            engine((2 * leaf,), (seed,), False, False, (), allow_unreachable=True, accumulate_grad=True)
            return engine if leaf.grad is not None and float(leaf.grad) == 6.0 else None
    except Exception:  # another torch, other arguments
        return None
