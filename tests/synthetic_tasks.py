"""Small made-up tasks of every family, in the hub's layout, with the cases that trip an implementation:
ties, empty titles, unjudged queries, graded and zero judgements, a query that is a document, one-label sets."""

import functools
import hashlib
import json
import random

import numpy as np

WORDS = [f"w{i}" for i in range(60)]


@functools.cache
def word_vector(word):
    """A fixed random vector."""
    seed = int.from_bytes(hashlib.md5(word.encode()).digest()[:4], "big")
    return np.random.default_rng(seed).standard_normal(24).astype(np.float32)


def encode(texts):
    """A cheap deterministic encoder: one vector per word, added up. Equal bags of words tie."""
    vectors = np.zeros((len(texts), 24), np.float32)
    for row, text in zip(vectors, texts):
        for word in text.split():
            row += word_vector(word)
        row[0] += 0.1
    return vectors


def counts(texts):
    """Words counted in twenty bins: most similarities tie, and the order of additions decides."""
    vectors = np.full((len(texts), 20), 1e-3, np.float32)
    for row, text in zip(vectors, texts):
        for word in text.split():
            row[int(word[1:]) % 20] += 1
    return vectors


def sentence(rng, topic=None, n=6):
    pool = WORDS if topic is None else WORDS[topic * 10 : topic * 10 + 14]
    return " ".join(rng.choice(pool) for _ in range(n))


def rows(path, data):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in data))


def readme(folder, configs):
    """`{config: {split: path}}` as the YAML header by which `datasets` finds configurations."""
    lines = ["---", "configs:"]
    for config, splits in configs.items():
        lines += [f"- config_name: {config}", "  data_files:"]
        for split, path in splits.items():
            lines += [f"  - split: {split}", f"    path: {path}"]
    (folder / "README.md").write_text("\n".join([*lines, "---", ""]))


def retrieval(folder, rng, documents=60, n_queries=12, candidates=0):
    corpus = [{"_id": f"d{i}", "title": rng.choice(["", "w1 w2"]), "text": sentence(rng) + " "} for i in range(documents)]
    for i in range(0, documents, 7):
        corpus[i]["text"], corpus[i]["title"] = corpus[0]["text"], corpus[0]["title"]  # exact ties
    queries = [{"_id": f"q{i}", "text": sentence(rng)} for i in range(n_queries)]
    queries[0] = {"_id": "d5", "text": corpus[5]["text"]}  # a query that is its own document
    queries[1]["text"] = corpus[0]["text"]
    judged = [
        {"query-id": q["_id"], "corpus-id": f"d{i}", "score": rng.choice([0, 1, 2])}
        for q in queries[:-2]
        for i in rng.sample(range(documents), 5)
    ]  # the last two queries have no judgement
    judged += [{"query-id": queries[1]["_id"], "corpus-id": f"d{i}", "score": 1} for i in (7, 14)]
    for row in judged:
        row["score"] = 0 if row["query-id"] == "q3" else row["score"]  # judged, and nothing is right
        row["score"] = 1 if row["query-id"] == "q4" else row["score"]
    unique = {(row["query-id"], row["corpus-id"]): row for row in judged}
    configs = {
        "corpus": {"corpus": "corpus.jsonl"},
        "queries": {"queries": "queries.jsonl"},
        "default": {"test": "qrels.jsonl"},
    }
    rows(folder / "corpus.jsonl", corpus)
    rows(folder / "queries.jsonl", queries)
    rows(folder / "qrels.jsonl", unique.values())
    if candidates:
        top = [
            {
                "query-id": q["_id"],
                "corpus-ids": sorted(
                    {f"d{i}" for i in rng.sample(range(documents), candidates)}
                    | {row["corpus-id"] for row in unique.values() if row["query-id"] == q["_id"]}
                ),
            }
            for q in queries
        ]
        rows(folder / "top.jsonl", top)
        configs["top_ranked"] = {"test": "top.jsonl"}
    readme(folder, configs)


def write_all(base, seed=0):
    """One folder per task under `base`. Returns the task names."""
    rng = random.Random(seed)
    retrieval(base / "SciFact", rng)
    retrieval(base / "ArguAna", rng)
    retrieval(base / "NFCorpus", rng, documents=1300, n_queries=8)  # more documents than the top 1000
    retrieval(base / "SciDocsRR", rng, candidates=9)
    sts = []
    for i in range(80):
        one = sentence(rng)
        two = one if i % 9 == 0 else one.rsplit(" ", rng.randint(0, 5))[0] + " " + sentence(rng, n=2)
        sts.append({"sentence1": one, "sentence2": two, "score": float(rng.randint(0, 5)), "lang": "en-en"})
    rows(base / "STSBenchmark" / "test.jsonl", sts)
    rows(base / "STS17" / "en-en" / "test.jsonl", sts[:50])
    readme(base / "STS17", {"en-en": {"test": "en-en/test.jsonl"}})
    pairs = {
        "sent1": [row["sentence1"] for row in sts],
        "sent2": [row["sentence2"] for row in sts],
        "labels": [int(row["score"] > 2) for row in sts],
    }
    rows(base / "SprintDuplicateQuestions" / "test.jsonl", [pairs])
    sets = []
    for size, topics in ((120, 4), (90, 3), (12, 1)):  # the last set has one label
        labels = [rng.randrange(topics) for _ in range(size)]
        sets.append({"sentences": [sentence(rng, t) for t in labels], "labels": [f"topic {t}" for t in labels]})
    rows(base / "TwentyNewsgroupsClustering" / "test.jsonl", sets)
    for name, label in (("Banking77Classification", int), ("EmotionClassification", int), ("MassiveIntentClassification", str)):
        for split, size in (("train", 240), ("test", 100)):
            topics = [rng.randrange(4) for _ in range(size)]
            data = [{"text": sentence(rng, t), "label": label(t), "lang": "en"} for t in topics]
            rows(base / name / split_path(name, split), data)
    readme(base / "MassiveIntentClassification", {"en": {s: f"en/{s}.jsonl" for s in ("train", "test")}})
    summaries = []
    for i in range(14):
        human = [sentence(rng) for _ in range(4)]
        machine = [f"{rng.choice(human).rsplit(' ', rng.randint(1, 4))[0]} {sentence(rng, n=2)}" for _ in range(16)]
        relevance = [2.0] * 16 if i == 3 else [rng.randint(1, 5) / 1.0 for _ in range(16)]  # row 3 is constant
        if i == 5:
            machine = machine[:1] * 16
        summaries.append({"text": "x", "human_summaries": human, "machine_summaries": machine, "relevance": relevance})
    rows(base / "SummEval" / "test.jsonl", summaries)
    return sorted(path.name for path in base.iterdir())


def split_path(name, split):
    return f"en/{split}.jsonl" if name == "MassiveIntentClassification" else f"{split}.jsonl"
