"""What a step leaves in metrics.jsonl: what its rollouts look like, how far its update went, and the signs of a collapse.

Shapes: N groups, K rollouts per group, T tokens, D hidden size; n rows.
"""

import torch

from plumbing import ranks


def effective_rank(embeddings):
    """exp of the entropy of the normalized singular values (Roy & Vetterli 2007). `[n, D] -> scalar`."""
    p = torch.linalg.svdvals(embeddings.cpu())  # small, and not implemented on mps
    p = p / p.sum()
    return torch.exp(-(p * p.clamp(min=1e-12).log()).sum())


def batch_metrics(rollouts, R, components):
    """What a batch of rollouts looks like: rewards and their spread, and the signs of a collapse.

    Two figures count what can teach little or nothing. `no_spread` is the share of groups in which every rollout got the same
    reward: the advantages are 0, and only the other terms move it. `empty` is the share of rollouts with the end token and
    nothing before it: the embedding is that of the text and the end token.
    """
    wrote = rollouts.mask.any(-1).all(-1)  # not documents whose prompt is all that is read
    rollouts, R, components = rollouts[wrote], R[wrote], {name: x[wrote] for name, x in components.items()}
    lengths, first = rollouts.mask.sum(-1).float(), rollouts.embeddings[:, 0]  # [N, K]; one rollout per text [N, D]
    ids = [tuple(row) for row in rollouts.ids.flatten(0, 1).tolist()]  # each row ends, or is full
    N, K = lengths.shape
    stats = {"reward": R.mean(), "reward_std": R.std(1).mean()}
    for name, x in components.items():  # the spread within a group is all that an advantage depends on
        stats |= {name: x.mean(), f"{name}_std": x.std(1).mean()}
    stats |= {
        "length": lengths.mean(),
        "truncated": 1 - rollouts.finished.float().mean(),
        "distinct": len(set(ids)) / (N * K),
        "distinct_texts": len(set(ids[::K])) / N,  # of one rationale per text: agreement between texts alone
        "effective_rank": effective_rank(first),
        "cosine": ((first @ first.T).sum() - N) / max(N * (N - 1), 1),  # between different texts
        "prompts_cut": rollouts.cut.sum(),
        "no_spread": (R.amax(1) - R.amin(1) < 1e-6).float().mean(),
        "empty": ((lengths == 1) & rollouts.finished).float().mean(),
    }
    return {name: float(x) for name, x in stats.items()}


def update_metrics(now, start, part, A, value, clip_eps):
    """What is worth logging of one micro-batch, as sums over its rollouts, by name; `first_ratio_off` is a maximum.

    approx_kl and kl_start: Schulman's k3 estimate of how far the update has come from the sampler, and the policy from its
    start. clip_fraction: tokens that Eq. 8 takes out of the gradient. first_ratio_off: how far a ratio is from 1; in the
    first optimizer step on a batch it can only be rounding.
    """
    of_tokens = lambda x: ((x * part.mask).sum(-1) / part.mask.sum(-1).clamp(min=1)).sum()
    k3 = lambda log_ratio: of_tokens(log_ratio.exp() - 1 - log_ratio)
    with torch.no_grad():
        off = ((now.logprobs - part.logprobs).exp() - 1) * part.mask
        clipped = off * A.sign()[..., None] > clip_eps  # the other way nothing is clipped
        sums = {"loss": -value.sum(), "approx_kl": k3(now.logprobs - part.logprobs), "clip_fraction": of_tokens(clipped)}
        sums |= {"prompt_loss": -now.text_logprobs.sum() * A.shape[1], "first_ratio_off": off.abs().max()}
        return sums | ({"kl_start": k3(start.logprobs - now.logprobs)} if start else {})


def update_means(log, n):
    """Means over n rollouts of what `update_metrics` gave per micro-batch. log: `[(optimizer step, sums)]` of this rank."""
    log = [micro for of_rank in ranks.gather(log) for micro in of_rank]
    means = {name: sum(float(sums[name]) for _, sums in log) / n for name in log[0][1]}
    return means | {"first_ratio_off": max(float(sums["first_ratio_off"]) for step, sums in log if step == 0)}
