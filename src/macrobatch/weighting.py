"""What a loss averages over: a loss is a sum over terms with a count, and is divided once, by the count of all.

The mean over the effective batch is (sum of all micro-batches' loss_sum) / (sum of all their loss_weight). The mean of
micro-batch means is another number wherever the counts differ: token means, class weights, a short last micro-batch.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from numbers import Real
from typing import Any, NamedTuple

import torch
from torch import Tensor

from macrobatch.containers import leaves
from macrobatch.structure import Nested

LOSS = "loss"  # the name of a sum or a denominator that was given none
Count = float | Tensor  # of loss terms: a number, or a tensor of shape () that may live on the device

FORMS = (
    "A loss_fn returns (loss_sum, loss_weight), or a scalar tensor (the mean over the micro-batch's samples), or "
    "{name: loss_sum} together with Accumulator(..., count=), or macrobatch.Loss(sum, weight, metrics)."
)


@dataclass(frozen=True)
class Loss:
    """A micro-batch's loss as a sum over its terms, how many they are, and sums of whatever else should be reported.

    `sum`: shape (). `weight`: how many terms (samples, valid tokens, sum of class weights), or None where `count=`
    tells. `metrics`: name to a sum over the same terms (number or shape ()), divided by the same total in the Report.
    """

    sum: Tensor | Mapping[str, Tensor]
    weight: Count | None = None
    metrics: Mapping[str, Count] = field(default_factory=dict)


class Terms(NamedTuple):  # one for each micro-batch: a tuple is made in a fifth of the time of a frozen dataclass
    """A loss in normal form: `sums[name] * multiplier` sums `weight` terms; a sum given as the number 0 is left out."""

    sums: dict[str, Tensor]
    multiplier: int
    weight: Count | None
    metrics: Mapping[str, Count]
    is_mean: bool = False
    is_empty: bool = False  # whether there is nothing to run backward on, as far as is known without a host sync


def terms_of(output: Any, num_samples: int, has_count: bool) -> Terms:
    """What a loss_fn returned, in normal form, checked. ValueError with the forms for anything else."""
    if type(output) is Tensor and not has_count and not output.ndim:  # the common case, for every micro-batch
        return Terms({LOSS: output}, num_samples, num_samples, {}, is_mean=True)
    loss = output if isinstance(output, Loss) else _as_loss(output, num_samples, has_count)
    named = isinstance(loss.sum, Mapping)
    given: Mapping[str, Any] = loss.sum if isinstance(loss.sum, Mapping) else {LOSS: loss.sum}
    is_mean = isinstance(output, Tensor) and not has_count
    sums = {name: _checked_sum(value, name) for name, value in given.items() if not _is_zero(value)}
    if has_count and loss.weight is not None:
        raise ValueError(f"the loss_fn gave a loss_weight and the Accumulator has count=: give one of them. {FORMS}")
    if not has_count and (named or loss.weight is None):
        raise ValueError(f"{{name: loss_sum}} needs Accumulator(..., count=), which tells each denominator. {FORMS}")
    weight = None if loss.weight is None else checked_count(loss.weight, "loss_weight")
    metrics = {name: _checked_metric(value, name) for name, value in loss.metrics.items()} if loss.metrics else {}
    is_empty = not sums or (weight is not None and known(weight) == 0)
    return Terms(sums, num_samples if is_mean else 1, weight, metrics, is_mean, is_empty)


def _as_loss(output: Any, num_samples: int, has_count: bool) -> Loss:
    if isinstance(output, Tensor):
        return Loss(output, None if has_count else num_samples)
    if isinstance(output, tuple) and len(output) == 2:
        return Loss(output[0], output[1])
    if isinstance(output, Mapping) and not hasattr(output, "loss"):
        return Loss(output)
    what = f"a tuple of {len(output)}" if isinstance(output, tuple) else f"a {type(output).__name__}"
    raise ValueError(f"the loss_fn returned {what}. {FORMS}")


def _is_zero(value: Any) -> bool:
    return (
        not isinstance(value, Tensor) and isinstance(value, Real) and value == 0
    )  # (0, 0): a micro-batch without terms


def _checked_sum(value: Any, name: str) -> Tensor:
    if not isinstance(value, Tensor):
        raise ValueError(f"the {name} is a {type(value).__name__}, not a tensor. {FORMS}")
    if value.ndim:
        raise ValueError(
            f"the {name} has shape {tuple(value.shape)}, not (): for losses per term return "
            "(losses.sum(), losses.numel())"
        )
    return value


def _checked_metric(value: Any, name: str) -> Count:
    if isinstance(value, Tensor):
        if value.numel() != 1:
            raise ValueError(f"the metric {name!r} has shape {tuple(value.shape)}, not (): sum it over the terms")
        return value.detach().reshape(())
    if not isinstance(value, Real):
        raise ValueError(f"the metric {name!r} is a {type(value).__name__}, not a number or a tensor of shape ()")
    return float(value)


def checked_count(weight: Any, name: str) -> Count:
    """`weight` as a number or a tensor of shape (). ValueError if negative or not finite, where that costs no sync."""
    if isinstance(weight, Tensor):
        if weight.numel() != 1 or weight.dtype == torch.bool:
            raise ValueError(
                f"{name} has shape {tuple(weight.shape)} and dtype {weight.dtype}: it is a number, so sum it over the "
                "micro-batch's terms, as in mask.sum()"
            )
        weight = weight.detach().reshape(())
    elif isinstance(weight, bool) or not isinstance(weight, Real):
        raise ValueError(f"{name} is a {type(weight).__name__}, not a number or a tensor of shape ()")
    value = known(weight)
    if value is not None and not (0 <= value < math.inf):
        raise ValueError(f"{name} is {value}: a count of terms must be finite and not negative")
    checked: Count = weight
    return checked


def known(weight: Count) -> float | None:
    """The value of a count where reading it costs no host sync, else None."""
    if type(weight) is float or type(weight) is int:
        return float(weight)
    if isinstance(weight, Tensor):
        return float(weight.item()) if weight.is_cpu else None
    return float(weight)


def refuse_bare_token_mean(micro_batch: Nested) -> None:
    """ValueError if `micro_batch` holds ignore labels: a bare scalar is then almost surely a mean over valid tokens."""
    for path, leaf in leaves(micro_batch, "batch"):
        label = ignore_label(leaf) if isinstance(leaf, Tensor) else None
        if label is None:
            continue
        count = f"macrobatch.valid_tokens({path}, ignore_index={label}"
        raise ValueError(
            f"the loss_fn returned a bare scalar, which counts as a mean over samples, but {path}, of shape "
            f"{tuple(leaf.shape)}, holds the ignore label {label}, so it is almost surely a mean over valid tokens: "
            f"accumulated, its gradient would be wrong. Return the exact form: for a sum over tokens\n"
            f"    return loss_sum, {count})\n"
            f"or, where the model gives the mean,\n"
            f"    n = {count}); return mean * n, n\n"
            f"or, where a causal LM shifts the labels inside, as those of transformers do for the .loss they return,\n"
            f"    n = {count}, shifted=True); return mean * n, n\n"
            f"(if it truly is a mean over samples: return mean * num_samples, num_samples)"
        )


def ignore_label(leaf: Tensor) -> int | None:
    """The label by which `leaf` ignores positions: its only negative value, as in -100 or -1; else None."""
    if leaf.dtype not in (torch.int64, torch.int32) or leaf.numel() == 0:
        return None
    negative = leaf[leaf < 0]
    if negative.numel() == 0 or bool((negative != negative[0]).any()):
        return None
    return int(negative[0])


def valid_tokens(labels: Tensor, ignore_index: int = -100, shifted: bool = False) -> Tensor:
    """How many labels are not `ignore_index`: shape (), on the device of `labels`, without a host sync.

    `labels`: (..., T). `shifted=True`: the loss compares position t with label t + 1, as causal language models of
    transformers do inside, so the first label of each sequence is never predicted and does not count.

    ValueError for what is no labels, but a mask: its own sum is the count.

    >>> valid_tokens(torch.tensor([[5, -100, 7], [5, 6, -100]]), shifted=True)
    tensor(2)
    """
    if labels.dtype == torch.bool or labels.is_floating_point():
        raise ValueError(
            f"valid_tokens counts the integer labels that are not {ignore_index}, got {labels.dtype}: of a mask take "
            "mask.sum(), of labels that are numbers (labels != ignored).sum()"
        )
    counted = labels[..., 1:] if shifted else labels
    return (counted != ignore_index).sum()
