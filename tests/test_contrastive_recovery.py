"""Out of memory at any operation of either pass, or of the loss, leaves the gradient as if nothing had been."""

import random
from collections.abc import Callable
from typing import Any

import pytest
import torch
from helpers import clear, difference, gradients, reference
from test_recovery import FailAt
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

import macrobatch as mb
from macrobatch import gathered_forward, recovery
from macrobatch.gathered_backward import Backwards
from macrobatch.gathered_forward import FirstForwards
from macrobatch.gathered_loss import WindowLoss

SIZE = 8  # samples, in micro-batches of 4
PHASES = {"forward": (FirstForwards, "_piece"), "loss": (WindowLoss, "backward"), "backward": (Backwards, "step")}


class Encoder(nn.Module):
    """Vectors (B, 5) to vectors (B, 6); `kind` says what makes it hard to recover."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind = kind
        self.first, self.second = nn.Linear(5, 7), nn.Linear(7, 6)
        self.dropout = nn.Dropout(0.4 if kind == "dropout" else 0.0)
        self.norm = nn.BatchNorm1d(7) if kind == "batchnorm" else nn.LayerNorm(7)
        self.log_scale = nn.Parameter(torch.tensor(1.0))
        self.register_buffer("seen", torch.zeros(()))

    def body(self, x: Tensor) -> Tensor:
        return self.second(self.dropout(self.norm(x.tanh())))

    def forward(self, x: Tensor) -> Tensor:
        self.seen.add_(len(x))
        if "reentrant" in self.kind:
            return checkpoint(self.body, self.first(x), use_reentrant=self.kind == "reentrant")
        return self.body(self.first(x))


def encode(model: Encoder, batch: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    return model(batch[0]), model(batch[1])


def info_nce(model: Encoder, outputs: tuple[Tensor, Tensor], window: Any) -> Tensor:
    left, right = (F.normalize(z, dim=-1) for z in outputs)
    return F.cross_entropy(left @ right.T * model.log_scale.exp(), torch.arange(len(left)))


def case(kind: str) -> tuple[Encoder, tuple[Tensor, Tensor]]:
    torch.manual_seed(0)
    model = Encoder(kind).double()
    x = torch.randn(SIZE, 5, dtype=torch.float64)
    return model, (x, x + 0.3)


@pytest.fixture(autouse=True)
def _fast_collection(monkeypatch: pytest.MonkeyPatch) -> None:
    """Hundreds of failures in one process: a full garbage collection after each takes most of the time."""
    monkeypatch.setattr(recovery.gc, "collect", lambda: 0)
    monkeypatch.setattr(gathered_forward.gc, "collect", lambda: 0)


def run_with_failures(
    accumulator: mb.GatheredAccumulator, batch: Any, points: set[int], monkeypatch: pytest.MonkeyPatch, *phases: str
) -> tuple[mb.Report, FailAt]:
    mode = FailAt(points)
    with monkeypatch.context() as patch:
        for phase in phases or PHASES:
            owner, name = PHASES[phase]
            patch.setattr(owner, name, under(mode, getattr(owner, name)))
        return accumulator.run(batch), mode


def under(mode: FailAt, method: Callable[..., Any]) -> Callable[..., Any]:
    def wrapped(*arguments: Any) -> Any:
        with mode:
            return method(*arguments)

    return wrapped


def fresh(kind: str, keep: int) -> tuple[Encoder, Any, mb.GatheredAccumulator]:
    model, batch = case(kind)
    options: dict[str, Any] = {"micro_batch_size": 4, "keep_graphs": keep, "batch_norm": "micro_batch"}
    accumulator = mb.GatheredAccumulator(model, encode, info_nce, **options)
    accumulator.run(batch)  # the first window looks at graphs as well
    return model, batch, accumulator


def again(model: Encoder, accumulator: mb.GatheredAccumulator, seed: int = 7) -> None:
    """Everything as before the first failure."""
    clear(model)
    model.seen.zero_()
    torch.manual_seed(seed)
    start = accumulator._limit.start
    accumulator._limit.__init__(start)  # the window holds this very object
    accumulator._graphs.__init__(accumulator._graphs.start)


@pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad")  # torch's, of reentrant checkpoints
@pytest.mark.parametrize("phase", PHASES)
@pytest.mark.parametrize("keep", [0, 1, 2])
@pytest.mark.parametrize("kind", ["plain", "non-reentrant", "reentrant"])
def test_a_failure_before_every_operation_leaves_the_gradient_exact(
    kind: str, keep: int, phase: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, batch, accumulator = fresh(kind, keep)
    expected = reference(model, lambda: info_nce(model, encode(model, batch), None))
    again(model, accumulator)
    _, clean = run_with_failures(accumulator, batch, set(), monkeypatch, phase)
    step = 1 if kind == "plain" else 7
    for point in range(1, clean.count + 1, step):
        again(model, accumulator)
        if phase == "loss" and keep == 0:
            with pytest.raises(torch.OutOfMemoryError, match=r"outputs of all 8 samples does not fit: .*RowBlocks"):
                run_with_failures(accumulator, batch, {point}, monkeypatch, phase)
            assert all(p.grad is None for p in model.parameters())
            continue
        report, mode = run_with_failures(accumulator, batch, {point}, monkeypatch, phase)
        assert mode.failures == report.retries == 1
        assert report.num_samples == sum(report.micro_batch_sizes) == SIZE
        assert difference(gradients(model), expected) <= 1e-12, point
        assert float(model.seen) == 2 * SIZE, point


@pytest.mark.parametrize("keep", [0, 1, 2])
@pytest.mark.parametrize("kind", ["dropout", "batchnorm"])
def test_where_halves_would_be_others_the_window_runs_again_from_zero(
    kind: str, keep: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Masks and statistics of the loss's outputs and of the backward are the same: those of the sizes reported."""
    model, batch, accumulator = fresh(kind, keep)
    start = {name: value.clone() for name, value in model.state_dict().items()}
    again(model, accumulator)
    _, clean = run_with_failures(accumulator, batch, set(), monkeypatch)
    outcomes: dict[tuple[int, ...], Any] = {}
    for point in range(1, clean.count + 1, 5):
        model.load_state_dict(start)
        again(model, accumulator)
        try:
            report, _ = run_with_failures(accumulator, batch, {point}, monkeypatch)
        except torch.OutOfMemoryError:
            assert keep == 0, "only the loss, with no graph to let go, gives up"
            continue
        mine, sizes = gradients(model), report.micro_batch_sizes
        state, following = {n: b.clone() for n, b in model.named_buffers()}, torch.rand(2)
        if sizes not in outcomes:
            model.load_state_dict(start)
            again(model, accumulator)
            window = mb.Window(list(zip(batch[0].split(sizes), batch[1].split(sizes), strict=True)))
            options: dict[str, Any] = {"keep_graphs": len(sizes), "batch_norm": "micro_batch"}
            mb.GatheredAccumulator(model, encode, info_nce, **options).run(window)
            outcomes[sizes] = gradients(model), {n: b.clone() for n, b in model.named_buffers()}, torch.rand(2)
        assert difference(mine, outcomes[sizes][0]) <= 1e-12, point
        assert all(torch.equal(state[n], b) for n, b in outcomes[sizes][1].items()), point
        assert torch.equal(following, outcomes[sizes][2]), point
    assert outcomes.keys() == ({(2, 2, 2, 2)} if keep == 0 else {(2, 2, 2, 2), (4, 4)})


def test_several_failures_in_one_window_leave_the_gradient_exact(monkeypatch: pytest.MonkeyPatch) -> None:
    model, batch, accumulator = fresh("plain", 2)
    expected = reference(model, lambda: info_nce(model, encode(model, batch), None))
    again(model, accumulator)
    _, clean = run_with_failures(accumulator, batch, set(), monkeypatch, "forward", "backward")
    draw, several = random.Random(0), 0
    for _ in range(60):
        points = {draw.randint(1, clean.count), draw.randint(1, 2 * clean.count)}
        again(model, accumulator)
        report, mode = run_with_failures(accumulator, batch, points, monkeypatch, "forward", "backward")
        assert report.retries == mode.failures
        several += mode.failures > 1
        assert difference(gradients(model), expected) <= 1e-12, points
    assert several > 20


def test_kept_graphs_make_room_before_any_micro_batch_is_halved(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    model, batch, accumulator = fresh("plain", 2)
    again(model, accumulator)
    _, forward = run_with_failures(accumulator, batch, set(), monkeypatch, "forward")
    again(model, accumulator)
    report, _ = run_with_failures(accumulator, batch, {forward.count}, monkeypatch, "forward")
    assert report.micro_batch_sizes == (4, 4)
    assert accumulator.keep_graphs == 1
    assert "kept graphs were let go and made again; at most 1 now" in caplog.text
    kept = []
    for _ in range(8):
        clear(model)
        kept.append(accumulator.keep_graphs)
        accumulator.run(batch)
    assert kept == [1] * 4 + [2] * 4, "what was lowered is tried again later"


def test_a_single_sample_that_does_not_fit_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    model, batch, accumulator = fresh("plain", 1)
    for phase in ("forward", "backward"):
        again(model, accumulator)
        with pytest.raises(torch.OutOfMemoryError, match=r"a single sample does not fit: injected"):
            run_with_failures(accumulator, batch, set(range(1, 10_000)), monkeypatch, phase)
        assert all(p.grad is None for p in model.parameters())


def test_within_a_limit_the_size_is_found_and_every_gradient_is_exact() -> None:
    torch.manual_seed(0)
    layers = [layer for _ in range(6) for layer in (nn.Linear(48, 48), nn.Tanh())]
    model, x = nn.Sequential(*layers).double(), torch.randn(96, 48, dtype=torch.float64)
    spread = lambda m, z, w: z.std(0).log().square().sum()  # noqa: E731
    expected = reference(model, lambda: spread(None, model(x), None))
    small = mb.GatheredAccumulator(model, lambda m, b: m(b), spread, micro_batch_size=12)
    budget = mb.peak_memory(lambda: small.run(x) and None)
    clear(model)
    accumulator = mb.GatheredAccumulator(model, lambda m, b: m(b), spread, micro_batch_size=96, keep_graphs=4)
    for _ in range(3):
        with mb.memory_limit(budget + 20_000):
            report = accumulator.run(x)
        assert difference(gradients(model), expected) <= 1e-12
        clear(model)
    assert max(report.micro_batch_sizes) <= 24


def test_halves_that_are_alike_are_told_apart() -> None:
    """Two halves of one micro-batch have as many samples and the same buffers before them: BatchNorm in train mode."""

    class Encoder(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.norm, self.last = nn.Linear(6, 8), nn.BatchNorm1d(8), nn.Linear(8, 4)

        def forward(self, x: Tensor) -> Tensor:
            if len(x) > 4:
                raise torch.OutOfMemoryError("injected")
            return self.last(self.norm(self.first(x)).relu())

    torch.manual_seed(0)
    accumulator = mb.GatheredAccumulator(
        Encoder(),
        lambda model, batch: model(batch["x"]),
        lambda model, outputs, window: (outputs @ outputs.T).logsumexp(1).mean(),
        micro_batch_size=8,
        batch_norm="micro_batch",
    )
    report = accumulator.run({"x": torch.randn(24, 6)})
    assert report.retries == 1
    assert report.micro_batch_sizes == (4,) * 6
