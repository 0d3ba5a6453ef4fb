"""Outputs that compare the samples of one micro-batch, and so leave out all other pairs, are told from embeddings."""

from collections.abc import Iterator

import torch
from torch import Tensor

from macrobatch.batch import Cut, Window, cut_batch
from macrobatch.containers import leaves
from macrobatch.devices import on_device
from macrobatch.gathered_forward import FirstForwards
from macrobatch.gathering import Outputs
from macrobatch.state import RandomState

Shapes = dict[str, tuple[int, ...]]  # of outputs, by path


def refuse_pairs(first: FirstForwards, window: Window, own_cut: Cut | None, device: torch.device | None) -> None:
    """ValueError for an output whose second or a later dimension is the micro-batch's size, and changes with it.

    Only where an output has such a dimension, and it cannot be told from another micro-batch of the window, two samples
    are encoded once more, without a graph; random numbers and buffers are as before. One sample alone tells nothing.
    """
    n = first.pieces[0].num_samples
    suspects = {path: shape for path, shape in _shapes(first.pieces[0].outputs).items() if n > 1 and n in shape[1:]}
    if not suspects:
        return
    other = next((piece for piece in first.pieces if piece.num_samples != n), None)
    size = min(2, n - 1) if other is None else other.num_samples
    shapes = _shapes_of_some(first, window, size, own_cut, device) if other is None else _shapes(other.outputs)
    for path, shape in suspects.items():
        follows = [
            j for j, length in enumerate(shapes.get(path, ())) if j and length == size and shape[j : j + 1] == (n,)
        ]
        if follows:
            raise ValueError(
                f"{path} has shape {shape} for a micro-batch of {n} samples, and {shapes[path]} for one of {size}: it "
                "compares the samples of a micro-batch with one another, so the loss would see no other pairs. Return "
                "what it compares (embeddings), and compare them in the loss_fn, which is given those of all samples"
            )


def _shapes_of_some(
    first: FirstForwards, window: Window, size: int, own_cut: Cut | None, device: torch.device | None
) -> Shapes:
    """Of the outputs of the first `size` samples; nothing where they cannot be run apart."""
    micro_batch, n = next(window.sized())
    random = RandomState(device)
    try:
        some = cut_batch(micro_batch, [size, n - size], own_cut)[0]
        with torch.no_grad(), first.replay.again(first.pieces[0].beginning):
            for part, _, _ in on_device([(some, size)], device):
                return _shapes(first.encoder(part, size))
    except (
        Exception
    ):  # so few samples may be too few for a model, which says nothing of micro-batches of the usual size
        pass
    finally:
        random.restore()
    return {}


def _shapes(outputs: Outputs | None) -> Shapes:
    return dict(_paths(outputs)) if outputs is not None else {}


def _paths(outputs: Outputs) -> Iterator[tuple[str, tuple[int, ...]]]:
    return ((path, tuple(leaf.shape)) for path, leaf in leaves(outputs.nested, "outputs") if isinstance(leaf, Tensor))
