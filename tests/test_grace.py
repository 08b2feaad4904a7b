"""The objective and its gradient against oracles, the update under any split, steps that are made again, and whole runs."""

import copy
import inspect
import itertools
import json
import math

import pytest
import torch
import transformers
from conftest import ROWS, build, by_full_forward, command, config, descent, embedded, gradient, infonce_terms, start, weights

import grace
import rollout
from course.tests.test_task5 import *  # noqa: F403 (Eq. 7, 8 and 18 against loops)
from evaluation.page import finish_page
from grace import Trainer, advantages, judge, kl_k2, kl_k3, safe_step
from plumbing.errors import GraceError
from policy import Policy
from prompt import Reading
from reward import infonce, infonce_components, paper_components
from rollout import make_batch, roll_out, sample, score, uniforms

# ---------------------------------------------------------------- the KL term


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
    if estimator is kl_k3:  # and k3's own mean is KL(policy || reference)
        torch.testing.assert_close(probability @ per_token, probability @ (p - q))


# ---------------------------------------------------------------- what can teach, and what cannot


def embeddings(seed=1):
    """Four instances with three rollouts per positive and two negatives."""
    torch.manual_seed(seed)
    make = lambda *shape: torch.nn.functional.normalize(torch.randn(*shape, 8, dtype=torch.float64), dim=-1)
    return {"query": make(4, 1), "positive": make(4, 3), "negative": make(4, 2, 1)}


def judged(roles, finished=None, **settings):
    """`judge` of a batch in which no two instances share a text, and, unless given, every rationale has ended."""
    given = config(**settings)
    finished = torch.ones(4 * len(given.roles), 3, dtype=torch.bool) if finished is None else finished
    return judge(roles, finished, torch.eye(4, dtype=torch.bool), given)


@pytest.mark.parametrize("recipe", ["full", "paper"])
def test_rewards_and_their_gradient(recipe):
    """Of every trained role, the components weighted, scaled and penalised; and the gradient of their sum."""
    more = dict(lambda_consistency=0.3, lambda_hard=0.7, tau=2.0, gamma=0.4)
    roles = {**embeddings(), "query": embeddings(2)["positive"]} if recipe == "full" else embeddings()
    leaves = {role: x.clone().requires_grad_() for role, x in roles.items()}
    trained = ["query", "positive"] if recipe == "full" else ["positive"]
    finished = torch.rand(4 * len(trained), 3) < 0.5
    R, components, g = judged(roles, finished, recipe=recipe, **more)
    parts = [infonce_components(leaves, role, 0.05) for role in trained] if recipe == "full" else [paper_components(leaves)]
    expected = {name: torch.cat([part[name] for part in parts]) for name in parts[0]}
    rewards = (expected["contrastive"] + 0.3 * expected["consistency"] + 0.7 * expected["hard"]) / 2
    rewards = torch.where(finished, rewards, rewards - 0.4 if recipe == "full" else torch.tensor(-0.4).double())
    torch.testing.assert_close((R, components), (rewards, expected))
    torch.testing.assert_close(g, torch.cat(torch.autograd.grad(rewards.sum(), [leaves[role] for role in trained])))


def test_negatives_and_eq15_cancel():
    """Under the paper's reward neither moves an advantage."""
    roles, other = embeddings(), embeddings(2)
    R, components, _ = judged(roles, recipe="paper", lambda_hard=0.2)
    moved, _, _ = judged({**roles, "negative": other["negative"]}, recipe="paper", lambda_hard=1.0)
    torch.testing.assert_close(advantages(moved), advantages(R), rtol=0, atol=1e-12)
    assert advantages(R).abs().max() > 0.1 and components["hard"].std(1).max() == 0


def test_under_infonce_they_move_advantages():
    """A hard negative those of its own instance, another instance's texts those of others, too."""
    roles, other = {**embeddings(), "query": embeddings(3)["positive"]}, embeddings(2)
    teach = lambda **changes: advantages(judged({**roles, **changes}, lambda_hard=0.0, lambda_consistency=0.0)[0])
    negative, positive = roles["negative"].clone(), roles["positive"].clone()
    negative[0], positive[3] = other["negative"][0], other["positive"][0]
    by_negative, by_instance = teach(negative=negative) - teach(), teach(positive=positive) - teach()
    assert by_negative[0].abs().max() > 0.05 and by_negative[1:].abs().max() == 0
    assert by_instance[0].abs().max() > 0.05


# ---------------------------------------------------------------- the full gradient, by enumeration


@pytest.fixture
def enumerable():
    """A float64 policy over four tokens and rationales of at most two: thirteen rationales in all."""
    from tokenizers import Tokenizer, models, pre_tokenizers

    core = Tokenizer(models.WordLevel({"a": 0, "b": 1, "c": 2, "<end>": 3}, unk_token="c"))
    core.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=core, eos_token="<end>", unk_token="c")
    policy = Policy(build("GPT2", 4, eos_token_id=3).double(), tokenizer, Reading("a", 32, 2))
    rollouts = sample(policy, policy.template(["a b b"]), 13, 1.0, uniforms(0, 1, 13, 2))
    rollouts.ids, rollouts.mask = torch.zeros(1, 13, 2, dtype=torch.long), torch.ones(1, 13, 2, dtype=torch.long)
    for k, ids in enumerate([[3]] + [[x, y] for x in range(3) for y in range(4)]):
        rollouts.ids[0, k, : len(ids)] = torch.tensor(ids)
    rollouts.mask[0, 0, 1] = 0
    with torch.no_grad():
        scores = score(policy, rollouts)
    rollouts.logprobs, rollouts.embeddings = scores.logprobs, scores.embeddings
    return policy, rollouts


@pytest.mark.parametrize("reward", ["infonce", "paper"])
def test_full_gradient_is_exact(enumerable, reward):
    """E over all 169 groups of two = (K-1)/K times the gradient of the exactly computed E[R]; Eq. 19 alone is not it."""
    policy, every = enumerable
    D, K = every.embeddings.shape[2], 2
    torch.manual_seed(0)
    anchors = torch.nn.functional.normalize(torch.randn(3, D, dtype=torch.float64), dim=-1)
    given = config(
        reward=reward, train_roles="positive", pathwise=(K - 1) / K, kl=0.0, text_weight=0.0, tau=0.5, length_normalize=False,
        lambda_consistency=0.0, lambda_hard=0.0, infonce_temperature=0.3, temperature=1.0,
    )  # fmt: skip

    def roles_of(h):  # instance 0 is ours; instance 1 is there to be told apart from
        return {"query": anchors[:2, None], "positive": h.expand(2, -1, -1), "negative": anchors[2].expand(2, 1, 1, D)}

    def rewards_of(h):
        components = paper_components(roles_of(h)) if reward == "paper" else infonce_components(roles_of(h), "positive", 0.3)
        return components["contrastive"][0] / given.tau

    scores = score(policy, every)
    probability = scores.logprobs.sum(-1).exp()[0]  # [13]
    assert probability.sum().item() == pytest.approx(1, abs=1e-12)  # these are all there are
    exact = gradient(policy, (probability * rewards_of(scores.embeddings)).sum()) * (K - 1) / K

    finished, same_text = torch.ones(2, 13, dtype=torch.bool), torch.eye(2, dtype=torch.bool)
    R, _, g = judge(roles_of(every.embeddings), finished, same_text, given)
    pairs = torch.tensor(list(itertools.product(range(13), repeat=K)))  # [169, 2]: every group there could be
    groups = every[torch.zeros(len(pairs), dtype=torch.long)]
    for name in ("ids", "mask", "logprobs"):
        setattr(groups, name, getattr(every, name)[0][pairs])
    weight = probability.detach()[pairs].prod(1)

    def expected_update(**changes):
        trainer = Trainer(policy, None, ROWS, config(**{**vars(given), **changes}))
        value = trainer.objective(score(policy, groups), None, groups, advantages(R[0][pairs]), g[0][pairs])
        return gradient(policy, (weight * value.mean(1)).sum())

    assert (expected_update() - exact).norm() < 1e-9 * exact.norm()
    error = (expected_update(pathwise=0.0) - exact).norm() / exact.norm()
    assert error > 0.1, "the pathwise term would not matter here, and the test would prove nothing"


# ---------------------------------------------------------------- the update


def prepared(policy, **settings):
    """A trainer by gradient descent, one batch of its rollouts, and what they are worth."""
    trainer = descent(policy, **settings)
    batch = make_batch(trainer.next_rows())
    rollouts, h, _ = roll_out(policy, batch.texts, trainer.config, step=0)
    R, _, g = judge(h, rollouts.finished, batch.same_text, trainer.config)
    return trainer, rollouts, advantages(R), g


def learned(trainer, *update):
    """What an update logs, and its gradient, without the optimizer's step."""
    trainer.optimizer_step = lambda: 0.0
    trainer.policy.model.zero_grad()
    metrics = trainer.update(*update)
    return metrics, torch.cat([p.grad.flatten() for p in trainer.policy.model.parameters() if p.requires_grad])


def test_update_is_eq19(make_policy):
    """On policy, with no other term: the gradient of A log pi, a rationale at a time, by a full forward pass."""
    policy = make_policy("GPT2", double=True)
    trainer, rollouts, A, g = prepared(policy, pathwise=0.0, kl=0.0, text_weight=0.0)
    _, ours = learned(trainer, rollouts, A, g)
    total = 0
    for n, k in itertools.product(range(8), range(3)):
        total = total + A[n, k] * by_full_forward(policy, rollouts, n, k, trainer.config.temperature)[0].sum()
    expected = gradient(policy, -total / 24)
    assert (ours - expected).norm() < 1e-9 * expected.norm()


@pytest.mark.parametrize("estimator, lora", [("k3", None), ("k2", 2)], ids=["k3, weights", "k2, adapters"])
def test_loss_with_pathwise_kl_term_and_text_term(make_policy, estimator, lora):
    """Off policy, with every term: the loss, its gradient, and what is logged, a rationale at a time by full forward passes."""
    policy = make_policy("GPT2", double=True, lora=lora)
    weighted = dict(pathwise=0.7, prompt_weight=0.4, text_weight=0.3, kl=0.5, kl_estimator=estimator)
    trainer, rollouts, A, g = prepared(policy, clip_eps=0.05, **weighted)
    torch.manual_seed(3)
    with torch.no_grad():  # away from the sampler's weights, so that ratios leave the clip range
        for p in policy.model.parameters():
            if p.requires_grad:
                p += 0.01 * torch.randn_like(p)
    g_prompt = 0.3 * g[:, 0]  # any constant
    metrics, ours = learned(trainer, rollouts, A, g, g_prompt)

    texts, k3 = [row[role] for role in ("query", "positive") for row in trainer.next_rows()], lambda x: x.exp() - 1 - x
    expected = dict.fromkeys(("loss", "approx_kl", "kl_start", "clip_fraction", "prompt_loss"), 0.0)
    for n, k in itertools.product(range(8), range(3)):
        now, h = by_full_forward(policy, rollouts, n, k, trainer.config.temperature)
        with torch.no_grad(), trainer.reference.switched():
            start, _ = by_full_forward(trainer.reference, rollouts, n, k, trainer.config.temperature)
        _, h_prompt = by_full_forward(policy, rollouts, n, None)
        _, text = embedded(policy, texts[n])
        ratios, a = (now - rollouts.logprobs[n, k, : len(now)]).exp(), A[n, k]
        kl = (now - start).square() / 2 if estimator == "k2" else k3(start - now)
        terms = sum(min(r * a, min(max(r, 0.95), 1.05) * a) for r in ratios) + 0.3 * text - 0.5 * kl.mean()
        one = {"loss": -terms - 0.7 * g[n, k] @ h - 0.4 * g_prompt[n] @ h_prompt, "prompt_loss": -text}
        one |= {"approx_kl": k3(ratios.log()).mean(), "kl_start": k3(start - now).mean()}
        one |= {"clip_fraction": (ratios > 1.05 if a > 0 else ratios < 0.95).double().mean()}
        expected = {name: x + one[name] / 24 for name, x in expected.items()}
    assert {name: metrics[name] for name in expected} == pytest.approx({k: x.item() for k, x in expected.items()}, rel=1e-7)
    assert 0.05 < metrics["clip_fraction"] < 0.95 and metrics["kl_start"] > 1e-4
    exact = gradient(policy, expected["loss"])
    assert (ours - exact).norm() < 1e-9 * exact.norm()


def test_prompt_term(make_policy):
    """What a step hands to its update: the gradient of what the texts' prompts alone would be rewarded with."""
    policy, updates = make_policy(double=True), []
    trainer = descent(policy, prompt_weight=0.7, lambda_hard=0.5, infonce_temperature=0.3)
    trainer.update = lambda rollouts, A, g, g_prompt: updates.append(g_prompt) or {}
    trainer.step()
    texts = trainer.batch.texts
    h = {role: torch.stack([embedded(policy, text)[0] for text in texts[role]]).detach() for role in texts}
    trained = h["query"].requires_grad_(), h["positive"].requires_grad_()
    rewards = 1.5 * infonce_terms(*trained, h["negative"], 0.3)  # of one prompt each: the mean is the nearest
    torch.testing.assert_close(updates[0], torch.cat(torch.autograd.grad(rewards.sum(), trained)), rtol=1e-4, atol=1e-8)


@pytest.mark.parametrize("minibatches", [1, 3])
def test_micro_batches_make_one_update(make_policy, minibatches):
    updates, norms, splits = [], [], []
    for budget in (1, 80, 10**6):
        policy = make_policy("GPT2", double=True)
        trainer, rollouts, A, g = prepared(policy, tokens_per_batch=budget, minibatches=minibatches)
        parts = list(grace.micro_batches(rollouts, torch.arange(8), budget))
        assert sorted(torch.cat(parts).tolist()) == list(range(8))
        for part in parts:
            tokens = rollouts[part].prompt_ids[:, rollouts.n_shared :].numel() + rollouts[part].ids.numel()
            assert len(part) == 1 or tokens <= budget
        splits.append([len(part) for part in parts])
        before = weights(policy)
        norms.append(trainer.update(rollouts, A, g)["grad_norm"])
        updates.append(weights(policy) - before)
    assert len(splits[0]) == 8 > len(splits[1]) > len(splits[2]) == 1 and len(set(splits[1])) > 1  # an uneven split
    for update, norm in zip(updates[1:], norms[1:]):  # the norm is that before clipping
        assert (update - updates[0]).norm() < 1e-7 * updates[0].norm() and norm == pytest.approx(norms[0], rel=1e-7)


@pytest.mark.parametrize("lora", [None, 2], ids=["weights", "adapters"])  # what is trained
def test_first_ratio_is_one(make_policy, lora):
    """In the first of four optimizer steps on a batch, not in the later ones; in the next batch again."""
    policy = make_policy("Qwen2", lora=lora)
    trainer = Trainer(policy, start(policy), ROWS, config(lr=0.05, minibatches=4))
    for step in (1, 2):
        metrics = trainer.step()
        assert metrics["first_ratio_off"] < 1e-4 < 0.01 < metrics["clip_fraction"]
        assert metrics["approx_kl"] > 1e-3 and metrics["grad_norm"] > 0 and metrics["step"] == step


SETTINGS = {
    "full": {},
    "paper": dict(recipe="paper"),
    "all three roles": dict(train_roles="query,positive,negative"),
    "unsupervised": dict(mode="unsupervised"),
    "unsupervised paper": dict(mode="unsupervised", recipe="paper"),
    "paper, one instance": dict(recipe="paper", batch=1),
}


@pytest.mark.parametrize("name, M", [*itertools.product(SETTINGS, [2]), ("full", 0), ("paper", 0)])
def test_every_kind_of_step(make_policy, name, M):
    policy, given = make_policy(), config(**SETTINGS[name])
    rows = [{**row, "negative": row["negative"] * M} for row in ROWS]
    if given.mode == "unsupervised":
        rows = [{"text": row["query"]} for row in rows]
    before = weights(policy)
    metrics = Trainer(policy, copy.deepcopy(policy), rows, given).step()
    assert all(math.isfinite(x) for x in metrics.values()) and (weights(policy) != before).any()
    if given.recipe == "paper":
        assert metrics["hard_std"] == 0 and "kl_start" not in metrics
    if given.batch == 1:  # Eq. 15 has nobody to compare with
        assert metrics["hard"] == 0


def test_bfloat16_trains_float32_weights(make_policy):
    """What computes has the weights of the step before, rounded; a rate far below their rounding still moves the weights."""
    policy = make_policy("Qwen2", dtype="bfloat16", tie_word_embeddings=True)
    trainer = Trainer(policy, start(policy), ROWS, config(lr=1e-6))
    for _ in range(3):
        before = weights(policy)
        assert torch.equal(weights(policy, policy.network), before.bfloat16())
        assert 0 < trainer.step()["first_ratio_off"] < 0.2
        assert before.dtype == torch.float32 and (weights(policy) != before).float().mean() > 0.9
    assert policy.head.weight is policy.base.embed_tokens.weight and policy.head.weight.grad is None  # still tied
    assert trainer.batch.rollouts.embeddings.dtype == trainer.batch.rollouts.logprobs.dtype == torch.float32


def test_queries_think_and_documents_are_read(make_policy):
    """A document's rollouts are empty, its embedding is its prompt's, and the reward's gradient moves it as any other.

    The oracle is the same step written out: InfoNCE over queries with rationales and prompts without, in one graph.
    """
    policy = make_policy(double=True, documents="prompt")
    settings = config(
        pathwise=1.0, kl=0.0, text_weight=0.0, length_normalize=False, gamma=0.0, lambda_consistency=0.0, lambda_hard=0.0
    )
    trainer = Trainer(policy, None, ROWS, settings)
    grads = []
    trainer.optimizer_step = lambda: grads.append([p.grad.clone() for p in policy.model.parameters()]) or 0.0
    trainer.step()
    rollouts, B, K = trainer.batch.rollouts, settings.batch, settings.rollouts
    assert rollouts.mask[:B].any(-1).all() and not rollouts.mask[B:].any() and rollouts.finished[B:].all()
    alone = torch.stack([by_full_forward(policy, rollouts, n, None)[1] for n in range(B, 2 * B)])
    torch.testing.assert_close(rollouts.embeddings[B:], alone[:, None].expand(-1, K, -1), rtol=0, atol=1e-10)

    policy.model.zero_grad()
    written = [[by_full_forward(policy, rollouts, n, k, settings.temperature) for k in range(K)] for n in range(B)]
    h = torch.stack([torch.stack([embedding for _, embedding in group]) for group in written])
    read = torch.stack([by_full_forward(policy, rollouts, n, None)[1] for n in range(B, 2 * B)])[:, None]
    negatives = trainer.batch.embeddings["negative"]
    own = infonce(h, read, settings.infonce_temperature, negatives, trainer.batch.same_text)
    back = infonce(read, h, settings.infonce_temperature, None, trainer.batch.same_text)
    A = own.detach() - own.detach().mean(1, keepdim=True)
    likely = torch.stack([torch.stack([logprobs.sum() for logprobs, _ in group]) for group in written])
    loss = -((A * likely).sum() + own.sum() + K * back.sum()) / (2 * B * K)
    loss.backward()
    for p, g in zip(policy.model.parameters(), grads[0]):
        assert (g - p.grad).norm() < 1e-6 * p.grad.norm()  # the model normalizes in float32


def test_rate_and_largest_step(make_policy):
    """Steps are limited to a gradient of norm 1, and the rate falls linearly to 0, where that is set."""
    policy = make_policy(double=True)
    trainer = Trainer(policy, start(policy), ROWS, config(lr=0.5, lr_decay=True, steps=4))
    trainer.optimizer = torch.optim.SGD(policy.model.parameters(), lr=0.5)
    for rate in (0.5, 0.375):
        before = weights(policy)
        metrics = trainer.step()
        assert metrics["grad_norm"] > 1 and metrics["lr"] == rate
        assert float((weights(policy) - before).norm()) == pytest.approx(rate, rel=1e-5)


def test_batches_are_whole_shuffled_passes(make_policy):
    trainer = Trainer(make_policy(), None, [{"text": str(i)} for i in range(10)], config(batch=4, mode="unsupervised"))
    order = []
    for step in range(5):
        trainer.step_number = step
        order += [int(row["text"]) for row in trainer.next_rows()]
    assert sorted(order[:10]) == sorted(order[10:]) == list(range(10)) and order[:10] != order[10:]


def test_few_frames_from_the_step_to_the_loop(make_policy, monkeypatch):
    """A reader who stops where a token is drawn sees Algorithm 1 five frames above."""
    draw, above = rollout.draw, []

    def watched(*args):
        above.append([frame.function for frame in inspect.stack(0)].index("step"))
        return draw(*args)

    monkeypatch.setattr(rollout, "draw", watched)
    Trainer(make_policy(), None, ROWS, config(kl=0.0)).step()
    assert 0 < max(above) <= 5


# ---------------------------------------------------------------- steps that are made again, and steps that cannot be made


def short_of_memory(monkeypatch, name, fails):
    """Replace a function that `grace` calls: the calls whose numbers `fails` holds run out of memory after their work."""
    function, calls = getattr(grace, name), itertools.count(1)

    def starved(*args, **more):
        result = function(*args, **more)
        if next(calls) in fails:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")
        return result

    monkeypatch.setattr(grace, name, starved)


@pytest.mark.parametrize("name, fails", [("score", [1, 3]), ("roll_out", [1, 3])])
def test_a_step_made_again_is_the_step(make_policy, monkeypatch, name, fails):
    """Out of memory in the update, before and after a backward pass, or while sampling: two steps in double precision."""
    updates, logged, budgets = [], [], []
    for starved in (False, True):
        trainer = descent(make_policy("GPT2", double=True), kl=0.0, tokens_per_batch=80)
        before = weights(trainer.policy)
        if starved:
            short_of_memory(monkeypatch, name, fails)
        logged.append([safe_step(trainer)[name] for _ in range(2) for name in ("loss", "grad_norm")])
        updates.append(weights(trainer.policy) - before)
        budgets.append(trainer.config.tokens_per_batch)
    assert budgets == [80, 80 // 2 ** len(fails)] and logged[1] == pytest.approx(logged[0], rel=1e-9)
    assert (updates[1] - updates[0]).norm() < 1e-9 * updates[0].norm()


def test_out_of_memory_for_the_moments(make_policy, monkeypatch):
    """AdamW makes them in its first step: when that fails, half of one weight's may be there."""
    step, ends = torch.optim.AdamW.step, []

    def starved(optimizer, *args):
        monkeypatch.setattr(torch.optim.AdamW, "step", step)
        optimizer.state[optimizer.param_groups[0]["params"][0]]["step"] = torch.tensor(0.0)
        raise torch.OutOfMemoryError("CUDA out of memory")

    for method in (step, starved):
        trainer = Trainer(make_policy(), None, ROWS, config(kl=0.0))
        monkeypatch.setattr(torch.optim.AdamW, "step", method)
        safe_step(trainer)
        ends.append(weights(trainer.policy))
    assert torch.equal(*ends)


@pytest.mark.parametrize("minibatches, message", [(1, "3, one group at a time; lower --rollouts"), (2, "60; lower it, and")])
def test_out_of_memory_for_ever(make_policy, monkeypatch, minibatches, message):
    """Once the weights may have moved, at the first time; else with a budget of one group."""
    trainer = descent(make_policy(), minibatches=minibatches, tokens_per_batch=60)
    short_of_memory(monkeypatch, "score", range(10**6))
    with pytest.raises(GraceError, match=f"step 1: out of memory with --tokens-per-batch {message}"):
        safe_step(trainer)


@pytest.mark.parametrize("what", ["a reward, its gradient or an embedding's direction", "the gradient"])
def test_not_finite(make_policy, tmp_path, what):
    """It stops the run before the optimizer, and the batch is written where a person can read it."""
    policy = make_policy()
    trainer = descent(policy, out=str(tmp_path))
    if what == "the gradient":
        policy.head.weight.register_hook(lambda gradient: gradient * torch.inf)
    else:
        policy.model.model.norm.weight.data.fill_(torch.nan)
    before = weights(policy)
    with pytest.raises(GraceError, match=f"step 1: {what} is not finite: .*not_finite_step_1.json shows the batch"):
        safe_step(trainer)
    torch.testing.assert_close(weights(policy), before, rtol=0, atol=0, equal_nan=True)
    groups = json.loads((tmp_path / "not_finite_step_1.json").read_text())
    assert [group["text"] for group in groups] == [row[role] for role in ("query", "positive") for row in trainer.next_rows()]
    rollout = groups[1]["rollouts"][2]
    assert {"rationale", "tokens", "finished", "reward", "contrastive", "consistency", "hard"} == rollout.keys()
    assert math.isfinite(float(rollout["reward"])) == (what == "the gradient")


# ---------------------------------------------------------------- whole runs


def test_run_writes_what_it_promises(tiny_world, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(grace, "finish_page", finish_page)
    grace.main(command(tiny_world, tmp_path, f"--eval-every 2 --graded {tiny_world}/data/graded.jsonl"))
    assert (tmp_path / "report.html").exists()
    summary = json.loads((tmp_path / "summary.json").read_text())
    for moment in ("before", "after"):
        assert {"ndcg_at_10", "top1", "spearman", "text_loss"} <= summary[moment].keys()
    assert {"ndcg_at_10", "top1", "spearman"} == summary["after_without_rationale"].keys()
    lines = [json.loads(line) for line in open(tmp_path / "metrics.jsonl")]
    assert [line["step"] for line in lines] == [1, 2, 3]
    assert {"contrastive_std", "consistency_std", "hard_std", "truncated", "distinct", "effective_rank"} <= lines[0].keys()
    assert "heldout_ndcg_at_10" in lines[1] and "heldout_ndcg_at_10" not in lines[0]
    page = (tmp_path / "rationales.md").read_text()
    assert page.count("| 0 |") == page.count("| 2 |") == page.count("| 3 |") == 6
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path)
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path)
    assert model(**tokenizer("the old doctor", return_tensors="pt")).logits.shape[-1] == len(tokenizer)


def test_few_rows(tiny_world, tmp_path):
    """Nothing to hold out, and a batch of one: still a run, and valid JSON."""
    data = tmp_path / "few.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    grace.main(command(tiny_world, tmp_path, f"--data {data} --recipe paper --batch 1 --steps 1", heldout=False))
    assert json.loads((tmp_path / "metrics.jsonl").read_text())["cosine"] == pytest.approx(0, abs=1e-5)
    assert json.loads((tmp_path / "summary.json").read_text())["after"].keys() == {"text_loss"}


def test_unsupervised_run_holds_no_labels(tiny_world, tmp_path, capsys):
    """It is evaluated on held-out texts alone."""
    texts = f"{tiny_world}/data/texts.jsonl"
    grace.main(command(tiny_world, tmp_path, f"--mode unsupervised --data {texts} --steps 1", heldout=False))
    assert "0 negatives each" in capsys.readouterr().out
    summary = json.loads((tmp_path / "summary.json").read_text())
    assert {"self_ndcg_at_10", "alignment", "uniformity", "text_loss"} <= summary["after"].keys()
    assert summary["after_without_rationale"].keys() == {"uniformity"}
