"""A chat model that somebody else made, on two dictionaries, captions, plain English events, and similarity tasks.

    python experiments/real.py                                        the runs, and how many seeds of each have a record
    python experiments/real.py start                                  the supervised start that the runs words-... begin from
    python experiments/real.py captions-grace --seed 1                one run; its record becomes a line of real.jsonl
    python experiments/real.py captions-grace --part choose --lr 3e-5   a try: any setting of a run, on rows for choosing
    python experiments/real.py page                                   the tables of docs/results.md

Every record has all four ways to embed a text: the prompt alone, the text read twice (Echo embeddings, the control that
needs no rationale), the prompt with its rationale, and the text read twice with a rationale written about it. A run that was
stopped continues from its newest checkpoint.
"""

import argparse
import json
import os
import random
import re
import sys
import time

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))

import numpy as np

import grace
from evaluation.encoder import GraceEncoder, encode_texts, text_loss
from evaluation.tasks import columns, graded_spearman, load
from experiments import records
from experiments.baselines import LossTrainer
from experiments.measure import answered
from experiments.page import markdown, mean_and_range, replaced
from plumbing.errors import GraceError
from plumbing.run import read_metrics, versions
from policy import Policy
from rollout import sample, score, uniforms
from worlds.chat import english
from worlds.make import write_rows

RESULTS = os.path.join(records.ROOT, "experiments", "real.jsonl")
PAGE = os.path.join(records.ROOT, "docs", "results.md")

# ---------------------------------------------------------------- the runs: plain dicts

SHARED = dict(batch=16, lr=5e-5, lr_decay=True, max_prompt_tokens=256, pooling="halves", eval_every=0)
SHARED |= dict(part="table", pairs=60)  # which held-out rows (or: "choose"); at most so many pairs per similarity task
KEYWORDS = dict(model="chat", instruction="Give the keywords of the text, separated by commas.", max_new_tokens=24)
WORD = dict(model="start", instruction="Name the word for this.", max_new_tokens=8)
DATA = {  # where a run's rows are from, which model it starts from, and what that is told
    "captions": KEYWORDS | dict(data="captions"),
    "words": WORD | dict(data="dictionary"),
    "events": KEYWORDS | dict(data="events"),  # the rows of `bash train.sh chat`
}
LOSS = dict(trainer="contrastive", steps=40, text_weight=0.1)
FULL = dict(trainer="GRACE", rollouts=4, steps=40, text_weight=0.1, pathwise=1.0)
REWARD = dict(pathwise=0.0, temperature=1.0, length_normalize=True, kl=0.02)
ROWS = {  # a row's name on the command line: its name on the page, and its settings
    "untrained": ("untrained", dict(trainer="none")),
    "loss": ("InfoNCE as a loss", LOSS),
    "loss-twice": ("InfoNCE as a loss, over texts read twice", LOSS | dict(twice=True)),
    "loss-longer": ("InfoNCE as a loss, for as long as GRACE", LOSS),
    "loss-twice-longer": ("InfoNCE as a loss, over texts read twice, for as long", LOSS | dict(twice=True)),
    "paper": ("GRACE, the paper's recipe", dict(trainer="GRACE", recipe="paper", rollouts=4, steps=40)),
    "grace": ("GRACE, full", FULL),
    "grace-twice": ("GRACE, full, over texts read twice", FULL | dict(twice=True)),
    "grace-both": ("GRACE, full, over texts read twice, with the prompt term", FULL | dict(twice=True, prompt_weight=1.0)),
    "no-grpo": ("GRACE, full, without GRPO", FULL | dict(trainer="pathwise")),
    "queries": ("GRACE, only queries write", FULL | dict(documents="prompt")),
    "reward": ("by reward alone", FULL | REWARD),
    "simcse": ("SimCSE, without labels", LOSS | dict(trainer="simcse", mode="unsupervised")),
    "unlabelled": ("GRACE, full, without labels", FULL | dict(mode="unsupervised")),
}
# What the tries on the rows for choosing changed.
CHOSEN = {f"words-{row}": dict(lr=1e-4) for row in ROWS if row != "untrained"}
# A step of GRACE costs as much as 2.9 of the loss and, over texts read twice, as 2.2.
CHOSEN["words-loss-longer"] |= dict(steps=116)
CHOSEN["words-loss-twice-longer"] |= dict(steps=88)
LONGER = dict(steps=60, text_weight=1.0)
CHOSEN |= {f"events-{row}": LONGER for row in ("loss", "loss-twice")}
CHOSEN |= {f"events-{row}": LONGER | dict(kl=0.0, infonce_temperature=0.1) for row in ("grace", "grace-twice", "grace-both")}
RUNS = {
    f"{data}-{row}": SHARED | DATA[data] | settings | CHOSEN.get(f"{data}-{row}", {})
    for data in DATA
    for row, (_, settings) in ROWS.items()
    if data == "words" or not row.endswith("longer")
}
START = dict(data="start", model="chat", trainer="start", batch=64, lr=1e-4, steps=110, part="choose")
RUNS["start"] = SHARED | WORD | START

WAYS = {  # whether a text is read twice, and whether a rationale is written
    "prompt": (False, False),
    "text twice": (True, False),
    "rationale": (False, True),
    "twice and rationale": (True, True),
}
PAIR = "query", "positive"
TASKS = "STSBenchmark", "STS12", "STS13", "STS17", "SICK-R"

# ---------------------------------------------------------------- rows


def jsonl(folder, name):
    """The rows of a file in the folder of data: dictionary/{train,validation,start}, captions/{flickr30k_train,...}."""
    path = os.path.join(folder, f"{name}.jsonl")
    if not os.path.isfile(path):
        raise GraceError(f"{path}: no such file; --data-dir names the folder that holds dictionary/, captions/ and eval/")
    with open(path) as file:
        return [json.loads(line) for line in file]


def training_rows(run, folder):
    """Pairs of two definitions of a word, of two captions of a picture, or of definition and word; or their texts alone.

    None has a held-out text: synonyms share definitions.
    """
    if run["data"] == "events":
        return english(run["seed"])["train"]
    if run["data"] == "captions":
        pictures = jsonl(folder, "captions/flickr30k_train") + jsonl(folder, "captions/coco")
        drawn = random.Random(run["seed"])
        pairs = [drawn.sample(picture["captions"], 2) for picture in pictures]
    else:
        names, file = (("definition", "word"), "start") if run["data"] == "start" else (PAIR, "train")
        pairs = [[row[name] for name in names] for row in jsonl(folder, f"dictionary/{file}")]
    held_out = {row[role] for part in heldout_rows(run, folder).values() for row in part for role in PAIR}
    pairs = [pair for pair in pairs if held_out.isdisjoint(pair)]
    if run.get("mode") == "unsupervised":
        return [{"text": text} for pair in pairs for text in pair]
    return [dict(zip(PAIR, pair)) for pair in pairs]


def heldout_rows(run, folder):
    """Held-out rows, those for choosing settings and those of the table: 256 and 256 pictures, or 200 and 200 words.

    The events of another seed are other rows, so for choosing settings there is another seed.
    """
    if run["data"] == "events":
        return dict.fromkeys(("choose", "table"), english(run["seed"])["heldout"])
    if run["data"] == "captions":
        rows = [dict(zip(PAIR, picture["captions"])) for picture in jsonl(folder, "captions/flickr30k_heldout")]
        return {"choose": rows[:256], "table": rows[256:512]}
    rows = jsonl(folder, "dictionary/validation")
    return {"choose": rows[:200], "table": rows[200:]}


class Start(LossTrainer):
    """A supervised start: cross entropy on the right answer, a word, over texts of about one length."""

    def next_rows(self):
        by_length = sorted(self.rows, key=lambda row: len(row["query"]))
        first = np.random.default_rng([self.config.seed, self.step_number]).integers(len(by_length) - self.config.batch + 1)
        return by_length[first : first + self.config.batch]

    def loss(self, batch):
        """Nats per token of the answers, end tokens included."""
        right = answered(self.policy, batch.texts["query"], batch.texts["positive"])
        return -score(self.policy, right, text=False).logprobs.sum() / right.mask.sum()


TRAINERS = records.TRAINERS | {"start": Start}

# ---------------------------------------------------------------- what is measured

EMPTY = set("a an and are as at be by for from in into is it its of on one or some that the this to was which who with".split())


def words(text):
    """A text's content words, in lower case."""
    return set(re.findall(r"[a-z]+", text.lower())) - EMPTY


def forms(some):
    """Words, and what they may be the plural of: enough to compare two of them."""
    return some | {w[:-1] for w in some if w.endswith("s")} | {w[:-2] for w in some if w.endswith("es")}


def names(rationale, word):
    """Whether a rationale has the word among its own, whatever their case and number."""
    return bool(forms(words(rationale)) & forms({word.lower()}))


def ranks(queries, positives):
    """The rank of query i's own text, the i-th, among all; ties do not count against it. `[n, ..., D], [m, D] -> [n, ...]`."""
    scores = queries @ positives.T
    own = np.stack([x[..., i] for i, x in enumerate(scores)])
    return 1 + (scores > own[..., None]).sum(-1)


def similarity(encode, pairs, folder):
    """Spearman per similarity task, over at most so many of its pairs, always the same."""
    scores = {}
    for name in TASKS:
        graded = columns(load(name, os.path.join(folder, "eval")), name, "sentence1", "sentence2", "score")
        n = len(graded[0])
        at = random.Random(0).sample(range(n), min(n, pairs))
        scores[name] = graded_spearman(encode, [[column[i] for i in at] for column in graded])
    return scores


def describe(rows, written):
    """What rationales are like: `written` has two per row, one about the query and one about the positive.

    true: of their content words, the share that the text or its pair has. named: the share of texts whose rationale names
    the dictionary's word.
    """
    count = true = 0
    for row, both in zip(rows, written):
        told = forms(words(row["query"] + " " + row["positive"]))
        for word in (word for rationale in both for word in words(rationale)):
            count, true = count + 1, true + bool(forms({word}) & told)
    stats = {"true": true / max(count, 1)}
    if "word" in rows[0]:
        stats["named"] = np.mean([names(rationale, row["word"]) for row, both in zip(rows, written) for rationale in both])
    return {name: float(x) for name, x in stats.items()}


def headroom(policy, rows, positives, temperature, K=16, queries=64):
    """Is what is drawn ever better than its mean? Of K rationales per query the mean and the best, by reciprocal rank.

    On a dictionary also the share of the queries of which any of the K rationales names the word.
    """
    reciprocal, named = [], []
    for first in range(0, min(queries, len(rows)), 8):
        part = rows[first : first + 8]
        chance = uniforms([0, first], len(part), K, policy.reading.max_new_tokens, device=policy.device)
        drawn = sample(policy, policy.template([row["query"] for row in part]), K, temperature, chance)
        own_first = np.roll(positives, -first, 0)  # query i's own positive stands at i
        reciprocal.append(1 / ranks(drawn.embeddings.float().cpu().numpy(), own_first))
        if "word" in rows[0]:
            written = [policy.tokenizer.batch_decode(group, skip_special_tokens=True) for group in drawn.rationales()]
            named += [any(names(r, row["word"]) for r in group) for row, group in zip(part, written)]
    reciprocal = np.concatenate(reciprocal)
    stats = {"mean_of_16": float(reciprocal.mean()), "best_of_16": float(reciprocal.max(1).mean())}
    return stats | ({"any_of_16_names": float(np.mean(named))} if named else {})


def measure(policy, rows, run, folder, temperature):
    """All that a record has of a policy: scores by way, and what its rationales are like."""
    texts, stats = [row[role] for role in PAIR for row in rows], {"ways": {}}
    documents = texts[len(rows) :] + [row["negative"] for row in rows if "negative" in row]
    for way, (twice, rationale) in WAYS.items():
        encoder, start = GraceEncoder(policy.reads(twice=twice), rationale=rationale), time.perf_counter()
        queries, positives = encoder.encode(texts[: len(rows)]), encoder.encode_document(documents)
        seconds = time.perf_counter() - start
        rank = ranks(queries, positives)
        scores = {"ndcg_at_10": float(np.where(rank <= 10, 1 / np.log2(rank + 1), 0).mean())}
        scores["text_s"] = seconds / len({*texts, *documents})
        if way == "rationale":
            rationales, counts = encoder.rationales(texts), encoder.counts
            stats["finished"] = 1 - counts["unfinished"] / counts["distinct"]
            stats["words"] = float(np.mean([len(rationale.split()) for rationale in rationales]))
            stats |= describe(rows, list(zip(rationales[: len(rows)], rationales[len(rows) :])))
            stats |= headroom(policy, rows, positives, temperature)
        if run["part"] == "table":
            scores["sts"] = similarity(encoder.encode, run["pairs"], folder)
        stats["ways"][way] = scores
    return stats | {"text_loss": text_loss(policy, texts)}


def make(run, folder, args):
    """Train a run in a folder of --out, or go on with it there, and measure it. `-> its record`."""
    out = os.path.join(args.out, folder)
    data, heldout, rows = f"{out}.rows.jsonl", f"{out}.heldout.jsonl", heldout_rows(run, args.data_dir)[run["part"]]
    model = {"chat": args.model, "start": os.path.join(args.out, "start-seed-0")}[run["model"]]
    config = records.config_of(run, model=model, out=out, data=data, heldout=heldout, resume=True)
    policy = Policy.load(config.model, config.device, config.dtype, **config.reading)
    texts = [row[role] for role in PAIR for row in rows]
    record = {"name": args.name, "run": run, "before": {"text_loss": text_loss(policy, texts)}}
    written = [texts[:12], encode_texts(policy, texts[:12]).rationales]
    if run["trainer"] != "none":
        write_rows(data, training_rows(run, args.data_dir))
        write_rows(heldout, [{role: row[role] for role in PAIR} for row in rows[:12]])
        del policy
        record["train_seconds"] = grace.train(config, TRAINERS[run["trainer"]])["seconds"]
        record["step_s"] = float(np.median([line["step_s"] for line in read_metrics(os.path.join(out, "metrics.jsonl"))]))
        policy = Policy.load(out, config.device, config.dtype)
    record["after"] = measure(policy, rows, run, args.data_dir, config.temperature)
    record["written"] = list(zip(*written, encode_texts(policy, texts[:12]).rationales))
    return records.rounded(record | {"revision": records.revision(), "versions": versions()})


# ---------------------------------------------------------------- the page

FIGURES = {  # of rationales and costs: heading, digits, and where a record has it
    "text loss, rise": (2, lambda r: r["after"]["text_loss"] - r["before"]["text_loss"]),
    "ended": (2, lambda r: r["after"]["finished"]),
    "words": (1, lambda r: r["after"]["words"]),
    "true words": (2, lambda r: r["after"]["true"]),
    "names the word": (3, lambda r: r["after"]["named"]),
    "any of 16 names it": (3, lambda r: r["after"]["any_of_16_names"]),
    "mean of 16": (3, lambda r: r["after"]["mean_of_16"]),
    "best of 16": (3, lambda r: r["after"]["best_of_16"]),
    "seconds per step": (1, lambda r: r["step_s"]),
    **{f"ms per text, {way}": (0, lambda r, way=way: 1000 * r["after"]["ways"][way]["text_s"]) for way in WAYS},
}
sts_mean = lambda record, way: float(np.mean(list(record["after"]["ways"][way]["sts"].values())))
SCORES = {"nDCG@10": lambda record, way: record["after"]["ways"][way]["ndcg_at_10"], "similarity": sts_mean}


def figure(group, value, digits):
    """A cell: the mean and range over the seeds, a dash where these records have no such figure."""
    try:
        return mean_and_range([value(record) for record in group], digits)
    except KeyError:
        return "–"


def best_way(group, value):
    """The way with the highest mean over the seeds."""
    return max(WAYS, key=lambda way: np.mean([value(record, way) for record in group]))


def score_cells(group):
    """A row's scores by each way, the best way of each score in bold."""
    for value in SCORES.values():
        best = best_way(group, value)
        for way in WAYS:
            text = mean_and_range([value(record, way) for record in group], 3)
            yield f"**{text}**" if way == best else text


def tables(rows):
    """A section's tables. `{label: [a record per seed]}` to lines."""
    head = [f"{name}, {way}" for name in SCORES for way in WAYS]
    yield markdown(["", *head], [[label, *score_cells(group)] for label, group in rows.items()])
    lines = [[label, *(figure(group, value, digits) for digits, value in FIGURES.values())] for label, group in rows.items()]
    yield markdown(["", *FIGURES], lines)
    for label, (record, *_) in rows.items():
        if label == ROWS["grace"][0]:
            lines = [[text.replace("\n", " ").replace("|", "/") for text in one] for one in record["written"][:6]]
            yield markdown(["text", "its rationale before", f"after {label}"], lines, ["---"] * 3)


def tried(known):
    """Every try on the rows for choosing: what it changed, and the best nDCG@10 of the four ways."""
    lines = []
    for record in known:
        row, run = RUNS[record["name"]], record["run"]
        changed = {k: v for k, v in run.items() if row.get(k) != v and k not in ("part", "seed", "pairs")}
        best = best_way([record], SCORES["nDCG@10"])
        settings = ", ".join(f"{k} {v}" for k, v in changed.items()) or "as above"
        lines.append([record["name"], settings, best, f"{SCORES['nDCG@10'](record, best):.3f}"])
    return markdown(["run", "changed", "best way", "nDCG@10"], sorted(lines), ["---", "---", "---", "---:"])


def page(known):
    """The part of docs/results.md between its two marks."""
    parts, seeds = [], lambda name: [r for r in known if r["run"] == RUNS.get(name, {}) | {"seed": r["run"]["seed"]}]
    for data in DATA:
        rows = {label: group for row, (label, _) in ROWS.items() if (group := seeds(f"{data}-{row}"))}
        if rows:
            parts += [[f"### {data.capitalize()}"], *tables(rows)]
    if tries := [record for record in known if record["run"]["part"] == "choose"]:
        parts += [["### What was tried"], tried(tries)]
    return "\n\n".join(["<!-- real -->", *("\n".join(part) for part in parts), "<!-- /real -->"])


def main(arguments):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("name", nargs="?", help="a run, or page; any setting of a run may follow, as --NAME VALUE")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--model", default="runs/smollm2", help="folder (train.sh chat makes it) or hub id [runs/smollm2]")
    parser.add_argument("--data-dir", default=os.environ.get("DATA_DIR", "../shared/data"), help="[DATA_DIR, ../shared/data]")
    parser.add_argument("--out", default="runs/real", help="folder for the trained models [runs/real]")
    args, more = parser.parse_known_args(arguments)
    known = list(records.read(RESULTS).values())
    if args.name is None:
        for name, run in RUNS.items():
            print(f"{name:24} {sum(r['run'] == run | {'seed': r['run']['seed']} for r in known)} seeds")
    elif args.name == "page":
        with open(PAGE) as file:
            text = replaced(file.read(), {"real": page(known)})
        with open(PAGE, "w") as file:
            file.write(text)
    elif args.name not in RUNS or len(more) % 2:
        parser.error(f"{args.name!r} {' '.join(more)}: give a run's name, and settings as --NAME VALUE")
    else:
        changes = {"seed": args.seed}
        for flag, value in zip(more[::2], more[1::2]):
            number = re.fullmatch(r"[-\d.e]+|true|false", value)
            changes[flag[2:].replace("-", "_")] = json.loads(value) if number else value
        folder = "-".join([args.name, *(f"{name}-{value}" for name, value in changes.items())])
        records.keep(make(RUNS[args.name] | changes, folder, args), RESULTS)


if __name__ == "__main__":
    try:
        main(sys.argv[1:])
    except GraceError as error:
        sys.exit(f"real.py: {error}")
