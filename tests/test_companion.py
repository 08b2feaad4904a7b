"""docs/companion.md says where everything is: every name, flag, command, value and link in it is checked against the code.

So are the commands and links of docs/first-hour.md, and what it and the README quote from the results.
"""

import importlib
import os
import re
import shlex

import pytest
import run
from record import Place
from scores import value
from tables import EXPERIMENTS, NO_PATHWISE, REAL

import config
import eval_mteb_subset
from prompt import Reading

with open(os.path.join("docs", "companion.md"), encoding="utf-8") as file:
    PAGE = file.read()
SPANS = re.findall(r"`([^`\n]+)`", re.sub(r"```.*?```", "", PAGE, flags=re.S))
ROWS = [[cell.strip() for cell in line.strip("|").split("|")] for line in PAGE.splitlines() if line.startswith("| ")]
COMMAND = r'bash test\.sh (tests/\w+\.py) -k (?:"([^"]+)"|(\w+))'
FLAG = r"(?<![\w-])--[a-z][a-z-]*"


def is_file(name):
    return any(os.path.isfile(os.path.join(folder, name)) for folder in (".", "experiments", "docs"))


def resolve(name):
    """What a dotted name stands for: the longest module at its beginning, then attributes. AssertionError if it is nothing."""
    parts = name.split(".")
    lengths = [n for n in range(1, len(parts) + 1) if is_file(os.path.join(*parts[:n]) + ".py")]
    assert lengths, f"{name}: it begins with no module"
    value = importlib.import_module(".".join(parts[: lengths[-1]]))
    for part in parts[lengths[-1] :]:
        assert hasattr(value, part), f"{name}: there is no {part}"
        value = getattr(value, part)
    return value


def code_names(text):
    """Every dotted name in a text that begins with a module or a folder of modules, in its pictures, too."""
    ours = lambda part: is_file(part + ".py") or os.path.isfile(os.path.join(part, "__init__.py"))
    names = {m[0] for m in re.finditer(r"(?<![\w/])[a-z_]+(?:\.\w+)+", text)}
    return {name for name in names if ours(name.split(".")[0]) and not is_file(name)}


def test_names_lead_to_code():
    names = {name for name in SPANS if re.fullmatch(r"\w+(\.\w+)+", name) and not is_file(name)} | code_names(PAGE)
    for name in names:
        resolve(name)
    assert len(names) >= 40


@pytest.mark.parametrize("name", ["similarity.no_such", "evaluation.no_such.encode", "no_such.name", "grace.Trainer.no_such"])
def test_a_name_without_code_is_caught(name):
    with pytest.raises(AssertionError, match=r"no module|there is no no_such"):
        resolve(name)


def test_flags_exist_and_take_their_values(capsys):
    def flags(parse):
        with pytest.raises(SystemExit):
            parse(["--help"])
        return set(re.findall(FLAG, capsys.readouterr().out))

    ours = flags(lambda arguments: config.parse(arguments, ""))
    others = {"run.py": flags(run.parse), "eval_mteb_subset.py": flags(eval_mteb_subset.main)}
    for line in PAGE.splitlines():
        known = ours.union(*(theirs for script, theirs in others.items() if script in line))
        assert set(re.findall(FLAG, line)) <= known, line
    valued = [span for span in SPANS if span.startswith("--") and " " in span]
    for span in valued:
        config.parse(shlex.split(span), "")
    assert len(set(re.findall(FLAG, PAGE))) >= 30 and len(valued) >= 8


def test_commands_select_tests():
    """Each word of `-k "this or that"` has to stand in a test's name; names alone, not parameters."""
    commands = re.findall(COMMAND, PAGE)
    for path, quoted, word in commands:
        with open(path) as file:
            tests = re.findall(r"^ *def (test_\w+)", file.read(), flags=re.M)
        for part in (quoted or word).split(" or "):
            assert any(part in test for test in tests), f"{path} -k {part!r}: no test"
    assert len(commands) == len(re.findall(r"bash test\.sh (?!FILE)", PAGE)) >= 30


def test_every_equation_has_a_row():
    rows = {int(row[0]): row for row in ROWS if row[0].isdigit()}
    assert set(rows) == {*range(7, 22), 28}
    for number, row in rows.items():
        assert len(row) == 6 and all(row) and "." in row[3] and re.search(COMMAND, row[4]), f"Eq. {number}"


def test_every_table_and_figure_has_a_row():
    named = re.findall(r"experiments/run\.py (?!NAME)(\w+)", PAGE)
    assert set(named) == set(EXPERIMENTS)
    rows = {m[1]: row for row in ROWS if (m := re.fullmatch(r"`python experiments/run\.py (\w+)`", row[1]))}
    assert {name: row[2] for name, row in rows.items()} == {name: e.title for name, e in EXPERIMENTS.items()}
    for name, row in rows.items():  # "table1" stands beside "Table 1"
        others = "ladder", "collapse", "frontier", "search", "yardstick", "unseen", *REAL
        assert name.removeprefix("town_") in (row[0].lower().replace(" ", ""), *others)
    elsewhere = re.findall(r'results\.md\), "([^"]+)"', PAGE)
    assert elsewhere and set(elsewhere) <= {e.title for e in EXPERIMENTS.values()}


def test_values_of_both_recipes():
    rows = {row[1].strip("`-").replace("-", "_"): row for row in ROWS if row[1].startswith("`--")}
    assert len(rows) >= 25 and set(rows) >= {*config.RECIPES["paper"], *config.RECIPES["full"]}
    for recipe, column in (("paper", 3), ("full", 4)):
        given = config.Config(recipe=recipe, device="cpu")
        for name, row in rows.items():
            value, cell = getattr(given, name), row[column]
            value = getattr(Reading(), name) if value is None else value
            right = cell == ("off", "on")[value] if isinstance(value, bool) else type(value)(cell) == value
            assert right, f"{row[1]}: {recipe} has {value}"


def test_links_lead_somewhere():
    targets = re.findall(r"\]\(([^)#]+)\)", PAGE)
    for target in targets:
        assert target.startswith("https://") or os.path.exists(os.path.join("docs", target)), target
    assert len(targets) >= 6


with open(os.path.join("docs", "first-hour.md"), encoding="utf-8") as file:
    HOUR = file.read()


def test_the_first_hour_quotes_rows_that_stand_in_the_results():
    """What a reader is told to expect comes from the records."""
    with open(os.path.join("docs", "results.md"), encoding="utf-8") as file:
        results = file.read()
    quoted = re.findall(r"^(\| (?!-).*\|)$", HOUR, flags=re.M)
    assert len(quoted) >= 5
    for row in quoted:
        assert row in results, f"docs/results.md has no row {row[:60]}"


def test_the_readme_s_figures_are_the_results():
    """Whatever a table of scores in the README says is a cell of docs/results.md, to the digit."""
    cells = lambda line: [cell.strip().strip("*") for cell in line.strip("|").split("|")]
    with open("README.md", encoding="utf-8") as readme, open(os.path.join("docs", "results.md"), encoding="utf-8") as page:
        tables, results = re.findall(r"(?:^\|.*\n)+", readme.read(), flags=re.M), page.read()
    known = {cell for line in results.splitlines() if line.startswith("|") for cell in cells(line)}
    scores = [table for table in tables if "nDCG@10" in table]
    assert len(scores) == 3
    for row in (line for table in scores for line in table.splitlines()[2:]):
        figures = [cell for cell in cells(row)[1:] if re.fullmatch(r"-?[\d.]+( \(.*\))?", cell)]
        assert figures and known >= set(figures), f"not in docs/results.md: {set(figures) - known} of {row[:60]}"


def test_the_first_hour_s_commands_and_links():
    commands = re.findall(r"^OUT=runs/(\S+) bash train\.sh events ?(.*)$", HOUR.replace("\\\n", ""), flags=re.M)
    runs = {name: config.parse(shlex.split(flags), "") for name, flags in commands}
    assert len(runs) == 6 and runs["events-paper"].recipe == "paper"
    assert set(re.findall(r"\bruns/([\w-]+)", HOUR)) == {"toy", *runs}  # written by these, or by train.sh alone
    given = {name: value for name, value in NO_PATHWISE.items() if name not in ("trainer", "recipe")}
    assert {name: getattr(runs["reward-alone"], name) for name in given} == given
    for path, _, word in re.findall(COMMAND, HOUR):
        with open(path) as file:
            assert word in file.read()
    targets = re.findall(r"\]\(([^)#]+)\)", HOUR)
    assert len(targets) >= 2 and all(os.path.exists(os.path.join("docs", target)) for target in targets)


def test_your_model_s_flags_links_and_divisions(capsys):
    with open(os.path.join("docs", "your-model.md"), encoding="utf-8") as file:
        text = file.read()
    with pytest.raises(SystemExit):
        config.parse(["--help"], "")
    flags = {flag for span in re.findall(r"`(--[^`]+)`", text) for flag in re.findall(FLAG, span)}
    assert len(flags) >= 8 and flags <= set(re.findall(FLAG, capsys.readouterr().out))
    assert all(os.path.exists(os.path.join("docs", target)) for target in re.findall(r"\]\(([^)#]+)\)", text))
    moves = re.findall(r"^\| [^|]+ \| ([\d.]+) \| (?:about )?([\d.]+) \| ([\d.]+) \|$", text, flags=re.M)
    assert len(moves) >= 4
    for moved, weight, ratio in moves:
        digits = len(ratio.partition(".")[2])
        assert round(float(moved) / float(weight), digits) == float(ratio), (moved, weight)
    place = Place()
    tried = [place.read(run) for _, run in EXPERIMENTS["captions_search"].runs() if run["trainer"] == "GRACE"]
    tried = {(x["config"]["steps"], x["config"]["lr"]): x for x in tried if x and x["config"]["pathwise"]}
    shown = re.findall(r"^\| (\d+) steps at (\S+) \| (\S+) \| (\S+) \| (\S+) \| (\S+) \|$", text, flags=re.M)
    assert len(shown) == len(tried)
    for steps, rate, *figures in shown:
        record = tried[int(steps), float(rate)]
        ratio, *measured = map(float, figures)
        assert ratio == pytest.approx(float(rate) * int(steps) / 2 / 0.128, rel=0.03)
        for name, digits, figure in zip(("ndcg_at_10", "plain loss", "answers loss"), (3, 2, 2), measured):
            assert round(value(record, name), digits) == figure


@pytest.mark.parametrize("page", ["reliability", "benchmarks"])
def test_names_files_and_flags_of_other_pages(page, capsys):
    with open(os.path.join("docs", page + ".md"), encoding="utf-8") as file:
        text = file.read()
    for name in code_names(text):
        resolve(name)
    paths = re.findall(r"(?<![\w/.])(?:tests|bench|speed|experiments)/[\w/.]*\w", text)
    assert len(paths) >= 6 and all(os.path.exists(path) for path in paths), paths
    with pytest.raises(SystemExit):
        config.parse(["--help"], "")
    known = {*re.findall(FLAG, capsys.readouterr().out), "--n", "--repeats"}  # those two are of bench/encode.py
    flags = {flag for span in re.findall(r"`(--[^`]+)`", text) for flag in re.findall(FLAG, span)}
    assert len(flags) >= 5 and flags <= known
