"""python examples/quickstart.py: handwritten digits with an effective batch of 256 at the memory of 32, in two ways.

`by_epoch` is one call for a whole epoch of an ordinary loader. `by_batch` is the same as three lines of your own loop,
which are there when you want to do something between accumulating and updating. Both make the same updates: those of a
loop that runs 256 samples in one piece, up to rounding, the short last batch of each epoch included.
"""

import torch
from sklearn.datasets import load_digits
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import macrobatch as mb


def data() -> tuple[TensorDataset, TensorDataset]:
    """1500 digits to train on, which 256 does not divide, and 297 to test on: pixels (64,) in 0..1 and a label."""
    digits = load_digits()
    images, labels = torch.tensor(digits.data / 16, dtype=torch.float32), torch.tensor(digits.target)
    return TensorDataset(images[:1500], labels[:1500]), TensorDataset(images[1500:], labels[1500:])


def network() -> nn.Module:
    return nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 10))


criterion = nn.CrossEntropyLoss()


def by_epoch(model: nn.Module, dataset: TensorDataset, epochs: int) -> float:
    """The mean loss of the last epoch. The loader yields micro-batches; 8 of them, 256 samples, make an update."""
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    loader = DataLoader(dataset, batch_size=32, shuffle=True)
    for _ in range(epochs):
        loss = mb.train_epoch(model, loader, optimizer, criterion, accumulation_steps=8, max_norm=1.0)
    return loss


def by_batch(model: nn.Module, dataset: TensorDataset, epochs: int) -> float:
    """The loss of the last update. The loader yields the batch that you want; the accumulator cuts it to fit."""
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    accumulator = mb.Accumulator(model, mb.sum_loss(criterion), micro_batch_size=32)
    for _ in range(epochs):
        for batch in DataLoader(dataset, batch_size=256, shuffle=True):
            report = accumulator.run(batch)  # p.grad is the gradient of all 256
            mb.apply_update(optimizer, report, max_norm=1.0)  # checks, clips, steps, zeroes
    return float(report.loss)


def accuracy(model: nn.Module, dataset: TensorDataset) -> float:
    images, labels = dataset.tensors
    with torch.no_grad():
        return float((model(images).argmax(1) == labels).double().mean())


def main(epochs: int = 20) -> None:
    train, test = data()
    for way in (by_epoch, by_batch):
        torch.manual_seed(0)
        model = network()
        loss = way(model, train, epochs)
        print(f"{way.__name__:8}  training loss {loss:.3f}  test accuracy {accuracy(model, test):.3f}")


if __name__ == "__main__":
    main()
