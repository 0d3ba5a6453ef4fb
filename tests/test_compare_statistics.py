"""`macrobatch compare` validates weights, and not how often BatchNorm's running statistics were moved."""

import copy
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from own_tasks import Pair, line
from own_towers import towers
from test_compare import comparison, run, strict_json
from torch import Tensor, nn

from macrobatch.cli import words
from macrobatch.cli.comparison import Comparison
from macrobatch.cli.curvature import sharpness_of
from macrobatch.cli.formats import share_text
from macrobatch.cli.race import Racer
from macrobatch.cli.report import page, rows
from macrobatch.cli.running_statistics import running_layers, taken_anew
from macrobatch.cli.validation import validate
from macrobatch.cli.way import Way
from macrobatch.sharpness import sharpness
from macrobatch.tasks import Task

CPU = torch.device("cpu")


def normalised(*, dropout: float = 0.0) -> Task:
    """Least squares through a BatchNorm in float64, on inputs that are not centred."""
    torch.manual_seed(0)
    x = torch.randn(40, 3, dtype=torch.float64) * torch.tensor([1.0, 5.0, 0.2]) + 3
    pairs: Any = list(zip(x, x[:, :1].sin(), strict=True))
    model = nn.Sequential(nn.Linear(3, 8), nn.Dropout(dropout), nn.BatchNorm1d(8), nn.Tanh(), nn.Linear(8, 1)).double()
    return replace(line(), name="normalised", model=model, train=pairs, validation=pairs[30:], metrics={})


def pieces(task: Task, sizes: Sequence[int] = (7, 5, 8)) -> list[Pair]:
    found, start = [], 0
    for size in sizes:
        found.append(task.collate([task.train[index] for index in range(start, start + size)]))
        start += size
    return found


def by_hand(model: nn.Module, task: Task, micro_batches: Sequence[Pair], held_out: Pair) -> float:
    """The loss where the layer's statistics are the plain means of those of its inputs."""
    first, norm, last = model[0], model[2], model[4]  # type: ignore[index]
    hidden = [first(x) for x, _ in micro_batches]
    mean = torch.stack([h.mean(0) for h in hidden]).mean(0)
    var = torch.stack([h.var(0) for h in hidden]).mean(0)
    inputs, targets = held_out
    scaled = (first(inputs) - mean) / torch.sqrt(var + norm.eps) * norm.weight + norm.bias
    return float((last(scaled.tanh()) - targets).detach().pow(2).mean())


@pytest.mark.parametrize("dropout", [0.0, 0.5])
def test_a_racer_is_validated_with_the_means_of_the_statistics_of_the_micro_batches(dropout: float) -> None:
    task = normalised(dropout=dropout)
    micro_batches = pieces(task)
    racer = Racer(task, Way("native", "", 16, 16), 0.05, CPU, anew=micro_batches)
    racer.train_on([task.train[index] for index in range(16)])
    held_out: Pair = task.collate([task.train[index] for index in range(30, 40)])
    before = copy.deepcopy(racer.model)
    racer.validate_on([held_out], with_metrics=True)
    expected = by_hand(before, task, micro_batches, held_out)
    assert racer.course().final.loss == pytest.approx(expected, rel=1e-12)
    as_left = float((before.eval()(held_out[0]) - held_out[1]).detach().pow(2).mean())
    assert racer.course().loss_as_left == pytest.approx(as_left, rel=1e-12)
    assert abs(as_left - expected) > 1e-2  # the control: the two are not the same


def test_validating_changes_no_buffer_no_mode_no_parameter_and_no_random_number() -> None:
    task = normalised(dropout=0.5)
    racer = Racer(task, Way("small", "", 4, 4), 0.05, CPU, anew=pieces(task))
    racer.train_on([task.train[index] for index in range(16)])
    before, random = copy.deepcopy(racer.model.state_dict()), torch.get_rng_state()
    racer.validate_on(pieces(task), with_metrics=True)
    assert torch.equal(random, torch.get_rng_state())
    for name, value in racer.model.state_dict().items():
        assert torch.equal(value, before[name]), name
    assert all(module.training for module in racer.model.modules())
    assert [layer.momentum for layer in running_layers(racer.model)] == [0.1]
    # The control: within it they are others.
    with racer.statistics_anew():
        assert not torch.equal(racer.model.state_dict()["2.running_mean"], before["2.running_mean"])


def test_everything_is_put_back_where_a_forward_fails() -> None:
    task = normalised()
    before = copy.deepcopy(task.model.state_dict())
    broken = [*pieces(task), (torch.ones(4, 5, dtype=torch.float64), torch.ones(4, 1))]
    with pytest.raises(RuntimeError, match="shapes cannot be multiplied"), taken_anew(task.model, task, broken):
        pass
    assert all(torch.equal(value, before[name]) for name, value in task.model.state_dict().items())
    assert all(module.training for module in task.model.modules())
    assert [layer.momentum for layer in running_layers(task.model)] == [0.1]


def test_layers_that_training_does_not_move_are_left_alone_and_stay_as_they_are() -> None:
    task = normalised()
    task.model[2].eval()  # type: ignore[index]
    assert running_layers(task.model) == []
    racer = Racer(task, Way("small", "", 4, 4), 0.05, CPU, anew=pieces(task))
    racer.validate_on(pieces(task), with_metrics=True)
    assert racer.course().loss_as_left is None
    assert not racer.model[2].training  # type: ignore[index]
    validate(task.model, task, pieces(task))
    assert not task.model[2].training  # type: ignore[index]
    assert task.model.training


def test_sharpness_is_by_statistics_taken_anew_as_well() -> None:
    task = normalised()
    racer = Racer(task, Way("small", "", 4, 4), 0.05, CPU, anew=pieces(task))
    samples = [task.train[index] for index in range(20)]
    racer.train_on(samples)
    racer.validate_on(pieces(task), with_metrics=False)
    with racer.statistics_anew():
        found = sharpness_of(racer, samples)
    as_left = sharpness_of(racer, samples)
    assert found is not None
    assert as_left is not None
    with taken_anew(racer.model, task, pieces(task)):
        one_piece = sharpness(racer.model, task.loss_fn, task.collate(samples), tolerance=0.01, max_products=20)
    assert found.top == pytest.approx(one_piece.top, rel=0.05)
    assert abs(as_left.top / found.top - 1) > 0.1  # the control


def test_where_the_loss_compares_samples_the_statistics_are_those_of_encoding_each_micro_batch_once() -> None:
    task = towers(hidden=8, norm=True, dtype="float64")
    micro_batches = [task.collate([task.train[index] for index in indices]) for indices in (range(7), range(7, 12))]
    (layer, *_) = running_layers(task.model)
    seen: list[Tensor] = []
    layer.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0].detach().clone()))
    with taken_anew(task.model, task, micro_batches):
        assert [len(hidden) for hidden in seen] == [7, 5]
        torch.testing.assert_close(layer.running_mean, torch.stack([hidden.mean(0) for hidden in seen]).mean(0))
        torch.testing.assert_close(layer.running_var, torch.stack([hidden.var(0) for hidden in seen]).mean(0))
    assert layer.running_mean is not None
    assert not layer.running_mean.any()  # as it was made


def test_a_comparison_whose_loss_compares_samples_says_so_too(tmp_path: Path) -> None:
    options = ["--task", "own_towers:towers", "--task-option", "hidden=8", "--task-option", "norm=True"]
    said = run(*options, "--samples", "48", "--device", "cpu", "--output", tmp_path / "run")
    found = strict_json(tmp_path / "run" / "compare.json")
    assert found["statistics_samples"] == 48
    assert all(result["course"]["loss_as_left"] is not None for result in found["results"].values())
    assert "taken anew for each, over the same 48 training samples" in said


# ---- the whole, on digits


@pytest.fixture(scope="module")
def digits(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, dict[str, Any], str]:
    folder = tmp_path_factory.mktemp("statistics") / "run"
    options = ["--batch-size", "64", "--micro-batch-size", "8", "--samples", "512", "--device", "cpu", "--threads", "1"]
    said = run("--task", "digits", *options, "--output", folder)
    return said, strict_json(folder / "compare.json"), " ".join((folder / "report.html").read_text().split())


def test_accumulation_and_the_native_batch_learn_much_the_same_through_batchnorm(
    digits: tuple[str, dict[str, Any], str],
) -> None:
    said, found, text = digits
    accumulated, native = (found["results"][key]["course"] for key in ("accumulated", "native"))
    assert abs(accumulated["final"]["loss"] - native["final"]["loss"]) < 0.02
    # The control: by the statistics that training left, they seem to be far apart.
    assert abs(accumulated["loss_as_left"] - native["loss_as_left"]) > 0.5
    assert (accumulated["num_micro_batches"], native["num_micro_batches"]) == (64, 8)
    as_left = f"{accumulated['loss_as_left']:.4f} and {native['loss_as_left']:.4f}"
    assert (
        "by running statistics of BatchNorm that were taken anew for each, over the same 512 training samples" in said
    )
    assert f"By those that training left the losses are {as_left}" in said
    assert "64 times by accumulation and 8 times by the native batch" in said
    assert "did not equal the native large batch here: their gradients differ by up to" in said
    assert "and its loss is" not in said
    assert "ended near" not in said
    assert "<b>Running statistics</b>: for validation and sharpness those of BatchNorm are taken anew" in text
    assert "statistics as left" in said


def test_nothing_is_called_overfitting_and_no_batch_size_follows_from_the_noise_scale(
    digits: tuple[str, dict[str, Any], str],
) -> None:
    said, found, _ = digits
    curve = [loss for _, loss in found["results"]["scaled"]["course"]["validation_losses"]]
    assert max(curve) > 2 * curve[0] > curve[-1]  # it rose, and came down again
    assert f"its loss rose to {max(curve):.3f}" in said
    assert "overfitted" not in said
    assert "which is overfitting" not in said
    assert "is worth about" not in said
    assert "couples samples. By its formula it is" in said


# ---- the words


def normalised_comparison(accumulated: float | None, native: float | None) -> Comparison:
    base = comparison(noisy_layers=["BatchNorm1d"], gradient_difference=1.04, statistics_samples=512)
    left = {"accumulated": accumulated, "native": native, "small": accumulated}
    results = {
        key: replace(result, course=replace(result.course, loss_as_left=left[key], num_micro_batches=128))
        for key, result in base.results.items()
        if result.course is not None
    }
    return replace(base, results=results)


def test_a_difference_of_gradients_is_said_as_a_share_of_their_length() -> None:
    said = words.equality(normalised_comparison(0.3, 1.5))
    assert said is not None
    assert "their gradients differ by at most 104% of their length" in said.text
    assert [share_text(x) for x in (1.0, 0.0999, 1e-3, 9e-4, 3e-7)] == ["100%", "10.0%", "0.10%", "0.0009", "3e-07"]


def test_losses_by_the_statistics_that_training_left_are_said_only_where_there_are_some() -> None:
    with_statistics, without = normalised_comparison(0.3, 1.5), comparison()
    said = words.equality(with_statistics)
    assert said is not None
    assert "By those that training left the losses are 0.3000 and 1.5000" in said.text
    assert dict(rows(with_statistics))["statistics as left"] == ["0.3000", "0.3000", "1.500"]
    assert "Running statistics" in page(with_statistics, [])
    assert "statistics as left" not in dict(rows(without))
    assert "Running statistics" not in page(without, [])
    control = words.equality(without)
    assert control is not None
    assert "statistics" not in control.text


def test_a_task_without_a_description_is_called_one(tmp_path: Path) -> None:
    options = ["--task", "own_tasks:line", "--samples", "16", "--sharpness", "0", "--device", "cpu"]
    assert run(*options, "--output", tmp_path / "run").startswith("task line the same 16 samples")
