"""What a loss is, as far as the last operations of its graph tell: a mean or a sum, and over how many terms.

A mean given as a sum over n terms makes the update n times too small, a sum given as a mean over n samples n times too
large, and a mean over fewer terms in one micro-batch than in another counts them unlike. None of this shows in
anything but a learning rate that seems wrong.
"""

import math
from collections.abc import Iterator
from typing import Any, Literal

from torch import Tensor
from torch.autograd.graph import Node

from macrobatch.weighting import LOSS, Count, Terms, known

Reduction = Literal["mean", "sum"]

_BARE = "the loss_fn returned a bare scalar, which counts as a mean over samples, but it is"
_INSTEAD = 'Return the sum over the terms beside their number (reduction="sum", or mean * n and n)'
_TRULY = "(if a mean over samples is meant all the same: return mean * num_samples, num_samples)"
_SAME_NUMBER = ("ToCopy", "Clone", "View", "UnsafeView", "ReshapeAlias", "Squeeze", "Unsqueeze", "Alias")
_OF_CRITERIA: dict[int | None, Reduction] = {1: "mean", 2: "sum"}  # what torch's criteria call `reduction`
_MOST_SUMMANDS = 100  # longer chains of additions are not followed


def refuse_other_reduction(terms: Terms, num_samples: int, counts: dict[str, Count] | None = None) -> None:
    """ValueError if a mean was given where a sum is meant, or a sum where a mean is. `terms`: of one micro-batch.

    `counts`: how many terms each sum has on average, where the loss_fn did not tell. A count that lives on the device
    is not read: a micro-batch of several samples then has several terms.
    """
    if terms.is_mean:
        if num_samples > 1 and reduction_of(terms.sums[LOSS]) == "sum":
            raise ValueError(
                f"the loss_fn returned a bare scalar, which counts as a mean over the {num_samples} samples of the "
                'micro-batch, but it is the sum of a criterion with reduction="sum": its gradient would be that many '
                "times too large. Return (loss_sum, number of terms), as macrobatch.sum_loss(criterion) does (if it "
                "truly is a mean over samples: return mean * num_samples, num_samples)"
            )
        refuse_mean_over_some(terms.sums[LOSS], num_samples)
        return
    for name, loss in terms.sums.items():
        given = terms.weight if counts is None else counts.get(name, counts.get(LOSS))
        if given is None:
            continue  # a sum without a count of its own, refused where it is divided
        number = known(given)
        number = num_samples if number is None else number
        if number > 1 and reduction_of(loss) == "mean":
            raise ValueError(
                f"the {name} is a mean, and stands for the sum over about {number:g} terms: its gradient would be that "
                f"many times too small. {_INSTEAD}, or for a mean over samples the scalar alone; "
                "macrobatch.sum_loss(criterion) returns torch's criteria as sums"
            )


def refuse_mean_over_some(loss: Tensor, num_samples: int) -> None:
    """ValueError if `loss`, of shape (), is a mean over terms that are not the same number for each sample.

    Seen are class weights, ignored labels, and a number of terms that is no multiple of the samples.
    """
    operations = [operation for operation, _ in _last_operations(loss.grad_fn)]
    for operation in operations:
        if operation is not None and getattr(operation, "_saved_reduction", None) == 1:
            _refuse_weighted_labels(operation)
    num_terms = _num_terms(operations[0]) if len(operations) == 1 else None  # one of several may concern no samples
    if num_terms is not None and num_terms % num_samples:
        raise ValueError(
            f"{_BARE} a mean over {num_terms} terms of {num_samples} samples: not as many of each. Where other "
            f"micro-batches have other numbers, its gradient would be wrong. {_INSTEAD} {_TRULY}"
        )


def _refuse_weighted_labels(criterion: Any) -> None:
    """ValueError if the mean of a cross-entropy leaves out labels, or weighs them by class."""
    labels, weight = getattr(criterion, "_saved_target", None), getattr(criterion, "_saved_weight", None)
    total = getattr(criterion, "_saved_total_weight", None)
    if not isinstance(labels, Tensor) or not isinstance(total, Tensor) or labels.is_floating_point():
        return
    if weight is not None and bool((weight != weight[0]).any()):
        raise ValueError(
            f"{_BARE} a cross-entropy with class weights, whose mean divides by the weights of the labels: "
            "accumulated, its gradient would be wrong. Return macrobatch.sum_loss(criterion)(outputs, targets), which "
            f"gives the sum and those weights {_TRULY}"
        )
    ignored = int(getattr(criterion, "_saved_ignore_index", -100))
    ignored -= 2**64 if ignored >= 2**63 else 0  # torch shows it without its sign
    num_ignored = int((labels == ignored).sum())
    if num_ignored:
        raise ValueError(
            f"{_BARE} a cross-entropy that leaves out {num_ignored} of {labels.numel()} labels, those that are "
            f"{ignored}: a mean over the others, and accumulated, its gradient would be wrong. {_INSTEAD}, "
            f"n = macrobatch.valid_tokens(labels, ignore_index={ignored}), as macrobatch.sum_loss(criterion)(outputs, "
            f"targets) does {_TRULY}"
        )


def _num_terms(operation: Node | None) -> int | None:
    """Over how many terms the operation averages; None if it does not, or does not tell."""
    if operation is None or _kind(operation) != "mean":
        return None
    labels = getattr(operation, "_saved_target", None)
    if operation.name().startswith("NllLoss") and isinstance(labels, Tensor):
        return labels.numel()
    outputs = getattr(operation, "_saved_self", None)
    return outputs.numel() if isinstance(outputs, Tensor) else getattr(operation, "_saved_self_sym_numel", None)


def reduction_of(loss: Tensor) -> Reduction | None:
    """What the last operation of the graph of `loss`, of shape (), made of its terms; None where that does not tell.

    A sum of means is a mean, and so is a part of one, as in 0.1 * mean. `x.sum()` may be anything, so only criteria
    with reduction="sum" are sums; `x.sum() / 2` may be half a sum as well as the mean of two terms.

    >>> import torch
    >>> reduction_of(torch.ones(3, requires_grad=True).mean())
    'mean'
    """
    kinds = {
        None if is_part and _kind(operation) == "sum" else _kind(operation)
        for operation, is_part in _last_operations(loss.grad_fn)
    }
    return kinds.pop() if len(kinds) == 1 else None


def _last_operations(root: Node | None) -> Iterator[tuple[Node | None, bool]]:
    """The operations whose results are added up to that of `root`, and of which of them only a part is.

    None, at last, where the graph is not followed any further.
    """
    waiting, seen = [(root, False)], 0
    while waiting:
        (node, is_part), seen = waiting.pop(), seen + 1
        if node is None or seen > _MOST_SUMMANDS:
            yield None, is_part
            return
        operation = node.name().partition("Backward")[0]
        makes_smaller = _makes_smaller(node, operation)
        if makes_smaller or operation in ("Add", "Sub", *_SAME_NUMBER) or (operation == "Mean" and _is_of_one(node)):
            children = [child for child, _ in node.next_functions if child is not None]  # others have no gradient
            waiting += [(child, is_part or makes_smaller) for child in children]
        else:
            yield node, is_part


def _kind(operation: Node | None) -> Reduction | None:
    if operation is not None and operation.name().startswith("MeanBackward"):
        return "mean"
    return _OF_CRITERIA.get(getattr(operation, "_saved_reduction", None))


def _is_of_one(mean: Node) -> bool:
    return bool(getattr(mean, "_saved_self_sym_numel", 2) == 1)


def _makes_smaller(node: Node, operation: str) -> bool:
    """Whether the result is no larger than its one operand: no mean over n terms becomes their sum by it."""
    return (operation == "Mul" and _number_in(node) <= 1) or (operation == "Div" and _number_in(node) >= 1)


def _number_in(node: Node) -> float:
    """The size of the one number by which a loss is multiplied or divided; NaN if it is trained, or not on the CPU."""
    factors = [getattr(node, name, None) for name in ("_saved_other", "_saved_self")]
    numbers = [f for f in factors if isinstance(f, Tensor) and f.is_cpu and f.numel() == 1 and not f.requires_grad]
    if len(numbers) != 1:
        return math.nan
    number: Any = numbers[0].tolist()  # not item(): a dispatch mode sees that, and fails at a number of Python's
    return float(abs(number))
