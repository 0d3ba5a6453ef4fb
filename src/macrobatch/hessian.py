"""Products of a loss's Hessian with vectors, micro-batch by micro-batch, with the weights that the loss itself has.

    H v = ( Σ_j H_j v ) / Σ_j loss_weight_j         H_j: the Hessian of micro-batch j's loss_sum

Exact like the gradient, for any cut. By double backward, or by differences of gradients where a kernel has none:

    H v ≈ ( g(w + e v) - g(w - e v) ) / (2 e)       |v| = 1
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Literal

import torch
from torch import Tensor, nn

from macrobatch.accumulator import Accumulator
from macrobatch.batch import Window
from macrobatch.devices import device_of, on_device
from macrobatch.gradients import ddp_modules, modules_of, submodules
from macrobatch.leaves import StrayLeaves
from macrobatch.recovery import is_out_of_memory
from macrobatch.structure import Nested
from macrobatch.substitution import Stage
from macrobatch.weighting import known, terms_of

LossFn = Callable[[Any, Any], Any]
Method = Literal["auto", "double-backward", "finite-differences"]


class Hessian:
    """The Hessian of the mean loss over one effective batch, at the present weights; made by `hessian_of`.

    `parameters`: what it is about. Vectors are flat, (n,), in the order of the parameters, float32 at least.
    `num_products` counts.
    """

    def __init__(
        self,
        model: nn.Module | Sequence[nn.Module],
        modules: Sequence[nn.Module],
        loss_fn: LossFn,
        window: Window,
        parameters: Sequence[nn.Parameter],
        method: Method,
    ) -> None:
        self._model = model
        self._modules = modules
        self._loss_fn = loss_fn
        self._window = window
        self.parameters = parameters
        self.num_products = 0
        self.method = "finite-differences" if method == "finite-differences" else "double-backward"
        self.why = "as asked for"
        if method == "auto":
            self.why = "every operation of the loss has a second derivative"
            self._try_double_backward()

    def _try_double_backward(self) -> None:
        try:
            self._second(self.zeros())
        except RuntimeError as error:
            if is_out_of_memory(error):
                raise
            self.method, self.why = "finite-differences", f"double backward failed: {str(error).splitlines()[0]}"

    def zeros(self) -> Tensor:
        """A zero vector, shape (n,)."""
        return torch.zeros(sum(p.numel() for p in self.parameters), dtype=self._dtype, device=self.parameters[0].device)

    @property
    def _dtype(self) -> torch.dtype:
        return torch.float64 if all(p.dtype == torch.float64 for p in self.parameters) else torch.float32

    def product(self, v: Tensor) -> Tensor:
        """H v, shape (n,)."""
        self.num_products += 1
        return self._second(v) if self.method == "double-backward" else self._difference(v)

    def gradient(self) -> Tensor:
        """The gradient of the mean loss, shape (n,)."""
        Accumulator(self._model, self._loss_fn, process_group=None).run(self._window)
        g = self._flat([p.grad for p in self.parameters])
        for p in self.parameters:
            p.grad = None
        return g

    def loss(self) -> Tensor:
        """The mean loss, shape ()."""
        return Accumulator(self._model, self._loss_fn, process_group=None).evaluate(self._window).loss

    @contextmanager
    def moved(self, step: Tensor) -> Iterator[None]:
        """Within the context the weights are `step` further; then they are, bit for bit, what they were."""
        before = [p.detach().clone() for p in self.parameters]
        try:
            with torch.no_grad():
                for p, s in zip(self.parameters, self._split(step), strict=True):
                    p.add_(s)
            yield
        finally:
            with torch.no_grad():
                for p, b in zip(self.parameters, before, strict=True):
                    p.copy_(b)

    def _difference(self, v: Tensor) -> Tensor:
        length = torch.linalg.vector_norm(v, dtype=torch.float64)
        if length == 0:
            return self.zeros()
        # The error has a part that grows with e (the loss is not quadratic) and one with 1 / e (rounding of g).
        e = (1e-4 if self._dtype == torch.float64 else 1e-2) / length
        with self.moved(e * v):
            ahead = self.gradient()
        with self.moved(-e * v):
            behind = self.gradient()
        difference: Tensor = (ahead - behind) / (2 * e)
        return difference.to(self._dtype)

    def _second(self, v: Tensor) -> Tensor:
        parts = [part.to(p.dtype) for part, p in zip(self._split(v), self.parameters, strict=True)]
        total, weights = self.zeros(), 0.0
        for micro_batch, n, _ in on_device(self._window.sized(), device_of(self.parameters)):
            terms = terms_of(self._loss_fn(self._model, micro_batch), n, has_count=False)
            assert terms.weight is not None
            weight = known(terms.weight)
            weights += float(terms.weight) if weight is None else weight
            for loss_sum in terms.sums.values() if weight != 0 else ():
                total += terms.multiplier * self._flat(self._of_sum(loss_sum, parts))
        if weights == 0:
            raise ValueError("the batch has no loss terms: its mean loss, and so its curvature, is not defined")
        return total / weights

    def _of_sum(self, loss_sum: Tensor, v: list[Tensor]) -> Sequence[Tensor | None]:
        if not loss_sum.requires_grad:
            raise ValueError("the loss does not depend on any trainable parameter (it requires no gradient)")
        StrayLeaves([loss_sum], self.parameters, self._loss_fn)
        gradient = torch.autograd.grad(loss_sum, self.parameters, create_graph=True, allow_unused=True)
        pairs = [(g, part) for g, part in zip(gradient, v, strict=True) if g is not None and g.requires_grad]
        if not pairs:  # a loss linear in the weights
            return [None] * len(self.parameters)
        outputs, directions = zip(*pairs, strict=True)
        # Not autograd.grad: it would pass by the error that marks a function as differentiable only once, and be wrong.
        torch.autograd.backward(outputs, directions)
        products = [p.grad for p in self.parameters]
        for p in self.parameters:
            p.grad = None
        return products

    def _flat(self, tensors: Sequence[Tensor | None]) -> Tensor:
        filled = [torch.zeros_like(p) if t is None else t for t, p in zip(tensors, self.parameters, strict=True)]
        return torch.cat([(t.to_dense() if t.is_sparse else t).detach().flatten().to(self._dtype) for t in filled])

    def _split(self, v: Tensor) -> list[Tensor]:
        pieces = v.split([p.numel() for p in self.parameters])
        return [piece.view(p.shape) for piece, p in zip(pieces, self.parameters, strict=True)]


@contextmanager
def hessian_of(
    model: nn.Module | Sequence[nn.Module],
    loss_fn: LossFn,
    batch: Nested,
    *,
    micro_batch_size: int | None = None,
    method: Method = "auto",
) -> Iterator[Hessian]:
    """Within the context: the Hessian at the present weights, all modules in eval mode. Afterwards all is as before.

    `batch`: a Window, or a collated batch that is cut by `micro_batch_size` (None: it is one micro-batch). Weights,
    buffers, gradients, modes and random numbers are as they were. ValueError for an empty batch, for no trainable
    parameter, and for DDP modules, whose hooks second derivatives do not pass.
    """
    modules = [*modules_of(model), *([loss_fn] if isinstance(loss_fn, nn.Module) else [])]
    if method not in ("auto", "double-backward", "finite-differences"):
        raise ValueError(f"method must be 'auto', 'double-backward' or 'finite-differences', got {method!r}")
    if ddp_modules(modules):
        raise ValueError("curvature is measured on one process: give the module inside DistributedDataParallel")
    window = _window(batch, micro_batch_size)
    with Stage(modules, loss_fn).copies() as parameters:
        for module in submodules(modules):
            module.training = False
        yield Hessian(model, modules, loss_fn, window, parameters, method)


def _window(batch: Nested, micro_batch_size: int | None) -> Window:
    window = batch if isinstance(batch, Window) else Window([batch])
    if micro_batch_size is not None:
        window = window.cut(micro_batch_size)
    if window.num_samples == 0:
        raise ValueError("the batch is empty: curvature needs at least one sample")
    return window
