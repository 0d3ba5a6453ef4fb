"""`digits`: a small conv net with BatchNorm on scikit-learn's handwritten digits, 1797 images of 8 by 8 pixels."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim import SGD
from torch.utils.data import Dataset

from macrobatch.tasks.task import SumAndCount, Task

Digits = list[Tensor]  # images (B, 1, 8, 8) between 0 and 1, labels (B,), as torch's collate makes them


def digits(*, width: int = 16, momentum: float = 0.9, validation_share: float = 0.2) -> Task:
    """The task: name the digit. BatchNorm couples the samples of a micro-batch: its size is part of the model."""
    if width < 1:
        raise ValueError(f"digits: width must be at least 1, got {width}")
    if not momentum >= 0:
        raise ValueError(f"digits: momentum must be at least 0, got {momentum}")
    if not 0 < validation_share < 1:
        raise ValueError(f"digits: validation_share must be between 0 and 1, got {validation_share}")
    images, labels = _load_images()
    # The split is the same for every seed: validation losses of different runs are about the same images.
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(0))
    held_out, rest = order.tensor_split([max(1, round(validation_share * len(labels)))])
    return Task(
        name="digits",
        model=_conv_net(width),
        loss_fn=label_loss,
        train=LabelledImages(images[rest], labels[rest]),
        validation=LabelledImages(images[held_out], labels[held_out]),
        make_optimizer=lambda model, lr: SGD(model.parameters(), lr=lr, momentum=momentum),
        learning_rate=0.05,
        base_batch_size=64,
        batch_size=64,
        metrics={"accuracy": label_accuracy},
        description=(
            f"conv net with BatchNorm, width {width}, on scikit-learn's handwritten digits: "
            f"{len(rest)} images to train, {len(held_out)} for validation"
        ),
    )


class LabelledImages(Dataset[tuple[Tensor, Tensor]]):
    """Images (N, 1, 8, 8) and their labels (N,): sample i is a copy of each, which keeps no other with it."""

    def __init__(self, images: Tensor, labels: Tensor) -> None:
        self._images, self._labels = images.numpy(), labels.numpy()

    def __len__(self) -> int:
        return len(self._labels)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        return torch.from_numpy(self._images[index].copy()), torch.tensor(self._labels[index])


def _load_images() -> tuple[Tensor, Tensor]:
    try:
        from sklearn.datasets import load_digits
    except ModuleNotFoundError:
        raise ModuleNotFoundError(
            "task 'digits' needs scikit-learn: pip install -e '.[tasks]'", name="sklearn"
        ) from None
    data = load_digits()
    images = torch.tensor(data.images, dtype=torch.float32).unsqueeze(1) / 16  # 16 grey levels
    return images, torch.tensor(data.target, dtype=torch.long)


def _conv_net(width: int) -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(1, width, 3, padding=1, bias=False),
        nn.BatchNorm2d(width),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Conv2d(width, 2 * width, 3, padding=1, bias=False),
        nn.BatchNorm2d(2 * width),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(2 * width * 4 * 4, 10),
    )


def label_loss(model: nn.Module, micro_batch: Digits) -> SumAndCount:
    """Cross-entropy in nats, summed, and the number of images."""
    images, labels = micro_batch
    return F.cross_entropy(model(images), labels, reduction="sum"), len(labels)


def label_accuracy(model: nn.Module, micro_batch: Digits) -> SumAndCount:
    """The images whose digit was named right, and the number of images."""
    images, labels = micro_batch
    return (model(images).argmax(-1) == labels).sum(), len(labels)
