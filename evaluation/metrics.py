"""The scores of retrieval and similarity, on plain numpy arrays: what mteb's v1 tasks compute.

Each function is short, pure and says which library it agrees with; the tests hold it against that one. What a task
takes from a library as it is (average precision, v-measure, k-means, logistic regression, a p-value) is in tasks.py.
"""

import numpy as np
import torch


def average_ranks(x):
    """Ranks from 1, ties sharing the mean of their ranks (scipy.stats.rankdata). `[n] -> [n]` float64."""
    x = np.asarray(x, dtype=np.float64)
    order = np.argsort(x, kind="stable")
    _, first, group, counts = np.unique(x[order], return_index=True, return_inverse=True, return_counts=True)
    ranks = np.empty(len(x))
    ranks[order] = (first + (counts + 1) / 2)[group]
    return ranks


def spearman(x, y):
    """Spearman's correlation: Pearson's, of the ranks. In [-1, 1]; nan where either is constant."""
    a, b = average_ranks(x), average_ranks(y)
    a, b = a - a.mean(), b - b.mean()
    spread = np.sqrt((a @ a) * (b @ b))
    return float(np.clip(a @ b / spread, -1, 1)) if spread else float("nan")


def row_norms(x):
    """The length of each row. `[n, D] -> [n]`.

    Sums as scikit-learn sums: where an encoder gives tied similarities, the order of additions decides the ties,
    and a rank correlation moves in the fourth digit.
    """
    return np.sqrt(np.einsum("ij,ij->i", x, x))


def normalize(x):
    """Rows at unit length; a zero row stays zero. `[n, D] -> [n, D]`."""
    length = row_norms(x)[:, None]
    return x / np.where(length == 0, 1, length).astype(x.dtype)


def cosine(a, b):
    """Row-wise cosine as 1 - |a - b|^2 / 2 of unit vectors: exactly 1 for equal ones. `[n, D] x 2 -> [n]`."""
    apart = normalize(a) - normalize(b)
    return 1 - 0.5 * np.einsum("ij,ij->i", apart, apart)


def ranking(scores, ids, top_k=1000):
    """Positions of the best `top_k` documents, best first: float32 scores, ties by id, descending.

    That is pytrec_eval's order: ids are compared as strings.
    """
    scores = np.asarray(scores, dtype=np.float32)
    kept = range(len(scores))
    if len(scores) > top_k:
        kept = torch.from_numpy(scores).topk(top_k).indices.tolist()
    return sorted(kept, key=lambda i: (scores[i], ids[i]), reverse=True)


def ndcg(ranked_gains, all_gains, k=10):
    """nDCG@k, linear gain, discount log2(rank + 1), ideal over all judged documents (pytrec_eval's ndcg_cut)."""
    discount = 1 / np.log2(np.arange(2, k + 2))

    def dcg(gains):
        gains = np.asarray(gains[:k], dtype=np.float64)
        return float(gains @ discount[: len(gains)])

    ideal = dcg(sorted(all_gains, reverse=True))
    return dcg(ranked_gains) / ideal if ideal else 0.0


def ranked_average_precision(ranked_relevant, number_relevant):
    """Mean precision at the ranks of the relevant documents (pytrec_eval's map). Ties already broken."""
    hits = np.asarray(ranked_relevant, dtype=np.float64)
    precision = hits.cumsum() / np.arange(1, len(hits) + 1)
    return float(precision @ hits / number_relevant) if number_relevant else 0.0
