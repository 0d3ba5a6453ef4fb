"""The command `macrobatch`, outside of the package, so that Ctrl-C while torch is imported ends in a word, too."""

import os
import signal
from types import FrameType
from typing import NoReturn


def main() -> None:
    """The command named on the command line has run, and the process ends with its exit code."""
    before = signal.getsignal(signal.SIGINT)
    if before is signal.default_int_handler:  # elsewhere whoever started this has other plans with it
        signal.signal(signal.SIGINT, _leave)
    from macrobatch.cli import main as run

    signal.signal(signal.SIGINT, before)
    run()


def _leave(number: int, frame: FrameType | None) -> NoReturn:
    """The process has ended; an exception would not do: some imports swallow it, and fail later in another way."""
    os.write(2, b"interrupted\n")
    os._exit(130)


if __name__ == "__main__":
    main()
