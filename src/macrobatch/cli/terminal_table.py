"""A comparison as tables on a terminal: as many ways side by side as there is room for, no number broken in two."""

import textwrap
from dataclasses import dataclass
from itertools import accumulate

from rich.box import SIMPLE_HEAD
from rich.console import Group
from rich.table import Table

from macrobatch.cli.comparison import Comparison
from macrobatch.cli.report import rows
from macrobatch.structure import even_sizes

GAPS = (2, 1)  # characters between two columns: the first that will do
PROSE = 14  # characters of a line in a name, or in a cell of words


@dataclass(frozen=True)
class Column:
    """A way: its name and its cells, in lines that are not broken again."""

    name: str
    cells: list[str]

    @property
    def width(self) -> int:
        """Characters in its longest line."""
        return max(len(line) for text in (self.name, *self.cells) for line in text.splitlines())


def terminal_table(comparison: Comparison, width: int) -> Group:
    """The rows of a comparison, `width` characters wide: in one table, or in several below one another."""
    table_rows = rows(comparison)
    labels = [label for label, _ in table_rows]
    columns = [
        Column(textwrap.fill(result.way.name, PROSE), [_lines(cells[number]) for _, cells in table_rows])
        for number, result in enumerate(comparison.results.values())
    ]
    gap, parts = _parts(columns, width - max(map(len, labels)))
    tables = [_table(labels, part, gap) for part in parts]
    tables[0].title = f"{comparison.task}: {comparison.samples:,} samples"
    return Group(*tables)


def _lines(cell: str) -> str:
    """Words may be broken; what begins with a number may not."""
    return textwrap.fill(cell, PROSE) if cell[:1].isalpha() else cell


def _parts(columns: list[Column], room: int) -> tuple[int, list[list[Column]]]:
    """A gap, and the columns in as few parts of even length as fit into the room with it, or one by one."""
    for count in range(1, len(columns) + 1):
        parts = _split(columns, count)
        for gap in GAPS:
            if all(sum(gap + column.width for column in part) <= room for part in parts):
                return gap, parts
    return GAPS[-1], parts


def _split(columns: list[Column], count: int) -> list[list[Column]]:
    sizes = even_sizes(len(columns), -(-len(columns) // count))
    ends = list(accumulate(sizes))
    return [columns[end - size : end] for end, size in zip(ends, sizes, strict=True)]


def _table(labels: list[str], columns: list[Column], gap: int) -> Table:
    table = Table(box=SIMPLE_HEAD, padding=(0, 0, 0, gap - 1), pad_edge=False, show_edge=False)
    table.add_column("", no_wrap=True, vertical="bottom")
    for column in columns:
        table.add_column(column.name, justify="right", vertical="bottom")
    for row in zip(labels, *(column.cells for column in columns), strict=True):
        table.add_row(*row)
    return table
