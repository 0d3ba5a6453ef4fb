"""The second pass of SAM begins where the first did, and after an error all is as before."""

import pytest
import torch
from torch import Tensor, nn

import macrobatch as mb


class Halving(nn.Module):
    """Its forward depends on a buffer that each forward changes in place, as spectral norm's does."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(3, 1)
        self.register_buffer("scale", torch.ones(()))
        self.register_buffer("calls", torch.zeros(()))
        self.seen: list[float] = []

    def forward(self, x: Tensor) -> Tensor:
        self.seen.append(float(self.scale))
        self.scale.mul_(0.5)
        self.calls = self.calls + 1  # assigned anew
        return self.linear(x) * self.scale


def square(model: nn.Module, batch: Tensor) -> Tensor:
    return model(batch).square().mean()


def sam_for(model: nn.Module, loss_fn: object = square) -> mb.SAM:
    accumulator = mb.Accumulator(model, loss_fn, micro_batch_size=2)  # type: ignore[arg-type]
    return mb.SAM(accumulator, torch.optim.SGD(model.parameters(), lr=0.1))


def test_both_passes_see_the_same_buffers_and_these_change_once() -> None:
    model = Halving()
    sam_for(model).step(torch.randn(4, 3))  # two micro-batches
    assert model.seen == [1.0, 0.5, 1.0, 0.5]
    assert (float(model.scale), float(model.calls)) == (0.25, 2.0)


def test_after_an_error_in_the_second_pass_buffers_and_random_numbers_are_as_before() -> None:
    model, passes = Halving(), [0]

    def failing(model: nn.Module, batch: Tensor) -> Tensor:
        passes[0] += 1
        loss = square(model, nn.functional.dropout(batch))
        if passes[0] == 4:
            raise KeyError("lost")
        return loss

    x, before = torch.randn(4, 3), {name: value.clone() for name, value in model.state_dict().items()}
    state = torch.get_rng_state()
    with pytest.raises(KeyError, match="lost"):
        sam_for(model, failing).step(x)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert torch.equal(torch.get_rng_state(), state)
    assert all(p.grad is None for p in model.parameters())


def test_low_precision_parameters_are_refused_because_the_step_would_be_lost() -> None:
    wide = nn.Linear(512, 512, bias=False)
    low, x = nn.Linear(512, 512, bias=False).bfloat16(), torch.randn(4, 512)
    step = 0.05 * torch.ones_like(wide.weight) / wide.weight.numel() ** 0.5
    with torch.no_grad():
        moved = [float((p + step.to(p.dtype) != p).float().mean()) for p in (wide.weight, low.weight)]
    assert moved[0] > 0.99
    assert moved[1] < 0.9, "control: in bfloat16 many weights would not move at all"
    with pytest.raises(ValueError, match=r"'weight' is torch.bfloat16, in which most of a step.*autocast="):
        sam_for(low).step(x.bfloat16())
