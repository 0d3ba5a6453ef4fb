"""Modules and their parameters: walked, named, told apart, and frozen for a while."""

from collections.abc import Iterable, Iterator, Mapping, Sequence

from torch import nn
from torch.nn.parallel import DistributedDataParallel


def submodules(modules: Sequence[nn.Module]) -> Iterator[nn.Module]:
    """Each module below `modules` once. Walks the dictionaries directly: no names are built, 15 times faster."""
    seen: set[int] = set()
    stack: list[nn.Module | None] = list(reversed(modules))
    while stack:
        module = stack.pop()
        if module is not None and id(module) not in seen:
            seen.add(id(module))
            yield module
            stack.extend(reversed(module._modules.values()))


def trainable(modules: Sequence[nn.Module]) -> list[nn.Parameter]:
    """Each parameter of `modules` that requires a gradient, once. Walked anew for each window: nothing can go stale."""
    return trainable_of(submodules(modules))


def trainable_of(walked: Iterable[nn.Module]) -> list[nn.Parameter]:
    """Each parameter that these modules hold themselves and that requires a gradient, once."""
    parameters = {id(p): p for module in walked for p in module._parameters.values() if p is not None}
    return [p for p in parameters.values() if p.requires_grad]


def modules_of(model: nn.Module | Iterable[nn.Module]) -> list[nn.Module]:
    """A module, or several, as a list. ValueError for anything else."""
    needed = "model must be an nn.Module or a sequence of them"
    if isinstance(model, Mapping):
        raise ValueError(f"{needed}, got a {type(model).__name__}: give its values, list(models.values())")
    modules = [model] if isinstance(model, nn.Module) else list(model) if isinstance(model, Iterable) else [model]
    for module in modules:
        if not isinstance(module, nn.Module):
            hint = ": give the model, not its parameters" if isinstance(module, nn.Parameter) else ""
            raise ValueError(f"{needed}, got a {type(module).__name__}{hint}")
    if isinstance(model, Iterator):
        raise ValueError(f"{needed}, got a {type(model).__name__}: give a list, to be read again")
    return modules


def ddp_modules(modules: Sequence[nn.Module]) -> list[DistributedDataParallel]:
    """The DistributedDataParallel wrappers among `modules` and below."""
    return [module for module in submodules(modules) if isinstance(module, DistributedDataParallel)]


def name_of(parameter: nn.Parameter, modules: Sequence[nn.Module]) -> str:
    """The name of `parameter` within the first of `modules` that has it; only for messages, it is slow."""
    for module in modules:
        for name, p in module.named_parameters():
            if p is parameter:
                return name
    return "(unnamed)"


class Frozen:
    """Within the context the parameters of `modules` require no gradient; what they required before is put back."""

    def __init__(self, modules: Sequence[nn.Module]) -> None:
        self._modules = modules

    def __enter__(self) -> None:
        self._thawed = trainable(self._modules) if self._modules else []
        for p in self._thawed:
            p.requires_grad_(False)

    def __exit__(self, *_: object) -> None:
        for p in self._thawed:
            p.requires_grad_(True)
