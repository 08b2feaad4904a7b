"""docs/results.md from the records: tables, verdicts, and the lines of those experiments that have a form of their own.

`by_label` is {row's label: [a record per seed]} everywhere.
"""

from collections import Counter
from dataclasses import dataclass

import numpy as np
from scores import GENRES, SCORES, TASKS, WAYS, better_way, value, ways

HEAD = """# The paper in miniature

`python experiments/run.py` writes this page from the records in `experiments/results/`; no figure in a table is typed. The
sections from *Real text* on are on real text, all others on the embedded worlds (worlds/): a model of 0.35 M parameters, greedy
rationales, 256 held-out queries among 512 texts, half of them negatives that copy the query's words. A figure is the mean over
seeds, with the lowest and the highest.

Every trained row is embedded in two ways: with the rationale that it writes, and by its prompt alone. Tables show both scores;
the better way of a row, by the mean over seeds, is in bold. A claim about a score compares the better ways of its rows. Claims
are counted over all comparisons, seeds times pairs of rows: *agrees* where all hold, *disagrees* where none does, and *cannot
be seen at this size* in between.

*facts rightly named*: of the facts in a text, the share that its rationale names. *names that are true*: of the facts that a
rationale names, the share that the text has. *loss on the training kind of texts, rise*: nats per token, on held-out texts. A
text term (`--text-weight`) is language-model training on the training texts, so it lowers this very loss: what it did not train
stands in Table 5. Two runs were made at a time, so *seconds* are rough.
"""

COLUMNS = {  # a figure's name in a record: its heading, and digits
    "ndcg_at_10": ("nDCG@10", 3), "spearman": ("Spearman", 3), "text loss": ("loss on the training kind of texts, rise", 2),
    "thinks": ("thinks", 2), "true_steps": ("true steps", 3), "forced": ("nDCG@10, forced walks", 3),
    "recall": ("facts rightly named", 2), "precision": ("names that are true", 2), "distinct": ("distinct", 2),
    "answers loss": ("loss on the start's own answers, rise", 2), "start_logprob": ("log p of its answers under the start", 2),
    "other loss": ("loss on another instruction, rise", 2), "other_right": ("another instruction, answered rightly", 2),
    "plain loss": ("loss on another kind of texts, rise", 2), "plain_loss": ("loss on another kind of texts", 2),
    "bare loss": ("loss on another kind of texts, without a prompt, rise", 2),
    "well_formed": ("well formed", 2),
    "told_apart": ("hard negatives told apart", 3),
    **{name: (name, 3) for name in (*TASKS, "mean of tasks", *GENRES)},
    "true": ("words that are true", 3), "copied": ("words of the text", 3), "by_chance": ("true of the next text", 3),
    "follows": ("instructions followed", 2), "words": ("words", 1), "finished": ("ended", 2), "seconds": ("seconds", 0),
}  # fmt: skip
MISSING = "–"  # a figure that was not measured when the record was made


# ---------------------------------------------------------------- what an experiment is


def paired(one, other):
    """The records of two rows by the seeds that both have, `[(record, record)]`; a run that names its seed is of every seed."""
    seeds = [[record["run"]["seed"] for record in records] for records in (one, other)]
    of_every = [len(set(row)) < len(row) for row in seeds]  # one record, once for each seed
    if all(of_every):
        return [(one[0], other[0])]
    if any(of_every) or not set(seeds[0]) & set(seeds[1]):
        return list(zip(one, other))
    return [(a, b) for a in one for b in other if a["run"]["seed"] == b["run"]["seed"]]


@dataclass
class Claim:
    """`text` holds if, by `column`, the first row of each pair is above the second by more than `by`.

    within: if they differ by no more than that, instead. way: of the first row, instead of its better one.
    """

    text: str
    pairs: list
    column: str = "ndcg_at_10"
    within: float = None
    by: float = 0.0
    way: str = None

    def verdict(self, by_label):
        """What the records show, in how many of the comparisons (pairs times seeds). Scores are of each row's better way."""
        if not by_label.keys() >= {label for pair in self.pairs for label in pair}:
            return "not measured yet"
        way = {label: better_way(by_label[label], label, self.column) for pair in self.pairs for label in pair}
        if self.way:
            way[self.pairs[0][0]] = self.way
        figure = lambda record, label: value(record, self.column, way[label])
        both = [
            (figure(one, above), figure(other, below))
            for above, below in self.pairs
            for one, other in paired(by_label[above], by_label[below])
        ]
        if any(None in figures for figures in both):
            return "not measured on these data"
        apart = [above - below for above, below in both]
        holds = sum(abs(x) <= self.within if self.within is not None else x > self.by for x in apart)
        word = "agrees" if holds == len(apart) else "disagrees" if holds == 0 else "cannot be seen at this size"
        return f"**{word}** ({holds} of {len(apart)} comparison{'s' if len(apart) > 1 else ''})"


@dataclass
class Experiment:
    """What stands in docs/results.md under one name."""

    title: str
    paper: str  # what the paper reports
    rows: dict  # {label: settings of its runs}; rows of several experiments with equal settings share their runs
    columns: tuple = ("ndcg_at_10", "spearman", "text loss", "recall", "precision")
    claims: tuple = ()
    note: str = ""
    seeds: tuple = (0, 1, 2)
    figure: object = None  # function(by_label) -> a matplotlib figure
    lines: object = None  # function(by_label) -> more lines of the page
    whole: bool = True  # False: rows are shown as their records come in

    def runs(self, seeds=None):
        """Every run, `[(label, run)]`; one that names its seed is the same for all."""
        return [(label, {"seed": seed, **run}) for label, run in self.rows.items() for seed in seeds or self.seeds]


# ---------------------------------------------------------------- tables


def mean_and_range(values, digits):
    """Numbers of several seeds as a mean, with the lowest and highest where they differ."""
    low, high, mean = (f"{round(f(values), digits) + 0.0:.{digits}f}" for f in (min, max, np.mean))  # no "-0.00"
    return mean if low == high else f"{mean} ({low} to {high})"


def cell(records, label, name, way="after"):
    """One cell: mean over seeds, lowest and highest; in bold where the row has another way that is not as good.

    Empty where the row does not have this way, a dash where a record does not have this figure.
    """
    if name in SCORES and way not in ways(label):
        return ""
    values = [value(record, name, way) for record in records]
    if any(x is None or x != x for x in values):
        return MISSING
    text = mean_and_range(values, COLUMNS[name][1])
    both = name in SCORES and len(ways(label)) > 1
    return f"**{text}**" if both and way == better_way(records, label, name) else text


def heading(name, way):
    """The heading of a column; scores have one per way."""
    return f"{COLUMNS[name][0]}, {WAYS[way]}" if name in SCORES else COLUMNS[name][0]


def table(by_label, names):
    """The rows as a markdown table; columns that no row fills are left out."""
    columns = [(name, way) for name in names for way in (WAYS if name in SCORES else ["after"])]
    cells = {label: [cell(records, label, *column) for column in columns] for label, records in by_label.items()}
    kept = [i for i in range(len(columns)) if any(row[i] not in ("", MISSING) for row in cells.values())]
    lines = ["| | " + " | ".join(heading(*columns[i]) for i in kept) + " |", "| --- " + "| ---: " * len(kept) + "|"]
    return lines + [f"| {label} | " + " | ".join(row[i] for i in kept) + " |" for label, row in cells.items()]


def grid_lines(by_label):
    """Figure 3 as small tables of nDCG@10."""
    lines, weights = [], sorted({label.split()[1] for label in by_label})
    for name, title in (("paper", "the paper's reward"), ("infonce", "InfoNCE, the full recipe")):
        for way in WAYS:
            lines += [f"nDCG@10 under {title}, {WAYS[way]}:\n", "| λ1 \\ λ2 | " + " | ".join(weights) + " |"]
            lines += ["| --- " + "| ---: " * len(weights) + "|"]
            for a in weights:
                groups = ([value(record, "ndcg_at_10", way) for record in by_label[f"{name} {a} {b}"]] for b in weights)
                lines.append(f"| {a} | " + " | ".join(mean_and_range(values, 3) for values in groups) + " |")
            lines.append("")
        records = [record for label, group in by_label.items() if label.startswith(name) for record in group]
        largest = max(m["hard_std"] for record in records for m in record["trace"])
        lines.append(f"The hard component's standard deviation within a group, the largest of all runs: {largest:.2g}.\n")
    return lines


def along(by_label, texts=2):
    """Table 6: the same held-out texts' rationales along the training, first seed."""
    lines = []
    for label, records in by_label.items():
        for entry in records[0]["rationales"][:texts]:
            lines += [f"{label}: *{entry['text']}*\n", "| step | rationale |", "| ---: | --- |"]
            lines += [f"| {step} | {rationale} |" for step, rationale in entry["written"]] + [""]
    return lines


def discovery_lines(by_label):
    """When a run's greedy answers have half as many words again as the start's: per row a step for each seed."""
    lines = ["| | steps until answers have grown by half, per seed |", "| --- | --- |"]
    for label, records in by_label.items():
        lines.append(f"| {label} | {', '.join(str(grown_at(record) or 'never') for record in records)} |")
    return lines


def grown_at(record):
    """The first evaluation whose answers have half as many words again as the start's, as a step; None: there is none."""
    course = [*record["curve"], {"step": record["config"]["steps"], **record["after"]}]
    return next((at["step"] for at in course if at["words"] > 1.5 * record["before"]["words"]), None)


def ladder_lines(by_label):
    """nDCG@10 by the number of steps in a walk, each row in both ways."""
    steps = list(next(iter(by_label.values()))[0]["ladder"]["after"])
    lines = ["| steps in each walk | " + " | ".join(steps) + " |", "| --- " + "| ---: " * len(steps) + "|"]
    for label, records in by_label.items():
        for way in ways(label):
            cells = (mean_and_range([record["ladder"][way][n] for record in records], 3) for n in steps)
            lines.append(f"| {label}, {WAYS[way]} | " + " | ".join(cells) + " |")
    return lines


def traces(by_label):
    """What a group's rewards spread over, along the training, first seed."""
    columns = {
        "step": "step", "reward": "reward", "contrastive_std": "contrastive std", "consistency_std": "consistency std",
        "hard_std": "hard std", "distinct": "distinct", "cosine": "cosine between texts",
        "effective_rank": "effective rank", "length": "length",
    }  # fmt: skip
    lines = []
    for label, records in by_label.items():
        lines.append(f"{label}, seed {records[0]['run']['seed']}:\n")
        lines += ["| " + " | ".join(columns.values()) + " |", "| ---: " * len(columns) + "|"]
        for m in records[0]["trace"]:
            lines.append("| " + " | ".join(f"{m[c]:.4f}" if c.endswith("_std") else f"{m[c]:.4g}" for c in columns) + " |")
        lines.append("")
    return lines


def budget_lines(by_label):
    """Figure 4 as a table, and the sampler's share of a training step."""
    (records,) = by_label.values()
    lines = ["| longest rationale, tokens | nDCG@10 | ended | ms per text |", "| ---: " * 4 + "|"]
    for rows in zip(*(record["budgets"] for record in records)):
        limit, ended = rows[0]["limit"], [row["finished"] for row in rows]
        ndcg, ms = (np.mean([row[name] for row in rows]) for name in ("ndcg_at_10", "ms"))
        lines.append(f"| {limit or 'none'} | {ndcg:.3f} | {f'{np.mean(ended):.2f}' if limit else ''} | {ms:.2f} |")
    trace = [m for record in records for m in record["trace"]]
    sampling, whole = (np.mean([m[name] for m in trace]) for name in ("sample_s", "step_s"))
    return lines + [f"\nA training step takes {whole:.2f} s, of which sampling takes {sampling:.2f} s.\n"]


def search_lines(by_label):
    """What was tried, each run at its best evaluation, by the better way; per family of rows, the best of all in bold."""
    tried = {label: best_evaluation(records) for label, records in by_label.items()}
    graded = all("spearman" in scores for scores, _, _ in tried.values())
    lines = [f"| tried | best nDCG@10 |{' Spearman there |' * graded} at step | of | embedded |"]
    lines.append("| --- " + "| ---: " * (3 + graded) + "| --- |")
    family = lambda label: label.split(":")[0]
    chosen = {family(label): label for label in sorted(tried, key=lambda label: tried[label][0]["ndcg_at_10"])}
    for label, (scores, step, way) in tried.items():
        score = f"**{scores['ndcg_at_10']:.3f}**" if label in chosen.values() else f"{scores['ndcg_at_10']:.3f}"
        spearman = f" {scores['spearman']:.3f} |" if graded else ""
        lines.append(f"| {label} | {score} |{spearman} {step} | {steps(by_label[label][0])} | {WAYS[way]} |")
    first = next(iter(by_label.values()))[0]
    if not steps(first):
        return [*lines, ""]
    before = first["before"]
    spearman = f", Spearman {before['spearman']:.3f}" if graded else ""
    return [*lines, "", f"The start: nDCG@10 {before['ndcg_at_10']:.3f}{spearman}.\n"]


def steps(record):
    """How long a record's run was trained."""
    return 0 if record["run"]["trainer"] == "none" else record["config"]["steps"]


def best_evaluation(records):
    """Of all evaluations after the training, or after some of it, the one with the best nDCG@10: `(scores, step, way)`.

    Scores are means over the records, one per seed.
    """
    evaluations = [[(record[way], steps(record), way) for way in WAYS] for record in records]
    for each, record in zip(evaluations, records):
        each += [(scores, int(scores["step"]), "after") for scores in record["curve"]]
    means = []
    for same in zip(*evaluations):
        names = [name for name in ("ndcg_at_10", "spearman") if name in same[0][0]]
        means.append(({name: np.mean([scores[name] for scores, *_ in same]) for name in names}, *same[0][1:]))
    return max(means, key=lambda evaluation: (evaluation[0]["ndcg_at_10"], *evaluation[1:]))


def task_lines(by_label):
    """Real tasks and held-out triplets, a row per policy and way."""
    first = next(iter(by_label.values()))[0]
    names = list(first["tasks"])
    lines = ["| | " + " | ".join([*names, "held-out nDCG@10", COLUMNS["text loss"][0]]) + " |"]
    lines.append("| --- " + "| ---: " * (len(names) + 2) + "|")
    words = " | ".join(f"{100 * first['tasks_words'][name]:.1f}" for name in names)
    lines.append(f"| hashed words, no model | {words} | | |")
    for label, records in by_label.items():
        rise, label = cell(records, label, "text loss"), label.replace("given", records[0]["backbone"])
        for way, tasks in (("after", "tasks"), ("after_without_rationale", "tasks_alone")):
            cells = " | ".join(mean_and_range([100 * record[tasks][name] for record in records], 1) for name in names)
            ndcg = mean_and_range([value(record, "ndcg_at_10", way) for record in records], 2)
            lines.append(f"| {label}, {WAYS[way]} | {cells} | {ndcg} | {rise} |")
    return lines


# ---------------------------------------------------------------- the page


def section(name, experiment, place, seeds=None, picture=None):
    """One experiment's part of the page, and its picture where a path is given.

    None if a run has no record; where rows come in one by one, if no trained one has.
    """
    by_label = {}
    for label, run in experiment.runs(seeds):
        if (record := place.read(run)) is None:
            if experiment.whole:
                return None
            continue
        by_label.setdefault(label, []).append(record)
    if all(records[0]["run"]["trainer"] == "none" for records in by_label.values()):
        return None
    lines = [f"## {experiment.title}\n", f"The paper: {experiment.paper}\n"]
    if experiment.columns:
        lines += [*table(by_label, experiment.columns), ""]
    if experiment.lines:
        lines += [*experiment.lines(by_label), ""]
    if experiment.claims:
        lines += ["| claim | verdict |", "| --- | --- |"]
        lines += [f"| {claim.text} | {claim.verdict(by_label)} |" for claim in experiment.claims] + [""]
    if experiment.figure:
        if picture:
            experiment.figure(by_label).savefig(picture)
        lines.append(f"![{experiment.title}]({name}.png)\n")
    wanted = Counter(label for label, _ in experiment.runs(seeds))
    few = [
        f"{label} ({len(by_label.get(label, ()))} of {n})" for label, n in wanted.items() if len(by_label.get(label, ())) < n
    ]
    few = f"Not all seeds yet: {'; '.join(few)}." if few else ""
    return "\n".join([*lines, " ".join(filter(None, (experiment.note, few, foot(name, by_label, place)))), ""])


def foot(name, by_label, place):
    """How a section is made again: command, seeds, sizes, cost, and the revisions that made its records."""
    records = {place.key(record["run"]): record for group in by_label.values() for record in group}.values()
    seeds = sorted({record["run"]["seed"] for record in records})
    configs = [record["config"] for record in records if record["run"]["trainer"] != "none"]
    sizes = {key: sorted({config[key] for config in configs}) for key in ("batch", "rollouts", "steps", "lr")}
    sizes = ", ".join(f"{key} {'/'.join(f'{x:g}' for x in values)}" for key, values in sizes.items())
    minutes = sum(record["seconds"] for record in records) / 60
    revisions = sorted({r["revision"][:7] + ("+" if r["revision"].endswith("+") else "") for r in records})
    command = f"`python experiments/run.py {name}`; seeds {', '.join(map(str, seeds))}"
    return f"{command}; {sizes}; {minutes:.0f} minutes of one core; revision {', '.join(revisions)}."


def whole_page(experiments, place, seeds=None, pictures=None):
    """docs/results.md: every experiment whose runs are all there. pictures: {name: path} of those to draw."""
    sections = [section(name, one, place, seeds, (pictures or {}).get(name)) for name, one in experiments.items()]
    return "\n".join([HEAD, *(text for text in sections if text)])
