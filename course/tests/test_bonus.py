"""Bonus: the forward kernel, in Triton's interpreter on a CPU, against the plain definition."""

import importlib.util

import pytest
import torch

pytestmark = [
    pytest.mark.bonus,
    pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="triton is not installed"),
]
SHAPES = [(5, 3, 2, 40), (1, 4, 3, 8), (3, 8, 1, 100), (20, 5, 3, 70)]  # B, K, rows a group, D


@pytest.mark.points(5)
@pytest.mark.parametrize("shape", SHAPES[:2])
def test_small(units, shape, monkeypatch):
    check(units, shape, monkeypatch)


@pytest.mark.points(5)
@pytest.mark.parametrize("shape", SHAPES[2:])
def test_more_than_a_tile_and_odd_sizes(units, shape, monkeypatch):
    check(units, shape, monkeypatch)


def check(units, shape, monkeypatch):
    from speed import similarity_triton

    B, K, R, D = shape
    rows, columns = units(B * R, D).float(), units(B, K, D).float()
    barred = torch.eye(B, dtype=torch.bool)
    if B > 2:
        barred[0, 2] = barred[2, 0] = True
    found = torch.stack(similarity_triton.forward(rows, columns, barred, 0.2))
    s = torch.einsum("nd,bkd->nbk", rows, columns)
    mine = torch.arange(B).repeat_interleave(R)
    own, other = torch.nn.functional.one_hot(mine, B).bool(), ~barred[mine]
    lse = lambda x: (x / 0.2).masked_fill(~other, -torch.inf).logsumexp(1)
    hard = (s.amax(2) * other).sum(1) / other.sum(1).clamp(min=1)
    expected = torch.stack([(s.mean(2) * own).sum(1), lse(s.mean(2)), lse(s.amax(2)), hard])
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
