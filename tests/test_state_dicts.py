"""Everything that remembers can be saved and loaded, and goes on as if nothing had happened: one test for all of it."""

import io
import json
from collections.abc import Callable
from typing import Any

import pytest
import torch
from helpers import clear
from moments_by_hand import moments_of_gradients
from test_accumulator import mean_square, points, regressor

import macrobatch as mb
from macrobatch.auto_size import AutoSize
from macrobatch.sizing import SizeLimit

# For each: how to make one, one event in its life, and what can be seen of it.


def accumulator() -> mb.Accumulator:
    return mb.Accumulator(regressor(), mean_square, micro_batch_size=8)


def lowered_and_run(made: mb.Accumulator) -> None:
    if made._limit.quiet_windows == 2:
        made._limit.failed(8)
    made.run(points())
    clear(made.model)


def ended(limit: SizeLimit) -> None:
    if limit.quiet_windows == 1 and limit.proven < 20:
        limit.failed(20)
    limit.window_ended(limit.current, 0)


def auto() -> AutoSize:
    limit = AutoSize(None)
    limit.begin(64, 128)
    return limit


def searched(limit: AutoSize) -> None:
    limit.laps.extend([1.0, 1.0 / limit.current, 1.0 / limit.current])
    limit.window_ended(limit.current, 0)


def observed(noise: mb.GradientNoiseScale) -> None:
    seed = noise._average.num_windows
    gradients = 1 + torch.randn(3, 4, generator=torch.Generator().manual_seed(seed))
    noise.observe(moments_of_gradients(gradients, [1, 2, 3]))


def advanced(schedule: mb.BatchSchedule) -> None:
    schedule.advance(schedule.batch_size)
    schedule.observe(1.0 + schedule.samples)


def spike_guard() -> mb.SpikeGuard:
    model = regressor()
    return mb.SpikeGuard(model, torch.optim.SGD(model.parameters(), lr=0.0), policy="skip", window=6, min_updates=2)


def checked(guard: mb.SpikeGuard) -> None:
    (model,) = guard._run.modules
    x, y = points()
    spike = 1000 if guard.num_accepted == 5 and not guard.flags_in_a_row else 1 + 0.1 * guard.num_accepted
    guard.check(mb.Accumulator(model, mean_square, micro_batch_size=8).run((x, y * spike)))
    clear(model)


MAKERS: dict[str, tuple[Callable[[], Any], Callable[[Any], None], Callable[[Any], object]]] = {
    "Accumulator": (accumulator, lowered_and_run, lambda made: (made.micro_batch_size, made._learned.exponent)),
    "SizeLimit": (lambda: SizeLimit(20), ended, lambda made: (made.current, made.patience)),
    "AutoSize": (auto, searched, lambda made: (made.current, made.is_found)),
    "GradientNoiseScale": (mb.GradientNoiseScale, observed, lambda made: repr(made.estimate())),
    "SpikeGuard": (spike_guard, checked, lambda made: (made.num_accepted, made.flags_in_a_row, list(made.norms))),
    "BatchSchedule": (
        lambda: mb.BatchSchedule.doubling(3, largest=96),
        advanced,
        lambda made: (made.samples, made.batch_size),
    ),
}


@pytest.mark.parametrize("midpoint", [0, 1, 3, 7])
@pytest.mark.parametrize("name", MAKERS)
def test_what_is_saved_and_loaded_goes_on_as_if_nothing_had_happened(name: str, midpoint: int) -> None:
    make, live, see = MAKERS[name]
    original = make()
    for _ in range(midpoint):
        live(original)
    file = io.BytesIO()
    torch.save(original.state_dict(), file)
    file.seek(0)
    state = torch.load(file, weights_only=True)
    resumed = make()
    resumed.load_state_dict(state)
    assert json.dumps(resumed.state_dict()) == json.dumps(original.state_dict())
    states = {json.dumps(state)}
    for _ in range(8):
        live(original)
        live(resumed)
        assert see(resumed) == see(original)
        states.add(json.dumps(original.state_dict()))
    assert original.state_dict() == resumed.state_dict()
    assert len(states) >= 2, "a state that never changes shows nothing"


def test_a_state_of_another_kind_is_refused() -> None:
    with pytest.raises(ValueError, match="it was saved with another kind of micro_batch_size"):
        SizeLimit(8).load_state_dict(auto().state_dict())


def test_a_search_survives_a_journey_through_json() -> None:
    limit = auto()
    for _ in range(3):
        searched(limit)
    resumed = auto()
    resumed.load_state_dict(json.loads(json.dumps(limit.state_dict())))
    while not limit.is_found:
        searched(limit)
        searched(resumed)
    assert (resumed.current, resumed.is_found) == (limit.current, True)


def test_a_smaller_size_asked_for_on_resume_counts() -> None:
    resumed = mb.Accumulator(regressor(), mean_square, micro_batch_size=4)
    resumed.load_state_dict(accumulator().state_dict())
    assert resumed.micro_batch_size == 4
    with pytest.raises(ValueError, match="an accumulator's state holds 'limit' and 'exponent', this one"):
        resumed.load_state_dict({})
