"""Real processes for the distributed tests: a script of claims, started once for each rank."""

import os
import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path


def outcomes_of(script: str | None, claims: Iterable[str], world: int, folder: Path) -> dict[str, list[str]]:
    """For each claim the traceback of each rank, empty where it held; all claims in one start of the processes."""
    assert script is not None
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore"}
    processes = [
        subprocess.Popen(
            [sys.executable, script, str(rank), str(world), str(folder)], env=environment, cwd=Path(script).parent
        )
        for rank in range(world)
    ]
    try:
        for process in processes:  # each ends by itself, when a claim hangs: see ranks.main
            process.wait(timeout=500)
    finally:
        for process in processes:
            process.kill()
            process.wait()
    paths = {name: [folder / f"{name}.{rank}" for rank in range(world)] for name in claims}
    return {name: [p.read_text() if p.exists() else "never finished" for p in ps] for name, ps in paths.items()}
