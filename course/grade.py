"""Grades a submission: `python course/grade.py submission.zip` (or a folder).

Each task is graded by itself: its file comes from the submission, everything else from a new starter, in which nothing is
done, with this repository's tests. So whatever else was changed counts for nothing, and a syntax error, a missing file or
an endless loop costs points in its own task alone. The code is run as it is: run strangers' code in a container.

It needs an environment in which the tests run, and nothing else.
"""

import argparse
import os
import re
import shutil
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

from make_starter import TASKS, build


def graded(task, file, seed=0, limit=120.0):
    """A student's file of one task. Returns its points, and lines about what failed."""
    with tempfile.TemporaryDirectory() as folder:
        build(folder)
        if os.path.exists(file):
            shutil.copy(file, os.path.join(folder, TASKS[task][1]))
        command = [sys.executable, "-m", "pytest", "--tb=line", f"--hidden-seed={seed}", f"tests/test_{task}.py"]
        wide = {**os.environ, "COLUMNS": "160"}  # for lines with the reason of a failure
        try:
            ran = subprocess.run(command, cwd=folder, env=wide, capture_output=True, text=True, timeout=limit)
        except subprocess.TimeoutExpired:
            return 0.0, [f"not done after {limit:g} seconds: is there an endless loop?"]
    points = re.search(rf"^{task} +([\d.]+) of", ran.stdout, re.M)
    if points:
        return float(points[1]), re.findall(r"^FAILED (.*)", ran.stdout, re.M)
    return 0.0, re.findall(r"^E +(.*)", ran.stdout, re.M) or [ran.stderr]  # the file cannot be imported, or there is no pytest


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("submission", help="submission.zip, or a folder")
    parser.add_argument("--tasks", nargs="+", choices=TASKS, default=list(TASKS), help="those that were to do; all by default")
    parser.add_argument("--hidden-seed", type=int, default=0, help="of the tests' random inputs [0, as students have]")
    parser.add_argument("--time-limit", type=float, default=120.0, help="seconds for the tests of one task [120]")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        student = args.submission
        if not os.path.isdir(student):
            if not zipfile.is_zipfile(student):
                sys.exit(f"grade.py: {student} is neither a folder nor a zip file")
            zipfile.ZipFile(student).extractall(scratch)
            student = scratch
        # With 0 points nobody would notice that a submission was packed wrongly.
        homes = [path.parent for path in Path(student).rglob("pool.py")]
        if not homes:
            sys.exit(f"grade.py: {args.submission} holds no pool.py")
        home = min(homes, key=lambda path: len(path.parts))  # a zip file may have a folder around its files
        points = {}
        for task in args.tasks:
            of, file, _ = TASKS[task]
            points[task], failed = graded(task, home / file, args.hidden_seed, args.time_limit)
            print(f"{task:6}{points[task]:6.1f} of {of}", *failed, sep="\n    ", flush=True)
        tasks = [task for task in args.tasks if task != "bonus"]
        print(f"sum   {sum(points[t] for t in tasks):6.1f} of {sum(TASKS[t][0] for t in tasks)}, bonus aside")


if __name__ == "__main__":
    main()
