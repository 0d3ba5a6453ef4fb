"""With aligned random numbers micro-batches draw what the full batch draws: masks, gradients, what follows."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from helpers import clear, difference, gradients, reference
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from macrobatch.aligned_random import AlignedRandom, Draws, recorded_draws

N, SIZES = 7, (3, 3, 1)


class Perceptron(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(6, 8), nn.Dropout(0.4), nn.Tanh(), nn.AlphaDropout(0.3), nn.Linear(8, 6))

    def forward(self, x: Tensor) -> Tensor:
        return self.layers(x)


class Noisy(nn.Module):
    """Noise of every kind: on samples, on features, on weights, one number for all, a path dropped for a sample."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(6, 7), nn.Linear(7, 6)

    def forward(self, x: Tensor) -> Tensor:
        x = x + 0.1 * torch.randn_like(x) + 0.1 * torch.rand(len(x), 1, dtype=x.dtype)
        hidden = F.linear(x, F.dropout(self.first.weight, 0.3), self.first.bias)  # (7, 6) is no batch of 7
        kept = x.new_empty(len(x), 1).bernoulli_(0.8)
        scale = torch.randint(1, 4, (len(x),)).to(x.dtype)[:, None] * (1 + torch.rand(()))
        return self.second(hidden.tanh()) * kept * scale + torch.empty_like(x).normal_(0, 0.1).exponential_(2.0)


class Images(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            nn.Unflatten(1, (1, 2, 3)), nn.Conv2d(1, 6, 1), nn.Dropout2d(0.4), nn.Flatten(), nn.Dropout(0.2)
        )
        self.head = nn.Linear(36, 6)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.layers(x))


class Sequences(nn.Module):
    """Attention with dropout on its weights (B H, T, T), batch dimension first, or second inside of the layer."""

    def __init__(self, batch_first: bool) -> None:
        super().__init__()
        self.batch_first = batch_first
        self.embed = nn.Linear(1, 8)
        self.layer = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.3, batch_first=batch_first)
        self.head = nn.Linear(8, 6)

    def forward(self, x: Tensor) -> Tensor:
        tokens = self.embed(x[:, :, None])
        out = self.layer(tokens) if self.batch_first else self.layer(tokens.transpose(0, 1)).transpose(0, 1)
        return self.head(out.mean(1))


MODELS: dict[str, Callable[[], nn.Module]] = {
    "perceptron": Perceptron,
    "noisy": Noisy,
    "images": Images,
    "batch-first": lambda: Sequences(True),
    "batch-second": lambda: Sequences(False),
}


def case(name: str) -> tuple[nn.Module, Tensor]:
    torch.manual_seed(0)
    return MODELS[name]().double(), torch.randn(N, 6, dtype=torch.float64)


def loss_sum(model: nn.Module, x: Tensor) -> Tensor:
    return (model(x) - x).square().sum()


@pytest.mark.parametrize("sizes", [SIZES, (1,) * 7, (7,), (2, 5)])
@pytest.mark.parametrize("name", MODELS)
def test_gradients_and_the_random_numbers_that_follow_are_those_of_the_full_batch(
    name: str, sizes: tuple[int, ...]
) -> None:
    model, x = case(name)
    torch.manual_seed(5)
    with recorded_draws() as draws:
        expected = reference(model, lambda: loss_sum(model, x))
    following = torch.rand(4)
    assert draws.calls
    torch.manual_seed(5)
    aligned, start = AlignedRandom(draws, N), 0
    clear(model)
    for part in x.split(list(sizes)):
        with aligned.rows(start, start + len(part)):
            loss_sum(model, part).backward()
        start += len(part)
    assert difference(gradients(model), expected) <= 1e-12
    assert torch.equal(torch.rand(4), following)


@pytest.mark.parametrize("name", MODELS)
def test_control_without_alignment_gradients_are_others(name: str) -> None:
    model, x = case(name)
    torch.manual_seed(5)
    expected = reference(model, lambda: loss_sum(model, x))
    torch.manual_seed(5)
    apart = reference(model, lambda: sum(loss_sum(model, part) for part in x.split(list(SIZES))))
    assert difference(apart, expected) > 0.05


def test_a_full_batch_that_does_not_fit_is_recorded_on_fake_tensors() -> None:
    model, x = case("batch-first")
    with recorded_draws() as real:
        model(x)
    state = torch.get_rng_state()
    with FakeTensorMode() as mode, recorded_draws() as fake:
        parameters = {name: mode.from_tensor(p) for name, p in model.named_parameters()}
        torch.func.functional_call(model, parameters, mode.from_tensor(x))
    assert fake == real
    assert torch.equal(torch.get_rng_state(), state)


def test_a_shape_that_could_be_a_batch_is_told_from_one_by_the_full_batch() -> None:
    """Weights (7, 6) with dropout, for the 7 samples of the full batch and for micro-batches of 7 and of 1."""
    model, x = case("noisy")
    with recorded_draws() as draws:
        model(x)
    assert ("bernoulli_", (7, 6)) in [(draw.name, draw.shape) for draw in draws.calls]
    torch.manual_seed(5)
    expected = model(x)
    torch.manual_seed(5)
    aligned = AlignedRandom(draws, N)
    parts = []
    for i in range(N):
        with aligned.rows(i, i + 1):
            parts.append(model(x[i : i + 1]))
    assert torch.allclose(torch.cat(parts), expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize(
    ("drawing", "message"),
    [
        (lambda x: x[torch.randperm(len(x))], "randperm draws random numbers in a way that has no rows"),
        (lambda x: torch.multinomial(x.abs(), 1) + x, "multinomial draws random numbers"),
        (lambda x: torch.bernoulli(x.abs().clamp(max=1)), "bernoulli draws random numbers"),
        (lambda x: x + torch.normal(x, 1.0), "normal draws random numbers"),
        (lambda x: x + torch.rand(x.shape, generator=torch.Generator()), "a torch.Generator of its own"),
    ],
)
def test_draws_without_rows_are_refused(drawing: Callable[[Tensor], Tensor], message: str) -> None:
    x = torch.randn(N, 6)
    with pytest.raises(ValueError, match=message), recorded_draws():
        drawing(x)


def test_advice_for_attention_is_given_for_attention_alone() -> None:
    q = torch.randn(2, 2, 4, 8)
    flash = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
    with pytest.raises(ValueError, match=r"flash_attention_for_cpu draws .*SDPBackend.MATH"), recorded_draws():
        flash(q, q, q, 0.3)
    for draw in (lambda: torch.normal(q, 1.0), lambda: F.rrelu(q, training=True), lambda: torch.randperm(4)):
        with pytest.raises(ValueError, match="draws random numbers in a way that") as raised, recorded_draws():
            draw()
        assert "attention" not in str(raised.value)


def aligned_run(record: Callable[[Tensor], Any], run: Callable[[Tensor], Any], sizes: tuple[int, ...] = SIZES) -> None:
    x = torch.randn(N, 6)
    with recorded_draws() as draws:
        record(x)
    aligned, start = AlignedRandom(draws, N), 0
    for part in x.split(list(sizes)):
        with aligned.rows(start, start + len(part)):
            run(part)
        start += len(part)


def test_a_forward_that_draws_otherwise_than_the_full_batch_is_refused() -> None:
    aligned_run(torch.rand_like, torch.rand_like)
    with pytest.raises(ValueError, match="drew 0 times, the full batch 1 times"):
        aligned_run(torch.rand_like, lambda x: x)
    with pytest.raises(ValueError, match="draws more often than the full batch, which drew 1 times"):
        aligned_run(torch.rand_like, lambda x: (torch.rand_like(x), torch.rand_like(x)))
    with pytest.raises(ValueError, match=r"draws by randn_like \(3, 6\) where the full batch drew by rand_like \(7, "):
        aligned_run(torch.rand_like, torch.randn_like)
    with pytest.raises(ValueError, match=r"rand_like draws \(3, 3\) for 3 samples and \(7, 7\) for 7: no single"):
        aligned_run(lambda x: torch.rand_like(x @ x.T), lambda x: torch.rand_like(x @ x.T))
    aligned = AlignedRandom(Draws(), N)
    with pytest.raises(ValueError, match="rows 3 to 9 were asked of a full batch of 7"), aligned.rows(3, 9):
        pass


def test_checkpointing_that_draws_again_in_backward_is_refused() -> None:
    model, x = case("perceptron")
    with recorded_draws() as draws:
        model(x)
    with pytest.raises(ValueError, match=r"draws more often .* \(checkpointing\)"), AlignedRandom(draws, N).rows(0, 3):
        checkpoint(model, x[:3], use_reentrant=False).sum().backward()


def test_dropout_that_is_off_draws_nothing() -> None:
    model, x = case("batch-first")
    model.eval()
    with recorded_draws() as draws:
        model(x)
        F.dropout(x, 0.0)
        F.scaled_dot_product_attention(x[None, None], x[None, None], x[None, None])
    assert draws.calls == []
