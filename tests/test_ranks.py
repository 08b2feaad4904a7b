"""Two ranks take the step that one process takes; what ends one of them ends both, and any number of ranks resumes the run.

On the CPU, over gloo. The ranks are forked (tests/forked.py), but for one run that torchrun itself starts.
"""

import json
import os
import re
import signal
import subprocess
import sys
import time

import pytest
import torch
from conftest import ROWS, command, config, start, weights
from forked import before, fork_ranks, send
from safetensors.torch import load_file

import grace
from plumbing import ranks
from plumbing.run import checkpoints

MORE = [
    ROWS[0] | {"positive": "the boat was found ."},  # shares a text with the first row
    {
        "query": "a very old lamp near the forest around noon",
        "positive": "somebody hid the old lamp around noon near the forest .",
        "negative": ["the boat"],
    },
]


def two_steps(make_policy, lora=None, **settings):
    """Two steps of gradient descent in float64: ids, weights before and after, metrics."""
    policy = make_policy("GPT2", double=True, lora=lora)  # its norms compute in float64, too
    rows = ROWS[:3] + MORE
    if settings.get("mode") == "unsupervised":
        rows = [{"text": text} for row in rows for text in (row["query"], row["positive"])]
    trainer = grace.Trainer(policy, start(policy), rows, config(tokens_per_batch=60, **settings))
    trainer.optimizer = torch.optim.SGD([p for p in policy.model.parameters() if p.requires_grad], lr=1e-2)
    ids, metrics, before = [], [], weights(policy)
    for _ in range(2):
        step = trainer.step()
        metrics.append({name: x for name, x in step.items() if not name.endswith(("_s", "_gb"))})
        ids.append(trainer.batch.rollouts.ids)
    return {"ids": ids, "before": before, "after": weights(policy), "metrics": metrics}


@pytest.mark.parametrize(
    "settings",
    [
        dict(batch=5, minibatches=2, prompt_weight=0.5),  # minibatches of five groups: three for one rank, two for the other
        dict(recipe="paper", batch=5, minibatches=2, kl=0.1),
        dict(mode="unsupervised", batch=5, lora=4),
        dict(recipe="paper", mode="unsupervised", batch=3, minibatches=3),  # one group each: a rank is left without
    ],
    ids=["full", "paper", "full, unsupervised, adapters", "paper, unsupervised"],
)
def test_the_step_of_one_process(make_policy, tmp_path, monkeypatch, settings):
    monkeypatch.setattr(grace, "MAX_GRAD_NORM", 1e9)  # neither clipping nor Adam, which would hide a gradient of a wrong scale
    ended = fork_ranks(lambda: torch.save(two_steps(make_policy, **settings), tmp_path / f"{ranks.rank}.pt"), tmp_path)
    assert [code for code, _ in ended] == [0, 0], ended
    one, *two = two_steps(make_policy, **settings), *(torch.load(tmp_path / f"{rank}.pt") for rank in (0, 1))
    assert (one["after"] - one["before"]).abs().max() > 1e-3
    assert torch.equal(two[0]["after"], two[1]["after"])
    for rank in two:
        assert all(torch.equal(a, b) for a, b in zip(rank["ids"], one["ids"], strict=True))
        assert (rank["after"] - one["after"]).abs().max() < 1e-12
        for a, b in zip(rank["metrics"], one["metrics"], strict=True):
            assert a == pytest.approx(b, rel=1e-6, abs=1e-12)


# ---------------------------------------------------------------- whole runs


@pytest.fixture(scope="module")
def run(tiny_world, no_page, tmp_path_factory):
    """The arguments of a run of three steps, and the folder in which one process has made it."""
    one = tmp_path_factory.mktemp("run") / "one"
    arguments = lambda out, *more: command(tiny_world, out, "--steps 3 --batch 5 --device cpu --eval-every 0", *more)
    grace.main(arguments(one))

    def near(out):
        """Whether a folder's model is that of one process but for rounding, of which Adam makes a step where no gradient is."""
        a, b, start = (load_file(folder / "model.safetensors") for folder in (one, out, tiny_world / "model"))
        apart = lambda x, y: sum(float((x[name] - y[name]).pow(2).sum()) for name in x) ** 0.5
        assert apart(a, start) > 0.1
        return apart(a, b) < 5e-3 * apart(a, start)

    return arguments, near


def in_second_step(rank, method, act):
    """In one of the ranks: `act()` before a method of the trainer in its second step."""
    when = lambda trainer, *_: ranks.rank == rank and trainer.step_number == 1
    setattr(grace.Trainer, method, before(getattr(grace.Trainer, method), when, act))  # in a forked process: nothing to undo


def test_a_rank_that_runs_out_of_memory(run, tmp_path):
    """It cannot make its step again alone. Both ranks end, and two continue from the checkpoint."""
    arguments, near = run
    out, began = tmp_path / "out", time.time()

    def out_of_memory():
        raise torch.OutOfMemoryError("CUDA out of memory")

    def program():
        in_second_step(1, "objective", out_of_memory)
        grace.main(arguments(out))

    (first, _), (second, printed) = fork_ranks(program, tmp_path)
    assert (first, second) == (1, 1) and time.time() - began < 60
    assert re.match(r"grace.py: step 2: out of memory with --tokens-per-batch \d+; lower it, and --resume continues", printed)
    assert [os.path.basename(x) for x in checkpoints(out)] == ["00000001"]
    (first, printed), (second, silent) = fork_ranks(lambda: grace.main(arguments(out, "--resume")), tmp_path)
    assert (first, second) == (0, 0) and "resumed from" in printed and silent == ""
    assert near(out) and len((out / "metrics.jsonl").read_text().splitlines()) == 3


def test_a_signal_to_one_rank(run, tmp_path):
    """Both finish the step. The second one does not end before the checkpoint is written: the first would be ended, too."""
    arguments, near = run
    out = tmp_path / "out"

    def program():
        in_second_step(0, "update", lambda: send(signal.SIGTERM))
        torch.save = before(torch.save, lambda *_: True, lambda: time.sleep(0.5))
        grace.main(arguments(out, "--save-every 0"))

    (first, printed), (second, silent) = fork_ranks(program, tmp_path)
    assert (first, second) == (143, 143) and silent == ""
    assert printed.endswith("stopped after step 2, with a checkpoint: the same command with --resume continues\n")
    assert [os.path.basename(x) for x in checkpoints(out)] == ["00000002"]
    grace.main(arguments(out, "--save-every 0 --resume"))
    assert near(out)


def test_torchrun(run, tmp_path):
    """It is stopped by a signal after its first steps; one process continues."""
    arguments, near = run
    out = tmp_path / "out"
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "grace.py"]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    with open(tmp_path / "printed", "w") as printed:
        process = subprocess.Popen(
            [*torchrun, *arguments(out, "--steps 3000")], env=environment, stdout=printed, stderr=printed
        )
        while process.poll() is None and len(checkpoints(out)) < 2:
            time.sleep(0.1)
        process.send_signal(signal.SIGTERM)
        process.wait(timeout=60)
    printed = (tmp_path / "printed").read_text()
    assert printed.count("64 training rows") == printed.count("with a checkpoint: the same command with --resume") == 1, printed
    last = json.loads((out / "metrics.jsonl").read_text().splitlines()[-1])["step"]
    assert os.path.basename(checkpoints(out)[-1]) == f"{last:08d}"
    grace.main(arguments(out, f"--resume --steps {last + 1}"))
    assert (out / "summary.json").exists() and len((out / "metrics.jsonl").read_text().splitlines()) == last + 1


def test_shares(monkeypatch):
    """They cover everything once, in order, and no rank is left without where there are as many items as ranks."""
    assert ranks.size == 1 and ranks.first() and ranks.gather("x") == ["x"]
    for n, size in [(7, 2), (2, 2), (5, 3), (1, 2), (64, 8)]:
        monkeypatch.setattr(ranks, "size", size)
        shares = []
        for rank in range(size):
            monkeypatch.setattr(ranks, "rank", rank)
            shares.append(range(n)[ranks.mine(n)])
        assert [i for share in shares for i in share] == list(range(n)) and (n < size or all(shares))
