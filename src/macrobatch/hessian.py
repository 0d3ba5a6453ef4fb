"""Products of a loss's Hessian with vectors, micro-batch by micro-batch, with the weights that the loss itself has.

    H v = ( Σ_j H_j v ) / Σ_j loss_weight_j         H_j: the Hessian of micro-batch j's loss_sum

By double backward H_j v is the gradient of g_j · v, a loss like any other, so that the Accumulator adds it up: every
form of loss, exact for any cut. Or by differences of gradients, where a kernel has no second derivative:

    H v ≈ ( g(w + e v) - g(w - e v) ) / (2 e)       |v| = 1
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

from macrobatch.accumulator import Accumulator
from macrobatch.arguments import check_loss_fn
from macrobatch.batch import Window
from macrobatch.coupling import coupled_layers
from macrobatch.modules import ddp_modules, modules_of, name_of, submodules
from macrobatch.recovery import is_out_of_memory
from macrobatch.slope import Slope
from macrobatch.structure import Nested
from macrobatch.substitution import Stage
from macrobatch.tally import CountFn

LossFn = Callable[[Any, Any], Any]
Method = Literal["auto", "double-backward", "finite-differences"]
AGREE = 0.02  # how far, relative, a custom function's second derivative may be from the difference of its first


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
        count: CountFn | None = None,
    ) -> None:
        self._model = model
        self._modules = modules
        self._loss_fn = loss_fn
        self._window = window
        self._count = count
        self.parameters = parameters
        self.num_products = 0
        self.method = "finite-differences" if method == "finite-differences" else "double-backward"
        self.why = "as asked for"
        if method == "auto":
            failure = self._why_not_double_backward()
            self.why = failure or "every operation of the loss has a second derivative"
            self.method = "finite-differences" if failure else "double-backward"

    def _why_not_double_backward(self) -> str | None:
        """What is wrong with second derivatives, None if nothing; tried on the first micro-batch that has terms."""
        for micro_batch, n in self._window.sized():
            one = Window.of_sized([(micro_batch, n)]).fill()
            gradient, has_terms = self._run(self._loss_fn_alone, one)
            if has_terms:
                return self._failure_on(one, gradient)
        return None  # the whole window is refused by the first product

    def _failure_on(self, one: Window, gradient: Tensor) -> str | None:
        length = _norm(gradient)
        v = gradient / length if length > 0 else torch.ones_like(gradient) / len(gradient) ** 0.5
        try:
            second, has_custom_functions = self._second(v, one)
        except RuntimeError as error:
            if is_out_of_memory(error):
                raise
            return f"double backward failed: {str(error).splitlines()[0]}"
        if not has_custom_functions:
            return None
        # Such a function's backward may treat as constant what is not, without an error.
        difference = self._difference(v, one)
        rounding = 100 * torch.finfo(self._dtype).eps * length / self._step
        off, size = _norm(second - difference), max(_norm(second), _norm(difference))
        if off <= AGREE * size + rounding:
            return None
        return f"a custom autograd function's second derivative is {off / size:.0%} off the difference of its first"

    def zeros(self) -> Tensor:
        """A zero vector, shape (n,)."""
        return torch.zeros(sum(p.numel() for p in self.parameters), dtype=self._dtype, device=self.parameters[0].device)

    @property
    def _dtype(self) -> torch.dtype:
        return torch.float64 if all(p.dtype == torch.float64 for p in self.parameters) else torch.float32

    @property
    def _step(self) -> float:
        # The error has a part that grows with the step (the loss is not quadratic) and one with its inverse (rounding).
        return 1e-4 if self._dtype == torch.float64 else 1e-2

    def product(self, v: Tensor) -> Tensor:
        """H v, shape (n,)."""
        self.num_products += 1
        if self.method == "double-backward":
            return self._second(v, self._window)[0]
        return self._difference(v, self._window)

    def gradient(self) -> Tensor:
        """The gradient of the mean loss, shape (n,)."""
        return self._gradient_over(self._window)

    def _gradient_over(self, window: Window) -> Tensor:
        return self._of_terms(self._loss_fn_alone, window)

    def _of_terms(self, loss_fn: LossFn, window: Window) -> Tensor:
        gradient, has_terms = self._run(loss_fn, window)
        if not has_terms:
            raise ValueError("the batch has no loss terms: its mean loss, and so its curvature, is not defined")
        return gradient

    def _run(self, loss_fn: LossFn, window: Window) -> tuple[Tensor, bool]:
        """The gradient of that loss over the window, flat, and whether it had terms."""
        report = self._accumulator(loss_fn).run(window)
        gradient = self._flat([p.grad for p in self.parameters])
        for p in self.parameters:
            p.grad = None
        return gradient, bool(report.has_terms)

    def _accumulator(self, loss_fn: LossFn) -> Accumulator:
        """A new one each time, so that every window is looked at as closely as a first one."""
        return Accumulator(self._modules, loss_fn, count=self._count, batch_norm="micro_batch", process_group=None)

    def _loss_fn_alone(self, _: Any, micro_batch: Nested) -> Any:
        return self._loss_fn(self._model, micro_batch)

    def loss(self) -> Tensor:
        """The mean loss, shape ()."""
        return self._accumulator(self._loss_fn_alone).evaluate(self._window).loss

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

    def _difference(self, v: Tensor, window: Window) -> Tensor:
        length = _norm(v)
        if length == 0:
            return self.zeros()
        e = self._step / length
        with self.moved(e * v):
            ahead = self._gradient_over(window)
        with self.moved(-e * v):
            behind = self._gradient_over(window)
        return (ahead - behind) / (2 * e)

    def _second(self, v: Tensor, window: Window) -> tuple[Tensor, bool]:
        """H v by double backward, and whether the loss has functions that may be wrong about it without an error."""
        direction = [part.to(p.dtype) for part, p in zip(self._split(v), self.parameters, strict=True)]
        slope = Slope(self._loss_fn, self._model, self.parameters, direction, has_count=self._count is not None)
        return self._of_terms(slope.loss, window), slope.has_custom_functions

    def _flat(self, tensors: Sequence[Tensor | None]) -> Tensor:
        filled = [torch.zeros_like(p) if t is None else t for t, p in zip(tensors, self.parameters, strict=True)]
        return torch.cat([(t.to_dense() if t.is_sparse else t).detach().flatten().to(self._dtype) for t in filled])

    def _split(self, v: Tensor) -> list[Tensor]:
        pieces = v.split([p.numel() for p in self.parameters])
        return [piece.view(p.shape) for piece, p in zip(pieces, self.parameters, strict=True)]


def _norm(v: Tensor) -> float:
    return float(torch.linalg.vector_norm(v, dtype=torch.float64))


@contextmanager
def hessian_of(
    model: nn.Module | Sequence[nn.Module],
    loss_fn: LossFn,
    batch: Nested,
    *,
    micro_batch_size: int | None = None,
    method: Method = "auto",
    count: CountFn | None = None,
) -> Iterator[Hessian]:
    """Within the context: the Hessian at the present weights, all modules in eval mode. Afterwards all is as before.

    `batch`: a Window, or a collated batch that is cut by `micro_batch_size` (None: it is one micro-batch). Weights,
    buffers, gradients, modes and random numbers are as they were. `count`: as the Accumulator's. ValueError for an
    empty batch, for no trainable parameter, for one in low precision, for layers that see several samples in eval mode
    if there are several micro-batches, and for DDP modules, whose hooks second derivatives do not pass.
    """
    check_loss_fn(loss_fn)
    modules = [*modules_of(model), *([loss_fn] if isinstance(loss_fn, nn.Module) else [])]
    if method not in ("auto", "double-backward", "finite-differences"):
        raise ValueError(f"method must be 'auto', 'double-backward' or 'finite-differences', got {method!r}")
    if ddp_modules(modules):
        raise ValueError("curvature is measured on one process: give the module inside DistributedDataParallel")
    window = _window(batch, micro_batch_size)
    with Stage(modules, loss_fn).copies() as parameters:
        for module in submodules(modules):
            module.training = False
        _refuse_unfit(modules, parameters, window)
        yield Hessian(model, modules, loss_fn, window, parameters, method, count)


def _refuse_unfit(modules: Sequence[nn.Module], parameters: Sequence[nn.Parameter], window: Window) -> None:
    for p in parameters:
        if p.dtype not in (torch.float32, torch.float64):
            raise ValueError(
                f"curvature needs float32 or float64, parameter {name_of(p, modules)!r} is {p.dtype}: its rounding "
                "hides second derivatives. Measure a float32 copy: copy.deepcopy(model).float()"
            )
    layers = coupled_layers(modules)
    if layers and len(window) > 1:
        raise ValueError(
            f"{layers[0]}, so the value would depend on the cut: give the batch as one micro-batch, or convert the "
            "layer (macrobatch.batchnorm.convert)"
        )


def _window(batch: Nested, micro_batch_size: int | None) -> Window:
    if isinstance(batch, DataLoader | Iterator):
        raise ValueError(
            f"curvature is that of one batch, got a {type(batch).__name__}: give next(iter(loader)), or "
            "Window(list(loader))"
        )
    window = batch if isinstance(batch, Window) else Window([batch])
    if micro_batch_size is not None:
        window = window.cut(micro_batch_size)
    if window.num_samples == 0:
        raise ValueError("the batch is empty: curvature needs at least one sample")
    return window
