"""Claims about BatchNorm for test_distributed.py: on every rank, checked against one process."""

import copy
import threading
from typing import Any

import torch
import torch.distributed as dist
from helpers import clear, difference, gradients, reference
from norm_models import Branches, Convolutional, Pair, Residual, Twice, batch_of, loss_sum
from ranks import close, refused, sizes_for
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.parallel import DistributedDataParallel as DDP

import macrobatch as mb


def seeded(make: Any, *arguments: Any) -> nn.Module:
    torch.manual_seed(0)
    return make(*arguments).double()


def everything(world: int, sample: tuple[int, ...]) -> Pair:
    torch.manual_seed(1)
    return batch_of(sum(sizes_for(world)), sample)


def share_of(batch: Pair, world: int) -> Pair:
    start, rank = sum(sizes_for(world)[: dist.get_rank()]), dist.get_rank()
    x, labels = batch
    stop = start + sizes_for(world)[rank]
    return x[start:stop], labels[start:stop]


def one_process(model: nn.Module, batch: Pair, loss: Any = loss_sum) -> tuple[nn.Module, list[Tensor | None]]:
    """A copy that saw all samples in one piece, with its gradients."""
    twin = as_batch_norm(copy.deepcopy(model))

    def mean() -> Tensor:
        total, weight = loss(twin, batch)
        return total / weight

    return twin, reference(twin, mean)


def same_buffers(mine: nn.Module, theirs: nn.Module) -> None:
    for (name, a), b in zip(mine.named_buffers(), theirs.buffers(), strict=True):
        error = float((a - b).abs().max())
        assert error <= 1e-12 * max(1.0, float(b.abs().max())), f"{name} differs by {error:.2e}"


def check_exact(world: int, model: nn.Module, sample: tuple[int, ...], wrap: Any = lambda model: model) -> None:
    batch = everything(world, sample)
    wrapped = wrap(model)
    accumulator = mb.Accumulator(wrapped, loss_sum, micro_batch_size=2, batch_norm="exact")
    for _ in range(2):
        twin, expected = one_process(model, batch)
        clear(model)
        report = accumulator.run(share_of(batch, world))
        close(gradients(model), expected)
        same_buffers(model, twin)
        assert report.num_samples == len(batch[1])


def as_batch_norm(model: nn.Module) -> nn.Module:
    """A SyncBatchNorm of one process is a BatchNorm, but refuses the CPU: its forward is replaced."""
    for layer in model.modules():
        if isinstance(layer, nn.SyncBatchNorm):
            layer.forward = lambda x, layer=layer: nn.modules.batchnorm._BatchNorm.forward(layer, x)
    return model


# ---------------------------------------------------------------------------------------------------------------------
# Claims


def exact_over_ranks_with_different_numbers_of_micro_batches(world: int) -> None:
    check_exact(world, seeded(Convolutional, 2), (3, 6, 6))
    check_exact(world, seeded(Residual), (3, 6, 6))
    check_exact(world, seeded(Twice), (7,))


def exact_over_ranks_with_ddp(world: int) -> None:
    check_exact(world, seeded(Convolutional, 2), (3, 6, 6), DDP)
    check_exact(world, seeded(Twice), (7,), lambda model: DDP(model, broadcast_buffers=False))


def exact_with_ways_side_by_side(world: int) -> None:
    check_exact(world, seeded(Branches), (7,))
    check_exact(world, seeded(Branches), (7,), lambda model: DDP(model, find_unused_parameters=True))


def exact_with_sync_batchnorm(world: int) -> None:
    model = nn.SyncBatchNorm.convert_sync_batchnorm(seeded(Convolutional, 2))
    before = [dict(vars(layer)) for layer in model.modules()]
    check_exact(world, model, (3, 6, 6))
    assert [dict(vars(layer)).keys() for layer in model.modules()] == [layer.keys() for layer in before]
    check_exact(world, nn.SyncBatchNorm.convert_sync_batchnorm(seeded(Twice)), (7,))


def a_sync_batchnorm_keeps_to_its_own_group(world: int) -> None:
    alone = [dist.new_group([rank]) for rank in range(world)]
    model = nn.SyncBatchNorm.convert_sync_batchnorm(seeded(Convolutional, 2), alone[dist.get_rank()])
    own = share_of(everything(world, (3, 6, 6)), world)
    twin = copy.deepcopy(seeded(Convolutional, 2))
    loss_sum(twin, own)
    mb.Accumulator(model, loss_sum, micro_batch_size=2, batch_norm="exact").run(own)
    same_buffers(model, twin)


def a_rank_without_terms_takes_part_in_the_statistics(world: int) -> None:
    def masked(model: nn.Module, batch: Pair) -> tuple[Tensor | int, Tensor | int]:
        x, labels = batch
        outputs = model(x)
        if bool((labels < 0).all()):
            return 0, 0
        return F.cross_entropy(outputs, labels, reduction="sum", ignore_index=-100), (labels >= 0).sum()

    model, batch = seeded(Convolutional, 2), everything(world, (3, 6, 6))
    batch[1][: sizes_for(world)[0]] = -100
    twin, expected = one_process(model, batch, masked)
    mb.Accumulator(model, masked, micro_batch_size=2, batch_norm="exact").run(share_of(batch, world))
    close(gradients(model), expected)
    same_buffers(model, twin)


def a_rank_without_samples_is_refused_everywhere(world: int) -> None:
    model, batch = seeded(Convolutional, 2), everything(world, (3, 6, 6))
    accumulator = mb.Accumulator(model, loss_sum, micro_batch_size=2, batch_norm="exact")
    mine = share_of(batch, world) if dist.get_rank() else mb.Window([])
    refused(ValueError, "some rank has no micro-batch", lambda: accumulator.run(mine))
    assert not any(thread.name == "macrobatch strand" for thread in threading.enumerate())


def exact_evaluation_over_ranks_in_train_mode(world: int) -> None:
    model, batch = seeded(Convolutional, 2), everything(world, (3, 6, 6))
    twin = copy.deepcopy(model)
    total, count = loss_sum(twin, batch)
    report = mb.Accumulator(model, loss_sum, micro_batch_size=2, batch_norm="exact").evaluate(share_of(batch, world))
    assert abs(float(report.loss) - float(total.detach()) / count) <= 1e-12
    same_buffers(model, twin)


def pooled_statistics_are_those_of_all_ranks(world: int) -> None:
    torch.manual_seed(2)
    model, x = nn.BatchNorm1d(4).double(), torch.randn(sum(sizes_for(world)), 4, dtype=torch.float64) * 3
    twin = copy.deepcopy(model)
    twin(x)
    mine = share_of((x, x), world)[0]
    with mb.batchnorm.pooled(model):
        for micro_batch in mine.split([len(mine) - 2, 2] if len(mine) > 3 else [len(mine)]):
            model(micro_batch)
    same_buffers(model, twin)


def pooling_sync_batchnorm_on_several_ranks_is_refused(world: int) -> None:
    with_sync = nn.Sequential(nn.SyncBatchNorm(4))
    refused(ValueError, "a SyncBatchNorm sums each over ranks", lambda: mb.batchnorm.pooled(with_sync).__enter__())


def control_plain_accumulation_is_wrong_by_more_than_a_tenth(world: int) -> None:
    model, batch = seeded(Convolutional, 2), everything(world, (3, 6, 6))
    _, expected = one_process(model, batch)
    mb.Accumulator(model, loss_sum, micro_batch_size=2, batch_norm="micro_batch").run(share_of(batch, world))
    error = difference(gradients(model), expected)
    assert error > 0.1, f"the control differs by {error:.2e} only"
