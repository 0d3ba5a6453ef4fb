"""Each example runs, is short, and has the gradient of its full batch in one piece; the textbook loop has another."""

import functools
import importlib.util
import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from helpers import clear, difference, gradients, reference, textbook
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import macrobatch as mb
from macrobatch import structure

EXAMPLES = Path(__file__).parents[1] / "examples"
NAMES = sorted(path.stem for path in EXAMPLES.glob("*.py"))
EXACT, WRONG = 1e-12, 1e-2


def example(name: str) -> ModuleType:
    pytest.importorskip("transformers" if name == "causal_lm" else "sklearn")
    spec = importlib.util.spec_from_file_location(f"example_{name}", EXAMPLES / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def micro_batches_of(batch: Any, size: int) -> list[Any]:
    """As the usual loop has them: the last one smaller."""
    n = structure.num_samples(batch)
    return [structure.cut(batch, start, min(start + size, n)) for start in range(0, n, size)]


class Recorder(torch.optim.SGD):
    """An optimizer that moves nothing and keeps every gradient it was asked to step along."""

    def __init__(self, parameters: Iterable[nn.Parameter]) -> None:
        super().__init__(parameters, lr=0.0)
        self.steps: list[list[Tensor]] = []

    def step(self, closure: Any = None) -> None:
        self.steps.append([p.grad.clone() for group in self.param_groups for p in group["params"]])


# ---- quickstart


def digits(module: ModuleType) -> TensorDataset:
    """270 digits in float64: with 256 to a batch, a batch of 256 and one of 14, which is not even one micro-batch."""
    images, labels = module.data()[0].tensors
    return TensorDataset(images[:270].double(), labels[:270])


def trained_in_one_piece(module: ModuleType, micro_batch_size: int = 256, accumulation_steps: int = 1) -> list[Tensor]:
    """Parameters after two epochs of the loop written by hand, one piece for each batch or textbook accumulation."""
    torch.manual_seed(1)
    model = module.network().double()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    for _ in range(2):
        loader = DataLoader(digits(module), batch_size=micro_batch_size, shuffle=True)
        for index, (images, labels) in enumerate(loader):
            (F.cross_entropy(model(images), labels) / accumulation_steps).backward()
            if (index + 1) % accumulation_steps == 0 or index + 1 == len(loader):
                nn.utils.clip_grad_norm_(model.parameters(), 1.0)
                optimizer.step()
                optimizer.zero_grad()
    return [p.detach() for p in model.parameters()]


@pytest.mark.parametrize("way", ["by_epoch", "by_batch"])
def test_both_ways_of_the_quickstart_train_the_model_that_whole_batches_train(way: str) -> None:
    module = example("quickstart")
    torch.manual_seed(1)
    model = module.network().double()
    getattr(module, way)(model, digits(module), epochs=2)
    assert difference([p.detach() for p in model.parameters()], trained_in_one_piece(module)) <= EXACT


def test_the_textbook_loop_trains_another_model_than_the_quickstart() -> None:
    module = example("quickstart")
    assert difference(trained_in_one_piece(module, 32, accumulation_steps=8), trained_in_one_piece(module)) > WRONG


# ---- gan


def gan() -> tuple[ModuleType, nn.Module, nn.Module, dict[str, Tensor]]:
    module = example("gan")
    generator, discriminator = module.models()
    batch = module.batch_of(torch.randn(29, 64, dtype=torch.float64).tanh())
    return module, generator.double(), discriminator.double(), batch


def call(logits: Tensor, real: bool) -> Tensor:
    """The mean loss of taking images for real, or not, by the formula: -log sigmoid(+-logit)."""
    return -F.logsigmoid(logits if real else -logits).mean()


def test_the_generators_turn_has_the_full_batchs_gradient_and_leaves_none_in_the_discriminator() -> None:
    module, generator, discriminator, batch = gan()
    expected = reference(generator, lambda: call(discriminator(generator(batch["noise"])), True))
    clear(discriminator)
    generators_turn, _ = module.accumulators(generator, discriminator, micro_batch_size=9)
    report = generators_turn.run(batch)
    assert difference(gradients(generator), expected) <= EXACT
    assert all(p.grad is None and p.requires_grad for p in discriminator.parameters())
    assert float(report.metrics["fooled"]) == float((discriminator(generator(batch["noise"])) > 0).double().mean())


def test_the_discriminators_turn_has_the_full_batchs_gradient_and_leaves_none_in_the_generator() -> None:
    module, generator, discriminator, batch = gan()
    fakes = generator(batch["noise"]).detach()
    expected = reference(
        discriminator, lambda: call(discriminator(batch["images"]), True) + call(discriminator(fakes), False)
    )
    _, discriminators_turn = module.accumulators(generator, discriminator, micro_batch_size=9)
    discriminators_turn.run(batch)
    assert difference(gradients(discriminator), expected) <= EXACT
    assert all(p.grad is None and p.requires_grad for p in generator.parameters())


def test_the_textbook_gan_is_wrong_in_the_generator_and_fills_the_discriminator() -> None:
    _, generator, discriminator, batch = gan()
    expected = reference(generator, lambda: call(discriminator(generator(batch["noise"])), True))
    clear(discriminator)
    wrong = textbook(
        generator, lambda part: call(discriminator(generator(part["noise"])), True), micro_batches_of(batch, 9)
    )
    assert difference(wrong, expected) > WRONG
    assert any(bool(p.grad.any()) for p in discriminator.parameters() if p.grad is not None)


# ---- two denominators


def policy() -> tuple[ModuleType, nn.Module, dict[str, Tensor]]:
    module = example("policy_two_denominators")
    policy, start = module.Policy().double(), module.Policy().double()
    batch, _ = module.rollout(policy, start, num_sequences=23)
    assert len(set(batch["mask"].sum(1).tolist())) > 3, "the sequences should differ in length"
    return module, policy, batch


def policy_mean(module: ModuleType, policy: nn.Module, batch: dict[str, Tensor]) -> Tensor:
    """The objective in one piece: a mean over written tokens, and a mean over sequences of a sum over their tokens."""
    log_probs = policy(batch["tokens"][:, :-1]).log_softmax(-1).gather(-1, batch["tokens"][:, 1:, None])[..., 0]
    token_mean = -(batch["advantages"] * log_probs)[batch["mask"]].mean()
    gap = batch["reference"] - log_probs
    per_sequence = ((gap.exp() - 1 - gap) * batch["mask"]).sum(1)
    return token_mean + module.KL_FACTOR * per_sequence.mean()


def test_the_policys_two_denominators_give_the_full_batchs_gradient() -> None:
    module, policy_model, batch = policy()
    expected = reference(policy_model, lambda: policy_mean(module, policy_model, batch))
    report = mb.Accumulator(policy_model, module.losses, micro_batch_size=5, count=module.count).run(batch)
    assert difference(gradients(policy_model), expected) <= EXACT
    assert report.loss_weight == {"policy": batch["mask"].sum(), "kl": 23}
    torch.testing.assert_close(report.loss, policy_mean(module, policy_model, batch).detach(), rtol=EXACT, atol=0)


def test_the_policys_mean_of_means_and_its_one_denominator_are_wrong() -> None:
    module, policy_model, batch = policy()
    expected = reference(policy_model, lambda: policy_mean(module, policy_model, batch))
    means = textbook(policy_model, lambda part: policy_mean(module, policy_model, part), micro_batches_of(batch, 5))
    assert difference(means, expected) > WRONG

    def folded(model: nn.Module, part: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
        return sum(module.losses(model, part).values()), part["mask"].sum()

    mb.Accumulator(policy_model, folded, micro_batch_size=5).run(batch)
    assert difference(gradients(policy_model), expected) > WRONG


def tasks() -> tuple[ModuleType, nn.Module, list[Tensor]]:
    module = example("multi_task")
    batch = list(module.data(torch.float64)[:41])
    batch[1][8:16] = module.UNLABELLED  # micro-batches without a label
    assert 0 < mb.valid_tokens(batch[1]) < 41
    return module, module.TwoHeads().double(), batch


def tasks_mean(model: nn.Module, batch: list[Tensor]) -> Tensor:
    images, labels, hidden = batch
    logits, pixels = model(images, hidden)
    naming = F.cross_entropy(logits, labels, ignore_index=-100) if (labels != -100).any() else 0.0
    return naming + 10 * F.mse_loss(pixels[hidden], images[hidden])


def test_two_tasks_with_their_own_masks_have_the_full_batchs_gradient() -> None:
    module, model, batch = tasks()
    expected = reference(model, lambda: tasks_mean(model, batch))
    mb.Accumulator(model, module.losses, micro_batch_size=6, count=module.count).run(batch)
    assert difference(gradients(model), expected) <= EXACT


def test_the_textbook_loop_over_two_tasks_is_wrong() -> None:
    _, model, batch = tasks()
    expected = reference(model, lambda: tasks_mean(model, batch))
    assert (
        difference(textbook(model, lambda part: tasks_mean(model, part), micro_batches_of(batch, 6)), expected) > WRONG
    )


# ---- an existing loop

NUM_LINES, K = 100, 4  # 7 micro-batches of 16 lines and of 4, hence windows of 4 and of 3


def windows_in_one_piece(module: ModuleType, model: nn.Module) -> list[list[Tensor | None]]:
    lines = module.loader(NUM_LINES).dataset
    pieces = [module.collate(lines[:64]), module.collate(lines[64:])]

    def mean(inputs: Tensor, targets: Tensor) -> Tensor:
        return F.cross_entropy(model(inputs), targets, ignore_index=-100)

    return [reference(model, functools.partial(mean, *piece)) for piece in pieces]


def test_the_converted_loop_has_the_full_batchs_gradient_in_every_window() -> None:
    module = example("existing_loop")
    model = module.NextByte().double()
    recorder = Recorder(model.parameters())
    module.after(model, module.loader(NUM_LINES), recorder, K)
    errors = [difference(*pair) for pair in zip(recorder.steps, windows_in_one_piece(module, model), strict=True)]
    assert len(errors) == 2
    assert max(errors) <= EXACT


def test_the_loop_before_has_a_wrong_gradient_and_never_makes_the_second_update() -> None:
    module = example("existing_loop")
    model = module.NextByte().double()
    recorder = Recorder(model.parameters())
    module.before(model, module.loader(NUM_LINES), recorder, K)
    clear(model)  # what it left for the next epoch
    first, _ = windows_in_one_piece(module, model)
    assert len(recorder.steps) == 1
    assert difference(recorder.steps[0], first) > WRONG


# ---- causal language model


def language_model() -> tuple[ModuleType, nn.Module, Any]:
    module = example("causal_lm")
    samples = module.definitions(13)
    batch = module.collate([sample[: 20 + 9 * j] for j, sample in enumerate(samples)])
    return module, module.tiny_gpt2().double(), batch


def next_byte_mean(model: nn.Module, batch: Any) -> Tensor:
    logits = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits[:, :-1]
    return F.cross_entropy(logits.transpose(1, 2), batch["labels"][:, 1:], ignore_index=-100)


def test_the_causal_language_model_has_the_full_batchs_gradient() -> None:
    module, model, batch = language_model()
    expected = reference(model, lambda: next_byte_mean(model, batch))
    report = mb.Accumulator(model, module.next_byte_loss, micro_batch_size=3).run(batch)
    assert difference(gradients(model), expected) <= EXACT
    assert report.micro_batch_sizes == (3, 3, 3, 2, 2)


def test_the_textbook_causal_language_model_is_wrong_and_its_bare_loss_is_caught() -> None:
    _, model, batch = language_model()
    expected = reference(model, lambda: next_byte_mean(model, batch))
    assert (
        difference(textbook(model, lambda part: next_byte_mean(model, part), micro_batches_of(batch, 3)), expected)
        > WRONG
    )
    with pytest.raises(ValueError, match="almost surely a mean over valid tokens"):
        mb.Accumulator(model, lambda model, part: model(**part).loss, micro_batch_size=3).run(batch)


# ---- all of them

SHORT = {"policy_two_denominators": {"updates": 2}, "existing_loop": {"epochs": 1, "num_lines": 100}}
SHORT["causal_lm"] = {"epochs": 1, "num_samples": 70}


@pytest.mark.parametrize("name", NAMES)
def test_the_example_runs(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    example(name).main(**SHORT.get(name, {"epochs": 1}))
    assert "nan" not in capsys.readouterr().out


def test_an_example_runs_as_the_command_that_it_names() -> None:
    command = [sys.executable, str(EXAMPLES / "quickstart.py")]
    child = subprocess.run(command, capture_output=True, text=True, check=False, timeout=300)
    assert child.returncode == 0, child.stderr
    assert child.stdout.count("test accuracy 0.9") == 2


@pytest.mark.parametrize("name", NAMES)
def test_the_example_is_short_and_begins_with_its_command(name: str) -> None:
    text = (EXAMPLES / f"{name}.py").read_text(encoding="utf-8")
    assert text.count("\n") <= 80
    assert text.startswith(f'"""python examples/{name}.py: ')
