"""Task 1: pooling, against loops."""

import pytest
import torch

import pool

HOW = ("mean", "penultimate", "eos", "max", "halves")


@pytest.fixture
def block(rand, generator):
    """Hidden states and a mask: a full row, rows with holes, a row with one token, and one whose last token does not count."""
    mask = (torch.rand(6, 9, generator=generator) < 0.5).long()
    mask[0], mask[1], mask[2, -1] = 1, 0, 0
    mask[1, 4] = 1
    mask[:, 1] |= ~mask.bool().any(1)  # no row without a token
    return rand(6, 9, 5), mask


def by_loop(hidden, mask, how):
    vectors = []
    for states, counts in zip(hidden, mask):
        kept = [x for x, count in zip(states, counts) if count]
        vectors.append({"max": lambda k: torch.stack(k).amax(0), "eos": lambda k: k[-1]}.get(how, sum)(kept))
    return torch.stack([x / x.norm() for x in vectors])


def close(actual, expected):
    torch.testing.assert_close(actual, expected, rtol=1e-12, atol=1e-12)


@pytest.mark.points(2)
def test_mean_is_its_definition(block):
    close(pool.mean_pool(*block), by_loop(*block, "mean"))


@pytest.mark.points(3)
@pytest.mark.parametrize("how", HOW[1:])
def test_other_poolings(block, how):
    for shift in (0, -9):  # padding is not a zero
        close(pool.pool(block[0] + shift, block[1], how), by_loop(block[0] + shift, block[1], how))


@pytest.mark.points(1)
def test_what_does_not_count_cannot_matter(block):
    hidden, mask = block
    before = mask.clone(), hidden.clone()
    for how in HOW:
        for garbage in (torch.nan, torch.inf, 1e9):
            spoiled = hidden.masked_fill(mask[..., None] == 0, garbage)
            close(pool.pool(spoiled, mask, how), by_loop(hidden, mask, how))
    assert torch.equal(mask, before[0]) and torch.equal(hidden, before[1]), "the caller's tensors were edited"


@pytest.mark.points(2)
@pytest.mark.parametrize("how", HOW)
def test_folding_blocks_is_pooling_the_whole(block, how):
    hidden, mask = block[0][:2], block[1][:2]
    mask[:, 0] = 1  # a state exists from the first block on, as every prompt has tokens that count
    state = None
    for part in (slice(0, 2), slice(2, 7), slice(7, 9)):
        state = pool.fold(state, hidden[:, part], mask[:, part], how)
    close(pool.unit(state), by_loop(hidden, mask, how))
    before = state.clone()
    ended = pool.fold(state, hidden[:, :1] * 50, torch.zeros_like(mask[:, :1]), how)
    close(ended, before)  # a row that has ended stays as it is
    pool.fold(state, hidden[:, :1] * 50, torch.ones_like(mask[:, :1]), how)
    assert torch.equal(state, before), "the state was edited in place"


@pytest.mark.points(1)
def test_sums_are_taken_in_float32_and_differentiable(block):
    ones = torch.ones(1, 257, 2, dtype=torch.bfloat16)  # there is no 257 in bfloat16
    assert float(pool.fold(None, ones, torch.ones(1, 257))[0, 0]) == 257
    assert all(pool.fold(None, ones, torch.ones(1, 257), how).dtype == torch.float32 for how in HOW)
    hidden, mask = block[0][:2].requires_grad_(), block[1][:2]
    for how in HOW:
        assert torch.autograd.gradcheck(lambda h, how=how: pool.pool(h, mask, how), hidden)


@pytest.mark.points(1)
def test_what_has_no_embedding_is_an_error(block):
    hidden, mask = block
    with pytest.raises(ValueError):
        pool.fold(None, hidden, mask, "median")
    mask[2] = 0
    with pytest.raises(ValueError, match="2"):  # the message names the row
        pool.pool(hidden, mask)
