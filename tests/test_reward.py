"""Every equation against a loop in float64, written from the paper and not from the code: the first seven are the course's."""

import math

import pytest
import torch

import reward
from course.tests.test_task3 import (  # noqa: F401
    close,
    infonce_by_loop,
    test_eq13_contrastive,
    test_eq14_consistency,
    test_eq15_hard_negative,
    test_eq21_self_similarity,
    test_infonce,
    test_length_penalty,
    test_total_and_scale_are_eq16_and_eq17,
)

SHARED = torch.eye(4, dtype=torch.bool)  # which of four instances share a text
SHARED[1, 2] = SHARED[2, 1] = True


def outranked_by_loop(n, q, p, t, mined=False):
    pick = max if mined else (lambda xs: sum(xs) / len(xs))
    expected = []
    for i in range(len(n)):
        own = [float(a @ b) for a in q[i] for b in p[i]]
        for m in range(n.shape[1]):
            near = [pick([float(h @ a) for a in q[i]]) for h in n[i, m]]
            expected.append([-math.log(1 + math.exp((s - sum(own) / len(own)) / t)) for s in near])
    return expected


@pytest.mark.parametrize("M", [0, 2])
@pytest.mark.parametrize("same_text", [None, SHARED])
def test_infonce_of_each_role(units, M, same_text):
    """Whose columns are its candidates, whose negatives, and what is mined."""
    t, q, p, n, text = 0.2, units(4, 2, 6), units(4, 3, 6), units(4, M, 3, 6), units(4, 3, 6)
    roles = {"query": q, "positive": p, "negative": n, "text": text}
    for mined, name in ((False, "contrastive"), (True, "hard")):
        expected = {
            "query": infonce_by_loop(q, p, t, n, mined, same_text),
            "positive": infonce_by_loop(p, q, t, None, mined, same_text),
            "text": infonce_by_loop(text, text, t, None, mined, same_text, leave_one_out=True),
        }
        close(reward.infonce(q, p, t, n, same_text, mined), expected["query"])
        if M:
            expected["negative"] = outranked_by_loop(n, q, p, t, mined)
        for role, values in expected.items():
            components = reward.infonce_components(roles, role, t, same_text)
            close(components[name], values)
            close(components["consistency"], reward.consistency(roles[role].flatten(0, -3)).tolist())


def test_paper_components_of_both_modes(units):
    q, p, n = units(4, 1, 6), units(4, 3, 6), units(4, 2, 1, 6)
    supervised = reward.paper_components({"query": q, "positive": p, "negative": n}, SHARED)
    unsupervised = reward.paper_components({"anchor": q, "text": p}, SHARED)
    close(supervised["contrastive"], reward.contrastive(q[:, 0], p, n[:, :, 0]).tolist())
    close(unsupervised["contrastive"], reward.self_similarity(q[:, 0], p).tolist())
    for components in (supervised, unsupervised):
        close(components["hard"], reward.hard_negative(q[:, 0], p, SHARED)[:, None].expand(4, 3).tolist())
        close(components["consistency"], reward.consistency(p).tolist())


def test_infonce_ignores_a_rise_of_all(units):
    """One more coordinate, shared by all, raises every cosine by the same amount. Eq. 13 is fooled."""
    q, p, shared = units(4, 2, 6), units(4, 3, 6), 0.8

    def coned(x):  # unit vectors again, with cosines shared^2 + (1 - shared^2) cos
        return torch.cat([x * math.sqrt(1 - shared**2), torch.full((*x.shape[:-1], 1), shared, dtype=x.dtype)], -1)

    t = 0.1
    before = reward.infonce(q, p, t)
    after = reward.infonce(coned(q), coned(p), t * (1 - shared**2))
    torch.testing.assert_close(after, before)
    paid = reward.contrastive(coned(q)[:, 0], coned(p), coned(units(4, 0, 6))) - reward.contrastive(q[:, 0], p, units(4, 0, 6))
    assert paid.mean() > 0.5
