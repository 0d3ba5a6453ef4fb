"""Whether the rows of a draw are the samples in their order, so that a micro-batch's rows of it can be told.

Two samples are run again and again, from the same random numbers: (a, a), then for other samples (a, o) and (o, a). A
draw is applied to a tensor: it is multiplied with it, added to it. The rows of that tensor that change with a sample
are that sample's. Where they are not those of its position (sorted by length, flipped, views or time steps stacked) the
rows that a micro-batch takes would be those of other samples. Since a stands twice in the first run, a sort moves rows
in (a, o) or in (o, a), whatever it sorts by, unless both are equal in it.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from macrobatch.aligned_random import Draw, Draws, drawn_shape, draws_numbers, growing_dimension


@dataclass(eq=False)
class Applied:
    """A draw of `shape`, and a copy of what it was first applied to; None where that is not seen."""

    shape: tuple[int, ...]
    to: Tensor | None = None


Run = Callable[[Sequence[int]], list[Applied]]  # of the samples at these positions of the window


@contextmanager
def recorded_applications() -> Iterator[list[Applied]]:
    """What the draws of the forward inside are applied to, in order."""
    mode = _Watching()
    with mode:
        yield mode.applied


def refuse_other_orders(run: Run, draws: Draws, num_samples: int) -> None:
    """ValueError if rows of `draws`, those of a forward of all `num_samples`, are not the samples in their order."""
    n = 2 if num_samples != 2 else 3  # otherwise the dimension that grows could not be told
    first = 0
    same = run([first] * n)
    for other in sorted({num_samples // 2, num_samples - 1} - {first}):
        for position in (0, n - 1):
            samples = [other if j == position else first for j in range(n)]
            for before, after, whole in zip(same, run(samples), draws.calls, strict=False):
                if not _in_order(before, after, whole, position, n, num_samples):
                    raise ValueError(_message(whole))


def _in_order(before: Applied, after: Applied, whole: Draw, position: int, n: int, num_samples: int) -> bool:
    """Whether only rows of the sample at `position` differ. True also where all do, as samples see each other."""
    x, y = before.to, after.to
    if x is None or y is None or x.shape != y.shape or before.shape != after.shape or before.shape == whole.shape:
        return True
    dimension = growing_dimension(before.shape, n, whole, num_samples) - len(before.shape)  # from the last
    rows = before.shape[dimension]
    if x.ndim < -dimension or x.shape[dimension] != rows:
        return True
    differs = ((x != y) & ~((x != x) & (y != y))).movedim(dimension, 0).reshape(rows, -1).any(1)
    share = rows // n
    own = differs[position * share : (position + 1) * share]
    return bool(differs.all() | (differs.sum() == own.sum()))


def _message(whole: Draw) -> str:
    return (
        f"{whole.name} draws {whole.shape} for rows that are not the samples in their order, so a micro-batch would "
        'take the rows of other samples. rng="aligned" needs all rows of the first sample first, then those of the '
        "second, ...: draw before samples are sorted or flipped; stack views or time steps with torch.stack(views, 1), "
        "x.repeat_interleave(2, 0) or (samples, time, ...) instead of torch.cat(views), x.repeat(2, 1) or (time, "
        "samples, ...); or leave rng out"
    )


class _Watching(TorchDispatchMode):
    """Follows what is made of draws alone, in their shape, until it meets another tensor."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.applied: list[Applied] = []
        self._drawn: dict[int, tuple[Tensor, Applied]] = {}  # with the tensor, so that its id stays its own

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if draws_numbers(func, args, kwargs):
            draw = Applied(drawn_shape(func, args))
            self.applied.append(draw)
            if func.overloadpacket is torch.ops.aten.native_dropout:
                draw.to = args[0].detach().clone()
                return func(*args, **kwargs)
            return self._follow(func(*args, **kwargs), draw)
        given = [argument for argument in args if isinstance(argument, Tensor)]
        drawn = [self._drawn[id(tensor)][1] for tensor in given if id(tensor) in self._drawn]
        others = [tensor for tensor in given if id(tensor) not in self._drawn and tensor.ndim]
        for draw in drawn if others else ():
            draw.to = others[0].detach().clone() if draw.to is None else draw.to
        result = func(*args, **kwargs)
        return self._follow(result, drawn[0]) if drawn and not others else result

    def _follow(self, result: Any, draw: Applied) -> Any:
        if isinstance(result, Tensor) and result.shape == draw.shape:
            self._drawn[id(result)] = result, draw
        return result
