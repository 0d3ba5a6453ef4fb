"""What branched training found, as a table and in words that follow from the numbers."""

from typing import TYPE_CHECKING

from rich import box
from rich.table import Table

from macrobatch.batch_tradeoff import in_samples
from macrobatch.cli.formats import NONE, number_text, with_error

if TYPE_CHECKING:
    from macrobatch.cli.branches import Branch, Branches

SURE = 2.0  # standard errors
MANY = 3.0  # times the noise scale: from here on the two are said to disagree


def branch_table(found: "Branches") -> Table:
    """A row for each batch size."""
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for name in ("batch", "lr", "updates", "loss", "above best smaller", "validation", ""):
        table.add_column(name, justify="right", no_wrap=True)
    for branch in found.branches:
        table.add_row(
            f"{branch.batch_size:,}",
            number_text(branch.learning_rate),
            f"{branch.updates:,}",
            number_text(branch.loss, 4),
            _excess_text(found, branch),
            number_text(sum(branch.validation) / len(branch.validation), 4),
            "critical" if branch is found.critical else "",
        )
    return table


def branch_words(found: "Branches") -> list[str]:
    """The critical batch with what speaks for and against it, the noise scale beside it, and the limits of both."""
    return [_answer(found), *_noise(found), _limits(found)]


def _answer(found: "Branches") -> str:
    critical = found.critical
    above = [branch for branch in found.branches if branch.factor > critical.factor]
    where = f"after {found.at_samples:,} samples of training"
    tolerance = number_text(found.tolerance)
    if not above:
        words = (
            f"The critical batch {where} is at least {critical.batch_size:,}: the largest that was tried ends within "
            f"{tolerance} of all smaller ones. Larger --factors would tell how far it goes"
        )
    else:
        following = above[0]
        words = (
            f"The critical batch {where} is {critical.batch_size:,}: batches of {following.batch_size:,} end "
            f"{_excess_text(found, following)} above the best smaller one, and {tolerance} is allowed"
        )
        if critical is found.branches[0]:
            words = words.replace(" is ", " is at most ", 1) + ". It may lie below: try a smaller --batch-size"
    return words + _certainty(found)


def _certainty(found: "Branches") -> str:
    if len(found.branches[0].losses) < 2:
        return ". How sure that is, one repeat does not tell"
    near = [
        branch
        for branch in found.branches[1:]
        if abs(found.excess(branch) - found.tolerance) < SURE * (found.error(branch) or 0.0)
    ]
    if not near:
        return ""
    sizes = ", ".join(f"{branch.batch_size:,}" for branch in near)
    return f". Not settled: for {sizes} the other answer is within {SURE:.0f} standard errors; --repeats more"


def _noise(found: "Branches") -> list[str]:
    known, measured = found.noise_scale, found.critical.batch_size
    if known is None or known in (0.0, float("inf")):
        return []
    ratio = measured / known
    words = f"The noise scale there is {in_samples(known)}"
    if ratio > MANY:
        return [f"{words}: {number_text(ratio, 2)} times less than what branches can take, so it is no critical batch"]
    if ratio < 1 / MANY:
        return [f"{words}: {number_text(1 / ratio, 2)} times more than what branches can take"]
    return [f"{words}, of the size that branches can take"]


def _limits(found: "Branches") -> str:
    repeats = len(found.branches[0].losses)
    return (
        f"Measured over {found.samples:,} samples from one point of one run, rates by the {found.rule} rule from its "
        f"own, {repeats} order{'' if repeats == 1 else 's'} of samples. The critical batch grows in training: measure "
        "again later (--steps)"
    )


def _excess_text(found: "Branches", branch: "Branch") -> str:
    if branch is found.branches[0]:
        return NONE
    error = found.error(branch)
    return number_text(found.excess(branch), 2) if error is None else with_error(found.excess(branch), error)
