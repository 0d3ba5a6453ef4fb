"""With `rng="aligned"` a window of any cut, failing or not, is the full batch: masks, noise, gradient, what follows."""

import itertools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from helpers import clear, difference, gradients, reference
from test_aligned_random import MODELS, N, Noisy, case, loss_sum
from test_contrastive_recovery import run_with_failures as run_gathered_with_failures
from test_recovery import run_with_failures
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

import macrobatch as mb
from macrobatch import alignment, gathered_forward, recovery
from macrobatch.alignment import DrawnAnew, FullBatchRandom

Model = nn.Module


def loss_fn(model: Model, x: Tensor) -> tuple[Tensor, int]:
    return loss_sum(model, x), len(x)


def encode(model: Model, x: Tensor) -> tuple[Tensor, Tensor]:
    return model(x), x


def spread(model: Model, outputs: tuple[Tensor, Tensor], window: Any) -> Tensor:
    """A loss of all outputs that draws random numbers, too."""
    z, x = outputs
    return (z * torch.rand_like(z) - x).std(0).log().square().sum() + (z @ z.T).logsumexp(1).mean()


def in_one_piece(model: Model, x: Tensor, coupled: bool = False, seed: int = 5) -> tuple[list[Tensor | None], Tensor]:
    """The full batch's gradient, and the random numbers that follow it."""
    torch.manual_seed(seed)
    if coupled:
        return reference(model, lambda: spread(model, encode(model, x), None)), torch.rand(4)
    return reference(model, lambda: loss_sum(model, x) / len(x)), torch.rand(4)


def run(accumulator: mb.Accumulator, model: Model, batch: Any, seed: int = 5) -> mb.Report:
    clear(model)
    torch.manual_seed(seed)
    return accumulator.run(batch)


def accumulator_of(model: Model, coupled: bool = False, **options: Any) -> mb.Accumulator:
    options = {"micro_batch_size": 3, "rng": "aligned"} | options
    if coupled:
        return mb.GatheredAccumulator(model, encode, spread, **options)
    options.pop("keep_graphs", None)
    return mb.Accumulator(model, loss_fn, **options)


@pytest.fixture
def _fast_collection(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(recovery.gc, "collect", lambda: 0)
    monkeypatch.setattr(gathered_forward.gc, "collect", lambda: 0)


# ---------------------------------------------------------------------------------------------------------------------
# The gradient


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("size", [1, 3, 5, 7])
def test_gradient_and_the_random_numbers_that_follow_are_those_of_the_full_batch(name: str, size: int) -> None:
    model, x = case(name)
    expected, following = in_one_piece(model, x)
    accumulator = accumulator_of(model, micro_batch_size=size)
    for _ in range(2):
        report = run(accumulator, model, x)
        assert torch.equal(torch.rand(4), following)
        assert difference(gradients(model), expected) <= 1e-12
    assert report.accumulation_steps == -(-N // size)


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("keep", [0, 1, 2, 3])
def test_so_they_are_for_a_loss_over_all_outputs_that_draws_numbers_of_its_own(name: str, keep: int) -> None:
    model, x = case(name)
    expected, following = in_one_piece(model, x, coupled=True)
    run(accumulator_of(model, True, keep_graphs=keep), model, x)
    assert torch.equal(torch.rand(4), following)
    assert difference(gradients(model), expected) <= 1e-12


@pytest.mark.parametrize("coupled", [False, True])
@pytest.mark.parametrize("name", MODELS)
def test_control_without_it_gradients_differ_by_more_than_a_hundredth(name: str, coupled: bool) -> None:
    model, x = case(name)
    expected, _ = in_one_piece(model, x, coupled)
    run(accumulator_of(model, coupled, rng=None), model, x)
    assert difference(gradients(model), expected) > 0.01


@pytest.mark.parametrize("coupled", [False, True])
def test_evaluate_gives_the_loss_of_the_full_batch_in_train_mode(coupled: bool) -> None:
    model, x = case("noisy")
    torch.manual_seed(5)
    with torch.no_grad():
        expected = spread(model, encode(model, x), None) if coupled else loss_sum(model, x) / N
    following = torch.rand(4)
    torch.manual_seed(5)
    report = accumulator_of(model, coupled).evaluate(x)
    assert torch.equal(torch.rand(4), following)
    assert abs(float(report.loss) - float(expected)) <= 1e-12 * abs(float(expected))
    torch.manual_seed(5)
    anew = float(accumulator_of(model, coupled, rng=None).evaluate(x).loss)
    assert abs(anew - float(expected)) > 0.01 * abs(float(expected)), "the control"


@pytest.mark.parametrize("coupled", [False, True])
def test_so_it_does_for_a_model_that_is_frozen(coupled: bool) -> None:
    model, x = case("noisy")
    model.requires_grad_(False)
    torch.manual_seed(5)
    expected = spread(model, encode(model, x), None) if coupled else loss_sum(model, x) / N
    torch.manual_seed(5)
    report = accumulator_of(model, coupled).evaluate(x)
    assert abs(float(report.loss) - float(expected)) <= 1e-12 * abs(float(expected))


@pytest.mark.parametrize("coupled", [False, True])
def test_windows_may_come_cut_unevenly_and_fill_while_they_run(coupled: bool) -> None:
    model, x = case("noisy")
    expected, following = in_one_piece(model, x, coupled)
    for window in (mb.Window(x.split([1, 4, 2])), mb.Window(iter(x.split([4, 1, 2])))):
        run(accumulator_of(model, coupled, micro_batch_size=None), model, window)
        assert torch.equal(torch.rand(4), following)
        assert difference(gradients(model), expected) <= 1e-12


class Nested(Noisy):
    def forward(self, batch: Any) -> Tensor:
        assert batch["kind"] == "noisy"
        return super().forward(batch["views"][0] * batch["scale"] + batch["views"][1])


def test_batches_are_nested_structures() -> None:
    torch.manual_seed(0)
    model = Nested().double()
    views = [torch.randn(N, 6, dtype=torch.float64) for _ in range(2)]
    batch = {"views": views, "scale": torch.tensor(0.5).double(), "kind": "noisy", "names": list("abcdefg")}

    def squares(m: Model, b: Any) -> tuple[Tensor, int]:
        return m(b).square().sum(), len(b["names"])

    torch.manual_seed(5)
    expected = reference(model, lambda: squares(model, batch)[0] / N)
    run(mb.Accumulator(model, squares, micro_batch_size=3, rng="aligned"), model, batch)
    assert difference(gradients(model), expected) <= 1e-12


LAYOUTS: dict[str, Callable[[Tensor], Tensor]] = {
    "contiguous": lambda x: x,
    "channels last": lambda x: x.to(memory_format=torch.channels_last),
    "batch last in memory": lambda x: x.permute(1, 2, 3, 0).contiguous().permute(3, 0, 1, 2),
    "batch second in memory": lambda x: x.transpose(0, 1).contiguous().transpose(0, 1),
    "with gaps": lambda x: torch.stack([x, x], -1)[..., 0],
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_random_numbers_are_drawn_in_the_full_batchs_order_of_memory(layout: str) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Dropout(0.3), nn.Conv2d(3, 4, 3), nn.Dropout(0.3), nn.Flatten(), nn.Linear(16, 3)).double()
    x = LAYOUTS[layout](torch.randn(N, 3, 4, 4, dtype=torch.float64))
    torch.manual_seed(5)
    expected = reference(model, lambda: model(x).square().sum() / N)
    run(mb.Accumulator(model, lambda m, b: (m(b).square().sum(), len(b)), micro_batch_size=3, rng="aligned"), model, x)
    assert difference(gradients(model), expected) <= 1e-12


def test_a_window_in_another_order_of_memory_is_another_one() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Dropout(0.3), nn.Flatten(), nn.Linear(48, 3)).double()
    accumulator = mb.Accumulator(model, lambda m, b: (m(b).square().sum(), len(b)), micro_batch_size=3, rng="aligned")
    x = torch.randn(N, 3, 4, 4, dtype=torch.float64)
    for lay_out in (*LAYOUTS.values(), *LAYOUTS.values()):
        batch = lay_out(x)
        torch.manual_seed(5)
        expected = reference(model, lambda batch=batch: model(batch).square().sum() / N)
        run(accumulator, model, batch)
        assert difference(gradients(model), expected) <= 1e-12


class Recurrent(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers, self.head = nn.LSTM(1, 5, num_layers=3, dropout=0.4, batch_first=True), nn.Linear(5, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.layers(x[:, :, None])[0])[:, :, 0]


@pytest.mark.parametrize(
    "options",
    [
        {"measure": "squares"},
        {"frozen": [nn.Linear(2, 2)]},
        {"micro_batch_size": "auto", "max_memory": "1GB"},
        {"batch_norm": "micro_batch"},
        {"device": "cpu"},
        {"count": len},
    ],
)
def test_other_options_go_with_it(options: dict[str, Any]) -> None:
    torch.manual_seed(0)
    model, x = Recurrent().double(), torch.randn(N, 6, dtype=torch.float64)
    expected, following = in_one_piece(model, x)
    form = loss_sum if "count" in options else loss_fn
    accumulator = mb.Accumulator(model, form, **({"micro_batch_size": 3, "rng": "aligned"} | options))
    for _ in range(4):
        run(accumulator, model, x)
        assert torch.equal(torch.rand(4), following)
        assert difference(gradients(model), expected) <= 1e-12


def test_under_autocast_and_in_bfloat16_masks_are_the_full_batchs() -> None:
    """As far from the full batch as rounding is, and much nearer than with masks of their own."""
    single, half, autocast = torch.float32, torch.bfloat16, {"autocast": torch.bfloat16}
    for of_model, of_batch, options in ((single, single, autocast), (half, half, {}), (half, single, autocast)):
        model, x = case("perceptron")
        model, x = model.to(of_model), x.to(of_batch)
        torch.manual_seed(5)
        with torch.autocast("cpu", torch.bfloat16, enabled="autocast" in options):
            loss = loss_sum(model, x) / N
        expected = reference(model, lambda loss=loss: loss)
        errors = []
        for rng in ("aligned", None):
            run(accumulator_of(model, rng=rng, **options), model, x)
            errors.append(difference(gradients(model), expected))
        assert errors[0] < 0.02
        assert errors[1] > 0.1


def test_what_the_full_batch_draws_is_asked_under_the_same_autocast() -> None:
    model, x = case("perceptron")

    def drops(m: Model, b: Tensor) -> tuple[Tensor, int]:
        return F.dropout(m(b), 0.3 if torch.is_autocast_enabled("cpu") else 0.0).square().sum(), len(b)

    accumulator = mb.Accumulator(model.float(), drops, micro_batch_size=3, rng="aligned", autocast=torch.bfloat16)
    run(accumulator, model, x.float())
    assert all(g is not None for g in gradients(model))


# ---------------------------------------------------------------------------------------------------------------------
# Rows that are not the samples in their order


def pairs(n: int) -> tuple[Tensor, Tensor]:
    """Samples, and lengths to sort them by."""
    torch.manual_seed(0)
    return torch.randn(n, 4, 6, dtype=torch.float64), torch.arange(n).mul(5).remainder(7)


def by_length(x: Tensor, lengths: Tensor) -> Tensor:
    return lengths.argsort(descending=True)


IN_ORDER: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "views side by side": lambda x, lengths: x[:, :2].flatten(0, 1),
    "views stacked": lambda x, lengths: torch.stack([x[:, 0], x[:, 1]], 1),
    "repeated": lambda x, lengths: x[:, 0].repeat_interleave(3, 0),
    "time within samples": lambda x, lengths: x.flatten(0, 1),
    "batch second": lambda x, lengths: x.transpose(0, 1),
    "views in front": lambda x, lengths: torch.stack([x[:, 0], x[:, 1]]),
}
OUT_OF_ORDER: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "views": lambda x, lengths: torch.cat([x[:, 0], x[:, 1]]),
    "repeated": lambda x, lengths: x[:, 0].repeat(3, 1),
    "time first": lambda x, lengths: x.transpose(0, 1).flatten(0, 1),
    "sorted": lambda x, lengths: x[by_length(x, lengths)],
    "sorted the other way": lambda x, lengths: x[by_length(x, -lengths)],
    "flipped": lambda x, lengths: x.flip(0),
}
DRAWS: dict[str, Callable[[Tensor], Tensor]] = {
    "dropout": lambda rows: F.dropout(rows, 0.4),
    "fused dropout": lambda rows: torch.native_dropout(rows, 0.4, True)[0],
    "alpha dropout": lambda rows: F.alpha_dropout(rows, 0.4, True),
    "feature dropout": lambda rows: F.dropout1d(rows.reshape(len(rows), -1, 6), 0.4),
    "noise": lambda rows: rows + 0.3 * torch.randn_like(rows),
    "mask": lambda rows: rows * (torch.rand(rows.shape, dtype=rows.dtype) < 0.6),
    "path": lambda rows: torch.where(rows[..., :1].new_empty(rows[..., :1].shape).bernoulli_(0.6) > 0, rows, -rows),
}
SIZES_AND_DRAWS = [(2, "dropout"), (3, "dropout"), *((N, draw) for draw in DRAWS)]


def drops(order: Callable[..., Tensor], draw: Callable[[Tensor], Tensor]) -> Callable[..., tuple[Tensor, int]]:
    """A loss of rows that are drawn upon in an order."""

    def loss(m: Model, batch: tuple[Tensor, Tensor]) -> tuple[Tensor, int]:
        return m(draw(order(*batch))).tanh().square().sum(), len(batch[1])

    return loss


@pytest.mark.parametrize(("n", "draw"), SIZES_AND_DRAWS)
@pytest.mark.parametrize("order", IN_ORDER)
def test_rows_that_are_the_samples_in_their_order_have_the_full_batchs_numbers(n: int, order: str, draw: str) -> None:
    model, loss = nn.Linear(6, 3).double(), drops(IN_ORDER[order], DRAWS[draw])
    batch = pairs(n)
    torch.manual_seed(5)
    expected = reference(model, lambda: loss(model, batch)[0] / n)
    run(mb.Accumulator(model, loss, micro_batch_size=n - 1, rng="aligned"), model, batch)
    assert difference(gradients(model), expected) <= 1e-12


@pytest.mark.parametrize(("n", "draw"), SIZES_AND_DRAWS)
@pytest.mark.parametrize("order", OUT_OF_ORDER)
def test_rows_that_are_not_are_refused_each_time(n: int, order: str, draw: str) -> None:
    model, loss = nn.Linear(6, 3).double(), drops(OUT_OF_ORDER[order], DRAWS[draw])
    accumulator = mb.Accumulator(model, loss, micro_batch_size=2, rng="aligned")
    for _ in range(2):
        with pytest.raises(ValueError, match=r"for rows that are not the samples in their order.*x.repeat_interleave"):
            accumulator.run(pairs(n))
    assert all(g is None for g in gradients(model))


def sorts(keys: Tensor) -> Callable[..., tuple[Tensor, int]]:
    """A loss that sorts samples by a key of theirs."""
    return drops(lambda x, positions: x[keys[positions].argsort(stable=True)], DRAWS["dropout"])


def numbered(n: int = N) -> tuple[Tensor, Tensor]:
    return pairs(n)[0], torch.arange(n)


@pytest.mark.parametrize("keys", [k for k in itertools.product((0, 1), repeat=4) if len({k[0], k[2], k[3]}) > 1])
def test_a_sort_is_seen_if_it_tells_the_first_the_middle_and_the_last_sample_apart(keys: tuple[int, ...]) -> None:
    """Whether they come sorted or not, because another window of this shape may come otherwise."""
    accumulator = mb.Accumulator(nn.Linear(6, 3).double(), sorts(torch.tensor(keys)), micro_batch_size=2, rng="aligned")
    with pytest.raises(ValueError, match="rows that are not the samples in their order"):
        accumulator.run(numbered(4))


def test_a_loss_over_all_outputs_is_refused_stacked_views() -> None:
    model, x = nn.Sequential(nn.Linear(6, 6), nn.Dropout(0.5)).double(), torch.randn(N, 6, dtype=torch.float64)
    encodes = lambda m, b: m(torch.cat([b, 2 * b])).view(2, -1, 6).transpose(0, 1)  # noqa: E731
    accumulator = mb.GatheredAccumulator(
        model, encodes, lambda m, z, w: z.std(0).sum(), micro_batch_size=3, rng="aligned"
    )
    for work in (accumulator.run, accumulator.evaluate):
        with pytest.raises(ValueError, match="rows that are not the samples in their order"):
            work(x)


def test_a_model_with_batch_norm_is_refused_stacked_views_and_not_others() -> None:
    """Its layers see samples together, so that rows of all samples would change with one."""
    x = torch.randn(N, 6, dtype=torch.float64)
    model = nn.Sequential(nn.Linear(6, 6), nn.BatchNorm1d(6), nn.ReLU(), nn.Dropout(0.5)).double()
    options: dict[str, Any] = {"micro_batch_size": 3, "batch_norm": "micro_batch", "rng": "aligned"}
    mb.Accumulator(model, lambda m, b: (m(b).square().sum(), len(b)), **options).run(x)
    accumulator = mb.Accumulator(model, lambda m, b: (m(torch.cat([b, -b])).square().sum(), len(b)), **options)
    clear(model)
    with pytest.raises(ValueError, match="rows that are not the samples in their order"):
        accumulator.run(x)
    assert model.training
    assert model[1].training


HIDDEN: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "a draw that is reshaped first": lambda x, _: x[:, 0].flip(0) * torch.randn(len(x), dtype=x.dtype)[:, None],
    "a draw that meets something else first": lambda x, _: x[:, 0].flip(0) + x.new_ones(6) * torch.randn_like(x[:, 0]),
    "samples that see each other": lambda x, _: F.dropout(
        F.batch_norm(x[:, 0], None, None, training=True).flip(0), 0.5
    ),
    "a sort that leaves those three as they are": lambda x, at: F.dropout(
        x[at.eq(4).to(torch.int).argsort(stable=True, descending=True), 0], 0.5
    ),
}


@pytest.mark.parametrize("hidden", HIDDEN)
def test_limit_an_order_that_is_not_seen_is_wrong(hidden: str) -> None:
    model, loss, batch = nn.Linear(6, 3).double(), drops(HIDDEN[hidden], lambda rows: rows), numbered()
    torch.manual_seed(5)
    expected = reference(model, lambda: loss(model, batch)[0] / N)
    run(mb.Accumulator(model, loss, micro_batch_size=3, rng="aligned"), model, batch)
    assert difference(gradients(model), expected) > 0.01


def test_limit_a_compiled_model_draws_what_it_draws_uncompiled() -> None:
    model, x = case("perceptron")
    expected, following = in_one_piece(model, x)
    run(accumulator_of(torch.compile(model, backend="eager")), model, x)
    assert torch.equal(torch.rand(4), following)
    assert difference(gradients(model), expected) <= 1e-12


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("coupled", [False, True])
@pytest.mark.parametrize("name", ["perceptron", "images"])
def test_on_a_gpu_masks_are_the_full_batchs_too(name: str, coupled: bool) -> None:
    model, x = case(name)
    model, x = model.cuda(), x.cuda()
    expected, _ = in_one_piece(model, x, coupled)
    following = torch.rand(4, device="cuda")
    run(accumulator_of(model, coupled), model, x)
    torch.rand(4)
    assert torch.equal(torch.rand(4, device="cuda"), following)
    assert difference(gradients(model), expected) <= 1e-12


# ---------------------------------------------------------------------------------------------------------------------
# Out of memory


class Twice(torch.autograd.Function):
    """A function written in Python: a backward that breaks in it cannot be mended in place."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return 2 * x

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Tensor:
        return 2 * g


class Unmendable(Noisy):
    def forward(self, x: Tensor) -> Tensor:
        return Twice.apply(super().forward(x))


@pytest.mark.usefixtures("_fast_collection")
@pytest.mark.parametrize("kind", [Noisy, Unmendable])
def test_a_failure_before_every_operation_leaves_the_full_batchs_gradient(
    kind: Callable[[], Noisy], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Halves draw what the whole micro-batch would have drawn, also where the window runs again from zero."""
    torch.manual_seed(0)
    model, x = kind().double(), torch.randn(8, 6, dtype=torch.float64)
    expected, following = in_one_piece(model, x)
    accumulator, sizes = accumulator_of(model, micro_batch_size=4), set()
    run(accumulator, model, x)
    clear(model)
    _, clean = run_with_failures(accumulator, x, set(), monkeypatch)
    for point in range(1, clean.count + 1, 1 if kind is Noisy else 3):
        clear(model)
        accumulator._limit.__init__(4)
        torch.manual_seed(5)
        report, mode = run_with_failures(accumulator, x, {point}, monkeypatch)
        assert torch.equal(torch.rand(4), following), point
        assert difference(gradients(model), expected) <= 1e-12, point
        assert mode.failures == report.retries == 1
        sizes.add(report.micro_batch_sizes)
    assert sizes == {(2, 2, 2, 2), (4, 2, 2)}


@pytest.mark.usefixtures("_fast_collection")
@pytest.mark.parametrize("phase", ["forward", "loss", "backward"])
@pytest.mark.parametrize("keep", [0, 1, 2])
def test_so_does_one_in_each_phase_of_a_loss_over_all_outputs(
    keep: int, phase: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.manual_seed(0)
    model, x = Noisy().double(), torch.randn(8, 6, dtype=torch.float64)
    expected, following = in_one_piece(model, x, coupled=True)
    accumulator = accumulator_of(model, True, micro_batch_size=4, keep_graphs=keep)
    assert isinstance(accumulator, mb.GatheredAccumulator)
    run(accumulator, model, x)
    clear(model)
    _, clean = run_gathered_with_failures(accumulator, x, set(), monkeypatch, phase)
    for point in range(1, clean.count + 1, 2):
        clear(model)
        accumulator._limit.__init__(4)
        accumulator._graphs.__init__(keep + 1)
        torch.manual_seed(5)
        if phase == "loss" and keep == 0:
            with pytest.raises(torch.OutOfMemoryError, match="RowBlocks"):
                run_gathered_with_failures(accumulator, x, {point}, monkeypatch, phase)
            continue
        report, mode = run_gathered_with_failures(accumulator, x, {point}, monkeypatch, phase)
        assert torch.equal(torch.rand(4), following), point
        assert difference(gradients(model), expected) <= 1e-12, point
        assert mode.failures == report.retries == 1


@pytest.mark.usefixtures("_fast_collection")
def test_halves_in_a_backward_need_no_new_first_forwards(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where each draws anew the whole window must run again, because halves would have other masks."""
    for rng, sizes in (("aligned", (4, 2, 2)), (None, (2, 2, 2, 2))):
        model, x = case("perceptron")
        accumulator = accumulator_of(model, True, micro_batch_size=4, keep_graphs=0, rng=rng)
        batch = torch.cat([x, x[:1]])
        run(accumulator, model, batch)
        clear(model)
        _, clean = run_gathered_with_failures(accumulator, batch, set(), monkeypatch, "backward")
        clear(model)
        report, _ = run_gathered_with_failures(accumulator, batch, {clean.count - 5}, monkeypatch, "backward")
        assert report.micro_batch_sizes == sizes


# ---------------------------------------------------------------------------------------------------------------------
# What is looked at once


@pytest.fixture
def recordings(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The samples of every full batch that was asked what it draws."""
    asked: list[int] = []
    real = alignment.draws_in_one_piece

    def counted(recipe: Any, forward: Any, window: mb.Window) -> Any:
        asked.append(window.num_samples)
        return real(recipe, forward, window)

    monkeypatch.setattr(alignment, "draws_in_one_piece", counted)
    return asked


def test_windows_that_are_alike_are_asked_once_what_they_draw(recordings: list[int]) -> None:
    model, x = case("perceptron")
    accumulator = accumulator_of(model)
    for _ in range(3):
        run(accumulator, model, torch.randn_like(x))
    assert recordings == [7]
    run(accumulator, model, x[:5])
    run(accumulator, model, x)
    accumulator.evaluate(x)
    assert recordings == [7, 5, 7], "the last one without gradients"


@pytest.mark.parametrize(
    "change",
    [
        lambda model: model.eval(),
        lambda model: setattr(model.layers[1], "p", 0.0),
        lambda model: setattr(model.layers[1], "p", 1.0),
        lambda model: model.layers.insert(1, nn.Dropout(0.2)),
        lambda model: setattr(model, "layers", nn.Sequential(nn.Dropout(0.5), nn.Linear(6, 6)).double()),
    ],
)
def test_a_model_that_was_changed_is_asked_again(change: Callable[[Any], Any], recordings: list[int]) -> None:
    model, x = case("perceptron")
    accumulator = accumulator_of(model)
    run(accumulator, model, x)
    change(model)
    expected, following = in_one_piece(model, x)
    run(accumulator, model, x)
    assert torch.equal(torch.rand(4), following)
    assert difference(gradients(model), expected) <= 1e-12
    assert recordings == [7, 7]


def test_a_window_with_another_flag_or_probability_is_asked_again(recordings: list[int]) -> None:
    model, x = case("perceptron")

    def as_told(m: Model, b: Any) -> tuple[Tensor, int]:
        out = F.dropout(b["x"], b["p"], b["drops"])
        return m(out + torch.rand_like(out) if b["kind"] == "noisy" else out).square().sum(), len(out)

    accumulator = mb.Accumulator(model, as_told, micro_batch_size=3, rng="aligned")
    quiet = {"x": x, "p": 0.5, "drops": True, "kind": "plain"}
    for change in ({}, {"p": 0.0}, {"drops": False}, {"kind": "noisy"}, {}):
        batch = quiet | change
        torch.manual_seed(5)
        expected = reference(model, lambda batch=batch: as_told(model, batch)[0] / N)
        following = torch.rand(4)
        run(accumulator, model, batch)
        assert torch.equal(torch.rand(4), following)
        assert difference(gradients(model), expected) <= 1e-12
    assert len(recordings) == 4


def test_a_change_that_cannot_be_seen_is_an_error_and_then_right() -> None:
    model, x = case("perceptron")
    p = itertools.chain([0.0] * 9, itertools.repeat(0.5))  # fake, five times two samples, three micro-batches

    def drops(m: Model, b: Tensor) -> tuple[Tensor, int]:
        return F.dropout(m(b), next(p)).square().sum(), len(b)

    accumulator = mb.Accumulator(model, drops, micro_batch_size=3, rng="aligned")
    run(accumulator, model, x)
    with pytest.raises(ValueError, match="draws more often than the full batch"):
        run(accumulator, model, x)
    assert all(g is None for g in gradients(model))
    torch.manual_seed(5)
    expected = reference(model, lambda: drops(model, x)[0] / N)
    run(accumulator, model, x)
    assert difference(gradients(model), expected) <= 1e-12


def test_without_it_forwards_are_called_as_they_are() -> None:
    """Not so much as a context manager for each micro-batch."""
    assert DrawnAnew().in_order(loss_fn, lambda model, x: 1) is loss_fn
    assert DrawnAnew().around(loss_fn, lambda model, x: None) is loss_fn


class Counting(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("seen", torch.zeros(()))

    def forward(self, x: Tensor) -> Tensor:
        self.seen.add_(len(x))
        return x


def test_model_and_random_numbers_are_not_changed_by_looking(recordings: list[int]) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 6), nn.BatchNorm1d(6), nn.Dropout(0.3), Counting()).double()
    x = torch.randn(N, 6, dtype=torch.float64)
    model(x)
    once = {name: b.clone() for name, b in model.named_buffers()}
    model[1].reset_running_stats()
    model[3].seen.zero_()
    run(accumulator_of(model, micro_batch_size=7, batch_norm="micro_batch"), model, x)
    assert recordings == [7]
    assert all(torch.equal(b, once[name]) for name, b in model.named_buffers())
    assert all(type(p) is nn.Parameter for p in model.parameters())


# ---------------------------------------------------------------------------------------------------------------------
# What is refused


def looks(m: Model, x: Tensor) -> tuple[Tensor, int]:
    return m(x).square().sum(), int((x > 0).sum())


def chooses(m: Model, x: Tensor) -> tuple[Tensor, int]:
    return m(x)[x[:, 0] > 0].square().sum(), len(x)


def shuffles(m: Model, x: Tensor) -> tuple[Tensor, int]:
    return m(x[torch.randperm(len(x))]).square().sum(), len(x)


def seeds(m: Model, x: Tensor) -> tuple[Tensor, int]:
    torch.manual_seed(0)
    return loss_fn(m, x)


def seeds_afterwards(m: Model, x: Tensor) -> tuple[Tensor, int]:
    terms = loss_fn(m, x)
    torch.manual_seed(0)
    return terms


def recomputes(m: Model, x: Tensor) -> tuple[Tensor, int]:
    return checkpoint(m, x, use_reentrant=False).square().sum(), len(x)


class DrawsBehind(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Tensor:
        return g * torch.rand_like(g)


class SeedsBehind(DrawsBehind):
    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Tensor:
        torch.manual_seed(0)
        return g


@pytest.mark.parametrize(
    ("loss", "message"),
    [
        (looks, r"on fake tensors, which have no numbers, and there it failed, DataDependent.*leave rng out"),
        (chooses, r"on fake tensors, which have no numbers, and there it failed, DynamicOutputShape"),
        (shuffles, r"randperm draws random numbers in a way that has no rows"),
        (seeds, r"random numbers were drawn or seeded where it could not be seen .*torch.manual_seed"),
        (seeds_afterwards, r"random numbers were drawn or seeded where it could not be seen"),
        (recomputes, r"draws more often than the full batch, .*checkpointing"),
    ],
)
def test_what_cannot_be_aligned_is_an_error_that_leaves_gradients_as_before(
    loss: Callable[..., Any], message: str
) -> None:
    model, x = case("perceptron")
    accumulator = mb.Accumulator(model, loss, micro_batch_size=3, rng="aligned")
    before = reference(model, lambda: loss_sum(model, x))
    for p, g in zip(model.parameters(), before, strict=True):
        p.grad = None if g is None else g.clone()
    with pytest.raises(ValueError, match=message):
        accumulator.run(x, add=True)
    assert difference(gradients(model), before) == 0


@pytest.mark.parametrize("keep", [0, 1, 3])
@pytest.mark.parametrize(
    ("function", "message"),
    [
        (DrawsBehind, "draws more often than the full batch"),
        (SeedsBehind, "drawn or seeded where it could not"),
    ],
)
def test_random_numbers_drawn_in_backward_are_refused_also_where_graphs_were_kept(
    function: Any, message: str, keep: int
) -> None:
    model, x = case("perceptron")
    encodes = lambda m, b: function.apply(m(b))  # noqa: E731
    accumulator = mb.GatheredAccumulator(
        model, encodes, lambda m, z, w: z.std(0).sum(), micro_batch_size=3, keep_graphs=keep, rng="aligned"
    )
    with pytest.raises(ValueError, match=message):
        accumulator.run(x)
    assert all(g is None for g in gradients(model))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"rng": "full"}, r"rng must be 'aligned' or None, got 'full'"),
        ({"cut": lambda b, i, j: b[i:j]}, r"a batch with a cut= of its own cannot be: give nested tensors"),
        ({"batch_norm": "exact"}, r"micro-batches that run one by one, and batch_norm='exact' looks into their"),
        ({"batch_norm": "pooled"}, r"micro-batches that run one by one, and batch_norm='pooled'"),
    ],
)
def test_what_it_does_not_go_with_is_refused_at_once(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        mb.Accumulator(nn.Linear(6, 6), loss_fn, **({"micro_batch_size": 3, "rng": "aligned"} | options))


def test_micro_batches_that_cannot_be_joined_are_refused() -> None:
    model, x = case("perceptron")
    accumulator = accumulator_of(model, micro_batch_size=None)
    with pytest.raises(ValueError, match=r"batch cannot be joined: shapes \[\(3, 6\), \(4, 5\)\]"):
        accumulator.run(mb.Window([x[:3], x[3:, :5]]))
    halves = mb.Window([x[:4], x[4:]], num_samples=lambda b: len(b) // 2)
    with pytest.raises(ValueError, match=r"num_samples= says 3; own batches need cut= too"):
        accumulator.run(halves)


def test_a_model_on_several_devices_is_refused() -> None:
    model, x = case("perceptron")
    recipe = accumulator_of(model)._recipe
    with pytest.raises(ValueError, match="the model is spread over several: leave rng out"):
        FullBatchRandom()(recipe, loss_fn, mb.Window([x]), None)
