"""Ctrl-C as a wish that is granted between two updates, so that parameters and files are never left half done."""

import signal
from collections.abc import Callable
from contextlib import suppress
from types import FrameType, TracebackType
from typing import Any


class CtrlC:
    """A context in which the first Ctrl-C (or SIGTERM) only sets `wanted`; the second one interrupts as usual.

    The first one is answered at once, by `say`: after `at_hand`, what is going on, it will stop; and a second one
    would lose what is `unwritten`.
    """

    def __init__(self, say: Callable[[str], None], at_hand: str, unwritten: str) -> None:
        self.wanted = False
        self.at_hand, self.unwritten = at_hand, unwritten
        self._say = say
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
        with suppress(RuntimeError):  # the signal came in the middle of a write to the same stream
            self._say(f"stopping after {self.at_hand}; Ctrl-C again to stop now, without {self.unwritten}")

    def _put_back(self) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
