"""What a run records for its page: the same few held-out rows at the start and as the policy is now, in OUT/probe.json.

A page can be drawn long after the run, when the model that it started from may be gone, and without a GPU. So what
needs a policy is recorded during the run, at each evaluation: which document each query finds, the words that carry
the cosine, and a map of the embeddings. That costs one pass over about 70 texts, and some 100 kB.
"""

import numpy as np

from evaluation.explain import compare, split

ROWS, ANSWERS = 24, 3  # held-out rows that are recorded; answers per query
ROLES = "query", "positive", "text"


def probe(policy, heldout):
    """`_probe` of the first held-out rows, or None.

    Rows whose positive is the query itself, and a single text, have nothing to find and are left out.
    """
    rows = [row for row in heldout if "text" in row or row["query"] != row["positive"]][:ROWS]
    return _probe(policy, rows) if len({row[role] for row in rows for role in ROLES if role in row}) > 1 else None


def _probe(policy, rows):
    """What each query finds among the rows' documents, and where its embedding lies.

    Supervised rows: a query searches all positives and the first negative of each row, and its own positive is right.
    Unlabelled texts: a text searches all others, and no answer is right or wrong.
    Returns `{"documents": n, "variance": share, "points": [{"row", "role", "x", "y"}], "queries": [...]}`; see `_query`.
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
    on_map = [(i, role, row[role]) for i, row in enumerate(rows) for role in ROLES if role in row]
    places, variance = two_components(np.stack([splits[text].embedding for _, _, text in on_map]))
    points = [{"row": i, "role": role, "x": x, "y": y} for (i, role, _), (x, y) in zip(on_map, places.tolist())]
    answers = [_query(splits, text, documents, right.get(text)) for text in queries]
    return {"documents": len(documents), "variance": variance, "points": points, "queries": answers}


def _query(splits, text, documents, right):
    """A query, its first answers, and the words that carry the cosine to the first one (`compare`)."""
    query, others = splits[text], [splits[d] for d in documents if d != text]
    cosines = np.stack([d.embedding for d in others]) @ query.embedding
    order = np.argsort(-cosines, kind="stable").tolist()
    answers = [
        {
            "text": others[i].text,
            "rationale": others[i].rationale,
            "cosine": float(cosines[i]),
            "right": right and others[i].text in right,
        }
        for i in order[:ANSWERS]
    ]
    rank = right and 1 + next(n for n, i in enumerate(order) if others[i].text in right)
    words = compare(query, others[order[0]])
    for share in words["a"] + words["b"]:
        share["share"] = round(share["share"], 7)
    return {"text": text, "rationale": query.rationale, "answers": answers, "rank": rank, **words}


def two_components(x):
    """The first two principal components of `[n, D]`, `[n, 2]`, and the share of the variance that they hold."""
    centred = x - x.mean(0)
    U, S, _ = np.linalg.svd(centred, full_matrices=False)
    places = U[:, :2] * S[:2]
    return places, float((S[:2] ** 2).sum() / max((S**2).sum(), 1e-12))
