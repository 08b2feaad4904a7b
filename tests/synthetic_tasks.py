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
        lines += [f"  - split: {split}\n    path: {path}" for split, path in splits.items()]
    (folder / "README.md").write_text("\n".join([*lines, "---", ""]))


def retrieval(folder, rng, documents=60, n_queries=12, candidates=0):
    """Queries q0, q1, ...: the first is document d5 itself, the second d0; the last two have no judgement."""
    corpus = [{"_id": f"d{i}", "title": rng.choice(["", "w1 w2"]), "text": sentence(rng) + " "} for i in range(documents)]
    for i in range(0, documents, 7):  # exact ties
        corpus[i] |= {"text": corpus[0]["text"], "title": corpus[0]["title"]}
    queries = [{"_id": f"q{i}", "text": sentence(rng)} for i in range(n_queries)]
    queries[0], queries[1]["text"] = {"_id": "d5", "text": corpus[5]["text"]}, corpus[0]["text"]
    gains = {(q["_id"], f"d{i}"): rng.choice([0, 1, 2]) for q in queries[:-2] for i in rng.sample(range(documents), 5)}
    gains |= {("q1", "d7"): 1, ("q1", "d14"): 1}
    gains = {(q, d): {"q3": 0, "q4": 1}.get(q, gain) for (q, d), gain in gains.items()}  # nothing is right for q3
    rows(folder / "corpus.jsonl", corpus)
    rows(folder / "queries.jsonl", queries)
    rows(folder / "qrels.jsonl", ({"query-id": q, "corpus-id": d, "score": gain} for (q, d), gain in gains.items()))
    configs = {name: {name: f"{name}.jsonl"} for name in ("corpus", "queries")} | {"default": {"test": "qrels.jsonl"}}
    if candidates:
        some = lambda q: {f"d{i}" for i in rng.sample(range(documents), candidates)} | {d for r, d in gains if r == q}
        rows(folder / "top.jsonl", ({"query-id": q["_id"], "corpus-ids": sorted(some(q["_id"]))} for q in queries))
        configs["top_ranked"] = {"test": "top.jsonl"}
    readme(folder, configs)


def write_all(base, seed=0):
    """One folder per task under `base`. Returns the task names."""
    rng = random.Random(seed)
    retrieval(base / "SciFact", rng)
    retrieval(base / "ArguAna", rng)
    retrieval(base / "NFCorpus", rng, documents=1300, n_queries=8)  # more documents than the top 1000
    retrieval(base / "SciDocsRR", rng, candidates=9)
    pairs = []
    for i in range(80):
        one = sentence(rng)
        two = one if i % 9 == 0 else one.rsplit(" ", rng.randint(0, 5))[0] + " " + sentence(rng, n=2)
        pairs.append({"sentence1": one, "sentence2": two, "score": float(rng.randint(0, 5)), "lang": "en-en"})
    rows(base / "STSBenchmark" / "test.jsonl", pairs)
    rows(base / "STS17" / "en-en" / "test.jsonl", pairs[:50])
    readme(base / "STS17", {"en-en": {"test": "en-en/test.jsonl"}})
    columns = {name: [row[f"sentence{name[-1]}"] for row in pairs] for name in ("sent1", "sent2")}
    rows(base / "SprintDuplicateQuestions" / "test.jsonl", [columns | {"labels": [int(row["score"] > 2) for row in pairs]}])
    sets = []
    for size, topics in ((120, 4), (90, 3), (12, 1)):  # the last set has one label
        labels = [rng.randrange(topics) for _ in range(size)]
        sets.append({"sentences": [sentence(rng, t) for t in labels], "labels": [f"topic {t}" for t in labels]})
    rows(base / "TwentyNewsgroupsClustering" / "test.jsonl", sets)
    for name, label in (
        ("Banking77Classification", int),
        ("EmotionClassification", int),
        ("MassiveIntentClassification/en", str),
    ):
        for split, size in (("train", 240), ("test", 100)):
            topics = [rng.randrange(4) for _ in range(size)]
            rows(base / name / f"{split}.jsonl", ({"text": sentence(rng, t), "label": label(t), "lang": "en"} for t in topics))
    readme(base / "MassiveIntentClassification", {"en": {s: f"en/{s}.jsonl" for s in ("train", "test")}})
    summaries = []
    for i in range(14):
        human = [sentence(rng) for _ in range(4)]
        machine = [f"{rng.choice(human).rsplit(' ', rng.randint(1, 4))[0]} {sentence(rng, n=2)}" for _ in range(16)]
        relevance = [2.0] * 16 if i == 3 else [float(rng.randint(1, 5)) for _ in range(16)]  # rows 3 and 5 are constant
        machine = machine[:1] * 16 if i == 5 else machine
        summaries.append({"text": "x", "human_summaries": human, "machine_summaries": machine, "relevance": relevance})
    rows(base / "SummEval" / "test.jsonl", summaries)
    return sorted(path.name for path in base.iterdir())
