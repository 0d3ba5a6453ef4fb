"""One, two and three real gloo processes: the gradient is that of one process on everything, whatever a rank holds."""

from collections import Counter

import all_ranks
import one_rank
import pytest
from processes import outcomes_of

pytestmark = pytest.mark.distributed


@pytest.fixture(scope="session", params=[2, pytest.param(3, marks=pytest.mark.slow)])
def outcomes(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[str]]:
    """For each claim the traceback of each rank, empty where it held; all claims in one start of the processes."""
    return outcomes_of(all_ranks.__file__, all_ranks.CLAIMS, request.param, tmp_path_factory.mktemp("ranks"))


@pytest.mark.parametrize("claim", all_ranks.CLAIMS)
def test_on_real_processes(claim: str, outcomes: dict[str, list[str]]) -> None:
    failures = [f"rank {rank}:\n{text}" for rank, text in enumerate(outcomes[claim]) if text]
    assert not failures, "\n".join(failures)


@pytest.fixture(scope="session")
def outcomes_of_one(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[str]]:
    return outcomes_of(one_rank.__file__, one_rank.CLAIMS, 1, tmp_path_factory.mktemp("one_rank"))


@pytest.mark.parametrize("claim", one_rank.CLAIMS)
def test_in_a_group_of_one(claim: str, outcomes_of_one: dict[str, list[str]]) -> None:
    assert outcomes_of_one[claim] == [""], outcomes_of_one[claim][0]


def test_there_are_claims_and_controls() -> None:
    assert Counter(name.split(".")[0] for name in all_ranks.CLAIMS) >= Counter(
        {"ranks": 35, "norm_ranks": 10, "noise_ranks": 2, "sam_ranks": 2, "spike_ranks": 2}
    )
    for module in ("ranks", "norm_ranks"):
        assert any(name.startswith(f"{module}.control") for name in all_ranks.CLAIMS)
