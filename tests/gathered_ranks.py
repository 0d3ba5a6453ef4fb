"""What each process of test_contrastive_distributed.py runs: claims on every rank, checked against one process."""

import sys
from typing import Any

import ranks
import torch
import torch.distributed as dist
from helpers import clear, difference, gradients, reference
from ranks import close, refused, share_of, sizes_for
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.parallel import DistributedDataParallel as DDP
from torch.utils._python_dispatch import TorchDispatchMode

import macrobatch as mb
from macrobatch.gathered_backward import Backwards

Batch = dict[str, Tensor]


class Towers(nn.Module):
    """Two encoders, and a temperature; returns both sides, so that DDP can wrap it."""

    def __init__(self, dropout: float = 0.0) -> None:
        super().__init__()
        self.left, self.right = nn.Linear(5, 6), nn.Sequential(nn.Linear(5, 7), nn.Tanh(), nn.Linear(7, 6))
        self.dropout = nn.Dropout(dropout)
        self.log_scale = nn.Parameter(torch.tensor(1.0))
        self.register_buffer("seen", torch.zeros(()))

    def forward(self, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        self.seen.add_(len(x))
        return self.dropout(self.left(x)), self.dropout(self.right(y))


def towers(**options: Any) -> Towers:
    torch.manual_seed(0)
    return Towers(**options).double()


def everything(n: int) -> Batch:
    generator = torch.Generator().manual_seed(n)
    x = torch.randn(n, 5, generator=generator, dtype=torch.float64)
    return {"x": x, "y": x + 0.4, "label": torch.arange(n) // 2, "even": torch.arange(n) % 2 == 0}


def encode(model: nn.Module, batch: Batch) -> dict[str, Any]:
    return {"sides": model(batch["x"], batch["y"]), "label": batch["label"], "even": batch["even"]}


def inner(model: nn.Module) -> Towers:
    return model.module if isinstance(model, DDP) else model


def info_nce(model: nn.Module, outputs: dict[str, Any], window: Any) -> Tensor:
    left, right = (F.normalize(side, dim=-1) for side in outputs["sides"])
    return F.cross_entropy(left @ right.T * inner(model).log_scale.exp(), torch.arange(len(left)))


def info_nce_rows(model: nn.Module, outputs: dict[str, Any], window: Any, rows: slice) -> Tensor:
    left, right = (F.normalize(side, dim=-1) for side in outputs["sides"])
    logits = left[rows] @ right.T * inner(model).log_scale.exp()
    return F.cross_entropy(logits, torch.arange(len(left))[rows], reduction="sum") / len(left)


def triplet(model: nn.Module, outputs: dict[str, Any], window: Any) -> Tensor:
    """Positives and negatives are told by labels of all ranks; every second sample is an anchor."""
    distances = torch.cdist(*outputs["sides"])
    same = outputs["label"][:, None] == outputs["label"][None, :]
    positive = distances.masked_fill(~same, -torch.inf).amax(1)
    negative = distances.masked_fill(same, torch.inf).amin(1)
    return (positive - negative + 1).clamp(min=0)[outputs["even"]].mean() * inner(model).log_scale


class InfoNCE(nn.Module):
    """A loss with a temperature of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.tensor(2.0, dtype=torch.float64))

    def forward(self, model: nn.Module, outputs: dict[str, Any], window: Any) -> Tensor:
        return info_nce(model, outputs, window) * self.scale


LOSSES = {"info-nce": info_nce, "triplet": triplet, "blocks": mb.RowBlocks(info_nce_rows, rows=3)}


class FailAt(TorchDispatchMode):
    """Raises torch.OutOfMemoryError before the dispatched operation of that number."""

    def __init__(self, point: int) -> None:
        super().__init__()
        self.point, self.count = point, 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += 1
        if self.count == self.point:
            raise torch.OutOfMemoryError(f"injected before {func}")
        return func(*args, **(kwargs or {}))


def expected_for(model: Towers, batch: Batch, loss_fn: Any) -> list[Tensor | None]:
    return reference(model, lambda: loss_fn(model, encode(model, batch), None))


# ---------------------------------------------------------------------------------------------------------------------
# Claims


def gradients_are_those_of_one_process_whatever_each_rank_holds(world: int) -> None:
    sizes = sizes_for(world)
    batch = everything(sum(sizes))
    for name, loss_fn in LOSSES.items():
        for keep in (0, 1, 9):
            model = towers()
            expected = expected_for(model, batch, loss_fn)
            value = loss_fn(model, encode(model, batch), None).item()
            accumulator = mb.GatheredAccumulator(model, encode, loss_fn, micro_batch_size=2, keep_graphs=keep)
            for _ in range(2):
                clear(model)
                report = accumulator.run(share_of(batch, sizes))
                close(gradients(model), expected)
            assert abs(float(report.loss) - value) <= 1e-12, name
            assert report.num_samples == sum(sizes)
            assert sum(report.micro_batch_sizes) == sizes[dist.get_rank()]
            assert abs(float(accumulator.evaluate(share_of(batch, sizes)).loss) - value) <= 1e-12


def with_ddp_gradients_are_the_same(world: int) -> None:
    sizes = sizes_for(world)
    batch = everything(sum(sizes))
    for bucket_view in (False, True):
        for name in ("info-nce", "blocks"):
            model = towers()
            expected = expected_for(model, batch, LOSSES[name])
            model.seen.zero_()
            ddp = DDP(model, gradient_as_bucket_view=bucket_view)
            accumulator = mb.GatheredAccumulator(ddp, encode, LOSSES[name], micro_batch_size=2)
            for _ in range(3):
                clear(model)
                accumulator.run(share_of(batch, sizes))
                close(gradients(model), expected)
            # a plain forward and backward through DDP reduces as before
            clear(model)
            ddp(*(share_of(batch, sizes)[key] for key in "xy"))[0].sum().backward()
            assert model.left.weight.grad is not None


def a_temperature_of_the_loss_is_reduced_once(world: int) -> None:
    sizes = sizes_for(world)
    batch, model, loss_fn = everything(sum(sizes)), towers(), InfoNCE()
    expected = reference([model, loss_fn], lambda: loss_fn(model, encode(model, batch), None))
    mb.GatheredAccumulator(DDP(model), encode, loss_fn, micro_batch_size=3).run(share_of(batch, sizes))
    close(gradients([model, loss_fn]), expected)


def a_rank_without_samples_takes_part(world: int) -> None:
    for sizes in ([9, 4, 0][-world:], [0, 5, 6][:world]):
        batch = everything(sum(sizes))
        for loss_fn in LOSSES.values():
            model = towers()
            expected = expected_for(model, batch, loss_fn)
            mine = share_of(batch, sizes)
            accumulator = mb.GatheredAccumulator(DDP(model), encode, loss_fn, micro_batch_size=2)
            accumulator.run(mb.Window([mine] if len(mine["x"]) else []))
            close(gradients(model), expected)


def each_rank_alone_where_the_process_group_is_none(world: int) -> None:
    sizes = sizes_for(world)
    model, mine = towers(), share_of(everything(sum(sizes)), sizes)
    expected = expected_for(model, mine, info_nce)
    mb.GatheredAccumulator(model, encode, info_nce, micro_batch_size=2, process_group=None).run(mine)
    close(gradients(model), expected)


def dropout_masks_are_drawn_again_on_every_rank(world: int) -> None:
    sizes = sizes_for(world)
    model, mine = towers(dropout=0.4), share_of(everything(sum(sizes)), sizes)
    results = []
    for keep in (9, 0, 1):
        clear(model)
        torch.manual_seed(dist.get_rank())
        mb.GatheredAccumulator(model, encode, info_nce, micro_batch_size=2, keep_graphs=keep).run(mine)
        results.append(gradients(model))
    close(results[1], results[0])
    close(results[2], results[0])


def failing_backwards(world: int, dropout: float, keep: int) -> None:
    """Out of memory on rank 0 only, at many points of its backwards; the gradients are those without failures."""
    sizes = [8, 4, 6][:world]
    model, mine = towers(dropout=dropout), share_of(everything(sum(sizes)), sizes)
    step, retries = Backwards.step, 0
    try:
        for point in range(1, 60, 12):
            wanted, sizes_run = None, (4,)
            for fails in (True, False):
                clear(model)
                torch.manual_seed(dist.get_rank())
                window = mb.Window([mine]).cut(max(sizes_run))  # at last: as rank 0 was cut to in the end
                accumulator = mb.GatheredAccumulator(model, encode, info_nce, micro_batch_size=4, keep_graphs=keep)
                mode = FailAt(point if fails and dist.get_rank() == 0 else 0)

                def under_mode(self: Backwards, attempt: Any, mode: Any = mode) -> None:
                    with mode:
                        step(self, attempt)

                Backwards.step = under_mode  # type: ignore[method-assign]
                report = accumulator.run(window)
                retries += report.retries
                sizes_run = report.micro_batch_sizes if dropout else sizes_run
                wanted = wanted or gradients(model)
            close(gradients(model), wanted)
        assert retries >= 4 if dist.get_rank() == 0 else retries == 0
    finally:
        Backwards.step = step  # type: ignore[method-assign]


def out_of_memory_on_one_rank_is_recovered(world: int) -> None:
    for keep in (0, 1):
        failing_backwards(world, 0.0, keep)


def where_halves_would_draw_other_masks_all_ranks_run_again(world: int) -> None:
    for keep in (0, 1):
        failing_backwards(world, 0.4, keep)


def an_error_on_one_rank_is_one_on_all(world: int) -> None:
    sizes = sizes_for(world)
    model, mine = towers(), share_of(everything(sum(sizes)), sizes)
    first = dist.get_rank() == 0

    def failing_encode(m: nn.Module, b: Batch) -> Any:
        if first:
            raise ValueError("this rank's own")
        return encode(m, b)

    def failing_loss(m: nn.Module, o: Any, w: Any) -> Tensor:
        if first:
            raise ValueError("this rank's own")
        return info_nce(m, o, w)

    for encoder, loss_fn in ((failing_encode, info_nce), (encode, failing_loss)):
        accumulator = mb.GatheredAccumulator(model, encoder, loss_fn, micro_batch_size=2)
        kind, message = (ValueError, "this rank's own") if first else (RuntimeError, "another rank could not run")
        refused(kind, message, lambda accumulator=accumulator: accumulator.run(mine))
        assert all(p.grad is None for p in model.parameters())


def losses_that_differ_between_ranks_are_refused(world: int) -> None:
    sizes = sizes_for(world)
    model, mine = towers(), share_of(everything(sum(sizes)), sizes)
    accumulator = mb.GatheredAccumulator(
        model, encode, lambda m, o, w: info_nce(m, o, w) * (1 + dist.get_rank()), micro_batch_size=2
    )
    refused(ValueError, "draws no random numbers", lambda: accumulator.run(mine))


def outputs_that_differ_between_ranks_are_refused(world: int) -> None:
    sizes = sizes_for(world)
    model, mine = towers(), share_of(everything(sum(sizes)), sizes)
    width = 5 + dist.get_rank()
    accumulator = mb.GatheredAccumulator(
        model, lambda m, b: m(b["x"], b["y"])[0][:, :width], lambda m, o, w: o.square().mean(), micro_batch_size=2
    )
    refused(ValueError, "the outputs of two ranks differ", lambda: accumulator.run(mine))


def pairs_within_micro_batches_are_refused(world: int) -> None:
    """Also where each rank has a single one, and all are alike."""
    mine = share_of(everything(4 * world), [4] * world)
    for size in (2, 4):
        accumulator = mb.GatheredAccumulator(
            DDP(towers()),
            lambda m, b: (z := m(b["x"], b["y"]))[0] @ z[1].T,
            lambda m, o, w: o.mean(),
            micro_batch_size=size,
        )
        message = "it compares the samples of a micro-batch"
        refused(ValueError, message, lambda accumulator=accumulator: accumulator.run(mine))


def a_rank_that_encodes_some_samples_once_more_waits_for_no_other(world: int) -> None:
    """Outputs are 6 numbers long, as the first rank's micro-batches are: only there it is looked what changes them."""
    sizes = [12, 4, 5][:world]
    batch, model = everything(sum(sizes)), towers()
    expected = expected_for(model, batch, info_nce)
    model.seen.zero_()
    accumulator = mb.GatheredAccumulator(DDP(model), encode, info_nce, micro_batch_size=6)
    accumulator.run(share_of(batch, sizes))
    close(gradients(model), expected)


def blocks_that_do_not_add_up_are_refused(world: int) -> None:
    def mean_of_the_block(m: nn.Module, o: dict[str, Any], w: Any, rows: slice) -> Tensor:
        left, right = o["sides"]
        return F.cross_entropy(left[rows] @ right.T, torch.arange(len(left))[rows])

    model, mine = towers(), share_of(everything(6 * world), [6] * world)
    accumulator = mb.GatheredAccumulator(model, encode, mb.RowBlocks(mean_of_the_block, rows=3), micro_batch_size=2)
    refused(ValueError, "the shares that block_loss returns do not add up", lambda: accumulator.run(mine))


def control_negatives_of_the_own_rank_only_are_wrong_by_more_than_a_tenth(world: int) -> None:
    sizes = sizes_for(world)
    batch, model = everything(sum(sizes)), towers()
    expected = expected_for(model, batch, info_nce)
    ddp = DDP(model)
    info_nce(ddp, encode(ddp, share_of(batch, sizes)), None).backward()
    error = difference(gradients(model), expected)
    assert error > 0.1, f"the control differs by {error:.2e} only"


def claims() -> dict[str, Any]:
    """Every claim of this module."""
    own = {"world": int, "return": None}
    return {n: f for n, f in globals().items() if getattr(f, "__annotations__", {}) == own and f.__module__ == __name__}


if __name__ == "__main__":
    ranks.claims = claims
    ranks.main(int(sys.argv[1]), int(sys.argv[2]), sys.argv[3])
