"""The ends of a symmetric operator's spectrum by the Lanczos method, with full re-orthogonalisation."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Ritz:
    """What the Krylov space of `num_products` products tells: eigenvalues, ascending, and how far off each may be.

    For a residual r there is an eigenvalue of the operator within r of it.
    """

    values: tuple[float, ...]
    residuals: tuple[float, ...]
    num_products: int


def lanczos(
    product: Callable[[Tensor], Tensor],
    start: Tensor,
    *,
    num_eigenvalues: int = 1,
    max_products: int = 30,
    tolerance: float = 1e-6,
) -> Ritz:
    """The top `num_eigenvalues` of the operator are within `tolerance`, relative, or `max_products` were made.

    `product`: vector (n,) to vector (n,), symmetric. `start`: (n,), not zero; it is the first of the vectors that are
    kept, one for each product. Dot products are in float64. Lanczos 1950; every vector is made orthogonal to all before
    it, twice, which is enough (Parlett, The Symmetric Eigenvalue Problem, 6.9).
    """
    basis = [start / _norm(start)]
    diagonal: list[float] = []
    beside: list[float] = []
    while True:
        w = product(basis[-1])
        diagonal.append(_dot(basis[-1], w))
        w = _orthogonal(w, basis)
        length = _norm(w)
        ritz = _ritz(diagonal, beside, length)
        scale = max(abs(value) for value in ritz.values)
        wanted = list(zip(ritz.values, ritz.residuals, strict=True))[-num_eigenvalues:]
        settled = len(diagonal) >= num_eigenvalues and all(r <= tolerance * max(abs(v), 1e-30) for v, r in wanted)
        exhausted = length <= 1e-12 * max(scale, 1e-30) or len(basis) == start.numel()
        if settled or len(diagonal) >= max_products or (exhausted and len(diagonal) >= num_eigenvalues):
            return ritz
        if exhausted:  # the start lies in an invariant space too small for so many eigenvalues: go on beside it
            w, length = _orthogonal(random_vector(start, seed=len(basis)), basis), 0.0
            basis.append(w / _norm(w))
        else:
            basis.append(w / length)
        beside.append(length)


def random_vector(like: Tensor, *, seed: int, signs: bool = False) -> Tensor:
    """Normal numbers, or random signs, as `like` in shape, dtype and device; drawn on the CPU: the same everywhere."""
    generator = torch.Generator().manual_seed(seed)
    if signs:
        drawn = torch.randint(0, 2, like.shape, generator=generator, dtype=torch.int8) * 2 - 1
    else:
        drawn = torch.randn(like.shape, generator=generator, dtype=torch.float64)
    return drawn.to(like.device, like.dtype)


def _dot(a: Tensor, b: Tensor) -> float:
    return float(torch.dot(a.double(), b.double()))


def _norm(a: Tensor) -> float:
    return float(torch.linalg.vector_norm(a, dtype=torch.float64))


def _orthogonal(w: Tensor, basis: list[Tensor]) -> Tensor:
    for _ in range(2):
        for v in basis:
            w = w - v * _dot(v, w)
    return w


def _ritz(diagonal: list[float], beside: list[float], next_beside: float) -> Ritz:
    side = torch.tensor(beside, dtype=torch.float64)
    tridiagonal = torch.tensor(diagonal, dtype=torch.float64).diag() + side.diag(1) + side.diag(-1)
    values, vectors = torch.linalg.eigh(tridiagonal)
    residuals = (next_beside * vectors[-1]).abs()
    return Ritz(tuple(values.tolist()), tuple(residuals.tolist()), len(diagonal))
