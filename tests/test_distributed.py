"""Two and three real gloo processes: the gradient is that of one process on everything, whatever each rank holds."""

import pytest
import ranks
from processes import outcomes_of

pytestmark = pytest.mark.distributed


@pytest.fixture(scope="session", params=[2, pytest.param(3, marks=pytest.mark.slow)])
def outcomes(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[str]]:
    """For each claim the traceback of each rank, empty where it held; all claims in one start of the processes."""
    return outcomes_of(ranks.__file__, ranks.claims(), request.param, tmp_path_factory.mktemp("ranks"))


@pytest.mark.parametrize("claim", sorted(ranks.claims()))
def test_on_real_processes(claim: str, outcomes: dict[str, list[str]]) -> None:
    failures = [f"rank {rank}:\n{text}" for rank, text in enumerate(outcomes[claim]) if text]
    assert not failures, "\n".join(failures)


def test_there_are_claims_and_a_control() -> None:
    assert len(ranks.claims()) >= 15
    assert any(name.startswith("control") for name in ranks.claims())
