"""What the user can mend is said in a line or two, with exit code 2; everything else keeps its traceback."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

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
