"""torch criteria in the exact form: a sum over terms and how many terms the criterion's own mean divides by."""

import copy
import functools
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from macrobatch.weighting import Count

_CLASS_LOSSES = (nn.CrossEntropyLoss, nn.NLLLoss)  # whose mean leaves out ignored targets and weighs by class


class SumLoss(nn.Module):
    """What `sum_loss` returns: `(outputs, targets) -> (loss_sum, loss_weight)`, and a loss_fn for (inputs, targets)."""

    def __init__(self, criterion: nn.Module, mean_to_check: nn.Module | None = None) -> None:
        super().__init__()
        self.criterion = criterion
        self._mean_to_check = (mean_to_check,)  # in a tuple: not a second registration of the same parameters

    def forward(self, outputs: Any, targets: Any, *others: Any) -> tuple[Tensor, Count]:
        """The sum over terms and their number; called as `(model, (inputs, targets))` it applies the model first."""
        if isinstance(outputs, nn.Module):
            inputs, targets = _pair(targets)
            outputs = outputs(inputs)
        if isinstance(self.criterion, _CLASS_LOSSES):
            return _class_sum(self.criterion, outputs, targets)
        if isinstance(self.criterion, nn.CTCLoss):
            return _ctc_sum(self.criterion, outputs, targets, *others)
        losses = self.criterion(outputs, targets, *others)
        terms = len(outputs) if getattr(self.criterion, "per_sample", False) else losses.numel()
        self._check_mean(losses, terms, (outputs, targets, *others))
        return losses.sum(), terms

    def _check_mean(self, losses: Tensor, terms: int, arguments: tuple[Any, ...]) -> None:
        """On the first call: that a criterion torch does not define means by its mean what is computed here."""
        (criterion,), self._mean_to_check = self._mean_to_check, (None,)
        if criterion is None or terms == 0:
            return
        with torch.no_grad():
            mean = criterion(*arguments)
        if not torch.allclose(losses.detach().sum() / terms, mean, rtol=1e-3, equal_nan=True):
            raise ValueError(
                f"the mean of {_name(criterion)} is not the mean of its losses under reduction='none', so its "
                "denominator is unknown: return (loss_sum, loss_weight) from a loss_fn of your own"
            )


def sum_loss(criterion: Any) -> SumLoss:
    """A torch criterion in the exact form: whatever its reduction, `loss_sum / loss_weight` is what its mean is.

    Knows class weights, `ignore_index` and label smoothing (the weight of cross-entropy is the sum of the class weights
    of its valid targets), `KLDivLoss(reduction="batchmean")` (samples), `CTCLoss` (samples, each over its length) and
    every criterion that can give its losses unreduced (their number). Takes a module or a function of
    torch.nn.functional, also in a `functools.partial`. The result is called as (outputs, targets), or as
    (model, (inputs, targets)): a loss_fn. ValueError where the denominator cannot be known.
    """
    module = criterion if isinstance(criterion, nn.Module) else _module_of(criterion)
    reduction = getattr(module, "reduction", None)
    if reduction not in ("mean", "sum", "none", "batchmean"):
        raise ValueError(
            f"sum_loss needs a torch criterion with a reduction, got {_name(criterion)}: write a loss_fn that returns "
            "(loss_sum, loss_weight) instead"
        )
    assert module is not None
    if isinstance(module, _CLASS_LOSSES) and type(module).forward in [kind.forward for kind in _CLASS_LOSSES]:
        return SumLoss(module)
    unreduced = copy.copy(module)  # shares parameters and buffers, not the reduction
    unreduced.__dict__.update(reduction="none", per_sample=reduction == "batchmean")
    is_torchs = type(module).__module__.startswith("torch.nn") or isinstance(module, _Functional)
    if isinstance(module, _CLASS_LOSSES) or (not is_torchs and reduction != "mean"):
        raise ValueError(
            f"{_name(criterion)} overrides a torch loss, or has no reduction='mean' to compare with, so its "
            "denominator is unknown: return (loss_sum, loss_weight) from a loss_fn of your own"
        )
    return SumLoss(unreduced, None if is_torchs else module)


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
    options = {}
    if isinstance(criterion, functools.partial) and not criterion.args:
        criterion, options = criterion.func, dict(criterion.keywords)
    if criterion is F.cross_entropy:
        return nn.CrossEntropyLoss(**options)
    if criterion is F.nll_loss:
        return nn.NLLLoss(**options)
    return _Functional(criterion, options) if getattr(F, _name(criterion), None) is criterion else None


def _name(criterion: Any) -> str:
    return getattr(criterion, "__name__", type(criterion).__name__)


def _pair(micro_batch: Any) -> tuple[Any, Any]:
    if isinstance(micro_batch, tuple | list) and len(micro_batch) == 2:
        return micro_batch[0], micro_batch[1]
    raise ValueError(
        f"sum_loss as a loss_fn takes (inputs, targets) micro-batches, got a {type(micro_batch).__name__}: write "
        "loss_fn(model, micro_batch) and call the criterion there with (outputs, targets)"
    )


def _class_sum(criterion: Any, outputs: Tensor, targets: Tensor) -> tuple[Tensor, Count]:
    """Cross-entropy and its divisor: the class weights of the valid targets, positions for probabilities."""
    options = {"weight": criterion.weight, "reduction": "sum"}
    if (
        targets.is_floating_point()
    ):  # class probabilities: torch divides by the number of positions, whatever the weights
        loss_sum = F.cross_entropy(outputs, targets, label_smoothing=criterion.label_smoothing, **options)
        return loss_sum, outputs.numel() // outputs.shape[1 if outputs.ndim > 1 else 0]
    options["ignore_index"] = criterion.ignore_index
    if isinstance(criterion, nn.CrossEntropyLoss):
        loss_sum = F.cross_entropy(outputs, targets, label_smoothing=criterion.label_smoothing, **options)
    else:
        loss_sum = F.nll_loss(outputs, targets, **options)
    valid = targets != criterion.ignore_index
    if criterion.weight is None:
        return loss_sum, valid.sum()
    return loss_sum, (criterion.weight[targets.where(valid, 0)] * valid).sum()


def _ctc_sum(
    criterion: Any, log_probs: Tensor, targets: Tensor, lengths: Tensor, target_lengths: Tensor
) -> tuple[Tensor, Count]:
    """Its mean divides each sample's loss by its target length (at least 1), then averages over samples."""
    losses = criterion(log_probs, targets, lengths, target_lengths)
    return (losses / torch.as_tensor(target_lengths, device=losses.device).clamp(min=1)).sum(), losses.numel()
