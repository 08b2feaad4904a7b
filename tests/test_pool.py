"""Pooling against plain loops in float64, and the properties that masks must have."""

import pytest
import torch

from pool import POOLS, fold, length_mask, mean_pool, pool, unit


def by_loop(hidden, mask, how):
    """The definition, a row at a time."""
    rows = []
    for states, counts in zip(hidden, mask):
        kept = [state for state, count in zip(states, counts) if count]
        if how == "max":
            vector = torch.stack(kept).max(0).values
        elif how == "eos":
            vector = kept[-1]
        else:
            vector = sum(kept) / len(kept)
        rows.append(vector / (vector * vector).sum().sqrt())
    return torch.stack(rows)


@pytest.fixture
def block():
    torch.manual_seed(0)
    hidden = torch.randn(4, 7, 5, dtype=torch.float64)
    mask = torch.tensor([[1, 1, 1, 1, 1, 1, 1], [0, 0, 1, 1, 1, 0, 0], [1, 0, 0, 0, 0, 0, 0], [0, 1, 0, 1, 0, 0, 1]])
    return hidden, mask


@pytest.mark.parametrize("how", POOLS)
def test_pool_is_its_definition(block, how):
    hidden, mask = block
    torch.testing.assert_close(pool(hidden, mask, how), by_loop(hidden, mask, how), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("how", POOLS)
@pytest.mark.parametrize("cut", [1, 3, 6])
def test_folding_blocks_is_pooling_the_whole(block, how, cut):
    """The decoding loop sees one token at a time; the result must not depend on that."""
    hidden, mask = block
    hidden, mask = hidden[[0, 3]], mask[[0, 3]]
    mask[:, 0] = 1  # a state exists from the first block on, as every prompt has tokens that count
    state = fold(None, hidden[:, :cut], mask[:, :cut], how)
    state = fold(state, hidden[:, cut:], mask[:, cut:], how)
    torch.testing.assert_close(unit(state), pool(hidden, mask, how), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("how", POOLS)
def test_what_does_not_count_cannot_matter(block, how):
    """Padding may hold anything, NaN included, and the caller's mask is left as it was."""
    hidden, mask = block
    expected, before = pool(hidden, mask, how), mask.clone()
    spoiled = hidden.masked_fill(mask[..., None] == 0, float("nan"))
    torch.testing.assert_close(pool(spoiled, mask, how), expected, rtol=0, atol=0)
    assert torch.equal(mask, before)


def test_mean_in_any_order(block):
    hidden, mask = block
    order = torch.randperm(7)
    torch.testing.assert_close(mean_pool(hidden[:, order], mask[:, order]), mean_pool(hidden, mask))


@pytest.mark.parametrize("how", POOLS)
def test_gradient(block, how):
    hidden, mask = block
    assert torch.autograd.gradcheck(lambda h: pool(h, mask, how), hidden.requires_grad_())


def test_half_precision_is_summed_in_float32():
    hidden = torch.ones(1, 257, 2, dtype=torch.bfloat16)  # there is no 257 in bfloat16
    assert float(fold(None, hidden, torch.ones(1, 257))[0, 0]) == 257


def test_a_row_without_tokens_is_an_error(block):
    hidden, mask = block
    mask[2] = 0
    with pytest.raises(ValueError, match=r"row\(s\) \[2\]"):
        mean_pool(hidden, mask)


def test_unknown_pooling_is_an_error(block):
    with pytest.raises(ValueError, match="choose one of mean"):
        pool(*block, "median")


def test_length_mask_counts():
    assert length_mask(torch.tensor([0, 2, 5]), 5).sum(1).tolist() == [0, 2, 5]
