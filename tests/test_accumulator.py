"""A window's gradient is that of the effective batch in one piece, whatever the loss averages over, however cut."""

import copy
import dataclasses
from collections.abc import Callable

import pytest
import torch
from helpers import clear, difference, gradients, reference, textbook
from torch import nn
from torch.nn import functional as F

import macrobatch as mb

EXACT = 1e-12  # float64, relative to the largest gradient entry
WRONG = 0.01  # what a control must exceed


class Tagger(nn.Module):
    """Tokens (B, T) to class scores (B, C, T), embedding and head sharing one weight if `tied`."""

    def __init__(self, classes: int = 11, width: int = 6, tied: bool = False) -> None:
        super().__init__()
        self.embedding = nn.Embedding(classes, width)
        self.mix = nn.GRU(width, width, batch_first=True)
        self.head = nn.Linear(width, classes)
        if tied:
            self.head.weight = self.embedding.weight

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        return self.head(self.mix(self.embedding(tokens))[0]).transpose(1, 2)


def tokens_and_labels(n: int = 13, length: int = 7) -> dict[str, torch.Tensor]:
    """Sequences whose valid lengths differ much, so that the mean of means is far off."""
    generator = torch.Generator().manual_seed(3)
    tokens = torch.randint(0, 11, (n, length), generator=generator)
    labels = torch.randint(0, 11, (n, length), generator=generator)
    for i in range(n):
        labels[i, 1 + (i * i) % length :] = -100
    return {"tokens": tokens, "labels": labels}


def tagger(tied: bool = False) -> Tagger:
    torch.manual_seed(0)
    return Tagger(tied=tied).double()


def token_mean(model: nn.Module, batch: dict[str, torch.Tensor]) -> torch.Tensor:
    return F.cross_entropy(model(batch["tokens"]), batch["labels"])


def token_sum(model: nn.Module, batch: dict[str, torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
    loss = F.cross_entropy(model(batch["tokens"]), batch["labels"], reduction="sum")
    return loss, mb.valid_tokens(batch["labels"])


def parts(batch: dict[str, torch.Tensor], sizes: list[int]) -> list[dict[str, torch.Tensor]]:
    columns = {key: value.split(sizes) for key, value in batch.items()}
    return [{key: column[j] for key, column in columns.items()} for j in range(len(sizes))]


def regressor() -> nn.Sequential:
    torch.manual_seed(1)
    return nn.Sequential(nn.Linear(5, 8), nn.Tanh(), nn.Linear(8, 1)).double()


def points(n: int = 22) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(5)
    scale = torch.linspace(0.2, 3, n, dtype=torch.float64)[:, None]  # later samples matter more
    x = torch.randn(n, 5, dtype=torch.float64, generator=generator) * scale
    return x, torch.randn(n, 1, dtype=torch.float64, generator=generator) * scale


def mean_square(model: nn.Module, batch: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
    return F.mse_loss(model(batch[0]), batch[1])


# ---------------------------------------------------------------------------------------------------------------------
# Exact for every denominator


@pytest.mark.parametrize("micro_batch_size", [1, 2, 3, 4, 7, 21, 22, 1000])
def test_a_mean_loss_gives_the_full_batchs_gradient_for_any_micro_batch_size(micro_batch_size: int) -> None:
    model, batch = regressor(), points()
    expected = reference(model, lambda: mean_square(model, batch))
    report = mb.Accumulator(model, mean_square, micro_batch_size=micro_batch_size).run(batch)
    assert difference(gradients(model), expected) <= EXACT
    assert abs(float(report.loss) - mean_square(model, batch).item()) <= EXACT
    assert report.num_samples == 22
    assert sum(report.micro_batch_sizes) == 22
    assert max(report.micro_batch_sizes) - min(report.micro_batch_sizes) <= 1


@pytest.mark.parametrize("sizes", [[1, 1, 20], [9, 9, 4], [22], [3, 2, 1, 16]])
def test_a_smaller_last_micro_batch_counts_for_its_samples(sizes: list[int]) -> None:
    model, batch = regressor(), points()
    micro_batches = list(zip(batch[0].split(sizes), batch[1].split(sizes), strict=True))
    expected = reference(model, lambda: mean_square(model, batch))
    mb.Accumulator(model, mean_square).run(mb.Window(micro_batches))
    assert difference(gradients(model), expected) <= EXACT
    if len(sizes) > 1:
        assert difference(textbook(model, lambda b: mean_square(model, b), micro_batches), expected) > WRONG


@pytest.mark.parametrize("micro_batch_size", [1, 2, 3, 5, 12])
@pytest.mark.parametrize("tied", [False, True])
def test_a_token_mean_with_ignored_labels_is_exact(micro_batch_size: int, tied: bool) -> None:
    model, batch = tagger(tied), tokens_and_labels()
    expected = reference(model, lambda: token_mean(model, batch))
    report = mb.Accumulator(model, token_sum, micro_batch_size=micro_batch_size).run(batch)
    assert difference(gradients(model), expected) <= EXACT
    assert report.loss_weight == (batch["labels"] != -100).sum()
    micro_batches = mb.Window([batch]).cut(micro_batch_size)
    assert difference(textbook(model, lambda b: token_mean(model, b), list(micro_batches)), expected) > WRONG


@pytest.mark.parametrize("micro_batch_size", [1, 4, 5])
def test_class_weights_are_divided_by_the_window_sum_of_class_weights(micro_batch_size: int) -> None:
    torch.manual_seed(0)
    model = nn.Linear(5, 3).double()
    criterion = nn.CrossEntropyLoss(weight=torch.tensor([0.1, 1.0, 9.0], dtype=torch.float64))
    x, y = torch.randn(22, 5, dtype=torch.float64), torch.randint(0, 3, (22,)).sort().values
    expected = reference(model, lambda: criterion(model(x), y))
    mb.Accumulator(model, mb.sum_loss(criterion), micro_batch_size=micro_batch_size).run((x, y))
    assert difference(gradients(model), expected) <= EXACT
    micro_batches = list(mb.Window([(x, y)]).cut(micro_batch_size))
    assert difference(textbook(model, lambda b: criterion(model(b[0]), b[1]), micro_batches), expected) > WRONG


def two_losses(model: nn.Module, batch: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """A token loss and a penalty for each sequence: two denominators in one backward."""
    scores = model(batch["tokens"])
    tokens = F.cross_entropy(scores, batch["labels"], reduction="sum")
    return {"tokens": tokens, "sequences": scores.square().mean(dim=(1, 2)).sum()}


def count_two(batch: dict[str, torch.Tensor]) -> dict[str, object]:
    return {"tokens": mb.valid_tokens(batch["labels"]), "sequences": len(batch["labels"])}


def both_means(model: nn.Module, batch: dict[str, torch.Tensor]) -> torch.Tensor:
    losses = two_losses(model, batch)
    return losses["tokens"] / mb.valid_tokens(batch["labels"]) + losses["sequences"] / len(batch["labels"])


@pytest.mark.parametrize("micro_batch_size", [1, 2, 5, 13])
def test_two_denominators_are_each_divided_by_their_own_total(micro_batch_size: int) -> None:
    model, batch = tagger(), tokens_and_labels()
    expected = reference(model, lambda: both_means(model, batch))
    accumulator = mb.Accumulator(model, two_losses, micro_batch_size=micro_batch_size, count=count_two)
    report = accumulator.run(batch)
    assert difference(gradients(model), expected) <= EXACT
    assert abs(float(report.loss) - both_means(model, batch).item()) <= EXACT
    assert report.loss_weight["sequences"] == 13
    assert set(report.metrics) == {"tokens", "sequences"}
    clear(model)
    folded = mb.Accumulator(  # the control: one denominator for both
        model, lambda m, b: (sum(two_losses(m, b).values()), mb.valid_tokens(b["labels"])), micro_batch_size=5
    )
    folded.run(batch)
    assert difference(gradients(model), expected) > WRONG


def test_a_single_count_divides_a_bare_sum() -> None:
    model, batch = tagger(), tokens_and_labels()
    expected = reference(model, lambda: token_mean(model, batch))
    accumulator = mb.Accumulator(
        model, lambda m, b: token_sum(m, b)[0], micro_batch_size=3, count=lambda b: mb.valid_tokens(b["labels"])
    )
    report = accumulator.run(batch)
    assert difference(gradients(model), expected) <= EXACT
    assert abs(float(report.loss) - token_mean(model, batch).item()) <= EXACT


@pytest.mark.parametrize("masked", [[0], [2], [4], [0, 1], [3, 4]])
def test_a_fully_masked_micro_batch_counts_for_nothing(masked: list[int]) -> None:
    model, batch = tagger(), tokens_and_labels(15)
    for j in masked:
        batch["labels"][3 * j : 3 * j + 3] = -100
    expected = reference(model, lambda: token_mean(model, batch))

    def mean_times_count(m: nn.Module, b: dict[str, torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
        valid = mb.valid_tokens(b["labels"])
        return token_mean(m, b) * valid, valid  # NaN * 0 where nothing is valid

    def zero_zero(m: nn.Module, b: dict[str, torch.Tensor]) -> tuple[object, object]:
        return token_sum(m, b) if (b["labels"] != -100).any() else (0, 0)

    for loss_fn in (token_sum, mean_times_count, zero_zero):
        clear(model)
        report = mb.Accumulator(model, loss_fn, micro_batch_size=3).run(batch)
        assert difference(gradients(model), expected) <= EXACT
        assert abs(float(report.loss) - token_mean(model, batch).item()) <= EXACT
    assert (
        difference(textbook(model, lambda b: token_mean(model, b), list(mb.Window([batch]).cut(3))), expected) > WRONG
    )


def test_the_last_window_of_two_of_four_is_divided_by_its_own_samples() -> None:
    model, batch = regressor(), points(30)
    loader = list(zip(batch[0].split(5), batch[1].split(5), strict=True))  # six micro-batches: windows of 4 and 2
    last = (batch[0][20:], batch[1][20:])
    expected = reference(model, lambda: mean_square(model, last))
    accumulator = mb.Accumulator(model, mean_square)
    for window in mb.windows(loader, accumulation_steps=4):
        clear(model)
        accumulator.run(window)
    assert difference(gradients(model), expected) <= EXACT
    clear(model)
    for micro_batch in loader[4:]:
        (mean_square(model, micro_batch) / 4).backward()  # the textbook divides by the steps it planned
    assert difference(gradients(model), expected) > WRONG


def test_frozen_and_unused_parameters_keep_no_gradient() -> None:
    model, batch = regressor(), points()
    model.spare = nn.Linear(3, 3).double()
    model[0].weight.requires_grad_(False)

    def loss_fn(m: nn.Module, b: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
        return F.mse_loss(m[2](m[1](m[0](b[0]))), b[1])

    expected = reference(model, lambda: loss_fn(model, batch))
    mb.Accumulator(model, loss_fn, micro_batch_size=4).run(batch)
    assert difference(gradients(model), expected) <= EXACT
    assert model[0].weight.grad is None
    assert model.spare.weight.grad is None
    uneven = list(zip(batch[0].split([2, 20]), batch[1].split([2, 20]), strict=True))
    assert difference(textbook(model, lambda b: loss_fn(model, b), uneven), expected) > WRONG


class Temperature(nn.Module):
    """A loss with a parameter of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.log_scale = nn.Parameter(torch.zeros((), dtype=torch.float64))

    def forward(self, model: nn.Module, batch: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
        return (F.mse_loss(model(batch[0]), batch[1], reduction="none") * self.log_scale.exp()).mean() - self.log_scale


def test_a_loss_with_parameters_of_its_own_is_trained_exactly() -> None:
    model, batch, loss_fn = regressor(), points(), Temperature()
    both = [model, loss_fn]
    expected = reference(both, lambda: loss_fn(model, batch))
    report = mb.Accumulator(model, loss_fn, micro_batch_size=4).run(batch)
    assert difference(gradients(both), expected) <= EXACT
    assert any(p is loss_fn.log_scale for p in report.parameters)
    uneven = list(zip(batch[0].split([2, 20]), batch[1].split([2, 20]), strict=True))
    assert difference(textbook(both, lambda b: loss_fn(model, b), uneven), expected) > WRONG


def test_add_adds_this_windows_mean_to_what_is_there_unchanged() -> None:
    model, first, second = regressor(), points(22), points(9)
    a = reference(model, lambda: mean_square(model, first))
    b = reference(model, lambda: mean_square(model, second))
    accumulator = mb.Accumulator(model, mean_square, micro_batch_size=4)
    accumulator.run(first)
    accumulator.run(second, add=True)
    assert difference(gradients(model), [x + y for x, y in zip(a, b, strict=True)]) <= EXACT
    assert difference(a, [x + y for x, y in zip(a, b, strict=True)]) > WRONG


def test_float32_differs_from_the_full_batch_by_rounding_only() -> None:
    model, batch = regressor().float(), tuple(x.float() for x in points())
    expected = reference(model, lambda: mean_square(model, batch))
    mb.Accumulator(model, mean_square, micro_batch_size=3).run(batch)
    assert difference(gradients(model), expected) <= 1e-6


def test_metrics_are_summed_and_divided_like_the_loss() -> None:
    model, batch = tagger(), tokens_and_labels()

    def loss_fn(m: nn.Module, b: dict[str, torch.Tensor]) -> mb.Loss:
        loss, valid = token_sum(m, b)
        correct = (m(b["tokens"]).argmax(1) == b["labels"]).sum()
        return mb.Loss(loss, valid, metrics={"accuracy": correct})

    report = mb.Accumulator(model, loss_fn, micro_batch_size=2).run(batch)
    right = (model(batch["tokens"]).argmax(1) == batch["labels"]).sum() / mb.valid_tokens(batch["labels"])
    assert float(report.metrics["accuracy"]) == pytest.approx(float(right), abs=1e-6)


def test_evaluate_reports_the_same_without_gradients() -> None:
    model, batch = tagger(), tokens_and_labels()
    report = mb.Accumulator(model, token_sum, micro_batch_size=2).evaluate(batch)
    assert abs(float(report.loss) - token_mean(model, batch).item()) <= EXACT
    assert all(p.grad is None for p in model.parameters())


def test_a_report_adds_up_once_and_only_when_it_is_asked() -> None:
    report, calls = mb.Accumulator(tagger(), token_sum, micro_batch_size=2).run(tokens_and_labels()), []

    def means() -> object:
        calls.append(1)
        return report.means()

    asked = dataclasses.replace(report, means=means)
    assert (asked.micro_batch_sizes, asked.accumulation_steps, len(asked.loss_weights)) == ((2,) * 6 + (1,), 7, 7)
    assert not calls
    assert (asked.loss, asked.loss_weight, asked.num_samples, asked.metrics) == (
        report.loss,
        report.loss_weight,
        13,
        {},
    )
    assert asked.loss is asked.loss
    assert calls == [1]


def test_a_report_in_words_puts_equal_sizes_together() -> None:
    report = mb.Accumulator(regressor(), mean_square, micro_batch_size=4).run(points())
    assert "micro_batch_sizes=(4 x 4, 3 x 2), retries=0" in repr(report)


def test_several_models_are_trained_as_one() -> None:
    encoder, head, batch = nn.Linear(5, 4).double(), nn.Linear(4, 1).double(), points()

    def loss_fn(models: list[nn.Module], b: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
        return F.mse_loss(models[1](models[0](b[0]).tanh()), b[1])

    expected = reference([encoder, head], lambda: loss_fn([encoder, head], batch))
    mb.Accumulator([encoder, head], loss_fn, micro_batch_size=3).run(batch)
    assert difference(gradients([encoder, head]), expected) <= EXACT


def test_frozen_modules_pass_the_gradient_on_and_take_none() -> None:
    generator, discriminator, batch = regressor(), nn.Linear(1, 1).double(), points()

    def loss_fn(model: nn.Module, b: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
        return F.softplus(-discriminator(model(b[0]))).mean()

    discriminator.bias.requires_grad_(False)  # frozen before: stays frozen after
    expected = reference(generator, lambda: loss_fn(generator, batch))
    discriminator.weight.grad = None
    mb.Accumulator(generator, loss_fn, micro_batch_size=4, frozen=[discriminator]).run(batch)
    assert difference(gradients(generator), expected) <= EXACT
    assert discriminator.weight.grad is None
    assert discriminator.weight.requires_grad
    assert not discriminator.bias.requires_grad


def test_a_window_that_fills_while_it_runs_can_run_again() -> None:
    model, batch = regressor(), points()
    expected = reference(model, lambda: mean_square(model, batch))
    sizes = [5, 5, 5, 5, 2]
    window = mb.Window(zip(batch[0].split(sizes), batch[1].split(sizes), strict=True))
    accumulator = mb.Accumulator(model, mean_square)
    for _ in range(2):
        clear(model)
        accumulator.run(window)
        assert difference(gradients(model), expected) <= EXACT


def test_micro_batches_of_a_window_are_cut_smaller_but_never_joined() -> None:
    model, batch = regressor(), points()
    sizes = [9, 2, 11]
    window = mb.Window(list(zip(batch[0].split(sizes), batch[1].split(sizes), strict=True)))
    report = mb.Accumulator(model, mean_square, micro_batch_size=4).run(window)
    assert report.micro_batch_sizes == (3, 3, 3, 2, 4, 4, 3)


def test_a_gradient_penalty_whose_leaf_lives_only_in_the_loss_is_allowed_and_exact() -> None:
    model, batch = regressor(), points()

    def loss_fn(m: nn.Module, b: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
        x = b[0].detach().clone().requires_grad_()
        (slope,) = torch.autograd.grad(m(x).sum(), x, create_graph=True)
        return F.mse_loss(m(b[0]), b[1]) + slope.norm(dim=1).square().mean()

    expected = reference(model, lambda: loss_fn(model, batch))
    mb.Accumulator(model, loss_fn, micro_batch_size=3).run(batch)
    assert difference(gradients(model), expected) <= EXACT


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_activation_checkpointing_changes_nothing(use_reentrant: bool) -> None:
    model, batch = regressor(), points()
    batch[0].requires_grad_(False)

    def loss_fn(m: nn.Module, b: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
        hidden = m[0](b[0])
        inner = torch.utils.checkpoint.checkpoint(m[1:], hidden, use_reentrant=use_reentrant)
        return F.mse_loss(inner, b[1])

    expected = reference(model, lambda: mean_square(model, batch))
    mb.Accumulator(model, loss_fn, micro_batch_size=4).run(batch)
    assert difference(gradients(model), expected) <= EXACT


def test_forward_runs_once_for_each_micro_batch() -> None:
    model, batch = regressor(), points()
    calls: list[int] = []
    model.register_forward_hook(lambda *_: calls.append(1))
    mb.Accumulator(model, mean_square, micro_batch_size=4).run(batch)
    assert len(calls) == 6


def test_own_cut_and_num_samples_serve_batches_of_any_layout() -> None:
    model, (x, y) = regressor(), points()
    batch = {"x": x.T.contiguous(), "y": y.T.contiguous()}  # batch dimension last

    def loss_fn(m: nn.Module, b: dict[str, torch.Tensor]) -> torch.Tensor:
        return F.mse_loss(m(b["x"].T), b["y"].T)

    expected = reference(model, lambda: mean_square(model, (x, y)))
    accumulator = mb.Accumulator(
        model,
        loss_fn,
        micro_batch_size=4,
        cut=lambda b, start, stop: {key: value[:, start:stop] for key, value in b.items()},
        num_samples=lambda b: b["x"].shape[1],
    )
    report = accumulator.run(batch)
    assert report.micro_batch_sizes == (4, 4, 4, 4, 3, 3)
    assert difference(gradients(model), expected) <= EXACT


def test_rng_and_buffers_are_those_of_the_forwards_and_nothing_else_changes() -> None:
    model, batch = nn.Sequential(nn.Linear(5, 4), nn.Dropout(0.5), nn.Linear(4, 1)).double(), points()
    before = copy.deepcopy(model.state_dict())
    accumulator = mb.Accumulator(model, mean_square, micro_batch_size=4)
    torch.manual_seed(7)
    accumulator.run(batch)
    after_run = torch.rand(1)
    torch.manual_seed(7)
    for micro_batch in mb.Window([batch]).cut(4):
        mean_square(model, micro_batch)
    assert torch.equal(after_run, torch.rand(1))
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
    assert model.training
    assert all(p.requires_grad for p in model.parameters())


# ---------------------------------------------------------------------------------------------------------------------
# Bad input: a clear error, and nothing lost


def run(loss_fn: object, batch: object = None, model: nn.Module | None = None, **options: object) -> mb.Report:
    options.setdefault("micro_batch_size", 4)
    return mb.Accumulator(model or regressor(), loss_fn, **options).run(points() if batch is None else batch)


def test_a_bare_token_mean_is_refused_and_the_exact_forms_are_shown() -> None:
    with pytest.raises(ValueError, match=r"(?s)mean over valid tokens.*valid_tokens\(batch\['labels'\].*mean \* n, n"):
        run(token_mean, tokens_and_labels(), tagger())


def with_backward(model: nn.Module, batch: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
    mean_square(model, batch).backward()
    return mean_square(model, batch)


def with_zeroing(model: nn.Module, batch: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
    model.zero_grad()
    return mean_square(model, batch)


def with_zeroing_in_place(model: nn.Module, batch: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
    model.zero_grad(set_to_none=False)
    return mean_square(model, batch)


@pytest.mark.parametrize("loss_fn", [with_backward, with_zeroing, with_zeroing_in_place])
def test_a_loss_fn_that_trains_is_refused(loss_fn: object) -> None:
    model = regressor()
    with pytest.raises(ValueError, match=r"the loss_fn changed the gradients of 4 of 4 parameters: did it call backw"):
        run(loss_fn, model=model)
    assert all(p.grad is None for p in model.parameters())
    expected = reference(model, lambda: mean_square(model, points()))
    run(mean_square, model=model)
    assert difference(gradients(model), expected) <= 1e-12, "what failed has left nothing behind"


def test_a_forward_that_makes_zero_gradients_is_no_change_of_gradients() -> None:
    def with_zeros(model: nn.Module, batch: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
        for p in model.parameters():
            p.grad = torch.zeros_like(p) if p.grad is None else p.grad
        return mean_square(model, batch)

    model = regressor()
    expected = reference(model, lambda: mean_square(model, points()))
    run(with_zeros, model=model)
    assert difference(gradients(model), expected) <= 1e-12


def test_what_is_added_to_stays_the_tensor_that_it_was() -> None:
    for dtype in (torch.float64, torch.bfloat16):
        model = nn.Linear(5, 1, bias=False).to(dtype)
        flat = torch.ones(5, dtype=dtype)
        model.weight.grad = held = flat.view(1, 5)
        mb.Accumulator(model, lambda m, b: (m(b).sum(), len(b)), micro_batch_size=2).run(
            torch.ones(4, 5).to(dtype), add=True
        )
        assert model.weight.grad is held
        assert flat.tolist() == [2.0] * 5


def test_a_gradient_penalty_within_the_loss_is_no_change_of_gradients() -> None:
    def penalised(model: nn.Module, batch: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
        inputs = batch[0].clone().requires_grad_()
        (slope,) = torch.autograd.grad(model(inputs).sum(), inputs, create_graph=True)
        return mean_square(model, batch) + slope.square().mean()

    model = regressor()
    expected = reference(model, lambda: penalised(model, points()))
    run(penalised, model=model)
    assert difference(gradients(model), expected) <= 1e-12


def test_a_mean_over_samples_beside_ignore_labels_passes_when_said_explicitly() -> None:
    model, batch = tagger(), tokens_and_labels()
    run(lambda m, b: (m(b["tokens"]).square().mean() * len(b["tokens"]), len(b["tokens"])), batch, model)


@pytest.mark.parametrize("size", [0, -3, 2.5, True, "8", "automatic"])
def test_a_micro_batch_size_must_be_a_positive_integer(size: object) -> None:
    with pytest.raises(ValueError, match=r"micro_batch_size must be an integer of at least 1(, 'auto' or None)?, got"):
        mb.Accumulator(regressor(), mean_square, micro_batch_size=size)


def test_leaves_of_different_length_are_named_with_their_shapes() -> None:
    x, y = points()
    with pytest.raises(ValueError, match=r"batch\[0\] has shape \(22, 5\), batch\[1\] has shape \(21, 1\)"):
        run(mean_square, (x, y[:21]))


def test_an_empty_batch_is_refused() -> None:
    x, y = points()
    with pytest.raises(ValueError, match="the effective batch is empty"):
        run(mean_square, (x[:0], y[:0]))
    with pytest.raises(ValueError, match="the effective batch is empty"):
        run(mean_square, mb.Window([]))
    with pytest.raises(ValueError, match="holds no samples"):
        run(mean_square, mb.Window([(x[:3], y[:3]), (x[:0], y[:0])]))


def test_a_plain_batch_needs_a_micro_batch_size() -> None:
    with pytest.raises(ValueError, match="micro_batch_size=None takes a Window, got a tuple"):
        run(mean_square, micro_batch_size=None)


def test_a_loss_that_is_not_a_scalar_is_refused_with_the_form_to_use() -> None:
    with pytest.raises(ValueError, match=r"the loss has shape \(4, 1\), not \(\): for losses per term return \(losses"):
        run(lambda m, b: (m(b[0]) - b[1]).square())


def test_a_loss_without_grad_is_refused() -> None:
    with pytest.raises(ValueError, match="does not depend on any trainable parameter"):
        run(lambda m, b: mean_square(m, b).detach())


def test_of_several_sums_the_one_without_a_graph_is_named_and_no_gradient_is_left() -> None:
    model = regressor()

    def one_detached(m: nn.Module, b: tuple[torch.Tensor, torch.Tensor]) -> dict[str, torch.Tensor]:
        loss_sum = mean_square(m, b) * len(b[0])
        return {"first": loss_sum, "second": loss_sum.detach()}

    with pytest.raises(ValueError, match="the second does not depend on any trainable parameter"):
        run(one_detached, model=model, count=lambda b: {"first": len(b[0]), "second": len(b[0])})
    assert all(p.grad is None for p in model.parameters())


@pytest.mark.parametrize("weight", [-1, float("nan"), float("inf"), torch.tensor(-2.0)])
def test_negative_and_non_finite_weights_are_refused(weight: object) -> None:
    with pytest.raises(ValueError, match=r"loss_weight is .*: a count of terms must be finite and not negative"):
        run(lambda m, b: (mean_square(m, b), weight))


def test_no_output_of_a_model_passes_for_a_loss() -> None:
    with pytest.raises(
        ValueError, match=r"the loss_fn returned a NoneType. A loss_fn returns \(loss_sum, loss_weight\)"
    ):
        run(lambda m, b: None)


def test_gradients_left_over_are_refused_by_content_and_named() -> None:
    model, batch = regressor(), points()
    accumulator = mb.Accumulator(model, mean_square, micro_batch_size=4)
    accumulator.run(batch)
    with pytest.raises(
        ValueError, match=r"4 of 4 parameters hold a gradient from before, the first of them '0.weight'"
    ):
        accumulator.run(batch)
    model.zero_grad(set_to_none=False)  # zeros are not left over
    accumulator.run(batch)
    clear(model)
    expected = reference(model, lambda: mean_square(model, batch))
    accumulator.run(batch)
    assert difference(gradients(model), expected) <= EXACT


@pytest.mark.parametrize("zeros", [False, True])
@pytest.mark.parametrize("add", [False, True])
def test_after_an_exception_gradients_are_as_before_and_the_next_run_is_right(zeros: bool, add: bool) -> None:
    model, batch = regressor(), points()
    calls = []

    def fails_third(m: nn.Module, b: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
        calls.append(1)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return mean_square(m, b)

    expected = reference(model, lambda: mean_square(model, batch))
    accumulator = mb.Accumulator(model, fails_third, micro_batch_size=4)
    if zeros:
        for p in model.parameters():
            p.grad = torch.zeros_like(p)
    before = gradients(model)
    with pytest.raises(KeyboardInterrupt):
        accumulator.run(batch, add=add)
    for p, gradient in zip(model.parameters(), before, strict=True):
        assert p.grad is None if gradient is None else torch.equal(p.grad, gradient)
    accumulator.run(batch)
    assert difference(gradients(model), expected) <= EXACT


def test_a_failed_run_with_add_leaves_the_earlier_gradient_untouched() -> None:
    model, batch = regressor(), points()
    mb.Accumulator(model, mean_square, micro_batch_size=4).run(batch)
    before = gradients(model)
    with pytest.raises(ZeroDivisionError):
        mb.Accumulator(model, lambda m, b: mean_square(m, b) * (1 // 0), micro_batch_size=4).run(batch, add=True)
    assert all(torch.equal(p.grad, g) for p, g in zip(model.parameters(), before, strict=True))


def test_a_parameter_outside_the_model_is_named() -> None:
    temperature = nn.Parameter(torch.ones((), dtype=torch.float64))
    with pytest.raises(ValueError, match=r"outside of the model: 'temperature', shape \(\)"):
        run(lambda m, b: mean_square(m, b) * temperature)
    assert temperature.grad is None


def test_a_trainable_tensor_outside_the_model_that_outlives_the_loss_is_named_and_keeps_its_gradient() -> None:
    temperature = torch.ones((), dtype=torch.float64, requires_grad=True)
    model = regressor()
    with pytest.raises(ValueError, match=r"outside of the model: 'temperature'"):
        run(lambda m, b: mean_square(m, b) * temperature, model=model)
    assert temperature.grad is None
    assert all(p.grad is None for p in model.parameters())


def test_a_stray_parameter_is_refused_again_by_the_next_run_and_after_evaluate() -> None:
    temperature, model = nn.Parameter(torch.ones((), dtype=torch.float64)), regressor()
    accumulator = mb.Accumulator(model, lambda m, b: mean_square(m, b) * temperature, micro_batch_size=4)
    accumulator.evaluate(points())
    for _ in range(2):
        with pytest.raises(ValueError, match="outside of the model"):
            accumulator.run(points())


def test_a_frozen_model_can_be_evaluated() -> None:
    model, batch = regressor().requires_grad_(False), points()
    report = mb.Accumulator(model, mean_square, micro_batch_size=4).evaluate(batch)
    assert abs(float(report.loss) - mean_square(model, batch).item()) <= EXACT


def test_a_module_used_by_the_loss_but_not_given_is_named() -> None:
    critic = nn.Linear(1, 1).double()
    with pytest.raises(ValueError, match=r"'critic.weight', shape \(1, 1\).*frozen="):
        run(lambda m, b: critic(m(b[0])).mean())


def test_a_hook_that_would_step_inside_backward_is_refused() -> None:
    model = regressor()
    model[0].weight.register_post_accumulate_grad_hook(lambda p: None)
    with pytest.raises(ValueError, match=r"'0.weight' has a hook from register_post_accumulate_grad_hook"):
        run(mean_square, model=model)


def test_a_model_on_the_meta_device_is_refused() -> None:
    with pytest.raises(ValueError, match=r"meta device.*to_empty"):
        run(mean_square, model=nn.Linear(5, 1, device="meta"))


def test_a_model_with_nothing_to_train_is_refused() -> None:
    with pytest.raises(ValueError, match="no parameter that requires a gradient"):
        run(mean_square, model=regressor().requires_grad_(False))


def test_a_model_that_is_no_module_is_refused() -> None:
    with pytest.raises(ValueError, match=r"model must be an nn.Module or a sequence of them, got a function"):
        mb.Accumulator(lambda x: x, mean_square)


def test_count_and_weight_together_are_refused() -> None:
    with pytest.raises(ValueError, match="give one of them"):
        run(lambda m, b: (mean_square(m, b), 4), count=len)
    with pytest.raises(ValueError, match=r"needs Accumulator.*count="):
        run(lambda m, b: {"a": mean_square(m, b)})
    with pytest.raises(ValueError, match=r"the loss 'a' has no count: count= gave \['b', 'c'\]"):
        run(lambda m, b: {"a": mean_square(m, b)}, count=lambda b: {"b": 1, "c": 2})


def test_a_criterion_is_no_loss_fn_and_the_error_names_sum_loss() -> None:
    with pytest.raises(ValueError, match=r"a CrossEntropyLoss takes \(outputs, targets\): give macrobatch.sum_loss"):
        mb.Accumulator(regressor(), nn.CrossEntropyLoss(), micro_batch_size=4)


@pytest.mark.parametrize("micro_batch_size", [4, None, "auto"])
def test_a_loader_given_for_a_batch_is_refused_with_the_loop_to_write(micro_batch_size: object) -> None:
    loader = torch.utils.data.DataLoader(list(zip(*points(), strict=True)), batch_size=4)
    for given in (loader, iter(loader), mb.windows(loader, accumulation_steps=2)):
        with pytest.raises(ValueError, match=r"run takes one effective batch at a time, got a .*: for batch in loader"):
            run(mean_square, given, micro_batch_size=micro_batch_size)


def test_a_denominator_of_zero_leaves_the_other_loss_and_its_gradient() -> None:
    model, batch = tagger(), tokens_and_labels()

    def count(b: dict[str, torch.Tensor]) -> dict[str, int]:
        return {"tokens": 0, "sequences": len(b["labels"])}

    def losses(m: nn.Module, b: dict[str, torch.Tensor]) -> dict[str, object]:
        return {"tokens": 0, "sequences": two_losses(m, b)["sequences"]}

    expected = reference(model, lambda: two_losses(model, batch)["sequences"] / 13)
    report = mb.Accumulator(model, losses, micro_batch_size=4, count=count).run(batch)
    assert difference(gradients(model), expected) <= EXACT
    assert abs(float(report.loss) - two_losses(model, batch)["sequences"].item() / 13) <= EXACT
    assert report.metrics["tokens"].isnan()


def test_a_bare_list_of_images_of_unlike_size_is_cut_between_them() -> None:
    images = [torch.ones(3, height, 5, dtype=torch.float64) for height in (4, 5, 6, 7)]
    assert [len(part) for part in mb.Window([images]).cut(1)] == [1, 1, 1, 1]


def test_model_and_loss_fn_swapped_are_refused_at_once() -> None:
    with pytest.raises(
        ValueError, match=r"Sequential\(input\) is not: too many positional arguments. Were model and loss_fn swap"
    ):
        mb.Accumulator(nn.Identity(), regressor(), micro_batch_size=4)
    with pytest.raises(ValueError, match="give the model, not its parameters"):
        mb.Accumulator(regressor().parameters(), mean_square, micro_batch_size=4)


class Pair:
    """A batch of an own class, which nothing here knows how to cut."""

    def __init__(self, x: torch.Tensor, y: torch.Tensor) -> None:
        self.x, self.y = x, y


def test_own_batches_with_num_samples_but_without_cut_are_refused_not_shared() -> None:
    x, y = points()
    window = mb.Window([Pair(x[:16], y[:16]), Pair(x[16:], y[16:])], num_samples=lambda pair: len(pair.x))
    with pytest.raises(ValueError, match=r"is a Pair, an unknown container of tensors.*own batches need cut= too"):
        run(lambda m, pair: mean_square(m, (pair.x, pair.y)), window, micro_batch_size=6)


def test_evaluating_first_does_not_switch_off_the_look_at_the_first_window() -> None:
    model, batch = tagger(), tokens_and_labels()
    accumulator = mb.Accumulator(model, token_mean, micro_batch_size=2)
    accumulator.evaluate({"tokens": batch["tokens"], "labels": batch["tokens"]})
    with pytest.raises(ValueError, match="almost surely a mean over valid tokens"):
        accumulator.run(batch)


def test_evaluate_builds_no_graph() -> None:
    seen = []
    model, batch = regressor(), points()

    def loss_fn(m: nn.Module, b: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
        seen.append(m(b[0]).requires_grad)
        return mean_square(m, b)

    mb.Accumulator(model, loss_fn, micro_batch_size=8).evaluate(batch)
    assert seen == [False, False, False]


def test_empty_gradients_are_not_left_over() -> None:
    model, batch = regressor(), points()
    model.empty = nn.Parameter(torch.zeros(0, 3))
    model.empty.grad = torch.zeros(0, 3)

    def loss_fn(m: nn.Module, b: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
        return F.mse_loss(m[2](m[1](m[0](b[0]))), b[1])

    mb.Accumulator(model, loss_fn, micro_batch_size=8).run(batch)


# ---------------------------------------------------------------------------------------------------------------------
# Limits


def test_known_limit_a_hook_that_clamps_sees_micro_batches_and_one_that_scales_does_not_mind() -> None:
    def off(hook: Callable[[torch.Tensor], torch.Tensor]) -> float:
        model = regressor()
        model[0].weight.register_hook(hook)
        expected = reference(model, lambda: mean_square(model, points()))
        run(mean_square, model=model)
        return difference(gradients(model), expected)

    assert off(lambda g: g.clamp(-0.01, 0.01)) > 0.01
    assert off(lambda g: g * 0.5) <= 1e-12


def test_known_limit_spectral_norm_steps_once_for_each_micro_batch_and_is_exact_once_converged() -> None:
    def off(steps: int) -> float:
        torch.manual_seed(0)
        model = nn.Sequential(nn.utils.parametrizations.spectral_norm(nn.Linear(5, 8)), nn.Linear(8, 1)).double()
        with torch.no_grad():
            model[0].parametrizations.weight.original.normal_()  # as training moves it, ahead of its power iteration
            for _ in range(steps):
                model(points()[0])
        start = {name: value.clone() for name, value in model.state_dict().items()}
        expected = reference(model, lambda: mean_square(model, points()))
        model.load_state_dict(start)
        run(mean_square, model=model)
        return difference(gradients(model), expected)

    assert off(0) > 1e-4
    assert off(500) <= 1e-9


def test_known_limit_a_stray_leaf_is_looked_for_in_the_first_loss_alone() -> None:
    temperature = torch.ones((), dtype=torch.float64, requires_grad=True)
    calls: list[int] = []

    def later(m: nn.Module, b: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
        calls.append(0)
        return mean_square(m, b) * (temperature if len(calls) > 1 else 1.0)

    run(later)
    with pytest.raises(ValueError, match="trainable tensor outside of the model: 'temperature'"):
        run(lambda m, b: mean_square(m, b) * temperature)


def test_known_limit_padding_that_shows_up_in_a_later_window_passes() -> None:
    batch = tokens_and_labels()
    whole = {key: value[:2] for key, value in batch.items()} | {"labels": batch["tokens"][:2]}
    model = tagger()
    accumulator = mb.Accumulator(model, token_mean, micro_batch_size=2)
    accumulator.run(whole)
    model.zero_grad()
    accumulator.run(batch)
    with pytest.raises(ValueError, match="mean over valid tokens"):
        run(token_mean, batch, tagger())
