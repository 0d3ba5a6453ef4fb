"""What takes its time before training: loading a task, and getting its data ready once everything was checked."""

from contextlib import AbstractContextManager, nullcontext
from typing import Any

from rich.console import Console
from rich.markup import escape

from macrobatch.cli.progress import Progress, say
from macrobatch.tasks import Task


def busy(console: Console, text: str) -> AbstractContextManager[Any]:
    """Within it a terminal shows that something is going on; nothing is written elsewhere."""
    return console.status(escape(text)) if console.is_terminal else nullcontext()


def prepare(task: Task, console: Console) -> None:
    """The task's data are ready, with a bar and the time left where that takes work of the task's own."""
    if task.prepare is None:
        return
    say(console, "preparing the data")
    with Progress(console, 1.0) as progress:
        task.prepare(lambda done, total: progress.advance(done / total - progress.done, f"{done:,} of {total:,}"))
