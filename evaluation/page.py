"""The command `report DIR`: a run as one page of HTML that opens without a network.

The page is made from what is in the folder, and no model is loaded. A run that has not finished gives a page of what is
there so far.
"""

import argparse
import difflib
import json
import math
import os

from evaluation.render import SHADES, comparison, curve, document, escape
from plumbing.errors import GraceError, first_line
from plumbing.run import read_metrics, write_atomically
from plumbing.status import SIGNS, health

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
    "reward_std": ("spread within groups", "Where all rollouts of a text earn the same, there is nothing to learn from."),
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
SIDES = "the query", "what it found"
RATIONALES, QUERIES = 8, 6  # rationales shown per text, evenly spaced over the training; queries shown


def report(arguments):
    """Write a page about a run, finished or not: one HTML file that opens without a network."""
    parser = argparse.ArgumentParser("grace.py report", description=report.__doc__)
    parser.add_argument("folder", help="the --out of a run")
    parser.add_argument("--out", metavar="FILE", help="where to write the page [DIR/report.html]")
    args = parser.parse_args(arguments)
    finish_page(args.folder, args.out)


def finish_page(out, file=None):
    """Write the page, as OUT/report.html unless `file` says where. Raises GraceError as `build_page` does."""
    path = file or os.path.join(out, "report.html")
    write_atomically(path, build_page(out))
    print(f"{path} shows this run")


def build_page(out):
    """The page of a run, as HTML. Raises GraceError if the folder holds no run, or a file that cannot be read."""
    run, recorded = read_json(out, "run.json") | read_json(out, "summary.json"), read_json(out, "probe.json")
    if "config" not in run:
        raise GraceError(f"{out}: no run is here, or it has not evaluated its start yet")
    steps = read_metrics(os.path.join(out, "metrics.jsonl"))
    body = about(run, steps), scores(run, steps), rationales(recorded), queries(recorded), curves(run, steps), settings(run)
    return document(os.path.basename(os.path.abspath(out)), "GRACE · one run", "".join(body))


def read_json(out, name):
    """A JSON object of the run, `{}` where there is none. Raises GraceError if it cannot be read."""
    path = os.path.join(out, name)
    try:
        with open(path) as file:
            return dict(json.load(file))
    except FileNotFoundError:
        return {}
    except (OSError, ValueError, TypeError) as error:
        raise GraceError(f"{path}: cannot be read ({first_line(error)})") from error


# ---------------------------------------------------------------- sections, each of them HTML, empty where there is nothing


def section(title, lead, body):
    """A heading, a remark, and the body; nothing where there is no body. All HTML."""
    return f'<h2>{title}</h2>\n<p class="lead">{lead}</p>\n{body}\n' if body else ""


def table(head, rows):
    """Rows of cells, all HTML; the first cell of a row is its heading."""
    head = "".join(f"<th>{cell}</th>" for cell in head)
    lines = (f"<tr><th>{first}</th>{''.join(f'<td>{cell}</td>' for cell in cells)}</tr>\n" for first, *cells in rows)
    return f"<table><thead><tr>{head}</tr></thead><tbody>{''.join(lines)}</tbody></table>"


def about(run, steps):
    """How far the run is, and its main settings."""
    config = run["config"]
    state = f"Not finished: {len(steps)} of {config['steps']} steps when this page was written."
    if "after" in run:
        state = f"Finished after {len(steps)} steps, in {run['seconds'] / 60:.1f} minutes."
    facts = " ".join(f"<span>{name} <b>{escape(str(config[name]))}</b></span>" for name in FACTS if name in config)
    return f'<p class="lead">{state}</p>\n<p class="facts">{facts}</p>\n'


def scores(run, steps):
    """Before, after (in training: as of the last evaluation), and after without a rationale."""
    latest = {}
    for line in steps:
        latest |= {name.removeprefix("heldout_"): x for name, x in line.items() if name.startswith("heldout_")}
    before, now, without, rows = run["before"], run.get("after", latest), run.get("after_without_rationale", {}), []
    for name, (title, meaning, sense) in SCORES.items():
        digits = 1 if name == "words" else 3
        cells = [f"{x[name]:.{digits}f}" if name in x else "–" for x in (before, now, without)]
        if sense * (now.get(name, 0) - before.get(name, 0)) > 0:
            cells[1] = f'<b class="good">{cells[1]}</b>'
        if name in before:
            rows.append([f'{title}<span class="what">{meaning}</span>', *cells])
    head = "score", "before", "after" if "after" in run else "so far", "without rationale"
    lead = "Scores on held-out rows. Without a rationale, the trained policy embeds the prompt alone."
    return section("What it learned", lead, f'<div class="card numbers">{table(head, rows)}</div>')


def rationales(recorded):
    """The same texts' rationales along the training, up to `RATIONALES` of each, evenly spaced."""
    history, cards = recorded.get("history", []), []
    keep = sorted({round(i * (len(history) - 1) / (RATIONALES - 1)) for i in range(RATIONALES)})
    for i, text in enumerate(recorded.get("texts", [])):
        shown = [(history[k][0], history[k][1][i]) for k in keep]
        rows = [(step, changes(old, new)) for (step, new), (_, old) in zip(shown, [shown[0], *shown])]
        cards.append(f'<section class="card steps"><h3>{escape(text)}</h3>{table(("step", "rationale"), rows)}</section>')
    lead = "The same held-out texts along the training. Words that differ from the row above are <mark>marked</mark>."
    return section("What it writes", lead, cards and f'<div class="two">{"".join(cards)}</div>')


def changes(old, new):
    """A rationale as HTML; words that the one before it does not have in that place are marked."""
    words = new.split()
    blocks = difflib.SequenceMatcher(None, old.split(), words, autojunk=False).get_matching_blocks()
    same = {block.b + i for block in blocks for i in range(block.size)}
    marked = (escape(word) if i in same else f"<mark>{escape(word)}</mark>" for i, word in enumerate(words))
    return " ".join(marked) or "(nothing)"


def queries(recorded):
    """A few held-out queries with what they find: first what was learned, then what is still wrong."""
    moments = [recorded[name] for name in ("before", "after") if name in recorded]
    if not moments:
        return ""
    starts, cards = {query["text"]: query for query in moments[0]["queries"]}, []
    order = lambda query: 0 if query["right"] and not starts[query["text"]]["right"] else 2 if query["right"] else 1
    for query in sorted(moments[-1]["queries"], key=order)[:QUERIES]:
        start = starts[query["text"]]
        before = f"<details><summary>before training: {outcome(start)}</summary>{comparison(start, SIDES)}</details>"
        cards.append(f'<article class="card"><p>{outcome(query)}</p>{comparison(query, SIDES)}{before}</article>\n')
    lead = f"{len(starts)} held-out queries search {moments[-1]['documents']} texts. "
    if query["right"] is not None:
        first, last = (sum(query["right"] for query in moment["queries"]) for moment in (moments[0], moments[-1]))
        lead += f"{first} found the right one first before training, {last} do now. "
    return section("What queries find, and why", lead + SHADES, "".join(cards))


def outcome(query):
    """Whether a query finds its positive, in words."""
    cosine = f"cosine {query['cosine']:.3f}"
    if query["right"] is None:
        return f"nearest text, {cosine}"
    if query["right"]:
        return f'<b class="good">right</b>, {cosine}'
    return f"<b>wrong</b>, {cosine}; its positive is number {query['rank']}"


def curves(run, steps):
    """Held-out scores at each evaluation, then a few metrics at each step, with the sign of trouble where one has it."""
    verdicts, before, after = signs(run, steps), run["before"], run.get("after", {})
    heldout, training = [], []
    for name, (title, meaning, _) in SCORES.items():
        points = {0: before[name]} if name in before else {}
        points |= {line["step"]: line[f"heldout_{name}"] for line in steps if f"heldout_{name}" in line}
        points |= {len(steps): after[name]} if name in after else {}
        heldout.append(card(title, meaning, points, verdicts.get(name)))
    for name, (title, meaning) in CURVES.items():
        points = {line["step"]: line[name] for line in steps if name in line}
        training.append(card(title, meaning, points, verdicts.get(name)))
    grid = lambda cards: any(cards) and f'<div class="grid">{"".join(cards)}</div>'
    judge, pale = "The one judge that does not trust the reward.", "One value per step in pale, and their running mean."
    return section("Held-out scores", judge, grid(heldout)) + section("Training", pale, grid(training))


def card(title, meaning, points, verdict):
    """A curve of `{step: value}` with what it means and the verdict of the command `status`; nothing for a single point."""
    if len(points) < 2:
        return ""
    mark = f'<span class="label">{"ok" if verdict == "ok" else "<b>look here</b>"}</span>' if verdict else ""
    trouble = f" <b>Now: {escape(verdict)}.</b>" if verdict and verdict != "ok" else ""
    picture = curve(list(points), list(points.values()), title)
    return f'<figure class="card"><h3>{title}{mark}</h3>{picture}<figcaption>{meaning}{trouble}</figcaption></figure>\n'


def signs(run, steps):
    """`{metric: "ok", or what is wrong and what to try}`: the verdicts of the command `status`, where steps are enough."""
    lines = health(steps, {"max_new_tokens": run.get("max_new_tokens", math.inf), "before": run["before"]})[1:]
    metrics = {"held-out nDCG@10": "ndcg_at_10", **{name: metric for name, metric, *_ in SIGNS}}
    return {metrics[line[:24].strip()]: line.split("   ")[-1] for line in lines}


def settings(run):
    """Every setting and version."""
    values = {**run["config"], **run.get("reading", {}), **run.get("versions", {})}
    rows = [(escape(name), escape(str(value))) for name, value in sorted(values.items())]
    return f"<h2>Every setting</h2>\n<details><summary>{len(rows)} settings and versions</summary>{table((), rows)}</details>"
