"""The assignment: a starter in which nothing is done, a grader that tells right from wrong, and a handout that says so."""

import os
import re
import subprocess
import sys
import xml.etree.ElementTree as xml
import zipfile

import pytest

COURSE = os.path.join(os.path.dirname(os.path.dirname(os.path.abspath(__file__))), "course")
sys.path.insert(0, COURSE)

from make_starter import ROOT, TASKS, body, build, put, take  # noqa: E402
from mutants import ALTERNATIVES, MUTANTS, code_lines, mutated  # noqa: E402


def run(*command, cwd):
    return subprocess.run([sys.executable, *command], cwd=cwd, capture_output=True, text=True)


def read(path):
    with open(path) as file:
        return file.read()


def test_every_task_of_a_starter_is_to_do_and_all_else_works(tmp_path):
    """From the command line, as a lecturer and then a student would."""
    done = run("course/make_starter.py", str(tmp_path / "starter"), cwd=ROOT)
    assert done.returncode == 0, done.stderr
    starter = tmp_path / "starter"
    run("-m", "pytest", "--junitxml=report.xml", cwd=starter)
    outcome = {}
    for case in xml.parse(starter / "report.xml").iter("testcase"):
        about = {p.get("name"): p.get("value") for p in case.iter("property")}
        failure = case.find("failure")
        assert case.find("error") is None
        said = "passed" if failure is None else "to do" if "NotImplementedError" in failure.text else failure.get("message")
        outcome.setdefault(about.get("task", "given"), set()).add("to do" if case.find("skipped") is not None else said)
    assert outcome == {"given": {"passed"}, **{task: {"to do"} for task in TASKS}}
    assert len(re.findall("## Question", read(starter / "answers.md"))) == 6
    assert run("course/make_starter.py", str(starter), cwd=ROOT).returncode == 1  # not into a folder that holds something


@pytest.fixture(scope="module")
def table():
    """The mutants' table as `course/mutants.py` prints it now; it fails if a single verdict is wrong."""
    done = run("course/mutants.py", cwd=ROOT)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_every_mutant_is_caught_and_every_alternative_passes(table):
    has_bonus = "| bonus |" in table
    assert table.count("\n| ") + 1 - 2 == sum(task != "bonus" or has_bonus for task, *_ in MUTANTS) >= 70
    assert {task for task, *_ in MUTANTS} == set(TASKS)
    if has_bonus:
        assert table in read(os.path.join(ROOT, "docs", "lecturer.md")), "python course/mutants.py: put its table there"


def test_tasks_turn_green_one_by_one():
    """With the bodies put back task by task, exactly those tasks' tests pass: in one process, as the mutants are tried."""
    done = run("course/mutants.py", "--one-by-one", cwd=ROOT)
    tasks = [task for task in TASKS if task != "bonus"]
    assert done.stdout.splitlines() == [" ".join(tasks[:n]) for n in range(len(tasks) + 1)], done.stderr


def test_grading_takes_bodies_alone(tmp_path):
    """A right solution, a wrong one, a missing function, and a test folder that claims everything: only bodies count."""
    student = tmp_path / "student"
    build(str(student), ())
    for file, name, old, new in (("reward.py", "scaled", "/ tau", "* tau"), ("pool.py", "fold", "-torch.inf", "0.0")):
        changed = mutated(read(student / file), name, old, new)
        (student / file).write_text(changed)
    (student / "grace.py").write_text(read(student / "grace.py").replace("def pathwise(", "def path_wise("))
    (student / "similarity.py").write_text("this is not Python (")
    (student / "tests" / "test_task3.py").write_text("def test_all_is_well(): pass\n")
    with zipfile.ZipFile(tmp_path / "submission.zip", "w") as packed:
        for file in student.glob("*.py"):
            packed.write(file, file.name)
    report = tmp_path / "report.xml"
    command = ["course/grade.py", str(tmp_path / "submission.zip"), "--junit", str(report), "--hidden-seed", "5"]
    said = run(*command, cwd=ROOT).stdout
    points = dict(re.findall(r"^(\w+) +([\d.]+) of", said, re.M))
    assert points.pop("bonus", "10.0") in ("10.0", "0.0")  # 0 where triton is not installed
    del points["sum"]
    assert points == {"task1": "8.0", "task2": "15.0", "task3": "14.0", "task4": "0.0", "task5": "10.0", "task6": "7.0"}, said
    assert "task6: grace.py, pathwise cannot be taken: no function pathwise" in said and "task4: similarity.py" in said
    cases = xml.parse(report).iter("testcase")
    assert sum(p.get("name") == "points" for case in cases for p in case.iter("property")) > 60


def test_a_task_is_at_most_twenty_lines():
    short = {task: bodies for task, _, bodies in ALTERNATIVES}
    for task, (file, names) in TASKS.items():
        source = read(os.path.join(ROOT, file))
        lines = {name: code_lines(take(source, name)) for name in names}
        own = {name: code_lines(text.splitlines()) for name, text in short.get(task, {}).items()}
        assert task == "bonus" or min(sum(lines.values()), sum({**lines, **own}.values())) <= 20, (task, lines)


def test_the_handout_has_a_page_a_task_with_its_functions_and_points():
    pages = re.split(r"^---$", read(os.path.join(COURSE, "handout.md")), flags=re.M)
    for task, (file, names) in TASKS.items():
        page = next(p for p in pages if p.strip().startswith(f"## {task.capitalize().replace('sk', 'sk ')}"))
        assert all(f"`{name}`" in page for name in (file, *names))
        promised = int(re.search(r"\((\d+) points\)", page).group(1))
        tests = read(os.path.join(COURSE, "tests", f"test_{task}.py"))
        assert promised == sum(map(int, re.findall(r"points\((\d+)\)", tests)))
        assert task == "bonus" or "**Question" in page
    answers = read(os.path.join(COURSE, "answers.md"))
    assert re.findall(r"^## Question (\d)", answers, re.M) == list("123456")


def test_bodies_are_found_and_put_back():
    for file, names in TASKS.values():
        source = read(os.path.join(ROOT, file))
        for name in names:
            assert put(source, name, take(source, name)) == source
    assert take("class A:\n    def f(x):\n        '''Doc.'''\n        # why\n        return x\n", "A.f") == [
        "        # why",
        "        return x",
    ]
    for source in ("def g(): return 1\n", "def h():\n    pass\n"):
        with pytest.raises(LookupError):
            body(source, "g")
