"""What the policy makes of a few held-out texts: what it writes about each, which document each finds, and why.

A page can be drawn long after the run, when the model that it started from may be gone, and without a GPU. So what needs a
policy is recorded during the run, at each evaluation (`Run.note`). It costs one pass over about 70 texts.
"""

import numpy as np

from evaluation.explain import compare, split

ROWS, TEXTS = 24, 6  # rows that are searched; texts whose rationales are kept along the training


def probe(policy, rows):
    """The first texts' rationales, `{text: rationale}`, and what each query finds.

    Supervised rows: a query searches all positives and the first negative of each row, and its own positives are right.
    Unlabelled texts: a text searches all others, and no answer is right or wrong (`right` and `rank` are None).

    Returns what is found as a dict per query: `text`, `found`, `right`, the `rank` of the first right document, and what
    `explain.compare` says of the two texts. There is none where there is nothing to choose from.
    """
    rows, labelled, right = rows[:ROWS], "query" in rows[0], {}
    queries = list(dict.fromkeys(row["query" if labelled else "text"] for row in rows))
    documents = queries
    if labelled:
        for row in rows:
            right.setdefault(row["query"], set()).add(row["positive"])
        documents = list(dict.fromkeys(text for row in rows for text in (row["positive"], *row["negative"][:1])))
    texts = list(dict.fromkeys(queries + documents))
    splits = dict(zip(texts, split(policy, texts)))

    def search(text):
        others = [splits[d] for d in documents if labelled or d != text]
        cosines = np.stack([d.embedding for d in others]) @ splits[text].embedding
        found = [others[i] for i in np.argsort(-cosines, kind="stable")]
        hits = [d.text in right[text] for d in found] if labelled else [None]
        rank = 1 + hits.index(True) if labelled else None
        return {"text": text, "found": found[0].text, "right": hits[0], "rank": rank, **compare(splits[text], found[0])}

    rationales = {text: splits[text].rationale for text in queries[:TEXTS]}
    return rationales, [search(text) for text in queries] if len(documents) > 1 else []
