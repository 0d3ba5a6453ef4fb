"""Models with batch normalisation of every kind, each with its samples, that several test files share."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

Pair = tuple[Tensor, Tensor]
CLASSES = 5


@dataclass(frozen=True)
class Case:
    """How to make the model in float64, and the shape of one sample."""

    model: Callable[[], nn.Module]
    sample: tuple[int, ...]


class Residual(nn.Module):
    """Written by hand: its own parameters and statistics, everything functional, two ways from each block's input."""

    def __init__(self, channels: int = 6, blocks: int = 2) -> None:
        super().__init__()
        self.stem = nn.Parameter(torch.randn(channels, 3, 3, 3) / 5)
        self.kernels = nn.Parameter(torch.randn(blocks, channels, channels, 3, 3) / 7)
        self.scales = nn.Parameter(1 + torch.rand(blocks + 1, channels))
        self.shifts = nn.Parameter(torch.randn(blocks + 1, channels))
        self.head = nn.Parameter(torch.randn(CLASSES, channels))
        for i in range(blocks + 1):
            self.register_buffer(f"mean{i}", torch.zeros(channels))
            self.register_buffer(f"var{i}", torch.ones(channels))

    def norm(self, x: Tensor, i: int) -> Tensor:
        mean, var = getattr(self, f"mean{i}"), getattr(self, f"var{i}")
        return F.batch_norm(x, mean, var, self.scales[i], self.shifts[i], training=self.training, momentum=0.3)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.norm(F.conv2d(x, self.stem, padding=1), 0))
        for i, kernel in enumerate(self.kernels, 1):
            x = F.relu(x + self.norm(F.conv2d(x, kernel, padding=1), i))
        return x.mean((2, 3)) @ self.head.T


class Convolutional(nn.Module):
    """A stack of convolutions of any dimension, each normalised."""

    def __init__(self, dims: int, width: int = 6, depth: int = 2, **options: object) -> None:
        super().__init__()
        conv, norm = getattr(nn, f"Conv{dims}d"), getattr(nn, f"BatchNorm{dims}d")
        layers = []
        for i in range(depth):
            layers += [conv(3 if i == 0 else width, width, 3, padding=1), norm(width, **options), nn.ReLU(inplace=True)]
        self.body = nn.Sequential(*layers)
        self.head = nn.Linear(width, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.body(x).flatten(2).mean(2))


class Twice(nn.Module):
    """One layer, called twice in a forward, with a second way around the second call."""

    def __init__(self, **options: object) -> None:
        super().__init__()
        self.first, self.norm, self.head = nn.Linear(7, 6), nn.BatchNorm1d(6, **options), nn.Linear(6, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm(self.first(x)).tanh()
        return self.head(x + self.norm(x).sigmoid())


def flat(**options: object) -> nn.Module:
    layers = [nn.Linear(7, 8), nn.BatchNorm1d(8, **options), nn.Tanh(), nn.Linear(8, 6), nn.BatchNorm1d(6, **options)]
    return nn.Sequential(*layers, nn.Tanh(), nn.Linear(6, CLASSES))


def partly_frozen() -> nn.Module:
    model = Convolutional(2, depth=3)
    model.body[:2].requires_grad_(False)  # the first convolution and its normalisation, still in train mode
    model.body[4].weight.requires_grad_(False)
    return model


def partly_in_eval_mode() -> nn.Module:
    model = Convolutional(2, depth=3)
    with torch.no_grad():
        model.body[1].running_mean.normal_()
    model.body[1].eval()
    return model


class Branches(nn.Module):
    """Ways side by side, each with its own normalisation, and one whose output nobody uses."""

    def __init__(self) -> None:
        super().__init__()
        self.ways = nn.ModuleList(nn.Sequential(nn.Linear(7, 6), nn.BatchNorm1d(6), nn.Tanh()) for _ in range(4))
        self.unused = nn.Sequential(nn.Linear(7, 6), nn.BatchNorm1d(6))
        self.head = nn.Linear(6, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        self.unused(x)
        return self.head(sum(way(x) for way in self.ways))


class FrontWithoutGraph(nn.Module):
    """Its front runs under no_grad, normalisation included."""

    def __init__(self) -> None:
        super().__init__()
        self.front, self.back = nn.Sequential(nn.Linear(7, 6), nn.BatchNorm1d(6)), nn.BatchNorm1d(6)
        self.head = nn.Linear(6, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            x = self.front(x)
        return self.head(self.back(x).tanh())


class Instances(nn.Module):
    """Instance normalisation that tracks statistics: its gradients couple nothing, its buffers do."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv2d(3, 4, 3), nn.InstanceNorm2d(4, affine=True, track_running_stats=True)
        self.last, self.head = nn.BatchNorm2d(4), nn.Linear(4, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.last(self.norm(self.conv(x)).relu()).mean((2, 3)))


def transformers_resnet() -> nn.Module:
    from transformers import ResNetConfig, ResNetForImageClassification

    config = ResNetConfig(
        embedding_size=6, hidden_sizes=[6, 8], depths=[2, 1], layer_type="basic", num_labels=CLASSES, hidden_act="relu"
    )
    return Logits(ResNetForImageClassification(config))


class Logits(nn.Module):
    """A transformers model that gives nothing but its logits."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, x: Tensor) -> Tensor:
        return self.model(pixel_values=x).logits


IMAGE = (3, 6, 6)
CASES = {
    "BatchNorm1d, 2-D input": Case(flat, (7,)),
    "BatchNorm1d, 3-D input": Case(lambda: Convolutional(1), (3, 5)),
    "BatchNorm2d": Case(lambda: Convolutional(2), IMAGE),
    "BatchNorm3d": Case(lambda: Convolutional(3), (3, 4, 3, 5)),
    "functional residual net": Case(Residual, IMAGE),
    "momentum=None": Case(lambda: flat(momentum=None), (7,)),
    "momentum=None, a layer used twice": Case(lambda: Twice(momentum=None), (7,)),
    "track_running_stats=False": Case(lambda: flat(track_running_stats=False), (7,)),
    "affine=False": Case(lambda: Convolutional(2, affine=False), IMAGE),
    "a layer used twice": Case(Twice, (7,)),
    "ways side by side, one unused": Case(Branches, (7,)),
    "partly frozen": Case(partly_frozen, IMAGE),
    "partly in eval mode": Case(partly_in_eval_mode, IMAGE),
    "a front under no_grad": Case(FrontWithoutGraph, (7,)),
    "InstanceNorm2d that tracks statistics": Case(Instances, IMAGE),
    "channels last": Case(lambda: Convolutional(2).to(memory_format=torch.channels_last), IMAGE),
    "transformers' ResNetForImageClassification": Case(transformers_resnet, (3, 16, 16)),
}


def batch_of(n: int, sample: tuple[int, ...], dtype: torch.dtype = torch.float64) -> Pair:
    """Samples that differ in mean and scale, so that no micro-batch's statistics are like another's; labels."""
    scale = torch.linspace(0.2, 3, n, dtype=dtype).view(-1, *[1] * len(sample))
    x = torch.randn(n, *sample, dtype=dtype) * scale + scale.flip(0)
    return x, torch.randint(0, CLASSES, (n,))


def loss_sum(model: nn.Module, batch: Pair) -> tuple[Tensor, int]:
    """The classification loss as a sum over samples, and how many they are."""
    x, labels = batch
    return F.cross_entropy(model(x), labels, reduction="sum"), len(labels)


def cut(batch: Pair, sizes: list[int]) -> list[Pair]:
    return list(zip(batch[0].split(sizes), batch[1].split(sizes), strict=True))
