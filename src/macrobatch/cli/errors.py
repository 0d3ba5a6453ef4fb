"""What the user can mend is said in a line or two, with exit code 2; everything else keeps its traceback."""

import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import typer
from rich.console import Console
from rich.markup import escape

PACKAGE = Path(__file__).parents[1]


@contextmanager
def short_errors(console: Console) -> Iterator[None]:
    """Errors that this package raised on purpose end the command without a traceback, and with exit code 2."""
    try:
        yield
    except (ValueError, ImportError, torch.OutOfMemoryError) as error:
        if not _is_meant_for_the_user(error):
            raise
        console.print(f"[bold red]error:[/] {escape(str(error))}", soft_wrap=True)
        raise typer.Exit(2) from None


def _is_meant_for_the_user(error: BaseException) -> bool:
    """Whether this package raised it. A ValueError out of a user's own task is a bug there: its traceback helps."""
    if isinstance(error, torch.OutOfMemoryError):
        return True
    frame = error.__traceback__
    while frame is not None and frame.tb_next is not None:
        frame = frame.tb_next
    return frame is not None and Path(frame.tb_frame.f_code.co_filename).is_relative_to(PACKAGE)


@contextmanager
def said_where(task_name: str) -> Iterator[None]:
    """What a task of one's own raises while it is loaded is a ValueError of a line: which error, and where in its code.

    What `load_task` itself says of the name, the function and its options stays as it is.
    """
    module_name, colon, _ = task_name.partition(":")
    try:
        yield
    except torch.OutOfMemoryError:
        raise
    except Exception as error:
        where = _last_line_in(module_name.partition(".")[0], error) if colon else None
        if not colon or (where is None and isinstance(error, (ValueError, ImportError))):
            raise
        what = " ".join("".join(traceback.format_exception_only(error)).split())
        raise ValueError(f"the task {task_name} raised {what}{where or ''}") from error


def _last_line_in(package: str, error: Exception) -> str | None:
    """The last line of the package on the way to the error; None where none of its lines has run."""
    if isinstance(error, SyntaxError):  # names the line itself
        return ""
    passed = [each for each in traceback.walk_tb(error.__traceback__) if _package_of(each[0].f_globals) == package]
    return f" ({passed[-1][0].f_code.co_filename}, line {passed[-1][1]})" if passed else None


def _package_of(names: dict[str, Any]) -> str:
    return str(names.get("__name__")).partition(".")[0]
