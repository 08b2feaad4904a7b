import numpy as np
import torch

from rollout import encode, text_loss


def average_ranks(x):
    """Ranks from 1, ties sharing the mean of their places. `[n] -> [n]` float64."""
    x = np.asarray(x, dtype=np.float64)
    order = np.argsort(x, kind="stable")
    _, first, group, counts = np.unique(x[order], return_index=True, return_inverse=True, return_counts=True)
    ranks = np.empty(len(x))
    ranks[order] = (first + (counts + 1) / 2)[group]
    return ranks


def spearman(x, y):
    """Spearman's rank correlation: Pearson's, of the ranks. In [-1, 1]; nan where either is constant."""
    a, b = average_ranks(x), average_ranks(y)
    a, b = a - a.mean(), b - b.mean()
    spread = np.sqrt((a @ a) * (b @ b))
    return float(a @ b / spread) if spread else float("nan")


def ranking(scores, ids, top_k=1000):
    """Positions of the best `top_k` documents, best first: float32 scores, ties by id, descending.

    That is pytrec_eval's order: ids are compared as strings.
    """
    scores = np.asarray(scores, dtype=np.float32)
    if len(scores) > top_k:
        kept = torch.from_numpy(scores).topk(top_k).indices.numpy()
    else:
        kept = np.arange(len(scores))
    return sorted(kept, key=lambda i: (scores[i], ids[i]), reverse=True)


def ndcg(ranked_gains, all_gains, k=10):
    """nDCG@k with linear gain and discount log2(rank + 1); the ideal is over all judged documents."""
    discount = 1 / np.log2(np.arange(2, k + 2))
    dcg = lambda gains: float(np.sum(np.asarray(gains[:k], dtype=float) * discount[: len(gains[:k])]))  # noqa: E731
    ideal = dcg(sorted(all_gains, reverse=True))
    return dcg(ranked_gains) / ideal if ideal else 0.0


def evaluate_triplets(policy, heldout, graded=None, rationale=True):
    """Held-out triplets, greedy: is the right positive found among all positives and hard negatives?

    Returns nDCG@10, top-1 accuracy, with `graded` the Spearman correlation of cosine and score, the
    language-modelling loss on the texts (nats a token), the share of rationales that ended, and
    their mean length in words.
    """
    queries = [row["query"] for row in heldout]
    documents = list(dict.fromkeys([r["positive"] for r in heldout] + [n for r in heldout for n in r["negative"]]))
    relevant = {}
    for row in heldout:
        relevant.setdefault(row["query"], set()).add(row["positive"])
    one, two, grades = graded or ([], [], [])
    vectors, written, _, finished = encode(policy, queries + documents + one + two, rationale=rationale)
    q, d, a, b = np.split(vectors, np.cumsum([len(queries), len(documents), len(one)]))
    gains = [
        [float(documents[i] in relevant[query]) for i in ranking(scores, documents)] for query, scores in zip(queries, q @ d.T)
    ]
    result = {
        "ndcg_at_10": float(np.mean([ndcg(g, [1.0] * len(relevant[query])) for g, query in zip(gains, queries)])),
        "top1": float(np.mean([g[0] for g in gains])),
    }
    if graded:
        result["spearman"] = spearman((a * b).sum(1), grades)
    if rationale:
        result |= {"text_loss": text_loss(policy, queries + documents), "finished": finished}
        result["words"] = float(np.mean([len(w.split()) for w in written]))
    return result
