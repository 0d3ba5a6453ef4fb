"""What each process of test_alignment_distributed.py runs: each rank draws as its own samples in one piece would."""

import sys
from typing import Any

import ranks
import torch
import torch.distributed as dist
from gathered_ranks import encode, everything, inner, towers
from helpers import clear, gradients, reference
from ranks import close, share_of, sizes_for
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel as DDP

import macrobatch as mb

Batch = dict[str, Tensor]


def loss_fn(model: nn.Module, batch: Batch) -> tuple[Tensor, int]:
    left, right = encode(model, batch)["sides"]
    return ((left * right).square().sum(1) * inner(model).log_scale.exp()).sum(), len(left)


def in_one_piece(model: nn.Module, sizes: list[int]) -> list[Tensor | None]:
    """The mean over all ranks' samples, each rank's share in one forward from its own seed."""
    batch = everything(sum(sizes))

    def loss() -> Tensor:
        total = torch.zeros((), dtype=torch.float64)
        for rank in range(len(sizes)):
            torch.manual_seed(rank)
            start = sum(sizes[:rank])
            part = {key: value[start : start + sizes[rank]] for key, value in batch.items()}
            total = total + (loss_fn(model, part)[0] if sizes[rank] else 0)
        return total / sum(sizes)

    return reference(model, loss)


def run(model: nn.Module, sizes: list[int], **options: Any) -> None:
    run_again(mb.Accumulator(model, loss_fn, micro_batch_size=2, **options), sizes)


def run_again(accumulator: mb.Accumulator, sizes: list[int]) -> None:
    torch.manual_seed(dist.get_rank())
    mine = share_of(everything(sum(sizes)), sizes)
    accumulator.run(mb.Window([mine] if sizes[dist.get_rank()] else []))


def each_rank_draws_as_its_samples_in_one_piece(world: int) -> None:
    sizes, model = sizes_for(world), towers(dropout=0.4)
    expected = in_one_piece(model, sizes)
    run(model, sizes, rng="aligned")
    close(gradients(model), expected)


def under_ddp_it_is_the_same(world: int) -> None:
    sizes, model = sizes_for(world), towers(dropout=0.4)
    expected = in_one_piece(model, sizes)
    run(DDP(model), sizes, rng="aligned")
    close(gradients(model), expected)


def a_rank_without_samples_takes_part(world: int) -> None:
    """Under DDP looking at what a batch draws must not communicate: this rank does not look."""
    sizes = [5, 0, 3][:world]
    for has_ddp in (False, True):
        model = towers(dropout=0.4)
        expected = in_one_piece(model, sizes)
        run(DDP(model) if has_ddp else model, sizes, rng="aligned")
        close(gradients(model), expected)


def a_window_that_is_new_on_one_rank_only_is_looked_at_alone(world: int) -> None:
    """DDP broadcasts buffers in forwards: looking at what a batch draws must not run one, on fake tensors or real."""
    model = DDP(towers(dropout=0.4))
    assert model.broadcast_buffers
    assert list(model.buffers())
    accumulator = mb.Accumulator(model, loss_fn, micro_batch_size=2, rng="aligned")
    calls: list[int] = []
    model.register_forward_hook(lambda *_: calls.append(1))
    for sizes in ([4, 4, 4], [6, 4, 4], [6, 5, 4], [4, 5, 4]):
        expected = in_one_piece(model, sizes[:world])
        calls.clear()
        run_again(accumulator, sizes[:world])
        close(gradients(model), expected)
        assert len(calls) == -(-sizes[dist.get_rank()] // 2)
        clear(model)


def control_masks_of_their_own_differ_by_more_than_a_hundredth(world: int) -> None:
    sizes, model = sizes_for(world), towers(dropout=0.4)
    expected = in_one_piece(model, sizes)
    run(model, sizes)
    ranks.refused(AssertionError, "", lambda: close(gradients(model), expected))
    clear(model)


def claims() -> dict[str, Any]:
    """Every claim of this module."""
    own = {"world": int, "return": None}
    return {n: f for n, f in globals().items() if getattr(f, "__annotations__", {}) == own and f.__module__ == __name__}


if __name__ == "__main__":
    ranks.claims = claims
    ranks.main(int(sys.argv[1]), int(sys.argv[2]), sys.argv[3])
