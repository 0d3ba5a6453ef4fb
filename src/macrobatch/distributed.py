"""Who talks when: sums and agreement over ranks, and the reduction of a window's gradients.

One process is the same code with a group of one. Gradients of parameters inside a DistributedDataParallel are reduced
by it, once per window, overlapped with the last micro-batch's backward, and right after it where that backward does not
reach them. Everything else is reduced explicitly, later: parameters outside of DDP (a temperature in the loss),
gradients kept in float32 that DDP's buckets reject, and all of them in a window in which some rank has no micro-batch.
"""

from collections.abc import Callable, Iterable, Sequence
from types import TracebackType
from typing import Literal

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.weak import TensorWeakRef

Auto = Literal["auto"]
AUTO: Auto = "auto"
GroupChoice = dist.ProcessGroup | None | Auto

BUCKET_BYTES = 25 * 2**20  # as DDP's default: large enough for bandwidth, small beside the gradients


def is_distributed() -> bool:
    """Whether a default process group was started."""
    return dist.is_available() and dist.is_initialized()


class Ranks:
    """Sums and agreement over the ranks of a process group; with None, of this process alone."""

    def __init__(self, group: dist.ProcessGroup | None) -> None:
        self.group = group
        self.size = 1 if group is None else dist.get_world_size(group)
        self.rank = 0 if group is None else dist.get_rank(group)

    @classmethod
    def of(cls, choice: GroupChoice, replicas: Sequence[DistributedDataParallel] = ()) -> "Ranks":
        """The ranks of `choice`; "auto" means the group of the DDP modules, else all processes, if any were started."""
        if choice != AUTO:
            return cls(choice)
        if not is_distributed():
            return cls(None)
        group = replicas[0].process_group if replicas else dist.group.WORLD
        return cls(group if dist.get_world_size(group) > 1 else None)

    @property
    def device(self) -> torch.device:
        """Where this group's collectives want their tensors."""
        if self.group is None or "nccl" not in dist.get_backend(self.group):
            return torch.device("cpu")
        return torch.device("cuda", torch.cuda.current_device())

    def sum(self, values: Tensor) -> Tensor:
        """The elementwise sum of `values` over ranks, on the device of `values`."""
        return self._reduce(values, dist.ReduceOp.SUM)

    def maximum(self, values: Tensor) -> Tensor:
        """The elementwise maximum of `values` over ranks, on the device of `values`."""
        return self._reduce(values, dist.ReduceOp.MAX)

    def any(self, flag: bool) -> bool:
        """Whether `flag` is true on some rank: the same answer on every rank."""
        return self.any_of(flag)[0]

    def any_of(self, *flags: bool) -> tuple[bool, ...]:
        """For each flag whether it is true on some rank: the same answers on every rank."""
        if self.size == 1:
            return flags
        return tuple(flag > 0 for flag in self.maximum(torch.tensor(flags, dtype=torch.int32)).tolist())

    def all(self, flag: bool) -> bool:
        """Whether `flag` is true on every rank: the same answer on every rank."""
        return not self.any(not flag)

    def union(self, names: Iterable[str]) -> tuple[str, ...]:
        """The names that any rank gave, in the same order on every rank."""
        own = list(dict.fromkeys(names))
        if self.size == 1:
            return tuple(own)
        everyone: list[list[str]] = [[] for _ in range(self.size)]
        dist.all_gather_object(everyone, own, group=self.group)
        return tuple(dict.fromkeys(name for theirs in everyone for name in theirs))

    def _reduce(self, values: Tensor, operation: dist.ReduceOp.RedOpType) -> Tensor:
        if self.size == 1:
            return values
        reduced = values.to(self.device, copy=True)
        dist.all_reduce(reduced, op=operation, group=self.group)
        return reduced.to(values.device)


class GradientReduction:
    """Within the context, DDP communicates only in the micro-batch announced as the last; `finish` does the rest.

    In a group of one it never does, nor where `ranks` are this process alone.

    `overlaps`: whether DDP may reduce in the last backward: not where a rank has no micro-batch, nor where gradients
    are of another dtype than the parameters. What DDP was set to is put back at the end.
    """

    def __init__(
        self, replicas: Sequence[DistributedDataParallel], ranks: Ranks, overlaps: bool, everyone_runs: bool
    ) -> None:
        # In a group of one a static graph is left to DDP, which cannot be told to wait and talks to nobody.
        self._replicas = [ddp for ddp in replicas if not ddp.static_graph or _has_others(ddp)]
        self._ranks = ranks
        self._overlaps = overlaps and everyone_runs and ranks.size > 1
        self._everyone_runs = everyone_runs
        self._awaited: list[tuple[nn.Parameter, Callable[[], Tensor | None], int | None]] = []

    def __enter__(self) -> "GradientReduction":
        if torch.is_grad_enabled() and any(ddp.static_graph for ddp in self._replicas):
            raise ValueError(
                "a DistributedDataParallel with static_graph=True reduces in the first backward that it sees, and an "
                "effective batch has its gradient after the last: leave static_graph out (find_unused_parameters=True "
                "where some parameters get no gradient, use_reentrant=False for checkpoints)"
            )
        self._before = [(ddp.require_backward_grad_sync, ddp.require_forward_param_sync) for ddp in self._replicas]
        for ddp in self._replicas:
            ddp.require_backward_grad_sync = False
            if self._ranks.size == 1:
                ddp.require_forward_param_sync = False  # DDP's group may have other ranks, which hear nothing of this
            elif not self._everyone_runs:  # a rank without a forward would be missing in what DDP communicates there
                ddp.require_forward_param_sync = False  # the broadcast of buffers
                ddp.reducer._rebuild_buckets()  # the new order of buckets, once after the first reduction
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for ddp, (backward_sync, forward_sync) in zip(self._replicas, self._before, strict=True):
            ddp.require_backward_grad_sync = backward_sync
            ddp.require_forward_param_sync = forward_sync

    def announce(self, is_last: bool, is_retry: bool = False) -> None:
        """What comes next: the last forward and backward of the window on this rank, or another; `is_retry`: again."""
        for ddp in self._replicas:
            ddp.require_backward_grad_sync = is_last and self._overlaps
            if is_retry:
                ddp.require_forward_param_sync = False  # the first try has broadcast the buffers
        if is_last:
            self._await()

    def prepare(self, losses: Sequence[Tensor]) -> None:
        """DDP reduces in the backward of these losses, the window's last one on this rank, which begins now.

        What DDP prepares it cannot forget. Prepared in its own forward, as it does by itself, it would also reduce what
        is run in place of a micro-batch that ran out of memory between that forward and its backward.
        """
        for ddp in self._replicas if self._overlaps else ():
            ddp.require_backward_grad_sync = True
            ddp.reducer.prepare_for_forward()
            finds_unused = ddp.find_unused_parameters and not ddp.static_graph
            ddp.reducer.prepare_for_backward(list(losses) if finds_unused else [])
        self._await()

    def _await(self) -> None:
        """From here on the count of changes of `p.grad` tells whether the last backward has reached the parameter."""
        replicas = [ddp for ddp in self._replicas if not ddp.find_unused_parameters] if self._overlaps else []
        self._awaited = []
        for p in (p for ddp in replicas for p in _reduced_by(ddp) if p.requires_grad):
            if p.grad is None:
                self._awaited.append((p, lambda: None, None))
                continue
            if p.grad._base is not None:
                p.grad = p.grad.data  # the same memory with a count of its own: views of DDP's buckets share one
            self._awaited.append((p, TensorWeakRef(p.grad), p.grad._version))  # weak: DDP may put views in their place

    def complete(self) -> None:
        """After the last backward, before ranks say anything else: DDP reduces also what this backward did not reach.

        DDP waits for every parameter, and other ranks for DDP. Adding zeros to those that only earlier micro-batches
        reached, or none, tells it that they are ready. ValueError if it waits for a parameter frozen since it was made.
        """
        awaited, self._awaited = self._awaited, []
        missed = [
            p for p, before, count in awaited if p.grad is before() and (p.grad is None or p.grad._version == count)
        ]
        if missed:
            _add_zeros(missed)
        for ddp in self._replicas if awaited else ():
            _refuse_unfinished(ddp)

    @property
    def is_communicating(self) -> bool:
        """Whether the present backward is one in which DDP reduces."""
        return any(ddp.require_backward_grad_sync for ddp in self._replicas)

    def finish(
        self, parameters: Sequence[nn.Parameter], gradients: list[Tensor | None]
    ) -> list[tuple[list[Tensor], int]]:
        """After it every gradient is reduced: groups of gradients, each with the factor that makes it a sum over ranks.

        DDP averages over ranks, so what it reduced comes with the factor `ranks.size`; the rest are sums already.
        Entries of `gradients` are filled in where only other ranks had one.
        """
        if self._ranks.size == 1:
            return [([g for g in gradients if g is not None], 1)]
        self.complete()  # unless it was called before something else was sent
        by_ddp = {id(p) for ddp in self._replicas for p in _reduced_by(ddp)} if self._overlaps else set()
        gradients[:] = [p.grad if id(p) in by_ddp else g for p, g in zip(parameters, gradients, strict=True)]
        rest = [j for j, p in enumerate(parameters) if id(p) not in by_ddp]
        _sum_gradients(parameters, gradients, rest, self._ranks)
        averaged = [g for p, g in zip(parameters, gradients, strict=True) if g is not None and id(p) in by_ddp]
        return [(averaged, self._ranks.size), ([g for j in rest if (g := gradients[j]) is not None], 1)]

    def join_without_terms(self) -> None:
        """Other ranks' DDP waits for this rank's last backward: it takes part with zero gradients."""
        for ddp in self._replicas if self._overlaps else ():
            parameters = [p for p in _reduced_by(ddp) if p.requires_grad]
            ddp.reducer.prepare_for_forward()
            ddp.reducer.prepare_for_backward([p.view_as(p) for p in parameters])
            _add_zeros(parameters)


def _add_zeros(parameters: Sequence[nn.Parameter]) -> None:
    """Zeros have arrived at `p.grad` in a backward, as DDP sees it."""
    torch.autograd.backward([p.view_as(p) for p in parameters], [torch.zeros_like(p) for p in parameters])


def _refuse_unfinished(ddp: DistributedDataParallel) -> None:
    check = getattr(ddp, "_check_reducer_finalized", None)  # without it DDP's next forward raises an error of its own
    try:
        if check is not None:
            check()
    except RuntimeError as error:
        frozen = [name for name, p in ddp.module.named_parameters() if not p.requires_grad]
        raise ValueError(
            "DistributedDataParallel still waits for gradients after the last backward, as it does for parameters that "
            f"required one when it was made and no longer do; now {len(frozen)} require none, the first of them "
            f"{frozen[:3]}. Freeze parameters before DDP is made, or give it find_unused_parameters=True"
        ) from error


def _has_others(ddp: DistributedDataParallel) -> bool:
    return dist.get_world_size(ddp.process_group) > 1


def _reduced_by(ddp: DistributedDataParallel) -> Iterable[nn.Parameter]:
    ignored = ddp.parameters_to_ignore
    return (p for name, p in ddp.module.named_parameters() if name not in ignored)


def _sum_gradients(
    parameters: Sequence[nn.Parameter], gradients: list[Tensor | None], which: Sequence[int], ranks: Ranks
) -> None:
    """Sum `gradients[j]` over ranks for each j in `which`; where only some ranks have one, the others give zeros."""
    if not which:
        return
    mine = torch.tensor([_dtype_code(gradients[j]) for j in which])
    codes = ranks.maximum(mine).tolist()
    reduced: list[Tensor] = []
    for j, code in zip(which, codes, strict=True):
        if code < 0:
            continue
        gradient = gradients[j]
        if gradient is None:
            gradient = torch.zeros_like(parameters[j], dtype=_DTYPES[code], memory_format=torch.contiguous_format)
        gradients[j] = gradient.to_dense() if gradient.is_sparse else gradient
        reduced.append(gradients[j])  # type: ignore[arg-type]
    for bucket in _buckets(reduced):
        flat = ranks.sum(torch.cat([g.detach().flatten() for g in bucket]))
        for g, piece in zip(bucket, flat.split([g.numel() for g in bucket]), strict=True):
            g.copy_(piece.view(g.shape))


_DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64, torch.complex64, torch.complex128)


def _dtype_code(gradient: Tensor | None) -> int:
    return -1 if gradient is None else _DTYPES.index(gradient.dtype)


def _buckets(gradients: Iterable[Tensor]) -> Iterable[list[Tensor]]:
    """Consecutive gradients of one dtype and device, about BUCKET_BYTES in each list."""
    bucket: list[Tensor] = []
    num_bytes = 0
    for g in gradients:
        if bucket and (num_bytes > BUCKET_BYTES or (g.dtype, g.device) != (bucket[0].dtype, bucket[0].device)):
            yield bucket
            bucket, num_bytes = [], 0
        bucket.append(g)
        num_bytes += g.nbytes
    if bucket:
        yield bucket
