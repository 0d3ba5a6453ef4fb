"""Running statistics of the whole window, where each micro-batch is normalised by itself: gathered, then updated once.

With c_j elements per channel, mean mu_j and summed squared deviations M_j in micro-batch j (law of total variance):

    n = sum c_j     mu = sum c_j mu_j / n     var = (sum M_j + sum c_j (mu_j - mu)^2) / (n - 1)
    running <- (1 - m) running + m (mu, var)
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.modules.batchnorm import _BatchNorm
from torch.overrides import TorchFunctionMode

from macrobatch.distributed import AUTO, GroupChoice, Ranks
from macrobatch.joint_norm import Moments, exact_dtype, merged_over_ranks, update_running
from macrobatch.modules import modules_of, submodules
from macrobatch.norm_calls import BatchNormCall, norm_call

SUMS = ("pooled_count", "pooled_mean", "pooled_deviations")  # buffers of a layer while its moments are gathered


@contextmanager
def pooled(model: nn.Module | Sequence[nn.Module], *, process_group: GroupChoice = AUTO) -> Iterator[None]:
    """After the context the running statistics have made one step, with the moments of all that ran in it.

    Inside, each forward is normalised by its own batch, as ever. All calls of a layer make one step together. If the
    context ends in an error, running statistics are as before. `process_group`: the ranks whose moments are pooled;
    "auto" is all processes, None this one alone. ValueError for functional batch_norm that updates tensors which are
    no layer's, and for a SyncBatchNorm on several ranks.
    """
    layers = [m for m in submodules(modules_of(model)) if isinstance(m, _BatchNorm) and m.running_mean is not None]
    ranks = Ranks.of(process_group)
    _refuse_sync(layers)
    statistics = [b for m in layers for b in (m.running_mean, m.running_var, m.num_batches_tracked) if b is not None]
    before = [buffer.clone() for buffer in statistics]
    for layer in layers:
        for name, value in zip(SUMS, _nothing(layer), strict=True):
            layer.register_buffer(name, value, persistent=False)
    try:
        try:
            with torch.compiler.set_stance("force_eager"), _Gather(layers):
                yield
        finally:  # forwards have counted themselves, and a checkpoint's second ones have moved the statistics
            for buffer, value in zip(statistics, before, strict=True):
                buffer.copy_(value)
        for layer in layers:
            _update(layer, ranks)
    finally:
        for layer in layers:
            for name in SUMS:
                del layer._buffers[name]


def momentum_for(accumulation_steps: int, *, momentum: float = 0.1) -> float:
    """The momentum m' of which K updates, one for each micro-batch, weigh as much as one update with `momentum`.

    1 - (1 - m')^K = m, so m' = 1 - (1 - m)^(1/K). The between-micro-batch part of the variance stays left out, which
    `pooled` has. ValueError for a momentum outside of 0 to 1.

    >>> round(momentum_for(8, momentum=0.1), 4)
    0.0131
    """
    if accumulation_steps < 1:
        raise ValueError(f"accumulation_steps must be at least 1, got {accumulation_steps}")
    if not 0 <= momentum <= 1:
        raise ValueError(f"momentum must be between 0 and 1, got {momentum}")
    return float(1 - (1 - momentum) ** (1 / accumulation_steps))


class _Gather(TorchFunctionMode):
    """Within the context a batch_norm that would update a layer's running statistics adds to the layer's sums.

    Forwards that a checkpoint runs again in backward are not seen: torch switches function modes off around backward.
    """

    def __init__(self, layers: Sequence[_BatchNorm]) -> None:
        self._layers = {id(layer.running_mean): layer for layer in layers}

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Make the call; where it updates statistics, with fresh tensors in their place."""
        call = norm_call(func, args, kwargs or {})
        if not isinstance(call, BatchNormCall) or call.running_mean is None:
            return func(*args, **(kwargs or {}))
        layer = self._layers.get(id(call.running_mean))
        if layer is None:
            raise ValueError(
                f"{call.describe()} updates running statistics that are no layer's of the model: they cannot be "
                "pooled. Give pooled(...) every module, or keep the statistics in a BatchNorm layer"
            )
        mean, variance = torch.zeros_like(call.running_mean), torch.ones_like(call.running_mean)
        y = F.batch_norm(call.x, mean, variance, call.weight, call.bias, True, 1.0, call.eps)
        _add(layer, mean, variance, call.x.numel() // call.x.shape[1])
        return y


def _nothing(layer: _BatchNorm) -> tuple[Tensor, Tensor, Tensor]:
    assert layer.running_mean is not None
    device, dtype = layer.running_mean.device, exact_dtype(layer.running_mean.device)
    zeros = torch.zeros(layer.num_features, dtype=dtype, device=device)
    return zeros.new_zeros(()), zeros, zeros.clone()


def _add(layer: _BatchNorm, mean: Tensor, unbiased: Tensor, n: int) -> None:
    """Merge the moments of `n` elements per channel into the layer's sums (Chan's formula), in place."""
    count, total_mean, deviations = (getattr(layer, name) for name in SUMS)
    count.add_(n)
    share = n / count
    d = mean - total_mean
    total_mean.addcmul_(d, share)
    deviations.add_(unbiased, alpha=n - 1).addcmul_(d.square_(), (count - n) * share)


def _update(layer: _BatchNorm, ranks: Ranks) -> None:
    moments = merged_over_ranks(Moments(*(getattr(layer, name) for name in SUMS)), ranks)
    there = moments.count > 1  # a layer that was not called keeps what it has
    momentum: float | Tensor = layer.momentum or 0.0
    if layer.num_batches_tracked is not None:
        layer.num_batches_tracked.add_(there)
        if layer.momentum is None:
            momentum = 1 / layer.num_batches_tracked.double().clamp(min=1)
    kept = [(running, running.clone()) for running in (layer.running_mean, layer.running_var) if running is not None]
    update_running(layer.running_mean, layer.running_var, moments, momentum)
    for running, before in kept:
        running.copy_(running.where(there, before))


def _refuse_sync(layers: Sequence[_BatchNorm]) -> None:
    if Ranks.of(AUTO).size > 1 and any(isinstance(layer, nn.SyncBatchNorm) and layer.training for layer in layers):
        raise ValueError(
            "pooled(...) gathers the statistics of single forwards, and a SyncBatchNorm sums each over ranks: use "
            'Accumulator(..., batch_norm="exact"), or BatchNorm layers, whose statistics pooled sums over ranks itself'
        )
