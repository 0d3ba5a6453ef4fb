"""How sharp a minimum is: top eigenvalues and trace of the Hessian, the rise of the loss within a small ball."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.optim import SGD, Optimizer

from macrobatch.batch import check_size
from macrobatch.hessian import Method, hessian_of
from macrobatch.lanczos import lanczos, random_vector
from macrobatch.structure import Nested
from macrobatch.tally import CountFn

LossFn = Callable[[Any, Any], Any]
Model = nn.Module | Sequence[nn.Module]


@dataclass(frozen=True)
class Sharpness:
    """Eigenvalues of the Hessian of the mean loss, the largest first, and how they were found.

    `residuals`: there is an eigenvalue within that distance of each. `smallest`: the other end of the spectrum, as far
    as these products tell. `method`: "double-backward" or "finite-differences", and `why`.
    """

    eigenvalues: tuple[float, ...]
    residuals: tuple[float, ...]
    smallest: float
    num_products: int
    method: str
    why: str

    @property
    def top(self) -> float:
        """The largest eigenvalue."""
        return self.eigenvalues[0]


@dataclass(frozen=True)
class Trace:
    """The trace of the Hessian of the mean loss: `value`, with the standard error of the mean over `num_products`."""

    value: float
    standard_error: float
    num_products: int
    method: str


def sharpness(
    model: Model,
    loss_fn: LossFn,
    batch: Nested,
    *,
    micro_batch_size: int | None = None,
    num_eigenvalues: int = 1,
    method: Method = "auto",
    max_products: int = 30,
    tolerance: float = 1e-4,
    seed: int = 0,
    count: CountFn | None = None,
) -> Sharpness:
    """The top eigenvalues of the Hessian over all of `batch`; model, gradients and random numbers are as before.

    `batch`: a Window, or a batch, cut by `micro_batch_size`; any cut gives the same value. In eval mode: dropout off,
    BatchNorm by its running statistics. Lanczos from a start drawn with `seed` ends when every residual is within
    `tolerance` of its eigenvalue, or after `max_products`, each one forward and two backwards over the batch. Keeps one
    vector of the parameters' size (float32 at least) for each product. Over the parameters that require a gradient.
    """
    _check_counts(num_eigenvalues=num_eigenvalues, max_products=max_products)
    if max_products < num_eigenvalues:
        raise ValueError(
            f"{num_eigenvalues} eigenvalues need at least as many products, got max_products={max_products}"
        )
    with hessian_of(model, loss_fn, batch, micro_batch_size=micro_batch_size, method=method, count=count) as hessian:
        n = len(hessian.zeros())
        if num_eigenvalues > n:
            raise ValueError(f"num_eigenvalues={num_eigenvalues}, but {n} trainable numbers have only {n} eigenvalues")
        start = random_vector(hessian.zeros(), seed=seed)
        ritz = lanczos(
            hessian.product, start, num_eigenvalues=num_eigenvalues, max_products=max_products, tolerance=tolerance
        )
        values, residuals = ritz.values[::-1], ritz.residuals[::-1]
        return Sharpness(
            eigenvalues=values[:num_eigenvalues],
            residuals=residuals[:num_eigenvalues],
            smallest=values[-1],
            num_products=ritz.num_products,
            method=hessian.method,
            why=hessian.why,
        )


def hessian_trace(
    model: Model,
    loss_fn: LossFn,
    batch: Nested,
    *,
    micro_batch_size: int | None = None,
    num_products: int = 30,
    method: Method = "auto",
    seed: int = 0,
    count: CountFn | None = None,
) -> Trace:
    """The trace of the Hessian over all of `batch`, as the mean of z·Hz over random signs z: Hutchinson 1990.

    Everything else as for `sharpness`. ValueError for fewer than two products, which have no standard error.
    """
    _check_counts(num_products=num_products)
    if num_products < 2:
        raise ValueError("num_products=1 gives no standard error: at least 2 are needed")
    with hessian_of(model, loss_fn, batch, micro_batch_size=micro_batch_size, method=method, count=count) as hessian:
        draws = []
        for j in range(num_products):
            z = random_vector(hessian.zeros(), seed=seed + j, signs=True)
            draws.append(float(torch.dot(z.double(), hessian.product(z).double())))
        error = float(torch.tensor(draws, dtype=torch.float64).std()) / math.sqrt(num_products)
        return Trace(math.fsum(draws) / num_products, error, num_products, hessian.method)


def sam_sharpness(
    model: Model,
    loss_fn: LossFn,
    batch: Nested,
    *,
    rho: float = 0.05,
    micro_batch_size: int | None = None,
    count: CountFn | None = None,
) -> float:
    """How much the mean loss rises at distance `rho` in the direction of the gradient: Foret et al. 2021, eq. 2.

    L(w + rho g / |g|) - L(w), to first order the largest rise within that distance; 0 where the gradient is zero. Near
    a minimum at most rho^2 / 2 times the top eigenvalue. Three forwards, one backward; all else as for `sharpness`.
    """
    check_rho(rho)
    with hessian_of(
        model, loss_fn, batch, micro_batch_size=micro_batch_size, method="finite-differences", count=count
    ) as hessian:
        gradient = hessian.gradient()
        length = torch.linalg.vector_norm(gradient, dtype=torch.float64)
        if length == 0:
            return 0.0
        before = hessian.loss()
        with hessian.moved(gradient * (rho / length)):
            return float(hessian.loss() - before)


def stability_threshold(optimizer: Optimizer) -> float:
    """The sharpness beyond which gradient descent with this optimizer's present rate diverges on a quadratic.

    2 / lr for SGD, 2 (1 + m) / lr with momentum m, 2 (1 + m) / (lr (1 + 2 m)) with Nesterov's (Cohen et al. 2021, table
    in appendix B); the least over its parameter groups. ValueError for other optimizers, whose threshold is for the
    preconditioned Hessian, and for dampening.
    """
    if not isinstance(optimizer, SGD):
        raise ValueError(
            f"the threshold is known for SGD, got {type(optimizer).__name__}: its steps are preconditioned"
        )
    thresholds = []
    for group in optimizer.param_groups:
        lr, m = float(group["lr"]), float(group["momentum"])
        if group["dampening"] or lr <= 0:
            raise ValueError(f"the threshold needs dampening 0 and lr above 0, got {group['dampening']} and {lr}")
        thresholds.append(2 * (1 + m) / (lr * (1 + 2 * m) if group["nesterov"] else lr))
    return min(thresholds)


def check_rho(rho: float) -> None:
    """ValueError unless `rho` is a distance above 0."""
    if not 0 < rho < math.inf:
        raise ValueError(f"rho must be a distance above 0, got {rho!r}")


def _check_counts(**counts: int) -> None:
    for name, value in counts.items():
        check_size(value, name)
