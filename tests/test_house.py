"""The house stays in order: layers, a light import, documented names, one word for each thing, short modules."""

import ast
import inspect
import json
import re
import subprocess
import sys
import tomllib
from collections.abc import Iterator, Mapping
from importlib import metadata
from pathlib import Path
from typing import Any

import pytest

import macrobatch

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "src" / "macrobatch"

# A module imports only from levels above its own line: strictly downward in the architecture, never sideways.
# A folder (cli, tasks, integrations) is one entry; inside it imports are free. A new module must be entered here.
LEVELS = (
    # L0 values
    ("modules",),
    (
        "callers",
        "containers",
        "distributed",
        "engine",
        "gradients",
        "leaves",
        "unscaling",
        "sizing",
        "untouched",
        "storages",
        "signatures",
        "speed",
        "moments",
        "lanczos",
    ),
    ("samples",),
    ("structure", "memory", "substitution", "batch_tradeoff"),
    ("devices", "autocasting"),
    ("state",),
    # normalising over a window: decision 0004
    ("strands", "offload", "norm_calls", "norm_conversion", "coupling", "joint_norm"),
    ("meeting", "pooled_norm"),
    ("lockstep",),
    ("batch", "budget", "prediction", "gathering", "replay", "aligned_random"),
    ("weighting", "recording", "size_plans", "row_order", "window_kind"),
    ("sums",),
    ("criteria", "tally", "reductions", "rehearsal", "update_memory"),
    ("report",),
    ("recovery", "measuring", "seeds", "moment_average"),
    ("call_notes",),
    ("fitting", "auto_size"),
    # What a size needs is known before anything runs, so it stands below what runs: decision 0002.
    ("checkpointing",),
    ("arguments", "recipe"),
    ("planning",),
    ("searching", "grouping"),
    ("intake",),
    ("scheduled_batches",),
    # L1 mechanism
    ("window_pass",),
    ("alignment",),
    ("ways",),
    ("accumulator", "loops", "update"),
    ("row_blocks", "gathered_forward"),
    ("gathered_loss", "gathered_backward", "gathered_pairs"),
    ("gathered_window", "gathered_options", "graph_budget", "slope"),
    ("epoch", "per_example", "hessian"),
    # What scaling_rules and warmup stand on.
    ("rule_table",),
    ("scaling_families", "schedulers", "outliers", "snapshots"),
    ("scaling_changes", "saving", "spike_rates", "spike_values"),
    ("spike_options", "spike_history"),
    # L2 policies: one level, so that they never import one another
    (
        *("scaling_rules", "warmup", "schedule", "noise", "adascale", "invariant_adam", "spikes"),
        *("batchnorm", "contrastive", "packing", "sharpness", "sam", "verify"),
    ),
    ("__init__",),
    # L3 edges
    ("tasks", "integrations"),
    ("cli",),
    ("__main__",),
)
LEVEL_OF = {entry: level for level, entries in enumerate(LEVELS) for entry in entries}
# Values that are explained where they are used: on the page of another module.
PAGE_OF = {
    "report": "accumulator",
    "criteria": "weighting",
    "structure": "batch",
    "grouping": "batch",
    "warmup": "scaling_rules",
    "row_blocks": "contrastive",
}
PAGE_OF |= {"moments": "noise", "batch_tradeoff": "noise", "per_example": "noise"}
PAGE_OF |= {"spike_values": "spikes", "outliers": "spikes"}
EDGES = ("tasks", "integrations", "cli")  # need extras: never re-exported by the package

# `.chunk(` is torch's own method.
AVOID = {
    r"mini-?batch|physical[ -]batch|virtual[ -]batch|(?<![A-Za-z.])chunk": "micro-batch, batch or effective batch",
    r"mini-?step": "micro-batch",
    r"(?<!power )\biterations?\b": "update, micro-batch or epoch",
}
SPEAKS_OF_WORDS = ("tests/test_house.py", "docs/glossary.md")
TEXT_SUFFIXES = {".py", ".md", ".toml", ".txt", ".html", ".jinja", ".j2", ".css", ".js", ".json", ".jsonl", ""}
MACHINE_PATH = re.compile(r"(?<![\w.])/(?:home|root|work|Users|opt|mnt|tmp)/\w")


def text_files() -> dict[str, str]:
    """Every text file of the project, by its path from the root: what a clean clone holds."""
    folders = ("src", "tests", "docs", "examples", "benchmarks", ".ci")
    paths = [path for folder in folders for path in (ROOT / folder).rglob("*")]
    paths += [*ROOT.glob("*.md"), *ROOT.glob("*.toml"), *ROOT.glob("*.txt"), ROOT / "Makefile"]
    return {
        path.relative_to(ROOT).as_posix(): path.read_text(encoding="utf-8")
        for path in sorted(paths)
        if path.is_file() and path.suffix in TEXT_SUFFIXES and "__pycache__" not in path.parts
    }


def sources() -> dict[str, str]:
    """Module name, dotted, to source, for every module of the package; `macrobatch` itself is its `__init__`."""
    return {_module_name(path): path.read_text(encoding="utf-8") for path in sorted(PACKAGE.rglob("*.py"))}


def _module_name(path: Path) -> str:
    parts = ("macrobatch", *path.relative_to(PACKAGE).with_suffix("").parts)
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def entry_of(module: str) -> str:
    """The entry of `LEVELS` that a dotted module name belongs to: `macrobatch.cli.plots` belongs to `cli`."""
    return [*module.split("."), "__init__"][1]


# ---- layers


def imported_modules(module: str, source: str, *, is_package: bool = False) -> Iterator[tuple[int, str]]:
    """Line and dotted name of every module of this package that `source` imports, wherever in the file it does so."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            parents = module.split(".")[: len(module.split(".")) - node.level + is_package] if node.level else []
            base = ".".join([*parents, *([node.module] if node.module else [])])
            # `from macrobatch import batch` imports a module, `from macrobatch import Window` the package's name
            names = [
                f"{base}.{alias.name}" if base == "macrobatch" and alias.name in LEVEL_OF else base
                for alias in node.names
            ]
        else:
            continue
        yield from ((node.lineno, name) for name in names if name.split(".")[0] == "macrobatch")


def upward_imports(modules: Mapping[str, str]) -> list[str]:
    """One sentence for every import that does not go strictly downward."""
    found = []
    for module, source in modules.items():
        above, is_package = entry_of(module), any(other.startswith(f"{module}.") for other in modules)
        for line, name in imported_modules(module, source, is_package=is_package):
            below = entry_of(name)
            if above != below and LEVEL_OF[below] >= LEVEL_OF[above]:
                found.append(f"{module} line {line} imports {name}, which is not below it")
    return found


def test_every_module_has_its_place_in_the_layers() -> None:
    missing = {entry_of(module) for module in sources()} - LEVEL_OF.keys()
    assert not missing, f"enter these modules in LEVELS, at the level where they belong: {sorted(missing)}"


def test_imports_go_strictly_downward() -> None:
    assert upward_imports(sources()) == []


@pytest.mark.parametrize(
    ("module", "line"),
    [
        ("macrobatch.batch", "from macrobatch.accumulator import Report"),
        ("macrobatch.noise", "import macrobatch.spikes"),
        ("macrobatch.noise", "from macrobatch import spikes"),
        ("macrobatch.noise", "from . import spikes"),
        ("macrobatch.noise", "from .spikes import detect"),
        ("macrobatch.noise", "from macrobatch import Window"),
        ("macrobatch.update", "def late():\n    from macrobatch.schedule import schedule"),
        ("macrobatch.tasks.digits", "from ..cli import main"),
        ("macrobatch", "from .cli import main"),
    ],
)
def test_a_planted_upward_import_is_caught(module: str, line: str) -> None:
    others = ("macrobatch", "macrobatch.noise", "macrobatch.tasks", "macrobatch.tasks.code")
    assert len(upward_imports(dict.fromkeys(others, "") | {module: line})) == 1


def test_downward_imports_and_those_inside_a_folder_are_free() -> None:
    package = "from .batch import Window"
    train = "import macrobatch as mb\nfrom macrobatch.tasks import code_lm\nfrom . import plots\nfrom .run import run"
    assert upward_imports({"macrobatch": package, "macrobatch.cli": "", "macrobatch.cli.train": train}) == []


# ---- importing

CHILD = """
import json, logging, os, random, sys, threading, warnings
import numpy, torch, torch.distributed

def settings():
    return {
        "threads": [torch.get_num_threads(), torch.get_num_interop_threads(), threading.active_count()],
        "dtype and device": [str(torch.get_default_dtype()), str(torch.get_default_device())],
        "process group": torch.distributed.is_available() and torch.distributed.is_initialized(),
        "random state": [hash(torch.get_rng_state().numpy().tobytes()), hash(random.getstate())],
        "environment": dict(os.environ),
        "warnings": [str(f) for f in warnings.filters],
        "logging": [str(handler) for handler in logging.getLogger().handlers],
    }

modules, before = set(sys.modules), settings()
exec(sys.argv[1])
after = settings()
report = {
    "modules": sorted({name.split(".")[0] for name in set(sys.modules) - modules}),
    "changed": [name for name in before if before[name] != after[name]],
}
with open(sys.argv[2], "w") as file:
    json.dump(report, file)
"""


def effects_of(statement: str, folder: Path) -> dict[str, Any]:
    """What `statement` does in a fresh process that already has torch and numpy.

    Returns the foreign packages it loads, the settings it changes and the text it prints.
    """
    report = folder / "report.json"
    command = [sys.executable, "-W", "error", "-c", CHILD, statement, str(report)]
    child = subprocess.run(command, capture_output=True, text=True, check=False, timeout=300)
    assert child.returncode == 0, child.stderr
    effects: dict[str, Any] = json.loads(report.read_text())
    at_home = sys.stdlib_module_names | {"macrobatch", "numpy"} | packages_of("torch")
    foreign = [name for name in effects["modules"] if name not in at_home]
    return {"foreign": foreign, "changed": effects["changed"], "printed": child.stdout + child.stderr}


def packages_of(distribution: str) -> set[str]:
    """Top-level packages of an installed distribution and of everything it requires."""
    wanted, seen = [distribution], set()
    while wanted:
        name = re.sub(r"[-_.]+", "-", wanted.pop()).lower()
        if name in seen:
            continue
        seen.add(name)
        try:
            requirements = metadata.requires(name) or []
        except metadata.PackageNotFoundError:
            continue
        wanted += [re.split(r"[^\w.-]", line)[0] for line in requirements if "extra ==" not in line]
    owners = metadata.packages_distributions().items()
    return {package for package, names in owners if seen & {re.sub(r"[-_.]+", "-", name).lower() for name in names}}


def test_importing_loads_torch_numpy_and_the_standard_library_only_and_does_nothing(tmp_path: Path) -> None:
    assert effects_of("import macrobatch", tmp_path) == {"foreign": [], "changed": [], "printed": ""}


def test_an_import_that_does_something_is_noticed(tmp_path: Path) -> None:
    statement = "import rich, torch; print('hello'); torch.set_num_threads(torch.get_num_threads() + 1); torch.rand(1)"
    effects = effects_of(statement, tmp_path)
    assert "rich" in effects["foreign"]
    assert effects["changed"] == ["threads", "random state"]
    assert effects["printed"] == "hello\n"


# ---- public names


def public_names() -> dict[str, str]:
    """Public name to the module of this package that it comes from, read off `__init__`."""
    tree = ast.parse((PACKAGE / "__init__.py").read_text(encoding="utf-8"))
    imports = [node for node in tree.body if isinstance(node, ast.ImportFrom)]
    return {a.asname or a.name: entry_of(f"{node.module}.{a.name}") for node in imports for a in node.names}


def test_the_package_reexports_its_public_names_and_nothing_else() -> None:
    assert sorted(macrobatch.__all__) == sorted(public_names())
    assert not set(public_names().values()) & set(EDGES), "names that need extras stay out of the package"


@pytest.mark.parametrize("name", sorted(public_names()))
def test_every_public_name_has_a_docstring(name: str) -> None:
    value = getattr(macrobatch, name)
    assert inspect.getdoc(value), f"macrobatch.{name} has no docstring"
    assert inspect.getdoc(value) != inspect.getdoc(type(value)), f"macrobatch.{name} only inherits its docstring"


@pytest.mark.parametrize("name", sorted(public_names()))
def test_every_public_name_is_explained_on_the_page_of_its_module(name: str) -> None:
    module = public_names()[name]
    page = ROOT / "docs" / f"{PAGE_OF.get(module, module)}.md"
    assert page.exists(), f"macrobatch.{name} needs the page docs/{page.name}"
    assert re.search(rf"`[^`\n]*\b{name}\b", page.read_text(encoding="utf-8")), f"docs/{page.name} never says `{name}`"


@pytest.mark.parametrize("edge", [edge for edge in EDGES if (PACKAGE / edge).exists()])
def test_every_edge_has_a_page(edge: str) -> None:
    assert (ROOT / "docs" / f"{edge}.md").exists()


# ---- words, lengths, machines


def words_to_avoid(text: str) -> list[str]:
    """One line for every word of `text` that has a better one in the glossary."""
    return [
        f"line {number}: {match.group()!r}, better: {better}"
        for number, line in enumerate(text.splitlines(), 1)
        for pattern, better in AVOID.items()
        for match in re.finditer(pattern, line, flags=re.IGNORECASE)
    ]


def test_each_thing_has_one_word() -> None:
    found = {name: words_to_avoid(text) for name, text in text_files().items() if name not in SPEAKS_OF_WORDS}
    assert {name: words for name, words in found.items() if words} == {}


@pytest.mark.parametrize("word", ["a minibatch", "mini-batches", "Virtual batch", "chunk_size", "a chunk", "iteration"])
def test_a_word_to_avoid_is_found(word: str) -> None:
    assert len(words_to_avoid(f"first line\n{word} here")) == 1
    assert words_to_avoid("micro-batch x.chunk(2) StopIteration, power iteration, and the window") == []


@pytest.mark.parametrize("module", sorted(sources()))
def test_modules_and_functions_are_short_enough_to_read(module: str) -> None:
    source = sources()[module]
    assert source.count("\n") <= 300, f"{module} has more than 300 lines: split it by purpose"
    functions = [n for n in ast.walk(ast.parse(source)) if isinstance(n, ast.FunctionDef | ast.AsyncFunctionDef)]
    long = {f.name: n for f in functions if f.end_lineno and (n := f.end_lineno - f.lineno + 1) > 60}
    assert not long, f"{module} has functions of more than 60 lines: {long}"


def test_examples_fit_on_a_page_or_two() -> None:
    lines = {name: text.count("\n") for name, text in text_files().items() if name.startswith("examples/")}
    assert {name: count for name, count in lines.items() if count > 80} == {}, "an example has at most 80 lines"


def test_no_file_names_a_place_on_one_machine() -> None:
    found = {name: MACHINE_PATH.findall(text) for name, text in text_files().items() if name != "tests/test_house.py"}
    assert {name: places for name, places in found.items() if places} == {}
    assert MACHINE_PATH.findall("see /home/me/project") == ["/home/m"]


def test_installation_takes_packages_from_wherever_the_reader_does() -> None:
    files = ("pyproject.toml", "constraints.txt", "Makefile", ".ci/run")
    found = {name: re.findall(r"\w+://|index-url|find-links", text_files()[name]) for name in files}
    assert not any(found.values()), found


def test_the_constraints_pin_every_dependency() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    lines = [*project["dependencies"], *(line for extra in project["optional-dependencies"].values() for line in extra)]
    wanted = {re.split(r"[^\w-]", line)[0].lower() for line in lines} - {"macrobatch"}
    pins = (ROOT / "constraints.txt").read_text(encoding="utf-8").lower().splitlines()
    assert wanted <= {line.split("==")[0] for line in pins}
    assert "torch==2.13.0" in pins
