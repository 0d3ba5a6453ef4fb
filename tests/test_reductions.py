"""A mean given as a sum, a sum given as a mean, and a mean over some terms are told; what is none of it is right."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from helpers import clear, difference, gradients, reference
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

import macrobatch as mb
from macrobatch.reductions import reduction_of
from macrobatch.weighting import valid_tokens

Batch = dict[str, Tensor]

generator = torch.Generator().manual_seed(0)
SCORES = torch.randn(6, 4, dtype=torch.float64, generator=generator)
LABELS = torch.randint(4, (6,), generator=generator)
TARGETS = torch.rand(6, 4, dtype=torch.float64, generator=generator)
SIGNS = TARGETS.sub(0.5).sign()
CRITERIA: dict[str, tuple[Callable[..., nn.Module], tuple[Tensor, ...]]] = {
    "cross-entropy": (nn.CrossEntropyLoss, (LABELS,)),
    "cross-entropy with class weights": (
        lambda **k: nn.CrossEntropyLoss(weight=torch.arange(1.0, 5.0).double(), **k),
        (LABELS,),
    ),
    "negative log likelihood": (nn.NLLLoss, (LABELS,)),
    "squared error": (nn.MSELoss, (TARGETS,)),
    "smooth l1": (nn.SmoothL1Loss, (TARGETS,)),
    "huber": (nn.HuberLoss, (TARGETS,)),
    "binary cross-entropy": (nn.BCEWithLogitsLoss, (TARGETS,)),
    "soft margin": (nn.SoftMarginLoss, (SIGNS,)),
    "multi-margin": (nn.MultiMarginLoss, (LABELS,)),
}
COMPOSED: dict[str, tuple[Callable[..., nn.Module], tuple[Tensor, ...]]] = {
    "absolute error": (nn.L1Loss, (TARGETS,)),
    "poisson": (nn.PoissonNLLLoss, (TARGETS,)),
    "multi-label": (nn.MultiLabelSoftMarginLoss, (TARGETS,)),
    "triplet": (nn.TripletMarginLoss, (TARGETS, TARGETS.flip(0))),
    "hinge": (nn.HingeEmbeddingLoss, (SIGNS,)),
}


def scores() -> Tensor:
    return SCORES.clone().requires_grad_()


@pytest.mark.parametrize("name", [*CRITERIA, *COMPOSED])
def test_the_mean_of_a_criterion_is_known_as_one(name: str) -> None:
    criterion, others = (CRITERIA | COMPOSED)[name]
    assert reduction_of(criterion()(scores(), *others)) == "mean"


@pytest.mark.parametrize("name", CRITERIA)
def test_the_sum_of_a_criterion_is_known_as_one(name: str) -> None:
    criterion, others = CRITERIA[name]
    assert reduction_of(criterion(reduction="sum")(scores(), *others)) == "sum"


@pytest.mark.parametrize("name", [*CRITERIA, *COMPOSED])
def test_what_a_criterion_gives_unreduced_tells_nothing_once_it_is_summed(name: str) -> None:
    criterion, others = (CRITERIA | COMPOSED)[name]
    assert reduction_of(criterion(reduction="none")(scores(), *others).sum()) is None


SAME: dict[str, Callable[[Tensor], Tensor]] = {
    "itself": lambda loss: loss,
    "in another dtype": lambda loss: loss.float(),
    "reshaped": lambda loss: loss.reshape(1).squeeze(),
    "the mean of one number": lambda loss: loss.reshape(1).mean(),
    "cloned": lambda loss: loss.clone(),
    "and another mean": lambda loss: loss + scores().mean((0, 1)) - scores().abs().mean(),
    "and a number": lambda loss: loss + 3.0,
    "a part of it": lambda loss: 0.1 * loss,
    "a part of it, by a tensor": lambda loss: torch.tensor(0.1) * loss,
    "divided once more": lambda loss: loss / 4,
    "parts of two": lambda loss: 0.9 * loss + scores().abs().mean() / torch.tensor(2.0),
    "with a constant tensor": lambda loss: loss + torch.ones(()),
}


@pytest.mark.parametrize("form", SAME)
def test_a_mean_is_known_through_what_leaves_the_number_as_it_is(form: str) -> None:
    assert reduction_of(SAME[form](scores().mean())) == "mean"


OTHERS: dict[str, Callable[[Tensor], Tensor]] = {
    "a mean times the number of terms": lambda x: x.mean() * x.numel(),
    "a mean divided by a part of one": lambda x: x.mean() / 0.5,
    "a mean times a trained number": lambda x: x.mean() * torch.tensor(0.5, requires_grad=True),
    "a mean by a trained number": lambda x: x.mean() / torch.tensor(2.0, requires_grad=True),
    "something by a mean": lambda x: 4 / x.mean(),
    "a part of a sum": lambda x: 0.5 * x.sum(),
    "a part of a criterion's sum": lambda x: 0.5 * F.mse_loss(x, TARGETS, reduction="sum"),
    "a criterion's sum by the number of samples": lambda x: F.mse_loss(x, TARGETS, reduction="sum") / len(x),
    "a sum": lambda x: x.sum(),
    "means of rows, summed": lambda x: x.mean(1).sum(),
    "a sum and a mean": lambda x: F.mse_loss(x, TARGETS, reduction="sum") + x.mean(),
    "a root of a mean": lambda x: x.square().mean().sqrt(),
    "no graph": lambda x: x.detach().mean(),
    "a leaf": lambda x: torch.ones((), requires_grad=True),
    "a sum with a leaf in it": lambda x: x.mean() + torch.ones((), requires_grad=True),
    "more summands than are followed": lambda x: sum((x.mean() for _ in range(300)), torch.zeros(())),
}


@pytest.mark.parametrize("form", OTHERS)
def test_what_is_neither_for_sure_is_not_told(form: str) -> None:
    assert reduction_of(OTHERS[form](scores())) is None


def test_numbers_in_the_graph_are_read_within_a_dispatch_mode_too() -> None:
    def loss() -> Tensor:
        return 0.1 * scores().mean() + scores().mean() / 4

    class Watching(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            return func(*args, **(kwargs or {}))

    with Watching():
        assert reduction_of(loss()) == "mean"


# ---------------------------------------------------------------------------------------------------------------------
# In the first window


def batch(n: int = 7) -> Batch:
    made = torch.Generator().manual_seed(n)
    return {
        "x": torch.randn(n, 3, generator=made, dtype=torch.float64),
        "y": torch.randint(4, (n,), generator=made),
    }


def classifier() -> nn.Module:
    torch.manual_seed(0)
    return nn.Linear(3, 4).double()


def cross_entropy(model: nn.Module, b: Batch, reduction: str = "mean") -> Tensor:
    return F.cross_entropy(model(b["x"]), b["y"], reduction=reduction)


MISTAKES: dict[str, tuple[Callable[[nn.Module, Batch], Any], Any, str]] = {
    "a mean for a sum": (
        lambda m, b: (cross_entropy(m, b), len(b["y"])),
        None,
        "the loss is a mean, and stands for the sum over about 4 terms: its gradient is that many times too",
    ),
    "a mean for a sum, as a Loss": (
        lambda m, b: mb.Loss(cross_entropy(m, b), torch.tensor(len(b["y"]))),
        None,
        'Return the sum over the terms beside their number .reduction="sum", or mean \\* n and n.',
    ),
    "two means for a sum": (
        lambda m, b: (cross_entropy(m, b) + m(b["x"]).square().mean(), valid_tokens(b["y"])),
        None,
        "the loss is a mean",
    ),
    "a mean where count= tells the number": (
        lambda m, b: cross_entropy(m, b),
        lambda b: len(b["y"]),
        "the loss is a mean, and stands for the sum over about 3.5 terms",
    ),
    "one of two that count= tells": (
        lambda m, b: {"policy": cross_entropy(m, b, "sum"), "kl": m(b["x"]).square().mean()},
        lambda b: {"policy": len(b["y"]), "kl": b["x"].numel()},
        "the kl is a mean, and stands for the sum over about 10.5 terms",
    ),
    "a sum for a mean": (
        lambda m, b: cross_entropy(m, b, "sum"),
        None,
        r"mean over samples, but it is the sum of a criterion with reduction=.sum.: with 4 samples in a micro-batch "
        r"its gradient is that many times too large. Return \(loss_sum, number of terms\)",
    ),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_the_first_window_warns_once(mistake: str) -> None:
    loss_fn, count, message = MISTAKES[mistake]
    accumulator = mb.Accumulator(classifier(), loss_fn, micro_batch_size=4, count=count)
    with pytest.warns(UserWarning, match=message) as told:
        accumulator.run(batch())
    assert len(told) == 1
    accumulator.run(batch(), add=True)  # where a warning is an error
    assert told[0].filename == __file__, "it is about the line that called run"


def tokens(n: int = 7) -> Batch:
    """Sequences of four tokens; the mask has other numbers of them in each."""
    made = torch.Generator().manual_seed(n)
    return {
        "x": torch.randn(n, 4, 3, generator=made, dtype=torch.float64),
        "y": torch.randint(1, 4, (n, 4), generator=made),
        "mask": torch.arange(4) < torch.tensor([4, 4, 3, 2, 1, 1, 2])[:n, None],
    }


WEIGHTS = torch.tensor([1.0, 3.0, 0.5, 2.0], dtype=torch.float64)


def token_entropy(model: nn.Module, b: Batch, labels: Tensor, **options: Any) -> Tensor:
    return F.cross_entropy(model(b["x"]).transpose(1, 2), labels, **options)


OVER_SOME: dict[str, tuple[Callable[[nn.Module, Batch], Any], str]] = {
    "labels made in the loss_fn": (
        lambda m, b: token_entropy(m, b, b["y"].masked_fill(~b["mask"], -100)),
        r"a cross-entropy that leaves out \d+ of 16 labels, those that are -100, and not as many of each sample",
    ),
    "labels of padding that are not negative": (
        lambda m, b: token_entropy(m, b, b["y"] * b["mask"], ignore_index=0),
        r"leaves out \d+ of 16 labels, those that are 0, .* n = macrobatch.valid_tokens\(labels, ignore_index=0\)",
    ),
    "of two means one leaves out labels": (
        lambda m, b: m(b["x"]).square().mean() + 0.5 * token_entropy(m, b, b["y"].masked_fill(~b["mask"], -100)),
        "leaves out",
    ),
    "class weights": (
        lambda m, b: token_entropy(m, b, b["y"], weight=WEIGHTS),
        r"a cross-entropy with class weights, .* Return macrobatch.sum_loss\(criterion\)\(outputs, targets\)",
    ),
    "a selection": (
        lambda m, b: F.cross_entropy(m(b["x"])[b["mask"]], b["y"][b["mask"]]),
        r"a mean over \d+ terms of \d samples: not as many of each",
    ),
    "squares of a selection": (
        lambda m, b: F.mse_loss(m(b["x"])[b["mask"]][:, 0], b["y"][b["mask"]].double()),
        r"a mean over \d+ terms of \d samples",
    ),
    "the mean of a selection": (
        lambda m, b: m(b["x"])[b["mask"]][:, 0].square().mean(),
        r"Return the sum over the terms beside their number \(reduction=.sum., or mean \* n and n\) \(if a mean over",
    ),
}


@pytest.mark.parametrize("mistake", OVER_SOME)
def test_a_bare_mean_over_other_terms_than_the_samples_is_told_and_ignored_labels_are_refused(
    mistake: str,
) -> None:
    loss_fn, message = OVER_SOME[mistake]
    model = classifier()
    accumulator = mb.Accumulator(model, loss_fn, micro_batch_size=4)
    message = "(?s)returned a bare scalar, which counts as a mean over samples.*" + message
    if "leaves out" in message:
        with pytest.raises(ValueError, match=message):
            accumulator.run(tokens())
        assert all(p.grad is None for p in model.parameters())
    else:
        with pytest.warns(UserWarning, match=message):
            accumulator.run(tokens())


@pytest.mark.parametrize("mistake", OVER_SOME)
def test_control_accumulated_such_a_mean_is_wrong(mistake: str) -> None:
    loss_fn, _ = OVER_SOME[mistake]
    model = classifier()
    expected = reference(model, lambda: loss_fn(model, tokens()))
    mb.Accumulator(model, lambda m, b: loss_fn(m, b).neg().neg(), micro_batch_size=4).run(tokens())
    assert difference(gradients(model), expected) > 0.01


def shifted(m: nn.Module, b: Batch) -> Tensor:
    """As causal models of transformers do inside: the last position has no label, whatever the batch holds."""
    labels = F.pad(b["y"], (0, 1), value=-100)[:, 1:]
    return F.cross_entropy(m(b["x"]).flatten(0, 1), labels.flatten())


@pytest.mark.parametrize("micro_batch_size", [1, 2, 4])
def test_ignored_labels_are_refused_only_where_samples_have_unlike_numbers_of_others_in_whatever_micro_batch(
    micro_batch_size: int,
) -> None:
    def by_length(m: nn.Module, b: Batch) -> Tensor:
        return token_entropy(m, b, b["y"].masked_fill(~b["mask"], -100))

    with pytest.raises(ValueError, match="and not as many of each sample"):
        mb.Accumulator(classifier(), by_length, micro_batch_size=micro_batch_size).run(tokens())
    alike = tokens() | {"mask": (torch.arange(4) < 3).expand(7, 4)}
    model = classifier()
    expected = reference(model, lambda: by_length(model, alike))
    mb.Accumulator(model, by_length, micro_batch_size=micro_batch_size).run(alike)
    assert difference(gradients(model), expected) <= 1e-12


SURE: dict[str, Callable[[nn.Module, Batch], Any]] = {
    "tokens, all but the last of each": shifted,
    "tokens, all of them": lambda m, b: token_entropy(m, b, b["y"]),
    "equal class weights": lambda m, b: token_entropy(m, b, b["y"], weight=torch.full((4,), 2.0).double()),
    "features": lambda m, b: F.mse_loss(m(b["x"]), torch.zeros(len(b["x"]), 4, 4).double()),
    "a mean and one over parameters": lambda m, b: token_entropy(m, b, b["y"]) + m.weight.square().mean(),
    "what is meant to be averaged": lambda m, b: (
        F.mse_loss(m.weight, torch.zeros(4, 3).double()) * len(b["x"]),
        len(b["x"]),
    ),
}


@pytest.mark.parametrize("form", SURE)
def test_a_bare_mean_over_as_many_terms_of_each_sample_passes(form: str) -> None:
    model = classifier()

    def full() -> Tensor:
        loss = SURE[form](model, tokens())
        return loss[0] / loss[1] if isinstance(loss, tuple) else loss

    expected = reference(model, full)
    mb.Accumulator(model, SURE[form], micro_batch_size=4).run(tokens())
    assert difference(gradients(model), expected) <= 1e-12


@pytest.mark.parametrize("mask", [torch.tensor([True, False]), torch.tensor([1.0, 0.0])])
def test_valid_tokens_takes_no_mask(mask: Tensor) -> None:
    with pytest.raises(ValueError, match=r"integer labels that are not -100, got torch.*: of a mask take mask.sum\(\)"):
        valid_tokens(mask)


RIGHT: dict[str, tuple[Callable[[nn.Module, Batch], Any], Any]] = {
    "a mean": (lambda m, b: cross_entropy(m, b), None),
    "a sum": (lambda m, b: (cross_entropy(m, b, "sum"), len(b["y"])), None),
    "a sum by the number of samples": (lambda m, b: cross_entropy(m, b, "sum") / len(b["y"]), None),
    "a mean times its terms": (lambda m, b: (cross_entropy(m, b) * len(b["y"]), len(b["y"])), None),
    "a sum with count": (lambda m, b: cross_entropy(m, b, "sum"), lambda b: len(b["y"])),
    "a criterion": (
        lambda m, b: mb.sum_loss(nn.CrossEntropyLoss())(m(b["x"]), b["y"]),
        None,
    ),
}


@pytest.mark.parametrize("form", RIGHT)
def test_what_is_right_passes_and_gives_the_gradient_of_the_full_batch(form: str) -> None:
    loss_fn, count = RIGHT[form]
    model = classifier()
    expected = reference(model, lambda: cross_entropy(model, batch()))
    mb.Accumulator(model, loss_fn, micro_batch_size=4, count=count).run(batch())
    assert difference(gradients(model), expected) <= 1e-12


def test_a_sum_of_one_mean_for_each_sample_passes() -> None:
    def each(m: nn.Module, b: Batch) -> tuple[Tensor, int]:
        losses = [F.cross_entropy(m(x[None]), y[None]) for x, y in zip(b["x"], b["y"], strict=True)]
        return sum(losses, torch.zeros(())), len(losses)

    model = classifier()
    expected = reference(model, lambda: cross_entropy(model, batch()))
    mb.Accumulator(model, each, micro_batch_size=4).run(batch())
    assert difference(gradients(model), expected) <= 1e-12


def test_what_hooks_keep_for_the_backward_is_not_looked_at() -> None:
    kept: dict[int, Tensor] = {}

    def pack(tensor: Tensor) -> int:
        kept[len(calls)] = tensor
        calls.append(0)
        return len(calls) - 1

    def mean(m: nn.Module, b: Batch) -> Tensor:
        with torch.autograd.graph.saved_tensors_hooks(pack, kept.pop):  # a second look would fail
            return 0.5 * cross_entropy(m, b)

    calls: list[int] = []
    model = classifier()
    expected = reference(model, lambda: 0.5 * cross_entropy(model, batch()))
    mb.Accumulator(model, mean, micro_batch_size=4).run(batch())
    assert difference(gradients(model), expected) <= 1e-12


def test_micro_batches_of_one_term_and_means_that_count_once_pass() -> None:
    model = classifier()
    expected = reference(model, lambda: cross_entropy(model, batch()))
    for loss_fn in (
        lambda m, b: (cross_entropy(m, b), len(b["y"])),
        lambda m, b: (cross_entropy(m, b), 1),
        lambda m, b: cross_entropy(m, b, "sum"),
    ):
        clear(model)
        mb.Accumulator(model, loss_fn, micro_batch_size=1).run(batch())
        assert difference(gradients(model), expected) <= 1e-12


def test_control_the_mistakes_would_be_wrong_by_the_number_of_terms() -> None:
    """What the check keeps from training: hidden from it by an operation that it does not follow."""
    model = classifier()
    expected = reference(model, lambda: cross_entropy(model, batch(8)))
    for loss_fn, factor in (
        (lambda m, b: (cross_entropy(m, b).neg().neg(), len(b["y"])), 1 / 4),
        (lambda m, b: cross_entropy(m, b, "sum").neg().neg(), 4),
    ):
        clear(model)
        mb.Accumulator(model, loss_fn, micro_batch_size=4).run(batch(8))
        assert difference(gradients(model), [None if g is None else g * factor for g in expected]) <= 1e-12


def test_known_limit_what_an_operation_hides_is_not_seen() -> None:
    smoothed = F.cross_entropy(scores(), LABELS, label_smoothing=0.1)
    assert reduction_of(smoothed) is None
    assert reduction_of(1.5 * scores().mean()) is None
    assert reduction_of((scores() * TARGETS).sum() / TARGETS.sum()) is None
    assert reduction_of(scores().square().sum() / 2) is None
