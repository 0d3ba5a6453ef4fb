"""python examples/existing_loop.py: a loop that owns forward and backward, before and after.

The loop predicts the next byte in lines of Python source. Its loader pads each micro-batch to its longest line, so that
micro-batches differ in how many bytes they predict, and the last window of an epoch is short. `before` is as usual;
`after` keeps its forward, its backward and its optimizer, and takes from the window which micro-batches form an update
and what each counts for. Nothing of the loop is hidden: a second backward or a print fits in where it did.
"""

import inspect

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader

import macrobatch as mb

PADDING = -100


class NextByte(nn.Module):
    """A small recurrent network over bytes."""

    def __init__(self, width: int = 32) -> None:
        super().__init__()
        self.embedding, self.memory = nn.Embedding(256, width), nn.GRU(width, width, batch_first=True)
        self.head = nn.Linear(width, 256)

    def forward(self, tokens: Tensor) -> Tensor:
        """Logits (B, 256, T) for the byte after each of (B, T)."""
        return self.head(self.memory(self.embedding(tokens))[0]).transpose(1, 2)


def collate(lines: list[str]) -> tuple[Tensor, Tensor]:
    """Inputs (B, T) and targets (B, T), padded to the longest of these lines."""
    rows = [torch.tensor(list(line.encode())) for line in lines]
    targets = nn.utils.rnn.pad_sequence([row[1:] for row in rows], batch_first=True, padding_value=PADDING)
    return nn.utils.rnn.pad_sequence([row[:-1] for row in rows], batch_first=True), targets


def loader(num_lines: int, micro_batch_size: int = 16) -> DataLoader[str]:
    lines = [line for line in inspect.getsource(inspect).splitlines() if len(line) > 1][:num_lines]
    return DataLoader(lines, batch_size=micro_batch_size, collate_fn=collate)


def before(model: nn.Module, micro_batches: DataLoader[str], optimizer: torch.optim.Optimizer, k: int) -> None:
    """A mean of means, divided by k even where the window is shorter, whose leftovers spill into the next epoch."""
    for index, (inputs, targets) in enumerate(micro_batches):
        loss = F.cross_entropy(model(inputs), targets, ignore_index=PADDING)
        (loss / k).backward()
        if (index + 1) % k == 0:
            optimizer.step()
            optimizer.zero_grad()


def after(model: nn.Module, micro_batches: DataLoader[str], optimizer: torch.optim.Optimizer, k: int) -> None:
    """The mean over all bytes that the window predicts, whatever the window holds."""
    for window in mb.windows(micro_batches, accumulation_steps=k):
        with mb.accumulate(window, model, count=lambda pair: mb.valid_tokens(pair[1], PADDING)) as steps:
            for (inputs, targets), share in steps:
                loss_sum = F.cross_entropy(model(inputs), targets, ignore_index=PADDING, reduction="sum")
                (loss_sum * share).backward()
        optimizer.step()
        optimizer.zero_grad()


def main(epochs: int = 3, num_lines: int = 1000) -> None:
    for loop in (before, after):
        torch.manual_seed(0)
        model = NextByte()
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
        for _ in range(epochs):
            loop(model, loader(num_lines), optimizer, k=8)
        report = mb.Accumulator(model, mb.sum_loss(nn.CrossEntropyLoss())).evaluate(mb.Window(loader(num_lines)))
        print(f"{loop.__name__:6}  nats per byte after {epochs} epochs: {float(report.loss):.3f}")


if __name__ == "__main__":
    main()
