"""What holds for all files: their size, and the order in which they import each other."""

import ast
import pathlib
import re
import subprocess

import pytest

from mtpd_jax import config
from tests.mutation.run import load

ROOT = pathlib.Path(__file__).parents[1]
# What stands further down may import what stands further up.
ORDER = (
    "shapes", "validation", "fields", "config", "editing", "reference", "platform", "sharding", "data", "model",
    "losses", "methods", "training", "decoding", "interop", "runs", "evaluation", "run", "session", "conversion",
    "corpora", "trainer", "dry_run", "frontdoor",
)  # fmt: skip
COMMANDS = ("train", "generate", "evaluate", "convert", "corpus")
LIBRARY = sorted((ROOT / "mtpd_jax").rglob("*.py"))
FILES = [path for top in ("mtpd_jax", "experiments", "configs", "tests") for path in sorted((ROOT / top).rglob("*.py"))]


def room(path):
    return path.relative_to(ROOT / "mtpd_jax").parts[0].removesuffix(".py")


def imported(path):
    """Names of this project's modules that a file imports, anywhere in it, below the package's name."""
    for node in ast.walk(ast.parse(path.read_text())):
        names = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert not node.level, f"{path}: a relative import"
            modules = node.module == "mtpd_jax"
            names = [f"{node.module}.{alias.name}" for alias in node.names] if modules else [node.module]
        for name in names:
            if name.split(".")[0] in ("mtpd_jax", "experiments", "configs", "tests"):
                yield name


@pytest.mark.parametrize("path", LIBRARY, ids=lambda path: str(path.relative_to(ROOT)))
def test_imports_go_one_way(path):
    own = room(path)
    for name in imported(path):
        top, *below = name.split(".")
        assert top == "mtpd_jax", f"{path} imports {name}: the library stands alone"
        if own in COMMANDS or own == "__init__":
            continue
        assert below[0] not in COMMANDS, f"{path} imports a command"
        assert ORDER.index(below[0]) <= ORDER.index(own), f"{path} imports {name}"


def test_every_room_has_its_place_in_the_order():
    assert {room(path) for path in LIBRARY} == {*ORDER, *COMMANDS, "__init__"}


def test_files_and_functions_are_short():
    long = [f"{path}: {len(path.read_text().splitlines())} lines" for path in FILES if _lines(path) > 400]
    for path in FILES:
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.FunctionDef) and node.end_lineno - node.lineno >= 60:
                long.append(f"{path}: {node.name} has {node.end_lineno - node.lineno + 1} lines")
    assert not long


def _lines(path):
    return len(path.read_text().splitlines())


def test_what_runs_where_is_asked_of_the_mesh():
    """Not of the machine at hand; and only one table knows the mesh's axes."""
    for path in LIBRARY:
        text = path.read_text()
        assert "default_backend" not in text, path
        words = {node.value for node in ast.walk(ast.parse(text)) if isinstance(node, ast.Constant)}
        assert room(path) in ("sharding", "config") or not words & {"fsdp", "tensor", "expert"}, path


def test_tables_are_made_in_one_place():
    """Which sees to it that nothing in them is cut off."""
    made = re.compile(r"= rich\.table\.Table\(|\(rich\.table\.Table\)")
    makers = [path.relative_to(ROOT) for path in FILES if made.search(path.read_text())]
    assert [str(path) for path in makers if path.name != "test_house.py"] == ["mtpd_jax/evaluation/report.py"]


def test_imports_by_name_are_those_of_the_cases():
    """One goes up, and only when a config is built: to where methods and sources of text stand with their sections.

    And the package's own names are imported when they are asked for.
    """
    assert [room(path) for path in LIBRARY if "importlib.import_module" in path.read_text()] == ["__init__", "config"]
    assert config._CASES == ("mtpd_jax.data", "mtpd_jax.methods")


def test_the_root_holds_what_it_should():
    found = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True)
    if found.returncode:
        pytest.skip("not a checkout")
    tops = {line.split("/")[0] for line in found.stdout.splitlines()}
    assert tops <= {
        ".ci", ".github", ".gitignore", "CHANGELOG.md", "CITATION.cff", "CONTRIBUTING.md", "LICENSE", "Makefile",
        "README.md", "configs", "docs", "experiments", "mkdocs.yml", "mtpd_jax", "notebooks", "pyproject.toml",
        "requirements.txt", "scripts", "tests",
    }  # fmt: skip


def test_every_fault_that_is_tried_can_be_made():
    """What a mutant replaces stands in its file, once: code that was written anew takes its mutants along."""
    for mutant in load():
        assert (ROOT / mutant.file).read_text().count(mutant.old) == 1, mutant.name
