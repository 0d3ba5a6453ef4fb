"""What each process of test_distributed.py runs: the claims of several modules in one start, which takes longest."""

import sys
from collections.abc import Callable

import noise_ranks
import norm_ranks
import ranks
import sam_ranks
import spike_ranks

CLAIMS: dict[str, Callable[[int], None]] = {
    f"{module.__name__}.{name}": claim
    for module in (ranks, norm_ranks, noise_ranks, sam_ranks, spike_ranks)
    for name, claim in ranks.claims_of(module).items()
}


if __name__ == "__main__":
    ranks.claims = lambda: CLAIMS
    ranks.main(int(sys.argv[1]), int(sys.argv[2]), sys.argv[3])
