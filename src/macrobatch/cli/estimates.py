"""Measured numbers with their standard errors: differences over the same held-out samples, and ratios."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

from macrobatch.cli.validation import Validation


@dataclass(frozen=True)
class Estimate:
    """A measured number and its standard error."""

    value: float
    standard_error: float


def paired_difference(one: Validation, other: Validation) -> Estimate:
    """Mean loss of `one` minus that of `other` over the same held-out samples, with its paired standard error."""
    differences = [a - b for a, b in zip(one.losses, other.losses, strict=True)]
    return Estimate(one.loss - other.loss, _error_of_mean(differences, one.weights))


def paired_metric(one: Validation, other: Validation, name: str) -> Estimate:
    """The same of a metric; without an error where its parts are not known."""
    parts = (one.parts_of_metrics.get(name, ()), other.parts_of_metrics.get(name, ()))
    differences = [a - b for a, b in zip(*parts, strict=True)]
    weights = one.weights if differences else ()
    return Estimate(one.metrics[name] - other.metrics[name], _error_of_mean(differences, weights))


def _error_of_mean(values: Sequence[float], weights: Sequence[float]) -> float:
    """The standard error of the weighted mean of independent values; NaN for fewer than two.

    sqrt(1/g sum_j w_j / (n - w_j) (v_j - mean)^2) for g values and n = sum_j w_j: its square has no bias where a value
    is the mean of w_j alike terms; for pseudo-values it is the jackknife's (Busing, Meijer and van der Leeden 1999).
    """
    counted = [(w, value) for w, value in zip(weights, values, strict=True) if w]
    if len(counted) < 2:
        return math.nan
    n = sum(w for w, _ in counted)
    mean = sum(w * value for w, value in counted) / n
    return math.sqrt(sum(w / (n - w) * (value - mean) ** 2 for w, value in counted) / len(counted))


def ratio_of(one: Estimate, other: Estimate) -> Estimate:
    """`one / other`, their errors taken as independent."""
    value = one.value / other.value if other.value else math.nan
    return Estimate(value, abs(value) * relative_error(one, other))


def relative_error(one: Estimate, other: Estimate) -> float:
    """The standard error of `one / other` over its value; NaN where either is zero."""
    if not one.value or not other.value:
        return math.nan
    return math.hypot(one.standard_error / one.value, other.standard_error / other.value)
