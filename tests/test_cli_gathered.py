"""Commands on a task whose loss compares all samples of an update: trained exactly, planned, or refused in words."""

import importlib.util
import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import clear, difference, gradients, reference
from own_towers import Outputs, Pair, encode, first, info_nce, towers
from torch import Tensor, nn
from typer.testing import CliRunner

import macrobatch as mb
from macrobatch.cli import app
from macrobatch.cli.gathered_plan import GatheredNeeds, gathered_plan
from macrobatch.cli.run import Run
from macrobatch.cli.run_options import TrainOptions, batch_plan, tokens_per_sample
from macrobatch.cli.sampling import take
from macrobatch.cli.validation import validate
from macrobatch.tasks import Task, load_task
from macrobatch.tasks.embeddings import PACKAGE

TOWERS = ["--task", "own_towers:towers"]
LARGE = [*TOWERS, "--task-option", "size=600", "--batch-size", "96"]


def run(command: str, *arguments: str | float | Path, code: int = 0) -> str:
    """What the command prints, both streams, its lines joined; the exit code is checked."""
    result = CliRunner().invoke(app, [command, *map(str, arguments)])
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    assert result.exit_code == code, result.output
    return " ".join(result.output.replace("│", " ").split())


def summary(folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((folder / "summary.json").read_text(), parse_constant=pytest.fail)
    return found


def rows(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def collated(task: Task, data: Any, count: int, start: int = 0) -> Pair:
    batch: Pair = task.collate(take(data, range(start, start + count)))
    return batch


def looking(**options: Any) -> Task:
    """The towers with a forward that looks at its numbers: no fake tensor gets through."""
    task = towers(**options)

    def looking_encode(model: Any, micro_batch: Pair) -> Outputs:
        assert float(micro_batch[0].sum()) < torch.inf
        return encode(model, micro_batch)

    return replace(task, encode=looking_encode)


# ---- training


@pytest.mark.parametrize(("micro_batch_size", "max_memory"), [(5, None), (5, "1MB"), (12, None), (None, None)])
def test_the_first_update_is_that_of_the_loss_over_the_whole_batch(
    micro_batch_size: int | None, max_memory: str | None
) -> None:
    task = towers(dtype="float64", hidden=7)
    task = replace(task, make_optimizer=lambda model, lr: torch.optim.SGD(model.parameters(), lr=lr))
    options = TrainOptions(learning_rate=1.0, micro_batch_size=micro_batch_size, max_memory=max_memory, seed=5)
    training = Run(task, options)
    before = [p.detach().clone() for p in task.model.parameters()]
    order = torch.randperm(48, generator=torch.Generator().manual_seed(5)).tolist()
    batch = task.collate(take(task.train, order[:12]))
    by_hand = reference(task.model, lambda: info_nce(task.model, encode(task.model, batch), None))
    loss = float(info_nce(task.model, encode(task.model, batch), None).detach())
    clear(task.model)
    for start, stop in ((0, 4), (4, 8), (8, 12)):  # the control: the mean of the micro-batches' own losses
        part = (batch[0][start:stop], batch[1][start:stop])
        (info_nce(task.model, encode(task.model, part), None) / 3).backward()
    assert difference(gradients(task.model), by_hand) > 0.01
    clear(task.model)

    row = training.advance(next(iter(training.windows())))
    moved = [old - new.detach() for old, new in zip(before, task.model.parameters(), strict=True)]
    assert difference(moved, by_hand) < 1e-12
    assert row["loss"] == pytest.approx(loss, rel=1e-12)
    assert row["grad_norm"] == pytest.approx(float(torch.cat([g.flatten() for g in by_hand if g is not None]).norm()))


def test_the_summary_has_the_loss_and_metrics_over_all_outputs_of_the_held_out_samples(tmp_path: Path) -> None:
    from safetensors.torch import load_file

    folder = tmp_path / "run"
    said = run("train", *TOWERS, "--micro-batch-size", 5, "--epochs", 4, "--output", folder)
    task, ended = load_task("own_towers:towers"), summary(folder)
    task.model.load_state_dict(load_file(folder / "model.safetensors"))
    outputs = encode(task.model, collated(task, task.validation, 12))
    found, count = first(task.model, outputs)
    assert ended["validation_loss"] == pytest.approx(float(info_nce(task.model, outputs, None).detach()), rel=1e-5)
    assert ended["validation_metrics"]["recall@1"] == pytest.approx(float(found) / count)
    parts = [encode(task.model, collated(task, task.validation, 5 if start < 10 else 2, start)) for start in (0, 5, 10)]
    by_parts = sum(float(info_nce(task.model, part, None).detach()) * len(part["left"]) for part in parts) / 12
    assert ended["validation_loss"] != pytest.approx(by_parts, rel=0.01)  # the control
    assert f"recall@1 {ended['validation_metrics']['recall@1']:.4g}"[:12] in said
    assert "the loss compares all samples of an update" in said
    assert "graphs kept for the backward in the last update: 1 of 3" in said
    assert {(row["micro_batches"], row["largest_micro_batch"], row["kept_graphs"]) for row in rows(folder)} == {
        (3, 4, 1)
    }


def test_nothing_is_said_of_noise_that_is_not_defined(tmp_path: Path) -> None:
    said = run("train", *TOWERS, "--micro-batch-size", 3, "--epochs", 2, "--output", tmp_path / "run")
    assert "noise" not in said.replace(str(tmp_path), "").lower()
    assert not any("noise" in name for row in rows(tmp_path / "run") for name in row)
    assert summary(tmp_path / "run")["noise"] is None
    other = run("train", "--task", "own_tasks:line", "--micro-batch-size", 2, "--output", tmp_path / "other")
    assert "noise" in other  # the control


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_lower_precision_a_guard_and_a_ramp_in_terms_of_the_loss_go_with_it(precision: str, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    options = ["--precision", precision, "--spike-guard", "rollback", "--batch-schedule", "ramp:4:12:20tokens"]
    run("train", *TOWERS, *options, "--micro-batch-size", 3, "--output", folder)
    assert [row["batch_size"] for row in rows(folder)] == [4, 4, 4, 8, 12, 12, 4]
    assert summary(folder)["validation_loss"] < 5


def test_a_sample_is_one_term_of_the_loss() -> None:
    assert tokens_per_sample(towers())() == 1.0


# ---- memory


def test_a_budget_is_spent_on_graphs_and_not_exceeded(tmp_path: Path) -> None:
    sizes: list[Any] = [*LARGE, "--task-option", "hidden=1024", "--micro-batch-size", 8, "--steps", 3]
    run("train", *sizes, "--output", tmp_path / "free")
    said = run("train", *sizes, "--max-memory", "1MB", "--output", tmp_path / "held")
    free, held = summary(tmp_path / "free"), summary(tmp_path / "held")
    assert (free["kept_graphs"], held["kept_graphs"]) == (1, 7)
    assert held["peak_bytes"] <= 1_000_000
    assert held["retries"] == 0
    assert "graphs kept for the backward in the last update: 7 of 12" in said
    assert [row["loss"] for row in rows(tmp_path / "free")] == pytest.approx(
        [row["loss"] for row in rows(tmp_path / "held")], rel=1e-4
    )


@pytest.mark.parametrize(
    ("options", "tolerance"),
    [
        (["--batch-size", "96", "--task-option", "hidden=256", "--micro-batch-size", "8"], 0.01),
        (["--batch-size", "97", "--micro-batch-size", "8"], 0.01),  # the loss takes most
        (["--batch-size", "48", "--task-option", "hidden=4096", "--micro-batch-size", "12"], 0.01),  # the model does
        (["--batch-size", "12", "--micro-batch-size", "4"], 0.03),  # hardly anything does
    ],
)
def test_the_memory_of_an_update_is_as_predicted(options: list[str], tolerance: float, tmp_path: Path) -> None:
    said = run("train", *TOWERS, "--task-option", "size=600", *options, "--steps", 2, "--output", tmp_path / "run")
    ended = summary(tmp_path / "run")
    assert ended["memory_predicted_bytes"] == pytest.approx(ended["memory_measured_bytes"], rel=tolerance)
    assert "memory of update 2" in said


def test_with_several_graphs_the_measurement_is_lower_by_the_gradients_at_most(tmp_path: Path) -> None:
    options: list[Any] = [*TOWERS, "--task-option", "size=600", "--batch-size", "48", "--task-option", "hidden=4096"]
    run("train", *options, "--micro-batch-size", 12, "--max-memory", "5MB", "--steps", 2, "--output", tmp_path / "run")
    ended = summary(tmp_path / "run")
    assert ended["kept_graphs"] == 4
    surplus = ended["memory_predicted_bytes"] - ended["memory_measured_bytes"]
    assert 0 <= surplus <= 1.1 * ended["memory_predicted"]["gradients"]


@pytest.mark.slow
def test_without_a_size_the_fastest_that_fits_is_found(tmp_path: Path) -> None:
    options: list[Any] = [*LARGE, "--task-option", "hidden=1024", "--max-memory", "1MB", "--steps", 13]
    said = run("train", *options, "--output", tmp_path / "run")
    ended = summary(tmp_path / "run")
    assert "in micro-batches of the fastest size that is found (up to" in said
    assert (ended["micro_batch_size_is"], ended["peak_bytes"] <= 1_000_000) == ("found", True)
    assert ended["kept_graphs"] >= 1


def test_a_model_that_looks_at_its_numbers_trains_and_says_why_nothing_was_predicted(tmp_path: Path) -> None:
    task = ["--task", "test_cli_gathered:looking"]
    said = run("train", *task, "--micro-batch-size", 4, "--steps", 2, "--output", tmp_path / "run")
    assert "not predicted: the model does not run on fake tensors, measured" in said
    assert summary(tmp_path / "run")["memory_predicted_bytes"] is None


# ---- planning


@pytest.mark.parametrize(("hidden", "max_memory"), [(4096, 3_000_000), (1024, 600_000), (0, 190_000)])
def test_a_planned_size_trains_within_the_budget_at_the_peak_that_was_predicted(hidden: int, max_memory: int) -> None:
    task = towers(size=600, hidden=hidden)
    optimizer = task.make_optimizer(task.model, 0.01)
    found = gathered_plan(GatheredNeeds.of(task, task.model, optimizer, 96, max_memory))
    assert (found.method, found.is_exact, found.batch_size) == ("fake", True, 96)
    assert found.peak <= max_memory
    accumulator = mb.GatheredAccumulator(
        task.model, encode, info_nce, micro_batch_size=found.micro_batch_size, keep_graphs=min(found.graphs, 1)
    )
    for _ in range(2):
        window = mb.collate_windows(task.collate, micro_batch_size=found.micro_batch_size)(take(task.train, range(96)))
        with mb.MemoryMeter() as meter:
            states = (value for state in optimizer.state.values() for value in state.values())
            for tensor in [*task.model.parameters(), *states]:
                tensor.detach()  # an operation: from here on it counts
            mb.apply_update(optimizer, accumulator.run(window))
    surplus = found.peak - meter.peak
    several = found.accumulation_steps > 1  # with one micro-batch gradients come while activations go
    assert -0.01 * meter.peak < surplus < 0.01 * meter.peak + (0 if several else 1.1 * found.memory.gradients)


def test_the_plan_is_on_the_terminal_and_in_the_folder(tmp_path: Path) -> None:
    said = run("plan", *LARGE, "--task-option", "hidden=4096", "--max-memory", "4MB", "--output", tmp_path / "run")
    found = json.loads((tmp_path / "run" / "plan.json").read_text())
    assert found["largest"]["memory"]["peak"] <= 4_000_000
    assert (found["outputs"], found["fastest"], found["graphs"]) == (96 * 8 * 4, None, 1)
    assert "the loss compares all 96 samples: it takes 151 kB" in said
    assert "the peak is with 1 graph kept for the backward" in said
    assert "time is not predicted" in said
    assert "time per sample" not in said
    assert "</svg>" in (tmp_path / "run" / "plan.svg").read_text()
    roomy = run("plan", *LARGE, "--task-option", "hidden=4096", "--max-memory", "1GB", "--output", tmp_path / "other")
    assert "the whole effective batch fits" in roomy


def test_a_model_that_needs_real_numbers_is_measured() -> None:
    task = looking(size=600, hidden=1024)
    needs = GatheredNeeds.of(task, task.model, task.make_optimizer(task.model, 0.01), 96, 600_000)
    fake = towers(size=600, hidden=1024)
    other = GatheredNeeds.of(fake, fake.model, fake.make_optimizer(fake.model, 0.01), 96, 600_000)
    measured, predicted = gathered_plan(needs), gathered_plan(other)
    assert (measured.method, predicted.method) == ("probes", "fake")
    assert measured.micro_batch_size == predicted.micro_batch_size
    assert measured.peak == pytest.approx(predicted.peak, rel=0.01)


# ---- the built-in task with a real encoder

FUNCTION = '''
def {name}_{j}(values):
    """Of number {j} the {what}."""
    return {name}(values, {j})
'''
has_weights = pytest.mark.skipif(importlib.util.find_spec(PACKAGE) is None, reason="needs the extra 'embeddings'")


def real_encoder(folder: Path) -> list[str]:
    """Options for the task `embeddings` on a few files of its own, whose docstrings differ in length."""
    names = {"total": "sum", "mean": "mean of them all", "spread": "largest less the smallest, whatever they are"}
    for j in range(24):
        texts = [FUNCTION.format(name=name, what=what, j=j) for name, what in names.items()]
        (folder / f"module_{j}.py").write_text("".join(texts))
    return ["--task", "embeddings", "--task-option", f"root={folder}", "--task-option", "frozen_layers=5"]


@has_weights
def test_what_the_task_embeddings_takes_is_predicted_and_measured_alike(tmp_path: Path) -> None:
    library = tmp_path / "library"
    library.mkdir()
    options = [*real_encoder(library), "--batch-size", "24", "--device", "cpu"]
    said = run("train", *options, "--micro-batch-size", 8, "--steps", 2, "--output", tmp_path / "run")
    ended = summary(tmp_path / "run")
    assert ended["memory_predicted_bytes"] == pytest.approx(ended["memory_measured_bytes"], rel=0.01)
    assert "memory of update 2, micro-batches of 8: predicted" in said
    assert "preparing the data" in said
    plan = run("plan", *options, "--max-memory", "60MB", "--threads", 1, "--output", tmp_path / "plan")
    found = json.loads((tmp_path / "plan" / "plan.json").read_text())
    assert (found["method"], found["is_exact"]) == ("fake", True)
    assert 1 <= found["largest"]["micro_batch_size"] < 24
    assert "every operation runs on fake tensors" in plan
    assert "preparing" not in plan  # what the frozen layers give is only needed of a few samples


# ---- metrics


def of_eleven(model: Any, outputs: Outputs) -> tuple[Tensor, int]:
    """Of the eleven nearest: as many are left of the 12 held-out samples without one of their groups."""
    scores = outputs["left"] @ outputs["right"].T
    return scores.topk(11).values.sum(), len(scores)


def of_too_many(model: Any, outputs: Outputs) -> tuple[Tensor, int]:
    scores = outputs["left"] @ outputs["right"].T
    return scores.topk(13).values.sum(), len(scores)


def bare(model: Any, outputs: Outputs) -> Tensor:
    return outputs["left"].mean()


def metric_of_all(*, name: str) -> Task:
    return replace(towers(), metrics={name: {"many": of_eleven, "too many": of_too_many, "bare": bare}[name]})


def test_a_metric_that_needs_more_samples_than_a_micro_batch_has_is_tried_on_all(tmp_path: Path) -> None:
    options = ["--task", "test_cli_gathered:metric_of_all", "--steps", "1", "--output", tmp_path / "run"]
    said = run("train", *options, "--task-option", "name=many")
    assert "many" in summary(tmp_path / "run")["validation_metrics"]
    assert "error" not in said
    with pytest.raises(RuntimeError, match="out of range"):  # the control: a micro-batch of five is too few for it
        validate(towers().model, metric_of_all(name="many"), [collated(towers(), towers().validation, 5)])


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("too many", "raised RuntimeError: selected index k out of range (test_cli_gathered.py, line "),
        ("bare", "returned a tensor of shape (); needed is (sum, count), a sum over the samples as a number or a"),
    ],
)
def test_a_metric_that_no_outputs_will_do_for_is_named_before_training(name: str, message: str, tmp_path: Path) -> None:
    options = ["--task", "test_cli_gathered:metric_of_all", "--task-option", f"name={name}"]
    said = run("train", *options, "--output", tmp_path / "run", code=2)
    assert f"error: task 'towers': the metric '{name}', called as metric(model, outputs), {message}" in said
    assert not (tmp_path / "run").exists()


# ---- refusals


@pytest.mark.parametrize(
    "arguments",
    [
        ["plan", *LARGE],
        ["train", *LARGE, "--micro-batch-size", "8"],
        ["train", *LARGE],
    ],
)
def test_a_loss_beyond_the_budget_is_refused_before_any_work(arguments: list[str], tmp_path: Path) -> None:
    said = run(*arguments, "--max-memory", "150kB", "--output", tmp_path / "run", code=2)
    assert "error: max_memory=150.00 kB is too small for a window of 96 samples" in said
    assert "most of all while the loss is computed: parameters 276 B, optimizer state 560 B, inputs 5.76 kB, " in said
    assert "RowBlocks" in said
    assert not (tmp_path / "run").exists()


def test_a_micro_batch_size_beyond_the_budget_is_refused_before_any_work(tmp_path: Path) -> None:
    options: list[Any] = [*LARGE, "--task-option", "hidden=4096", "--max-memory", "2.5MB", "--steps", 1]
    said = run("train", *options, "--micro-batch-size", 96, "--output", tmp_path / "run", code=2)
    assert (
        "error: max_memory=2.50 MB is too small for a window of 96 samples: in micro-batches of 96 samples it ne"
        in said
    )
    assert "What would also help: a smaller micro_batch_size" in said
    assert not (tmp_path / "run").exists()
    run("train", *options, "--micro-batch-size", 8, "--output", tmp_path / "run")  # the control
    assert summary(tmp_path / "run")["peak_bytes"] <= 2_500_000


@pytest.mark.parametrize(
    ("hidden", "max_memory", "most"),
    [
        (64, 10_000, "while the loss is computed"),
        (4096, 10_000, "in the backward of a micro-batch|in the optimizer's step"),
        (4096, 1_900_000, "in the backward of a micro-batch|in the optimizer's step"),
    ],
)
def test_a_budget_for_no_sample_is_refused_and_the_one_that_is_named_is_enough(
    hidden: int, max_memory: int, most: str
) -> None:
    task = towers(size=600, hidden=hidden)
    message = (
        rf"max_memory={mb.storages.format_bytes(max_memory)} is too small for a window of 96 samples: even in micro"
    )
    with pytest.raises(ValueError, match=message) as refused:
        planned_with(task, max_memory)
    assert re.search(rf"most of all ({most}): parameters [^(]* \(optimizer: AdamW\)\.", str(refused.value))
    named = re.search(r"Give ([\d.]+ [kMG]?B) or more", str(refused.value))
    assert named is not None
    enough = mb.memory.parse_bytes(named[1])
    planned_with(task, enough)
    with pytest.raises(ValueError, match="is too small"):  # the control
        planned_with(task, int(0.98 * enough))


def planned_with(task: Task, max_memory: int) -> None:
    gathered_plan(GatheredNeeds.of(task, task.model, task.make_optimizer(task.model, 0.01), 96, max_memory))


@pytest.mark.parametrize(
    "options", [[], ["--per-example"], ["--branched"], ["--micro-batch-size", "3"], ["--batch-size", "48"]]
)
def test_noise_is_refused_where_a_micro_batch_has_no_gradient_of_its_own(options: list[str], tmp_path: Path) -> None:
    said = run("noise", *TOWERS, *options, "--output", tmp_path / "run", code=2)
    assert "macrobatch noise: the loss of towers compares all samples of an update" in said
    assert "the gradient noise scale is not defined" in said
    assert "Compare the validation metrics of macrobatch train at several --batch-size" in said
    assert not (tmp_path / "run").exists()


def test_a_batch_that_grows_by_noise_is_refused_and_one_that_grows_by_plan_is_not() -> None:
    task = towers()
    with pytest.raises(
        ValueError, match=r"--batch-schedule doubling:4:12: .* not defined\. Say yourself when .* steps"
    ):
        Run(task, TrainOptions(batch_schedule="doubling:4:12"))
    options = TrainOptions(batch_schedule="steps:4,12@16")
    assert Run(task, options).sizes == [4, 4, 4, 4, 12, 12, 8]
    assert not batch_plan(task, options, 48).measures


def test_a_size_that_would_change_the_model_is_the_tasks_own_and_not_found(tmp_path: Path) -> None:
    options = [*TOWERS, "--task-option", "hidden=8", "--task-option", "norm=True", "--steps", "1"]
    said = run("train", *options, "--output", tmp_path / "run")
    assert "note: the micro-batch size is the task's own, not auto: 'left.1' (BatchNorm1d) normalises over the" in said
    refused = run("train", *options, "--micro-batch-size", "auto", "--output", tmp_path / "other", code=2)
    assert "--micro-batch-size auto would change the result" in refused


def test_out_of_memory_says_that_the_loss_may_be_what_does_not_fit() -> None:
    training = Run(towers(), TrainOptions(max_memory="1MB", micro_batch_size=4))
    assert "the loss over all outputs does not fit, or not even one sample at a time, into" in training.too_large()
    training.has_gradient = True
    assert "the optimizer's state does not fit into the budget" in training.too_large()


class Detached(nn.Module):
    """An encoder whose outputs have no graph."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(6, 4))

    def forward(self, x: Tensor) -> Tensor:
        """Rows without a graph."""
        return (x @ self.weight).detach()


def test_outputs_without_a_graph_are_an_error_before_any_work() -> None:
    task = replace(
        towers(),
        model=Detached(),
        encode=lambda model, pair: model(pair[0]),
        loss_fn=lambda model, outputs, window: outputs.square().mean(),
    )
    with pytest.raises(ValueError, match="no output of encode depends on a trainable parameter"):
        Run(task, TrainOptions())


def test_planning_leaves_model_and_random_numbers_as_they_were() -> None:
    task = towers(hidden=8, norm=True)
    dropping = replace(task, encode=lambda model, pair: encode(model, (nn.functional.dropout(pair[0], 0.5), pair[1])))
    before = {name: value.clone() for name, value in task.model.state_dict().items()}
    state = torch.get_rng_state()
    optimizer = task.make_optimizer(task.model, 0.01)
    needs = GatheredNeeds.of(dropping, task.model, optimizer, 24, "1MB")
    gathered_plan(needs)
    assert needs.predicted(4, 2) is not None
    assert torch.equal(torch.get_rng_state(), state)
    for name, value in task.model.state_dict().items():
        assert torch.equal(value, before[name])
    assert all(p.grad is None for p in task.model.parameters())
    assert not optimizer.state
    dropping.encode(task.model, collated(task, task.train, 4))  # type: ignore[misc]  # the control: a forward does
    assert not torch.equal(torch.get_rng_state(), state)
    assert not torch.equal(task.model.state_dict()["left.1.running_mean"], before["left.1.running_mean"])
