"""From gradients to parameters: agree on finiteness, clip, step, zero, in that order, once for each effective batch."""

import logging
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence, Set, ValuesView
from dataclasses import dataclass
from numbers import Real
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.amp.grad_scaler import GradScaler
from torch.nn.utils import clip_grads_with_norm_
from torch.optim import LBFGS, Optimizer
from torch.optim.lr_scheduler import LRScheduler

from macrobatch.callers import first_outside
from macrobatch.distributed import Ranks
from macrobatch.gradients import norm_of
from macrobatch.report import Report
from macrobatch.signatures import given

logger = logging.getLogger("macrobatch")
NO_TERMS = "the loss of its window had no terms to average over"
NAMED = 3  # parameters that a message names, of those that it is about


@dataclass(frozen=True)
class Update:
    """What became of the gradients. `grad_norm`: shape (), their 2-norm before clipping. `applied`: stepped."""

    grad_norm: Tensor
    applied: bool


def apply_update(
    optimizer: Optimizer | Sequence[Optimizer],
    report: Report | None = None,
    *,
    max_norm: float | None = None,
    nonfinite: Literal["skip", "ignore"] = "skip",
) -> Update:
    """The parameters have made one step along `p.grad`, or none, and all gradients are None.

    No step is made, on all ranks alike, where a gradient is not finite, or the loss had no terms (zero gradients would
    still move AdamW), or there is no gradient at all. `max_norm` clips the norm over all optimizers together. `report`
    brings the GradScaler to update and the ranks to agree with; without it nothing is communicated. Costs one host
    sync, none with `nonfinite="ignore"`, which steps whatever the gradients are. The scheduler is the caller's: step
    it if `applied`. ValueError if the optimizers hold nothing that the window has gradients for; UserWarning, once for
    each place in the code, if they lack some of it, and if there is no gradient at all where one was to be expected.
    A step that is not made is one line in the log `macrobatch`.
    """
    optimizers = _checked(optimizer)
    if report is not None and not isinstance(report, Report):
        raise ValueError(f"report must be what Accumulator.run returned, got {given(report)}{_report_of(report)}")
    _check_options(max_norm, nonfinite)
    if nonfinite == "ignore" and report is not None and report.scaler is not None:
        raise ValueError(
            "nonfinite='ignore' would step on the overflows that a GradScaler provokes: leave it at 'skip'"
        )
    owned = {id(p): p for each in optimizers for group in each.param_groups for p in group["params"]}
    parameters = list(owned.values())  # each once: optimizers may share some
    if report is not None:
        _check_held(owned, [p for p in report.parameters if p.grad is not None], report.modules)
    grad_norm = norm_of(p.grad for p in parameters)
    has_gradients = any(p.grad is not None for p in parameters)
    if not has_gradients:
        _warn_of_no_gradient(report)
    applied = (nonfinite == "ignore" or _may_step(grad_norm, report)) and has_gradients
    if applied:
        if max_norm is not None:
            _clip(parameters, max_norm, grad_norm)
        for each in optimizers:
            each.step()
    elif has_gradients:
        _log_skip(grad_norm, report)
    if report is not None and report.scaler is not None:
        _update_scaler(report.scaler)
    _drop_gradients([*parameters, *(report.parameters if report is not None else ())])
    return Update(grad_norm, applied)


def _check_held(
    owned: Mapping[int, nn.Parameter], trained: Sequence[nn.Parameter], modules: Sequence[nn.Module]
) -> None:
    """ValueError if the optimizers hold none of what the window trained, a warning if they lack some of it."""
    lost = [p for p in trained if id(p) not in owned]
    if not lost:
        return
    if len(lost) == len(trained):
        raise ValueError(
            f"the optimizer holds {len(owned)} parameters, none of the {len(trained)} that this window has "
            f"gradients for ({_named(lost, modules)}): it would change nothing. Give the optimizer of the "
            "accumulator's model"
        )
    warnings.warn(
        f"{len(lost)} of the {len(trained)} parameters that this window has gradients for are in no optimizer given "
        f"({_named(lost, modules)}): they stay as they are, and their gradients are dropped. "
        "Add them to an optimizer (a loss has parameters of its own), give all optimizers in one call, "
        "apply_update([first, second], report), or train without them: requires_grad_(False), or frozen= of the "
        "Accumulator",
        stacklevel=first_outside(),  # python shows it once for each line
    )


def _log_skip(grad_norm: Tensor, report: Report | None) -> None:
    """One line: why no step was made. Its host syncs are those of skipped updates alone."""
    if not bool(torch.isfinite(grad_norm)):
        why, level = f"the gradient norm is {float(grad_norm)}", logging.WARNING
        if report is not None and report.scaler is not None:
            why, level = f"{why}, the loss scale {report.scaler.get_scale():g} too large", logging.INFO  # its usual way
    elif report is None or bool(report.has_terms):
        why, level = "a gradient on another rank is not finite", logging.WARNING
    else:
        why, level = NO_TERMS, logging.INFO
    logger.log(level, "update skipped: %s", why)


def _warn_of_no_gradient(report: Report | None) -> None:
    """A warning where a gradient was to be expected: not after a window that had no terms."""
    if report is None:
        expected = "run a window before each update, with accumulator.run(batch), or in the loop of accumulate(...)"
    elif report.has_terms:
        expected = (
            "apply each report once, right after the run that returned it. An update before it, or zero_grad() in "
            "between, has dropped the gradients, and evaluate makes none"
        )
    else:
        logger.info("update skipped: %s", NO_TERMS)
        return
    warnings.warn(
        f"no parameter of the optimizer has a gradient, so no step is made: {expected}", stacklevel=first_outside()
    )


def _named(parameters: Sequence[nn.Parameter], modules: Sequence[nn.Module]) -> str:
    """The first few by the name that the modules know them by, and by shape."""
    names: dict[int, str] = {}
    for module in modules:
        for path, owner in module.named_modules():
            for name, p in owner.named_parameters(path, recurse=False):
                names.setdefault(id(p), f"{name!r} of {type(owner).__name__}, ")
    first = "; ".join(f"{names.get(id(p), '')}shape {tuple(p.shape)}" for p in parameters[:NAMED])
    return f"{first}; ..." if len(parameters) > NAMED else first


def _may_step(grad_norm: Tensor, report: Report | None) -> bool:
    may = torch.isfinite(grad_norm)
    if report is None:
        return bool(may)
    must_not = ~(may & report.has_terms.to(may.device))
    over_ranks = Ranks(report.process_group).maximum(must_not.int())
    return not bool(over_ranks)  # the one host sync


def _clip(parameters: Sequence[nn.Parameter], max_norm: float, grad_norm: Tensor) -> None:
    dense = [p for p in parameters if p.grad is not None and not p.grad.is_sparse]
    clip_grads_with_norm_(dense, max_norm, grad_norm)
    for p in parameters:
        if p.grad is not None and p.grad.is_sparse:
            p.grad.mul_((max_norm / (grad_norm + 1e-6)).clamp(max=1.0))  # as clip_grads_with_norm_ does


def _update_scaler(scaler: GradScaler) -> None:
    try:
        scaler.update()
    except AssertionError:  # a window without terms, or another report has updated it: no gradient was looked at since
        return


def _drop_gradients(parameters: Iterable[nn.Parameter]) -> None:
    for p in parameters:
        p.grad = None


def _checked(optimizer: Any) -> list[Optimizer]:
    if isinstance(optimizer, Optimizer):
        optimizers = [optimizer]
    else:  # several, and nothing that merely can be iterated: a loader would load all its data
        several = isinstance(optimizer, Sequence | Set | ValuesView | Iterator) and not isinstance(optimizer, str)
        optimizers = list(optimizer) if several else [optimizer]
    for each in optimizers:
        if not isinstance(each, Optimizer):
            raise ValueError(f"apply_update takes a torch optimizer, or several, got {given(each)}{_instead_of(each)}")
        if isinstance(each, LBFGS):
            raise ValueError(
                "LBFGS evaluates the loss several times for a step, so it needs a closure: "
                "optimizer.step(closure) with def closure(): optimizer.zero_grad(); return accumulator.run(batch).loss"
            )
    if not optimizers:
        raise ValueError("apply_update got no optimizer, but an empty sequence or an iterator that was used up")
    if len({id(each) for each in optimizers}) < len(optimizers):
        raise ValueError("apply_update got an optimizer twice, which would make two steps: give each once")
    return optimizers


def _instead_of(other: Any) -> str:
    if isinstance(other, LRScheduler):
        return ": a scheduler is stepped by you, after the update. Give scheduler.optimizer"
    if isinstance(other, Mapping):
        return ": give its values, list(optimizers.values())"
    if isinstance(other, type) and issubclass(other, Optimizer):
        return f": give {other.__name__}(model.parameters(), ...), made once before training"
    return ". The order is apply_update(optimizer, report)"


def _report_of(other: Any) -> str:
    is_run = callable(other) and getattr(other, "__name__", "") == "run"
    return ": give report=accumulator.run(batch)" if is_run or hasattr(other, "run") else ""


def _check_options(max_norm: float | None, nonfinite: str) -> None:
    check_max_norm(max_norm)
    if nonfinite not in ("skip", "ignore"):
        raise ValueError(f"nonfinite must be 'skip' or 'ignore', got {nonfinite!r}")


def check_max_norm(max_norm: float | None) -> None:
    """ValueError for what is no norm to clip to."""
    if max_norm is not None and (isinstance(max_norm, bool) or not isinstance(max_norm, Real) or not max_norm > 0):
        raise ValueError(
            f"max_norm must be positive, or None for no clipping, got {given(max_norm)}: give a number above 0"
        )
