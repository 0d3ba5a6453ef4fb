"""The rules for another batch size, as data: what each does to the knobs, why, and on whose word."""

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class Rule:
    """How the knobs follow k = to_batch_size / from_batch_size: lr * k**lr_power, eps * k**eps_power.

    `averages`: what becomes of decay rates: nothing, 1 - k(1 - beta), or beta**k, of both or of that of squares only.
    """

    name: str
    lr_power: float
    averages: Literal["as given", "1-k(1-beta)", "beta**k", "beta2**k"]
    eps_power: float
    why: str
    source: str


RULES = {
    rule.name: rule
    for rule in (
        Rule(
            name="linear",
            lr_power=1.0,
            averages="as given",
            eps_power=0.0,
            why="k updates along nearly the same gradient are one update k times as long",
            source="Goyal et al. 2017, section 2.1",
        ),
        Rule(
            name="sqrt",
            lr_power=0.5,
            averages="as given",
            eps_power=0.0,
            why="k updates that are mostly noise add up like a random walk",
            source="Krizhevsky 2014; You et al. 2019 (LAMB)",
        ),
        Rule(
            name="adam-sde",
            lr_power=0.5,
            averages="1-k(1-beta)",
            eps_power=-0.5,
            why="the stochastic differential equation of the optimizer stays the same",
            source="Malladi et al. 2022",
        ),
        Rule(
            name="half-life",
            lr_power=0.0,
            averages="beta2**k",
            eps_power=0.0,
            why="the average of squares keeps its half-life in samples, and the rate is yours",
            source="Marek et al. 2025, equation 2",
        ),
        Rule(
            name="sqrt-half-life",
            lr_power=0.5,
            averages="beta2**k",
            eps_power=-0.5,
            why="noise adds up like a random walk, and the average of squares keeps its half-life in samples",
            source="Malladi et al. 2022 for lr and eps, Marek et al. 2025, equation 2, for beta2",
        ),
        Rule(
            name="invariant",
            lr_power=1.0,
            averages="beta**k",
            eps_power=0.0,
            why="squares of micro-batch gradients do not change with the batch, so neither does the size of lr * g",
            source="Wang and Aitchison 2024 (2402.18824)",
        ),
        Rule(
            name="none",
            lr_power=0.0,
            averages="as given",
            eps_power=0.0,
            why="everything stays as given, weight decay too",
            source="",
        ),
    )
}
