"""What a run records for its page: the same few held-out rows at the start and as the policy is now, in OUT/probe.json.

A page can be drawn long after the run, when the model that it started from may be gone, and without a GPU. So what
needs a policy is recorded during the run, at each evaluation: the rationales of a few texts, which document each query
finds, and the words that carry that cosine. It costs one pass over about 70 texts.

    {"texts": [str], "history": [[step, [rationale of each text]]], "before": moment, "after": moment}
    moment = {"documents": n, "queries": [{"text", "found", "right", "rank", "cosine", "a", "b"}]}
"""

import json
import os

import numpy as np

from evaluation.explain import compare, split
from plumbing.run import read_json, write_atomically

ROWS, TEXTS = 24, 6  # held-out rows that are searched; texts whose rationales are kept along the training


def record(out, step, policy, heldout):
    """Write what the policy makes of the first held-out rows: at step 0 as `before`, later as `after`.

    Rows whose positive is the query itself, and a single text, have nothing to find and are left out.
    """
    rows = [row for row in heldout if "text" in row or row["query"] != row["positive"]][:ROWS]
    if len({row[role] for row in rows for role in ("query", "positive", "text") if role in row}) < 2:
        return
    path = os.path.join(out, "probe.json")
    recorded = step and read_json(path) or {}
    moment, rationales = probe(policy, rows)
    earlier = [entry for entry in recorded.get("history", []) if entry[0] < step]  # a resumed run takes some steps again
    recorded |= {"texts": list(rationales)[:TEXTS], "history": [*earlier, [step, list(rationales.values())[:TEXTS]]]}
    recorded["after" if step else "before"] = moment
    write_atomically(path, json.dumps(recorded))


def probe(policy, rows):
    """What each query finds among the rows' documents, as a moment of probe.json, and `{query: its rationale}`.

    Supervised rows: a query searches all positives and the first negative of each row, and its own positive is right.
    Unlabelled texts: a text searches all others, and no answer is right or wrong (`right` and `rank` are None).
    """
    labelled = "query" in rows[0]
    queries = list(dict.fromkeys(row["query" if labelled else "text"] for row in rows))
    right, documents = {}, queries
    if labelled:
        for row in rows:
            right.setdefault(row["query"], set()).add(row["positive"])
        documents = list(dict.fromkeys(text for row in rows for text in (row["positive"], *row["negative"][:1])))
    texts = list(dict.fromkeys(queries + documents))
    splits = dict(zip(texts, split(policy, texts)))

    def search(text):
        others = [splits[d] for d in documents if d != text]
        cosines = np.stack([d.embedding for d in others]) @ splits[text].embedding
        found = [others[i] for i in np.argsort(-cosines, kind="stable")]
        hits = [d.text in right[text] for d in found] if labelled else [None]
        rank = 1 + hits.index(True) if labelled else None
        return {"text": text, "found": found[0].text, "right": hits[0], "rank": rank, **compare(splits[text], found[0])}

    moment = {"documents": len(documents), "queries": [search(text) for text in queries]}
    return moment, {text: splits[text].rationale for text in queries}
