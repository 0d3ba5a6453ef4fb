"""`accumulate`: loops that own forward and backward get each micro-batch's share, and an error when they stop early."""

import warnings
from typing import Any

import pytest
import torch
from helpers import clear, difference, gradients, reference
from test_accumulator import (
    both_means,
    count_two,
    mean_square,
    parts,
    points,
    regressor,
    tagger,
    token_mean,
    token_sum,
    tokens_and_labels,
    two_losses,
)
from torch.nn import functional as F

import macrobatch as mb
from macrobatch import loops
from macrobatch.distributed import GradientReduction


def test_shares_of_counted_tokens_give_the_full_batchs_gradient() -> None:
    model, batch = tagger(), tokens_and_labels()
    expected = reference(model, lambda: token_mean(model, batch))
    window = mb.Window(parts(batch, [4, 1, 5, 3]))
    with mb.accumulate(window, model, count=lambda b: mb.valid_tokens(b["labels"])) as steps:
        for micro_batch, share in steps:
            (token_sum(model, micro_batch)[0] * share).backward()
    assert difference(gradients(model), expected) <= 1e-12


def test_without_count_samples_are_counted() -> None:
    model, batch = regressor(), points()
    expected = reference(model, lambda: mean_square(model, batch))
    with mb.accumulate(mb.Window([batch]).cut(4), model) as steps:
        for (x, y), share in steps:
            (F.mse_loss(model(x), y, reduction="sum") * share).backward()
    assert difference(gradients(model), expected) <= 1e-12


def test_several_counts_give_several_shares() -> None:
    model, batch = tagger(), tokens_and_labels()
    expected = reference(model, lambda: both_means(model, batch))
    with mb.accumulate(mb.Window(parts(batch, [4, 9])), model, count=count_two) as steps:
        for micro_batch, share in steps:
            losses = two_losses(model, micro_batch)
            for name in losses:
                (losses[name] * share[name]).backward(retain_graph=name == "tokens")
    assert difference(gradients(model), expected) <= 1e-12


def test_bf16_parameters_accumulate_in_float32() -> None:
    model, (x, y) = regressor().bfloat16(), points(300)
    x, y = x.bfloat16(), y.bfloat16()
    with mb.accumulate(mb.Window([(x, y)]).cut(1), model) as steps:
        for micro_batch, share in steps:
            (mean_square(model, micro_batch) * share).backward()
    mine = gradients(model)
    assert mine[0].dtype == torch.bfloat16
    clear(model)
    expected = [torch.zeros(p.shape, dtype=torch.float64) for p in model.parameters()]
    for micro_batch in mb.Window([(x, y)]).cut(1):
        clear(model)
        (mean_square(model, micro_batch) / 300).backward()
        for total, p in zip(expected, model.parameters(), strict=True):
            total += p.grad.double()
    assert difference(mine, expected) <= 1e-2


def run_loop(model: torch.nn.Module, batch: object, after_first: str) -> None:
    with mb.accumulate(mb.Window([batch]).cut(4), model) as steps:
        for micro_batch, share in steps:
            (mean_square(model, micro_batch) * share).backward()
            if after_first == "break":
                break
            raise ZeroDivisionError


def test_leaving_early_is_an_error_and_gradients_are_as_before() -> None:
    model, batch = regressor(), points()
    with pytest.raises(RuntimeError, match="the loop over the window was left early"):
        run_loop(model, batch, "break")
    assert all(p.grad is None for p in model.parameters())


def test_an_exception_passes_through_and_gradients_are_as_before() -> None:
    model, batch = regressor(), points()
    with pytest.raises(ZeroDivisionError):
        run_loop(model, batch, "raise")
    assert all(p.grad is None for p in model.parameters())


def walk(context: mb.accumulate, model: torch.nn.Module, leaves_after: int | None = None) -> None:
    """The loop over a regressor's window, left by a break after so many steps."""
    with context as steps:
        for index, ((x, y), share) in enumerate(steps, 1):
            (F.mse_loss(model(x), y, reduction="sum") * share).backward()
            if index == leaves_after:
                break


def test_a_context_that_is_entered_again_sees_again_whether_its_loop_was_left_early() -> None:
    model, batch = regressor(), points()
    expected = reference(model, lambda: mean_square(model, batch))
    again = mb.accumulate(mb.Window([batch]).cut(4), model)
    for _ in range(2):
        walk(again, model)
        assert difference(gradients(model), expected) <= 1e-12
        clear(model)
        with pytest.raises(RuntimeError, match="the loop over the window was left early"):
            walk(again, model, leaves_after=2)
        assert all(p.grad is None for p in model.parameters())


def failing(*_: object) -> None:
    raise OSError("a cable fell out")


@pytest.mark.parametrize("place", ["entering", "reducing", "dividing"])
@pytest.mark.parametrize("zeros", [False, True])
def test_an_error_at_the_edge_of_the_block_leaves_gradients_and_their_dtype_as_before(
    place: str, zeros: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, (x, y) = regressor().bfloat16(), points()
    for p in model.parameters():
        p.grad = torch.zeros_like(p) if zeros else None
    before = [(p.grad, getattr(p, "grad_dtype", None)) for p in model.parameters()]
    window = mb.Window([(x.bfloat16(), y.bfloat16())])
    inside = []

    def run() -> None:
        with mb.accumulate(window, model) as steps:
            for micro_batch, share in steps:
                (mean_square(model, micro_batch) * share).backward()
                inside.extend(p.grad.dtype for p in model.parameters())

    with monkeypatch.context() as patched:
        target, name = {
            "entering": (GradientReduction, "__enter__"),
            "reducing": (GradientReduction, "finish"),
            "dividing": (loops, "multiply_"),
        }[place]
        patched.setattr(target, name, failing)
        with pytest.raises(OSError, match="a cable fell out"):
            run()
    for p, (gradient, dtype) in zip(model.parameters(), before, strict=True):
        assert p.grad is gradient
        assert gradient is None or not gradient.any()
        assert getattr(p, "grad_dtype", None) is dtype
    if hasattr(torch.Tensor, "grad_dtype"):
        assert set(inside) == ({torch.float32} if place != "entering" else set()), "control: it was another inside"
    run()
    assert all(p.grad.any() and p.grad.dtype == torch.bfloat16 for p in model.parameters())


def broken(step: int, error: BaseException | None) -> None:
    """A loop that raises `error` in a step, or forgets the share."""
    model = regressor()
    try:
        with mb.accumulate(mb.Window([points()]).cut(11), model) as steps:
            for index, (x, share) in enumerate(steps):
                if index == step and error is not None:
                    raise error
                (model(x if error is None else x[0]).sum() * share).backward()
    finally:
        assert all(p.grad is None for p in model.parameters())


def test_an_error_in_the_first_step_has_a_note_of_what_the_loop_is_given() -> None:
    with pytest.raises(TypeError, match="must be Tensor, not tuple") as caught:
        broken(0, None)
    assert caught.value.__notes__ == [
        "accumulate gives (micro_batch, share): for micro_batch, share in steps; here micro_batch is a tuple of "
        f"(Tensor of shape (11, 5), Tensor of shape (11, 1)) and share is {1 / 22!r}"
    ]


@pytest.mark.parametrize(
    ("step", "error"),
    [(0, KeyboardInterrupt()), (0, torch.cuda.OutOfMemoryError("no memory left")), (1, ZeroDivisionError())],
)
def test_an_error_that_is_not_about_what_the_loop_is_given_has_no_note(step: int, error: BaseException) -> None:
    with pytest.raises(type(error)) as caught:
        broken(step, error)
    assert not hasattr(caught.value, "__notes__")


def test_what_accumulate_itself_refuses_after_the_first_step_has_no_note() -> None:
    model, batch = regressor(), points()
    with pytest.raises(ValueError, match="was changed inside the loop") as caught:
        converted(model, batch, "step")
    assert not hasattr(caught.value, "__notes__")


# ---------------------------------------------------------------------------------------------------------------------
# Ignored labels without count=


def summed(model: torch.nn.Module, window: mb.Window, **options: Any) -> list[torch.Tensor | None]:
    """The gradient of a loop over the sums of a tagger's valid tokens."""
    with mb.accumulate(window, model, **options) as steps:
        for micro_batch, share in steps:
            (token_sum(model, micro_batch)[0] * share).backward()
    found = gradients(model)
    clear(model)
    return found


def test_samples_that_count_beside_ignored_labels_are_warned_of_at_the_users_line() -> None:
    model, batch = tagger(), tokens_and_labels()
    expected, window = reference(model, lambda: token_mean(model, batch)), mb.Window(parts(batch, [4, 9]))
    message = (
        r"no count=, .* batch\['labels'\], of shape \(4, 7\), holds the ignore label -100.* "
        r"Give count=lambda batch: macrobatch.valid_tokens\(batch\['labels'\]\) .* count=lambda batch: len\(batch\['lab"
    )
    with pytest.warns(UserWarning, match=message) as caught:
        wrong = summed(model, window)
    assert [warning.filename for warning in caught] == [__file__]
    assert difference(wrong, expected) > 0.1, "control: what is warned of is wrong"
    counted = summed(
        model, window, count=lambda batch: mb.valid_tokens(batch["labels"])
    )  # no warning, or an error here
    assert difference(counted, expected) <= 1e-12
    assert difference(summed(model, window, count=lambda batch: len(batch["labels"])), wrong) == 0


def test_the_warning_names_another_ignore_label_and_is_shown_once_for_each_line() -> None:
    torch.manual_seed(0)
    model, batch = torch.nn.Linear(3, 4), (torch.randn(6, 3), torch.tensor([1, -7, 2, -7, 0, 3]))
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("default")
        for _ in range(3):
            with mb.accumulate(mb.Window([batch]).cut(2), model) as steps:
                for (x, y), share in steps:
                    (F.cross_entropy(model(x), y, ignore_index=-7, reduction="sum") * share).backward()
            clear(model)
    (warning,) = caught
    assert "count=lambda batch: macrobatch.valid_tokens(batch[1], ignore_index=-7) " in str(warning.message)


def test_a_label_of_minus_one_for_each_sample_is_one_of_two_classes() -> None:
    batch = (points(4)[0], torch.tensor([1, -1, -1, 1]))
    model = regressor()
    with mb.accumulate(mb.Window([batch]).cut(2), model) as steps:  # a warning would be an error
        for (x, y), share in steps:
            (F.soft_margin_loss(model(x)[:, 0], y.double(), reduction="sum") * share).backward()


def test_labels_on_a_device_are_not_read_which_is_a_limit() -> None:
    labels = torch.full((4,), -100, device="meta")  # which has nothing that could be read
    with pytest.raises(ZeroDivisionError), mb.accumulate(mb.Window([(points(4)[0], labels)]), regressor()):
        raise ZeroDivisionError


# ---------------------------------------------------------------------------------------------------------------------
# What is refused


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"count": 13},
            r"count must be callable with \(micro_batch\), got 13, which cannot be called: give a function",
        ),
        (
            {"count": lambda model, batch: 1},
            r"missing a required argument: 'batch'. It tells the loss terms of one micro",
        ),
        ({"device": "gpu"}, "device='gpu' is no device of torch's: give 'cpu' or 'cuda'"),
        ({"process_group": "gloo"}, "process_group must be 'auto', None for this process alone, .* got 'gloo'"),
    ],
)
def test_options_that_mean_nothing_are_refused_before_the_loop(options: dict[str, object], message: str) -> None:
    model, batch = regressor(), points()
    with pytest.raises(ValueError, match=message), mb.accumulate(mb.Window([batch]), model, **options):
        pass
    assert all(p.grad is None for p in model.parameters())


def test_an_error_inside_an_own_count_stays_its_own() -> None:
    def broken(micro_batch: object) -> int:
        return len(None)

    context = mb.accumulate(mb.Window([points()]), regressor(), broken)
    with pytest.raises(TypeError, match="object of type 'NoneType' has no len"), context:
        pass


def test_a_loop_over_it_without_with_says_how_to_write_it() -> None:
    with pytest.raises(TypeError, match=r"is a context: with accumulate\(window, model\) as steps: for ... in steps"):
        list(mb.accumulate(mb.Window([points()]), regressor()))


def test_bad_input_is_refused_before_the_loop() -> None:
    model, batch = regressor(), points()
    with pytest.raises(ValueError, match="accumulate takes a Window, got a tuple"):
        mb.accumulate(batch, model)
    with pytest.raises(ValueError, match="the effective batch is empty"), mb.accumulate(mb.Window([]), model):
        pass
    mean_square(model, batch).backward()
    window = mb.Window([batch])
    with pytest.raises(ValueError, match="hold a gradient from before"), mb.accumulate(window, model):
        pass
    assert all(p.grad is not None for p in model.parameters())


def converted(model: torch.nn.Module, batch: object, inside: str, **options: Any) -> None:
    """A loop over three micro-batches with `inside` left in it."""
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with mb.accumulate(mb.Window([batch]).cut(5), model) as steps:
        for micro_batch, share in steps:
            if inside == "zero first":
                optimizer.zero_grad(**options)
            loss = mean_square(model, micro_batch) * share
            if inside != "no backward":
                loss.backward()
            if "step" in inside:
                optimizer.step()
            if "zero last" in inside:
                optimizer.zero_grad(**options)


@pytest.mark.parametrize(
    ("inside", "message"),
    [
        ("step", r"parameter '.*' was changed inside the loop over the window, as by optimizer.step\(\) there"),
        ("step, zero last", r"Step once, after the with block: optimizer.step\(\), then optimizer.zero_grad\(\)"),
        ("zero first", r"the gradient of '.*' was dropped or replaced inside the loop .* Zero once, after the with"),
        ("zero last", r"no parameter of the model has a gradient: call \(loss_sum \* share\).backward\(\) for each"),
        ("no backward", r"no parameter of the model has a gradient: call \(loss_sum \* share\).backward\(\) for each"),
    ],
)
@pytest.mark.parametrize("zeros", [False, True])
def test_what_a_converted_loop_leaves_inside_is_refused_and_gradients_are_as_before(
    inside: str, message: str, zeros: bool
) -> None:
    model, batch = regressor(), points()
    for p in model.parameters():
        p.grad = torch.zeros_like(p) if zeros else None
    before = [p.grad for p in model.parameters()]
    with pytest.raises(ValueError, match=message):
        converted(model, batch, inside)
    assert all(p.grad is g for p, g in zip(model.parameters(), before, strict=True))
    assert all(g is None or not g.any() for g in before)
    converted(model, batch, "nothing")  # the control
    assert all(p.grad.any() for p in model.parameters())


def test_gradients_zeroed_in_place_without_a_step_are_a_limit() -> None:
    model, batch = regressor(), points()
    expected = reference(model, lambda: mean_square(model, batch))
    converted(model, batch, "zero first", set_to_none=False)
    assert difference(gradients(model), expected) > 0.1


def test_what_changes_on_its_own_inside_the_loop_is_not_refused() -> None:
    draw = torch.Generator().manual_seed(0)
    model = torch.nn.Sequential(
        torch.nn.Embedding(9, 4, max_norm=0.5), torch.nn.Flatten(), torch.nn.BatchNorm1d(12), torch.nn.Linear(12, 1)
    ).double()
    critic = torch.nn.Linear(1, 1).double()
    optimizer = torch.optim.SGD(critic.parameters(), lr=0.1)
    tokens = torch.randint(9, (13, 3), generator=draw)
    weight = model[0].weight.detach().clone()
    with mb.accumulate(mb.Window([tokens]).cut(5), model) as steps:
        for micro_batch, share in steps:
            (critic(model(micro_batch).detach()).sum() * share).backward()
            optimizer.step()
            optimizer.zero_grad()
            (critic(model(micro_batch)).square().sum() * share).backward()
            optimizer.zero_grad()
    assert not torch.equal(weight, model[0].weight)  # the control: the embedding did change its weight
    assert all(p.grad is not None for p in model.parameters())


@pytest.mark.filterwarnings("ignore:Using backward:UserWarning")
def test_gradients_that_keep_a_graph_are_new_tensors_and_add_up() -> None:
    model, batch = regressor(), points()
    expected = reference(model, lambda: mean_square(model, batch))
    with mb.accumulate(mb.Window([batch]).cut(5), model) as steps:
        for (x, y), share in steps:
            (F.mse_loss(model(x), y, reduction="sum") * share).backward(create_graph=True)
    mine = [p.grad.detach() for p in model.parameters()]
    for p in model.parameters():
        p.grad = None  # or the graph would keep itself alive
    assert difference(mine, expected) <= 1e-12


def test_a_window_without_terms_needs_no_backward() -> None:
    model, batch = regressor(), points()
    with mb.accumulate(mb.Window([batch]), model, count=lambda _: 0) as steps:
        for _ in steps:
            pass
    assert all(p.grad is None for p in model.parameters())


def test_leftover_gradients_are_refused_in_the_words_of_a_loop() -> None:
    model, batch = regressor(), points()
    mean_square(model, batch).backward()
    message = r"hold a gradient from before, .* Call optimizer.zero_grad\(\) after each optimizer.step\(\)"
    with pytest.raises(ValueError, match=message) as caught, mb.accumulate(mb.Window([batch]), model):
        pass
    assert "add=True" not in str(caught.value)


class Bounded(torch.nn.Linear):
    """A layer that bounds its own weight in its forward."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        with torch.no_grad():
            self.weight.clamp_(-1, 1)
        return super().forward(x)


def test_a_model_that_writes_to_its_own_parameters_is_a_limit_and_refused() -> None:
    model, (x, y) = Bounded(points()[0].shape[1], points()[1].shape[1]).double(), points()
    with pytest.raises(ValueError, match="parameter 'weight' was changed inside the loop"):
        converted(model, (x, y), "nothing")
