"""What a forward of a window on fake tensors can depend on, as a value: equal for windows whose full batches run alike.

Shapes and layouts of all tensors, plain values and arrays beside them, modes and plain attributes of all modules.
Numbers in tensors are not in it: such a forward has none.
"""

from collections.abc import Hashable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from macrobatch.batch import Window
from macrobatch.containers import is_opaque, leaves
from macrobatch.modules import submodules

PLAIN = (bool, int, float, str, bytes, type(None))


def kind_of(modules: Sequence[nn.Module], window: Window) -> Hashable:
    """Equal for windows, and states of `modules`, between which a forward without numbers sees no difference."""
    batches = tuple(tuple((path, _described(leaf)) for path, leaf in leaves(part, "batch")) for part in window)
    return torch.is_grad_enabled(), batches, tuple(map(_state, submodules(modules)))


def _described(leaf: Any) -> Hashable:
    if isinstance(leaf, Tensor):
        return leaf.shape, () if is_opaque(leaf) else leaf.stride(), leaf.dtype, leaf.device
    if isinstance(leaf, np.ndarray):
        return leaf.shape, leaf.dtype.str, leaf.tobytes()
    return (type(leaf), leaf) if isinstance(leaf, PLAIN) else object()  # equal to nothing: it may have changed


def _state(module: nn.Module) -> Hashable:
    """The mode, the probabilities, the counters of a module, and the shapes of its parameters."""
    plain = tuple((name, value) for name, value in vars(module).items() if isinstance(value, PLAIN))
    shapes = ((p.shape, p.stride()) for p in module._parameters.values() if p is not None)
    return type(module), plain, tuple(shapes)
