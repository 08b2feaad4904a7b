"""The command `report DIR`: a run as one page of HTML that opens without a network.

The page is made from what is in the folder, and no model is loaded. A run that has not finished gives a page of what is
there so far.
"""

import argparse
import difflib
import os

from evaluation.render import comparison, curve, document, escape
from plumbing.run import read_json, write_atomically
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
SHADES = (
    "The stronger the shade of a word, the larger its share of the cosine; a dotted line marks a negative share. "
    "The shares of each side sum to the cosine exactly."
)
RATIONALES, QUERIES = 8, 6  # rationales shown per text, evenly spaced over the training; queries shown


def report(arguments):
    """Write OUT/report.html, a page about a run, finished or not."""
    parser = argparse.ArgumentParser("grace.py report", description=report.__doc__)
    parser.add_argument("folder", metavar="OUT", help="the --out of a run")
    finish_page(parser.parse_args(arguments).folder)


def finish_page(out):
    """Write the page of a run into its folder. Raises GraceError as `build_page` does."""
    path = os.path.join(out, "report.html")
    write_atomically(path, build_page(out))
    print(f"{path} shows this run")


def build_page(out):
    """The page of a run, as HTML. Raises GraceError if the folder holds no run, or a file that cannot be read."""
    (run, steps), recorded = read_run(out), read_json(os.path.join(out, "probe.json")) or {}
    body = about(run, steps), scores(run, steps), rationales(recorded), queries(recorded), curves(run, steps)
    return document(os.path.basename(os.path.abspath(out)), "".join(body))


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
    before, *later = evaluations(run, steps).values()
    now, without, rows = later[-1] if later else {}, run.get("after_without_rationale", {}), []
    for name, (title, meaning, sense) in SCORES.items():
        if name in before:
            digits = 1 if name == "words" else 3
            cells = [f"{x[name]:.{digits}f}" if name in x else "–" for x in (before, now, without)]
            if name in now and sense * (now[name] - before[name]) > 0:
                cells[1] = f'<b class="good">{cells[1]}</b>'
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
    """A few held-out queries with what they find, before training and now."""
    if not recorded:
        return ""
    first, last = (moment["queries"] for moment in (recorded["before"], recorded.get("after", recorded["before"])))
    cards = (
        f'<article class="card"><p>{outcome(now)}</p>{comparison(now, SIDES)}'
        f"<details><summary>before training: {outcome(then)}</summary>{comparison(then, SIDES)}</details></article>\n"
        for then, now in list(zip(first, last))[:QUERIES]
    )
    lead = f"{len(last)} held-out queries search {recorded['before']['documents']} texts. "
    if last[0]["right"] is not None:
        then, now = (sum(query["right"] for query in queries) for queries in (first, last))
        lead += f"{then} found the right one first before training, {now} do now. "
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
    troubles = {metric: trouble for _, metric, _, _, trouble in health(run, steps)}
    heldout = grid(SCORES, evaluations(run, steps), troubles)
    training = grid(CURVES, {line["step"]: line for line in steps}, troubles)
    judge, pale = "The one judge that does not trust the reward.", "One value per step in pale, and their running mean."
    return section("Held-out scores", judge, heldout) + section("Training", pale, training)


def grid(metrics, lines, troubles):
    """A curve per metric that has two points or more, with what it means and the verdict of the command `status`.

    metrics: `SCORES` or `CURVES`; lines: `{step: {metric: value}}`; troubles: `{metric: what is wrong, or None}`.
    """
    cards = []
    for name, (title, meaning, *_) in metrics.items():
        points = {step: line[name] for step, line in lines.items() if name in line}
        if len(points) > 1:
            mark = trouble = ""
            if name in troubles:
                mark = f'<span class="label">{"<b>look here</b>" if troubles[name] else "ok"}</span>'
                trouble = f" <b>Now: {escape(troubles[name])}.</b>" if troubles[name] else ""
            picture = curve(list(points), list(points.values()), title)
            caption = f"<figcaption>{meaning}{trouble}</figcaption>"
            cards.append(f'<figure class="card"><h3>{title}{mark}</h3>{picture}{caption}</figure>\n')
    return cards and f'<div class="grid">{"".join(cards)}</div>'
