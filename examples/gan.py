"""python examples/gan.py: a generator and a discriminator of handwritten digits, each with exact accumulated gradients.

Two accumulators share two models. Each trains one of them and freezes the other, so that the generator's turn leaves no
gradient in the discriminator. The noise is a leaf of the batch: it is cut together with the images, and any cut of the
batch gives the same gradient.
"""

import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.utils.data import DataLoader

import macrobatch as mb

NOISE = 16
Batch = dict[str, Tensor]  # images (B, 64) in -1..1 and noise (B, NOISE)


def batch_of(images: Tensor) -> Batch:
    return {"images": images, "noise": torch.randn(len(images), NOISE, dtype=images.dtype)}


def models() -> tuple[nn.Module, nn.Module]:
    """The generator, noise to images, and the discriminator, images to logits; no BatchNorm, which couples samples."""
    generator = nn.Sequential(nn.Linear(NOISE, 128), nn.LeakyReLU(0.2), nn.Linear(128, 64), nn.Tanh())
    discriminator = nn.Sequential(nn.Linear(64, 128), nn.LeakyReLU(0.2), nn.Linear(128, 1))
    return generator, discriminator


def accumulators(
    generator: nn.Module, discriminator: nn.Module, micro_batch_size: int
) -> tuple[mb.Accumulator, mb.Accumulator]:
    """One for the generator's turn, one for the discriminator's."""

    def call_real(logits: Tensor, real: bool) -> Tensor:
        return F.binary_cross_entropy_with_logits(logits, torch.full_like(logits, float(real)), reduction="sum")

    def fool(generator: nn.Module, batch: Batch) -> mb.Loss:
        logits = discriminator(generator(batch["noise"]))
        return mb.Loss(call_real(logits, True), len(logits), metrics={"fooled": (logits > 0).sum()})

    def tell_apart(discriminator: nn.Module, batch: Batch) -> tuple[Tensor, int]:
        fakes = generator(batch["noise"])
        loss_sum = call_real(discriminator(batch["images"]), True) + call_real(discriminator(fakes), False)
        return loss_sum, len(fakes)

    return (
        mb.Accumulator(generator, fool, micro_batch_size=micro_batch_size, frozen=[discriminator]),
        mb.Accumulator(discriminator, tell_apart, micro_batch_size=micro_batch_size, frozen=[generator]),
    )


def picture(images: Tensor) -> str:
    """The images (B, 64) beside one another, one character for each pixel."""
    rows = ((images + 1) * 2.49).long().unflatten(1, (8, 8)).transpose(0, 1).tolist()
    return "\n".join("  ".join("".join(" .:*#"[pixel] for pixel in image) for image in row) for row in rows)


def main(epochs: int = 60) -> None:
    torch.manual_seed(0)
    generator, discriminator = models()
    generators_turn, discriminators_turn = accumulators(generator, discriminator, micro_batch_size=32)
    generators_steps = torch.optim.Adam(generator.parameters(), lr=1e-3, betas=(0.5, 0.999))
    discriminators_steps = torch.optim.Adam(discriminator.parameters(), lr=1e-3, betas=(0.5, 0.999))
    images = torch.tensor(load_digits().data / 8 - 1, dtype=torch.float32)
    for epoch in range(epochs):
        for real in DataLoader(images, batch_size=100, shuffle=True):
            mb.apply_update(discriminators_steps, discriminators_turn.run(batch_of(real)))
            verdict = generators_turn.run(batch_of(real))
            mb.apply_update(generators_steps, verdict)
        if (epoch + 1) % 10 == 0:
            print(f"epoch {epoch + 1}  fakes taken for real {float(verdict.metrics['fooled']):.2f}")
    print(picture(generator(torch.randn(6, NOISE)).detach()))


if __name__ == "__main__":
    main()
