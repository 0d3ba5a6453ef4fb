"""train_epoch makes the updates of the full batch, window by window, and returns the exact mean loss of the epoch."""

import functools
import math
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim import SGD, AdamW, Optimizer
from torch.optim.lr_scheduler import ReduceLROnPlateau, StepLR
from torch.utils.data import DataLoader, TensorDataset

import macrobatch as mb

EXACT, WRONG = 1e-11, 0.01
CLASSES = 4
CLASS_WEIGHT = torch.tensor([0.2, 3.0, 1.0, 0.5], dtype=torch.float64)

Pair = tuple[Tensor, Tensor]


def net(outputs: int = CLASSES) -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 8), nn.Tanh(), nn.Linear(8, outputs)).double()


def inputs(n: int) -> Tensor:
    """Later samples are larger, so that windows and micro-batches differ much."""
    numbers = torch.randn(n, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    return numbers * torch.linspace(0.3, 3, n, dtype=torch.float64)[:, None]


def labels(n: int, ignored: float = 0.0) -> Tensor:
    generator = torch.Generator().manual_seed(2)
    numbers = torch.randint(0, CLASSES, (n,), generator=generator)
    numbers[torch.rand(n, generator=generator) < ignored] = -100
    return numbers


def micro_batches(x: Tensor, y: Tensor, *sizes: int) -> list[Pair]:
    return list(zip(x.split(list(sizes)), y.split(list(sizes)), strict=True))


def by_hand(
    model: nn.Module,
    loader: list[Pair],
    optimizer: Optimizer,
    criterion: Callable[[Tensor, Tensor], Tensor],
    steps: int,
    max_norm: float | None = None,
) -> None:
    """One full-batch update for each window."""
    for start in range(0, len(loader), steps):
        x, y = (torch.cat(column) for column in zip(*loader[start : start + steps], strict=True))
        optimizer.zero_grad()
        criterion(model(x), y).backward()
        if max_norm is not None:
            nn.utils.clip_grad_norm_(model.parameters(), max_norm)
        optimizer.step()


def textbook(
    model: nn.Module,
    loader: list[Pair],
    optimizer: Optimizer,
    criterion: Callable[[Tensor, Tensor], Tensor],
    steps: int,
    max_norm: float | None = None,
) -> None:
    """The loop of every tutorial: mean of means, and what the last window leaves is lost."""
    for position, (x, y) in enumerate(loader, 1):
        (criterion(model(x), y) / steps).backward()
        if position % steps == 0:
            if max_norm is not None:
                nn.utils.clip_grad_norm_(model.parameters(), max_norm)
            optimizer.step()
            optimizer.zero_grad()


def movement(model: nn.Module) -> Tensor:
    return torch.cat(
        [
            (p.detach() - q.detach()).flatten()
            for p, q in zip(model.parameters(), net(outputs_of(model)).parameters(), strict=True)
        ]
    )


def outputs_of(model: nn.Module) -> int:
    return int(list(model.parameters())[-1].numel())


def apart(mine: nn.Module, theirs: nn.Module) -> float:
    """How far two models are apart, relative to how far the second one moved."""
    return float((movement(mine) - movement(theirs)).abs().max() / movement(theirs).abs().max())


CASES: dict[str, dict[str, Any]] = {
    "a smaller last micro-batch": {"sizes": (5, 5, 5, 5, 5, 2), "steps": 3},
    "a last window of two of four": {"sizes": (5, 5, 5, 5, 5, 5), "steps": 4},
    "both": {"sizes": (4, 4, 4, 4, 1), "steps": 3},
    "uneven micro-batches": {"sizes": (7, 1, 3, 2, 9), "steps": 2},
    "fewer micro-batches than a window": {"sizes": (4, 1), "steps": 8},
    "ignored labels": {"sizes": (5, 5, 5, 5, 2), "steps": 3, "ignored": 0.5},
    "class weights": {"sizes": (5, 5, 5, 5, 2), "steps": 2, "criterion": nn.CrossEntropyLoss(CLASS_WEIGHT)},
    "all at once": {
        "sizes": (6, 3, 5, 5, 2),
        "steps": 2,
        "ignored": 0.3,
        "criterion": nn.CrossEntropyLoss(CLASS_WEIGHT, label_smoothing=0.1),
    },
    "clipping": {"sizes": (5, 5, 5, 2), "steps": 2, "max_norm": 0.1},
}


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize(
    "make", [functools.partial(SGD, lr=0.5, momentum=0.9), functools.partial(AdamW, lr=0.1, eps=1e-3)]
)
def test_an_epoch_is_one_full_batch_update_for_each_window(name: str, make: Callable[..., Optimizer]) -> None:
    case = {"criterion": nn.CrossEntropyLoss(), "ignored": 0.0, "max_norm": None, **CASES[name]}
    n = sum(case["sizes"])
    loader = micro_batches(inputs(n), labels(n, case["ignored"]), *case["sizes"])
    mine, theirs, control = net(), net(), net()
    criterion, steps, max_norm = case["criterion"], case["steps"], case["max_norm"]
    mb.train_epoch(mine, loader, make(mine.parameters()), criterion, steps, max_norm=max_norm)
    by_hand(theirs, loader, make(theirs.parameters()), criterion, steps, max_norm)
    textbook(control, loader, make(control.parameters()), criterion, steps, max_norm)
    assert apart(mine, theirs) < EXACT
    assert apart(control, theirs) > WRONG


@pytest.mark.parametrize("name", CASES)
def test_it_returns_the_mean_loss_over_all_terms_of_the_epoch(name: str) -> None:
    case = {"criterion": nn.CrossEntropyLoss(), "ignored": 0.0, **CASES[name]}
    x, y = inputs(sum(case["sizes"])), labels(sum(case["sizes"]), case["ignored"])
    loader, model, criterion = micro_batches(x, y, *case["sizes"]), net(), case["criterion"]
    mean = mb.train_epoch(model, loader, SGD(model.parameters(), lr=0.0), criterion, case["steps"])
    assert isinstance(mean, float)
    assert math.isclose(mean, float(criterion(net()(x), y).detach()), rel_tol=1e-12)
    means = [float(criterion(net()(x), y).detach()) for x, y in loader]
    if len(set(case["sizes"])) > 1:
        assert not math.isclose(mean, sum(means) / len(means), rel_tol=1e-3), "control: the mean of means"


def test_the_loss_is_that_of_each_window_before_its_update() -> None:
    loader, criterion, model = micro_batches(inputs(13), labels(13), 5, 5, 3), nn.CrossEntropyLoss(), net()
    mean = mb.train_epoch(model, loader, SGD(model.parameters(), lr=0.5), criterion, 1)
    other, losses = net(), []
    optimizer = SGD(other.parameters(), lr=0.5)
    for x, y in loader:
        losses.append(float(criterion(other(x), y).detach()) * len(x))
        by_hand(other, [(x, y)], optimizer, criterion, 1)
    assert math.isclose(mean, sum(losses) / 13, rel_tol=1e-12)


@pytest.mark.parametrize(
    "criterion", [nn.MSELoss(), F.mse_loss, functools.partial(F.huber_loss, delta=0.5), nn.L1Loss(reduction="sum")]
)
def test_any_criterion_means_what_its_mean_is_over_the_window(criterion: Any) -> None:
    x = inputs(12)
    loader = micro_batches(x, x.sum(1, keepdim=True), 5, 5, 2)
    mine, theirs = net(1), net(1)
    mb.train_epoch(mine, loader, SGD(mine.parameters(), lr=0.1), criterion, 3)
    mean = nn.L1Loss() if isinstance(criterion, nn.L1Loss) else criterion
    by_hand(theirs, loader, SGD(theirs.parameters(), lr=0.1), mean, 3)
    assert apart(mine, theirs) < EXACT


def test_a_data_loader_that_shuffles_is_seen_whole_in_every_epoch() -> None:
    seen: list[int] = []

    class Watching(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = net(1)

        def forward(self, x: Tensor) -> Tensor:
            seen.extend(x[:, 0].int().tolist())
            return self.inner(x)

    x = torch.arange(23, dtype=torch.float64)[:, None].expand(23, 3)
    loader = DataLoader(TensorDataset(x, x[:, :1]), batch_size=4, shuffle=True)
    model = Watching()
    optimizer = SGD(model.parameters(), lr=1e-4)
    for epoch in range(2):
        mb.train_epoch(model, loader, optimizer, nn.MSELoss(), accumulation_steps=4)
        assert sorted(seen[23 * epoch :]) == list(range(23))
    assert seen[:23] != seen[23:]


def test_clipping_meets_the_gradient_of_the_window_once() -> None:
    loader, max_norm = micro_batches(inputs(22), labels(22), 5, 5, 5, 5, 2), 0.01
    model = net()
    steps: list[float] = []
    optimizer = SGD(model.parameters(), lr=1.0)
    before = torch.cat([p.detach().flatten() for p in model.parameters()])

    def measure(*_: Any) -> None:
        nonlocal before
        after = torch.cat([p.detach().flatten() for p in model.parameters()])
        steps.append(float((after - before).norm()))
        before = after

    optimizer.register_step_post_hook(measure)
    mb.train_epoch(model, loader, optimizer, nn.CrossEntropyLoss(), 2, max_norm=max_norm)
    assert len(steps) == 3
    assert all(math.isclose(step, max_norm, rel_tol=1e-3) for step in steps)


# ---------------------------------------------------------------------------------------------------------------------
# The scheduler, and updates that are not made


def test_the_scheduler_steps_once_for_each_update() -> None:
    loader, model = micro_batches(inputs(22), labels(22), 5, 5, 5, 5, 2), net()
    optimizer = SGD(model.parameters(), lr=1.0)
    scheduler = StepLR(optimizer, step_size=1, gamma=0.5)
    for epoch in (1, 2):
        mb.train_epoch(model, loader, optimizer, nn.CrossEntropyLoss(), 2, scheduler=scheduler)
        assert scheduler.last_epoch == 3 * epoch
        assert optimizer.param_groups[0]["lr"] == 0.5 ** (3 * epoch)


@pytest.mark.parametrize("spoiled", ["not finite", "without terms"])
def test_an_update_that_is_not_made_steps_no_scheduler_and_changes_nothing_else(spoiled: str) -> None:
    x, y = inputs(20), labels(20)
    if spoiled == "not finite":
        x[7] = math.inf
    else:
        y[5:15] = -100
    loader, criterion = micro_batches(x, y, 5, 5, 5, 5), nn.CrossEntropyLoss()
    mine, theirs = net(), net()
    optimizer, other = (AdamW(model.parameters(), lr=0.1, eps=1e-3) for model in (mine, theirs))
    scheduler = StepLR(optimizer, step_size=1, gamma=0.5)
    mean = mb.train_epoch(
        mine, [loader[1], loader[2], loader[0], loader[3]], optimizer, criterion, 2, scheduler=scheduler
    )
    by_hand(theirs, [loader[0], loader[3]], other, criterion, 2)
    assert scheduler.last_epoch == 1
    assert apart(mine, theirs) < EXACT
    if spoiled == "not finite":
        assert math.isnan(mean), "a loss that was not finite is not hidden"
    else:
        kept = [torch.cat(column) for column in zip(loader[0], loader[3], strict=True)]
        assert math.isclose(mean, float(criterion(net()(kept[0]), kept[1]).detach()), rel_tol=1e-12)


def test_no_gradient_is_left_behind() -> None:
    model = net()
    mb.train_epoch(
        model, micro_batches(inputs(7), labels(7), 5, 2), SGD(model.parameters(), lr=0.1), nn.CrossEntropyLoss()
    )
    assert all(p.grad is None for p in model.parameters())


# ---------------------------------------------------------------------------------------------------------------------
# Options


def test_the_model_trains_and_the_rest_of_its_mode_is_the_callers() -> None:
    model = nn.Sequential(nn.Linear(3, CLASSES), nn.Dropout(0.5)).double().eval()
    mb.train_epoch(
        model, micro_batches(inputs(7), labels(7), 5, 2), SGD(model.parameters(), lr=0.1), nn.CrossEntropyLoss()
    )
    assert model.training


def normalised() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 8), nn.BatchNorm1d(8), nn.Tanh(), nn.Linear(8, CLASSES)).double()


def state_apart(mine: nn.Module, theirs: nn.Module) -> float:
    """The largest difference in parameters and running statistics, relative to the largest entry."""
    a, b = (torch.cat([v.double().flatten() for v in model.state_dict().values()]) for model in (mine, theirs))
    return float((a - b).abs().max() / b.abs().max())


NORM_SIZES = (6, 3, 5, 5, 2)  # two windows, the last micro-batch smaller


@pytest.mark.parametrize("batch_norm", ["pooled", "micro_batch"])
def test_batchnorm_is_told_as_to_an_accumulator(batch_norm: Any) -> None:
    loader, criterion = micro_batches(inputs(21), labels(21), *NORM_SIZES), nn.CrossEntropyLoss()
    mine, theirs, control = normalised(), normalised(), normalised()
    mb.train_epoch(mine, loader, SGD(mine.parameters(), lr=0.5), criterion, 3, batch_norm=batch_norm)
    for model, way in ((theirs, batch_norm), (control, "exact")):
        accumulator = mb.Accumulator(model, mb.sum_loss(criterion), batch_norm=way)
        for window in mb.windows(loader, accumulation_steps=3):
            mb.apply_update(SGD(model.parameters(), lr=0.5), accumulator.run(window))
    assert state_apart(mine, theirs) == 0
    assert state_apart(control, theirs) > WRONG


def test_with_exact_batchnorm_an_epoch_is_one_full_batch_update_for_each_window_in_statistics_too() -> None:
    loader, criterion = micro_batches(inputs(21), labels(21), *NORM_SIZES), nn.CrossEntropyLoss()
    mine, theirs, control = normalised(), normalised(), normalised()
    mb.train_epoch(mine, loader, SGD(mine.parameters(), lr=0.5), criterion, 3, batch_norm="exact")
    by_hand(theirs, loader, SGD(theirs.parameters(), lr=0.5), criterion, 3)
    with pytest.warns(UserWarning, match="normalises over the micro-batch"):
        mb.train_epoch(control, loader, SGD(control.parameters(), lr=0.5), criterion, 3)
    assert state_apart(mine, theirs) < EXACT
    assert state_apart(control, theirs) > WRONG


def test_low_precision_with_a_scaler_follows_full_precision() -> None:
    loader = [(x.float(), y) for x, y in micro_batches(inputs(22), labels(22), 5, 5, 5, 5, 2)]
    mine, theirs = net().float(), net().float()
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0, growth_interval=1)
    optimizer = SGD(mine.parameters(), lr=0.5)
    mb.train_epoch(
        mine, loader, optimizer, nn.CrossEntropyLoss(), 2, device="cpu", autocast=torch.float16, scaler=scaler
    )
    by_hand(theirs, loader, SGD(theirs.parameters(), lr=0.5), nn.CrossEntropyLoss(), 2)
    assert 0 < apart(mine, theirs) < 0.02
    assert scaler.get_scale() == 1024.0 * 2**3, "three updates, none of them skipped"


def test_a_criterion_with_parameters_trains_them_where_the_optimizer_has_them() -> None:
    if not hasattr(nn, "LinearCrossEntropyLoss"):
        pytest.skip("this torch has no LinearCrossEntropyLoss")
    loader = micro_batches(inputs(22), labels(22, ignored=0.3), 5, 5, 5, 5, 2)

    def train(by: Callable[..., Any]) -> list[Tensor]:
        model = net(5)
        criterion = nn.LinearCrossEntropyLoss(5, CLASSES, dtype=torch.float64)
        optimizer = SGD([*model.parameters(), *criterion.parameters()], lr=0.5)
        by(model, loader, optimizer, criterion, 2)
        return [p.detach() for p in (*model.parameters(), *criterion.parameters())]

    assert all(
        torch.allclose(p, q, rtol=0, atol=1e-12) for p, q in zip(train(mb.train_epoch), train(by_hand), strict=True)
    )


# ---------------------------------------------------------------------------------------------------------------------
# Bad input


def used_up() -> Iterator[Pair]:
    yield from ()


@pytest.mark.parametrize("loader", [[], used_up(), DataLoader(TensorDataset(torch.zeros(0, 3), torch.zeros(0)))])
def test_a_loader_without_data_is_an_error_not_a_mean_of_nothing(loader: Any) -> None:
    model = net()
    with pytest.raises(ValueError, match=r"gave no batch: an iterator that was used up, or an empty dataset\? Give"):
        mb.train_epoch(model, loader, SGD(model.parameters(), lr=0.1), nn.CrossEntropyLoss())


def test_an_iterator_that_is_used_up_by_the_first_epoch_is_noticed_in_the_second() -> None:
    model = net()
    train = functools.partial(
        mb.train_epoch, model, iter(micro_batches(inputs(7), labels(7), 5, 2)), SGD(model.parameters(), lr=0.1)
    )
    train(nn.CrossEntropyLoss())
    with pytest.raises(ValueError, match="gave no batch: an iterator that was used up"):
        train(nn.CrossEntropyLoss())


def test_a_criterion_or_a_number_of_steps_that_means_nothing_is_refused_before_any_data_is_drawn() -> None:
    drawn = []

    def loader() -> Iterator[Pair]:
        drawn.append(1)
        yield inputs(5), labels(5)

    model = net()
    optimizer = SGD(model.parameters(), lr=0.1)
    with pytest.raises(ValueError, match="a torch criterion with a reduction, got <lambda>"):
        mb.train_epoch(model, loader(), optimizer, lambda outputs, targets: outputs.mean())
    with pytest.raises(ValueError, match="accumulation_steps must be an integer of at least 1, got 0"):
        mb.train_epoch(model, loader(), optimizer, nn.CrossEntropyLoss(), 0)
    assert drawn == []


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"model": lambda x: x},
            r"model must be an nn.Module, got a function\. The order is train_epoch\(model, dataloader",
        ),
        (
            {"optimizer": nn.CrossEntropyLoss()},
            r"optimizer must be a torch optimizer, got a CrossEntropyLoss\. The order is",
        ),
        ({"dataloader": None}, r"dataloader must give .* got a NoneType, which cannot be\. The order is train_epoch\("),
        (
            {"dataloader": TensorDataset(inputs(4), labels(4))},
            r"got a TensorDataset, which gives samples: give DataLoader\(dataset, batch_size=...\)",
        ),
        (
            {"scheduler": StepLR},
            r"scheduler must have a step\(\) without a metric, .* got the class StepLR\. Give one such",
        ),
        ({"scheduler": "cosine"}, r"scheduler must have a step\(\) without a metric, .* got a str"),
        (
            {"scheduler": ReduceLROnPlateau},
            r"got a ReduceLROnPlateau\. .* step yours after the epoch: scheduler.step\(loss",
        ),
        ({"max_norm": 0}, "max_norm must be positive, or None for no clipping, got 0"),
    ],
)
def test_arguments_of_another_kind_are_refused_before_anything_is_trained(change: dict[str, Any], message: str) -> None:
    model = net()
    optimizer = SGD(model.parameters(), lr=0.1)
    if change.get("scheduler") is ReduceLROnPlateau:
        change = {"scheduler": ReduceLROnPlateau(optimizer)}
    drawn: list[int] = []

    def loader() -> Iterator[Pair]:
        drawn.append(1)
        yield inputs(5), labels(5)

    given = {
        "model": model,
        "dataloader": loader(),
        "optimizer": optimizer,
        "criterion": nn.CrossEntropyLoss(),
    } | change
    with pytest.raises(ValueError, match=message):
        mb.train_epoch(**given)
    assert drawn == []
    assert all(p.grad is None for p in model.parameters())


def test_several_optimizers_and_a_criterion_in_the_exact_form_are_taken() -> None:
    mine, theirs = net(), net()
    pairs = micro_batches(inputs(15), labels(15), 5, 5, 5)
    halves = [SGD([p], lr=0.5) for p in mine.parameters()]
    mb.train_epoch(mine, pairs, halves, mb.sum_loss(nn.CrossEntropyLoss()), 2)
    by_hand(theirs, pairs, SGD(theirs.parameters(), lr=0.5), nn.CrossEntropyLoss(), 2)
    assert apart(mine, theirs) < EXACT


@pytest.mark.parametrize("batch", [{"x": inputs(4), "y": labels(4)}, (inputs(4), labels(4), labels(4)), inputs(4)])
def test_batches_that_are_no_pairs_are_refused(batch: Any) -> None:
    model = net()
    with pytest.raises(ValueError, match=r"takes \(inputs, targets\) micro-batches, got a"):
        mb.train_epoch(model, [batch], SGD(model.parameters(), lr=0.1), nn.CrossEntropyLoss())


def test_inputs_and_targets_of_different_length_are_refused_by_shape() -> None:
    model = net()
    with pytest.raises(ValueError, match=r"batch\[0\] has shape \(4, 3\), batch\[1\] has shape \(5,\)"):
        mb.train_epoch(model, [(inputs(4), labels(5))], SGD(model.parameters(), lr=0.1), nn.CrossEntropyLoss())


def test_a_loader_that_fails_keeps_the_updates_before_and_leaves_no_gradient() -> None:
    pairs = micro_batches(inputs(15), labels(15), 5, 5, 5)

    def loader() -> Iterator[Pair]:
        yield from pairs
        raise OSError("disk gone")

    mine, theirs = net(), net()
    with pytest.raises(OSError, match="disk gone"):
        mb.train_epoch(mine, loader(), SGD(mine.parameters(), lr=0.5), nn.CrossEntropyLoss(), 2)
    by_hand(theirs, pairs[:2], SGD(theirs.parameters(), lr=0.5), nn.CrossEntropyLoss(), 2)
    assert apart(mine, theirs) < EXACT
    assert all(p.grad is None for p in mine.parameters())
