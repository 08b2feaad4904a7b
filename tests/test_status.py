"""The command `status`: where a run is, in every state it can be in, and each sign of trouble."""

import pytest

import grace
from plumbing.status import health


def test_every_state(finished_run, two_checkpoints, tmp_path, capsys):
    grace.main(["status", str(finished_run)])
    printed = capsys.readouterr().out
    assert "finished, after 4 steps" in printed and "after without rationale" in printed and "too few steps" in printed
    grace.main(["status", str(two_checkpoints)])
    assert "step 4 of 4" in (printed := capsys.readouterr().out) and "newest checkpoint: 00000004" in printed
    with open(two_checkpoints / "metrics.jsonl", "a") as file:
        file.write('{"step": 5')  # a line being written right now
    grace.main(["status", str(two_checkpoints)])
    assert "step 4 of 4" in capsys.readouterr().out
    with pytest.raises(SystemExit, match="no run is here"):
        grace.main(["status", str(tmp_path / "nowhere")])


HEALTHY = dict(
    step=1, reward=-1.0, reward_std=0.3, no_spread=0.0, distinct=1.0, cosine=0.6, effective_rank=20.0, length=6.0,
    truncated=0.0, empty=0.0, kl_start=0.2, approx_kl=0.0, clip_fraction=0.0, first_ratio_off=1e-6, step_s=0.1,
)  # fmt: skip


@pytest.mark.parametrize(
    "metric, end, sign",
    [
        ("reward", -2.0, "reward"), ("reward_std", 0.03, "spread within groups"), ("no_spread", 0.5, "groups without spread"),
        ("distinct", 0.4, "distinct rationales"), ("cosine", 0.85, "cosine between texts"),
        ("effective_rank", 5.0, "effective rank"), ("length", 16.0, "length"), ("truncated", 0.5, "truncated"),
        ("empty", 0.9, "empty rationales"), ("kl_start", 2.0, "KL to the start"), ("approx_kl", 0.2, "KL of one batch"),
        ("clip_fraction", 0.6, "clipped"), ("first_ratio_off", 1.5, "first ratio off 1"),
        ("heldout_ndcg_at_10", 0.3, "held-out nDCG@10"), (None, None, None),
    ],
)  # fmt: skip
def test_each_sign_alone(metric, end, sign):
    steps = []
    for i in range(100):
        steps.append({**HEALTHY, "step": i + 1, "reward": -1 + i / 200, "heldout_ndcg_at_10": 0.1 + 0.8 * min(1, i / 50)})
        if metric and i >= 60:
            steps[-1][metric] = end
    lines = health(steps, {"max_new_tokens": 20, "before": {"ndcg_at_10": 0.1}})[1:]
    assert len(lines) == 14
    assert [line for line in lines if not line.endswith("ok")] == [
        line for line in lines if sign and line.startswith(sign + " ")
    ]
    assert sign is None or any(line.startswith(sign + " ") for line in lines)
