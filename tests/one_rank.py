"""What the one process of test_distributed.py runs: DistributedDataParallel in a group of one, as by torchrun."""

import sys
from collections.abc import Callable

import ranks
import torch
from helpers import clear, gradients, reference
from ranks import Branched, branched_samples, close, square_sum
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel as DDP

import macrobatch as mb

OPTIONS: tuple[dict[str, bool], ...] = (
    {},
    {"gradient_as_bucket_view": True},
    {"find_unused_parameters": True},
    {"static_graph": True},
)


def samples(takes_branch: Callable[[int, int], bool]) -> Tensor:
    (micro_batches,) = branched_samples(takes_branch, 1)
    return torch.cat(micro_batches)


def out_of_memory_is_recovered_in_every_forward_and_backward(world: int) -> None:
    x = samples(lambda rank, j: True)
    for options in OPTIONS[:3]:  # within a static graph DDP reduces in every backward: a stated limit
        model = Branched()
        expected = reference(model, lambda m=model: square_sum(m, x)[0] / len(x))
        ddp, fails = DDP(model, **options), {"in": "", "left": 0}

        def fail(where: str, fails: dict[str, object] = fails) -> None:
            if fails["in"] == where:
                fails["left"] -= 1
                if fails["left"] == 0:
                    raise torch.OutOfMemoryError("injected")

        def loss_fn(m: nn.Module, b: Tensor, model: Branched = model, fail: Callable[[str], None] = fail) -> object:
            loss, num_samples = square_sum(m, b)
            fail("forward")
            return loss, num_samples

        def in_backward(
            module: nn.Module, arguments: object, output: Tensor, fail: Callable[[str], None] = fail
        ) -> None:
            output.register_hook(lambda _: fail("backward"))

        model.main.register_forward_hook(in_backward)
        accumulator = mb.Accumulator(ddp, loss_fn, micro_batch_size=2)
        for where in ("", "forward", "backward"):
            for left in (1, 2, 3):  # the last of 3 micro-batches, too, in which DDP of several processes communicates
                clear(model)
                fails.update({"in": where, "left": left})
                accumulator._limit.__init__(2)  # type: ignore[misc]
                report = accumulator.run(x)
                assert report.retries == (1 if where else 0), (options, where, left)
                close(gradients(model), expected)


def after_an_exception_the_next_window_is_right(world: int) -> None:
    x = samples(lambda rank, j: True)
    for options in OPTIONS:
        model = Branched()
        expected = reference(model, lambda m=model: square_sum(m, x)[0] / len(x))
        fails = [True]

        def loss_fn(m: nn.Module, b: Tensor, fails: list[bool] = fails) -> object:
            loss = square_sum(m, b)
            if fails:
                fails.clear()
                raise KeyboardInterrupt
            return loss

        accumulator = mb.Accumulator(DDP(model, **options), loss_fn, micro_batch_size=2)
        try:
            accumulator.run(x)
        except KeyboardInterrupt:
            accumulator.run(x)
        close(gradients(model), expected)


def a_parameter_that_some_micro_batches_do_not_reach_is_right(world: int) -> None:
    for reached_in in (0, 2, None):
        (micro_batches,) = branched_samples(lambda rank, j, k=reached_in: j == k, world)
        window = mb.Window(micro_batches)
        for options in OPTIONS[:3]:  # a static graph is a promise that there are no such parameters
            model = Branched()
            expected = reference(
                model, lambda m=model, w=micro_batches: sum(square_sum(m, x)[0] for x in w) / sum(map(len, w))
            )
            ddp = DDP(model, **options)
            accumulator = mb.Accumulator(ddp, square_sum)
            for _ in range(2):
                clear(model)
                accumulator.run(window)
                close(gradients(model), expected)
                clear(model)
                with mb.accumulate(window, ddp) as steps:
                    for x, share in steps:
                        (square_sum(ddp, x)[0] * share).backward()
                close(gradients(model), expected)


CLAIMS = ranks.claims_of(sys.modules[__name__])


if __name__ == "__main__":
    ranks.claims = lambda: CLAIMS
    ranks.main(int(sys.argv[1]), int(sys.argv[2]), sys.argv[3])
