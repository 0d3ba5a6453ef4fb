"""What all commands have around them: a console, a new output folder, mistakes and Ctrl-C that end in a line."""

import logging
import signal
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import typer
from rich.console import Console

from macrobatch.cli.errors import said_where, short_errors, traceback_kept
from macrobatch.cli.interrupt import Terminated, exit_code, terminate, unwrapped
from macrobatch.cli.preparing import busy
from macrobatch.cli.progress import say
from macrobatch.cli.runfiles import new_folder, release
from macrobatch.tasks import Task, load_task


def loaded(console: Console, name: str, options: list[Any] | None, seed: int) -> Task:
    """The task, from its name and the options given; the terminal says that it is being loaded."""
    with busy(console, f"loading {name}"):
        return task_of(name, options, seed)


def task_of(name: str, options: list[Any] | None, seed: int) -> Task:
    """The task, from its name and the options given; what its own code raises is said in a line."""
    with said_where(name):
        return load_task(name, seed=seed, **dict(options or []))


def folder_name(task: str) -> str:
    """What the folder of a task's results is called: the last part of its name."""
    return task.rpartition(":")[2] or "task"


@contextmanager
def command(wanted: Path, task_name: str, threads: int | None = None) -> Iterator[tuple[Console, Path]]:
    """A console and a new output folder; mistakes and Ctrl-C end in a line and an exit code; no empty folder stays."""
    with short_errors():
        folder = new_folder(wanted)
        threads_before = torch.get_num_threads()
        torch.set_num_threads(threads or threads_before)
        before = signal.signal(signal.SIGTERM, terminate)
        try:
            with traceback_kept(task_name, folder), _quiet_fakes(), _plain_warnings(), unwrapped():
                yield Console(highlight=False), folder
        except KeyboardInterrupt as stop:
            is_terminated = isinstance(stop, Terminated)
            written = sorted(path.name for path in folder.iterdir() if path.name[0] != ".")  # all but its run's mark
            kept = f"{', '.join(written)} in {folder}" if written else "nothing was written"
            word = "terminated" if is_terminated else "interrupted"
            say(Console(stderr=True, highlight=False), f"{word}: {kept}")
            raise typer.Exit(exit_code(signal.SIGTERM if is_terminated else signal.SIGINT)) from None
        finally:
            signal.signal(signal.SIGTERM, before)
            torch.set_num_threads(threads_before)
            release(folder)


@contextmanager
def _plain_warnings() -> Iterator[None]:
    """Within it a UserWarning is a line: the place in the code that it is about is this package's own."""
    before = warnings.formatwarning

    def formatted(message: Warning | str, category: type[Warning], *place: Any, **line: Any) -> str:
        return f"warning: {message}\n" if category is UserWarning else before(message, category, *place, **line)

    warnings.formatwarning = formatted
    try:
        yield
    finally:
        warnings.formatwarning = before


@contextmanager
def _quiet_fakes() -> Iterator[None]:
    """Within it torch logs no traceback of a model that fails on fake tensors: the error itself is said."""
    logger = logging.getLogger("torch._subclasses.fake_tensor")
    before = logger.level
    logger.setLevel(logging.CRITICAL)
    try:
        yield
    finally:
        logger.setLevel(before)
