"""`--batch-schedule`: how the effective batch grows over the run, from its text to the size of each update."""

import re
from collections.abc import Callable, Sequence
from copy import copy
from dataclasses import dataclass
from typing import Literal

from macrobatch import BatchSchedule

FORMS = (
    "steps:32,128@5k,512@20k (32, then 128 after 5,000 samples, 512 after 20,000), ramp:32:512:20k (evenly over "
    "20,000 samples) or doubling:32:512 (twice as much whenever the measured noise scale allows); lengths may be in "
    "tokens, as in 20Mtokens"
)
UNIT = {"": 1, "k": 1_000, "M": 1_000_000, "G": 1_000_000_000}
NUMBER = re.compile(r"([\d_]*\d(?:\.\d+)?)([kMG]?)(tokens)?")


@dataclass(frozen=True)
class BatchPlan:
    """A batch schedule as it was written. `lengths`: where each of `sizes` begins; of a ramp, how long it is.

    `end`: where a schedule of steps ends, if it does. `in_tokens`: whether lengths count loss terms, not samples.
    """

    kind: Literal["constant", "steps", "ramp", "doubling"]
    sizes: tuple[int, ...]
    lengths: tuple[int, ...] = ()
    end: int | None = None
    in_tokens: bool = False

    @property
    def measures(self) -> bool:
        """Whether the sizes depend on the noise scale that is measured on the way."""
        return self.kind == "doubling"

    def schedule(self, tokens_per_sample: Callable[[], float]) -> BatchSchedule:
        """The schedule that a run follows. ValueError where sizes or lengths contradict one another."""
        tokens = tokens_per_sample() if self.in_tokens else None
        first, last = self.sizes[0], self.sizes[-1]
        if self.kind == "ramp":
            # Whole multiples of the smaller size: few different sizes, and all of them cut evenly.
            multiple, over = min(first, last), self.lengths[0]
            return BatchSchedule.ramp(first, last, over=over, multiple_of=multiple, tokens_per_sample=tokens)
        if self.kind == "doubling":
            return BatchSchedule.doubling(first, largest=last)
        steps = dict(zip(self.lengths or (0,), self.sizes, strict=True))
        return BatchSchedule.steps(steps, tokens_per_sample=tokens, end=self.end)


def parse_batch_plan(text: str) -> BatchPlan:
    """The plan that is written in `text`; ValueError, with the forms there are, for anything else.

    >>> parse_batch_plan("ramp:32:512:20k")
    BatchPlan(kind='ramp', sizes=(32, 512), lengths=(20000,), end=None, in_tokens=False)
    >>> parse_batch_plan("steps:32,128@5k,end@20k").end
    20000
    """
    kind, _, rest = text.partition(":")
    try:
        if kind == "steps":
            return _steps(rest.split(","))
        if kind == "ramp":
            first, last, over = rest.split(":")
            (length,), in_tokens = _lengths([over])
            return BatchPlan("ramp", (_size(first), _size(last)), (length,), in_tokens=in_tokens)
        if kind == "doubling":
            first, last = rest.split(":")
            return BatchPlan("doubling", (_size(first), _size(last)))
    except _Unreadable as error:
        raise ValueError(f"--batch-schedule {text}: {error}; write {FORMS}") from None
    except ValueError:  # too few parts, or too many
        pass
    hint = "; --batch-size alone stays constant" if kind == "constant" else ""
    raise ValueError(f"--batch-schedule {text} is no schedule{hint}; write {FORMS}")


def planned_sizes(
    schedule: BatchSchedule,
    data_size: int,
    *,
    updates: int | None = None,
    epochs: int | None = None,
    samples: int | None = None,
    before: Sequence[int] = (),
) -> list[int]:
    """The sizes of all updates of a run as known now: `before` are made, the rest follow `schedule`.

    One of the limits is given. The last batch of an epoch, and of the samples, is as short as it is.
    """
    ahead = copy(schedule)  # which counts on while the schedule itself stays
    limit = samples if samples is not None else data_size * epochs if epochs is not None else None
    sizes = list(before)
    while len(sizes) < updates if updates is not None else ahead.samples < (limit or 0):
        left_in_epoch = data_size - ahead.samples % data_size
        left = left_in_epoch if limit is None else min(left_in_epoch, limit - ahead.samples)
        sizes.append(min(ahead.batch_size, left))
        ahead.advance(sizes[-1])
    return sizes


class _Unreadable(ValueError):
    """A part of the text is not what stands in its place."""


def _steps(parts: Sequence[str]) -> BatchPlan:
    names, _, starts = zip(*(part.partition("@") for part in parts), strict=True)
    if starts[0]:
        raise _Unreadable(f"the first size stands alone, got {parts[0]!r}")
    if not all(starts[1:]):
        raise _Unreadable("every size after the first says when it begins, as in 128@5k")
    lengths, in_tokens = _lengths(starts[1:])
    has_end = names[-1] == "end"
    sizes = names[:-1] if has_end else names
    borders = (0, *lengths)
    return BatchPlan(
        "steps",
        tuple(map(_size, sizes)),
        borders[: len(sizes)],
        end=borders[-1] if has_end else None,
        in_tokens=in_tokens,
    )


def _size(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise _Unreadable(f"a batch size is a whole number of at least 1, got {text!r}")
    return int(text)


def _lengths(texts: Sequence[str]) -> tuple[tuple[int, ...], bool]:
    """The numbers, and whether they count tokens; all of them do, or none."""
    found = [NUMBER.fullmatch(text) for text in texts]
    numbers, units = [], set()
    for text, match in zip(texts, found, strict=True):
        value = 0.0 if match is None else float(match[1].replace("_", "")) * UNIT[match[2]]
        if match is None or value < 1 or value % 1:
            raise _Unreadable(f"a length is a number such as 20000, 20k, 1.5M or 20Mtokens, got {text!r}")
        numbers.append(int(value))
        units.add(match[3] is not None)
    if len(units) > 1:
        raise _Unreadable("lengths are all in samples or all in tokens")
    return tuple(numbers), units == {True}
