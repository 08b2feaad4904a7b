"""The rewards: Eq. 13 to 17, 21 and 28 as the paper writes them, and InfoNCE as a reward.

Every function is pure, takes unit-length embeddings (a dot product is a cosine), and returns one
number per rollout. Nothing here knows a model: gradients flow through all of it, which is what the
pathwise term of grace.py needs.

What is rewarded is a *component*; Eq. 16 weights three of them: contrastive, consistency, hard.
Two families fill these places:

    component     --reward paper              --reward infonce
    contrastive   Eq. 13 (21 without labels)  log-softmax of a rollout's own pair over the batch
    consistency   Eq. 14                      Eq. 14
    hard          Eq. 15                      the same log-softmax, every other group represented
                                              by the one rollout that comes nearest

Departures from the paper, and why:

1. Under Eq. 18 a group's advantages are its rewards less their mean, so whatever is the same for
   all K rollouts of a group cannot teach. That holds for the negative term of Eq. 13 and all of
   Eq. 15: they look at q, d- and other instances, never at rollout k. What is left rewards being
   similar, to everything (docs/companion.md, derivation 1). In the InfoNCE reward every term
   depends on k, and raising all similarities alike leaves it unchanged.
2. Eq. 28 replaces a truncated rollout's reward by -gamma. Where rewards lie below -gamma that is a
   bonus. `length_penalty` subtracts gamma by default; it can also replace, as the paper does.
3. Instances that share a text are not negatives of each other (`same_text`).

Shapes: B instances, K rollouts per group, M hard negatives per instance, D hidden size, N = rows.
"""

import torch
import torch.nn.functional as F

from similarity import group_similarity

# ---------------------------------------------------------------- the paper's components


def contrastive(query, positive, negative):
    """Eq. 13: the cosine to the query, less the query's cosines to the negatives. `[B,D], [B,K,D], [B,M,D] -> [B,K]`.

    With M = 0 the sum is empty. The second term is the same for all K: see departure 1.
    """
    own = torch.einsum("bd,bkd->bk", query, positive)
    away = torch.einsum("bd,bmd->b", query, negative)
    return own - away[:, None]


def self_similarity(anchor, rollouts):
    """Eq. 21: without labels, the cosine to the anchor rollout of the same text. `[B,D], [B,K,D] -> [B,K]`."""
    return torch.einsum("bd,bkd->bk", anchor, rollouts)


def consistency(rollouts):
    """Eq. 14: the mean cosine to the other rollouts of the group. `[B, K, D] -> [B, K]`.

    A group of one has no others: its consistency is 0.
    """
    K = rollouts.shape[1]
    if K == 1:
        return rollouts.new_zeros(rollouts.shape[:2])
    others = rollouts.sum(1, keepdim=True) - rollouts  # [B, K, D]
    return (rollouts * others).sum(-1) / (K - 1)


def hard_negative(query, positive, same_text=None):
    """Eq. 15: minus the mean, over other instances, of the cosine to their nearest rollout. `[B,D], [B,K,D] -> [B]`.

    same_text `[B, B]`, True where two instances share a text: those pairs are left out of the mean.
    An instance with no other to compare with (B = 1) gets 0.
    """
    return -group_similarity(query, positive, 1.0, same_text).hard


# ---------------------------------------------------------------- InfoNCE, read as a reward


def infonce(rows, columns, temperature, negatives=None, same_text=None, mined=False, leave_one_out=False):
    """The log-probability of each rollout's own pair in a softmax over the batch, in nats. At most 0; `-> [B, Kr]`.

    rows       `[B, Kr, D]` what is rewarded; group i's own pair is group i of the columns
    columns    `[B, Kc, D]` each group is a candidate, at the mean cosine to its rollouts
    negatives  `[B, M, Kn, D]` or None: hard negatives, candidates only for the rows of their own instance
    same_text  `[B, B]` or None: True where two instances share a text; not candidates for each other
    mined      every candidate but its own pair at the cosine to its *nearest* rollout instead
    leave_one_out  rows and columns are the same rollouts, and none is its own pair (unsupervised)

        R(i,k) = s_own / t - log sum over candidates c of exp(s_c / t)

    Oord et al. 2018 use its negative as a loss. Adding one number to all similarities changes
    nothing, so unlike Eq. 13's first term it does not pay for an embedding space that shrinks to a cone.
    """
    return infonce_by_mean_and_mined(rows, columns, temperature, negatives, same_text, leave_one_out)[mined]


def infonce_by_mean_and_mined(rows, columns, temperature, negatives=None, same_text=None, leave_one_out=False):
    """`infonce` with mined False and True, from one pass over the batch. `-> [B, Kr], [B, Kr]`."""
    shape = rows.shape[:2]
    own, mean, nearest, _ = (x.view(shape) for x in group_similarity(rows.flatten(0, 1), columns, temperature, same_text))
    if leave_one_out:
        own = consistency(rows)  # Eq. 14 is the mean cosine to the group's others

    near = rows.new_empty(*shape, 0, 1)
    if negatives is not None and negatives.shape[1]:
        near = torch.einsum("bkd,bmld->bkml", rows, negatives)  # [B, Kr, M, Kn]
    return confidence(own, mean, near.mean(3), temperature), confidence(own, nearest, near.amax(3), temperature)


def confidence(own, others, near, temperature):
    """The log-softmax of each rollout's own pair among all candidates. `[B, K], [B, K], [B, K, M] -> [B, K]`, in nats.

    own     cosine of its own pair
    others  log sum over the other candidates c of exp(s_c / t), from the fused similarity; -inf where there is none
    near    cosines to M more candidates: the row's own hard negatives
    """
    candidates = torch.cat([torch.stack([own / temperature, others], 2), near / temperature], 2)  # [B, K, 2 + M]
    return own / temperature - candidates.logsumexp(2)


def outranked(negative, query, positive, temperature, mined=False):
    """InfoNCE for the rollouts of a hard negative: rewarded for staying behind the positive.

    `[B, M, Kn, D], [B, Kq, D], [B, Kp, D] -> [B*M, Kn]`: the log-probability that the query picks its
    positive, if this rollout were its only negative.
    """
    own = torch.einsum("bd,bd->b", query.mean(1), positive.mean(1))
    near = torch.einsum("bmld,bkd->bmlk", negative, query)
    near = near.amax(3) if mined else near.mean(3)
    return F.logsigmoid((own[:, None, None] - near) / temperature).flatten(0, 1)


# ---------------------------------------------------------------- Eq. 16, 17, 28


def total(components, lambda_consistency, lambda_hard):
    """Eq. 16: the weighted sum of a role's three components."""
    return components["contrastive"] + lambda_consistency * components["consistency"] + lambda_hard * components["hard"]


def scaled(reward, tau):
    """Eq. 17: R / tau."""
    return reward / tau


def length_penalty(reward, finished, gamma, relative=True):
    """The rewards, with the penalty of rollouts that never reached an end token. `[B, K], [B, K] bool -> [B, K]`.

    relative: the reward less gamma; otherwise Eq. 28, -gamma whatever the reward would have been.
    """
    return torch.where(finished, reward, reward - gamma if relative else torch.full_like(reward, -gamma))


# ---------------------------------------------------------------- which role is rewarded for what


def paper_components(roles, same_text=None):
    """The paper's components of the one role it trains, `{component: [B, K]}`.

    roles: embeddings by role. Supervised: query `[B, 1, D]`, positive `[B, K, D]` and negative
    `[B, M, 1, D]`; unsupervised: anchor `[B, 1, D]` and text `[B, K, D]`.
    """
    if "text" in roles:
        anchor, rollouts = roles["anchor"][:, 0], roles["text"]
        near = self_similarity(anchor, rollouts)
    else:
        anchor, rollouts = roles["query"][:, 0], roles["positive"]
        near = contrastive(anchor, rollouts, roles["negative"][:, :, 0])
    hard = hard_negative(anchor, rollouts, same_text)[:, None].expand_as(near)
    return {"contrastive": near, "consistency": consistency(rollouts), "hard": hard}


def infonce_components(roles, role, temperature, same_text=None):
    """The InfoNCE components of one role, `{component: [groups, K]}`.

    Supervised: a query's candidates are the batch's positives and its own hard negatives, a
    positive's are the batch's queries; a negative is rewarded by `outranked`. Unsupervised: a
    rollout's own pair are the other rollouts of its text, its candidates those of other texts.
    """
    x = roles[role]
    if role == "text":
        mean, mined = infonce_by_mean_and_mined(x, x, temperature, None, same_text, leave_one_out=True)
    elif role == "query":
        mean, mined = infonce_by_mean_and_mined(x, roles["positive"], temperature, roles["negative"], same_text)
    elif role == "positive":
        mean, mined = infonce_by_mean_and_mined(x, roles["query"], temperature, None, same_text)
    else:
        mean, mined = (outranked(x, roles["query"], roles["positive"], temperature, how) for how in (False, True))
    groups = x.flatten(0, -3)  # negatives: [B, M, K, D] -> [B*M, K, D]
    return {"contrastive": mean, "consistency": consistency(groups), "hard": mined}
