"""The pages lead to code: every name, flag, link and test in them exists, and both recipes have the values that they say."""

import dataclasses
import importlib
import re
import shlex
from pathlib import Path
from pkgutil import resolve_name

import pytest

import config
from experiments.runs import TABLES
from prompt import Reading

ROOT = Path(__file__).parent.parent
FILES = ROOT / "README.md", *sorted(ROOT.glob("docs/*.md")), *sorted(ROOT.glob("course/*.md"))
COMPANION = (ROOT / "docs" / "companion.md").read_text(encoding="utf-8")
ROOMS = {path.stem for path in ROOT.glob("*.py")} | {path.parent.name for path in ROOT.glob("*/*.py")}
SUFFIXES = "py", "md", "sh", "txt", "png", "zip", "html", "json", "jsonl", "sqlite", "pt", "safetensors"


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.name)
def test_names_flags_and_links(path):
    text = path.read_text(encoding="utf-8")
    names = {span for span in re.findall(r"`([^`\n]+)`", text) if re.fullmatch(r"[a-z]\w*(\.[A-Za-z_]\w*)+", span)}
    for name in re.findall(r"(?<![\w/.])[a-z_]+(?:\.[A-Za-z_]\w*)+", text):  # in pictures and in code, too
        names |= {name} if name.split(".")[0] in ROOMS else set()
    for name in names:
        if name.rpartition(".")[2] not in SUFFIXES and path.parent.name != "course":  # there they are students' variables
            resolve_name(re.sub(r"^config\.(?=[a-z])", "config.Config.", name))
    known = {"--standalone", "--nproc-per-node"}  # torchrun's
    known |= {sign + field.name.replace("_", "-") for field in dataclasses.fields(config.Config) for sign in ("--", "--no-")}
    for script in (*ROOT.glob("*.py"), *ROOT.glob("[a-z]*/*.py")):  # not those of .venv
        known |= set(re.findall(r'add(?:_argument)?\("(--[a-z-]+)"', script.read_text(encoding="utf-8")))
    assert set(re.findall(r"(?<![\w-])--[a-z][a-z-]*", text)) <= known
    for target in re.findall(r"\]\(([^)#]+)[^)]*\)", text):
        assert target.startswith("https://") or (path.parent / target).exists(), target


def test_commands_select_tests():
    """Each word of `-k "this or that"` has to stand in a test's name."""
    pages = "".join(path.read_text(encoding="utf-8") for path in FILES)
    commands = re.findall(r'bash test\.sh (tests/\w+\.py) -k (?:"([^"]+)"|(\w+))', pages)
    assert len(commands) > 30
    for path, quoted, word in commands:
        tests = dir(importlib.import_module(Path(path).stem))  # those that it takes from the course, too
        for part in (quoted or word).split(" or "):
            assert any(name.startswith("test_") and part in name for name in tests), f"{path} -k {part}"


def test_every_equation_and_experiment_has_a_row():
    assert {int(number) for number in re.findall(r"^\| (\d+) \|", COMPANION, flags=re.M)} == {*range(7, 22), 28}
    rows = re.findall(r"^\| (?:–|Tables? .*?|Figure .) \| (`.*?`) \|", COMPANION, flags=re.M)
    assert sorted(name for row in rows for name in re.findall(r"\w+", row)) == sorted(TABLES)
    assert set(re.findall(r"experiments/run\.py (\w+)", COMPANION)) <= {"NAME", *TABLES}


def test_values_of_flags_and_of_both_recipes():
    for span in re.findall(r"`(--[a-z-]+ [^`]+)`", COMPANION):
        config.parse(shlex.split(span), "")
    rows = re.findall(r"^\| [^|]+ \| `--([a-z-]+)` \| [^|]+ \| ([^|]+) \| ([^|]+) \|", COMPANION, flags=re.M)
    rows = {name.replace("-", "_"): cells for name, *cells in rows}
    assert rows.keys() >= config.RECIPES["paper"].keys() | config.RECIPES["full"].keys()
    for i, recipe in enumerate(("paper", "full")):
        given = config.Config(recipe=recipe, device="cpu")
        for name, cells in rows.items():
            value = getattr(given, name) if getattr(given, name) is not None else getattr(Reading(), name)
            right = cells[i] == ("off", "on")[value] if isinstance(value, bool) else type(value)(cells[i]) == value
            assert right, f"--{name}: {recipe} has {value}"
