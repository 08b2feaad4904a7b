"""Grades a submission: `python course/grade.py submission.zip` (or a folder).

Only the bodies of the tasks' functions are taken from the submission. They are put into a fresh copy of this repository
beside this repository's tests. So whatever else was changed counts for nothing, and a function that is missing costs
points in its own task alone. Only tasks that were to do give points. The functions' code is run as it is: run strangers'
code in a container.

It needs an environment in which the tests run, and nothing else.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import zipfile

from make_starter import GIVEN, TASKS, build, put, read, take, task_names, write

STARTING = 120  # seconds for importing and collecting, beside the tasks' own limits


def unwrapped(folder):
    """The folder that holds the tasks' files: `folder` itself, or the only folder in it. Raises LookupError for neither."""
    while not any(os.path.exists(os.path.join(folder, file)) for file, _ in TASKS.values()):
        inside = [entry.path for entry in os.scandir(folder) if entry.is_dir() and not entry.name.startswith((".", "__"))]
        if len(inside) != 1:
            raise LookupError(f"the submission holds none of {', '.join(sorted({file for file, _ in TASKS.values()}))}")
        folder = inside[0]
    return folder


def listed_tasks(student):
    """The tasks to do that the submission's tests/given.json lists; all tasks where it has no such list."""
    try:
        return task_names(json.loads(read(student, GIVEN))["tasks"])
    except (OSError, ValueError, LookupError, TypeError):
        return list(TASKS)


def assemble(student, out, tasks):
    """The reference with a student's bodies of these tasks, in `out`. Returns a line per function that cannot be taken."""
    build(out, tasks)
    missing = []
    for task in tasks:
        file, names = TASKS[task]
        for name in names:
            try:
                source = put(read(out, file), name, take(read(student, file), name))
                compile(source, file, "exec")
                write(out, file, source)
            except FileNotFoundError:
                missing.append(f"{task}: {file}, {name} cannot be taken: there is no such file")
            except (LookupError, OSError, SyntaxError, ValueError) as error:
                missing.append(f"{task}: {file}, {name} cannot be taken: {error}")
    return missing


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("submission", help="submission.zip, or a folder")
    parser.add_argument("--hidden-seed", type=int, default=0, help="of the tests' random inputs [0, as students have]")
    parser.add_argument("--tasks", nargs="+", help="the tasks that were to do [those of the submission's own list]")
    parser.add_argument("--time-limit", type=float, default=120.0, help="seconds for the tests of one task together [120]")
    parser.add_argument("--junit", help="write a report here: points and task of each test as properties")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        student, out = args.submission, os.path.join(scratch, "graded")
        if not os.path.isdir(student):
            if not zipfile.is_zipfile(student):
                sys.exit(f"grade.py: {student} is neither a folder nor a zip file")
            student = os.path.join(scratch, "student")
            zipfile.ZipFile(args.submission).extractall(student)
        try:
            student = unwrapped(student)
            tasks = task_names(args.tasks) if args.tasks else listed_tasks(student)
        except LookupError as error:
            sys.exit(f"grade.py: {error}")
        print(f"to do: {', '.join(tasks)}")
        for line in assemble(student, out, tasks):
            print(line)
        sys.stdout.flush()
        command = [sys.executable, "-m", "pytest", "--tb=no", f"--hidden-seed={args.hidden_seed}"]
        command += [f"--time-limit={args.time_limit}", *(f"tests/test_{task}.py" for task in tasks)]
        command += [f"--junitxml={os.path.abspath(args.junit)}"] if args.junit else []
        limit = STARTING + args.time_limit * len(tasks)
        try:
            return subprocess.run(command, cwd=out, env={**os.environ, "HF_HUB_OFFLINE": "1"}, timeout=limit).returncode
        except subprocess.TimeoutExpired:  # the tests' own clock raises an exception, and code can catch it
            sys.exit(
                f"grade.py: no result after {limit:.0f} seconds: an endless loop. Grade task by task (--tasks 1) to see where"
            )


if __name__ == "__main__":
    sys.exit(main())
