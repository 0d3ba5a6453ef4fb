"""Layers in which the samples of a micro-batch see each other: found by name, and what can be done about them."""

from collections.abc import Sequence
from dataclasses import dataclass

from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.instancenorm import _InstanceNorm

CHOICES = """\
Choose how samples shall see each other:
    Accumulator(..., batch_norm="exact")          statistics and gradients of the whole effective batch, in more time
    Accumulator(..., batch_norm="pooled")         each micro-batch by itself; running statistics of the whole window
    Accumulator(..., batch_norm="micro_batch")    each micro-batch by itself, on purpose: its size is part of the model
    macrobatch.batchnorm.convert(model, "group")  layers that do not couple: "group", "layer", "rms", or "frozen"\
"""

GATHERED_CHOICES = """\
The loss sees the outputs of all samples, these layers one micro-batch at a time. Choose how they shall see each other:
    macrobatch.batchnorm.convert(model, "group")        layers that do not couple: "group", "layer", "rms", or "frozen"
    GatheredAccumulator(..., batch_norm="micro_batch")  each micro-batch by itself, on purpose\
"""


@dataclass(frozen=True)
class CoupledLayer:
    """A layer whose result for a sample, or whose running statistics, depend on the other samples of its input."""

    name: str
    layer: nn.Module
    effect: str

    def __str__(self) -> str:
        return f"{self.name!r} ({type(self.layer).__name__}) {self.effect}"


def coupled_layers(modules: nn.Module | Sequence[nn.Module]) -> list[CoupledLayer]:
    """The layers of `modules` that couple samples in their present mode, with their qualified names, each once.

    BatchNorm and SyncBatchNorm in train mode, or without running statistics in either mode; InstanceNorm in train mode
    that tracks statistics. What functions do (F.batch_norm in a forward, a softmax over the batch) shows in no layer.
    """
    found: dict[int, CoupledLayer] = {}
    for module in [modules] if isinstance(modules, nn.Module) else modules:
        for name, layer in module.named_modules():
            effect = _effect(layer)
            if effect and id(layer) not in found:
                found[id(layer)] = CoupledLayer(name, layer, effect)
    return list(found.values())


def _effect(layer: nn.Module) -> str | None:
    if isinstance(layer, _BatchNorm):
        if layer.training:
            return "in train mode normalises over the micro-batch"
        if layer.running_mean is None:
            return "without running statistics normalises over the micro-batch, in eval mode, too"
    if isinstance(layer, _InstanceNorm) and layer.training and layer.track_running_stats:
        return "in train mode tracks the statistics of each micro-batch"
    return None


def coupling_message(layers: Sequence[CoupledLayer], choices: str = CHOICES) -> str:
    """What plain accumulation does to a model with these layers, and the choices."""
    others = f", and {len(layers) - 1} more" if len(layers) > 1 else ""
    return (
        f"the model couples samples: {layers[0]}{others}. Accumulated micro-batch by micro-batch, gradients and "
        f"running statistics are not those of the effective batch. {choices}"
    )
