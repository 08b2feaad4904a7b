"""Tables 1, 2 and 5 and the frontier on real text: captions of pictures, and a small chat model that can say them otherwise.

    python experiments/captions.py --groups FILE... --triplets FILE... --heldout FILE --plain FILE --out ROWS
    python experiments/run.py captions_search --model DIR --data ROWS/train.jsonl --heldout ROWS/search.jsonl \\
        --plain ROWS/plain.txt --data-dir FOLDER --out OUT
    python experiments/run.py captions captions_retention captions_frontier --model DIR --data ROWS/train.jsonl \\
        --heldout ROWS/heldout.jsonl --plain ROWS/plain.txt --data-dir FOLDER --out OUT
    python experiments/run.py captions_sizes captions_asked (as the third), captions_search_asked captions_search_stronger (as the
        second); beside DIR the folders captions1m and captions16m, which backbone.py makes
    python experiments/run.py captions_search_unlabelled (as the second), captions_unlabelled (as the third), each with
        --data ROWS/texts.jsonl

Settings are chosen by the searches' records alone, on rows held back from the training groups and on a seed that no table
has: for Table 1 three rates for each row, in short runs, and three long ones for each of the two rows that the page compares
(two for the reward alone). No task is looked at (the idea to ask for the main words came from one, its choice did not). Rows
stand on the page as they are made.
"""

import functools

import numpy as np
import pictures
from chats import INSTRUCTIONS
from page import COLUMNS, Claim, Experiment, cell, mean_and_range, search_lines, task_lines
from scores import GENRES, TASKS, WAYS, better_way, ways

# ---------------------------------------------------------------- what a row is, before any setting is chosen

SHARED = dict(
    backbone="given", batch=32, rollouts=4, max_new_tokens=24, lr=3e-4, lr_decay=True, infonce_temperature=0.05, eval_every=0
)
START = SHARED | dict(trainer="none", seed=0)  # greedy, so no seed matters
LOSS = SHARED | dict(trainer="contrastive", text_weight=0.0)
FULL = SHARED | dict(trainer="GRACE", recipe="full", pathwise=1.0)
BASE, REASONING = "Base", "Base with reasoning"
CONTRASTIVE, TEXT_TERM = "contrastive fine-tuning", "contrastive with the text term"
PAPERS, BEST, IN_TIME = "GRACE, the paper's recipe", "GRACE, full", "GRACE, full, in the time of the loss"
NO_GRPO, ALONE = "the same without GRPO", "by reward alone"
KINDS = {
    CONTRASTIVE: LOSS,
    TEXT_TERM: LOSS | dict(text_weight=1.0),
    PAPERS: SHARED | dict(trainer="GRACE", recipe="paper"),
    BEST: FULL,
    NO_GRPO: FULL | dict(trainer="pathwise"),
    # What suited the reward without the pathwise term in the embedded worlds (tables.py), but for the rate.
    ALONE: FULL | dict(pathwise=0.0, temperature=1.0, length_normalize=True, kl=0.02),
}
SIMCSE, VIEWS = "SimCSE", "full: two rationales as two views"
UNLABELLED = {
    SIMCSE: LOSS | dict(trainer="simcse", mode="unsupervised", text_weight=1.0),
    VIEWS: FULL | dict(mode="unsupervised"),
}

# ---------------------------------------------------------------- how settings were chosen

SEARCHED = KINDS | UNLABELLED
is_loss = lambda kind: kind["trainer"] in ("contrastive", "simcse")
SHORT = {label: dict(steps=60 if is_loss(kind) else 20) for label, kind in KINDS.items()}
LONG = {label: dict(steps=200 if is_loss(kind) else 60) for label, kind in SEARCHED.items()}  # about five minutes
TRIED = {label: [steps | dict(lr=rate) for rate in (1e-4, 3e-4, 1e-3)] for label, steps in SHORT.items()}
for label in (TEXT_TERM, BEST):  # the two that the page compares: a rate that suits a short run may be too high for a long one
    TRIED[label] += [LONG[label] | dict(lr=rate) for rate in (3e-4, 1e-3)]
# A step of GRACE takes three times as long as one of the loss: GRACE with as many pairs, and the loss in that time.
TRIED[BEST].append(dict(steps=200, lr=1e-3))
TRIED[TEXT_TERM].append(dict(steps=600, lr=1e-3))
TRIED[ALONE] += [dict(steps=steps, lr=1e-3) for steps in (60, 200)]  # does the reward teach if it is given as long?
CHOSEN = {  # the best of what was tried in at most 200 steps, by the better way; without GRPO, what GRACE has in that time
    CONTRASTIVE: dict(steps=60, lr=3e-4),
    TEXT_TERM: dict(steps=200, lr=1e-3),
    PAPERS: dict(steps=20, lr=1e-4),
    BEST: dict(steps=200, lr=1e-3),
    IN_TIME: dict(steps=60, lr=3e-4),
    NO_GRPO: dict(steps=60, lr=3e-4),
    ALONE: dict(steps=20, lr=1e-3),
}


def words(changes):
    """Settings as a table names them."""
    return ", ".join(f"{name} {value:g}" for name, value in changes.items())


def search(tried, **where):
    """What is tried of some rows, `{label: [changes]}`, as the rows of a search."""
    runs = [(label, changes) for label, each in tried.items() for changes in each]
    return {f"{label}: {words(changes)}": SEARCHED[label] | changes | dict(probe="search") | where for label, changes in runs}


SEARCH = search(TRIED)
RATES = [dict(steps=200, lr=rate) for rate in (3e-4, 1e-3)]  # does a larger backbone want another one?
SEARCH_LARGE = search({TEXT_TERM: RATES, BEST: RATES}, backbone="captions60m")
RATES_UNLABELLED = [dict(lr=1e-4), dict(lr=3e-4), dict(lr=1e-3), *(dict(lr=x, text_weight=0.1) for x in (3e-4, 1e-3))]
SEARCH_UNLABELLED = search({label: [LONG[label] | knob for knob in RATES_UNLABELLED] for label in UNLABELLED})
CHOSEN_UNLABELLED = {SIMCSE: dict(lr=1e-4), VIEWS: dict(lr=3e-4, text_weight=0.1)}  # the best of these

# ---------------------------------------------------------------- the tables

MEASURED = dict(probe="captions")
BASES = {BASE: START | MEASURED, REASONING: START | MEASURED}
TABLE = BASES | {label: kind | CHOSEN[label] | MEASURED for label, kind in KINDS.items()}
FULL_IN_TIME = FULL | CHOSEN[IN_TIME] | MEASURED
TABLE[IN_TIME] = FULL_IN_TIME | dict(averaged=True)
UNSUPERVISED = BASES | {label: kind | LONG[label] | MEASURED for label, kind in UNLABELLED.items()}
UNSUPERVISED |= {f"{label}, as searched": UNSUPERVISED[label] | knob for label, knob in CHOSEN_UNLABELLED.items()}
FRONTIER = {  # one knob at a time, of the two rows that take equally long
    **{f"the loss, text term {x:g}": TABLE[TEXT_TERM] | dict(text_weight=x) for x in (0.3, 1.0, 3.0)},
    "GRACE, text term 1, pathwise 1": TABLE[IN_TIME],
    **{f"GRACE, text term {x:g}": FULL_IN_TIME | dict(text_weight=x) for x in (0.3, 3.0)},
    **{f"GRACE, pathwise {x:g}": FULL_IN_TIME | dict(pathwise=x) for x in (0.3, 3.0)},
}
OTHER_TASKS = {label: TABLE[label] | dict(probe="captions tasks") for label in (REASONING, TEXT_TERM, BEST)}
SIZES = {"1.3 M": dict(backbone="captions1m"), "4.2 M": {}, "15.5 M": dict(backbone="captions16m")}  # folders beside --model
COMPARED = (BASE, REASONING, TEXT_TERM, BEST)  # with the settings that were found at 4.2 M
BY_SIZE = {f"{label}, {size}": TABLE[label] | other for size, other in SIZES.items() for label in COMPARED}
BY_SIZE |= {f"{label}, 60 M": TABLE[label] | dict(backbone="captions60m") for label in (BASE, REASONING)}
SLOWER = SIZES["15.5 M"] | dict(lr=3e-4)  # the rate that the search at 60 M prefers, for both rows
BY_SIZE |= {f"{label}, 15.5 M, lr 0.0003": TABLE[label] | SLOWER for label in (TEXT_TERM, BEST)}

# ---------------------------------------------------------------- what the policy is asked for

ASKED = {kind: {} if kind == "other words" else dict(instruction=text) for kind, (text, _) in INSTRUCTIONS.items()}
MAIN_WORDS = ASKED["main words"]  # what the search prefers, clearly at 15.5 M
SEARCH_ASKED = {
    f"untrained, {size}: {kind}": START | SIZES[size] | asked | dict(probe="search")
    for size in ("4.2 M", "15.5 M")
    for kind, asked in ASKED.items()
}
SEARCH_ASKED |= search({TEXT_TERM: RATES, BEST: RATES}, **MAIN_WORDS)
LESS_TEXT = {  # more weight for pairs
    TEXT_TERM: [*(dict(text_weight=x) for x in (1.0, 0.3, 0.1, 0.03, 0.01)), dict(lr=1e-3, text_weight=0.03)],
    BEST: [
        *(dict(pathwise=x) for x in (1.0, 3.0)),
        *(dict(text_weight=x) for x in (0.1, 0.03)),
        *(dict(text_weight=0.1, prompt_weight=x) for x in (1.0, 3.0)),
    ],
}
SEARCH_STRONGER = search(
    {label: [RATES[0] | knob for knob in knobs] for label, knobs in LESS_TEXT.items()}, **SIZES["15.5 M"] | MAIN_WORDS
)
BY_MAIN_WORDS = {label: TABLE[label] | SLOWER | MAIN_WORDS for label in COMPARED}
BY_MAIN_WORDS[REASONING] |= dict(shares=True)
LESS_LOSS, LEAST_LOSS = f"{TEXT_TERM} of 0.1", f"{TEXT_TERM} of 0.03"
LESS_BEST, MORE_PATHWISE = f"{BEST}, text term 0.1", f"{BEST}, pathwise 3"
LESS_BOTH = f"{LESS_BEST}, prompt weight 3"
KNOBS = {
    LESS_LOSS: (TEXT_TERM, dict(text_weight=0.1)),
    LEAST_LOSS: (TEXT_TERM, dict(text_weight=0.03, shares=True)),
    LESS_BEST: (BEST, dict(text_weight=0.1, averaged=True, shares=True)),
    MORE_PATHWISE: (BEST, dict(pathwise=3.0, averaged=True)),
    LESS_BOTH: (BEST, dict(text_weight=0.1, prompt_weight=3.0, averaged=True, shares=True)),
}
BY_MAIN_WORDS |= {label: TABLE[row] | SLOWER | MAIN_WORDS | knob for label, (row, knob) in KNOBS.items()}
BY_MAIN_WORDS |= {f"{label}, asked for other words": TABLE[label] | SLOWER for label in COMPARED[1:]}
SCORE_COLUMNS = ("ndcg_at_10", "told_apart", "mean of tasks")
KEPT = ("text loss", "plain loss", "answers loss", "start_logprob", "other loss", "other_right")
SAID = ("true", "copied", "by_chance", "distinct", "words", "finished")
ABOUT = (
    " Rows: two captions of one picture (Flickr30k, COCO) with a caption of another picture that shares words as the hard negative, and "
    "triplets whose negatives change who does what, or how many, or where. Held out: 1,013 pictures, one caption finds another among all; and 739 triplets. The backbone is "
    "captions4m, a Llama-architecture network of 4.2 M parameters made from such captions (experiments/backbone.py makes its like). "
    "Flickr30k's captions are for research, so no text is kept here; a run writes a page of samples under `runs/samples`. With a network: "
    "`HuggingFaceTB/SmolLM2-135M-Instruct` as `--model` and, written as rows of query and positive, `sentence-transformers/flickr30k-captions`, "
    "`sentence-transformers/coco-captions` and `sentence-transformers/all-nli` (triplet)."
)
SEEDS = (
    "The mean is over four tasks of similarity. The start has no seed. A step of GRACE takes three times as long as one of the loss: the row "
    "*in the time of the loss* has 60 steps, about as long as 200 of the loss; *GRACE, full* has 200, as many pairs as the loss. "
    "(The loss for 600 steps, the time of that row, was tried in the search alone.)"
)
BY_KIND = (
    " What GRACE lacks on similarity it lacks on news. On pairs of captions its rationales put it ahead of the loss; about a headline this backbone "
    "writes a caption, which costs every row that has a rationale. A backbone can help with what it can put in other words."
)


def settings_lines(by_label):
    """Every trained row's settings, as they stand in its records."""
    names = ("steps", "lr", "infonce_temperature", "text_weight", "pathwise", "kl", "temperature", "length_normalize")
    lines = ["| | " + " | ".join(names) + " |", "| --- " + "| ---: " * len(names) + "|"]
    for label, records in by_label.items():
        config = records[0]["config"]
        unread = names[4:] if is_loss(records[0]["run"]) else ()
        cells = ["" if name in unread else f"{config[name]:g}" for name in names]
        lines += [f"| {label} | {' | '.join(cells)} |"] if records[0]["run"]["trainer"] != "none" else []
    return [
        "Settings, otherwise those of the recipe (B = 32, K = 4, T = 24, the rate falls to 0):\n",
        *lines,
        "",
        *similarity_lines(by_label),
        *genre_lines(by_label),
        *averaged_lines(by_label),
    ]


def embedded_lines(title, names, rows):
    """A table of scores that has the way of embedding in a column. rows: `[(label, way, cells)]`."""
    lines = [f"{title}:\n", f"| | embedded | {' | '.join(names)} |", "| --- | --- " + "| ---: " * len(names) + "|"]
    return [*lines, *(f"| {label} | {WAYS[way]} | {' | '.join(cells)} |" for label, way, cells in rows), ""]


def similarity_lines(by_label):
    """The tasks one by one, each row by the way that is better on their mean."""
    way = {label: better_way(records, label, "mean of tasks") for label, records in by_label.items()}
    rows = [
        (label, way[label], [cell(records, label, name, way[label]).strip("*") for name in TASKS])
        for label, records in by_label.items()
    ]
    title = "Tasks, each row by the way that is better on their mean (cosine Spearman)"
    return embedded_lines(title, [COLUMNS[name][0] for name in TASKS], rows)


def genre_lines(by_label):
    """STSBenchmark by the kind of its texts, in both ways, of the records that have it."""
    split = {label: [r for r in records if GENRES[0] in r["after"]] for label, records in by_label.items()}
    rows = [
        (label, way, [cell(records, label, name, way) for name in GENRES])
        for label, records in split.items()
        for way in (ways(label) if records else ())
    ]
    title = "STSBenchmark by the kind of its texts (625, 500 and 254 pairs), where it was measured"
    return embedded_lines(title, GENRES, rows) if rows else []


def other_lines(by_label):
    """Tasks that Table 1 leaves out, and retrieval among texts of several captions."""
    numbers = list(next(iter(by_label.values()))[0]["longer"]["after"])
    rows = [
        (label, way, [mean_and_range([record["longer"][way][n] for record in records], 3) for n in numbers])
        for label, records in by_label.items()
        for way in WAYS
    ]
    title = "nDCG@10 by the number of captions, of different pictures, in a text: which one, of as many for every number, has other captions of the same pictures?"
    return [*task_lines(by_label), "", *embedded_lines(title, numbers, rows)]


def share_lines(by_label):
    """Scores by the prompt's share of the embedding, of the rows that have it; in bold the share that the search rows choose."""
    shown = {label: [r["shares"] for r in records if "shares" in r] for label, records in by_label.items()}
    shown = {label: each for label, each in shown.items() if each and "after" in ways(label)}
    lines = []
    for name in BY.values() if shown else ():
        shares = list(next(iter(shown.values()))[0])
        title = f"{COLUMNS[name][0]} by the prompt's share of the embedding, mean over seeds; bold: what is best on rows held back from training"
        lines += [f"{title}:\n", f"| | {' | '.join(shares)} |", "| --- " + "| ---: " * len(shares) + "|"]
        for label, each in shown.items():
            mean = {x: {w: np.mean([scores[w][x] for scores in each]) for w in shares} for x in ("searched", name)}
            best = max(shares, key=mean["searched"].get)
            cells = [f"**{x:.3f}**" if w == best else f"{x:.3f}" for w, x in mean[name].items()]
            lines += [f"| {label} | {' | '.join(cells)} |"]
        lines += [""]
    return lines


def averaged_lines(by_label):
    """Retrieval by the mean of several sampled rationales, of the rows that have it, over their seeds."""
    lines = []
    for label, records in by_label.items():
        found = [record["averaged"] for record in records if "averaged" in record]
        if found:
            lines += [
                f"{label}: nDCG@10 among the first 256 pictures by several sampled rationales averaged, mean over seeds:\n"
            ]
            lines += ["| " + " | ".join("greedy" if n == "0" else n for n in found[0]) + " |", "| ---: " * len(found[0]) + "|"]
            lines += ["| " + " | ".join(f"{sum(x[n] for x in found) / len(found):.3f}" for n in found[0]) + " |", ""]
    return lines


def said_lines(by_label):
    """What each policy of the first seed writes about our own texts."""
    lines = []
    for text in next(iter(by_label.values()))[0]["said"]:
        lines += [f"*{text}*\n", "| | rationale |", "| --- | --- |"]
        lines += [f"| {label} | {records[0]['said'][text]} |" for label, records in by_label.items() if label != BASE] + [""]
    return lines


def claims(pairs):
    """One claim for each pair of rows, by retrieval and by the mean of tasks."""
    for (text, above, below, way), (name, column) in ((p, c) for p in pairs for c in BY.items()):
        yield Claim(f"{text}, {name}", [(above, below)], column, way=way)


BY = {"by retrieval": "ndcg_at_10", "by the mean of tasks": "mean of tasks"}
EXPERIMENTS = {
    "captions_search": Experiment(
        "Captions: how settings were chosen", "One set of settings for everything.",
        SEARCH, (), lines=search_lines, seeds=(10,), whole=False,
        note="256 groups held back from the training captions: a caption finds another of the same picture among 256. The rate falls to 0 in "
        "short runs as in long ones. With 200 steps each, and so the same pairs, GRACE is ahead of the loss with the text term; in the same time, 200 steps "
        "against 600, the loss is ahead, by its prompt; with its rationale it has fallen below the start. The reward alone stays below the start, "
        "in 20 steps as in 200: on captions the pathwise term does the work.",
    ),
    "captions_search_large": Experiment(
        "Captions: the rate at 60 M parameters", "One set of settings for everything.",
        SEARCH_LARGE, ("plain loss", "distinct"), lines=search_lines, seeds=(10,), whole=False,
        note="As above, with a backbone of 60 M parameters (see *the size of the backbone*), on an H100, with matrix products in TF32. Both rows want the "
        "smaller rate, by retrieval and by what they take from other texts; each at its own, GRACE is ahead by 0.033.",
    ),
    "captions": Experiment(
        "Captions: Table 1", "On every backbone: base < base with reasoning < contrastive fine-tuning < GRACE.",
        TABLE, (*SCORE_COLUMNS, "seconds"),
        (
            *claims([
                ("reasoning helps the untrained policy", REASONING, BASE, None),
                ("contrastive fine-tuning is above the base with reasoning", CONTRASTIVE, REASONING, None),
                ("GRACE by the paper's recipe is above contrastive fine-tuning", PAPERS, CONTRASTIVE, None),
                ("GRACE in full, with its rationale, is above the loss with the text term, with as many pairs", BEST, TEXT_TERM, "after"),
                ("the same in the time of the loss", IN_TIME, TEXT_TERM, "after"),
                ("GRPO adds to the pathwise term", IN_TIME, NO_GRPO, None),
                ("the reward alone is above the base with reasoning", ALONE, REASONING, None),
            ]),
        ),
        lines=settings_lines, note=SEEDS + BY_KIND + ABOUT, whole=False,
    ),
    "captions_tasks": Experiment(
        "Captions: SICK-R and Banking77", "56 MTEB tasks; here the four of *Real text*, after training on captions.",
        OTHER_TASKS, (), lines=other_lines, seeds=(0,), whole=False,
        note="Rows of Table 1 once more. SICK-R's sentences come from captions: there GRACE, with its rationale, is level with the loss. Banking77 sorts questions "
        "to a bank by what they want, and this backbone has no words for them: the loss is ahead, and counting words beats both. Of longer texts (253 of each length) a rationale has to "
        "choose what it says, in 24 tokens; GRACE stays ahead of the loss, by 0.034 at two captions and by 0.026 at four.",
    ),
    "captions_search_unlabelled": Experiment(
        "Captions: how settings were chosen, unsupervised", "One set of settings for everything.",
        SEARCH_UNLABELLED, ("plain loss", "distinct"), lines=search_lines, seeds=(10,), whole=False,
        note="Rows held back from training, as above; texts without labels; five tries for each row, each about as long as any other. Only GRACE with a text term of 0.1 "
        "ends above the start, by 0.007, and SimCSE ends below it at every setting; but among 256 texts a difference of 0.01 may be chance.",
    ),
    "captions_unlabelled": Experiment(
        "Captions: Table 2, unsupervised", "On every backbone: base < base with reasoning < SimCSE < GRACE.",
        UNSUPERVISED, (*SCORE_COLUMNS, "plain loss", "true", "distinct"),
        tuple(claims([
            ("GRACE in full is above SimCSE", VIEWS, SIMCSE, None),
            ("each at the settings of its search", f"{VIEWS}, as searched", f"{SIMCSE}, as searched", None),
        ])),
        note="Trained rows have the rate 3e-4 and a text term of 1, without a search; but *as searched* SimCSE has the rate 1e-4, and GRACE 3e-4 with a text term of "
        "0.1, the best of five each on rows held back from training. SimCSE has 200 steps and GRACE 60, which take about as long.", whole=False,
    ),
    "captions_retention": Experiment(
        "Captions: Table 5, what is kept and what is true", "Contrastive fine-tuning takes general abilities to 0, GRACE keeps them (± 0.4).",
        TABLE, (*KEPT, *SAID),
        (
            Claim("GRACE keeps plain text within 0.05 nats", [(BEST, REASONING), (IN_TIME, REASONING)], "plain loss", within=0.05),
            Claim("it takes less from plain text than the loss with the text term", [(TEXT_TERM, BEST), (TEXT_TERM, IN_TIME)], "plain loss"),
            Claim("it takes less from the other instructions, with as many pairs", [(TEXT_TERM, BEST)], "other loss"),
            Claim("and in the same time", [(TEXT_TERM, IN_TIME)], "other loss"),
            Claim("its rationales are truer than before training", [(BEST, REASONING), (IN_TIME, REASONING)], "true"),
            Claim("those of the loss are not", [(REASONING, TEXT_TERM)], "true"),
            Claim("and no less distinct, by 0.02 at most", [(BEST, REASONING), (IN_TIME, REASONING)], "distinct", by=-0.02),
        ),
        lines=said_lines, note="*words that are true*: of a rationale's content words, the share that the text or another caption of its picture has; *of the "
        "text*: that the text itself has; *true of the next text*: what another picture's captions would support, so what common words get.",
        whole=False,
    ),
    "captions_sizes": Experiment(
        "Captions: the size of the backbone", "On every backbone: base < base with reasoning < contrastive fine-tuning < GRACE.",
        BY_SIZE, (*SCORE_COLUMNS, "plain loss", "true", "distinct"),
        tuple(claims([
            *(("reasoning helps the untrained policy at " + size, f"{REASONING}, {size}", f"{BASE}, {size}", None) for size in (*SIZES, "60 M")),
            *(
                (f"GRACE in full, with its rationale, is above the loss with the text term at {at}", f"{BEST}, {at}", f"{TEXT_TERM}, {at}", "after")
                for at in (*SIZES, "15.5 M, lr 0.0003")
            ),
        ])),
        note="The start has no seed. All backbones are of one architecture and were made from captions, Tatoeba's sentences and paraphrases, children's books, "
        "TinyStories and Wikipedia, but not in one way: 1.3 M by `experiments/backbone.py --size 1m --minutes 25` on one core (16 million tokens; it cannot repeat a "
        "sentence yet, and its instruction is worded a little otherwise); 15.5 M by `--size 16m --batch 256 --minutes 2` on an H200 (88 million tokens, MSVD's "
        "captions too, and the development sets of SNLI and MultiNLI as triplets); 60 M from the same by `--size 60m --batch 256 --minutes 1.9 --evaluations 8` on an H100 "
        "(36 million tokens, fewer than such a model needs; its trained rows are in *the rate at 60 M parameters*). Rows have the settings found at 4.2 M, but for those of "
        "15.5 M at the rate that 60 M prefers. What a rationale adds to the untrained model grows with size on similarity (-0.035, 0.015, 0.038, 0.054), and up to 15.5 M on retrieval. "
        "GRACE retrieves better than the loss at every size and rate. On similarity it is behind: at the rate 1e-3 by 0.057, 0.034 and 0.014, but that is because this rate is too high "
        "for the loss at 15.5 M. At 3e-4 (one seed there) the loss gains on similarity and GRACE on retrieval and on what it keeps: it is ahead by 0.027 on retrieval and behind by 0.046 "
        "on similarity, takes half as much from other texts, and its rationales are truer than before training. So the gap on similarity does not close with size. It is not in STSBenchmark, "
        "where the two are level at that rate, but in STS12 and STS13: news, parliament and glosses, about which these models write captions all the same: see *asked for the main words*.",
        lines=genre_lines,
        figure=functools.partial(pictures.by_size, rows=COMPARED, sizes={size: float(size.split()[0]) for size in SIZES}),
        whole=False,
    ),
    "captions_search_asked": Experiment(
        "Captions: what is asked for", "One instruction for everything.",
        SEARCH_ASKED, (), lines=search_lines, seeds=(10,), whole=False,
        note="Rows held back from training, as in *how settings were chosen*. *other words* is the instruction that each folder has by itself. What is asked for "
        "matters more at 15.5 M. Trained rows: 4.2 M, asked for the main words. There GRACE is ahead of the loss at both rates, and at the smaller one forgets half "
        "as much for the same retrieval; in other words it has 0.748. (Before this search, the untrained models were tried by each instruction on 400 pairs of STSBenchmark, "
        "STS12 and STS13 each, which gave the idea: the main words were ahead there too, 0.459 against 0.399 at 4.2 M, 0.516 against 0.441 at 15.5 M.)",
    ),
    "captions_search_stronger": Experiment(
        "Captions: pairs against the text term, at 15.5 M", "One set of settings for everything.",
        SEARCH_STRONGER, ("plain loss", "answers loss", "distinct"), lines=search_lines, seeds=(10,), whole=False,
        note="Asked for the main words, 200 steps at the rate 3e-4 (one of the loss at 1e-3), rows held back from training; six tries for each. A text term of 1 is too much for both. "
        "The loss gains the more the less there is of it, down to 0.03; 0.01 is no better than that (0.785 and 0.784 among 256), and the rate 1e-3 is worse (0.767). GRACE is best with 0.1, 0.777 instead of 0.768, and gains next to "
        "nothing from a pathwise weight of 3. A prompt weight trains, by the same reward, what the prompt embeds without a rationale: 0.694 that way becomes 0.764 with a weight of 1 and 0.780 with 3, and then "
        "the rationale no longer has to be written; with it there are 0.770 and 0.775 (one seed). So at the settings that this search prefers the loss is ahead by 0.005 on these rows, at two fifths of the "
        "cost of a step. (These two tries were trained while the term was a trainer of its own, whose gradients are those of `--prompt-weight` but for rounding.) "
        "Less text term takes no more from the start's own answers; of other texts 0.03 takes more, in both rows.",
    ),
    "captions_asked": Experiment(
        "Captions: asked for the main words", "On every backbone: base < base with reasoning < contrastive fine-tuning < GRACE.",
        BY_MAIN_WORDS, (*SCORE_COLUMNS, "plain_loss", "bare loss", "true", "distinct"),
        tuple(claims([
            ("reasoning helps the untrained policy", REASONING, BASE, None),
            ("GRACE in full, with its rationale, is above the loss with the text term", BEST, TEXT_TERM, "after"),
            ("and above the loss that is asked for other words", BEST, f"{TEXT_TERM}, asked for other words", "after"),
            ("and above the loss with a text term of 0.1", BEST, LESS_LOSS, "after"),
            ("so is GRACE with a pathwise weight of 3", MORE_PATHWISE, LESS_LOSS, "after"),
            ("and with a text term of 0.1", LESS_BEST, LESS_LOSS, "after"),
            ("and with a text term of 0.1 above the loss with 0.03, what either search prefers", LESS_BEST, LEAST_LOSS, "after"),
            ("so is GRACE with a prompt weight of 3", LESS_BOTH, LEAST_LOSS, "after"),
            ("and above GRACE without one", LESS_BOTH, LESS_BEST, "after"),
        ])),
        lines=lambda by_label: [
            *similarity_lines(by_label), *genre_lines(by_label), *share_lines(by_label), *averaged_lines(by_label), *said_lines(by_label)
        ],
        note="15.5 M parameters, the rate 3e-4 and 200 steps for both. What is asked for decides most: with a text term of 1, GRACE is behind the loss by 0.046 on similarity if it is asked for other "
        "words, all of it in STS12 and STS13, and by 0.005 if it is asked for the main words. Each at the text term that its search prefers (see *pairs against the text term*), 0.1 for "
        "GRACE and 0.03 for the loss, GRACE has 0.589 and 0.619, the loss 0.581 and 0.650: GRACE is ahead by 0.008 on retrieval, on three seeds of three, and behind by 0.031 on similarity, "
        "where the loss does best by its prompt alone. What GRACE lacked is training of the prompt's own embedding: with a prompt weight of 3 (also from that search) it has 0.590 and 0.649 with its rationale, and "
        "0.574 and 0.645 without, ahead of the loss by 0.009 on retrieval, on three seeds of three, and level on similarity (-0.001 on average, ahead on one seed of three). What is said is then almost as true as before training, "
        "0.801 against 0.814, but there is less of it: 3.2 words instead of 5.2, and 0.90 of the rationales are distinct. *By the prompt's share*: untrained, a quarter prompt and three quarters "
        "rationale find 0.522 instead of 0.483 (similarity: 0.559 instead of 0.574). GRACE is best about as it was trained, but the loss, which trained no rationale, wants a tenth of it: 0.595 and 0.657, the highest of all rows. So at the best "
        "reading of each, chosen on held-back rows, the loss is ahead by 0.006 and 0.005. By texts that stand alone, without a prompt, both forget at most 0.04 nats, GRACE least. Otherwise words become less true than before training, "
        "by 0.04 in GRACE's rationales and 0.08 in those of the loss (0.05 and 0.13 with a text term of 1; 0.02 with a pathwise weight of 3, one seed). "
        "Averaging sampled rationales adds little: eight find 0.744 among 256 where the greedy one finds 0.738. Why the main words help: when the untrained model says "
        "news in other words, 7 % of the content words that it writes stand in the text, and 21 % when it lists the main words (captions: 66 and 77 %, forums: 55 and 52 %; 150 "
        "sentences of STSBenchmark each). Before training a rationale adds 0.080 to retrieval and 0.068 to similarity (other words, 15.5 M: 0.099 and 0.038). *loss on another "
        "kind of texts* is not a rise here, because the start's own depends on the instruction: 5.98 behind this one, 5.18 behind the other. GRACE ends below the loss.", whole=False,
    ),
    "captions_frontier": Experiment(
        "Captions: the frontier of retrieval against retention", "(Ours.) One knob at a time.",
        FRONTIER, ("ndcg_at_10", "mean of tasks", "plain loss", "other loss", "true"), figure=pictures.retention, whole=False,
        note="A text term of 3 keeps no more of another kind of texts than one of 1: it is a loss on the training texts, and holds those. A pathwise weight of 3 "
        "gains GRACE 0.012 of the 0.021 that it lacks on retrieval in the same time, and costs only some of the other instruction. A text term of 0.3 "
        "gives the loss 0.012 and 0.009 and takes 0.16 nats more of other texts; GRACE with as many pairs (0.551) is still ahead on retrieval. (No search tried either: Table 1 has 1 and 1.)",
    ),
}  # fmt: skip
