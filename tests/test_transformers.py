"""A causal language model from transformers, padded, with -100 labels: exact on its logits, caught on its own loss."""

import pytest
import torch
from helpers import clear, difference, gradients, reference, textbook
from torch.nn import functional as F

import macrobatch as mb

transformers = pytest.importorskip("transformers")


def model_and_batch() -> tuple[torch.nn.Module, object]:
    torch.manual_seed(0)
    config = transformers.GPT2Config(vocab_size=50, n_positions=16, n_embd=16, n_layer=2, n_head=2)
    model = transformers.GPT2LMHeadModel(config).double().eval()  # eval: its dropout would draw other masks
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(0, 50, (11, 16), generator=generator)
    lengths = torch.tensor([16, 2, 3, 16, 5, 2, 7, 16, 4, 3, 9])
    mask = (torch.arange(16) < lengths[:, None]).long()
    batch = transformers.BatchEncoding(
        {"input_ids": ids, "attention_mask": mask, "labels": ids.masked_fill(mask == 0, -100)}
    )
    return model, batch


def logits_sum(model: torch.nn.Module, batch: object) -> tuple[torch.Tensor, torch.Tensor]:
    logits = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits
    loss = F.cross_entropy(logits[:, :-1].flatten(0, 1), batch["labels"][:, 1:].flatten(), reduction="sum")
    return loss, mb.valid_tokens(batch["labels"], shifted=True)


def logits_mean(model: torch.nn.Module, batch: object) -> torch.Tensor:
    loss_sum, valid = logits_sum(model, batch)
    return loss_sum / valid


@pytest.mark.parametrize("micro_batch_size", [1, 2, 3, 11])
def test_cross_entropy_on_the_logits_gives_the_full_batchs_gradient(micro_batch_size: int) -> None:
    model, batch = model_and_batch()
    expected = reference(model, lambda: logits_mean(model, batch))
    report = mb.Accumulator(model, logits_sum, micro_batch_size=micro_batch_size).run(batch)
    assert difference(gradients(model), expected) <= 1e-12
    assert abs(float(report.loss) - logits_mean(model, batch).item()) <= 1e-12
    if micro_batch_size < 11:
        micro_batches = list(mb.Window([batch]).cut(micro_batch_size))
        assert isinstance(micro_batches[0], transformers.BatchEncoding)
        assert difference(textbook(model, lambda b: logits_mean(model, b), micro_batches), expected) > 0.01


def test_its_own_loss_as_a_bare_scalar_is_caught() -> None:
    model, batch = model_and_batch()
    with pytest.raises(
        ValueError, match=r"batch\['labels'\], .* holds the ignore label -100, so it is almost surely a mean over valid"
    ):
        mb.Accumulator(model, lambda m, b: m(**b).loss, micro_batch_size=2).run(batch)


@pytest.mark.parametrize("micro_batch_size", [1, 4])
def test_its_own_loss_of_sequences_without_padding_is_a_mean_over_samples_and_passes(micro_batch_size: int) -> None:
    model, batch = model_and_batch()
    whole = {"input_ids": batch["input_ids"], "labels": batch["input_ids"].clone()}
    expected = reference(model, lambda: model(**whole).loss)
    mb.Accumulator(model, lambda m, b: m(**b).loss, micro_batch_size=micro_batch_size).run(whole)
    assert difference(gradients(model), expected) <= 1e-6  # it computes its loss in float32


def test_the_form_that_is_shown_for_its_own_loss_is_exact_and_the_one_for_other_means_is_not() -> None:
    model, batch = model_and_batch()
    expected = reference(model, lambda: model(**batch).loss)
    with pytest.raises(ValueError, match="almost surely") as error:
        mb.Accumulator(model, lambda m, b: m(**b).loss, micro_batch_size=2).run(batch)
    shown = [line.strip() for line in str(error.value).splitlines() if line.strip().startswith("n = ")]
    found = []
    for line in shown:
        body = "\n    ".join(line.replace("macrobatch.", "mb.").split("; "))
        names: dict[str, object] = {"mb": mb}
        exec(f"def loss_fn(model, batch):\n    mean = model(**batch).loss\n    {body}", names)
        clear(model)
        mb.Accumulator(model, names["loss_fn"], micro_batch_size=2).run(batch)  # type: ignore[arg-type]
        found.append(difference(gradients(model), expected))
    others, shifted = found
    assert shifted <= 1e-6  # it computes its loss in float32
    assert others > 1e-3


def test_control_its_own_loss_averaged_over_micro_batches_is_far_off() -> None:
    model, batch = model_and_batch()
    expected = reference(model, lambda: model(**batch).loss)
    micro_batches = list(mb.Window([batch]).cut(2))
    assert difference(textbook(model, lambda b: model(**b).loss, micro_batches), expected) > 0.1


def test_its_own_loss_told_to_sum_is_exact_up_to_the_float32_it_computes_in() -> None:
    model, batch = model_and_batch()
    expected = reference(model, lambda: model(**batch).loss)
    own_sum = mb.Accumulator(
        model,
        lambda m, b: (m(**b, num_items_in_batch=1).loss, mb.valid_tokens(b["labels"], shifted=True)),
        micro_batch_size=2,
    )
    own_sum.run(batch)
    assert difference(gradients(model), expected) <= 1e-6
    clear(model)
    unshifted = mb.Accumulator(  # the control: the label that is shifted away counted too
        model,
        lambda m, b: (m(**b).loss * mb.valid_tokens(b["labels"]), mb.valid_tokens(b["labels"])),
        micro_batch_size=2,
    )
    unshifted.run(batch)
    assert difference(gradients(model), expected) > 0.01


def test_the_model_output_returned_whole_is_refused() -> None:
    model, batch = model_and_batch()
    with pytest.raises(ValueError, match="the loss_fn returned a CausalLMOutput"):
        mb.Accumulator(model, lambda m, b: m(**b), micro_batch_size=2).run(batch)
