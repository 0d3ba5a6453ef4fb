"""The backward of every micro-batch from its outputs' gradients: through its kept graph, or its forward run again."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from macrobatch.batch import Cut, Window, cut_batch
from macrobatch.devices import on_device
from macrobatch.distributed import GradientReduction
from macrobatch.gathered_forward import FirstForwards, Piece
from macrobatch.gathering import Outputs
from macrobatch.leaves import StrayLeaves, has_nested_backward
from macrobatch.recovery import Attempt, RunAgain, is_out_of_memory
from macrobatch.seeds import Learned
from macrobatch.state import coupled_layer
from macrobatch.structure import Nested


class StartOver(Exception):
    """A micro-batch is too large for its backward, and halves of it would not be what its first forward was."""


@dataclass
class Job:
    """What the backward of a piece needs, or of a part of it: `gradients` of its outputs, None where there is none.

    `start`: position of its first sample in the window.
    """

    micro_batch: Nested
    start: int
    num_samples: int
    gradients: list[Tensor | None]
    piece: Piece
    graph: Outputs | None = None


def rows_of(attempt: Attempt) -> range | None:
    """The samples whose forward an attempt at a job runs; None where its graph is there."""
    job: Job = attempt.micro_batch
    return range(job.start, job.start + job.num_samples) if job.graph is None else None


class Backwards:
    """The second half of a window: `jobs` in order, each to be run by `step` under a Recovery that cuts with `cut`."""

    def __init__(
        self,
        first: FirstForwards,
        gradients: Sequence[Tensor | None],
        learned: Learned,
        parameters: Sequence[nn.Parameter],
        reduction: GradientReduction,
        own_cut: Cut | None,
    ) -> None:
        self._first = first
        self._gradients = gradients
        self._learned = learned
        self._parameters = parameters
        self._reduction = reduction
        self._own_cut = own_cut
        self._couples = coupled_layer(first.encoder.recipe.everything) is not None
        self._strays: StrayLeaves | None = None

    def jobs(self, window: Window, device: torch.device | None) -> Iterator[Job]:
        """Pieces whose graph was kept first, the last one first of all, which frees memory soonest; then the others."""
        pieces = self._first.pieces
        sizes = [piece.num_samples for piece in pieces]
        split = [[None] * len(sizes) if g is None else g.split(sizes) for g in self._gradients]
        jobs = [Job(None, p.start, p.num_samples, [g[i] for g in split], p) for i, p in enumerate(pieces)]
        for job in reversed(jobs):
            job.piece.sizes = []
            if job.piece.kept is not None:
                (job.micro_batch, job.graph), job.piece.kept = job.piece.kept, None
                yield job
        again = [job for job in jobs if not job.piece.sizes]
        parts = on_device(self._parts(window, again), device)
        for job, (micro_batch, _, _) in zip(again, parts, strict=True):
            job.micro_batch = micro_batch
            yield job
            job.micro_batch = micro_batch = None

    def _parts(self, window: Window, jobs: Sequence[Job]) -> Iterator[tuple[Nested, int]]:
        """The micro-batches of these jobs, cut from the window's as they were in their first forward."""
        wanted = {id(job.piece) for job in jobs}
        by_source: dict[int, list[Piece]] = {}
        for piece in self._first.pieces:
            by_source.setdefault(piece.source, []).append(piece)
        for source, (micro_batch, _) in enumerate(window.sized()):
            pieces = by_source[source]
            if not any(id(piece) in wanted for piece in pieces):
                continue
            sizes = [piece.num_samples for piece in pieces]
            cut = [micro_batch] if len(pieces) == 1 else cut_batch(micro_batch, sizes, self._own_cut)
            for piece, part in zip(pieces, cut, strict=True):
                if id(piece) in wanted:
                    yield part, piece.num_samples

    def cut(self, job: Job, start: int, stop: int) -> Job:
        """Samples `start` to `stop` of a job. StartOver if they cannot be run apart from the others as they were."""
        if (job.piece.beginning.draws and not self._first.rows.cuts_alike) or self._couples:
            raise StartOver
        part = cut_batch(job.micro_batch, [start, stop - start, job.num_samples - stop], self._own_cut)[1]
        gradients = [None if g is None else g[start:stop] for g in job.gradients]
        return Job(part, job.start + start, stop - start, gradients, job.piece)

    def step(self, attempt: Attempt) -> None:
        """The job has added its part to `p.grad`. RunAgain if it failed while graphs were kept, which are gone now."""
        job: Job = attempt.micro_batch
        outputs, job.graph = job.graph, None
        roots: list[Tensor] = []
        try:
            if outputs is None:
                self._reduction.announce(False, is_retry=True)  # the first forward has broadcast the buffers
                with self._first.replay.again(job.piece.beginning):
                    outputs = self._first.encoder(job.micro_batch, job.num_samples)
            roots, seeds = self._roots(outputs, job)
            del outputs
            if attempt.inputs != []:
                attempt.started_backward = True
                torch.autograd.backward(roots, seeds, inputs=attempt.inputs)
            job.piece.sizes.append(job.num_samples)
            return
        except RuntimeError as error:
            attempt.can_mend = not (self._couples or has_nested_backward(roots))
            if not (is_out_of_memory(error) and self._first.holds_graphs):
                raise
        del roots, seeds
        self._first.let_graphs_go()
        raise RunAgain

    def refuse_strays(self) -> None:
        """ValueError if the first graph, gone by now, had leaves outside of the model that live on."""
        if self._strays is not None:
            self._strays.refuse_survivors()
            self._strays, self._learned.knows_leaves = None, True

    def _roots(self, outputs: Outputs, job: Job) -> tuple[list[Tensor], list[Tensor]]:
        """The outputs that depend on parameters and that the loss depends on, and the loss's gradients by them."""
        rows = zip(outputs.rows, job.gradients, strict=True)
        pairs = [(row, g) for row, g in rows if g is not None and row.requires_grad]
        if not pairs:
            raise ValueError(
                "no output of encode that the loss uses depends on a trainable parameter: was it detached, or "
                "computed under torch.no_grad()?"
            )
        roots = [row for row, _ in pairs]
        if not self._learned.knows_leaves and self._strays is None:
            self._strays = StrayLeaves(roots, self._parameters, self._first.encoder.encode)
        return roots, [g for _, g in pairs]
