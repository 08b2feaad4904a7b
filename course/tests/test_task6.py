"""Task 6: rewards with their gradient, the pathwise term, and the objective; on an encoder whose every gradient is known."""

import types

import pytest
import torch

import grace
import reward
from config import Config
from rollout import Scores


@pytest.fixture(autouse=True)
def given(monkeypatch):
    """Plain stand-ins for task 3: Eq. 16 and 17, the penalty, and two rewards by role that are easy to differentiate."""

    def by_role(roles, role, temperature, same_text):
        assert same_text is not None, "same_text was not passed on"
        x = roles[role].flatten(0, -3)
        other = roles["positive" if role == "query" else "query"]
        near = (x * other.flatten(0, -3).mean(1, keepdim=True)[: len(x)]).sum(-1)
        return {"contrastive": near / temperature, "consistency": x.square().sum(-1) * x[..., 0], "hard": -(x[..., 1] ** 3)}

    def total(parts, consistency, hard):
        return parts["contrastive"] + consistency * parts["consistency"] + hard * parts["hard"]

    stand_ins = {
        "infonce_components": by_role,
        "paper_components": lambda roles, same_text=None: by_role(roles, "positive", 7.0, same_text),
        "total": total,
        "scaled": lambda R, tau: R / tau,
        "length_penalty": lambda R, done, gamma, relative=True: torch.where(
            done, R, R - gamma if relative else torch.full_like(R, -gamma)
        ),
    }
    for name, function in stand_ins.items():
        for module in (grace, reward):
            monkeypatch.setattr(module, name, function)
    return by_role, total


def config(**more):
    given = dict(train_roles="query,positive", tau=0.5, lambda_consistency=0.3, lambda_hard=0.7, infonce_temperature=0.4)
    return Config(model="m", data="d", out="o", batch=3, rollouts=2, gamma=1.5, **(given | more))


@pytest.fixture
def batch(units):
    embeddings = {"query": units(3, 2, 4), "positive": units(3, 2, 4), "negative": units(3, 1, 2, 4)}
    finished = torch.ones(6, 2, dtype=torch.bool)
    finished[1, 0] = finished[4, 1] = False
    return embeddings, finished, torch.eye(3, dtype=torch.bool)


# ---------------------------------------------------------------- judge


@pytest.mark.points(2)
def test_the_reward_is_weighted_scaled_and_penalised(batch, given):
    by_role, total = given
    embeddings, finished, same_text = batch
    R, components, _ = grace.judge(embeddings, finished, same_text, config())
    expected = torch.cat([total(by_role(embeddings, role, 0.4, same_text), 0.3, 0.7) for role in ("query", "positive")]) / 0.5
    torch.testing.assert_close(R, torch.where(finished, expected, expected - 1.5))
    assert set(components) == {"contrastive", "consistency", "hard"} and all(x.shape == (6, 2) for x in components.values())
    torch.testing.assert_close(components["hard"][3:], -(embeddings["positive"][..., 1] ** 3))


@pytest.mark.points(2)
@pytest.mark.parametrize("roles", ["query,positive", "positive", "positive,query", "query,positive,negative"])
def test_g_is_the_gradient_of_all_rewards_at_each_embedding(batch, roles):
    """By finite differences: moving a query also moves the positives' rewards, where positives are trained."""
    embeddings, finished, same_text = batch
    given = config(train_roles=roles)
    finished = torch.cat([finished, finished])[: 3 * len(given.roles)]
    R, _, g = grace.judge(embeddings, finished, same_text, given)
    assert R.shape == finished.shape and g.shape == (*finished.shape, 4)
    for place, role in enumerate(given.roles):
        for at in ((0, 1, 2), (2, 0, 0)):
            sides = []
            for step in (1e-6, -1e-6):
                moved = {name: x.clone() for name, x in embeddings.items()}
                moved[role].view(3, 2, 4)[at] += step
                sides.append(float(grace.judge(moved, finished, same_text, given)[0].sum()))
            assert float(g[3 * place + at[0], at[1], at[2]]) == pytest.approx((sides[0] - sides[1]) / 2e-6, rel=1e-5, abs=1e-7)


@pytest.mark.points(1)
def test_the_papers_reward_trains_positives_alone_and_a_penalty_replaces_it(batch, given):
    by_role, total = given
    embeddings, finished, same_text = batch
    settings = config(recipe="paper", reward="paper", train_roles="positive")
    R, _, g = grace.judge(embeddings, finished[3:], same_text, settings)
    expected = total(by_role(embeddings, "positive", 7.0, same_text), 0.3, 0.7) / 0.5
    expected[1, 1] = -1.5
    torch.testing.assert_close(R, expected)
    assert g.shape == (3, 2, 4) and float(g.abs().sum()) > 0


@pytest.mark.points(1)
def test_what_comes_out_is_constant_and_what_goes_in_is_left_alone(batch):
    embeddings, finished, same_text = batch
    R, components, g = grace.judge(embeddings, finished, same_text, config())
    assert not any(x.requires_grad for x in (R, g, *components.values(), *embeddings.values()))


# ---------------------------------------------------------------- pathwise and the objective


@pytest.mark.points(2)
def test_the_pathwise_term_has_the_gradient_of_the_reward(batch, rand, given):
    """An encoder of one matrix theta. The term's gradient at theta is that of R(h(theta)), taken directly."""
    by_role, total = given
    _, _, same_text = batch
    x, theta = rand(6, 2, 5), rand(5, 4).requires_grad_()
    encoder = lambda: torch.nn.functional.normalize(x @ theta, dim=-1)
    of = lambda h: {"query": h[:3], "positive": h[3:], "negative": h[:3, None].detach()}
    roles = of(encoder())
    R = sum(total(by_role(roles, role, 0.4, same_text), 0.3, 0.7).sum() for role in ("query", "positive")) / 0.5
    g = torch.cat(torch.autograd.grad(R, (roles["query"], roles["positive"]), retain_graph=True))
    value = grace.pathwise(g, encoder())
    assert value.shape == (6, 2)
    gradient, expected = (torch.autograd.grad(y, theta)[0] for y in (value.sum(), R))
    torch.testing.assert_close(gradient, expected, rtol=1e-9, atol=1e-9)
    assert expected.norm() > 0.1


@pytest.mark.points(2)
@pytest.mark.parametrize("more", [{}, {"kl": 0.0, "text_weight": 0.0}, {"kl_estimator": "k2", "prompt_weight": 0.6}], ids=str)
def test_the_objective_is_the_weighted_sum_of_its_terms(rand, monkeypatch, more):
    """Eq. 8, the pathwise terms, the text term and the KL term: one number per rollout, with plain stand-ins for them."""
    monkeypatch.setattr(grace, "pathwise", lambda g, h: (g * h).sum(-1))
    for name, power in (("kl_k3", 2), ("kl_k2", 4)):
        monkeypatch.setattr(grace, name, lambda a, b, mask, power=power: ((a - b) ** power * mask).sum(-1))
    settings = config(**{"pathwise": 0.4, "kl": 0.2, "text_weight": 0.7} | more)
    surrogate = lambda logprobs, part, A: (logprobs * part.mask).sum(-1) * A
    trainer, part = types.SimpleNamespace(config=settings, surrogate=surrogate), types.SimpleNamespace(mask=rand(3, 2, 5) > 0)
    now = Scores(rand(3, 2, 5), rand(3, 2, 4), rand(3, 4), rand(3))
    start, power = Scores(rand(3, 2, 5), None, None) if settings.kl else None, 4 if settings.kl_estimator == "k2" else 2
    A, g, g_prompt = rand(3, 2), rand(3, 2, 4), rand(3, 4) if settings.prompt_weight else None
    value = grace.Trainer.objective(trainer, now, start, part, A, g, g_prompt)
    assert value.shape == (3, 2)
    for i in range(3):
        for k in range(2):
            kept = part.mask[i, k]
            expected = (now.logprobs[i, k][kept]).sum() * A[i, k] + 0.4 * g[i, k] @ now.embeddings[i, k]
            expected = expected + settings.text_weight * now.text_logprobs[i]
            if settings.prompt_weight:
                expected = expected + 0.6 * g_prompt[i] @ now.prompt_embeddings[i]
            if settings.kl:
                expected = expected - 0.2 * ((now.logprobs - start.logprobs)[i, k][kept] ** power).sum()
            torch.testing.assert_close(value[i, k], expected)
