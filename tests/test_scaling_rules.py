"""Every optimizer and every scheduler of torch goes to another batch size as a whole, by rules that hold where said."""

import copy
import functools
import inspect
import itertools
import math
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim import SGD, Adam, AdamW, Optimizer
from torch.optim import lr_scheduler as schedulers
from torch.optim.swa_utils import SWALR

import macrobatch as mb
from macrobatch.rule_table import RULES
from macrobatch.scaling_families import FAMILIES

EVERY_OPTIMIZER = sorted(
    name
    for name, cls in inspect.getmembers(torch.optim, inspect.isclass)
    if issubclass(cls, Optimizer) and cls is not Optimizer
)
SCALABLE = [name for name in EVERY_OPTIMIZER if name != "LBFGS"]
LR_FACTOR = {"linear": 4.0, "sqrt": 2.0, "adam-sde": 2.0, "half-life": 1.0, "sqrt-half-life": 2.0, "none": 1.0}
PICKED = {
    **dict.fromkeys(("SGD", "ASGD"), "linear"),
    **dict.fromkeys(("Adam", "AdamW", "NAdam", "RAdam", "SparseAdam", "RMSprop"), "sqrt-half-life"),
    **dict.fromkeys(("Adamax", "Adadelta", "Adafactor", "Muon"), "sqrt"),
    "Adagrad": "half-life",
    "Rprop": "none",
}


def groups(cls: type[Optimizer], *, tensor_lr: bool = False) -> Optimizer:
    """Two groups with rates of their own, the second as large as three of the first."""
    rates = [torch.tensor(0.01), torch.tensor(0.03)] if tensor_lr else [0.01, 0.03]
    parameters = [nn.Parameter(torch.ones(2, 2)) for _ in rates]
    return cls([{"params": [p], "lr": lr} for p, lr in zip(parameters, rates, strict=True)])  # type: ignore[call-arg]


def with_momentum() -> Optimizer:
    return SGD(groups(SGD).param_groups, momentum=0.9)


def rates(optimizer: Optimizer) -> list[float]:
    return [float(group["lr"]) for group in optimizer.param_groups]


def knobs(optimizer: Optimizer) -> list[dict[str, Any]]:
    return copy.deepcopy([{k: v for k, v in group.items() if k != "params"} for group in optimizer.param_groups])


def move(optimizer: Optimizer, scheduler: schedulers.LRScheduler, step: int) -> None:
    """An update without gradients, so that the scheduler may step after it."""
    optimizer.step()
    if isinstance(scheduler, schedulers.ReduceLROnPlateau):
        scheduler.step(1.0 + step)  # ever worse
    else:
        scheduler.step()


# ---------------------------------------------------------------------------------------------------------------------
# every optimizer


def test_every_optimizer_of_torch_is_spoken_of() -> None:
    assert set(SCALABLE) == set(PICKED)


@pytest.mark.parametrize("tensor_lr", [False, True])
@pytest.mark.parametrize("name", SCALABLE)
def test_every_optimizer_is_scaled_in_every_group_together_with_the_scheduler_attached_before(
    name: str, tensor_lr: bool
) -> None:
    cls = getattr(torch.optim, name)
    if tensor_lr and name == "Muon":
        with pytest.raises(ValueError, match="Tensor lr"):
            cls([nn.Parameter(torch.ones(2, 2))], lr=torch.ones(2))
        tensor_lr = False
    scaled, twin = groups(cls, tensor_lr=tensor_lr), groups(cls)
    on_scaled, on_twin = (schedulers.LambdaLR(each, lambda step: 0.8**step) for each in (scaled, twin))
    held = [group["lr"] for group in scaled.param_groups]
    scaling = mb.scale_hyperparameters(scaled, on_scaled, from_batch_size=64, to_batch_size=256)
    assert (scaling.rule, scaling.lr_factor) == (PICKED[name], LR_FACTOR[PICKED[name]])
    assert not scaling.caveats
    for step in range(4):
        assert rates(scaled) == pytest.approx([lr * scaling.lr_factor for lr in rates(twin)], rel=1e-6)
        assert rates(scaled) == pytest.approx([float(lr) for lr in on_scaled.get_last_lr()], rel=1e-6)
        move(scaled, on_scaled, step)
        move(twin, on_twin, step)
    if tensor_lr:
        assert all(group["lr"] is lr for group, lr in zip(scaled.param_groups, held, strict=True)), "changed in place"


def test_control_without_the_scheduler_the_old_rate_comes_back() -> None:
    optimizer = groups(SGD)
    scheduler = schedulers.LambdaLR(optimizer, lambda step: 0.8**step)
    for group in optimizer.param_groups:
        group["lr"] *= 4
    move(optimizer, scheduler, 0)
    assert rates(optimizer) == pytest.approx([0.008, 0.024])


def test_one_tensor_that_is_the_rate_of_all_groups_is_scaled_once() -> None:
    lr = torch.tensor(0.1, requires_grad=True)
    optimizer = SGD([{"params": [nn.Parameter(torch.ones(1))]} for _ in range(3)], lr=lr)
    mb.scale_hyperparameters(optimizer, from_batch_size=1, to_batch_size=4)
    assert float(lr.detach()) == pytest.approx(0.4)
    assert all(group["lr"] is lr for group in optimizer.param_groups)


def test_betas_that_are_tensors_are_changed_in_place() -> None:
    beta2 = torch.tensor(0.99)
    betas = (torch.tensor(0.9), beta2)
    optimizer = Adam([nn.Parameter(torch.ones(1))], lr=torch.tensor(0.1), betas=betas, capturable=True)
    mb.scale_hyperparameters(optimizer, from_batch_size=1, to_batch_size=4)
    assert optimizer.param_groups[0]["betas"][1] is beta2
    assert float(beta2) == pytest.approx(0.99**4)


def test_a_subclass_behaves_as_its_parent_and_others_are_known_by_their_names() -> None:
    class Mine(AdamW):
        pass

    class Lion(SGD):
        pass

    for cls, family in ((Mine, "adamw"), (Lion, "lion")):
        optimizer = groups(cls)
        assert mb.scale_hyperparameters(optimizer, from_batch_size=1, to_batch_size=4).family == family


# ---------------------------------------------------------------------------------------------------------------------
# every scheduler

Make = Callable[[Optimizer], schedulers.LRScheduler]
EVERY_SCHEDULER: dict[str, Make] = {
    "LambdaLR": lambda o: schedulers.LambdaLR(o, [lambda t: 0.9**t, lambda t: 1 / (1 + t)]),
    "MultiplicativeLR": lambda o: schedulers.MultiplicativeLR(o, lambda t: 0.9),
    "StepLR": lambda o: schedulers.StepLR(o, 2, 0.5),
    "MultiStepLR": lambda o: schedulers.MultiStepLR(o, [1, 4], 0.5),
    "ConstantLR": lambda o: schedulers.ConstantLR(o, 0.5, 6),
    "LinearLR": lambda o: schedulers.LinearLR(o, 0.25, total_iters=4),
    "ExponentialLR": lambda o: schedulers.ExponentialLR(o, 0.9),
    "PolynomialLR": lambda o: schedulers.PolynomialLR(o, 10, 2.0),
    "CosineAnnealingLR": lambda o: schedulers.CosineAnnealingLR(o, 5, eta_min=0.002),
    "CosineAnnealingWarmRestarts": lambda o: schedulers.CosineAnnealingWarmRestarts(o, 3, eta_min=0.002),
    "CyclicLR": lambda o: schedulers.CyclicLR(o, 0.01, [0.05, 0.1], step_size_up=3),
    "OneCycleLR": lambda o: schedulers.OneCycleLR(o, [0.05, 0.1], total_steps=14),
    "ReduceLROnPlateau": lambda o: schedulers.ReduceLROnPlateau(o, factor=0.3, patience=0, min_lr=[0.002, 0.001]),
    "SequentialLR": lambda o: schedulers.SequentialLR(
        o, [schedulers.ConstantLR(o, 0.5, 9), schedulers.CosineAnnealingLR(o, 5, eta_min=0.001)], [3]
    ),
    "ChainedScheduler": lambda o: schedulers.ChainedScheduler(
        [schedulers.ExponentialLR(o, 0.9), schedulers.CosineAnnealingLR(o, 9)], o
    ),
    "SWALR": lambda o: SWALR(o, swa_lr=[0.002, 0.004], anneal_epochs=4),
}


def test_every_scheduler_of_torch_is_tested() -> None:
    assert {*schedulers.__all__, "SWALR"} - {"LRScheduler"} == set(EVERY_SCHEDULER)


@pytest.mark.parametrize("scaled_after", [0, 4])
@pytest.mark.parametrize("name", EVERY_SCHEDULER)
def test_base_rates_and_every_scheduler_agree_before_and_in_the_middle_of_a_run(name: str, scaled_after: int) -> None:
    optimizers = [with_momentum(), with_momentum()]
    scaled, twin = optimizers
    on_scaled, on_twin = (EVERY_SCHEDULER[name](each) for each in optimizers)
    factor, seen = 1.0, set()
    for step in range(12):
        if step == scaled_after:
            factor = mb.scale_hyperparameters(scaled, on_scaled, from_batch_size=2, to_batch_size=16).lr_factor
        assert rates(scaled) == pytest.approx([lr * factor for lr in rates(twin)], rel=1e-12)
        assert [float(lr) for lr in on_scaled.get_last_lr()] == pytest.approx(rates(scaled), rel=1e-12)
        seen.add(round(rates(twin)[1], 9))
        move(scaled, on_scaled, step)
        move(twin, on_twin, step)
    assert factor == 8
    assert len(seen) > 1, "a rate that never changes shows nothing"


@pytest.mark.parametrize("make", [EVERY_SCHEDULER["OneCycleLR"], EVERY_SCHEDULER["CyclicLR"]])
def test_a_scheduler_that_moves_beta1_moves_it_between_scaled_bounds(make: Make) -> None:
    optimizers = [groups(Adam), groups(Adam)]
    scaled, twin = optimizers
    on_scaled, on_twin = (make(each) for each in optimizers)
    mb.scale_hyperparameters(scaled, on_scaled, from_batch_size=2, to_batch_size=4, rule="adam-sde")
    seen = set()
    for step in range(12):
        for mine, its in zip(scaled.param_groups, twin.param_groups, strict=True):
            assert [1 - beta for beta in mine["betas"]] == pytest.approx([2 * (1 - beta) for beta in its["betas"]])
        seen.add(round(twin.param_groups[0]["betas"][0], 6))
        move(scaled, on_scaled, step)
        move(twin, on_twin, step)
    assert len(seen) > 3


@pytest.mark.parametrize("name", EVERY_SCHEDULER)
def test_a_scheduler_that_is_attached_and_not_given_is_an_error_and_one_that_was_dropped_is_not(name: str) -> None:
    optimizer = SGD([nn.Parameter(torch.ones(1)), nn.Parameter(torch.ones(1))], lr=0.1, momentum=0.9)
    optimizer.add_param_group({"params": [nn.Parameter(torch.ones(1))]})
    scheduler = EVERY_SCHEDULER[name](optimizer)
    with pytest.raises(ValueError, match=f"this SGD has a .*{name} attached that was not given"):
        mb.scale_hyperparameters(optimizer, from_batch_size=1, to_batch_size=2)
    assert rates(optimizer) == [float(lr) for lr in scheduler.get_last_lr()], "nothing was changed"
    mb.scale_hyperparameters(optimizer, [scheduler], from_batch_size=1, to_batch_size=2)
    del scheduler
    mb.scale_hyperparameters(optimizer, from_batch_size=1, to_batch_size=2)


def test_all_of_several_schedulers_must_be_given_and_belong_to_this_optimizer() -> None:
    optimizer, other = groups(SGD), groups(SGD)
    first, second = schedulers.ExponentialLR(optimizer, 0.9), schedulers.StepLR(optimizer, 3)
    with pytest.raises(ValueError, match=r"a StepLR attached that was not given.*scheduler=, several as a list"):
        mb.scale_hyperparameters(optimizer, first, from_batch_size=1, to_batch_size=2)
    with pytest.raises(ValueError, match="the ExponentialLR given belongs to another optimizer"):
        mb.scale_hyperparameters(other, first, from_batch_size=1, to_batch_size=2)
    with pytest.raises(ValueError, match="must be a torch LRScheduler, or several, got a str"):
        mb.scale_hyperparameters(other, "cosine", from_batch_size=1, to_batch_size=2)  # type: ignore[arg-type]
    mb.scale_hyperparameters(optimizer, [first, second], from_batch_size=1, to_batch_size=2)
    assert rates(optimizer) == pytest.approx([0.02, 0.06])


# ---------------------------------------------------------------------------------------------------------------------
# numbers worked by hand


def adam(**options: Any) -> Adam:
    return Adam([nn.Parameter(torch.ones(1))], **options)


@pytest.mark.parametrize(
    ("rule", "before", "after", "betas", "expected"),
    [
        ("half-life", 512, 1, (0.9, 0.95), (0.9, 0.99990)),  # Marek et al. 2025
        ("half-life", 16, 1, (0.9, 0.95), (0.9, 0.99680)),
        ("adam-sde", 1, 8, (0.9, 0.999), (0.2, 0.992)),  # Malladi et al. 2022
        ("sqrt-half-life", 1, 8, (0.9, 0.999), (0.9, 0.99203)),
        ("adam-sde", 8, 1, (0.2, 0.992), (0.9, 0.999)),
        ("half-life", 1, 512, (0.5, 0.999), (0.5, 0.59914)),
        ("sqrt", 1, 16, (0.9, 0.999), (0.9, 0.999)),
    ],
)
def test_betas_worked_by_hand(
    rule: Any, before: int, after: int, betas: tuple[float, float], expected: tuple[float, float]
) -> None:
    optimizer = adam(betas=betas, lr=1e-3, eps=1e-8)
    scaling = mb.scale_hyperparameters(optimizer, from_batch_size=before, to_batch_size=after, rule=rule)
    (group,) = optimizer.param_groups
    assert group["betas"] == pytest.approx(expected, abs=6e-6)
    lr_power, eps_power = RULES[rule].lr_power, RULES[rule].eps_power
    assert group["lr"] == pytest.approx(1e-3 * (after / before) ** lr_power)
    assert group["eps"] == pytest.approx(1e-8 * (after / before) ** eps_power)
    assert scaling.rule == rule


def test_the_root_rule_of_the_differential_equation_has_an_end_which_is_an_error_and_never_a_clamp() -> None:
    optimizer = AdamW([nn.Parameter(torch.ones(1))], betas=(0.0, 0.998))
    mb.scale_hyperparameters(optimizer, from_batch_size=10, to_batch_size=1, rule="adam-sde")
    assert optimizer.param_groups[0]["betas"] == pytest.approx((0.9, 0.9998))
    before = knobs(optimizer)
    with pytest.raises(
        ValueError, match=r"1 - beta1 to k\(1 - beta1\) = 10 x 0.1, which must stay below 1: at most 10"
    ):
        mb.scale_hyperparameters(optimizer, from_batch_size=1, to_batch_size=10, rule="adam-sde")
    assert knobs(optimizer) == before


def test_what_cannot_be_done_in_one_group_is_done_in_none_nor_in_the_scheduler() -> None:
    parameters = [nn.Parameter(torch.ones(1)) for _ in range(2)]
    optimizer = AdamW(
        [{"params": [parameters[0]], "betas": (0.99, 0.999)}, {"params": [parameters[1]], "betas": (0.5, 0.999)}]
    )
    scheduler = schedulers.CosineAnnealingLR(optimizer, 10)
    before = knobs(optimizer), scheduler.state_dict()
    with pytest.raises(ValueError, match=r"k\(1 - beta1\) = 4 x 0.5"):
        mb.scale_hyperparameters(optimizer, scheduler, from_batch_size=1, to_batch_size=4, rule="adam-sde")
    assert (knobs(optimizer), scheduler.state_dict()) == before
    with pytest.raises(mb.ScalingWarning, match="has no source for the adamw family"):  # pytest makes it an error
        mb.scale_hyperparameters(optimizer, scheduler, from_batch_size=1, to_batch_size=4, rule="linear")
    assert (knobs(optimizer), scheduler.state_dict()) == before, "a warning turned into an error changes nothing either"


SHRINK = (1 - 1e-4) ** 100_000  # of weights over 1e5 samples, by lr 1e-2 and weight_decay 1e-2: 4.5e-5


@pytest.mark.parametrize(
    ("rule", "k", "factor"), [("sqrt", 4, 2.0), ("sqrt", 16, 4.0), ("linear", 16, 1.0), ("half-life", 16, 16.0)]
)
def test_decoupled_weight_decay_keeps_its_time_scale_in_samples(rule: Any, k: int, factor: float) -> None:
    optimizer = AdamW([nn.Parameter(torch.ones(1))], lr=1e-2, weight_decay=1e-2)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the linear rule is none for AdamW
        mb.scale_hyperparameters(optimizer, from_batch_size=1, to_batch_size=k, rule=rule)
    (group,) = optimizer.param_groups
    assert group["weight_decay"] == pytest.approx(1e-2 * factor)
    kept = (1 - group["lr"] * group["weight_decay"]) ** (100_000 / k)
    assert pytest.approx(4.5e-5, rel=0.02) == SHRINK
    assert kept == pytest.approx(SHRINK, rel=0.02)


@pytest.mark.parametrize(("k", "kept"), [(4, 6.7e-3), (16, 8.2e-2)])
def test_control_weight_decay_left_as_it_is_under_the_root_rule_forgets_too_slowly(k: int, kept: float) -> None:
    assert (1 - 1e-2 * math.sqrt(k) * 1e-2) ** (100_000 / k) == pytest.approx(kept, rel=0.02)


DECOUPLED: dict[str, dict[str, Any]] = {
    "AdamW": {},
    "Adam": {"decoupled_weight_decay": True},
    "NAdam": {"decoupled_weight_decay": True},
    "RAdam": {"decoupled_weight_decay": True},
    "Muon": {},
    "Adafactor": {},
}


@pytest.mark.parametrize("name", DECOUPLED)
def test_what_is_taken_for_decoupled_weight_decay_multiplies_the_weights(name: str) -> None:
    weights = nn.Parameter(torch.ones(2, 2, dtype=torch.float64))
    optimizer = getattr(torch.optim, name)([weights], lr=0.1, weight_decay=0.2, **DECOUPLED[name])
    weights.grad = torch.zeros_like(weights)
    optimizer.step()
    assert weights.detach() == pytest.approx(torch.full((2, 2), 0.98, dtype=torch.float64), rel=1e-9)
    mb.scale_hyperparameters(optimizer, from_batch_size=1, to_batch_size=4)
    assert optimizer.param_groups[0]["weight_decay"] == pytest.approx(0.4)


@pytest.mark.parametrize("name", ["SGD", "Adam", "RMSprop", "Adagrad", "Adadelta", "Adamax", "ASGD"])
def test_coupled_weight_decay_belongs_to_the_loss_and_stays(name: str) -> None:
    optimizer = getattr(torch.optim, name)([nn.Parameter(torch.ones(1))], lr=0.1, weight_decay=0.2)
    mb.scale_hyperparameters(optimizer, from_batch_size=1, to_batch_size=4)
    assert optimizer.param_groups[0]["weight_decay"] == 0.2


def test_weight_decay_that_would_turn_weights_around_is_an_error() -> None:
    optimizer = AdamW([nn.Parameter(torch.ones(1))], lr=0.1, weight_decay=0.1)
    with pytest.raises(ValueError, match=r"lr 1 x weight_decay 1 in group 0 would be at least 1.*less weight_decay"):
        mb.scale_hyperparameters(optimizer, from_batch_size=1, to_batch_size=100, rule="sqrt")
    assert rates(optimizer) == [0.1]


def test_what_counts_updates_counts_the_same_samples_before_the_first_update_and_is_left_alone_later() -> None:
    for is_fresh in (True, False):
        optimizer = torch.optim.NAdam([nn.Parameter(torch.ones(1))], momentum_decay=0.004)
        if not is_fresh:
            optimizer.param_groups[0]["params"][0].grad = torch.ones(1)
            optimizer.step()
        mb.scale_hyperparameters(optimizer, from_batch_size=1, to_batch_size=4)
        assert optimizer.param_groups[0]["momentum_decay"] == pytest.approx(0.016 if is_fresh else 0.004)


def test_adagrad_with_a_decaying_rate_has_the_same_rate_after_the_same_samples() -> None:
    optimizer = torch.optim.Adagrad([nn.Parameter(torch.ones(1))], lr=0.1, lr_decay=1e-3)
    mb.scale_hyperparameters(optimizer, from_batch_size=1, to_batch_size=8)
    (group,) = optimizer.param_groups
    assert group["lr"] / (1 + 1000 * group["lr_decay"]) == pytest.approx(0.1 / (1 + 8000 * 1e-3))


# ---------------------------------------------------------------------------------------------------------------------
# the noisy quadratic: loss = sum h theta**2 / 2, gradient h theta + noise of variance c / B in each coordinate

CURVATURE = torch.logspace(-2, 0, 20, dtype=torch.float64)  # h, at most 1
NOISE = CURVATURE  # c: more noise where the curvature is larger


@functools.cache
def expected_loss(lr: float, batch_size: int, samples: int) -> float:
    """The expected loss after `samples`, by the exact recursion of E[theta**2]: no random numbers."""
    square = torch.ones_like(CURVATURE)
    for _ in range(samples // batch_size):
        square = (1 - lr * CURVATURE) ** 2 * square + lr**2 * NOISE / batch_size
    return float((CURVATURE * square).sum() / 2)


def loss_ratio(k: int, rule: Any = "linear", samples: int = 16_000) -> float:
    optimizer = SGD([nn.Parameter(torch.ones(1))], lr=0.01)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", mb.ScalingWarning)
        mb.scale_hyperparameters(optimizer, from_batch_size=1, to_batch_size=k, rule=rule)
    return expected_loss(rates(optimizer)[0], k, samples) / expected_loss(0.01, 1, samples)


def test_the_linear_rule_keeps_the_loss_of_the_noisy_quadratic_at_equal_samples_until_k_lr_h_is_2() -> None:
    ratios = {k: loss_ratio(k) for k in (4, 16, 64, 128, 180, 199)}
    assert ratios[4] == pytest.approx(1.0, abs=0.01)
    assert ratios[16] == pytest.approx(1.0, abs=0.05)
    assert list(ratios.values()) == sorted(ratios.values())
    assert ratios[128] < 2 < ratios[199] < 100
    assert loss_ratio(201) > 1.5 * ratios[199], "k lr h = 2.01"
    assert loss_ratio(201, samples=64_000) > 100 * loss_ratio(201), "and ever larger"
    assert loss_ratio(199, samples=64_000) < 1.1 * loss_ratio(199)
    stationary = 1.28 * NOISE / (2 * 128 * (2 - 1.28 * CURVATURE))  # the recursion at rest, a = 1.28, B = 128
    assert expected_loss(1.28, 128, 128_000) == pytest.approx(float(stationary.sum()), rel=1e-3)


def test_control_other_rules_do_not_keep_the_loss_of_sgd() -> None:
    # In 2000 samples the loss is still falling, and smaller steps for their number leave it higher.
    assert loss_ratio(16, "linear", 2000) == pytest.approx(1.0, abs=0.05)
    assert loss_ratio(16, "sqrt", 2000) > 1.5
    assert loss_ratio(16, "none", 2000) > 3


class Lion(Optimizer):
    """Chen et al. 2023, without weight decay: the sign of an interpolated momentum."""

    def __init__(self, parameters: Any, lr: float, betas: tuple[float, float] = (0.9, 0.99)) -> None:
        super().__init__(parameters, {"lr": lr, "betas": betas})

    @torch.no_grad()
    def step(self) -> None:  # type: ignore[override]
        for group in self.param_groups:
            for p in group["params"]:
                m = self.state[p].setdefault("m", torch.zeros_like(p))
                p.sub_(torch.lerp(p.grad, m, group["betas"][0]).sign_(), alpha=group["lr"])
                m.lerp_(p.grad, 1 - group["betas"][1])


# How to make it, and the noise of one sample's gradient, large beside the gradient of at most 6.
ON_NOISE: dict[str, tuple[Callable[[list[nn.Parameter]], Optimizer], float]] = {
    "SGD": (lambda p: SGD(p, 6e-4, momentum=0.0), 30.0),
    "momentum": (lambda p: SGD(p, 6e-5, momentum=0.9), 30.0),
    "ASGD": (lambda p: torch.optim.ASGD(p, 6e-4), 30.0),
    "Adam": (lambda p: Adam(p, 6e-3), 30.0),
    "NAdam": (lambda p: torch.optim.NAdam(p, 6e-3), 30.0),
    "RAdam": (lambda p: torch.optim.RAdam(p, 6e-3), 30.0),
    "RMSprop": (lambda p: torch.optim.RMSprop(p, 6e-3), 30.0),
    "Adamax": (lambda p: torch.optim.Adamax(p, 1e-2), 30.0),
    "Adagrad": (lambda p: torch.optim.Adagrad(p, 0.2), 30.0),
    "Adadelta": (lambda p: torch.optim.Adadelta(p, 1.0, rho=0.98, eps=1e-5), 30.0),
    "Lion": (lambda p: Lion(p, 6e-3), 300.0),
}


@functools.cache
def losses_on_noise(name: str, batch_size: int, rule: Any, samples: int = 2048) -> Tensor:
    """The mean loss of 1000 copies of the noisy quadratic halfway and at the end, all with the same seed: (2,)."""
    make, noise = ON_NOISE[name]
    generator = torch.Generator().manual_seed(0)
    curvature = torch.tensor([0.5, 1.0, 2.0], dtype=torch.float64)
    theta = nn.Parameter(torch.full((1000, 3), 3.0, dtype=torch.float64))
    optimizer, losses = make([theta]), []
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", mb.ScalingWarning)
        mb.scale_hyperparameters(optimizer, from_batch_size=1, to_batch_size=batch_size, rule=rule)
    for update in range(1, samples // batch_size + 1):
        drawn = torch.randn(theta.shape, generator=generator, dtype=torch.float64)
        theta.grad = curvature * theta.detach() + noise / math.sqrt(batch_size) * drawn
        optimizer.step()
        if update * batch_size in (samples // 2, samples):
            losses.append((curvature * theta.detach() ** 2).sum(1).mean() / 2)
    return torch.stack(losses)


def distance(name: str, rule: Any, base: Tensor, k: int = 8) -> float:
    """How far the losses at k times the batch are from those at 1, as a factor, the worse of halfway and the end."""
    return float((losses_on_noise(name, k, rule) / base).log().abs().max().exp())


@pytest.mark.parametrize("name", ON_NOISE)
def test_the_rule_picked_keeps_the_course_of_training_where_gradients_are_mostly_noise(name: str) -> None:
    base = losses_on_noise(name, 1, "none")
    assert distance(name, "auto", base) < 1.15
    others = ["sqrt", "none"] if name in ("SGD", "momentum", "ASGD") else ["linear", "none"]
    if name == "Adagrad":
        others = ["linear", "sqrt"]  # where to leave the rate is what is right
    assert max(distance(name, rule, base) for rule in others) > 1.3
    assert min(distance(name, rule, base) for rule in others) > 1.1


def test_adam_by_the_root_and_by_the_differential_equation_keeps_its_course() -> None:
    base = losses_on_noise("Adam", 1, "none")
    for k in (4, 8):
        assert distance("Adam", "sqrt", base, k) < 1.1
        assert distance("Adam", "adam-sde", base, k) < 1.1
        assert distance("Adam", "linear", base, k) > 1.5
        assert distance("Adam", "none", base, k) > 1.5


def test_limit_where_gradients_are_mostly_signal_the_root_rule_does_not_keep_the_course() -> None:
    make, _ = ON_NOISE["Adam"]
    ON_NOISE["signal"] = (make, 3.0)
    try:
        assert distance("signal", "auto", losses_on_noise("signal", 1, "none")) > 1.5
    finally:
        del ON_NOISE["signal"]


@pytest.mark.slow
@pytest.mark.parametrize(("name", "lr"), [("Muon", 3e-2), ("Adafactor", 3e-3)])
def test_optimizers_of_matrices_keep_their_course_too(name: str, lr: float) -> None:
    def final(k: int, rule: Any) -> float:
        generator = torch.Generator().manual_seed(0)
        curvature = torch.linspace(0.5, 2, 16, dtype=torch.float64)
        theta = nn.Parameter(3 * torch.randn(16, 16, generator=generator, dtype=torch.float64))
        optimizer = getattr(torch.optim, name)([theta], lr=lr, weight_decay=0.0)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", mb.ScalingWarning)
            mb.scale_hyperparameters(optimizer, from_batch_size=1, to_batch_size=k, rule=rule)
        for _ in range(4096 // k):
            drawn = torch.randn(16, 16, generator=generator, dtype=torch.float64)
            theta.grad = curvature * theta.detach() + (300.0 if name == "Muon" else 30.0) / math.sqrt(k) * drawn
            optimizer.step()
        return float((curvature * theta.detach() ** 2).sum())

    base = final(1, "none")
    assert final(8, "auto") == pytest.approx(base, rel=0.08)
    assert abs(final(8, "none") / base - 1) > 0.12
    assert abs(final(8, "linear") / base - 1) > 0.12


def test_where_squares_are_those_of_micro_batches_rate_and_betas_go_by_the_invariant_rule() -> None:
    options = {"lr": 1e-3, "betas": (0.9, 0.999), "eps": 1e-8, "weight_decay": 0.1, "reference_batch_size": 4}
    optimizer = mb.InvariantAdamW([nn.Parameter(torch.ones(1))], **options)  # type: ignore[arg-type]
    scaling = mb.scale_hyperparameters(optimizer, from_batch_size=1, to_batch_size=8)
    (group,) = optimizer.param_groups
    assert (scaling.rule, scaling.family) == ("invariant", "invariant")
    assert (group["lr"], group["eps"], group["weight_decay"]) == (8e-3, 1e-8, 0.1)
    assert group["betas"] == pytest.approx((0.9**8, 0.999**8))


# ---------------------------------------------------------------------------------------------------------------------
# how large a step of Adam can be


def largest_step(beta1: float, beta2: float) -> float:
    """|m| / sqrt(v) for the worst gradients by Cauchy, g_i proportional to (beta1 / beta2)**i, 200 updates back."""
    i = torch.arange(200, dtype=torch.float64)
    g = (beta1 / beta2) ** i
    m, v = ((1 - beta) * (beta**i * power).sum() for beta, power in ((beta1, g), (beta2, g**2)))
    return float(m / v.sqrt())


def test_adam_steps_are_bounded_while_beta1_squared_is_below_beta2_and_auto_stays_there() -> None:
    bound = (1 - 0.9) / math.sqrt((1 - 0.95) * (1 - 0.9**2 / 0.95))
    assert largest_step(0.9, 0.95) == pytest.approx(bound, rel=1e-3)
    assert largest_step(0.9, 0.95**16) > 1000, "unbounded"
    optimizer = adam(betas=(0.9, 0.95))
    with pytest.warns(mb.ScalingWarning, match=r"beta2 falls to beta1\*\*2 or below in the groups \[0\]"):
        mb.scale_hyperparameters(optimizer, from_batch_size=32, to_batch_size=512, rule="half-life")
    optimizer = adam(betas=(0.9, 0.95))
    scaling = mb.scale_hyperparameters(optimizer, from_batch_size=32, to_batch_size=512)
    assert scaling.rule == "sqrt"
    assert "not sqrt-half-life, because beta2**16 would fall to beta1**2 or below" in str(scaling)
    assert optimizer.param_groups[0]["betas"] == (0.9, 0.95)
    usual = mb.scale_hyperparameters(optimizer, from_batch_size=32, to_batch_size=64)
    assert usual.rule == "sqrt-half-life"
    assert "would fall" not in str(usual)


# ---------------------------------------------------------------------------------------------------------------------
# where rules are valid


def scaled(optimizer: Optimizer, k: int, **options: Any) -> mb.Scaling:
    return mb.scale_hyperparameters(optimizer, from_batch_size=32, to_batch_size=32 * k, **options)


@pytest.mark.parametrize(
    ("cls", "k", "options", "message"),
    [
        (SGD, 33, {}, r"up to 32 times the batch, and this is 33 times.*give it as noise_scale="),
        (Adam, 33, {}, r"the sqrt-half-life rule holds while .* at 33 times the batch.*give it as noise_scale="),
        (torch.optim.Adamax, 64, {}, r"the sqrt rule holds while gradients are mostly noise, and at 64 times"),
        (SGD, 4, {"rule": "sqrt"}, r"'sqrt' has no source for the sgd family.*2.5 points of error worse.*'linear'"),
        (
            SGD,
            4,
            {"noise_scale": 100},
            r"128 is beyond the noise scale 100.*by 4, while 4 times .* worth only 2.316 upd",
        ),
        (Adam, 4, {"noise_scale": 100}, r"beyond the noise scale 100.*multiplies lr by 2"),
        (Adam, 4, {"rule": "linear"}, r"'linear' has no source for the adam family, where the update is the gradient"),
        (Adam, 4, {"rule": "invariant"}, r"'invariant' has no source for the adam family"),
        (torch.optim.Adagrad, 4, {"rule": "sqrt"}, r"no source for the adagrad family.*that fits is 'half-life'"),
        (
            torch.optim.Rprop,
            4,
            {"rule": "linear"},
            r"no source for the rprop family, where it finds its own step sizes",
        ),
    ],
)
def test_beyond_its_validity_a_rule_warns_and_does_as_told(
    cls: type[Optimizer], k: int, options: dict[str, Any], message: str
) -> None:
    optimizer = groups(cls)
    with pytest.warns(mb.ScalingWarning, match=message):
        scaling = scaled(optimizer, k, **options)
    assert len(scaling.caveats) == 1
    assert rates(optimizer) == pytest.approx([0.01 * scaling.lr_factor, 0.03 * scaling.lr_factor])
    assert f"caution: {scaling.caveats[0]}" in str(scaling)


def test_within_its_validity_a_rule_is_silent() -> None:
    for cls, options in (
        (SGD, {}),
        (Adam, {}),
        (SGD, {"noise_scale": 2000}),
        (Adam, {"noise_scale": 1e4}),
        (Adam, {"rule": "none"}),
    ):
        assert not scaled(groups(cls), 32, **options).caveats
    for cls in (SGD, Adam):
        assert not scaled(groups(cls), 100, noise_scale=1e5).caveats


@pytest.mark.parametrize(
    ("make", "options", "message"),
    [
        (
            lambda: groups(SGD),
            {"rule": "cubic"},
            r"unknown rule 'cubic': give one of auto, linear, sqrt, adam-sde, half",
        ),
        (
            lambda: groups(SGD),
            {"rule": "adam-sde"},
            r"an average of squared gradients, which the sgd family has not: give",
        ),
        (lambda: groups(SGD), {"rule": "half-life"}, r"rule='linear', or one of linear, sqrt, none"),
        (lambda: groups(SGD), {"from_batch_size": 0}, r"from_batch_size must be an integer of at least 1, got 0"),
        (lambda: groups(SGD), {"to_batch_size": -8}, r"to_batch_size must be an integer of at least 1, got -8"),
        (lambda: groups(SGD), {"to_batch_size": 8.5}, r"to_batch_size must be an integer of at least 1, got 8.5"),
        (lambda: groups(SGD), {"noise_scale": 0}, r"noise_scale must be positive, in samples.*got 0"),
        (lambda: groups(SGD), {"noise_scale": math.nan}, r"noise_scale must be positive, in samples.*got nan"),
        (lambda: groups(SGD), {"family": "sgdw"}, r"unknown family 'sgdw': give one of sgd, adam, adamw"),
        (
            lambda: torch.optim.LBFGS([nn.Parameter(torch.ones(1))]),
            {},
            r"LBFGS searches along a line of the full batch",
        ),
    ],
)
def test_bad_input_is_an_error_and_nothing_is_changed(
    make: Callable[[], Optimizer], options: dict[str, Any], message: str
) -> None:
    optimizer = make()
    before = knobs(optimizer)
    with pytest.raises(ValueError, match=message):
        mb.scale_hyperparameters(optimizer, **{"from_batch_size": 2, "to_batch_size": 8} | options)
    assert knobs(optimizer) == before


def test_an_unknown_optimizer_is_an_error_that_lists_the_families_and_may_be_told_its_own() -> None:
    class Shampoo(Optimizer):
        def __init__(self, parameters: Any, lr: float | None) -> None:
            super().__init__(parameters, {"lr": lr, "weight_decay": 0.1})

    optimizer = Shampoo([nn.Parameter(torch.ones(1))], lr=0.1)
    listed = ", ".join(family.name for family in FAMILIES)
    with pytest.raises(ValueError, match=rf"no rule is known for the optimizer Shampoo.*family=, one of {listed}"):
        scaled(optimizer, 4)
    assert scaled(optimizer, 4, family="muon").rule == "sqrt"
    assert (rates(optimizer), optimizer.param_groups[0]["weight_decay"]) == ([0.2], 0.2)
    with pytest.raises(ValueError, match="parameter group 0 of Shampoo has no lr to scale"):
        scaled(Shampoo([nn.Parameter(torch.ones(1))], lr=None), 4, family="muon")


# ---------------------------------------------------------------------------------------------------------------------
# what is returned


def test_every_change_is_told_with_its_reason_and_its_source() -> None:
    optimizer = groups(AdamW)
    scheduler = schedulers.CosineAnnealingLR(optimizer, 10, eta_min=1e-4)
    before = knobs(optimizer)
    scaling = scaled(optimizer, 4, scheduler=scheduler)
    told = {(change.group, change.name): (change.before, change.after) for change in scaling.changes}
    for number, (old, new) in enumerate(zip(before, knobs(optimizer), strict=True)):
        for name in ("lr", "initial_lr", "eps", "weight_decay"):
            assert told.pop((number, name)) == (old[name], new[name])
        assert told.pop((number, "beta2")) == (old["betas"][1], new["betas"][1])
        assert told.pop((number, "CosineAnnealingLR.base_lrs")) == (old["lr"], new["lr"])
    assert told == {(None, "CosineAnnealingLR.eta_min"): (1e-4, 2e-4)}
    assert all(change.why and change.source for change in scaling.changes)
    text = str(scaling)
    assert "batch size 32 -> 128, rule sqrt-half-life: the update is the gradient over its own size" in text
    assert "group 1: lr 0.03 -> 0.06" in text
    assert "all groups: CosineAnnealingLR.eta_min 0.0001 -> 0.0002" in text
    assert "Wang and Aitchison 2024" in text
    assert str(scaled(groups(SGD), 4, rule="none")).endswith("nothing changes")


def test_there_and_back_is_nothing() -> None:
    for name in SCALABLE:
        optimizer = groups(getattr(torch.optim, name))
        before = knobs(optimizer)
        scaled(optimizer, 4)
        mb.scale_hyperparameters(optimizer, from_batch_size=128, to_batch_size=32)
        for old, new in zip(before, knobs(optimizer), strict=True):
            numbers = {key: value for key, value in old.items() if isinstance(value, float)}
            assert {key: new[key] for key in numbers} == pytest.approx(numbers, rel=1e-12)


def test_there_and_back_is_nothing_by_a_named_rule_where_the_automatic_one_depends_on_the_way() -> None:
    def after(rule: Any, sizes: tuple[int, ...]) -> dict[str, Any]:
        optimizer = torch.optim.AdamW([torch.ones(2)], lr=1e-3, betas=(0.9, 0.95))
        for old, new in itertools.pairwise(sizes):
            mb.scale_hyperparameters(optimizer, from_batch_size=old, to_batch_size=new, rule=rule)
        return {key: optimizer.param_groups[0][key] for key in ("lr", "betas", "eps", "weight_decay")}

    start, there_and_back = after("sqrt", (32,)), (32, 256, 32)
    for key, value in after("sqrt", there_and_back).items():
        assert value == pytest.approx(start[key], rel=1e-12)
    assert after("auto", there_and_back)["betas"][1] == pytest.approx(0.95**0.125), "the control"


# ---------------------------------------------------------------------------------------------------------------------
# weight averages and clipping


def lag(decay: float, batch_size: int) -> float:
    """How many samples ago, on average, what an average of weights holds was current: by going through the past."""
    ages = torch.arange(100_000, dtype=torch.float64)
    return float(((1 - decay) * decay**ages * ages).sum()) * batch_size


def test_an_average_of_weights_lags_as_many_samples_behind() -> None:
    assert lag(0.99, 1) == pytest.approx(99.0)
    decay = mb.scale_ema(0.99, from_batch_size=1, to_batch_size=8)
    assert decay == pytest.approx(0.99**8)
    assert lag(decay, 8) == pytest.approx(95.5, abs=0.1)
    assert lag(0.99, 8) == pytest.approx(792), "the control: left as it is"
    assert mb.scale_ema(decay, from_batch_size=8, to_batch_size=1) == pytest.approx(0.99)
    assert [mb.scale_ema(end, from_batch_size=1, to_batch_size=8) for end in (0.0, 1.0)] == [0.0, 1.0]


def share_clipped(max_norm: float, batch_size: int, spread: float) -> float:
    """Share of 20000 gradients above max_norm: |G| = 1, S = spread**2, in 4 dimensions."""
    generator = torch.Generator().manual_seed(1)
    noise = torch.randn(20_000, 4, generator=generator, dtype=torch.float64) * spread / 2 / math.sqrt(batch_size)
    return float(((noise + 0.5).norm(dim=1) > max_norm).double().mean())


@pytest.mark.parametrize(("spread", "tolerance"), [(100.0, 0.01), (10.0, 0.03)])
def test_the_clipping_threshold_clips_as_often_and_left_as_it_is_hardly_ever(spread: float, tolerance: float) -> None:
    before = share_clipped(1.1 * spread / 4, 16, spread)
    scaled_norm = mb.scale_clip(1.1 * spread / 4, from_batch_size=16, to_batch_size=64, noise_scale=spread**2)
    assert 0.2 < before < 0.5
    assert share_clipped(scaled_norm, 64, spread) == pytest.approx(before, abs=tolerance)
    assert share_clipped(1.1 * spread / 4, 64, spread) < 0.02


def test_the_clipping_threshold_falls_with_the_root_of_k_for_noise_and_stays_for_signal() -> None:
    to_64 = {"from_batch_size": 16, "to_batch_size": 64}
    assert mb.scale_clip(1.0, noise_scale=math.inf, **to_64) == 0.5
    assert mb.scale_clip(1.0, noise_scale=1e12, **to_64) == pytest.approx(0.5)
    assert mb.scale_clip(1.0, noise_scale=0.0, **to_64) == 1.0
    assert mb.scale_clip(1.0, noise_scale=64.0, **to_64) == pytest.approx(math.sqrt(2 / 5))


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: mb.scale_ema(1.1, from_batch_size=1, to_batch_size=2), "decay must lie between 0 and 1, got 1.1"),
        (lambda: mb.scale_ema(0.9, from_batch_size=0, to_batch_size=2), "from_batch_size must be an integer"),
        (lambda: mb.scale_clip(0.0, from_batch_size=1, to_batch_size=2, noise_scale=1), "max_norm must be positive"),
        (lambda: mb.scale_clip(1.0, from_batch_size=1, to_batch_size=0, noise_scale=1), "to_batch_size must be an int"),
        (
            lambda: mb.scale_clip(1.0, from_batch_size=1, to_batch_size=2, noise_scale=-3),
            "noise is all, which is math.inf",
        ),
        (lambda: mb.scale_clip(1.0, from_batch_size=1, to_batch_size=2, noise_scale=math.nan), "at least 0, got nan"),
    ],
)
def test_averages_and_thresholds_refuse_what_means_nothing(call: Callable[[], float], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call()


# ---------------------------------------------------------------------------------------------------------------------
# warmup

WARM = 4  # updates
FOLLOWING = [
    name
    for name in EVERY_SCHEDULER
    if name not in ("MultiplicativeLR", "ReduceLROnPlateau", "ChainedScheduler", "SWALR")
]


def course(optimizer: Optimizer, scheduler: schedulers.LRScheduler, updates: int) -> Iterator[list[float]]:
    for step in range(updates):
        yield rates(optimizer)
        move(optimizer, scheduler, step)


@pytest.mark.parametrize("name", FOLLOWING)
def test_the_rate_rises_by_equal_amounts_from_the_old_one_and_then_follows_the_scheduler_from_its_start(
    name: str,
) -> None:
    optimizers = [with_momentum(), with_momentum()]
    warmed, alone = optimizers
    old = rates(alone)
    given = EVERY_SCHEDULER[name](warmed)
    scheduler = mb.warmup(warmed, given, factor=1 / 8, num_updates=WARM)
    assert type(scheduler).__module__ == schedulers.__name__, "torch's own"
    seen = list(course(warmed, scheduler, WARM + 10))
    follows = list(course(alone, EVERY_SCHEDULER[name](alone), 10))
    base = [group["initial_lr"] for group in warmed.param_groups]
    for update in range(WARM):
        assert seen[update] == pytest.approx([lr * (1 / 8 + 7 / 8 * update / WARM) for lr in base])
    for warm, plain in zip(seen[WARM:], follows, strict=True):
        assert warm == pytest.approx(plain)
    assert old == [0.01, 0.03]


def test_scaled_and_warmed_training_starts_at_the_rate_of_the_small_batch_and_ends_at_that_of_the_large_one() -> None:
    optimizer = groups(SGD)
    decay = schedulers.CosineAnnealingLR(optimizer, 10)
    scaling = scaled(optimizer, 8, scheduler=decay)
    scheduler = mb.warmup(optimizer, decay, factor=1 / scaling.lr_factor, num_samples=1000, batch_size=256)
    seen = list(course(optimizer, scheduler, 6))
    assert seen[0] == pytest.approx([0.01, 0.03])
    assert seen[1] == pytest.approx([0.01 + 0.07 / 4, 0.03 + 0.21 / 4]), "1000 samples are 4 updates"
    assert seen[4] == pytest.approx([0.08, 0.24])
    assert seen[5][0] < 0.08


def test_warmup_alone_ends_at_the_base_rate_and_stays() -> None:
    optimizer = groups(SGD)
    seen = list(course(optimizer, mb.warmup(optimizer, factor=0.5, num_updates=2), 5))
    assert [lr for lr, _ in seen] == pytest.approx([0.005, 0.0075, 0.01, 0.01, 0.01])


def test_warmup_and_scaling_commute() -> None:
    optimizers = [groups(SGD), groups(SGD)]
    warmed_first, scaled_first = optimizers
    first = mb.warmup(warmed_first, schedulers.ExponentialLR(warmed_first, 0.9), factor=0.25, num_updates=3)
    scaled(warmed_first, 4, scheduler=first)
    second = schedulers.ExponentialLR(scaled_first, 0.9)
    scaled(scaled_first, 4, scheduler=second)
    second = mb.warmup(scaled_first, second, factor=0.25, num_updates=3)
    for one, other in zip(course(warmed_first, first, 8), course(scaled_first, second, 8), strict=True):
        assert one == pytest.approx(other)


@pytest.mark.parametrize("stop", [2, 4, 6])
def test_a_warmup_resumes_where_it_was(stop: int) -> None:
    def made() -> tuple[Optimizer, schedulers.LRScheduler]:
        optimizer = groups(SGD)
        decay = schedulers.CosineAnnealingLR(optimizer, 10)
        return optimizer, mb.warmup(optimizer, decay, factor=0.25, num_updates=4)

    optimizer, scheduler = made()
    list(course(optimizer, scheduler, stop))
    resumed, on_resumed = made()
    on_resumed.load_state_dict(copy.deepcopy(scheduler.state_dict()))
    resumed.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    assert list(course(resumed, on_resumed, 6)) == list(course(optimizer, scheduler, 6))


def test_control_torch_alone_starts_a_product_from_the_middle_of_the_warmup() -> None:
    optimizer = groups(SGD)
    following = schedulers.MultiplicativeLR(optimizer, lambda t: 0.9)
    rising = schedulers.LinearLR(optimizer, 0.25, total_iters=WARM)
    seen = list(course(optimizer, schedulers.SequentialLR(optimizer, [rising, following], [WARM]), WARM + 1))
    assert seen[WARM][0] == pytest.approx(0.9 * 0.8125 * 0.01), "not 0.01"


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("ReduceLROnPlateau", "a ReduceLROnPlateau cannot follow a warmup: it steps on a metric"),
        ("ChainedScheduler", "a ChainedScheduler cannot follow a warmup: torch cannot start it at 0"),
        ("SWALR", "a SWALR cannot follow a warmup: it anneals from the rate that it finds"),
        ("MultiplicativeLR", "a MultiplicativeLR cannot follow a warmup: .* LambdaLR with the product"),
    ],
)
def test_schedulers_that_torch_cannot_start_after_another_are_refused(name: str, message: str) -> None:
    optimizer = groups(SGD)
    scheduler = EVERY_SCHEDULER[name](optimizer)
    with pytest.raises(ValueError, match=message):
        mb.warmup(optimizer, scheduler, factor=0.5, num_updates=3)
    nested = schedulers.StepLR(optimizer, 3)
    with pytest.raises(ValueError, match="attached that was not given"):
        mb.warmup(optimizer, nested, factor=0.5, num_updates=3)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"factor": 2.0, "num_updates": 3},
            r"factor must be above 0 and at most 1.*got 2.0: a rate that was scaled down",
        ),
        ({"factor": 0.0, "num_updates": 3}, r"factor must be above 0"),
        ({"factor": 0.5}, r"as num_updates, or as num_samples with batch_size, got num_updates=None"),
        ({"factor": 0.5, "num_samples": 9}, r"as num_updates, or as num_samples with batch_size"),
        ({"factor": 0.5, "num_updates": 9, "num_samples": 9, "batch_size": 3}, r"as num_updates, or as num_samples"),
        ({"factor": 0.5, "num_updates": 9, "batch_size": 3}, r"as num_updates, or as num_samples with batch_size"),
        ({"factor": 0.5, "num_updates": 0}, r"num_updates must be an integer of at least 1, got 0"),
        ({"factor": 0.5, "num_samples": 9, "batch_size": 0}, r"batch_size must be an integer of at least 1, got 0"),
    ],
)
def test_a_warmup_that_means_nothing_is_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        mb.warmup(groups(SGD), **options)


def test_a_warmup_in_the_middle_of_a_schedule_is_refused() -> None:
    optimizer = groups(SGD)
    scheduler = schedulers.StepLR(optimizer, 3)
    move(optimizer, scheduler, 0)
    with pytest.raises(ValueError, match="the StepLR has made 1 steps: make the warmup before the first update"):
        mb.warmup(optimizer, scheduler, factor=0.5, num_updates=3)
