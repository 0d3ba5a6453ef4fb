"""Two and three real gloo processes: batch normalisation over all samples of all ranks, as one process computes it."""

import os
import subprocess
import sys
from pathlib import Path

import norm_ranks
import pytest

pytestmark = pytest.mark.distributed
RANKS = Path(norm_ranks.__file__)


@pytest.fixture(scope="session", params=[2, pytest.param(3, marks=pytest.mark.slow)])
def outcomes(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[str]]:
    """For each claim the traceback of each rank, empty where it held; all claims in one start of the processes."""
    world, folder = request.param, tmp_path_factory.mktemp("norms")
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore"}
    processes = [
        subprocess.Popen([sys.executable, RANKS, str(rank), str(world), str(folder)], env=environment, cwd=RANKS.parent)
        for rank in range(world)
    ]
    try:
        for process in processes:
            process.wait(timeout=300)
    finally:
        for process in processes:
            process.kill()
    paths = {name: [folder / f"{name}.{rank}" for rank in range(world)] for name in norm_ranks.claims()}
    return {name: [p.read_text() if p.exists() else "never finished" for p in ps] for name, ps in paths.items()}


@pytest.mark.parametrize("claim", sorted(norm_ranks.claims()))
def test_on_real_processes(claim: str, outcomes: dict[str, list[str]]) -> None:
    failures = [f"rank {rank}:\n{text}" for rank, text in enumerate(outcomes[claim]) if text]
    assert not failures, "\n".join(failures)


def test_there_are_claims_and_a_control() -> None:
    assert len(norm_ranks.claims()) >= 10
    assert any(name.startswith("control") for name in norm_ranks.claims())
