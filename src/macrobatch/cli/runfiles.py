"""The output folder: made and tried before any work, and written so that what is done is kept whatever happens."""

import json
import math
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
from torch import nn
from torch.utils.tensorboard.writer import SummaryWriter

CLAIM = ".in-use"


def new_folder(wanted: Path) -> Path:
    """An empty folder that can be written to: `wanted`, or if that holds something `wanted-2`, `wanted-3` and so on.

    Nothing is ever overwritten, also not by a run that goes on at the same time. ValueError if the folder cannot be
    made or written to.
    """
    folder, number = wanted, 1
    try:
        while not _claimed(folder):
            number += 1
            folder = wanted.with_name(f"{wanted.name}-{number}")
    except OSError as error:
        raise ValueError(
            f"cannot write to the output folder {folder} ({error.strerror or error}); choose another with --output"
        ) from None
    return folder


def _claimed(folder: Path) -> bool:
    """Whether the folder was empty and is this run's now: its mark in it keeps others out until `release`."""
    if folder.exists() and not folder.is_dir():
        raise NotADirectoryError(f"{folder} is a file")
    folder.mkdir(parents=True, exist_ok=True)
    if any(folder.iterdir()):
        return False
    try:
        (folder / CLAIM).touch(exist_ok=False)
    except FileExistsError:  # another run was quicker
        return False
    return True


def release(folder: Path) -> None:
    """The run that claimed the folder has ended; a folder in which it wrote nothing is gone."""
    with suppress(OSError):
        (folder / CLAIM).unlink(missing_ok=True)
        folder.rmdir()


@contextmanager
def all_or_nothing(folder: Path) -> Iterator[None]:
    """If what is done in the context fails or is interrupted, no file is left in `folder`: half a result is none.

    The folder is made once more, should somebody have removed it since: the work of a whole run is not for nothing.
    """
    folder.mkdir(parents=True, exist_ok=True)
    try:
        yield
    except BaseException:
        for path in folder.iterdir():
            path.unlink()
        raise


def write_text(path: Path, text: str) -> None:
    """The file holds `text`, or what it held before if the write was cut short."""
    partial = path.with_name(f".{path.name}.partial")
    partial.write_text(text, encoding="utf-8")
    os.replace(partial, path)


def write_json(path: Path, value: Mapping[str, Any]) -> None:
    """The file holds `value` as JSON that every parser takes: numbers that are not finite become null."""
    write_text(path, json.dumps(finite(value), indent=2, allow_nan=False) + "\n")


def finite(value: Any) -> Any:
    """`value` with None for every number that is not finite, which JSON does not know."""
    if isinstance(value, Mapping):
        return {str(name): finite(entry) for name, entry in value.items()}
    if isinstance(value, list | tuple):
        return [finite(entry) for entry in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def save_weights(folder: Path, model: nn.Module) -> Path:
    """The model's parameters and buffers are in a file of `folder`: safetensors if installed, else torch's format."""
    state = {name: tensor.detach().cpu().contiguous() for name, tensor in model.state_dict().items()}
    path = folder / "model.pt"
    partial = folder / ".model.partial"
    try:
        from safetensors.torch import save_file

        path = folder / "model.safetensors"
        # Tied parameters share storage, which safetensors refuses: each name gets its own.
        save_file({name: tensor.clone() for name, tensor in state.items()}, str(partial))
    except ModuleNotFoundError:
        torch.save(state, partial)
    os.replace(partial, path)
    return path


class UpdateLog:
    """A context: one JSON line per update in metrics.jsonl, written out at once, and TensorBoard events of the same."""

    def __init__(self, folder: Path) -> None:
        self._lines = (folder / "metrics.jsonl").open("w", encoding="utf-8")
        self._events = SummaryWriter(str(folder / "tensorboard"))

    def write(self, row: Mapping[str, Any]) -> None:
        """`row["update"]` counts from 1; every other number becomes a curve of its name, words a note."""
        self._lines.write(json.dumps(finite(row), allow_nan=False) + "\n")
        self._lines.flush()
        for name, value in row.items():
            if name != "update" and isinstance(value, int | float):
                self._events.add_scalar(f"train/{name}", float(value), row["update"])
            elif isinstance(value, str):
                self._events.add_text(f"train/{name}", value, row["update"])

    def write_validation(self, update: int, means: Mapping[str, float]) -> None:
        """The validation means as TensorBoard events."""
        for name, value in means.items():
            self._events.add_scalar(f"validation/{name}", value, update)

    def __enter__(self) -> "UpdateLog":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        with self._lines:
            self._events.close()
