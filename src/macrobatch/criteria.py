"""torch criteria in the exact form: a sum over terms and how many terms the criterion's own mean divides by."""

import copy
import functools
import inspect
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from macrobatch.weighting import Count

# The mean of these leaves out ignored targets and divides by the class weights of the others. LinearCrossEntropyLoss,
# which owns the last layer, came with torch 2.13.
_CLASS_LOSSES = tuple(
    getattr(nn, name) for name in ("CrossEntropyLoss", "NLLLoss", "LinearCrossEntropyLoss") if hasattr(nn, name)
)
_MODULE_OF: dict[Any, type[nn.Module]] = {
    F.cross_entropy: nn.CrossEntropyLoss,
    F.nll_loss: nn.NLLLoss,
    F.ctc_loss: nn.CTCLoss,
}


REDUCTIONS = ("mean", "sum", "none", "batchmean")


class SumLoss(nn.Module):
    """What `sum_loss` returns: `(outputs, targets) -> (loss_sum, loss_weight)`, and a loss_fn for (inputs, targets)."""

    def __init__(self, criterion: nn.Module, mean_to_check: nn.Module | None = None) -> None:
        super().__init__()
        self.criterion = criterion  # of class losses with reduction="sum", of all others with reduction="none"
        self._mean_to_check = (mean_to_check,)  # in a tuple: not a second registration of the same parameters
        self._calls = 0

    def forward(self, outputs: Any, targets: Any, *others: Any) -> tuple[Tensor, Count]:
        """The sum over terms and their number; called as `(model, (inputs, targets))` it applies the model first."""
        if isinstance(outputs, nn.Module):
            inputs, targets = _pair(targets)
            outputs = outputs(inputs)
        self._check_outputs(outputs)
        losses = self.criterion(outputs, targets, *others)
        if isinstance(self.criterion, _CLASS_LOSSES):
            return losses, _class_weight(self.criterion, targets)
        if isinstance(self.criterion, nn.CTCLoss):
            return _ctc_sum(losses, *others)
        terms = len(outputs) if getattr(self.criterion, "per_sample", False) else losses.numel()
        self._check_mean(losses, terms, (outputs, targets, *others))
        return losses.sum(), terms

    def _check_outputs(self, outputs: Any) -> None:
        """ValueError where a criterion of torch's own, which takes tensors, is given what models return around them."""
        if isinstance(outputs, Tensor) or self._mean_to_check[0] is not None:
            return
        if isinstance(outputs, list | tuple) and outputs and all(isinstance(each, nn.Module) for each in outputs):
            raise ValueError(
                f"sum_loss as a loss_fn calls one model, got a {type(outputs).__name__} of {len(outputs)}: give the "
                "Accumulator the model itself, or write a loss_fn(models, micro_batch) that returns "
                "sum_loss(criterion)(outputs, targets)"
            )
        raise ValueError(
            f"{_name(self.criterion)} needs a tensor of outputs, got a {type(outputs).__name__}: write a "
            "loss_fn(model, micro_batch) that takes the tensor out of what the model returns (outputs.logits, say) and "
            "returns sum_loss(criterion)(tensor, targets), for Accumulator(model, loss_fn)"
        )

    def _check_mean(self, losses: Tensor, terms: int, arguments: tuple[Any, ...]) -> None:
        """That a criterion torch does not define means by its mean what is computed here.

        On calls 1, 2, 4, 8, ...: a mean that leaves out masked terms shows only where there are some, and reading the
        comparison costs a host sync.
        """
        criterion = self._mean_to_check[0]
        if criterion is None or terms == 0:
            return
        self._calls += 1
        if self._calls & (self._calls - 1):
            return
        with torch.no_grad():
            mean = criterion(*arguments).double()
        tolerance = 1e-3 + 4 * torch.finfo(losses.dtype).eps
        is_mean = torch.allclose(losses.detach().sum().double() / terms, mean, rtol=tolerance, equal_nan=True)
        if losses.ndim == 0 or not is_mean:
            raise ValueError(
                f"the mean of {_name(criterion)} is not the mean of its losses under reduction='none', so its "
                "denominator is unknown: return (loss_sum, loss_weight) from a loss_fn of your own"
            )


def sum_loss(criterion: Any) -> SumLoss:
    """A torch criterion in the exact form: whatever its reduction, `loss_sum / loss_weight` is what its mean is.

    Knows class weights, `ignore_index` and label smoothing (the weight of cross-entropy is the sum of the class weights
    of its valid targets), `KLDivLoss(reduction="batchmean")` (samples), `CTCLoss` (samples, each over its length) and
    every criterion that can give its losses unreduced (their number). Takes a module or a function of
    torch.nn.functional, also in a `functools.partial`; what is a SumLoss already is returned as it is. The result is
    called as (outputs, targets), or as (model, (inputs, targets)): a loss_fn. ValueError where the denominator cannot
    be known.
    """
    if isinstance(criterion, SumLoss):
        return criterion
    module = criterion if isinstance(criterion, nn.Module) else _module_of(criterion)
    reduction = getattr(module, "reduction", None)
    if module is None or reduction not in REDUCTIONS:
        raise ValueError(f"sum_loss needs a torch criterion with a reduction, {_instead(criterion, reduction)}")
    is_torchs = type(module).__module__.startswith("torch.nn") or isinstance(module, _Functional)
    is_class_loss = isinstance(module, _CLASS_LOSSES)
    if is_class_loss and type(module).forward in [kind.forward for kind in _CLASS_LOSSES]:
        return SumLoss(_reduced(module, "sum"))
    if is_class_loss or (not is_torchs and reduction != "mean"):
        raise ValueError(
            f"{_name(criterion)} overrides a torch loss, or has no reduction='mean' to compare with, so its "
            "denominator is unknown: return (loss_sum, loss_weight) from a loss_fn of your own"
        )
    return SumLoss(_reduced(module, "none", per_sample=reduction == "batchmean"), None if is_torchs else module)


def _reduced(module: nn.Module, reduction: str, per_sample: bool = False) -> nn.Module:
    """The same criterion with another reduction; parameters and buffers are shared."""
    clone = copy.copy(module)
    clone.__dict__.update(reduction=reduction, per_sample=per_sample)
    return clone


class _Functional(nn.Module):
    """A function of torch.nn.functional as a criterion."""

    def __init__(self, function: Any, options: dict[str, Any]) -> None:
        super().__init__()
        self.function, self.options = function, options
        self.reduction = options.pop("reduction", "mean")

    def forward(self, *arguments: Any) -> Tensor:
        result: Tensor = self.function(*arguments, **self.options, reduction=self.reduction)
        return result


def _module_of(criterion: Any) -> nn.Module | None:
    """The module for a function of torch.nn.functional that has a reduction, else None."""
    options: dict[str, Any] = {}
    if isinstance(criterion, functools.partial) and not criterion.args:
        criterion, options = criterion.func, dict(criterion.keywords)
    is_torchs = inspect.isfunction(criterion) and getattr(F, criterion.__name__, None) is criterion
    if not is_torchs:
        return None
    if criterion in _MODULE_OF:
        return _MODULE_OF[criterion](**options)
    takes = inspect.signature(criterion).parameters
    # linear_cross_entropy takes the last layer's weight between outputs and targets: only its module is known here
    return _Functional(criterion, options) if "reduction" in takes and "linear_weight" not in takes else None


def _instead(criterion: Any, reduction: Any) -> str:
    """What was given in place of a criterion, and what to give."""
    name = _name(criterion)
    if isinstance(criterion, type):
        return f"got the class {name}: give one of it, {name}(...)"
    if isinstance(criterion, Tensor):
        return "got a tensor, which is a loss computed already: give the criterion itself"
    if isinstance(criterion, functools.partial) and criterion.args:
        return f"got a partial of {_name(criterion.func)} with arguments by position: give them by name"
    if reduction is not None:
        return f"got {name} with reduction={reduction!r}: give one of {', '.join(map(repr, REDUCTIONS))}"
    return (
        f"got {name}: write a loss_fn(model, micro_batch) that returns (loss_sum, loss_weight) instead, for "
        "Accumulator(model, loss_fn)"
    )


def _name(criterion: Any) -> str:
    return getattr(criterion, "__name__", type(criterion).__name__)


def _pair(micro_batch: Any) -> tuple[Any, Any]:
    if isinstance(micro_batch, tuple | list) and len(micro_batch) == 2:
        return micro_batch[0], micro_batch[1]
    is_sequence = isinstance(micro_batch, tuple | list)
    of = f" of {len(micro_batch)}" if is_sequence else f" of shape {tuple(getattr(micro_batch, 'shape', ()))}"
    raise ValueError(
        f"sum_loss as a loss_fn takes (inputs, targets) micro-batches, got a {type(micro_batch).__name__}"
        f"{of if is_sequence or isinstance(micro_batch, Tensor) else ''}: write a loss_fn(model, micro_batch) that "
        "returns sum_loss(criterion)(outputs, targets), for Accumulator(model, loss_fn)"
    )


def _class_weight(criterion: Any, targets: Tensor) -> Count:
    """The divisor of cross-entropy's mean: the class weights of the valid targets, positions for probabilities."""
    if (
        targets.is_floating_point()
    ):  # class probabilities, (C,) or (B, C, ...): divided by positions, whatever the weights
        return targets.numel() // targets.shape[1 if targets.ndim > 1 else 0]
    valid = targets != (-100 if criterion.ignore_index is None else criterion.ignore_index)
    if criterion.weight is None:
        return valid.sum()
    weight: Tensor = (criterion.weight[targets.where(valid, 0)] * valid).sum()
    return weight


def _ctc_sum(losses: Tensor, lengths: Any, target_lengths: Any) -> tuple[Tensor, Count]:
    """Its mean divides each sample's loss by its target length (at least 1), then averages over samples."""
    return (losses / torch.as_tensor(target_lengths, device=losses.device).clamp(min=1)).sum(), losses.numel()
