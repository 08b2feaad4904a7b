"""What is given works, whatever is still to do."""

import toy
from policy import Policy


def test_the_embedded_world_is_built_and_opens(tmp_path):
    policy = Policy.load(toy.build(str(tmp_path), train=8, heldout=4, steps=1))
    assert policy.render("x").endswith("<user> x <assistant>") and len(policy.end_ids) == 1


def test_everything_can_be_imported():
    import eval_mteb_subset
    import grace

    assert grace.Trainer and eval_mteb_subset.evaluate_tasks
