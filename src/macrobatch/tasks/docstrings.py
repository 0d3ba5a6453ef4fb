"""Pairs of a function's docstring and its source without it, from the Python files of a folder."""

import ast
import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

HELD_OUT_SHARE = 0.2  # of the modules
FEWEST_WORDS = 4  # in a docstring: shorter ones fit many functions


@dataclass(frozen=True)
class Pair:
    """The first paragraph of a function's docstring, and its source without the docstring; `module`: its file."""

    docstring: str
    source: str
    module: str


def pairs_of(root: Path, files: Sequence[Path]) -> tuple[list[Pair], list[Pair]]:
    """The pairs of all files, relative to `root`: those to train on, and those of held-out modules.

    A module is held out by a hash of its path, whatever other modules there are. A docstring that came before is left
    out, so that every docstring has one function.
    """
    train: list[Pair] = []
    held_out: list[Pair] = []
    seen: set[str] = set()
    for path in files:
        text = (root / path).read_text(encoding="utf-8", errors="replace")
        for docstring, source in functions_in(text):
            words = docstring.lower().split()
            if len(words) >= FEWEST_WORDS and (key := " ".join(words)) not in seen:
                seen.add(key)
                (held_out if is_held_out(path) else train).append(Pair(docstring, source, path.as_posix()))
    return train, held_out


def functions_in(text: str) -> Iterator[tuple[str, str]]:
    """(first paragraph of the docstring, source without docstring) of each function that has one; none if no Python."""
    try:
        tree = ast.parse(text)
    except (SyntaxError, ValueError):
        return
    lines = text.splitlines()
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) and (docstring := ast.get_docstring(node)):
            first = node.body[0]
            rest = lines[node.lineno - 1 : first.lineno - 1] + lines[first.end_lineno : node.end_lineno]
            yield docstring.split("\n\n")[0], "\n".join(rest)


def is_held_out(path: Path) -> bool:
    """Whether a module is for validation: decided by a hash of its relative path."""
    digest = hashlib.sha256(f"pairs {path.as_posix()}".encode()).digest()
    return int.from_bytes(digest[:8], "big") < HELD_OUT_SHARE * 2**64
