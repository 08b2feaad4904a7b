"""What is given works, and stands as it was, whatever is still to do."""

import ast
import json
import os

import toy
from policy import Policy


def test_the_embedded_world_is_built_and_opens(tmp_path):
    policy = Policy.load(toy.build(str(tmp_path), train=8, heldout=4, steps=1))
    assert policy.render("x").endswith("<user> x <assistant>") and len(policy.end_ids) == 1


def test_only_bodies_were_changed():
    """Grading takes the bodies alone: a new function beside them, or other arguments, would be lost there."""
    here = os.path.dirname(os.path.abspath(__file__))
    with open(os.path.join(here, "given.json")) as file:
        given = json.load(file)
    for name, before in given.items():
        with open(os.path.join(here, "..", name)) as file:
            tree = ast.parse(file.read())
        now = {}
        for node in tree.body:
            for part in (node, *(node.body if isinstance(node, ast.ClassDef) else ())):
                if isinstance(part, (ast.FunctionDef, ast.ClassDef)):
                    now[part.name] = ast.unparse(part.args) if isinstance(part, ast.FunctionDef) else "a class"
                    assert part.body[0].lineno > part.lineno, f"{name}, {part.name}: begin the body on a line of its own"
        assert now == before, f"{name}: keep names and arguments as they were; helpers go inside a body"


def test_everything_can_be_imported():
    import eval_mteb_subset
    import grace

    assert grace.Trainer and eval_mteb_subset.evaluate_tasks
