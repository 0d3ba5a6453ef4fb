"""Whose code an error came from, read off its traceback: a task of one's own, or this package."""

import re
import sys
import traceback
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

PACKAGE = Path(__file__).parents[1]
# Third-party packages that the commands call themselves: a line of theirs is not one of the task.
CALLED_HERE = frozenset(
    {"rich", "typer", "matplotlib", "jinja2", "tensorboard", "safetensors", "numpy", "google", "PIL"}
)
# Where calls of a task's model and data go that are made of torch's own parts.
PARTS_OF_A_TASK = ("torch.nn.modules.", "torch.utils.data.")
CALL_OF_TASK = re.compile(r"\btask\.(make_optimizer|collate|prepare|loss_fn|encode)\(")
INTERCEPTS = ("__torch_function__", "__torch_dispatch__")


@dataclass(frozen=True)
class Step:
    """One call on the way to an error. `module`: its dotted name."""

    file: str
    line: int
    module: str
    function: str

    @property
    def text(self) -> str:
        """The line itself."""
        return traceback.FrameSummary(self.file, self.line, self.function).line or ""

    @property
    def is_passing(self) -> bool:
        """Of this package, and only passes on a call of torch that it looked at.

        It is the line that makes that call: any other may have an error of its own.
        """
        return self.package == "macrobatch" and self.function in INTERCEPTS and "func" in self.text

    @property
    def package(self) -> str:
        """The first part of the module's name."""
        return self.module.partition(".")[0]

    @property
    def is_here(self) -> bool:
        """A line of this package: not one that only passes on."""
        return Path(self.file).is_relative_to(PACKAGE) and not self.is_passing

    @property
    def is_library(self) -> bool:
        """Of torch, of Python, of this package, or of what the commands call themselves."""
        return self.is_passing or self.package in sys.stdlib_module_names | CALLED_HERE | {"torch"}

    @property
    def is_installed(self) -> bool:
        """Of a package that was installed, by whomever."""
        return not {"site-packages", "dist-packages"}.isdisjoint(Path(self.file).parts)

    def __str__(self) -> str:
        return f" ({self.file}, line {self.line})"


def steps_to(error: BaseException) -> list[Step]:
    """The calls from the outermost to the one that raised."""
    return [
        Step(frame.f_code.co_filename, line, str(frame.f_globals.get("__name__")), frame.f_code.co_name)
        for frame, line in traceback.walk_tb(error.__traceback__)
    ]


def place_in_task(task_name: str, error: Exception) -> str | None:
    """File and line, in brackets, of the innermost line of a task's own code that an error came out of.

    Where it called into this package, and that raised, it is an error of this package: None, and for built-in tasks.
    Empty where the call of one of its functions failed, for its arguments. Data and models that are made of torch's own
    parts have no line of their own: theirs is torch's.
    """
    module_name, colon, _ = task_name.partition(":")
    if not colon:
        return None
    steps = steps_to(error)
    below = steps[max((j for j, step in enumerate(steps) if step.is_here), default=-1) + 1 :]
    place = _place(below, module_name.partition(".")[0])
    if not below and isinstance(error, TypeError) and not [step for step in steps if not step.is_here]:
        # Notes say how a function of the task is called: it takes other arguments.
        is_call_of_task = hasattr(error, "__notes__") or CALL_OF_TASK.search(steps[-1].text)
        return "" if is_call_of_task else None
    return None if place is None else str(place)


def _place(below: Sequence[Step], package: str) -> Step | None:
    """The innermost step of the task's package or of any that is not installed; else of any library of its choice."""
    own = [step for step in below if step.package == package or not (step.is_library or step.is_installed)]
    if own:
        return own[-1]
    theirs = [step for step in below if not step.is_library]
    if theirs and not any(step.package in CALLED_HERE for step in below):
        return theirs[-1]
    if below and below[0].module.startswith(PARTS_OF_A_TASK):
        return [step for step in below if step.module.startswith(PARTS_OF_A_TASK)][-1]
    return None


def last_line_of(package: str, error: Exception) -> str | None:
    """The last line of the package on the way to the error, in brackets; None where none of its lines has run."""
    if isinstance(error, SyntaxError):  # names the line itself
        return ""
    passed = [step for step in steps_to(error) if step.package == package]
    return str(passed[-1]) if passed else None
