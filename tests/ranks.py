"""What each process of the distributed tests runs: one function a claim, checked on every rank against one process.

Started through all_ranks.py; imports nothing from pytest, so that a child process starts quickly.
"""

import datetime
import faulthandler
import gc
import itertools
import os
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import torch
import torch.distributed as dist
from helpers import clear, difference, gradients, reference
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.parallel import DistributedDataParallel as DDP
from torch.utils._python_dispatch import TorchDispatchMode

import macrobatch as mb
from macrobatch.window_pass import WindowPass

Batch = dict[str, Tensor]
LENGTH = 6
UNFINISHED = "never finished\n"


class Tagger(nn.Module):
    """Token scores (B, C, T); `unused` takes part only where the first token is even."""

    def __init__(self, sometimes_unused: bool = False) -> None:
        super().__init__()
        self.embedding = nn.Embedding(9, 5)
        self.mix = nn.Linear(5, 5)
        self.head = nn.Linear(5, 9)
        self.extra = nn.Linear(5, 5) if sometimes_unused else None
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, tokens: Tensor) -> Tensor:
        hidden = self.mix(self.embedding(tokens)).tanh()
        if self.extra is not None and int(tokens[0, 0]) % 2 == 0:
            hidden = self.extra(hidden)
        return self.head(hidden).transpose(1, 2)


def tagger(**options: bool) -> Tagger:
    torch.manual_seed(0)
    return Tagger(**options).double()


def everything(n: int) -> Batch:
    """The effective batch over all ranks; later samples have fewer valid tokens."""
    generator = torch.Generator().manual_seed(n)
    tokens = torch.randint(0, 9, (n, LENGTH), generator=generator)
    labels = torch.randint(0, 9, (n, LENGTH), generator=generator)
    for i in range(n):
        labels[i, LENGTH - (5 * i) // n :] = -100
    return {"tokens": tokens, "labels": labels}


def share_of(batch: Batch, sizes: list[int]) -> Batch:
    """This rank's samples, where rank r has sizes[r]."""
    start = sum(sizes[: dist.get_rank()])
    return {key: value[start : start + sizes[dist.get_rank()]] for key, value in batch.items()}


def sizes_for(world: int) -> list[int]:
    return [7, 3, 5][:world]


def token_sum(model: nn.Module, batch: Batch) -> tuple[Tensor, Tensor]:
    loss = F.cross_entropy(model(batch["tokens"]), batch["labels"], reduction="sum")
    return loss, mb.valid_tokens(batch["labels"])


def token_mean(model: nn.Module, batch: Batch) -> Tensor:
    return F.cross_entropy(model(batch["tokens"]), batch["labels"])


def expected_for(
    model: nn.Module, batch: Batch, loss: Callable[[nn.Module, Batch], Tensor] = token_mean
) -> list[Tensor | None]:
    return reference(model, lambda: loss(model, batch))


def close(mine: list[Tensor | None], theirs: list[Tensor | None]) -> None:
    error = difference(mine, theirs)
    assert error <= 1e-12, f"gradient differs by {error:.2e}"


def refused(kind: type[Exception], message: str, action: Callable[[], object]) -> None:
    try:
        action()
    except kind as error:
        if message not in str(error):
            raise AssertionError(f"another message: {error}") from error
    else:
        raise AssertionError(f"no {kind.__name__}")


# ---------------------------------------------------------------------------------------------------------------------
# Claims


def different_samples_tokens_and_micro_batch_counts(world: int) -> None:
    batch, sizes = everything(sum(sizes_for(world))), sizes_for(world)
    for bucket_view in (False, True):
        model = tagger()
        expected = expected_for(model, batch)
        ddp = DDP(model, gradient_as_bucket_view=bucket_view)
        accumulator = mb.Accumulator(ddp, token_sum, micro_batch_size=2)
        for _ in range(3):  # DDP rebuilds its buckets after the first
            clear(model)
            report = accumulator.run(share_of(batch, sizes))
            close(gradients(model), expected)
        assert report.num_samples == sum(sizes)
        assert report.loss_weight == (batch["labels"] != -100).sum()
        assert abs(float(report.loss) - token_mean(model, batch).item()) < 1e-12
        assert sum(report.micro_batch_sizes) == sizes[dist.get_rank()]


def gradients_are_reduced_once_for_each_window(world: int) -> None:
    model = tagger()
    ddp = DDP(model)
    reductions: list[int] = []

    def counting(state: object, bucket: dist.GradBucket) -> torch.futures.Future[Tensor]:
        reductions.append(bucket.buffer().numel())
        flat = bucket.buffer().div_(world)
        return dist.all_reduce(flat, async_op=True).get_future().then(lambda f: f.value()[0])

    ddp.register_comm_hook(None, counting)
    accumulator = mb.Accumulator(ddp, token_sum, micro_batch_size=1)
    accumulator.run(share_of(everything(sum(sizes_for(world))), sizes_for(world)))
    assert sum(reductions) == sum(p.numel() for p in model.parameters()), reductions


def a_rank_without_samples_takes_part(world: int) -> None:
    sizes = [9, 4, 0][-world:]
    batch, model = everything(sum(sizes)), tagger()
    expected = expected_for(model, batch)
    accumulator = mb.Accumulator(DDP(model), token_sum, micro_batch_size=2)
    for window_sizes in (sizes, sizes_for(world), sizes):  # between: a window in which DDP reduces
        clear(model)
        mine = share_of(batch, window_sizes) if window_sizes is sizes else share_of(everything(30), window_sizes)
        accumulator.run(mb.Window([mine] if len(mine["tokens"]) else []))
        if window_sizes is sizes:
            close(gradients(model), expected)


def a_rank_whose_loader_ends_earlier_trains_on_like_one_process(world: int) -> None:
    per_rank = [4, 2, 3][:world]  # micro-batches of 3 samples on each rank, 2 to a window
    data = everything(3 * sum(per_rank))
    model, single = tagger(), tagger()
    ddp = DDP(model)
    optimizer, other = torch.optim.SGD(model.parameters(), 0.5), torch.optim.SGD(single.parameters(), 0.5)
    micro_batches = mb.Window([data]).cut(3)
    shares = [list(micro_batches)[sum(per_rank[:r]) : sum(per_rank[: r + 1])] for r in range(world)]
    accumulator, num_windows = mb.Accumulator(ddp, token_sum), 0
    for window in mb.windows(shares[dist.get_rank()], accumulation_steps=2):
        together = [b for share in shares for b in share[2 * num_windows : 2 * num_windows + 2]]
        num_windows += 1
        report = accumulator.run(window)
        assert report.num_samples == 3 * len(together)
        assert mb.apply_update(optimizer, report).applied
        token_mean(single, {key: torch.cat([b[key] for b in together]) for key in data}).backward()
        other.step()
        other.zero_grad()
        for p, q in zip(model.parameters(), single.parameters(), strict=True):
            assert torch.allclose(p, q, rtol=0, atol=1e-12)
    assert num_windows == 2


def windows_divide_the_batch_size_over_the_ranks(world: int) -> None:
    data = everything(40)
    mine = [{key: value[i : i + 3] for key, value in data.items()} for i in range(0, 39, 3)]
    seen = [window.num_samples for window in mb.windows(mine, batch_size=10)]
    own = 10 // world + (dist.get_rank() < 10 % world)
    longest = -(-39 // (10 // world))
    assert sum(seen) == 39
    assert set(seen[: 39 // own]) == {own}
    assert len(seen) == longest


def parameters_outside_ddp_are_reduced_too(world: int) -> None:
    class Temperature(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.scale = nn.Parameter(torch.ones((), dtype=torch.float64))

        def forward(self, model: nn.Module, batch: Batch) -> tuple[Tensor, Tensor]:
            loss = F.cross_entropy(model(batch["tokens"]) * self.scale, batch["labels"], reduction="sum")
            return loss, mb.valid_tokens(batch["labels"])

    batch, sizes = everything(sum(sizes_for(world))), sizes_for(world)
    model, loss_fn = tagger(), Temperature()

    def mean() -> Tensor:
        loss, valid = loss_fn(model, batch)
        return loss / valid

    expected = reference([model, loss_fn], mean)
    mb.Accumulator(DDP(model), loss_fn, micro_batch_size=2).run(share_of(batch, sizes))
    close(gradients([model, loss_fn]), expected)


def a_model_without_ddp_is_reduced_explicitly(world: int) -> None:
    batch, model = everything(sum(sizes_for(world))), tagger()
    expected = expected_for(model, batch)
    mb.Accumulator(model, token_sum, micro_batch_size=2).run(share_of(batch, sizes_for(world)))
    close(gradients(model), expected)
    clear(model)
    alone = share_of(batch, sizes_for(world))
    local = expected_for(model, alone)
    mb.Accumulator(model, token_sum, micro_batch_size=2, process_group=None).run(alone)
    close(gradients(model), local)


def bf16_parameters_are_summed_in_float32(world: int) -> None:
    batch, sizes = everything(sum(sizes_for(world))), sizes_for(world)
    model = tagger().bfloat16()
    expected = expected_for(tagger(), batch)
    mb.Accumulator(DDP(model), token_sum, micro_batch_size=2).run(share_of(batch, sizes))
    assert all(p.grad is not None and p.grad.dtype == torch.bfloat16 for p in model.parameters())
    assert difference(gradients(model), expected) < 0.03


def a_masked_last_micro_batch_still_joins(world: int) -> None:
    for options in ({}, {"find_unused_parameters": True}):
        batch, sizes = everything(sum(sizes_for(world))), sizes_for(world)
        batch["labels"][sizes[0] - 1] = -100  # the last micro-batch of rank 0
        model = tagger()
        expected = expected_for(model, batch)

        def loss_fn(m: nn.Module, b: Batch) -> tuple[object, object]:
            loss, valid = token_sum(m, b)
            return (loss, valid) if valid > 0 else (0, 0)

        accumulator = mb.Accumulator(DDP(model, **options), loss_fn, micro_batch_size=1)
        for _ in range(3):
            clear(model)
            accumulator.run(share_of(batch, sizes))
            close(gradients(model), expected)


def a_rank_whose_whole_share_is_masked_joins(world: int) -> None:
    batch, sizes = everything(sum(sizes_for(world))), sizes_for(world)
    batch["labels"][: sizes[0]] = -100  # all of rank 0
    model = tagger()
    expected = expected_for(model, batch)

    def loss_fn(m: nn.Module, b: Batch) -> tuple[object, object]:
        loss, valid = token_sum(m, b)
        return (loss, valid) if valid > 0 else (0, 0)

    accumulator = mb.Accumulator(DDP(model), loss_fn, micro_batch_size=2)
    for _ in range(2):
        clear(model)
        accumulator.run(share_of(batch, sizes))
        close(gradients(model), expected)


def parameters_unused_in_some_micro_batches_are_right(world: int) -> None:
    batch, sizes = everything(sum(sizes_for(world))), sizes_for(world)
    model = tagger(sometimes_unused=True)

    def each_alone(m: nn.Module, b: Batch) -> Tensor:
        losses = [token_sum(m, {key: value[i : i + 1] for key, value in b.items()}) for i in range(len(b["tokens"]))]
        return sum(loss for loss, _ in losses) / sum(valid for _, valid in losses)

    expected = expected_for(model, batch, each_alone)
    accumulator = mb.Accumulator(DDP(model, find_unused_parameters=True), token_sum, micro_batch_size=1)
    for _ in range(3):
        clear(model)
        accumulator.run(share_of(batch, sizes))
        close(gradients(model), expected)


def two_denominators_with_an_idle_rank(world: int) -> None:
    sizes = [0, 9, 4][:world]
    batch, model = everything(sum(sizes)), tagger()

    def losses(m: nn.Module, b: Batch) -> dict[str, Tensor]:
        return {"tokens": token_sum(m, b)[0], "samples": m(b["tokens"]).square().mean((1, 2)).sum()}

    def count(b: Batch) -> dict[str, object]:
        return {"tokens": mb.valid_tokens(b["labels"]), "samples": len(b["labels"])}

    def means(m: nn.Module, b: Batch) -> Tensor:
        return losses(m, b)["tokens"] / count(b)["tokens"] + losses(m, b)["samples"] / count(b)["samples"]

    expected = expected_for(model, batch, means)
    mine = share_of(batch, sizes)
    window = mb.Window([mine] if len(mine["tokens"]) else []).cut(2)
    report = mb.Accumulator(DDP(model), losses, count=count).run(window)
    close(gradients(model), expected)
    assert abs(float(report.loss) - means(model, batch).item()) < 1e-12


def adding_windows_keeps_what_lies_in_ddps_buckets(world: int) -> None:
    batch, sizes = everything(sum(sizes_for(world))), sizes_for(world)
    model = tagger()
    expected = expected_for(model, batch)
    accumulator = mb.Accumulator(DDP(model, gradient_as_bucket_view=True), token_sum, micro_batch_size=4)
    for _ in range(2):
        clear(model)
        accumulator.run(share_of(batch, sizes))
    for _ in range(2):
        accumulator.run(share_of(batch, sizes), add=True)
    close(gradients(model), [3 * g if g is not None else None for g in expected])


def one_count_while_ddp_overlaps(world: int) -> None:
    batch, sizes = everything(sum(sizes_for(world))), sizes_for(world)
    model = tagger()
    expected = expected_for(model, batch)
    accumulator = mb.Accumulator(
        DDP(model),
        lambda m, b: token_sum(m, b)[0],
        micro_batch_size=2,
        count=lambda b: mb.valid_tokens(b["labels"]),
    )
    for _ in range(2):
        clear(model)
        accumulator.run(share_of(batch, sizes))
        close(gradients(model), expected)


def own_loops_get_shares_over_all_ranks(world: int) -> None:
    for sizes in (sizes_for(world), [0, 9, 4][:world]):
        batch, model = everything(sum(sizes)), tagger()
        expected = expected_for(model, batch)
        ddp, mine = DDP(model), share_of(batch, sizes)
        window = mb.Window([mine] if len(mine["tokens"]) else []).cut(2)
        for _ in range(2):
            clear(model)
            with mb.accumulate(window, ddp, count=lambda b: mb.valid_tokens(b["labels"])) as steps:
                for micro_batch, share in steps:
                    (token_sum(ddp, micro_batch)[0] * share).backward()
            close(gradients(model), expected)
        assert ddp.require_backward_grad_sync


def evaluate_needs_no_equal_counts(world: int) -> None:
    sizes = [9, 4, 0][-world:]
    batch, model = everything(sum(sizes)), tagger()
    mine = share_of(batch, sizes)
    window = mb.Window([mine] if len(mine["tokens"]) else []).cut(2)
    report = mb.Accumulator(DDP(model), token_sum).evaluate(window)
    assert abs(float(report.loss) - token_mean(model, batch).item()) < 1e-12
    assert report.num_samples == sum(sizes)


def bad_input_on_one_rank_raises_on_all(world: int) -> None:
    model = tagger()
    accumulator = mb.Accumulator(DDP(model), token_sum, micro_batch_size=2)
    mine = share_of(everything(15), sizes_for(world))
    if dist.get_rank() == 0:
        mine["labels"] = mine["labels"][:-1]
    kind, message = (ValueError, "batch['tokens']") if dist.get_rank() == 0 else (RuntimeError, "another rank")
    refused(kind, message, lambda: accumulator.run(mine))
    accumulator.run(share_of(everything(15), sizes_for(world)))  # and the ranks are still in step


def an_effective_batch_without_samples_is_refused_everywhere(world: int) -> None:
    refused(ValueError, "no rank has a sample", lambda: mb.Accumulator(DDP(tagger()), token_sum).run(mb.Window([])))


def a_non_finite_gradient_on_one_rank_skips_on_all(world: int) -> None:
    model = tagger()
    optimizer = torch.optim.AdamW(model.parameters())
    before = [p.detach().clone() for p in model.parameters()]

    def poisoned(m: nn.Module, b: Batch) -> tuple[Tensor, Tensor]:
        loss, valid = token_sum(m, b)
        return loss * (float("nan") if dist.get_rank() == world - 1 else 1.0), valid

    mine = share_of(everything(15), sizes_for(world))
    for group, ddp in (("auto", DDP(model)), (None, model)):
        clear(model)
        report = mb.Accumulator(ddp, poisoned, micro_batch_size=2, process_group=group).run(mine)
        if group is None:  # local gradients: only one rank sees the NaN; the others must be told
            object.__setattr__(report, "process_group", dist.group.WORLD)
        assert not mb.apply_update(optimizer, report).applied
        assert all(torch.equal(p, b) for p, b in zip(model.parameters(), before, strict=True))
        assert not optimizer.state


def metrics_are_summed_over_ranks_also_where_a_rank_has_none(world: int) -> None:
    sizes = [9, 4, 0][-world:]
    batch, model = everything(sum(sizes)), tagger()

    def loss_fn(m: nn.Module, b: Batch) -> mb.Loss:
        loss, valid = token_sum(m, b)
        return mb.Loss(loss, valid, metrics={"right": (m(b["tokens"]).argmax(1) == b["labels"]).sum()})

    mine = share_of(batch, sizes)
    report = mb.Accumulator(DDP(model), loss_fn).run(mb.Window([mine] if len(mine["tokens"]) else []).cut(3))
    right = (model(batch["tokens"]).argmax(1) == batch["labels"]).sum() / mb.valid_tokens(batch["labels"])
    assert abs(float(report.metrics["right"]) - float(right)) < 1e-6


def after_an_exception_on_all_ranks_the_next_window_is_right(world: int) -> None:
    batch, sizes = everything(sum(sizes_for(world))), sizes_for(world)
    model = tagger()
    expected = expected_for(model, batch)
    fails = [True]

    def loss_fn(m: nn.Module, b: Batch) -> tuple[Tensor, Tensor]:
        if fails:
            fails.clear()
            raise KeyboardInterrupt
        return token_sum(m, b)

    ddp = DDP(model)
    accumulator = mb.Accumulator(ddp, loss_fn, micro_batch_size=2)
    try:
        accumulator.run(share_of(batch, sizes))
    except KeyboardInterrupt:
        assert all(p.grad is None for p in model.parameters())
        assert ddp.require_backward_grad_sync
    accumulator.run(share_of(batch, sizes))
    close(gradients(model), expected)


class FailOnce(TorchDispatchMode):
    """Raises torch.OutOfMemoryError before one dispatched operation of those in which `ddp` does not communicate."""

    def __init__(self, ddp: DDP, point: int) -> None:
        super().__init__()
        self.ddp, self.point, self.count = ddp, point, 0

    def __torch_dispatch__(self, func: object, types: object, args: object = (), kwargs: object = None) -> object:
        self.count += not self.ddp.require_backward_grad_sync
        if self.count == self.point and not self.ddp.require_backward_grad_sync:
            self.point = 0
            raise torch.OutOfMemoryError(f"injected before {func}")
        return func(*args, **(kwargs or {}))


def recovered_everywhere(world: int, overlap: bool = True, **options: bool) -> None:
    """Fail rank 0 at every fourth operation of its window, in turn, but not in a backward that communicates."""
    batch, sizes = everything(sum(sizes_for(world))), sizes_for(world)
    model = tagger()
    del model.calls  # a failure in DDP's own broadcast of buffers cannot be recovered: a stated limit
    expected = expected_for(model, batch)
    ddp = DDP(model, **options)
    accumulator = mb.Accumulator(ddp, token_sum, micro_batch_size=3, overlap=overlap)
    forward_backward = WindowPass.forward_backward
    mode = FailOnce(ddp, 0)

    def under_mode(self: WindowPass, *arguments: object) -> None:
        with mode:
            forward_backward(self, *arguments)

    WindowPass.forward_backward = under_mode  # type: ignore[method-assign]
    try:
        for _ in range(3):  # the first window does more, and DDP rebuilds its buckets after it
            clear(model)
            mode.count = 0
            accumulator.run(share_of(batch, sizes))
        points = torch.tensor([mode.count])
        dist.broadcast(points, 0)
        retries = 0
        for point in range(1, int(points), 4):
            clear(model)
            mode = FailOnce(ddp, point if dist.get_rank() == 0 else 0)
            accumulator._limit.__init__(3)  # type: ignore[misc]
            report = accumulator.run(share_of(batch, sizes))
            retries += report.retries
            close(gradients(model), expected)
            assert report.num_samples == sum(sizes)
        assert retries == (len(range(1, int(points), 4)) if dist.get_rank() == 0 else 0)
        assert dist.get_rank() != 0 or retries > 20
    finally:
        WindowPass.forward_backward = forward_backward  # type: ignore[method-assign]


def out_of_memory_on_one_rank_is_recovered(world: int) -> None:
    recovered_everywhere(world)


def out_of_memory_is_recovered_with_gradients_as_bucket_views(world: int) -> None:
    recovered_everywhere(world, gradient_as_bucket_view=True)


def without_overlap_out_of_memory_is_recovered_in_the_last_backward_too(world: int) -> None:
    recovered_everywhere(world, overlap=False)


def a_sum_or_metric_that_appears_in_a_later_window_is_an_error_on_every_rank(world: int) -> None:
    model, batch = tagger(), share_of(everything(sum(sizes_for(world))), sizes_for(world))
    metrics: dict[str, float] = {"accuracy": 1.0}

    def loss_fn(model: nn.Module, batch: Batch) -> mb.Loss:
        loss_sum, weight = token_sum(model, batch)
        return mb.Loss(loss_sum, weight, metrics)

    accumulator = mb.Accumulator(DDP(model), loss_fn, micro_batch_size=3)
    before = accumulator.run(batch)
    clear(model)
    metrics["recall"] = 1.0  # no rank asks the others for names again: a rank without it would miss a column
    refused(ValueError, "the metric 'recall' is new", lambda: accumulator.run(batch))
    del metrics["recall"]
    again = accumulator.run(batch)
    assert torch.equal(again.metrics["accuracy"], before.metrics["accuracy"])


def a_metric_may_be_given_where_nothing_is_trained_alone(world: int) -> None:
    batch, sizes = everything(sum(sizes_for(world))), sizes_for(world)
    mine = share_of(batch, sizes)

    def loss_fn(m: nn.Module, b: Batch) -> mb.Loss:
        loss_sum, weight = token_sum(m, b)
        right = (m(b["tokens"]).argmax(1) == b["labels"]).sum()
        return mb.Loss(loss_sum, weight, {} if torch.is_grad_enabled() else {"right": right})

    ddp = DDP(model := tagger())
    with torch.no_grad():
        expected = (model(batch["tokens"]).argmax(1) == batch["labels"]).sum() / token_sum(model, batch)[1]
    for evaluates_first in (False, True):
        accumulator = mb.Accumulator(ddp, loss_fn, micro_batch_size=2)
        for evaluates in (evaluates_first, not evaluates_first, evaluates_first):
            clear(model)
            report = accumulator.evaluate(mine) if evaluates else accumulator.run(mine)
            assert set(report.metrics) == ({"right"} if evaluates else set())
            if evaluates:
                assert abs(float(report.metrics["right"]) - float(expected)) < 1e-6


def a_static_graph_is_refused_where_it_would_reduce_too_early(world: int) -> None:
    model, batch = tagger(), share_of(everything(sum(sizes_for(world))), sizes_for(world))
    accumulator = mb.Accumulator(DDP(model, static_graph=True), token_sum, micro_batch_size=2)
    refused(ValueError, "static_graph=True reduces in the first backward", lambda: accumulator.run(batch))
    assert all(p.grad is None for p in model.parameters())
    assert accumulator.evaluate(batch).has_terms  # which has no backward


def a_forward_that_failed_after_its_buffers_were_broadcast_runs_again_without_a_broadcast(world: int) -> None:
    batch, sizes = everything(sum(sizes_for(world))), sizes_for(world)
    model = tagger()  # with a buffer: every forward under DDP begins with a broadcast, in which all ranks take part
    expected = expected_for(model, batch)
    ddp, fails = DDP(model), []

    def fail_once(*_: object) -> None:
        if fails:
            fails.clear()
            raise torch.OutOfMemoryError("injected")

    model.embedding.register_forward_pre_hook(fail_once)
    accumulator = mb.Accumulator(ddp, token_sum, micro_batch_size=3)
    for window in range(3):
        clear(model)
        fails_here = window > 0 and dist.get_rank() == (0 if window == 1 else world - 1)  # who sends, and who receives
        fails[:] = [True] if fails_here else []
        report = accumulator.run(share_of(batch, sizes))
        assert report.retries == int(fails_here)
        close(gradients(model), expected)


def out_of_memory_in_a_backward_that_communicates_is_an_error_that_says_what_to_change(world: int) -> None:
    model = tagger()
    ddp = DDP(model)
    batch, calls = share_of(everything(sum(sizes_for(world))), sizes_for(world)), [0]

    def failing(model: nn.Module, batch: Batch) -> tuple[Tensor, Tensor]:
        calls[0] += 1
        loss, weight = token_sum(model, batch)
        loss.register_hook(fail_where_ddp_communicates)
        return loss, weight

    def fail_where_ddp_communicates(_: Tensor) -> None:
        if ddp.require_backward_grad_sync and calls[0] < 20:  # before anything is sent, on all ranks alike
            raise torch.OutOfMemoryError("injected")

    accumulator = mb.Accumulator(ddp, failing, micro_batch_size=2)
    refused(torch.OutOfMemoryError, "in which DDP communicates", lambda: accumulator.run(batch))
    assert all(p.grad is None for p in model.parameters())
    refused(torch.OutOfMemoryError, "or overlap=False", lambda: accumulator.run(batch))
    expected = expected_for(model, everything(sum(sizes_for(world))))
    mb.Accumulator(ddp, failing, micro_batch_size=2, overlap=False).run(batch)  # where no backward communicates
    close(gradients(model), expected)


def out_of_memory_between_the_last_forward_and_its_backward_is_recovered(world: int) -> None:
    """Where a loss over logits needs most: DDP's own forward is over, and other ranks wait for one reduction."""
    batch, sizes = everything(sum(sizes_for(world))), sizes_for(world)
    mine = share_of(batch, sizes)
    for find_unused_parameters in (False, True):
        model = tagger()
        expected = expected_for(model, batch)
        ddp, seen, fails = DDP(model, find_unused_parameters=find_unused_parameters), [0], [False]

        def loss_fn(m: nn.Module, b: Batch, seen: list[int] = seen, fails: list[bool] = fails) -> object:
            loss = token_sum(m, b)
            seen[0] += len(b["tokens"])
            if fails[0] and seen[0] == len(mine["tokens"]):
                fails[0] = False
                raise torch.OutOfMemoryError("injected")
            return loss

        accumulator = mb.Accumulator(ddp, loss_fn, micro_batch_size=3)
        for window in range(4):  # the last: what failed has left nothing behind
            clear(model)
            seen[0], fails[0] = 0, window in (1, 2) and dist.get_rank() == 0
            accumulator._limit.__init__(3)  # type: ignore[misc]
            report = accumulator.run(mine)
            assert report.retries == (1 if window in (1, 2) and dist.get_rank() == 0 else 0)
            close(gradients(model), expected)


def micro_batches_are_measured_over_all_ranks(world: int) -> None:
    batch, sizes = everything(sum(sizes_for(world))), sizes_for(world)
    pieces = [share for size in sizes for share in [size // 2, size - size // 2]]  # as micro_batch_size cuts them
    model = tagger()
    whole = expected_for(model, batch)
    weights, norms, squares = [], [], []
    start = 0
    for size in pieces:
        part = {key: value[start : start + size] for key, value in batch.items()}
        start += size
        weights.append(float((part["labels"] != -100).sum()))
        g = expected_for(model, part)
        norms.append(sum(float(x.square().sum()) for x in g if x is not None))
        squares.append([None if x is None else x.square() for x in g])
    w = [weight / sum(weights) for weight in weights]
    for replica in (DDP(model), DDP(model, gradient_as_bucket_view=True), model):
        accumulator = mb.Accumulator(replica, token_sum, measure="squares")
        for _ in range(2):
            clear(model)
            mine = share_of(batch, sizes)
            half = len(mine["tokens"]) // 2
            window = mb.Window([{k: v[:half] for k, v in mine.items()}, {k: v[half:] for k, v in mine.items()}])
            report = accumulator.run(window)
            close(gradients(model), whole)
            moments = report.moments
            assert moments is not None
            assert report.mean_squares is not None
            assert int(moments.num_micro_batches) == len(pieces)
            expected = sum(a * b for a, b in zip(w, norms, strict=True))
            assert abs(float(moments.mean_squared_norm) / expected - 1) < 1e-11
            total = sum(float(x.square().sum()) for x in whole if x is not None)
            assert abs(float(moments.squared_norm) / total - 1) < 1e-11
            expected = sum(a * a / n for a, n in zip(w, pieces, strict=True))
            assert abs(float(moments.weighted_inverse_size) / expected - 1) < 1e-11
            means = [
                None if column[0] is None else sum(a * b for a, b in zip(w, column, strict=True))
                for column in zip(*squares, strict=True)
            ]
            close(list(report.mean_squares), means)


class Branched(nn.Module):
    """A `branch` beside the main way, taken where the first entry of the first sample is positive."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(2)
        self.main = nn.Linear(4, 3)
        self.branch = nn.Linear(4, 3)
        self.head = nn.Linear(3, 1)
        self.double()

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.main(x)
        return self.head((hidden + self.branch(x) if float(x[0, 0]) > 0 else hidden).tanh())


def square_sum(model: nn.Module, x: Tensor) -> tuple[Tensor, int]:
    return model(x).square().sum(), len(x)


def branched_samples(takes_branch: Callable[[int, int], bool], world: int) -> list[list[Tensor]]:
    """For each rank its micro-batches of 2 samples, of which j takes the branch where `takes_branch(rank, j)`."""
    generator = torch.Generator().manual_seed(5)
    everyone = [list(torch.randn(3 + rank, 2, 4, generator=generator).double()) for rank in range(world)]
    for rank, mine in enumerate(everyone):
        for j, x in enumerate(mine):
            x[:, 0] = x[:, 0].abs() * (1 if takes_branch(rank, j) else -1)
    return everyone


def same_on_every_rank(mine: list[Tensor | None]) -> None:
    flat = torch.cat([g.flatten() for g in mine if g is not None])
    first = flat.clone()
    dist.broadcast(first, 0)
    assert torch.equal(flat, first)


def right_with_the_branch_taken_where(takes_branch: Callable[[int, int], bool], world: int) -> None:
    everyone = branched_samples(takes_branch, world)
    num_samples = sum(2 * len(mine) for mine in everyone)
    window = mb.Window(everyone[dist.get_rank()])
    for options in ({}, {"gradient_as_bucket_view": True}):
        model = Branched()
        expected = reference(
            model, lambda m=model: sum(square_sum(m, x)[0] for mine in everyone for x in mine) / num_samples
        )
        assert all(g is not None for g in expected)
        ddp = DDP(model, **options)
        accumulator = mb.Accumulator(ddp, square_sum)
        for run_by, set_to_none in itertools.product(("run", "own loop"), (True, False, True)):
            model.zero_grad(set_to_none=set_to_none)  # zeros may lie in DDP's buckets, which it rebuilds once
            if run_by == "own loop":
                with mb.accumulate(window, ddp) as steps:
                    for x, share in steps:
                        (square_sum(ddp, x)[0] * share).backward()
            else:
                assert accumulator.run(window).num_samples == num_samples
            close(gradients(model), expected)
            same_on_every_rank(gradients(model))


def a_parameter_that_the_last_micro_batch_does_not_reach_is_right(world: int) -> None:
    right_with_the_branch_taken_where(lambda rank, j: j == 0, world)


def a_parameter_that_the_last_micro_batch_of_one_rank_alone_does_not_reach_is_right(world: int) -> None:
    right_with_the_branch_taken_where(lambda rank, j: j == 0 or rank != 0, world)


def a_parameter_that_one_rank_alone_reaches_is_right(world: int) -> None:
    right_with_the_branch_taken_where(lambda rank, j: j == 1 and rank == world - 1, world)


def a_parameter_of_ddp_that_no_rank_reaches_ends_with_zeros_unless_ddp_looks_for_it(world: int) -> None:
    everyone = branched_samples(lambda rank, j: False, world)
    window = mb.Window(everyone[dist.get_rank()])
    for options, overlap, is_none in (
        ({}, True, False),
        ({}, False, True),
        ({"find_unused_parameters": True}, True, True),
    ):
        model = Branched()
        accumulator = mb.Accumulator(DDP(model, **options), square_sum, overlap=overlap)
        for _ in range(3):
            clear(model)
            accumulator.run(window)
            assert all((p.grad is None) == is_none for p in model.branch.parameters())
            assert is_none or not any(p.grad.any() for p in model.branch.parameters())


def a_parameter_frozen_after_ddp_was_made_is_an_error_that_names_it(world: int) -> None:
    everyone = branched_samples(lambda rank, j: True, world)
    window = mb.Window(everyone[dist.get_rank()])
    model = Branched()
    ddp = DDP(model)
    model.branch.requires_grad_(False)
    refused(ValueError, "'branch.weight'", lambda: mb.Accumulator(ddp, square_sum).run(window))
    assert all(p.grad is None for p in model.parameters())
    model = Branched()
    ddp = DDP(model)
    ddp._check_reducer_finalized = None  # a torch without it: then the error is torch's own, one window later
    model.branch.requires_grad_(False)
    accumulator = mb.Accumulator(ddp, square_sum)
    accumulator.run(window)
    clear(model)
    refused(RuntimeError, "Expected to have finished reduction", lambda: accumulator.run(window))
    model = Branched()
    model.branch.requires_grad_(False)  # frozen before: DDP does not wait for it
    expected = reference(
        model,
        lambda: (
            sum(square_sum(model, x)[0] for mine in everyone for x in mine) / sum(2 * len(mine) for mine in everyone)
        ),
    )
    mb.Accumulator(DDP(model), square_sum).run(window)
    close(gradients(model), expected)


class Collectives(TorchDispatchMode):
    """Counts what is sent: the calls of c10d's operations."""

    count = 0

    def __torch_dispatch__(self, func: object, types: object, args: object = (), kwargs: object = None) -> object:
        self.count += str(func).startswith("c10d.")
        return func(*args, **(kwargs or {}))


def without_a_process_group_a_ddp_model_stays_in_this_process(world: int) -> None:
    batch, sizes = everything(sum(sizes_for(world))), sizes_for(world)
    mine = share_of(batch, sizes)
    model = tagger()  # with a buffer, which DDP would broadcast in each forward
    ddp = DDP(model)
    alone = mb.Accumulator(ddp, token_sum, micro_batch_size=2, process_group=None)
    together = mb.Accumulator(ddp, token_sum, micro_batch_size=2)
    everyones, own = expected_for(model, batch), expected_for(model, mine)
    with Collectives() as control:
        together.run(mine)
    assert control.count > 0
    close(gradients(model), everyones)
    clear(model)
    ddp(mine["tokens"]).sum().backward()  # in whose forward DDP sends its new order of buckets
    with Collectives() as sent:
        for _ in range(1 + dist.get_rank()):  # what ranks send to one another they would have to do equally often
            clear(model)
            model.calls.fill_(dist.get_rank())
            report = alone.run(mine)
            assert alone.evaluate(mine).num_samples == report.num_samples == len(mine["tokens"])
            assert float(model.calls) == dist.get_rank()
            close(gradients(model), own)
            clear(model)
            with mb.accumulate(
                mb.Window([mine]).cut(2), ddp, lambda b: mb.valid_tokens(b["labels"]), process_group=None
            ) as steps:
                for micro_batch, share in steps:
                    (token_sum(ddp, micro_batch)[0] * share).backward()
            close(gradients(model), own)
    assert sent.count == 0
    assert ddp.require_forward_param_sync
    assert ddp.require_backward_grad_sync
    clear(model)
    together.run(mine)
    close(gradients(model), everyones)


def control_the_textbook_loop_is_wrong_by_more_than_a_tenth(world: int) -> None:
    batch, sizes = everything(sum(sizes_for(world))), sizes_for(world)
    model = tagger()
    expected = expected_for(model, batch)
    ddp = DDP(model)
    micro_batches = list(mb.Window([share_of(batch, sizes)]).cut(2))
    micro_batches += micro_batches[-1:] * (4 - len(micro_batches))  # or the ranks would fall out of step
    for j, micro_batch in enumerate(micro_batches):
        ddp.require_backward_grad_sync = j == len(micro_batches) - 1
        (token_mean(ddp, micro_batch) / len(micro_batches)).backward()
    error = difference(gradients(model), expected)
    assert error > 0.1, f"the control differs by {error:.2e} only"


def claims_of(module: ModuleType) -> dict[str, Callable[[int], None]]:
    """Every function of a module that takes the number of ranks."""
    own = {
        name: value
        for name, value in vars(module).items()
        if getattr(value, "__annotations__", {}) == {"world": int, "return": None}
    }
    return {name: value for name, value in own.items() if value.__module__ == module.__name__}


def claims() -> dict[str, Callable[[int], None]]:
    """Every claim of this module."""
    return claims_of(sys.modules[__name__])


def main(rank: int, world: int, folder: str) -> None:
    """Run the claims on this rank and write for each nothing, or the traceback, or every stack where it hangs."""
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    torch.set_num_threads(1)
    timeout = datetime.timedelta(seconds=60)
    for name, claim in claims().items():
        gc.freeze()  # recovery collects garbage after every failure: not over all that was imported, too
        start = f"file://{folder}/{name}.start"  # a group for each claim: one that fails leaves its ranks out of step
        with Path(folder, f"{name}.{rank}").open("w+") as outcome:
            outcome.write(UNFINISHED)
            outcome.flush()
            faulthandler.dump_traceback_later(120, exit=True, file=outcome)  # after what the group's timeout ends
            dist.init_process_group("gloo", init_method=start, rank=rank, world_size=world, timeout=timeout)
            try:
                claim(world)
                text = ""
            except Exception:
                text = traceback.format_exc()
            # DDP goes before its group. As the last to hold it, it would wait for Gloo's threads with Python's lock in
            # its hand, and one of them may be waiting for that lock, to let go of the tensor it reduced last.
            gc.collect()
            dist.destroy_process_group()
            faulthandler.cancel_dump_traceback_later()
            outcome.seek(0)
            outcome.truncate()
            outcome.write(text)
