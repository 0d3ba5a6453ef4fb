"""Ctrl-C as a wish that is granted between two updates, so that parameters and files are never left half done."""

import signal
from types import FrameType, TracebackType
from typing import Any


class CtrlC:
    """A context in which the first Ctrl-C (or SIGTERM) only sets `wanted`; the second one interrupts as usual."""

    def __init__(self) -> None:
        self.wanted = False
        self._before: dict[int, Any] = {}

    def __enter__(self) -> "CtrlC":
        for number in (signal.SIGINT, signal.SIGTERM):
            self._before[number] = signal.signal(number, self._note)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._put_back()

    def _note(self, number: int, frame: FrameType | None) -> None:
        self.wanted = True
        self._put_back()

    def _put_back(self) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
