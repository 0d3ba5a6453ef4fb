"""The moments of a batch whose micro-batches are single samples: what tells most about noise, at most work."""

import warnings
from collections.abc import Callable, Sequence
from contextlib import suppress
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call, grad, vmap

from macrobatch import structure
from macrobatch.accumulator import Accumulator
from macrobatch.batch import check_size
from macrobatch.containers import leaves, map_tensors
from macrobatch.distributed import AUTO, Ranks
from macrobatch.modules import ddp_modules, modules_of, trainable
from macrobatch.moments import GradientMoments
from macrobatch.structure import Nested
from macrobatch.substitution import Stage
from macrobatch.weighting import Loss

LossFn = Callable[[Any, Any], Any]
SLOW_OPERATION = "There is a performance drop because we have not yet implemented the batching rule"  # of torch.func's

Sums = tuple[Tensor, Tensor, list[Tensor]]  # |r_i|^2 and W_i of each sample, and the sum of r_i by parameter


def per_example_moments(
    model: nn.Module | Sequence[nn.Module], loss_fn: LossFn, batch: Nested, *, micro_batch_size: int = 8
) -> GradientMoments:
    """The moments of `batch` cut into single samples: K = N, n_j = 1; the model and `p.grad` are as before.

    `micro_batch_size` samples run at once, each with a gradient of its own (that many copies of the gradients), where
    torch.func can: `vmap(grad)`. Where it cannot (an `.item()` in the model, a buffer that changes, a DDP module), one
    sample at a time. `loss_fn`: any form without `count=`. Under a process group the sums are over all ranks.
    """
    modules = [*modules_of(model), *([loss_fn] if isinstance(loss_fn, nn.Module) else [])]
    check_size(micro_batch_size)
    stage, ranks = Stage(modules, loss_fn), Ranks.of(AUTO, ddp_modules(modules))
    own: Sums | None = None
    if not ddp_modules(modules):
        # Whatever is wrong beyond what torch.func cannot do is raised by the way that needs nothing special.
        with suppress(Exception), stage.copies(), warnings.catch_warnings():
            warnings.filterwarnings("ignore", message=SLOW_OPERATION, category=UserWarning)
            own = _vectorised(modules, model, loss_fn, batch, micro_batch_size)
    if ranks.all(own is not None) and own is not None:
        return _moments(*own, ranks)
    with stage.copies():
        return _one_at_a_time(model, loss_fn, batch)


class _NotVectorised(Exception):
    """The batch or the loss has a form that only one sample at a time takes."""


def _one_at_a_time(model: Any, loss_fn: LossFn, batch: Nested) -> GradientMoments:
    moments = Accumulator(model, loss_fn, micro_batch_size=1, measure="norms").run(batch).moments
    assert moments is not None
    return moments


class _Whole(nn.Module):
    """All modules as one, so that the parameters of all can be replaced at once."""

    def __init__(self, modules: Sequence[nn.Module], loss: Callable[[Nested], tuple[Tensor, Tensor]]) -> None:
        super().__init__()
        self.parts = nn.ModuleList(modules)
        self.loss = loss

    def forward(self, sample: Nested) -> tuple[Tensor, Tensor]:
        """The loss_sum and loss_weight of one sample."""
        return self.loss(sample)


def _vectorised(
    modules: Sequence[nn.Module], model: Any, loss_fn: LossFn, batch: Nested, micro_batch_size: int
) -> Sums:
    whole = _Whole(modules, lambda sample: _sum_and_weight(loss_fn(model, sample)))
    trained = {id(p) for p in trainable(modules)}
    parameters = {name: p.detach() for name, p in whole.named_parameters() if id(p) in trained}
    device = next(iter(parameters.values())).device
    batch = map_tensors(batch, lambda tensor: tensor.to(device))
    n = structure.num_samples(batch)
    template = structure.cut(batch, 0, 1)
    columns = _columns(batch, template, n)

    def loss(parameters: dict[str, Tensor], rows: list[Tensor]) -> tuple[Tensor, Tensor]:
        row = iter(rows)
        sample = map_tensors(template, lambda leaf: next(row).unsqueeze(0) if _has_row(leaf) else leaf)
        result: tuple[Tensor, Tensor] = functional_call(whole, parameters, (sample,))
        return result

    gradient = vmap(grad(loss, has_aux=True), in_dims=(None, 0), randomness="different")
    sums: list[Tensor] = []
    norms, weights = [], []
    for start in range(0, n, micro_batch_size):
        each, weight = gradient(parameters, [column[start : start + micro_batch_size] for column in columns])
        rows = [g.detach() if g.dtype == torch.float64 else g.detach().float() for g in each.values()]
        norms.append(torch.stack([g.reshape(len(g), -1).square().sum(1, dtype=torch.float64) for g in rows]).sum(0))
        weights.append(weight.detach().double())
        totals = [g.sum(0) for g in rows]
        sums = totals if not sums else list(torch._foreach_add(sums, totals))
    return torch.cat(norms), torch.cat(weights), sums


def _moments(norms: Tensor, weights: Tensor, sums: list[Tensor], ranks: Ranks) -> GradientMoments:
    """With r_i the gradient of sample i's loss_sum and W_i its loss_weight: g_i = r_i / W_i, w_i = W_i / sum W."""
    total = ranks.sum(weights.sum())
    has_terms = weights > 0
    w = (weights / total).where(has_terms, 0.0)
    q = (norms / weights.square()).where(has_terms, 0.0)
    count, mean, squared_weights = ranks.sum(torch.stack([has_terms.sum(), (w * q).sum(), w.square().sum()])).unbind()
    whole = [ranks.sum(each) for each in sums]
    squared = torch.stack([each.square().sum(dtype=torch.float64) for each in whole]).sum() / total.square()
    return GradientMoments(count, mean, squared, torch.ones_like(total), squared_weights, q)


def _sum_and_weight(output: Any) -> tuple[Tensor, Tensor]:
    """The loss of one sample, in the forms that need no count beforehand, as two tensors of shape ()."""
    if isinstance(output, Loss):
        output = (output.sum, output.weight)
    loss, weight = output if isinstance(output, tuple) and len(output) == 2 else (output, 1)
    if not isinstance(loss, Tensor) or loss.ndim or weight is None:
        raise _NotVectorised
    return loss, torch.as_tensor(weight, dtype=torch.float64, device=loss.device)


def _has_row(leaf: Tensor) -> bool:
    return leaf.ndim > 0


def _columns(batch: Nested, template: Nested, n: int) -> list[Tensor]:
    """The tensors of `batch` with a batch dimension, where all else in it is shared by all samples."""
    whole, one = ([leaf for _, leaf in leaves(each)] for each in (batch, template))
    if len(whole) != len(one):
        raise _NotVectorised  # a list of samples
    pairs = [(a, b) for a, b in zip(whole, one, strict=True) if isinstance(a, Tensor) or a is not b]
    if any(not isinstance(a, Tensor) or (a.ndim and len(b) != 1) for a, b in pairs):
        raise _NotVectorised
    return [a for a, _ in pairs if a.ndim and len(a) == n]
