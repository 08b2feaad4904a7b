"""The pages lead to code: every name, flag, link and test that they mention exists, and both recipes have the values they say."""

import dataclasses
import re
import shlex
from pathlib import Path
from pkgutil import resolve_name

import pytest

import config
from experiments.runs import TABLES
from prompt import Reading

ROOT = Path(__file__).parent.parent
PAGES = {path: path.read_text(encoding="utf-8") for path in (ROOT / "README.md", *ROOT.glob("docs/*.md"), *ROOT.glob("course/*.md"))}
COMPANION = PAGES[ROOT / "docs" / "companion.md"]
ROOMS = {path.stem for path in ROOT.glob("*.py")} | {path.parent.name for path in ROOT.glob("*/*.py")}
FLAG = r"(?<![\w-])--[a-z][a-z-]*"
each_page = pytest.mark.parametrize("text", PAGES.values(), ids=[str(path.relative_to(ROOT)) for path in PAGES])


@each_page
def test_names_resolve(text):
    """Dotted names in code spans, and, in pictures and code, those that begin with a file or folder of ours."""
    spans = {span for span in re.findall(r"`([^`\n]+)`", text) if re.fullmatch(r"[a-z]\w*(\.[A-Za-z_]\w*)+", span)}
    drawn = {name for name in re.findall(r"(?<![\w/.])[a-z_]+(?:\.[A-Za-z_]\w*)+", text) if name.split(".")[0] in ROOMS}
    for name in spans | drawn:
        if name.rpartition(".")[2] not in ("py", "md", "sh", "json", "jsonl", "html", "pt", "png", "txt", "zip", "safetensors"):
            resolve_name(name)


@each_page
def test_flags_exist(text):
    known = {prefix + field.name.replace("_", "-") for field in dataclasses.fields(config.Config) for prefix in ("--", "--no-")}
    for path in ROOT.glob("**/*.py"):
        known |= set(re.findall(r'(?:add|add_argument)\("(--[a-z-]+)"', path.read_text(encoding="utf-8")))
    known |= {"--standalone", "--nproc-per-node"}  # torchrun's
    assert set(re.findall(FLAG, text)) <= known
    for span in re.findall(r"`(--[a-z-]+ [^`]+)`", text):  # with values that they take
        if not re.search(r"\b[A-Z]\b|…", span):
            config.parse(shlex.split(span), "")


@pytest.mark.parametrize("page", PAGES, ids=[str(path.relative_to(ROOT)) for path in PAGES])
def test_links_lead_to_files(page):
    for target in re.findall(r"\]\(([^)#]+)[^)]*\)", PAGES[page]):
        assert target.startswith("https://") or (page.parent / target).exists(), target


def test_commands_select_tests():
    commands = re.findall(r'bash test\.sh (tests/\w+\.py) -k (?:"([^"]+)"|(\w+))', "".join(PAGES.values()))
    for path, quoted, word in commands:
        names = re.findall(r"^ *def (test_\w+)", (ROOT / path).read_text(encoding="utf-8"), flags=re.M)
        for part in (quoted or word).split(" or "):
            assert any(part in name for name in names), f"{path} -k {part}"
    assert len(commands) >= 30


def test_companion_has_every_equation_and_experiment():
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in COMPANION.splitlines() if line.startswith("| ")]
    assert {int(row[0]) for row in rows if row[0].isdigit()} == {*range(7, 22), 28}
    listed = COMPANION.partition("| in the paper | NAME |")[2].partition("## Derivations")[0]
    assert {name for row in listed.splitlines() for name in re.findall(r"`(\w+)`", row.split("|", 3)[2:3])} >= set(TABLES)


def test_values_of_both_recipes():
    rows = re.findall(r"^\| [^|]+ \| `--([a-z-]+)` \| [^|]+ \| ([^|]+) \| ([^|]+) \|", COMPANION, flags=re.M)
    assert {name.replace("-", "_") for name, *_ in rows} >= config.RECIPES["full"].keys() | config.RECIPES["paper"].keys()
    for i, recipe in enumerate(("paper", "full")):
        given = config.Config(recipe=recipe, device="cpu")
        for name, *cells in rows:
            value = getattr(given, field := name.replace("-", "_"))
            value = getattr(Reading(), field) if value is None else value
            right = cells[i] == ("off", "on")[value] if isinstance(value, bool) else type(value)(cells[i]) == value
            assert right, f"--{name}: {recipe} has {value}"
