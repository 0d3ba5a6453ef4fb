"""A loss over all outputs of a window has the full batch's gradient, however it is cut and whatever graphs are kept."""

import json
import re
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from helpers import clear, difference, gradients, reference, textbook
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint
from torch.utils.data import DataLoader

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
    assert report.loss_weights == (4.0, 4.0, 3.0)
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


def test_limit_numbers_of_a_generator_of_its_own_are_not_drawn_again() -> None:
    model, batch = case()
    generator = torch.Generator()

    def noisy(m: Towers, b: Batch) -> dict[str, Tensor]:
        noise = torch.randn(len(b["x"]), 6, generator=generator, dtype=torch.float64)
        return encode(m, b) | {"left": m.left(b["x"]) * noise}

    results = []
    for keep in (3, 0):
        clear(model)
        generator.manual_seed(0)
        mb.GatheredAccumulator(model, noisy, info_nce, micro_batch_size=4, keep_graphs=keep).run(batch)
        results.append(gradients(model))
    assert difference(results[1], results[0]) > 0.1


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
    options: dict[str, Any] = {"micro_batch_size": 4, "batch_norm": "micro_batch"}
    mb.GatheredAccumulator(model, lambda m, b: m(b), loss, **options).run(x)
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


# ---------------------------------------------------------------------------------------------------------------------
# What the loss owns


class InfoNCE(nn.Module):
    """A loss with a temperature of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.log_scale = nn.Parameter(torch.tensor(1.0, dtype=torch.float64))

    def forward(self, model: nn.Module, outputs: tuple[Tensor, Tensor], window: Any) -> Tensor:
        left, right = (F.normalize(z, dim=-1) for z in outputs)
        return F.cross_entropy(left @ right.T * self.log_scale.exp(), torch.arange(len(left)))


def test_a_temperature_of_the_loss_gets_its_gradient_once() -> None:
    model, batch = case()
    loss_fn = InfoNCE()
    pair = lambda m, b: (m.left(b["x"]), m.right(b["y"]))  # noqa: E731
    expected = reference([model, loss_fn], lambda: loss_fn(model, pair(model, batch), None))
    for keep in (0, 1, 3):
        clear([model, loss_fn])
        report = mb.GatheredAccumulator(model, pair, loss_fn, micro_batch_size=2, keep_graphs=keep).run(batch)
        assert difference(gradients([model, loss_fn]), expected) <= 1e-12
        assert any(p is loss_fn.log_scale for p in report.parameters)


def test_a_temperature_of_the_loss_in_no_optimizer_is_warned_of_by_name() -> None:
    model, batch = case()
    pair = lambda m, b: (m.left(b["x"]), m.right(b["y"]))  # noqa: E731
    report = mb.GatheredAccumulator(model, pair, InfoNCE(), micro_batch_size=4).run(batch)
    with pytest.warns(
        UserWarning, match=r"in no optimizer given \('loss_fn\.log_scale' of InfoNCE, shape \(\)\): they stay"
    ):
        mb.apply_update(torch.optim.SGD(model.parameters(), lr=0.1), report)


def test_several_models_and_a_frozen_one_in_any_structure_of_outputs() -> None:
    _, batch = case()
    student, teacher, head = (nn.Linear(5, 6).double() for _ in range(3))

    def views(models: list[nn.Module], b: Batch) -> dict[str, Any]:
        return {"views": [models[0](b["x"]), models[1](b["y"])], "kind": "pair", "target": (teacher(b["x"]),)}

    def loss_fn(models: Any, outputs: dict[str, Any], window: Any) -> Tensor:
        assert outputs["kind"] == "pair"
        first, second = outputs["views"]
        return info_nce_of(first, second) + info_nce_of(first, outputs["target"][0])

    def info_nce_of(a: Tensor, b: Tensor) -> Tensor:
        return F.cross_entropy(a @ b.T, torch.arange(len(a)))

    expected = reference([student, head], lambda: loss_fn(None, views([student, head], batch), None))
    clear(teacher)
    mb.GatheredAccumulator([student, head], views, loss_fn, micro_batch_size=3, frozen=[teacher]).run(batch)
    assert difference(gradients([student, head]), expected) <= 1e-12
    assert all(p.grad is None and p.requires_grad for p in teacher.parameters())


def test_the_loss_is_given_the_window() -> None:
    model, batch = case()
    seen: list[mb.Window] = []

    def loss_fn(m: Towers, outputs: Any, window: mb.Window) -> Tensor:
        seen.append(window)
        return info_nce(m, outputs, window)

    mb.GatheredAccumulator(model, encode, loss_fn, micro_batch_size=4).run(batch)
    assert torch.equal(torch.cat([part["label"] for part in seen[0]]), batch["label"])


# ---------------------------------------------------------------------------------------------------------------------
# Blocks of rows


def info_nce_rows(model: Towers, outputs: dict[str, Tensor], window: Any, rows: slice) -> Tensor:
    left, right = (F.normalize(outputs[side], dim=-1) for side in ("left", "right"))
    scale, targets = model.log_scale.exp(), torch.arange(len(left))[rows]
    to_right = F.cross_entropy(left[rows] @ right.T * scale, targets, reduction="sum")
    to_left = F.cross_entropy(right[rows] @ left.T * scale, targets, reduction="sum")
    return (to_right + to_left) / (2 * len(left))


@pytest.mark.parametrize("rows", [1, 3, 11, 100])
def test_a_loss_in_blocks_of_rows_is_the_same_loss(rows: int) -> None:
    model, batch = case()
    expected = in_one_piece(model, batch, info_nce)
    loss_fn = mb.RowBlocks(info_nce_rows, rows=rows)
    assert difference(in_one_piece(model, batch, loss_fn), expected) <= 1e-12, "in one graph, too"
    accumulator = mb.GatheredAccumulator(model, encode, loss_fn, micro_batch_size=4)
    report = accumulator.run(batch)
    assert difference(gradients(model), expected) <= 1e-12
    assert abs(float(report.loss) - info_nce(model, encode(model, batch), None).item()) <= 1e-12
    assert abs(float(accumulator.evaluate(batch).loss) - float(report.loss)) <= 1e-12


def mean_of_the_block(model: Towers, outputs: dict[str, Tensor], window: Any, rows: slice) -> Tensor:
    """What comes to mind first: the mean over the block's rows instead of their share of the whole mean."""
    left, right = (F.normalize(outputs[side], dim=-1) for side in ("left", "right"))
    return F.cross_entropy(left[rows] @ right.T * model.log_scale.exp(), torch.arange(len(left))[rows])


def loss_of_all(model: Towers, outputs: dict[str, Tensor], window: Any, rows: slice) -> Tensor:
    return info_nce(model, outputs, window)


@pytest.mark.parametrize("rows", [1, 2, 3, 11, 100])
@pytest.mark.parametrize("method", ["run", "evaluate"])
@pytest.mark.parametrize("wrong", [mean_of_the_block, loss_of_all])
def test_blocks_that_do_not_add_up_are_refused_in_the_first_window(
    wrong: Callable[..., Tensor], method: str, rows: int
) -> None:
    model, batch = case()
    accumulator = mb.GatheredAccumulator(model, encode, mb.RowBlocks(wrong, rows=rows), micro_batch_size=4)
    last = min(max(rows, 2), N) - 1
    message = (
        rf"do not add up: \S+ for rows 0 to {last}, but \S+ for rows? 0.* and \S+ for rows? .*{last}\. Needed is, .* "
        rf"over all {N} samples\. Divide the sum over these rows by the number of all samples"
    )
    with pytest.raises(ValueError, match=message):
        getattr(accumulator, method)(batch)
    assert all(p.grad is None for p in model.parameters()), "gradients are as before"


def test_that_blocks_add_up_is_looked_at_once() -> None:
    model, batch = case()
    calls: list[tuple[int, int]] = []

    def counting(m: Towers, outputs: dict[str, Tensor], window: Any, rows: slice) -> Tensor:
        calls.append((rows.start, rows.stop))
        return info_nce_rows(m, outputs, window, rows)

    blocks = [(0, 4), (4, 8), (8, 11)]
    accumulator = mb.GatheredAccumulator(model, encode, mb.RowBlocks(counting, rows=4), micro_batch_size=4)
    accumulator.run(batch)
    assert calls == [(0, 4), (0, 4), (0, 2), (2, 4), *blocks[1:]]
    for _ in range(3):
        calls.clear()
        accumulator.run(batch, add=True)
        accumulator.evaluate(batch)
        assert calls == 2 * blocks


def test_blocks_without_a_loss_tell_nothing_and_the_next_one_is_looked_at() -> None:
    """A hinge that is 0 for the first rows adds up whatever it is divided by."""
    model, batch = case()

    def late_mean(m: Towers, outputs: dict[str, Tensor], window: Any, rows: slice) -> Tensor:
        is_late = (torch.arange(N)[rows] >= 6).to(torch.float64)
        return (F.normalize(outputs["left"][rows], dim=-1).square().sum(1) * is_late).mean()

    with pytest.raises(ValueError, match=r"for rows 6 to 8, but \S+ for row 6 and \S+ for rows 7 to 8\. Needed"):
        mb.GatheredAccumulator(model, encode, mb.RowBlocks(late_mean, rows=3), micro_batch_size=4).run(batch)


class CountingBlocks(nn.Module):
    """Shares that depend on a buffer that each call changes: of the loss itself, and of what it uses of the model."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("calls", torch.zeros((), dtype=torch.float64))
        self.register_buffer("bank", torch.zeros(20_000, dtype=torch.float64))  # larger than what is always copied

    def forward(self, model: nn.Module, outputs: Tensor, window: Any, rows: slice) -> Tensor:
        self.calls += 1
        self.bank.add_(1)
        model[1](outputs[rows])  # running statistics of BatchNorm
        return torch.cdist(outputs[rows], outputs).sum() / len(outputs) + 0 * self.bank[0]


def test_looking_at_blocks_leaves_buffers_and_random_numbers_as_they_were() -> None:
    model = nn.Sequential(nn.Linear(5, 6), nn.BatchNorm1d(6)).double()
    x, loss_fn = torch.randn(N, 5, dtype=torch.float64), CountingBlocks()
    after = torch.get_rng_state()
    accumulator = mb.GatheredAccumulator(
        model, lambda m, part: m[0](part), mb.RowBlocks(loss_fn, rows=4), micro_batch_size=4, batch_norm="micro_batch"
    )
    accumulator.run(x)
    assert float(loss_fn.calls) == float(loss_fn.bank[0]) == int(model[1].num_batches_tracked) == 3
    assert torch.equal(torch.get_rng_state(), after)


def test_limit_of_blocks_that_draw_random_numbers_it_is_not_known_whether_they_add_up() -> None:
    model, batch = case()

    def noisy(m: Towers, outputs: dict[str, Tensor], window: Any, rows: slice) -> Tensor:
        return mean_of_the_block(m, outputs, window, rows) * (1 + torch.rand(()))

    torch.manual_seed(0)
    by_hand = encode(model, batch)
    for rows in (slice(0, 4), slice(4, 8), slice(8, 11)):
        noisy(model, by_hand, None, rows)
    following = torch.rand(2)
    torch.manual_seed(0)
    mb.GatheredAccumulator(model, encode, mb.RowBlocks(noisy, rows=4), micro_batch_size=4).run(batch)
    assert torch.equal(torch.rand(2), following)


def test_in_blocks_the_matrix_of_all_pairs_never_stands_whole() -> None:
    n = 600
    model, batch = case(n)
    matrix, peaks = n * n * 8, {}
    for name, loss_fn in {"whole": info_nce, "blocks": mb.RowBlocks(info_nce_rows, rows=10)}.items():
        accumulator = mb.GatheredAccumulator(model, encode, loss_fn, micro_batch_size=10)
        accumulator.run(batch)
        clear(model)
        peaks[name] = mb.peak_memory(lambda accumulator=accumulator: accumulator.run(batch) and None)
        clear(model)
    assert peaks["whole"] > 2 * matrix
    assert peaks["blocks"] < matrix / 4


# ---------------------------------------------------------------------------------------------------------------------
# Memory


def deep(width: int = 64) -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(*(layer for _ in range(6) for layer in (nn.Linear(width, width), nn.Tanh()))).double()


def by_hand(model: nn.Module, x: Tensor, size: int, loss: Callable[[Tensor], Tensor]) -> None:
    """Cached gradients as published: every forward twice."""
    with torch.no_grad():
        z = torch.cat([model(part) for part in x.split(size)])
    z.requires_grad_()
    loss(z).backward()
    for part, gradient in zip(x.split(size), z.grad.split(size), strict=True):
        model(part).backward(gradient)


def test_one_kept_graph_takes_no_more_memory_than_none_and_each_further_one_its_activations() -> None:
    model, x = deep(), torch.randn(256, 64, dtype=torch.float64)
    loss = lambda z: z.std(0).log().square().sum()  # noqa: E731
    peaks = {}
    for keep in (0, 1, 2, 4):
        accumulator = mb.GatheredAccumulator(
            model, lambda m, b: m(b), lambda m, z, w: loss(z), micro_batch_size=32, keep_graphs=keep
        )
        accumulator.run(x)
        clear(model)
        peaks[keep] = mb.peak_memory(lambda accumulator=accumulator: accumulator.run(x) and None)
        clear(model)
    by_hand(model, x, 32, loss)
    clear(model)
    plain = mb.peak_memory(lambda: by_hand(model, x, 32, loss))
    clear(model)
    graph = 6 * 32 * 64 * 8  # one output of each pair of layers, 32 samples
    random_states = 5 * 5056  # copies of the random numbers' state, the same however many micro-batches there are
    assert peaks[0] <= plain + random_states
    assert peaks[1] <= plain + random_states
    assert peaks[2] <= peaks[1] + graph
    assert abs(peaks[4] - peaks[2] - 2 * graph) <= 0.01 * graph
    full = mb.peak_memory(lambda: loss(model(x)).backward())
    assert full > 1.5 * peaks[1]


def spread(model: nn.Module, outputs: Tensor, window: Any) -> Tensor:
    return torch.cdist(outputs, outputs + 1).mean()


def training(keep: Any, size: Any = 16, max_memory: int | None = None) -> tuple[int, mb.GatheredAccumulator, int]:
    """Bytes at the peak of a window within training with AdamW, the accumulator, forwards in that window."""
    model, x = deep(), torch.randn(128, 64, dtype=torch.float64)
    optimizer, forwards = torch.optim.AdamW(model.parameters()), 0

    def counting(m: nn.Module, part: Tensor) -> Tensor:
        nonlocal forwards
        forwards += 1
        return m(part)

    accumulator = mb.GatheredAccumulator(
        model, counting, spread, micro_batch_size=size, keep_graphs=keep, max_memory=max_memory
    )
    for _ in range(30):  # windows of the search for a size
        mb.apply_update(optimizer, accumulator.run(x))
        if size != "auto" or accumulator._limit.is_found:
            break
    mb.apply_update(optimizer, accumulator.run(x))
    forwards = 0
    with mb.MemoryMeter() as meter:  # the optimizer's state is not touched here, and yet stands beside
        accumulator.run(x)
    return meter.peak + 2 * sum(p.nbytes for p in model.parameters()), accumulator, forwards


def test_with_a_budget_as_many_graphs_are_kept_as_it_has_room_for() -> None:
    graph = 6 * 16 * 64 * 8
    peaks = {keep: training(keep)[0] for keep in (0, 1, 3, 6, 8)}
    assert peaks[8] > peaks[6] > peaks[3] > peaks[1]
    chosen = {}
    for keep in (1, 3, 6, 8):
        budget = peaks[keep] + graph // 2
        peak, accumulator, forwards = training("auto", max_memory=budget)
        chosen[keep] = accumulator.keep_graphs
        assert forwards == 2 * 8 - accumulator.keep_graphs
        assert peak <= budget
    assert all(keep - 1 <= found <= keep for keep, found in chosen.items()), chosen


def std(model: nn.Module, outputs: Tensor, window: Any) -> Tensor:
    """A loss that takes next to nothing."""
    return outputs.std(0).mean()


BUDGETS = {
    "the loss": (128, spread, 16, "while the loss is computed", "outputs and loss", "the same loss in blocks"),
    "a backward": (128, std, 128, "in the backward of a micro-batch", "activations", "a smaller micro_batch_size"),
    "the step": (16, std, 4, "in the optimizer's step", "the step itself", "training fewer parameters"),
}


@pytest.mark.parametrize("auto", [False, True], ids=["given size", "auto"])
@pytest.mark.parametrize("name", BUDGETS)
def test_a_budget_that_is_too_small_is_told_with_what_takes_it_and_how_much_would_do(name: str, auto: bool) -> None:
    n, loss_fn, size, moment, part, advice = BUDGETS[name]
    x = torch.randn(n, 64, dtype=torch.float64)

    def attempt(max_memory: int | str) -> int:
        model, size_asked = deep(), "auto" if auto else size
        accumulator = mb.GatheredAccumulator(
            model, lambda m, part: m(part), loss_fn, micro_batch_size=size_asked, max_memory=max_memory
        )
        with mb.MemoryMeter() as meter:
            accumulator.run(x)
        return meter.peak

    if auto and name == "a backward":
        advice = "recomputing activations"
    cut = "even in micro-batches of one sample" if auto else f"in micro-batches of {size} samples"
    with pytest.raises(
        ValueError, match=rf"^max_memory=100\.00 kB is too small for a window of {n} samples: {cut}"
    ) as e:
        attempt(100_000)
    told = re.fullmatch(
        rf".* it needs at least (\S+ .B), most of all {moment}: (.*) \(optimizer: AdamW, because no optimizer was "
        r"given: two moments for each parameter\)\. Give \1 or more, or a smaller effective batch\. "
        rf"What would also help: {advice}.*",
        str(e.value),
    )
    assert told is not None, str(e.value)
    parts = dict(re.findall(r"(\D+?) (\d\S* k?M?B)(?:, |$)", told[2]))
    assert {"parameters", "optimizer state", "inputs", part} <= parts.keys()
    least = mb.parse_bytes(told[1])
    assert sum(map(mb.parse_bytes, parts.values())) == pytest.approx(least, rel=0.01), "all that is needed"
    assert attempt(told[1]) <= least
    with pytest.raises(ValueError, match="is too small"):
        attempt(int(0.98 * least))


@pytest.mark.parametrize("size", [16, "auto"])
def test_with_a_budget_too_a_loader_is_told_from_a_batch(size: Any) -> None:
    x = torch.randn(32, 64, dtype=torch.float64)
    options: dict[str, Any] = {"micro_batch_size": size, "max_memory": "10MB"}
    accumulator = mb.GatheredAccumulator(deep(), lambda m, part: m(part), spread, **options)
    with pytest.raises(ValueError, match=r"one effective batch at a time, got a DataLoader: for batch in loader: run"):
        accumulator.run(DataLoader(x, batch_size=16))


def test_a_budget_that_is_too_small_is_named_as_it_was_given() -> None:
    for given in ("0.0001%", "2kB", 2000):
        said = r"'0\.0001%', here \S+ k?B," if given == "0.0001%" else r"2\.00 kB"
        for size in (16, "auto"):
            with pytest.raises(ValueError, match=rf"^max_memory={said} is too small for a window of 128 samples"):
                training("auto", size=size, max_memory=given)


def test_layers_that_couple_samples_are_told_at_the_users_line_with_what_can_be_chosen_here() -> None:
    model = nn.Sequential(nn.Linear(4, 3), nn.BatchNorm1d(3))
    with pytest.warns(UserWarning, match=r"GatheredAccumulator\(..., batch_norm=\"micro_batch\"\)") as told:
        mb.GatheredAccumulator(model, lambda model, x: model(x), spread, micro_batch_size=2)
    assert told[0].filename == __file__
    assert "exact" not in str(told[0].message)
    mb.GatheredAccumulator(model, lambda model, x: model(x), spread, micro_batch_size=2, batch_norm="micro_batch")


def test_a_loss_that_runs_out_of_memory_while_it_is_measured_is_an_error_not_a_small_loss() -> None:
    model, x = deep(), torch.randn(512, 64, dtype=torch.float64)
    accumulator = mb.GatheredAccumulator(
        model, lambda m, part: m(part), spread, micro_batch_size=16, max_memory="100MB"
    )
    matrix = 512 * 512 * 8
    with (
        mb.memory_limit(matrix // 2),
        pytest.raises(torch.OutOfMemoryError, match=r"the loss over 512 samples does not fit: .*RowBlocks"),
    ):
        accumulator.run(x)
    assert all(p.grad is None for p in model.parameters())
    accumulator.run(x)  # where there is room, the same accumulator goes on
    assert accumulator.keep_graphs > 1


def test_the_micro_batch_is_found_within_what_the_outputs_leave_of_the_budget() -> None:
    budget = training(1, size=32)[0] + 100_000
    peak, accumulator, _ = training("auto", size="auto", max_memory=budget)
    assert accumulator.micro_batch_size is not None
    assert peak <= budget


# ---------------------------------------------------------------------------------------------------------------------
# Low precision


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("keep", [0, 1, 3])
def test_under_autocast_it_is_as_near_to_the_truth_as_the_full_batch_under_autocast(
    dtype: torch.dtype, keep: int
) -> None:
    model, batch = case(64)
    truth = in_one_piece(model, batch, info_nce)
    model.float()
    batch = {key: value.float() if value.is_floating_point() else value for key, value in batch.items()}
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0) if dtype is torch.float16 else None

    def full() -> Tensor:
        with torch.autocast("cpu", dtype):
            loss = info_nce(model, encode(model, batch), None)
        return loss if scaler is None else scaler.scale(loss)

    expected = reference(model, full)
    native = difference([g if g is None or scaler is None else g / 1024 for g in expected], truth)
    accumulator = mb.GatheredAccumulator(
        model, encode, info_nce, micro_batch_size=24, keep_graphs=keep, autocast=dtype, scaler=scaler
    )
    report = accumulator.run(batch)
    assert difference(gradients(model), truth) <= 2 * native
    assert native > 1e-5, "it was computed in low precision"
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    assert mb.apply_update(optimizer, report).applied


def test_an_autocast_around_the_whole_run_loses_no_gradient() -> None:
    """Autocast remembers casts of weights, also those made without a graph, which would cut the second forward off."""
    model, batch = case(dropout=0.0)
    model.float()
    batch = {key: value.float() if value.is_floating_point() else value for key, value in batch.items()}
    wanted = None
    for keep in (3, 0, 1):
        clear(model)
        with torch.autocast("cpu", torch.bfloat16):
            mb.GatheredAccumulator(model, encode, info_nce, micro_batch_size=4, keep_graphs=keep).run(batch)
        wanted = wanted or gradients(model)
        assert difference(gradients(model), wanted) <= 1e-6


def test_bfloat16_parameters_accumulate_in_float32() -> None:
    model, batch = case(96)
    truth = in_one_piece(model, batch, siglip)
    model.bfloat16()
    batch = {key: value.bfloat16() if value.is_floating_point() else value for key, value in batch.items()}
    errors = {}
    for size in (96, 1):
        clear(model)
        mb.GatheredAccumulator(model, encode, siglip, micro_batch_size=size).run(batch)
        assert all(p.grad is None or p.grad.dtype == torch.bfloat16 for p in model.parameters())
        errors[size] = difference(gradients(model), truth)
    assert errors[1] <= 1.5 * errors[96]


# ---------------------------------------------------------------------------------------------------------------------
# The same as the plain accumulator


def test_reports_evaluate_add_and_updates_are_those_of_the_accumulator() -> None:
    model, batch = case()
    expected = in_one_piece(model, batch, info_nce)
    accumulator = mb.GatheredAccumulator(model, encode, info_nce, micro_batch_size=4)
    evaluated = accumulator.evaluate(batch)
    assert model.forwards == 3
    assert all(p.grad is None for p in model.parameters())
    report = accumulator.run(batch)
    assert torch.equal(report.loss, evaluated.loss)
    assert report.loss.dtype == torch.float64
    assert (report.num_samples, report.accumulation_steps, report.retries) == (N, 3, 0)
    assert float(report.loss_weight) == N
    with pytest.raises(ValueError, match="gradient from before"):
        accumulator.run(batch)
    accumulator.run(batch, add=True)
    assert difference(gradients(model), [None if g is None else 2 * g for g in expected]) <= 1e-12
    update = mb.apply_update(torch.optim.SGD(model.parameters(), lr=0.1), report, max_norm=1.0)
    assert update.applied


def test_the_micro_batches_own_gradients_are_measured_without_that_of_the_loss() -> None:
    model, batch = case()
    parts = list(mb.Window([batch]).cut(4))
    outputs = [encode(model, part) for part in parts]
    leaves = [{key: value.detach() for key, value in out.items()} for out in outputs]
    for leaf in leaves:
        leaf["left"].requires_grad_(), leaf["right"].requires_grad_()
    info_nce(model, {key: torch.cat([leaf[key] for leaf in leaves]) for key in leaves[0]}, None).backward()
    squares, parameters = [], [*model.left.parameters(), *model.right.parameters()]
    for out, leaf, part in zip(outputs, leaves, parts, strict=True):
        roots = [out["left"], out["right"]]
        grads = torch.autograd.grad(roots, parameters, [leaf["left"].grad, leaf["right"].grad])
        squares.append(sum(float(g.square().sum()) for g in grads) / (len(part["x"]) / N) ** 2)
    clear(model)
    report = mb.GatheredAccumulator(model, encode, info_nce, micro_batch_size=4, measure="squares").run(batch)
    moments = report.moments
    assert moments is not None
    assert torch.allclose(moments.squared_norms, torch.tensor(squares, dtype=torch.float64), rtol=1e-12)
    weighted = sum(len(part["x"]) / N * q for part, q in zip(parts, squares, strict=True))
    assert abs(float(moments.mean_squared_norm) - weighted) <= 1e-12 * weighted
    total = sum(float(p.grad.square().sum()) for p in model.parameters() if p.grad is not None)
    assert abs(float(moments.squared_norm) - total) <= 1e-12 * total
    assert report.mean_squares is not None
    assert sum(float(s.sum()) for s in report.mean_squares if s is not None) == pytest.approx(weighted, rel=1e-12)


def test_graphs_that_a_budget_was_found_to_hold_are_restored_without_looking_again() -> None:
    def make() -> tuple[Towers, Batch, mb.GatheredAccumulator]:
        model, batch = case()
        return model, batch, mb.GatheredAccumulator(model, encode, info_nce, micro_batch_size=4, max_memory="10MB")

    _, _, fresh = make()
    assert fresh.state_dict()["graphs"] is None
    model, batch, first = make()
    first.run(batch)
    assert first.keep_graphs == 3
    model, batch, second = make()
    second.load_state_dict(json.loads(json.dumps(first.state_dict())))
    assert second.keep_graphs == 3
    second.run(batch)
    assert model.forwards == 3, "no rehearsal"


def test_what_was_learned_is_saved_and_restored() -> None:
    model, _ = case()
    first = mb.GatheredAccumulator(model, encode, info_nce, micro_batch_size=4, keep_graphs=3)
    first._graphs.failed(4)
    second = mb.GatheredAccumulator(model, encode, info_nce, micro_batch_size=4, keep_graphs=3)
    second.load_state_dict(first.state_dict())
    assert second.keep_graphs == first.keep_graphs == 1
    with pytest.raises(ValueError, match="a gathered accumulator's state holds 'graphs'"):
        second.load_state_dict(mb.Accumulator(model, lambda m, b: (0, 0)).state_dict())


# ---------------------------------------------------------------------------------------------------------------------
# Errors


def run(encoder: Callable[..., Any] = encode, loss_fn: Callable[..., Any] = info_nce, **options: Any) -> Towers:
    model, batch = case()
    try:
        mb.GatheredAccumulator(model, encoder, loss_fn, micro_batch_size=4, **options).run(batch)
    finally:
        assert all(p.grad is None for p in model.parameters()), "gradients are as before"
    return model


@pytest.mark.parametrize(
    ("returned", "message"),
    [
        (lambda m, b: (m.left(b["x"]), m.log_scale.exp()), r"outputs\[1\] has shape \(\) .* temperature belongs into"),
        (lambda m, b: m.left(b["x"]).sum(0), r"outputs has shape \(6,\) for a micro-batch of 4 samples"),
        (lambda m, b: m.left(b["x"])[:, : len(b["x"]) - 1], r"outputs of two micro-batches differ: .* Pad them"),
        (lambda m, b: None, "encode returned a NoneType without a tensor"),
        (lambda m, b: [m.left(b["x"]).detach().numpy()], r"outputs\[0\] is an array"),
        (lambda m, b: {"left": m.left(b["x"]).detach(), "right": b["y"] @ torch.ones(5, 6).double()}, "depends on a"),
    ],
)
def test_outputs_that_are_not_rows_of_samples_are_refused(returned: Callable[..., Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        run(returned)


PAIRS: dict[str, tuple[Callable[..., Any], str]] = {
    "logits": (lambda m, b: m.left(b["x"]) @ m.right(b["y"]).T, r"outputs"),
    "among others": (lambda m, b: encode(m, b) | {"p": m.left(b["x"]) @ m.left(b["y"]).T}, r"outputs\['p'\]"),
    "of heads": (
        lambda m, b: (m.left(b["x"]), torch.einsum("ih,jh->ihj", m.left(b["x"]), m.right(b["y"]))),
        r"outputs\[1\]",
    ),
}


@pytest.mark.parametrize("method", ["run", "evaluate"])
@pytest.mark.parametrize("size", [2, 3, 4, 6])
@pytest.mark.parametrize("name", PAIRS)
def test_outputs_that_compare_the_samples_of_a_micro_batch_are_refused(name: str, size: int, method: str) -> None:
    """Also where all micro-batches are alike, so that their outputs fit together: 12 samples by 2, 3, 4 and 6."""
    encoder, path = PAIRS[name]
    model, batch = case(12, dropout=0.4)
    few = min(2, size - 1)
    accumulator = mb.GatheredAccumulator(model, encoder, siglip, micro_batch_size=size)
    shapes = rf"shape \({size}, .*{size}\) for a micro-batch of {size} samples, and \({few}, .*{few}\) for one of {few}"
    with pytest.raises(ValueError, match=rf"^{path} has {shapes}: it compares .* Return what it compares"):
        getattr(accumulator, method)(batch)
    assert all(p.grad is None for p in model.parameters())


@pytest.mark.parametrize("keep", [0, 2])
def test_embeddings_as_long_as_a_micro_batch_is_large_are_encoded_once_more_in_the_first_window_only(keep: int) -> None:
    model, batch = case(12, dropout=0.4)
    torch.manual_seed(3)
    expected = reference(model, lambda: one_graph(model, batch, 6))
    following = torch.rand(3)
    accumulator = mb.GatheredAccumulator(model, encode, info_nce, micro_batch_size=6, keep_graphs=keep)
    for extra in (1, 0, 0):
        model.forwards = 0
        clear(model)
        torch.manual_seed(3)
        accumulator.run(batch)
        assert torch.equal(torch.rand(3), following), "random numbers are as if it had not been"
        assert difference(gradients(model), expected) <= 1e-12
        assert model.forwards == 2 * 2 - keep + extra


def test_statistics_do_not_count_samples_that_were_encoded_once_more() -> None:
    model = nn.Sequential(nn.Linear(5, 6), nn.BatchNorm1d(6)).double()
    x, sizes = torch.randn(12, 5, dtype=torch.float64), []

    def seen(m: nn.Module, part: Tensor) -> Tensor:
        sizes.append(len(part))
        return m(part)

    options: dict[str, Any] = {"micro_batch_size": 6, "batch_norm": "micro_batch", "keep_graphs": 0}
    mb.GatheredAccumulator(model, seen, lambda m, z, w: torch.pdist(z).mean(), **options).run(x)
    assert sizes == [6, 6, 2, 6, 6]
    assert int(model[1].num_batches_tracked) == 2


def test_embeddings_as_long_as_a_micro_batch_are_trained_where_the_model_cannot_run_fewer_samples() -> None:
    model, batch = case(12)

    def only_whole(m: Towers, b: Batch) -> dict[str, Tensor]:
        assert len(b["x"]) == 6
        return encode(m, b)

    expected = in_one_piece(model, batch, info_nce)
    mb.GatheredAccumulator(model, only_whole, info_nce, micro_batch_size=6).run(batch)
    assert difference(gradients(model), expected) <= 1e-12


def test_in_one_micro_batch_pairs_are_all_pairs() -> None:
    model, batch = case(6)
    logits = lambda m, b: m.left(b["x"]) @ m.right(b["y"]).T  # noqa: E731
    loss_fn = lambda m, z, w: F.cross_entropy(z, torch.arange(len(z)))  # noqa: E731
    expected = reference(model, lambda: loss_fn(None, logits(model, batch), None))
    mb.GatheredAccumulator(model, logits, loss_fn, micro_batch_size=6).run(batch)
    assert difference(gradients(model), expected) <= 1e-12


def test_limit_pairs_in_a_multiple_of_the_micro_batch_are_not_seen_where_all_are_alike() -> None:
    """Each sample against two views of all in the micro-batch: (n, 2n), and silently the loss of some pairs."""
    model, batch = case(12)

    def views(m: Towers, b: Batch) -> Tensor:
        return m.left(b["x"]) @ torch.cat([m.left(b["y"]), m.right(b["y"])]).T

    loss_fn = lambda m, z, w: F.cross_entropy(z, torch.arange(len(z)) % z.shape[1])  # noqa: E731
    expected = reference(model, lambda: loss_fn(None, views(model, batch), None))
    mb.GatheredAccumulator(model, views, loss_fn, micro_batch_size=4).run(batch)
    assert difference(gradients(model), expected) > 0.1
    clear(model)
    with pytest.raises(ValueError, match="outputs of two micro-batches differ"):
        mb.GatheredAccumulator(model, views, loss_fn, micro_batch_size=4).run(case()[1])


def test_limit_pairs_are_not_seen_in_micro_batches_of_one_sample() -> None:
    model, batch = case(12)
    logits, loss_fn = PAIRS["logits"][0], lambda m, z, w: z.square().mean()
    expected = reference(model, lambda: loss_fn(None, logits(model, batch), None))
    mb.GatheredAccumulator(model, logits, loss_fn, micro_batch_size=1).run(batch)
    assert difference(gradients(model), expected) > 0.1


def test_outputs_without_parameters_are_refused_where_a_budget_is_planned_too() -> None:
    with pytest.raises(ValueError, match="no output of encode depends on a trainable parameter"):
        run(lambda m, b: {key: z.detach() for key, z in encode(m, b).items()}, max_memory="10MB")


@pytest.mark.parametrize(
    ("loss_fn", "message"),
    [
        (lambda m, o, w: scores(m, o), r"returned a tensor of shape \(11, 11\): .* one tensor of shape \(\)"),
        (lambda m, o, w: info_nce(m, o, w).item(), "returned a float"),
        (lambda m, o, w: info_nce(m, o, w).detach(), "depends on no output"),
        (lambda m, o, w: m.log_scale * 1.0, "depends on no output"),
    ],
)
def test_losses_without_a_gradient_are_refused(loss_fn: Callable[..., Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        run(loss_fn=loss_fn)


def test_a_trainable_tensor_outside_of_model_and_loss_is_refused() -> None:
    scale = nn.Parameter(torch.ones((), dtype=torch.float64))
    with pytest.raises(ValueError, match="trainable tensor outside of the model: 'scale'"):
        run(loss_fn=lambda m, o, w: info_nce(m, o, w) * scale)
    outside = torch.ones((), dtype=torch.float64, requires_grad=True)
    with pytest.raises(ValueError, match="trainable tensor outside of the model: 'outside'"):
        run(loss_fn=lambda m, o, w: info_nce(m, o, w) * outside)
    assert outside.grad is None
    with pytest.raises(ValueError, match="trainable tensor outside of the model: 'scale'"):
        run(lambda m, b: {key: z * scale if key != "label" else z for key, z in encode(m, b).items()}, keep_graphs=0)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"keep_graphs": -1}, "keep_graphs must be an integer of at least 0, or 'auto', got -1"),
        ({"batch_norm": "exact"}, "batch_norm='exact' is not for losses over all outputs"),
        ({"keep_graphs": True}, "keep_graphs must be an integer"),
        ({"encoder": lambda m: m}, r"encode must be callable with \(model, micro_batch\)"),
        ({"loss_fn": lambda m, o: o}, r"loss_fn must be callable with \(model, outputs, window\)"),
        ({"loss_fn": nn.CrossEntropyLoss()}, r"loss_fn must be callable with \(model, outputs, window\)"),
    ],
)
def test_what_cannot_work_is_refused_before_anything_runs(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        run(**arguments)


def swapped(window: Any) -> Any:
    return window


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (
            lambda: mb.RowBlocks(info_nce, rows=4),
            r"block_loss must be callable with \(model, outputs, window, rows\), and info_nce\(model: .*\) .* is not: "
            r"too many positional arguments\. The loss of all samples at once is a loss_fn without RowBlocks",
        ),
        (
            lambda: mb.RowBlocks(swapped, rows=4),
            r"block_loss must be callable with \(model, outputs, window, rows\), and swapped\(window: .* is not: too",
        ),
        (lambda: mb.RowBlocks(7, rows=4), r"with \(model, outputs, window, rows\), got 7, which cannot be called"),
        (
            lambda: run(loss_fn=info_nce_rows),
            r"loss_fn must be callable .* missing a required argument: 'rows'\. A loss in blocks of rows is given as "
            r"RowBlocks\(block_loss, rows=...\)",
        ),
        (
            lambda: run(loss_fn=nn.CrossEntropyLoss()),
            r"CrossEntropyLoss\(input: .*\) .* is not: .*\. Write one that calls it with what it needs of outputs",
        ),
        (lambda: run(nn.Linear(5, 6)), r"Linear\(input: .*encode=lambda model, micro_batch: model\(micro_batch\)"),
    ],
)
def test_functions_with_other_arguments_are_refused_with_what_to_give_instead(
    make: Callable[[], Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        make()


def test_blocks_have_at_least_one_row() -> None:
    with pytest.raises(ValueError, match="rows must be an integer of at least 1, got 0"):
        mb.RowBlocks(info_nce_rows, rows=0)


# ---------------------------------------------------------------------------------------------------------------------
# On a GPU


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("keep", [0, 1, 3])
def test_on_a_gpu_gradients_and_masks_are_the_same(keep: int) -> None:
    model, batch = case(dropout=0.4)
    model.cuda()

    def on_gpu(m: Towers, outputs: dict[str, Tensor], window: Any) -> Tensor:
        logits, targets = scores(m, outputs), torch.arange(N, device="cuda")
        return (F.cross_entropy(logits, targets) + F.cross_entropy(logits.T, targets)) / 2

    def whole() -> Tensor:
        parts = [encode(model, {key: value.cuda() for key, value in p.items()}) for p in mb.Window([batch]).cut(4)]
        return on_gpu(model, {key: torch.cat([part[key] for part in parts]) for key in parts[0]}, None)

    torch.manual_seed(3)
    expected = reference(model, whole)
    following = torch.rand(3, device="cuda")
    torch.manual_seed(3)
    pinned = {key: value.pin_memory() for key, value in batch.items()}
    mb.GatheredAccumulator(model, encode, on_gpu, micro_batch_size=4, keep_graphs=keep).run(pinned)
    assert difference(gradients(model), expected) <= 1e-10
    assert torch.equal(torch.rand(3, device="cuda"), following)
