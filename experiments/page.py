"""Records as markdown. docs/results.md is written by hand but for its tables, which stand between two comments each:

    <!-- table1 -->
    ...
    <!-- /table1 -->

Everywhere `rows` is {label: [a record per seed]}. A record has the scores of both ways in which a text is embedded, with
the rationale and by the prompt alone. Whoever compares two policies by one way that suits only one of them has shown
nothing: so tables show both, with the better one, by the mean over seeds, in bold.
"""

import re

import numpy as np

from experiments.runs import BASE, REASONING, SCORES, WEIGHTS

WAYS = {"after": "with rationale", "after_without_rationale": "prompt alone"}
COLUMNS = {  # a figure's name: its heading, and digits
    "ndcg_at_10": ("nDCG@10", 3), "spearman": ("Spearman", 3), "text loss": ("loss on the training kind of texts, rise", 2),
    "answers loss": ("loss on the start's own answers, rise", 2), "other loss": ("loss on another instruction, rise", 2),
    "other_right": ("another instruction, answered rightly", 2), "recall": ("facts rightly named", 2),
    "precision": ("names that are true", 2), "distinct": ("distinct", 2), "thinks": ("thinks", 2),
    "true_steps": ("true steps", 3), "forced": ("nDCG@10, forced walks", 3), "well_formed": ("well formed", 2),
    "finished": ("ended", 2), "words": ("words", 1), "grown at": ("grown by half at step, per seed", None),
    "seconds": ("seconds", 0),
}  # fmt: skip


# ---------------------------------------------------------------- figures of records


def ways(label):
    """The ways of a row. Before training each way has a row of its own, as in the paper; trained rows have both."""
    return {BASE: ["after_without_rationale"], REASONING: ["after"]}.get(label, list(WAYS))


def value(record, name, way="after"):
    """One figure of a record, or None where it was not measured."""
    if name in ("text loss", "answers loss", "other loss"):
        before, after = (record[moment].get(name.replace(" ", "_")) for moment in ("before", "after"))
        return None if None in (before, after) else after - before
    if name == "seconds":
        return record["train_seconds"]
    return grown_at(record) if name == "grown at" else record[way].get(name)


def course(record, name):
    """Steps and a held-out figure along a run, before and after included. `-> [steps], [values]`."""
    moments = (
        {0: record["before"]} | {int(at["step"]): at for at in record["curve"]} | {record["run"]["steps"]: record["after"]}
    )
    return list(moments), [at[name] for at in moments.values()]


def grown_at(record):
    """The first evaluation whose rationales have half as many words again as the start's, as a step, or "never"."""
    steps, words = course(record, "words")
    return next((step for step, n in zip(steps, words) if n > 1.5 * words[0]), "never")


def better_way(records, label, name):
    """The way by which a row is judged: the one with the higher mean over the seeds."""
    means = {way: np.mean([value(record, name, way) for record in records]) for way in ways(label)}
    return max(means, key=means.get)


# ---------------------------------------------------------------- tables


def markdown(head, lines, aligned=None):
    """A table: a list of headings, and a list of cells per line. All columns but the first are flush right by default."""
    return [f"| {' | '.join(cells)} |" for cells in (head, aligned or ["---", *["---:"] * (len(head) - 1)], *lines)]


def mean_and_range(values, digits):
    """Numbers of several seeds as a mean, with the lowest and highest where they differ."""
    low, high, mean = (f"{round(f(values), digits) + 0.0:.{digits}f}" for f in (min, max, np.mean))  # no "-0.00"
    return mean if low == high else f"{mean} ({low} to {high})"


def cell(records, label, name, way):
    """One cell: empty where the row does not have this way, a dash where a figure was not measured."""
    if name in SCORES and way not in ways(label):
        return ""
    values = [value(record, name, way) for record in records]
    if None in values:
        return "–"
    digits = COLUMNS[name][1]
    text = ", ".join(map(str, values)) if digits is None else mean_and_range(values, digits)
    return f"**{text}**" if name in SCORES and len(ways(label)) > 1 and way == better_way(records, label, name) else text


def plain(rows, columns):
    """A line per row; scores have a column per way, as far as any row has it."""
    columns = [(name, way) for name in columns for way in (WAYS if name in SCORES else ["after"])]
    columns = [(name, way) for name, way in columns if name not in SCORES or any(way in ways(label) for label in rows)]
    head = ["", *(COLUMNS[name][0] + (f", {WAYS[way]}" if name in SCORES else "") for name, way in columns)]
    return markdown(head, [[label, *(cell(records, label, *column) for column in columns)] for label, records in rows.items()])


def by_steps(rows):
    """The ladder: nDCG@10 by the number of steps in a walk, each row in both ways."""
    steps = list(next(iter(rows.values()))[0]["ladder"]["after"])
    lines = [
        [f"{label}, {WAYS[way]}", *(mean_and_range([record["ladder"][way][n] for record in records], 3) for n in steps)]
        for label, records in rows.items()
        for way in ways(label)
    ]
    return markdown(["steps in each walk", *steps], lines)


def along(rows):
    """Table 6: one held-out text's rationales along the training; a step that changed nothing is left out."""
    lines, texts = [], {records[0]["rationales"][0]["text"] for records in rows.values()}
    for label, (record, *_) in rows.items():
        written = record["rationales"][0]["written"]
        changes = [now for now, last in zip(written, [None, *written]) if not last or now[1] != last[1]]
        lines += [[label, str(step), rationale] for step, rationale in changes]
    return [f"*{' / '.join(texts)}*", "", *markdown(["", "step", "rationale"], lines, ["---", "---:", "---"])]


def grid(rows):
    """Figure 3: nDCG@10 with rationale, lambda1 by lambda2, under either reward."""
    lines = []
    for name, title in (("paper", "the paper's reward"), ("infonce", "InfoNCE, full recipe")):
        for a in WEIGHTS:
            groups = [rows[f"{name} {a:g} {b:g}"] for b in WEIGHTS]
            cells = [mean_and_range([value(record, "ndcg_at_10") for record in group], 3) for group in groups]
            spread = max(m["hard_std"] for group in groups for record in group for m in record["trace"])
            lines.append([f"{title}, λ1 = {a:g}", *cells, f"{spread:.2g}"])
    return markdown(["", *(f"λ2 = {b:g}" for b in WEIGHTS), "largest std of the hard component"], lines)


def tried(rows):
    """What was tried, a line per family: each run's best nDCG@10, along or after the training and by either way."""
    families = {}
    for label, (record, *_) in rows.items():
        family, settings = label.split(": ")
        evaluations = [record[way] for way in WAYS] + record["curve"]
        families.setdefault(family, {})[settings] = max(scores["ndcg_at_10"] for scores in evaluations)
    lines = []
    for family, found in families.items():
        shown = {settings: f"{score:.3f}" for settings, score in found.items()}
        top = max(found, key=found.get)
        shown[top] = f"**{shown[top]}**"
        lines.append([family, "; ".join(f"{settings}: {score}" for settings, score in shown.items())])
    return markdown(["", "what was tried, and the best nDCG@10"], lines, ["---", "---"])


FORMS = {"ladder": by_steps, "town_table6": along, "figure3": grid, "search": tried}


# ---------------------------------------------------------------- the page


def block(name, table, rows):
    """A table's part of the page; empty where there is a picture alone."""
    parts = ([plain(rows, table.columns)] if table.columns else []) + ([FORMS[name](rows)] if name in FORMS else [])
    lines = "\n\n".join("\n".join(part) for part in parts)
    return lines and f"<!-- {name} -->\n{lines}\n<!-- /{name} -->"


def replaced(page, blocks):
    """The page with these blocks, `{name: text}`, in the places of the old ones. Raises KeyError where it has no such place."""
    for name, text in blocks.items():
        old = re.search(rf"<!-- {name} -->.*<!-- /{name} -->", page, re.DOTALL)
        if not old:
            raise KeyError(f"the page has no place for {name}: give it <!-- {name} --> and <!-- /{name} -->")
        page = page[: old.start()] + text + page[old.end() :]
    return page
