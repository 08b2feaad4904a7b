"""The command `report DIR`: a run as one page of HTML that opens without a network.

The page is made from what is in the folder, and no model is loaded (`--reread` loads two). A run that has not finished
gives a page of what is there so far. A file that cannot be read costs its section and is named at the top.
"""

import argparse
import difflib
import json
import math
import os
import re

from evaluation.charts import curve, embedding_map
from evaluation.explain import subtotals
from evaluation.render import render
from plumbing.errors import GraceError, first_line
from plumbing.run import read_metrics, write_atomically
from plumbing.status import SIGNS, health

SCORES = {  # score: its name, what it is, and whether less is better
    "ndcg_at_10": ("nDCG@10", "how near the top a query ranks its positive; 1 is always first", False),
    "self_ndcg_at_10": ("self nDCG@10", "how near the top a text ranks itself by another rationale; 1 is always first", False),
    "top1": ("top 1", "share of queries that rank their positive first", False),
    "spearman": ("Spearman", "rank correlation of cosines with graded similarity", False),
    "alignment": ("alignment", "mean squared distance of a text to itself by another rationale", True),
    "uniformity": ("uniformity", "how evenly texts cover the sphere; lower is more evenly", True),
    "text_loss": ("text loss", "nats per token on held-out texts, which are like the training texts", True),
    "finished": ("finished", "share of rationales that come to an end", False),
    "words": ("words", "per rationale", None),
}
MEANINGS = {  # metric: its name, and what it says
    "reward": ("reward", "What a rationale earns. The band is the spread within a group: what an update learns from."),
    "contrastive": (
        "contrastive",
        "Closer to its own pair than to others of the batch (Eq. 13; without labels 21; or InfoNCE).",
    ),
    "consistency": ("consistency", "Mean cosine to the other rollouts of the same text (Eq. 14)."),
    "hard": ("hard-negative mining", "Against the nearest rollout of each other text (Eq. 15)."),
    "length": ("length", "Tokens per rationale."),
    "truncated": ("truncated", "Share of rationales that reach the limit without an end token."),
    "empty": ("empty", "Share of rationales of which nothing but an end token is written."),
    "prompt_loss": ("text loss in training", "Nats per token on the prompts of each batch."),
    "reward_std": ("spread within groups", "Where all rollouts of a text earn the same, there is nothing to learn from."),
    "no_spread": ("groups without spread", "Share of the groups whose advantages are all 0."),
    "distinct": ("distinct rationales", "Share of a batch's rationales that differ, within groups and between texts."),
    "distinct_texts": ("distinct between texts", "The same for one rationale per text: near 0, all texts get the same one."),
    "cosine": ("cosine between texts", "Of different texts. It rises when all embeddings drift into one cone."),
    "effective_rank": ("effective rank", "How many directions a batch's embeddings use."),
    "kl_start": ("KL to the start", "Nats per token between this policy and the one it started from."),
    "approx_kl": ("KL of one batch", "How far one batch moves the policy."),
    "clip_fraction": ("clipped", "Share of the tokens that an update does not learn from, because they moved too far."),
    "first_ratio_off": (
        "first ratio off 1",
        "Sampler and update must agree on the probability of a token. If not, it is a bug.",
    ),
    "grad_norm": ("gradient norm", "Before clipping."),
}
GROUPS = (  # a heading, and its metrics
    ("Reward", "by component", ("reward", "contrastive", "consistency", "hard")),
    ("Length and language", "what the policy writes", ("length", "truncated", "empty", "prompt_loss")),
    ("Signs of trouble", "each with what it means",
     ("reward_std", "no_spread", "distinct_texts", "distinct", "cosine", "effective_rank", "kl_start", "approx_kl",
      "clip_fraction", "first_ratio_off", "grad_norm")),
)  # fmt: skip
FACTS = ("model", "data", "recipe", "mode", "reward", "pathwise", "kl", "batch", "rollouts", "steps", "lr", "seed", "device")
RATIONALES = 8  # rationales shown per text, evenly spaced over the training

# ---------------------------------------------------------------- what the folder holds


def _read_json(out, name, notes):
    """A JSON object of the run; `{}`, and a note, where there is none that can be read."""
    path = os.path.join(out, name)
    if not os.path.isfile(path):
        return {}
    try:
        with open(path) as file:
            value = json.load(file)
        if isinstance(value, dict):
            return value
        notes.append(f"{name} holds no JSON object")
    except (OSError, ValueError) as error:
        notes.append(f"{name} cannot be read ({first_line(error)})")
    return {}


def _numbers(scores):
    """The entries that are finite numbers."""
    scores = scores if isinstance(scores, dict) else {}
    return {k: v for k, v in scores.items() if isinstance(v, (int, float)) and math.isfinite(v)}


def read_run(out):
    """What the page is made from. Raises GraceError, one sentence, if the folder holds no run."""
    notes = []
    run, summary = (_read_json(out, name, notes) for name in ("run.json", "summary.json"))
    steps = [_numbers(line) for line in read_metrics(os.path.join(out, "metrics.jsonl"))]
    steps = [line for line in steps if "step" in line]
    if not (run or summary or steps):
        why = "".join(f"; {note}" for note in notes)
        raise GraceError(f"{out}: no run is here, or it has not evaluated its start yet{why}")
    if not run and not summary:
        notes.append("neither run.json nor summary.json is there: the settings are not known")
    if not steps:
        notes.append("metrics.jsonl holds no step yet")
    config = summary.get("config") or run.get("config")
    scores = {moment: _numbers(summary.get(moment)) for moment in ("before", "after", "after_without_rationale")}
    scores["before"] = scores["before"] or _numbers(run.get("before"))
    return {
        "out": out,
        "config": config if isinstance(config, dict) else {},
        "run": run,
        "summary": summary,
        "steps": steps,
        "scores": scores,
        "probe": _read_json(out, "probe.json", notes),
        "notes": notes,
    }


# ---------------------------------------------------------------- sections


def about(run):
    """What was run, and how far it is."""
    config, summary, steps = run["config"], run["summary"], run["steps"]
    done, wanted = int(steps[-1]["step"]) if steps else 0, config.get("steps", "?")
    seconds = summary.get("seconds")
    state = f"Not finished: {done} of {wanted} steps when this page was written."
    if summary:
        took = f" in {seconds / 60:.1f} minutes" if isinstance(seconds, (int, float)) else ""
        state = f"Finished after {done} steps{took}."
    facts = [(name.replace("_", " "), config[name]) for name in FACTS if config.get(name) is not None]
    reading = summary.get("reading") if isinstance(summary.get("reading"), dict) else {}
    settings = sorted({**config, **{k: v for k, v in reading.items() if v is not None}}.items())
    return {"state": state, "facts": facts, "settings": settings, "versions": sorted((summary.get("versions") or {}).items())}


def score_table(run):
    """`[{"name", "meaning", "cells": [before, after, without], "better"}]`; in training, `after` is the last evaluation."""
    before, after, without = run["scores"].values()
    latest = {}
    for line in run["steps"]:
        latest |= {k.removeprefix("heldout_"): v for k, v in line.items() if k.startswith("heldout_")}
    now, rows = after or latest, []
    for name in dict.fromkeys([*SCORES, *before, *now]):
        if name in before or name in now:
            title, meaning, less = SCORES.get(name, (name.replace("_", " "), "", None))
            values = [scores.get(name) for scores in (before, now, without)]
            cells = ["" if x is None else f"{x:.1f}" if name == "words" else f"{x:.3f}" for x in values]
            better = None not in values[:2] and less is not None and (values[1] < values[0] if less else values[1] > values[0])
            rows.append({"key": name, "title": title, "meaning": meaning, "cells": cells, "better": better})
    return {"rows": rows, "now": "after" if after else "so far", "without": bool(without)}


def _card(key, title, meaning, svg, verdict=None):
    return {"key": key, "title": title, "meaning": meaning, "svg": svg, "verdict": verdict}


def heldout_curves(run):
    """A picture per held-out score: at the start, at each evaluation, at the end."""
    before, after, _ = run["scores"].values()
    last = run["steps"][-1]["step"] if run["steps"] else 0
    cards, verdicts = [], _verdicts(run)
    for name in dict.fromkeys([*SCORES, *before, *after]):
        points = {0: before[name]} if name in before else {}
        points |= {line["step"]: line[f"heldout_{name}"] for line in run["steps"] if f"heldout_{name}" in line}
        points |= {last: after[name]} if name in after else {}
        if len(points) > 1:
            title, meaning, _ = SCORES.get(name, (name.replace("_", " "), "", None))
            svg = curve(f"heldout-{name}", title, list(points), list(points.values()), dots=True)
            cards.append(_card(name, title, f"{meaning[:1].upper()}{meaning[1:]}." if meaning else "", svg, verdicts.get(name)))
    return cards


def training_curves(run):
    """`[(heading, remark, cards)]`: a picture per metric, with its sign of trouble where it has one."""
    steps, verdicts = run["steps"], _verdicts(run)
    groups = []
    for heading, remark, names in GROUPS:
        cards = []
        for name in names:
            lines = [line for line in steps if name in line]
            if len(lines) > 1:
                title, meaning = MEANINGS[name]
                spread = [line.get(f"{name}_std") for line in lines]
                around = None if None in spread else spread
                svg = curve(name, title, [x["step"] for x in lines], [x[name] for x in lines], around)
                cards.append(_card(name, title, meaning, svg, verdicts.get(name)))
        if cards:
            groups.append((heading, remark, cards))
    return groups


def _verdicts(run):
    """`{metric: ok, or what is wrong and what to try}`: the verdicts of the command `status`."""
    limit = run["run"].get("max_new_tokens") or (run["summary"].get("reading") or {}).get("max_new_tokens") or math.inf
    # status reads every sign of every step; a line that lacks one (a metric that was not finite) is left out.
    lines = [line for line in run["steps"] if run["steps"][0].keys() <= line.keys()]
    try:
        verdicts = health(lines, {"max_new_tokens": limit, "before": run["scores"]["before"]})[1:]
    except KeyError:  # of steps that lack what a sign compares: no verdicts, but curves
        return {}
    by_name = {line[:24].strip(): line.split("   ")[-1] for line in verdicts}
    signs = [*(sign[:2] for sign in SIGNS), ("held-out nDCG@10", "ndcg_at_10")]
    return {metric: by_name[name] for name, metric in signs if name in by_name}


def rationales(run):
    """Rationales along the training, from rationales.md: `[{"text", "rows": [(step, [(word, changed)])], "left_out"}]`."""
    try:
        with open(os.path.join(run["out"], "rationales.md")) as file:
            page = file.read()
    except OSError:
        return []
    texts = []
    table = r"^\*\*(.*?)\*\*\n\n\| step \| rationale \|\n\| ---: \| --- \|\n((?:\| \d+ \|[^\n]*\|\n?)*)"
    for match in re.finditer(table, page, re.S | re.M):
        rows = re.findall(r"^\| (\d+) \| (.*) \|$", match[2], re.M)
        keep = sorted({round(i * (len(rows) - 1) / (RATIONALES - 1)) for i in range(RATIONALES)})
        shown = [rows[i] for i in keep] if len(rows) > RATIONALES else rows
        previous = [None, *(words for _, words in shown)]
        marked = [(int(step), changes(old, new)) for old, (step, new) in zip(previous, shown)]
        texts.append({"text": match[1], "rows": marked, "left_out": len(rows) - len(shown)})
    return texts


def changes(old, new):
    """`[(word, whether it is new)]` of a rationale beside the one before it."""
    words = new.split()
    if old is None:
        return [(word, False) for word in words]
    blocks = difflib.SequenceMatcher(None, old.split(), words, autojunk=False).get_matching_blocks()
    same = {block.b + i for block in blocks for i in range(block.size)}
    return [(word, i not in same) for i, word in enumerate(words)]


def answers(run):
    """Held-out queries with what they find: `[{"text", "row", "moments": [(name, query)]}]`, those that teach most first."""
    moments = {name: run["probe"].get(name) for name in ("before", "after")}
    by_text = {name: {q["text"]: q for q in moment["queries"]} for name, moment in moments.items() if moment}
    if not by_text:
        return {"queries": [], "documents": 0, "right": {}}
    last = by_text.get("after") or by_text["before"]
    first = by_text.get("before") or last
    queries = []
    for row, (text, now) in enumerate(last.items(), 1):
        shown = [(name, dict(by_text[name][text])) for name in by_text if text in by_text[name]]
        for _, query in shown:
            query["most"] = max(abs(s["share"]) for s in query["a"] + query["b"]) or 1
            query["totals"] = [subtotals(query["a"]), subtotals(query["b"])]
        right = now["answers"][0]["right"]
        learned = right and text in first and not first[text]["answers"][0]["right"]
        queries.append({"text": text, "row": row, "moments": shown, "order": 1 if right is False else 0 if learned else 2})
    # Three that were learned, then three that are still wrong, then the others.
    groups = [[q for q in queries if q["order"] == n] for n in (0, 1, 2)]
    queries = [*groups[0][:3], *groups[1][:3], *groups[2], *groups[0][3:], *groups[1][3:]]
    right = {name: sum(bool(q["answers"][0]["right"]) for q in known.values()) for name, known in by_text.items()}
    labelled = next(iter(last.values()))["answers"][0]["right"] is not None
    documents = next(m for m in moments.values() if m)["documents"]
    return {"queries": queries, "documents": documents, "right": right if labelled else {}}


def maps(run):
    """A picture per moment, before and after."""
    cards = []
    for name in ("before", "after"):
        if moment := run["probe"].get(name):
            title = "before" if name == "before" else f"after {moment['step']} steps"
            svg = embedding_map(f"map-{name}", f"Map of embeddings {title}", moment["points"])
            cards.append(_card(name, title, f"{moment['variance']:.0%} of the variance lies in these two components.", svg))
    return cards


# ---------------------------------------------------------------- the page

SECTIONS = (  # the template's name, what makes it, and, for a note, what it is and where it comes from
    ("about", about, "the settings", "run.json or summary.json"),
    ("scores", score_table, "the scores", "run.json or summary.json"),
    ("heldout", heldout_curves, "the held-out scores along the training", "metrics.jsonl"),
    ("training", training_curves, "the curves", "metrics.jsonl"),
    ("rationales", rationales, "the rationales", "rationales.md"),
    ("answers", answers, "what queries find", "probe.json"),
    ("maps", maps, "the map", "probe.json"),
)


def build_page(out):
    """The page of a run, as HTML. Raises GraceError if the folder holds no run, or where matplotlib is missing."""
    run, values = read_run(out), {}
    for name, section, shown, file in SECTIONS:
        try:
            values[name] = section(run)
        except GraceError:
            raise
        except (KeyError, TypeError, ValueError, AttributeError, IndexError, StopIteration) as error:
            values[name] = None  # the other sections can be read
            run["notes"].append(f"{shown} cannot be shown: {file} is damaged ({type(error).__name__}: {first_line(error)})")
    title = os.path.basename(os.path.abspath(out))
    return render("run.html", title=title, notes=run["notes"], **values)


def write_page(out, file=None):
    """Write the page, as OUT/report.html unless `file` says where. Returns where. Raises GraceError as `build_page` does."""
    path = file or os.path.join(out, "report.html")
    write_atomically(path, build_page(out))
    return path


def finish_page(out):
    """Write the page at the end of a run. What keeps it from being written is said, and does not fail the run."""
    try:
        print(f"{write_page(out)} shows this run")
    except GraceError as error:
        print(f"no page of this run: {error}")


def report(arguments):
    """Write a page about a run, finished or not: one HTML file that opens without a network."""
    parser = argparse.ArgumentParser("grace.py report", description=report.__doc__)
    parser.add_argument("folder", help="the --out of a run")
    parser.add_argument("--out", metavar="FILE", help="where to write the page [DIR/report.html]")
    args = parser.parse_args(arguments)
    print(f"{write_page(args.folder, args.out)} shows the run")
