"""Claims about spikes for test_distributed.py; imports nothing from pytest."""

import math
import tempfile
from pathlib import Path

import torch
import torch.distributed as dist
from spiking import Batch, Training, assert_same, windows
from torch.nn.parallel import DistributedDataParallel

import macrobatch as mb

BAD = 14  # the snapshot before it holds 10 updates


def shares(world: int, *, by: float, rank: int) -> list[Batch]:
    """This rank's samples of each window; only those of `rank` are bad, in window BAD."""
    mine = dist.get_rank()
    batches = windows(20, bad=[BAD] if mine == rank else [], by=by, n=12 * world)
    return [(x[12 * mine : 12 * mine + 12], y[12 * mine : 12 * mine + 12]) for x, y in batches]


def everyones(value: object, world: int) -> list[object]:
    gathered: list[object] = [None] * world
    dist.all_gather_object(gathered, value)
    return gathered


def wrapped(measure: str | None = None) -> Training:
    mine = Training(measure=measure)
    torch.manual_seed(dist.get_rank())  # each rank draws its own dropout
    ddp = DistributedDataParallel(mine.model, broadcast_buffers=False)
    mine.accumulator = mb.Accumulator(
        ddp, mine.accumulator.loss_fn, micro_batch_size=4, measure=measure, batch_norm="micro_batch"
    )
    return mine


def all_ranks_go_back_together_bit_for_bit(world: int) -> None:
    for by, kind, dropped in ((1000.0, "rolled_back", slice(10, 15)), (math.nan, "skipped", slice(14, 15))):
        batches = shares(world, by=by, rank=world - 1)
        mine, reference = wrapped(), wrapped()
        with tempfile.TemporaryDirectory() as folder:
            torch.manual_seed(dist.get_rank())
            mine.train(batches, mine.guard(folder=folder, lr_factor=1.0, warmup_updates=0))
            rank = dist.get_rank()
            assert [path.name for path in Path(folder).iterdir()] == [f"snapshot-{rank}.pt"]
        assert [(t, k) for t, k in enumerate(mine.kinds) if k != "accepted"] == [(BAD, kind)], mine.kinds
        assert len({str(kinds) for kinds in everyones(mine.kinds, world)}) == 1
        after = mine.state()
        torch.manual_seed(dist.get_rank())
        reference.train([*batches[: dropped.start], *batches[dropped.stop :]])
        assert_same(after, reference.state())


def the_micro_batch_is_named_with_its_rank(world: int) -> None:
    for by in (100.0, math.nan):
        mine = wrapped("norms")
        batches = shares(world, by=1.0, rank=0)
        if dist.get_rank() == world - 1:
            batches[BAD][1][8:] *= by  # the last of three micro-batches
        mine.train(batches, mine.guard(policy="skip"))
        verdict = mine.verdicts[BAD]
        assert (verdict.kind, verdict.rank, verdict.micro_batch) == ("skipped", world - 1, 2), verdict
