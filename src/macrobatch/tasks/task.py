"""A task as a value: a model, its loss, its data and its optimizer, with the sizes it was tried with."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields
from typing import Any

from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils.data import Dataset, default_collate

SumAndCount = tuple[Tensor, Tensor | float]  # a sum over the terms of a micro-batch, and how many terms there are
LossFunction = Callable[..., Any]  # of (model, micro_batch), or of (model, outputs, window)
Metric = Callable[[nn.Module, Any], SumAndCount]
Tell = Callable[[int, int], None]  # of (done, total): how far a work is


@dataclass(frozen=True, kw_only=True)
class Task:
    """Everything that training needs, and nothing about how it is trained.

    `train` and `validation` are map-style datasets (`len` and `[index]`); `collate` makes one micro-batch of a list of
    their samples. `loss_fn(model, micro_batch)` returns what `Accumulator` takes, best `(loss_sum, loss_weight)`. Each
    of `metrics`, by its name, returns `(sum, weight)` likewise and is averaged over the whole validation data.
    With `encode(model, micro_batch)` the task is for GatheredAccumulator: `loss_fn(model, outputs, window)` and
    `metric(model, outputs)` see the outputs of all samples at once.
    Whatever learns is in `model`; a loss, `encode` or metric that is a module may hold constants (class weights).
    `learning_rate` was tuned at `base_batch_size`.
    `prepare(tell)` is for data that takes its time: it gets all samples ready, and says how far it is by
    `tell(done, total)`. Commands call it once everything was checked; until then they ask for a few samples at most.
    """

    name: str
    model: nn.Module
    loss_fn: LossFunction
    train: Dataset[Any]
    validation: Dataset[Any]
    make_optimizer: Callable[[nn.Module, float], Optimizer]
    learning_rate: float
    base_batch_size: int
    batch_size: int = 128
    micro_batch_size: int = 16
    metrics: Mapping[str, Metric] = field(default_factory=dict)
    collate: Callable[[list[Any]], Any] = default_collate
    encode: Callable[[nn.Module, Any], Any] | None = None
    prepare: Callable[[Tell], None] | None = None
    description: str = ""

    def __post_init__(self) -> None:
        _check_kinds(self)
        _check_learned(self)
        for name in ("train", "validation"):
            if num_samples(getattr(self, name), name) == 0:
                raise ValueError(f"task {self.name!r}: the {name} data is empty; at least one sample is needed")
        for name in ("learning_rate", "base_batch_size", "batch_size", "micro_batch_size"):
            if not getattr(self, name) > 0:
                raise ValueError(f"task {self.name!r}: {name} must be above 0, got {getattr(self, name)!r}")

    @property
    def modules(self) -> Mapping[str, nn.Module]:
        """Loss, `encode` and metrics that are modules, or methods of one, by name: `model` is not among them."""
        found = {"loss_fn": self.loss_fn, "encode": self.encode, **self.metrics}
        owners = {name: getattr(function, "__self__", function) for name, function in found.items()}
        return {name: owner for name, owner in owners.items() if isinstance(owner, nn.Module)}


def num_samples(dataset: Dataset[Any], name: str) -> int:
    """The length of a map-style dataset, or a ValueError where it has none."""
    try:
        return len(dataset)  # type: ignore[arg-type]  # the torch class promises no length; this is where it is asked
    except (TypeError, NotImplementedError):
        kind = type(dataset).__name__
        raise ValueError(
            f"the {name} data is a {kind} without a length; a map-style dataset is needed: len(data) and data[index]"
        ) from None


def _check_kinds(task: Task) -> None:
    if not isinstance(task.model, nn.Module):
        raise ValueError(f"task {task.name!r}: model must be a torch.nn.Module, got {type(task.model).__name__}")
    given = {entry.name: getattr(task, entry.name) for entry in fields(task)}
    functions = {name: given[name] for name in ("loss_fn", "make_optimizer", "collate")} | dict(task.metrics)
    functions |= {name: given[name] for name in ("encode", "prepare") if given[name] is not None}
    for name, function in functions.items():
        if not callable(function):
            raise ValueError(f"task {task.name!r}: {name} must be a function, got {type(function).__name__}")


def _check_learned(task: Task) -> None:
    """ValueError where something else than the model learns: it would be one for all the copies of the model."""
    for name, module in task.modules.items():
        learned = next((own for own, p in module.named_parameters() if p.requires_grad), None)
        if learned is not None:
            raise ValueError(
                f"task {task.name!r}: {name} has a trainable parameter of its own, {learned}; what learns belongs into "
                "the task's model, because every run of a comparison trains a copy of the model: make it "
                "model.log_scale, for instance, and let the function read it off the model it is given, or freeze it"
            )
