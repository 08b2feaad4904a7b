"""Every equation against a loop in float64, written from the paper and not from the code."""

import math

import pytest
import torch

import reward


def units(*shape, seed=0):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(*shape, dtype=torch.float64, generator=generator)
    return x / x.norm(dim=-1, keepdim=True)


def close(values, expected):
    torch.testing.assert_close(values, torch.tensor(expected, dtype=torch.float64), rtol=1e-10, atol=1e-10)


def pairs(B, *shared):
    """`[B, B]`, True where two instances share a text."""
    same_text = torch.eye(B, dtype=torch.bool)
    for i, j in shared:
        same_text[i, j] = same_text[j, i] = True
    return same_text


# ---------------------------------------------------------------- the paper


@pytest.mark.parametrize("B, K, M, D", [(5, 4, 2, 8), (1, 3, 1, 4), (3, 1, 0, 4), (2, 2, 3, 2)])
class TestPaper:
    def test_eq13(self, B, K, M, D):
        q, p, n = units(B, D), units(B, K, D, seed=1), units(B, M, D, seed=2)
        expected = [[float(q[i] @ p[i, k]) - sum(float(q[i] @ n[i, m]) for m in range(M)) for k in range(K)] for i in range(B)]
        close(reward.contrastive(q, p, n), expected)

    def test_eq14(self, B, K, M, D):
        p = units(B, K, D)
        expected = [
            [sum(float(p[i, k] @ p[i, j]) for j in range(K) if j != k) / max(K - 1, 1) for k in range(K)] for i in range(B)
        ]
        close(reward.consistency(p), expected)

    def test_eq15(self, B, K, M, D):
        """A batch of one has 0; instances that share a text are not others of each other."""
        q, p = units(B, D), units(B, K, D, seed=1)
        for same_text in (None, pairs(B, (0, B - 1))):
            expected = []
            for i in range(B):
                others = [j for j in range(B) if j != i and (same_text is None or not same_text[i, j])]
                expected.append(-sum(max(float(q[i] @ p[j, l]) for l in range(K)) for j in others) / max(len(others), 1))
            close(reward.hard_negative(q, p, same_text), expected)

    def test_eq21(self, B, K, M, D):
        a, p = units(B, D), units(B, K, D, seed=1)
        close(reward.self_similarity(a, p), [[float(a[i] @ p[i, k]) for k in range(K)] for i in range(B)])


def test_total_and_scale_are_eq16_and_eq17():
    c, s, h = torch.randn(3, 2, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    R = reward.scaled(reward.total({"contrastive": c, "consistency": s, "hard": h}, 0.2, 0.5), 0.1)
    close(R, [[float(c[i, k] + 0.2 * s[i, k] + 0.5 * h[i, k]) / 0.1 for k in range(4)] for i in range(2)])


def test_length_penalty_is_eq28():
    R, gamma = torch.randn(2, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0)) - 1, 0.7
    finished = torch.tensor([[True, False, True, False], [False, True, False, False]])
    expected = [[float(R[i, k]) if finished[i, k] else -gamma for k in range(4)] for i in range(2)]
    close(reward.length_penalty(R, finished, gamma, relative=False), expected)
    assert (torch.tensor(expected) > R)[~finished].any()  # where rewards lie below -gamma, Eq. 28 is a prize
    relative = [[float(R[i, k]) - (0 if finished[i, k] else gamma) for k in range(4)] for i in range(2)]
    close(reward.length_penalty(R, finished, gamma), relative)


# ---------------------------------------------------------------- InfoNCE


def infonce_by_loop(rows, columns, t, negatives=None, same_text=None, mined=False, leave_one_out=False):
    B, Kr, _ = rows.shape
    pick = max if mined else (lambda xs: sum(xs) / len(xs))
    table = []
    for i in range(B):
        table.append([])
        for k in range(Kr):
            row = rows[i, k]
            mates = [l for l in range(columns.shape[1]) if not (leave_one_out and l == k)]
            own = sum(float(row @ columns[i, l]) for l in mates) / len(mates)
            scores = [own]
            for j in range(B):
                if j != i and not (same_text is not None and same_text[i, j]):
                    scores.append(pick([float(row @ c) for c in columns[j]]))
            for m in range(negatives.shape[1] if negatives is not None else 0):
                scores.append(pick([float(row @ c) for c in negatives[i, m]]))
            table[-1].append(own / t - math.log(sum(math.exp(s / t) for s in scores)))
    return table


def outranked_by_loop(n, q, p, t, mined=False):
    pick = max if mined else (lambda xs: sum(xs) / len(xs))
    expected = []
    for i in range(len(n)):
        own = [float(a @ b) for a in q[i] for b in p[i]]
        for m in range(n.shape[1]):
            near = [pick([float(h @ a) for a in q[i]]) for h in n[i, m]]
            expected.append([-math.log(1 + math.exp((s - sum(own) / len(own)) / t)) for s in near])
    return expected


@pytest.mark.parametrize("M", [0, 2])
@pytest.mark.parametrize("same_text", [None, pairs(4, (1, 2))])
def test_infonce_of_each_role(M, same_text):
    """Whose columns are its candidates, whose negatives, and what is mined."""
    t, q, p, n, text = 0.2, units(4, 2, 6), units(4, 3, 6, seed=1), units(4, M, 3, 6, seed=2), units(4, 3, 6, seed=3)
    roles = {"query": q, "positive": p, "negative": n, "text": text}
    for mined, name in ((False, "contrastive"), (True, "hard")):
        expected = {
            "query": infonce_by_loop(q, p, t, n, same_text, mined),
            "positive": infonce_by_loop(p, q, t, None, same_text, mined),
            "text": infonce_by_loop(text, text, t, None, same_text, mined, leave_one_out=True),
        }
        if M:
            expected["negative"] = outranked_by_loop(n, q, p, t, mined)
        for role, values in expected.items():
            components = reward.infonce_components(roles, role, t, same_text)
            close(components[name], values)
            close(components["consistency"], reward.consistency(roles[role].flatten(0, -3)).tolist())


def test_paper_components_of_both_modes():
    same_text = pairs(4, (1, 2))
    q, p, n = units(4, 1, 6), units(4, 3, 6, seed=1), units(4, 2, 1, 6, seed=2)
    supervised = reward.paper_components({"query": q, "positive": p, "negative": n}, same_text)
    unsupervised = reward.paper_components({"anchor": q, "text": p}, same_text)
    close(supervised["contrastive"], reward.contrastive(q[:, 0], p, n[:, :, 0]).tolist())
    close(unsupervised["contrastive"], reward.self_similarity(q[:, 0], p).tolist())
    for components in (supervised, unsupervised):
        close(components["hard"], reward.hard_negative(q[:, 0], p, same_text)[:, None].expand(4, 3).tolist())
        close(components["consistency"], reward.consistency(p).tolist())


def test_infonce_ignores_a_rise_of_all():
    """One more coordinate, shared by all, raises every cosine by the same amount. Eq. 13 is fooled."""
    q, p, shared = units(4, 2, 6), units(4, 3, 6, seed=1), 0.8

    def coned(x):  # unit vectors again, with cosines shared^2 + (1 - shared^2) cos
        return torch.cat([x * math.sqrt(1 - shared**2), torch.full((*x.shape[:-1], 1), shared, dtype=x.dtype)], -1)

    t = 0.1
    before = reward.infonce(q, p, t)
    after = reward.infonce(coned(q), coned(p), t * (1 - shared**2))
    torch.testing.assert_close(after, before)
    paid = reward.contrastive(coned(q)[:, 0], coned(p), coned(units(4, 0, 6))) - reward.contrastive(q[:, 0], p, units(4, 0, 6))
    assert paid.mean() > 0.5
