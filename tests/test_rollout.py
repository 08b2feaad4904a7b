"""What the decoding loop captures, against a full forward pass without padding and without a cache."""

from dataclasses import fields

import pytest
import torch
from conftest import ROWS, SMALL, TEXTS, by_full_forward, config, embedded, rolled

import rollout
from evaluation.signs import batch_metrics, effective_rank
from pool import POOLS
from rollout import draw, make_batch, roll_out, sample, sample_texts, score, split_by_role, token_logprobs, uniforms

# ---------------------------------------------------------------- sampling


@pytest.mark.parametrize("architecture, pooling", [*((name, "mean") for name in SMALL), *(("Llama", how) for how in POOLS[1:])])
def test_captured_equals_full_forward(make_policy, architecture, pooling):
    """Every log-probability and embedding, as sampled and as scored. The gradient of that is held in test_grace.py."""
    policy = make_policy(architecture, pooling=pooling)
    rollouts = rolled(policy, temperature=0.7)
    shared = architecture not in ("Gemma2", "Mpt")  # sliding windows, soft-capped scores, and places in the row forbid it
    assert (rollouts.n_shared > 0) == policy.shares_prompts == shared
    assert rollouts.prompt_mask.sum(1).unique().numel() > 1  # unequal lengths: padding is at work
    assert rollouts.mask.sum(-1).unique().numel() > 1  # rows have left the batch at different steps
    close = dict(rtol=1e-5, atol=1e-5)
    with torch.no_grad():
        scores = score(policy, rollouts, 0.7)
        for n, text in enumerate(TEXTS):
            torch.testing.assert_close(scores.text_logprobs[n].double(), embedded(policy, text)[1], **close)
            for captured in (rollouts, scores):
                _, h = by_full_forward(policy, rollouts, n, None)
                torch.testing.assert_close(captured.prompt_embeddings[n], h, **close)
                for k in range(3):
                    logprobs, h = by_full_forward(policy, rollouts, n, k, 0.7)
                    recorded = captured.logprobs[n, k][rollouts.mask[n, k].bool()]
                    torch.testing.assert_close(recorded, logprobs, **close)
                    torch.testing.assert_close(captured.embeddings[n, k], h, **close)


@pytest.mark.parametrize("V", [7, 110, 512])
def test_a_draw_follows_the_softmax(V):
    """Over 100,000 draws (chi-square, four standard deviations); what cannot be drawn never is; greedy is the largest."""
    torch.manual_seed(V)
    logits, n = 2 * torch.randn(V), 100_000
    logits[V // 2] = -torch.inf
    p = torch.softmax(logits.double() / 0.7, -1)
    uniform, counts = uniforms(V, n), torch.zeros(V, dtype=torch.double)
    for u in uniform.split(10_000):
        token, logprob = draw(logits.expand(len(u), V), 0.7, u)
        counts += torch.bincount(token, minlength=V)
        torch.testing.assert_close(logprob.double(), p[token].log(), rtol=1e-5, atol=1e-5)
    assert counts[V // 2] == 0
    often = p * n > 10
    chi_square, freedom = ((counts - p * n) ** 2 / (p * n))[often].sum(), int(often.sum()) - 1
    assert abs(chi_square - freedom) < 4 * (2 * freedom) ** 0.5
    token, logprob = draw(logits[None], 0.0)
    assert token == logits.argmax() and logprob.item() == pytest.approx(torch.log_softmax(logits.double(), -1).max().item())


def test_rounding_turns_no_draw():
    """At a real vocabulary. Between two batches logits differ by 1e-6; here a hundred times as much gives the same tokens."""
    torch.manual_seed(0)
    logits, u = 2.2 * torch.randn(200, 49_152), uniforms(5, 200)
    other = logits + 1e-4 * torch.randn_like(logits)
    assert torch.equal(draw(logits, 1.0, u)[0], draw(other, 1.0, u)[0])


def test_noise_is_finite():
    """From numbers in (0, 1), also at both ends of what `uniforms` gives."""
    x = rollout.hashed(torch.cat([uniforms(0, 50_000), torch.tensor([0.0, 1 - 2**-24])]), 12)
    assert x.min() > 0 and x.max() < 1 and torch.isfinite(-(-x.log()).log()).all()


# ---------------------------------------------------------------- parts of a batch


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_sampling_in_parts(make_policy, monkeypatch, temperature):
    """The same rollouts, with less in the cache at a time; parts whose longest rationales differ are padded."""
    policy, parts = make_policy(), []
    sampled = lambda budget: sample_texts(policy, TEXTS, 2, temperature, [3, 1], budget)
    monkeypatch.setattr(rollout, "sample", lambda *args: parts.append(sample(*args)) or parts[-1])
    whole = sampled(10**6)
    assert len(parts) == 1
    parts.clear()
    one_by_one = sampled(1)
    for field in fields(whole):
        torch.testing.assert_close(getattr(one_by_one, field.name), getattr(whole, field.name), rtol=1e-5, atol=1e-5)
    assert len(parts) == 3 and len({part.ids.shape[2] for part in parts}) > 1
    P = whole.prompt_ids.shape[1]
    parts.clear()
    sampled((P + 2 * 6) * 2 // rollout.NO_GRADIENTS + 1)  # room for two of the texts
    assert [len(part) for part in parts] == [2, 1]


# ---------------------------------------------------------------- roles


def test_shared_texts_are_found():
    rows = [dict(row) for row in ROWS]
    rows[2]["positive"] = rows[0]["positive"]
    rows[3]["query"] = rows[1]["positive"]  # one's query, another's positive
    batch = make_batch(rows)
    assert batch.texts["negative"] == [n for row in rows for n in row["negative"]]
    expected = torch.eye(4, dtype=torch.bool)
    expected[0, 2] = expected[2, 0] = expected[1, 3] = expected[3, 1] = True
    assert torch.equal(batch.same_text, expected)
    batch = make_batch([{"text": "a"}, {"text": "b"}, {"text": "a"}], anchored=True)
    assert batch.texts["anchor"] == batch.texts["text"] and batch.same_text.sum() == 5


@pytest.mark.parametrize("mode", ["supervised", "unsupervised"])
def test_rollouts_and_anchors_are_eq12_and_eq20(make_policy, mode):
    """A text at a time in float64: K rollouts of the trained role, one of each other text as an anchor."""
    policy, given = make_policy("GPT2", double=True), config(recipe="paper", mode=mode, seed=5)
    rows = [{**row, "negative": [*row["negative"], f"{row['query']} ."]} for row in ROWS]
    if mode == "unsupervised":
        rows = [{"text": row["query"]} for row in rows]
    texts = make_batch(rows, anchored=True).texts
    trained, *anchors = ["positive", "query", "negative"] if mode == "supervised" else ["text", "anchor"]
    rollouts, embeddings, prompts = roll_out(policy, texts, given, step=7)
    assert torch.equal(embeddings[trained], rollouts.embeddings)
    for roles, K, temperature, stream in (([trained], 3, 1.0, 1), (anchors, 1, 0.5, 2)):
        every = [text for role in roles for text in texts[role]]
        uniform = uniforms([5, 7, stream], len(every), K, 6)
        alone = [sample(policy, policy.template([x]), K, temperature, uniform[i : i + 1]) for i, x in enumerate(every)]
        h, h_prompt = (torch.cat([getattr(x, name) for x in alone]) for name in ("embeddings", "prompt_embeddings"))
        for role, own in split_by_role(h, texts, roles).items():
            torch.testing.assert_close(embeddings[role], own, rtol=0, atol=1e-9)
        for role, own in split_by_role(h_prompt, texts, roles).items():
            torch.testing.assert_close(prompts[role].squeeze(-2), own, rtol=0, atol=1e-9)


# ---------------------------------------------------------------- scoring


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
    rollouts.mask[:], rollouts.finished[:] = 1, True
    rollouts.mask[3, 1, 1:] = 0  # the end token alone
    R = torch.arange(12.0).view(4, 3)
    R[3] = 0.25
    stats = batch_metrics(rollouts, R, {})
    assert stats["no_spread"] == 1 / 4 and stats["empty"] == pytest.approx(1 / 12)
