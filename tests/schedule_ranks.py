"""What each process of the distributed test of schedules runs: each rank draws its share, and all agree on the size."""

import sys
from collections.abc import Callable
from pathlib import Path

import torch
import torch.distributed as dist
from torch.utils.data import DataLoader, TensorDataset
from torch.utils.data.distributed import DistributedSampler

import macrobatch as mb

SAMPLES = 96


def sizes_over_ranks(batches: object, schedule: mb.BatchSchedule) -> list[int]:
    """Samples of each effective batch, which all but the last are as the schedule says."""
    sizes, meant = [], []
    for batch in batches:  # type: ignore[attr-defined]
        parts = list(batch) if isinstance(batch, mb.Window) else [batch]
        total = torch.tensor(sum(len(part[0]) for part in parts))
        dist.all_reduce(total)
        sizes.append(int(total))
        meant.append(schedule.batch_size)
        schedule.advance(int(total))
        if schedule._largest is not None:
            schedule.observe(schedule.samples / 3)
    assert sizes[:-1] == meant[:-1], (sizes, meant)
    assert SAMPLES - 1 <= sum(sizes) <= SAMPLES, sizes  # a last batch of one sample would leave a rank without any
    return sizes


def refused(call: Callable[[], object], message: str) -> None:
    try:
        call()
    except ValueError as error:
        if message in str(error):
            return
        raise
    raise AssertionError(f"accepted, instead of: {message}")


def main(rank: int, world: int, folder: Path) -> None:
    dist.init_process_group("gloo", init_method=f"file://{folder}/start", rank=rank, world_size=world)
    dataset = TensorDataset(torch.arange(SAMPLES))
    makers = (
        lambda: mb.BatchSchedule.steps({0: 5, 15: 9, 42: 24}),
        lambda: mb.BatchSchedule.doubling(5, largest=20),
    )
    for make in makers:
        sampler = DistributedSampler(dataset, num_replicas=world, rank=rank, shuffle=False)
        schedule = make()
        loader = DataLoader(dataset, batch_sampler=schedule.batch_sampler(sampler), num_workers=2)
        drawn = sizes_over_ranks(loader, schedule)
        assert len(set(drawn)) >= 2, drawn
        schedule = make()
        windows = mb.windows(DataLoader(dataset, sampler=sampler, batch_size=2), batch_size=schedule)
        assert len(set(sizes_over_ranks(windows, schedule))) >= 2
    too_small = mb.BatchSchedule.constant(world - 1)
    refused(lambda: next(iter(too_small.batch_sampler(range(8)))), "less than one sample for each of 2 ranks")
    endless = mb.BatchSchedule.constant(8).batch_sampler(number for number in range(8))
    refused(lambda: next(iter(endless)), "has no length, so 2 ranks cannot tell when to end together")
    dist.destroy_process_group()


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]), Path(sys.argv[3]))
