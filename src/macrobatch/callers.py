"""The user's line that a warning is about, however deep in this package it is given."""

import sys


def first_outside() -> int:
    """How many calls above its caller the first line is that is not this package's own: a `stacklevel`."""
    level, frame = 1, sys._getframe(1)
    while frame.f_back is not None and frame.f_globals.get("__name__", "").startswith("macrobatch."):
        level, frame = level + 1, frame.f_back
    return level
