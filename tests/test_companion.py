"""The companion and the first hour, held to the code: every function, flag, command, value and link in them is there."""

import ast
import dataclasses
import importlib
import os
import re
import sys

import pytest

import config
from config import RECIPES, Config

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
sys.path.insert(0, os.path.join(ROOT, "experiments"))
PAGES = ("docs/companion.md", "docs/first-hour.md", "README.md")
TABLES_AND_FIGURES = ["table1", "table2", "table4", "table5", "table6", "table7", *(f"figure{i}" for i in range(3, 8))]


def read(path):
    with open(os.path.join(ROOT, path)) as file:
        return file.read()


COMPANION = read("docs/companion.md")


def found(pattern, least, text=COMPANION):
    """All matches; at least so many, or this test looks past what it is to check."""
    matches = re.findall(pattern, text)
    assert len(matches) >= least, f"only {len(matches)} of {pattern}"
    return matches


def modules():
    names = [name for folder in (ROOT, os.path.join(ROOT, "experiments")) for name in os.listdir(folder)]
    return {name.removesuffix(".py") for name in names if name.endswith(".py")}


def test_every_function_named_exists():
    known, checked = modules(), 0
    for name in found(r"`([a-z_]+(?:\.\w+)+)`", 40) + found(
        r"(?<![\w/.])((?:grace|rollout|policy)\.[A-Za-z_]\w*(?:\.\w+)*)(?=[\s(:,])", 5
    ):
        module, *path = name.split(".")
        if module in known and path[-1] not in ("py", "md", "json", "jsonl"):
            thing = importlib.import_module(module)
            for part in path:
                assert hasattr(thing, part), f"docs/companion.md: there is no {name}"
                thing = getattr(thing, part)
            checked += 1
    assert checked >= 45


def test_every_equation_the_method_and_its_objective_have_stands_in_the_table():
    assert [int(n) for n in found(r"(?m)^\| (\d+) \|", 16)] == [*range(7, 22), 28]


def flags():
    return {"--" + field.name.replace("_", "-"): field for field in dataclasses.fields(Config)}


@pytest.mark.parametrize("page", PAGES)
def test_every_flag_exists(page):
    known = {*flags(), *("--no-" + flag[2:] for flag, field in flags().items() if field.type is bool), "--help", "--model"}
    for script in (
        "toy.py",
        "eval_mteb_subset.py",
        "experiments/run.py",
        "look.py",
        "course/grade.py",
        "course/make_starter.py",
    ):
        known |= set(re.findall(r'"(--[a-z-]+)"', read(script)))
    known |= {"--data", "--data-dir", "--heldout", "--graded"}  # experiments/run.py makes these in a loop
    for flag in found(r"(?<![\w-])(--[a-z][a-z-]*)", 5, read(page)):
        assert flag in known, f"{page}: there is no {flag}"


def test_hyperparameters_are_what_the_recipes_set():
    rows = found(r"(?m)^\|[^|]*\|[^|]*\| `(--[a-z-]+)` \|([^|]*)\|([^|]*)\|", 22)
    for flag, *cells in rows:
        field = flags()[flag]
        for recipe, cell in zip(("paper", "full"), cells):
            value = RECIPES[recipe].get(field.name, field.default)
            assert cell.strip() == ("" if value is None else str(value)), f"{flag}, --recipe {recipe}: {value}"
    named = {flags()[flag].name for flag, *_ in rows}
    assert set(RECIPES["full"]) - named == {"relative_length_penalty"}  # stands at Eq. 28


def cases_in(path):
    """The tests of a file, as source."""
    tree = ast.parse(read(path))
    return [ast.unparse(node) for node in ast.walk(tree) if isinstance(node, ast.FunctionDef) and node.name.startswith("test_")]


@pytest.mark.parametrize("page, least", [("docs/companion.md", 20), ("docs/first-hour.md", 1)])
def test_every_test_command_selects_something(page, least):
    for path, word in found(r"bash test\.sh (tests/\w+\.py)(?: -k (\w+))?", least, read(page)):
        chosen = [
            source for source in cases_in(path) if word in source.split("def ", 1)[1].split("(")[0] or f"'{word}" in source
        ]
        assert chosen, f"{page}: `bash test.sh {path} -k {word}` selects no test"


def test_every_experiment_exists_and_every_table_and_figure_has_one():
    from tables import EXPERIMENTS

    named = found(r"python experiments/run\.py (\w+)", 15)
    assert set(named) <= set(EXPERIMENTS) and {*TABLES_AND_FIGURES, "collapse", "frontier", "yardstick"} <= set(named)


@pytest.mark.parametrize("page", PAGES)
def test_every_link_leads_somewhere(page):
    for target in found(r"\]\(([^)#:]+)\)", 1, read(page)):
        assert os.path.exists(os.path.join(ROOT, os.path.dirname(page), target)), f"{page}: {target} is not there"


def test_the_first_hour_s_rows_stand_in_the_results():
    """What a reader is told to expect is read from the records, not typed."""
    page, results = read("docs/first-hour.md"), read("docs/results.md")
    for cells in found(r"(?m)^> (\| .* \|)$", 3, page):
        assert cells in results, f"docs/first-hour.md quotes a row that docs/results.md does not have: {cells[:60]}"


def test_flags_of_the_first_hour_make_a_configuration():
    for line in found(r"bash train\.sh full (--[^\n]*)", 3, read("docs/first-hour.md")):
        assert isinstance(config.parse(["--model", "m", "--data", "d", "--out", "o", *line.split()], ""), Config)
