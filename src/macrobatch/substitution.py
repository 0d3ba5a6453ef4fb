"""A model with other tensors for a while: fake ones, or copies of its buffers. Afterwards all is as it was before."""

from collections import OrderedDict, defaultdict, deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, suppress
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from macrobatch.containers import map_tensors, tensors
from macrobatch.gradients import WindowGradients, gradient_dtype
from macrobatch.modules import Frozen, submodules, trainable

Replacement = Callable[[Tensor], Tensor]
_MAPPINGS = (dict, OrderedDict, defaultdict)
_CONTAINERS = (*_MAPPINGS, list, set, deque)  # exactly these: what a subclass does in `clear` is not known


class Stage:
    """Contexts in which `modules` may be trained on for a micro-batch, and which leave no trace.

    In them the parameters have no gradients, those of `frozen` require none, and gradients accumulate in the dtype that
    the Accumulator would choose with `grad_dtype`. After them the attributes of the modules and of `loss_fn`, buffers,
    gradients and random number generators are as before. `device`: where the fake tensors claim to lie.
    """

    def __init__(
        self,
        modules: Sequence[nn.Module],
        loss_fn: object,
        frozen: Sequence[nn.Module] = (),
        grad_dtype: torch.dtype | None = None,
        device: torch.device | None = None,
    ) -> None:
        parameters = trainable(modules)
        if not parameters:
            raise ValueError("the model has no parameter that requires a gradient")
        self.modules = modules
        self.home = parameters[0].device  # where the model is
        self.device = device or self.home  # where it is to run
        self._loss_fn = loss_fn
        self._frozen = frozen
        self._grad_dtype = grad_dtype

    @contextmanager
    def fakes(self) -> Iterator[tuple[list[nn.Parameter], Replacement]]:
        """The modules hold fake tensors, without numbers. Yields the parameters to train, and what makes a tensor fake.

        A fake tensor of the same tensor is the same. Operations make fake tensors, too, or raise where they cannot.
        """
        mode = FakeTensorMode(allow_non_fake_inputs=True, allow_fallback_kernels=False)
        fakes: dict[int, tuple[Tensor, Tensor]] = {}  # with the real one, so that its id stays its own

        def fake(tensor: Tensor) -> Tensor:
            if id(tensor) not in fakes:
                fakes[id(tensor)] = tensor, self._fake(tensor, mode)
            return fakes[id(tensor)][1]

        with self._set(fake) as parameters, mode:
            yield parameters, fake

    def copies(self) -> AbstractContextManager[list[nn.Parameter]]:
        """The modules hold their own parameters and copies of their buffers. Yields the parameters to train."""
        buffers = {id(b): b.clone() for module in self.modules for b in module.buffers()}
        return self._set(lambda tensor: buffers.get(id(tensor), tensor))

    @contextmanager
    def _set(self, replacement: Replacement) -> Iterator[list[nn.Parameter]]:
        devices = [self.device] if self.device.type == "cuda" and torch.cuda.is_available() else []
        with unchanged([*submodules(self.modules), self._loss_fn]), torch.random.fork_rng(devices), suppress(_Done):
            substitute(self.modules, replacement)
            with Frozen(self._frozen), WindowGradients(self.modules, self._grad_dtype, add=True) as gradients:
                yield gradients.parameters
                raise _Done  # as after an error, gradients are what they were

    def _fake(self, tensor: Tensor, mode: FakeTensorMode) -> Tensor:
        if tensor.device == self.device or tensor.device not in (self.home, torch.device("meta")):
            return mode.from_tensor(tensor)
        with mode:
            moved = torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device=self.device)
        if isinstance(tensor, nn.Parameter):
            return nn.Parameter(moved, tensor.requires_grad)
        return moved


class _Done(Exception):
    """A stage is left."""


@contextmanager
def unchanged(objects: Iterable[object]) -> Iterator[None]:
    """After the context `objects` have the attributes they had before, with the same contents.

    Also the lists, dicts and sets in these attributes, at any depth, hold again what they held, hooks included. What
    was written into a tensor in place is not undone.
    """
    saved: dict[int, tuple[Any, Any]] = {}
    for each in objects:
        _save(getattr(each, "__dict__", None), saved)
    try:
        yield
    finally:
        for container, contents in saved.values():
            container.clear()
            (container.update if isinstance(container, dict | set) else container.extend)(contents)


def _save(container: Any, saved: dict[int, tuple[Any, Any]]) -> None:
    if type(container) not in _CONTAINERS or id(container) in saved:
        return
    saved[id(container)] = container, container.copy()
    for value in container.values() if isinstance(container, dict) else container:
        _save(value, saved)


def substitute(modules: Sequence[nn.Module], replacement: Replacement) -> None:
    """Each tensor that a submodule of `modules` holds is replaced: parameters, buffers, and those in plain attributes.

    `replacement` gives the same tensor for the same one. Meant for the inside of `unchanged`.
    """
    for module in submodules(modules):
        held = vars(module)
        for name, value in list(held.items()):
            if isinstance(value, Tensor) or _holds_tensors(value):
                held[name] = map_tensors(value, replacement)


def held_tensors(modules: Sequence[nn.Module]) -> list[Tensor]:
    """The parameters and buffers of `modules`, each once."""
    found = (t for m in submodules(modules) for t in (*m._parameters.values(), *m._buffers.values()) if t is not None)
    return list({id(t): t for t in found}.values())


def allocate_gradients(parameters: Iterable[nn.Parameter], idle: frozenset[int] = frozenset()) -> None:
    """`p.grad` is zeros, in the dtype in which gradients accumulate; not for the parameters at the positions `idle`."""
    for j, p in enumerate(parameters):
        if j not in idle:
            p.grad = torch.zeros_like(p, dtype=gradient_dtype(p))


def _holds_tensors(value: Any) -> bool:
    return type(value) in (*_MAPPINGS, list, tuple) and any(True for _ in tensors(value))
