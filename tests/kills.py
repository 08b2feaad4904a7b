"""Kills training runs, at random moments and before every change of the disk, and checks that each ends as it would have.

python tests/kills.py --kills 100        prints the figures of docs/reliability.md, a line of JSON per row of its table

The runs are forked from this process, which has imported everything once and uses one thread. tests/test_kill.py runs a
short form.
"""

import argparse
import contextlib
import json
import os
import random
import shutil
import signal
import sys
import tempfile
import time

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))

import torch  # noqa: E402
from conftest import command, same, same_weights  # noqa: E402

import grace  # noqa: E402
from policy import Policy  # noqa: E402
from worlds.make import build_world  # noqa: E402


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


def exit_code(pid):
    """Waits for a child: its exit code, or minus the signal that killed it."""
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def where_it_died(out):
    """What a killed run was doing, by the files it left."""
    folder = os.path.join(out, "checkpoints")
    if os.path.isdir(os.path.join(out, "final.tmp")):
        return "saving the result"
    if os.path.isdir(folder) and any(name.endswith(".tmp") for name in os.listdir(folder)):
        return "saving a checkpoint"
    return "in a step or evaluation" if os.path.isdir(folder) else "before the first checkpoint"


def random_kills(world, folder, kills, number, steps, seed=0):
    """Runs that get a signal at random moments, each resumed until it is finished, against one never interrupted."""
    straight, rng, places = os.path.join(folder, "straight"), random.Random(seed), {}
    start = time.time()
    assert exit_code(child(command(world, straight, f"--steps {steps}"))) == 0
    span, runs, left = 0.15 * (time.time() - start), 0, kills
    while left:
        out, code = os.path.join(folder, f"run-{runs}"), None
        while code != 0:
            pid = child(command(world, out, f"--steps {steps} --resume"))
            if left:
                time.sleep(rng.uniform(0, span))
                os.kill(pid, number)
            code = exit_code(pid)
            assert code in (0, -number, 128 + number), f"exit code {code}"
            if code != 0:
                left -= 1
                place = "stopped with a checkpoint" if code == 128 + number else where_it_died(out)
                if number == signal.SIGTERM and code == -number:
                    place = "ended at once: opening, or evaluating the end"
                places[place] = places.get(place, 0) + 1
        same(straight, out)
        runs += 1
    return {"signal": signal.Signals(number).name, "kills": kills, "runs": runs, "steps": steps, **places}


def kill_at_call(n):
    """Have this process kill itself at its n-th call of anything that changes the disk."""
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
    """SIGKILL before each `stride`-th change of the disk, from a resume to the end of a run; then the run is resumed."""
    straight, started, out = (os.path.join(folder, name) for name in ("whole", "started", "killed"))
    assert exit_code(child(command(world, straight, "--steps 4"))) == 0
    assert exit_code(child(command(world, started, "--steps 2"))) == 0
    n, kills, places = 1, 0, {}
    while True:
        shutil.rmtree(out, ignore_errors=True)
        shutil.copytree(started, out)
        if exit_code(child(command(world, out, "--steps 4 --resume"), lambda: kill_at_call(n))) == 0:  # noqa: B023
            break
        place = where_it_died(out)
        places[place], kills, n = places.get(place, 0) + 1, kills + 1, n + stride
        assert exit_code(child(command(world, out, "--steps 4 --resume"))) == 0
        same_weights(straight, out)
    return {"signal": "SIGKILL, by call", "kills": kills, **places}


def main(arguments=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=100, help="how many by SIGKILL, and as many by SIGTERM")
    parser.add_argument("--stride", type=int, default=1, help="kill before one in so many changes of the disk")
    parser.add_argument("--steps", type=int, default=40, help="steps per run")
    parser.add_argument("--world", help="an embedded world (default: a new one)")
    args = parser.parse_args(arguments)
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        world = args.world or os.path.join(folder, "world")
        with contextlib.redirect_stdout(sys.stderr):
            if not args.world:
                build_world(world, seed=0, train=64, heldout=16, steps=30)
            grace.main(command(world, os.path.join(folder, "warm"), "--steps 1"))  # imports what is only imported in a run

        def report(function, *more):
            start = time.time()
            figures = function(world, *more)
            print(json.dumps(figures | {"seconds": round(time.time() - start, 1)}), flush=True)

        for number in (signal.SIGKILL, signal.SIGTERM):
            report(random_kills, os.path.join(folder, number.name), args.kills, number, args.steps)
        report(kills_at_every_call, os.path.join(folder, "calls"), args.stride)


if __name__ == "__main__":
    main()
