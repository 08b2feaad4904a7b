"""The house: what imports what. No arrow runs upward, and nothing in plumbing/ knows the method."""

import ast
import re
import sys
import tomllib
from pathlib import Path

ROOT = Path(__file__).parent.parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
FOLDERS = {path.parent.name for path in ROOT.glob("*/__init__.py")}
ROOMS = {path.stem for path in ROOT.glob("*.py")} | FOLDERS
FLOORS = [  # a room imports from floors below its own; a folder also from itself
    "plumbing worlds",
    "speed pool",
    "similarity prompt",
    "reward policy config rollout",
    "evaluation",
    "grace eval_mteb_subset",
]


def files(room):
    return sorted((ROOT / room).glob("*.py")) if room in FOLDERS else [ROOT / f"{room}.py"]


def imported(path):
    """The modules, by their first name, that a file imports at its top or inside a function."""
    nodes = list(ast.walk(ast.parse(path.read_text(encoding="utf-8"))))
    names = [alias.name for node in nodes if isinstance(node, ast.Import) for alias in node.names]
    names += [node.module for node in nodes if isinstance(node, ast.ImportFrom) and not node.level]
    return {name.split(".")[0] for name in names}


def test_plumbing_knows_nothing_of_the_method():
    dependencies = {re.match(r"\w+", name)[0] for name in PROJECT["project"]["dependencies"]}
    for path in files("plumbing"):
        assert imported(path) <= {"plumbing"} | dependencies | sys.stdlib_module_names, path.name


def test_no_arrow_runs_upward():
    below = set()
    for floor in map(str.split, FLOORS):
        for room in floor:
            for path in files(room):
                assert imported(path) & ROOMS <= below | ({room} & FOLDERS), path.relative_to(ROOT)
        below |= set(floor)
    assert below == ROOMS, "each room needs a floor"


def test_few_files_at_the_root():
    assert len(list(ROOT.glob("*.py"))) <= 10
    for folder in FOLDERS:  # each says why it is there
        assert ast.get_docstring(ast.parse((ROOT / folder / "__init__.py").read_text(encoding="utf-8"))), folder


def test_everything_needed_is_installed():
    """By `pip install .`: a module that pyproject.toml forgets is missing only there."""
    settings = PROJECT["tool"]["setuptools"]
    installed = {*settings["py-modules"], *settings["packages"]}
    assert all(imported(path) & ROOMS <= installed for room in installed for path in files(room))
    assert "grace" in installed and installed <= ROOMS
