"""`macrobatch plan`: which micro-batch size fits, which is fastest, and what takes the memory, before any training."""

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from macrobatch.cli import setup
from macrobatch.cli.forecast import coupling_layer, sample_batch
from macrobatch.cli.gathered_plan import GatheredNeeds, gathered_plan
from macrobatch.cli.plan_figure import save_curve
from macrobatch.cli.plan_words import choices_table, lines, memory_table
from macrobatch.cli.preparing import busy
from macrobatch.cli.progress import say
from macrobatch.cli.runfiles import write_json
from macrobatch.planning import Plan
from macrobatch.planning import plan as make_plan
from macrobatch.tasks import Task
from macrobatch.tasks.task import num_samples


@dataclass(frozen=True, kw_only=True)
class PlanOptions:
    """What the command line said; None where the task's own value is meant, or all that the device has."""

    batch_size: int | None = None
    max_memory: int | str | None = None
    precision: setup.Precision = "fp32"
    device: setup.Device = "auto"
    seed: int = 0


def plan(task: Task, options: PlanOptions, folder: Path, console: Console) -> Plan:
    """The plan is on the terminal, and with its curve in `folder`."""
    device = setup.device_named(options.device)
    say(console, f"{task.name}: {task.description}" if task.description else task.name)
    with busy(console, "planning"):
        found = planned(task, options, device)
    say(console, f"effective batch of {found.batch_size:,} samples in {options.precision} on {found.device}")
    write_json(folder / "plan.json", plan_json(found))
    save_curve(folder, found, task.name)
    console.print(choices_table(found), memory_table(found), sep="\n")
    for line in lines(found, coupling_layer(task.model)):
        say(console, line)
    say(console, f"plan.json, plan.png, plan.svg in {folder}")
    return found


def planned(task: Task, options: PlanOptions, device: torch.device) -> Plan:
    """The plan for a task with its own optimizer. ValueError for a batch or a budget that cannot be."""
    data_size = num_samples(task.train, "train")
    batch_size = options.batch_size or min(task.batch_size, data_size)
    if batch_size > data_size:
        raise ValueError(f"--batch-size {batch_size} is more than the {data_size} training samples of {task.name}")
    setup.place_constants(task, device)
    model, autocast = task.model.to(device), setup.autocast_dtype(options.precision)
    optimizer = task.make_optimizer(model, task.learning_rate)
    if task.encode is not None:
        return gathered_plan(GatheredNeeds.of(task, model, optimizer, batch_size, options.max_memory, autocast))
    return make_plan(
        model,
        task.loss_fn,
        sample_batch(task),
        batch_size=batch_size,
        max_memory=options.max_memory,
        optimizer=optimizer,
        autocast=autocast,
    )


def plan_json(found: Plan) -> dict[str, Any]:
    """Everything in the plan, in bytes and seconds, with the sums that a reader would make."""
    entries = {name: value for name, value in vars(found).items() if name not in ("device", "curve")}
    entries = {
        name: asdict(value) if hasattr(value, "__dataclass_fields__") else value for name, value in entries.items()
    }
    for name, choice in (("largest", found.largest), ("fastest", found.fastest)):
        if choice is not None:
            entries[name]["memory"]["peak"] = choice.memory.peak
    return {**entries, "device": str(found.device), "curve": [asdict(point) for point in found.curve]}
