"""A loss over all outputs of a window has the full batch's gradient, whatever the cut, and whichever graphs are kept."""

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from helpers import clear, difference, gradients, reference, textbook
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

import macrobatch as mb

N = 11  # samples: by 4 they are cut into 4, 4, 3
Batch = dict[str, Tensor]


class Towers(nn.Module):
    """Two encoders, or one for both sides, and a temperature."""

    def __init__(self, *, shared: bool = False, dropout: float = 0.0) -> None:
        super().__init__()
        self.left = self.tower(dropout)
        self.right = self.left if shared else self.tower(dropout)
        self.log_scale = nn.Parameter(torch.tensor(1.0))
        self.bias = nn.Parameter(torch.tensor(-0.5))
        self.forwards = 0

    @staticmethod
    def tower(dropout: float) -> nn.Module:
        return nn.Sequential(nn.Linear(5, 8), nn.Tanh(), nn.Dropout(dropout), nn.Linear(8, 6))


def encode(model: Towers, batch: Batch) -> dict[str, Tensor]:
    model.forwards += 1
    return {"left": model.left(batch["x"]), "right": model.right(batch["y"]), "label": batch["label"]}


def scores(model: Towers, outputs: dict[str, Tensor]) -> Tensor:
    return F.normalize(outputs["left"], dim=-1) @ F.normalize(outputs["right"], dim=-1).T * model.log_scale.exp()


def info_nce(model: Towers, outputs: dict[str, Tensor], window: Any) -> Tensor:
    logits = scores(model, outputs)
    targets = torch.arange(len(logits))
    return (F.cross_entropy(logits, targets) + F.cross_entropy(logits.T, targets)) / 2


def siglip(model: Towers, outputs: dict[str, Tensor], window: Any) -> Tensor:
    logits = scores(model, outputs) + model.bias
    signs = 2 * torch.eye(len(logits), dtype=logits.dtype) - 1
    return -F.logsigmoid(signs * logits).sum() / len(logits)


def triplet(model: Towers, outputs: dict[str, Tensor], window: Any) -> Tensor:
    """The hardest positive and the hardest negative of each anchor within the batch; margin 1."""
    distances = torch.cdist(outputs["left"], outputs["right"])
    same = outputs["label"][:, None] == outputs["label"][None, :]
    positive = distances.masked_fill(~same, -torch.inf).amax(1)
    negative = distances.masked_fill(same, torch.inf).amin(1)
    return (positive - negative + 1).clamp(min=0).mean()


def barlow_twins(model: Towers, outputs: dict[str, Tensor], window: Any) -> Tensor:
    left, right = ((z - z.mean(0)) / z.std(0) for z in (outputs["left"], outputs["right"]))
    c = left.T @ right / len(left)
    return (c.diagonal() - 1).square().sum() + 0.01 * (c - c.diagonal().diag()).square().sum()


LOSSES = {"info-nce": info_nce, "siglip": siglip, "triplet": triplet, "barlow-twins": barlow_twins}


def case(n: int = N, **options: Any) -> tuple[Towers, Batch]:
    torch.manual_seed(0)
    model = Towers(**options).double()
    x = torch.randn(n, 5, dtype=torch.float64)
    return model, {"x": x, "y": x + 0.5 * torch.randn_like(x), "label": torch.arange(n) // 2}


def in_one_piece(model: Towers, batch: Batch, loss_fn: Callable[..., Tensor]) -> list[Tensor | None]:
    result = reference(model, lambda: loss_fn(model, encode(model, batch), None))
    model.forwards = 0
    return result


# ---------------------------------------------------------------------------------------------------------------------
# Exactness


@pytest.mark.parametrize("keep", [0, 1, 2, 3])
@pytest.mark.parametrize("shared", [False, True], ids=["two-towers", "shared"])
@pytest.mark.parametrize("name", LOSSES)
def test_the_gradient_is_that_of_the_full_batch(name: str, shared: bool, keep: int) -> None:
    model, batch = case(shared=shared)
    expected = in_one_piece(model, batch, LOSSES[name])
    report = mb.GatheredAccumulator(model, encode, LOSSES[name], micro_batch_size=4, keep_graphs=keep).run(batch)
    assert report.micro_batch_sizes == (4, 4, 3)
    assert difference(gradients(model), expected) <= 1e-12
    assert abs(float(report.loss) - LOSSES[name](model, encode(model, batch), None).item()) <= 1e-12


@pytest.mark.parametrize("size", [1, 2, 5, 10, 11, 64])
def test_any_size_of_micro_batch_gives_the_same(size: int) -> None:
    model, batch = case()
    expected = in_one_piece(model, batch, info_nce)
    mb.GatheredAccumulator(model, encode, info_nce, micro_batch_size=size).run(batch)
    assert difference(gradients(model), expected) <= 1e-12


@pytest.mark.parametrize("name", LOSSES)
def test_control_plain_accumulation_is_wrong_by_more_than_a_tenth(name: str) -> None:
    model, batch = case()
    expected = in_one_piece(model, batch, LOSSES[name])
    micro_batches = list(mb.Window([batch]).cut(4))
    plain = textbook(model, lambda b: LOSSES[name](model, encode(model, b), None), micro_batches)
    present = [j for j, g in enumerate(expected) if g is not None]
    assert difference([plain[j] for j in present], [expected[j] for j in present]) > 0.1


@pytest.mark.parametrize("keep", [0, 1, 2, 3])
def test_it_takes_two_forwards_for_each_micro_batch_less_the_graphs_that_are_kept(keep: int) -> None:
    model, batch = case()
    accumulator = mb.GatheredAccumulator(model, encode, info_nce, micro_batch_size=4, keep_graphs=keep)
    assert accumulator.keep_graphs == keep
    accumulator.run(batch)
    assert model.forwards == 2 * 3 - keep


def test_by_default_one_graph_is_kept() -> None:
    model, batch = case()
    mb.GatheredAccumulator(model, encode, info_nce, micro_batch_size=4).run(batch)
    assert model.forwards == 5


def test_windows_may_come_cut_and_fill_while_they_run() -> None:
    model, batch = case()
    expected = in_one_piece(model, batch, info_nce)
    micro_batches = list(mb.Window([batch]).cut(3))
    for keep in (0, 1, 2):
        clear(model)
        drawn: list[int] = []

        def source(drawn: list[int] = drawn) -> Iterator[Batch]:
            for micro_batch in micro_batches:
                drawn.append(model.forwards)
                yield micro_batch

        model.forwards = 0
        mb.GatheredAccumulator(model, encode, info_nce, keep_graphs=keep).run(mb.Window(source()))
        assert difference(gradients(model), expected) <= 1e-12
        # With one graph or none the next micro-batch is loaded while the present one runs; which are the last two
        # cannot be known before all are there.
        assert drawn == ([0, 0, 1, 2] if keep < 2 else [0, 0, 0, 0])


# ---------------------------------------------------------------------------------------------------------------------
# Random numbers and buffers


def one_graph(model: Towers, batch: Batch, size: int) -> Tensor:
    """Micro-batches encoded in turn, all graphs alive, one loss: what cached gradients must equal, dropout included."""
    parts = [encode(model, part) for part in mb.Window([batch]).cut(size)]
    return info_nce(model, {key: torch.cat([part[key] for part in parts]) for key in parts[0]}, None)


@pytest.mark.parametrize("keep", [0, 1, 2, 3])
def test_dropout_draws_the_same_masks_in_both_forwards(keep: int) -> None:
    model, batch = case(dropout=0.4)
    torch.manual_seed(3)
    expected = reference(model, lambda: one_graph(model, batch, 4))
    following = torch.rand(3)
    torch.manual_seed(3)
    mb.GatheredAccumulator(model, encode, info_nce, micro_batch_size=4, keep_graphs=keep).run(batch)
    assert torch.equal(torch.rand(3), following), "the random numbers that follow are those of one pass"
    assert difference(gradients(model), expected) <= 1e-12


def test_control_masks_drawn_anew_in_the_second_forward_are_wrong() -> None:
    model, batch = case(dropout=0.4)
    torch.manual_seed(3)
    expected = reference(model, lambda: one_graph(model, batch, 4))
    torch.manual_seed(3)
    parts = list(mb.Window([batch]).cut(4))
    with torch.no_grad():
        outputs = [encode(model, part) for part in parts]
    leaves = {key: torch.cat([o[key] for o in outputs]) for key in outputs[0]}
    for key in ("left", "right"):
        leaves[key].requires_grad_()
    info_nce(model, leaves, None).backward()
    for j, part in enumerate(parts):
        again = encode(model, part)
        rows = slice(4 * j, 4 * j + len(part["x"]))
        torch.autograd.backward(
            [again["left"], again["right"]], [leaves["left"].grad[rows], leaves["right"].grad[rows]]
        )
    assert difference(gradients(model), expected) > 0.1


def test_random_numbers_that_the_loss_draws_follow_those_of_the_encoder() -> None:
    model, batch = case(dropout=0.4)
    drawn: list[Tensor] = []

    def noisy(m: Towers, outputs: dict[str, Tensor], window: Any) -> Tensor:
        drawn.append(torch.rand(2))
        return info_nce(m, outputs, window)

    torch.manual_seed(3)
    one_graph(model, batch, 4)
    expected, following = torch.rand(2), torch.rand(2)
    torch.manual_seed(3)
    mb.GatheredAccumulator(model, encode, noisy, micro_batch_size=4).run(batch)
    assert torch.equal(drawn[0], expected)
    assert torch.equal(torch.rand(2), following)


class Stateful(nn.Module):
    """A layer with state that its output depends on and that each forward changes, in one of several ways."""

    def __init__(self, how: str) -> None:
        super().__init__()
        self.how = how
        self.layer = nn.Linear(5, 6)
        self.register_buffer("seen", torch.ones((), dtype=torch.float64))
        self.register_buffer("bank", torch.zeros(9000 if how == "large" else 3, dtype=torch.float64))
        self.register_buffer("spare", torch.ones(2) if how == "grows" else None)

    def forward(self, x: Tensor) -> Tensor:
        if self.how == "replaced":
            self.seen = self.seen + len(x)
        elif self.how == "through data":
            self.seen.data.add_(len(x))
        elif self.how == "grows":
            self.seen.add_(len(x))
            self.spare = torch.ones(len(self.spare) + 1)
        elif self.how == "appears":
            self.seen.add_(len(x))
            self.spare = torch.ones(2)
        elif self.how == "large":
            self.bank.add_(1)
            self.seen.add_(len(x))
        else:
            self.seen.add_(len(x))
        return self.layer(x) * self.seen.log() + self.bank[:6].sum()


@pytest.mark.parametrize("how", ["in place", "replaced", "through data", "grows", "appears", "large"])
@pytest.mark.parametrize("keep", [0, 2])
def test_buffers_count_each_sample_once_and_the_second_forward_begins_where_the_first_did(how: str, keep: int) -> None:
    torch.manual_seed(0)
    model, twin = Stateful(how).double(), Stateful(how).double()
    twin.layer.load_state_dict(model.layer.state_dict())
    x = torch.randn(N, 5, dtype=torch.float64)

    def spread(m: nn.Module, outputs: Tensor, window: Any) -> Tensor:
        return torch.cdist(outputs, outputs + 1).mean()

    accumulator = mb.GatheredAccumulator(model, lambda m, b: m(b), spread, micro_batch_size=4, keep_graphs=keep)
    for _ in range(3):  # of a large buffer the first window learns that it changes
        clear([model, twin])
        spread(twin, torch.cat([twin(part) for part in x.split([4, 4, 3])]), None).backward()
        accumulator.run(x)
        assert difference(gradients(model), gradients(twin)) <= 1e-12
        for (name, mine), (_, theirs) in zip(model.named_buffers(), twin.named_buffers(), strict=True):
            assert torch.equal(mine, theirs), name


@pytest.mark.parametrize("keep", [0, 1])
def test_a_buffer_that_the_graph_itself_holds_is_not_written_over(keep: int) -> None:
    class Counting(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(5, 6)
            self.register_buffer("seen", torch.zeros(()))

        def forward(self, x: Tensor) -> Tensor:
            self.seen.add_(len(x))
            return self.layer(x) * self.seen  # backward needs the value of now

    torch.manual_seed(0)
    model, x = Counting().double(), torch.randn(N, 5, dtype=torch.float64)

    def by_hand() -> Tensor:
        counts = torch.tensor([4.0] * 4 + [8.0] * 4 + [11.0] * 3, dtype=torch.float64)
        return torch.pdist(model.layer(x) * counts[:, None]).mean()

    expected = reference(model, by_hand)
    accumulator = mb.GatheredAccumulator(
        model, lambda m, b: m(b), lambda m, o, w: torch.pdist(o).mean(), micro_batch_size=4, keep_graphs=keep
    )
    accumulator.run(x)
    assert difference(gradients(model), expected) <= 1e-12
    assert float(model.seen) == N


def test_batchnorm_statistics_are_updated_once_for_each_micro_batch() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(5, 6), nn.BatchNorm1d(6), nn.Linear(6, 4)).double()
    twin = nn.Sequential(nn.Linear(5, 6), nn.BatchNorm1d(6), nn.Linear(6, 4)).double()
    twin.load_state_dict(model.state_dict())
    x = torch.randn(N, 5, dtype=torch.float64)
    loss = lambda m, o, w: torch.pdist(o).mean()  # noqa: E731
    loss(None, torch.cat([twin(part) for part in x.split([4, 4, 3])]), None).backward()
    mb.GatheredAccumulator(model, lambda m, b: m(b), loss, micro_batch_size=4).run(x)
    assert int(model[1].num_batches_tracked) == 3
    assert difference(gradients(model), gradients(twin)) <= 1e-12
    assert all(torch.equal(a, b) for a, b in zip(model.buffers(), twin.buffers(), strict=True))


def test_spectral_norm_and_checkpointing_are_exact() -> None:
    torch.manual_seed(0)
    make = lambda: nn.utils.parametrizations.spectral_norm(nn.Linear(5, 6)).double()  # noqa: E731
    model, twin = make(), make()
    twin.load_state_dict(model.state_dict())
    x = torch.randn(N, 5, dtype=torch.float64)
    loss = lambda m, o, w: torch.pdist(o).mean()  # noqa: E731
    loss(None, torch.cat([twin(part) for part in x.split([4, 4, 3])]), None).backward()
    recomputing = lambda m, b: checkpoint(m, b, use_reentrant=False)  # noqa: E731
    mb.GatheredAccumulator(model, lambda m, b: m(b), loss, micro_batch_size=4).run(x)
    assert difference(gradients(model), gradients(twin)) <= 1e-12
    plain = nn.Sequential(nn.Linear(5, 8), nn.Tanh(), nn.Dropout(0.3), nn.Linear(8, 6)).double()
    torch.manual_seed(1)
    expected = reference(plain, lambda: loss(None, torch.cat([plain(part) for part in x.split([4, 4, 3])]), None))
    torch.manual_seed(1)
    mb.GatheredAccumulator(plain, recomputing, loss, micro_batch_size=4, keep_graphs=2).run(x)
    assert difference(gradients(plain), expected) <= 1e-12
