"""Batch normalisation over a window in micro-batches is that of the full batch: gradients, statistics, no trace."""

import copy
import os
import signal
import threading
import time
from collections.abc import Callable, Sequence

import pytest
import torch
from helpers import clear, difference, gradients, reference
from norm_models import CASES, Convolutional, Pair, Residual, Twice, batch_of, cut, flat, loss_sum
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

import macrobatch as mb
from macrobatch import peak_memory
from macrobatch.lockstep import run_in_lockstep
from macrobatch.modules import submodules
from macrobatch.offload import Offload

SIZES = [4, 3, 2, 1]
LossSum = Callable[[nn.Module, Pair], tuple[Tensor, int]]


def in_lockstep(
    model: nn.Module, micro_batches: Sequence[Pair], loss: LossSum = loss_sum, offload: Offload | None = None
) -> Tensor:
    """`p.grad` is the gradient of the mean over all micro-batches, which run in lockstep; the mean is returned."""
    forwards = [lambda micro_batch=micro_batch: loss(model, micro_batch) for micro_batch in micro_batches]
    terms = run_in_lockstep(forwards, [model], offload=offload).results
    total = sum(weight for _, weight in terms)
    torch.autograd.backward([loss_sum / total for loss_sum, _ in terms])
    return sum(loss_sum.detach() for loss_sum, _ in terms) / total


def buffer_difference(mine: nn.Module, theirs: nn.Module) -> float:
    """The largest difference of a buffer's entry, relative where the entry is larger than 1."""
    pairs = zip(mine.buffers(), theirs.buffers(), strict=True)
    return max((float(((a - b).abs() / b.abs().clamp(min=1)).max()) for a, b in pairs), default=0.0)


def full_batch(model: nn.Module, batch: Pair, loss: LossSum = loss_sum) -> tuple[nn.Module, list[Tensor | None], float]:
    """A copy of the model that has seen the batch in one piece, its gradients, its loss."""
    twin, losses = copy.deepcopy(model), []

    def mean() -> Tensor:
        total, weight = loss(twin, batch)
        losses.append(float((total / weight).detach()))
        return total / weight

    return twin, reference(twin, mean), losses[0]


def plainly(model: nn.Module, micro_batches: Sequence[Pair]) -> None:
    """The control: exact for every loss that is a sum over samples, in a model that does not couple them."""
    total = sum(len(labels) for _, labels in micro_batches)
    for micro_batch in micro_batches:
        (loss_sum(model, micro_batch)[0] / total).backward()


# ---- exact


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("offloads", [False, True], ids=["on the device", "offloaded"])
def test_gradients_and_buffers_are_those_of_the_full_batch(name: str, offloads: bool) -> None:
    if name.startswith("transformers"):
        pytest.importorskip("transformers")
    case = CASES[name]
    model, batch = case.model().double(), batch_of(sum(SIZES), case.sample)
    control, offload = copy.deepcopy(model), Offload(model.parameters(), small=0) if offloads else None
    for _ in range(2):  # the second window starts from running statistics that the first has made
        twin, expected, expected_loss = full_batch(model, batch)
        loss = in_lockstep(model, cut(batch, SIZES), offload=offload)
        assert difference(gradients(model), expected) <= 1e-12
        assert buffer_difference(model, twin) <= 1e-12
        assert abs(float(loss) - expected_loss) <= 1e-12
        model.zero_grad()
    twin, expected, _ = full_batch(control, batch)
    plainly(control, cut(batch, [4, 4, 2]))  # some of these layers refuse a micro-batch of 1
    assert difference(gradients(control), expected) > (0.02 if name.startswith("InstanceNorm") else 0.1)
    assert buffer_difference(control, twin) > 0.01 or not list(control.buffers())
    assert offload is None or offload.peak > offload.live == 0


@pytest.mark.parametrize("sizes", [[1] * 10, [10], [9, 1], [3, 3, 3, 1]])
def test_any_cut_gives_the_same(sizes: list[int]) -> None:
    model, batch = flat().double(), batch_of(10, (7,))
    twin, expected, _ = full_batch(model, batch)
    in_lockstep(model, cut(batch, sizes))
    assert difference(gradients(model), expected) <= 1e-12
    assert buffer_difference(model, twin) <= 1e-12


def test_in_eval_mode_nothing_meets_and_nothing_changes() -> None:
    model, batch = Convolutional(2).double(), batch_of(10, (3, 6, 6))
    plainly(model, [batch])  # running statistics that are not 0 and 1
    model.zero_grad()
    model.eval()
    twin, expected, _ = full_batch(model, batch)
    in_lockstep(model, cut(batch, SIZES))
    assert difference(gradients(model), expected) <= 1e-12
    assert buffer_difference(model, twin) == 0


def test_a_micro_batch_without_terms_still_counts_in_the_statistics() -> None:
    def masked(model: nn.Module, batch: Pair) -> tuple[Tensor, Tensor]:
        x, labels = batch
        kept = labels >= 0
        return F.cross_entropy(model(x), labels, reduction="sum", ignore_index=-100), kept.sum()

    model, (x, labels) = Convolutional(2).double(), batch_of(10, (3, 6, 6))
    labels[:4] = -100
    twin, expected, _ = full_batch(model, (x, labels), masked)
    in_lockstep(model, cut((x, labels), SIZES), masked)
    assert difference(gradients(model), expected) <= 1e-12
    assert buffer_difference(model, twin) <= 1e-12


def test_without_a_graph_the_losses_and_statistics_are_those_of_the_full_batch() -> None:
    model, batch = Residual().double(), batch_of(10, (3, 6, 6))
    twin, _, expected_loss = full_batch(model, batch)
    with torch.no_grad():
        terms = run_in_lockstep([lambda b=b: loss_sum(model, b)[0] for b in cut(batch, SIZES)], [model]).results
    assert not any(term.requires_grad for term in terms)
    assert abs(float(sum(terms)) / 10 - expected_loss) <= 1e-12
    assert buffer_difference(model, twin) <= 1e-12


@pytest.mark.parametrize("shape", [(64, 8), (8, 8, 5, 5)])
def test_float32_keeps_its_digits_where_the_mean_is_ten_thousand_standard_deviations(shape: tuple[int, ...]) -> None:
    x = torch.randn(shape) * 1e-2 + 100 * (1 + torch.rand(1, 8, *[1] * (len(shape) - 2)))
    assert float(x.mean() / x[:, 0].std()) > 1e4
    single, weights = nn.BatchNorm1d(8) if x.ndim == 2 else nn.BatchNorm2d(8), torch.randn(shape)
    double = copy.deepcopy(single).double()
    x.requires_grad_()
    y = x.detach().double().requires_grad_()
    expected = double(y)
    (expected.sin() * weights).sum().backward()
    inputs, outputs = list(x.split(3)), []

    def forward(j: int) -> Tensor:
        outputs.append(single(inputs[j]))
        return (outputs[-1].sin() * weights.split(3)[j]).sum()

    losses = run_in_lockstep([lambda j=j: forward(j) for j in range(len(inputs))], [single]).results
    torch.autograd.backward(losses)
    assert difference([y.detach() for y in outputs], expected.detach().split(3)) <= 1e-4
    assert difference([x.grad], [y.grad]) <= 1e-4
    assert difference(gradients(single), gradients(double)) <= 1e-4
    assert difference([single.running_mean, single.running_var], [double.running_mean, double.running_var]) <= 1e-6
    naive = (x.detach().square().mean(0) - x.detach().mean(0).square()).flatten()  # the control
    assert float((naive / x.detach().double().var(0, correction=0).flatten() - 1).abs().max()) > 10


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_low_precision_inputs_are_normalised_in_float32(dtype: torch.dtype) -> None:
    model, x = nn.BatchNorm2d(4), batch_of(10, (4, 6, 6), torch.float32)[0].to(dtype)
    twin = copy.deepcopy(model)
    expected = twin(x)
    parts: list[Tensor] = []
    run_in_lockstep([lambda part=part: parts.append(model(part)) for part in x.split(SIZES)], [model])
    assert parts[0].dtype == expected.dtype == dtype
    assert difference([torch.cat(parts).detach()], [expected.detach()]) <= 2 * torch.finfo(dtype).eps
    assert buffer_difference(model, twin) <= 1e-5


# ---- torch's settings in each forward's thread


def test_autocast_modes_hooks_and_grad_mode_reach_every_forward() -> None:
    seen = []

    class Mode(torch.overrides.TorchFunctionMode):
        calls = 0

        def __torch_function__(self, func, types, args=(), kwargs=None):
            Mode.calls += 1
            return func(*args, **(kwargs or {}))

    def forward() -> Tensor:
        before = Mode.calls
        product = torch.ones(2, 2) @ torch.ones(2, 2)
        seen.append((product.dtype, torch.is_grad_enabled(), Mode.calls > before))
        return product

    with torch.autocast("cpu", torch.bfloat16), torch.no_grad(), Mode():
        run_in_lockstep([forward, forward], [nn.Identity()])
    with torch.device("meta"):
        assert run_in_lockstep([lambda: torch.ones(1)], []).results[0].is_meta
    with torch.inference_mode():
        assert run_in_lockstep([lambda: torch.ones(1)], []).results[0].is_inference()
    assert seen == [(torch.bfloat16, False, True)] * 2


def test_the_number_of_threads_for_operations_reaches_every_forward() -> None:
    torch.set_num_threads(2)
    assert run_in_lockstep([torch.get_num_threads, torch.get_num_threads], []).results == [2, 2]


def test_autocast_gives_the_gradients_of_the_full_batch() -> None:
    def under_autocast(model: nn.Module, batch: Pair) -> tuple[Tensor, int]:
        with torch.autocast("cpu", torch.bfloat16):
            return loss_sum(model, batch)

    model, batch = Convolutional(2), batch_of(10, (3, 6, 6), torch.float32)
    twin, expected, _ = full_batch(model, batch, under_autocast)
    in_lockstep(model, cut(batch, SIZES), under_autocast)
    assert difference(gradients(model), expected) <= 0.02
    assert buffer_difference(model, twin) <= 0.02
    control = copy.deepcopy(twin)
    control.zero_grad()
    with torch.autocast("cpu", torch.bfloat16):
        plainly(control, cut(batch, [4, 4, 2]))
    assert difference(gradients(control), expected) > 0.1


def test_the_meter_counts_what_every_forward_allocates() -> None:
    forwards = [lambda: torch.ones(1000), lambda: torch.ones(3000)]
    assert peak_memory(lambda: run_in_lockstep(forwards, [])) == 4 * 4000


# ---- memory


def test_at_eight_micro_batches_the_peak_is_below_a_third_of_the_full_batch() -> None:
    model, batch = Residual(12, 6), batch_of(64, (3, 16, 16), torch.float32)
    native = peak_memory(lambda: full_batch(model, batch))
    offload = Offload([*model.parameters(), *batch])
    ours = peak_memory(lambda: in_lockstep(model, cut(batch, [8] * 8), offload=offload))
    model.zero_grad()
    kept = peak_memory(lambda: in_lockstep(model, cut(batch, [8] * 8)))
    assert ours <= 0.3 * native
    assert kept > 0.8 * native  # the control: without the host it stays
    assert 0.3 * native < offload.peak < 1.5 * native  # it lies there instead
    assert offload.live == 0


# ---- refused, and no trace


def no_strand_is_alive() -> bool:
    return not any(thread.name == "macrobatch strand" for thread in threading.enumerate())


@pytest.mark.parametrize("point", range(6))
def test_after_an_error_nothing_is_patched_and_no_thread_is_alive(point: int) -> None:
    class Fails(nn.Module):
        calls = 0

        def forward(self, x: Tensor) -> Tensor:
            Fails.calls += 1
            if Fails.calls == point + 1:
                raise KeyError("on purpose")
            return x

    def norm() -> nn.Module:
        return nn.SyncBatchNorm(6)

    model = nn.Sequential(Fails(), nn.Linear(7, 6), norm(), Fails(), norm()).double()
    before = [dict(vars(module)) for module in submodules([model])]
    with pytest.raises(KeyError, match="on purpose"):
        run_in_lockstep([lambda x=x: model(x) for x in batch_of(10, (7,))[0].split(4)], [model], offload=Offload())
    assert [dict(vars(module)) for module in submodules([model])] == before
    assert no_strand_is_alive()
    assert torch.is_grad_enabled()
    assert F.batch_norm is nn.functional.batch_norm
    assert torch._C._autograd._top_saved_tensors_default_hooks(True) is None
    assert torch.overrides._get_current_function_mode_stack() == []


def test_a_forward_that_is_given_up_unwinds_its_context_managers() -> None:
    left = []

    class Opened:
        def __enter__(self) -> None: ...

        def __exit__(self, *_: object) -> None:
            left.append(threading.current_thread().name)

    def forward(norm: nn.Module, fails: bool) -> None:
        with Opened():
            norm(torch.randn(4, 3))
            if fails:
                raise KeyError("on purpose")
            norm(torch.randn(4, 3))

    norm = nn.BatchNorm1d(3)
    with pytest.raises(KeyError, match="on purpose"):
        run_in_lockstep([lambda j=j: forward(norm, j == 1) for j in range(3)], [norm])
    assert left == ["macrobatch strand"] * 3
    assert no_strand_is_alive()


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_a_checkpointed_normalisation_is_refused_with_the_reason(use_reentrant: bool) -> None:
    norm, body = nn.BatchNorm1d(6), nn.Linear(6, 6)

    def forward(x: Tensor) -> Tensor:
        return checkpoint(lambda x: norm(body(x)), x.requires_grad_(), use_reentrant=use_reentrant).sum()

    with pytest.raises(ValueError, match="again in backward for one micro-batch alone, with other statistics"):
        run_in_lockstep([lambda x=x: forward(x) for x in torch.randn(8, 6).split(4)], [norm])
    assert no_strand_is_alive()


def test_a_normalisation_inside_of_an_autograd_function_is_refused() -> None:
    class Own(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return F.batch_norm(x, None, None, training=True)

        @staticmethod
        def backward(ctx, gradient):
            return gradient

    with pytest.raises(ValueError, match="or of an autograd function of its own"):
        run_in_lockstep([lambda x=x: Own.apply(x.requires_grad_()) for x in torch.randn(8, 3).split(4)], [])


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_checkpointing_parts_without_normalisation_stays_exact(use_reentrant: bool) -> None:
    class Partly(Twice):
        def forward(self, x: Tensor) -> Tensor:
            x = self.norm(checkpoint(self.first, x.requires_grad_(), use_reentrant=use_reentrant)).tanh()
            return self.head(x)

    model, batch = Partly().double(), batch_of(10, (7,))
    twin, expected, _ = full_batch(model, batch)
    in_lockstep(model, cut(batch, SIZES), offload=Offload())
    assert difference(gradients(model), expected) <= 1e-12
    assert buffer_difference(model, twin) <= 1e-12


@pytest.mark.parametrize(
    "call",
    [
        lambda x, w: torch.batch_norm(x, w, w, None, None, True, 0.1, 1e-5, False),
        lambda x, w: torch.native_batch_norm(x, w, w, None, None, True, 0.1, 1e-5)[0],
        lambda x, w: torch.ops.aten.native_batch_norm(x, w, w, None, None, True, 0.1, 1e-5)[0],
    ],
)
def test_a_normalisation_past_the_functional_one_is_refused_and_never_missed(call: Callable[..., Tensor]) -> None:
    x, w = torch.randn(8, 3), torch.ones(3)
    with pytest.raises(ValueError, match=r"normalises over its micro-batch by (native_)?batch_norm, called past"):
        run_in_lockstep([lambda x=x: call(x, w) for x in x.split(4)], [])


def test_a_scripted_normalisation_is_refused() -> None:
    with pytest.warns(DeprecationWarning, match="torch.jit.script"):
        scripted = torch.jit.script(nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(3)))
    with pytest.raises(ValueError, match="in a scripted module"):
        run_in_lockstep([lambda x=x: scripted(x) for x in torch.randn(8, 3).split(4)], [scripted])


def test_a_compiled_model_runs_uncompiled_and_exactly() -> None:
    model, batch = flat().double(), batch_of(10, (7,))
    twin, expected, _ = full_batch(model, batch)
    compiled = torch.compile(model, backend="eager")
    in_lockstep(compiled, cut(batch, SIZES))
    assert difference(gradients(model), expected) <= 1e-12
    assert buffer_difference(model, twin) <= 1e-12


def test_micro_batches_that_take_different_ways_are_told_so() -> None:
    one, other = nn.BatchNorm1d(3), nn.BatchNorm1d(3)
    ways = [lambda: one(torch.randn(4, 3)), lambda: other(torch.randn(4, 3))]
    with pytest.raises(ValueError, match="took different ways through the model"):
        run_in_lockstep(ways, [one, other])
    with pytest.raises(ValueError, match="stands at batch_norm over 3 channels, another one at its end"):
        run_in_lockstep([ways[0], lambda: torch.zeros(())], [one])
    assert no_strand_is_alive()


def test_a_single_value_per_channel_in_the_whole_window_is_refused_as_torch_refuses_it() -> None:
    norm = nn.BatchNorm1d(3)
    with pytest.raises(ValueError, match="a single value per channel in the whole window"):
        run_in_lockstep([lambda: norm(torch.randn(1, 3))], [norm])
    with pytest.raises(ValueError, match="Expected more than 1 value per channel"):
        norm(torch.randn(1, 3))


def test_a_backward_inside_of_a_loss_is_refused() -> None:
    norm = nn.BatchNorm1d(3)

    def penalised(x: Tensor) -> Tensor:
        x.requires_grad_()
        (gradient,) = torch.autograd.grad(norm(x).sum(), x)
        return gradient.norm()

    with pytest.raises(RuntimeError, match="ran backward through batch_norm by itself"):
        run_in_lockstep([lambda x=x: penalised(x) for x in torch.randn(8, 3).split(4)], [norm])
    assert no_strand_is_alive()


def test_an_exception_for_the_waiting_thread_ends_all_of_them() -> None:
    norm = nn.BatchNorm1d(3)

    def forward() -> Tensor:
        return norm(torch.randn(4, 3))

    def interrupted() -> Tensor:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run_in_lockstep([forward, interrupted, forward], [norm])
    assert no_strand_is_alive()


def test_ctrl_c_while_a_forward_runs_ends_all_of_them() -> None:
    norm = nn.BatchNorm1d(3)

    def forward(interrupts: bool) -> Tensor:
        if interrupts:
            os.kill(os.getpid(), signal.SIGINT)  # reaches the main thread, which waits for this one
            time.sleep(0.2)
        return norm(torch.randn(4, 3))

    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # a process in the background may ignore it
    try:
        with pytest.raises(KeyboardInterrupt):
            run_in_lockstep([lambda j=j: forward(j == 1) for j in range(3)], [norm])
    finally:
        signal.signal(signal.SIGINT, before)
    assert no_strand_is_alive()


# ---- Accumulator(batch_norm="exact")


@pytest.mark.parametrize("name", CASES)
def test_the_accumulator_gives_gradient_loss_and_buffers_of_the_full_batch(name: str) -> None:
    if name.startswith("transformers"):
        pytest.importorskip("transformers")
    model, batch = CASES[name].model().double(), batch_of(10, CASES[name].sample)
    accumulator = mb.Accumulator(model, loss_sum, micro_batch_size=3, batch_norm="exact")
    for _ in range(2):
        twin, expected, expected_loss = full_batch(model, batch)
        report = accumulator.run(batch)
        assert difference(gradients(model), expected) <= 1e-12
        assert buffer_difference(model, twin) <= 1e-12
        assert abs(float(report.loss) - expected_loss) <= 1e-12
        assert (report.micro_batch_sizes, report.retries) == ((3, 3, 2, 2), 0)
        model.zero_grad()


def test_windows_that_end_with_a_single_sample_are_exact() -> None:
    model, batch = flat().double(), batch_of(10, (7,))
    twin, expected, _ = full_batch(model, batch)
    report = mb.Accumulator(model, loss_sum, batch_norm="exact").run(mb.Window(cut(batch, SIZES)))
    assert report.micro_batch_sizes == (4, 3, 2, 1)
    assert difference(gradients(model), expected) <= 1e-12
    assert buffer_difference(model, twin) <= 1e-12


def test_two_denominators_and_gradients_from_before_are_as_without() -> None:
    def two(model: nn.Module, batch: Pair) -> dict[str, Tensor]:
        x, labels = batch
        outputs = model(x)
        return {"samples": loss_sum_of(outputs, labels), "first": outputs[labels == 0].square().sum()}

    def count(batch: Pair) -> dict[str, float]:
        return {"samples": len(batch[1]), "first": float((batch[1] == 0).sum())}

    def loss_sum_of(outputs: Tensor, labels: Tensor) -> Tensor:
        return F.cross_entropy(outputs, labels, reduction="sum")

    model, batch = flat().double(), batch_of(10, (7,))
    batch[1][:4] = 0
    twin = copy.deepcopy(model)

    def full() -> Tensor:
        return sum(value / count(batch)[name] for name, value in two(twin, batch).items())

    expected = reference(twin, full)
    accumulator = mb.Accumulator(model, two, micro_batch_size=3, count=count, batch_norm="exact")
    for p in model.parameters():
        p.grad = torch.ones_like(p)
    accumulator.run(batch, add=True)
    assert difference(gradients(model), [g + 1 for g in expected if g is not None]) <= 1e-12
    assert buffer_difference(model, twin) <= 1e-12


def test_evaluation_in_train_mode_sees_the_whole_window() -> None:
    model, batch = Residual().double(), batch_of(10, (3, 6, 6))
    twin, _, expected_loss = full_batch(model, batch)
    report = mb.Accumulator(model, loss_sum, micro_batch_size=3, batch_norm="exact").evaluate(batch)
    assert abs(float(report.loss) - expected_loss) <= 1e-12
    assert buffer_difference(model, twin) <= 1e-12


def test_a_grad_scaler_and_autocast_go_with_it() -> None:
    model, batch = Convolutional(2), batch_of(10, (3, 6, 6), torch.float32)
    scaler = torch.amp.GradScaler("cpu", init_scale=256.0)

    def under_autocast(model: nn.Module, batch: Pair) -> tuple[Tensor, int]:
        with torch.autocast("cpu", torch.bfloat16):
            return loss_sum(model, batch)

    twin, expected, _ = full_batch(model, batch, under_autocast)
    options = {"micro_batch_size": 3, "batch_norm": "exact", "scaler": scaler, "autocast": torch.bfloat16}
    mb.Accumulator(model, loss_sum, **options).run(batch)
    assert difference(gradients(model), expected) <= 0.02
    assert buffer_difference(model, twin) <= 0.02


def test_training_is_that_of_the_full_batch_update_by_update() -> None:
    model = Convolutional(2).double()
    twin = copy.deepcopy(model)
    optimizers = [torch.optim.SGD(m.parameters(), lr=0.1, momentum=0.9) for m in (model, twin)]
    accumulator = mb.Accumulator(model, loss_sum, micro_batch_size=3, batch_norm="exact")
    for step in range(4):
        batch = batch_of(8 + step, (3, 6, 6))
        mb.apply_update(optimizers[0], accumulator.run(batch))
        total, count = loss_sum(twin, batch)
        (total / count).backward()
        optimizers[1].step()
        optimizers[1].zero_grad()
    drift = [float((a - b).detach().abs().max()) for a, b in zip(model.parameters(), twin.parameters(), strict=True)]
    assert max(drift) <= 1e-12
    assert buffer_difference(model, twin) <= 1e-12


# ---- the cheapest that fits the budget


def budgeted(max_memory: int | None, n: int = 32) -> tuple[mb.Accumulator, nn.Module, Pair]:
    model, batch = Residual(8, 4).double(), batch_of(n, (3, 10, 10))
    options = {} if max_memory is None else {"max_memory": max_memory}
    return mb.Accumulator(model, loss_sum, micro_batch_size="auto", batch_norm="exact", **options), model, batch


def test_without_a_budget_the_whole_window_is_one_micro_batch_with_its_graph_on_the_host() -> None:
    accumulator, model, batch = budgeted(None)
    twin, expected, _ = full_batch(model, batch)
    native = peak_memory(lambda: full_batch(model, batch))
    report = None

    def run() -> None:
        nonlocal report
        report = accumulator.run(batch)

    assert peak_memory(run) < 0.6 * native
    assert report is not None
    assert report.micro_batch_sizes == (32,)
    assert difference(gradients(model), expected) <= 1e-12
    assert buffer_difference(model, twin) <= 1e-12


def test_with_a_budget_the_window_is_cut_until_it_fits_and_stays_exact() -> None:
    accumulator, model, batch = budgeted(None)
    whole = peak_memory(lambda: accumulator.run(batch))
    clear(model)
    accumulator, model, batch = budgeted(int(0.75 * whole))
    twin, expected, _ = full_batch(model, batch)
    report = accumulator.run(batch)
    assert report.retries >= 1
    assert max(report.micro_batch_sizes) < 32
    assert difference(gradients(model), expected) <= 1e-12
    assert buffer_difference(model, twin) <= 1e-12
    clear(model)
    assert accumulator.run(batch).retries == 0  # what fits is known now
    accumulator, model, _ = budgeted(int(0.2 * whole))
    with pytest.raises(torch.OutOfMemoryError, match="a window in lockstep does not fit, one sample at a time"):
        accumulator.run(batch)
    assert all(p.grad is None for p in model.parameters())
    assert no_strand_is_alive()


class FailAt(TorchDispatchMode):
    """The operation at this position fails, as an allocation would."""

    def __init__(self, point: int) -> None:
        super().__init__()
        self.point, self.count = point, 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.count += 1
        if self.count == self.point:
            raise torch.OutOfMemoryError("injected")
        return func(*args, **(kwargs or {}))


def test_a_failure_at_any_operation_is_recovered_exactly() -> None:
    model, batch = Twice().double(), batch_of(8, (7,))
    start = copy.deepcopy(model.state_dict())
    twin, expected, _ = full_batch(model, batch)

    def run(point: int) -> tuple[int, mb.Report]:
        model.load_state_dict(start)
        model.zero_grad()
        accumulator = mb.Accumulator(model, loss_sum, micro_batch_size=4, batch_norm="exact")
        with FailAt(point) as mode:
            report = accumulator.run(batch)
        return mode.count, report

    num_operations, _ = run(0)
    recovered = 0
    for point in range(1, num_operations, 61):
        try:
            _, report = run(point)
        except torch.OutOfMemoryError:
            assert all(p.grad is None for p in model.parameters())  # before or after the window's own work
            continue
        recovered += report.retries
        assert difference(gradients(model), expected) <= 1e-12, point
        assert buffer_difference(model, twin) <= 1e-12, point
        assert no_strand_is_alive()
    assert recovered > 2


def test_what_cannot_be_measured_or_is_no_choice_is_refused() -> None:
    with pytest.raises(ValueError, match="no micro-batch has a gradient of its own, so measure='norms'"):
        mb.Accumulator(flat(), loss_sum, batch_norm="exact", measure="norms")
    with pytest.raises(ValueError, match="batch_norm must be 'exact', 'pooled', 'micro_batch' or None, got 'full'"):
        mb.Accumulator(flat(), loss_sum, batch_norm="full")
    with pytest.raises(ValueError, match="goes with micro_batch_size='auto'"):
        mb.Accumulator(flat(), loss_sum, batch_norm="exact", micro_batch_size=4, max_memory="1GB")


def test_an_error_in_the_loss_leaves_gradients_and_threads_as_before() -> None:
    model, batch = flat().double(), batch_of(10, (7,))
    calls = []

    def fails(model: nn.Module, batch: Pair) -> tuple[Tensor, int]:
        calls.append(1)
        if len(calls) == 3:
            raise KeyError("on purpose")
        return loss_sum(model, batch)

    with pytest.raises(KeyError, match="on purpose"):
        mb.Accumulator(model, fails, micro_batch_size=3, batch_norm="exact").run(batch)
    assert all(p.grad is None for p in model.parameters())
    assert no_strand_is_alive()
    _, expected, _ = full_batch(model, batch)
    mb.Accumulator(model, loss_sum, micro_batch_size=3, batch_norm="exact").run(batch)
    assert difference(gradients(model), expected) <= 1e-12


def test_a_forward_that_catches_everything_does_not_keep_the_window_waiting() -> None:
    class Stubborn(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear, self.norm, self.calls = nn.Linear(4, 8), nn.BatchNorm1d(8), 0

        def forward(self, x: Tensor) -> Tensor:
            self.calls += 1
            if self.calls == 3:
                raise ValueError("lost")
            hidden = self.linear(x)
            try:
                return self.norm(hidden)
            except BaseException:
                return self.norm(hidden)

    before = threading.active_count()
    accumulator = mb.Accumulator(
        Stubborn(), lambda model, batch: model(batch).square().mean(), micro_batch_size=4, batch_norm="exact"
    )
    with pytest.raises(ValueError, match="lost"):
        accumulator.run(torch.randn(16, 4))
    assert threading.active_count() == before
