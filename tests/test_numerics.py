"""Low precision: float32 sums of bf16 gradients, float16 with a GradScaler, and what each would lose without."""

import gc
import math

import pytest
import torch
from helpers import clear, difference, gradients, reference
from torch import nn
from torch.nn import functional as F

import macrobatch as mb
from macrobatch import gradients as gradients_module

LOW = torch.bfloat16


class TiedTagger(nn.Module):
    """Embedding and head share one weight, so two gradients reach it in each backward."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(13, 8)
        self.mix = nn.Linear(8, 8)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        return F.linear(self.mix(self.embedding(tokens)).tanh(), self.embedding.weight)


def tagger_and_batch(n: int) -> tuple[TiedTagger, tuple[torch.Tensor, torch.Tensor]]:
    torch.manual_seed(0)
    model = TiedTagger().to(LOW)
    tokens = torch.randint(0, 13, (n, 5))
    return model, (tokens, (tokens + 1) % 13)


def loss_fn(model: nn.Module, batch: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
    return F.cross_entropy(model(batch[0]).transpose(1, 2).float(), batch[1])


def set_grad_dtype(model: nn.Module, dtype: torch.dtype) -> None:
    for p in model.parameters() if hasattr(torch.Tensor, "grad_dtype") else ():
        p.grad_dtype = dtype


def fresh_sum(model: nn.Module, batch: tuple[torch.Tensor, torch.Tensor], wide: bool) -> list[torch.Tensor]:
    """The float64 mean of fresh micro-batch gradients of one sample each."""
    sums = [torch.zeros(p.shape, dtype=torch.float64) for p in model.parameters()]
    for tokens, labels in zip(batch[0].split(1), batch[1].split(1), strict=True):
        clear(model)
        set_grad_dtype(model, torch.float32 if wide else LOW)
        loss_fn(model, (tokens, labels)).backward()
        for total, p in zip(sums, model.parameters(), strict=True):
            total += p.grad.double()
    clear(model)
    set_grad_dtype(model, LOW)
    return [total / len(batch[0]) for total in sums]


needs_grad_dtype = pytest.mark.skipif(not gradients_module.HAS_GRAD_DTYPE, reason="this torch has no Tensor.grad_dtype")


@needs_grad_dtype
def test_512_bf16_micro_batches_with_tied_weights_add_up_in_float32() -> None:
    model, batch = tagger_and_batch(512)
    expected = fresh_sum(model, batch, wide=True)
    mb.Accumulator(model, loss_fn, micro_batch_size=1, grad_dtype=torch.float32).run(batch)
    assert all(p.grad.dtype == torch.float32 for p in model.parameters())
    assert difference(gradients(model), expected) <= 1e-5
    clear(model)
    set_grad_dtype(model, LOW)
    for tokens, labels in zip(batch[0].split(1), batch[1].split(1), strict=True):
        (loss_fn(model, (tokens, labels)) / 512).backward()  # the control: plain accumulation in bf16
    assert difference(gradients(model), expected) >= 1e-2


@pytest.mark.parametrize("has_grad_dtype", [pytest.param(True, marks=needs_grad_dtype), False])
def test_by_default_gradients_end_in_the_dtype_of_the_parameter_rounded_once(
    has_grad_dtype: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gradients_module, "HAS_GRAD_DTYPE", has_grad_dtype)  # False: what an older torch does
    model, batch = tagger_and_batch(512)
    expected = fresh_sum(model, batch, wide=has_grad_dtype)
    mb.Accumulator(model, loss_fn, micro_batch_size=1).run(batch)
    assert all(p.grad.dtype == LOW for p in model.parameters())
    assert difference(gradients(model), expected) <= 2**-8  # half a unit of bf16, relative to the largest entry
    if gradients_module.HAS_GRAD_DTYPE:
        assert all(p.grad_dtype == LOW for p in model.parameters())
    mb.apply_update(torch.optim.AdamW(model.parameters(), fused=True))  # which takes bf16 gradients only


@pytest.mark.parametrize("has_grad_dtype", [pytest.param(True, marks=needs_grad_dtype), False])
def test_after_an_exception_bf16_gradients_and_their_dtype_are_as_before(
    has_grad_dtype: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gradients_module, "HAS_GRAD_DTYPE", has_grad_dtype)
    model, batch = tagger_and_batch(6)
    for p in model.parameters():
        p.grad = torch.zeros_like(p)
    calls = []

    def fails_later(m: nn.Module, b: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
        calls.append(1)
        return loss_fn(m, b) if len(calls) < 4 else 1 / 0

    with pytest.raises(ZeroDivisionError):
        mb.Accumulator(model, fails_later, micro_batch_size=1).run(batch)
    assert all(p.grad.dtype == LOW and not p.grad.any() for p in model.parameters())


def test_adding_windows_in_bf16_keeps_the_dtype() -> None:
    model, batch = tagger_and_batch(6)
    accumulator = mb.Accumulator(model, loss_fn, micro_batch_size=2)
    accumulator.run(batch)
    once = gradients(model)
    accumulator.run(batch, add=True)
    assert difference(gradients(model), [2 * g for g in once]) <= 1e-6


def test_a_grad_dtype_that_this_torch_cannot_hold_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gradients_module, "HAS_GRAD_DTYPE", False)
    model, batch = tagger_and_batch(6)
    with pytest.raises(ValueError, match=r"grad_dtype=torch.float32 needs a torch with Tensor.grad_dtype"):
        mb.Accumulator(model, loss_fn, micro_batch_size=2, grad_dtype=torch.float32).run(batch)


# ---------------------------------------------------------------------------------------------------------------------
# float16 and the GradScaler


def half_model() -> tuple[nn.Module, tuple[torch.Tensor, torch.Tensor]]:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(16, 32), nn.Tanh(), nn.Linear(32, 7))
    return model, (torch.randn(64, 40, 16), torch.randint(0, 7, (64, 40)))


def tokens_loss(model: nn.Module, batch: tuple[torch.Tensor, torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
    scores = model(batch[0])
    # in float16 throughout: what the sum over 320 tokens times a scale of 65536 would overflow
    return F.cross_entropy(scores.flatten(0, 1).float(), batch[1].flatten(), reduction="sum"), mb.valid_tokens(batch[1])


@pytest.mark.parametrize("micro_batch_size", [8, 5, 64])
def test_float16_with_a_scaler_skips_nothing_that_the_full_batch_would_not_skip(micro_batch_size: int) -> None:
    model, batch = half_model()
    expected = reference(model, lambda: F.cross_entropy(model(batch[0]).flatten(0, 1), batch[1].flatten()))
    scaler = torch.amp.GradScaler("cpu")
    accumulator = mb.Accumulator(
        model, tokens_loss, micro_batch_size=micro_batch_size, autocast=torch.float16, scaler=scaler
    )
    report = accumulator.run(batch)
    assert report.scaler is scaler
    assert difference(gradients(model), expected) <= 5e-3  # float16 forward
    update = mb.apply_update(torch.optim.SGD(model.parameters(), lr=0.1), report)
    assert update.applied
    assert scaler.get_scale() == 65536.0


def test_control_the_raw_sum_loss_at_scale_65536_overflows_float16() -> None:
    model, batch = half_model()
    optimizer, scaler = torch.optim.SGD(model.parameters(), lr=0.1), torch.amp.GradScaler("cpu")
    with torch.autocast("cpu", dtype=torch.float16):
        loss, _ = tokens_loss(model, batch)
    scaler.scale(loss).backward()
    scaler.unscale_(optimizer)
    assert not all(torch.isfinite(p.grad).all() for p in model.parameters())


def test_an_overflow_skips_the_update_lowers_the_scale_and_the_next_window_is_right() -> None:
    model, batch = half_model()
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**40)
    accumulator = mb.Accumulator(model, tokens_loss, micro_batch_size=8, autocast=torch.float16, scaler=scaler)
    optimizer = torch.optim.AdamW(model.parameters())
    before = [p.detach().clone() for p in model.parameters()]
    skipped = 0
    while not mb.apply_update(optimizer, accumulator.run(batch)).applied:
        skipped += 1
        assert all(torch.equal(p, b) for p, b in zip(model.parameters(), before, strict=True))
        assert not optimizer.state
        assert scaler.get_scale() == 2.0 ** (40 - skipped)
        assert skipped < 40
    assert skipped > 0
    assert not torch.equal(next(model.parameters()), before[0])


def test_several_windows_before_one_update_share_a_scaler() -> None:
    model, batch = half_model()
    scaler = torch.amp.GradScaler("cpu")
    accumulator = mb.Accumulator(model, tokens_loss, micro_batch_size=8, autocast=torch.float16, scaler=scaler)
    accumulator.run(batch)
    once = gradients(model)
    for _ in range(4):
        report = accumulator.run(batch, add=True)
    assert difference(gradients(model), [5 * g for g in once]) <= 1e-6
    assert mb.apply_update(torch.optim.SGD(model.parameters(), lr=0.1), report).applied


def test_autocast_takes_a_context_that_can_be_entered_again() -> None:
    model, batch = half_model()
    seen = []

    def watched(m: nn.Module, b: tuple[torch.Tensor, torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
        seen.append(m[0](b[0]).dtype)
        return tokens_loss(m, b)

    mb.Accumulator(model, watched, micro_batch_size=32, autocast=torch.autocast("cpu", dtype=torch.bfloat16)).run(batch)
    assert seen == [torch.bfloat16, torch.bfloat16]


def test_the_seed_is_a_power_of_two_so_it_costs_no_rounding() -> None:
    """In float32 the accumulated gradient equals, bit for bit, that of plain sums multiplied once."""
    model, batch = half_model()
    report = mb.Accumulator(model, tokens_loss, micro_batch_size=8).run(batch)
    mine = gradients(model)
    clear(model)
    for micro_batch in mb.Window([batch]).cut(8):
        tokens_loss(model, micro_batch)[0].backward()
    plain = [p.grad * (1 / float(report.loss_weight)) for p in model.parameters()]
    assert all(torch.equal(m, p) for m, p in zip(mine, plain, strict=True))


def test_a_hundred_windows_before_one_update_share_a_scaler() -> None:
    model, batch = half_model()
    scaler = torch.amp.GradScaler("cpu")
    accumulator = mb.Accumulator(model, tokens_loss, micro_batch_size=32, autocast=torch.float16, scaler=scaler)
    for _ in range(100):
        report = accumulator.run(batch, add=True)
    assert mb.apply_update(torch.optim.SGD(model.parameters(), lr=1e-3), report).applied


def test_a_scaler_takes_windows_whose_optimizers_have_gone_for_windows_of_others() -> None:
    """It knows optimizers by id, and garbage that is collected between two windows frees ids for the next one."""
    model, batch = half_model()
    scaler = torch.amp.GradScaler("cpu")
    accumulator = mb.Accumulator(model, tokens_loss, micro_batch_size=32, autocast=torch.float16, scaler=scaler)
    for _ in range(20):
        gc.collect()
        report = accumulator.run(batch, add=True)
    assert mb.apply_update(torch.optim.SGD(model.parameters(), lr=1e-3), report).applied


def test_two_accumulators_share_a_scaler() -> None:
    scaler, updates = torch.amp.GradScaler("cpu"), []
    models = [half_model() for _ in range(2)]
    reports = [
        mb.Accumulator(model, tokens_loss, micro_batch_size=32, autocast=torch.float16, scaler=scaler).run(batch)
        for model, batch in models
    ]
    for (model, _), report in zip(models, reports, strict=True):
        updates.append(mb.apply_update(torch.optim.SGD(model.parameters(), lr=1e-3), report).applied)
    assert updates == [True, True]


def test_a_first_micro_batch_that_is_almost_wholly_masked_costs_one_update_at_most() -> None:
    model, batch = half_model()
    labels = batch[1].clone()
    labels[:8] = -100
    labels[0, 0] = 1
    scaler = torch.amp.GradScaler("cpu")
    accumulator = mb.Accumulator(model, tokens_loss, micro_batch_size=8, autocast=torch.float16, scaler=scaler)
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
    applied = [mb.apply_update(optimizer, accumulator.run((batch[0], labels))).applied for _ in range(4)]
    assert applied[1:] == [True, True, True]


@needs_grad_dtype
def test_a_mean_in_bf16_over_uneven_micro_batches_keeps_an_exact_seed() -> None:
    """21 / 101 is no number of bf16: as a seed it would be 0.1% off. The control shows that it is seen."""
    torch.manual_seed(0)
    model = nn.Linear(4, 1, bias=False).to(LOW)
    batch = torch.randn(101, 4).to(LOW)
    parts = list(mb.Window([batch]).cut(24))

    def sums(seed: list[torch.Tensor]) -> list[torch.Tensor]:
        clear(model)
        set_grad_dtype(model, torch.float32)
        for part, one in zip(parts, seed, strict=True):
            torch.autograd.backward(model(part).square().mean(), one)
        gradient = [p.grad.double() for p in model.parameters()]
        clear(model)
        set_grad_dtype(model, LOW)
        return gradient

    expected = [g / 101 for g in sums([torch.tensor(float(len(part)), dtype=LOW) for part in parts])]
    accumulator = mb.Accumulator(
        model, lambda m, b: m(b).square().mean(), micro_batch_size=24, grad_dtype=torch.float32
    )
    accumulator.run(batch)
    assert difference(gradients(model), expected) <= 1e-6
    assert difference(sums([torch.tensor(len(part) / 101, dtype=LOW) for part in parts]), expected) > 1e-4


@pytest.mark.parametrize(("values", "expected"), [((math.inf, -math.inf), math.nan), ((1e308, 1e308), math.inf)])
def test_losses_beyond_every_number_are_reported_as_such(values: tuple[float, float], expected: float) -> None:
    model = nn.Linear(1, 1).double()

    def loss_fn(model: nn.Module, batch: torch.Tensor) -> tuple[torch.Tensor, int]:
        return model(batch).sum() * 0 + batch.sum(), 1

    window = mb.Window([torch.tensor([[value]], dtype=torch.float64) for value in values])
    loss = float(mb.Accumulator(model, loss_fn).run(window).loss)
    assert math.isnan(loss) or loss == expected
    assert not math.isfinite(loss)


def test_metrics_without_terms_are_not_a_number() -> None:
    model = nn.Linear(1, 1)
    accumulator = mb.Accumulator(model, lambda model, batch: mb.Loss(torch.zeros(()), 0, {"hits": 0.0}))
    assert math.isnan(float(accumulator.run(mb.Window([torch.ones(2, 1)])).metrics["hits"]))


def summed(dtype: torch.dtype, num_summands: int) -> float:
    """The relative error of a mean of gradients (mean 3, deviation 1) that are added up in `dtype`, against float64."""
    generator = torch.Generator().manual_seed(0)
    total, truth = torch.zeros(20000, dtype=dtype), torch.zeros(20000, dtype=torch.float64)
    for _ in range(num_summands):
        g = 3 + torch.randn(20000, generator=generator)
        total += g.to(dtype)
        truth += g.to(torch.float64)
    return float((total.double() - truth).norm() / truth.norm())


@pytest.mark.parametrize(
    ("dtype", "errors"),
    [
        (torch.bfloat16, (4.1e-3, 4.1e-2, 3.6e-1)),
        (torch.float16, (5.1e-4, 2.0e-3, 3.9e-3)),
        (torch.float32, (6.2e-8, 2.4e-7, 4.8e-7)),
    ],
)
def test_what_adding_up_in_each_dtype_loses(dtype: torch.dtype, errors: tuple[float, ...]) -> None:
    for num_summands, expected in zip((16, 256, 1024), errors, strict=True):
        assert expected / 1.5 < summed(dtype, num_summands) < 1.5 * expected


@pytest.mark.parametrize(("dtype", "stall"), [(torch.bfloat16, 256), (torch.float16, 2048), (torch.float32, 2**24)])
def test_where_equal_summands_stop_adding_up(dtype: torch.dtype, stall: int) -> None:
    one, below, at = (torch.tensor(float(x), dtype=dtype) for x in (1, stall - 1, stall))
    assert float(below + one) == stall
    assert float(at + one) == stall, "the sum no longer grows"


def test_bf16_parameters_do_not_stall_where_bf16_sums_would() -> None:
    p = torch.nn.Linear(1, 1, bias=False).bfloat16()
    window = mb.Window([torch.ones(1, 1, dtype=torch.bfloat16)] * 512)
    mb.Accumulator(p, lambda model, x: (model(x).float().sum(), 1.0 / 512)).run(window)
    assert p.weight.grad is not None
    assert p.weight.grad.item() == 512
    plain = torch.nn.Linear(1, 1, bias=False).bfloat16()
    for x in window:
        plain(x).float().sum().backward()
    assert plain.weight.grad is not None
    assert plain.weight.grad.item() == 256, "control"
