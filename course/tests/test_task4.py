"""Task 4: the in-batch similarity in blocks of rows, against a loop and finite differences; and what it holds."""

import math

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import similarity

BLOCKS = pytest.mark.parametrize("table", [1, 40, 10**6])  # cosines held at a time: a row, a few rows, all


def by_loop(rows, columns, t, same_text):
    """The four numbers of each row, from their definition."""
    numbers = []
    for n, x in enumerate(rows):
        mine = n // (len(rows) // len(columns))
        s = [[float(x @ c) for c in group] for group in columns]
        others = [g for g in range(len(columns)) if g != mine and not (same_text is not None and same_text[mine, g])]
        lse = lambda xs: math.log(sum(math.exp(x / t) for x in xs)) if xs else -math.inf
        near = [max(s[g]) for g in others]
        mean = [sum(s[g]) / len(s[g]) for g in others]
        numbers.append([sum(s[mine]) / len(s[mine]), lse(mean), lse(near), sum(near) / max(len(near), 1)])
    return torch.tensor(numbers, dtype=torch.float64).T


@pytest.fixture
def example(units, generator):
    rows, columns = units(5 * 2, 4), units(5, 3, 4)
    same_text = torch.rand(5, 5, generator=generator) < 0.3
    return rows, columns, same_text | same_text.T


@pytest.mark.points(2)
@BLOCKS
def test_values(example, table, monkeypatch):
    monkeypatch.setattr(similarity, "TABLE", table)
    rows, columns, same_text = example
    for mask in (None, same_text):
        numbers = torch.stack(similarity.group_similarity(rows, columns, 0.2, mask))
        torch.testing.assert_close(numbers, by_loop(rows, columns, 0.2, mask), rtol=1e-10, atol=1e-10)


@pytest.mark.points(1)
def test_no_other_group(units):
    numbers = similarity.group_similarity(units(3, 4), units(1, 2, 4), 0.1)
    assert numbers.hard.eq(0).all() and numbers.mean.eq(-torch.inf).all() and numbers.nearest.eq(-torch.inf).all()


@pytest.mark.points(4)
@pytest.mark.parametrize("table", [1, 40])
@pytest.mark.parametrize("which", range(4), ids=similarity.Similarity._fields)
def test_gradient_of_each_number(example, table, which, monkeypatch):
    monkeypatch.setattr(similarity, "TABLE", table)
    rows, columns, same_text = example
    same_text = same_text & (torch.arange(5)[:, None] > 0) & (torch.arange(5) > 0)  # group 0 has others: its numbers are finite
    number = lambda r, c: similarity.group_similarity(r, c, 0.4, same_text)[which][:2]
    assert torch.autograd.gradcheck(number, (rows.requires_grad_(), columns.requires_grad_()))


@pytest.mark.points(1)
def test_equal_members_share_the_gradient_of_one(example):
    rows, columns, _ = example
    columns = columns.clone()
    columns[:, 1] = columns[:, 0]
    columns.requires_grad_()
    gradient = torch.autograd.grad(similarity.group_similarity(rows, columns, 1.0).hard.sum(), columns)[0]
    nearest = torch.einsum("nd,bkd->nbk", rows, columns).amax(2)  # torch shares its gradient evenly among equal members
    off = 1 - torch.eye(5, dtype=torch.float64).repeat_interleave(2, 0)
    expected = torch.autograd.grad((nearest * off).sum() / 4, columns)[0]
    torch.testing.assert_close(gradient, expected, rtol=1e-10, atol=1e-12)


@pytest.mark.points(1)
def test_without_another_group_no_gradient_is_nan(example):
    rows, columns, same_text = example
    alone = same_text.clone()
    alone[2] = True  # group 2 has no other group
    rows.requires_grad_()
    columns.requires_grad_()
    numbers = similarity.group_similarity(rows, columns, 0.3, alone)
    value = numbers.own.sum() + numbers.hard.sum() + numbers.mean[:4].sum() + numbers.nearest[6:].sum()
    assert all(torch.isfinite(x).all() for x in torch.autograd.grad(value, (rows, columns)))


@pytest.mark.points(1)
def test_no_tensor_of_the_table_s_size(units, monkeypatch):
    monkeypatch.setattr(similarity, "TABLE", 1000)
    largest = 0

    class Largest(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            nonlocal largest
            out = function(*args, **(kwargs or {}))
            for x in out if isinstance(out, (tuple, list)) else [out]:
                largest = max(largest, x.numel() if isinstance(x, torch.Tensor) else 0)
            return out

    rows, columns = units(200, 4).requires_grad_(), units(50, 4, 4).requires_grad_()
    with Largest():
        sum(x.sum() for x in similarity.group_similarity(rows, columns, 0.5)).backward()
    assert largest < 200 * 200 / 4, "a tensor as large as a good part of the table was made"
