"""Small models whose memory is predicted and measured, each with its loss and a batch of any size."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

VOCABULARY, LENGTH = 64, 64


class Block(nn.Module):
    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.mlp = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))

    def forward(self, x: Tensor) -> Tensor:
        b, t, d = x.shape
        q, k, v = self.qkv(self.norm1(x)).view(b, t, 3, self.heads, d // self.heads).permute(2, 0, 3, 1, 4)
        attended = F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).reshape(b, t, d)
        x = x + self.out(attended)
        return x + self.mlp(self.norm2(x))


class Decoder(nn.Module):
    """A causal language model; `reentrant`: how its blocks are checkpointed, None for not at all."""

    def __init__(self, layers: int = 2, width: int = 64, reentrant: bool | None = None) -> None:
        super().__init__()
        self.tokens = nn.Embedding(VOCABULARY, width)
        self.positions = nn.Parameter(torch.zeros(LENGTH, width))
        self.blocks = nn.ModuleList(Block(width, 4) for _ in range(layers))
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, VOCABULARY)
        self.reentrant = reentrant

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.tokens(tokens) + self.positions
        for block in self.blocks:
            x = block(x) if self.reentrant is None else checkpoint(block, x, use_reentrant=self.reentrant)
        return self.head(self.norm(x))


def token_loss(model: nn.Module, batch: Any) -> tuple[Tensor, int]:
    outputs = model(batch["tokens"])
    logits = getattr(outputs, "logits", outputs)
    return F.cross_entropy(logits.flatten(0, 1), batch["labels"].flatten(), reduction="sum"), batch["labels"].numel()


def class_loss(model: nn.Module, batch: Any) -> tuple[Tensor, int]:
    outputs = model(batch["inputs"])
    logits = getattr(outputs, "logits", outputs)
    return F.cross_entropy(logits, batch["classes"], reduction="sum"), len(batch["classes"])


def token_batch(n: int) -> dict[str, Tensor]:
    return {key: torch.zeros(n, LENGTH, dtype=torch.long) for key in ("tokens", "labels")}


def sentence_batch(n: int) -> dict[str, Tensor]:
    return {"inputs": torch.zeros(n, LENGTH, dtype=torch.long), "classes": torch.zeros(n, dtype=torch.long)}


def image_batch(n: int) -> dict[str, Tensor]:
    return {"inputs": torch.zeros(n, 3, 32, 32), "classes": torch.zeros(n, dtype=torch.long)}


def conv_net() -> nn.Module:
    first = (nn.Conv2d(3, 16, 3, padding=1), nn.BatchNorm2d(16), nn.ReLU(), nn.MaxPool2d(2))
    second = (nn.Conv2d(16, 32, 3, padding=1), nn.BatchNorm2d(32), nn.ReLU(inplace=True))
    return nn.Sequential(*first, *second, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(32, 10))


def gpt2() -> nn.Module:
    from transformers import GPT2Config, GPT2LMHeadModel

    size = {"n_embd": 64, "n_layer": 2, "n_head": 4, "n_positions": LENGTH}
    config = GPT2Config(vocab_size=VOCABULARY, bos_token_id=0, eos_token_id=0, **size)
    return GPT2LMHeadModel(config).train()


def bert() -> nn.Module:
    from transformers import BertConfig, BertForSequenceClassification

    size = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 128}
    config = BertConfig(vocab_size=VOCABULARY, max_position_embeddings=LENGTH, num_labels=4, **size)
    return BertForSequenceClassification(config).train()


def resnet(wide: bool = True) -> nn.Module:
    """`wide`: most of its memory is in the first, wide layer; else spread over convolutions, as in ResNet-18."""
    from transformers import ResNetConfig, ResNetForImageClassification

    size = {"embedding_size": 64, "hidden_sizes": [16, 16, 16], "depths": [2, 2, 2]}
    if not wide:
        size = {"embedding_size": 16, "hidden_sizes": [16, 32, 64], "depths": [1, 1, 1]}
    return ResNetForImageClassification(ResNetConfig(layer_type="basic", num_labels=10, **size)).train()


@dataclass(frozen=True)
class Case:
    """What is trained: `build()` makes the model, `batch(n)` n samples."""

    build: Callable[[], nn.Module]
    loss_fn: Callable[[Any, Any], Any]
    batch: Callable[[int], Any]

    @cache  # noqa: B019
    def model(self) -> nn.Module:
        """One and the same model: tests must leave it as it was."""
        torch.manual_seed(0)
        return self.build()


CASES = {
    "transformer": Case(Decoder, token_loss, token_batch),
    "transformer, non-reentrant checkpointing": Case(lambda: Decoder(reentrant=False), token_loss, token_batch),
    "transformer, reentrant checkpointing": Case(lambda: Decoder(reentrant=True), token_loss, token_batch),
    "conv net with BatchNorm": Case(conv_net, class_loss, image_batch),
    "GPT-2": Case(gpt2, token_loss, token_batch),
    "BERT": Case(bert, class_loss, sentence_batch),
    "ResNet": Case(resnet, class_loss, image_batch),
}
