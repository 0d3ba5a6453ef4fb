"""`code-lm`: a byte-level decoder Transformer on the source of the Python standard library, which every machine has."""

import hashlib
import sysconfig
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim import AdamW
from torch.utils.data import Dataset

from macrobatch.tasks.task import SumAndCount, Task

NUM_BYTES = 256
MAX_FILE_BYTES = 200_000  # above this: tables and documentation texts rather than code
VALIDATION_SHARE = 0.05
LEFT_OUT = frozenset({"test", "tests", "idle_test", "site-packages", "dist-packages", "__pycache__"})


def code_lm(
    *,
    d_model: int = 64,
    num_layers: int = 2,
    num_heads: int = 4,
    context: int = 128,
    weight_decay: float = 0.01,
    root: str | None = None,
) -> Task:
    """The task: predict each byte of a file of source code from at most `context` bytes before it.

    `root`: the folder of Python files to learn from; the standard library's own where not given.
    """
    _check_sizes(d_model=d_model, num_layers=num_layers, num_heads=num_heads, context=context)
    if not weight_decay >= 0:
        raise ValueError(f"code-lm: weight_decay must be at least 0, got {weight_decay}")
    folder = Path(root) if root is not None else Path(sysconfig.get_paths()["stdlib"])
    train, validation, num_files = _read_source(folder, context)
    layers = "1 layer" if num_layers == 1 else f"{num_layers} layers"
    return Task(
        name="code-lm",
        model=ByteTransformer(d_model, num_layers, num_heads, context),
        loss_fn=next_byte_loss,
        train=train,
        validation=validation,
        make_optimizer=lambda model, lr: AdamW(model.parameters(), lr=lr, weight_decay=weight_decay),
        learning_rate=2e-3,
        base_batch_size=128,
        metrics={"bits per byte": bits_per_byte, "accuracy": next_byte_accuracy},
        description=(
            f"byte-level decoder Transformer, d={d_model}, {layers}, context {context}, on {num_files} "
            f"files of {'Python source in ' + root if root else 'the Python standard library'}: "
            f"{train.num_bytes / 1e6:.1f} MB to train, {validation.num_bytes / 1e6:.1f} MB for validation"
        ),
    )


# ------------------------------------------------------------------------------------------------ the data
class ByteContexts(Dataset[Tensor]):
    """Consecutive pieces of a text: sample i has shape (context + 1,), uint8, and starts where sample i - 1 ended.

    Each sample is a copy: a view would count as the whole text wherever the memory of tensors is measured or limited.
    """

    def __init__(self, text: bytes, context: int) -> None:
        # One byte more than the context: inputs are the first `context` bytes, targets the last.
        self.context = context
        self.num_bytes = len(text)
        self._bytes = np.frombuffer(text, dtype=np.uint8)

    def __len__(self) -> int:
        return max(self.num_bytes - 1, 0) // self.context

    def __getitem__(self, index: int) -> Tensor:
        if not 0 <= index < len(self):
            raise IndexError(f"sample {index} of {len(self)}")
        start = index * self.context
        return torch.from_numpy(self._bytes[start : start + self.context + 1].copy())


def source_files(root: Path) -> list[Path]:
    """The Python files below `root` to learn from, as sorted relative paths: no tests, none over 200 kB."""
    relative = (path.relative_to(root) for path in root.rglob("*.py"))
    return sorted(
        path for path in relative if LEFT_OUT.isdisjoint(path.parts) and (root / path).stat().st_size <= MAX_FILE_BYTES
    )


def is_validation(path: Path) -> bool:
    """Whether a file is held out: decided by a hash of its relative path, so that it never depends on other files."""
    digest = hashlib.sha256(path.as_posix().encode()).digest()
    return int.from_bytes(digest[:8], "big") < VALIDATION_SHARE * 2**64


def _read_source(root: Path, context: int) -> tuple[ByteContexts, ByteContexts, int]:
    files = source_files(root) if root.is_dir() else []
    texts = {True: bytearray(), False: bytearray()}
    for path in files:
        texts[is_validation(path)] += (root / path).read_bytes() + b"\0"  # a zero byte: here a file ends
    train, validation = (ByteContexts(bytes(texts[held_out]), context) for held_out in (False, True))
    if len(train) == 0 or len(validation) == 0:
        raise ValueError(
            f"{len(files)} Python files in {root} give {len(train)} samples to train and {len(validation)} to "
            "validate; at least one of each is needed: give another folder, root=FOLDER, or a smaller context"
        )
    return train, validation, len(files)


# ------------------------------------------------------------------------------------------------ the model
class Block(nn.Module):
    """Causal self-attention and a feed-forward network, each behind a LayerNorm and added to its input: (B, T, d)."""

    def __init__(self, d_model: int, num_heads: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.attention_norm = nn.LayerNorm(d_model)
        self.query_key_value = nn.Linear(d_model, 3 * d_model)
        self.attention_out = nn.Linear(d_model, d_model)
        self.feed_forward = nn.Sequential(
            nn.LayerNorm(d_model), nn.Linear(d_model, 4 * d_model), nn.GELU(), nn.Linear(4 * d_model, d_model)
        )

    def forward(self, x: Tensor) -> Tensor:
        """The same shape, (B, T, d)."""
        x = x + self.attention_out(self._attend(self.attention_norm(x)))
        return x + self.feed_forward(x)  # type: ignore[no-any-return]  # a torch module returns Any

    def _attend(self, x: Tensor) -> Tensor:
        split = self.query_key_value(x).unflatten(-1, (3, self.num_heads, -1))  # (B, T, 3, heads, d / heads)
        query, key, value = split.permute(2, 0, 3, 1, 4)  # each (B, heads, T, d / heads)
        return F.scaled_dot_product_attention(query, key, value, is_causal=True).transpose(1, 2).flatten(2)


class ByteTransformer(nn.Module):
    """Logits for the byte that follows each byte: (B, T) integers to (B, T, 256)."""

    def __init__(self, d_model: int, num_layers: int, num_heads: int, context: int) -> None:
        super().__init__()
        self.byte = nn.Embedding(NUM_BYTES, d_model)
        self.position = nn.Embedding(context, d_model)
        self.blocks = nn.Sequential(*[Block(d_model, num_heads) for _ in range(num_layers)])
        self.out = nn.Sequential(nn.LayerNorm(d_model), nn.Linear(d_model, NUM_BYTES))
        self.apply(_small_weights)

    def forward(self, tokens: Tensor) -> Tensor:
        """Logits of shape (B, T, 256) for `tokens` of shape (B, T)."""
        x = self.byte(tokens) + self.position.weight[: tokens.shape[1]]
        return self.out(self.blocks(x))  # type: ignore[no-any-return]  # a torch module returns Any


def _small_weights(module: nn.Module) -> None:
    # GPT-2's start: every weight from N(0, 0.02), so that the first loss is ln 256 = 5.55.
    if isinstance(module, nn.Linear | nn.Embedding):
        nn.init.normal_(module.weight, std=0.02)


# ------------------------------------------------------------------------------------------------ loss and metrics
def next_byte_loss(model: nn.Module, pieces: Tensor) -> SumAndCount:
    """Cross-entropy of every next byte in nats, summed, and the number of bytes; `pieces`: (B, context + 1)."""
    logits, targets = _predict(model, pieces)
    return F.cross_entropy(logits, targets, reduction="sum"), targets.numel()


def bits_per_byte(model: nn.Module, pieces: Tensor) -> SumAndCount:
    """Cross-entropy in bits: what a compressor with this model would need for a byte."""
    loss_sum, num_bytes = next_byte_loss(model, pieces)
    return loss_sum / torch.log(torch.tensor(2.0)).item(), num_bytes


def next_byte_accuracy(model: nn.Module, pieces: Tensor) -> SumAndCount:
    """The bytes whose most likely prediction was right, and the number of bytes."""
    logits, targets = _predict(model, pieces)
    return (logits.argmax(-1) == targets).sum(), targets.numel()


def _predict(model: nn.Module, pieces: Tensor) -> tuple[Tensor, Tensor]:
    tokens = pieces.long()  # here rather than in the data: a sample waits as 129 bytes instead of 2 kB
    return model(tokens[:, :-1]).flatten(0, 1), tokens[:, 1:].flatten()


def _check_sizes(*, d_model: int, num_layers: int, num_heads: int, context: int) -> None:
    given = {"d_model": d_model, "num_layers": num_layers, "num_heads": num_heads, "context": context}
    for name, value in given.items():
        if value < 1:
            raise ValueError(f"code-lm: {name} must be at least 1, got {value}")
    if d_model % num_heads:
        raise ValueError(f"code-lm: d_model must be a multiple of num_heads, got {d_model} and {num_heads}")
