"""What a backward costs, by who calls the engine: python benchmarks/backward.py. The numbers of decision 0006.

Windows of K = 8 micro-batches of the small perceptron of overhead.py, run in turn in an order drawn anew for each
round, each right after one of its own kind. The ratio is to `(loss / K).backward()`: quartiles over rounds.
"""

from collections.abc import Callable
from typing import Any

import torch
from common import in_turns, machine, parsed, parser, quartiles, write
from overhead import K, hand_written, keep_memory, tiny_mlp
from torch import Tensor, nn
from torch.autograd import Variable, graph
from torch.nn import functional as F

Backward = Callable[[Tensor, Tensor], Any]


def by_the_public_function(loss: Tensor, seed: Tensor) -> None:
    """As anybody calls it."""
    torch.autograd.backward([loss], [seed])


def by_its_engine(loss: Tensor, seed: Tensor) -> None:
    """As macrobatch.engine does."""
    graph._engine_run_backward((loss,), (seed,), False, False, (), allow_unreachable=True, accumulate_grad=True)


def by_the_engine_alone(loss: Tensor, seed: Tensor) -> None:
    """Without what hands the compiler's settings to the threads of devices."""
    Variable._execution_engine.run_backward(
        (loss,), (seed,), False, False, (), allow_unreachable=True, accumulate_grad=True
    )


WAYS: dict[str, Backward] = {
    "torch.autograd.backward": by_the_public_function,
    "_engine_run_backward": by_its_engine,
    "the C++ engine": by_the_engine_alone,
}


def windows(model: nn.Module, batch: tuple[Tensor, Tensor], backward: Backward) -> Callable[[], None]:
    """A window whose micro-batches go backward by `backward`."""
    micro_batches = list(zip(batch[0].chunk(K), batch[1].chunk(K), strict=True))
    seed = torch.tensor(1 / K)

    def window() -> None:
        for inputs, targets in micro_batches:
            backward(F.cross_entropy(model(inputs), targets), seed)

    return window


def main() -> None:
    """Measure all ways, print them, and write them with machine and versions if --output says where."""
    arguments = parsed(parser(__doc__, rounds=400))
    keep_memory()
    torch.manual_seed(0)
    model, batch = tiny_mlp()
    by_hand = {name: hand_written(model, batch) for name in ("(loss / K).backward()", "again")}
    contestants = by_hand | {name: windows(model, batch, backward) for name, backward in WAYS.items()}
    seconds = in_turns(contestants, arguments.rounds, before=model.zero_grad, warmup=5, untimed=1)
    base = seconds.pop("(loss / K).backward()")
    results = machine() | {"K": K, "rounds": arguments.rounds}
    results |= {name: quartiles(each, base) for name, each in seconds.items()}
    print(results)
    write(results, arguments.output)


if __name__ == "__main__":
    main()
