"""python examples/multi_task.py: two tasks on one trunk, each with its own mask and its own denominator.

One digit in five has a label; the loss of naming it is a mean over labelled digits. Of every image some pixels are
hidden, from a few to most; the loss of filling them in is a mean over hidden pixels. Micro-batches differ in how many
they hold of both, and some hold no label at all. `count=` tells both denominators before the first forward.
"""

import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import macrobatch as mb

UNLABELLED = -100
Batch = list[Tensor]  # images (B, 64) in 0..1, labels (B,) or UNLABELLED, which pixels are hidden (B, 64)


class TwoHeads(nn.Module):
    """A trunk that sees the pixels left, and the mask; one head for the digit, one for the hidden pixels."""

    def __init__(self, width: int = 128) -> None:
        super().__init__()
        self.trunk = nn.Sequential(nn.Linear(128, width), nn.ReLU(), nn.Linear(width, width), nn.ReLU())
        self.digit, self.pixels = nn.Linear(width, 10), nn.Linear(width, 64)

    def forward(self, images: Tensor, hidden: Tensor) -> tuple[Tensor, Tensor]:
        """Logits (B, 10) and pixels (B, 64)."""
        features = self.trunk(torch.cat([images.masked_fill(hidden, 0.0), hidden.to(images.dtype)], dim=1))
        return self.digit(features), self.pixels(features)


def data(dtype: torch.dtype = torch.float32) -> TensorDataset:
    digits = load_digits()
    images, labels = torch.tensor(digits.data / 16, dtype=dtype), torch.tensor(digits.target)
    unlabelled = torch.rand(len(labels)) < 0.8
    hidden = torch.rand(images.shape) < torch.rand(len(images), 1)  # a few pixels of one image, most of another
    return TensorDataset(images, labels.masked_fill(unlabelled, UNLABELLED), hidden)


def losses(model: nn.Module, batch: Batch) -> dict[str, Tensor]:
    images, labels, hidden = batch
    logits, pixels = model(images, hidden)
    return {
        "digit": F.cross_entropy(logits, labels, ignore_index=UNLABELLED, reduction="sum"),
        "pixels": ((pixels - images) ** 2)[hidden].sum() * 10.0,  # a factor is part of the loss, not of its count
    }


def count(batch: Batch) -> dict[str, Tensor]:
    _, labels, hidden = batch
    return {"digit": mb.valid_tokens(labels, ignore_index=UNLABELLED), "pixels": hidden.sum()}


def main(epochs: int = 20) -> None:
    torch.manual_seed(0)
    model = TwoHeads()
    optimizer = torch.optim.Adam(model.parameters(), lr=2e-3)
    accumulator = mb.Accumulator(model, losses, micro_batch_size=16, count=count)
    dataset = data()
    for epoch in range(epochs):
        for batch in DataLoader(dataset, batch_size=128, shuffle=True):
            report = accumulator.run(batch)
            mb.apply_update(optimizer, report, max_norm=1.0)
        if (epoch + 1) % 5 == 0:
            report = accumulator.evaluate(dataset.tensors)
            means = "  ".join(f"{name} {float(mean):.3f}" for name, mean in report.metrics.items())
            print(f"epoch {epoch + 1:3}  loss {float(report.loss):.3f}  {means}")


if __name__ == "__main__":
    main()
