"""Every criterion of torch, taken apart by sum_loss, means over any parts together what it means over the whole."""

import functools
import inspect
import itertools
import pickle
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from helpers import difference, gradients, reference
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional as F

import macrobatch as mb

SIZES = (5, 1, 3, 2)
N, C, T = sum(SIZES), 4, 6
EXACT, WRONG = 1e-12, 0.01

# torch speaks up for these on its own; here they are the reference.
pytestmark = [
    pytest.mark.filterwarnings("ignore:reduction. 'mean' divides the total loss:UserWarning"),
]


def draw(*shape: int, seed: int = 1) -> Tensor:
    """Numbers whose size grows over the batch, so that the mean of means is far from the mean."""
    numbers = torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    return numbers * torch.linspace(0.3, 2, shape[0], dtype=torch.float64).reshape(-1, *[1] * (len(shape) - 1))


def classes(*shape: int, ignored: int | None = None) -> Tensor:
    labels = torch.randint(0, C, shape, generator=torch.Generator().manual_seed(2))
    if ignored is not None:
        labels[torch.rand(shape, generator=torch.Generator().manual_seed(3)) < 0.4] = ignored
    return labels


def signs(*shape: int) -> Tensor:
    return classes(*shape).remainder(2).double() * 2 - 1


def several_labels() -> Tensor:
    """Lists of classes that end with -1."""
    labels = torch.full((N, C), -1)
    for j in range(N):
        labels[j, : j % C] = torch.randperm(C, generator=torch.Generator().manual_seed(j))[: j % C]
    return labels


CLASS_WEIGHT = torch.tensor([0.2, 3.0, 1.0, 0.5], dtype=torch.float64)
LOG = functools.partial(torch.log_softmax, dim=1)


@dataclass
class Case:
    """A criterion and what it takes: numbers of N samples that become outputs by `link`, and the other arguments."""

    make: Callable[..., nn.Module]  # takes reduction=
    numbers: Tensor
    others: tuple[Tensor, ...]
    link: Callable[[Tensor], Tensor]
    batch_dim: int  # of the outputs; of every other argument it is 0

    def parts(self, sizes: Sequence[int]) -> list[tuple[Tensor, ...]]:
        columns = [self.numbers.split(list(sizes), self.batch_dim), *(x.split(list(sizes)) for x in self.others)]
        return list(zip(*columns, strict=True))


class Scale(nn.Module):
    """The model under the criterion: one factor for each column, then what makes the outputs admissible."""

    def __init__(self, case: Case) -> None:
        super().__init__()
        shape = [1 if d == case.batch_dim else size for d, size in enumerate(case.numbers.shape)]
        self.factor = nn.Parameter(torch.linspace(0.5, 1.5, torch.Size(shape).numel(), dtype=torch.float64).view(shape))
        self.link = case.link

    def forward(self, numbers: Tensor) -> Tensor:
        return self.link(numbers * self.factor)


def case(make: Any, numbers: Tensor, *others: Tensor, link: Any = None, batch_dim: int = 0, **options: Any) -> Case:
    return Case(functools.partial(make, **options), numbers, others, link or nn.Identity(), batch_dim)


def probabilities(*shape: int) -> Tensor:
    return draw(*shape, seed=5).softmax(1)


def ctc(**options: Any) -> Case:
    others = (classes(N, 3).clamp(min=1), torch.full((N,), T), torch.arange(N) % 4)
    return case(
        nn.CTCLoss, draw(N, T, C).transpose(0, 1), *others, link=lambda x: x.log_softmax(-1), batch_dim=1, **options
    )


def linear(**options: Any) -> Callable[..., nn.Module]:
    """With a head of its own, the same each time."""

    def make(reduction: str) -> nn.Module:
        torch.manual_seed(4)
        return nn.LinearCrossEntropyLoss(3, C, bias=True, dtype=torch.float64, reduction=reduction, **options)

    return make


SMOOTH = {"label_smoothing": 0.2}
WEIGHTED = {"weight": CLASS_WEIGHT}
CASES: dict[str, list[Case]] = {
    "L1Loss": [case(nn.L1Loss, draw(N, 3), draw(N, 3, seed=2))],
    "MSELoss": [case(nn.MSELoss, draw(N, 3), draw(N, 3, seed=2))],
    "HuberLoss": [case(nn.HuberLoss, draw(N, 3), draw(N, 3, seed=2), delta=0.7)],
    "SmoothL1Loss": [case(nn.SmoothL1Loss, draw(N, 3), draw(N, 3, seed=2), beta=0.3)],
    "PoissonNLLLoss": [
        case(nn.PoissonNLLLoss, draw(N, 3), classes(N, 3).double(), full=True),
        case(nn.PoissonNLLLoss, draw(N, 3), classes(N, 3).double(), link=torch.exp, log_input=False),
    ],
    "GaussianNLLLoss": [case(nn.GaussianNLLLoss, draw(N, 3), draw(N, 3, seed=2), draw(N, 3, seed=3).exp(), full=True)],
    "KLDivLoss": [
        case(nn.KLDivLoss, draw(N, C), probabilities(N, C), link=LOG),
        case(nn.KLDivLoss, draw(N, C, T), probabilities(N, C, T).log(), link=LOG, log_target=True),
    ],
    "BCELoss": [case(nn.BCELoss, draw(N, C), probabilities(N, C), link=torch.sigmoid, weight=CLASS_WEIGHT)],
    "BCEWithLogitsLoss": [
        case(nn.BCEWithLogitsLoss, draw(N, C), probabilities(N, C), weight=CLASS_WEIGHT, pos_weight=CLASS_WEIGHT + 1)
    ],
    "MarginRankingLoss": [case(nn.MarginRankingLoss, draw(N), draw(N, seed=2), signs(N), margin=0.5)],
    "HingeEmbeddingLoss": [case(nn.HingeEmbeddingLoss, draw(N, 3), signs(N, 3))],
    "MultiLabelMarginLoss": [case(nn.MultiLabelMarginLoss, draw(N, C), several_labels())],
    "SoftMarginLoss": [case(nn.SoftMarginLoss, draw(N, 3), signs(N, 3))],
    "MultiLabelSoftMarginLoss": [
        case(nn.MultiLabelSoftMarginLoss, draw(N, C), probabilities(N, C), weight=CLASS_WEIGHT)
    ],
    "CosineEmbeddingLoss": [case(nn.CosineEmbeddingLoss, draw(N, 3), draw(N, 3, seed=2), signs(N), margin=-0.5)],
    "MultiMarginLoss": [case(nn.MultiMarginLoss, draw(N, C), classes(N), p=2, weight=CLASS_WEIGHT)],
    "TripletMarginLoss": [case(nn.TripletMarginLoss, draw(N, 3), draw(N, 3, seed=2), draw(N, 3, seed=3), margin=2.0)],
    "TripletMarginWithDistanceLoss": [
        case(nn.TripletMarginWithDistanceLoss, draw(N, 3), draw(N, 3, seed=2), draw(N, 3, seed=3), swap=True)
    ],
    "CTCLoss": [ctc(), ctc(zero_infinity=True)],
    "NLLLoss": [
        case(nn.NLLLoss, draw(N, C), classes(N, ignored=1), link=LOG, ignore_index=1, **WEIGHTED),
        case(nn.NLLLoss, draw(N, C, T, 2), classes(N, T, 2, ignored=-100), link=LOG),
    ],
    "CrossEntropyLoss": [
        case(nn.CrossEntropyLoss, draw(N, C), classes(N)),
        case(nn.CrossEntropyLoss, draw(N, C), classes(N, ignored=-100), **WEIGHTED),
        case(nn.CrossEntropyLoss, draw(N, C), classes(N), **SMOOTH),
        case(nn.CrossEntropyLoss, draw(N, C), classes(N, ignored=2), ignore_index=2, **SMOOTH, **WEIGHTED),
        case(nn.CrossEntropyLoss, draw(N, C, T), classes(N, T, ignored=-1), ignore_index=-1, **SMOOTH, **WEIGHTED),
        case(nn.CrossEntropyLoss, draw(N, C, T, 2), classes(N, T, 2, ignored=-100)),
        case(nn.CrossEntropyLoss, draw(N, C), probabilities(N, C), **WEIGHTED),
        case(nn.CrossEntropyLoss, draw(N, C, T), probabilities(N, C, T), **SMOOTH, **WEIGHTED),
    ],
}
if hasattr(nn, "LinearCrossEntropyLoss"):  # torch 2.13
    CASES["LinearCrossEntropyLoss"] = [
        case(linear(), draw(N, 3), classes(N, ignored=-100)),
        case(linear(ignore_index=1, **SMOOTH, **WEIGHTED), draw(N, 3), classes(N, ignored=1)),
        case(linear(**WEIGHTED), draw(N, 3), probabilities(N, C)),
    ]
EXCEPTIONS = {
    "NLLLoss2d": "the deprecated name of NLLLoss",
    "AdaptiveLogSoftmaxWithLoss": "has no reduction: a loss_fn returns (-output.sum(), len(output))",
}
EVERY = [pytest.param(each, id=f"{name}-{j}") for name, cases in CASES.items() for j, each in enumerate(cases)]


def test_every_criterion_of_torch_is_among_these_cases_or_excepted_for_a_reason() -> None:
    losses = {name for name, kind in vars(nn).items() if isinstance(kind, type) and name.endswith(("Loss", "Loss2d"))}
    losses |= {n for n, kind in vars(nn).items() if isinstance(kind, type) and issubclass(kind, nn.modules.loss._Loss)}
    assert losses == CASES.keys() | EXCEPTIONS.keys()


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("example", EVERY)
def test_sum_over_weight_is_the_mean_of_the_criterion_whatever_its_reduction(example: Case, reduction: str) -> None:
    outputs = example.link(example.numbers)
    loss_sum, loss_weight = mb.sum_loss(example.make(reduction=reduction))(outputs, *example.others)
    mean = example.make(reduction="mean")(outputs, *example.others)
    assert loss_sum.ndim == 0
    assert torch.isclose(loss_sum / loss_weight, mean, rtol=EXACT, atol=0)


def by_parts(example: Case, loss: Callable[..., tuple[Tensor, Any]], model: nn.Module) -> None:
    """Gradients of the sum of `loss` over uneven parts, divided once by all weights."""
    total = 0.0
    for numbers, *others in example.parts(SIZES):
        loss_sum, loss_weight = loss(model(numbers), *others)
        loss_sum.backward()
        total += float(loss_weight)
    for p in model.parameters():
        assert p.grad is not None
        p.grad /= total


@pytest.mark.parametrize("example", EVERY)
def test_uneven_parts_give_the_gradient_of_the_criterion_on_the_whole_and_the_mean_of_means_does_not(
    example: Case,
) -> None:
    model, criterion = Scale(example), example.make(reduction="mean")
    expected = reference(model, lambda: criterion(model(example.numbers), *example.others))
    by_parts(example, mb.sum_loss(criterion), model)
    assert difference(gradients(model), expected) < EXACT
    model.zero_grad()
    by_parts(example, lambda *arguments: (criterion(*arguments), 1), model)
    assert difference(gradients(model), expected) > WRONG


def test_kl_divergence_over_samples_is_divided_by_samples() -> None:
    example = case(nn.KLDivLoss, draw(N, C, T), probabilities(N, C, T), link=LOG)
    model, criterion = Scale(example), nn.KLDivLoss(reduction="batchmean")
    expected = reference(model, lambda: criterion(model(example.numbers), *example.others))
    by_parts(example, mb.sum_loss(criterion), model)
    assert difference(gradients(model), expected) < EXACT
    _, over_entries = mb.sum_loss(nn.KLDivLoss(reduction="mean"))(LOG(example.numbers), *example.others)
    assert over_entries == N * C * T, "control: the mean over entries has another denominator"


@given(
    st.lists(st.integers(1, 6), min_size=1, max_size=5),
    st.lists(st.floats(0, 5), min_size=C, max_size=C),
    st.floats(0, 1),
    st.sampled_from([-100, 0, 3]),
    st.integers(0, 1000),
)
@settings(max_examples=100, deadline=None)
def test_any_cross_entropy_is_exact_over_any_parts(
    sizes: list[int], weights: list[float], smoothing: float, ignored: int, seed: int
) -> None:
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(sum(sizes), C, 3, dtype=torch.float64, generator=generator)
    labels = torch.randint(0, C, (sum(sizes), 3), generator=generator)
    labels[torch.rand(labels.shape, generator=generator) < 0.5] = ignored
    weight = torch.tensor(weights, dtype=torch.float64)
    criterion = nn.CrossEntropyLoss(weight, ignore_index=ignored, label_smoothing=smoothing)
    pairs = zip(logits.split(sizes), labels.split(sizes), strict=True)
    parts = [mb.sum_loss(criterion)(outputs, targets) for outputs, targets in pairs]
    total = sum(float(loss_weight) for _, loss_weight in parts)
    if total > 0:
        mean = float(criterion(logits, labels))
        assert abs(sum(float(loss_sum) for loss_sum, _ in parts) / total - mean) <= 1e-12 * max(abs(mean), 1)


def test_a_micro_batch_of_ignored_targets_counts_for_nothing_where_the_mean_is_nan() -> None:
    logits = draw(3, C).requires_grad_()
    labels = torch.full((3,), -100)
    for criterion in (nn.CrossEntropyLoss(), nn.CrossEntropyLoss(CLASS_WEIGHT, label_smoothing=0.1)):
        loss_sum, loss_weight = mb.sum_loss(criterion)(logits, labels)
        assert (float(loss_sum.detach()), float(loss_weight)) == (0, 0)
        (gradient,) = torch.autograd.grad(loss_sum, [logits])
        assert gradient.abs().max() == 0
        assert criterion(logits, labels).isnan(), "control"


@pytest.mark.parametrize(
    ("criterion", "arguments"),
    [
        (nn.CrossEntropyLoss(CLASS_WEIGHT, label_smoothing=0.1), (draw(C), torch.tensor(1))),
        (nn.CrossEntropyLoss(CLASS_WEIGHT), (draw(C), draw(C, seed=2).softmax(0))),
        (nn.NLLLoss(CLASS_WEIGHT), (draw(C).log_softmax(0), torch.tensor(1))),
        (nn.MSELoss(), (draw(3), draw(3, seed=2))),
        (nn.MSELoss(), (torch.tensor(3.0), torch.tensor(1.0))),
        (nn.MultiMarginLoss(), (draw(C), torch.tensor([1]))),
        (nn.CosineEmbeddingLoss(), (draw(3), draw(3, seed=2), torch.tensor(1))),
        (nn.TripletMarginLoss(), (draw(3), draw(3, seed=2), draw(3, seed=3))),
        (nn.KLDivLoss(reduction="batchmean"), (draw(C).log_softmax(0), draw(C, seed=2).softmax(0))),
        (nn.CTCLoss(), (draw(T, C).log_softmax(-1), torch.tensor([1, 2]), torch.tensor(T), torch.tensor(2))),
        (nn.CTCLoss(), (draw(T, 2, C).log_softmax(-1), torch.tensor([1, 2, 3]), (T, T), (1, 2))),
    ],
)
def test_one_sample_without_a_batch_dimension_and_lengths_in_tuples_are_taken_too(
    criterion: nn.Module, arguments: tuple[Any, ...]
) -> None:
    loss_sum, loss_weight = mb.sum_loss(criterion)(*arguments)
    assert torch.isclose(loss_sum / loss_weight, criterion(*arguments), rtol=EXACT, atol=0)


# ---------------------------------------------------------------------------------------------------------------------
# Functions

FUNCTIONS = {
    "binary_cross_entropy": "BCELoss",
    "binary_cross_entropy_with_logits": "BCEWithLogitsLoss",
    "cosine_embedding_loss": "CosineEmbeddingLoss",
    "cross_entropy": "CrossEntropyLoss",
    "ctc_loss": "CTCLoss",
    "gaussian_nll_loss": "GaussianNLLLoss",
    "hinge_embedding_loss": "HingeEmbeddingLoss",
    "huber_loss": "HuberLoss",
    "kl_div": "KLDivLoss",
    "l1_loss": "L1Loss",
    "margin_ranking_loss": "MarginRankingLoss",
    "mse_loss": "MSELoss",
    "multi_margin_loss": "MultiMarginLoss",
    "multilabel_margin_loss": "MultiLabelMarginLoss",
    "multilabel_soft_margin_loss": "MultiLabelSoftMarginLoss",
    "nll_loss": "NLLLoss",
    "poisson_nll_loss": "PoissonNLLLoss",
    "smooth_l1_loss": "SmoothL1Loss",
    "soft_margin_loss": "SoftMarginLoss",
    "triplet_margin_loss": "TripletMarginLoss",
    "triplet_margin_with_distance_loss": "TripletMarginWithDistanceLoss",
}
FUNCTION_EXCEPTIONS = {
    "linear_cross_entropy": "takes the last layer's weight between outputs and targets; its module is known",
}


def takes_a_reduction(function: Any) -> bool:
    return inspect.isfunction(function) and "reduction" in inspect.signature(function).parameters


def test_every_loss_function_of_torch_is_among_these_or_excepted_for_a_reason() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        losses = {name for name in dir(F) if not name.startswith("_") and takes_a_reduction(getattr(F, name))}
    assert losses - {"embedding_bag"} == FUNCTIONS.keys() | FUNCTION_EXCEPTIONS.keys() & losses


@pytest.mark.parametrize("name", FUNCTIONS)
def test_a_function_of_torch_bare_or_with_options_is_taken_like_its_module(name: str) -> None:
    for example in CASES[FUNCTIONS[name]]:
        options = example.make.keywords  # type: ignore[attr-defined]
        function = functools.partial(getattr(F, name), **options) if options else getattr(F, name)
        outputs = example.link(example.numbers)
        mean = function(outputs, *example.others)
        for criterion in (function, functools.partial(function, reduction="sum")):
            loss_sum, loss_weight = mb.sum_loss(criterion)(outputs, *example.others)
            assert torch.isclose(loss_sum / loss_weight, mean, rtol=EXACT, atol=0)


def test_the_functional_kl_divergence_over_samples_is_divided_by_samples() -> None:
    criterion = functools.partial(F.kl_div, reduction="batchmean", log_target=True)
    arguments = (LOG(draw(N, C)), probabilities(N, C).log())
    loss_sum, loss_weight = mb.sum_loss(criterion)(*arguments)
    assert loss_weight == N
    assert torch.isclose(loss_sum / loss_weight, criterion(*arguments), rtol=EXACT, atol=0)


@pytest.mark.parametrize(
    ("criterion", "name"),
    [
        (nn.Linear(2, 2), "Linear"),
        (nn.AdaptiveLogSoftmaxWithLoss(4, 8, [2]), "AdaptiveLogSoftmaxWithLoss"),
        (F.relu, "relu"),
        (torch.softmax, "softmax"),
        (lambda outputs, targets: outputs.mean(), "<lambda>"),
        ("cross_entropy", "str"),
        ([], "list"),
        (None, "NoneType"),
    ],
)
def test_what_has_no_reduction_is_refused_with_what_to_write(criterion: Any, name: str) -> None:
    with pytest.raises(
        ValueError,
        match=rf"a torch criterion with a reduction, got {name}: write a loss_fn\(model, micro_batch\) that returns "
        r"\(loss_sum, loss_weight\) instead, for Accumulator",
    ):
        mb.sum_loss(criterion)


@pytest.mark.parametrize(
    ("criterion", "message"),
    [
        (nn.CrossEntropyLoss, r"got the class CrossEntropyLoss: give one of it, CrossEntropyLoss\(...\)"),
        (torch.zeros(()), "got a tensor, which is a loss computed already: give the criterion itself"),
        (
            functools.partial(F.cross_entropy, None),
            "a partial of cross_entropy with arguments by position: give them by n",
        ),
        (
            nn.MSELoss(reduction="men"),
            "got MSELoss with reduction='men': give one of 'mean', 'sum', 'none', 'batchmean'",
        ),
    ],
)
def test_what_was_meant_to_be_a_criterion_is_refused_with_what_to_give(criterion: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        mb.sum_loss(criterion)


def test_what_is_in_the_exact_form_already_stays_what_it_is() -> None:
    loss = mb.sum_loss(nn.MSELoss())
    assert mb.sum_loss(loss) is loss


class Returns(nn.Module):
    """A model that returns its inputs in a container."""

    def __init__(self, container: Any) -> None:
        super().__init__()
        self.container = container

    def forward(self, inputs: Any) -> Any:
        return self.container(inputs)


@pytest.mark.parametrize(
    ("container", "kind"),
    [(lambda z: {"logits": z}, "dict"), (lambda z: (z, None), "tuple"), (lambda z: None, "NoneType")],
)
def test_outputs_in_a_container_are_refused_with_what_to_write(container: Any, kind: str) -> None:
    pairs = torch.randn(4, 3), torch.zeros(4, dtype=torch.long)
    message = (
        rf"^CrossEntropyLoss needs a tensor of outputs, got a {kind}: write .* takes the tensor out of what the model"
    )
    with pytest.raises(ValueError, match=message):
        mb.sum_loss(nn.CrossEntropyLoss())(Returns(container), pairs)
    with pytest.raises(ValueError, match=message):
        mb.sum_loss(F.cross_entropy)(container(pairs[0]), pairs[1])


def test_a_criterion_of_ones_own_may_take_outputs_in_any_container() -> None:
    class OfTwo(nn.Module):
        reduction = "mean"

        def forward(self, outputs: Any, targets: torch.Tensor) -> torch.Tensor:
            losses = (outputs[0] - targets).square() + outputs[1].square()
            return losses if self.reduction == "none" else losses.mean()

    outputs, targets = (torch.randn(4), torch.randn(4)), torch.randn(4)
    loss_sum, weight = mb.sum_loss(OfTwo())(outputs, targets)
    torch.testing.assert_close(loss_sum / weight, OfTwo()(outputs, targets))


def test_several_models_are_refused_where_one_is_called() -> None:
    with pytest.raises(ValueError, match=r"calls one model, got a list of 1: give the Accumulator the model itself"):
        mb.sum_loss(nn.MSELoss())([nn.Linear(3, 2)], (torch.randn(4, 3), torch.randn(4, 2)))


@pytest.mark.parametrize(
    ("micro_batch", "kind"),
    [
        ({"x": torch.zeros(4)}, "a dict: write"),
        (torch.zeros(4, 3), r"a Tensor of shape \(4, 3\): write"),
        ((torch.zeros(4),) * 3, "a tuple of 3: write"),
    ],
)
def test_micro_batches_that_are_no_pairs_are_refused_with_what_they_are(micro_batch: Any, kind: str) -> None:
    with pytest.raises(
        ValueError, match=rf"takes \(inputs, targets\) micro-batches, got {kind} a loss_fn\(model, micro"
    ):
        mb.sum_loss(nn.MSELoss())(nn.Linear(3, 2), micro_batch)


def test_linear_cross_entropy_as_a_function_is_refused() -> None:
    if hasattr(F, "linear_cross_entropy"):
        with pytest.raises(ValueError, match="a torch criterion with a reduction, got linear_cross_entropy"):
            mb.sum_loss(F.linear_cross_entropy)


# ---------------------------------------------------------------------------------------------------------------------
# Criteria of one's own


class Focal(nn.Module):
    """Focal loss; its mean is over samples, over class weights, or over the samples that are not ignored."""

    def __init__(self, reduction: str = "mean", divide_by: str = "samples") -> None:
        super().__init__()
        self.reduction, self.divide_by = reduction, divide_by

    def forward(self, outputs: Tensor, targets: Tensor) -> Tensor:
        log_p = outputs.log_softmax(1).gather(1, targets.clamp(min=0)[:, None])[:, 0]
        weight = CLASS_WEIGHT.to(outputs)[targets.clamp(min=0)] if self.divide_by == "class weights" else 1.0
        losses = -weight * (1 - log_p.exp()) ** 2 * log_p * (targets >= 0)
        if self.reduction == "none":
            return losses
        by = {"class weights": lambda: weight.sum(), "valid": lambda: (targets >= 0).sum()}  # type: ignore[union-attr]
        return losses.sum() / by.get(self.divide_by, lambda: len(targets))()


def test_an_own_criterion_whose_mean_is_over_its_losses_is_taken() -> None:
    example = case(Focal, draw(N, C), classes(N))
    model, criterion = Scale(example), Focal()
    expected = reference(model, lambda: criterion(model(example.numbers), *example.others))
    by_parts(example, mb.sum_loss(criterion), model)
    assert difference(gradients(model), expected) < EXACT
    assert criterion.reduction == "mean", "the criterion itself is as before"


def test_an_own_criterion_whose_mean_is_weighted_is_refused_each_time() -> None:
    loss = mb.sum_loss(Focal(divide_by="class weights"))
    for _ in range(2):
        with pytest.raises(ValueError, match=r"the mean of Focal is not the mean of its losses under reduction='none'"):
            loss(draw(N, C), classes(N))


def test_an_own_mean_over_valid_targets_is_refused_once_there_are_others() -> None:
    loss = mb.sum_loss(Focal(divide_by="valid"))
    loss(draw(N, C), classes(N))
    with pytest.raises(ValueError, match="the mean of Focal is not the mean of its losses"):
        loss(draw(N, C), classes(N, ignored=-100))


def test_the_check_of_an_own_criterion_grows_rare() -> None:
    calls = []

    class Counted(Focal):
        def forward(self, outputs: Tensor, targets: Tensor) -> Tensor:
            calls.append(self.reduction)
            return super().forward(outputs, targets)

    loss = mb.sum_loss(Counted())
    for _ in range(20):
        loss(draw(N, C), classes(N))
    assert (calls.count("none"), calls.count("mean")) == (20, 5)


class Stubborn(nn.Module):
    """Always the mean, whatever its reduction says."""

    reduction = "mean"

    def forward(self, outputs: Tensor, targets: Tensor) -> Tensor:
        return (outputs - targets).square().mean()


def test_an_own_criterion_that_ignores_its_reduction_is_refused() -> None:
    with pytest.raises(ValueError, match="the mean of Stubborn is not the mean of its losses under reduction='none'"):
        mb.sum_loss(Stubborn())(draw(N, C), draw(N, C, seed=2))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_rounding_in_low_precision_does_not_refuse_an_own_criterion(dtype: torch.dtype) -> None:
    for seed in range(20):
        loss_sum, loss_weight = mb.sum_loss(Focal())(draw(N, C, seed=seed).to(dtype), classes(N))
        assert (loss_sum.dtype, loss_weight) == (dtype, N)


@pytest.mark.parametrize("criterion", [Focal(reduction="sum"), Focal(reduction="none")])
def test_an_own_criterion_without_a_mean_to_compare_with_is_refused(criterion: nn.Module) -> None:
    with pytest.raises(ValueError, match=r"Focal overrides a torch loss, or has no reduction='mean' to compare with"):
        mb.sum_loss(criterion)


class Named(nn.CrossEntropyLoss):
    """The loss of torch under another name."""


class Halved(nn.CrossEntropyLoss):
    def forward(self, outputs: Tensor, targets: Tensor) -> Tensor:
        return super().forward(outputs, targets) / 2


class Squared(nn.MSELoss):
    def forward(self, outputs: Tensor, targets: Tensor) -> Tensor:
        return super().forward(outputs, targets) ** (2 if self.reduction == "mean" else 1)


def test_a_subclass_of_a_torch_loss_is_known_as_long_as_it_computes_the_same() -> None:
    logits, labels = draw(N, C), classes(N, ignored=-100)
    loss_sum, loss_weight = mb.sum_loss(Named(CLASS_WEIGHT))(logits, labels)
    assert torch.isclose(loss_sum / loss_weight, nn.CrossEntropyLoss(CLASS_WEIGHT)(logits, labels), rtol=EXACT)
    with pytest.raises(ValueError, match="Halved overrides a torch loss"):
        mb.sum_loss(Halved())
    with pytest.raises(ValueError, match="the mean of Squared is not the mean of its losses"):
        mb.sum_loss(Squared())(draw(N), draw(N, seed=2))


# ---------------------------------------------------------------------------------------------------------------------
# In an Accumulator


@pytest.mark.parametrize("name", ["CrossEntropyLoss", "LinearCrossEntropyLoss", "MSELoss"])
def test_sum_loss_is_a_loss_fn_and_its_own_parameters_are_trained(name: str) -> None:
    for example in CASES.get(name, []):
        model, criterion = Scale(example), example.make(reduction="mean")
        modules = [model, criterion]
        expected = reference(modules, lambda: criterion(model(example.numbers), *example.others))  # noqa: B023
        for micro_batch_size in (1, 4, N):
            accumulator = mb.Accumulator(model, mb.sum_loss(criterion), micro_batch_size=micro_batch_size)
            report = accumulator.run((example.numbers, *example.others))
            assert difference(gradients(modules), expected) < EXACT
            assert torch.isclose(report.loss, criterion(model(example.numbers), *example.others), rtol=EXACT)
            model.zero_grad()
            criterion.zero_grad()


def test_class_weights_belong_to_the_loss_and_travel_with_it() -> None:
    criterion = nn.CrossEntropyLoss(CLASS_WEIGHT.float())
    loss = mb.sum_loss(criterion)
    assert [name for name, _ in loss.named_buffers()] == ["criterion.weight"]
    copy = pickle.loads(pickle.dumps(loss)).double()
    mine, theirs = copy(draw(N, C), classes(N)), mb.sum_loss(nn.CrossEntropyLoss(CLASS_WEIGHT.float().double()))
    assert all(map(torch.equal, mine, theirs(draw(N, C), classes(N))))


def test_parameters_of_the_criterion_are_registered_once() -> None:
    class Tempered(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.reduction, self.temperature = "mean", nn.Parameter(torch.tensor(2.0))

        def forward(self, outputs: Tensor, targets: Tensor) -> Tensor:
            return F.mse_loss(outputs * self.temperature, targets, reduction=self.reduction)

    criterion = Tempered()
    loss = mb.sum_loss(criterion)
    assert list(itertools.chain(loss.parameters())) == [criterion.temperature]
    loss(draw(N), draw(N, seed=2))[0].backward()
    assert criterion.temperature.grad is not None
