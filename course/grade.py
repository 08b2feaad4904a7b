"""Grades what a student handed in: `python course/grade.py submission.zip` (or a folder), a few seconds each.

Only the bodies of the tasks' functions are taken from it and put into a fresh copy of this repository, with this
repository's tests: what else was changed counts for nothing, and a function that is missing costs its own task alone.
The functions' code is run as it is. Grade strangers' code where you would run it: in a container.

    --hidden-seed N    other random inputs than the students' own run
    --junit FILE       a report for a course system: points and task of each test as properties

Standard library, and an environment in which the tests run.
"""

import argparse
import os
import subprocess
import sys
import tempfile
import zipfile

from make_starter import TASKS, blank, build, put, take, write


def assemble(student, out):
    """The reference with a student's bodies, in `out`. Returns a line for each function that could not be taken."""
    build(out, tasks=())
    missing, sources = [], {}
    for task, (file, names) in TASKS.items():
        for name in names:
            if file not in sources:
                with open(os.path.join(out, file)) as f:
                    sources[file] = f.read()
            try:
                with open(os.path.join(student, file)) as f:
                    theirs = put(sources[file], name, take(f.read(), name))
                compile(theirs, file, "exec")
            except (LookupError, OSError, SyntaxError, ValueError) as error:
                missing.append(f"{task}: {file}, {name} cannot be taken: {error}")
                theirs = blank(sources[file], name, task)
            sources[file] = theirs
    for file, source in sources.items():
        write(out, file, source)
    return missing


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("submission", help="submission.zip, or a folder")
    parser.add_argument("--hidden-seed", type=int, default=0, help="of the tests' random inputs [0, as the students have]")
    parser.add_argument("--junit", help="write a junit report to this file")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        student, out = args.submission, os.path.join(scratch, "graded")
        if not os.path.isdir(student):
            if not zipfile.is_zipfile(student):
                sys.exit(f"grade.py: {student} is neither a folder nor a zip file")
            student = os.path.join(scratch, "student")
            zipfile.ZipFile(args.submission).extractall(student)
        for line in assemble(student, out):
            print(line)
        command = [sys.executable, "-m", "pytest", "--tb=no", f"--hidden-seed={args.hidden_seed}"]
        command += [f"--junitxml={os.path.abspath(args.junit)}"] if args.junit else []
        return subprocess.run(command, cwd=out, env={**os.environ, "HF_HUB_OFFLINE": "1"}).returncode


if __name__ == "__main__":
    sys.exit(main())
