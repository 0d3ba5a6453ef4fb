"""BatchNorm under accumulation: find it, convert it, freeze it, or pool its running statistics over the window.

Statistics and gradients of the whole window: `macrobatch.Accumulator(..., batch_norm="exact")`.
"""

from macrobatch.coupling import CoupledLayer, coupled_layers
from macrobatch.norm_conversion import ChannelLayerNorm, ChannelRMSNorm, FrozenBatchNorm, convert
from macrobatch.pooled_norm import momentum_for, pooled

__all__ = [
    "ChannelLayerNorm",
    "ChannelRMSNorm",
    "CoupledLayer",
    "FrozenBatchNorm",
    "convert",
    "coupled_layers",
    "momentum_for",
    "pooled",
]
