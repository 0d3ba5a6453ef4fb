"""What cannot be an argument of an accumulator is refused when it is made, before any work, in words that help."""

import contextlib
import inspect
import re
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from helpers import clear, gradients
from test_accumulator import mean_square, points, regressor
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

import macrobatch as mb
from macrobatch import arguments
from macrobatch.budget import checked_device
from macrobatch.signatures import check_callable, given

Make = Callable[..., mb.Accumulator]


def plain(model: nn.Module, **options: Any) -> mb.Accumulator:
    return mb.Accumulator(model, mean_square, **({"micro_batch_size": 4} | options))


def gathered(model: nn.Module, **options: Any) -> mb.GatheredAccumulator:
    def spread(model: nn.Module, outputs: Tensor, window: mb.Window) -> Tensor:
        return outputs.std()

    return mb.GatheredAccumulator(model, lambda m, b: m(b[0]), spread, **({"micro_batch_size": 4} | options))


@contextlib.contextmanager
def once() -> Iterator[None]:
    yield


AUTOCAST = "autocast must be torch.bfloat16, torch.float16, a context manager such as .*, or None .*, got "
SCALER = "scaler must be a torch.amp.GradScaler, or None, got "
GRAD_DTYPE = "grad_dtype must be one of torch.float32, torch.float64, .*, or None for float32 sums .*, got "
FROZEN = "frozen must be a sequence of modules, got "
GROUP = "process_group must be 'auto', None for this process alone, or a group of torch.distributed, .*, got "
BYTES = r"max_memory: .* write 500000000, .*; or give a share of what the device has, \"80%\""
OPTIMIZER = "optimizer must be a torch optimizer, several, or None for AdamW's state, got "
SHARED: list[tuple[dict[str, Any], str]] = [
    ({"autocast": "bfloat16"}, AUTOCAST + "'bfloat16'"),
    ({"autocast": True}, AUTOCAST + "True"),
    ({"autocast": torch.int32}, AUTOCAST + "torch.int32"),
    ({"autocast": torch.float32}, AUTOCAST + "torch.float32"),
    ({"autocast": torch.autocast}, AUTOCAST + "the class autocast"),
    ({"autocast": lambda: torch.autocast("cpu")}, AUTOCAST + "a function"),
    ({"autocast": once()}, r"@contextmanager function returns can be entered once: give torch.autocast\(...\), or an"),
    ({"scaler": True}, SCALER + r"True: give scaler=torch.amp.GradScaler\('cuda'\)"),
    ({"scaler": torch.amp.GradScaler}, SCALER + "the class GradScaler"),
    ({"scaler": 65536.0}, SCALER + "65536.0"),
    ({"device": "gpu"}, "device='gpu' is no device of torch's: give 'cpu' or 'cuda'"),
    ({"device": 1.5}, "device=1.5 is no device of torch's"),
    ({"device": nn.Linear(1, 1)}, "device=a Linear is no device of torch's"),
    ({"device": "meta"}, "device='meta' holds no numbers: give the device to train on, or None"),
    ({"grad_dtype": "float32"}, GRAD_DTYPE + "'float32'"),
    ({"grad_dtype": torch.int64}, GRAD_DTYPE + "torch.int64"),
    ({"grad_dtype": torch.complex64}, GRAD_DTYPE + "torch.complex64"),
    ({"grad_dtype": torch.float8_e4m3fn}, GRAD_DTYPE + "torch.float8_e4m3fn"),
    (
        {"frozen": list(nn.Linear(1, 1).parameters())},
        FROZEN + "a Parameter: give the modules that hold them, or parameter.req",
    ),
    ({"frozen": nn.Parameter(torch.ones(1))}, FROZEN + "a Parameter"),
    ({"frozen": None}, FROZEN + r"None: give \[module\], or \[\] for none"),
    ({"frozen": "critic"}, FROZEN + "'critic'"),
    ({"process_group": "gloo"}, GROUP + "'gloo'"),
    ({"process_group": [0, 1]}, GROUP + r"\[0, 1\]"),
    ({"process_group": dist.GroupMember.NON_GROUP_MEMBER}, GROUP + "what new_group gives ranks outside of it"),
    (
        {"cut": 3},
        r"cut must be callable with \(batch, start, stop\), got 3, which cannot be called: give a function, cut=",
    ),
    (
        {"cut": lambda batch: batch},
        r"cut must be callable with .* too many .*\. It returns the samples from start to bef",
    ),
    ({"num_samples": 10}, r"num_samples must be callable with \(batch\), got 10, which cannot be called"),
    ({"num_samples": lambda: 10}, r"num_samples must be callable .* It returns how many samples the batch has"),
    ({"measure": "norm"}, "measure must be 'norms', 'squares' or None, got 'norm'"),
    ({"measure": ["norms"]}, r"measure must be 'norms', 'squares' or None, got \['norms'\]"),
    ({"micro_batch_size": "auto", "max_memory": "6 gigs"}, BYTES),
    ({"micro_batch_size": "auto", "max_memory": 1.5}, BYTES),
    ({"micro_batch_size": "auto", "max_memory": -1}, "max_memory: a memory size must be at least 1 byte, got -1"),
    ({"micro_batch_size": "auto", "max_memory": 0}, "max_memory: a memory size must be at least 1 byte, got 0"),
    ({"micro_batch_size": "auto", "max_memory": "120%"}, "max_memory='120%': a share .* is above 0% and at most 100%"),
    ({"micro_batch_size": "auto", "max_memory": "-5%"}, "max_memory='-5%': a share .* is above 0% and at most 100%"),
    ({"optimizer": "adam"}, OPTIMIZER + "'adam'"),
    ({"optimizer": 0.1}, OPTIMIZER + "0.1"),
    (
        {"optimizer": torch.optim.SGD},
        OPTIMIZER + r"the class SGD: give SGD\(model.parameters\(\), \.\.\.\)",
    ),
    ({"optimizer": {"a": None}}, OPTIMIZER + r"a dict: give list\(optimizers.values\(\)\)"),
    ({"optimizer": [None]}, OPTIMIZER + "None"),
    ({"optimizer": []}, "optimizer holds no optimizer: give those that step, or None, which plans for AdamW's"),
    ({"micro_batch_size": [4]}, r"micro_batch_size must be an integer of at least 1, 'auto' or None, got \[4\]"),
    ({"micro_batch_size": torch.tensor([4, 4])}, "at least 1, 'auto' or None, got a Tensor"),
]


@pytest.mark.parametrize("make", [plain, gathered])
@pytest.mark.parametrize(("options", "message"), SHARED, ids=lambda case: re.sub(" at 0x.*", "", str(case))[:40])
def test_an_argument_that_cannot_work_is_refused_when_the_accumulator_is_made(
    make: Make, options: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        make(regressor(), **options)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"count": 13}, r"count must be callable with \(micro_batch\), got 13, which cannot be called"),
        (
            {"count": lambda model, batch: 1},
            r"missing a required argument: 'batch'\. It tells the loss terms of one micro",
        ),
        ({"overlap": "no"}, "overlap must be True or False, got 'no'"),
        ({"overlap": None}, "overlap must be True or False, got None"),
        ({"batch_norm": "exact", "micro_batch_size": "auto", "max_memory": "6 gigs"}, BYTES),
    ],
)
def test_so_is_one_that_only_plain_accumulation_has(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        plain(regressor(), **options)


@pytest.mark.parametrize("max_memory", ["6 gigs", 1.5, 0])
def test_so_is_a_budget_for_graphs(max_memory: Any) -> None:
    with pytest.raises(ValueError, match="max_memory: "):
        gathered(regressor(), max_memory=max_memory)


@pytest.mark.skipif(torch.cuda.is_available(), reason="shows what happens without CUDA")
@pytest.mark.parametrize("make", [plain, gathered])
def test_a_device_that_this_machine_lacks_is_refused_with_what_torch_says(make: Make) -> None:
    with pytest.raises(
        ValueError, match=r"device='cuda' cannot be used here \(.+\): give 'cpu', or None for the param"
    ):
        make(regressor(), device="cuda")


@pytest.mark.gpu
@pytest.mark.parametrize("make", [plain, gathered])
def test_a_cuda_device_beyond_the_last_is_refused(make: Make) -> None:
    with pytest.raises(ValueError, match=r"device='cuda:63' cannot be used here \(.+\): give 'cpu', or None"):
        make(regressor(), device="cuda:63")
    make(regressor(), device="cuda:0")


@pytest.mark.parametrize("make", [plain, gathered])
def test_control_what_can_work_is_taken(make: Make) -> None:
    frozen, scaler = nn.Linear(1, 1), torch.amp.GradScaler("cpu")
    taken: list[dict[str, Any]] = [
        {"autocast": torch.bfloat16},
        {"autocast": torch.autocast("cpu", torch.bfloat16)},
        {"autocast": contextlib.nullcontext()},
        {"autocast": torch.float16, "scaler": scaler},
        {"device": "cpu", "grad_dtype": torch.float64},
        {"frozen": frozen},
        {"frozen": (frozen,)},
        {"frozen": nn.ModuleList([frozen])},
        {"process_group": None},
        {"num_samples": len, "cut": lambda batch, start, stop=None: batch},
        {"micro_batch_size": np.int64(4)},
        {"micro_batch_size": "auto", "max_memory": "80%"},
    ]
    for options in taken:
        make(regressor(), **options)


def test_every_argument_with_a_choice_is_in_the_table() -> None:
    """`model`, `loss_fn`, `batch_norm` and `rng` are refused where they are explained."""
    tried = {name for options, _ in SHARED for name in options} | {"count", "overlap"}
    parameters = set(inspect.signature(mb.Accumulator).parameters)
    assert parameters - tried == {"model", "loss_fn", "batch_norm", "rng"}


# ---------------------------------------------------------------------------------------------------------------------
# float16


def test_float16_without_a_scaler_is_warned_of_and_loses_the_gradients_that_the_scaler_keeps() -> None:
    def small(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
        return 1e-6 * F.mse_loss(model(batch[0].float()).float(), batch[1].float())

    model, found = regressor().float(), {}
    for scaler in (None, torch.amp.GradScaler("cpu")):
        made = mb.Accumulator(model, small, micro_batch_size=4, autocast=torch.float16, scaler=scaler)
        with warnings.catch_warnings(record=True) as warned:
            warnings.simplefilter("always")
            made.run(points())
        assert [warning.filename for warning in warned] == ([__file__] if scaler is None else [])
        found[scaler is None] = sum(int((g != 0).sum()) for g in gradients(model) if g is not None)
        clear(model)
    assert found[True] < found[False]


@pytest.mark.parametrize("make", [plain, gathered])
@pytest.mark.parametrize("autocast", [torch.float16, torch.autocast("cpu", torch.float16)])
def test_the_warning_says_what_to_give_in_the_first_window_with_gradients(make: Make, autocast: Any) -> None:
    made, batch = make(regressor().float(), autocast=autocast), tuple(leaf.float() for leaf in points())
    made.evaluate(batch)  # nothing is lost where nothing is trained
    with pytest.warns(UserWarning, match=r"float16 without a scaler: .* Give scaler=.*, or autocast=torch.bfloat16"):
        made.run(batch)
    clear(made.model)
    made.run(batch)  # once


@pytest.mark.parametrize("make", [plain, gathered])
def test_a_warning_is_about_the_users_line(make: Make) -> None:
    made = make(regressor().float(), autocast=torch.float16)
    with pytest.warns(UserWarning, match="float16 without a scaler") as warned:
        made.run(tuple(leaf.float() for leaf in points()))
    assert [warning.filename for warning in warned] == [__file__]


def test_a_warning_from_within_an_epoch_is_about_the_users_line() -> None:
    model, stranger = nn.Linear(3, 1), nn.Linear(3, 1)
    both = nn.ModuleList([model, stranger])
    both.forward = lambda x: model(x) + stranger(x)  # type: ignore[method-assign]
    loader = DataLoader(TensorDataset(torch.ones(4, 3), torch.ones(4, 1)), batch_size=2)
    with pytest.warns(UserWarning, match="in no optimizer") as warned:
        mb.train_epoch(both, loader, torch.optim.SGD(model.parameters(), lr=0.1), nn.MSELoss(), accumulation_steps=2)
    assert [warning.filename for warning in warned] == [__file__]


def test_an_autocast_that_is_switched_off_is_not_warned_of() -> None:
    made = plain(regressor().float(), autocast=torch.autocast("cpu", torch.float16, enabled=False))
    made.run(tuple(leaf.float() for leaf in points()))


# ---------------------------------------------------------------------------------------------------------------------
# Functions


@pytest.mark.parametrize(
    ("loss_fn", "message"),
    [
        (
            None,
            r"loss_fn must be callable with \(model, micro_batch\), got None, which cannot be called: give a function",
        ),
        ("mse", r"got 'mse', which cannot be called: give a function, loss_fn=lambda model, micro_batch: \.\.\."),
        (nn.MSELoss(), r"a MSELoss takes \(outputs, targets\): give macrobatch.sum_loss\(criterion\)"),
        (nn.MSELoss, r"a MSELoss takes \(outputs, targets\): give macrobatch.sum_loss\(criterion\)"),
        (F.mse_loss, r"a mse_loss takes \(outputs, targets\): give macrobatch.sum_loss\(criterion\)"),
        (nn.Linear, "got the class Linear: give one of its objects, or a function"),
        (lambda batch: 0, "<lambda>.batch. is not: too many positional arguments. Were model and loss_fn swapped"),
        (lambda model, x, y: 0, "missing a required argument: 'y'"),
    ],
)
def test_what_is_no_loss_fn_is_refused(loss_fn: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        mb.Accumulator(regressor(), loss_fn, micro_batch_size=4)


def test_a_function_without_arguments_is_asked_for_as_one() -> None:
    with pytest.raises(
        ValueError, match=r"fn must be callable with \(\), got 7, which cannot be called: .* fn=lambda: "
    ):
        check_callable(7, "fn", ())  # type: ignore[arg-type]


def test_builtins_without_a_signature_pass() -> None:
    check_callable(max, "count", ("micro_batch",))


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (None, "None"),
        ("gpu", "'gpu'"),
        ([0, 1], "[0, 1]"),
        (list(range(99)), "a list"),
        (torch.ones(3), "a Tensor"),
        ({"x": 1}, "a dict"),
        (nn.Linear, "the class Linear"),
        (torch.int32, "torch.int32"),
        ("", "''"),
    ],
)
def test_what_was_given_is_shown_as_it_was_written_where_that_is_short(value: Any, text: str) -> None:
    assert given(value) == text


@pytest.mark.parametrize("make", [plain, gathered])
def test_optimizers_are_taken_with_any_size_and_one_by_one_or_several(make: Make) -> None:
    model = regressor()
    sgd, adam = torch.optim.SGD(model.parameters()), torch.optim.Adam(model.parameters())
    several: list[Any] = [None, sgd, [sgd, adam], (sgd,), {"a": sgd}.values(), iter([adam])]
    for optimizer in several:
        make(model, optimizer=optimizer)
    make(model, micro_batch_size=8, optimizer=sgd).run(points())


def test_a_plan_refuses_what_is_no_optimizer_as_well() -> None:
    with pytest.raises(ValueError, match=OPTIMIZER + "'adam'"):
        mb.plan(regressor(), mean_square, points(), batch_size=4, optimizer="adam")  # type: ignore[arg-type]


# ---------------------------------------------------------------------------------------------------------------------
# Errors of the loss_fn's own


Broken = tuple[Any, Any, str]
CALLED = r"^loss_fn is called as loss_fn\(model, micro_batch\); here micro_batch was "
PAIR = r"a tuple of \(Tensor of shape \(4, 3\), Tensor of shape \(4, 1\)\)"


def pair(n: int = 4) -> tuple[Tensor, Tensor]:
    return torch.ones(n, 3), torch.ones(n, 1)


def arrays() -> tuple[Any, Any]:
    return np.ones((4, 3), np.float32), np.ones((4, 1), np.float32)


def of_outputs(outputs: Any, targets: Any) -> Tensor:
    return F.mse_loss(outputs, targets)


def of_model(model: nn.Module, batch: Any) -> Tensor:
    return F.mse_loss(model(batch[0]), batch[1])


BROKEN: list[Broken] = [
    (of_outputs, pair(), PAIR + "$"),
    (
        of_model,
        {"x": pair()[0], "y": pair()[1]},
        r"a dict of {'x': Tensor of shape \(4, 3\), 'y': Tensor of shape \(4, 1\)}$",
    ),
    (
        of_model,
        arrays(),
        r"a tuple of \(numpy array of shape \(4, 3\), numpy array .*\. Arrays stay arrays: give tensors, torch",
    ),
    (
        of_model,
        [pair(), pair()],
        rf"a list of \({PAIR}, {PAIR}\)\. A list is one batch\. If .* run a Window\(\[micro_batch, ",
    ),
    (of_model, [pair()] * 5, rf"a list of \({PAIR}, {PAIR}, {PAIR}, and 2 more\)\. A list is one batch"),
    (of_model, [[[[[torch.ones(4)]]]]], r"a list of \(a list of \(a list of \(a list\)\)\)"),
    (of_model, (pair()[0].tolist(), "name", None), r"a tuple of \(a list of .*, 'name', None\)$"),
]


def notes_of(run: Callable[[], Any]) -> list[str]:
    with pytest.raises(Exception, match=r"\w") as caught:
        run()
    return getattr(caught.value, "__notes__", [])


@pytest.mark.parametrize("method", ["run", "evaluate"])
@pytest.mark.parametrize(("loss_fn", "batch", "note"), BROKEN)
def test_an_error_in_the_first_call_of_the_loss_fn_shows_how_it_was_called(
    loss_fn: Any, batch: Any, note: str, method: str
) -> None:
    made = mb.Accumulator(nn.Linear(3, 1), loss_fn)
    (found,) = notes_of(lambda: getattr(made, method)(mb.Window([batch], num_samples=lambda _: 4)))
    assert re.search(CALLED + note, found), found


class Masked(nn.Linear):
    """A model that can be called with two arguments, as `encode` is."""

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        return super().forward(x)


@pytest.mark.parametrize("max_memory", [None, "1GB"])
@pytest.mark.parametrize("method", ["run", "evaluate"])
def test_so_does_one_of_encode(method: str, max_memory: str | None) -> None:
    model = Masked(3, 1)
    made = mb.GatheredAccumulator(model, model, lambda m, z, w: z.std(), micro_batch_size=4, max_memory=max_memory)
    (found,) = notes_of(lambda: getattr(made, method)(pair()))
    assert re.search(CALLED.replace("loss_fn", "encode") + PAIR, found), found


def test_control_of_encode_only_in_the_first_window() -> None:
    def encode(model: nn.Module, batch: Any) -> Tensor:
        if breaks:
            raise ValueError("of one's own")
        return model(batch[0])

    model, breaks = nn.Linear(3, 1), False
    made = mb.GatheredAccumulator(model, encode, lambda m, z, w: (z**2).mean(), micro_batch_size=2)
    made.run(pair())
    breaks = True
    clear(model)
    assert notes_of(lambda: made.run(pair())) == []


def test_with_auto_it_is_the_planning_that_calls_it_first() -> None:
    made = mb.Accumulator(nn.Linear(3, 1), of_outputs, micro_batch_size="auto", max_memory="1GB")
    (found,) = notes_of(lambda: made.run(pair()))
    assert re.search(CALLED + "made of " + PAIR, found), found


def test_with_batch_norm_exact_and_several_micro_batches_too() -> None:
    made = mb.Accumulator(nn.Linear(3, 1), of_outputs, micro_batch_size=2, batch_norm="exact")
    (found,) = notes_of(lambda: made.run(pair()))
    assert re.search(CALLED + r"a tuple of \(Tensor of shape \(2, 3\)", found), found


def test_control_after_the_first_window_an_error_is_as_it_was_raised_and_so_is_out_of_memory() -> None:
    def loss(model: nn.Module, batch: Any) -> Tensor:
        if error is not None:
            raise error
        return of_model(model, batch)

    error: Exception | None = torch.OutOfMemoryError("of one sample")
    made = mb.Accumulator(nn.Linear(3, 1), loss, micro_batch_size=4)
    assert not any("is called as" in note for note in notes_of(lambda: made.run(pair(1))))
    error = ValueError("of one's own")
    assert len(notes_of(lambda: made.run(pair()))) == 1
    error = None
    made.run(pair())
    error = ValueError("of one's own")
    clear(made.model)
    assert notes_of(lambda: made.run(pair())) == []


# ---------------------------------------------------------------------------------------------------------------------
# What checking costs


def test_no_check_runs_again_in_a_window(monkeypatch: pytest.MonkeyPatch) -> None:
    model = regressor()
    made = plain(model, num_samples=lambda batch: len(batch[0]), count=lambda batch: 1)
    checks = [name for name in vars(arguments) if name.startswith("check_")]
    assert len(checks) >= 10
    for name in checks:
        monkeypatch.setattr(arguments, name, None)  # a call would fail
    for kind in (inspect.Signature, inspect.BoundArguments):
        monkeypatch.setattr(kind, "__init__", None)
    assert made.run(points()).num_samples == len(points()[0])


def test_a_device_for_a_plan_that_torch_does_not_know_is_a_value_error() -> None:
    with pytest.raises(ValueError, match="device='gpu' is no device of torch's"):
        checked_device("gpu")
