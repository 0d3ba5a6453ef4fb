"""How far the work is and how long it still takes: a bar on a terminal, a plain line now and then elsewhere."""

import time
from types import TracebackType

import rich.progress
from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, TaskProgressColumn, TextColumn

from macrobatch.cli.formats import duration_text

SECONDS_BETWEEN_LINES = 10.0
EARLIEST_ESTIMATE = 0.02  # of the work: before that, starting up would be taken for the pace


def say(console: Console, text: str) -> None:
    """A line of plain text: wrapped at words on a terminal, left whole elsewhere, for programs to read."""
    console.print(escape(text), soft_wrap=not console.is_terminal)


class Progress:
    """A context in which `advance` shows progress towards `total`, in whatever unit the caller counts."""

    def __init__(self, console: Console, total: float) -> None:
        self._console = console
        self._total = total
        self.done = 0.0
        self._started = self._last_line = time.monotonic()
        self._bar = rich.progress.Progress(
            TextColumn("{task.description}"),
            BarColumn(bar_width=None),
            TaskProgressColumn(),
            TextColumn("{task.fields[left]}"),
            console=console,
            expand=True,
            transient=True,
            disable=not console.is_terminal,
        )
        self._row = self._bar.add_task("", total=total, left="")

    def __enter__(self) -> "Progress":
        self._started = self._last_line = time.monotonic()
        self._bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._bar.stop()

    def expect(self, total: float) -> None:
        """The total has turned out to be another one."""
        self._total = total
        self._bar.update(self._row, total=total)

    def advance(self, amount: float, text: str) -> None:
        """`amount` more of the total is done; `text` says what is going on now."""
        self.done += amount
        left = self._time_left()
        if self._console.is_terminal:
            self._bar.update(self._row, completed=self.done, description=text, left=left)
        elif time.monotonic() - self._last_line >= SECONDS_BETWEEN_LINES:
            self._last_line = time.monotonic()
            self._console.print(f"{self.done / self._total:4.0%}  {text}  {left}", soft_wrap=True)

    def _time_left(self) -> str:
        elapsed = time.monotonic() - self._started
        if self.done < EARLIEST_ESTIMATE * self._total:
            return ""
        return f"{duration_text(elapsed * max(self._total / self.done - 1, 0))} left"
