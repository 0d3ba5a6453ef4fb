"""What the user can mend is said in a line or two, with exit code 2; everything else keeps its traceback."""

import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
import typer
from rich.console import Console
from rich.markup import escape

from macrobatch.cli.error_places import PACKAGE, last_line_of, place_in_task
from macrobatch.cli.runfiles import write_text

LONGEST = 400  # characters of an error's own text in a line: the file with the traceback has the rest


def print_error(text: str) -> None:
    """A line on stderr, where every error goes: stdout is for what a command found. Wrapped as in `say`."""
    console = Console(stderr=True, highlight=False)
    console.print(f"[bold red]error:[/] {escape(text)}", soft_wrap=not console.is_terminal)


@contextmanager
def short_errors() -> Iterator[None]:
    """Errors that this package raised on purpose end the command without a traceback, and with exit code 2."""
    try:
        yield
    except (ValueError, ImportError, torch.OutOfMemoryError) as error:
        if not _is_meant_for_the_user(error):
            raise
        print_error(str(error))
        raise typer.Exit(2) from None


def _is_meant_for_the_user(error: BaseException) -> bool:
    """Whether this package raised it: a ValueError of another library, without a line of a task, is a bug here."""
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
        where = last_line_of(module_name.partition(".")[0], error) if colon else None
        if not colon or (where is None and isinstance(error, (ValueError, ImportError))):
            raise
        what = " ".join("".join(traceback.format_exception_only(error)).split())
        raise ValueError(f"the task {task_name} raised {what}{where or ''}") from error


@contextmanager
def traceback_kept(task_name: str, folder: Path) -> Iterator[None]:
    """What the code of a task of one's own raises at work is a ValueError of the same form, with the error's notes.

    The whole traceback is in `folder`. Errors in which no line of the task took part stay as they are.
    """
    try:
        yield
    except torch.OutOfMemoryError:
        raise
    except Exception as error:
        where = place_in_task(task_name, error)
        if where is None:
            raise
        path = folder / "traceback.txt"
        write_text(path, "".join(traceback.format_exception(error)))
        said = f"the task {task_name} raised {_in_a_line(error)}{where}; the whole traceback is in {path}"
        raise ValueError("\n".join([said, *(f"note: {note}" for note in getattr(error, "__notes__", []))])) from error


def _in_a_line(error: Exception) -> str:
    """Type and text, without the notes.

    >>> _in_a_line(KeyError("x"))
    "KeyError: 'x'"
    """
    name, text = type(error).__qualname__, " ".join(str(error).split())
    if not text:
        return name
    return f"{name}: {text if len(text) <= LONGEST else text[:LONGEST] + ' ...'}"
