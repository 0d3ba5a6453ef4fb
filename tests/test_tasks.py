"""Tasks: the same for the same seed, disjoint in their data, and clear about what is wrong with a name or an option."""

import copy
import hashlib
import importlib.util
import subprocess
import sys
import weakref
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers import clear, difference, gradients
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.data import IterableDataset, default_collate

import macrobatch as mb
from macrobatch.cli.learner import accumulator_of
from macrobatch.cli.setup import place_constants
from macrobatch.structure import tensors
from macrobatch.tasks import Task, load_task, parse_task_option, task_names
from macrobatch.tasks.code_lm import MAX_FILE_BYTES, ByteContexts, is_validation, source_files
from macrobatch.tasks.embeddings import PACKAGE
from macrobatch.tasks.encoded_pairs import BLOCK, TEXTS_AT_ONCE, EncodedPairs, computing

TINY: dict[str, dict[str, Any]] = {
    "code-lm": {"d_model": 8, "num_layers": 1, "num_heads": 2, "context": 16},
    "digits": {"width": 2},
    "embeddings": {"frozen_layers": 5, "max_tokens": 12},
}
PRETRAINED = {"embeddings"}  # its weights are not drawn
FUNCTION = '''
def {name}_{j}(values):
    """Of number {j} the {what}."""
    return {name}(values, {j})
'''


@pytest.fixture(scope="module")
def loaded(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Task]:
    """Tasks by name and seed, each `number` loaded anew; those with a real encoder read a few files of their own."""
    found: dict[tuple[str, int, int], Task] = {}
    root = tmp_path_factory.mktemp("library")
    for j in range(12):
        names = ("total", "product", "mean", "median", "largest", "smallest", "spread")
        (root / f"module_{j}.py").write_text("".join(FUNCTION.format(name=n, what=n, j=j) for n in names))

    def load(name: str, seed: int = 0, number: int = 0) -> Task:
        if (name, seed, number) not in found:
            own = {"root": str(root)} if name == "embeddings" else {}
            found[name, seed, number] = load_task(name, seed=seed, **TINY[name], **own)
        task = found[name, seed, number]
        return replace(task, model=copy.deepcopy(task.model))

    return load


has_weights = pytest.mark.skipif(importlib.util.find_spec(PACKAGE) is None, reason="needs the extra 'embeddings'")


@pytest.fixture(
    params=["code-lm", "digits", pytest.param("embeddings", marks=has_weights)],
)
def task(request: pytest.FixtureRequest, loaded: Callable[..., Task]) -> Task:
    return loaded(request.param)


def first_samples(task: Task, count: int) -> Any:
    return task.collate([task.train[index] for index in range(count)])


def weights_of(task: Task) -> torch.Tensor:
    return torch.cat([p.detach().flatten() for p in task.model.parameters()])


def source_folder(root: Path, files: dict[str, str]) -> Path:
    for name, text in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text)
    return root


# ---- what is true of every task


def test_every_built_in_task_is_tested_here() -> None:
    assert set(task_names()) == set(TINY)


def test_a_task_is_the_same_for_the_same_seed_and_another_for_another(task: Task, loaded: Callable[..., Task]) -> None:
    torch.manual_seed(123)  # what happened before does not matter
    again, other = loaded(task.name, 0, 1), loaded(task.name, 1)
    assert torch.equal(weights_of(task), weights_of(again))
    assert torch.equal(weights_of(task), weights_of(other)) == (task.name in PRETRAINED)
    for one, two in zip(tensors(task.train[3]), tensors(again.train[3]), strict=True):
        assert torch.equal(one, two)


def test_loading_a_task_leaves_the_random_numbers_of_the_caller_alone() -> None:
    before = torch.get_rng_state()
    load_task("digits", width=2)
    assert torch.equal(before, torch.get_rng_state())


def test_the_loss_of_a_task_is_a_sum_with_its_count_or_of_all_outputs(task: Task) -> None:
    task.model.eval()  # BatchNorm would couple the halves
    batch = first_samples(task, 6)
    if task.encode is not None:
        accumulator_of(task, task.model).run(mb.Window([batch]))
        in_one_piece = gradients(task.model)
        clear(task.model)
        accumulator_of(task, task.model, micro_batch_size=4).run(batch)
        assert difference(gradients(task.model), in_one_piece) < 1e-4
        return
    whole = task.loss_fn(task.model, batch)
    halves = [task.loss_fn(task.model, part) for part in mb.Window([batch]).cut(4)]
    assert whole[1] == sum(count for _, count in halves)
    assert whole[0].item() == pytest.approx(sum(loss_sum.item() for loss_sum, _ in halves), rel=1e-5)


def test_a_task_learns(task: Task) -> None:
    optimizer = task.make_optimizer(task.model, task.learning_rate)
    accumulator = accumulator_of(task, task.model, micro_batch_size=8)
    losses = []
    for _ in range(10 if task.name in PRETRAINED else 40):
        report = accumulator.run(first_samples(task, 32))
        mb.apply_update(optimizer, report)
        losses.append(float(report.loss))
    assert losses[-1] < 0.9 * losses[0]


def test_metrics_of_a_task_are_sums_with_their_counts(task: Task) -> None:
    batch = first_samples(task, 5)
    seen = batch if task.encode is None else task.encode(task.model, batch)
    for name, metric in task.metrics.items():
        value, count = metric(task.model, seen)
        assert value.shape == (), name
        assert count >= 5


# ---- code-lm


def test_training_and_validation_files_are_disjoint_and_chosen_by_their_own_path_alone(tmp_path: Path) -> None:
    names = [f"package/module_{number}.py" for number in range(200)]
    root = source_folder(tmp_path, dict.fromkeys(names, "x = 1\n"))
    held_out = {path.as_posix() for path in source_files(root) if is_validation(path)}
    expected = {name for name in names if hashlib.sha256(name.encode()).digest()[0] < 0.05 * 256 - 1}
    assert expected <= held_out  # the first byte decides, but for one value of it
    assert 2 <= len(held_out) <= 25  # 5% of 200, give or take
    (root / names[0]).unlink()
    assert {path.as_posix() for path in source_files(root) if is_validation(path)} == held_out - {names[0]}


def test_tests_packages_and_large_files_are_left_out(tmp_path: Path) -> None:
    kept = {"a.py": "x", "b/c.py": "x", "just_right.py": "#" * MAX_FILE_BYTES}
    left_out = {
        "test/d.py": "x",
        "b/tests/e.py": "x",
        "idlelib/idle_test/f.py": "x",
        "site-packages/g.py": "x",
        "large.py": "#" * (MAX_FILE_BYTES + 1),
        "h.txt": "x",
    }
    root = source_folder(tmp_path, kept | left_out)
    assert [path.as_posix() for path in source_files(root)] == sorted(kept)


def test_no_byte_of_a_validation_file_is_trained_on(tmp_path: Path) -> None:
    names = [f"m{number}.py" for number in range(120)]
    contents = {name: chr(ord("b") if is_validation(Path(name)) else ord("a")) * 40 for name in names}
    root = source_folder(tmp_path, contents)
    task = load_task("code-lm", root=str(root), **TINY["code-lm"])
    seen = {name: {byte for i in range(len(data)) for byte in data[i].tolist()} for name, data in data_of(task).items()}
    assert seen == {"train": {ord("a"), 0}, "validation": {ord("b"), 0}}


def data_of(task: Task) -> dict[str, Any]:
    return {"train": task.train, "validation": task.validation}


def test_every_byte_but_the_first_is_predicted_once() -> None:
    data = ByteContexts(bytes(range(50)), context=7)
    assert len(data) == 7
    targets = torch.cat([data[index][1:] for index in range(len(data))])
    assert targets.tolist() == list(range(1, 50))
    with pytest.raises(IndexError, match="sample 7 of 7"):
        data[7]


def test_a_byte_is_predicted_from_earlier_bytes_only() -> None:
    task = load_task("code-lm", **TINY["code-lm"])
    tokens = torch.randint(256, (1, 16))
    changed = tokens.clone()
    changed[0, 9] = (changed[0, 9] + 1) % 256
    same = (task.model(tokens) == task.model(changed)).all(-1)[0]
    assert same[:9].all()
    assert not same[9:].any()  # the control: what comes after does change


def test_an_untrained_model_needs_eight_bits_for_a_byte() -> None:
    task = load_task("code-lm", d_model=16, num_layers=1, num_heads=2, context=32)
    bits, count = task.metrics["bits per byte"](task.model, first_samples(task, 8))
    assert bits.item() / count == pytest.approx(8, abs=0.2)


def test_a_folder_without_enough_source_is_an_error_that_says_what_was_found(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"0 Python files in .* give 0 samples to train"):
        load_task("code-lm", root=str(tmp_path / "nowhere"))


def test_sizes_that_no_model_can_have_are_errors() -> None:
    with pytest.raises(ValueError, match="multiple of num_heads, got 10 and 4"):
        load_task("code-lm", d_model=10)
    with pytest.raises(ValueError, match="num_layers must be at least 1, got 0"):
        load_task("code-lm", num_layers=0)
    with pytest.raises(ValueError, match="validation_share must be between 0 and 1"):
        load_task("digits", validation_share=1.0)
    with pytest.raises(ValueError, match=r"momentum must be at least 0, got -1\.0"):
        load_task("digits", momentum=-1.0)
    with pytest.raises(ValueError, match=r"weight_decay must be at least 0, got -0\.1"):
        load_task("code-lm", weight_decay=-0.1)
    with pytest.raises(ValueError, match="dropout must be at least 0 and below 1, got 2"):
        load_task("embeddings", dropout=2)


# ---- digits


def test_digits_are_split_the_same_way_for_every_seed_into_images_that_differ() -> None:
    one, two = (load_task("digits", seed=seed, width=2) for seed in (0, 1))
    assert len(one.train) + len(one.validation) == 1797
    held_out = default_collate([one.validation[i] for i in range(len(one.validation))])
    assert torch.equal(held_out[0], default_collate([two.validation[i] for i in range(len(two.validation))])[0])
    assert 0.0 <= held_out[0].min() < held_out[0].max() <= 1.0


def test_without_scikit_learn_the_error_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "sklearn.datasets", None)
    with pytest.raises(ModuleNotFoundError, match=r"pip install -e '\.\[tasks\]'"):
        load_task("digits")


def test_the_names_of_tasks_are_known_without_the_libraries_of_any_of_them() -> None:
    code = "import sys; from macrobatch.tasks import task_names; task_names(); print(*sys.modules)"
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split()
    assert "macrobatch.tasks.embeddings" in found
    assert not {"transformers", "tokenizers", "sklearn", PACKAGE} & set(found)


# ---- embeddings


def rows_of(tokens: Any) -> list[np.ndarray]:
    return [np.full((len(ids), 2), sum(ids), dtype=np.float16) for ids in tokens]


def counted_pairs(count: int, *, max_tokens: int = 7) -> tuple[EncodedPairs, list[int]]:
    """Pairs of texts of differing length, and how many texts went through the layers in each forward."""
    forwards: list[int] = []

    def layers(tokens: Any) -> list[np.ndarray]:
        forwards.append(len(tokens))
        return rows_of(tokens)

    tokens = {"docstring": [[j] * (1 + j % 7) for j in range(count)], "source": [[1, j] for j in range(count)]}
    return EncodedPairs(tokens, layers, max_tokens), forwards


def test_what_frozen_layers_give_is_computed_of_the_block_that_is_asked_for_and_once() -> None:
    data, forwards = counted_pairs(3 * BLOCK + 5)
    assert (len(data), forwards) == (3 * BLOCK + 5, [])
    for _ in range(2):
        sample = data[BLOCK + 3]
        assert (sum(forwards), max(forwards)) == (2 * BLOCK, TEXTS_AT_ONCE)
    length = 1 + (BLOCK + 3) % 7
    assert (int(sample["docstring_length"]), sample["docstring"].shape) == (length, (7, 2))
    assert sample["docstring"][:, 0].tolist() == [(BLOCK + 3) * length] * length + [0] * (7 - length)
    assert sample["source"][0, 0] == 1 + BLOCK + 3
    with pytest.raises(IndexError, match=f"pair {len(data)} of {len(data)}"):
        data[len(data)]


def test_preparing_computes_every_pair_once_tells_how_far_it_is_and_lets_the_layers_go() -> None:
    one, forwards_of_one = counted_pairs(BLOCK + 5)
    two, forwards_of_two = counted_pairs(3)
    before, told = one[2], list[tuple[int, int]]()
    layers = weakref.ref(one._layers)  # type: ignore[arg-type]  # not None yet
    computing(one, two)(lambda done, total: told.append((done, total)))
    assert told == [(BLOCK, BLOCK + 8), (BLOCK + 5, BLOCK + 8), (BLOCK + 8, BLOCK + 8)]
    assert (sum(forwards_of_one), sum(forwards_of_two)) == (2 * BLOCK + 10, 6)
    assert all(torch.equal(one[2][name], value) for name, value in before.items())
    assert layers() is None


@has_weights
def test_padding_changes_no_embedding_and_no_shape_depends_on_the_lengths(loaded: Callable[..., Task]) -> None:
    model = loaded("embeddings").model.double()
    lengths = torch.tensor([3, 9, 5, 1])
    hidden = torch.randn(4, 12, 384, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    trimmed, whole = (model(rows, lengths) for rows in (hidden[:, : int(lengths.max())], hidden))
    assert (trimmed - whole).abs().max() <= 1e-12
    for j, length in enumerate(lengths.tolist()):
        assert (model(hidden[j : j + 1, :length], lengths[j : j + 1]) - whole[j]).abs().max() <= 1e-12
    other = model(hidden, lengths + 1)  # the control: another token does change it
    assert ((other - whole).abs().amax(1) > 1e-4).all()
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        assert model(mode.from_tensor(hidden), mode.from_tensor(lengths)).shape == (4, 384)


@has_weights
def test_a_folder_of_ones_own_is_named_in_what_the_task_says_of_itself(loaded: Callable[..., Task]) -> None:
    said = loaded("embeddings").description
    assert "functions of Python source in " in said
    assert "standard library" not in said


# ---- names and options


def own_module(folder: Path, monkeypatch: pytest.MonkeyPatch, text: str) -> str:
    """The name of a new module on the path with this text."""
    name = f"own_task_{hashlib.sha256(text.encode()).hexdigest()[:8]}"
    (folder / f"{name}.py").write_text(text)
    monkeypatch.syspath_prepend(str(folder))
    return name


OWN = """
import torch
from torch import nn
from macrobatch.tasks import Task

def loss_fn(model, micro_batch):
    inputs, targets = micro_batch
    return (model(inputs) - targets).pow(2).sum(), len(inputs)

def line(*, slope=2.0, steep=False, **others):
    data = [(torch.tensor([x / 8]), torch.tensor([slope * x / 8])) for x in range(8)]
    return Task(
        name="line", model=nn.Linear(1, 1), loss_fn=loss_fn, train=data, validation=data[:2],
        make_optimizer=lambda model, lr: torch.optim.SGD(model.parameters(), lr), learning_rate=0.1, base_batch_size=4,
    )

def nothing():
    return 3
"""


def test_a_task_of_ones_own_is_found_by_module_and_function(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    name = own_module(tmp_path, monkeypatch, OWN)
    task = load_task(f"{name}:line", slope=3)
    assert task.name == "line"
    assert task.train[4][1].item() == 1.5
    assert torch.equal(weights_of(task), weights_of(load_task(f"{name}:line", colour="red")))


@pytest.mark.parametrize(
    ("task_name", "options", "message"),
    [
        (
            "code-ml",
            {},
            r"there is no task 'code-ml'. Did you mean code-lm\? Built-in tasks: code-lm, digits, embeddings",
        ),
        (
            "cats",
            {},
            "there is no task 'cats'. Built-in tasks: code-lm, digits, embeddings; your own is written package.module:",
        ),
        (":f", {}, "there is no task ':f'"),
        ("{own}:circle", {}, "has no function 'circle'; it has: line, loss_fn, nothing"),
        ("{own}:nothing", {}, "returned a value of type int; a macrobatch.tasks.Task is needed"),
        ("{own}:line", {"slope": "steep"}, r"option slope takes a value such as 2.0, got 'steep' \(str\)"),
        ("{own}:line", {"steep": 1}, r"option steep takes a value such as False, got 1 \(int\)"),
        ("code-lm", {"depth": 3}, "task 'code-lm' has no option 'depth'; its options: d_model, num_layers,"),
        ("code-lm", {"d_model": 64.5}, r"option d_model takes a value such as 64, got 64.5 \(float\)"),
        ("code-lm", {"d_model": True}, "option d_model takes a value such as 64, got True"),
    ],
)
def test_a_wrong_name_or_option_is_an_error_that_lists_what_there_is(
    task_name: str, options: dict[str, Any], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    own = own_module(tmp_path, monkeypatch, OWN)
    with pytest.raises(ValueError, match=message):
        load_task(task_name.format(own=own), **options)


def test_a_module_that_is_not_there_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ModuleNotFoundError, match=r"cannot import 'no_such.module': no module 'no_such' on the Python"):
        load_task("no_such.module:f")
    # The control: a module that is there and lacks something itself keeps its own error.
    own = own_module(tmp_path, monkeypatch, "import also_not_there")
    with pytest.raises(ModuleNotFoundError, match=r"^No module named 'also_not_there'$"):
        load_task(f"{own}:f")


@pytest.mark.parametrize(
    ("text", "option"),
    [
        ("d_model=64", ("d_model", 64)),
        ("weight_decay=0.1", ("weight_decay", 0.1)),
        ("flag=True", ("flag", True)),
        ("root=some/folder", ("root", "some/folder")),
        ("text=a=b", ("text", "a=b")),
        ("sizes=[1, 2]", ("sizes", [1, 2])),
    ],
)
def test_a_task_option_is_a_name_and_a_python_value(text: str, option: tuple[str, Any]) -> None:
    assert parse_task_option(text) == option


@pytest.mark.parametrize("text", ["d_model", "=3", "d-model=3"])
def test_what_is_no_task_option_is_an_error(text: str) -> None:
    with pytest.raises(ValueError, match="a task option is written name=value, such as d_model=64; got"):
        parse_task_option(text)


# ---- the value


class Stream(IterableDataset[int]):
    """Data without a length."""

    def __iter__(self) -> Any:
        return iter(range(3))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model": nn.Linear}, "model must be a torch.nn.Module, got type"),
        ({"loss_fn": "mse"}, "loss_fn must be a function, got str"),
        ({"prepare": 3}, "prepare must be a function, got int"),
        ({"metrics": {"accuracy": 0.5}}, "accuracy must be a function, got float"),
        ({"train": []}, "the train data is empty"),
        ({"validation": Stream()}, "validation data is a Stream without a length; a map-style dataset is needed"),
        ({"learning_rate": 0.0}, "learning_rate must be above 0, got 0.0"),
        ({"micro_batch_size": -1}, "micro_batch_size must be above 0, got -1"),
    ],
)
def test_a_task_that_cannot_train_is_an_error(change: dict[str, Any], message: str) -> None:
    make: Callable[..., Task] = replace
    task = load_task("digits", width=2)
    with pytest.raises(ValueError, match=message):
        make(task, **change)


class Scaled(nn.Module):
    """A function with a temperature of its own, learned or not, and class weights."""

    def __init__(self, *, learned: bool = True) -> None:
        super().__init__()
        self.log_scale = nn.Parameter(torch.tensor(1.0), requires_grad=learned)
        self.register_buffer("class_weights", torch.ones(3))

    def forward(self, model: nn.Module, micro_batch: Any) -> Any:
        """The loss, scaled."""
        return model(micro_batch[0]).sum() * self.log_scale.exp(), len(micro_batch[0])

    method = forward


@pytest.mark.parametrize("method", [False, True])
@pytest.mark.parametrize("field", ["loss_fn", "encode", "metrics"])
def test_what_learns_outside_of_the_model_is_an_error_and_constants_are_not(field: str, method: bool) -> None:
    make: Callable[..., Task] = replace
    task = load_task("digits", width=2)

    def with_module(module: Scaled) -> Task:
        function = module.method if method else module
        return make(task, **{field: {"scale": function} if field == "metrics" else function})

    name = "scale" if field == "metrics" else field
    with pytest.raises(
        ValueError,
        match=rf"task 'digits': {name} has a trainable parameter of its own, log_scale; what learns belongs into the "
        r"task's model, because every run of a comparison trains a copy of the model: make it model\.log_scale",
    ):
        with_module(Scaled())
    frozen = with_module(Scaled(learned=False))
    assert list(frozen.modules) == [name]
    place_constants(frozen, torch.device("meta"))
    module = frozen.modules[name]
    assert {tensor.device.type for tensor in [*module.parameters(), *module.buffers()]} == {"meta"}
    assert next(frozen.model.parameters()).device.type == "cpu"
