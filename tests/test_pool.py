"""Pooling against plain loops in float64, and the properties that masks must have."""

import pytest
import torch

from pool import POOLS, fold, mean_pool, pool, unit, with_rationale

each_pooling = pytest.mark.parametrize("how", POOLS)


def by_loop(hidden, mask, how):
    """The definition, a row at a time; for the mean, Eq. 11."""
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


@each_pooling
def test_pool_is_its_definition(block, how):
    """Whatever stands where the mask is 0, NaN included; and its gradient is that of finite differences."""
    hidden, mask = block
    expected, before = by_loop(hidden, mask, how), mask.clone()
    spoiled = hidden.masked_fill(mask[..., None] == 0, float("nan"))
    torch.testing.assert_close(pool(spoiled, mask, how), expected, rtol=1e-12, atol=1e-12)
    assert torch.equal(mask, before)  # the caller goes on using it
    assert torch.autograd.gradcheck(lambda h: pool(h, mask, how), hidden.requires_grad_())


@each_pooling
@pytest.mark.parametrize("cut", [1, 3, 6])
def test_folding_blocks_is_pooling_the_whole(block, how, cut):
    """The decoding loop sees one token at a time; the result must not depend on that."""
    hidden, mask = block[0][[0, 3]], block[1][[0, 3]]
    mask[:, 0] = 1  # a state exists from the first block on, as every prompt has tokens that count
    state = fold(None, hidden[:, :cut], mask[:, :cut], how)
    state = fold(state, hidden[:, cut:], mask[:, cut:], how)
    torch.testing.assert_close(unit(state), pool(hidden, mask, how), rtol=1e-12, atol=1e-12)


def test_mean_in_any_order(block):
    hidden, mask = block
    order = torch.randperm(7)
    torch.testing.assert_close(mean_pool(hidden[:, order], mask[:, order]), mean_pool(hidden, mask))


def test_half_precision_is_summed_in_float32():
    hidden = torch.ones(1, 257, 2, dtype=torch.bfloat16)  # there is no 257 in bfloat16
    assert float(fold(None, hidden, torch.ones(1, 257))[0, 0]) == 257


def test_halves_without_a_rationale_are_the_prompt():
    """Its gradient, too, in float32: the difference of two equal sums has no direction."""
    torch.manual_seed(0)
    prompt, g = (30 * torch.randn(4, 64)).requires_grad_(), torch.randn(4, 64)
    alone, both = unit(prompt), with_rationale(prompt, prompt, "halves")
    torch.testing.assert_close(both, alone)
    (expected,), (given,) = (torch.autograd.grad((g * h).sum(), prompt) for h in (alone, both))
    torch.testing.assert_close(given, expected, rtol=1e-5, atol=1e-7)


def test_what_is_refused(block):
    hidden, mask = block
    with pytest.raises(ValueError, match="choose one of mean"):
        pool(hidden, mask, "median")
    mask[2] = 0
    with pytest.raises(ValueError, match=r"row\(s\) \[2\]"):
        mean_pool(hidden, mask)
