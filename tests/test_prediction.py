"""What one micro-batch needs is predicted without running it: as the meter counts, at any size, with nothing left."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from memory_models import CASES, Case, Decoder, class_loss, conv_net, image_batch, resnet, token_batch, token_loss
from torch import Tensor, nn
from torch.nn.utils import parametrizations
from torch.profiler import ProfilerActivity, profile

import macrobatch as mb
from macrobatch.memory import MemoryMeter
from macrobatch.prediction import Fit, Trace, activations_at, largest_that_fits
from macrobatch.rehearsal import Rehearsal
from macrobatch.update_memory import update_memory


def each_case() -> pytest.MarkDecorator:
    return pytest.mark.parametrize("case", CASES.values(), ids=CASES)


def second_micro_batch(case: Case, num_samples: int, run: Callable[[Callable[[], None]], int]) -> int:
    """What `run` measures of a hand-written forward and backward; every parameter and gradient exists and counts."""
    model, batch = case.model(), case.batch(num_samples)
    for p in model.parameters():
        p.grad = torch.zeros_like(p)

    def forward_backward() -> None:
        held = [*model.parameters(), *model.buffers(), *(p.grad for p in model.parameters()), *batch.values()]
        for tensor in held:
            assert tensor is not None
            tensor.detach()  # counts from here on
        loss_sum, _ = case.loss_fn(model, batch)
        loss_sum.backward()

    measured = run(forward_backward)
    model.zero_grad()
    return measured


def allocator_peak(run: Callable[[], None]) -> int:
    """The most bytes that the CPU allocator gave out during `run` and did not get back."""
    run()  # once before: what is allocated for good in the first run
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        run()
    assert profiler.profiler is not None
    events = [e for e in profiler.profiler.kineto_results.events() if e.name() == "[memory]"]
    return int(np.cumsum([e.nbytes() for e in sorted(events, key=lambda e: e.start_ns())]).max(initial=0))


def peak_by_allocator(case: Case, num_samples: int) -> int:
    """The same, with what existed before the run added by hand."""
    model, batch = case.model(), case.batch(num_samples)
    held = {t.untyped_storage()._cdata: t.nbytes for t in [*model.parameters(), *model.buffers(), *batch.values()]}
    gradients = sum(p.nbytes for p in model.parameters())
    return second_micro_batch(case, num_samples, allocator_peak) + sum(held.values()) + gradients


# ---- the prediction is what the meter says, and what the allocator does


@each_case()
def test_a_fake_run_needs_what_the_meter_says_of_a_real_one(case: Case) -> None:
    rehearsal = Rehearsal(case.model(), case.loss_fn, case.batch(3))
    for num_samples in (1, 2, 16):
        predicted = rehearsal.fake(num_samples).peak
        assert predicted == pytest.approx(second_micro_batch(case, num_samples, mb.peak_memory), rel=1e-3), num_samples


@pytest.mark.slow
@each_case()
def test_a_fake_run_needs_what_the_meter_says_at_every_size_up_to_64(case: Case) -> None:
    rehearsal = Rehearsal(case.model(), case.loss_fn, case.batch(3))
    for num_samples in range(1, 65):
        predicted = rehearsal.fake(num_samples).peak
        assert predicted == pytest.approx(second_micro_batch(case, num_samples, mb.peak_memory), rel=1e-3), num_samples


@each_case()
def test_two_fake_runs_tell_the_peak_at_every_size_between_and_beyond(case: Case) -> None:
    rehearsal = Rehearsal(case.model(), case.loss_fn, case.batch(3))
    traces = [rehearsal.fake(2), rehearsal.fake(48)]
    for size in (1, 3, 8, 31, 64):
        peak = traces[0].parameters + traces[0].gradients + rehearsal.input_bytes(size) + activations_at(size, traces)
        assert peak == pytest.approx(rehearsal.fake(size).peak, rel=1e-3), size


def test_the_peaks_alone_of_two_runs_predict_too_much_between_and_too_little_beyond() -> None:
    early = np.array([100, 20, 0])  # bytes that do not depend on the size, at the first of three operations
    late = np.array([0, 10, 1])  # bytes per sample
    traces = [Trace(b, 0, 0, 0, early + b * late) for b in (1, 100)]
    assert [t.activations for t in traces] == [100, 1020]
    assert [activations_at(b, traces) for b in (4, 8, 9, 50, 200)] == [100, 100, 110, 520, 2020]
    of_unlike_lengths = [traces[0], Trace(100, 0, 0, 0, np.append(early + 100 * late, 0))]
    chord = [activations_at(b, of_unlike_lengths) for b in (4, 50, 200)]  # all that can be known of other operations
    assert (chord[0] > 100, chord[1] > 520, chord[2] < 2020) == (True, True, True)


@each_case()
def test_from_eight_samples_on_the_allocator_gives_out_what_was_predicted(case: Case) -> None:
    rehearsal = Rehearsal(case.model(), case.loss_fn, case.batch(3))
    for num_samples in (8, 32):
        assert rehearsal.fake(num_samples).peak == pytest.approx(peak_by_allocator(case, num_samples), rel=0.01)


def test_known_limit_workspaces_inside_a_kernel_are_not_predicted() -> None:
    one = Case(conv_net, class_loss, image_batch)
    predicted = Rehearsal(one.model(), class_loss, image_batch(1)).fake(1).peak
    assert predicted < 0.9 * peak_by_allocator(one, 1)  # a single sample: the convolution's workspace is 18% of it
    deep = Case(lambda: resnet(wide=False), class_loss, image_batch)
    for num_samples in (8, 64):  # the peak lies in the backward of a convolution, which reorders its tensors
        predicted = Rehearsal(deep.model(), class_loss, image_batch(1)).fake(num_samples).peak
        assert 0.9 < predicted / peak_by_allocator(deep, num_samples) < 0.98


# ---- other models: a fake run and a real one through the same recorder


class Unused(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.used, self.unused = nn.Linear(8, 8), nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        return self.used(x)


class RemembersThings(nn.Module):
    """Counts its calls, fills a cache, keeps its last input, and holds a plain tensor."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(8, 8)
        self.scale, self.last = torch.ones(8), None
        self.cache: dict[str, list[Tensor]] = {"positions": []}
        self.calls = 0

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        self.last = x * 2
        if not self.cache["positions"]:
            self.cache["positions"].append(torch.arange(8.0))
        return self.layer(x * self.scale + self.cache["positions"][0])


class Tempered(nn.Module):
    """A loss with a parameter of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.temperature = nn.Parameter(torch.zeros(()))

    def forward(self, model: nn.Module, batch: Any) -> tuple[Tensor, Tensor]:
        return (model(batch[0]) * self.temperature.exp()).square().sum(), torch.tensor(len(batch[0]))


def square_loss(model: Any, batch: Any) -> tuple[Tensor, int]:
    return model(batch[0]).square().sum(), len(batch[0])


def norm_of_gradient(model: Any, batch: Any) -> tuple[Tensor, int]:
    x = batch[0].clone().requires_grad_()
    (gradient,) = torch.autograd.grad(model(x).sum(), x, create_graph=True)
    return gradient.square().sum(), len(x)


TEACHER = nn.Linear(8, 8).requires_grad_(False)


def distill(model: Any, batch: Any) -> tuple[Tensor, int]:
    return (model(batch[0]) - TEACHER(batch[0])).square().sum(), len(batch[0])


@dataclass(frozen=True)
class Other:
    model: Callable[[], Any]
    loss_fn: Any
    shape: tuple[int, ...] = (8,)
    options: tuple[tuple[str, Any], ...] = ()

    def rehearsal(self) -> Rehearsal:
        batch = token_batch(3) if self.loss_fn is token_loss else (torch.randn(3, *self.shape),)
        return Rehearsal(self.model(), self.loss_fn, batch, **dict(self.options))


OTHERS = {
    "bf16 autocast": Other(Decoder, token_loss, options=(("autocast", torch.bfloat16),)),
    "bf16 parameters, summed in float32": Other(lambda: Decoder().bfloat16(), token_loss),
    "bf16 all through": Other(lambda: Decoder().bfloat16(), token_loss, options=(("grad_dtype", torch.bfloat16),)),
    "float64": Other(lambda: Decoder().double(), token_loss),
    "two models": Other(
        lambda: [nn.Linear(8, 8), nn.Linear(8, 8)], lambda both, x: square_loss(nn.Sequential(*both), x)
    ),
    "a loss with a parameter": Other(lambda: nn.Linear(8, 8), Tempered()),
    "a loss that differentiates": Other(lambda: nn.Sequential(nn.Linear(8, 8), nn.Tanh()), norm_of_gradient),
    "a loss that knows a teacher": Other(lambda: nn.Linear(8, 8), distill),
    "a mean": Other(lambda: nn.Linear(8, 8), lambda model, x: model(x[0]).mean()),
    "several sums": Other(
        lambda: nn.Linear(8, 8), lambda model, x: {"a": model(x[0]).sum(), "b": model(x[0]).exp().sum()}
    ),
    "a Loss": Other(
        lambda: nn.Linear(8, 8), lambda model, x: mb.Loss(model(x[0]).sum(), torch.tensor(3.0), {"m": 1.0})
    ),
    "unused parameters": Other(Unused, square_loss),
    "a module that remembers things": Other(RemembersThings, square_loss),
    "spectral norm": Other(lambda: parametrizations.spectral_norm(nn.Linear(8, 8)), square_loss),
    "weight norm": Other(lambda: parametrizations.weight_norm(nn.Linear(8, 8)), square_loss),
    "torch's encoder": Other(lambda: nn.TransformerEncoderLayer(16, 2, 32, batch_first=True), square_loss, (9, 16)),
    "GRU": Other(
        lambda: nn.GRU(8, 16, batch_first=True), lambda model, x: square_loss(lambda b: model(b)[0], x), (7, 8)
    ),
    "channels last": Other(lambda: conv_net().to(memory_format=torch.channels_last), square_loss, (3, 16, 16)),
    "torch.compile": Other(lambda: torch.compile(nn.Sequential(nn.Linear(8, 8), nn.ReLU())), square_loss),
}


@pytest.mark.filterwarnings("ignore:.*torch.jit.script:DeprecationWarning")  # torch.compile imports it
@pytest.mark.parametrize("other", OTHERS.values(), ids=OTHERS)
def test_a_fake_run_needs_what_a_real_one_does_and_neither_leaves_anything_behind(other: Other) -> None:
    rehearsal = other.rehearsal()
    before = everything(rehearsal)
    for size in (2, 5):
        fake, real = rehearsal.fake(size), rehearsal.real(size)
        assert (fake.parameters, fake.gradients, fake.inputs) == (real.parameters, real.gradients, real.inputs)
        assert (fake.peak, fake.idle) == (pytest.approx(real.peak, rel=1e-3), real.idle)
    assert everything(rehearsal) == before


def everything(rehearsal: Rehearsal) -> list[Any]:
    """All that a module is made of, by identity, the numbers in its tensors, and the state of random numbers."""
    modules = [inner for module in rehearsal.stage.modules for inner in module.modules()]
    attributes = [{name: id(value) for name, value in vars(module).items()} for module in modules]
    contents = [(list(m._parameters), list(m._buffers), list(m._forward_hooks), list(m._modules)) for m in modules]
    tensors = [(id(t), t.tolist(), t.grad) for m in modules for t in (*m.parameters(), *m.buffers())]
    plain = [(m.calls, m.last, dict(m.cache), m.scale.tolist()) for m in modules if isinstance(m, RemembersThings)]
    return [attributes, contents, tensors, [str(each) for each in plain], torch.get_rng_state().tolist()]


def test_parameters_that_the_loss_does_not_reach_and_frozen_ones_have_no_gradients() -> None:
    trace = Rehearsal(Unused(), square_loss, (torch.randn(3, 8),)).fake(2)
    assert (trace.parameters, trace.gradients, trace.idle) == (2 * 288, 288, {2, 3})
    first, second = nn.Linear(8, 8), nn.Linear(8, 8)
    both = Rehearsal([first, second], lambda m, x: square_loss(nn.Sequential(*m), x), (torch.randn(3, 8),))
    frozen = Rehearsal(
        [first, second], lambda m, x: square_loss(nn.Sequential(*m), x), (torch.randn(3, 8),), frozen=[second]
    )
    assert (both.fake(2).gradients, frozen.fake(2).gradients) == (576, 288)
    assert all(p.requires_grad for p in second.parameters())


def test_gradients_that_were_there_before_are_there_afterwards() -> None:
    model = nn.Linear(8, 8)
    model.weight.grad = gradient = torch.randn(8, 8)
    before = gradient.clone()
    rehearsal = Rehearsal(model, square_loss, (torch.randn(3, 8),))
    rehearsal.fake(2), rehearsal.real(2), rehearsal.seconds(2)
    assert model.weight.grad is gradient
    assert model.bias.grad is None
    assert torch.equal(gradient, before)


def test_hooks_fire_stay_and_an_error_in_one_leaves_the_model_whole() -> None:
    model, calls = nn.Sequential(nn.Linear(8, 8), nn.BatchNorm1d(8)), []

    def hook(module: nn.Module, inputs: Any, output: Any) -> None:
        calls.append(len(output))
        if len(calls) > 2:
            raise KeyError("third call")

    handle = model.register_forward_hook(hook)
    rehearsal = Rehearsal(model, square_loss, (torch.randn(3, 8),))
    before = everything(rehearsal)
    rehearsal.fake(5), rehearsal.real(4)
    assert calls == [5, 4]
    for run in (rehearsal.fake, rehearsal.real):
        with pytest.raises(KeyError, match="third call"):
            run(2)
        assert everything(rehearsal) == before
    handle.remove()
    assert not model._forward_hooks


def test_a_fake_run_allocates_nothing_whatever_its_size() -> None:
    rehearsal = Rehearsal(Decoder(), token_loss, token_batch(3))
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        trace = rehearsal.fake(10**6)
    assert trace.peak > 10**11
    assert profiler.profiler is not None
    events = [e for e in profiler.profiler.kineto_results.events() if e.name() == "[memory]"]
    assert sum(e.nbytes() for e in events if e.nbytes() > 0) < 10**5


def test_a_model_without_numbers_can_be_rehearsed_before_it_is_made() -> None:
    with torch.device("meta"):
        planned = Decoder()
    there = Rehearsal(planned, token_loss, token_batch(3), device=torch.device("cpu")).fake(8)
    assert there.peak == Rehearsal(Decoder(), token_loss, token_batch(3)).fake(8).peak


# ---- what cannot be predicted


def test_a_model_that_looks_at_its_numbers_cannot_run_on_fake_tensors() -> None:
    def loss_fn(model: Any, batch: Any) -> Any:
        loss_sum = model(batch[0]).sum()
        return (loss_sum if loss_sum.item() > 0 else -loss_sum), len(batch[0])

    rehearsal = Rehearsal(nn.Linear(8, 8), loss_fn, (torch.randn(3, 8),))
    with pytest.raises(Exception, match="_local_scalar_dense"):
        rehearsal.fake(2)
    assert rehearsal.real(2).peak > 0


def test_an_lstm_is_one_kernel_on_the_cpu_which_fake_tensors_do_not_take() -> None:
    lstm = nn.LSTM(8, 16, batch_first=True)
    rehearsal = Rehearsal(lstm, lambda model, x: (model(x[0])[0].sum(), len(x[0])), (torch.randn(3, 5, 8),))
    with pytest.raises(NotImplementedError, match="LSTM runs as one operation on a CPU"):
        rehearsal.fake(2)


def test_a_trainable_tensor_outside_of_the_model_is_refused_before_backward() -> None:
    stray = nn.Linear(8, 8)
    rehearsal = Rehearsal(nn.Linear(8, 8), lambda m, x: (stray(m(x[0])).sum(), 1), (torch.randn(3, 8),))
    for run in (rehearsal.fake, rehearsal.real):
        with pytest.raises(ValueError, match=r"trainable tensor outside of the model: 'stray\.weight'"):
            run(2)
    assert stray.weight.grad is None


def test_a_loss_without_gradient_and_a_model_without_parameters_are_refused() -> None:
    rehearsal = Rehearsal(nn.Linear(8, 8), lambda m, x: (m(x[0]).detach().sum(), 1), (torch.randn(3, 8),))
    with pytest.raises(ValueError, match="does not depend on any trainable parameter, or has no terms"):
        rehearsal.fake(2)
    with pytest.raises(ValueError, match="no parameter that requires a gradient"):
        Rehearsal(nn.ReLU(), square_loss, (torch.randn(3, 8),))


# ---- a real run within a limit


def test_a_real_run_past_its_limit_is_out_of_memory_and_leaves_the_model_whole() -> None:
    rehearsal = Rehearsal(Decoder(), token_loss, token_batch(3))
    before, needed = everything(rehearsal), rehearsal.fake(16).peak
    assert rehearsal.real(16, needed).peak == needed
    with pytest.raises(torch.OutOfMemoryError, match="out of memory"):
        rehearsal.real(16, needed - 1)
    assert everything(rehearsal) == before


def test_a_real_run_leaves_no_memory_behind() -> None:
    rehearsal = Rehearsal(Decoder(), token_loss, token_batch(3))
    with MemoryMeter() as meter:
        torch.zeros(1)
        rehearsal.real(8)
        torch.zeros(1)  # what was freed is seen at the next operation
        held = sum(p.nbytes for module in rehearsal.stage.modules for p in module.parameters())
        assert meter.live <= held + rehearsal.input_bytes(3) + 100


# ---- checkpointing, from a plain run


@pytest.mark.parametrize("size", [2, 16, 64])
@pytest.mark.parametrize("reentrant", [False, True])
def test_what_checkpointed_blocks_would_need_is_told_by_a_run_without_checkpointing(size: int, reentrant: bool) -> None:
    plain = Rehearsal(Decoder(layers=6), token_loss, token_batch(3)).fake(size)
    truth = Rehearsal(Decoder(layers=6, reentrant=reentrant), token_loss, token_batch(3)).fake(size)
    estimate = plain.with_checkpointing()
    assert plain.num_blocks == 6
    assert 0.98 < estimate.peak / truth.peak < 1.1
    assert estimate.peak < 0.7 * plain.peak or size == 2


def test_without_blocks_or_with_blocks_that_are_checkpointed_there_is_nothing_to_tell() -> None:
    for model in (Decoder(reentrant=False), Decoder(reentrant=True)):
        assert Rehearsal(model, token_loss, token_batch(3)).fake(4).checkpointed is None
    trace = Rehearsal(conv_net(), class_loss, image_batch(3)).fake(4)
    assert (trace.num_blocks, trace.checkpointed) == (0, None)
    with pytest.raises(ValueError, match="no blocks that could be checkpointed"):
        trace.with_checkpointing()


# ---- the search


@dataclass(frozen=True)
class Programme:
    """Live bytes a + m b after each operation, and more for some sizes if `curved`."""

    fixed: tuple[int, ...]
    per_sample: tuple[int, ...]
    curved: float = 0.0

    def run(self, size: int) -> Trace:
        live = np.array(self.fixed) + np.array(self.per_sample) * size + np.int64(self.curved * size**2)
        return Trace(size, 0, 0, 0, live)

    def search(self, room: int, largest: int, max_runs: int = 4) -> Fit:
        return largest_that_fits(self.run, lambda size, trace: room, largest, max_runs=max_runs)

    def truth(self, room: int, largest: int) -> int:
        return max((b for b in range(1, largest + 1) if self.run(b).activations <= room), default=0)


@settings(max_examples=300, deadline=None)
@given(
    st.lists(st.tuples(st.integers(0, 10**4), st.integers(0, 10**3)), min_size=1, max_size=8),
    st.integers(1, 10**5),
    st.integers(1, 300),
)
def test_four_runs_find_the_largest_size_that_fits(lines: list[tuple[int, int]], room: int, largest: int) -> None:
    programme = Programme(*zip(*lines, strict=True))  # type: ignore[arg-type]
    fit = programme.search(room, largest)
    assert (fit.size, fit.exact) == (programme.truth(room, largest), True)
    assert fit.num_runs <= 4


def test_where_bytes_are_not_linear_the_result_fits_and_does_not_claim_to_be_the_largest() -> None:
    programme = Programme((0, 500), (10, 3), curved=0.5)
    fit = programme.search(room=5000, largest=400)
    assert 0 < fit.size < programme.truth(5000, 400) == 90
    assert not fit.exact
    assert programme.run(fit.size).activations <= 5000
    more = programme.search(room=5000, largest=400, max_runs=20)
    assert (more.size, more.exact) == (90, True)


def test_a_size_that_ran_out_of_memory_bounds_the_search_though_it_left_no_trace() -> None:
    programme, runs = Programme((0, 500), (10, 3)), []

    def run(size: int) -> Trace | None:
        runs.append(size)
        trace = programme.run(size)
        return trace if trace.activations <= 1234 else None

    fit = largest_that_fits(run, lambda size, trace: 1234, 500, max_runs=8, second=4)
    assert (fit.size, fit.exact) == (123, True)
    assert runs == [2, 4, 123, 124]


# ---- the optimizer

OPTIMIZERS: dict[str, Callable[[Any], torch.optim.Optimizer]] = {
    "SGD": lambda p: torch.optim.SGD(p, lr=0.1),
    "SGD with momentum": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9),
    "AdamW": torch.optim.AdamW,
    "AdamW foreach": lambda p: torch.optim.AdamW(p, foreach=True),
    "AdamW fused": lambda p: torch.optim.AdamW(p, fused=True),
    "AdamW with a tensor for lr": lambda p: torch.optim.AdamW(p, lr=torch.tensor(1e-3)),
    "Adam with amsgrad": lambda p: torch.optim.Adam(p, amsgrad=True),
    "NAdam": torch.optim.NAdam,
    "RMSprop": lambda p: torch.optim.RMSprop(p, momentum=0.9),
    "Adafactor, which looks at its numbers": torch.optim.Adafactor,
    "under a scheduler": lambda p: scheduled(torch.optim.AdamW(p)),
}


def scheduled(optimizer: torch.optim.Optimizer) -> torch.optim.Optimizer:
    torch.optim.lr_scheduler.ConstantLR(optimizer)  # replaces optimizer.step
    return optimizer


@pytest.mark.parametrize("make", OPTIMIZERS.values(), ids=OPTIMIZERS)
def test_the_state_of_an_optimizer_is_known_before_its_first_step(make: Callable[[Any], Any]) -> None:
    model = Decoder()
    optimizer = make(model.parameters())
    fired: list[int] = []
    optimizer.register_step_pre_hook(lambda *_: fired.append(1))
    before = [str(vars(optimizer)), [id(p) for group in optimizer.param_groups for p in group["params"]]]
    predicted = update_memory(Rehearsal(model, token_loss, token_batch(3)).stage, [optimizer])
    assert [str(vars(optimizer)), [id(p) for g in optimizer.param_groups for p in g["params"]]] == before
    assert (fired, dict(optimizer.state)) == ([], {})

    for p in model.parameters():
        p.grad = torch.zeros_like(p)
    with MemoryMeter() as meter:
        for p in model.parameters():
            assert p.grad is not None
            p.detach(), p.grad.detach()
        held = meter.live
        optimizer.step()
        assert (predicted.state, predicted.peak) == (meter.live - held, pytest.approx(meter.peak - held, rel=0.01))


def test_without_an_optimizer_two_moments_are_assumed_and_said() -> None:
    stage, parameters = Rehearsal(nn.Linear(8, 8), square_loss, (torch.randn(3, 8),)).stage, 4 * 72
    assumed = update_memory(stage, [])
    assert assumed.state == 2 * parameters + 2 * 4  # and a step count for each of two parameters
    assert "AdamW, because no optimizer was given" in assumed.assumption
    assert update_memory(stage, [], idle=frozenset({0})).state == 2 * 4 * 8 + 4


def test_an_optimizer_that_cannot_step_on_fake_tensors_is_said_to_be_guessed() -> None:
    model = nn.Linear(8, 8)
    guessed = update_memory(
        Rehearsal(model, square_loss, (torch.randn(3, 8),)).stage, [torch.optim.LBFGS(model.parameters())]
    )
    assert guessed.state == 8 * 72
    assert "LBFGS cannot step on fake tensors (TypeError" in guessed.assumption
