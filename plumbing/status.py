"""The command `status DIR`: where a run is, how long it still takes, and whether it shows a sign of trouble.

It compares the first steps of a run with the last. Where its rules draw a line, they draw it between 15 runs of
the embedded world: the paper's recipe, which collapses there, the full one, which does not, and the steps between
(docs/reliability.md has the table). On other data they are reasons to look, not verdicts.
"""

import argparse
import json
import os
import statistics
import time

from plumbing.checkpoint import checkpoints
from plumbing.errors import GraceError
from plumbing.report import read_metrics, show_summary

SIGNS = [  # name, metric, when it is a bad sign (a: at the start, b: now, T: longest rationale), what it means and what to try
    ("reward", "reward", lambda a, b, T: b <= a,
     "not rising. Try a higher --lr, a larger --batch, --pathwise above 0"),
    # A thin line: an InfoNCE reward that is satisfied ends at 0.12 of its first spread or more, the paper's at 0.10 or less.
    ("spread within groups", "reward_std", lambda a, b, T: b < 0.11 * a,
     "going to zero: rollouts agree with each other, advantages fade. Try --reward infonce, more --kl, a lower --lr"),
    ("groups without spread", "no_spread", lambda a, b, T: b > 0.25,
     "a quarter and more teach nothing. Try a higher --temperature, more --rollouts, more --kl"),
    # Rollouts of one text may agree, at low temperatures the more: 0.78 of a batch differed in runs that learned all.
    ("distinct rationales", "distinct", lambda a, b, T: b < 0.5,
     "falling: the policy writes the same about everything. Try --reward infonce, more --kl, a lower --lr"),
    # Between different texts. Where all reward is for being similar, it rises; under InfoNCE it falls by a third.
    ("cosine between texts", "cosine", lambda a, b, T: b > a + 0.03,
     "rising: embeddings drift into a cone. Try --reward infonce, --pathwise above 0, more --lambda-hard"),
    ("effective rank", "effective_rank", lambda a, b, T: b < 0.9 * a,
     "falling: fewer directions are in use. The same things to try as for the cosine"),
    ("length", "length", lambda a, b, T: b > 0.5 * T and b > 1.3 * a,
     "drifting to the limit: length is being rewarded. Try --pathwise above 0, --relative-length-penalty, more --gamma"),
    ("truncated", "truncated", lambda a, b, T: b > 0.2,
     "many rationales never end. Try more --max-new-tokens, --relative-length-penalty, more --gamma"),
    ("empty rationales", "empty", lambda a, b, T: b > 0.2,
     "nothing is written: the prompt alone is embedded. Try another --instruction, or a better starting model"),
    # Nats a token. With the pathwise term runs stayed below 0.45; without it, twice as long rationales, 1.2 to 1.9.
    ("KL to the start", "kl_start", lambda a, b, T: b > 1,
     "far from the starting model: generation suffers. Try more --kl, a lower --lr, --pathwise above 0"),
    ("KL of one batch", "approx_kl", lambda a, b, T: b > 0.05,
     "a batch moves the policy far. Try a lower --lr, fewer --minibatches and --epochs"),
    ("clipped", "clip_fraction", lambda a, b, T: b > 0.3,
     "much of a batch is not learned from. Try a lower --lr, fewer --minibatches and --epochs"),
    # In float32 some 1e-5; where rationales come from a bfloat16 copy, up to 0.5 for the token that is hit hardest.
    ("first ratio off 1", "first_ratio_off", lambda a, b, T: b > 1,
     "the update does not see what was sampled. Try --dtype float32"),
]  # fmt: skip


def status(arguments):
    """Where a run is, how long it still takes, and whether it looks healthy: what each sign means and what to try."""
    parser = argparse.ArgumentParser("grace.py status", description=status.__doc__)
    parser.add_argument("folder", help="the --out of a run, running or not")
    out = parser.parse_args(arguments).folder
    metrics_file = os.path.join(out, "metrics.jsonl")
    steps = [metrics for _, metrics in read_metrics(metrics_file)]
    try:
        with open(os.path.join(out, "run.json")) as file:
            run = json.load(file)
    except (OSError, ValueError) as error:
        raise GraceError(f"{out}: no run is here, or it has not evaluated its start yet") from error
    summary = os.path.join(out, "summary.json")
    wanted, done = run["config"]["steps"], len(steps)
    if os.path.isfile(summary):
        print(f"{out}: finished, after {done} steps")
        with open(summary) as file:
            print(f"\n{show_summary(json.load(file))}")
    else:
        saved = [os.path.basename(folder) for folder in checkpoints(out)]
        left = statistics.median(m["step_s"] for m in steps[-20:]) * (wanted - done) if steps else float("nan")
        print(
            f"{out}: step {done} of {wanted}, the last one {time.time() - os.path.getmtime(metrics_file):.0f} s ago; "
            f"{left / 60:.1f} minutes left, evaluations aside; newest checkpoint: {saved[-1] if saved else 'none'}"
        )
    if steps:
        print("\nlast step:  " + "  ".join(f"{name} {value:.4g}" for name, value in steps[-1].items()))
    print("\n" + "\n".join(health(steps, run)))


def health(steps, run):
    """A line a sign: its mean over the first steps and over the last, then `ok`, or what is wrong and what to try."""
    window = min(20, len(steps) // 4)
    if window < 2:
        return ["too few steps to tell how it is doing"]
    lines, T = [f"{'sign':<24}{'start':>10}{'now':>10}"], run["max_new_tokens"]
    for name, metric, bad, advice in SIGNS:
        if all(metric in m for m in (steps[0], steps[-1])):
            a, b = (statistics.fmean(m[metric] for m in part) for part in (steps[:window], steps[-window:]))
            lines.append(f"{name:<24}{a:10.4f}{b:10.4f}   {advice if bad(a, b, T) else 'ok'}")
    scores = [x for x in [run["before"].get("ndcg_at_10"), *(m.get("heldout_ndcg_at_10") for m in steps)] if x is not None]
    if len(scores) > 1:  # the one sign that does not trust the reward
        verdict = "ok"
        if scores[-1] < 0.9 * max(scores):
            verdict = "retrieval is down from its best: where the reward is up, it is hacked. Try --reward infonce, more --kl"
        elif scores[-1] < scores[0] + 0.05:
            verdict = "no better than at the start. Try --reward infonce, --pathwise above 0, a higher --lr"
        lines.append(f"{'held-out nDCG@10':<24}{scores[0]:10.4f}{scores[-1]:10.4f}   {verdict}")
    return lines
