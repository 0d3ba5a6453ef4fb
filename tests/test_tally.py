"""What a window adds up to: each sum is divided by its own total, and scalars on a device are summed as on the CPU."""

import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import macrobatch as mb
from macrobatch.sums import as_scalar, mean, ratio, total
from macrobatch.tally import denominator

CPU = torch.device("cpu")


class OnDevice(Tensor):
    """A scalar that is summed as one on a device is, and yet can be read."""

    is_cpu = property(lambda _: False)  # type: ignore[assignment]


def accumulator(loss_fn: Any, **options: Any) -> mb.Accumulator:
    torch.manual_seed(0)
    return mb.Accumulator(nn.Linear(3, 1).double(), loss_fn, **options)


def window(*values: float) -> mb.Window:
    """One micro-batch of two samples for each value, all of whose entries are that value."""
    return mb.Window([torch.full((2, 3), value, dtype=torch.float64) for value in values])


# ---------------------------------------------------------------------------------------------------------------------
# Denominators


def test_each_sum_is_divided_by_the_total_of_its_own_name_and_by_one_without_a_name() -> None:
    assert denominator("kl", {"policy": 40, "kl": 8}) == 8
    assert denominator("kl", {"loss": 5}) == 5
    assert denominator("loss", {"loss": 5}) == 5


@pytest.mark.parametrize("totals", [{"tokens": 40}, {"tokens": 40, "loss": 5}, {}])
def test_a_sum_whose_name_was_not_counted_has_no_denominator_not_even_the_only_one(totals: dict[str, int]) -> None:
    with pytest.raises(ValueError, match=r"the loss 'kl' has no count: count= gave \[.*\], the loss_fn must use these"):
        denominator("kl", totals)


@pytest.mark.parametrize("output", ["a", "loss"])
def test_one_count_with_a_name_is_refused_for_a_loss_of_another_name(output: str) -> None:
    def loss_fn(model: nn.Module, x: Tensor) -> Any:
        loss_sum = model(x).sum()
        return {"a": loss_sum} if output == "a" else loss_sum

    own = accumulator(loss_fn, count=lambda x: {"tokens": len(x)})
    with pytest.raises(ValueError, match=rf"the loss '{output}' has no count: count= gave \['tokens'\]"):
        own.run(window(1, 2))
    assert all(p.grad is None for p in own.model.parameters())
    control = accumulator(lambda model, x: {"tokens": model(x).sum()}, count=lambda x: {"tokens": len(x)})
    assert control.run(window(1, 2)).loss_weight == 4


# ---------------------------------------------------------------------------------------------------------------------
# Sums


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ([math.inf, -math.inf], math.nan),
        ([math.inf, 1.0], math.inf),
        ([math.nan, 1.0], math.nan),
        ([1e308, 1e308], math.inf),  # too large, of finite numbers
        ([1e16, 1.0, -1e16], 1.0),  # what a sum in float64 loses
    ],
)
def test_numbers_are_summed_exactly_and_to_what_a_tensor_would_say_where_they_are_not_finite(
    values: list[float], expected: float
) -> None:
    found = total([(value, 1) for value in values], CPU)
    assert found == pytest.approx(expected, rel=0, abs=0, nan_ok=True)


def test_losses_that_are_infinite_with_both_signs_are_not_a_number_in_the_report() -> None:
    def loss_fn(model: nn.Module, x: Tensor) -> Tensor:
        return (model(x) * 0 + 1 / x[:, :1]).mean()

    for run in ("run", "evaluate"):
        own = accumulator(loss_fn)
        assert getattr(own, run)(window(0.0, -0.0)).loss.isnan()
        own.model.zero_grad()
        assert getattr(own, run)(window(1.0, 2.0)).loss == 0.75, "control: it is the mean"


def test_each_value_counts_as_often_as_its_multiplier() -> None:
    parts = [(torch.tensor(3.0), 5), (2, 7), (torch.tensor(1, dtype=torch.int32), 1)]
    assert total(parts, CPU) == 30
    assert total([], CPU) == 0


@pytest.mark.parametrize(
    ("parts", "expected"),
    [
        ([(torch.tensor(3.0), 5), (torch.tensor(4.0), 2)], 23.0),
        ([(torch.tensor(3.0), 1), (torch.tensor(4.0), 1)], 7.0),
        ([(torch.tensor(2.0**24), 1), (torch.tensor(1.0), 1)], 2.0**24 + 1),  # lost in float32
        ([(torch.tensor(70_001), 1), (torch.tensor(0.5, dtype=torch.float16), 2)], 70_002.0),  # infinite in float16
        ([(torch.tensor(2**24 + 1), 3), (torch.tensor(0.5), 2)], 3.0 * 2**24 + 4),  # rounded in float32
        ([(torch.tensor(300.0, dtype=torch.float16), 300), (torch.tensor(1.0, dtype=torch.float16), 1)], 90_001.0),
    ],
)
def test_scalars_on_a_device_are_summed_in_float64_times_their_multipliers_whatever_their_dtypes(
    parts: list[tuple[Tensor, int]], expected: float
) -> None:
    found = total([(value.as_subclass(OnDevice), times) for value, times in parts], CPU)
    assert isinstance(found, Tensor)
    assert (found.shape, found.dtype, found.item()) == ((), torch.float64, expected)
    assert total(parts, CPU) == expected, "control: those on the CPU are summed as numbers"
    assert isinstance(total(parts, CPU), float)


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32, torch.int64])
def test_a_sum_with_a_part_on_a_device_stays_there(dtype: torch.dtype) -> None:
    meta = torch.device("meta")  # has no numbers, so that reading one would be an error
    value = torch.ones((), dtype=dtype, device=meta)
    for parts in ([(value, 1), (2.0, 3)], [(value, 5), (value.double(), 1)], [(torch.ones(()), 1), (value, 2)]):
        found = total(parts, meta)
        assert isinstance(found, Tensor)
        assert (found.shape, found.dtype, found.device) == ((), torch.float64, meta)


# ---------------------------------------------------------------------------------------------------------------------
# Means and ratios


def test_a_mean_over_nothing_is_not_a_number_and_a_share_of_nothing_is_zero() -> None:
    zero = torch.tensor(0.0)
    assert math.isnan(mean(0.0, 0))  # type: ignore[arg-type]
    assert torch.as_tensor(mean(0.0, zero * 1)).isnan()
    assert ratio(2.0, 0) == 0.0
    assert ratio(2.0, zero) == 0.0
    assert ratio(torch.tensor(2.0), zero) == 0.0
    assert (mean(6.0, 4), ratio(6.0, 4), ratio(torch.tensor(6.0), 4)) == (1.5, 1.5, 1.5)


def test_a_ratio_is_a_number_where_its_divisor_can_be_read_and_a_tensor_on_a_device() -> None:
    assert type(ratio(6.0, torch.tensor(4))) is float
    on_device = ratio(6.0, torch.ones((), device="meta"))
    assert isinstance(on_device, Tensor)
    assert on_device.is_meta


def test_a_number_becomes_a_scalar_in_float64_and_a_tensor_stays_itself() -> None:
    made, given = as_scalar(3, CPU), torch.tensor(3.0)
    assert (made.shape, made.dtype) == ((), torch.float64)
    assert as_scalar(given, CPU) is given
