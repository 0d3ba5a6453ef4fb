"""Held-out values that compare all samples: the loss over all of them at once, and the jackknife for its error."""

import math
from collections.abc import Sequence
from dataclasses import replace
from itertools import pairwise
from typing import Any

import pytest
import torch
from own_tasks import line
from own_towers import encode, first, info_nce, towers
from torch import Tensor, nn

from macrobatch import RowBlocks
from macrobatch.cli.estimates import paired_difference
from macrobatch.cli.gathered_validation import MOST_GROUPS
from macrobatch.cli.validation import Validation, validate, validation_batches
from macrobatch.tasks import Task


@pytest.fixture(autouse=True)
def seed() -> None:
    torch.manual_seed(0)


def held_out(task: Task) -> tuple[Any, int]:
    samples = list(task.validation)  # type: ignore[call-overload]  # a list is map-style
    return task.collate(samples), len(samples)


def validated(task: Task, micro_batch_size: int = 5, **options: Any) -> Validation:
    return validate(task.model, task, validation_batches(task, micro_batch_size), **options)


def brute_force(task: Task, keep: Tensor) -> float:
    """The loss over the held-out samples at `keep`, in one piece."""
    batch, _ = held_out(task)
    with torch.no_grad():
        return float(info_nce(task.model, encode(task.model, tuple(leaf[keep] for leaf in batch)), None))


def test_the_held_out_loss_is_over_all_samples_at_once_whatever_the_micro_batch() -> None:
    task = towers(size=100, dtype="float64")
    _, n = held_out(task)
    expected = brute_force(task, torch.arange(n))
    for size in (3, 7, n):
        assert validated(task, size).loss == pytest.approx(expected, rel=1e-12)
    # The control: the mean over micro-batches is another number, and depends on their size.
    parts = [brute_force(task, torch.arange(n)[start : start + 5]) for start in range(0, n, 5)]
    assert abs(sum(parts) / len(parts) - expected) > 0.5


def test_metrics_are_over_all_samples_at_once() -> None:
    task = towers(size=100)
    found = validated(task)
    batch, n = held_out(task)
    outputs = encode(task.model, batch)
    hits = (outputs["left"] @ outputs["right"].T).argmax(1) == torch.arange(n)
    assert found.metrics == {"recall@1": pytest.approx(float(hits.float().mean()))}
    assert found.num_samples == n


def test_the_model_is_in_eval_mode_without_gradients_and_its_mode_is_put_back() -> None:
    seen: list[tuple[bool, bool]] = []

    def watched(model: Any, micro_batch: Any) -> Any:
        seen.append((model.training, torch.is_grad_enabled()))
        return encode(model, micro_batch)

    task = replace(towers(hidden=3, norm=True), encode=watched)
    before = {name: buffer.clone() for name, buffer in task.model.named_buffers()}
    validated(task)
    assert set(seen) == {(False, False)}
    assert task.model.training
    task.model.eval()
    validated(task)
    assert not task.model.training
    assert all(torch.equal(buffer, before[name]) for name, buffer in task.model.named_buffers())


def test_a_stop_ends_after_a_micro_batch_and_the_loss_is_over_what_was_seen() -> None:
    task = towers(size=100, dtype="float64")
    answers = iter([False, True])
    found = validated(task, 4, stop=lambda: next(answers))
    assert found.num_samples == 8
    assert found.loss == pytest.approx(brute_force(task, torch.arange(8)), rel=1e-12)


def test_autocast_reaches_the_encoder_and_the_loss() -> None:
    seen: set[tuple[str, bool, torch.dtype]] = set()

    def note(name: str, outputs: Any) -> None:
        """The towers end in bfloat16; products of what is float32 are so only within autocast."""
        product = outputs["left"].float() @ outputs["right"].float().T
        seen.add((name, torch.is_autocast_enabled("cpu"), product.dtype))

    def watched_encode(model: Any, micro_batch: Any) -> Any:
        outputs = encode(model, micro_batch)
        note("encode", outputs)
        return outputs

    def watched(model: Any, outputs: Any, window: Any) -> Tensor:
        note("loss", outputs)
        return info_nce(model, outputs, window)

    def metric(model: Any, outputs: Any) -> Any:
        note("metric", outputs)
        return first(model, outputs)

    task = replace(towers(size=100), encode=watched_encode, loss_fn=watched, metrics={"recall@1": metric})
    loss = validated(task, autocast=torch.bfloat16).loss
    assert seen == {(name, True, torch.bfloat16) for name in ("encode", "loss", "metric")}
    seen.clear()
    validated(task)
    assert seen == {(name, False, torch.float32) for name in ("encode", "loss", "metric")}  # the control
    assert 0 < abs(loss - validated(replace(task, loss_fn=info_nce)).loss) < 0.05


def test_a_loss_in_blocks_of_rows_is_the_same() -> None:
    def block(model: Any, outputs: Any, window: Any, rows: slice) -> Tensor:
        logits = outputs["left"][rows] @ outputs["right"].T * model.log_scale.exp()
        own = torch.arange(rows.start, rows.stop)
        return nn.functional.cross_entropy(logits, own, reduction="sum") / len(outputs["left"])

    task = towers(size=100, dtype="float64")
    blocks = replace(task, loss_fn=RowBlocks(block, rows=3))
    assert validated(blocks).loss == pytest.approx(validated(task).loss, rel=1e-12)
    assert validated(blocks).losses == pytest.approx(validated(task).losses, rel=1e-9)


# ---- the jackknife


def two_models(size: int) -> tuple[Task, Task]:
    """The same task with two models."""
    one, other = towers(size=size, dtype="float64"), towers(size=size, dtype="float64")
    torch.manual_seed(5)
    with torch.no_grad():
        for p in other.model.parameters():
            p += 0.1 * torch.randn_like(p)
    return one, other


def without_each(one: Task, other: Task, groups: Sequence[Tensor]) -> list[float]:
    """The difference of the losses over all held-out samples but those of a group, for each group."""
    everything = torch.cat([*groups]).tolist()
    kept = [torch.tensor([i for i in everything if i not in group]) for group in groups]
    return [brute_force(one, keep) - brute_force(other, keep) for keep in kept]


def test_the_standard_error_of_a_paired_difference_is_the_jackknife_s() -> None:
    one, other = two_models(160)
    _, n = held_out(one)
    assert n == 32
    found = paired_difference(validated(one), validated(other))
    groups = torch.arange(n).split(2)
    assert len(groups) == MOST_GROUPS == 16
    left_out = without_each(one, other, groups)
    mean = sum(left_out) / len(groups)
    # Efron and Tibshirani 1993, 11.5, over groups.
    variance = (len(groups) - 1) / len(groups) * sum((value - mean) ** 2 for value in left_out)
    assert found.standard_error == pytest.approx(math.sqrt(variance), rel=1e-9)
    everything = torch.arange(n)
    assert found.value == pytest.approx(brute_force(one, everything) - brute_force(other, everything), rel=1e-9)


def test_groups_of_unlike_size_count_by_their_samples() -> None:
    """Busing, Meijer and van der Leeden 1999: with h_j = n / m_j, t_j* = h_j t - (h_j - 1) t_(-j) and

    J = g t - sum_j (1 - m_j / n) t_(-j),   variance = 1/g sum_j (t_j* - J)^2 / (h_j - 1)
    """
    one, other = two_models(170)
    _, n = held_out(one)
    sizes = [3] * 10 + [2] * 2
    assert n == sum(sizes) == 34
    found, (mine, theirs) = validated(one), (validated(one), validated(other))
    assert list(found.weights) == sizes
    groups = torch.arange(n).split(sizes)
    whole = brute_force(one, torch.arange(n)) - brute_force(other, torch.arange(n))
    left_out, g = without_each(one, other, groups), len(sizes)
    pseudo = [n / m * whole - (n / m - 1) * without for m, without in zip(sizes, left_out, strict=True)]
    centre = g * whole - sum((1 - m / n) * without for m, without in zip(sizes, left_out, strict=True))
    variance = sum((value - centre) ** 2 / (n / m - 1) for m, value in zip(sizes, pseudo, strict=True)) / g
    assert paired_difference(mine, theirs).standard_error == pytest.approx(math.sqrt(variance), rel=1e-9)
    differences = [a - b for a, b in zip(mine.losses, theirs.losses, strict=True)]
    assert differences == pytest.approx(pseudo, rel=1e-7)
    # The controls: all groups taken for equally large, in the pseudo-values, and in their spread.
    alike = [g * whole - (g - 1) * without for without in left_out]
    assert max(abs(a - b) for a, b in zip(alike, pseudo, strict=True)) > 0.01 * math.sqrt(variance)
    unweighted = sum((value - sum(pseudo) / g) ** 2 for value in pseudo) / (g * (g - 1))
    assert abs(unweighted / variance - 1) > 0.01


def test_each_value_is_computed_once_over_all_samples_and_once_without_each_group() -> None:
    seen: list[int] = []

    def watched(model: Any, outputs: Any, window: Any) -> Tensor:
        seen.append(len(outputs["left"]))
        return info_nce(model, outputs, window)

    validated(replace(towers(size=170), loss_fn=watched))
    assert sorted(seen) == [31] * 10 + [32] * 2 + [34]


def test_where_the_loss_is_a_mean_over_samples_a_pseudo_value_is_the_mean_over_its_group() -> None:
    def squares(model: Any, outputs: Tensor, window: Any) -> Tensor:
        return outputs.square().mean()

    base = line(size=33)
    data = [pair[0].double() * 3 + i for i, pair in enumerate(base.train)]  # type: ignore[arg-type,var-annotated]
    task = replace(
        base,
        model=nn.Linear(3, 1).double(),
        encode=lambda model, x: model(x),
        loss_fn=squares,
        metrics={},
        validation=data,  # type: ignore[arg-type]
    )
    found = validated(task, 4)
    values = task.model(torch.stack(data)).detach().square().flatten()
    sizes = [int(size) for size in found.weights]
    assert (sum(sizes), len(sizes), set(sizes)) == (33, 11, {3})
    starts = [0, *torch.tensor(sizes).cumsum(0).tolist()]
    assert found.losses == pytest.approx([float(values[a:b].mean()) for a, b in pairwise(starts)], rel=1e-9)


def test_over_many_held_out_sets_the_standard_error_is_the_spread_of_the_difference() -> None:
    """Of independent sets: the spread that the jackknife claims is the one that is there."""
    differences, errors = [], []
    task, other = towers(), towers()
    torch.manual_seed(0)
    with torch.no_grad():
        for p in other.model.parameters():
            p += 0.3 * torch.randn_like(p)
    generator = torch.Generator().manual_seed(1)
    for _ in range(150):
        shared = torch.randn(48, 4, generator=generator)
        left = torch.cat([shared, torch.randn(48, 2, generator=generator)], 1)
        right = torch.cat([shared @ torch.ones(4, 4).triu(), torch.randn(48, 5, generator=generator)], 1)
        data: Any = list(zip(left, right, strict=True))
        found = paired_difference(*(validated(replace(t, validation=data, metrics={}), 16) for t in (task, other)))
        differences.append(found.value)
        errors.append(found.standard_error)
    spread = float(torch.tensor(differences).std())
    assert sum(errors) / len(errors) == pytest.approx(spread, rel=0.2)


def test_metrics_have_pseudo_values_of_their_own_and_a_single_sample_has_none() -> None:
    found = validated(towers(size=160))
    assert len(found.parts_of_metrics["recall@1"]) == len(found.losses) == MOST_GROUPS
    alone = validated(towers(size=5))
    assert (alone.num_samples, alone.losses, alone.weights) == (1, [alone.loss], [1.0])
    assert math.isnan(paired_difference(alone, alone).standard_error)
