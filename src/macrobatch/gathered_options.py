"""Checks what a gathered accumulator is given, before any window; the budget and the graphs to keep, as values."""

from typing import Literal

from macrobatch.budget import check_max_memory
from macrobatch.gathered_forward import Encode
from macrobatch.gathered_loss import GatheredLoss
from macrobatch.signatures import check_callable, takes
from macrobatch.sizing import SizeLimit


def check_functions(encode: Encode, loss_fn: GatheredLoss) -> None:
    """ValueError if `encode` or `loss_fn` cannot be called as they will be; it says what each was taken for."""
    whole = ". A model is handed to it: encode=lambda model, micro_batch: model(micro_batch)"
    check_callable(encode, "encode", ("model", "micro_batch"), whole if takes(encode, 1) else "")
    of_outputs = ". Write one that calls it with what it needs of outputs"
    in_blocks = ". A loss in blocks of rows is given as RowBlocks(block_loss, rows=...)"
    advice = in_blocks if takes(loss_fn, 4) else of_outputs
    check_callable(loss_fn, "loss_fn", ("model", "outputs", "window"), advice)


def check_batch_norm(batch_norm: Literal["micro_batch"] | None) -> None:
    """ValueError for what a window could only do if its micro-batches ran side by side."""
    if batch_norm not in (None, "micro_batch"):
        raise ValueError(
            f"batch_norm={batch_norm!r} is not for losses over all outputs: micro-batches run one by one, twice. "
            "Convert the layers (macrobatch.batchnorm.convert), freeze them, or give 'micro_batch'"
        )


def graph_limit(keep_graphs: int | Literal["auto"]) -> SizeLimit:
    """A limit that counts one more than the graphs: halved after a failure it ends at no graph, and grows again."""
    if keep_graphs == "auto":
        return SizeLimit(2)
    if isinstance(keep_graphs, bool) or not isinstance(keep_graphs, int) or keep_graphs < 0:
        raise ValueError(f"keep_graphs must be an integer of at least 0, or 'auto', got {keep_graphs!r}")
    return SizeLimit(keep_graphs + 1)


def check_budget(
    max_memory: int | str | None, keep_graphs: int | Literal["auto"], micro_batch_size: int | Literal["auto"] | None
) -> int | str | None:
    """`max_memory`, if it is one and something is left to be chosen by it."""
    budget = check_max_memory(max_memory)
    if max_memory is not None and "auto" not in (keep_graphs, micro_batch_size):
        raise ValueError(
            f"max_memory={max_memory!r} goes with keep_graphs='auto' or micro_batch_size='auto'; to enforce one "
            "run inside memory_limit(...)"
        )
    return budget
