"""bench/: the timeline of a step against a case worked out by hand, and the script that writes the page of a GPU."""

import os
import subprocess
from pathlib import Path

import numpy as np
import pytest

ROOT = Path(__file__).parent.parent


@pytest.fixture
def scaling(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "bench"))
    import scaling

    return scaling


def case(scaling, **changes):
    """A network of 100 numbers with one layer, on two ranks whose every rate is 1, one thing after the other."""
    model = scaling.Model("tiny", parameters=100, layers=1, hidden=2, keys=3, vocabulary=10)
    rates = dict(products=1.0, float32=1.0, memory=1.0, link=1.0, network=1.0, gather=1.0, latency=0.0)
    machine = scaling.Machine(**{**rates, "launch": 0.0, "launch_decoding": 0.0, "weight": 1, "overlap": False, **changes})
    return model, machine, scaling.Job(batch=2, ranks=2, rollouts=2, prompt=4, roles=1, budget=1000)


def test_a_step_by_hand(scaling):
    """Two ranks, a group of two rationales each, the second rank's twice as long: it is waited for, at both meetings."""
    model, machine, job = case(scaling)
    lengths, anchors = np.array([[1, 1], [2, 2]]), np.array([[1], [1]])
    spans = scaling.timeline(model, machine, job, lengths, anchors)
    body, head = 2 * 80, 2 * 20  # operations per token
    prefill = 4 * body + 4 * 4 * 1 * 2 * 2  # four tokens; attention: 4 layers D context, the context 2 on average

    def step(rows, t):  # reads weights, the prompt's and the rows' own keys, the logits; computes body, attention and head
        return 100 + 6 * (4 + rows * t) + 8 * 4 * 10 * rows + rows * (body + 4 * 2 * (4 + t) + head)

    sample = [prefill + step(2, 0), prefill + step(2, 0) + step(2, 1)]
    anchor = prefill + step(1, 0)
    gather = 2 * 3 * (20 * 2 + 4 * 2)
    reward = 4 * 2 * 4 * 4 * 2

    def update(n):  # n tokens per rationale, two of them
        once = 2 * n * (body + 4 * 2 * (4 + n / 2)) + prefill
        return 4 * once + 5 * head * (2 * n + 4) + 24 * 4 * 10 * 2 * n

    reduce, optimizer = 2 * 0.5 * 4 * 100, 100 * 34
    expected = sample[1] + gather + anchor + reward + update(2) + reduce + optimizer
    seconds = scaling.totals(spans)
    assert seconds["step"] == pytest.approx(expected)
    assert seconds["wait"] == pytest.approx((sample[1] - sample[0] + update(2) - update(1)) / 2)
    assert sum(seconds.values()) == pytest.approx(2 * seconds["step"])  # the phases add up to the step
    assert [phase for phase, _, _ in spans].count("wait") == 3


def test_one_rank_waits_for_nobody(scaling):
    model, machine, _ = case(scaling)
    job = scaling.Job(batch=2, ranks=1, rollouts=2, prompt=4, roles=1)
    seconds = scaling.totals(scaling.timeline(model, machine, job, np.array([[1, 3], [2, 2]]), np.array([[1], [1]])))
    assert seconds["wait"] == seconds["gather"] == seconds["reduce"] == 0


def test_work_at_the_same_time_takes_as_long_as_the_longest(scaling):
    model, machine, job = case(scaling, overlap=True, products=np.inf)
    lengths = np.array([[3, 1]])
    read = [100 + 6 * (4 + rows * t) + 320 * rows for t, rows in enumerate((2, 1, 1))]
    assert scaling.sampling(model, machine, job, lengths) == pytest.approx(sum(read))
    model, machine, job = case(scaling, overlap=True, products=np.inf, memory=np.inf, launch_decoding=7.0)
    assert scaling.sampling(model, machine, job, lengths) == pytest.approx(3 * 7)


def test_micro_batches(scaling):
    """As many as grace.Trainer.micro_batches makes."""
    expected = {(10,) * 10: 1, (10,) * 11: 2, (60, 60): 2, (300,): 1, (): 0, (50, 20, 30): 2}
    assert {costs: scaling.micro_batches(np.array(costs), 100) for costs in expected} == expected


def test_the_page_has_the_tables(scaling, capsys):
    scaling.tables()
    rows = [line for line in capsys.readouterr().out.splitlines() if line.startswith("|")]
    page = (ROOT / "docs" / "scaling.md").read_text(encoding="utf-8").splitlines()
    assert len(rows) == 4 * (9 + 2) and set(rows) <= set(page)


def test_the_page_of_a_gpu(tmp_path):
    """Parts that work, one that fails and one of an earlier call: the page has all of them, in order."""
    python = tmp_path / "python"
    env = {**os.environ, "TINY": "1", "FOLDER": str(tmp_path / "gpu"), "PYTHON": str(python)}

    def gpu(program, *parts):
        python.write_text(f"#!/bin/sh\n{program}\n")
        python.chmod(0o755)
        return subprocess.run(["bash", "bench/gpu.sh", *parts], cwd=ROOT, env=env, capture_output=True, text=True)

    assert gpu('echo "goal | speed | 5 times | 6 times |"; echo "$@ takes long"', "similarity").returncode == 0
    gpu("echo half a table; echo out of memory >&2; exit 3", "machine", "rollout")
    page = (tmp_path / "gpu" / "page.md").read_text()
    assert "| speed | 5 times | 6 times | similarity |" in page
    assert "| The machine | - | failed | machine |" in page and page.count("**Failed**: exit code 3. out of memory") == 2
    assert "bench/similarity.py --rows 64 --group 4 --dim 32 --device cpu takes long" in page and "half a table" in page
    assert page.index("## The machine") < page.index("## Rollouts") < page.index("## The in-batch similarity")
    wrong = gpu("exit 0", "no_such")
    assert wrong.returncode == 2 and "is none of: machine tests" in wrong.stderr
