"""Layers that couple samples are found and told; converted layers do not couple; pooled statistics are the window's."""

import copy
import json
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import benchmark, difference, gradients, reference
from norm_models import CASES, Convolutional, Pair, Residual, Twice, batch_of, cut, flat, loss_sum
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

import macrobatch as mb
from macrobatch.batchnorm import (
    ChannelLayerNorm,
    ChannelRMSNorm,
    FrozenBatchNorm,
    convert,
    coupled_layers,
    momentum_for,
    pooled,
)

ROOT = Path(__file__).parents[1]
SIZES = [4, 3, 3]

# ---- found and told


def test_an_accumulator_over_coupled_layers_warns_once_with_their_names_and_the_choices() -> None:
    with pytest.warns(UserWarning, match=r"the model couples samples: '1' \(BatchNorm1d\) in train mode") as record:
        accumulator = mb.Accumulator(flat().double(), loss_sum, micro_batch_size=4)
    accumulator.run(batch_of(10, (7,)))  # where a second warning would be an error
    assert len(record) == 1
    assert record[0].filename == __file__  # it points at whoever built the accumulator
    text = str(record[0].message)
    for choice in ('batch_norm="exact"', 'batch_norm="pooled"', 'batch_norm="micro_batch"', "batchnorm.convert"):
        assert choice in text
    assert "and 1 more" in text


@pytest.mark.parametrize("choice", ["exact", "pooled", "micro_batch"])
def test_a_choice_silences_the_warning(choice: str) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        mb.Accumulator(flat(), loss_sum, batch_norm=choice)
        mb.Accumulator(flat().eval(), loss_sum)
        mb.Accumulator(convert(flat(), "group"), loss_sum)


@pytest.mark.parametrize(
    ("layer", "effect"),
    [
        (nn.BatchNorm1d(4), "in train mode normalises over the micro-batch"),
        (nn.SyncBatchNorm(4), "in train mode normalises over the micro-batch"),
        (nn.LazyBatchNorm2d(), "in train mode normalises over the micro-batch"),
        (nn.BatchNorm2d(4).eval(), None),
        (nn.BatchNorm2d(4, track_running_stats=False).eval(), "in eval mode, too"),
        (nn.InstanceNorm2d(4, track_running_stats=True), "tracks the statistics of each micro-batch"),
        (nn.InstanceNorm2d(4, track_running_stats=True).eval(), None),
        (nn.InstanceNorm2d(4), None),
        (nn.GroupNorm(2, 4), None),
        (FrozenBatchNorm(4), None),
    ],
)
def test_coupled_layers_are_found_in_the_mode_they_are_in(layer: nn.Module, effect: str | None) -> None:
    found = coupled_layers(nn.ModuleDict({"inner": nn.Sequential(nn.Identity(), layer)}))
    assert [each.name for each in found] == (["inner.1"] if effect else [])
    assert all(effect is not None and each.effect.endswith(effect) and each.layer is layer for each in found)


def test_a_layer_at_two_places_is_found_once() -> None:
    layer = nn.BatchNorm1d(4)
    assert len(coupled_layers([nn.Sequential(layer, layer), layer])) == 1


# ---- converted


@pytest.mark.parametrize("to", ["group", "layer", "rms", "frozen"])
@pytest.mark.parametrize("name", ["BatchNorm1d, 2-D input", "BatchNorm1d, 3-D input", "BatchNorm2d", "BatchNorm3d"])
def test_a_converted_model_couples_no_samples(name: str, to: str) -> None:
    case = CASES[name]
    model, batch = convert(case.model().double(), to), batch_of(10, case.sample)
    assert not coupled_layers(model)
    expected = reference(model, lambda: loss_sum(model, batch)[0] / 10)
    mb.Accumulator(model, loss_sum, micro_batch_size=3).run(batch)
    assert difference(gradients(model), expected) <= 1e-12
    x = batch[0]
    assert float((model(x)[:1] - model(x[:1])).detach().abs().max()) <= 1e-12
    assert float((model(x)[0] - model(x)[1]).detach().abs().max()) > 1e-3  # and is not constant


def test_the_control_a_batchnorm_model_couples_samples() -> None:
    model, (x, _) = flat().double(), batch_of(10, (7,))
    assert float((model(x)[:4] - model(x[:4])).detach().abs().max()) > 0.1


def by_hand(x: Tensor, weight: Tensor, bias: Tensor, *, centre: bool) -> Tensor:
    """Over the channels of one position at a time, in plain numbers."""
    y = torch.empty_like(x)
    moved, target = x.movedim(1, -1), y.movedim(1, -1)
    for index in torch.cartesian_prod(*[torch.arange(n) for n in moved.shape[:-1]]).reshape(-1, x.ndim - 1).tolist():
        values = moved[tuple(index)]
        mean = values.mean() if centre else 0.0
        scale = ((values - mean) ** 2).mean() + 1e-5
        target[tuple(index)] = (values - mean) / scale.sqrt() * weight + bias
    return y


@pytest.mark.parametrize("shape", [(5, 6), (2, 6, 4), (2, 6, 3, 2), (2, 6, 2, 2, 2)])
@pytest.mark.parametrize(("kind", "centre"), [(ChannelLayerNorm, True), (ChannelRMSNorm, False)])
def test_channel_norms_normalise_over_the_channels_at_each_position(
    kind: Callable[[int], nn.Module], centre: bool, shape: tuple[int, ...]
) -> None:
    norm, x = kind(6).double(), torch.randn(shape, dtype=torch.float64) + 1
    nn.init.normal_(norm.weight)
    nn.init.normal_(norm.bias)
    expected = by_hand(x, norm.weight.detach(), norm.bias.detach(), centre=centre)
    assert float((norm(x) - expected).detach().abs().max()) <= 1e-12
    if centre:
        same = F.layer_norm(x.movedim(1, -1), (6,), norm.weight, norm.bias).movedim(-1, 1)
        assert float((norm(x) - same).detach().abs().max()) <= 1e-12


def test_group_norm_has_groups_that_hold_more_than_one_value() -> None:
    def groups(channels: int, layer: type[nn.Module] = nn.BatchNorm2d, **options: int) -> int:
        return convert(layer(channels), "group", **options).num_groups

    assert [groups(c) for c in (64, 96, 32, 20, 3, 1)] == [32, 32, 16, 10, 1, 1]
    assert groups(64, num_groups=8) == 8
    assert [groups(c, nn.BatchNorm1d) for c in (64, 20, 6)] == [8, 2, 1]


def test_weights_are_carried_over_and_shared_and_modes_kept() -> None:
    model = Convolutional(2)
    nn.init.normal_(model.body[1].weight)
    model.body[4].eval()
    weight = model.body[1].weight
    copied = convert(model, "group")
    assert isinstance(model.body[1], nn.BatchNorm2d)
    assert copied.body[1].weight is not weight
    assert torch.equal(copied.body[1].weight, weight)
    assert (copied.body[1].training, copied.body[4].training) == (True, False)
    assert convert(model, "group", in_place=True) is model
    assert model.body[1].weight is weight  # an optimizer that has it keeps it
    twice = convert(Twice(), "layer")
    assert isinstance(twice.norm, ChannelLayerNorm)
    tied = nn.Sequential(nn.BatchNorm1d(8))
    tied.append(tied[0])
    tied = convert(tied, "group")
    assert tied[0] is tied[1]
    assert isinstance(convert(nn.BatchNorm1d(8, affine=False), "rms").weight, type(None))
    assert convert(nn.BatchNorm1d(8, eps=0.1), "group").eps == 0.1


def test_frozen_layers_are_the_eval_mode_in_train_mode_with_the_same_names() -> None:
    model, (x, _) = Convolutional(2).double(), batch_of(10, (3, 6, 6))
    model(x)
    nn.init.normal_(model.body[1].weight)
    frozen = convert(model, "frozen").train()
    assert torch.equal(frozen(x), model.eval()(x))
    assert frozen.state_dict().keys() == {k for k in model.state_dict() if not k.endswith("num_batches_tracked")}
    assert not any(p.requires_grad for p in frozen.body[1].parameters())
    before = copy.deepcopy(frozen.state_dict())
    frozen(x * 3)
    assert all(torch.equal(before[key], value) for key, value in frozen.state_dict().items())


def test_sync_layers_keep_weights_and_statistics() -> None:
    model, (x, _) = Convolutional(2), batch_of(10, (3, 6, 6), torch.float32)
    model(x)
    synced = convert(model, "sync")
    assert isinstance(synced.body[1], nn.SyncBatchNorm)
    assert synced.state_dict().keys() == model.state_dict().keys()
    assert torch.equal(synced.eval()(x), model.eval()(x))


def test_what_cannot_be_converted_is_told() -> None:
    with pytest.raises(ValueError, match="to must be one of 'group', 'rms', 'layer', 'sync', 'frozen', got 'instance'"):
        convert(flat(), "instance")
    with pytest.raises(ValueError, match=r"'0' \(LazyBatchNorm1d\) does not know its channels yet: run the model once"):
        convert(nn.Sequential(nn.LazyBatchNorm1d()), "group")
    with pytest.raises(ValueError, match="has no running statistics that could be frozen"):
        convert(flat(track_running_stats=False), "frozen")
    with pytest.raises(ValueError, match="has a single channel: normalised by itself it would be constant"):
        convert(nn.Sequential(nn.BatchNorm1d(1)), "group")
    with pytest.raises(ValueError, match="num_groups must be at least 1, got 0"):
        convert(flat(), "group", num_groups=0)


# ---- pooled


def pooled_by_hand(model: nn.Module, micro_batches: list[Pair]) -> dict[str, tuple[Tensor, Tensor]]:
    """For each layer the mean and the unbiased variance of all of its inputs, micro-batch by micro-batch forwards."""
    twin, seen = copy.deepcopy(model), {}
    for name, layer in twin.named_modules():
        if isinstance(layer, nn.modules.batchnorm._BatchNorm):
            inputs = seen.setdefault(name, [])
            layer.register_forward_pre_hook(lambda _, args, inputs=inputs: inputs.append(args[0].detach()))
    for x, _ in micro_batches:
        twin(x)
    values = {name: torch.cat([x.movedim(1, 0).flatten(1) for x in inputs], 1) for name, inputs in seen.items()}
    return {name: (x.mean(1), x.var(1)) for name, x in values.items()}


@pytest.mark.parametrize("momentum", [0.1, None])
@pytest.mark.parametrize("way", ["context", "accumulator"])
def test_pooled_statistics_make_one_step_with_the_moments_of_the_window(momentum: float | None, way: str) -> None:
    model, batch = Convolutional(2, momentum=momentum).double(), batch_of(10, (3, 6, 6))
    for _ in range(2):
        micro_batches = cut(batch, SIZES)
        expected = pooled_by_hand(model, micro_batches)
        before = copy.deepcopy(model.state_dict())
        if way == "context":
            with pooled(model):
                for x, _labels in micro_batches:
                    model(x)
        else:
            mb.Accumulator(model, loss_sum, batch_norm="pooled").run(mb.Window(micro_batches))
            model.zero_grad()
        for name, (mean, variance) in expected.items():
            count = int(before[f"{name}.num_batches_tracked"]) + 1
            m = 1 / count if momentum is None else momentum
            after = model.state_dict()
            assert int(after[f"{name}.num_batches_tracked"]) == count
            for key, value in (("running_mean", mean), ("running_var", variance)):
                wanted = (1 - m) * before[f"{name}.{key}"] + m * value
                assert float((after[f"{name}.{key}"] - wanted).abs().max()) <= 1e-12
    assert set(model.state_dict()) == set(before)  # no buffer is left behind


def test_a_single_batchnorm_pooled_has_the_full_batchs_statistics_and_plain_ones_have_not() -> None:
    norm, x = nn.BatchNorm1d(4).double(), batch_of(10, (4,))[0]
    full, plain = copy.deepcopy(norm), copy.deepcopy(norm)
    full(x)
    with pooled(norm):
        outputs = [norm(part) for part in x.split(SIZES)]
    assert torch.equal(torch.cat(outputs), torch.cat([plain(part) for part in x.split(SIZES)]))
    assert all(float((a - b).abs().max()) <= 1e-12 for a, b in zip(norm.buffers(), full.buffers(), strict=True))
    assert float((plain.running_var - full.running_var).abs().max()) > 0.1
    for layer in (averaged := copy.deepcopy(full),):  # momentum_for weighs as one update, but lacks the part between
        layer.reset_running_stats()
        layer.momentum = momentum_for(len(SIZES), momentum=0.1)
        for part in x.split(SIZES):
            layer(part)
    assert float((averaged.running_mean - full.running_mean).abs().max()) < 0.05
    assert float((averaged.running_var - full.running_var).abs().max()) > 0.01


def test_gradients_are_those_of_micro_batches_either_way() -> None:
    model, batch = flat().double(), batch_of(10, (7,))
    plain = copy.deepcopy(model)
    mb.Accumulator(model, loss_sum, micro_batch_size=4, batch_norm="pooled").run(batch)
    mb.Accumulator(plain, loss_sum, micro_batch_size=4, batch_norm="micro_batch").run(batch)
    assert difference(gradients(model), gradients(plain)) == 0


def test_functional_calls_with_a_layers_statistics_are_pooled_and_others_refused() -> None:
    norm, x = nn.BatchNorm1d(4).double(), batch_of(10, (4,))[0]
    full = copy.deepcopy(norm)
    full(x)
    with pooled(norm):
        for part in x.split(SIZES):
            F.batch_norm(part, norm.running_mean, norm.running_var, training=True)
    assert float((norm.running_var - full.running_var).abs().max()) <= 1e-12
    with pytest.raises(ValueError, match="updates running statistics that are no layer's of the model"), pooled(norm):
        Residual()(torch.randn(2, 3, 6, 6))


def test_after_an_error_running_statistics_are_as_before() -> None:
    norm, x = nn.BatchNorm1d(4).double(), batch_of(10, (4,))[0]
    before, buffers = copy.deepcopy(norm.state_dict()), set(norm._buffers)

    def fail() -> None:
        with pooled(norm):
            norm(x)
            raise KeyError("on purpose")

    with pytest.raises(KeyError, match="on purpose"):
        fail()
    assert all(torch.equal(before[key], value) for key, value in norm.state_dict().items())
    assert set(norm._buffers) == buffers


def test_a_layer_that_is_not_called_keeps_its_statistics() -> None:
    norm = nn.BatchNorm1d(4)
    before = copy.deepcopy(norm.state_dict())
    with pooled(norm):
        pass
    norm.eval()
    with pooled(norm):
        norm(torch.randn(5, 4))
    assert all(torch.equal(before[key], value) for key, value in norm.state_dict().items())


def test_a_micro_batch_that_ran_out_of_memory_counts_once() -> None:
    model, batch = flat().double(), batch_of(12, (7,))
    twin, failed = copy.deepcopy(model), []

    def fails_once(model: nn.Module, batch: Pair) -> tuple[Tensor, int]:
        result = loss_sum(model, batch)
        if len(batch[1]) > 2 and not failed:
            failed.append(1)
            raise torch.OutOfMemoryError("injected")
        return result

    report = mb.Accumulator(model, fails_once, micro_batch_size=4, batch_norm="pooled").run(batch)
    assert report.retries == 1
    with pooled(twin):
        start = 0
        for size in report.micro_batch_sizes:
            twin(batch[0][start : start + size])
            start += size
    assert all(float((a - b).abs().max()) <= 1e-12 for a, b in zip(model.buffers(), twin.buffers(), strict=True))


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_what_a_checkpoint_computes_again_is_not_counted_again(use_reentrant: bool) -> None:
    norm, x = nn.BatchNorm1d(4).double(), batch_of(10, (4,))[0]
    full = copy.deepcopy(norm)
    full(x)
    with pooled(norm):
        for part in x.split(SIZES):
            checkpoint(norm, part.requires_grad_(), use_reentrant=use_reentrant).sum().backward()
    assert float((norm.running_var - full.running_var).abs().max()) <= 1e-12


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_a_checkpointed_layer_is_pooled_once_by_an_accumulator(use_reentrant: bool) -> None:
    torch.manual_seed(0)
    model, x = nn.Sequential(nn.Linear(4, 3), nn.BatchNorm1d(3), nn.Tanh()).double(), batch_of(10, (4,))[0].detach()
    full = copy.deepcopy(model)
    full(x)

    def loss_fn(m: nn.Module, part: torch.Tensor) -> torch.Tensor:
        return checkpoint(m[1:], m[0](part), use_reentrant=use_reentrant).square().mean()

    mb.Accumulator(model, loss_fn, micro_batch_size=4, batch_norm="pooled").run(x)
    assert float((model[1].running_var - full[1].running_var).abs().max()) <= 1e-12


def test_all_calls_of_a_layer_make_one_step_together() -> None:
    """A stated limit: the full batch would make a step for each call of a layer that is used twice."""
    model, batch = Twice().double(), batch_of(10, (7,))
    with pooled(model):
        model(batch[0])
    assert int(model.norm.num_batches_tracked) == 1


# ---- momentum


@pytest.mark.parametrize("steps", [1, 2, 8, 64])
def test_the_adapted_momentum_leaves_the_old_statistics_the_same_weight(steps: int) -> None:
    assert (1 - momentum_for(steps, momentum=0.1)) ** steps == pytest.approx(0.9, rel=1e-12)
    norm = nn.BatchNorm1d(1, momentum=momentum_for(steps, momentum=0.1)).double()
    norm.running_mean.fill_(1.0)
    for _ in range(steps):
        norm(torch.tensor([[-1.0], [1.0]], dtype=torch.float64))  # mean 0
    assert float(norm.running_mean) == pytest.approx(0.9, rel=1e-12)


def test_momenta_that_are_none_are_refused() -> None:
    with pytest.raises(ValueError, match="accumulation_steps must be at least 1, got 0"):
        momentum_for(0)
    with pytest.raises(ValueError, match=r"momentum must be between 0 and 1, got 1\.5"):
        momentum_for(2, momentum=1.5)


# ---- the benchmark


def check_memory(rows: list[dict[str, Any]]) -> None:
    """Lockstep at K = 8 is far below the full batch, whose saved tensors lie on the host instead."""
    by_name = {row["name"]: row for row in rows}
    assert by_name["exact, 8"]["peak of full batch"] <= 0.3
    assert by_name["exact, 8"]["host"] > 0.5 * by_name["full batch"]["peak"]
    assert by_name["micro-batches"]["host"] == by_name["full batch"]["host"] == 0


def test_the_benchmark_runs_and_memory_is_as_claimed() -> None:
    module = benchmark("batchnorm")
    rows = module.measure(batch_size=32, width=8, side=16, rounds=1)
    assert len(rows) == len(module.table(rows).splitlines()) - 2
    check_memory(rows)


def test_the_page_shows_the_kept_results_which_keep_their_promises() -> None:
    rows = json.loads((ROOT / "benchmarks" / "results" / "batchnorm.json").read_text(encoding="utf-8"))["rows"]
    assert benchmark("batchnorm").table(rows) in (ROOT / "docs" / "batchnorm.md").read_text(encoding="utf-8")
    check_memory(rows)
    assert {row["name"]: row["time"][1] for row in rows}["exact, 8"] <= 2.2


def test_a_model_that_comes_in_eval_mode_is_warned_about_in_its_first_window() -> None:
    model = nn.Sequential(nn.Linear(4, 3), nn.BatchNorm1d(3)).eval()
    accumulator = mb.Accumulator(model, lambda model, x: model(x).square().mean(), micro_batch_size=2)
    model.train()
    with pytest.warns(UserWarning, match="the model couples samples: '1'"):
        accumulator.run(torch.randn(4, 4))
    model.zero_grad()
    accumulator.run(torch.randn(4, 4))  # once is enough
