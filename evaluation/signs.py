"""What a batch of rollouts looks like, for `metrics.jsonl`: rewards, lengths, and the signs of a collapse.

Shapes: N groups, K rollouts per group, D hidden size; n rows.
"""

import torch


def effective_rank(embeddings):
    """exp of the entropy of the normalized singular values (Roy & Vetterli 2007). `[n, D] -> scalar`."""
    p = torch.linalg.svdvals(embeddings)
    p = p / p.sum()
    return torch.exp(-(p * p.clamp(min=1e-12).log()).sum())


def describe(rollouts, R, components):
    """What a batch of rollouts looks like: rewards and their spread, and the signs of a collapse.

    Four figures count what can teach little or nothing, as shares of the groups (`empty`: of the rollouts):

    no_spread      every rollout got the same reward: its advantages are 0. Only the other terms move it.
    all_identical  every rollout is the same: any small advantages that rounding leaves sum to 0 and weight the
                   same gradient, so the score-function term is 0 here too.
    all_truncated  no rollout reached an end token. If gamma is subtracted, all lose the same, and the group
                   learns from the rest of its rewards; if -gamma replaces them (Eq. 28), it has no spread.
    empty          the end token and nothing before it: a rollout like any other, whose embedding is that of
                   the text and the end token.
    """
    lengths, first = rollouts.mask.sum(-1).float(), rollouts.embeddings[:, 0]  # [N, K]; one rollout per text [N, D]
    ids = [tuple(row) for row in rollouts.ids.flatten(0, 1).tolist()]  # each row ends, or is full
    N, K = lengths.shape
    stats = {"reward": R.mean(), "reward_std": R.std(1).mean()}
    for name, x in components.items():  # the spread within a group is all that an advantage depends on
        stats |= {name: x.mean(), f"{name}_std": x.std(1).mean()}
    return (
        stats
        | {
            "length": lengths.mean(),
            "truncated": 1 - rollouts.finished.float().mean(),
            "distinct": len(set(ids)) / (N * K),
            "distinct_texts": len(set(ids[::K])) / N,  # of one rationale per text: agreement between texts alone
            "effective_rank": effective_rank(first),
            "cosine": ((first @ first.T).sum() - N) / max(N * (N - 1), 1),  # between different texts
            "prompts_cut": rollouts.n_cut,
            "no_spread": (R.amax(1) - R.amin(1) < 1e-6).float().mean(),
            "all_identical": (rollouts.ids == rollouts.ids[:, :1]).all(2).all(1).float().mean(),
            "all_truncated": (~rollouts.finished).all(1).float().mean(),
            "empty": ((lengths == 1) & rollouts.finished).float().mean(),
        }
    )
