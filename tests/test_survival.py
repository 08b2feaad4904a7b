"""Killed, stopped, starved or damaged: a run loses nothing, and says what to do.

    python tests/test_survival.py --kills 100        the long form of the kill tests; prints the figures of docs/reliability.md
"""

import argparse
import contextlib
import copy
import errno
import json
import math
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time

os.environ.setdefault("HF_HUB_OFFLINE", "1")
sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))

import pytest  # noqa: E402
import torch  # noqa: E402
from safetensors.torch import load_file  # noqa: E402

import checkpoint  # noqa: E402
import grace  # noqa: E402
import guard  # noqa: E402
import look  # noqa: E402
import toy  # noqa: E402
from checkpoint import checkpoints, damage, newest_whole  # noqa: E402
from config import Config  # noqa: E402
from data import GraceError  # noqa: E402
from guard import Signals, within_memory  # noqa: E402
from policy import Policy  # noqa: E402

# ---------------------------------------------------------------- runs, and what must be equal


def command(world, out, *more, data="train", heldout="heldout"):
    given = f"--model {world}/model --data {world}/data/{data}.jsonl --heldout {world}/data/{heldout}.jsonl --out {out}"
    return f"{given} --batch 4 --rollouts 2 --lr 1e-3 --save-every 1 --eval-every 5 {' '.join(more)}".split()


def same(one, two):
    """Two finished runs: weights, metrics and rationales, to the bit. Times and memory aside."""
    a, b = (load_file(os.path.join(out, "model.safetensors")) for out in (one, two))
    assert a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)
    timeless = lambda line: {k: v for k, v in json.loads(line).items() if not k.endswith(("_s", "_gb"))}
    a, b = ([timeless(line) for line in open(os.path.join(out, "metrics.jsonl"))] for out in (one, two))
    assert a == b and [line["step"] for line in a] == list(range(1, len(a) + 1))
    a, b = (open(os.path.join(out, "rationales.md")).read() for out in (one, two))
    assert a == b
    a, b = (json.load(open(os.path.join(out, "summary.json"))) for out in (one, two))
    assert all(a[moment] == b[moment] for moment in ("before", "after", "after_without_rationale"))


# ---------------------------------------------------------------- kills, in children of a process that has all imported


def child(arguments, prepare=None):
    """A training run in a forked process. Returns its id."""
    if pid := os.fork():
        return pid
    code = 1
    try:
        quiet = os.open(os.devnull, os.O_WRONLY)
        os.dup2(quiet, 1), os.dup2(quiet, 2)
        if prepare:
            prepare()
        grace.main(arguments)
        code = 0
    except SystemExit as stop:
        code = stop.code if isinstance(stop.code, int) else 2
    finally:
        os._exit(code)


def outcome(pid):
    """How a child ended: its exit code, or minus the signal that killed it."""
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def where_it_died(out):
    """What a killed run was doing, by what it left."""
    folder = os.path.join(out, "checkpoints")
    if os.path.isdir(os.path.join(out, "final.tmp")):
        return "saving the result"
    if os.path.isdir(folder) and any(name.endswith(".tmp") for name in os.listdir(folder)):
        return "saving a checkpoint"
    return "in a step or evaluation" if os.path.isdir(folder) else "before the first checkpoint"


def random_kills(world, folder, kills, number, steps, seed=0):
    """Runs that get a signal at random moments, each resumed until it is finished, against one never interrupted."""
    straight, rng, seen = os.path.join(folder, "straight"), random.Random(seed), {}
    start = time.time()
    assert outcome(child(command(world, straight, f"--steps {steps}"))) == 0
    span, runs, left = 0.15 * (time.time() - start), 0, kills
    while left:
        out, done = os.path.join(folder, f"run-{runs}"), None
        while done != 0:
            pid = child(command(world, out, f"--steps {steps} --resume"))
            if left:
                time.sleep(rng.uniform(0, span))
                os.kill(pid, number)
            done = outcome(pid)
            assert done in (0, -number, 128 + number), f"exit code {done}"
            if done != 0:
                left -= 1
                place = "stopped with a checkpoint" if done == 128 + number else where_it_died(out)
                seen[place] = seen.get(place, 0) + 1
        same(straight, out)
        runs += 1
    return {"signal": signal.Signals(number).name, "kills": kills, "runs": runs, "steps": steps, **seen}


def kill_at_call(n):
    """Kill this process at its n-th call of anything that changes what is on the disk."""
    calls = 0

    def counted(function):
        def call(*args, **kwargs):
            nonlocal calls
            calls += 1
            if calls == n:
                os.kill(os.getpid(), signal.SIGKILL)
            return function(*args, **kwargs)

        return call

    for module, name in [(os, n) for n in ("fsync", "replace", "makedirs", "rmdir", "remove")] + [(shutil, "rmtree")]:
        setattr(module, name, counted(getattr(module, name)))
    Policy.save, torch.save = counted(Policy.save), counted(torch.save)


def kills_at_every_call(world, folder, stride):
    """SIGKILL right before each `stride`-th change of the disk, from a resume to the end of a run; then resumed."""
    straight, started, out = (os.path.join(folder, name) for name in ("whole", "started", "killed"))
    assert outcome(child(command(world, straight, "--steps 4"))) == 0
    assert outcome(child(command(world, started, "--steps 2 --eval-every 5"))) == 0
    n, kills, seen = 1, 0, {}
    while True:
        shutil.rmtree(out, ignore_errors=True)
        shutil.copytree(started, out)
        if outcome(child(command(world, out, "--steps 4 --resume"), lambda: kill_at_call(n))) == 0:  # noqa: B023
            break
        place = where_it_died(out)
        seen[place], kills, n = seen.get(place, 0) + 1, kills + 1, n + stride
        assert outcome(child(command(world, out, "--steps 4 --resume"))) == 0
        a, b = (load_file(os.path.join(x, "model.safetensors")) for x in (straight, out))
        assert all(torch.equal(a[name], b[name]) for name in a)
    return {"signal": "SIGKILL, by call", "kills": kills, **seen}


def main(arguments=None):
    """Everything is imported once, in one thread; the runs are forked from here."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=100, help="of SIGKILL, and as many of SIGTERM")
    parser.add_argument("--stride", type=int, default=1, help="kill at every so-many-th change of the disk")
    parser.add_argument("--steps", type=int, default=40, help="steps of a run")
    parser.add_argument("--world", help="an embedded world (default: a new one)")
    args = parser.parse_args(arguments)
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        world = args.world or os.path.join(folder, "world")
        with contextlib.redirect_stdout(sys.stderr):
            if not args.world:
                toy.build(world, seed=0, train=64, heldout=16, steps=30)
            grace.main(command(world, os.path.join(folder, "warm"), "--steps 1"))  # what is imported late
        for number in (signal.SIGKILL, signal.SIGTERM):
            start = time.time()
            part = os.path.join(folder, number.name)
            found = random_kills(world, part, args.kills, number, args.steps)
            print(json.dumps(found | {"seconds": round(time.time() - start, 1)}), flush=True)
        start = time.time()
        found = kills_at_every_call(world, os.path.join(folder, "calls"), args.stride)
        print(json.dumps(found | {"seconds": round(time.time() - start, 1)}), flush=True)


def test_killed_at_any_moment_a_run_ends_where_it_would_have(tiny_world):
    """Twenty kills and twenty SIGTERMs at random moments, and kills before every few changes of the disk."""
    run = subprocess.run(
        [sys.executable, __file__, "--kills", "20", "--stride", "7", "--steps", "24", "--world", str(tiny_world)],
        env={**os.environ, "OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"},
        capture_output=True,
        text=True,
    )
    assert run.returncode == 0, run.stderr[-3000:]
    killed, stopped, by_call = map(json.loads, run.stdout.splitlines())
    assert killed["kills"] == stopped["kills"] == 20
    assert killed.get("in a step or evaluation", 0) + killed.get("saving a checkpoint", 0) > 5  # they hit what they are for
    assert stopped["stopped with a checkpoint"] > 5
    assert by_call["saving a checkpoint"] > 2 and by_call["saving the result"] >= 1


if __name__ == "__main__":
    main()
