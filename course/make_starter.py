"""Makes the students' repository from this one: the functions of every task lose their bodies, and nothing else changes.

    python course/make_starter.py OUT                               all tasks are to do
    python course/make_starter.py OUT --tasks task1 task3 task5     only these are to do; the others are solved

The functions are looked up by name in the files themselves, so a starter never falls behind this repository. Standard
library only.
"""

import argparse
import ast
import glob
import os
import shutil
import sys

HERE = os.path.dirname(os.path.abspath(__file__))
ROOT = os.path.dirname(HERE)
TASKS = {  # task: its points, its file, and the functions to write there
    "task1": (10, "pool.py", ("fold", "pool")),
    "task2": (15, "rollout.py", ("draw", "sample")),
    "task3": (
        15,
        "reward.py",
        ("contrastive", "self_similarity", "consistency", "hard_negative", "confidence", "total", "scaled", "length_penalty"),
    ),
    "task4": (10, "similarity.py", ("forward_in_tiles", "backward_in_tiles")),
    "task5": (10, "grace.py", ("advantages", "masked_mean", "clipped_objective", "kl_k3")),
    "task6": (10, "grace.py", ("judge", "pathwise", "Trainer.objective")),
    "bonus": (10, "speed/similarity_triton.py", ("forward_kernel",)),
}
FILES = ("train.sh", "test.sh", "setup.sh", "requirements.txt", "requirements-dev.txt", "LICENSE", ".gitignore")
FOLDERS = ("plumbing", "evaluation", "speed", "worlds")  # beside all *.py of the root
# These settings also keep a starter that lies inside a clone from using the clone's files.
PYTEST = "[pytest]\naddopts = -q --tb=short -p no:warnings\npythonpath = .\n"


# ---------------------------------------------------------------- bodies of functions


def body(source, name):
    """Where the body of a function stands, without its docstring: `lines[first:last]`, and its indentation.

    name is `function` or `Class.method`.
    """
    node = ast.parse(source)
    for part in name.split("."):
        node = next(child for child in node.body if getattr(child, "name", None) == part)
    start = node.body[0]
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


# ---------------------------------------------------------------- the students' repository


def build(out, tasks=tuple(TASKS)):
    """Write the students' repository into the empty folder `out`, with these tasks to do, and their tests alone."""
    if os.path.isdir(out) and os.listdir(out):
        raise FileExistsError(f"{out} is not empty: give a folder that is new")
    os.makedirs(os.path.join(out, "tests"))
    for name in FOLDERS:
        shutil.copytree(os.path.join(ROOT, name), os.path.join(out, name), ignore=shutil.ignore_patterns("__pycache__"))
    for name in (*glob.glob("*.py", root_dir=ROOT), *FILES):
        shutil.copy(os.path.join(ROOT, name), out)
    for name in ("submit.sh", "tests/conftest.py", *(f"tests/test_{task}.py" for task in tasks)):
        shutil.copy(os.path.join(HERE, name), os.path.join(out, name))
    for task in tasks:
        _, file, names = TASKS[task]
        source = read(out, file)
        for name in names:
            indent = " " * body(source, name)[2]
            source = put(source, name, [f'{indent}raise NotImplementedError("{task}: {name}")'])
        write(out, file, source)
    text = read(HERE, "handout.md")
    if len(tasks) < len(TASKS):
        text = text.replace("\n\n", f"\n\n**To do: {', '.join(tasks)}. The rest is solved here and gives no points.**\n\n", 1)
    write(out, "README.md", text)
    write(out, "answers.md", "".join(f"## Question {task[4:]}\n\n\n" for task in tasks if task != "bonus"))
    write(out, "pytest.ini", PYTEST)


def read(folder, name):
    with open(os.path.join(folder, name), encoding="utf-8") as file:
        return file.read()


def write(folder, name, text):
    with open(os.path.join(folder, name), "w", encoding="utf-8") as file:
        file.write(text)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", help="a new folder")
    parser.add_argument("--tasks", nargs="+", choices=TASKS, default=list(TASKS), help="those to do; all by default")
    args = parser.parse_args()
    try:
        build(args.out, args.tasks)
    except FileExistsError as error:
        sys.exit(f"make_starter.py: {error}")
    print(f"wrote {args.out}, to do: {', '.join(args.tasks)}. Give it to the students as it is; its README.md is the handout.")


if __name__ == "__main__":
    main()
