"""The assignment: a starter in which nothing is done, a grader that tells right from wrong, and a handout that fits both."""

import glob
import os
import re
import subprocess
import sys
import xml.etree.ElementTree as xml
import zipfile

import pytest

COURSE = os.path.join(os.path.dirname(os.path.dirname(os.path.abspath(__file__))), "course")
sys.path.insert(0, COURSE)

from make_starter import FOLDERS, GIVEN, ROOT, TASKS, body, build, handout, put, questions, read, take, write  # noqa: E402
from mutants import ALTERNATIVES, MUTANTS, code_lines, mutated  # noqa: E402
from outline import outline  # noqa: E402


def run(*command, cwd=ROOT):
    return subprocess.run([sys.executable, *map(str, command)], cwd=cwd, capture_output=True, text=True)


def points(output):
    """What the grader prints, as `{task: "points of how many"}`."""
    return dict(re.findall(r"^(\w+) +([\d.]+ of [\d.]+)", output, re.M))


def plant(folder, file, name, old, new):
    """Change one function of a student's repository."""
    write(folder, file, mutated(read(folder, file), name, old, new))


def pack(folder, path, inside=""):
    """A submission as submit.sh makes it: the tasks' files and the list of tasks, under a folder `inside` the zip file."""
    with zipfile.ZipFile(path, "w") as submission:
        for file in sorted({file for file, _ in TASKS.values()} | {GIVEN}):
            submission.write(os.path.join(folder, file), os.path.join(inside, file))
    return path


# ---------------------------------------------------------------- the starter


def test_every_task_of_a_starter_is_to_do_and_all_else_works(tmp_path):
    """From the command line, as a lecturer and then a student would."""
    made = run("course/make_starter.py", tmp_path / "starter")
    assert made.returncode == 0, made.stderr
    starter = tmp_path / "starter"
    run("-m", "pytest", "--junitxml=report.xml", cwd=starter)
    outcomes = {}
    for case in xml.parse(starter / "report.xml").iter("testcase"):
        about = {p.get("name"): p.get("value") for p in case.iter("property")}
        failure = case.find("failure")
        assert case.find("error") is None
        outcome = "passed" if failure is None else "to do" if "NotImplementedError" in failure.text else failure.get("message")
        outcomes.setdefault(about.get("task", "given"), set()).add("to do" if case.find("skipped") is not None else outcome)
    assert outcomes == {"given": {"passed"}, **{task: {"to do"} for task in TASKS}}
    assert len(re.findall("## Question", read(starter, "answers.md"))) == 6
    assert run("course/make_starter.py", starter).returncode == 1  # not into a folder that holds something
    assert "no such task" in run("course/make_starter.py", tmp_path / "other", "--tasks", "7").stderr


@pytest.mark.parametrize("world", ["town", "paper", "events"])
def test_train_sh_of_a_starter_asks_only_for_files_that_it_holds(tmp_path, world):
    build(str(tmp_path / "starter"))
    python = tmp_path / "python"
    python.write_text('#!/bin/sh\n[ "$1" != -m ] || set -- "$(echo "$2" | tr . /).py"\n[ -f "$1" ] && echo "ran $1"\n')
    python.chmod(0o755)
    there = dict(cwd=tmp_path / "starter", env={**os.environ, "PYTHON": str(python)})
    ran = subprocess.run(["bash", "train.sh", world], **there, capture_output=True, text=True)
    assert ran.returncode == 0, ran.stdout + ran.stderr
    assert re.findall("ran (.*)", ran.stdout) == ["worlds/make.py", "grace.py", "eval_mteb_subset.py", "grace.py"]


def test_an_outline_has_what_stands_outside_of_bodies():
    source = "import math\nA = 1\ndef f(x):\n    return x\n"
    assert outline(source) == outline(source.replace("return x", "import os\n    return A"))
    for more in ("import os\n", "from os import path\n", "B = 2\n", "def g(): pass\n"):
        assert outline(source + more) != outline(source)


def test_a_starter_holds_every_file_that_it_names_or_says_that_it_does_not(tmp_path):
    build(str(tmp_path))
    held = {os.path.relpath(os.path.join(at, file), tmp_path) for at, _, files in os.walk(tmp_path) for file in files}
    packages = {os.path.dirname(file) for file in glob.glob("*/__init__.py", root_dir=ROOT)}
    assert packages and packages <= set(FOLDERS) and packages <= {os.path.dirname(file) for file in held}
    pages = read(tmp_path, "README.md").split("\n---\n")
    elsewhere = set(re.findall(r"`([^`]+)` \(in", pages.pop()))
    here = lambda name: any(file == name or file.endswith("/" + name) for file in held)
    assert elsewhere and not any(here(name) for name in elsewhere - {"README.md"})
    named, outputs = re.compile(r"(?<![\w/.$%}{*-])(?:\w+/)*\w+\.(?:py|md|sh)\b"), {"rationales.md"}
    for file in sorted(held):
        text = "\n".join(pages) if file == "README.md" else read(tmp_path, file)
        for name in named.findall(text) if file.endswith((".py", ".md", ".sh")) else ():
            assert here(name) or name in elsewhere or os.path.basename(name) in outputs, f"{file} names {name}"
        for name in re.findall(r"\b(?:docs|experiments|bench|course)/", text):
            assert any(other.startswith(name) for other in elsewhere), f"{file} names {name}"


def test_the_handout_has_a_page_per_task_with_its_functions_and_points():
    text = read(COURSE, "handout.md")
    pages = text.split("\n---\n")
    for task, (file, names) in TASKS.items():
        page = next(p for p in pages if p.strip().startswith(f"## {task.capitalize().replace('sk', 'sk ')}"))
        assert all(f"`{name}`" in page for name in (file, *names))
        promised = int(re.search(r"\((\d+) points\)", page).group(1))
        assert promised == sum(map(int, re.findall(r"points\((\d+)\)", read(COURSE, f"tests/test_{task}.py"))))
        assert task == "bonus" or len(questions(page)) == 1
    assert re.findall(r"^## Question (\d)", read(COURSE, "answers.md"), re.M) == list("123456")
    assert handout(text, TASKS) == text, "the line of points does not fit the pages"


def test_the_handout_of_some_tasks_speaks_of_these_alone(tmp_path):
    build(str(tmp_path), ["task1", "task3", "task5"])
    text = read(tmp_path, "README.md")
    assert re.findall(r"^## (Task \d|Bonus|The end)", text, re.M) == ["Task 1", "Task 3", "Task 5", "The end"]
    assert "* Points: 35 for code, 15 for written answers.\n" in text
    assert not re.search(r"task [246]|question [246]|\b(six|seven)\b|\b70\b|bonus", text, re.I)
    assert re.findall(r"^## (.*)", read(tmp_path, "answers.md"), re.M) == ["Question 1", "Question 3", "Question 5"]


def test_bodies_are_located_and_put_back():
    for file, names in TASKS.values():
        source = read(ROOT, file)
        for name in names:
            assert put(source, name, take(source, name)) == source
    assert take("class A:\n    def f(x):\n        '''Doc.'''\n        # why\n        return x\n", "A.f") == [
        "        # why",
        "        return x",
    ]
    for source in ("def g(): return 1\n", "def h():\n    pass\n"):
        with pytest.raises(LookupError):
            body(source, "g")


# ---------------------------------------------------------------- the tests that grade


@pytest.fixture(scope="module")
def table():
    """The mutants' table as `course/mutants.py` prints it now; it fails if a single verdict is wrong."""
    tried = run("course/mutants.py")
    assert tried.returncode == 0, tried.stderr
    return tried.stdout


def test_every_mutant_is_caught_and_every_alternative_passes(table):
    has_bonus = "| bonus |" in table
    assert table.count("\n| ") + 1 - 2 == sum(task != "bonus" or has_bonus for task, *_ in MUTANTS) >= 100
    assert {task for task, *_ in MUTANTS} == set(TASKS)
    if has_bonus:
        assert table in read(ROOT, "docs/lecturer.md"), "python course/mutants.py: put its table there"


def test_tasks_turn_green_one_by_one():
    """With the bodies put back task by task, exactly those tasks' tests pass: in one process, as the mutants are tried."""
    tasks = [task for task in TASKS if task != "bonus"]
    expected = [" ".join(tasks[:n]) for n in range(len(tasks) + 1)]
    tried = run("course/mutants.py", "--one-by-one")
    if tried.stdout.splitlines() != expected:  # seen once, on a busy machine, and not again: a second failure is real
        print(tried.stderr)
        tried = run("course/mutants.py", "--one-by-one")
    assert tried.stdout.splitlines() == expected, tried.stderr


def test_a_task_is_at_most_twenty_lines():
    short = {task: bodies for task, _, bodies in ALTERNATIVES}
    for task, (file, names) in TASKS.items():
        lines = {name: code_lines(take(read(ROOT, file), name)) for name in names}
        otherwise = {name: code_lines(text.splitlines()) for name, text in short.get(task, {}).items()}
        assert task == "bonus" or min(sum(lines.values()), sum({**lines, **otherwise}.values())) <= 20, (task, lines)


# ---------------------------------------------------------------- the grader


def test_grading_takes_bodies_alone(tmp_path):
    """A right solution, a wrong one, a missing function, and a test folder that claims everything: only bodies count.

    All of it in a zip file with one folder around its files.
    """
    student = tmp_path / "student"
    build(str(student), ())
    (student / GIVEN).unlink()  # no list of tasks: all were to do
    plant(student, "reward.py", "scaled", "/ tau", "* tau")
    plant(student, "pool.py", "fold", "-torch.inf", "0.0")
    write(student, "grace.py", read(student, "grace.py").replace("def pathwise(", "def path_wise("))
    write(student, "similarity.py", "this is not Python (")
    write(student, "tests/test_task3.py", "def test_all_is_well(): pass\n")
    with zipfile.ZipFile(tmp_path / "submission.zip", "w") as submission:
        for file in (*student.glob("*.py"), *student.glob("*/*.py")):
            submission.write(file, os.path.join("a student", file.relative_to(student)))
        submission.writestr("__MACOSX/a student/._pool.py", "")
    report = tmp_path / "report.xml"
    output = run("course/grade.py", tmp_path / "submission.zip", "--junit", report, "--hidden-seed", "5").stdout
    got = points(output)
    assert got.pop("bonus", "10.0 of 10") in ("10.0 of 10", "0.0 of 10")  # 0 where triton is not installed
    expected = {"task1": "8.0 of 10", "task2": "15.0 of 15", "task3": "14.0 of 15", "task4": "0.0 of 10"}
    assert got == expected | {"task5": "10.0 of 10", "task6": "7.0 of 10", "sum": "54.0 of 70"}, output
    assert "task6: grace.py, pathwise cannot be taken: no function pathwise" in output and "task4: similarity.py" in output
    cases = xml.parse(report).iter("testcase")
    assert sum(p.get("name") == "points" for case in cases for p in case.iter("property")) > 60


def test_a_solved_task_gives_no_points(tmp_path):
    """A starter of three tasks, handed in as it is. It lists its tasks; the lecturer's own list comes first."""
    starter = tmp_path / "starter"
    assert run("course/make_starter.py", starter, "--tasks", "1", "3", "5").returncode == 0
    listed = run("course/grade.py", pack(starter, tmp_path / "submission.zip")).stdout
    nothing = {"task1": "0.0 of 10", "task3": "0.0 of 15", "task5": "0.0 of 10", "sum": "0.0 of 35"}
    assert points(listed) == nothing and "note:" not in listed, listed
    other = run("course/grade.py", starter, "--tasks", "2", "3").stdout
    assert points(other) == {"task2": "15.0 of 15", "task3": "0.0 of 15", "sum": "15.0 of 30"}, other
    assert "every body of task2 is this repository's own" in other, other


def test_submit_packs_what_the_grader_needs(tmp_path):
    """`bash submit.sh` as a student runs it; the bonus's file lies in a folder."""
    starter = tmp_path / "starter"
    build(str(starter), ["task5", "bonus"])
    source = read(starter, "grace.py")
    for name in TASKS["task5"][1]:
        source = put(source, name, take(read(ROOT, "grace.py"), name))
    write(starter, "grace.py", source)
    environment = {**os.environ, "PYTHON": sys.executable}
    packed = subprocess.run(["bash", "submit.sh"], cwd=starter, env=environment, capture_output=True, text=True)
    assert packed.returncode == 0 and "answers.md has no answers yet" in packed.stderr, packed.stderr
    assert points(packed.stdout) == {"task5": "10.0 of 10", "bonus": "0.0 of 10", "sum": "10.0 of 10"}, packed.stdout
    names = zipfile.ZipFile(starter / "submission.zip").namelist()
    assert {file for file, _ in TASKS.values()} | {"answers.md", "points.xml", GIVEN} == set(names)


def test_a_loop_without_an_end_costs_its_own_task(tmp_path):
    """Even one that catches the first exception: the next comes a second later."""
    student = tmp_path / "student"
    build(str(student), ())
    loop = "while True:\n        pass"
    plant(student, "pool.py", "fold", None, f"try:\n    {loop}\nexcept BaseException:\n    {loop}")
    graded = run("course/grade.py", student, "--tasks", "1", "5", "--time-limit", "4").stdout
    expected = {"task1": "2.0 of 10", "task5": "10.0 of 10", "sum": "12.0 of 20"}  # `length_mask` is right
    assert points(graded) == expected, graded
    assert "task1 has used up its 4 seconds. Is there a loop without an end?" in graded


def test_what_is_no_submission_is_refused(tmp_path):
    """Not with 0 points: a zip file in which nothing of the assignment can be seen was packed wrongly."""
    with zipfile.ZipFile(tmp_path / "submission.zip", "w") as submission:
        submission.writestr("report.pdf", "")
    refused = run("course/grade.py", tmp_path / "submission.zip")
    assert refused.returncode == 1 and "holds none of" in refused.stderr
    (tmp_path / "submission.txt").write_text("no zip file")
    assert "neither a folder nor a zip file" in run("course/grade.py", tmp_path / "submission.txt").stderr
