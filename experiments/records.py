"""One run: a dict of settings in (runs.py), a record out, made once and found again by that dict.

Records are the lines of results.jsonl: the run, the evaluations before and after (and after without a rationale), the
course of the training, wall time, versions and the git revision. Weights are not kept.
"""

import contextlib
import json
import os
import subprocess
import tempfile
import time

import grace
from config import Config
from evaluation.tasks import evaluate_triplets
from experiments import measure
from experiments.algorithms import ALGORITHMS
from experiments.baselines import BASELINES, LossTrainer
from plumbing.data import load_rows
from plumbing.run import versions, write_atomically
from policy import Policy
from worlds import WORLDS
from worlds.make import build_world

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
RESULTS = os.path.join(ROOT, "experiments", "results.jsonl")
TRAINERS = BASELINES | ALGORITHMS
NOT_SETTINGS = "world", "trainer", "budgets", "part", "pairs"  # of a run; all else is a setting of config.py
LIMITS = 0, 1, 2, 3, 4, 6, 8, 12, 20, 24, 28, 32, 40  # Figure 4's longest rationales


# ---------------------------------------------------------------- where records are


def read(path):
    """The records of a file, `{frozenset of the run's items: record}`; none where there is no file."""
    if not os.path.isfile(path):
        return {}
    with open(path) as file:
        records = [json.loads(line) for line in file]
    return {frozenset(record["run"].items()): record for record in records}


def keep(record, path):
    """Add a record to a file, in place of any that its run had."""
    records = read(path) | {frozenset(record["run"].items()): record}
    write_atomically(path, "".join(json.dumps(one, separators=(",", ":")) + "\n" for one in records.values()))


# ---------------------------------------------------------------- a run


def world_of(run):
    """The folder of a run's world, built where it is missing: `runs/WORLD-world-SEED`, as train.sh has it."""
    folder = os.path.join(ROOT, "runs", f"{run['world']}-world-{run['seed']}")
    if not os.path.isfile(os.path.join(folder, "model", "grace_config.json")):
        build_world(folder, run["seed"], world=WORLDS[run["world"]])
    return folder


def config_of(run, **more):
    """The Config of a run. more: settings that the run does not have, or has by another name."""
    return Config(**{name: value for name, value in (run | more).items() if name not in NOT_SETTINGS})


def make(run):
    """Train and measure one run. `-> its record`."""
    began, folder, world = time.time(), world_of(run), WORLDS[run["world"]]
    names = {"data": "texts" if run.get("mode") == "unsupervised" else "train", "heldout": "heldout", "graded": "graded"}
    files = {setting: f"{folder}/data/{name}.jsonl" for setting, name in names.items()}
    with (
        tempfile.TemporaryDirectory() as scratch,
        open(os.devnull, "w") as nowhere,
        contextlib.redirect_stdout(nowhere),
        contextlib.redirect_stderr(nowhere),
    ):
        config = config_of(run, model=f"{folder}/model", out=os.path.join(scratch, "run"), **files)
        _, heldout, graded = load_rows(config)
        start = Policy.load(config.model, config.device, **config.reading)
        if run["trainer"] == "none":
            policy, before = start, evaluate_triplets(start, heldout, graded)
            alone = evaluate_triplets(start, heldout, graded, rationale=False)
            summary = {"before": before, "after": before, "after_without_rationale": alone, "seconds": 0.0}
        else:
            summary = grace.train(config, TRAINERS[run["trainer"]])
            policy = Policy.load(config.out, config.device)
        record = {"run": run, **{name: summary[name] for name in ("before", "after", "after_without_rationale")}}
        texts = [row["query"] for row in heldout]
        for moment, which in (("before", start), ("after", policy)):
            record[moment] = record[moment] | measure.measure(which, start, texts, world)
        if run["trainer"] != "none":
            record |= measure.course(config.out)
        if run.get("budgets"):
            record["budgets"] = measure.budgets(policy, heldout, LIMITS)
        if run["world"] == "town":
            record["ladder"] = {
                way: measure.ladder(policy, folder, rationale)
                for way, rationale in (("after", True), ("after_without_rationale", False))
            }
            if run["trainer"] == "none" or issubclass(TRAINERS[run["trainer"]], LossTrainer):
                record["after"]["forced"] = measure.forced(policy, start, folder)
    record |= {"train_seconds": summary["seconds"], "seconds": time.time() - began}
    return rounded(record | {"revision": revision(), "versions": versions()})


def revision():
    """The git revision, with a + if the working tree differs from it."""
    git = lambda *command: subprocess.run(["git", *command], cwd=ROOT, capture_output=True, text=True).stdout.strip()
    return git("rev-parse", "HEAD") + ("+" if git("status", "--porcelain", "--", "*.py") else "")


def rounded(record):
    """The record with every float at five significant digits, so that records stay small and readable."""
    return json.loads(json.dumps(record), parse_float=lambda x: float(f"{float(x):.5g}"))
