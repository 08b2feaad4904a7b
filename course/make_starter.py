"""Makes the students' repository from this one: the functions of every task lose their bodies, and nothing else changes.

    python course/make_starter.py OUT                   all tasks are to do
    python course/make_starter.py OUT --tasks 1 3 5     only these are to do; the others are solved

The functions are looked up by name in the files themselves, so a starter never falls behind this repository. Standard
library only.
"""

import argparse
import ast
import glob
import json
import os
import shutil
import sys

HERE = os.path.dirname(os.path.abspath(__file__))
ROOT = os.path.dirname(HERE)
TASKS = {  # task: its file, and the functions to write there
    "task1": ("pool.py", ("fold", "pool")),
    "task2": ("rollout.py", ("draw", "sample")),
    "task3": (
        "reward.py",
        ("contrastive", "self_similarity", "consistency", "hard_negative", "confidence", "total", "scaled", "length_penalty"),
    ),
    "task4": ("similarity.py", ("forward_in_tiles", "backward_in_tiles")),
    "task5": ("grace.py", ("advantages", "masked_mean", "clipped_objective", "kl_k3")),
    "task6": ("grace.py", ("judge", "pathwise", "Trainer.objective")),
    "bonus": ("speed/similarity_triton.py", ("forward_kernel",)),
}
FILES = ("train.sh", "test.sh", "setup.sh", "requirements.txt", "requirements-dev.txt", "LICENSE", ".gitignore")
FOLDERS = ("plumbing", "evaluation", "speed", "worlds")  # beside all *.py of the root
GIVEN = os.path.join("tests", "given.json")  # in a starter: the tasks to do, and their files as they were handed out
# These settings also keep a starter that lies inside a clone from using the clone's files.
PYTEST = "[pytest]\naddopts = -q --tb=short -p no:warnings\npythonpath = .\n"


# ---------------------------------------------------------------- bodies of functions


def body(source, name):
    """Where the body of a function stands, without its docstring: `lines[first:last]`, and its indentation.

    name is `function` or `Class.method`. Raises LookupError where there is none, or where it shares the line of its `def`.
    """
    node = ast.parse(source)
    for part in name.split("."):
        node = next((child for child in node.body if getattr(child, "name", None) == part), None)
        if node is None:
            raise LookupError(f"no function {name}")
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


# ---------------------------------------------------------------- the students' repository


def build(out, tasks=tuple(TASKS)):
    """Write the students' repository into the empty folder `out`, with these tasks to do."""
    if os.path.isdir(out) and os.listdir(out):
        raise FileExistsError(f"{out} is not empty: give a folder that is new")
    no_caches = shutil.ignore_patterns("__pycache__")
    shutil.copytree(os.path.join(HERE, "tests"), os.path.join(out, "tests"), ignore=no_caches)
    shutil.copy(os.path.join(HERE, "submit.sh"), out)
    for name in (*glob.glob("*.py", root_dir=ROOT), *FILES):
        shutil.copy(os.path.join(ROOT, name), out)
    for name in FOLDERS:
        shutil.copytree(os.path.join(ROOT, name), os.path.join(out, name), ignore=no_caches)
    for task in tasks:
        file, names = TASKS[task]
        source = read(out, file)
        for name in names:
            indent = " " * body(source, name)[2]
            source = put(source, name, [f'{indent}raise NotImplementedError("{task}: {name}")'])
        write(out, file, source)
    files = {file: {"to_do": [], "source": read(out, file)} for file, _ in TASKS.values()}
    for task in tasks:
        file, names = TASKS[task]
        files[file]["to_do"] += names
    write(out, GIVEN, json.dumps({"tasks": list(tasks), "files": files}, indent=1))
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


def task_names(words):
    """Tasks as the command line gives them (`1`, `task1`, `bonus`) by their names. Raises LookupError for others."""
    names = [word if word in TASKS else f"task{word}" for word in words]
    if unknown := [name for name in names if name not in TASKS]:
        raise LookupError(f"no such task: {', '.join(unknown)}; there are {', '.join(TASKS)}")
    return [name for name in TASKS if name in names]


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", help="a new folder")
    parser.add_argument("--tasks", nargs="+", default=list(TASKS), help="1 to 6 and bonus; all by default")
    args = parser.parse_args()
    try:
        tasks = task_names(args.tasks)
        build(args.out, tasks)
    except (FileExistsError, LookupError) as error:
        sys.exit(f"make_starter.py: {error}")
    print(f"wrote {args.out}, to do: {', '.join(tasks)}. Give it to the students as it is; its README.md is the handout.")


if __name__ == "__main__":
    main()
