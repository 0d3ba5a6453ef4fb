"""What an Accumulator is given, checked before any work: a check returns its argument, or is a ValueError."""

import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence, Set, ValuesView
from contextlib import AbstractContextManager, _GeneratorContextManager
from inspect import isfunction
from typing import Any, Literal

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.amp.grad_scaler import GradScaler
from torch.nn import functional as F
from torch.nn.modules.loss import _Loss
from torch.optim import Optimizer

from macrobatch.auto_size import AutoSize
from macrobatch.autocasting import Autocast
from macrobatch.batch import Cut, NumSamples, check_size
from macrobatch.callers import first_outside
from macrobatch.distributed import AUTO, GroupChoice
from macrobatch.memory import known_device
from macrobatch.signatures import check_callable, given
from macrobatch.sizing import SizeLimit

AUTOCAST_DTYPES = (torch.bfloat16, torch.float16)
GRAD_DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)


# ---------------------------------------------------------------------------------------------------------------------
# Functions


def check_loss_fn(loss_fn: Callable[[Any, Any], Any]) -> None:
    """Whether `loss_fn` can be called with (model, micro_batch)."""
    criterion = loss_fn if isinstance(loss_fn, type) else type(loss_fn)
    name = getattr(loss_fn, "__name__", criterion.__name__)
    if issubclass(criterion, _Loss) or (isfunction(loss_fn) and getattr(F, name, None) is loss_fn):
        raise ValueError(
            f"a loss_fn takes (model, micro_batch), a {name} takes (outputs, targets): give "
            "macrobatch.sum_loss(criterion), which makes it one for (inputs, targets) batches"
        )
    check_callable(loss_fn, "loss_fn", ("model", "micro_batch"), ". Were model and loss_fn swapped?")


def check_count(count: Callable[[Any], Any] | None) -> Callable[[Any], Any] | None:
    """`count`, if it can tell the loss terms of a micro-batch."""
    if count is not None:
        check_callable(count, "count", ("micro_batch",), ". It tells the loss terms of one micro-batch")
    return count


def check_cut(cut: Cut | None) -> Cut | None:
    """`cut`, if it can cut samples start to stop out of a batch."""
    if cut is not None:
        check_callable(cut, "cut", ("batch", "start", "stop"), ". It returns the samples from start to before stop")
    return cut


def check_num_samples(num_samples: NumSamples | None) -> NumSamples | None:
    """`num_samples`, if it can count the samples of a batch."""
    if num_samples is not None:
        check_callable(num_samples, "num_samples", ("batch",), ". It returns how many samples the batch has")
    return num_samples


# ---------------------------------------------------------------------------------------------------------------------
# Precision


def check_autocast(autocast: Autocast) -> Autocast:
    """`autocast`, if it is a dtype that torch computes in, or can surround every call of the loss_fn."""
    if isinstance(autocast, _GeneratorContextManager):
        raise ValueError(
            "autocast is entered for every micro-batch, and what a @contextmanager function returns can be entered "
            "once: give torch.autocast(...), or an object of a class with __enter__ and __exit__"
        )
    if autocast is None or isinstance(autocast, AbstractContextManager) or autocast in AUTOCAST_DTYPES:
        return autocast
    raise ValueError(
        "autocast must be torch.bfloat16, torch.float16, a context manager such as torch.autocast(...), or None for "
        f"the dtype of the parameters, got {given(autocast)}"
    )


def check_scaler(scaler: GradScaler | None) -> GradScaler | None:
    """`scaler`, if it is one."""
    if scaler is not None and not isinstance(scaler, GradScaler):
        raise ValueError(
            f"scaler must be a torch.amp.GradScaler, or None, got {given(scaler)}: give "
            "scaler=torch.amp.GradScaler('cuda'); it belongs to the Accumulator alone, which scales and unscales"
        )
    return scaler


def warn_of_underflow(autocast: Autocast) -> None:
    """A UserWarning for a backward in float16, where no scaler keeps small gradients from becoming 0."""
    dtype = autocast
    if isinstance(autocast, torch.autocast):
        dtype = autocast.fast_dtype if autocast._enabled else None
    if dtype == torch.float16:
        warnings.warn(
            "autocast in float16 without a scaler: gradients below 6e-8 become 0 on their way back. Give "
            "scaler=torch.amp.GradScaler('cuda'), or autocast=torch.bfloat16, which needs none",
            stacklevel=first_outside(),
        )


def check_grad_dtype(grad_dtype: torch.dtype | None) -> torch.dtype | None:
    """`grad_dtype`, if gradients can add up in it."""
    if grad_dtype is None or grad_dtype in GRAD_DTYPES:
        return grad_dtype
    raise ValueError(
        f"grad_dtype must be one of {', '.join(map(str, GRAD_DTYPES))}, or None for float32 sums that end in the "
        f"parameter's dtype, got {given(grad_dtype)}"
    )


# ---------------------------------------------------------------------------------------------------------------------
# Places and modules


def check_device(device: torch.device | str | None) -> torch.device | None:
    """`device`, if a tensor can be made there; None stays None."""
    if device is None:
        return None
    where = known_device(device)
    if where.type == "meta":
        raise ValueError("device='meta' holds no numbers: give the device to train on, or None for the parameters' own")
    try:
        torch.empty(0, device=where)
    except (RuntimeError, AssertionError) as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise ValueError(
            f"device={str(where)!r} cannot be used here ({reason}): give 'cpu', or None for the parameters' own"
        ) from None
    return where


def check_group(process_group: GroupChoice) -> GroupChoice:
    """`process_group`, if ranks can talk in it."""
    is_auto = isinstance(process_group, str) and process_group == AUTO
    if process_group is None or is_auto or isinstance(process_group, dist.ProcessGroup):
        return process_group
    outside: Any = dist.GroupMember.NON_GROUP_MEMBER
    raise ValueError(
        "process_group must be 'auto', None for this process alone, or a group of torch.distributed, as "
        "new_group(ranks) or device_mesh.get_group() returns it, got "
        + ("what new_group gives ranks outside of it" if process_group is outside else given(process_group))
    )


def check_frozen(frozen: Iterable[nn.Module]) -> list[nn.Module]:
    """The modules of `frozen`, which may be one alone."""
    many = isinstance(frozen, Iterable) and not isinstance(frozen, nn.Module | Tensor | str)
    modules: list[Any] = list(frozen) if many else [frozen]
    for module in modules:
        if not isinstance(module, nn.Module):
            one = isinstance(module, nn.Parameter)
            advice = (
                "the modules that hold them, or parameter.requires_grad_(False)" if one else "[module], or [] for none"
            )
            raise ValueError(f"frozen must be a sequence of modules, got {given(module)}: give {advice}")
    return modules


def check_flag(value: bool, name: str) -> bool:
    """`value`, if it is True or False."""
    if not isinstance(value, bool):
        raise ValueError(f"{name} must be True or False, got {given(value)}")
    return value


# ---------------------------------------------------------------------------------------------------------------------
# Sizes


def check_optimizer(optimizer: Optimizer | Iterable[Optimizer] | None) -> list[Optimizer]:
    """The optimizers whose state a plan counts, one or several; none for None."""
    if optimizer is None:
        return []
    several = isinstance(optimizer, Sequence | Set | ValuesView | Iterator) and not isinstance(optimizer, str)
    optimizers: list[Any] = list(optimizer) if several else [optimizer]  # type: ignore[arg-type]  # seen above
    for each in optimizers:
        if not isinstance(each, Optimizer):
            is_class = isinstance(each, type) and issubclass(each, Optimizer)
            advice = ": give list(optimizers.values())" if isinstance(each, Mapping) else ""
            advice = f": give {each.__name__}(model.parameters(), ...)" if is_class else advice
            raise ValueError(
                f"optimizer must be a torch optimizer, several, or None for AdamW's state, got {given(each)}{advice}"
            )
    if not optimizers:
        raise ValueError("optimizer holds no optimizer: give those that step, or None, which plans for AdamW's state")
    return optimizers


def limit_of(micro_batch_size: int | Literal["auto"] | None, max_memory: int | str | None) -> SizeLimit:
    """The limit that `micro_batch_size` asks for. ValueError for what is no size, or a budget beside a given one."""
    if isinstance(micro_batch_size, str) and micro_batch_size == "auto":
        return AutoSize()
    if max_memory is not None:
        raise ValueError(
            f"max_memory={max_memory!r} goes with micro_batch_size='auto', got {micro_batch_size!r}; to enforce one "
            "run inside memory_limit(...)"
        )
    return SizeLimit(None if micro_batch_size is None else check_size(micro_batch_size, advice=", 'auto' or None"))
