"""Ctrl-C as a wish that is granted between two updates, so that parameters and files are never left half done."""

import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from types import FrameType, TracebackType
from typing import Any, NoReturn


class Terminated(KeyboardInterrupt):
    """SIGTERM: as Ctrl-C, with an exit code of its own."""


def terminate(number: int, frame: FrameType | None) -> NoReturn:
    """The handler of SIGTERM: what is at work is interrupted."""
    raise Terminated


@contextmanager
def unwrapped() -> Iterator[None]:
    """An interruption that some import has made an error of another kind of is an interruption again."""
    try:
        yield
    except Exception as error:
        behind: BaseException | None = error
        while behind is not None and not isinstance(behind, KeyboardInterrupt):
            behind = behind.__cause__ or (None if behind.__suppress_context__ else behind.__context__)
        if behind is None:
            raise
        raise behind from None


def exit_code(number: int) -> int:
    """What shells say of a process that such a signal has ended: 130 for Ctrl-C, 143 for SIGTERM."""
    return 128 + number


class CtrlC:
    """A context in which the first Ctrl-C (or SIGTERM) only sets `wanted`; the second one interrupts as usual.

    The first one is answered at once, by `say`: after `at_hand`, what is going on, it will stop; and a second one
    would lose what is `unwritten`.
    """

    def __init__(self, say: Callable[[str], None], at_hand: str, unwritten: str) -> None:
        self.wanted = False
        self.exit_code = exit_code(signal.SIGINT)  # of the first signal, once there was one
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
        self.wanted, self.exit_code = True, exit_code(number)
        self._put_back()
        name = "Ctrl-C" if number == signal.SIGINT else "SIGTERM"
        with suppress(RuntimeError):  # the signal came in the middle of a write to the same stream
            self._say(f"stopping after {self.at_hand}; {name} again to stop now, without {self.unwritten}")

    def _put_back(self) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
