"""Task 3: the rewards, against loops written from the equations."""

import math

import pytest
import torch

import reward
from similarity import plain_similarity

SIZES = pytest.mark.parametrize("B, K, M, D", [(5, 4, 2, 8), (1, 3, 1, 4), (3, 1, 0, 4), (2, 2, 3, 2)])


@pytest.fixture(autouse=True)
def plain(monkeypatch):
    """A plain stand-in for task 4: the definition, with the whole table at once."""

    def group_similarity(rows, columns, temperature, same_text=None):
        own = torch.eye(len(columns), dtype=torch.bool)
        return plain_similarity(rows, columns, temperature, own if same_text is None else own | same_text)

    monkeypatch.setattr(reward, "group_similarity", group_similarity)


def close(actual, expected):
    torch.testing.assert_close(actual, torch.tensor(expected, dtype=torch.float64), rtol=1e-10, atol=1e-10)


def dot(x, y):
    return float(x @ y)


@pytest.mark.points(1)
@SIZES
def test_eq13_contrastive(units, B, K, M, D):
    q, p, n = units(B, D), units(B, K, D), units(B, M, D)
    expected = [[dot(q[i], p[i, k]) - sum(dot(q[i], x) for x in n[i]) for k in range(K)] for i in range(B)]
    close(reward.contrastive(q, p, n), expected)


@pytest.mark.points(1)
@SIZES
def test_eq21_self_similarity(units, B, K, M, D):
    a, p = units(B, D), units(B, K, D)
    close(reward.self_similarity(a, p), [[dot(a[i], x) for x in p[i]] for i in range(B)])


@pytest.mark.points(1)
@SIZES
def test_eq14_consistency(units, B, K, M, D):
    """A group of one has no others, and no consistency: 0, not NaN."""
    p = units(B, K, D)
    others = lambda i, k: [dot(p[i, k], p[i, j]) for j in range(K) if j != k]
    close(reward.consistency(p), [[sum(others(i, k)) / max(K - 1, 1) for k in range(K)] for i in range(B)])


@pytest.mark.points(3)
@SIZES
@pytest.mark.parametrize("share", [False, True])
def test_eq15_hard_negative(units, B, K, M, D, share):
    """Of a batch of one there is no other instance: 0, not NaN. Instances that share a text are not others of each other."""
    q, p, same_text = units(B, D), units(B, K, D), torch.eye(B, dtype=torch.bool)
    if share:
        same_text[0, -1] = same_text[-1, 0] = True
    nearest = [[max(dot(q[i], x) for x in p[j]) for j in range(B) if not same_text[i, j]] for i in range(B)]
    close(reward.hard_negative(q, p, same_text if share else None), [-sum(xs) / max(len(xs), 1) for xs in nearest])


def infonce_by_loop(q, p, t, negatives, mined, same_text=None, leave_one_out=False):
    pick = max if mined else (lambda xs: sum(xs) / len(xs))
    table = []
    for i in range(len(q)):
        row = []
        for k, x in enumerate(q[i]):
            mates = [dot(x, c) for l, c in enumerate(p[i]) if not (leave_one_out and l == k)]
            own = sum(mates) / len(mates)
            apart = [j for j in range(len(p)) if j != i and not (same_text is not None and same_text[i, j])]
            others = [pick([dot(x, c) for c in p[j]]) for j in apart]
            others += [pick([dot(x, c) for c in group]) for group in (negatives[i] if negatives is not None else [])]
            row.append(own / t - math.log(sum(math.exp(s / t) for s in [own, *others])))
        table.append(row)
    return table


@pytest.mark.points(3)
@pytest.mark.parametrize("mined", [False, True])
@pytest.mark.parametrize("B, M", [(5, 2), (4, 0), (3, None), (1, 1)])
def test_infonce(units, B, M, mined):
    q, p = units(B, 3, 6), units(B, 4, 6)
    negatives = None if M is None else units(B, M, 2, 6)
    close(reward.infonce(q, p, 0.3, negatives, mined=mined), infonce_by_loop(q, p, 0.3, negatives, mined))


@pytest.mark.points(1)
def test_infonce_of_one_pair_is_0_and_a_small_temperature_does_not_overflow(units):
    assert reward.infonce(units(1, 2, 4), units(1, 3, 4), 0.1).abs().max() < 1e-12
    assert torch.isfinite(reward.infonce(units(3, 2, 4), units(3, 3, 4), 1e-4)).all()


@pytest.mark.points(1)
def test_total_and_scale_are_eq16_and_eq17(rand):
    parts = {name: rand(2, 3) for name in ("contrastive", "consistency", "hard")}
    whole = reward.total(parts, 0.2, 0.5)
    torch.testing.assert_close(whole, parts["contrastive"] + 0.2 * parts["consistency"] + 0.5 * parts["hard"])
    torch.testing.assert_close(reward.scaled(whole, 0.1), 10 * whole)


@pytest.mark.points(2)
def test_length_penalty(rand):
    R, finished = rand(3, 4), torch.tensor([[True, False, True, True], [False] * 4, [True] * 4])
    before = R.clone()
    less, instead = reward.length_penalty(R, finished, 1.5), reward.length_penalty(R, finished, 1.5, relative=False)
    for i in range(3):
        for k in range(4):
            assert less[i, k] == (R[i, k] if finished[i, k] else R[i, k] - 1.5)
            assert instead[i, k] == (R[i, k] if finished[i, k] else -1.5)  # Eq. 28
    assert torch.equal(R, before), "the rewards were edited in place"


@pytest.mark.points(2)
def test_gradients_flow(units):
    """The pathwise term needs them."""
    q, p, n = (x.requires_grad_() for x in (units(3, 2, 4), units(3, 2, 4), units(3, 1, 2, 4)))

    def everything(q, p, n):
        parts = (
            reward.contrastive(q[:, 0], p, n[:, :, 0]), reward.self_similarity(q[:, 0], p), reward.consistency(p),
            reward.hard_negative(q[:, 0], p)[:, None], reward.infonce(q, p, 0.3, n, mined=True),
        )  # fmt: skip
        together = reward.total({"contrastive": sum(parts[:2]), "consistency": parts[2], "hard": parts[3] + parts[4]}, 0.3, 0.7)
        return reward.length_penalty(reward.scaled(together, 0.5), torch.tensor([[True, False]] * 3), 1.0)

    assert torch.autograd.gradcheck(everything, (q, p, n))
