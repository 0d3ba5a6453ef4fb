"""A plan on the terminal: two tables, a bar for each kind of memory, and what stands behind the numbers in words."""

from collections.abc import Callable
from dataclasses import replace

from rich.bar import Bar
from rich.table import Table

from macrobatch.cli.forecast import KINDS
from macrobatch.cli.formats import NONE, bytes_text, counted, seconds_text
from macrobatch.cli.gathered_plan import GatheredPlan
from macrobatch.planning import Choice, Plan

BAR_WIDTH = 16


def choices(plan: Plan) -> dict[str, Choice]:
    """The choices worth a column, by their title: one, where the largest is also the fastest or nothing was timed."""
    if plan.fastest is None:
        return {"largest": plan.largest}
    if plan.fastest.accumulation_steps == plan.largest.accumulation_steps:
        # The same window: cut evenly, its micro-batches may be smaller than the largest that fit.
        return {"largest and fastest": replace(plan.largest, seconds_per_update=plan.fastest.seconds_per_update)}
    return {"largest": plan.largest, "fastest": plan.fastest}


def choices_table(plan: Plan) -> Table:
    """Micro-batch size, accumulation steps, peak and time of the largest and of the fastest choice."""
    table = Table(title="micro-batch size", title_justify="left")
    table.add_column("")
    found = choices(plan)
    for title in found:
        table.add_column(title, justify="right")
    rows: list[tuple[str, Callable[[Choice], str]]] = [
        ("samples at once", lambda choice: f"{choice.micro_batch_size:,}"),
        ("accumulation steps", lambda choice: f"{choice.accumulation_steps:,}"),
        ("predicted peak", lambda choice: bytes_text(choice.memory.peak)),
        (
            f"of the budget of {bytes_text(plan.max_memory)}",
            lambda choice: f"{choice.memory.peak / plan.max_memory:.1%}",
        ),
    ]
    if not isinstance(plan, GatheredPlan):
        rows += [
            ("predicted time per update", lambda choice: seconds_text(choice.seconds_per_update)),
            ("time per sample", lambda choice: _per_sample(plan, choice)),
        ]
    for label, text in rows:
        table.add_row(label, *(text(choice) for choice in found.values()))
    return table


def memory_table(plan: Plan) -> Table:
    """Bytes of each kind at the peak, with a bar whose full width is the peak of the largest choice."""
    table = Table(title="what takes the memory at the peak", title_justify="left")
    table.add_column("")
    found = choices(plan)
    for title in found:
        table.add_column(title, justify="right")
        table.add_column("", width=BAR_WIDTH)
    for name, label in KINDS.items():
        cells = [(getattr(choice.memory, name), plan.peak) for choice in found.values()]
        table.add_row(
            label, *(cell for num_bytes, of in cells for cell in (bytes_text(num_bytes), _bar(num_bytes, of)))
        )
    return table


def _bar(num_bytes: int, of: int) -> Bar:
    # An eighth of a character is the least that shows, and every kind takes something.
    return Bar(size=of, begin=0, end=min(max(num_bytes, of / (8 * BAR_WIDTH)), of), width=BAR_WIDTH, color="cyan")


def _per_sample(plan: Plan, choice: Choice) -> str:
    return NONE if choice.seconds_per_update is None else seconds_text(choice.seconds_per_update / plan.batch_size)


def lines(plan: Plan, coupled: str | None) -> list[str]:
    """How the numbers came about, and what they do not say."""
    passes = f"{plan.num_passes} pass{'' if plan.num_passes == 1 else 'es'}"
    how = {"fake": f"on fake tensors, in {passes} that allocate nothing", "probes": f"from {passes} with real tensors"}
    said = [
        f"predicted {how[plan.method]}: {plan.reason}",
        _limit_line(plan),
        f"optimizer state: {plan.optimizer}",
        f"checkpointing: {plan.checkpointing.verdict}",
        *(_gathered_lines(plan) if isinstance(plan, GatheredPlan) else []),
    ]
    if coupled is not None:
        said.append(
            f"note: {coupled} normalises over the micro-batch: its size changes the result, not only memory and time"
        )
    return said


def _gathered_lines(plan: GatheredPlan) -> list[str]:
    """What a loss over all outputs adds to the memory, and to the passes."""
    steps, kept = plan.accumulation_steps, min(plan.graphs, 1)
    loss = (
        f"the loss compares all {plan.batch_size:,} samples: it takes {bytes_text(plan.loss)}, as measured once, their "
        f"outputs among it ({bytes_text(plan.outputs)}); both count as activations"
    )
    room = f"{plan.graphs} of {steps}" if plan.graphs < steps else f"all {steps}"
    graphs = f"the peak is with {'1' if kept else 'no'} graph kept for the backward"
    if plan.graphs > kept:
        graphs += f"; there is room for {room}, and train --max-memory takes it"
    return [
        loss,
        graphs,
        f"time is not predicted: an update is {counted(steps, 'forward')} and as many backwards, the loss, and another "
        "forward for each micro-batch whose graph is not kept",
    ]


def _limit_line(plan: Plan) -> str:
    if plan.micro_batch_size >= plan.batch_size:
        return "the whole effective batch fits: there is nothing to accumulate"
    if plan.is_exact:
        return f"{plan.micro_batch_size + 1} samples at once were tried, too, and do not fit"
    return f"{plan.micro_batch_size} samples at once fit; whether a few more would was not tried"
