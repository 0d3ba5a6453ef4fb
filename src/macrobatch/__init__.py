"""Any effective batch size on any memory budget, with the gradient of the full batch."""

from macrobatch import batchnorm
from macrobatch.accumulator import Accumulator
from macrobatch.adascale import AdaScale
from macrobatch.batch import Window, collate_windows
from macrobatch.batch_tradeoff import FastestBatch, Tradeoff, gain
from macrobatch.contrastive import GatheredAccumulator
from macrobatch.criteria import sum_loss
from macrobatch.epoch import train_epoch
from macrobatch.grouping import windows
from macrobatch.invariant_adam import InvariantAdamW
from macrobatch.loops import accumulate
from macrobatch.memory import MemoryMeter, memory_limit, parse_bytes, peak_memory
from macrobatch.moments import GradientMoments
from macrobatch.noise import GradientNoiseScale, NoiseEstimate
from macrobatch.outliers import spike_score
from macrobatch.per_example import per_example_moments
from macrobatch.planning import Plan, plan
from macrobatch.report import Report
from macrobatch.row_blocks import RowBlocks
from macrobatch.sam import SAM
from macrobatch.scaling_rules import Scaling, ScalingWarning, scale_clip, scale_ema, scale_hyperparameters
from macrobatch.schedule import BatchSchedule
from macrobatch.sharpness import Sharpness, Trace, hessian_trace, sam_sharpness, sharpness, stability_threshold
from macrobatch.spike_values import SpikeError, SpikeVerdict
from macrobatch.spikes import SpikeGuard
from macrobatch.update import Update, apply_update
from macrobatch.warmup import warmup
from macrobatch.weighting import Loss, valid_tokens

__version__ = "0.1.0"

__all__ = [
    "SAM",
    "Accumulator",
    "AdaScale",
    "BatchSchedule",
    "FastestBatch",
    "GatheredAccumulator",
    "GradientMoments",
    "GradientNoiseScale",
    "InvariantAdamW",
    "Loss",
    "MemoryMeter",
    "NoiseEstimate",
    "Plan",
    "Report",
    "RowBlocks",
    "Scaling",
    "ScalingWarning",
    "Sharpness",
    "SpikeError",
    "SpikeGuard",
    "SpikeVerdict",
    "Trace",
    "Tradeoff",
    "Update",
    "Window",
    "accumulate",
    "apply_update",
    "batchnorm",
    "collate_windows",
    "gain",
    "hessian_trace",
    "memory_limit",
    "parse_bytes",
    "peak_memory",
    "per_example_moments",
    "plan",
    "sam_sharpness",
    "scale_clip",
    "scale_ema",
    "scale_hyperparameters",
    "sharpness",
    "spike_score",
    "stability_threshold",
    "sum_loss",
    "train_epoch",
    "valid_tokens",
    "warmup",
    "windows",
]
