"""The command `status DIR`: where a run is, how long it still takes, and whether it shows a sign of collapse.

The signs compare the first steps of a run with the last. Their thresholds were drawn between 15 runs of the events world: the
paper's recipe, which collapses there, the full one, which does not, and the steps between. On other data a sign is a reason to
look, not a verdict.
"""

import argparse
import os
import statistics
import time

from plumbing.errors import GraceError
from plumbing.run import checkpoints, read_json, read_metrics, show_summary


def alike(a, b):
    """Whether texts have become alike: few distinct rationales between texts, or embeddings that drift together."""
    return b["distinct_texts"] < 0.25 or b["cosine"] > a["cosine"] + 0.03


# name, metric, when it is a bad sign, what it means and what to try. a, b: mean metrics of the first and of the last steps;
# T: the longest rationale. Rollouts of one text agree once all of them are right, so agreement within a group is a bad
# sign only where texts become alike as well, or where the reward has not risen.
SIGNS = [
    ("reward", "reward", lambda a, b, T: b["reward"] <= a["reward"],
     "not rising. Try a higher --lr, a larger --batch, --pathwise above 0"),
    # A thin line: an InfoNCE reward that is satisfied ends at 0.12 of its first spread or more, the paper's at 0.10 or less.
    ("spread within groups", "reward_std", lambda a, b, T: b["reward_std"] < 0.11 * a["reward_std"] and alike(a, b),
     "going to zero while texts become alike: advantages fade. Try --reward infonce, more --kl, a lower --lr"),
    ("groups without spread", "no_spread",
     lambda a, b, T: b["no_spread"] > 0.25 and (alike(a, b) or b["reward"] <= a["reward"] or b["truncated"] > 0.2),
     "a quarter and more teach nothing. Try a higher --temperature, more --rollouts, more --kl"),
    # A query and its positive may say the same, so half of the texts' rationales can be equal in a run that is well.
    ("distinct between texts", "distinct_texts", lambda a, b, T: b["distinct_texts"] < 0.25,
     "falling: the policy writes the same about everything. Try --reward infonce, more --kl, a lower --lr"),
    # Between different texts. Where all reward is for being similar, it rises; under InfoNCE it falls by a third.
    ("cosine between texts", "cosine", lambda a, b, T: b["cosine"] > a["cosine"] + 0.03,
     "rising: embeddings drift into a cone. Try --reward infonce, --pathwise above 0, more --lambda-hard"),
    ("effective rank", "effective_rank", lambda a, b, T: b["effective_rank"] < 0.9 * a["effective_rank"],
     "falling: fewer directions are in use. The same things to try as for the cosine"),
    ("length", "length", lambda a, b, T: b["length"] > 0.5 * T and b["length"] > 1.3 * a["length"] and b["truncated"] > 0.02,
     "drifting to the limit: length is being rewarded. Try --pathwise above 0, more --gamma"),
    ("truncated", "truncated", lambda a, b, T: b["truncated"] > 0.2,
     "many rationales never end. Try more --max-new-tokens, more --gamma"),
    ("empty rationales", "empty", lambda a, b, T: b["empty"] > 0.2,
     "nothing is written: the prompt alone is embedded. Try another --instruction, or a better starting model"),
    # Nats per token. With the pathwise term runs stayed below 0.45; without it, twice as long rationales, 1.2 to 1.9.
    ("KL to the start", "kl_start", lambda a, b, T: b["kl_start"] > 1,
     "far from the starting model: generation suffers. Try more --kl, a lower --lr, --pathwise above 0"),
    ("KL of one batch", "approx_kl", lambda a, b, T: b["approx_kl"] > 0.05,
     "a batch moves the policy far. Try a lower --lr, fewer --minibatches"),
    ("clipped", "clip_fraction", lambda a, b, T: b["clip_fraction"] > 0.3,
     "much of a batch is not learned from. Try a lower --lr, fewer --minibatches"),
    # In float32 some 1e-5. In bfloat16, for the token hit hardest, up to about 3 in a step and 1 in the mean over steps.
    ("first ratio off 1", "first_ratio_off", lambda a, b, T: b["first_ratio_off"] > 2,
     "the update does not compute what was sampled. Try --dtype float32"),
]  # fmt: skip


def status(arguments):
    """Where a run is, how long it still takes, and whether it looks healthy: what each sign means and what to try."""
    parser = argparse.ArgumentParser("grace.py status", description=status.__doc__)
    parser.add_argument("folder", help="the --out of a run, running or not")
    out = parser.parse_args(arguments).folder
    run, steps = read_run(out)
    wanted, done = run["config"]["steps"], len(steps)
    if "after" in run:
        print(f"{out}: finished, after {done} steps\n\n{show_summary(run)}")
    elif not steps:
        print(f"{out}: before the first of {wanted} steps")
    else:
        ago = time.time() - os.path.getmtime(os.path.join(out, "metrics.jsonl"))
        left = statistics.median(m["step_s"] for m in steps[-20:]) * (wanted - done) / 60
        print(f"{out}: step {done} of {wanted}, {ago:.0f} s ago; {left:.1f} minutes left, evaluations aside")
        newest = (checkpoints(out) or ["none"])[-1]
        print(f"newest checkpoint: {os.path.basename(newest)}")
    signs = health(run, steps)
    print(f"\n{'sign':<24}{'start':>10}{'now':>10}" if signs else "\ntoo few steps to tell how it is doing")
    for name, _, first, last, trouble in signs:
        print(f"{name:<24}{first:10.4f}{last:10.4f}   {trouble or 'ok'}")


def read_run(out):
    """What a run has written so far: run.json, with summary.json where it is finished, and the steps' metrics.

    Raises GraceError if no run is in this folder.
    """
    run = read_json(os.path.join(out, "run.json"))
    if "config" not in (run or {}):
        raise GraceError(f"{out}: no run is here, or it has not evaluated its start yet")
    return run | (read_json(os.path.join(out, "summary.json")) or {}), read_metrics(os.path.join(out, "metrics.jsonl"))


def evaluations(run, steps):
    """The held-out scores along a run, in order: `{step: {name: score}}`. run, steps: see `read_run`."""
    scores = {0: run["before"]}
    for line in steps:
        if now := {name.removeprefix("heldout_"): x for name, x in line.items() if name.startswith("heldout_")}:
            scores[line["step"]] = now
    return scores | ({len(steps): run["after"]} if "after" in run else {})


def health(run, steps):
    """`[(sign, metric, its mean over the first steps, over the last, what is wrong and what to try or None)]`.

    run, steps: see `read_run`. Empty where there are too few steps to tell.
    """
    window = min(20, len(steps) // 4)
    if window < 2:
        return []
    first, last = steps[:window], steps[-window:]
    shared = set.intersection(*map(set, first + last))
    a, b = ({name: statistics.fmean(m[name] for m in part) for name in shared} for part in (first, last))
    signs = [
        (name, metric, a[metric], b[metric], advice if bad(a, b, run["max_new_tokens"]) else None)
        for name, metric, bad, advice in SIGNS
        if metric in shared
    ]
    scores = [x["ndcg_at_10"] for x in evaluations(run, steps).values() if "ndcg_at_10" in x]
    if len(scores) > 1:  # the one sign that does not trust the reward
        trouble = None
        if scores[-1] < 0.9 * max(scores):
            trouble = "retrieval is down from its best: where the reward is up, it is hacked. Try --reward infonce, more --kl"
        elif scores[-1] < scores[0] + 0.05:
            trouble = "no better than at the start. Try --reward infonce, --pathwise above 0, a higher --lr"
        signs.append(("held-out nDCG@10", "ndcg_at_10", scores[0], scores[-1], trouble))
    return signs
