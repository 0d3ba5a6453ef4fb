"""Calls that normalise over a batch: seen wherever they are made, read as values, or refused with the reason."""

import inspect
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from types import FrameType
from typing import Any

import torch
import torch.utils.checkpoint
from torch import Tensor
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

INSTEAD = "call torch.nn.functional.batch_norm or a BatchNorm layer instead"


@dataclass(frozen=True)
class BatchNormCall:
    """F.batch_norm over a batch: x of shape (N, C, ...), everything else of shape (C,) or a number."""

    x: Tensor
    running_mean: Tensor | None
    running_var: Tensor | None
    weight: Tensor | None
    bias: Tensor | None
    momentum: float
    eps: float

    def describe(self) -> str:
        """For messages."""
        return f"batch_norm over {self.x.shape[1]} channels"

    def is_like(self, other: object) -> bool:
        """Whether the other one is the same call in another forward."""
        return (
            isinstance(other, BatchNormCall)
            and self.running_mean is other.running_mean
            and (self.x.shape[1], self.eps, self.x.dtype) == (other.x.shape[1], other.eps, other.x.dtype)
        )


@dataclass(frozen=True)
class InstanceNormCall:
    """F.instance_norm with running statistics: only these see more than one sample."""

    x: Tensor
    running_mean: Tensor
    running_var: Tensor
    weight: Tensor | None
    bias: Tensor | None
    momentum: float
    eps: float

    def describe(self) -> str:
        """For messages."""
        return f"instance_norm over {self.x.shape[1]} channels"

    def is_like(self, other: object) -> bool:
        """Whether the other one is the same call in another forward."""
        return isinstance(other, InstanceNormCall) and self.running_mean is other.running_mean


NormCall = BatchNormCall | InstanceNormCall
_BATCH_NORM = inspect.signature(F.batch_norm)
_INSTANCE_NORM = inspect.signature(F.instance_norm)
_LOWER = {"batch_norm", "native_batch_norm", "cudnn_batch_norm", "miopen_batch_norm", "_native_batch_norm_legit"}
_LOWER |= {"_batch_norm_with_update", "_native_batch_norm_legit_functional", "_batch_norm_impl_index"}


def norm_call(function: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> NormCall | None:
    """The call as a value if it couples the samples of its input, else None. ValueError if it does so in other ways."""
    if function is F.batch_norm:
        given = _bound(_BATCH_NORM, args, kwargs)
        if not given["training"]:
            return None
        return BatchNormCall(*(given[name] for name in (*_TENSORS, "momentum", "eps")))
    if function is F.instance_norm:
        given = _bound(_INSTANCE_NORM, args, kwargs)
        if not given["use_input_stats"] or given["running_mean"] is None:
            return None
        return InstanceNormCall(*(given[name] for name in (*_TENSORS, "momentum", "eps")))
    name = getattr(function, "__name__", "").split(".")[0]
    if name in _LOWER and function is not F.batch_norm and _is_training(function, args, kwargs):
        raise ValueError(_hidden_message(name))
    return None


_TENSORS = ("input", "running_mean", "running_var", "weight", "bias")


def _bound(signature: inspect.Signature, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> dict[str, Any]:
    bound = signature.bind(*args, **kwargs)
    bound.apply_defaults()
    return bound.arguments


def _is_training(function: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> bool:
    """Of functions below F.batch_norm, whose first argument that is a bool says so; if none does, they always are."""
    if "training" in kwargs or "train" in kwargs:
        return bool(kwargs.get("training", kwargs.get("train")))
    return next((value for value in args if isinstance(value, bool)), True)


class RefuseHidden(TorchDispatchMode):
    """Within the context an operation that normalises over a batch is a ValueError, however it was called.

    For what torch's Python functions do not show, such as scripted modules. `allowed` is set around calls of our own;
    `refused` is what the error said, which an interpreter in between may have dropped.
    """

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.allowed = False
        self.refused: str | None = None

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Look at the operation's name, run it."""
        name = func.overloadpacket.__name__
        if name in _LOWER and not self.allowed and _is_training(func, args, kwargs or {}):
            self.refused = _hidden_message(name)
            raise ValueError(self.refused)
        return func(*args, **(kwargs or {}))


def refuse_recomputed() -> None:
    """ValueError if torch.utils.checkpoint is among the callers, or the forward of an autograd function."""
    frame: FrameType | None = sys._getframe(1)
    while frame is not None:
        if frame.f_code.co_filename in _RECOMPUTING:
            raise ValueError(_CHECKPOINTED)
        frame = frame.f_back


def _hidden_message(name: str) -> str:
    return (
        f"a forward normalises over its micro-batch by {name}, called past torch.nn.functional (in a scripted module, "
        f"or directly), where exact batch normalisation cannot take part in it: {INSTEAD}"
    )


_RECOMPUTING = (torch.utils.checkpoint.__file__, torch.autograd.function.__file__)
_CHECKPOINTED = (
    "batch_norm is called inside of an activation checkpoint, or of an autograd function of its own. There it would be "
    "computed again in backward for one micro-batch alone, with other statistics than in the forward. Switch "
    "checkpointing off (saved tensors lie in host memory, it would save little), or checkpoint only parts without "
    "BatchNorm"
)
