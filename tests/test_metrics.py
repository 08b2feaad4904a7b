"""Every score against scipy or a worked example."""

import math

import numpy as np
import pytest

from evaluation import metrics

RNG = np.random.default_rng(0)


@pytest.mark.parametrize("n, levels", [(3, 3), (20, 4), (200, 1000)])
def test_spearman_is_scipys(n, levels):
    stats = pytest.importorskip("scipy.stats", reason="scipy is not installed")
    for _ in range(5):
        x, y = RNG.integers(0, levels, n), RNG.integers(0, levels, n) + RNG.random(n)
        if len(set(x)) == 1:
            continue
        expected = stats.spearmanr(x, y)
        rho = metrics.spearman(x, y)
        assert rho == pytest.approx(expected.statistic, abs=1e-12)
        np.testing.assert_array_equal(metrics.average_ranks(x), stats.rankdata(x))


def test_spearman_at_the_ends():
    assert metrics.spearman([1, 2, 3], [10, 20, 30]) == 1 and metrics.spearman([1, 2, 3], [3, 2, 1]) == -1
    assert math.isnan(metrics.spearman([1, 1, 1], [1, 2, 3]))


def test_ndcg_worked_example():
    """Gains 2, 0, 1 in ranked order; 2, 1, 1 judged. DCG = 2 + 1/2; ideal = 2 + 1/log2(3) + 1/2."""
    assert metrics.ndcg([2, 0, 1], [1, 2, 1]) == pytest.approx(2.5 / (2.5 + 1 / math.log2(3)))
    assert metrics.ndcg([0] * 10 + [1], [1]) == 0  # past the tenth place
    assert metrics.ndcg([0, 0], [0, 0]) == 0


def test_ranked_average_precision():
    assert metrics.ranked_average_precision([True, False, True], 3) == pytest.approx((1 + 2 / 3) / 3)
    assert metrics.ranked_average_precision([False], 0) == 0


def test_ranking_breaks_ties_by_id():
    """Descending, as strings."""
    ids = ["9", "10", "2", "b"]
    assert metrics.ranking([1.0, 1.0, 2.0, 1.0], ids) == [2, 3, 0, 1]
    assert metrics.ranking([1.0, 1.0 + 1e-12, 0, 0], ids)[:2] == [0, 1]  # equal as float32
    assert [ids[i] for i in metrics.ranking([3.0, 2.0, 1.0, 0.0], ids, top_k=2)] == ["9", "10"]


def test_cosine_is_exactly_one():
    x = RNG.standard_normal((50, 33)).astype(np.float32)
    assert (metrics.cosine(x, x.copy()) == 1).all()
    y = RNG.standard_normal((50, 33)).astype(np.float32)
    expected = [a @ b / np.linalg.norm(a) / np.linalg.norm(b) for a, b in zip(x.astype(float), y.astype(float))]
    np.testing.assert_allclose(metrics.cosine(x, y), expected, atol=1e-6)
    assert np.isfinite(metrics.normalize(np.zeros((2, 3)))).all()
