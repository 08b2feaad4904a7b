"""The house: what imports what. It is what README shows, without circles: nothing in plumbing/ knows the method.

`python tests/test_layout.py` prints the picture of it that README shows.
"""

import ast
import functools
import graphlib
import tomllib
from pathlib import Path

ROOT = Path(__file__).parent.parent
FOLDERS = {path.parent.name for path in ROOT.glob("*/__init__.py")}
ROOMS = {path.stem for path in ROOT.glob("*.py")} | FOLDERS


def files(room):
    return sorted((ROOT / room).glob("*.py")) if room in FOLDERS else [ROOT / f"{room}.py"]


@functools.cache
def imported(path):
    """The modules that a file imports at its top or inside a function, and what it imports from them: `{"a", "a.b"}`."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and not node.level:
            names |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
    return names


def rooms(path):
    """The rooms that a file imports from."""
    return {name.split(".")[0] for name in imported(path)} & ROOMS


def picture():
    """The imports between rooms as a Mermaid graph, without arrows that a longer way implies."""
    graph = {room: set().union(*map(rooms, files(room))) - {room} for room in sorted(ROOMS)}
    below = {}
    for room in graphlib.TopologicalSorter(graph).static_order():
        below[room] = graph[room].union(*(below[other] for other in graph[room]))
    box = lambda room: f'{room}["{room}/"]' if room in FOLDERS else f'{room}["{room}.py"]'
    lines = ["```mermaid", "graph TD"]
    for room, others in graph.items():
        if needed := [box(b) for b in sorted(others) if not any(b in below[other] for other in others)]:
            lines.append(f"  {box(room)} --> {' & '.join(needed)}")
    return "\n".join([*lines, "```"])


def test_readme_shows_it():
    assert picture() in (ROOT / "README.md").read_text(encoding="utf-8"), "python tests/test_layout.py prints the new one"


def test_no_circles():
    """Among all files, those of experiments/ and bench/ too, which import each other by their bare names."""
    modules = {path.relative_to(ROOT).with_suffix("").as_posix().replace("/", "."): path for path in ROOT.glob("*/*.py")}
    modules |= {path.stem: path for path in ROOT.glob("*.py")}
    graph = {}
    for name, path in modules.items():
        beside = f"{path.parent.name}." if path.parent.name not in FOLDERS and path.parent != ROOT else ""
        graph[name] = ({beside + x for x in imported(path)} | imported(path)) & modules.keys() - {name}
    graphlib.TopologicalSorter(graph).prepare()  # raises CycleError, which names the circle


def test_everything_needed_is_installed():
    """By `pip install .`: a module that pyproject.toml forgets is missing only there."""
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["tool"]["setuptools"]
    installed = {*settings["py-modules"], *settings["packages"]}
    assert "grace" in installed and installed <= ROOMS
    assert all(rooms(path) <= installed for room in installed for path in files(room))


if __name__ == "__main__":
    print(picture())
