"""The in-batch similarity: the definition by a loop in float64, the tiles by the definition, the kernel by the tiles."""

import pytest
import torch
from conftest import interpreted, needs_triton

import similarity
from course.tests.test_task4 import by_loop, test_no_tensor_of_the_table_s_size  # noqa: F401

SHAPES = [(5, 3, 2, 40), (1, 4, 3, 8), (7, 8, 1, 100), (3, 1, 4, 17), (20, 5, 3, 70), (2, 33, 2, 16)]  # B, K, rows per group, D


def example(B, K, R, D, dtype=torch.float64):
    """Rows, columns with two equal members, and groups that share a text, in pairs that are not an equivalence."""
    generator = torch.Generator().manual_seed(0)
    draw = lambda *shape: torch.randn(*shape, dtype=torch.float64, generator=generator)
    rows, columns = (torch.nn.functional.normalize(x, dim=-1).to(dtype) for x in (draw(B * R, D), draw(B, K, D)))
    if K > 2:
        columns[:, 2] = columns[:, 1]
    same_text = torch.rand(B, B, generator=generator) < 0.2
    return rows, columns, same_text | same_text.T


def by_definition(rows, columns, t, same_text):
    """`plain_similarity`, called as `group_similarity` is."""
    itself = torch.eye(len(columns), dtype=torch.bool, device=rows.device)
    return similarity.plain_similarity(rows, columns, t, itself if same_text is None else itself | same_text)


def with_gradients(function, rows, columns, *more):
    """Values `[4, N]` and, for one fixed weighting of them, the gradients at rows and columns."""
    rows, columns = rows.clone().requires_grad_(), columns.clone().requires_grad_()
    values = torch.stack(function(rows, columns, 0.1, *more))
    weights = torch.randn(values.shape, generator=torch.Generator().manual_seed(3)).to(values)
    total = (values.masked_fill(values.isinf(), 0) * weights).sum()
    return values, *torch.autograd.grad(total, (rows, columns))


@pytest.mark.parametrize("block", [1, 100])  # a row at a time; some rows, or all of them where there are few
@pytest.mark.parametrize("shape", SHAPES)
def test_values_and_gradients(shape, block, monkeypatch):
    """The definition against the loop and the tiles against the definition, with members that tie; and with shared texts."""
    monkeypatch.setattr(similarity, "TABLE", block)
    rows, columns, same_text = example(*shape)
    assert shape[1] < 3 or torch.equal(columns[:, 1], columns[:, 2])
    for shared in (None, same_text):
        plain, tiles = (with_gradients(f, rows, columns, shared) for f in (by_definition, similarity.group_similarity))
        for ours, exact in zip((plain[0], *tiles), (by_loop(rows, columns, 0.1, shared), *plain)):
            torch.testing.assert_close(ours, exact, rtol=1e-10, atol=1e-10)


def test_bfloat16_is_computed_in_float32():
    rows, columns, _ = example(5, 3, 2, 64, torch.bfloat16)
    values, d_rows, _ = with_gradients(similarity.group_similarity, rows, columns)
    assert values.dtype == torch.float32 and d_rows.dtype == torch.bfloat16
    torch.testing.assert_close(values.double(), by_loop(rows.double(), columns.double(), 0.1, None), rtol=1e-5, atol=1e-5)


# ---------------------------------------------------------------- the kernel

INTERPRETED = """
import torch
from similarity import group_similarity
from speed import similarity_triton
from test_similarity import SHAPES, example, with_gradients
# Several tiles of rows, and several bands of them, the last of each incomplete.
similarity_triton.tile, similarity_triton.BAND, similarity_triton.LEAST = (16, 32), 3300, 1
for dtype, tolerance in ((torch.float32, 1e-5), (torch.bfloat16, 2e-2)):
    for shape in SHAPES if dtype == torch.float32 else SHAPES[:1]:
        given = example(*shape, dtype)
        for ours, theirs in zip(*(with_gradients(group_similarity, *given, use_triton) for use_triton in (True, False))):
            torch.testing.assert_close(ours.float(), theirs.float(), rtol=tolerance, atol=tolerance)
        print("equal", shape, dtype)
"""


@needs_triton
def test_kernel_in_the_interpreter():
    assert interpreted(INTERPRETED).count("equal") == len(SHAPES) + 1


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("shape", [*SHAPES, (128, 8, 8, 896)])
def test_kernel_on_cuda(shape):
    rows, columns, same_text = (x.cuda() for x in example(*shape, torch.float32))
    ours = with_gradients(similarity.group_similarity, rows, columns, same_text, True)
    exact = with_gradients(similarity.group_similarity, rows.double(), columns.double(), same_text, False)
    for one, two in zip(ours, exact):
        torch.testing.assert_close(one.double(), two, rtol=1e-4, atol=1e-4)
