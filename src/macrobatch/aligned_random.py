"""Random numbers of micro-batches that are those of the full batch: each draw is the full batch's, cut to its rows.

A forward of the full batch draws, at its c-th call, a tensor of shape F_c. In its place a micro-batch, samples `start`
to `stop` of N, draws a tensor of shape F_c from the same state, and takes the rows that are its own. So dropout has the
masks of the full batch, and the random numbers that follow are those that follow the full batch. It costs the random
numbers of the full batch once for each micro-batch, and for a moment the memory of the largest of these draws.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from macrobatch.state import RandomState

aten = torch.ops.aten
Shape = tuple[int, ...]

IN_PLACE = ("bernoulli_", "uniform_", "normal_", "exponential_", "random_", "log_normal_", "geometric_", "cauchy_")
LIKE = ("rand_like", "randn_like", "randint_like")
OF_SIZE = {"rand": 0, "randn": 0, "randint": -1}  # where the size stands among the arguments: first, or last


@dataclass(frozen=True)
class Draw:
    """One call. `strides`: of the tensor that it fills or is like, because numbers are drawn in order of memory."""

    name: str
    shape: Shape
    strides: Shape | None


@dataclass
class Draws:
    """What one forward of the full batch drew, in order."""

    calls: list[Draw] = field(default_factory=list)


@contextmanager
def recorded_draws() -> Iterator[Draws]:
    """The draws of the forward inside are recorded; it may run on fake tensors, where the real batch does not fit.

    ValueError for a draw that could not be cut into rows; see `aligned_rows`.
    """
    draws = Draws()
    with _Recording(draws):
        yield draws


class AlignedRandom:
    """From the present state of the random numbers on, micro-batches draw what the full batch would draw.

    `draws`: those of a forward of all `num_samples` samples. `device`: whose random numbers count beside the CPU's.
    """

    def __init__(self, draws: Draws, num_samples: int, device: torch.device | None = None) -> None:
        self._draws = draws
        self._num_samples = num_samples
        self._device = device
        self._beginning = RandomState(device)

    @contextmanager
    def rows(self, start: int, stop: int) -> Iterator[None]:
        """The forward inside, of samples `start` to `stop`, draws their rows of the full batch's random numbers.

        Run its backward inside, too. Afterwards random numbers are as after the full batch's forward. ValueError for a
        forward that draws otherwise than the full batch did, and for draws that have no rows: those that depend on
        values (multinomial), orders (randperm), generators of their own, and kernels that draw inside (fused attention
        with dropout, cuDNN's LSTM with dropout). A forward that is run again in backward (checkpointing) draws again
        and is refused for that. Rows are taken to be those of the samples in their order, several of one sample side by
        side (samples × heads): `row_order` tells whether they are.
        """
        if not 0 <= start < stop <= self._num_samples:
            raise ValueError(f"rows {start} to {stop} were asked of a full batch of {self._num_samples} samples")
        self._beginning.restore()
        mode = _Cutting(self._draws, self._num_samples, range(start, stop), self._device)
        with mode:
            yield
        mode.refuse_hidden_draws()
        if mode.position != len(self._draws.calls):
            raise ValueError(
                f"samples {start} to {stop} drew {mode.position} times, the full batch {len(self._draws.calls)} times: "
                "random numbers cannot be aligned where how often they are drawn depends on the batch"
            )

    @contextmanager
    def none(self) -> Iterator[None]:
        """Nothing is drawn inside, where a backward runs apart from its forward. ValueError where something is."""
        mode = _Cutting(self._draws, self._num_samples, range(0), self._device)
        mode.position = len(self._draws.calls)
        with mode:
            yield
        mode.refuse_hidden_draws()


class _Recording(TorchDispatchMode):
    def __init__(self, draws: Draws) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._draws = draws

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if draws_numbers(func, args, kwargs):
            strides = None if _name(func) in OF_SIZE else tuple(args[0].stride())
            self._draws.calls.append(Draw(_name(func), drawn_shape(func, args), strides))
        return func(*args, **kwargs)


class _Cutting(TorchDispatchMode):
    def __init__(self, draws: Draws, num_samples: int, samples: range, device: torch.device | None) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.position = 0
        self._calls = draws.calls
        self._num_samples = num_samples
        self._samples = samples
        self._device = device
        self._after = RandomState(device)  # the last draw

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if not draws_numbers(func, args, kwargs):
            return func(*args, **kwargs)
        whole = self._next(_name(func), drawn_shape(func, args))
        self.refuse_hidden_draws()
        result = self._draw(func, args, kwargs, whole)
        self._after = RandomState(self._device)
        return result

    def _draw(self, func: Any, args: Any, kwargs: Any, whole: Draw) -> Any:
        shape = drawn_shape(func, args)
        if whole.shape == shape:  # noise that does not belong to samples: the same for all of them
            return func(*args, **kwargs)
        dimension = growing_dimension(shape, len(self._samples), whole, self._num_samples)
        share = shape[dimension] // len(self._samples)  # rows of each sample
        rows = slice(self._samples.start * share, self._samples.stop * share)

        def cut(tensor: Tensor) -> Tensor:
            return tensor[(slice(None),) * dimension + (rows,)]

        return _drawn(func, args, kwargs, whole, cut)

    def refuse_hidden_draws(self) -> None:
        """ValueError if the random numbers went on since the last draw that was seen."""
        if not self._after.is_present():
            raise ValueError(
                "random numbers were drawn or seeded where it could not be seen (torch.compile, a kernel of its own, "
                "torch.manual_seed in the forward): they cannot be those of the full batch"
            )

    def _next(self, name: str, shape: Shape) -> Draw:
        if self.position == len(self._calls):
            raise ValueError(
                f"a micro-batch draws more often than the full batch, which drew {len(self._calls)} times, the last "
                f"time by {name}: is its forward run again in backward (checkpointing)?"
            )
        whole = self._calls[self.position]
        self.position += 1
        if whole.name != name:
            raise ValueError(
                f"a micro-batch draws by {name} {shape} where the full batch drew by {whole.name} {whole.shape}"
            )
        return whole


def growing_dimension(shape: Shape, n: int, whole: Draw, num_samples: int) -> int:
    """The dimension of a draw, of `shape` for `n` samples, that grows with the samples. ValueError if there is none."""
    differing = [k for k, (a, b) in enumerate(zip(shape, whole.shape, strict=False)) if a != b]
    if len(shape) == len(whole.shape) and len(differing) == 1:
        (k,) = differing
        if shape[k] % n == 0 and shape[k] * num_samples == whole.shape[k] * n:
            return k
    raise ValueError(
        f"{whole.name} draws {shape} for {n} samples and {whole.shape} for {num_samples}: no single dimension grows "
        "with the samples, so there are no rows to take"
    )


def _drawn(func: Any, args: Any, kwargs: Any, whole: Draw, cut: Callable[[Tensor], Tensor]) -> Any:
    """What `func` would give for the rows that `cut` takes of the draw `whole`."""
    name = _name(func)
    if name in OF_SIZE:
        position = OF_SIZE[name] % len(args)
        return cut(func(*args[:position], list(whole.shape), *args[position + 1 :], **kwargs)).clone()
    full = args[0].new_empty_strided(whole.shape, whole.strides)
    if name in IN_PLACE:
        return args[0].copy_(cut(func(full, *args[1:], **kwargs)))
    if name in LIKE:
        return cut(func(full, *args[1:], **kwargs)).clone()
    x, p, train = args  # native_dropout
    _, mask = func(full.fill_(1), p, train)
    mask = cut(mask).clone()
    return x * mask * (0.0 if p == 1 else 1 / (1 - p)), mask


def draws_numbers(func: Any, args: Any, kwargs: Any) -> bool:
    """Whether `func` draws random numbers. ValueError for one whose draws cannot be cut into rows."""
    if torch.Tag.nondeterministic_seeded not in func.tags:
        return False
    name = _name(func)
    if kwargs.get("generator") is not None:
        raise ValueError(f"{name} draws from a torch.Generator of its own: random numbers of such are not aligned")
    if name == "native_dropout":
        return bool(args[2] is not False and args[1] > 0)
    depends = any(isinstance(argument, Tensor) for argument in args[1:]) or "out" in kwargs
    if name in (*IN_PLACE, *LIKE, *OF_SIZE) and not depends:
        return True
    probability = kwargs.get("dropout_p", _dropout_of(func, args))
    if probability == 0:
        return False
    advice = "" if probability is None else ". For attention choose torch.nn.attention.SDPBackend.MATH"
    raise ValueError(
        f"{name} draws random numbers in a way that has no rows (by values, by order, or inside a kernel): they cannot "
        f"be those of the full batch{advice}"
    )


def _dropout_of(func: Any, args: Any) -> Any:
    """The argument by which a fused kernel drops out; None for a function without one, which draws in any case."""
    names = [argument.name for argument in func._schema.arguments]
    for key in ("dropout_p", "dropout"):
        if key in names:
            position = names.index(key)
            return args[position] if position < len(args) else func._schema.arguments[position].default_value
    return None


def _name(func: Any) -> str:
    return str(func.overloadpacket.__name__)


def drawn_shape(func: Any, args: Any) -> Shape:
    """The shape of what a call of `func` that draws random numbers draws."""
    name = _name(func)
    if name in OF_SIZE:
        return tuple(args[OF_SIZE[name] % len(args)])
    return tuple(args[0].shape)
