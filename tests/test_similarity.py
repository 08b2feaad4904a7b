"""The in-batch similarity: the definition by a loop in float64, the tiles by the definition, the kernel by the tiles."""

import importlib.util
import math
import os
import subprocess
import sys

import pytest
import torch

import similarity

SHAPES = [(5, 3, 2, 40), (1, 4, 3, 8), (7, 8, 1, 100), (3, 1, 4, 17), (20, 5, 3, 70), (2, 33, 2, 16)]  # B, K, rows per group, D


def example(B, K, R, D, dtype=torch.float64, seed=0):
    """Rows, columns with two equal members, and twins that are not an equivalence."""
    generator = torch.Generator().manual_seed(seed)
    unit = lambda *shape: torch.nn.functional.normalize(
        torch.randn(*shape, dtype=torch.float64, generator=generator), dim=-1
    ).to(dtype)  # fmt: skip
    rows, columns = unit(B * R, D), unit(B, K, D)
    if K > 2:
        columns[:, 2] = columns[:, 1]
    twins = torch.rand(B, B, generator=generator) < 0.2
    return rows, columns, twins | twins.T


def by_loop(rows, columns, t, twins):
    """The four numbers of each row, written from their definition."""
    (N, _), (B, K, _) = rows.shape, columns.shape
    table = []
    for n in range(N):
        mine = n // (N // B)
        s = [[sum(a * b for a, b in zip(rows[n].tolist(), c.tolist())) for c in group] for group in columns]
        others = [g for g in range(B) if g != mine and not (twins is not None and twins[mine, g])]
        lse = lambda xs: math.log(sum(math.exp(x / t) for x in xs)) if xs else -math.inf
        table.append([
            sum(s[mine]) / K, lse([sum(s[g]) / K for g in others]), lse([max(s[g]) for g in others]),
            sum(max(s[g]) for g in others) / max(len(others), 1),
        ])  # fmt: skip
    return torch.tensor(table, dtype=torch.float64).T


def barred(twins, B):
    """What is not another group: a group itself, and its twins."""
    return torch.eye(B, dtype=torch.bool) | (False if twins is None else twins)


@pytest.mark.parametrize("shape", SHAPES)
def test_values_of_the_definition(shape):
    rows, columns, twins = example(*shape)
    for mask in (None, twins):
        values = torch.stack(similarity.plain_similarity(rows, columns, 0.1, barred(mask, len(columns))))
        torch.testing.assert_close(values, by_loop(rows, columns, 0.1, mask), rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("block", [1, 100, 10**6])  # a row at a time, some rows, all of them
@pytest.mark.parametrize("shape", SHAPES)
def test_values_of_the_tiles(shape, block, monkeypatch):
    """Values and gradients, with members that tie, with twins and without."""
    monkeypatch.setattr(similarity, "TABLE", block)
    rows, columns, twins = example(*shape)
    assert shape[1] < 3 or torch.equal(columns[:, 1], columns[:, 2])
    weights = torch.randn(4, len(rows), dtype=torch.float64, generator=torch.Generator().manual_seed(3))
    for mask in (None, twins):
        results = []
        for function, other in ((similarity.group_similarity, mask), (similarity.plain_similarity, barred(mask, len(columns)))):
            x, c = rows.clone().requires_grad_(), columns.clone().requires_grad_()
            values = torch.stack(function(x, c, 0.1, other))
            total = (values.masked_fill(values.isinf(), 0) * weights).sum()
            results.append((values, *torch.autograd.grad(total, (x, c))))
        for tiles, plain in zip(*results):
            torch.testing.assert_close(tiles, plain, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("block", [1, 10**6])
def test_gradient(block, monkeypatch):
    monkeypatch.setattr(similarity, "TABLE", block)
    rows, columns, twins = example(4, 2, 2, 5)
    twins[0, 2] = twins[2, 0] = True
    check = lambda r, c: tuple(similarity.group_similarity(r, c, 0.3, twins))
    assert torch.autograd.gradcheck(check, (rows.requires_grad_(), columns.requires_grad_()))


def test_small_temperature():
    """It neither overflows nor vanishes."""
    rows, columns, _ = example(6, 2, 2, 9, torch.float32)
    values = similarity.group_similarity(rows, columns, 1e-3)
    expected = by_loop(rows, columns, 1e-3 * 10, None)[2]  # at a tenth the loop's own exp() still holds
    assert torch.isfinite(values.mean).all() and torch.isfinite(values.nearest).all()
    assert (values.nearest * 1e-3 - expected * 1e-2).abs().max() < 0.02  # both near the largest cosine
    assert (values.nearest >= values.mean).all()


def test_bfloat16_is_computed_in_float32():
    rows, columns, _ = example(5, 3, 2, 64, torch.bfloat16)
    rows.requires_grad_()
    values = similarity.group_similarity(rows, columns, 0.1)
    assert values.mean.dtype == torch.float32
    exact = by_loop(rows.detach().double(), columns.double(), 0.1, None)
    torch.testing.assert_close(torch.stack(values).double(), exact, rtol=1e-5, atol=1e-5)
    values.mean.sum().backward()
    assert rows.grad.dtype == torch.bfloat16


def test_shapes_that_do_not_go_together():
    with pytest.raises(ValueError, match="need the same D"):
        similarity.group_similarity(torch.zeros(5, 4), torch.zeros(2, 3, 4), 1.0)


def test_no_tensor_of_the_table_s_size(monkeypatch):
    """N = 512 rows against 512 columns: what any operation returns, forward or backward, stays below a quarter of it."""
    from torch.utils._python_dispatch import TorchDispatchMode

    class Largest(TorchDispatchMode):
        numel = 0

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            out = func(*args, **(kwargs or {}))
            Largest.numel = max([Largest.numel, *(x.numel() for x in [out] if isinstance(x, torch.Tensor))])
            return out

    monkeypatch.setattr(similarity, "TABLE", 2**14)
    rows, columns, _ = example(64, 8, 8, 16, torch.float32)
    rows.requires_grad_()
    columns.requires_grad_()
    with Largest():
        sum(x.sum() for x in similarity.group_similarity(rows, columns, 0.1)).backward()
    assert 0 < Largest.numel <= 512 * 512 // 4


INTERPRETED = """
import torch
import similarity
from speed import similarity_triton
from test_similarity import SHAPES, example
# Several tiles of rows, and several bands of them, the last of each incomplete.
similarity_triton.tile, similarity_triton.BAND, similarity_triton.LEAST = (16, 32), 3300, 1
for dtype, tolerance in ((torch.float32, 1e-5), (torch.bfloat16, 2e-2)):
    for shape in SHAPES if dtype == torch.float32 else SHAPES[:1]:
        rows, columns, twins = example(*shape, dtype)
        weights = torch.randn(4, len(rows), generator=torch.Generator().manual_seed(3))
        results = []
        for similarity.kernel in ("off", "on"):
            x, c = rows.clone().requires_grad_(), columns.clone().requires_grad_()
            values = torch.stack(similarity.group_similarity(x, c, 0.1, twins))
            assert values.dtype == torch.float32
            total = (values.masked_fill(values.isinf(), 0) * weights).sum()
            results.append((values, *torch.autograd.grad(total, (x, c))))
        for ours, theirs in zip(*results):
            torch.testing.assert_close(ours.float(), theirs.float(), rtol=tolerance, atol=tolerance)
        print("equal", shape, dtype)
"""


@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="triton is not installed")
def test_kernel_in_the_interpreter():
    """In a process of its own, because Triton reads TRITON_INTERPRET when it is imported."""
    result = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", INTERPRETED],
        env={**os.environ, "TRITON_INTERPRET": "1", "PYTHONPATH": "tests"},
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0, result.stderr
    assert result.stdout.count("equal") == len(SHAPES) + 1


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("shape", [*SHAPES, (128, 8, 8, 896)])
def test_kernel_on_cuda(shape, monkeypatch):
    rows, columns, twins = (x.cuda() for x in example(*shape, torch.float32))
    results = []
    for how, precise in (("on", torch.float32), ("off", torch.float64)):
        monkeypatch.setattr(similarity, "kernel", how)
        x, c = rows.to(precise).requires_grad_(), columns.to(precise).requires_grad_()
        values = torch.stack(similarity.group_similarity(x, c, 0.1, twins))
        results.append((values, *torch.autograd.grad(values.masked_fill(values.isinf(), 0).sum(), (x, c))))
    for ours, exact in zip(*results):
        torch.testing.assert_close(ours.double(), exact, rtol=1e-4, atol=1e-4)
