"""The colours of the ways and of the ink in the figures of a comparison."""

from collections.abc import Mapping

from macrobatch.cli.way import Key

COLOR: Mapping[Key, str] = {
    "small": "#d55e00",
    "plain": "#8c6d1f",
    "accumulated": "#0072b2",
    "native": "#009e73",
    "scaled": "#a6438a",
}
INK, FAINT, PANEL = "#1b1f24", "#8b949e", "#fefefe"
# What stands for each of these colours in a page: its style sheet has a light and a dark value.
VARIABLES = {
    INK: "var(--ink)",
    FAINT: "var(--faint)",
    PANEL: "var(--panel)",
    **{color: f"var(--{key})" for key, color in COLOR.items()},
}
