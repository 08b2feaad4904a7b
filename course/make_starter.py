"""Makes the student's repository from this one: every task's functions lose their bodies, and nothing else changes.

    python course/make_starter.py OUT                   all tasks to do
    python course/make_starter.py OUT --tasks 1 3 5     these to do; the others stand as they are here

What is taken out is found by name in the files themselves, so a starter is never behind them. Standard library only.
"""

import argparse
import ast
import glob
import json
import os
import re
import shutil
import sys

from outline import outline

HERE = os.path.dirname(os.path.abspath(__file__))
ROOT = os.path.dirname(HERE)
TASKS = {  # task: its file, and the functions to write there
    "task1": ("pool.py", ("length_mask", "fold")),
    "task2": ("rollout.py", ("draw", "write")),
    "task3": (
        "reward.py",
        ("contrastive", "self_similarity", "consistency", "hard_negative", "confidence", "total", "scaled", "length_penalty"),
    ),
    "task4": ("similarity.py", ("_Torch.forward", "_Torch.backward")),
    "task5": ("grace.py", ("advantages", "clipped_objective", "kl_k3")),
    "task6": ("grace.py", ("judge", "pathwise")),
    "bonus": ("similarity_triton.py", ("forward_kernel",)),
}
# Its own settings also keep a starter that lies inside a clone from using the clone's files.
PYTEST = "[pytest]\naddopts = -q -p no:warnings\npythonpath = .\n"


def body(source, name):
    """Where the body of a function stands, its docstring left out: `lines[first:last]`, and its indentation.

    name is `function` or `Class.method`. Raises LookupError where there is none, or where it shares the line of its `def`.
    """
    node = ast.parse(source)
    for part in name.split("."):
        found = [n for n in node.body if getattr(n, "name", None) == part]
        if not found:
            raise LookupError(f"no function {name}")
        node = found[0]
    start = node.body[0]
    if start.lineno == node.lineno:
        raise LookupError(f"{name}: its body must begin on a line of its own")
    first = start.end_lineno if ast.get_docstring(node) is not None else start.lineno - 1
    return first, node.end_lineno, start.col_offset


def take(source, name):
    """The lines of a function's body, as they stand."""
    first, last, _ = body(source, name)
    return source.splitlines()[first:last]


def put(source, name, lines):
    """The source with other lines as that function's body."""
    first, last, _ = body(source, name)
    old = source.splitlines()
    return "\n".join([*old[:first], *lines, *old[last:]]) + "\n"


def blank(source, name, task):
    """The source with nothing written in that function yet."""
    indent = " " * body(source, name)[2]
    return put(source, name, [f'{indent}raise NotImplementedError("{task}: {name}")'])


def build(out, tasks=tuple(TASKS)):
    """Write the student's repository into the empty folder `out`, with these tasks to do."""
    if os.path.isdir(out) and os.listdir(out):
        raise FileExistsError(f"{out} is not empty: give a folder that is new")
    shutil.copytree(os.path.join(HERE, "tests"), os.path.join(out, "tests"), ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("train.sh", "test.sh", "setup.sh", "requirements.txt", "requirements-dev.txt"):
        shutil.copy(os.path.join(ROOT, name), out)
    shutil.copy(os.path.join(HERE, "submit.sh"), out)
    shutil.copy(os.path.join(HERE, "outline.py"), os.path.join(out, "tests"))
    given = {}
    for path in glob.glob(os.path.join(ROOT, "*.py")):
        with open(path) as file:
            source = file.read()
        for task in tasks:
            where, names = TASKS[task]
            for name in names if where == os.path.basename(path) else ():
                source = blank(source, name, task)
        write(out, os.path.basename(path), source)
        given |= {file: outline(source) for file, _ in TASKS.values() if file == os.path.basename(path)}
    write(os.path.join(out, "tests"), "given.json", json.dumps(given, indent=1))
    with open(os.path.join(HERE, "handout.md")) as file:
        handout = file.read()
    write(out, "README.md", handout)
    questions = re.findall(r"^\*\*(Question \d+[a-z]?)\.\*\*", handout, re.M)
    write(out, "answers.md", "".join(f"## {question}\n\n\n" for question in questions))
    write(out, "pytest.ini", PYTEST)


def write(folder, name, text):
    with open(os.path.join(folder, name), "w") as file:
        file.write(text)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", help="a new folder")
    parser.add_argument("--tasks", nargs="+", default=list(TASKS), help="1 to 6 and bonus; all by default")
    args = parser.parse_args()
    tasks = [name if name in TASKS else f"task{name}" for name in args.tasks]
    if unknown := [name for name in tasks if name not in TASKS]:
        sys.exit(f"make_starter.py: no such task: {', '.join(unknown)}; there are {', '.join(TASKS)}")
    try:
        build(args.out, tasks)
    except FileExistsError as error:
        sys.exit(f"make_starter.py: {error}")
    print(f"wrote {args.out}, to do: {', '.join(tasks)}. Give it out as it is; its README.md is the handout.")


if __name__ == "__main__":
    main()
