"""Held-out values that compare all samples: the loss over all of them at once, and the jackknife for its error."""

import math
from dataclasses import replace
from itertools import pairwise
from typing import Any

import pytest
import torch
from own_tasks import line
from own_towers import encode, info_nce, towers
from torch import Tensor, nn

from macrobatch import RowBlocks
from macrobatch.cli.comparison import paired_difference
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
    assert all(torch.equal(buffer, before[name]) for name, buffer in task.model.named_buffers())


def test_a_stop_ends_after_a_micro_batch_and_the_loss_is_over_what_was_seen() -> None:
    task = towers(size=100, dtype="float64")
    answers = iter([False, True])
    found = validated(task, 4, stop=lambda: next(answers))
    assert found.num_samples == 8
    assert found.loss == pytest.approx(brute_force(task, torch.arange(8)), rel=1e-12)


def test_autocast_reaches_the_encoder_and_the_loss() -> None:
    seen: list[torch.dtype] = []

    def watched(model: Any, outputs: Any, window: Any) -> Tensor:
        seen.append((outputs["left"] @ outputs["right"].T).dtype)
        return info_nce(model, outputs, window)

    task = replace(towers(size=100), loss_fn=watched)
    loss = validated(task, autocast=torch.bfloat16).loss
    assert set(seen) == {torch.bfloat16}
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


def test_the_standard_error_of_a_paired_difference_is_the_jackknife_s() -> None:
    one, other = towers(size=160, dtype="float64"), towers(size=160, dtype="float64")
    torch.manual_seed(5)
    with torch.no_grad():
        for p in other.model.parameters():
            p += 0.1 * torch.randn_like(p)
    _, n = held_out(one)
    assert n == 32
    found = paired_difference(validated(one), validated(other))
    groups = [torch.arange(n)[start : start + 2] for start in range(0, n, 2)]
    assert len(groups) == MOST_GROUPS
    left_out = []
    for group in groups:
        keep = torch.tensor([i for i in range(n) if i not in group])
        left_out.append(brute_force(one, keep) - brute_force(other, keep))
    mean = sum(left_out) / len(groups)
    # Efron and Tibshirani 1993, 11.5, over groups.
    variance = (len(groups) - 1) / len(groups) * sum((value - mean) ** 2 for value in left_out)
    assert found.standard_error == pytest.approx(math.sqrt(variance), rel=1e-9)
    everything = torch.arange(n)
    assert found.value == pytest.approx(brute_force(one, everything) - brute_force(other, everything), rel=1e-9)


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
