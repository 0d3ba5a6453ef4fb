"""The documentation is true: its Python runs, its commands parse, its links lead somewhere.

A page is one program: its ```python blocks run in order, in one namespace, in an empty folder. Set-up that would bore
the reader may stand in an HTML comment around a block. A block that cannot run is ```python no-run, and the line before
it says why: <!-- no-run: needs two GPUs -->. Commands stand in ```console blocks.
"""

import re
import runpy
import shlex
import textwrap
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", ROOT / "CHANGELOG.md", ROOT / "CONTRIBUTING.md", *sorted(ROOT.glob("docs/**/*.md"))]
REASON = re.compile(r"<!-- no-run: .{8,} -->")
LINK = re.compile(r"\]\(([^)\s]+)[^)]*\)|(?:src|href)=\"([^\"]+)\"|^\[[^\]]+\]: (\S+)", re.MULTILINE)
INSTEAD = dict.fromkeys(("py", "python3", "pycon"), "python") | dict.fromkeys(("bash", "sh", "shell"), "console")


def each_page() -> pytest.MarkDecorator:
    return pytest.mark.parametrize("page", PAGES, ids=[page.relative_to(ROOT).as_posix() for page in PAGES])


# ---- reading a page


@dataclass(frozen=True)
class Block:
    """A fenced block: what stands after the fence, its lines, where they begin (from 1), the line before the fence."""

    info: str
    lines: tuple[str, ...]
    first_line: int
    before: str


def blocks(text: str) -> Iterator[Block]:
    """The fenced blocks of a page in order; a fence that is never closed is an error."""
    lines, start, fence = text.splitlines(), 0, ""
    for number, line in enumerate(lines, 1):
        stripped = line.strip()
        if not fence and (opening := re.match(r"(`{3,})[^`]*$", stripped)):
            start, fence = number, opening.group(1)
        elif fence and stripped == fence:
            info = lines[start - 1].strip().lstrip("`").strip()
            code = textwrap.dedent("\n".join(lines[start : number - 1])).splitlines()
            yield Block(info, tuple(code), start + 1, lines[start - 2] if start > 1 else "")
            fence = ""
    if fence:
        raise ValueError(f"the fence on line {start} is never closed")


def program(text: str) -> str:
    """The page as a program: its python blocks on the lines where they stand, every other line empty."""
    lines = [""] * len(text.splitlines())
    for block in blocks(text):
        if block.info == "python":
            lines[block.first_line - 1 : block.first_line - 1 + len(block.lines)] = block.lines
    return "\n".join(lines) + "\n"


def prose(text: str) -> str:
    """The page without its fenced blocks and inline code."""
    text = re.sub(r"^\s*(`{3,})[^\n]*\n.*?^\s*\1\s*$", "", text, flags=re.MULTILINE | re.DOTALL)
    return re.sub(r"`[^`\n]*`", "", text)


# ---- checking a page


def run_page(name: str, text: str, folder: Path) -> None:
    """Run the page's program; a traceback shows the page's own line numbers."""
    path = folder / f"{name}.py"
    path.write_text(program(text), encoding="utf-8")
    runpy.run_path(str(path), run_name="docs_page")


def unfit_blocks(text: str) -> Iterator[str]:
    """One sentence for every block that nothing would check."""
    for block in blocks(text):
        language, _, options = block.info.partition(" ")
        if language in INSTEAD:
            yield f"line {block.first_line}: write {INSTEAD[language]} instead of {language}, so that it is checked"
        elif language == "python" and options not in ("", "no-run"):
            yield f"line {block.first_line}: python is followed by nothing or by no-run, got {options!r}"
        elif options == "no-run" and not REASON.fullmatch(block.before.strip()):
            yield f"line {block.first_line}: the line before a no-run block says why: <!-- no-run: needs ... -->"
        elif language == "console" and not any(line.startswith("$ ") for line in block.lines):
            yield f"line {block.first_line}: a command in a console block begins with a dollar sign and a space"
        elif options == "no-run":
            compile("\n".join(block.lines), f"block on line {block.first_line}", "exec")


def commands(text: str) -> list[list[str]]:
    """The words of every command in a page's console blocks: lines after `$ `, joined at a backslash."""
    found = []
    for block in blocks(text):
        if block.info != "console":
            continue
        joined = re.sub(r"\\\n\s*", " ", "\n".join(block.lines))
        for line in joined.splitlines():
            if line.startswith("$ "):
                found.append(shlex.split(line[2:], comments=True))
    return found


def wrong_command(words: list[str]) -> str | None:
    """Why this command cannot work, as far as that shows without running it; None if nothing speaks against it."""
    program_name, *arguments = words
    if program_name == "macrobatch":
        return wrong_macrobatch(arguments)
    if program_name == "make":
        targets = set(re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), flags=re.MULTILINE))
        unknown = {word for word in arguments if "=" not in word} - targets
        return f"unknown targets of make: {sorted(unknown)}" if unknown else None
    if program_name == "python" and arguments[:1] and arguments[0].endswith(".py"):
        return None if (ROOT / arguments[0]).exists() else f"no such file: {arguments[0]}"
    return None


def wrong_macrobatch(arguments: list[str]) -> str | None:
    """What the command line's own parser says against these arguments; nothing is run."""
    from typer.main import get_command

    from macrobatch.cli import app

    group = get_command(app)
    if not arguments or arguments[0].startswith("-"):
        command, options = group, arguments
    else:
        command, options = getattr(group, "commands", {}).get(arguments[0]), arguments[1:]
    if command is None:
        return f"unknown subcommand: {arguments[0]}"
    try:
        command.make_context("macrobatch", list(options))
    except Exception as error:  # the parser's own class, which typer keeps private
        return None if "--help" in options else f"{type(error).__name__}: {getattr(error, 'message', error)}"
    return None


def slug(heading: str) -> str:
    """The anchor that a heading gets on the usual hosts."""
    return re.sub(r"[^\w\- ]", "", heading.strip().lower()).replace(" ", "-")


def dead_links(page: Path, text: str) -> Iterator[str]:
    """Every link inside the project that leads nowhere."""
    for target in ("".join(groups) for groups in LINK.findall(prose(text))):
        if re.match(r"[a-z]+:", target):
            continue
        path, _, anchor = target.partition("#")
        goal = (page.parent / path) if path else page
        if goal != page and not goal.exists():
            yield f"{target}: no such file"
        elif anchor and goal.suffix == ".md":
            goal_text = text if goal == page else goal.read_text(encoding="utf-8")
            if anchor not in {slug(line) for line in re.findall(r"^#+ (.*)$", goal_text, flags=re.MULTILINE)}:
                yield f"{target}: no such heading"


# ---- the claims


@each_page()
def test_the_code_of_the_page_runs(page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    run_page(page.stem, page.read_text(encoding="utf-8"), tmp_path)


@each_page()
def test_every_block_of_the_page_is_checked_or_says_why_not(page: Path) -> None:
    assert list(unfit_blocks(page.read_text(encoding="utf-8"))) == []


@each_page()
def test_the_commands_of_the_page_parse(page: Path) -> None:
    found = {shlex.join(words): wrong_command(words) for words in commands(page.read_text(encoding="utf-8"))}
    assert {command: why for command, why in found.items() if why} == {}


@each_page()
def test_the_links_of_the_page_lead_somewhere(page: Path) -> None:
    assert list(dead_links(page, page.read_text(encoding="utf-8"))) == []


def test_every_page_is_listed_in_the_contents() -> None:
    contents = (ROOT / "docs" / "README.md").read_text(encoding="utf-8")
    pages = [page.relative_to(ROOT / "docs").as_posix() for page in PAGES if page.is_relative_to(ROOT / "docs")]
    missing = [page for page in pages if page != "README.md" and f"]({page})" not in contents]
    assert not missing, f"link these pages from docs/README.md: {missing}"


# ---- controls

PAGE = """# A page

```python
three = 3
```

Between them, prose.

- In a list:

  ```python
  assert three == {value}
  ```
"""


def test_a_block_sees_the_names_of_the_one_before_it(tmp_path: Path) -> None:
    run_page("page", PAGE.format(value=3), tmp_path)


def test_a_broken_block_fails_on_its_own_line(tmp_path: Path) -> None:
    with pytest.raises(AssertionError) as error:
        run_page("page", PAGE.format(value=4), tmp_path)
    assert error.traceback[-1].lineno + 1 == 12


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ("```py\nx\n```", "write python instead"),
        ("```bash\nls\n```", "write console instead"),
        ("```python no-run\nx\n```", "says why"),
        ("<!-- no-run: -->\n```python no-run\nx\n```", "says why"),
        ("```console\nmake test\n```", "begins with a dollar sign"),
        ("```python skip\nx\n```", "nothing or by no-run"),
    ],
)
def test_a_block_that_nothing_checks_is_found(text: str, complaint: str) -> None:
    assert [complaint in sentence for sentence in unfit_blocks(text)] == [True]


def test_a_reason_lets_a_block_not_run_but_it_must_still_compile() -> None:
    text = "<!-- no-run: needs two GPUs -->\n```python no-run\n{code}\n```"
    assert list(unfit_blocks(text.format(code="missing_name"))) == []
    with pytest.raises(SyntaxError):
        list(unfit_blocks(text.format(code="this is no Python")))


def test_a_fence_that_is_never_closed_is_an_error() -> None:
    with pytest.raises(ValueError, match="fence on line 2 is never closed"):
        list(blocks("text\n```python\nx = 1\n"))


def test_commands_are_read_with_their_continuations_and_without_their_output() -> None:
    text = "```console\n$ make demo  # three minutes\nsome output\n$ macrobatch train \\\n    --task digits\n```"
    assert commands(text) == [["make", "demo"], ["macrobatch", "train", "--task", "digits"]]


@pytest.mark.parametrize(
    ("command", "complaint"),
    [
        ("make coffee", "coffee"),
        ("python examples/missing.py", "no such file"),
        ("macrobatch brew", "unknown subcommand"),
        ("macrobatch train --no-such-option", "no-such-option"),
        ("macrobatch train --batch-size many", "whole number"),
    ],
)
def test_a_wrong_command_is_found(command: str, complaint: str) -> None:
    assert complaint in (wrong_command(command.split()) or "")


@pytest.mark.parametrize("command", ["make PYTHON=python3.12 test", "macrobatch --help", "macrobatch train --help"])
def test_a_right_command_is_left_alone(command: str) -> None:
    assert wrong_command(command.split()) is None


@pytest.mark.parametrize(
    ("text", "dead"),
    [
        ("[a](missing.md)", ["missing.md: no such file"]),
        ("# One Heading\n[a](#one-heading) [b](#another)", ["#another: no such heading"]),
        ('<img src="missing.png">', ["missing.png: no such file"]),
        ("[a]: missing.md", ["missing.md: no such file"]),
        ("[a](README.md#contents) [b](https://example.org/x) `[c](missing.md)`\n```text\n[d](missing.md)\n```", []),
    ],
)
def test_a_dead_link_is_found(text: str, dead: list[str]) -> None:
    assert list(dead_links(ROOT / "docs" / "page.md", text)) == dead
