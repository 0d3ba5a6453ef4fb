"""Curvature: the top of the exact Hessian, whatever the cut, whatever the method; and the edge of stability."""

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

import macrobatch as mb
from macrobatch.lanczos import lanczos, random_vector

Batch = tuple[Tensor, Tensor]
SIZES = (7, 1, 4)


def small_net(dtype: torch.dtype = torch.float64) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(5, 7), nn.Tanh(), nn.Linear(7, 3)).to(dtype)


def batch_of(n: int = sum(SIZES), dtype: torch.dtype = torch.float64) -> Batch:
    generator = torch.Generator().manual_seed(3)
    return torch.randn(n, 5, generator=generator).to(dtype), torch.randint(0, 3, (n,), generator=generator)


def cross_entropy(model: nn.Module, batch: Batch) -> Tensor:
    return F.cross_entropy(model(batch[0]), batch[1])


def in_sums(model: nn.Module, batch: Batch) -> tuple[Tensor, Tensor]:
    weight = torch.tensor([1.0, 4.0, 0.5], dtype=batch[0].dtype)
    return F.cross_entropy(model(batch[0]), batch[1], weight=weight, reduction="sum"), weight[batch[1]].sum()


def mean_of(loss_fn: Callable[..., Any]) -> Callable[[nn.Module, Batch], Tensor]:
    def mean(model: nn.Module, batch: Batch) -> Tensor:
        output = loss_fn(model, batch)
        return output[0] / output[1] if isinstance(output, tuple) else output

    return mean


def exact_hessian(model: nn.Module, loss_fn: Callable[..., Any], batch: Batch) -> Tensor:
    """Brute force over the full batch in one piece, shape (n, n)."""
    names = [name for name, p in model.named_parameters() if p.requires_grad]
    shapes = [model.get_parameter(name).shape for name in names]
    flat = torch.cat([model.get_parameter(name).detach().flatten() for name in names])

    def loss(flat: Tensor) -> Tensor:
        pieces = flat.split([shape.numel() for shape in shapes])
        weights = {name: piece.view(shape) for name, piece, shape in zip(names, pieces, shapes, strict=True)}
        return mean_of(loss_fn)(lambda x: functional_call(model, weights, (x,)), batch)  # type: ignore[arg-type]

    hessian: Tensor = torch.autograd.functional.hessian(loss, flat)
    return hessian


def window_of(batch: Batch) -> mb.Window:
    return mb.Window(list(zip(batch[0].split(SIZES), batch[1].split(SIZES), strict=True)))


@pytest.mark.parametrize("loss_fn", [cross_entropy, in_sums])
def test_lanczos_finds_the_top_eigenvalue_in_twenty_products(loss_fn: Callable[..., Any]) -> None:
    model, batch = small_net(), batch_of()
    exact = torch.linalg.eigvalsh(exact_hessian(model, loss_fn, batch))
    found = mb.sharpness(model, loss_fn, window_of(batch), max_products=20, tolerance=0.0)
    assert found.num_products == 20
    assert found.top == pytest.approx(float(exact[-1]), rel=1e-6)
    assert found.smallest == pytest.approx(float(exact[0]), rel=1e-3)


def test_control_power_iteration_is_far_off_after_as_many_products() -> None:
    model, batch = small_net(), batch_of()
    exact = exact_hessian(model, cross_entropy, batch)
    top = float(torch.linalg.eigvalsh(exact)[-1])
    v = random_vector(exact[0], seed=0)
    for _ in range(10):
        v = exact @ (v / v.norm())
    mine = mb.sharpness(model, cross_entropy, batch, max_products=10, tolerance=0.0).top
    assert abs(float(v.norm()) - top) > 10 * abs(mine - top)


def test_several_eigenvalues_come_with_residuals_that_bound_their_errors() -> None:
    model, batch = small_net(), batch_of()
    exact = torch.linalg.eigvalsh(exact_hessian(model, cross_entropy, batch)).flip(0)
    found = mb.sharpness(model, cross_entropy, batch, num_eigenvalues=4, max_products=12, tolerance=0.0)
    for value, residual in zip(found.eigenvalues, found.residuals, strict=True):
        assert float((exact - value).abs().min()) <= residual + 1e-12
    found = mb.sharpness(model, cross_entropy, batch, num_eigenvalues=4, max_products=60)
    assert found.eigenvalues == pytest.approx(exact[:4].tolist(), rel=1e-6)
    assert found.num_products < 60, "it stops when the tolerance is met"


def test_repeated_eigenvalues_are_found_where_one_krylov_space_holds_only_one() -> None:
    matrix = torch.diag(torch.tensor([3.0, 3.0, 1.0, 1.0], dtype=torch.float64))
    ritz = lanczos(lambda v: matrix @ v, random_vector(matrix[0], seed=0), num_eigenvalues=3, max_products=10)
    assert ritz.values[-3:] == pytest.approx([1.0, 3.0, 3.0])


@pytest.mark.parametrize("method", ["double-backward", "finite-differences"])
@pytest.mark.parametrize("loss_fn", [cross_entropy, in_sums])
def test_the_value_does_not_depend_on_the_cut(loss_fn: Callable[..., Any], method: Any) -> None:
    model, batch = small_net(), batch_of()
    whole = mb.sharpness(model, loss_fn, batch, method=method, max_products=15, tolerance=0.0)
    for size in (1, 5):
        cut = mb.sharpness(model, loss_fn, batch, micro_batch_size=size, method=method, max_products=15, tolerance=0.0)
        assert cut.top == pytest.approx(whole.top, rel=1e-10)
    uneven = mb.sharpness(model, loss_fn, window_of(batch), method=method, max_products=15, tolerance=0.0)
    assert uneven.top == pytest.approx(whole.top, rel=1e-10)


def test_control_a_mean_over_uneven_micro_batches_is_another_hessian() -> None:
    model, batch = small_net(), batch_of()
    parts = [exact_hessian(model, cross_entropy, part) for part in window_of(batch)]
    exact = exact_hessian(model, cross_entropy, batch)
    assert float((sum(parts) / len(parts) - exact).norm() / exact.norm()) > 0.1  # type: ignore[union-attr]


def test_finite_differences_agree_in_float32() -> None:
    model, batch = small_net(torch.float32), batch_of(dtype=torch.float32)
    exact = mb.sharpness(small_net(), cross_entropy, batch_of(), max_products=20, tolerance=0.0).top
    found = mb.sharpness(model, cross_entropy, batch, method="finite-differences", max_products=20, tolerance=0.0)
    assert found.method == "finite-differences"
    assert found.top == pytest.approx(exact, rel=1e-3)


class OnceOnly(torch.autograd.Function):
    """A kernel without a second derivative, as many fused ones are."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return x.tanh()

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        (x,) = ctx.saved_tensors
        return gradient * (1 - x.tanh() ** 2)


def test_a_kernel_without_a_second_derivative_is_measured_by_differences() -> None:
    def loss_fn(model: nn.Sequential, batch: Batch) -> Tensor:
        return F.cross_entropy(model[2](OnceOnly.apply(model[0](batch[0]))), batch[1])

    model, batch = small_net(), batch_of()
    expected = mb.sharpness(model, cross_entropy, batch)
    found = mb.sharpness(model, loss_fn, batch)
    assert expected.method == "double-backward"
    assert found.method == "finite-differences"
    assert "double backward failed" in found.why
    assert found.top == pytest.approx(expected.top, rel=1e-6)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        mb.sharpness(model, loss_fn, batch, method="double-backward")


def test_frozen_tied_and_unused_parameters_count_as_they_are_trained() -> None:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second, self.unused = nn.Linear(5, 5), nn.Linear(5, 5), nn.Linear(2, 2)
            self.second.weight = self.first.weight
            self.head = nn.Linear(5, 3)
            self.head.bias.requires_grad_(False)

        def forward(self, x: Tensor) -> Tensor:
            return self.head(self.second(self.first(x).tanh()).tanh())

    torch.manual_seed(0)
    model, batch = Tied().double(), batch_of()
    found = mb.sharpness(model, cross_entropy, batch, micro_batch_size=5, max_products=25)
    exact = torch.linalg.eigvalsh(exact_hessian(model, cross_entropy, batch))
    assert found.top == pytest.approx(float(exact[-1]), rel=1e-6)


def test_nothing_is_left_changed() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(5, 7), nn.BatchNorm1d(7), nn.Dropout(0.5), nn.Linear(7, 3)).double()
    model[0].weight.grad = torch.ones_like(model[0].weight)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    state = torch.get_rng_state()
    for method in ("double-backward", "finite-differences"):
        mb.sharpness(model, cross_entropy, batch_of(), micro_batch_size=4, method=method, max_products=3)  # type: ignore[arg-type]
    mb.hessian_trace(model, cross_entropy, batch_of(), num_products=2)
    mb.sam_sharpness(model, cross_entropy, batch_of())
    assert model.training
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(model[0].weight.grad, torch.ones_like(model[0].weight))
    assert model[3].weight.grad is None


def test_the_weights_come_back_after_an_error_too() -> None:
    model, calls = small_net(), [0]
    before = [p.detach().clone() for p in model.parameters()]

    def failing(model: nn.Module, batch: Batch) -> Tensor:
        calls[0] += 1
        if calls[0] == 3:
            raise KeyError("lost")
        return cross_entropy(model, batch)

    with pytest.raises(KeyError, match="lost"):
        mb.sharpness(model, failing, batch_of(), method="finite-differences")
    assert all(torch.equal(p, b) for p, b in zip(model.parameters(), before, strict=True))


def test_the_same_seed_gives_the_same_bits() -> None:
    model, batch = small_net(torch.float32), batch_of(dtype=torch.float32)
    runs = [mb.sharpness(model, cross_entropy, batch, micro_batch_size=4, max_products=5) for _ in range(2)]
    assert runs[0] == runs[1]
    assert mb.sharpness(model, cross_entropy, batch, micro_batch_size=4, max_products=5, seed=1).top != runs[0].top


def test_the_trace_is_within_its_error_of_the_exact_one() -> None:
    model, batch = small_net(), batch_of()
    exact = float(exact_hessian(model, cross_entropy, batch).trace())
    found = mb.hessian_trace(model, cross_entropy, batch, micro_batch_size=5, num_products=200)
    assert abs(found.value - exact) < 4 * found.standard_error
    assert found.standard_error < 0.1 * exact


def test_a_loss_linear_in_the_weights_has_no_curvature() -> None:
    def linear(model: nn.Module, batch: Batch) -> Tensor:
        return model(batch[0]).mean()

    torch.manual_seed(0)
    assert mb.sharpness(nn.Linear(5, 3).double(), linear, batch_of()).top == 0.0


def test_sam_sharpness_is_the_rise_along_the_gradient() -> None:
    model, batch = small_net(), batch_of()
    gradient = torch.autograd.grad(cross_entropy(model, batch), list(model.parameters()))
    length = torch.stack([g.norm() for g in gradient]).norm()
    before = float(cross_entropy(model, batch).detach())
    moved = small_net()
    with torch.no_grad():
        for p, g in zip(moved.parameters(), gradient, strict=True):
            p.add_(0.05 * g / length)
        expected = float(cross_entropy(moved, batch).detach()) - before
    assert mb.sam_sharpness(model, cross_entropy, batch, micro_batch_size=5) == pytest.approx(expected, rel=1e-10)
    assert mb.sam_sharpness(model, cross_entropy, batch, rho=0.5) > 5 * expected


def test_near_a_minimum_sam_sharpness_is_half_rho_squared_times_the_top_eigenvalue() -> None:
    curvature = torch.tensor([4.0, 1.0, 0.25], dtype=torch.float64)

    class Point(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.w = nn.Parameter(torch.tensor([1e-9, 0.0, 0.0], dtype=torch.float64))

    def quadratic(model: Point, batch: Tensor) -> Tensor:
        return (curvature * model.w.square()).sum() / 2 + 0 * batch.sum()

    assert mb.sam_sharpness(Point(), quadratic, torch.zeros(2, 1), rho=0.1) == pytest.approx(0.01 * 4 / 2, rel=1e-6)


OPTIMIZERS = {
    "gradient descent": {"lr": 0.1},
    "heavy ball": {"lr": 0.1, "momentum": 0.9},
    "Nesterov": {"lr": 0.1, "momentum": 0.9, "nesterov": True},
}


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_a_quadratic_is_stable_just_below_the_threshold_and_diverges_just_above(name: str) -> None:
    for factor, stable in ((0.99, True), (1.01, False)):
        w = nn.Parameter(torch.ones((), dtype=torch.float64))
        optimizer = torch.optim.SGD([w], **OPTIMIZERS[name])  # type: ignore[arg-type]
        curvature = factor * mb.stability_threshold(optimizer)
        for _ in range(2000):
            w.grad = curvature * w.detach()
            optimizer.step()
        assert (abs(w.item()) < 1) is stable


def edge_of_stability(lr: float, num_updates: int) -> float:
    """lambda lr / 2 after full-batch gradient descent on a small tanh net: Cohen et al. 2021."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(10, 32), nn.Tanh(), nn.Linear(32, 32), nn.Tanh(), nn.Linear(32, 3)).double()
    generator = torch.Generator().manual_seed(1)
    inputs = torch.randn(96, 10, generator=generator).double()
    targets = torch.randn(96, 3, generator=generator).double()

    def loss_fn(model: nn.Module, batch: Batch) -> Tensor:
        return F.mse_loss(model(batch[0]), batch[1]) / 2

    optimizer = torch.optim.SGD(model.parameters(), lr=lr)
    for _ in range(num_updates):
        optimizer.zero_grad()
        loss_fn(model, (inputs, targets)).backward()
        optimizer.step()
    top = mb.sharpness(model, loss_fn, (inputs, targets), micro_batch_size=40).top
    return top / mb.stability_threshold(optimizer)


def test_gradient_descent_sharpens_up_to_the_edge_of_stability() -> None:
    assert edge_of_stability(1.0, 5) < 0.8, "control: it does not begin there"
    assert edge_of_stability(1.0, 1500) == pytest.approx(1, abs=0.05)


def test_bad_input_is_refused() -> None:
    model, batch = small_net(), batch_of()
    with pytest.raises(ValueError, match="the batch is empty: curvature needs at least one sample"):
        mb.sharpness(model, cross_entropy, (batch[0][:0], batch[1][:0]))
    with pytest.raises(ValueError, match="num_eigenvalues=100, but 66 trainable numbers have only 66"):
        mb.sharpness(model, cross_entropy, batch, num_eigenvalues=100, max_products=200)
    with pytest.raises(ValueError, match="31 eigenvalues need at least as many products, got max_products=30"):
        mb.sharpness(model, cross_entropy, batch, num_eigenvalues=31)
    with pytest.raises(ValueError, match="max_products must be an integer of at least 1, got 0"):
        mb.sharpness(model, cross_entropy, batch, max_products=0)
    with pytest.raises(ValueError, match=r"method must be 'auto', .* got 'exact'"):
        mb.sharpness(model, cross_entropy, batch, method="exact")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="num_products=1 gives no standard error"):
        mb.hessian_trace(model, cross_entropy, batch, num_products=1)
    for rho in (0.0, -1.0, math.inf, math.nan):
        with pytest.raises(ValueError, match="rho must be a distance above 0"):
            mb.sam_sharpness(model, cross_entropy, batch, rho=rho)
    with pytest.raises(ValueError, match="no loss terms"):
        mb.sharpness(model, lambda model, batch: (0, 0), batch)
    with pytest.raises(ValueError, match="does not depend on any trainable parameter"):
        mb.sharpness(model, lambda model, batch: batch[0].mean(), batch)
    with pytest.raises(ValueError, match="known for SGD, got Adam"):
        mb.stability_threshold(torch.optim.Adam(model.parameters()))
    with pytest.raises(ValueError, match="dampening 0"):
        mb.stability_threshold(torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, dampening=0.5))
    with pytest.raises(ValueError, match="makes it one for"):
        mb.sharpness(model, nn.CrossEntropyLoss(), batch)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="curvature is that of one batch, got a DataLoader"):
        mb.sharpness(model, cross_entropy, DataLoader(TensorDataset(*batch)))
    frozen = small_net().requires_grad_(False)
    with pytest.raises(ValueError, match="no parameter that requires a gradient"):
        mb.sharpness(frozen, cross_entropy, batch)
