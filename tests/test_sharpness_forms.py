"""Curvature is that of the loss as it is weighted, in every form; what would be silently wrong is noticed."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import macrobatch as mb

Tokens = dict[str, Tensor]
SIZES = (3, 1, 2)


def tagger() -> nn.Module:
    torch.manual_seed(0)
    return nn.Embedding(9, 9).double()


def tokens() -> Tokens:
    generator = torch.Generator().manual_seed(1)
    x, y = (torch.randint(0, 9, (sum(SIZES), 5), generator=generator) for _ in range(2))
    y[1, 1:], y[4, 2:] = -100, -100
    return {"x": x, "y": y}


def token_sum(model: nn.Module, batch: Tokens) -> Tensor:
    return F.cross_entropy(model(batch["x"]).transpose(1, 2), batch["y"], reduction="sum")


def exact(scale: Tensor | float = 1.0) -> float:
    """The top eigenvalue by brute force, over the full batch in one piece."""
    model, batch = tagger(), tokens()
    weight = model.weight.detach().clone()

    def mean(flat: Tensor) -> Tensor:
        scores = F.embedding(batch["x"], flat.view_as(weight)).transpose(1, 2)
        return F.cross_entropy(scores, batch["y"], reduction="sum") / (batch["y"] != -100).sum() * scale

    return float(torch.linalg.eigvalsh(torch.autograd.functional.hessian(mean, weight.flatten()))[-1])


def pair(model: nn.Module, batch: Tokens) -> Any:
    return token_sum(model, batch), mb.valid_tokens(batch["y"])


def value(model: nn.Module, batch: Tokens) -> Any:
    return mb.Loss(token_sum(model, batch), mb.valid_tokens(batch["y"]))


@pytest.mark.parametrize("loss_fn", [pair, value])
@pytest.mark.parametrize("size", [1, 4, 6])
def test_token_means_have_the_curvature_of_the_full_batch(loss_fn: Any, size: int) -> None:
    found = mb.sharpness(tagger(), loss_fn, tokens(), micro_batch_size=size, tolerance=1e-8, max_products=80)
    assert found.top == pytest.approx(exact(), rel=1e-10)


def test_several_denominators_each_divide_their_own_loss() -> None:
    def named(model: nn.Module, batch: Tokens) -> dict[str, Tensor]:
        return {"tokens": token_sum(model, batch), "samples": 0.5 * model(batch["x"]).square().sum()}

    def count(batch: Tokens) -> dict[str, Any]:
        return {"tokens": mb.valid_tokens(batch["y"]), "samples": len(batch["x"])}

    options: dict[str, Any] = {"count": count, "tolerance": 1e-8, "max_products": 80}
    tops = [mb.sharpness(tagger(), named, tokens(), micro_batch_size=m, **options).top for m in (1, 4, 6)]
    by_differences = mb.sharpness(tagger(), named, tokens(), micro_batch_size=4, method="finite-differences", **options)
    assert tops == pytest.approx([tops[-1]] * 3, rel=1e-10)
    assert by_differences.top == pytest.approx(tops[-1], rel=1e-6)
    assert tops[-1] > 1.1 * exact(), "control: the second loss counts"
    assert mb.sam_sharpness(tagger(), named, tokens(), micro_batch_size=4, count=count) > 0
    assert mb.hessian_trace(tagger(), named, tokens(), micro_batch_size=4, count=count, num_products=2).value > 0


@pytest.mark.parametrize("method", ["auto", "double-backward", "finite-differences"])
def test_a_bare_token_mean_is_refused_in_every_method(method: Any) -> None:
    def bare(model: nn.Module, batch: Tokens) -> Tensor:
        return F.cross_entropy(model(batch["x"]).transpose(1, 2), batch["y"])

    with pytest.raises(ValueError, match="almost surely a mean over valid tokens"):
        mb.sharpness(tagger(), bare, tokens(), micro_batch_size=2, method=method)


def test_a_micro_batch_without_terms_counts_for_nothing() -> None:
    batch = tokens()
    batch["y"][:2] = -100

    def loss_fn(model: nn.Module, batch: Tokens) -> Any:
        return pair(model, batch) if bool((batch["y"] != -100).any()) else (0, 0)

    options: dict[str, Any] = {"tolerance": 1e-8, "max_products": 80}
    cut = mb.sharpness(tagger(), loss_fn, batch, micro_batch_size=2, **options)
    assert cut.top == pytest.approx(mb.sharpness(tagger(), pair, batch, micro_batch_size=6, **options).top, rel=1e-10)
    assert cut.method == "double-backward", "tried on the first micro-batch that has terms"


class Constant(torch.autograd.Function):
    """The cube, whose backward takes for constant what is not: second derivatives are zero, and no error says so."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.x = x.detach()
        return x**3

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        return gradient * 3 * ctx.x**2


class Right(torch.autograd.Function):
    """The cube, done right."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return x**3

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        return gradient * 3 * ctx.saved_tensors[0] ** 2


def test_a_custom_function_with_a_wrong_second_derivative_is_noticed() -> None:
    torch.manual_seed(0)
    model, x = nn.Linear(5, 1).double(), torch.randn(12, 5).double()
    true = mb.sharpness(model, lambda m, b: (m(b) ** 3).mean(), x).top
    noticed = mb.sharpness(model, lambda m, b: Constant.apply(m(b)).mean(), x)
    fine = mb.sharpness(model, lambda m, b: Right.apply(m(b)).mean(), x)
    believed = mb.sharpness(model, lambda m, b: Constant.apply(m(b)).mean(), x, method="double-backward")
    assert noticed.method == "finite-differences"
    assert "a custom autograd function's second derivative is 100% off" in noticed.why
    assert noticed.top == pytest.approx(true, rel=1e-6)
    assert (fine.method, fine.top) == ("double-backward", pytest.approx(true, rel=1e-10))
    assert believed.top == 0, "control: without the comparison it is silently wrong"


def test_what_cannot_be_measured_is_refused() -> None:
    x = torch.randn(12, 5).double()
    norm = nn.Sequential(nn.Linear(5, 6), nn.BatchNorm1d(6, track_running_stats=False), nn.Linear(6, 1)).double()

    def loss_fn(model: nn.Module, batch: Tensor) -> Tensor:
        return model(batch).square().mean()

    assert mb.sharpness(norm, loss_fn, x).top > 0, "one micro-batch is no cut"
    with pytest.raises(ValueError, match=r"'1' .BatchNorm1d. without running statistics.*depend on the cut"):
        mb.sharpness(norm, loss_fn, x, micro_batch_size=4)
    with pytest.raises(ValueError, match=r"needs float32 or float64, parameter 'weight' is torch.bfloat16"):
        mb.sharpness(nn.Linear(5, 1).bfloat16(), loss_fn, x.bfloat16())
