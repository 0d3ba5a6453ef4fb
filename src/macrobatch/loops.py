"""For loops that own forward and backward: the window's micro-batches, each with the share its loss sum counts for.

The same arithmetic as `Accumulator`, with the division up front: the total is counted before the first forward, and
each backward runs on `loss_sum / total`. In float16 that may underflow; there use the Accumulator.
"""

import warnings
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from types import TracebackType
from typing import Any, NoReturn

import torch
from torch import Tensor, nn

from macrobatch.arguments import check_count, check_group
from macrobatch.batch import Window
from macrobatch.call_notes import described
from macrobatch.callers import first_outside
from macrobatch.containers import leaves
from macrobatch.devices import device_of, on_device
from macrobatch.distributed import AUTO, GradientReduction, GroupChoice, Ranks
from macrobatch.gradients import WindowGradients, multiply_, norm_of
from macrobatch.memory import known_device
from macrobatch.modules import ddp_modules, modules_of, name_of, submodules
from macrobatch.recovery import is_out_of_memory
from macrobatch.structure import Nested
from macrobatch.sums import ratio
from macrobatch.tally import CountFn, count_window
from macrobatch.weighting import LOSS, ignore_label

Share = Any  # a number or a tensor of shape (), or {name: share} where count= names several


class accumulate:
    """`with accumulate(window, model) as steps: for micro_batch, share in steps: (loss_sum * share).backward()`.

    After the block `p.grad` of the parameters of `model` (a module or several) is the gradient of the effective batch's
    mean. `count(micro_batch)` tells the number of loss terms, or `{name: number}`, and then `share` is `{name:
    share}`; without it, samples count, with a warning where labels are ignored: what your loss averages over is not
    seen here. DDP communicates once, in the last micro-batch. Leaving the loop early is a RuntimeError; after any error
    gradients are as before. A ValueError: gradients left from before, an empty effective batch, a step or a zero_grad
    of the model's own parameters inside the loop, and no gradient at its end.
    """

    def __init__(
        self,
        window: Window,
        model: nn.Module | Sequence[nn.Module],
        count: CountFn | None = None,
        *,
        device: torch.device | str | None = None,
        process_group: GroupChoice = AUTO,
    ) -> None:
        if not isinstance(window, Window):
            raise ValueError(
                f"accumulate takes a Window, got a {type(window).__name__}: Window([micro_batch, ...]), one of "
                "windows(loader, ...), or Window([batch]).cut(micro_batch_size)"
            )
        self._window = window
        self._modules = modules_of(model)
        self._count = count
        self._device = None if device is None else known_device(device)
        if process_group is not AUTO:
            check_group(process_group)
        self._process_group = process_group

    def __enter__(self) -> Iterator[tuple[Nested, Share]]:
        self._finished = False  # whether all its steps were run, this time
        self._first: tuple[Nested, Share] | None = None  # what the loop was given, while it is in its first step
        replicas = ddp_modules(self._modules)
        self._ranks = Ranks.of(self._process_group, replicas)
        everyone_runs = self._ranks.all(len(self._window) > 0)
        self._gradients = WindowGradients(self._modules)
        device = self._device or device_of(self._gradients.parameters)
        home = device or torch.device("cpu")
        sizes = iter(self._window.micro_batch_sizes)
        count = self._count or (lambda _: next(sizes))
        try:
            totals, num_micro_batches = count_window(self._window, count, self._ranks, home)
        except TypeError:  # a look at it in time would cost each window more than all else here
            check_count(self._count)
            raise
        if num_micro_batches == 0:
            raise ValueError("the effective batch is empty: no rank has a sample. Skip empty windows")
        if self._count is None:
            _warn_of_ignored(self._window)
        _refuse_leftovers(self._gradients.parameters, self._modules)
        overlaps = self._gradients.match_parameters and everyone_runs
        self._reduction = GradientReduction(replicas, self._ranks, overlaps, everyone_runs)
        # DDP averages over ranks, so a share counts for all of them; what is summed is divided again at the end.
        shares = {name: ratio(float(self._ranks.size), total) for name, total in totals.items()}
        # Elsewhere a rank may rightly be without a gradient, and an error on it alone would leave the others waiting.
        self._expected = totals if self._ranks.size == 1 or (replicas and overlaps) else {}
        with ExitStack() as contexts:  # left at once, with everything put back, if one of them cannot be entered
            contexts.enter_context(self._gradients)
            contexts.enter_context(self._reduction)
            self._contexts = contexts.pop_all()
        return self._steps(shares if list(shares) != [LOSS] else shares[LOSS], device)

    def __iter__(self) -> NoReturn:
        """TypeError: it must be entered first, since only then is it known when the loop is left."""
        raise TypeError("accumulate(...) is a context: with accumulate(window, model) as steps: for ... in steps: ...")

    def _steps(self, share: Share, device: torch.device | None) -> Iterator[tuple[Nested, Share]]:
        watch = _Watch(self._modules, self._gradients.parameters)
        for index, (micro_batch, _, is_last) in enumerate(on_device(self._window.sized(), device)):
            self._reduction.announce(is_last)
            self._first = None if index else (micro_batch, share)
            yield micro_batch, share
            self._first = None
            watch.refuse_changed_parameters()
            self._gradients.absorb()
            if not (is_last and self._reduction.is_communicating):  # DDP puts views of its buckets in their place
                watch.refuse_lost_gradients()
        if len(self._window) and any(float(total) > 0 for total in self._expected.values()):
            watch.refuse_no_gradient(self._gradients.sums())
        self._finished = True

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        first, self._first = self._first, None
        if error is not None:
            self._contexts.__exit__(kind, error, trace)
            if first is not None:
                _note_first_step(error, *first)
            return
        with self._contexts:
            if not self._finished:
                raise RuntimeError(
                    "the loop over the window was left early: gradients are as before; run all its steps"
                )
            sums = self._gradients.sums()
            for group, factor in self._reduction.finish(self._gradients.parameters, sums):
                multiply_(group, factor / self._ranks.size)
            self._gradients.finish(sums)


class _Watch:
    """Sees in the loop what belongs after it, steps and zeroing: by torch's counts of changes, not by content."""

    def __init__(self, modules: Sequence[nn.Module], parameters: Sequence[nn.Parameter]) -> None:
        self._modules, self._parameters = modules, parameters
        embeddings = [m for m in submodules(modules) if isinstance(m, (nn.Embedding, nn.EmbeddingBag))]
        own = {id(m.weight) for m in embeddings if m.max_norm is not None}  # which the forward itself changes
        self._fixed = [p for p in parameters if id(p) not in own]
        self._versions = [p._version for p in self._fixed]
        self._at_first = [(p.grad, None if p.grad is None else p.grad._version) for p in parameters]
        self._held: list[Tensor | None] = [None] * len(parameters)  # what was zero at first may be dropped

    def refuse_changed_parameters(self) -> None:
        """ValueError if a parameter was changed in place since the loop began, as a step does."""
        if [p._version for p in self._fixed] == self._versions:
            return
        changed = next(p for p, version in zip(self._fixed, self._versions, strict=True) if p._version != version)
        raise ValueError(
            f"parameter {name_of(changed, self._modules)!r} was changed inside the loop over the window, as by "
            "optimizer.step() there: the gradient of an effective batch is that of one set of weights. Step once, "
            "after the with block: optimizer.step(), then optimizer.zero_grad()"
        )

    def refuse_lost_gradients(self) -> None:
        """ValueError if what earlier micro-batches have added up is no longer in `p.grad`."""
        held, self._held = self._held, [p.grad for p in self._parameters]
        for p, before, now in zip(self._parameters, held, self._held, strict=True):
            if before is not None and now is not before and not _is_sum(before, now):
                raise ValueError(
                    f"the gradient of {name_of(p, self._modules)!r} was dropped or replaced inside the loop over the "
                    "window, as by zero_grad() there, and with it what earlier micro-batches had added up. Zero once, "
                    "after the with block and the step; gradients of your own are added in place (p.grad += ...)"
                )

    def refuse_no_gradient(self, sums: Sequence[Tensor | None]) -> None:
        """ValueError if no gradient has arrived since the loop began."""
        if not self._parameters or any(map(_has_arrived, sums, self._at_first)):
            return
        raise ValueError(
            "the loop over the window has ended and no parameter of the model has a gradient: call "
            "(loss_sum * share).backward() for each micro-batch, with a loss that comes from this model, and leave "
            "optimizer.zero_grad() for after the with block"
        )


def _is_sum(before: Tensor, now: Tensor | None) -> bool:
    """Whether autograd itself makes a new tensor here: with create_graph, and where sparse meets dense."""
    return now is not None and (now.requires_grad or now.layout != before.layout)


def _has_arrived(gradient: Tensor | None, at_first: tuple[Tensor | None, int | None]) -> bool:
    """Whether it is there and not as it was; of other kinds of tensors (DTensor) it cannot be told, so it counts."""
    before, version = at_first
    return gradient is not None and (
        gradient is not before or type(gradient) is not Tensor or gradient._version != version
    )


def _refuse_leftovers(parameters: Sequence[nn.Parameter], modules: Sequence[nn.Module]) -> None:
    """ValueError if some gradient is there and not zero, in the words of a loop: here nothing is added on purpose."""
    if not bool(norm_of(p.grad for p in parameters)):  # not a number counts as well
        return
    first = next(p for p in parameters if p.grad is not None and bool(norm_of([p.grad])))
    raise ValueError(
        f"parameter {name_of(first, modules)!r} and perhaps others hold a gradient from before, which would be added "
        "to this window's. Call optimizer.zero_grad() after each optimizer.step(), and before the with block if "
        "something else ran backward"
    )


def _note_first_step(error: BaseException, micro_batch: Nested, share: Share) -> None:
    """`error`, of the loop's first step, has a note of what the loop is given; not if memory ran out."""
    if isinstance(error, Exception) and not is_out_of_memory(error):
        error.add_note(
            "accumulate gives (micro_batch, share): for micro_batch, share in steps; here micro_batch is "
            f"{described(micro_batch)} and share is {described(share)}"
        )


def _warn_of_ignored(window: Window) -> None:
    """A UserWarning if the first micro-batch holds ignore labels, on the CPU: on a device that would be a host sync.

    No error, as the Accumulator gives: a loss that is a mean within each sample is right here, and looks the same.
    """
    for path, leaf in leaves(next(iter(window), ()), "batch"):
        label = ignore_label(leaf) if isinstance(leaf, Tensor) and leaf.is_cpu else None
        if label is None or (leaf.ndim == 1 and label == -1):  # one label for a sample: -1 is one of two classes
            continue
        ignored = "" if label == -100 else f", ignore_index={label}"
        warnings.warn(
            f"accumulate has no count=, so that the share is 1 / (number of samples), but {path}, of shape "
            f"{tuple(leaf.shape)}, holds the ignore label {label}: the gradient of a sum over valid labels would be "
            f"divided by another number than theirs. Give count=lambda batch: macrobatch.valid_tokens({path}{ignored}) "
            "(with shifted=True where a causal LM shifts the labels inside), or, where each sample's loss is a mean of "
            f"its own, count=lambda batch: len({path})",
            stacklevel=first_outside(),  # python shows it once for each line
        )
        return
