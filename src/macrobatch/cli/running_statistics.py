"""BatchNorm's running statistics taken anew, so that a validation is of the weights, not of how often these moved."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import chain
from typing import Any

from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from macrobatch import Window
from macrobatch.cli.learner import accumulator_of
from macrobatch.state import RandomState
from macrobatch.tasks import Task


def running_layers(model: nn.Module) -> list[_BatchNorm]:
    """The layers whose running statistics training updates, once for each micro-batch."""
    return [
        layer
        for layer in model.modules()
        if isinstance(layer, _BatchNorm) and layer.training and layer.running_mean is not None
    ]


@contextmanager
def taken_anew(model: nn.Module, task: Task, micro_batches: Sequence[Any]) -> Iterator[None]:
    """Within it running statistics are the means of those of the micro-batches, equally weighted; then as before.

    While they are taken all other layers are in eval mode, so that dropout drops nothing. Parameters, modes, random
    numbers and, after it, every buffer are as before. Cost: a forward of the samples. As
    torch.optim.swa_utils.update_bn, which would call the model itself, where a task says how in its loss_fn.
    """
    layers = running_layers(model)
    if not layers or not micro_batches:
        yield
        return
    modes = [(module, module.training) for module in model.modules()]
    buffers = [(buffer, buffer.clone()) for layer in layers for buffer in layer.buffers(recurse=False)]
    try:
        _take(model, layers, task, micro_batches)
        for module, mode in modes:
            module.training = mode
        yield
    finally:
        for module, mode in modes:
            module.training = mode
        _put_back(buffers)


def _take(model: nn.Module, layers: Sequence[_BatchNorm], task: Task, micro_batches: Sequence[Any]) -> None:
    device = next(chain(model.parameters(), model.buffers())).device
    random, momenta = RandomState(device), [layer.momentum for layer in layers]
    model.eval()
    try:
        for layer in layers:
            layer.training, layer.momentum = True, None  # None: the mean of all so far
            layer.reset_running_stats()
        accumulator = accumulator_of(task, model)
        for micro_batch in micro_batches:
            accumulator.evaluate(Window([micro_batch]))
    finally:
        random.restore()
        for layer, momentum in zip(layers, momenta, strict=True):
            layer.momentum = momentum


def _put_back(buffers: Sequence[tuple[Tensor, Tensor]]) -> None:
    for buffer, before in buffers:
        buffer.copy_(before)
