"""A loss_fn says what it averages over in one of four forms; whatever else it returns is refused with the forms."""

import math
import re
from collections.abc import Mapping
from fractions import Fraction
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import macrobatch as mb
from macrobatch.tally import Tally
from macrobatch.weighting import Terms, checked_count, refuse_bare_token_mean, terms_of

FORMS = r"returns \(loss_sum, loss_weight\), or a scalar tensor.*\{name: loss_sum\}.*count=\), or macrobatch.Loss"


def scalar(value: float = 3.0) -> Tensor:
    return torch.tensor(value, dtype=torch.float64, requires_grad=True)


def value_of(terms: Terms) -> float:
    """The sum over all terms of the loss that `terms` stands for."""
    return sum(float(x.detach()) for x in terms.sums.values()) * terms.multiplier


# ---------------------------------------------------------------------------------------------------------------------
# The forms


def test_a_sum_and_its_weight_are_taken_as_they_are() -> None:
    loss_sum, weight = scalar(), torch.tensor(7)
    terms = terms_of((loss_sum, weight), num_samples=4, has_count=False)
    assert terms.sums["loss"] is loss_sum
    assert (terms.multiplier, terms.is_mean, terms.is_empty) == (1, False, False)
    assert terms.weight == weight


def test_a_bare_scalar_is_the_mean_over_the_samples_of_its_micro_batch() -> None:
    terms = terms_of(scalar(3.0), num_samples=4, has_count=False)
    assert (value_of(terms), terms.weight, terms.is_mean) == (12.0, 4, True)


def test_with_count_a_bare_scalar_is_a_sum_and_names_are_sums() -> None:
    terms = terms_of(scalar(3.0), num_samples=4, has_count=True)
    assert (value_of(terms), terms.weight, terms.is_mean) == (3.0, None, False)
    terms = terms_of({"policy": scalar(3.0), "kl": scalar(1.0)}, num_samples=4, has_count=True)
    assert {name: float(x.detach()) for name, x in terms.sums.items()} == {"policy": 3.0, "kl": 1.0}


def test_a_loss_carries_metrics_beside_sum_and_weight() -> None:
    loss = mb.Loss(scalar(), 5, metrics={"correct": torch.tensor([3]), "seen": 4, "part": np.float32(0.5)})
    terms = terms_of(loss, num_samples=4, has_count=False)
    assert (value_of(terms), terms.weight) == (3.0, 5)
    assert {name: float(x) for name, x in terms.metrics.items()} == {"correct": 3.0, "seen": 4.0, "part": 0.5}
    assert all(not isinstance(x, Tensor) or x.ndim == 0 for x in terms.metrics.values())
    assert terms_of(mb.Loss({"a": scalar()}), 4, has_count=True).sums.keys() == {"a"}


@pytest.mark.parametrize(
    "weight", [5, 5.0, np.int64(5), np.float32(5), Fraction(5), torch.tensor(5), torch.ones(1) * 5]
)
def test_a_weight_is_any_real_number_or_a_tensor_with_one_entry(weight: Any) -> None:
    checked = terms_of((scalar(), weight), 4, has_count=False).weight
    assert float(checked) == 5  # type: ignore[arg-type]
    assert not isinstance(checked, Tensor) or checked.ndim == 0


def test_the_gradient_does_not_flow_through_a_weight() -> None:
    weight = torch.tensor(2.0, requires_grad=True)
    checked = terms_of((scalar(), weight * 3), 4, has_count=False).weight
    assert isinstance(checked, Tensor)
    assert not checked.requires_grad


@pytest.mark.parametrize("output", [(0, 0), (0.0, 0), (np.float64(0), 0), (torch.tensor(math.nan), 0), (scalar(), 0.0)])
def test_a_micro_batch_without_terms_has_nothing_to_run_backward_on(output: Any) -> None:
    assert terms_of(output, 4, has_count=False).is_empty
    assert not terms_of((scalar(), 1e-30), 4, has_count=False).is_empty


def test_terms_whose_loss_is_exactly_zero_are_counted_without_a_backward() -> None:
    terms = terms_of((0, 6), 4, has_count=False)
    assert (terms.is_empty, terms.weight) == (True, 6)


# ---------------------------------------------------------------------------------------------------------------------
# Refusals


@pytest.mark.parametrize(
    ("output", "what"),
    [
        (None, "a NoneType"),
        (1.5, "a float"),
        ([scalar(), 3], "a list"),
        ((scalar(),), "a tuple of 1"),
        ((scalar(), 3, {}), "a tuple of 3"),
        ("loss", "a str"),
    ],
)
def test_what_is_none_of_the_forms_is_refused_with_all_of_them(output: Any, what: str) -> None:
    with pytest.raises(ValueError, match=rf"the loss_fn returned {what}\. A loss_fn {FORMS}"):
        terms_of(output, 4, has_count=False)


def test_an_output_of_transformers_returned_as_it_is_is_refused_not_taken_for_named_sums() -> None:
    outputs = pytest.importorskip("transformers").modeling_outputs
    for output in (outputs.CausalLMOutput(loss=scalar(), logits=torch.ones(2, 3)), outputs.CausalLMOutput()):
        for has_count in (False, True):
            with pytest.raises(ValueError, match=rf"the loss_fn returned a CausalLMOutput\. A loss_fn {FORMS}"):
                terms_of(output, 4, has_count)
    assert isinstance(output, Mapping), "control: it is a mapping, as named sums are"


@pytest.mark.parametrize(
    "output", [{"a": scalar()}, mb.Loss({"a": scalar()}), mb.Loss({"a": scalar()}, 4), mb.Loss(scalar())]
)
def test_sums_without_a_denominator_need_count(output: Any) -> None:
    with pytest.raises(ValueError, match=r"\{name: loss_sum\} needs Accumulator\(..., count=\)"):
        terms_of(output, 4, has_count=False)


@pytest.mark.parametrize("output", [(scalar(), 4), mb.Loss(scalar(), 4), mb.Loss({"a": scalar()}, 4)])
def test_a_weight_beside_count_is_refused(output: Any) -> None:
    with pytest.raises(ValueError, match=r"gave a loss_weight and the Accumulator has count=: give one of them"):
        terms_of(output, 4, has_count=True)


@pytest.mark.parametrize("shape", [(1,), (4,), (2, 3)])
def test_a_loss_that_is_not_scalar_is_refused_with_the_form_for_losses_per_term(shape: tuple[int, ...]) -> None:
    losses = torch.ones(shape, requires_grad=True)
    for output in (losses, (losses, 4)):
        with pytest.raises(
            ValueError, match=r"the loss has shape \(.*\), not \(\).*\(losses.sum\(\), losses.numel\(\)\)"
        ):
            terms_of(output, 4, has_count=False)
    with pytest.raises(ValueError, match=r"the policy has shape"):
        terms_of({"policy": losses}, 4, has_count=True)


@pytest.mark.parametrize("loss_sum", [2.5, None, "3", np.ones(())])
def test_a_sum_that_is_no_tensor_is_refused(loss_sum: Any) -> None:
    with pytest.raises(ValueError, match=rf"the loss is a {type(loss_sum).__name__}, not a tensor"):
        terms_of((loss_sum, 4), 4, has_count=False)


@pytest.mark.parametrize(
    "weight", [-1, -0.5, math.nan, math.inf, torch.tensor(-2.0), torch.tensor(math.nan), np.float64(-1)]
)
def test_negative_and_non_finite_weights_are_refused(weight: Any) -> None:
    with pytest.raises(
        ValueError, match=rf"loss_weight is {float(weight)}: a count of terms must be finite and not neg"
    ):
        terms_of((scalar(), weight), 4, has_count=False)


@pytest.mark.parametrize("weight", [True, "4", [4], 2j, np.bool_(True)])
def test_a_weight_that_is_no_number_is_refused(weight: Any) -> None:
    with pytest.raises(
        ValueError, match=rf"loss_weight is a {type(weight).__name__}, not a number or a tensor of shape"
    ):
        terms_of((scalar(), weight), 4, has_count=False)


@pytest.mark.parametrize("weight", [torch.ones(4), torch.tensor(True), torch.ones(2, 3, dtype=torch.bool)])
def test_a_mask_is_no_weight_until_it_is_summed(weight: Tensor) -> None:
    message = (
        rf"loss_weight has shape \({weight.shape[0] if weight.ndim else ''}.*it is a number, so sum it over.*mask.sum"
    )
    with pytest.raises(ValueError, match=message):
        terms_of((scalar(), weight), 4, has_count=False)
    assert float(checked_count(weight.sum(), "loss_weight")) == weight.numel()


def test_a_count_is_checked_under_its_own_name() -> None:
    with pytest.raises(ValueError, match=r"count of 'kl' is -3.0: a count of terms must be finite and not negative"):
        checked_count(-3, "count of 'kl'")


@pytest.mark.parametrize(
    ("metric", "message"),
    [
        (torch.ones(3), r"the metric 'accuracy' has shape \(3,\), not \(\): sum it over the terms"),
        ("high", r"the metric 'accuracy' is a str, not a number"),
        (None, r"the metric 'accuracy' is a NoneType, not a number"),
    ],
)
def test_a_metric_that_is_no_sum_is_refused_by_name(metric: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        terms_of(mb.Loss(scalar(), 4, {"accuracy": metric}), 4, has_count=False)


# ---------------------------------------------------------------------------------------------------------------------
# A bare token mean


def labels(*rows: list[int], dtype: torch.dtype = torch.int64) -> Tensor:
    return torch.tensor(rows, dtype=dtype)


@pytest.mark.parametrize("ignored", [-100, -1, -2])
@pytest.mark.parametrize("dtype", [torch.int64, torch.int32])
def test_a_bare_scalar_beside_ignore_labels_is_refused_with_the_exact_forms(ignored: int, dtype: torch.dtype) -> None:
    micro_batch = {"ids": labels([5, 6, 7]), "deep": [(labels([5, ignored, ignored], dtype=dtype),)]}
    path = "batch['deep'][0][0]"
    with pytest.raises(
        ValueError, match=rf"{re.escape(path)}, of shape \(1, 3\), holds the ignore label {ignored}"
    ) as error:
        refuse_bare_token_mean(micro_batch)
    count = f"macrobatch.valid_tokens({path}, ignore_index={ignored}"
    assert f"return loss_sum, {count})\n" in str(error.value)
    assert f"n = {count}); return mean * n, n\n" in str(error.value)
    assert f"n = {count}, shifted=True); return mean * n, n\n" in str(error.value)
    assert "return mean * num_samples, num_samples" in str(error.value)


@pytest.mark.parametrize(
    "leaf",
    [
        labels([0, 5, 7]),
        labels([-3, 2, -1]),  # temperatures, offsets
        torch.tensor([-100.0, 2.0]),
        torch.tensor([-1, -1], dtype=torch.int8),
        torch.tensor([True, False]),
        torch.empty(0, 4, dtype=torch.int64),
        np.array([-100, 3]),
        [-100, 3],
        "text",
    ],
)
def test_a_mean_over_samples_beside_any_other_leaf_passes(leaf: Any) -> None:
    refuse_bare_token_mean({"x": torch.ones(2, 3), "leaf": leaf})


def run(loss_fn: Any, batch: Any) -> mb.Report:
    torch.manual_seed(0)
    return mb.Accumulator(nn.Linear(3, 4).double(), loss_fn, micro_batch_size=2).run(batch)


def test_the_check_meets_only_the_bare_scalar_and_only_where_labels_are_ignored() -> None:
    x = torch.randn(5, 3, dtype=torch.float64)
    y = torch.tensor([1, -100, 2, 0, -100])
    cross_entropy = nn.functional.cross_entropy
    with pytest.raises(ValueError, match="holds the ignore label -100"):
        run(lambda model, b: cross_entropy(model(b[0]), b[1]), (x, y))
    report = run(lambda model, b: (cross_entropy(model(b[0]), b[1], reduction="sum"), (b[1] >= 0).sum()), (x, y))
    assert float(report.loss_weight) == 3  # type: ignore[arg-type]
    assert run(lambda model, b: cross_entropy(model(b[0]), b[1]), (x, y.clamp(min=0))).num_samples == 5


# ---------------------------------------------------------------------------------------------------------------------
# Counting


def test_valid_tokens_counts_what_is_not_ignored() -> None:
    given = labels([5, -100, 7, -100], [5, 6, 0, -1])
    assert int(mb.valid_tokens(given)) == 6
    assert int(mb.valid_tokens(given, ignore_index=-1)) == 7
    assert int(mb.valid_tokens(given[0])) == 2
    assert int(mb.valid_tokens(labels([-100, -100]))) == 0
    assert mb.valid_tokens(given).shape == ()


def test_a_shifted_count_is_what_a_causal_model_predicts() -> None:
    torch.manual_seed(0)
    given = torch.where(torch.rand(6, 9) < 0.4, -100, torch.randint(0, 11, (6, 9)))
    losses = nn.functional.cross_entropy(torch.randn(6, 9, 11)[:, :-1].transpose(1, 2), given[:, 1:], reduction="none")
    assert int(mb.valid_tokens(given, shifted=True)) == int((losses != 0).sum())
    assert int(mb.valid_tokens(given)) != int((losses != 0).sum()), "control: unshifted it is another number"


def test_a_weight_that_is_written_into_the_same_tensor_each_time_counts_as_it_was() -> None:
    torch.manual_seed(0)
    model, x, weight = nn.Linear(5, 1).double(), torch.randn(16, 5).double(), torch.zeros(())

    def loss_fn(m: nn.Module, part: Tensor) -> tuple[Tensor, Tensor]:
        return m(part).square().sum(), weight.fill_(len(part))

    expected = torch.autograd.grad(model(x).square().mean(), list(model.parameters()))
    report = mb.Accumulator(model, loss_fn).run(mb.Window(x.split([9, 6, 1])))
    weight.fill_(1000)
    assert [float(value) for value in report.loss_weights] == [9, 6, 1]
    assert report.loss_weight == 16
    for p, g in zip(model.parameters(), expected, strict=True):
        assert p.grad is not None
        assert float((p.grad - g).abs().max()) <= 1e-12


def test_a_weight_that_is_a_view_keeps_no_more_than_a_number() -> None:
    def peak(accumulation_steps: int) -> int:
        model = nn.Linear(5, 1)

        def loss_fn(m: nn.Module, part: Tensor) -> tuple[Tensor, Tensor]:
            return m(part).square().sum(), torch.ones(10_000).cumsum(0)[-1]  # the last of a running sum

        accumulator, window = mb.Accumulator(model, loss_fn), mb.Window([torch.ones(4, 5)] * accumulation_steps)
        accumulator.run(window)
        model.zero_grad()
        return mb.peak_memory(lambda: accumulator.run(window))

    assert peak(32) - peak(2) < 10_000


def test_of_a_weight_on_another_device_an_own_copy_is_kept() -> None:
    """Where reading it would be a host sync; the control is the loss's own sum, which nobody writes into."""
    weight, loss, tally = torch.ones((), device="meta"), torch.ones((), device="meta"), Tally()
    tally.add(Terms({"loss": loss}, 1, weight, {"right": weight}), 4)
    (record,) = tally.records
    assert isinstance(record.weight, Tensor)
    assert record.weight.untyped_storage()._cdata != weight.untyped_storage()._cdata
    assert record.metrics["right"].untyped_storage()._cdata != weight.untyped_storage()._cdata  # type: ignore[union-attr]
    assert record.sums["loss"].untyped_storage()._cdata == loss.untyped_storage()._cdata  # type: ignore[union-attr]


def test_evaluating_between_windows_leaves_training_as_it_was() -> None:
    """The seed follows the windows that train; in float16 another one would underflow where this one does not."""
    found = []
    for evaluates in (False, True):
        torch.manual_seed(0)
        model = nn.Linear(64, 64).half()
        accumulator = mb.Accumulator(model, lambda m, x: (m(x).square().sum() * 1e-3, x.numel()))
        parts = [torch.randn(4, 64).half() for _ in range(4)]
        accumulator.run(mb.Window(parts))
        model.zero_grad()
        if evaluates:
            accumulator.evaluate(mb.Window([torch.zeros(2**15, 64).half()]))
        accumulator.run(mb.Window(parts))
        found.append(model.weight.grad.clone())  # type: ignore[union-attr]
    assert torch.equal(*found)


def test_of_a_sum_that_is_a_view_no_more_than_the_view_is_kept() -> None:
    losses, tally = torch.ones(100, device="meta"), Tally()
    tally.add(Terms({"loss": losses[3]}, 1, 1, {}), 4)
    kept = tally.records[0].sums["loss"]
    assert isinstance(kept, Tensor)
    assert kept.untyped_storage().nbytes() == losses.element_size()


def test_the_next_windows_seed_fits_its_micro_batches_not_the_window() -> None:
    accumulator = mb.Accumulator(nn.Linear(5, 1), lambda m, x: (m(x).square().sum(), 25 * len(x)))
    accumulator.run(mb.Window([torch.ones(4, 5)] * 8))
    assert accumulator.state_dict()["exponent"] == 7  # near 100 terms, of 800
