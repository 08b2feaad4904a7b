"""Killed at any moment, a run that is resumed ends where it would have ended: the short form of kills.py."""

import json
import os
import subprocess
import sys

KILLS = os.path.join(os.path.dirname(os.path.abspath(__file__)), "kills.py")


def test_kills(tiny_world):
    """Twelve SIGKILLs and twelve SIGTERMs at random moments, and SIGKILLs before changes of the disk."""
    run = subprocess.run(
        [sys.executable, KILLS, "--kills", "12", "--stride", "17", "--steps", "24", "--world", str(tiny_world)],
        env={**os.environ, "OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"},
        capture_output=True,
        text=True,
    )
    assert run.returncode == 0, run.stderr[-3000:]
    killed, stopped, by_call = map(json.loads, run.stdout.splitlines())
    assert killed["kills"] == stopped["kills"] == 12
    assert killed.get("in a step or evaluation", 0) + killed.get("saving a checkpoint", 0) > 5  # not all came too early
    assert stopped["stopped with a checkpoint"] > 5
    assert by_call["saving a checkpoint"] >= 1 and by_call["saving the result"] >= 1
