"""The command `status`: where a run is, and each sign of collapse."""

import pytest

import grace
from plumbing.status import health


def shown(out, capsys):
    grace.main(["status", str(out)])
    return capsys.readouterr().out


def test_a_finished_run(finished_run, capsys):
    printed = shown(finished_run, capsys)
    assert "finished, after 4 steps" in printed and "after without rationale" in printed and "too few steps" in printed


def test_a_run_that_is_not_finished(two_checkpoints, capsys):
    with open(two_checkpoints / "metrics.jsonl", "a") as file:
        file.write('{"step": 5')  # a line being written right now
    printed = shown(two_checkpoints, capsys)
    assert "step 4 of 4" in printed and "newest checkpoint: 00000004" in printed
    (two_checkpoints / "metrics.jsonl").unlink()
    assert "before the first of 4 steps" in shown(two_checkpoints, capsys)


def test_a_folder_without_a_run(tmp_path):
    with pytest.raises(SystemExit, match="no run is here"):
        grace.main(["status", str(tmp_path)])


HEALTHY = dict(
    step=1, reward=-1.0, reward_std=0.3, no_spread=0.0, distinct=1.0, distinct_texts=1.0, cosine=0.6, effective_rank=20.0,
    length=6.0, truncated=0.0, empty=0.0, kl_start=0.2, approx_kl=0.0, clip_fraction=0.0, first_ratio_off=1e-6, step_s=0.1,
)  # fmt: skip


def bad_signs(**end):
    """The names of the signs that are not ok, for a run whose last steps have these metrics."""
    steps = []
    for i in range(100):
        steps.append({**HEALTHY, "step": i + 1, "reward": -1 + i / 200, "heldout_ndcg_at_10": 0.1 + 0.8 * min(1, i / 50)})
        steps[-1] |= end if i >= 60 else {}
    signs = health({"max_new_tokens": 20, "before": {"ndcg_at_10": 0.1}}, steps)
    assert len(signs) == 14
    return [name for name, *_, trouble in signs if trouble]


@pytest.mark.parametrize(
    "end, sign",
    [
        (dict(reward=-2.0), "reward"),
        (dict(distinct_texts=0.1), "distinct between texts"), (dict(cosine=0.85), "cosine between texts"),
        (dict(effective_rank=5.0), "effective rank"), (dict(length=16.0, truncated=0.1), "length"),
        (dict(truncated=0.5), "truncated"), (dict(empty=0.9), "empty rationales"), (dict(kl_start=2.0), "KL to the start"),
        (dict(approx_kl=0.2), "KL of one batch"), (dict(clip_fraction=0.6), "clipped"),
        (dict(first_ratio_off=2.5), "first ratio off 1"), (dict(heldout_ndcg_at_10=0.3), "held-out nDCG@10"),
    ],
)  # fmt: skip
def test_each_sign_alone(end, sign):
    assert bad_signs(**end) == [sign] and bad_signs() == []


def test_a_sign_that_is_not_in_every_line_is_left_out():
    """As held-out scores are not, where a run is resumed with another --eval-every."""
    steps = [HEALTHY | {"step": i + 1} for i in range(100)]
    for metrics in steps[61:99]:
        del metrics["kl_start"]
    signs = [name for name, *_ in health({"max_new_tokens": 20, "before": {}}, steps)]
    assert "reward" in signs and "KL to the start" not in signs


def test_agreement_within_groups_is_a_sign_only_with_sameness_between_texts():
    """All rollouts of a text agree once all are right; all texts' rationales agree in a collapse."""
    agreed = dict(reward_std=0.01, no_spread=0.9, distinct=0.25)
    assert bad_signs(**agreed) == []
    signs = ["spread within groups", "groups without spread"]
    assert bad_signs(**agreed, distinct_texts=0.1) == [*signs, "distinct between texts"]
    assert bad_signs(**agreed, cosine=0.85) == [*signs, "cosine between texts"]
    assert bad_signs(no_spread=0.9, reward=-2.0) == ["reward", "groups without spread"]  # nothing was learned: not agreement
