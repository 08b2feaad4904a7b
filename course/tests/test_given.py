"""What is given works and stands as it was, whatever is still to do."""

import json
import os

from outline import outline

from policy import Policy
from worlds.make import build_world


def test_the_embedded_world_is_built_and_opens(tmp_path):
    policy = Policy.load(build_world(str(tmp_path), train=8, heldout=4, steps=1))
    assert policy.prompts.render("x").endswith("<user> x <assistant>") and len(policy.end_ids) == 1


def test_only_bodies_were_changed():
    """Grading takes the bodies alone: a new function beside them, or other arguments, would be lost there."""
    here = os.path.dirname(os.path.abspath(__file__))
    with open(os.path.join(here, "given.json")) as file:
        given = json.load(file)["outlines"]
    for name, before in given.items():
        with open(os.path.join(here, "..", name)) as file:
            now = outline(file.read())
        assert now == before, f"{name}: keep names and arguments, begin a body on a line of its own, put helpers inside a body"


def test_everything_can_be_imported():
    import eval_mteb_subset
    import grace

    assert grace.Trainer and eval_mteb_subset.evaluate_tasks
