"""Two ranks do what one process does: steps, sharded steps, reading texts, whole runs; and what ends one ends both.

The ranks run on the CPU, over gloo, in the program tests/two_ranks.py; torchrun itself starts one run.
"""

import json
import os
import subprocess
import sys

import pytest
from conftest import command
from two_ranks import CASES, CHECKS, weights_off

import grace
from plumbing import ranks
from plumbing.errors import GraceError

PROGRAM = os.path.join(os.path.dirname(os.path.abspath(__file__)), "two_ranks.py")
TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}
NOISE = 2e-5  # float noise, as a share of how far the weights moved; a sum that is off by one group is off by a tenth
ADAMS = 5e-3  # the same, as a share of norms, after AdamW, which makes a step of the noise where there is no gradient


@pytest.fixture(scope="module")
def figures(tiny_world):
    """What the program prints, by check."""
    run = subprocess.run([sys.executable, PROGRAM, str(tiny_world)], env=ENVIRONMENT, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr[-3000:]
    lines = [json.loads(line) for line in run.stdout.splitlines()]
    return {check: [line for line in lines if line["check"] == check] for check in CHECKS}


def test_steps(figures):
    """Of both recipes, with labels and without, with minibatches, epochs, twins, uneven shares, and sharded."""
    cases = {line["case"]: line for line in figures["steps"]}
    assert cases.keys() == {*CASES, "out of memory"}
    for name, line in cases.items():
        assert line["same_ids"] and line["ranks_equal"], name
        assert line["moved"] > 0.01 and line["off"] < NOISE * line["moved"] and line["metrics_off"] < 1e-3, line
        assert line["budgets"] == [30, 30] if name == "out of memory" else line["budgets"][0] in (60, 4096)


def test_reading(figures):
    """Vectors, sampled ones too, the text loss and the counts are those of one process, to the bit."""
    new, again = figures["encoding"]
    assert new["same"] == again["same"] == [True, True]
    assert new["counts"]["read"] == again["counts"]["remembered"] == 16 and new["counts"]["remembered"] == 0


def test_scores(figures):
    same, printed = figures["scores"]
    assert same["codes"] == [0, 0] and same["same"] and same["tasks"] == 2
    assert printed["printed"] == [True, False] and printed["counts"]


def test_what_stops_a_run(figures):
    """It stops both ranks, one sentence says why, and what was done is saved; any number of ranks goes on from there."""
    lines = figures["stops"]
    runs = {line["run"]: line for line in reversed(lines)}  # the first of each name
    for name in ("sharded, resumed by one", "killed, resumed sharded"):
        assert runs[name]["moved"] > 0.1 and runs[name]["off"] < ADAMS * runs[name]["moved"]

    def ended(name, codes, sentence, saved):
        line = runs[name]
        assert line["codes"] == codes and line["saved"] == saved, line
        said = [text for rank in line["said"] for text in rank if text.startswith("grace.py: ")]
        assert len(said) == 1 and sentence in said[0], line

    assert runs["sharded"]["codes"] == [0, 0] and runs["sharded"]["saved"] == ["00000001", "00000002"]
    ended("killed", [1, -9], "another rank has ended; the same command with --resume continues", ["00000001"])
    assert "step 1 was the last whole one and is saved: --resume continues from it" in runs["killed"]["said"][0]
    stopped = runs["signal"]
    assert stopped["codes"] == [143, 143] and stopped["saved"] == ["00000002"] and not stopped["said"][1]
    assert stopped["said"][0][-1] == "stopped after step 2, with a checkpoint: the same command with --resume continues"
    ended("not-finite", [1, 1], "step 2: the loss is not finite", ["00000001"])
    assert runs["shown"]["files"] == ["not_finite_step_2.json"]
    ended("refused", [1, 1], "the second rank does not like this", ["00000001"])
    ended("bug", [1, 1], "rank 1 failed: KeyError: 'a bug'", ["00000001"])
    assert any("Traceback" in text for text in runs["bug"]["said"][1])  # of what only a programmer can put right
    ended("memory", [1, 1], "step 2: --tokens-per-batch 4096: out of memory; lower it, and --resume continues", [])
    ended("full", [1, 1], "metrics.jsonl: cannot be written", ["00000002"])
    ended("no-model", [1, 1], "no/such/model: cannot be loaded", [])
    ended("too-many", [1, 1], "a batch has only 4 groups, and each of 2 ranks needs", [])


def test_torchrun(tiny_world, tmp_path):
    """The command line of always, behind torchrun."""
    more = "--steps 2 --batch 5 --minibatches 2 --device cpu --eval-every 0 --save-every 0"
    grace.main(command(tiny_world, tmp_path / "one", more))
    run = subprocess.run(
        [*TORCHRUN, "grace.py", *command(tiny_world, tmp_path / "two", more)], env=ENVIRONMENT, capture_output=True
    )
    assert run.returncode == 0, run.stderr[-3000:]
    off = weights_off(tmp_path / "one", tmp_path / "two", tiny_world / "model")
    assert off["moved"] > 0.1 and off["off"] < ADAMS * off["moved"]
    assert run.stdout.count(b"64 training rows") == 1


def test_connections_are_closed_before_python_ends(tmp_path):
    """What is registered before `start` runs after what that registers. Left open, gloo's threads abort a rank now and then."""
    (tmp_path / "program.py").write_text(
        "import atexit\nimport torch.distributed as dist\nfrom plumbing import ranks\n"
        "atexit.register(lambda: print('open' if dist.is_initialized() else 'closed', flush=True))\n"
        "ranks.start()\nprint(ranks.exchange(ranks.first()))\n"
    )
    root = os.path.dirname(os.path.dirname(PROGRAM))
    run = subprocess.run([*TORCHRUN, str(tmp_path / "program.py")], env=ENVIRONMENT | {"PYTHONPATH": root}, capture_output=True)
    assert run.returncode == 0, run.stderr[-3000:]
    assert run.stdout.split(b"\n")[:2] == [b"[True, False]", b"closed"]


def test_one_process_shares_nothing():
    """Every function of ranks.py does nothing there, and errors are the caller's own."""
    assert ranks.size() == 1 and ranks.first() and ranks.mine() == slice(0, None, 1)
    assert ranks.exchange(7) == [7] and ranks.together(lambda: 7) == [7] and ranks.last_word("why") == "why"
    assert list(ranks.each(str, iter([1, 2]))) == ["1", "2"] and ranks.by_first(str)(3) == "3"
    with pytest.raises(KeyError):
        ranks.together(lambda: {}["no"])


@pytest.mark.parametrize(
    "n, flags, message",
    [
        (1, "--shard", "torchrun --standalone --nproc-per-node N grace.py"),
        (4, "--shard --batch 5", "must divide 10 groups"),
        (2, "--shard --batch 4 --lora 8", "small enough for every rank"),
    ],
)
def test_shard_refuses(tiny_world, tmp_path, monkeypatch, n, flags, message):
    monkeypatch.setattr(ranks, "_size", n)
    with pytest.raises(GraceError, match=message):
        grace.parse(command(tiny_world, tmp_path, flags), "")
