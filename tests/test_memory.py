"""Memory is counted to the byte, and a limit refuses exactly what would pass it and nothing else."""

import gc
import threading
import weakref
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile
from torch.utils._python_dispatch import TorchDispatchMode, _get_current_dispatch_mode_stack
from torch.utils.checkpoint import checkpoint

import macrobatch as mb
from macrobatch.memory import MemoryMeter, format_bytes, memory_limit, parse_bytes, peak_memory, physical_memory
from macrobatch.storages import LiveStorages

KB = 1024  # bytes of 256 float32: the tensors below come in multiples of it


def tensor_of(num_bytes: int) -> Tensor:
    return torch.zeros(num_bytes // 4)


def bytes_of(*tensors: Tensor) -> int:
    return sum(t.numel() * t.element_size() for t in tensors)


@pytest.fixture
def _no_cycles_collected() -> Iterator[None]:
    """What is alive only because a cycle holds it stays alive, and shows."""
    gc.collect()
    gc.disable()
    yield
    gc.enable()


# ---- programs: small, and each with its own way through autograd


@dataclass(frozen=True)
class Program:
    """Something to run once, and the tensors that exist before it does."""

    run: Callable[[], object]
    model: nn.Module
    inputs: Tensor

    @property
    def held(self) -> int:
        return bytes_of(self.inputs, *self.model.parameters(), *self.model.buffers())


def encoder_layer() -> nn.Module:
    return nn.TransformerEncoderLayer(32, 4, 64, dropout=0.1, batch_first=True)


class Checkpointed(nn.Module):
    def __init__(self, use_reentrant: bool) -> None:
        super().__init__()
        self.layers = nn.ModuleList(encoder_layer() for _ in range(3))
        self.use_reentrant = use_reentrant

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = checkpoint(layer, x, use_reentrant=self.use_reentrant)
        return x


class SavesCopies(nn.Module):
    """Saves a copy for backward of whatever autograd would save itself."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = encoder_layer()

    def forward(self, x: Tensor) -> Tensor:
        with torch.autograd.graph.saved_tensors_hooks(torch.clone, torch.clone):
            output: Tensor = self.layer(x)
        return output


class Cube(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return x * x * x

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Tensor:
        (x,) = ctx.saved_tensors
        return 3 * x * x * gradients[0]


class Cubed(nn.Sequential):
    def forward(self, x: Tensor) -> Tensor:
        return Cube.apply(super().forward(x))


def conv_net() -> nn.Module:
    first = (nn.Conv2d(3, 16, 3, padding=1), nn.BatchNorm2d(16), nn.ReLU())
    second = (nn.Conv2d(16, 32, 3, padding=1), nn.BatchNorm2d(32), nn.ReLU(inplace=True))
    return nn.Sequential(*first, *second, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(32, 10))


def mlp(kind: type[nn.Sequential] = nn.Sequential) -> nn.Module:
    return kind(nn.Linear(64, 64), nn.Tanh(), nn.Linear(64, 64))


MODELS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "transformer layer": (encoder_layer, (16, 48, 32)),
    "conv net with BatchNorm": (conv_net, (8, 3, 32, 32)),
    "reentrant checkpointing": (lambda: Checkpointed(True), (16, 48, 32)),
    "non-reentrant checkpointing": (lambda: Checkpointed(False), (16, 48, 32)),
    "saved tensors hooks": (SavesCopies, (16, 48, 32)),
    "custom autograd function": (lambda: mlp(Cubed), (256, 64)),
    "foreach AdamW": (mlp, (8, 64)),
}


def build(name: str) -> Program:
    """One forward and backward, and for AdamW a step too, from fresh."""
    torch.manual_seed(0)
    make_model, shape = MODELS[name]
    model, x = make_model(), torch.randn(shape).requires_grad_("reentrant" in name)

    def run() -> None:
        model(x).square().mean().backward()
        if "AdamW" in name:
            torch.optim.AdamW(model.parameters(), foreach=True).step()
        model.zero_grad()
        x.grad = None

    return Program(run, model, x)


def each_program() -> pytest.MarkDecorator:
    return pytest.mark.parametrize("name", MODELS)


def allocator_peak(run: Callable[[], object]) -> int:
    """The most bytes that the CPU allocator gave out and did not get back, by the profiler's own events."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        run()
    events = profiler.profiler.kineto_results.events()
    live = peak = 0
    for event in sorted((e for e in events if e.name() == "[memory]"), key=lambda e: e.start_ns()):
        live += event.nbytes()
        peak = max(peak, live)
    return peak


# ---- the meter counts by hand


def test_a_product_and_its_relu_count_both_inputs_and_both_outputs_at_once() -> None:
    x, w = torch.ones(8, 16), torch.ones(16, 4)
    with MemoryMeter() as meter:
        y = x @ w
        assert meter.live == 4 * (8 * 16 + 16 * 4 + 8 * 4)
        z = y.relu()
        assert meter.live == 4 * (8 * 16 + 16 * 4 + 2 * 8 * 4)
        del y
        assert meter.live == 4 * (8 * 16 + 16 * 4 + 8 * 4)
        del z, x
        assert meter.live == 4 * 16 * 4
    assert meter.peak == 4 * (8 * 16 + 16 * 4 + 2 * 8 * 4)


def test_the_peak_of_a_backward_is_where_the_hand_puts_it() -> None:
    n, d = 64, 32
    x, w = torch.ones(n, d), torch.ones(d, d, requires_grad=True)
    live_at_relu = n * d + d * d + 2 * n * d  # x, w, x @ w, relu
    live_in_backward = n * d + d * d + n * d + 2 + n * d  # x, w, relu, the loss and its gradient, the gradient of x @ w
    live_at_the_end = n * d + d * d + n * d + 2 + d * d  # relu's output is freed, the gradient of w is there

    def run() -> None:
        (x @ w).relu().sum().backward()

    assert peak_memory(run) == 4 * max(live_at_relu, live_in_backward, live_at_the_end)
    w.grad = None
    x, w = torch.ones(2, d), torch.ones(d, d, requires_grad=True)
    assert peak_memory(run) == 4 * (2 * d + d * d + 2 * d + 2 + d * d)  # few samples: the gradient of w is the peak


def test_views_count_once_and_operations_in_place_count_nothing() -> None:
    def run() -> None:
        x = tensor_of(8 * KB)
        x.view(2, -1).t()[1:].expand(4, -1, 2)
        x.add_(1).mul_(2).clamp_(min=0)
        x[:3].fill_(7)
        x.detach().unsqueeze(0).relu_()

    assert peak_memory(run) == 8 * KB


def test_a_tensor_from_before_counts_from_the_first_touch_and_whole_though_only_a_slice_is_used() -> None:
    x, other = tensor_of(8 * KB), tensor_of(8 * KB)
    with MemoryMeter() as meter:
        assert meter.live == 0
        x[:4].sum()
        assert meter.live == 8 * KB
    assert other.sum() == 0


def test_a_storage_is_gone_the_moment_its_last_tensor_is() -> None:
    with MemoryMeter() as meter:
        x = tensor_of(4 * KB)
        view = x[1:]
        del x
        assert meter.live == 4 * KB
        del view
        assert meter.live == 0
        for _ in range(100):
            tensor_of(4 * KB)
    assert meter.peak == 4 * KB


def test_a_storage_that_grows_counts_as_large_as_it_is() -> None:
    with MemoryMeter() as meter:
        x = tensor_of(4 * KB)
        x.resize_(2 * KB)
        assert meter.live == 8 * KB


def test_a_storage_emptied_behind_the_back_of_torch_does_not_add_to_the_peak() -> None:
    with MemoryMeter() as meter:
        x = tensor_of(4 * KB)
        x.untyped_storage().resize_(0)
        tensor_of(6 * KB)
        x.untyped_storage().resize_(4 * KB)
        x.zero_()
        assert meter.live == 4 * KB
    assert meter.peak == 6 * KB


# ---- the meter against the allocator


@each_program()
def test_the_peak_is_that_of_the_allocators_own_events(name: str) -> None:
    counted, program = peak_memory(build(name).run), build(name)
    assert counted == pytest.approx(allocator_peak(program.run) + program.held, rel=0.01)


class IgnoresFrees(LiveStorages):
    """The control: adds and never subtracts."""

    def _subtract_freed(self) -> None:
        while self._freed:
            del self._counted[self._freed.popleft().address]


@each_program()
def test_a_meter_that_ignores_frees_overstates(name: str) -> None:
    with IgnoresFrees() as careless:
        build(name).run()
    assert careless.peak > 1.1 * peak_memory(build(name).run)


def test_what_a_kernel_takes_for_itself_is_not_seen() -> None:
    model, x = nn.Conv2d(16, 32, 3, padding=1), torch.randn(1, 16, 32, 32)
    held = bytes_of(x, *model.parameters())
    counted = peak_memory(lambda: model(x).sum().backward())
    model.zero_grad()
    assert allocator_peak(lambda: model(x).sum().backward()) + held > 1.05 * counted


def test_fake_tensors_count_as_the_real_ones_would() -> None:
    from torch._subclasses.fake_tensor import FakeTensorMode

    with FakeTensorMode():
        program = build("transformer layer")
        with LiveStorages(device_type="meta") as storages:
            program.run()
    assert storages.peak == peak_memory(build("transformer layer").run)


@pytest.mark.filterwarnings("ignore:Sparse CSR tensor support")
def test_a_sparse_tensor_counts_as_its_parts() -> None:
    columns, starts, values = torch.arange(4), torch.arange(5), torch.ones(4)
    by_coordinates = torch.sparse_coo_tensor(torch.stack([columns, columns]), values, (4, 4), check_invariants=False)
    by_row = torch.sparse_csr_tensor(starts, columns, values, (4, 4), check_invariants=False)
    by_column = torch.sparse_csc_tensor(starts, columns, values, (4, 4), check_invariants=False)
    assert peak_memory(by_coordinates._values) == 8 * 2 * 4 + 4 * 4
    assert peak_memory(by_row.values) == peak_memory(by_column.values) == 8 * (5 + 4) + 4 * 4


def test_a_tensor_given_by_name_counts() -> None:
    order, values = torch.arange(4), torch.ones(4)
    assert peak_memory(lambda: torch.searchsorted(values, values, sorter=order)) == 4 * 4 + 8 * 4 + 8 * 4


def test_a_tensor_elsewhere_does_not_count() -> None:
    assert peak_memory(lambda: torch.zeros(KB, device="meta") + 1) == 0


def test_a_higher_order_operation_is_one_operation() -> None:
    x = tensor_of(4 * KB)
    assert peak_memory(lambda: torch.cond(torch.tensor(True), torch.sin, torch.cos, (x,))) == 8 * KB + 1


def test_a_tensor_made_of_tensors_counts_as_they_do() -> None:
    ragged = torch.nested.nested_tensor([torch.ones(2), torch.ones(3)], layout=torch.jagged)
    assert peak_memory(lambda: ragged * 2) == 4 * 5 + 8 * 3 + 4 * 5  # values, offsets, the result's values


# ---- the limit


def refusal(run: Callable[[], object], max_bytes: int) -> bool:
    """Whether `run` meets the limit; the error and all it holds is dropped."""
    try:
        with memory_limit(max_bytes):
            run()
    except torch.OutOfMemoryError:
        return True
    return False


@each_program()
def test_the_peak_itself_passes_and_one_byte_less_is_refused(name: str) -> None:
    peak = peak_memory(build(name).run)
    assert not refusal(build(name).run, peak)
    assert refusal(build(name).run, peak - 1)


def test_the_limit_refuses_exactly_the_operation_that_would_pass_it() -> None:
    sizes = [4 * KB, KB, 2 * KB, 3 * KB, KB]
    for max_bytes in range(KB, 12 * KB, KB // 2):
        made: list[Tensor] = []

        def make(into: list[Tensor] = made) -> None:
            for size in sizes:
                into.append(tensor_of(size))

        refused = refusal(make, max_bytes)
        fit = [k for k in range(len(sizes) + 1) if sum(sizes[:k]) <= max_bytes]
        assert (len(made), refused) == (max(fit), max(fit) < len(sizes))


@each_program()
@pytest.mark.usefixtures("_no_cycles_collected")
def test_after_the_error_live_storage_is_what_it_was_and_nothing_holds_the_error(name: str) -> None:
    peak, program = peak_memory(build(name).run), build(name)
    held: list[weakref.ref[BaseException]] = []
    with MemoryMeter() as meter:
        for tensor in (program.inputs, *program.model.parameters(), *program.model.buffers()):
            tensor.view(-1)  # touched, so that they count
        before = meter.live
        for max_bytes in range(before, peak, (peak - before) // 20):
            torch.manual_seed(0)
            try:
                with memory_limit(max_bytes):
                    program.run()
            except torch.OutOfMemoryError as error:
                held.append(weakref.ref(error))
            program.model.zero_grad()
            program.inputs.grad = None
            assert meter.live == before
    assert len(held) >= 20
    assert [error() for error in held] == [None] * len(held)


def test_what_is_refused_is_released_at_once_and_training_goes_on_with_half_the_samples() -> None:
    torch.manual_seed(0)
    model, x = encoder_layer().double().eval(), torch.randn(16, 48, 32, dtype=torch.float64)

    def backward(samples: Tensor) -> None:
        model(samples).square().sum().backward()

    backward(x)
    wanted = [p.grad.clone() for p in model.parameters() if p.grad is not None]
    model.zero_grad()
    peak = peak_memory(lambda: backward(x))
    model.zero_grad()
    with memory_limit(int(0.7 * peak)):
        with pytest.raises(torch.OutOfMemoryError):
            backward(x)
        model.zero_grad()
        for half in x.split(8):
            backward(half)
    for p, gradient in zip(model.parameters(), wanted, strict=True):
        torch.testing.assert_close(p.grad, gradient, rtol=1e-12, atol=1e-12)


def test_the_message_says_what_was_tried_what_is_live_what_is_allowed_and_what_to_change() -> None:
    with memory_limit("10kB"):
        kept = tensor_of(6000)
        with pytest.raises(
            torch.OutOfMemoryError,
            match=r"aten\.add\.Tensor needed 6\.00 kB more; 6\.00 kB are live, so 4\.00 kB of the limit of 10\.00 kB "
            r"are free\. Use a smaller micro_batch_size, recompute activations",
        ):
            kept + 1


def test_a_tensor_from_before_that_does_not_fit_is_refused_before_the_operation_changes_it() -> None:
    x = torch.ones(2 * KB)
    with memory_limit(4 * KB), pytest.raises(torch.OutOfMemoryError, match=r"add_\.Tensor needed 8\.19 kB more"):
        x.add_(1)
    assert x.sum() == 2 * KB


def test_a_tensor_that_could_not_grow_keeps_its_storage_as_on_a_device() -> None:
    with memory_limit(6 * KB):
        x = tensor_of(4 * KB)
        with pytest.raises(torch.OutOfMemoryError, match=r"resize_\.default needed 4\.10 kB more"):
            x.resize_(2 * KB)
        assert x.untyped_storage().nbytes() == 4 * KB
        tensor_of(2 * KB)


def test_a_tensor_that_was_allowed_to_grow_is_left_alone_by_a_later_error() -> None:
    with memory_limit(8 * KB):
        x = tensor_of(2 * KB).resize_(KB)
        with pytest.raises(torch.OutOfMemoryError):
            x + x.sum() + tensor_of(6 * KB)
        assert x.untyped_storage().nbytes() == 4 * KB


def test_a_tensor_from_before_that_was_refused_takes_nothing_from_the_limit() -> None:
    large = torch.ones(2 * KB)
    with memory_limit(4 * KB):
        with pytest.raises(torch.OutOfMemoryError):
            large.sum()
        tensor_of(4 * KB)


@pytest.mark.parametrize("max_bytes", [KB, 12 * KB], ids=["the input is refused", "the output is refused"])
def test_the_error_itself_holds_no_tensor(max_bytes: int) -> None:
    tensors = [torch.ones(2 * KB)]
    storage = weakref.ref(tensors[0].untyped_storage())
    with memory_limit(max_bytes), pytest.raises(torch.OutOfMemoryError) as error:
        tensors[0].add(1)
    tensors.clear()
    assert error.value.__traceback__ is not None
    assert storage() is None


def test_a_refused_operation_has_moved_buffers_and_random_numbers_if_only_its_outputs_did_not_fit() -> None:
    layer, x = nn.BatchNorm1d(8), torch.randn(64, 8)
    random_state = torch.get_rng_state()
    with memory_limit(bytes_of(x, *layer.parameters(), *layer.buffers())):
        with pytest.raises(torch.OutOfMemoryError):
            layer(x)
        with pytest.raises(torch.OutOfMemoryError):
            torch.rand(KB)
    assert layer.running_mean is not None
    assert bool(layer.running_mean.any())
    assert not torch.equal(torch.get_rng_state(), random_state)


def test_adam_that_ran_out_of_memory_in_its_first_step_needs_a_fresh_optimizer() -> None:
    p = nn.Parameter(tensor_of(KB))
    p.grad = tensor_of(KB)
    optimizer = torch.optim.Adam([p])
    with memory_limit(2 * KB), pytest.raises(torch.OutOfMemoryError):
        optimizer.step()
    with pytest.raises(KeyError, match="exp_avg"):
        optimizer.step()
    torch.optim.Adam([p]).step()


# ---- limits and meters inside one another


def test_within_another_limit_the_tighter_one_holds_and_afterwards_the_outer_one() -> None:
    with memory_limit(8 * KB):
        with memory_limit(4 * KB), pytest.raises(torch.OutOfMemoryError, match=r"limit of 4\.10 kB"):
            tensor_of(6 * KB)
        tensor_of(6 * KB)
        with memory_limit(16 * KB), pytest.raises(torch.OutOfMemoryError, match=r"limit of 8\.19 kB"):
            tensor_of(12 * KB)
    tensor_of(12 * KB)


def test_what_an_outer_limit_counts_counts_in_the_inner_one_too() -> None:
    with memory_limit(16 * KB):
        kept = tensor_of(4 * KB)
        with memory_limit(6 * KB), pytest.raises(torch.OutOfMemoryError):
            tensor_of(3 * KB)
        with pytest.raises(ValueError, match=r"2\.05 kB is below what is live on cpu already, 4\.10 kB: free tensors"):
            memory_limit(2 * KB).__enter__()
        del kept
        with memory_limit(2 * KB):
            tensor_of(2 * KB)


def test_a_meter_says_the_same_inside_a_limit_and_inside_another_meter() -> None:
    alone = peak_memory(build("transformer layer").run)
    with memory_limit(2 * alone), MemoryMeter() as outer:
        kept = tensor_of(4 * KB)
        assert peak_memory(build("transformer layer").run) == alone
    assert outer.peak == alone + bytes_of(kept)


def test_an_exception_inside_leaves_no_limit_and_no_meter_behind() -> None:
    with pytest.raises(KeyError), memory_limit(8 * KB), MemoryMeter():
        raise KeyError
    with pytest.raises(KeyError):
        peak_memory(lambda: {}["missing"])
    assert _get_current_dispatch_mode_stack() == []
    tensor_of(16 * KB)


def test_other_dispatch_modes_work_inside_and_outside() -> None:
    class Names(TorchDispatchMode):
        seen: tuple[str, ...] = ()

        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            self.seen += (str(func),)
            return func(*args, **(kwargs or {}))

    x = tensor_of(KB)
    with Names() as outside, MemoryMeter() as meter, Names() as inside:
        x + 1
    assert outside.seen == inside.seen == ("aten.add.Tensor",)
    assert meter.peak == 2 * KB


def test_a_meter_can_be_used_again_and_stays_readable_afterwards() -> None:
    meter = MemoryMeter()
    assert (meter.live, meter.peak) == (0, 0)
    for size in (4 * KB, 2 * KB):
        with meter:
            kept = tensor_of(size)
        assert (meter.live, meter.peak) == (size, size)
        del kept
        assert (meter.live, meter.peak) == (size, size)


# ---- compiled functions and threads


def test_a_compiled_function_is_measured_uncompiled_and_is_compiled_again_afterwards() -> None:
    calls = []

    def backend(graph: torch.fx.GraphModule, _: list[Tensor]) -> Callable[..., Any]:
        return lambda *arguments: calls.append("compiled") or graph(*arguments)

    first_measured = torch.compile(lambda x: x.sin().cos(), backend=backend)
    first_called = torch.compile(lambda x: x.cos().sin(), backend=backend)
    x = tensor_of(KB)
    first_called(x)
    assert calls == ["compiled"]
    assert peak_memory(lambda: first_measured(x)) == peak_memory(lambda: first_called(x)) == 3 * KB
    assert calls == ["compiled"]
    first_measured(x), first_called(x)
    assert calls == ["compiled"] * 3


def test_operations_of_another_thread_are_not_seen_but_what_it_frees_is() -> None:
    def in_a_thread(run: Callable[[], object]) -> None:
        thread = threading.Thread(target=run)
        thread.start()
        thread.join()

    with MemoryMeter() as meter:
        in_a_thread(lambda: tensor_of(8 * KB))
        assert meter.peak == 0
        kept = [tensor_of(4 * KB)]
        assert meter.live == 4 * KB
        in_a_thread(kept.clear)
        assert meter.live == 0


def test_a_thread_may_read_while_another_computes() -> None:
    program, readings, done = build("transformer layer"), [], threading.Event()

    def read(meter: MemoryMeter) -> None:
        while not done.is_set():
            readings.append(meter.live)

    with MemoryMeter() as meter:
        reader = threading.Thread(target=read, args=(meter,))
        reader.start()
        program.run()
        done.set()
        reader.join()
    assert meter.peak == peak_memory(build("transformer layer").run)
    assert min(readings) >= 0


def test_nothing_is_printed(capfd: pytest.CaptureFixture[str]) -> None:
    refusal(build("transformer layer").run, 2_000_000)
    assert capfd.readouterr() == ("", "")


# ---- bytes as text


@pytest.mark.parametrize(
    ("text", "num_bytes"),
    [
        ("6GB", 6 * 10**9),
        ("500 MB", 500 * 10**6),
        ("1.5GiB", 3 * 2**29),
        ("0.1GB", 10**8),
        ("64kb", 64_000),
        ("64KiB", 65_536),
        ("2TB", 2 * 10**12),
        ("12B", 12),
        ("4096", 4096),
        (" 1mib ", 2**20),
        (4096, 4096),
        ("1.0005kB", 1000),
    ],
)
def test_a_size_is_read_with_its_unit(text: int | str, num_bytes: int) -> None:
    assert parse_bytes(text) == num_bytes


@pytest.mark.parametrize(
    "text", ["6 apples", "6G", "6M", "GB", "", "1.5", "1e9", "6GBs", "80%", "1,5GB", 6e9, None, True]
)
def test_what_is_no_size_is_an_error_that_shows_the_forms(text: Any) -> None:
    with pytest.raises(ValueError, match=r'is not a number of bytes: write 500000000, "500MB", "6GB" or "1\.5GiB"'):
        parse_bytes(text)


@pytest.mark.parametrize("text", [0, -1, "0", "0MB", "-6GB", "0.5B"])
def test_a_size_of_nothing_or_less_is_an_error(text: int | str) -> None:
    with pytest.raises(ValueError, match=f"at least 1 byte, got {text!r}"):
        memory_limit(text).__enter__()


@pytest.mark.parametrize(
    ("num_bytes", "text"),
    [(0, "0 B"), (999, "999 B"), (1000, "1.00 kB"), (1_234_567, "1.23 MB"), (6 * 10**12, "6.00 TB")],
)
def test_a_size_is_written_in_units_of_a_thousand(num_bytes: int, text: str) -> None:
    assert format_bytes(num_bytes) == text


def test_a_limit_beyond_the_machine_is_an_error() -> None:
    total = physical_memory()
    if total is None:
        pytest.skip("this system does not say how much memory it has")
    with pytest.raises(ValueError, match="is beyond the device: cpu has"):
        memory_limit(total + 1).__enter__()
    with memory_limit(total):
        pass


@pytest.mark.parametrize("device", ["meta", torch.device("mps")])
def test_another_kind_of_device_is_an_error(device: Any) -> None:
    with pytest.raises(ValueError, match="measured on cpu and cuda devices, got"):
        peak_memory(lambda: None, device=device)


@pytest.mark.parametrize(
    ("device", "shown"),
    [("gpu", "'gpu'"), ("", "''"), (1.5, "1.5"), (True, "True"), (torch.nn.ReLU(), "a ReLU"), ("cuda:x", "'cuda:x'")],
)
def test_a_device_that_torch_does_not_know_is_an_error(device: Any, shown: str) -> None:
    message = f"device={shown} is no device of torch's: give 'cpu' or 'cuda'"
    for measure in (lambda: peak_memory(lambda: None, device=device), memory_limit("1GB", device=device).__enter__):
        with pytest.raises(ValueError, match=message):
            measure()


@pytest.mark.parametrize(
    ("fn", "message"),
    [
        (
            torch.ones(3),
            r"fn must be callable with \(\), got a Tensor, which cannot be called: give a function, fn=lambda",
        ),
        (None, r"fn must be callable with \(\), got None, which cannot be called"),
        (lambda batch: batch, r"missing a required argument: 'batch'. Write peak_memory\(lambda: \.\.\.\)"),
    ],
)
def test_what_cannot_be_called_without_arguments_cannot_be_measured(fn: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        peak_memory(fn)


@pytest.mark.gpu
def test_a_cuda_device_beyond_the_last_is_an_error() -> None:
    last = torch.cuda.device_count() - 1
    with pytest.raises(ValueError, match=f"device cuda:63 was asked for, and the last that torch sees is cuda:{last}"):
        peak_memory(lambda: None, device="cuda:63")


@pytest.mark.skipif(torch.cuda.is_available(), reason="shows what happens without CUDA")
def test_a_cuda_device_that_is_not_there_is_an_error() -> None:
    with pytest.raises(ValueError, match="cuda:0 was asked for, and torch sees no CUDA device"):
        memory_limit("1GB", device="cuda:0").__enter__()


# ---- CUDA


@pytest.mark.gpu
def test_on_cuda_the_peak_is_the_allocators_and_counts_what_was_there() -> None:
    kept = torch.zeros(2**20, device="cuda")
    before = torch.cuda.memory_allocated()

    def run() -> None:
        torch.zeros(2**22, device="cuda")

    assert peak_memory(run, device="cuda") == before + 2**24
    assert bytes_of(kept) <= before


@pytest.mark.gpu
def test_on_cuda_a_limit_is_enforced_and_the_previous_one_put_back() -> None:
    previous = torch.cuda.get_per_process_memory_fraction(0)
    with memory_limit("1GB", device="cuda"):
        assert torch.cuda.get_per_process_memory_fraction(0) < previous
        with memory_limit("500MB", device="cuda"), pytest.raises(torch.OutOfMemoryError):
            torch.zeros(600_000_000, dtype=torch.uint8, device="cuda")
        torch.zeros(600_000_000, dtype=torch.uint8, device="cuda")
        with memory_limit("2GB", device="cuda"), pytest.raises(torch.OutOfMemoryError):
            torch.zeros(1_500_000_000, dtype=torch.uint8, device="cuda")
    assert torch.cuda.get_per_process_memory_fraction(0) == previous
    with pytest.raises(ValueError, match="beyond the device"):
        memory_limit("9000GB", device="cuda").__enter__()


# ---- what accumulation is for


def peak_of_a_window(accumulation_steps: int, micro_batch_size: int = 4) -> tuple[int, int]:
    """Peak of one `Accumulator.run`, and the bytes of the window's input storage in it."""
    torch.manual_seed(0)
    model = encoder_layer()
    batch = torch.randn(accumulation_steps * micro_batch_size, 32, 32)

    def loss_fn(model: nn.Module, x: Tensor) -> tuple[Tensor, int]:
        loss_sum: Tensor = model(x).square().mean((1, 2)).sum()
        return loss_sum, len(x)

    accumulator = mb.Accumulator(model, loss_fn, micro_batch_size=micro_batch_size)
    return peak_memory(lambda: accumulator.run(batch)), bytes_of(batch)


def test_the_peak_of_a_window_its_inputs_apart_is_flat_in_the_number_of_micro_batches() -> None:
    peaks = {k: peak - inputs for k in (2, 64) for peak, inputs in [peak_of_a_window(k)]}
    assert peaks[64] == pytest.approx(peaks[2], rel=0.001)


def test_the_peak_of_the_batch_in_one_piece_is_not_flat() -> None:
    (small, small_inputs), (large, large_inputs) = peak_of_a_window(1, 8), peak_of_a_window(1, 64)
    assert large - large_inputs > 4 * (small - small_inputs)
