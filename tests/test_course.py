"""The assignment: a starter in which nothing is done, a grader that tells right from wrong, and a handout that fits both."""

import json
import os
import re
import subprocess
import sys
import zipfile

import pytest

from course.make_starter import HERE, ROOT, TASKS, build, put, read, take, write


def run(*command, cwd=ROOT):
    return subprocess.run([sys.executable, *map(str, command)], cwd=cwd, capture_output=True, text=True)


def points(output):
    """What the tests print, as `{task: "points of how many"}`."""
    return dict(re.findall(r"^(\w+) +([\d.]+ of [\d.]+)", output, re.M))


def test_every_task_of_a_starter_is_to_do(tmp_path):
    """From the command line, as a lecturer and then a student would."""
    starter = tmp_path / "starter"
    made = run("course/make_starter.py", starter)
    assert made.returncode == 0, made.stderr
    tested = run("-m", "pytest", "--tb=line", cwd=starter).stdout
    assert points(tested) == {**{task: f"0.0 of {of}" for task, (of, *_) in TASKS.items()}, "sum": "0.0 of 70"}
    reasons = re.findall(r"^/.*:\d+: (.*)", tested, re.M)
    assert all("NotImplementedError" in reason for reason in reasons), tested
    assert len(reasons) == int(re.search(r"(\d+) failed", tested)[1]) > 70, tested
    assert run("-c", "import eval_mteb_subset, grace", cwd=starter).returncode == 0
    assert run("course/make_starter.py", starter).returncode == 1  # not into a folder that holds something


def test_the_reference_gets_all_points():
    tested = run("-m", "pytest", "course/tests")
    assert tested.returncode == 0 and points(tested.stdout)["sum"] == "70.0 of 70", tested.stdout


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
    for task, (of, file, names) in TASKS.items():
        page = next(p for p in pages if p.strip().startswith(f"## {task.capitalize().replace('sk', 'sk ')}"))
        assert all(f"`{name}`" in page for name in (file, *names)) and f"({of} points)" in page
        assert of == sum(map(int, re.findall(r"points\((\d+)\)", read(HERE, f"tests/test_{task}.py"))))
        assert task == "bonus" or f"**Question {task[4:]}.** (5 points)" in page
        for name in names:
            lines = [line.strip() for line in take(read(ROOT, file), name)]
            assert task == "bonus" or sum(bool(x) and x[0] != "#" for x in lines) <= 25, f"{name} is long for an exercise"


def test_mutants_are_caught_and_other_right_solutions_pass():
    """A sample; `python course/mutants.py` tries all."""
    tried = run("course/mutants.py", "task1", "--one-in", "6")
    assert tried.returncode == 0, tried.stderr
    verdicts = re.findall(r"^task1: .*: ([\d.]+) of 10$", tried.stdout, re.M)
    assert verdicts[:2] == ["10", "10"] and len(verdicts) == 4


def test_a_student_of_two_tasks_submits_and_is_graded(tmp_path):
    """First right, as `bash submit.sh` packs it; then with a mistake and a syntax error; then with an endless loop."""
    starter = tmp_path / "starter"
    assert run("course/make_starter.py", starter, "--tasks", "task1", "task3").returncode == 0
    assert "**To do: task1, task3." in read(starter, "README.md") and "Question 3" in read(starter, "answers.md")
    for _, file, names in (TASKS["task1"], TASKS["task3"]):
        for name in names:
            write(starter, file, put(read(starter, file), name, take(read(ROOT, file), name)))
    environment = {**os.environ, "PYTHON": sys.executable}
    packed = subprocess.run(["bash", "submit.sh"], cwd=starter, env=environment, capture_output=True, text=True)
    assert packed.returncode == 0 and "answers.md has no answers yet" in packed.stderr, packed.stderr
    assert points(packed.stdout) == {"task1": "10.0 of 10", "task3": "15.0 of 15", "sum": "25.0 of 25"}, packed.stdout
    with zipfile.ZipFile(starter / "submission.zip") as submission:
        assert {"answers.md", *(file for _, file, _ in TASKS.values())} <= set(submission.namelist())
    graded = run("course/grade.py", starter / "submission.zip", "--tasks", "task1", "--time-limit", "600").stdout
    assert points(graded) == {"task1": "10.0 of 10", "sum": "10.0 of 10"}, graded

    pool = read(starter, "pool.py")
    write(starter, "pool.py", pool.replace("hidden = hidden.to(torch.promote_types(hidden.dtype, torch.float32))", ""))
    write(starter, "reward.py", "this is not Python (")
    write(starter, "tests/test_task1.py", "def test_all_is_well(): pass")
    with zipfile.ZipFile(tmp_path / "submission.zip", "w") as submission:  # a folder around the files
        for file in starter.glob("*.py"):
            submission.write(file, os.path.join("a student", file.name))
    more = "--hidden-seed", "5", "--time-limit", "600"
    graded = run("course/grade.py", tmp_path / "submission.zip", "--tasks", "task1", "task3", *more).stdout
    assert points(graded) == {"task1": "9.0 of 10", "task3": "0.0 of 15", "sum": "9.0 of 25"}, graded
    assert "test_sums_are_taken_in_float32_and_differentiable - assert 256" in graded and "SyntaxError" in graded

    write(starter, "pool.py", "while True:\n    try:\n        import time\n    except BaseException:\n        pass\n")
    graded = run("course/grade.py", starter, "--tasks", "task1", "--time-limit", "5").stdout
    assert points(graded)["task1"] == "0.0 of 10" and "endless loop?" in graded


def test_what_is_no_submission_is_refused(tmp_path):
    """Not with 0 points: a zip file in which nothing of the assignment can be seen was packed wrongly."""
    with zipfile.ZipFile(tmp_path / "submission.zip", "w") as submission:
        submission.writestr("report.pdf", "")
    refused = run("course/grade.py", tmp_path / "submission.zip")
    assert refused.returncode == 1 and "holds no pool.py" in refused.stderr
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
