"""Any effective batch size on any memory budget, with the gradient of the full batch."""

from macrobatch.accumulator import Accumulator
from macrobatch.batch import Window, collate_windows
from macrobatch.criteria import sum_loss
from macrobatch.epoch import train_epoch
from macrobatch.grouping import windows
from macrobatch.loops import accumulate
from macrobatch.memory import MemoryMeter, memory_limit, parse_bytes, peak_memory
from macrobatch.planning import Plan, plan
from macrobatch.report import Report
from macrobatch.update import Update, apply_update
from macrobatch.weighting import Loss, valid_tokens

__version__ = "0.1.0"

__all__ = [
    "Accumulator",
    "Loss",
    "MemoryMeter",
    "Plan",
    "Report",
    "Update",
    "Window",
    "accumulate",
    "apply_update",
    "collate_windows",
    "memory_limit",
    "parse_bytes",
    "peak_memory",
    "plan",
    "sum_loss",
    "train_epoch",
    "valid_tokens",
    "windows",
]
