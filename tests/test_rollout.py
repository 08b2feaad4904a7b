"""What the decoding loop captures, against a full forward pass without padding and without a cache."""

import pytest
import torch
from conftest import ARCHITECTURES, ROWS, SMALL, TEXTS, by_full_forward, config, gradient, rolled

from evaluation.encoder import encode_texts
from evaluation.signs import describe, effective_rank
from pool import POOLS
from rollout import (
    Rollouts,
    draw,
    invert,
    join,
    make_batch,
    roll_out,
    sample,
    sample_in_parts,
    score,
    split_by_role,
    token_logprobs,
    uniforms,
)

TENSORS = ("prompt_ids", "prompt_mask", "counted", "ids", "mask", "logprobs", "embeddings", "finished", "prompt_embeddings")


def assert_same(one, two):
    """Two `Rollouts` are equal: ids and masks exactly, log-probabilities and embeddings but for rounding."""
    for name in TENSORS:
        torch.testing.assert_close(getattr(one, name), getattr(two, name), rtol=1e-5, atol=1e-5)
    assert (one.n_shared, one.n_cut) == (two.n_shared, two.n_cut)


# ---------------------------------------------------------------- sampling


@pytest.mark.parametrize("architecture", SMALL)
def test_captured_equals_full_forward(make_policy, architecture):
    policy = make_policy(architecture)
    rollouts = rolled(policy, temperature=0.7)
    assert (rollouts.n_shared == 0) == (architecture == "Gemma2")  # its sliding windows forbid it
    assert rollouts.prompt_mask.sum(1).unique().numel() > 1  # unequal lengths: padding is at work
    assert rollouts.mask.sum(-1).unique().numel() > 1  # rows have left the batch at different steps
    with torch.no_grad():
        for n in range(len(TEXTS)):
            for k in range(3):
                logprobs, h = by_full_forward(policy, rollouts, n, k, 0.7)
                captured = rollouts.logprobs[n, k][rollouts.mask[n, k].bool()]
                torch.testing.assert_close(captured, logprobs, rtol=1e-5, atol=1e-5)
                torch.testing.assert_close(rollouts.embeddings[n, k], h, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("pooling", POOLS)
def test_every_pooling_is_captured(make_policy, pooling):
    policy = make_policy(pooling=pooling)
    rollouts = rolled(policy)
    with torch.no_grad():
        scores = score(policy, rollouts)
        for captured in (rollouts, scores):
            for n in range(len(TEXTS)):
                (_, whole), (_, prompt) = (by_full_forward(policy, rollouts, n, k) for k in (1, None))
                torch.testing.assert_close(captured.embeddings[n, 1], whole, rtol=1e-5, atol=1e-5)
                torch.testing.assert_close(captured.prompt_embeddings[n], prompt, rtol=1e-5, atol=1e-5)


def test_rows_end_at_any_end_token(make_policy):
    policy = make_policy(max_new_tokens=6)
    assert len(policy.end_ids) > 20
    rollouts = rolled(policy, K=8)
    assert rollouts.finished.any() and not rollouts.finished.all()
    for ids, mask, finished in zip(rollouts.ids.flatten(0, 1), rollouts.mask.flatten(0, 1), rollouts.finished.flatten()):
        ends = torch.isin(ids[mask.bool()], policy.end_ids)
        assert not ends[:-1].any() and bool(ends[-1]) == bool(finished)  # the end token is kept, and is last
        assert finished or int(mask.sum()) == 6


def test_draw_follows_the_softmax():
    logits = torch.tensor([[0.0, 1.0, 2.0, -torch.inf, 0.5]]).expand(200_000, 5)
    token, logprob = draw(logits, 0.7, uniforms(0, 200_000))
    p = torch.softmax(logits[0].double() / 0.7, 0)
    share = torch.bincount(token, minlength=5) / len(token)
    assert share[3] == 0
    assert (share - p).abs().max() < 4 * (0.25 / len(token)) ** 0.5
    torch.testing.assert_close(logprob.double(), p[token].log(), rtol=1e-5, atol=1e-6)
    token, logprob = draw(logits[:1], 0.0)
    assert token.item() == 2 and logprob.item() == pytest.approx(float(torch.log_softmax(logits[0], -1)[2]))


@pytest.mark.parametrize("V", [7, 512, 513, 5000])
def test_a_draw_is_the_inverse_transform(V):
    """The place where the running sum passes the random number, as float64 finds it, in one step or in two."""
    torch.manual_seed(0)
    p = torch.softmax(5 * torch.randn(400, V), -1)
    p[:, 2] = 0
    u = uniforms(1, 400)[:, None]
    below = p.double().cumsum(-1)
    exact = torch.searchsorted(below, u * below[:, -1:], right=True)
    near = [torch.searchsorted(below, (u + e) * below[:, -1:], right=True).clamp(max=V - 1) for e in (-2e-6, 2e-6)]
    place = invert(p, u)
    assert (place == exact).float().mean() > 0.99 and ((near[0] <= place) & (place <= near[1])).all()
    assert (p.gather(1, place) > 0).all()


def test_a_draw_has_weight_at_both_ends():
    """A share that rounding has made 0 or 1, as of a block's own weight, is the first or the last place with any weight."""
    for V in (40, 40_000):
        weights = torch.zeros(2000, V)
        weights[:, 9:-9] = torch.rand(2000, V - 18, generator=torch.Generator().manual_seed(0)) + 0.1
        for share, place in ((0.0, 9), (1 - 2**-24, V - 10), (1.0, V - 10)):
            drawn = invert(weights, torch.full((2000, 1), share))
            assert (weights.gather(1, drawn) > 0).all() and (drawn - place).abs().max() <= V * 1e-6


def test_uniforms():
    """In [0, 1), even, the same by seed; a list of integers is a seed of its own."""
    numbers = uniforms([3, 1], 100, 200)
    assert numbers.shape == (100, 200) and numbers.dtype == torch.float32
    assert numbers.min() >= 0 and numbers.max() < 1 and (numbers < 0.25).float().mean() == pytest.approx(0.25, abs=0.02)
    assert torch.equal(numbers, uniforms([3, 1], 100, 200)) and not torch.equal(numbers, uniforms([3, 2], 100, 200))


def test_seeds_repeat_and_differ(make_policy):
    policy = make_policy()
    assert torch.equal(rolled(policy, seed=3).ids, rolled(policy, seed=3).ids)
    assert not torch.equal(rolled(policy, seed=3).ids, rolled(policy, seed=4).ids)


def test_every_rollout_draws_its_own_number(make_policy):
    """With the same numbers it draws the same tokens, whatever texts and rollouts stand beside it."""
    policy = make_policy()
    uniform = uniforms(0, 3, 4, 6)
    whole = sample(policy, policy.prompts(TEXTS), 4, 1.0, uniform)
    for n in range(3):
        alone = sample(policy, policy.prompts(TEXTS[n : n + 1]), 2, 1.0, uniform[n : n + 1, 1:3])
        T = alone.ids.shape[2]
        assert torch.equal(alone.ids[0], whole.ids[n, 1:3, :T])
        torch.testing.assert_close(alone.embeddings[0], whole.embeddings[n, 1:3], rtol=1e-5, atol=1e-5)


# ---------------------------------------------------------------- parts of a batch


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_sampling_in_parts(make_policy, monkeypatch, temperature):
    """The same rollouts, with less in the cache at a time; parts whose longest rationales differ are padded."""
    policy, uniform, parts = make_policy(), uniforms(0, 3, 2, 6), []
    monkeypatch.setattr("rollout.join", lambda *args: parts.extend(args[0]) or join(*args))
    prompts = policy.prompts(TEXTS)
    whole = sample_in_parts(policy, prompts, 2, temperature, uniform, 10**6)
    assert len(parts) == 1
    parts.clear()
    assert_same(sample_in_parts(policy, prompts, 2, temperature, uniform, 1), whole)
    assert len(parts) == 3 and len({part.ids.shape[2] for part in parts}) > 1
    assert whole.n_shared == 5


def test_join():
    """Two parts of unequal T, by hand; prompts, and what is counted of them, are the whole batch's."""

    def part(ids, mask):
        ids, mask = torch.tensor(ids), torch.tensor(mask)
        N, K, _ = ids.shape
        h, finished = ids[:, :, :1] * torch.ones(2), mask[..., -1] == 0
        prompts = torch.zeros(N, 4, dtype=torch.long)
        return Rollouts(prompts, prompts, prompts, ids, mask, -ids / 10, h, finished, 2 * h[:, 0])

    class Prompts:
        ids, mask, counted = (torch.arange(12).view(3, 4) + i for i in range(3))
        n_shared, n_cut = 2, 1

    one, two = (
        part([[[5], [6]]], [[[1], [1]]]),
        part([[[7, 8], [9, 0]], [[1, 2], [3, 4]]], [[[1, 1], [1, 0]], [[1, 1], [1, 1]]]),
    )
    rollouts = join([one, two], [slice(0, 1), slice(1, 3)], Prompts)
    assert rollouts.ids.tolist() == [[[5, 0], [6, 0]], [[7, 8], [9, 0]], [[1, 2], [3, 4]]]
    assert rollouts.mask.tolist() == [[[1, 0], [1, 0]], [[1, 1], [1, 0]], [[1, 1], [1, 1]]]
    assert rollouts.logprobs.tolist() == (-rollouts.ids / 10).tolist()
    assert rollouts.embeddings[:, :, 0].tolist() == [[5, 6], [7, 9], [1, 3]]
    assert rollouts.finished.tolist() == [[False, False], [False, True], [False, False]]
    assert rollouts.prompt_embeddings[:, 0].tolist() == [10, 14, 2]
    assert torch.equal(rollouts.prompt_ids, Prompts.ids) and torch.equal(rollouts.prompt_mask, Prompts.mask)
    assert torch.equal(rollouts.counted, Prompts.counted) and (rollouts.n_shared, rollouts.n_cut) == (2, 1)
    assert len(rollouts) == 3 and rollouts.rationales() == [[[5], [6]], [[7, 8], [9]], [[1, 2], [3, 4]]]
    dealt = join([two, one], [slice(0, None, 2), slice(1, None, 2)], Prompts)  # as two ranks share them out
    assert dealt.rationales() == [[[7, 8], [9]], [[5], [6]], [[1, 2], [3, 4]]]
    assert dealt.finished.tolist() == [[False, True], [False, False], [False, False]]


def test_selected_groups(make_policy):
    """A part of the rollouts has no padding that none of it needs, and scores as the whole does."""
    policy = make_policy()
    rollouts = rolled(policy, temperature=0.0)
    part = rollouts[torch.tensor([1])]  # the shortest text, and not the longest rationale
    assert part.prompt_ids.shape[1] == int(rollouts.prompt_mask[1].sum()) < rollouts.prompt_ids.shape[1]
    assert part.ids.shape[2] == int(rollouts.mask[1].sum(-1).max()) < rollouts.ids.shape[2]
    with torch.no_grad():
        whole, some = score(policy, rollouts), score(policy, part)
    torch.testing.assert_close(some.logprobs[0], whole.logprobs[1, :, : some.logprobs.shape[2]], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(some.embeddings[0], whole.embeddings[1], rtol=1e-5, atol=1e-5)


# ---------------------------------------------------------------- roles


def test_roles_get_their_texts_embeddings(make_policy):
    """Each embedding of `roll_out` is that of its role's text, negatives by instance."""
    policy = make_policy()
    rows = [{**row, "negative": [*row["negative"], f"{row['query']} ."]} for row in ROWS]
    batch = make_batch(rows)
    settings = config(train_roles="positive", reward="infonce", anchor_temperature=0.0)
    rollouts, embeddings, prompts, _ = roll_out(policy, batch.texts, settings, step=0, budget=10**6)
    assert {role: x.shape[:-1] for role, x in embeddings.items()} == {
        "positive": (4, 3),
        "query": (4, 1),
        "negative": (4, 2, 1),
    }
    assert {role: x.shape[:-1] for role, x in prompts.items()} == {"positive": (4, 1), "query": (4, 1), "negative": (4, 2, 1)}
    torch.testing.assert_close(embeddings["positive"], rollouts.embeddings)
    torch.testing.assert_close(prompts["positive"][:, 0], rollouts.prompt_embeddings)
    for i, row in enumerate(rows):
        for by_role, how in ((embeddings, {}), (prompts, dict(rationale=False))):
            texts, h = [row["query"], *row["negative"]], [by_role["query"][i, 0], *by_role["negative"][i, :, 0]]
            alone = torch.from_numpy(encode_texts(policy, texts, **how).vectors)
            torch.testing.assert_close(torch.stack(h), alone, rtol=1e-5, atol=1e-5)


def test_roles_without_texts(make_policy):
    """M = 0: an empty sum over negatives."""
    policy = make_policy()
    batch = make_batch([{**row, "negative": []} for row in ROWS])
    _, embeddings, prompts, _ = roll_out(policy, batch.texts, config(), step=0, budget=10**6)
    assert embeddings["negative"].shape[:3] == prompts["negative"].shape[:3] == (4, 0, 1)
    parts = split_by_role(torch.arange(6.0)[:, None], {"query": "ab", "negative": "cdef"}, ["query", "negative"])
    assert parts["query"][:, 0].tolist() == [0, 1] and parts["negative"][..., 0].tolist() == [[2, 3], [4, 5]]


def test_a_step_has_its_own_draws(make_policy):
    """A function of seed and step, the same under any budget."""
    policy, texts = make_policy(), make_batch(ROWS).texts
    drawn = lambda step, budget=10**6, **more: roll_out(policy, texts, config(**more), step, budget)[0]
    assert_same(drawn(1), drawn(1, budget=1))
    assert not torch.equal(drawn(1).ids, drawn(2).ids) and not torch.equal(drawn(1).ids, drawn(1, seed=1).ids)


# ---------------------------------------------------------------- scoring


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_score_and_its_gradient(make_policy, architecture):
    """One prefill per prompt, its cache repeated: the same numbers and the same gradients as full rows."""
    policy = make_policy(architecture, double=True)
    rollouts = rolled(policy, K=2)
    weight = torch.randn(2, 3, 2, 16, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    scores = score(policy, rollouts, text=True)
    T, D = scores.logprobs.shape[2], 16
    of_tokens, of_states = (scores.logprobs * weight[0, :, :, :T]).sum(), (scores.embeddings[..., :D] * weight[1]).sum()
    shared = gradient(policy, of_tokens + of_states + (scores.text_logprobs * weight[0, :, 0, 0]).sum())
    total = 0
    for n in range(3):
        at = rollouts.counted[n].nonzero()[1:, 0]  # tokens whose predecessor counts too
        ids = rollouts.prompt_ids[n][rollouts.prompt_mask[n].bool()]
        at = at - (rollouts.prompt_mask[n] == 0).sum()
        text = torch.log_softmax(policy.model(input_ids=ids[None]).logits[0], -1)[at - 1, ids[at]].mean()
        torch.testing.assert_close(scores.text_logprobs[n], text, rtol=1e-6, atol=1e-6)
        total = total + text * weight[0, n, 0, 0]
        for k in range(2):
            logprobs, h = by_full_forward(policy, rollouts, n, k)
            torch.testing.assert_close(scores.logprobs[n, k, : len(logprobs)], logprobs, rtol=1e-9, atol=1e-9)
            total = total + (logprobs * weight[0, n, k, : len(logprobs)]).sum() + (h[:D] * weight[1, n, k]).sum()
    full = gradient(policy, total)
    assert (shared - full).norm() < 1e-6 * full.norm()  # some architectures normalize in float32, whatever the weights


def test_the_ratio_starts_at_one(make_policy):
    policy = make_policy("Qwen2")
    rollouts = rolled(policy, K=4, temperature=0.6)
    with torch.no_grad():
        logprobs, other = (score(policy, rollouts, temperature).logprobs for temperature in (0.6, 1.0))
    assert ((logprobs - rollouts.logprobs).exp() * rollouts.mask - rollouts.mask).abs().max() < 1e-5
    assert (other - rollouts.logprobs).abs().max() > 0.01  # a temperature forgotten would show


def test_chunked_logprobs(make_policy):
    """They equal the whole, with gradients."""
    policy = make_policy("Gemma2")  # soft-capped logits
    hidden = torch.randn(11, 32, requires_grad=True)
    ids = torch.randint(0, 100, (11,))
    whole = torch.log_softmax(policy.logits(hidden), -1).gather(1, ids[:, None])[:, 0]
    chunked = token_logprobs(policy, hidden, ids, chunk=4)
    torch.testing.assert_close(chunked, whole)
    one, two = (torch.autograd.grad(x.square().sum(), hidden)[0] for x in (whole, chunked))
    torch.testing.assert_close(one, two)


# ---------------------------------------------------------------- what a batch looks like


def test_effective_rank():
    assert float(effective_rank(torch.eye(5))) == pytest.approx(5, rel=1e-4)
    assert float(effective_rank(torch.ones(5, 5))) == pytest.approx(1, abs=1e-3)


def test_groups_that_cannot_teach_are_counted(make_policy):
    rollouts = rolled(make_policy(), [row["query"] for row in ROWS])
    N, K, _ = rollouts.ids.shape
    rollouts.ids[0], rollouts.mask[0] = rollouts.ids[0, :1], rollouts.mask[0, :1]  # all identical
    rollouts.finished[:] = True
    rollouts.finished[1] = False  # all truncated
    rollouts.finished[2, 0] = False  # only one of them
    rollouts.mask[2:] = 1
    rollouts.ids[3] = torch.arange(K)[:, None] + 7
    rollouts.mask[3, 1, 1:] = 0  # the end token alone
    rollouts.mask[0] = 1
    R = torch.rand(N, K)
    R[3] = 0.25
    stats = {name: float(x) for name, x in describe(rollouts, R, {}).items()}
    assert (stats["all_identical"], stats["all_truncated"], stats["no_spread"]) == (1 / 4, 1 / 4, 1 / 4)
    assert stats["empty"] == pytest.approx(1 / 12)
