"""The options of the commands, each with its one explanation: what is given is checked where it is read."""

from collections.abc import Callable
from contextlib import suppress
from typing import Annotated, Any, get_args

import typer
from rich.markup import escape
from typer.core import TyperCommand, TyperGroup

from macrobatch.cli import setup
from macrobatch.cli.guard import Guarding
from macrobatch.cli.interrupt import unwrapped
from macrobatch.memory import parse_bytes
from macrobatch.scaling_rules import RuleName
from macrobatch.tasks import parse_task_option, task_names


def micro_batch_size_of(text: str) -> int | str:
    """A number of samples, or "auto"."""
    if text == "auto":
        return "auto"
    if not text.isdecimal() or int(text) < 1:
        raise typer.BadParameter(f"auto, or a number of samples of at least 1, is needed; got {text!r}")
    return int(text)


def _memory(text: str) -> int | str:
    if text.endswith("%"):
        return text  # of what the device has: known once the device is
    try:
        return parse_bytes(text)
    except ValueError as error:
        raise typer.BadParameter(str(error)) from None


def _at_least(least: int) -> Callable[[Any], int]:
    def number(text: Any) -> int:
        with suppress(ValueError):
            if int(text) >= least:
                return int(text)
        raise typer.BadParameter(f"a whole number of at least {least} is needed; got {text}")

    return number


def _one_of(kind: Any) -> Callable[[str], str]:
    def choice(text: str) -> str:
        if text in get_args(kind):
            return text
        raise typer.BadParameter(f"{text!r} is not one of {', '.join(map(repr, get_args(kind)))}")

    return choice


def option(help_text: str, *names: str, parser: Callable[[str], Any] | None = None, metavar: str | None = None) -> Any:
    """An option whose help is shown as it is written: `[the task's]` would be a style to rich, and not be seen."""
    return typer.Option(*names, parser=parser, metavar=metavar, help=escape(help_text))


def choice(kind: Any, help_text: str, metavar: str | None = None) -> Any:
    """An option that is one of the values of a Literal; `metavar` stands for them where a line has no room."""
    return option(help_text, parser=_one_of(kind), metavar=metavar or "|".join(get_args(kind)))


def count(least: int, help_text: str) -> Any:
    """An option that is a whole number of at least `least`."""
    return option(help_text, parser=_at_least(least), metavar="N")


def flag(name: str, help_text: str, **more: Any) -> Any:
    """An option without a value, and shown without one."""
    return typer.Option(name, help=help_text, metavar="", **more)


def output_folder(default: str) -> Any:
    """The option of where results go, with what it is for the command at hand where it is not given."""
    return option(
        f"A new folder for the results; if it holds something, FOLDER-2 and so on.  [{default}]", metavar="FOLDER"
    )


class Command(TyperCommand):
    """A command whose --help is shown without a value."""

    def get_help_option(self, ctx: Any) -> Any:
        """The option --help."""
        return _without_value(super().get_help_option(ctx))


class Commands(TyperGroup):
    """All commands together; --help is shown without a value, and Ctrl-C outside of their work is a word."""

    def invoke(self, ctx: Any) -> Any:
        """What the command returns."""
        try:
            with unwrapped():
                return super().invoke(ctx)
        except KeyboardInterrupt:  # while it imports what it needs: at work, `command` has answered
            typer.echo("interrupted", err=True)
            raise typer.Exit(130) from None

    def get_help_option(self, ctx: Any) -> Any:
        """The option --help."""
        return _without_value(super().get_help_option(ctx))


def _without_value(shown: Any) -> Any:
    if shown is not None:
        shown.metavar = ""
    return shown


def above_zero(text: str) -> float:
    """A finite number above 0."""
    with suppress(ValueError):
        if 0 < float(text) < float("inf"):
            return float(text)
    raise typer.BadParameter(f"a number above 0 is needed; got {text!r}")


def _task_option(text: str) -> tuple[str, Any]:
    try:
        name, value = parse_task_option(text)
    except ValueError as error:
        raise typer.BadParameter(str(error)) from None
    is_truth = isinstance(value, str) and text.partition("=")[2].lower() in ("true", "false")
    return name, value.lower() == "true" if is_truth else value


# The options that several commands have, each with its one explanation.
TaskName = Annotated[
    str, option(f"{', '.join(task_names())}, or package.module:function of your own.", "--task", metavar="NAME")
]
TaskOptions = Annotated[
    list[Any] | None,
    typer.Option("--task-option", parser=_task_option, metavar="NAME=VALUE", help="An option of the task; repeatable."),
]
BatchSize = Annotated[int | None, count(1, "Samples in an update: the effective batch.  [the task's]")]
MaxMemory = Annotated[
    Any,
    option("The most memory for tensors: 6GB, 500MB, or 80% of what is free.", parser=_memory, metavar="BYTES"),
]
PrecisionName = Annotated[setup.Precision, choice(setup.Precision, "Of matrix products; weights stay fp32.")]
LearningRate = Annotated[
    float | None, option("Learning rate.  [the task's]", "--lr", parser=above_zero, metavar="RATE")
]
Samples = Annotated[int | None, count(1, "Instead of --steps: train on this many samples.")]
Seed = Annotated[int, count(0, "Of initial weights and of the order of samples.")]
DeviceName = Annotated[setup.Device, choice(setup.Device, "Where to compute; auto: the GPU where there is one.")]
Threads = Annotated[int | None, count(1, "Threads of a CPU; fewer where other programs are at work.  [torch's]")]


# Those of commands that train.
BatchSchedule = Annotated[
    str | None,
    typer.Option(
        metavar="SIZES",
        help="The effective batch over the run: steps:32,128@5k or ramp:32:512:20k or doubling:32:512.",
    ),
]
MicroBatchSize = Annotated[
    Any,
    option(
        "Samples in memory at once.  [auto: the fastest that fits; the task's where BatchNorm couples samples]",
        parser=micro_batch_size_of,
        metavar="N|auto",
    ),
]
BaseBatchSize = Annotated[
    int | None, count(1, "The batch size that the learning rate was tuned for.  [the task's, with its --lr]")
]
ScalingRule = Annotated[
    RuleName,
    choice(
        RuleName,
        f"How hyperparameters follow the batch: {', '.join(get_args(RuleName))}; auto fits the optimizer.",
        "RULE",
    ),
]
LearningRateSchedule = Annotated[
    setup.Schedule, choice(setup.Schedule, "Learning rate over the run, after the warmup.")
]
Warmup = Annotated[int, count(0, "Updates in which the learning rate rises to its value.")]
Steps = Annotated[int | None, count(1, "Train for this many updates; or give --epochs, or --samples.")]
Epochs = Annotated[int | None, count(1, "Instead of --steps: passes over the data.  [1]")]
MaxNorm = Annotated[
    float | None, typer.Option(parser=above_zero, metavar="NORM", help="Clip the gradient of the update to this norm.")
]
SpikeGuarding = Annotated[Guarding, choice(Guarding, "What becomes of an update whose loss or gradient is a spike.")]
SnapshotEvery = Annotated[int | None, count(1, "Of rollback: updates between snapshots.  [25]")]
