"""Whether a loss is a mean or a sum, as far as the last operation of its graph tells, and the two ways to mix them up.

A mean given as a sum over n terms makes the update n times too small; a sum given as a mean over n samples makes it n
times too large. Neither shows in anything but a learning rate that seems wrong.
"""

import math
from collections.abc import Iterator
from typing import Any, Literal

from torch import Tensor
from torch.autograd.graph import Node

from macrobatch.weighting import LOSS, Count, Terms, known

Reduction = Literal["mean", "sum"]

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
                'many times too small. Return the sum (reduction="sum", or mean * n) beside the number of terms n, '
                "or for a mean over samples the scalar alone; macrobatch.sum_loss(criterion) returns torch's criteria "
                "as sums"
            )


def reduction_of(loss: Tensor) -> Reduction | None:
    """What the last operation of the graph of `loss`, of shape (), made of its terms; None where that does not tell.

    A sum of means is a mean, and so is a part of one, as in 0.1 * mean. `x.sum()` may be anything, so only criteria
    with reduction="sum" are sums; `x.sum() / 2` may be half a sum as well as the mean of two terms.

    >>> import torch
    >>> reduction_of(torch.ones(3, requires_grad=True).mean())
    'mean'
    """
    kinds = set(_kinds(loss.grad_fn))
    return kinds.pop() if len(kinds) == 1 else None


def _kinds(root: Node | None) -> Iterator[Reduction | None]:
    """What each loss is whose sum is that of `root`."""
    waiting, seen = [(root, False)], 0  # and whether it is a part only: of a mean still a mean, of a sum no sum
    while waiting:
        (node, is_part), seen = waiting.pop(), seen + 1
        if node is None or seen > _MOST_SUMMANDS:
            yield None
            return
        operation = node.name().partition("Backward")[0]
        makes_smaller = _makes_smaller(node, operation)
        if operation == "Mean" and getattr(node, "_saved_self_sym_numel", 2) > 1:
            yield "mean"
        elif makes_smaller or operation in ("Add", "Sub", "Mean", *_SAME_NUMBER):
            children = [child for child, _ in node.next_functions if child is not None]  # others have no gradient
            waiting += [(child, is_part or makes_smaller) for child in children]
        else:
            kind = _OF_CRITERIA.get(getattr(node, "_saved_reduction", None))
            yield None if kind == "sum" and is_part else kind


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
    return abs(float(number))
