"""python examples/policy_two_denominators.py: a policy gradient averaged over tokens, and a KL term over sequences.

A policy continues the first letters of module names, rewarded for the share of letters in what it writes. Its loss is a
mean over tokens; the KL divergence from the policy it started as is a mean over sequences. `count=` tells both numbers.
"""

import copy
import string
import sys

import torch
from torch import Tensor, nn

import macrobatch as mb

ALPHABET = "\n" + string.printable[:95]  # token 0 ends a sequence
PROMPT, LENGTH, KL_FACTOR = 2, 12, 0.01
Batch = dict[str, Tensor]  # tokens (B, T); of each token after the first (B, T - 1): mask, advantages, reference


class Policy(nn.Module):
    """A small recurrent network over the 96 tokens of ALPHABET."""

    def __init__(self, width: int = 32) -> None:
        super().__init__()
        self.embedding, self.memory = nn.Embedding(96, width), nn.GRU(width, width, batch_first=True)
        self.head = nn.Linear(width, 96)
        self.head.bias.data[0] = 2.0  # at first about one token in fourteen ends a sequence

    def forward(self, tokens: Tensor) -> Tensor:
        """Logits (B, T, 96) for the token after each of (B, T)."""
        return self.head(self.memory(self.embedding(tokens))[0])


def log_probs_of(policy: nn.Module, tokens: Tensor) -> Tensor:
    return policy(tokens[:, :-1]).log_softmax(-1).gather(-1, tokens[:, 1:, None]).squeeze(-1)


@torch.no_grad()
def rollout(policy: Policy, reference: Policy, num_sequences: int) -> tuple[Batch, float]:
    """What the policy writes after the prompts, and its mean reward; the advantage is over the others of the batch."""
    names = sorted(name for name in sys.stdlib_module_names if len(name) >= PROMPT) * num_sequences
    tokens = torch.tensor([[ALPHABET.index(letter) for letter in name[:PROMPT]] for name in names[:num_sequences]])
    for _ in range(LENGTH):
        following = torch.multinomial(policy(tokens)[:, -1].softmax(-1), 1)
        tokens = torch.cat([tokens, following.masked_fill((tokens == 0).any(1, keepdim=True), 0)], dim=1)
    mask = (tokens[:, :-1] != 0).cumprod(1).bool()
    mask[:, : PROMPT - 1] = False  # the prompt was not written by the policy
    texts = ["".join(ALPHABET[token] for token in row[PROMPT:] if token) for row in tokens.tolist()]
    rewards = torch.tensor([sum(map(str.isalpha, text)) / max(len(text), 1) for text in texts])
    advantages = ((rewards - rewards.mean()) / rewards.std())[:, None].expand(mask.shape)
    batch = {"tokens": tokens, "mask": mask, "advantages": advantages, "reference": log_probs_of(reference, tokens)}
    return batch, float(rewards.mean())


def losses(policy: Policy, batch: Batch) -> dict[str, Tensor]:
    log_probs, mask = log_probs_of(policy, batch["tokens"]), batch["mask"]
    gap = batch["reference"] - log_probs  # exp(x) - x - 1 of it estimates the KL divergence without bias
    return {"policy": -(batch["advantages"] * log_probs)[mask].sum(), "kl": KL_FACTOR * (gap.expm1() - gap)[mask].sum()}


def count(batch: Batch) -> dict[str, Tensor | int]:
    return {"policy": batch["mask"].sum(), "kl": len(batch["mask"])}


def main(updates: int = 40) -> None:
    torch.manual_seed(0)
    reference = copy.deepcopy(policy := Policy())
    optimizer = torch.optim.Adam(policy.parameters(), lr=1e-2)
    accumulator = mb.Accumulator(policy, losses, micro_batch_size=48, count=count)
    for update in range(1, updates + 1):
        batch, reward = rollout(policy, reference, num_sequences=256)
        report = accumulator.run(batch)
        mb.apply_update(optimizer, report, max_norm=1.0)
        if update % 10 == 0:
            print(f"update {update}  share of letters {reward:.2f}  {int(report.loss_weight['policy'])} tokens")


if __name__ == "__main__":
    main()
