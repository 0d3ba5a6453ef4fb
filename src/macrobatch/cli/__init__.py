"""The command line: `macrobatch train`, `compare`, `plan` and `noise`. Needs the extra `cli`."""

import os
import sys

_EXTRA = frozenset({"typer", "rich", "matplotlib", "jinja2", "tensorboard"})

try:
    from macrobatch.cli import noise_command
    from macrobatch.cli.app import app
except ModuleNotFoundError as missing:
    package = (missing.name or "").split(".")[0]
    if package not in _EXTRA:
        raise
    # Whoever types the command meets one line; whoever imports this module meets the same words as an error.
    raise SystemExit(f"error: the command line needs {package}: pip install -e '.[cli,tasks]'") from None


def main() -> None:
    """The command named on the command line has run, and the process ends with its exit code."""
    sys.path.insert(0, os.getcwd())  # where a task of one's own usually is; a script's path starts at the script
    app()


__all__ = ["app", "main", "noise_command"]
