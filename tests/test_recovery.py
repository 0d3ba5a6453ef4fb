"""Out of memory at any operation of a window leaves gradient, buffers and random numbers as if nothing had been."""

import random
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from helpers import clear, difference, gradients, reference
from torch import nn
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

import macrobatch as mb
from macrobatch import recovery as recovery_module
from macrobatch.window_pass import WindowPass

Batch = tuple[torch.Tensor, torch.Tensor]
SIZE = 8  # samples of the window, in micro-batches of 4


class Block(nn.Module):
    """Attention and a perceptron, as small as they can be."""

    def __init__(self, width: int, dropout: float) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.mix = nn.Linear(width, 3 * width)
        self.out = nn.Linear(width, width)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        q, k, v = self.mix(self.norm(x)).chunk(3, -1)
        weights = (q @ k.transpose(1, 2)).softmax(-1)
        return x + self.dropout(self.out(weights @ v))


class Transformer(nn.Module):
    """Tokens (B, T) to scores (B, T, C); `kind` says what makes it hard to recover."""

    def __init__(self, kind: str, width: int = 6, classes: int = 7) -> None:
        super().__init__()
        self.kind = kind
        self.embedding = nn.Embedding(classes, width)
        self.blocks = nn.ModuleList([Block(width, 0.1) for _ in range(2)])
        self.norm = nn.BatchNorm1d(width) if kind == "batchnorm" else None
        self.head = nn.Linear(width, classes, bias=False)
        if kind == "tied":
            self.head.weight = self.embedding.weight
        self.shared = self.blocks[0] if kind == "shared-reentrant" else None

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        x = self.embedding(tokens)
        for block in [*self.blocks, *([self.shared] if self.shared is not None else [])]:
            if "reentrant" in self.kind:
                x = checkpoint(block, x, use_reentrant=self.kind != "non-reentrant")
            else:
                x = block(x)
        if self.norm is not None:
            x = self.norm(x.transpose(1, 2)).transpose(1, 2)
        return self.head(x)


KINDS = ["plain", "tied", "non-reentrant", "reentrant", "shared-reentrant", "dropout-in-eval", "batchnorm"]


def case(kind: str) -> tuple[nn.Module, Batch, Callable[[nn.Module, Batch], Any]]:
    torch.manual_seed(0)
    model = Transformer(kind).double()
    model.eval() if kind == "dropout-in-eval" else model.train()
    if kind != "dropout-in-eval":
        for block in model.blocks:
            block.dropout.eval()  # halves cannot have the whole's masks: a stated limit, tested below
    if model.norm is not None:
        model.norm.momentum = 0.1
    tokens = torch.randint(0, 7, (SIZE, 5))

    def loss_fn(m: nn.Module, b: Batch) -> tuple[torch.Tensor, int]:
        scores = m(b[0])
        return F.cross_entropy(scores.transpose(1, 2), b[1], reduction="sum"), b[1].numel()

    return model, (tokens, (tokens * 3 + 1) % 7), loss_fn


class FailAt(TorchDispatchMode):
    """Raises torch.OutOfMemoryError before the dispatched operations whose numbers are in `points`; counts them all."""

    def __init__(self, points: set[int]) -> None:
        super().__init__()
        self.points = points
        self.count = 0
        self.failures = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += 1
        if self.count in self.points:
            self.failures += 1
            raise torch.OutOfMemoryError(f"injected before {func}")
        return func(*args, **(kwargs or {}))


def run_with_failures(
    accumulator: mb.Accumulator, batch: Batch, points: set[int], monkeypatch: pytest.MonkeyPatch
) -> tuple[mb.Report, FailAt]:
    """Run the window; the failures are injected in forward and backward only, as an allocator would."""
    mode = FailAt(points)
    step = WindowPass.forward_backward

    def under_mode(self: Any, *arguments: Any) -> None:
        with mode:
            step(self, *arguments)

    with monkeypatch.context() as patch:
        patch.setattr(WindowPass, "forward_backward", under_mode)
        return accumulator.run(batch), mode


@pytest.fixture
def _fast_collection(monkeypatch: pytest.MonkeyPatch) -> None:
    """Hundreds of failures in one process: a full garbage collection after each takes most of the time."""
    monkeypatch.setattr(recovery_module.gc, "collect", lambda: 0)


def count_operations(
    accumulator: mb.Accumulator, model: nn.Module, batch: Batch, monkeypatch: pytest.MonkeyPatch
) -> FailAt:
    """Of a window after the first, which looks at the loss graph as well."""
    for _ in range(2):
        clear(model)
        _, mode = run_with_failures(accumulator, batch, set(), monkeypatch)
    return mode


def fresh(kind: str) -> tuple[nn.Module, Batch, mb.Accumulator]:
    model, batch, loss_fn = case(kind)
    return model, batch, mb.Accumulator(model, loss_fn, micro_batch_size=4, batch_norm="micro_batch")


# Every operation of the plain model, and every seventh of the others: `make check` fails all of theirs, too.
POINTS = [pytest.param(kind, 1 if kind == "plain" else 7, id=kind) for kind in KINDS if kind != "batchnorm"]
POINTS += [
    pytest.param(kind, 1, id=f"{kind}, every operation", marks=pytest.mark.slow)
    for kind in KINDS
    if kind not in ("plain", "batchnorm")
]


@pytest.mark.usefixtures("_fast_collection")
@pytest.mark.parametrize(("kind", "every"), POINTS)
def test_a_failure_before_any_operation_leaves_the_gradient_exact(
    kind: str, every: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, batch, accumulator = fresh(kind)
    expected = reference(model, lambda: accumulator.loss_fn(model, batch)[0] / batch[1].numel())
    clean = count_operations(accumulator, model, batch, monkeypatch)
    points, injected = range(1, clean.count + 1, every), 0
    for point in points:
        clear(model)
        accumulator._limit = mb.sizing.SizeLimit(4)
        report, mode = run_with_failures(accumulator, batch, {point}, monkeypatch)
        injected += mode.failures
        assert report.retries == 1
        error = difference(gradients(model), expected)
        assert error <= 1e-12, f"failure at operation {point} of {clean.count}: gradient differs by {error:.1e}"
        assert report.num_samples == SIZE
        assert (
            abs(float(report.loss) - float((accumulator.loss_fn(model, batch)[0] / batch[1].numel()).detach())) < 1e-12
        )
    assert injected == len(points) > 100 / every


@pytest.mark.usefixtures("_fast_collection")
def test_control_without_the_undo_the_gradient_is_wrong(monkeypatch: pytest.MonkeyPatch) -> None:
    model, batch, accumulator = fresh("plain")
    expected = reference(model, lambda: accumulator.loss_fn(model, batch)[0] / batch[1].numel())
    clean = count_operations(accumulator, model, batch, monkeypatch)
    monkeypatch.setattr(recovery_module.Recovery, "_undone", lambda self, attempt, before: None)
    wrong = 0
    for point in range(1, clean.count + 1, 3):
        clear(model)
        accumulator._limit = mb.sizing.SizeLimit(4)
        run_with_failures(accumulator, batch, {point}, monkeypatch)
        wrong += difference(gradients(model), expected) > 0.01
    assert wrong > 10


@pytest.mark.usefixtures("_fast_collection")
def test_with_batchnorm_a_recovered_window_is_one_that_was_cut_smaller_from_the_start(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Parameters that took the failed micro-batch's gradient saw other statistics than its halves: no mending there."""
    model, batch, accumulator = fresh("batchnorm")
    start = {name: value.clone() for name, value in model.state_dict().items()}
    clean = count_operations(accumulator, model, batch, monkeypatch)
    outcomes: dict[tuple[int, ...], tuple[list[Any], dict[str, torch.Tensor]]] = {}
    for point in range(1, clean.count + 1, 3):
        model.load_state_dict(start)
        clear(model)
        accumulator._limit = mb.sizing.SizeLimit(4)
        report, _ = run_with_failures(accumulator, batch, {point}, monkeypatch)
        mine, buffers = gradients(model), {n: b.clone() for n, b in model.named_buffers()}
        sizes = report.micro_batch_sizes
        if sizes not in outcomes:
            model.load_state_dict(start)
            clear(model)
            window = mb.Window(list(zip(batch[0].split(sizes), batch[1].split(sizes), strict=True)))
            mb.Accumulator(model, accumulator.loss_fn, batch_norm="micro_batch").run(window)
            outcomes[sizes] = gradients(model), {n: b.clone() for n, b in model.named_buffers()}
        assert difference(mine, outcomes[sizes][0]) <= 1e-12
        assert all(torch.equal(buffers[n], b) for n, b in outcomes[sizes][1].items())
    assert len(outcomes) >= 2


@pytest.mark.usefixtures("_fast_collection")
def test_two_failures_in_one_window_leave_the_gradient_exact(monkeypatch: pytest.MonkeyPatch) -> None:
    model, batch, accumulator = fresh("tied")
    expected = reference(model, lambda: accumulator.loss_fn(model, batch)[0] / batch[1].numel())
    clean = count_operations(accumulator, model, batch, monkeypatch)
    draw, twice = random.Random(0), 0
    for _ in range(80):
        pair = {draw.randint(1, clean.count), draw.randint(1, clean.count + clean.count // 2)}
        clear(model)
        accumulator._limit = mb.sizing.SizeLimit(4)
        report, mode = run_with_failures(accumulator, batch, pair, monkeypatch)
        assert report.retries == mode.failures
        twice += mode.failures == 2
        assert difference(gradients(model), expected) <= 1e-12, pair
    assert twice > 60


def test_random_numbers_after_a_recovered_window_are_those_of_its_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    model, batch, _ = fresh("plain")
    drawn: list[torch.Tensor] = []

    def noisy(m: nn.Module, b: Batch) -> tuple[torch.Tensor, int]:
        noise = torch.rand(len(b[0]))
        drawn.append(noise)
        return (m(b[0]).sum((1, 2)) * noise).sum(), len(b[0])

    accumulator = mb.Accumulator(model, noisy, micro_batch_size=4)
    torch.manual_seed(5)
    first = torch.rand(4)
    torch.manual_seed(5)
    run_with_failures(accumulator, batch, {60}, monkeypatch)
    assert torch.equal(drawn[0], first)
    assert torch.equal(drawn[1], first[:2])  # the half that follows the failure draws what the failed one drew


def test_a_window_that_draws_where_the_first_did_not_runs_again_from_its_own_beginning(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model, batch, _ = fresh("plain")
    drawn: list[torch.Tensor] = []
    draws = False

    def perhaps_noisy(m: nn.Module, b: Batch) -> tuple[torch.Tensor, int]:
        drawn.append(torch.rand(len(b[0])) if draws else torch.ones(len(b[0])))
        return (m(b[0]).sum((1, 2)) * drawn[-1]).sum(), len(b[0])

    accumulator = mb.Accumulator(model, perhaps_noisy, micro_batch_size=4)
    late = count_operations(accumulator, model, batch, monkeypatch).count * 3 // 4
    draws = True  # as a model that was evaluated and then trains

    def sizes_run() -> tuple[int, ...]:
        clear(model)
        drawn.clear()
        accumulator._limit = mb.sizing.SizeLimit(4)
        torch.manual_seed(5)
        report, _ = run_with_failures(accumulator, batch, {late}, monkeypatch)
        assert report.retries == 1
        return report.micro_batch_sizes

    sizes = sizes_run()
    assert max(sizes) == 2  # the whole window in halves: where the failed micro-batch began was not remembered
    mine, noise = gradients(model), drawn[-len(sizes) :]
    torch.manual_seed(5)  # what was drawn before the failure is drawn again
    assert all(torch.equal(once, torch.rand(n)) for once, n in zip(noise, sizes, strict=True))
    whole = reference(model, lambda: (model(batch[0]).sum((1, 2)) * torch.cat(noise)).mean())
    assert difference(mine, whole) <= 1e-12
    assert sizes_run()[0] == 4  # from then on it is remembered, and what was run before the failure stays


def test_a_single_sample_that_does_not_fit_is_an_error_with_what_would_help(monkeypatch: pytest.MonkeyPatch) -> None:
    model, batch, accumulator = fresh("plain")
    with pytest.raises(torch.OutOfMemoryError, match=r"a single sample does not fit: injected.*checkpoint.*autocast"):
        run_with_failures(accumulator, batch, set(range(1, 10_000)), monkeypatch)
    assert all(p.grad is None for p in model.parameters())
    clear(model)
    expected = reference(model, lambda: accumulator.loss_fn(model, batch)[0] / batch[1].numel())
    accumulator.run(batch)
    assert difference(gradients(model), expected) <= 1e-12


@pytest.mark.parametrize(
    ("error", "counts"),
    [
        (torch.OutOfMemoryError("CUDA out of memory"), True),
        (RuntimeError("[enforce fail at alloc_cpu.cpp:117] . DefaultCPUAllocator: can't allocate memory: ..."), True),
        (RuntimeError("CUDA error: an illegal memory access was encountered"), False),
        (RuntimeError("CUDA error: out of memory while waiting for an earlier kernel"), False),
        (ValueError("out of memory"), False),
        (MemoryError(), False),
    ],
)
def test_only_failed_allocations_count_as_out_of_memory(error: Exception, counts: bool) -> None:
    assert recovery_module.is_out_of_memory(error) is counts


def test_the_allocators_own_failure_is_recovered() -> None:
    model, batch, accumulator = fresh("plain")
    expected = reference(model, lambda: accumulator.loss_fn(model, batch)[0] / batch[1].numel())
    plain = accumulator.loss_fn

    def greedy(m: nn.Module, b: Batch) -> tuple[torch.Tensor, int]:
        if len(b[0]) > 1:
            torch.empty(2**58, dtype=torch.uint8)  # more than any machine has
        return plain(m, b)

    report = mb.Accumulator(model, greedy, micro_batch_size=4).run(batch)
    assert report.micro_batch_sizes == (1,) * 8
    assert difference(gradients(model), expected) <= 1e-12


def test_other_errors_pass_through_untouched() -> None:
    model, batch, _ = fresh("plain")

    def broken(m: nn.Module, b: Batch) -> torch.Tensor:
        raise RuntimeError("CUDA error: device-side assert triggered")

    with pytest.raises(RuntimeError, match="device-side assert"):
        mb.Accumulator(model, broken, micro_batch_size=4).run(batch)


def test_one_line_is_logged(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    _, batch, accumulator = fresh("plain")
    report, _ = run_with_failures(accumulator, batch, {100}, monkeypatch)
    assert report.retries == 1
    assert [record.getMessage() for record in caplog.records] == [
        "out of memory 1 time(s) in this window: recovered, no sample lost; micro-batches now have at most 2"
    ]


@pytest.mark.parametrize("choice", [None, "micro_batch", "pooled", "exact"])
@pytest.mark.filterwarnings("ignore:the model couples samples")
def test_where_a_layer_normalises_over_micro_batches_the_line_says_that_smaller_ones_are_another_model(
    choice: Any, caplog: pytest.LogCaptureFixture
) -> None:
    model = nn.Sequential(nn.Linear(5, 4), nn.BatchNorm1d(4), nn.Linear(4, 1)).double()
    batch = torch.randn(16, 5, dtype=torch.float64)
    accumulator = mb.Accumulator(model, failing_above(8), micro_batch_size=16, batch_norm=choice)
    assert accumulator.run(batch).retries == 1
    plain = "out of memory 1 time(s) in this window: recovered, no sample lost; micro-batches now have at most 8"
    another = "; BatchNorm now normalises over at most 8 samples, which is another model than before"
    lines = [record.getMessage() for record in caplog.records]
    assert lines == [plain if choice == "exact" else plain + another]
    caplog.clear()
    clear(model)
    model.eval()
    accumulator._limit = mb.sizing.SizeLimit(16)
    assert accumulator.run(batch).retries == 1
    assert [record.getMessage() for record in caplog.records] == [plain]  # with running statistics it is the same one


def test_a_micro_batch_that_cannot_be_cut_is_an_error_that_names_memory_first() -> None:
    x = torch.randn(16, 5, dtype=torch.float64)
    window = mb.Window([{"x": x, "graph": torch.zeros(3, 3)}], num_samples=lambda b: len(b["x"]))
    model = nn.Linear(5, 1).double()
    accumulator = mb.Accumulator(model, lambda m, b: failing_above(8)(m, b["x"]))
    with pytest.raises(
        torch.OutOfMemoryError, match=r"^out of memory: injected\. .* this one cannot be cut: "
    ) as caught:
        accumulator.run(window)
    assert isinstance(caught.value.__cause__, ValueError)
    assert "graph" in str(caught.value.__cause__)
    assert all(p.grad is None for p in model.parameters())


class TwoInOne(nn.Module):
    """Two parameters used as one matrix, whose gradients come as views of one."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Parameter(torch.randn(2, 4, dtype=torch.float64))
        self.second = nn.Parameter(torch.randn(3, 4, dtype=torch.float64))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x @ torch.cat([self.first, self.second]).t()


@pytest.mark.parametrize("where", ["first", "second"])
def test_gradients_that_are_views_of_one_are_not_told_apart_by_their_changes(where: str) -> None:
    """They share one count of changes: what one of them took up would pass for taken up by the other."""
    model, x, calls = TwoInOne(), torch.randn(8, 4, dtype=torch.float64), []
    expected = reference(model, lambda: model(x).square().mean())

    def fail_once(_: torch.Tensor) -> None:
        if len(calls) == 2:
            raise torch.OutOfMemoryError("injected")

    getattr(model, where).register_hook(fail_once)

    def loss_fn(m: nn.Module, b: torch.Tensor) -> torch.Tensor:
        calls.append(len(b))
        return m(b).square().mean()

    assert mb.Accumulator(model, loss_fn, micro_batch_size=4).run(x).retries == 1
    assert difference(gradients(model), expected) <= 1e-12


def test_a_size_is_proven_by_the_largest_micro_batch_of_a_window() -> None:
    accumulator = mb.Accumulator(nn.Linear(5, 1), lambda m, b: m(b).square().mean(), micro_batch_size=8)
    accumulator.run(mb.Window([torch.ones(n, 5) for n in (4, 2, 2)]))
    assert accumulator._limit.proven == 4


# ---------------------------------------------------------------------------------------------------------------------
# A simulated device: memory_limit raises when live storage would exceed the budget


class Reader(nn.Module):
    """Sequences of features (B, T, F), any length, to one number each."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(16, 64)
        self.second = nn.Linear(64, 64)
        self.last = nn.Linear(64, 1)
        self.samples_run = 0

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.samples_run += len(x)
        return self.last(self.second(self.first(x).tanh()).tanh()).mean(1)


LENGTH, FITS = 50, 24


def reader_data() -> tuple[list[np.ndarray], torch.Tensor]:
    """Samples as arrays: they stay outside of the simulated device until the loss takes them there."""
    generator = np.random.default_rng(0)
    lengths = [LENGTH] * 512
    lengths[300] = 4 * LENGTH
    x = [generator.normal(size=(n, 16)) for n in lengths]
    return x, torch.from_numpy(generator.normal(size=(512, 1)))


def read_loss(model: nn.Module, batch: dict[str, Any]) -> torch.Tensor:
    x = nn.utils.rnn.pad_sequence([torch.from_numpy(row) for row in batch["x"]], batch_first=True)
    lengths = torch.tensor([len(row) for row in batch["x"]])[:, None]
    padded_mean = model(x)  # zeros contribute model(0): corrected below, so that padding does not change the loss
    zero = model.last(model.second(model.first(torch.zeros(1, 1, 16, dtype=x.dtype)).tanh()).tanh()).mean(1)
    real_mean = (padded_mean * x.shape[1] - zero * (x.shape[1] - lengths)) / lengths
    return F.mse_loss(real_mean, batch["y"])


def budget_for(model: nn.Module, samples: int) -> int:
    """Bytes with which `samples` ordinary samples fit and one more does not."""
    x, y = reader_data()

    def once(n: int) -> int:
        batch = {"x": x[:n], "y": y[:n]}
        clear(model)
        read_loss(model, batch).backward()  # gradients exist
        return mb.peak_memory(lambda: read_loss(model, batch).backward())

    fits, too_many = once(samples), once(samples + 1)
    clear(model)
    model.samples_run = 0
    return (fits + too_many) // 2


def test_on_a_device_with_room_for_24_every_update_has_128_samples_and_the_exact_gradient() -> None:
    torch.manual_seed(0)
    model = Reader().double()
    x, y = reader_data()
    budget = budget_for(model, FITS)
    batches = [{"x": x[i : i + 128], "y": y[i : i + 128]} for i in range(0, 512, 128)]
    expected = [reference(model, lambda batch=batch: read_loss(model, batch)) for batch in batches]
    accumulator = mb.Accumulator(model, read_loss, micro_batch_size=FITS)
    model.samples_run, updates = 0, 0
    with mb.memory_limit(budget):
        for batch, wanted in zip(batches, expected, strict=True):
            report = accumulator.run(batch)
            assert report.num_samples == 128
            assert difference(gradients(model), wanted) <= 1e-12
            updates += 1
            clear(model)
    assert updates == 4
    assert model.samples_run <= 1.15 * 512
    assert report.micro_batch_sizes != (22, 22, 21, 21, 21, 21)  # lowered by the long sample
    plain = {"x": x[:128], "y": y[:128]}
    for _ in range(20):
        with mb.memory_limit(budget):
            report = accumulator.run(plain)
        clear(model)
    assert max(report.micro_batch_sizes) == 22


def test_a_start_that_is_too_large_finds_its_size_and_every_gradient_is_exact() -> None:
    torch.manual_seed(0)
    model = Reader().double()
    x, y = reader_data()
    budget = budget_for(model, FITS)
    batch = {"x": x[:128], "y": y[:128]}
    expected = reference(model, lambda: read_loss(model, batch))
    accumulator = mb.Accumulator(model, read_loss, micro_batch_size=128)
    tries = 0
    for _ in range(24):
        with mb.memory_limit(budget):
            report = accumulator.run(batch)
        assert difference(gradients(model), expected) <= 1e-12
        assert report.num_samples == 128
        tries += report.retries
        clear(model)
    assert tries <= 3 + 4  # three to find 16; then the larger size is tried ever more rarely


def test_after_a_recovered_failure_no_memory_is_kept() -> None:
    torch.manual_seed(0)
    model = Reader().double()
    x, y = reader_data()
    batch = {"x": x[:48], "y": y[:48]}
    budget = budget_for(model, FITS)
    accumulator = mb.Accumulator(model, read_loss, micro_batch_size=16)
    with mb.memory.MemoryMeter() as meter:
        accumulator.run(batch)
        clear(model)
        accumulator.run(batch)
        clear(model)
        before = meter.live
        accumulator._limit = mb.sizing.SizeLimit(48)
        with mb.memory_limit(budget):
            report = accumulator.run(batch)
        clear(model)
        assert report.retries > 0
        del report
        random = torch.get_rng_state().nbytes  # the window's, which the meter sees only once it is compared
        assert meter.live <= before + random + 64  # and a few scalars of the last report


def failing_above(largest: int) -> Callable[[nn.Module, torch.Tensor], torch.Tensor]:
    """A mean loss that runs out of memory, after its forward, for more than `largest` samples."""

    def loss(model: nn.Module, x: torch.Tensor) -> torch.Tensor:
        out = model(x).square().mean()
        if len(x) > largest:
            raise torch.OutOfMemoryError("injected")
        return out

    return loss


class Stateful(nn.Module):
    """A layer with a buffer that its forward changes in one of the ways that people change buffers."""

    def __init__(self, how: str) -> None:
        super().__init__()
        self.how = how
        self.layer = nn.Linear(5, 5).double()
        self.register_buffer("seen", torch.zeros(()))
        self.register_buffer("cache", torch.ones(2, 1))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.how == "in place":
            self.seen.add_(len(x))
        elif self.how == "through data":
            self.seen.data.add_(len(x))
        elif self.how == "replaced":
            self.seen = self.seen + len(x)
        elif self.how == "grows":
            self.seen.add_(len(x))
            self.cache = torch.ones(len(self.cache) + 1, 1)
        elif self.how == "none":
            self.seen.add_(len(x))
            self.cache = None
        else:
            self.seen.add_(len(x))
            self._buffers.pop("cache", None)
        return self.layer(x)


@pytest.mark.parametrize("how", ["in place", "through data", "replaced", "grows", "none", "deleted"])
def test_buffers_changed_in_any_way_count_each_sample_once(how: str) -> None:
    model, x = Stateful(how), torch.randn(16, 5, dtype=torch.float64)
    expected = reference(model, lambda: model(x).square().mean())
    model = Stateful(how)
    model.layer.load_state_dict(model.layer.state_dict())
    accumulator = mb.Accumulator(model, failing_above(4), micro_batch_size=16)  # two failures in the first micro-batch
    for window in range(1, 4):
        clear(model)
        accumulator._limit = mb.sizing.SizeLimit(16)
        assert accumulator.run(x).retries == 2
        assert float(model.seen) == 16 * window
    assert len(expected) == 2


def test_a_start_that_is_too_large_works_with_spectral_norm() -> None:
    torch.manual_seed(0)
    model = nn.utils.parametrizations.spectral_norm(nn.Linear(5, 5)).double()
    report = mb.Accumulator(model, failing_above(4), micro_batch_size=16).run(torch.randn(16, 5, dtype=torch.float64))
    assert report.micro_batch_sizes == (4, 4, 4, 4)


def test_batchnorm_in_a_frozen_module_is_restored_and_refused_by_auto() -> None:
    torch.manual_seed(0)
    generator, discriminator = nn.Linear(5, 5).double(), nn.BatchNorm1d(5).double()
    x = torch.randn(16, 5, dtype=torch.float64)

    def loss(model: nn.Module, b: torch.Tensor) -> torch.Tensor:
        out = discriminator(model(b)).tanh().mean()
        if len(b) > 8:
            raise torch.OutOfMemoryError("injected")
        return out

    mb.Accumulator(generator, loss, micro_batch_size=16, batch_norm="micro_batch", frozen=[discriminator]).run(x)
    assert int(discriminator.num_batches_tracked) == 2
    clear(generator)
    with pytest.raises(ValueError, match=r"'auto' would change the result: '' \(BatchNorm1d, in train mode\)"):
        mb.Accumulator(generator, loss, micro_batch_size="auto", frozen=[discriminator]).run(x)


def test_an_own_cut_serves_the_halves_too() -> None:
    torch.manual_seed(0)
    model, x = nn.Linear(5, 1).double(), torch.randn(5, 16, dtype=torch.float64)  # batch dimension last
    expected = reference(model, lambda: model(x.T).square().mean())
    accumulator = mb.Accumulator(
        model,
        lambda m, b: failing_above(4)(m, b.T),
        micro_batch_size=16,
        cut=lambda b, start, stop: b[:, start:stop],
        num_samples=lambda b: b.shape[1],
    )
    assert accumulator.run(x).micro_batch_sizes == (4, 4, 4, 4)
    assert difference(gradients(model), expected) <= 1e-12
