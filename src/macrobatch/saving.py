"""Where a snapshot is kept: in memory, or in a file that is whole at any time and runs no code when it is read."""

import os
from io import BytesIO
from pathlib import Path

import torch

from macrobatch.snapshots import Run, Snapshot, copied


class InMemory:
    """Keeps one snapshot."""

    survives = False  # the process
    device: torch.device | str | None

    def __init__(self, device: torch.device | str | None = None) -> None:
        self.device = device
        self._snapshot: Snapshot | None = None

    def keep(self, snapshot: Snapshot) -> None:
        """`recall` gives this one."""
        self._snapshot = snapshot

    def recall(self) -> Snapshot | None:
        """The snapshot that was kept last, None without one."""
        return self._snapshot


class OnDisk:
    """Keeps one snapshot in a file, which is whole at any time: it is written beside it, then renamed."""

    survives = True
    device: torch.device | str | None = "cpu"

    def __init__(self, path: Path) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        self.path = path

    def keep(self, snapshot: Snapshot) -> None:
        """`recall` gives this one, in this process or another."""
        beside = self.path.with_name(f"{self.path.name}.{os.getpid()}.tmp")
        try:
            with beside.open("wb") as file:
                torch.save(snapshot, file)
                file.flush()
                os.fsync(file.fileno())
            os.replace(beside, self.path)
        finally:
            beside.unlink(missing_ok=True)

    def recall(self) -> Snapshot | None:
        """The snapshot that was kept last, None without one."""
        if not self.path.exists():
            return None
        return torch.load(self.path, map_location="cpu", weights_only=True)  # type: ignore[no-any-return]


def check_storable(run: Run) -> None:
    """ValueError for what a file could not bring back with `weights_only=True`, which runs no code from a file."""
    for each in (*run.schedulers, *run.stateful):
        file = BytesIO()
        try:
            torch.save(copied(each.state_dict()), file)
            file.seek(0)
            torch.load(file, weights_only=True)
        except Exception as error:
            raise ValueError(
                f"the state_dict of {type(each).__name__} holds more than tensors and plain Python, which a file is "
                "not trusted with: leave folder out to keep snapshots in memory"
            ) from error
