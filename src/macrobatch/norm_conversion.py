"""BatchNorm layers replaced by others, with the weights that mean the same there."""

import copy
from typing import Literal

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.modules.batchnorm import _BatchNorm, _LazyNormBase

Target = Literal["group", "rms", "layer", "sync", "frozen"]
TARGETS = ("group", "rms", "layer", "sync", "frozen")


def convert(
    model: nn.Module,
    to: Target,
    *,
    in_place: bool = False,
    num_groups: int = 32,
    process_group: dist.ProcessGroup | None = None,
) -> nn.Module:
    """A copy of `model` (or with `in_place` the model itself) in which every BatchNorm is another layer.

    `to="group"`: GroupNorm with the most groups up to `num_groups` that divide the channels and hold at least 2 of
    them (8 for BatchNorm1d, whose input may have nothing but channels). "layer", "rms": over the channels at each
    position. "sync": SyncBatchNorm over `process_group`. "frozen": running statistics and weights as constants, in
    train mode, too. Weight and bias are carried over; running statistics only to "sync" and "frozen", so the others
    need training or fine-tuning. A layer that is used twice stays one. A model that is itself a BatchNorm is returned
    converted. ValueError for a layer that does not know its channels, has no statistics to freeze, or would be 0.
    """
    if to not in TARGETS:
        raise ValueError(f"to must be one of {', '.join(map(repr, TARGETS))}, got {to!r}")
    if num_groups < 1:
        raise ValueError(f"num_groups must be at least 1, got {num_groups}")
    for name, layer in model.named_modules():
        if isinstance(layer, _BatchNorm):
            _check(layer, name, to)
    model = model if in_place else copy.deepcopy(model)
    made: dict[int, nn.Module] = {}
    for layer in model.modules():
        if isinstance(layer, _BatchNorm):
            made[id(layer)] = _converted(layer, to, num_groups, process_group)
    for module in list(model.modules()):
        for name, child in module._modules.items():
            if child is not None and id(child) in made:
                module._modules[name] = made[id(child)]
    return made.get(id(model), model)


def _check(layer: _BatchNorm, name: str, to: Target) -> None:
    what = f"{name!r} ({type(layer).__name__})"
    if isinstance(layer, _LazyNormBase):
        raise ValueError(f"{what} does not know its channels yet: run the model once first")
    if to == "frozen" and layer.running_mean is None:
        raise ValueError(f"{what} has no running statistics that could be frozen")
    if layer.num_features == 1 and (to == "layer" or (to == "group" and isinstance(layer, nn.BatchNorm1d))):
        raise ValueError(
            f"{what} has a single channel: normalised by itself it would be constant. "
            'Take to="rms", "sync" or "frozen" for this model, or replace the layer by hand'
        )


def _converted(layer: _BatchNorm, to: Target, num_groups: int, process_group: dist.ProcessGroup | None) -> nn.Module:
    if to == "sync":
        return nn.SyncBatchNorm.convert_sync_batchnorm(layer, process_group)  # type: ignore[no-any-return]
    if to == "frozen":
        new: nn.Module = _frozen(layer)
    else:
        new = _new_layer(layer, to, num_groups)
        if layer.affine:  # the very parameters of the old layer: an optimizer that has them keeps them
            new.weight, new.bias = layer.weight, layer.bias
    new.train(layer.training)
    return new


def _new_layer(layer: _BatchNorm, to: Target, num_groups: int) -> nn.Module:
    channels = layer.num_features
    if to == "layer":
        return ChannelLayerNorm(channels, eps=layer.eps, affine=layer.affine)
    if to == "rms":
        return ChannelRMSNorm(channels, eps=layer.eps, affine=layer.affine)
    least = min(8 if isinstance(layer, nn.BatchNorm1d) else 2, channels)  # so many in a group: one alone may be all 0
    groups = max(g for g in range(1, num_groups + 1) if channels % g == 0 and channels // g >= least)
    return nn.GroupNorm(groups, channels, eps=layer.eps, affine=layer.affine)


def _frozen(layer: _BatchNorm) -> "FrozenBatchNorm":
    assert layer.running_mean is not None
    assert layer.running_var is not None
    new = FrozenBatchNorm(layer.num_features, eps=layer.eps)
    new.running_mean, new.running_var = layer.running_mean, layer.running_var
    new.weight = torch.ones_like(layer.running_var) if layer.weight is None else layer.weight.detach()
    new.bias = torch.zeros_like(layer.running_mean) if layer.bias is None else layer.bias.detach()
    return new


class FrozenBatchNorm(nn.Module):
    """Batch normalisation with constants: y = weight (x - running_mean) / sqrt(running_var + eps) + bias.

    The constants are buffers, with the names that they have in a BatchNorm. x: (N, C, ...).
    """

    running_mean: Tensor
    running_var: Tensor
    weight: Tensor
    bias: Tensor

    def __init__(self, num_features: int, *, eps: float = 1e-5) -> None:
        super().__init__()
        self.num_features, self.eps = num_features, eps
        for name in ("running_mean", "bias"):
            self.register_buffer(name, torch.zeros(num_features))
        for name in ("running_var", "weight"):
            self.register_buffer(name, torch.ones(num_features))

    def forward(self, x: Tensor) -> Tensor:
        """x: (N, C, ...), of any number of dimensions."""
        return F.batch_norm(x, self.running_mean, self.running_var, self.weight, self.bias, False, 0.0, self.eps)

    def extra_repr(self) -> str:
        """What print(model) shows."""
        return f"{self.num_features}, eps={self.eps}"


class _ChannelNorm(nn.Module):
    def __init__(self, num_channels: int, *, eps: float = 1e-5, affine: bool = True) -> None:
        super().__init__()
        self.num_channels, self.eps = num_channels, eps
        self.weight = nn.Parameter(torch.ones(num_channels)) if affine else None
        self.bias = nn.Parameter(torch.zeros(num_channels)) if affine else None

    def extra_repr(self) -> str:
        """What print(model) shows."""
        return f"{self.num_channels}, eps={self.eps}, affine={self.weight is not None}"

    def _scaled(self, x: Tensor) -> Tensor:
        shape = (1, -1, *[1] * (x.ndim - 2))
        if self.weight is not None:
            x = x * self.weight.view(shape)
        return x if self.bias is None else x + self.bias.view(shape)


class ChannelLayerNorm(_ChannelNorm):
    """Over the channels at each position: y = weight (x - mean_c x) / sqrt(var_c x + eps) + bias. x: (N, C, ...)."""

    def forward(self, x: Tensor) -> Tensor:
        """x: (N, C, ...), of any number of dimensions."""
        variance, mean = torch.var_mean(x, 1, correction=0, keepdim=True)
        return self._scaled((x - mean) * (variance + self.eps).rsqrt())


class ChannelRMSNorm(_ChannelNorm):
    """Over the channels at each position: y = weight x / sqrt(mean_c x^2 + eps) + bias. x: (N, C, ...)."""

    def forward(self, x: Tensor) -> Tensor:
        """x: (N, C, ...), of any number of dimensions."""
        return self._scaled(x * (x.square().mean(1, keepdim=True) + self.eps).rsqrt())
