"""The objective and its gradient against oracles; a step on every architecture; whole runs and bad input."""

import copy
import itertools
import json
import math
import os
import subprocess
import sys

import pytest
import torch
import transformers
from conftest import (
    ARCHITECTURES,
    ROWS,
    adapted,
    build,
    command,
    config,
    descent,
    embedded,
    gradient,
    infonce_terms,
    start,
    weights,
)

import grace
from evaluation.page import finish_page
from grace import Trainer, advantages, clipped_objective, judge, kl_k2, kl_k3, masked_mean
from plumbing.data import open_dataset
from policy import Policy
from prompt import Reading
from reward import infonce, paper_components
from rollout import make_batch, sample, score, uniforms

# ---------------------------------------------------------------- advantage, objective, KL


def test_advantages():
    R = torch.tensor([[1.0, 2.0, 6.0], [0.5, 0.5, 0.5]])
    torch.testing.assert_close(advantages(R), torch.tensor([[-2.0, -1.0, 3.0], [0.0, 0.0, 0.0]]))
    scale = math.sqrt((4 + 1 + 9) / 3)
    normalized = torch.tensor([[-2 / scale, -1 / scale, 3 / scale], [0.0, 0.0, 0.0]])
    torch.testing.assert_close(advantages(R, normalize=True), normalized, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("length_normalize", [True, False])
def test_clipped_objective_is_eq8(length_normalize):
    torch.manual_seed(0)
    new, old = torch.randn(2, 3, 5, dtype=torch.float64) * 0.3, torch.randn(2, 3, 5, dtype=torch.float64) * 0.3
    A, lengths, eps = torch.randn(2, 3, dtype=torch.float64), [[5, 2, 1], [3, 4, 5]], 0.2
    mask = torch.tensor([[[int(t < n) for t in range(5)] for n in row] for row in lengths])
    values = clipped_objective(new, old, A, mask, eps, length_normalize)
    clipped = 0
    for i, k in itertools.product(range(2), range(3)):
        total = 0.0
        for t in range(lengths[i][k]):
            ratio = math.exp(new[i, k, t] - old[i, k, t])
            bounded = min(max(ratio, 1 - eps), 1 + eps)
            clipped += bounded != ratio
            total += min(ratio * float(A[i, k]), bounded * float(A[i, k]))
        assert float(values[i, k]) == pytest.approx(total / (lengths[i][k] if length_normalize else 1), abs=1e-12)
    assert clipped > 5  # the clip is at work


@pytest.mark.parametrize("ratio, A, slope", [(1.0, 1, 1), (1.5, 1, 0), (1.5, -1, -1.5), (0.5, -1, 0), (0.5, 1, 0.5)])
def test_which_side_is_clipped(ratio, A, slope):
    new = torch.tensor([[[math.log(ratio)]]], dtype=torch.float64, requires_grad=True)
    value = clipped_objective(new, torch.zeros_like(new), torch.tensor([[float(A)]]), torch.ones(1, 1, 1), 0.2)
    assert float(torch.autograd.grad(value.sum(), new)[0]) == pytest.approx(slope)


@pytest.mark.parametrize("estimator", [kl_k2, kl_k3])
def test_whose_gradient_the_kl_term_has(estimator):
    """By enumeration: on the policy's samples k2 has the gradient of KL(policy || reference), k3 that of the other one."""
    torch.manual_seed(0)
    logits = torch.randn(7, dtype=torch.float64, requires_grad=True)
    p, q = torch.log_softmax(logits, 0), torch.log_softmax(torch.randn(7, dtype=torch.float64), 0)
    per_token = estimator(p.view(7, 1, 1), q.view(7, 1, 1), torch.ones(7, 1, 1))[:, 0]
    probability = p.detach().exp()
    (sampled,) = torch.autograd.grad(probability @ per_token, logits, retain_graph=True)
    (forward,) = torch.autograd.grad(q.exp() @ (q - p), logits, retain_graph=True)
    (reverse,) = torch.autograd.grad(p.exp() @ (p - q), logits)
    expected, other = (reverse, forward) if estimator is kl_k2 else (forward, reverse)
    torch.testing.assert_close(sampled, expected)
    assert (sampled - other).norm() > 0.1 * other.norm()
    assert estimator(p.view(1, 1, 7), p.view(1, 1, 7), torch.ones(1, 1, 7)).item() == 0
    if estimator is kl_k3:  # and k3's own mean is KL(policy || reference)
        torch.testing.assert_close(probability @ per_token, probability @ (p - q))


def test_masked_mean():
    x, mask = torch.tensor([[1.0, 3.0, 50.0], [7.0, 50.0, 50.0]]), torch.tensor([[1, 1, 0], [1, 0, 0]])
    assert masked_mean(x, mask).tolist() == [2.0, 7.0]


# ---------------------------------------------------------------- what can teach, and what cannot


def embeddings(B, K, M, D=8):
    torch.manual_seed(1)
    make = lambda *shape: torch.nn.functional.normalize(torch.randn(*shape, D, dtype=torch.float64), dim=-1)
    return {"query": make(B, 1), "positive": make(B, K), "negative": make(B, M, 1)}


def paper_advantages(roles, hard=0.2):
    given = config(recipe="paper", lambda_hard=hard)
    K = roles["positive"].shape[1]
    finished = torch.ones(len(roles["query"]), K, dtype=torch.bool)
    R, components, _ = judge(roles, finished, torch.eye(len(finished), dtype=torch.bool), given)
    return advantages(R), components


def test_negatives_and_eq15_cancel():
    """Under the paper's reward neither moves an advantage."""
    roles = embeddings(4, 3, 2)
    before, components = paper_advantages(roles)
    moved, _ = paper_advantages({**roles, "negative": embeddings(5, 3, 2)["negative"][1:]}, hard=1.0)
    torch.testing.assert_close(moved, before, rtol=0, atol=1e-12)
    assert before.abs().max() > 0.1
    assert components["hard"].std(1).max() == 0


def test_under_infonce_they_move_advantages():
    """A hard negative those of its own instance, another instance's texts those of others, too."""
    roles, given = embeddings(4, 3, 2), config(train_roles="query,positive", lambda_hard=0.0, lambda_consistency=0.0)
    roles["query"] = embeddings(4, 3, 2)["positive"].roll(1, 0)
    finished, twins = torch.ones(8, 3, dtype=torch.bool), torch.eye(4, dtype=torch.bool)
    before = advantages(judge(roles, finished, twins, given)[0])
    other = torch.nn.functional.normalize(torch.randn(3, 8, dtype=torch.float64), dim=-1)
    negative, positive = roles["negative"].clone(), roles["positive"].clone()
    negative[0], positive[3] = other[:2, None], other
    by_negative = advantages(judge({**roles, "negative": negative}, finished, twins, given)[0]) - before
    by_instance = advantages(judge({**roles, "positive": positive}, finished, twins, given)[0]) - before
    assert by_negative[0].abs().max() > 0.05 and by_negative[1:].abs().max() == 0
    assert by_instance[0].abs().max() > 0.05


def test_rewards_gradient():
    """judge's g against the same sum of rewards written out, and no gradient for roles that are constants."""
    roles, given = embeddings(4, 3, 1), config(train_roles="positive", lambda_consistency=0.0, lambda_hard=0.0, tau=2.0)
    finished, twins = torch.ones(4, 3, dtype=torch.bool), torch.eye(4, dtype=torch.bool)
    R, _, g = judge(roles, finished, twins, given)
    p = roles["positive"].clone().requires_grad_()
    written_out = infonce(p, roles["query"], given.infonce_temperature) / 2.0
    torch.testing.assert_close(R, written_out.detach())
    torch.testing.assert_close(g, torch.autograd.grad(written_out.sum(), p)[0])


def test_twins_are_found():
    rows = copy.deepcopy(ROWS)
    rows[2]["positive"] = rows[0]["positive"]
    rows[3]["query"] = rows[1]["positive"]  # one's query, another's positive
    batch = make_batch(rows)
    assert batch.texts["negative"] == [n for row in rows for n in row["negative"]]
    expected = torch.eye(4, dtype=torch.bool)
    expected[0, 2] = expected[2, 0] = expected[1, 3] = expected[3, 1] = True
    assert torch.equal(batch.twins, expected)
    batch = make_batch([{"text": "a"}, {"text": "b"}, {"text": "a"}], anchored=True)
    assert batch.texts["anchor"] == batch.texts["text"] and batch.twins.sum() == 5


# ---------------------------------------------------------------- the full gradient, by enumeration


both_ways = pytest.mark.parametrize("lora", [None, 2], ids=["weights", "adapters"])  # what is trained


@pytest.fixture
def enumerable(lora):
    """A float64 policy over four tokens and rationales of at most two: thirteen rationales in all."""
    from tokenizers import Tokenizer, models, pre_tokenizers

    core = Tokenizer(models.WordLevel({"a": 0, "b": 1, "c": 2, "<end>": 3}, unk_token="c"))
    core.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=core, eos_token="<end>", unk_token="c")
    model = build("GPT2", 4, eos_token_id=3).double()
    policy = Policy(model, tokenizer, Reading("a", 32, 2))
    policy = adapted(policy, lora) if lora else policy
    rationales = [[3]] + [[x, y] for x in range(3) for y in range(4)]
    rollouts = sample(policy, policy.prompts(["a b b"]), 13, 1.0, uniforms(0, 1, 13, 2))
    rollouts.ids, rollouts.mask = torch.zeros(1, 13, 2, dtype=torch.long), torch.ones(1, 13, 2, dtype=torch.long)
    for k, ids in enumerate(rationales):
        rollouts.ids[0, k, : len(ids)] = torch.tensor(ids)
    rollouts.mask[0, 0, 1] = 0
    with torch.no_grad():
        scores = score(policy, rollouts)
    rollouts.logprobs, rollouts.embeddings = scores.logprobs, scores.embeddings
    return policy, rollouts


@both_ways
@pytest.mark.parametrize("reward", ["infonce", "paper"])
def test_full_gradient_is_exact(enumerable, reward):
    """E over all 169 groups of two = (K-1)/K times the gradient of the exactly computed E[R]; Eq. 19 alone is not it."""
    policy, every = enumerable
    D, K = every.embeddings.shape[2], 2
    torch.manual_seed(0)
    anchors = torch.nn.functional.normalize(torch.randn(3, D, dtype=torch.float64), dim=-1)
    given = config(
        reward=reward, train_roles="positive", pathwise=(K - 1) / K, kl=0.0, text_weight=0.0, tau=0.5, length_normalize=False,
        lambda_consistency=0.0, lambda_hard=0.0, infonce_temperature=0.3, relative_length_penalty=True, temperature=1.0,
    )  # fmt: skip

    def rewards_of(h):  # instance 0 is ours; instance 1 is there to be told apart from
        roles = {"query": anchors[:2, None], "positive": h.expand(2, -1, -1), "negative": anchors[2].expand(2, 1, 1, D)}
        if reward == "infonce":
            return infonce(roles["positive"], roles["query"], given.infonce_temperature)[:1] / given.tau
        return paper_components(roles)["contrastive"][:1] / given.tau

    scores = score(policy, every)
    probability = scores.logprobs.sum(-1).exp()[0]  # [13]
    assert probability.sum().item() == pytest.approx(1, abs=1e-12)  # these are all there are
    exact = gradient(policy, (probability * rewards_of(scores.embeddings)[0]).sum())

    fixed = {"query": anchors[:2, None], "positive": every.embeddings.expand(2, -1, -1)}
    fixed["negative"] = anchors[2].expand(2, 1, 1, D)
    R, _, g = judge(fixed, torch.ones(2, 13, dtype=torch.bool), torch.eye(2, dtype=torch.bool), given)
    pairs = torch.tensor(list(itertools.product(range(13), repeat=K)))  # [169, 2]: every group there could be
    groups = every[torch.zeros(len(pairs), dtype=torch.long)]
    for name in ("ids", "mask", "logprobs"):
        setattr(groups, name, getattr(every, name)[0][pairs])
    weight = probability.detach()[pairs].prod(1)

    def expected_update(**changes):
        trainer = Trainer(policy, None, ROWS, config(**{**vars(given), **changes}))
        value, _ = trainer.objective(groups, advantages(R[0][pairs]), g[0][pairs])
        return gradient(policy, (weight * value.mean(1)).sum())

    both, score_alone = expected_update(), expected_update(pathwise=0.0)
    assert (both - exact * (K - 1) / K).norm() < 1e-9 * exact.norm()
    error = (score_alone - exact * (K - 1) / K).norm() / (exact * (K - 1) / K).norm()
    assert error > 0.1, "the pathwise term would not matter here, and the test would prove nothing"


# ---------------------------------------------------------------- the update


def prepared(policy, **settings):
    """A trainer as `descent` makes it, one batch of its rollouts, and what they are worth."""
    trainer = descent(policy, **settings)
    batch = make_batch(trainer.next_rows(), anchored=trainer.config.reward == "paper")
    rollouts, embeddings, *_ = trainer.sample(batch.texts)
    R, _, g = judge(embeddings, rollouts.finished, batch.twins, trainer.config)
    return trainer, rollouts, advantages(R), g


@both_ways
def test_loss_by_finite_differences(make_policy, lora):
    """With clip, KL, pathwise and text terms all active, off policy."""
    policy = make_policy("GPT2", double=True, lora=lora)
    learned = [p for p in policy.model.parameters() if p.requires_grad]
    trainer, rollouts, A, g = prepared(policy, kl=0.5, pathwise=0.7, clip_eps=0.05, text_weight=0.3)
    with torch.no_grad():  # away from the sampler's weights, so that ratios leave the clip range
        torch.manual_seed(3)
        for p in learned:
            p += 0.01 * torch.randn_like(p)
    value, stats = trainer.objective(rollouts, A, g)
    assert 0.05 < float(stats["clip_fraction"].mean()) < 0.95 and float(stats["kl_start"].mean()) > 1e-4
    gradient(policy, value.sum())
    checked = 0
    for p in learned:
        at = p.grad.abs().argmax()
        flat, step = p.data.view(-1), 1e-6
        sides = []
        for sign in (1, -1):
            flat[at] += sign * step
            with torch.no_grad():
                sides.append(float(trainer.objective(rollouts, A, g)[0].sum()))
            flat[at] -= sign * step
        assert (sides[0] - sides[1]) / (2 * step) == pytest.approx(float(p.grad.view(-1)[at]), rel=1e-4, abs=1e-7)
        checked += 1
    assert checked > 20


@pytest.mark.parametrize("estimator", [kl_k2, kl_k3])
def test_kl_term(make_policy, estimator):
    """The policy against the starting one, with the estimator that is set; what is logged is k3's, comparable between runs."""
    policy = make_policy(double=True)
    trainer, rollouts, A, g = prepared(policy, kl=0.5, kl_estimator=estimator.__name__.removeprefix("kl_"))
    with torch.no_grad():
        policy.head.weight *= 1.1
        logprobs, at_start = (score(x, rollouts, trainer.config.temperature).logprobs for x in (policy, trainer.reference))
        with_kl, stats = trainer.objective(rollouts, A, g)
        trainer.config.kl = 0.0
        without, _ = trainer.objective(rollouts, A, g)
    torch.testing.assert_close(without - with_kl, 0.5 * estimator(logprobs, at_start, rollouts.mask))
    torch.testing.assert_close(stats["kl_start"], kl_k3(logprobs, at_start, rollouts.mask))
    assert (kl_k2(logprobs, at_start, rollouts.mask) - stats["kl_start"]).abs().max() > 1e-3


def test_text_term(make_policy):
    """The language model's loss on the texts, one at a time: all tokens that count, after the first."""
    policy = make_policy(double=True)
    trainer, rollouts, A, g = prepared(policy, text_weight=0.7)
    with_text, stats = trainer.objective(rollouts, A, g)
    trainer.config.text_weight = 0.0
    without, _ = trainer.objective(rollouts, A, g)
    for n, text in enumerate([row[role] for role in ("query", "positive") for row in trainer.next_rows()]):
        x = policy.prompts([text])
        logprobs = torch.log_softmax(policy.model(input_ids=x.ids).logits[0], -1)
        at = x.counted[0].nonzero()[1:, 0]
        expected = logprobs[at - 1, x.ids[0, at]].mean().item()
        assert len(at) >= 3 and (with_text - without)[n].tolist() == pytest.approx([0.7 * expected] * A.shape[1], rel=1e-5)
        assert stats["prompt_loss"][n].tolist() == pytest.approx([-expected] * A.shape[1], rel=1e-5)


def test_prompt_term(make_policy):
    """A step adds the gradient of what the texts' prompts would be rewarded with for their own embeddings."""
    policy = make_policy(double=True)
    weight = policy.model.model.layers[0].mlp.down_proj.weight

    def taken(prompt_weight):
        trainer, gradients = descent(policy, prompt_weight=prompt_weight, lambda_hard=0.5, infonce_temperature=0.3), []
        trainer.optimizer_step = lambda: gradients.append(weight.grad.clone()) or 0.0
        trainer.step()
        return gradients[0]

    h = {role: [embedded(policy, text)[0] for text in texts] for role, texts in make_batch(ROWS).texts.items()}
    reward = infonce_terms(h["query"], h["positive"], [x.detach() for x in h["negative"]], 0.3).mean()
    expected = -0.7 * 1.5 * torch.autograd.grad(reward, weight)[0]
    torch.testing.assert_close(taken(0.7) - taken(0.0), expected, rtol=1e-4, atol=1e-8)


def test_what_counts_as_clipped_has_no_gradient(make_policy):
    """Off policy, of each rationale's tokens the share that Eq. 8's gradient does not reach, by autograd."""
    policy = make_policy("GPT2", double=True)
    trainer, rollouts, A, g = prepared(policy, clip_eps=0.05)
    with torch.no_grad():
        torch.manual_seed(3)
        for p in policy.model.parameters():
            p += 0.01 * torch.randn_like(p)
        clipped = trainer.objective(rollouts, A, g)[1]["clip_fraction"]
        logprobs = score(policy, rollouts, trainer.config.temperature).logprobs
    logprobs.requires_grad_()
    trainer.surrogate(logprobs, rollouts, A).sum().backward()
    still = (logprobs.grad == 0) & rollouts.mask.bool()
    moved = ((logprobs.detach() - rollouts.logprobs).exp() - 1).abs() > 0.05
    assert A.abs().min() > 0 and (moved & rollouts.mask.bool() & ~still).any()  # some moved far, the other way
    torch.testing.assert_close(clipped, still.sum(-1) / rollouts.mask.sum(-1), rtol=0, atol=1e-6, check_dtype=False)


@both_ways
@pytest.mark.parametrize("minibatches", [1, 3])
def test_micro_batches_make_one_update(make_policy, minibatches, lora):
    updates, splits = [], []
    for budget in (1, 80, 10**6):
        policy = make_policy("GPT2", double=True, lora=lora)
        trainer, rollouts, A, g = prepared(policy, tokens_per_batch=budget, minibatches=minibatches, epochs=2)
        splits.append([len(part) for part in trainer.micro_batches(torch.arange(len(A)), rollouts, budget)])
        before = weights(policy)
        trainer.update(rollouts, A, g)
        updates.append(weights(policy) - before)
    assert len(splits[0]) == 8 > len(splits[1]) > len(splits[2]) == 1 and len(set(splits[1])) > 1  # an uneven split
    for update in updates[1:]:
        assert (update - updates[0]).norm() < 1e-7 * updates[0].norm()


def test_micro_batches_keep_to_the_budget(make_policy):
    trainer, rollouts, A, _ = prepared(make_policy())
    parts = list(trainer.micro_batches(torch.arange(len(A)), rollouts, 100))
    assert sorted(i for part in parts for i in part.tolist()) == list(range(8))
    for part in parts:
        trimmed = rollouts[part]
        assert len(part) == 1 or trimmed.prompt_ids.numel() + trimmed.ids.numel() <= 150  # the two maxima may be of two groups


@both_ways
def test_first_ratio_is_one(make_policy, lora):
    policy = make_policy(lora=lora)
    metrics = Trainer(policy, start(policy), ROWS, config(lr=0.05, minibatches=4)).step()
    assert metrics["first_ratio_off"] < 1e-4 < 0.01 < metrics["clip_fraction"]
    assert metrics["approx_kl"] > 1e-3


def test_step_pushes_better_rationales_up(make_policy):
    """With one rollout clearly better than its group, its log-probability rises more than the others'."""
    policy = make_policy()
    trainer, rollouts, A, g = prepared(policy, pathwise=0.0, kl=0.0, text_weight=0.0, temperature=1.0)
    A = torch.zeros_like(A)
    A[0] = torch.tensor([2.0, -1.0, -1.0])
    assert len({tuple(ids) for ids in rollouts.ids[0].tolist()}) == 3
    trainer.update(rollouts, A, g)
    with torch.no_grad():
        change = ((score(policy, rollouts).logprobs - rollouts.logprobs) * rollouts.mask).sum(-1)[0]
    assert change[0] > 0 and change[0] > change[1:].max()


SETTINGS = {
    "full": {},
    "paper": dict(recipe="paper"),
    "all three roles": dict(train_roles="query,positive,negative"),
    "unsupervised": dict(mode="unsupervised"),
    "unsupervised paper": dict(mode="unsupervised", recipe="paper"),
    "by the standard deviation, sums, two passes": dict(normalize=True, length_normalize=False, epochs=2, minibatches=2),
}


@pytest.mark.parametrize("M", [0, 1, 2])
@pytest.mark.parametrize("name", SETTINGS)
def test_every_kind_of_step(make_policy, name, M):
    policy = make_policy()
    given = config(**SETTINGS[name])
    rows = [{**row, "negative": row["negative"] * M} for row in ROWS]
    if given.mode == "unsupervised":
        rows = [{"text": row["query"]} for row in rows]
    before = copy.deepcopy(policy.model.state_dict())
    metrics = Trainer(policy, copy.deepcopy(policy), rows, given).step()
    assert all(math.isfinite(x) for x in metrics.values())
    assert any((before[k] != v).any() for k, v in policy.model.state_dict().items())
    if given.recipe == "paper":
        assert metrics["hard_std"] == 0 and "kl_start" not in metrics


@both_ways
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_step_on_every_architecture(make_policy, architecture, lora):
    policy = make_policy(architecture, lora=lora)
    trainer = Trainer(policy, start(policy), ROWS, config())
    first, second = trainer.step(), trainer.step()
    assert first["step"] == 1 and second["step"] == 2
    assert first["first_ratio_off"] < 1e-4 and first["grad_norm"] > 0


def test_batches_are_whole_shuffled_passes(make_policy):
    trainer = Trainer(make_policy(), None, [{"text": str(i)} for i in range(10)], config(batch=4, mode="unsupervised"))
    order = []
    for step in range(5):
        trainer.step_number = step
        order += [int(row["text"]) for row in trainer.next_rows()]
    assert sorted(order[:10]) == sorted(order[10:]) == list(range(10)) and order[:10] != order[10:]


# ---------------------------------------------------------------- groups that teach little or nothing


@pytest.mark.parametrize("normalize", [False, True])
def test_identical_rollouts(make_policy, normalize):
    """Whatever rounding does to their rewards."""
    trainer, rollouts, _, _ = prepared(make_policy("GPT2", double=True), pathwise=0.0, kl=0.0, text_weight=0.0)
    taught = lambda part, A: gradient(trainer.policy, trainer.objective(part, A, None)[0].sum()).norm()
    usual = taught(rollouts[[0]], torch.tensor([[1.0, -1.0, 0.0]]).double())
    alike = rollouts[[0]]
    for name in ("ids", "mask", "logprobs"):
        setattr(alike, name, getattr(alike, name)[:, :1].expand(-1, 3, -1).contiguous())
    A = advantages(torch.tensor([[0.5, 0.5 + 1e-6, 0.5 - 2e-6]]).double(), normalize)
    assert not normalize or A.abs().max() > 0.4  # the division blows rounding up ...
    assert taught(alike, A) < 1e-9 * usual  # ... and yet nothing comes of it


def test_truncated_groups():
    """A group that is all truncated teaches by its other rewards, or, under Eq. 28, not at all."""
    torch.manual_seed(0)
    h = torch.nn.functional.normalize(torch.randn(8, 3, 8, dtype=torch.float64), dim=-1)
    roles = {"query": h[:4], "positive": h[4:], "negative": h[:4, None, :1]}
    twins, none, every = torch.eye(4, dtype=torch.bool), torch.zeros(8, 3, dtype=torch.bool), torch.ones(8, 3, dtype=torch.bool)
    A = advantages(judge(roles, none, twins, config())[0])
    torch.testing.assert_close(A, advantages(judge(roles, every, twins, config())[0]))
    assert A.abs().max() > 0.1
    roles["query"] = h[:4, :1]
    R, _, g = judge(roles, none[:4], twins, config(recipe="paper"))
    assert advantages(R).abs().max() == 0 and g.abs().max() == 0


# ---------------------------------------------------------------- whole runs


def test_run_writes_what_it_promises(tiny_world, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(grace, "finish_page", finish_page)
    grace.main(command(tiny_world, tmp_path, f"--eval-every 2 --graded {tiny_world}/data/graded.jsonl"))
    assert "report.html shows this run" in capsys.readouterr().out and (tmp_path / "report.html").exists()
    with open(tmp_path / "summary.json") as file:
        summary = json.load(file)
    for moment in ("before", "after"):
        assert {"ndcg_at_10", "top1", "spearman", "text_loss"} <= summary[moment].keys()
    assert {"ndcg_at_10", "top1", "spearman"} == summary["after_without_rationale"].keys()
    assert summary["seed"] == 0 and summary["seconds"] > 0 and summary["config"]["reward"] == "infonce"
    lines = [json.loads(line) for line in open(tmp_path / "metrics.jsonl")]
    assert [line["step"] for line in lines] == [1, 2, 3]
    assert {"contrastive_std", "consistency_std", "hard_std", "truncated", "distinct", "effective_rank"} <= lines[0].keys()
    assert "heldout_ndcg_at_10" in lines[1] and "heldout_ndcg_at_10" not in lines[0]
    page = (tmp_path / "rationales.md").read_text()
    assert page.count("| 0 |") == page.count("| 2 |") == page.count("| 3 |") == 6
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path)
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path)
    assert model(**tokenizer("the old doctor", return_tensors="pt")).logits.shape[-1] == len(tokenizer)
    capsys.readouterr()
    grace.main(["explain", "--model", str(tmp_path), "the old doctor sold the boat", "the boat was sold"])
    printed = capsys.readouterr().out
    assert "cosine 0." in printed and "the old doctor sold the boat" in printed  # test_explain.py has the rest


def test_few_rows_and_one_instance(tiny_world, tmp_path):
    """Nothing to hold out, and a batch of one: documented, finite, and valid JSON."""
    data = tmp_path / "few.jsonl"
    data.write_text("".join(json.dumps({**row, "negative": row["negative"][0]}) + "\n" for row in ROWS))
    grace.main(command(tiny_world, tmp_path, f"--data {data} --recipe paper --batch 1 --steps 1", heldout=False))
    assert json.loads((tmp_path / "metrics.jsonl").read_text())["cosine"] == pytest.approx(0, abs=1e-5)
    with open(tmp_path / "summary.json") as file:
        assert json.load(file)["after"].keys() == {"text_loss"}


def one_step(model):
    """The reward of a step with two roles as anchors, and which of them a set names first."""
    trainer = Trainer(Policy.load(model), None, ROWS, config(recipe="paper"))
    return next(iter({"query", "negative"})), trainer.step()["reward"]


def test_anchors_are_drawn_in_one_order(tiny_world):
    """Sets of strings are walked in an order that changes from process to process; sampling must not depend on it."""
    here, reward = one_step(f"{tiny_world}/model")
    other = subprocess.run(
        [sys.executable, "-c", f"from test_grace import one_step; print(*one_step('{tiny_world}/model'))"],
        env={**os.environ, "PYTHONPATH": "tests", "PYTHONHASHSEED": "1" if here == "negative" else "2"},
        capture_output=True,
        text=True,
    )
    there, reward_there = other.stdout.split()
    assert here != there, "both walk their sets in one order, and the test would prove nothing"
    assert float(reward_there) == reward


def test_unsupervised_run_holds_no_labels(tiny_world, tmp_path, capsys):
    """It is evaluated on held-out texts alone."""
    grace.main(
        command(tiny_world, tmp_path, f"--mode unsupervised --data {tiny_world}/data/texts.jsonl --steps 1", heldout=False)
    )
    assert "0 negatives each" in capsys.readouterr().out
    with open(tmp_path / "summary.json") as file:
        summary = json.load(file)
    assert {"self_ndcg_at_10", "alignment", "uniformity", "text_loss"} <= summary["after"].keys()
    assert summary["after_without_rationale"].keys() == {"uniformity"}


@pytest.mark.parametrize("flags, expected", [("", 1), ("--relative-length-penalty", 0)])
def test_run_that_cannot_learn(tiny_world, tmp_path, capsys, flags, expected):
    """Where no rationale ends, Eq. 28 gives all of them the same reward, and the first step says so."""
    grace.main(command(tiny_world, tmp_path, "--recipe paper --steps 2 --max-new-tokens 1", flags))
    printed = capsys.readouterr().out
    assert printed.count("all rollouts of a text got one reward, and 100% of rationales never end") == expected


def test_rows_are_held_out(tiny_world, tmp_path, capsys):
    """Where no file is given."""
    grace.main(command(tiny_world, tmp_path, "--steps 1", heldout=False))
    assert "58 training rows (1 negatives each), 6 held-out" in capsys.readouterr().out


def test_one_instance(make_policy):
    """Eq. 15 has nobody to compare with and is 0; the paper's batch sizes go down to 1."""
    metrics = Trainer(make_policy(), None, ROWS, config(recipe="paper", batch=1)).step()
    assert metrics["hard"] == 0 and math.isfinite(metrics["reward"])


REAL = os.path.join("..", "shared")


@pytest.mark.skipif(not os.path.isdir(f"{REAL}/checkpoints/stories260K"), reason="no real checkpoint beside the repository")
@pytest.mark.parametrize("mode, name", [("supervised", "snli_dev_triplets"), ("unsupervised", "sentences")])
def test_real_checkpoint_on_real_text(tmp_path, mode, name):
    rows, data = open_dataset(f"{REAL}/data/train/{name}").select(range(40)), tmp_path / "data.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    given = f"--model {REAL}/checkpoints/stories260K --data {data} --mode {mode} --out {tmp_path}"
    given += " --batch 4 --rollouts 2 --steps 1 --max-new-tokens 4 --lr 1e-4 --eval-every 0"
    grace.main([*given.split(), "--instruction", "Say it again:"])
    assert transformers.AutoModelForCausalLM.from_pretrained(tmp_path).config.model_type == "llama"
