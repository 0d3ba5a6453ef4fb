"""Which random numbers a window's micro-batches draw: each its own, or with `rng="aligned"` the rows of the full batch.

What the full batch draws is told by its forward on fake tensors, which have shapes and no numbers: nothing is allocated
and nothing is drawn. Then each micro-batch takes its rows, see `aligned_random`.
"""

from collections.abc import Callable, Hashable, Sequence
from functools import partial
from typing import Any, Literal, ParamSpec, Protocol, TypeVar

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from macrobatch.aligned_random import AlignedRandom, Draws, recorded_draws
from macrobatch.autocasting import entered
from macrobatch.batch import Cut, Window
from macrobatch.coupling import coupled_layers
from macrobatch.modules import modules_of, submodules
from macrobatch.recipe import Recipe
from macrobatch.row_order import Applied, recorded_applications, refuse_other_orders
from macrobatch.structure import Nested, join, map_tensors, split, tensors
from macrobatch.substitution import Stage, held_tensors, substitute, unchanged
from macrobatch.window_kind import kind_of

P = ParamSpec("P")
T = TypeVar("T")
Rng = Literal["aligned"]
Forward = Callable[[Any, Nested], Any]  # (model, micro-batch)

MOST_KNOWN = 64  # windows of unlike shapes whose draws are remembered


class Rows(Protocol):
    """Where the forwards of one window take their random numbers from.

    `cuts_alike`: parts of a micro-batch draw what the whole of it would.
    """

    @property
    def cuts_alike(self) -> bool: ...  # noqa: D102

    def around(self, run: Callable[P, T], rows: Callable[P, range | None]) -> Callable[P, T]:
        """`run`, to be called for the samples `rows(...)` of the window; None where nothing is left to be drawn."""

    def in_order(self, run: Callable[P, T], num_samples: Callable[P, int]) -> Callable[P, T]:
        """`run`, to be called for all samples in order, each time for `num_samples(...)`; where it raises, again."""


Random = Callable[[Recipe, Forward, Window, torch.device | None], Rows]


class DrawnAnew:
    """Every forward draws random numbers of its own: runs are what they are."""

    cuts_alike = False

    def around(self, run: Callable[P, T], rows: Callable[P, range | None]) -> Callable[P, T]:
        """`run` itself."""
        return run

    def in_order(self, run: Callable[P, T], num_samples: Callable[P, int]) -> Callable[P, T]:
        """`run` itself."""
        return run


class FullBatchRows:
    """Every forward draws its rows of the full batch's random numbers. `forget`: called where they do not fit."""

    cuts_alike = True

    def __init__(self, random: AlignedRandom, forget: Callable[[], object]) -> None:
        self._random = random
        self._forget = forget

    def around(self, run: Callable[P, T], rows: Callable[P, range | None]) -> Callable[P, T]:
        """`run` with the random numbers of `rows(...)`."""

        def in_rows(*arguments: P.args, **options: P.kwargs) -> T:
            samples = rows(*arguments, **options)
            random = self._random.none() if samples is None else self._random.rows(samples.start, samples.stop)
            try:
                with random:
                    return run(*arguments, **options)
            except ValueError:
                self._forget()
                raise

        return in_rows

    def in_order(self, run: Callable[P, T], num_samples: Callable[P, int]) -> Callable[P, T]:
        """`run` with the random numbers of the samples that follow those of the last run that did not raise."""
        done = 0

        def following(*arguments: P.args, **options: P.kwargs) -> range:
            return range(done, done + num_samples(*arguments, **options))

        aligned = self.around(run, following)

        def in_rows(*arguments: P.args, **options: P.kwargs) -> T:
            nonlocal done
            result = aligned(*arguments, **options)
            done = following(*arguments, **options).stop
            return result

        return in_rows


def drawn_anew(recipe: Recipe, forward: Forward, window: Window, device: torch.device | None) -> Rows:
    """Every forward draws random numbers of its own."""
    return DrawnAnew()


class FullBatchRandom:
    """Every window draws what it would draw in one piece. Windows that are alike in all shapes are asked once."""

    def __init__(self) -> None:
        self._known: dict[Hashable, Draws] = {}

    def __call__(self, recipe: Recipe, forward: Forward, window: Window, device: torch.device | None) -> Rows:
        """From the present state of the random numbers on, `window` draws as in one `forward` of all its samples."""
        if window.num_samples == 0:  # a rank without samples
            return DrawnAnew()
        if device is None:
            raise ValueError(
                'rng="aligned" follows the random numbers of one device, and the model is spread over several: leave '
                "rng out"
            )
        kind = kind_of(recipe.everything, window)
        if kind not in self._known:
            if len(self._known) == MOST_KNOWN:
                self._known.clear()
            draws = draws_in_one_piece(recipe, forward, window)
            if draws.calls and window.num_samples > 1:
                refuse_other_orders(partial(_applied, recipe, forward, window, device), draws, window.num_samples)
            self._known[kind] = draws
        random = AlignedRandom(self._known[kind], window.num_samples, device)
        return FullBatchRows(random, partial(self._known.pop, kind, None))


def random_of(rng: Rng | None, cut: Cut | None) -> Random:
    """What `rng` asks for. ValueError for anything else, and where the full batch could not be put together."""
    if rng is None:
        return drawn_anew
    if rng != "aligned":
        raise ValueError(f"rng must be 'aligned' or None, got {rng!r}")
    if cut is not None:
        raise ValueError(
            'rng="aligned" joins the micro-batches of a window to the full batch, which a batch with a cut= of its own '
            "cannot be: give nested tensors, batch dimension first, or leave rng out"
        )
    return FullBatchRandom()


def draws_in_one_piece(recipe: Recipe, forward: Forward, window: Window) -> Draws:
    """What `forward` of all samples of `window` at once draws, told by fake tensors. ValueError where it cannot be."""
    modules = without_ddp(recipe.everything)
    anchor = nn.ParameterList([torch.empty(0, device=held_tensors(modules)[0].device)])  # a frozen model is evaluated
    stage = Stage([*modules, anchor], recipe.loss_fn, device=recipe.device)
    try:
        with stage.fakes() as (_, fake):
            batch = _in_one_piece([map_tensors(part, fake) for part in window], window.micro_batch_sizes)
            batch = map_tensors(batch, lambda leaf: leaf.to(stage.device))
            with entered(recipe.autocast, stage.device), recorded_draws() as draws:
                forward(without_ddp(recipe.model), batch)
    except ValueError:
        raise
    except Exception as error:
        raise ValueError(
            'rng="aligned" learns what the full batch draws from its forward on fake tensors, which have no numbers, '
            f"and there it failed, {type(error).__name__}: {str(error).strip()[:300]}. Where a model or a loss looks "
            "at values (.item(), boolean masks, if tensor: ...) random numbers cannot be aligned: leave rng out"
        ) from error
    return draws


def _applied(
    recipe: Recipe, forward: Forward, window: Window, device: torch.device, positions: Sequence[int]
) -> list[Applied]:
    """What the draws of `forward` of the samples at these positions are applied to; model and random numbers stay."""
    batch = join([_sample(window, position) for position in positions], [1] * len(positions))
    modules = without_ddp(recipe.everything)
    buffers = {id(b): b.clone() for module in modules for b in module.buffers()}
    with (
        unchanged([*submodules(modules), recipe.loss_fn]),
        torch.random.fork_rng([device] if device.type == "cuda" else []),
        entered(recipe.autocast, device),
    ):
        substitute(modules, lambda tensor: buffers.get(id(tensor), tensor))
        for found in coupled_layers(modules):
            found.layer.training = False  # or the rows of all samples would change with one
        with recorded_applications() as applied:
            forward(without_ddp(recipe.model), map_tensors(batch, lambda leaf: leaf.to(device)))
    return applied


def _sample(window: Window, position: int) -> Nested:
    """A batch of one sample."""
    for part, n in window.sized():
        if position < n:
            return split(part, [position, 1, n - position - 1], n=n)[1]
        position -= n
    raise IndexError(position)


def _in_one_piece(parts: list[Nested], sizes: Sequence[int]) -> Nested:
    """The full batch, laid out in memory as the micro-batches are: in that order random numbers are drawn."""
    batch = parts[0] if len(parts) == 1 else join(parts, sizes)
    split(batch, [sum(sizes)], n=sum(sizes))  # ValueError where it does not have as many rows
    likes = list(tensors(parts[0]))
    if len(likes) != sum(1 for _ in tensors(batch)):  # lists of samples
        return batch
    following = iter(likes)
    return map_tensors(batch, lambda leaf: _laid_out_like(leaf, next(following)))


def _laid_out_like(whole: Tensor, part: Tensor) -> Tensor:
    """A tensor in the shape of `whole`, its dimensions in memory in the order of those of `part`."""
    strides, size = [0] * whole.ndim, 1
    for k in sorted(range(whole.ndim), key=lambda k: (part.stride(k), -k)):  # the innermost first
        strides[k], size = size, size * whole.shape[k]
    return whole.new_empty_strided(whole.shape, strides)


def without_ddp(model: nn.Module | Sequence[nn.Module]) -> Any:
    """The model as one process has it: DDP would communicate in a forward that other ranks do not run."""
    inner = [m.module if isinstance(m, DistributedDataParallel) else m for m in modules_of(model)]
    return inner[0] if isinstance(model, nn.Module) else inner
