"""Every test starts from the same seed, on one thread, in float32, and leaves no trace of having run."""

import gc
import os
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

os.environ.setdefault("MPLBACKEND", "Agg")  # plots are drawn into files; no test opens a window
os.environ.setdefault("OMP_NUM_THREADS", "1")  # for child processes
sys.path.append(str(Path(__file__).parents[1] / "benchmarks"))  # they import one another, as scripts do
torch.set_num_threads(1)  # tiny tensors: more threads only wait for each other


@pytest.fixture(autouse=True)
def _same_start_for_every_test() -> Iterator[None]:
    torch.manual_seed(0)
    yield
    torch.set_default_dtype(torch.float32)
    torch.use_deterministic_algorithms(False)
    torch.set_num_threads(1)


@pytest.fixture(autouse=True, scope="module")
def _what_was_imported_is_no_garbage() -> None:
    """Recovery collects garbage after every failure; walking over all of torch each time would take longest."""
    gc.collect()
    gc.freeze()


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Names are the same in every process; tests marked gpu are skipped, visibly, on a machine without one."""
    changing = [item.nodeid for item in items if " at 0x" in item.nodeid]
    if changing:
        raise pytest.UsageError(f"the name of a test holds an address, give it ids=: {changing[0]}")
    if torch.cuda.is_available():
        return
    for item in items:
        if item.get_closest_marker("gpu"):
            item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))
