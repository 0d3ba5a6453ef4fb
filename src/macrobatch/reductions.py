"""What a loss is, as far as the last operations of its graph tell: a mean or a sum, and over how many terms.

A mean given as a sum over n terms makes the update n times too small, a sum given as a mean over n samples n times too
large, and a mean over fewer terms in one micro-batch than in another counts them unlike. None of this shows in
anything but a learning rate that seems wrong.
"""

import math
import warnings
from collections.abc import Iterator
from typing import Any, Literal

from torch import Tensor
from torch.autograd.graph import Node

from macrobatch.callers import first_outside
from macrobatch.weighting import LOSS, Count, Terms, known

Reduction = Literal["mean", "sum"]

_BARE = "the loss_fn returned a bare scalar, which counts as a mean over samples, but it is"
_INSTEAD = 'Return the sum over the terms beside their number (reduction="sum", or mean * n and n)'
_TRULY = "(if a mean over samples is meant all the same: return mean * num_samples, num_samples)"
_SAME_NUMBER = ("ToCopy", "Clone", "View", "UnsafeView", "ReshapeAlias", "Squeeze", "Unsqueeze", "Alias")
_OF_CRITERIA: dict[int | None, Reduction] = {1: "mean", 2: "sum"}  # what torch's criteria call `reduction`
_MOST_SUMMANDS = 100  # longer chains of additions are not followed


def warn_of_mixed_means(terms: Terms, num_samples: int, counts: dict[str, Count] | None = None) -> bool:
    """Whether there was a reason for a UserWarning: the loss of a micro-batch is almost surely not what it counts as.

    A warning and no error, because what was meant cannot be known for sure. `counts`: how many terms each sum has on
    average, where the loss_fn did not tell.
    """
    found = _of_bare_scalar(terms.sums[LOSS], num_samples) if terms.is_mean else _of_sums(terms, num_samples, counts)
    if found is not None:
        warnings.warn(found, stacklevel=first_outside())
    return found is not None


def refuse_ignored_labels(loss: Tensor, num_samples: int, known_counts: dict[int, set[int]]) -> None:
    """ValueError if `loss`, a bare scalar, is a cross-entropy over more labels of some samples than of others.

    Labels are seen wherever they were made; leaving out as many of each sample, as causal models do that shift them, is
    a mean over samples still. `known_counts`: for each cross-entropy in the loss, how many labels of a sample counted
    in the micro-batches before, to which those of this one are added.
    """
    for j, criterion in enumerate(_means_of_labels(loss)):
        labels = _saved(criterion, "target")
        if labels is None:
            continue
        ignored = int(criterion._saved_ignore_index)
        ignored -= 2**64 if ignored >= 2**63 else 0  # torch shows it without its sign
        counted = (labels != ignored).flatten()
        num_ignored = labels.numel() - int(counted.sum())
        is_even = labels.numel() % num_samples == 0
        counts = known_counts.setdefault(j, set())
        counts.update(counted.view(num_samples, -1).sum(1).tolist() if is_even else [])
        if num_ignored and not (is_even and len(counts) == 1):
            raise ValueError(
                f"{_BARE} a cross-entropy that leaves out {num_ignored} of {labels.numel()} labels, those that are "
                f"{ignored}, and not as many of each sample: accumulated, its gradient would be wrong. {_INSTEAD}, "
                f"n = macrobatch.valid_tokens(labels, ignore_index={ignored}), as "
                f"macrobatch.sum_loss(criterion)(outputs, targets) does {_TRULY}"
            )


def _of_bare_scalar(loss: Tensor, num_samples: int) -> str | None:
    if num_samples > 1 and reduction_of(loss) == "sum":
        return (
            f'{_BARE} the sum of a criterion with reduction="sum": with {num_samples} samples in a micro-batch its '
            f"gradient is that many times too large. Return (loss_sum, number of terms), as "
            f"macrobatch.sum_loss(criterion) does {_TRULY}"
        )
    for criterion in _means_of_labels(loss):
        weight = _saved(criterion, "weight")
        if weight is not None and bool((weight != weight[0]).any()):
            return (
                f"{_BARE} a cross-entropy with class weights, whose mean divides by the weights of the labels: "
                "accumulated, its gradient is wrong. Return macrobatch.sum_loss(criterion)(outputs, targets), which "
                f"gives the sum and those weights {_TRULY}"
            )
    operations = [operation for operation, _ in _last_operations(loss.grad_fn)]
    num_terms = _num_terms(operations[0]) if len(operations) == 1 else None  # one of several may concern no samples
    if num_terms is None or num_terms % num_samples == 0:
        return None
    return (
        f"{_BARE} a mean over {num_terms} terms of {num_samples} samples: not as many of each. Where another "
        f"micro-batch has another number, the gradient is wrong. {_INSTEAD} {_TRULY}"
    )


def _of_sums(terms: Terms, num_samples: int, counts: dict[str, Count] | None) -> str | None:
    for name, loss in terms.sums.items():
        given = terms.weight if counts is None else counts.get(name, counts.get(LOSS))
        if given is None:
            continue  # a sum without a count of its own, refused where it is divided
        number = known(given)
        number = num_samples if number is None else number  # what lives on the device is not read
        # As many means added up as there are terms, one for each sample, are a sum over them.
        num_means = sum(1 for _ in _last_operations(loss.grad_fn))
        if number > 1 and 2 * num_means <= number and reduction_of(loss) == "mean":
            return (
                f"the {name} is a mean, and stands for the sum over about {number:g} terms: its gradient is that many "
                f"times too small. {_INSTEAD}, or for a mean over samples the scalar alone; "
                "macrobatch.sum_loss(criterion) returns torch's criteria as sums"
            )
    return None


def _means_of_labels(loss: Tensor) -> Iterator[Any]:
    """The cross-entropies with reduction="mean" among the last operations of `loss`."""
    for operation, _ in _last_operations(loss.grad_fn):
        if operation is not None and operation.name().startswith("NllLoss") and _kind(operation) == "mean":
            yield operation


def _num_terms(operation: Node | None) -> int | None:
    """Over how many terms the operation averages; None if it does not, or does not tell."""
    if operation is None or _kind(operation) != "mean":
        return None
    if operation.name().startswith("NllLoss"):
        labels = _saved(operation, "target")
        return None if labels is None else labels.numel()
    outputs = _saved(operation, "self")
    return getattr(operation, "_saved_self_sym_numel", None) if outputs is None else outputs.numel()


def _saved(operation: Any, name: str) -> Tensor | None:
    """A tensor that an operation keeps for its backward; None if hooks keep it, who may have but one look at it."""
    kept = getattr(operation, f"_raw_saved_{name}", None)
    if kept is None or getattr(kept, "unpack_hook", kept) is not None:
        return None
    tensor = getattr(operation, f"_saved_{name}", None)
    return tensor if isinstance(tensor, Tensor) else None


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
    factors = [_saved(node, name) for name in ("other", "self")]
    numbers = [f for f in factors if f is not None and f.is_cpu and f.numel() == 1 and not f.requires_grad]
    if len(numbers) != 1:
        return math.nan
    number: Any = numbers[0].tolist()  # not item(): a dispatch mode sees that, and fails at a number of Python's
    return float(abs(number))
