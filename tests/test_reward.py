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
        q, p = units(B, D), units(B, K, D, seed=1)
        expected = [
            -sum(max(float(q[i] @ p[j, l]) for l in range(K)) for j in range(B) if j != i) / max(B - 1, 1) for i in range(B)
        ]
        close(reward.hard_negative(q, p), expected)

    def test_eq21(self, B, K, M, D):
        a, p = units(B, D), units(B, K, D, seed=1)
        close(reward.self_similarity(a, p), [[float(a[i] @ p[i, k]) for k in range(K)] for i in range(B)])


def infonce_by_loop(rows, columns, t, negatives, twins, mined, leave_one_out):
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
                if j != i and not (twins is not None and twins[i, j]):
                    scores.append(pick([float(row @ c) for c in columns[j]]))
            for m in range(negatives.shape[1] if negatives is not None else 0):
                scores.append(pick([float(row @ c) for c in negatives[i, m]]))
            table[-1].append(own / t - math.log(sum(math.exp(s / t) for s in scores)))
    return table


@pytest.mark.parametrize("mined", [False, True])
@pytest.mark.parametrize("twinned", [False, True])
@pytest.mark.parametrize("M", [None, 0, 1, 3])
def test_infonce(mined, twinned, M):
    B, Kr, Kc, D = 5, 3, 4, 8
    rows, columns = units(B, Kr, D), units(B, Kc, D, seed=1)
    negatives = None if M is None else units(B, M, 2, D, seed=2)
    twins = torch.eye(B, dtype=torch.bool) if twinned else None
    if twinned:
        twins[0, 3] = twins[3, 0] = True
    close(
        reward.infonce(rows, columns, 0.1, negatives, twins, mined),
        infonce_by_loop(rows, columns, 0.1, negatives, twins, mined, False),
    )


@pytest.mark.parametrize("mined", [False, True])
def test_infonce_unsupervised(mined):
    x = units(4, 3, 6)
    close(reward.infonce(x, x, 0.1, mined=mined, leave_one_out=True), infonce_by_loop(x, x, 0.1, None, None, mined, True))


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


def test_every_term_depends_on_the_rollout():
    """Moving another instance's column moves rollouts of one group unequally; Eq. 15 cannot."""
    q, p = units(4, 3, 6), units(4, 3, 6, seed=1)
    moved = q.clone()
    moved[1] = units(3, 6, seed=9)
    change = (reward.infonce(p, moved, 0.1) - reward.infonce(p, q, 0.1))[0]
    assert change.max() - change.min() > 0.1
    hard = reward.hard_negative(q[:, 0], p)[:, None].expand(4, 3)
    assert torch.equal(hard - hard.mean(1, keepdim=True), torch.zeros(4, 3, dtype=hard.dtype))


def test_outranked():
    n, q, p, t = units(3, 2, 4, 6), units(3, 2, 6, seed=1), units(3, 5, 6, seed=2), 0.2
    expected = []
    for i in range(3):
        own = sum(float(a @ b) for a in q[i] for b in p[i]) / 10
        for m in range(2):
            near = [sum(float(n[i, m, k] @ a) for a in q[i]) / 2 for k in range(4)]
            expected.append([-math.log(1 + math.exp((s - own) / t)) for s in near])
    close(reward.outranked(n, q, p, t), expected)
    assert (reward.outranked(n, q, p, t, mined=True) <= reward.outranked(n, q, p, t)).all()


@pytest.mark.parametrize("function", ["contrastive", "consistency", "hard_negative", "infonce", "outranked"])
def test_gradients(function):
    q, p, n = units(3, 2, 4), units(3, 2, 4, seed=1), units(3, 1, 2, 4, seed=2)
    call = {
        "contrastive": lambda q, p, n: reward.contrastive(q[:, 0], p, n[:, :, 0]),
        "consistency": lambda q, p, n: reward.consistency(p),
        "hard_negative": lambda q, p, n: reward.hard_negative(q[:, 0], p),
        "infonce": lambda q, p, n: reward.infonce(q, p, 0.1, n, mined=True),
        "outranked": lambda q, p, n: reward.outranked(n, q, p, 0.1),
    }[function]
    assert torch.autograd.gradcheck(call, tuple(x.requires_grad_() for x in (q, p, n)))


def test_length_penalty():
    R, finished = torch.tensor([[-3.0, -2.0], [0.5, 0.2]]), torch.tensor([[True, False], [False, True]])
    assert reward.length_penalty(R, finished, 1.0).tolist() == [[-3.0, -3.0], [-0.5, pytest.approx(0.2)]]
    replaced = reward.length_penalty(R, finished, 1.0, relative=False)  # Eq. 28
    assert replaced.tolist() == [[-3.0, -1.0], [-1.0, pytest.approx(0.2)]]
    assert replaced[0, 1] > replaced[0, 0]  # where rewards lie below -gamma, Eq. 28 is a prize


def test_total_and_scale():
    components = {name: torch.full((2, 3), x) for name, x in (("contrastive", 1.0), ("consistency", 2.0), ("hard", -3.0))}
    R = reward.scaled(reward.total(components, 0.2, 0.5), 0.1)  # Eq. 16, 17
    torch.testing.assert_close(R, torch.full((2, 3), (1 + 0.4 - 1.5) / 0.1))


def test_twins_are_left_out_of_eq15():
    q, p = units(3, 4), units(3, 2, 4, seed=1)
    twins = torch.eye(3, dtype=torch.bool)
    twins[0, 1] = twins[1, 0] = True
    expected = [-max(float(q[0] @ p[2, l]) for l in range(2))]
    close(reward.hard_negative(q, p, twins)[:1], expected)


def test_one_is_zero_not_nan():
    """A group of one, and a batch of one."""
    assert reward.consistency(units(3, 1, 4)).eq(0).all()
    assert reward.hard_negative(units(1, 4), units(1, 2, 4)).eq(0).all()
