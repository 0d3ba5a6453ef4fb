"""Pairs of texts as frozen layers give them: computed once, block by block, when first asked for or beforehand."""

from collections.abc import Callable, Mapping, Sequence

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from macrobatch.tasks.task import Tell

BLOCK = 128  # pairs that are computed together: a few seconds for the first sample, and no more for all of them
TEXTS_AT_ONCE = 32  # in one forward: those of like length, so that there is little padding
Sample = dict[str, Tensor]  # "docstring", "source": (T, d) float16 below the trained layers; "..._length": ()
Tokens = Sequence[Sequence[int]]  # of each text
FrozenLayers = Callable[[Tokens], list[np.ndarray]]  # of each text its rows: (its tokens, d), float16


class EncodedPairs(Dataset[Sample]):
    """Pairs in half precision: sample i is a copy, padded to `max_tokens`, the same whenever it is asked for.

    `tokens`: of the texts on each side, by its name. `layers`: what is computed of a few texts.
    """

    def __init__(self, tokens: Mapping[str, Tokens], layers: FrozenLayers, max_tokens: int) -> None:
        self._tokens = tokens
        self._layers: FrozenLayers | None = layers  # None once all is computed: they are not needed any more
        self._max_tokens = max_tokens
        self._num_pairs = len(next(iter(tokens.values())))
        self._blocks: dict[int, dict[str, list[np.ndarray]]] = {}

    def __len__(self) -> int:
        return self._num_pairs

    def __getitem__(self, index: int) -> Sample:
        if not 0 <= index < self._num_pairs:
            raise IndexError(f"pair {index} of {self._num_pairs}")
        sample: Sample = {}
        for side, rows in self._block(index // BLOCK).items():
            hidden = rows[index % BLOCK]
            padded = np.zeros((self._max_tokens, hidden.shape[1]), dtype=hidden.dtype)
            padded[: len(hidden)] = hidden
            sample |= {side: torch.from_numpy(padded), f"{side}_length": torch.tensor(len(hidden))}
        return sample

    def compute(self, tell: Callable[[int], None]) -> None:
        """Every pair is computed. `tell(n)`: n more of them are."""
        for start in range(0, self._num_pairs, BLOCK):
            self._block(start // BLOCK)
            tell(min(BLOCK, self._num_pairs - start))
        self._layers = None

    def _block(self, number: int) -> dict[str, list[np.ndarray]]:
        if number not in self._blocks:
            of = slice(number * BLOCK, (number + 1) * BLOCK)
            self._blocks[number] = {side: self._rows(tokens[of]) for side, tokens in self._tokens.items()}
        return self._blocks[number]

    def _rows(self, tokens: Tokens) -> list[np.ndarray]:
        assert self._layers is not None  # as long as a block is missing
        found: list[np.ndarray] = [np.zeros(0)] * len(tokens)
        order = sorted(range(len(tokens)), key=lambda j: len(tokens[j]))
        for start in range(0, len(order), TEXTS_AT_ONCE):
            some = order[start : start + TEXTS_AT_ONCE]
            for j, rows in zip(some, self._layers([tokens[j] for j in some]), strict=True):
                found[j] = rows
        return found


def computing(*datasets: EncodedPairs) -> Callable[[Tell], None]:
    """What a task's `prepare` is where all of these are to be computed before training."""

    def prepare(tell: Tell) -> None:
        done, total = 0, sum(map(len, datasets))

        def more(count: int) -> None:
            nonlocal done
            done += count
            tell(done, total)

        for dataset in datasets:
            dataset.compute(more)

    return prepare
