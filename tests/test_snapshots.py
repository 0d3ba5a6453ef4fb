"""A run goes back to a snapshot in every bit, from memory and from a file that is whole at any time."""

import io
import os
from collections import OrderedDict
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim import SGD, AdamW, Optimizer
from torch.optim.lr_scheduler import CosineAnnealingLR

import macrobatch as mb
from macrobatch.saving import InMemory, OnDisk, check_storable
from macrobatch.snapshots import BeforeWindow, Run, capture, copied, restore


class Net(nn.Module):
    """Draws (dropout), remembers (BatchNorm), holds a large mask and an empty buffer."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(6), nn.Dropout(0.3), nn.Linear(6, 1))
        self.register_buffer("mask", torch.ones(200, 100))
        self.register_buffer("later", None)

    def forward(self, x: Tensor) -> Tensor:
        return self.layers(x) * self.mask[0, 0]


def squared_error(model: nn.Module, x: Tensor) -> tuple[Tensor, int]:
    return F.mse_loss(model(x)[:, 0], x.sum(1), reduction="sum"), len(x)


class Parts:
    """A model, optimizer, schedule and scaler, and the run that they are."""

    def __init__(self, kind: type[Optimizer] = AdamW, **options: Any) -> None:
        torch.manual_seed(0)
        self.model = Net().double()
        self.optimizer = kind(self.model.parameters(), **({"lr": 0.01} | options))  # type: ignore[call-arg]
        self.scheduler = CosineAnnealingLR(self.optimizer, 30)
        self.scaler = torch.amp.GradScaler("cpu", init_scale=8.0, growth_interval=3)
        self.run = Run([self.model], [self.optimizer], [self.scheduler], self.scaler)
        self.accumulator = mb.Accumulator(
            self.model, squared_error, micro_batch_size=3, scaler=self.scaler, batch_norm="micro_batch"
        )

    def train(self, start: int, stop: int) -> "Parts":
        for t in range(start, stop):
            generator = torch.Generator().manual_seed(t)
            report = self.accumulator.run(torch.randn(8, 4, generator=generator, dtype=torch.float64))
            mb.apply_update(self.optimizer, report, max_norm=1.0)
            self.scheduler.step()
        return self

    def state(self) -> bytes:
        """Everything in bytes: tensors, counts, schedule, loss scale and the random numbers to come."""
        parts = (self.model, self.optimizer, self.scheduler, self.scaler)
        return repr([*map(exact, (part.state_dict() for part in parts)), exact(torch.get_rng_state())]).encode()


def exact(value: Any) -> Any:
    """The same structure, with the bytes of each tensor in its place."""
    if isinstance(value, Tensor):
        return value.dtype, tuple(value.shape), value.numpy().tobytes()
    if isinstance(value, dict):
        return {key: exact(each) for key, each in value.items()}
    if isinstance(value, list | tuple):
        return [exact(each) for each in value]
    return value


@pytest.mark.parametrize("where", ["memory", "file"])
@pytest.mark.parametrize("kind", ["AdamW", "SGD with momentum", "Adagrad"])
def test_a_run_goes_back_in_every_bit_and_goes_on_as_it_did(kind: str, where: str, tmp_path: Path) -> None:
    momentum = {"momentum": 0.9} if "momentum" in kind else {}
    mine = Parts(getattr(torch.optim, kind.split()[0]), **momentum).train(0, 5)
    store = InMemory() if where == "memory" else OnDisk(tmp_path / "snapshot.pt")
    store.keep(capture(mine.run, store.device))
    then = mine.state()
    later = mine.train(5, 12).state()
    assert later != then, "control: the run has moved"
    for _ in range(2):  # a snapshot can be gone back to more than once
        snapshot = store.recall()
        assert snapshot is not None
        restore(mine.run, snapshot)
        assert mine.state() == then
        assert mine.train(5, 12).state() == later


def test_a_snapshot_of_the_first_moment_takes_away_what_the_optimizer_has_gathered_since() -> None:
    mine = Parts()
    snapshot = capture(mine.run)
    then = mine.state()
    mine.train(0, 3)
    assert mine.optimizer.state
    restore(mine.run, snapshot)
    assert not mine.optimizer.state
    assert mine.state() == then


def test_a_snapshot_shares_no_memory_with_the_run() -> None:
    mine = Parts().train(0, 2)
    snapshot = capture(mine.run)
    file = io.BytesIO()
    torch.save(snapshot, file)
    mine.train(2, 6)
    again = io.BytesIO(file.getvalue())
    assert repr(exact(torch.load(again, weights_only=True))) == repr(exact(snapshot))


def test_an_optimizer_with_a_state_dict_of_its_own_is_asked_for_it() -> None:
    class Counting(SGD):
        calls = 0

        def state_dict(self) -> dict[str, Any]:
            return {**super().state_dict(), "calls": self.calls}

        def load_state_dict(self, state_dict: dict[str, Any]) -> None:
            self.calls = state_dict["calls"]
            super().load_state_dict({key: value for key, value in state_dict.items() if key != "calls"})

    mine = Parts(Counting)
    snapshot = capture(mine.run)
    mine.optimizer.calls = 7  # type: ignore[attr-defined]
    restore(mine.run, snapshot)
    assert mine.optimizer.calls == 0  # type: ignore[attr-defined]


def test_random_numbers_go_on_if_they_are_to() -> None:
    mine = Parts()
    snapshot, expected = capture(mine.run), torch.rand(3)
    restore(mine.run, snapshot, random_numbers=False)
    assert not torch.equal(torch.rand(3), expected)
    restore(mine.run, snapshot)
    assert torch.equal(torch.rand(3), expected)


@pytest.mark.parametrize("change", ["a buffer more", "another shape"])
def test_a_model_that_was_changed_since_is_refused_and_left_alone(change: str) -> None:
    mine = Parts()
    snapshot = capture(mine.run)
    mine.train(0, 2)
    if change == "a buffer more":
        mine.model.register_buffer("new", torch.zeros(1))
    else:
        mine.model.layers[3].weight.data = torch.zeros(2, 6, dtype=torch.float64)
    before = mine.state()
    with pytest.raises(ValueError, match=r"holds 6 parameters and 5 buffers, .* take a new snapshot after changing"):
        restore(mine.run, snapshot)
    assert mine.state() == before


# ---- the state before a window


def test_buffers_and_random_numbers_are_those_before_the_window_at_hand() -> None:
    mine = Parts().train(0, 2)
    before = BeforeWindow(mine.run)
    before.remember()
    then = mine.state()
    mine.model(torch.randn(5, 4, dtype=torch.float64))
    assert mine.state() != then
    before.restore()
    assert mine.state() == then


def test_large_buffers_are_copied_again_only_when_they_changed() -> None:
    mine = Parts()
    before = BeforeWindow(mine.run)

    def copy_of_mask() -> Tensor:
        return next(copy for (_, name), (_, copy, _) in before._copies.items() if name == "mask")

    first = copy_of_mask()
    before.remember()
    assert copy_of_mask() is first, "control: nothing changed, nothing is copied"
    mine.model.mask.mul_(2)
    before.remember()
    assert torch.equal(copy_of_mask(), mine.model.mask)
    mine.model.mask.mul_(2)
    before.restore()
    assert float(mine.model.mask[0, 0]) == 2


def test_a_checkpoint_loaded_before_the_first_window_makes_what_was_remembered_outdated() -> None:
    mine, other = Parts(), Parts().train(0, 3)
    before = BeforeWindow(mine.run)
    assert not before.is_outdated
    mine.model.load_state_dict(other.model.state_dict())
    assert before.is_outdated
    loaded = exact(mine.model.state_dict())
    before.restore()
    assert exact(mine.model.state_dict()) == loaded, "the buffers of the checkpoint stay"


# ---- files


def test_a_file_is_whole_at_any_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = OnDisk(tmp_path / "in" / "snapshot.pt")
    assert store.recall() is None
    store.keep({"number": 1})
    monkeypatch.setattr(os, "fsync", interrupted)
    with pytest.raises(OSError, match="no space left"):
        store.keep({"number": 2})
    assert store.recall() == {"number": 1}
    assert [path.name for path in store.path.parent.iterdir()] == ["snapshot.pt"], "nothing is left beside it"


def interrupted(descriptor: int) -> None:
    raise OSError("no space left")


def test_a_file_holds_no_code(tmp_path: Path) -> None:
    mine = Parts().train(0, 2)
    store = OnDisk(tmp_path / "snapshot.pt")
    store.keep(capture(mine.run, store.device))
    torch.load(store.path, weights_only=True)
    torch.save({"code": Net}, store.path)
    with pytest.raises(Exception, match="Weights only load failed"):
        store.recall()


def test_what_a_file_could_not_bring_back_is_refused_before_training() -> None:
    class Sampler:
        def state_dict(self) -> dict[str, Any]:
            return {"file": Path("data.txt")}

        def load_state_dict(self, state: dict[str, Any]) -> None:
            """Takes anything."""

    mine = Parts()
    check_storable(mine.run)
    message = "the state_dict of Sampler holds more than tensors and plain Python, .* leave folder out"
    with pytest.raises(ValueError, match=message):
        check_storable(Run([mine.model], [mine.optimizer], stateful=[Sampler()]))


def test_copies_are_deep_and_keep_their_types() -> None:
    tensor, inner = torch.ones(2), [1]
    made = copied(OrderedDict(a=(tensor, {"b": inner})))
    assert type(made) is OrderedDict
    assert torch.equal(made["a"][0], tensor)
    assert made["a"][0] is not tensor
    assert made["a"][1]["b"] == inner
    assert made["a"][1]["b"] is not inner
