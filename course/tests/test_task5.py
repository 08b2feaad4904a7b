"""Task 5: advantages and the clipped objective, against loops; and in which direction a gradient is cut."""

import pytest
import torch

import grace


def close(actual, expected):
    torch.testing.assert_close(actual, torch.tensor(expected, dtype=torch.float64), rtol=1e-10, atol=1e-10)


@pytest.mark.points(1)
def test_advantages_are_eq18(rand):
    R = rand(5, 4) * torch.tensor([[1e-3], [1.0], [10.0], [1.0], [0.0]], dtype=torch.float64)
    before = R.clone()
    close(grace.advantages(R), [[float(x) - sum(map(float, row)) / 4 for x in row] for row in R])
    assert torch.equal(R, before), "the rewards were edited in place"


@pytest.mark.points(1)
def test_normalized_advantages_are_eq7(rand):
    R = rand(5, 4)
    expected = (R - R.mean(1, keepdim=True)) / R.std(1, keepdim=True, correction=0)
    torch.testing.assert_close(grace.advantages(R, normalize=True), expected, rtol=1e-3, atol=1e-3)
    assert torch.isfinite(grace.advantages(torch.ones(2, 3), normalize=True)).all(), "equal rewards"


@pytest.fixture
def batch(rand, generator):
    """Log-probabilities, old ones, advantages, and a mask of unequal lengths; ratios on both sides of the clip."""
    old = -rand(4, 3, 5).abs()
    lengths = torch.randint(1, 6, (4, 3), generator=generator)
    lengths[0, 0], lengths[0, 1] = 1, 5
    mask = (torch.arange(5) < lengths[..., None]).long()
    return old + 0.4 * rand(4, 3, 5), old, rand(4, 3), mask


def eq8_by_loop(logprobs, old, A, mask, low, high, by_length):
    table = []
    for i in range(4):
        row = []
        for k in range(3):
            total, count = 0.0, 0
            for t in range(5):
                if mask[i, k, t]:
                    ratio = float((logprobs[i, k, t] - old[i, k, t]).exp())
                    total += min(ratio * float(A[i, k]), min(max(ratio, 1 - low), 1 + high) * float(A[i, k]))
                    count += 1
            row.append(total / count if by_length else total)
        table.append(row)
    return table


@pytest.mark.points(1)
def test_masked_mean(batch):
    x, _, _, mask = batch
    expected = [[float(x[i, k][mask[i, k].bool()].mean()) for k in range(3)] for i in range(4)]
    close(grace.masked_mean(x, mask), expected)
    close(grace.masked_mean(x.masked_fill(mask == 0, 3.0), mask), expected)


@pytest.mark.points(3)
@pytest.mark.parametrize("by_length", [True, False])
@pytest.mark.parametrize("low, high", [(0.2, None), (0.1, 0.3)])
def test_clipped_objective_is_eq8(batch, by_length, low, high):
    logprobs, old, A, mask = batch
    value = grace.clipped_objective(logprobs, old, A, mask, low, by_length, high)
    close(value, eq8_by_loop(logprobs, old, A, mask, low, high or low, by_length))
    with torch.no_grad():
        garbage = logprobs.masked_fill(mask == 0, 3.0)
    close(grace.clipped_objective(garbage, old, A, mask, low, by_length, high), value.tolist())


@pytest.mark.points(2)
def test_only_a_move_in_the_wanted_direction_is_clipped():
    """Ratios 0.5, 1 and 2, eps 0.2: a good rollout stops being pushed up at 1.2, a bad one down at 0.8."""
    logprobs = torch.tensor([0.5, 1.0, 2.0], dtype=torch.float64).log().view(1, 1, 3).requires_grad_()
    old, mask = torch.zeros(1, 1, 3, dtype=torch.float64), torch.ones(1, 1, 3)
    for A, expected in ((1.0, [0.5, 1.0, 0.0]), (-1.0, [0.0, -1.0, -2.0])):
        A = torch.tensor([[A]], dtype=torch.float64)
        value = grace.clipped_objective(logprobs, old, A, mask, 0.2, length_normalize=False).sum()
        close(torch.autograd.grad(value, logprobs)[0][0, 0], expected)


@pytest.mark.points(1)
def test_where_nothing_has_moved_the_gradient_is_eq19s(batch):
    _, old, A, mask = batch
    logprobs = old.clone().requires_grad_()
    value = grace.clipped_objective(logprobs, old, A, mask, 0.2, length_normalize=False).sum()
    torch.testing.assert_close(torch.autograd.grad(value, logprobs)[0], A[..., None] * mask)


@pytest.mark.points(1)
def test_kl_k3(batch):
    logprobs, reference, _, mask = batch
    token = lambda a, b: float((b - a).exp() - 1 - (b - a))
    mean = lambda i, k: (
        sum(token(logprobs[i, k, t], reference[i, k, t]) for t in range(5) if mask[i, k, t]) / int(mask[i, k].sum())
    )
    expected = [[mean(i, k) for k in range(3)] for i in range(4)]
    close(grace.kl_k3(logprobs, reference, mask), expected)
    close(grace.kl_k3(logprobs.masked_fill(mask == 0, 3.0), reference, mask), expected)
    assert torch.autograd.gradcheck(lambda x: grace.kl_k3(x, reference, mask), logprobs.requires_grad_())
