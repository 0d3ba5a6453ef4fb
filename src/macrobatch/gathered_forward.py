"""The first forward of every micro-batch: outputs without graphs, but for the last few, and how to run each again."""

import gc
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import Any

import torch

from macrobatch.alignment import DrawnAnew, Random, Rows
from macrobatch.autocasting import entered
from macrobatch.batch import Window
from macrobatch.call_notes import note_call
from macrobatch.devices import on_device
from macrobatch.distributed import GradientReduction
from macrobatch.gathering import Outputs, joined, outputs_of
from macrobatch.recipe import Recipe
from macrobatch.recovery import Attempt, Recovery, is_out_of_memory
from macrobatch.replay import Beginning, Replay
from macrobatch.state import Beginnings
from macrobatch.structure import Nested

Encode = Callable[[Any, Nested], Nested]
Forward = Callable[[Nested, int], tuple[Beginning, Outputs]]


@dataclass(eq=False)
class Piece:
    """A micro-batch, or a part of one, as its first forward ran it.

    `source`: position of the micro-batch in the window; `start`: of the first sample. `outputs`: without a graph, until
    they are joined. `kept`: the micro-batch and its outputs with their graph. `sizes`: samples in each part that the
    backward ran.
    """

    source: int
    start: int
    num_samples: int
    beginning: Beginning
    outputs: Outputs | None
    kept: tuple[Nested, Outputs] | None = None
    sizes: list[int] = field(default_factory=list)


class Encoder:
    """Runs `encode` on micro-batches, under autocast, and checks what it returns. `is_first`: in the first window."""

    def __init__(self, recipe: Recipe, encode: Encode, home: torch.device, *, is_first: bool = False) -> None:
        self.recipe = recipe
        self.encode = encode
        self.home = home
        self._is_first = is_first

    def __call__(self, micro_batch: Nested, num_samples: int) -> Outputs:
        """The outputs of one micro-batch."""
        if num_samples == 0:
            raise ValueError("a micro-batch of the window holds no samples: leave it out")
        with self.around_forward():
            try:
                outputs = self.encode(self.recipe.model, micro_batch)
            except Exception as error:
                if self._is_first:
                    note_call(error, "encode", micro_batch)
                raise
            return outputs_of(outputs, num_samples)

    def around_forward(self) -> AbstractContextManager[Any]:
        """The autocast that was asked for, to be entered."""
        if torch.is_grad_enabled():
            torch.clear_autocast_cache()  # an autocast around everything may hold weights that were cast without graph
        return entered(self.recipe.autocast, self.home)


class FirstForwards:
    """The pieces of one window, in order, and the graphs that are kept of them.

    `rows`: whose random numbers they draw. `num_let_go`: how often graphs were let go to make room.
    """

    def __init__(
        self, encoder: Encoder, replay: Replay, random: Random, beginnings: Beginnings, device: torch.device | None
    ) -> None:
        self.encoder = encoder
        self.replay = replay
        self.rows: Rows = DrawnAnew()
        self.pieces: list[Piece] = []
        self.num_let_go = 0
        self._random = random
        self._beginnings = beginnings  # remembered before each attempt by the recovery
        self._device = device

    def run(self, window: Window, keep: int, recovery: Recovery, reduction: GradientReduction) -> None:
        """`pieces` holds the outputs of every micro-batch, and the graphs of the last `keep` of them."""
        self.pieces = []
        self.rows = self._random(self.encoder.recipe, self.encoder.encode, window, self._device)
        forward = self.rows.around(self._forward, self._following)
        first_kept = len(window) - keep if keep > 1 else None  # with one or none a window may fill while it runs
        for source, (micro_batch, n, is_last) in enumerate(on_device(window.sized(), self._device)):
            keeps = keep > 0 and (is_last if first_kept is None else source >= first_kept)

            def step(attempt: Attempt, source: int = source, keeps: bool = keeps) -> None:
                reduction.announce(False, is_retry=recovery.retries > 0)
                piece = self._piece(forward, attempt, source, keeps)
                if piece is None:  # the error is gone, and with it what it held; so are the kept graphs
                    self._beginnings.return_to_micro_batch()
                    piece = self._piece(forward, attempt, source, keeps)
                assert piece is not None
                self.pieces.append(piece)

            recovery.run(micro_batch, n, is_last, step)
            del micro_batch

    def _piece(self, forward: Forward, attempt: Attempt, source: int, keeps: bool) -> Piece | None:
        """None if it ran out of memory while graphs were kept, which now are not."""
        try:
            with torch.set_grad_enabled(keeps):
                beginning, outputs = forward(attempt.micro_batch, attempt.num_samples)
            kept = (attempt.micro_batch, outputs) if keeps else None
            n = attempt.num_samples
            return Piece(source, self._following(None, n).start, n, beginning, outputs.detached(), kept)
        except RuntimeError as error:
            if not (is_out_of_memory(error) and self.holds_graphs):
                raise
        self.let_graphs_go()
        return None

    def _forward(self, micro_batch: Nested, num_samples: int) -> tuple[Beginning, Outputs]:
        """The outputs of a forward, and what it began from."""
        with self.replay.first() as beginning:
            return beginning, self.encoder(micro_batch, num_samples)

    def _following(self, micro_batch: Nested, num_samples: int) -> range:
        """The positions in the window of a micro-batch that follows all pieces."""
        start = self.pieces[-1].start + self.pieces[-1].num_samples if self.pieces else 0
        return range(start, start + num_samples)

    @property
    def holds_graphs(self) -> bool:
        """Whether some graph is kept."""
        return any(piece.kept is not None for piece in self.pieces)

    def let_graphs_go(self) -> None:
        """No graph is kept: their memory is free, and their forwards will run again."""
        for piece in self.pieces:
            piece.kept = None
        self.num_let_go += 1
        gc.collect()
        if self.encoder.home.type == "cuda":
            torch.cuda.empty_cache()

    def own(self) -> Outputs:
        """The outputs of this rank's samples, in one; pieces keep none."""
        parts = [piece.outputs for piece in self.pieces if piece.outputs is not None]
        for piece in self.pieces:
            piece.outputs = None
        return joined(parts) if parts else Outputs(None, [], 0)
