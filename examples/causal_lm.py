"""python examples/causal_lm.py: a GPT-2 of transformers on padded text, accumulated as a mean over valid tokens.

The text is the standard library's own source, one definition to a sample, its bytes the tokens. Batches are what a
tokenizer gives: a `BatchEncoding` with `attention_mask` and labels of -100 where padded. Cross-entropy is taken on the
logits: the model's own `.loss` is a mean over the micro-batch's valid tokens, which does not add up, and is computed in
float32 whatever the model's dtype. Returned bare, it is an error in the first window.
"""

import ast
import functools
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader
from transformers import BatchEncoding, GPT2Config, GPT2LMHeadModel

import macrobatch as mb

PADDING, CONTEXT = -100, 128


def definitions(num_samples: int) -> list[bytes]:
    """Functions and classes of the standard library, each cut off after CONTEXT bytes."""
    found: list[bytes] = []
    for path in sorted(Path(ast.__file__).parent.glob("*.py")):
        text = path.read_text(encoding="utf-8")
        found += [
            f"{ast.get_source_segment(text, node)}\n".encode()[:CONTEXT]
            for node in ast.parse(text).body
            if isinstance(node, ast.FunctionDef | ast.ClassDef)
        ]
        if len(found) >= num_samples:
            break
    return found[:num_samples]


def collate(samples: list[bytes]) -> BatchEncoding:
    """input_ids, attention_mask and labels, each (B, T), padded on the right to the longest sample."""
    rows = [torch.tensor(list(sample)) for sample in samples]
    pad = functools.partial(nn.utils.rnn.pad_sequence, batch_first=True)
    labels = pad(rows, padding_value=PADDING)
    return BatchEncoding({"input_ids": pad(rows), "attention_mask": (labels != PADDING).long(), "labels": labels})


def tiny_gpt2() -> GPT2LMHeadModel:
    """Random weights, no dropout: a loss that draws no random numbers is the same however it is cut."""
    return GPT2LMHeadModel(GPT2Config(
        vocab_size=256, n_positions=CONTEXT, n_embd=48, n_layer=2, n_head=4, resid_pdrop=0, embd_pdrop=0, attn_pdrop=0,
        bos_token_id=0, eos_token_id=0,
    ))  # fmt: skip


def next_byte_loss(model: nn.Module, batch: BatchEncoding) -> tuple[Tensor, Tensor]:
    logits = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits  # (B, T, 256)
    loss_sum = F.cross_entropy(logits[:, :-1].flatten(0, 1), batch["labels"][:, 1:].flatten(), reduction="sum")
    return loss_sum, mb.valid_tokens(batch["labels"], shifted=True)


def main(epochs: int = 3, num_samples: int = 400) -> None:
    torch.manual_seed(0)
    model = tiny_gpt2()
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    accumulator = mb.Accumulator(model, next_byte_loss, micro_batch_size=16)
    for epoch in range(epochs):
        for batch in DataLoader(definitions(num_samples), batch_size=64, shuffle=True, collate_fn=collate):
            report = accumulator.run(batch)
            update = mb.apply_update(optimizer, report, max_norm=1.0)
        tokens, norm = int(report.loss_weight), float(update.grad_norm)
        print(
            f"epoch {epoch + 1}  nats per byte {float(report.loss):.3f}  over {tokens} bytes  gradient norm {norm:.2f}"
        )


if __name__ == "__main__":
    main()
