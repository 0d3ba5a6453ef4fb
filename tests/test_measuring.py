"""What `measure=` reports of each micro-batch's own gradient is what brute force finds, micro-batch by micro-batch."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from helpers import difference, gradients
from torch import Tensor, nn
from torch.amp.grad_scaler import GradScaler
from torch.nn import functional as F

import macrobatch as mb

Batch = tuple[Tensor, Tensor]
SIZES = (5, 1, 4, 3)
LossFn = Callable[[nn.Module, Batch], Any]


def model_of(dtype: torch.dtype = torch.float64) -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 4)).to(dtype)


def batch_of(n: int = sum(SIZES)) -> Batch:
    generator = torch.Generator().manual_seed(1)
    return torch.randn(n, 6, generator=generator).double(), torch.randint(0, 4, (n,), generator=generator)


def window_of(batch: Batch) -> mb.Window:
    return mb.Window(list(zip(batch[0].split(SIZES), batch[1].split(SIZES), strict=True)))


CLASS_WEIGHT = torch.tensor([1.0, 5.0, 0.2, 2.0], dtype=torch.float64)


def mean(model: nn.Module, batch: Batch) -> Tensor:
    return F.cross_entropy(model(batch[0]), batch[1])


def class_weighted(model: nn.Module, batch: Batch) -> tuple[Tensor, Tensor]:
    loss = F.cross_entropy(model(batch[0]), batch[1], weight=CLASS_WEIGHT, reduction="sum")
    return loss, CLASS_WEIGHT[batch[1]].sum()


def one_masked(model: nn.Module, batch: Batch) -> tuple[Any, int]:
    n = len(batch[0])
    return (0, 0) if n == 1 else (F.cross_entropy(model(batch[0]), batch[1], reduction="sum"), n)


def brute_force(model: nn.Module, loss_fn: LossFn, window: mb.Window) -> tuple[list[float], list[list[Tensor]]]:
    """W_j and g_j of every micro-batch that has terms."""
    weights, means = [], []
    for micro_batch in window:
        output = loss_fn(model, micro_batch)
        total, weight = output if isinstance(output, tuple) else (output * len(micro_batch[0]), len(micro_batch[0]))
        if float(weight):
            weights.append(float(weight))
            means.append(list(torch.autograd.grad(total / weight, list(model.parameters()))))
    return weights, means


def squared(gradient: list[Tensor]) -> float:
    return sum(float(g.double().square().sum()) for g in gradient)


@pytest.mark.parametrize("loss_fn", [mean, class_weighted, one_masked])
def test_moments_are_those_of_the_micro_batches_one_by_one(loss_fn: LossFn) -> None:
    model, window = model_of(), window_of(batch_of())
    weights, means = brute_force(model, loss_fn, window)
    report = mb.Accumulator(model, loss_fn, measure="norms").run(window)
    w = [weight / sum(weights) for weight in weights]
    n = [size for size in SIZES if size > 1 or loss_fn is not one_masked]
    q = [squared(g) for g in means]
    moments = report.moments
    assert moments is not None
    assert report.mean_squares is None
    whole = [sum(wj * gj for wj, gj in zip(w, column, strict=True)) for column in zip(*means, strict=True)]
    expected = (
        (moments.num_micro_batches, len(w)),
        (moments.mean_squared_norm, sum(a * b for a, b in zip(w, q, strict=True))),
        (moments.squared_norm, squared(whole)),  # type: ignore[arg-type]
        (moments.inverse_size, sum(a / b for a, b in zip(w, n, strict=True))),
        (moments.weighted_inverse_size, sum(a * a / b for a, b in zip(w, n, strict=True))),
    )
    for mine, theirs in expected:
        assert mine.shape == ()
        assert mine.dtype == torch.float64
        assert float(mine) == pytest.approx(theirs, rel=1e-11)
    assert [value for value in moments.squared_norms.tolist() if value] == pytest.approx(q, rel=1e-11)
    assert len(moments.squared_norms) == len(SIZES)
    assert sum(q) / len(q) != pytest.approx(float(moments.mean_squared_norm), rel=1e-3), "control: an unweighted mean"


@pytest.mark.parametrize("loss_fn", [mean, class_weighted, one_masked])
def test_squares_are_averaged_elementwise(loss_fn: LossFn) -> None:
    model, window = model_of(), window_of(batch_of())
    weights, means = brute_force(model, loss_fn, window)
    report = mb.Accumulator(model, loss_fn, measure="squares").run(window)
    assert report.mean_squares is not None
    for j, p in enumerate(report.parameters):
        expected = sum(weight / sum(weights) * g[j].square() for weight, g in zip(weights, means, strict=True))
        assert torch.allclose(report.mean_squares[j], expected, rtol=1e-11, atol=0)  # type: ignore[arg-type]
        assert p.grad is not None
        assert not torch.allclose(report.mean_squares[j], p.grad.square(), rtol=0.01, atol=0), "control"  # type: ignore[arg-type]


@pytest.mark.parametrize("measure", ["norms", "squares"])
def test_the_gradient_is_that_without_measuring(measure: Any) -> None:
    results = []
    for choice in (None, measure):
        model = model_of()
        accumulator = mb.Accumulator(model, mean, measure=choice)
        assert (accumulator.run(window_of(batch_of())).moments is None) == (choice is None)
        accumulator.run(window_of(batch_of()), add=True)
        results.append(gradients(model))
    assert difference(*results) <= 1e-15


def test_two_denominators_count_samples() -> None:
    def loss_fn(model: nn.Module, batch: Batch) -> dict[str, Tensor]:
        losses = F.cross_entropy(model(batch[0]), batch[1], reduction="none")
        return {"all": losses.sum(), "even": losses[batch[1] % 2 == 0].sum()}

    def count(batch: Batch) -> dict[str, Any]:
        return {"all": len(batch[0]), "even": (batch[1] % 2 == 0).sum()}

    model, window = model_of(), window_of(batch_of())
    totals = {name: sum(float(count(x)[name]) for x in window) for name in ("all", "even")}
    contributions = []
    for micro_batch in window:
        loss = sum(value / totals[name] for name, value in loss_fn(model, micro_batch).items())
        contributions.append(list(torch.autograd.grad(loss, list(model.parameters()))))  # type: ignore[arg-type]
    moments = mb.Accumulator(model, loss_fn, count=count, measure="norms").run(window).moments
    assert moments is not None
    expected = [squared(h) * (sum(SIZES) / n) ** 2 for h, n in zip(contributions, SIZES, strict=True)]
    assert moments.squared_norms.tolist() == pytest.approx(expected, rel=1e-11)


def test_the_loss_scale_is_not_in_the_moments() -> None:
    found = []
    for scaler in (None, GradScaler("cpu", init_scale=2.0**12)):
        model = model_of(torch.float32)
        inputs, targets = batch_of()
        report = mb.Accumulator(model, mean, scaler=scaler, measure="squares").run(window_of((inputs.float(), targets)))
        assert report.moments is not None
        assert report.mean_squares is not None
        squares = [float(square.double().sum()) for square in report.mean_squares if square is not None]
        found.append([float(report.moments.mean_squared_norm), float(report.moments.squared_norm), *squares])
    assert found[1] == pytest.approx(found[0], rel=1e-5)


def test_bf16_parameters_are_measured_in_float32() -> None:
    model, (inputs, targets) = model_of(torch.bfloat16), batch_of()
    report = mb.Accumulator(model, mean, measure="norms").run(window_of((inputs.bfloat16(), targets)))
    assert report.moments is not None
    weighted = sum(n * q for n, q in zip(SIZES, report.moments.squared_norms.tolist(), strict=True)) / sum(SIZES)
    assert float(report.moments.mean_squared_norm) == pytest.approx(weighted, rel=1e-12)
    assert all(p.grad is not None and p.grad.dtype == torch.bfloat16 for p in model.parameters())


def test_what_bf16_parameters_measure_of_the_window_is_the_float32_sum() -> None:
    (inputs, targets), squared_norms = batch_of(), []
    for grad_dtype in (None, torch.float32):
        model = model_of(torch.bfloat16)
        accumulator = mb.Accumulator(model, mean, measure="norms", grad_dtype=grad_dtype)
        moments = accumulator.run(window_of((inputs.bfloat16(), targets))).moments
        assert moments is not None
        squared_norms.append((float(moments.squared_norm), squared([p.grad for p in model.parameters()])))  # type: ignore[misc]
    (rounded, of_bf16), (whole, of_float32) = squared_norms
    assert rounded == whole == pytest.approx(of_float32, rel=1e-6)
    assert of_bf16 != pytest.approx(whole, rel=1e-5), "control: rounded once, in the end"


def have_same_squares(mine: mb.Report, theirs: mb.Report, rtol: float) -> bool:
    assert mine.mean_squares is not None
    assert theirs.mean_squares is not None
    pairs = zip(mine.mean_squares, theirs.mean_squares, strict=True)
    return all(torch.allclose(a, b, rtol=rtol) for a, b in pairs)  # type: ignore[arg-type]


def test_a_window_that_is_added_to_gradients_from_before_is_measured_by_itself() -> None:
    accumulator = mb.Accumulator(model_of(), mean, measure="squares")
    first, second = (accumulator.run(window_of(batch_of()), add=add) for add in (False, True))
    assert first.moments is not None
    assert second.moments is not None
    assert float(second.moments.squared_norm) == pytest.approx(float(first.moments.squared_norm), rel=1e-12)
    assert have_same_squares(second, first, rtol=1e-12)


def test_squares_of_complex_gradients_are_those_of_their_absolute_values() -> None:
    torch.manual_seed(0)
    model = nn.Linear(6, 4, dtype=torch.complex128)
    window = window_of((torch.randn(sum(SIZES), 6, dtype=torch.complex128), batch_of()[1]))

    def loss_fn(model: nn.Module, batch: Batch) -> Tensor:
        return model(batch[0]).abs().square().mean()

    weights, means = brute_force(model, loss_fn, window)
    report = mb.Accumulator(model, loss_fn, measure="squares").run(window)
    assert report.mean_squares is not None
    for j, square in enumerate(report.mean_squares):
        expected = sum(weight / sum(weights) * g[j].abs().square() for weight, g in zip(weights, means, strict=True))
        assert square is not None
        assert not square.is_complex()
        assert torch.allclose(square, expected, rtol=1e-11, atol=0)  # type: ignore[arg-type]
    assert report.moments is not None
    q = [sum(float(g.abs().square().sum()) for g in gradient) for gradient in means]
    assert report.moments.squared_norms.tolist() == pytest.approx(q, rel=1e-11)


def test_sparse_gradients_are_measured() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.EmbeddingBag(7, 3, sparse=True), nn.Linear(3, 4)).double()
    dense = nn.Sequential(nn.EmbeddingBag(7, 3), nn.Linear(3, 4)).double()
    dense.load_state_dict(model.state_dict())
    inputs = torch.randint(0, 7, (sum(SIZES), 5), generator=torch.Generator().manual_seed(0))
    window = window_of((inputs, batch_of()[1]))
    reports = [mb.Accumulator(m, mean, measure="squares").run(window) for m in (model, dense)]
    assert model[0].weight.grad is not None
    assert model[0].weight.grad.is_sparse
    first, second = (report.moments for report in reports)
    assert first is not None
    assert second is not None
    assert first.squared_norms.tolist() == pytest.approx(second.squared_norms.tolist(), rel=1e-12)
    assert float(first.squared_norm) == pytest.approx(float(second.squared_norm), rel=1e-12)
    assert torch.allclose(reports[0].mean_squares[0], reports[1].mean_squares[0], rtol=1e-12)  # type: ignore[index,arg-type]


def test_a_window_that_ran_out_of_memory_is_measured_as_it_would_have_been() -> None:
    def run(fail_at: int) -> tuple[mb.Report, list[Tensor | None]]:
        model, calls = model_of(), [0]

        def loss_fn(model: nn.Module, batch: Batch) -> Tensor:
            calls[0] += 1
            loss = mean(model, batch)
            if calls[0] == fail_at:
                loss.register_hook(fail)
            return loss

        def fail(_: Tensor) -> None:
            raise torch.OutOfMemoryError("injected")

        accumulator = mb.Accumulator(model, loss_fn, measure="squares")
        return accumulator.run(window_of(batch_of())), gradients(model)

    (whole, expected), (recovered, found) = run(0), run(3)
    assert recovered.retries == 1
    assert len(recovered.micro_batch_sizes) == 6
    assert difference(found, expected) <= 1e-12
    assert whole.moments is not None
    assert recovered.moments is not None
    assert recovered.moments.squared_norms.tolist() == pytest.approx(whole.moments.squared_norms.tolist(), rel=1e-11)
    assert have_same_squares(recovered, whole, rtol=1e-11)


def test_measuring_keeps_one_more_copy_of_the_gradients_and_no_more() -> None:
    torch.manual_seed(0)
    model = nn.Linear(256, 256, bias=False)
    batch = torch.randn(32, 256), torch.randint(0, 256, (32,))
    peaks = []
    for measure in (None, "norms"):
        accumulator = mb.Accumulator(model, mean, micro_batch_size=4, measure=measure)  # type: ignore[arg-type]

        def window(accumulator: mb.Accumulator = accumulator) -> None:
            accumulator.run(batch)
            model.zero_grad()

        window()
        peaks.append(mb.peak_memory(window))
    copy = model.weight.nbytes
    # Without measuring, autograd adds a fresh gradient into the sum: it stands beside it for a moment as well.
    assert peaks[1] - peaks[0] <= 0.1 * copy


def test_an_unknown_measure_is_refused() -> None:
    with pytest.raises(ValueError, match="measure must be 'norms', 'squares' or None, got 'norm'"):
        mb.Accumulator(model_of(), mean, measure="norm")  # type: ignore[arg-type]


def test_a_window_that_ran_again_from_zero_is_measured_once() -> None:
    """BatchNorm cannot be mended in place, so a failed backward starts the window over; a failed forward does not."""

    def run(fail_at: int, in_backward: bool) -> mb.Report:
        torch.manual_seed(0)
        model, calls = nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.Linear(8, 4)).double(), [0]

        def fail(_: Tensor | None = None) -> None:
            raise torch.OutOfMemoryError("injected")

        def loss_fn(model: nn.Module, batch: Batch) -> Tensor:
            calls[0] += 1
            if calls[0] == fail_at and not in_backward:
                fail()
            loss = mean(model, batch)
            if calls[0] == fail_at:
                loss.register_hook(fail)
            return loss

        accumulator = mb.Accumulator(model, loss_fn, measure="squares", batch_norm="micro_batch")
        inputs, targets = batch_of(12)
        report = accumulator.run(mb.Window(list(zip(inputs.split(4), targets.split(4), strict=True))))
        assert report.retries == 1
        assert report.micro_batch_sizes == (2,) * 6
        return report

    again, in_place = run(3, in_backward=True), run(1, in_backward=False)
    assert again.moments is not None
    assert in_place.moments is not None
    assert int(again.moments.num_micro_batches) == 3
    assert again.moments.squared_norms.tolist() == pytest.approx(in_place.moments.squared_norms.tolist(), rel=1e-11)
    assert again.mean_squares is not None
    assert in_place.mean_squares is not None
    for mine, theirs in zip(again.mean_squares, in_place.mean_squares, strict=True):
        assert torch.allclose(mine, theirs, rtol=1e-9, atol=1e-20)  # type: ignore[arg-type]
