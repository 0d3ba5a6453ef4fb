"""Two and three real gloo processes: aligned random numbers are those of each rank's own samples in one piece."""

import aligned_ranks
import pytest
from processes import outcomes_of

pytestmark = pytest.mark.distributed


@pytest.fixture(scope="session", params=[2, pytest.param(3, marks=pytest.mark.slow)])
def outcomes(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[str]]:
    """For each claim the traceback of each rank, empty where it held; all claims in one start of the processes."""
    return outcomes_of(aligned_ranks.__file__, aligned_ranks.claims(), request.param, tmp_path_factory.mktemp("ranks"))


@pytest.mark.parametrize("claim", sorted(aligned_ranks.claims()))
def test_on_real_processes(claim: str, outcomes: dict[str, list[str]]) -> None:
    failures = [f"rank {rank}:\n{text}" for rank, text in enumerate(outcomes[claim]) if text]
    assert not failures, "\n".join(failures)
