"""The command line: `macrobatch train` and `macrobatch compare`. Needs the extra `cli`."""

_EXTRA = frozenset({"typer", "rich", "matplotlib", "jinja2", "tensorboard"})

try:
    from macrobatch.cli.app import app
except ModuleNotFoundError as missing:
    if missing.name is None or missing.name.split(".")[0] not in _EXTRA:
        raise
    # Whoever types the command meets one line; whoever imports this module meets the same words as an error.
    raise SystemExit(f"error: the command line needs {missing.name}: pip install 'macrobatch[cli]'") from None


def main() -> None:
    """The command named on the command line has run, and the process ends with its exit code."""
    app()


__all__ = ["app", "main"]
