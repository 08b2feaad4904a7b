"""The command `report DIR`: a run as one page of HTML that opens without a network.

The page is made from what is in the folder, and no model is loaded. A run that has not finished gives a page of what is
there so far. How it looks is in page.html, a template that shows whatever a text, a setting or a model holds and obeys none.
"""

import argparse
import difflib
import math
import os

import jinja2
import numpy as np

from evaluation.card import write_card
from plumbing.run import write_atomically
from plumbing.status import evaluations, health, read_run

SCORES = {  # score: its name, what it is, and 1 where more is better, -1 where less is
    "ndcg_at_10": ("nDCG@10", "How near the top a query ranks its positive; 1 is always first.", 1),
    "self_ndcg_at_10": ("self nDCG@10", "How near the top a text ranks itself by another rationale; 1 is always first.", 1),
    "top1": ("top 1", "Share of queries that rank their positive first.", 1),
    "spearman": ("Spearman", "Rank correlation of cosines with graded similarity.", 1),
    "alignment": ("alignment", "Mean squared distance of a text to itself by another rationale.", -1),
    "uniformity": ("uniformity", "How evenly texts cover the sphere; lower is more evenly.", -1),
    "text_loss": ("text loss", "Nats per token on held-out texts, which are like the training texts.", -1),
    "finished": ("finished", "Share of rationales that come to an end.", 1),
    "words": ("words", "Per rationale.", 0),
}
CURVES = {  # metric: its name, and what it says
    "reward": ("reward", "What a rationale earns."),
    "reward_std": ("spread within groups", "Where all rollouts of a text earn the same, GRPO learns nothing."),
    "length": ("length", "Tokens per rationale."),
    "truncated": ("truncated", "Share of rationales that reach the limit without an end token."),
    "distinct_texts": ("distinct between texts", "Share of rationales that differ; near 0, all texts get the same one."),
    "cosine": ("cosine between texts", "It rises when all embeddings drift into one cone."),
    "effective_rank": ("effective rank", "How many directions a batch's embeddings use."),
    "kl_start": ("KL to the start", "Nats per token between this policy and the one it started from."),
    "prompt_loss": ("text loss in training", "Nats per token on the prompts of each batch."),
    "grad_norm": ("gradient norm", "Before clipping."),
}
FACTS = "model", "data", "recipe", "mode", "reward", "pathwise", "kl", "batch", "rollouts", "steps", "lr", "seed", "device"
RATIONALES = 8  # per text, evenly spaced over the training


def report(arguments):
    """Write OUT/report.html, a page about a run, finished or not."""
    parser = argparse.ArgumentParser("grace.py report", description=report.__doc__)
    parser.add_argument("folder", metavar="OUT", help="the --out of a run")
    finish_page(parser.parse_args(arguments).folder)


def finish_page(out):
    """Write the page of a run into its folder and, if it is finished, its card. Raises GraceError as `build_page` does."""
    path = os.path.join(out, "report.html")
    write_atomically(path, build_page(out))
    if os.path.exists(os.path.join(out, "summary.json")):
        write_card(out)
    print(f"{path} shows this run")


def build_page(out):
    """The page of a run, as HTML. Raises GraceError if the folder holds no run."""
    run, steps = read_run(out)
    state = f"Not finished: {len(steps)} of {run['config']['steps']} steps when this page was written."
    if "after" in run:
        state = f"Finished after {len(steps)} steps, in {run['seconds'] / 60:.1f} minutes."
    heldout, troubles = evaluations(run, steps), {metric: trouble for _, metric, _, _, trouble in health(run, steps)}
    folder = jinja2.FileSystemLoader(os.path.dirname(__file__))
    template = jinja2.Environment(loader=folder, autoescape=True, trim_blocks=True).get_template("page.html")
    return template.render(
        name=os.path.basename(os.path.abspath(out)),
        state=state,
        facts=FACTS,
        config=run["config"],
        scores=scores(run, list(heldout.values())),
        texts=rationales(run["history"]),
        before=run["found_before"],
        found=run["found"],
        curves=curves(SCORES, heldout, troubles) + curves(CURVES, {line["step"]: line for line in steps}, troubles),
    )


# ---------------------------------------------------------------- what the template shows


def scores(run, heldout):
    """`(title, meaning, cells, whether it is better than before)` per score: at the start, last, without a rationale."""
    before, now, rows = heldout[0], heldout[-1], []
    for name, (title, meaning, sense) in SCORES.items():
        if name in before:
            moments = before, now if len(heldout) > 1 else {}, run.get("after_without_rationale", {})
            cells = [f"{x[name]:.{1 if name == 'words' else 3}f}" if name in x else "–" for x in moments]
            rows.append((title, meaning, cells, sense * (now[name] - before[name]) > 0))
    return rows


def rationales(history):
    """`(text, [(step, changes)])`: the same texts along the training, up to `RATIONALES` of each, evenly spaced."""
    keep = sorted({round(i * (len(history) - 1) / (RATIONALES - 1)) for i in range(RATIONALES)})
    shown = [history[i] for i in keep]
    pairs = list(zip(shown, [shown[0], *shown]))  # each with the one before it
    return [(text, [(step, changes(old[text], new[text])) for (step, new), (_, old) in pairs]) for text in shown[0][1]]


def changes(old, new):
    """The words of a rationale, each with whether the one before it does not have it in that place."""
    words = new.split()
    blocks = difflib.SequenceMatcher(None, old.split(), words, autojunk=False).get_matching_blocks()
    same = {block.b + i for block in blocks for i in range(block.size)}
    return [(word, i not in same) for i, word in enumerate(words)]


def curves(metrics, lines, troubles):
    """A curve per metric that has two points or more, with what it means and what the command `status` says is wrong.

    metrics: `SCORES` or `CURVES`; lines: `{step: {metric: value}}`; troubles: `{metric: what is wrong, or None}`.
    """
    drawn = []
    for name, (title, meaning, *_) in metrics.items():
        points = [(step, line[name]) for step, line in lines.items() if math.isfinite(line.get(name, math.nan))]
        if len(points) > 1:
            drawn.append({"title": title, "meaning": meaning, "trouble": troubles.get(name), **curve(points)})
    return drawn


def curve(points):
    """The `(step, value)` along a training as an SVG's lines: as they were measured, and their running mean."""
    first, last = points[0][0], points[-1][0]
    points = np.array([part.mean(0) for part in np.array_split(np.array(points, float), min(len(points), 300))])  # a small file
    x, y = points.T
    low, high = y.min(), y.max()
    if high - low < 1e-6 * max(abs(high), 1e-6):  # a constant, and what rounding makes of it
        low, high = low - 0.5, high + 0.5
    width = len(points) // 20
    means = [y[max(0, i - width) : i + width + 1].mean() for i in range(len(y))]
    x = 44 + 270 * (x - x[0]) / (x[-1] - x[0])
    line = lambda values: " ".join(f"{a:.1f},{118 - 108 * (b - low) / (high - low):.1f}" for a, b in zip(x, values))
    axis = [(10, high), (64, (low + high) / 2), (118, low)]
    return {"first": first, "last": last, "axis": axis, "raw": line(y), "smooth": line(means)}
