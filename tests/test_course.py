"""The assignment: a starter in which nothing is done, a grader that tells right from wrong, and a handout that fits both."""

import json
import os
import re
import subprocess
import sys
import xml.etree.ElementTree as xml
import zipfile

import pytest

from course.make_starter import GIVEN, HERE, ROOT, TASKS, body, build, put, read, take, write


def run(*command, cwd=ROOT):
    return subprocess.run([sys.executable, *map(str, command)], cwd=cwd, capture_output=True, text=True)


def points(output):
    """What the tests print, as `{task: "points of how many"}`."""
    return dict(re.findall(r"^(\w+) +([\d.]+ of [\d.]+)", output, re.M))


def plant(folder, file, old, new):
    """Change one place in a student's file."""
    source = read(folder, file)
    assert old in source
    write(folder, file, source.replace(old, new))


def test_every_task_of_a_starter_is_to_do_and_all_else_works(tmp_path):
    """From the command line, as a lecturer and then a student would."""
    starter = tmp_path / "starter"
    made = run("course/make_starter.py", starter)
    assert made.returncode == 0, made.stderr
    run("-m", "pytest", "--tb=line", "--junitxml=report.xml", cwd=starter)
    outcomes = {}
    for case in xml.parse(starter / "report.xml").iter("testcase"):
        about = {p.get("name"): p.get("value") for p in case.iter("property")}
        failure = case.find("failure")
        assert case.find("error") is None
        why = "passed" if failure is None else failure.get("message")
        outcome = "to do" if "NotImplementedError" in why or case.find("skipped") is not None else why
        outcomes.setdefault(about.get("task", "given"), set()).add(outcome)
    assert outcomes == {"given": {"passed"}, **{task: {"to do"} for task in TASKS}}
    assert run("course/make_starter.py", starter).returncode == 1  # not into a folder that holds something
    assert "no such task" in run("course/make_starter.py", tmp_path / "other", "--tasks", "7").stderr


@pytest.mark.parametrize("world", ["town", "paper", "events", "chat"])
def test_train_sh_of_a_starter_runs_only_files_that_it_holds(tmp_path, world):
    build(str(tmp_path / "starter"))
    python = tmp_path / "python"
    python.write_text(
        '#!/bin/sh\n[ "$2" != pip ] || exit 0\n[ "$1" != -m ] || set -- "$(echo "$2" | tr . /).py"\n[ -f "$1" ]\n'
    )
    python.chmod(0o755)
    (tmp_path / "rationales.md").touch()
    environment = {**os.environ, "PYTHON": str(python), "OUT": str(tmp_path)}
    ran = subprocess.run(["bash", "train.sh", world], cwd=tmp_path / "starter", env=environment, capture_output=True, text=True)
    assert ran.returncode == 0, ran.stdout + ran.stderr


def test_the_handout_has_a_page_per_task_with_its_functions_and_points():
    pages = read(HERE, "handout.md").split("\n---\n")
    promised = {}
    for task, (file, names) in TASKS.items():
        page = next(p for p in pages if p.strip().startswith(f"## {task.capitalize().replace('sk', 'sk ')}"))
        assert all(f"`{name}`" in page for name in (file, *names))
        promised[task] = int(re.search(r"\((\d+) points\)", page)[1])
        assert promised[task] == sum(map(int, re.findall(r"points\((\d+)\)", read(HERE, f"tests/test_{task}.py"))))
        assert task == "bonus" or f"**Question {task[4:]}.** (5 points)" in page
        for name in names:
            lines = [line.strip() for line in take(read(ROOT, file), name)]
            assert task == "bonus" or sum(bool(x) and x[0] != "#" for x in lines) <= 25, f"{name} is long for an exercise"
    assert sum(promised.values()) == 80 and "70 for code, 30 for written answers, 10 for the bonus" in pages[0]
    assert re.findall(r"^## Question (\d)", read(HERE, "answers.md"), re.M) == list("123456")


def test_bodies_are_located_and_put_back():
    for file, names in TASKS.values():
        for name in names:
            source = read(ROOT, file)
            assert put(source, name, take(source, name)) == source
    assert take("class A:\n    def f(x):\n        '''Doc.'''\n        # why\n        return x\n", "A.f")[0] == "        # why"
    for source in ("def g(): return 1\n", "def h():\n    pass\n"):
        with pytest.raises(LookupError):
            body(source, "g")


def test_mutants_are_caught_and_other_right_solutions_pass():
    """A sample; `python course/mutants.py` tries all."""
    tried = run("course/mutants.py", "task1", "task6", "--one-in", "10")
    assert tried.returncode == 0 and tried.stdout.count("caught by") >= 4, tried.stderr
    assert "task1: another right solution passes" in tried.stdout


def test_grading_takes_bodies_alone(tmp_path):
    """Mistakes, a missing function, and a test folder that claims everything, in a zip file with a folder around its files."""
    student = tmp_path / "student"
    build(str(student), ())
    (student / GIVEN).unlink()  # no list of tasks: all were to do
    plant(student, "pool.py", "-torch.inf", "0.0")
    plant(student, "grace.py", "def pathwise(", "def path_wise(")
    plant(student, "grace.py", "value - config.kl", "value + config.kl")
    write(student, "similarity.py", "this is not Python (")
    write(student, "tests/test_task1.py", "def test_all_is_well(): pass\n")
    with zipfile.ZipFile(tmp_path / "submission.zip", "w") as submission:
        for file in (*student.glob("*.py"), *student.glob("*/*.py")):
            submission.write(file, os.path.join("a student", file.relative_to(student)))
    report = tmp_path / "report.xml"
    graded = run("course/grade.py", tmp_path / "submission.zip", "--tasks", 1, 4, 5, 6, "--junit", report, "--hidden-seed", 5)
    expected = {"task1": "8.0 of 10", "task4": "0.0 of 10", "task5": "10.0 of 10", "task6": "6.7 of 10", "sum": "24.7 of 40"}
    assert points(graded.stdout) == expected, graded.stdout
    assert "task6: grace.py, pathwise cannot be taken: no function pathwise" in graded.stdout
    assert sum(p.get("name") == "points" for case in xml.parse(report).iter("testcase") for p in case.iter("property")) > 40


def test_a_student_of_two_tasks_submits_and_gets_points_for_these_alone(tmp_path):
    """`bash submit.sh` as a student runs it, and an endless loop that catches the first exception."""
    starter = tmp_path / "starter"
    assert run("course/make_starter.py", starter, "--tasks", "1", "5").returncode == 0
    assert "**To do: task1, task5." in read(starter, "README.md") and "Question 5" in read(starter, "answers.md")
    for task in ("task1", "task5"):
        file, names = TASKS[task]
        for name in names:
            write(starter, file, put(read(starter, file), name, take(read(ROOT, file), name)))
    environment = {**os.environ, "PYTHON": sys.executable}
    packed = subprocess.run(["bash", "submit.sh"], cwd=starter, env=environment, capture_output=True, text=True)
    assert packed.returncode == 0 and "answers.md has no answers yet" in packed.stderr, packed.stderr
    assert points(packed.stdout) == {"task1": "10.0 of 10", "task5": "10.0 of 10", "sum": "20.0 of 20"}, packed.stdout
    loop = "while True:\n            pass"
    text = f"    try:\n        {loop}\n    except BaseException:\n        {loop}"
    write(starter, "pool.py", put(read(starter, "pool.py"), "fold", text.splitlines()))
    graded = run("course/grade.py", starter, "--time-limit", "5").stdout
    assert points(graded) == {"task1": "0.0 of 10", "task5": "10.0 of 10", "sum": "10.0 of 20"}, graded
    assert "task1 has used up its 5 seconds. Is there an endless loop?" in graded


def test_what_is_no_submission_is_refused(tmp_path):
    """Not with 0 points: a zip file in which nothing of the assignment can be seen was packed wrongly."""
    with zipfile.ZipFile(tmp_path / "submission.zip", "w") as submission:
        submission.writestr("report.pdf", "")
    refused = run("course/grade.py", tmp_path / "submission.zip")
    assert refused.returncode == 1 and "holds none of" in refused.stderr
    (tmp_path / "submission.txt").write_text("no zip file")
    assert "neither a folder nor a zip file" in run("course/grade.py", tmp_path / "submission.txt").stderr


def test_the_notebook_runs(tmp_path, monkeypatch, capsys):
    """Its cells one after the other, with fewer steps than a reader takes."""
    with open(os.path.join(ROOT, "course", "try.ipynb"), encoding="utf-8") as file:
        notebook = json.load(file)
    first, *cells = ["".join(cell["source"]) for cell in notebook["cells"] if cell["cell_type"] == "code"]
    assert not any(cell.get("outputs") for cell in notebook["cells"])
    monkeypatch.chdir(HERE)
    names = {}
    exec(first, names)
    assert os.getcwd() == ROOT
    names |= {"OUT": str(tmp_path), "WARM_UP": 5, "STEPS": 2}
    for cell in cells:
        exec(cell, names)
    shown = capsys.readouterr().out
    assert "after without rationale" in shown and shown.count("writes:") == 6 and "cosine" in shown
    assert (tmp_path / "trained" / "model.safetensors").exists()
