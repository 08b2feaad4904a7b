"""What a run shows: the figures of a step, the signs of a collapse, rationales along the training, before and after."""

import sys

import torch


def effective_rank(embeddings):
    """exp of the entropy of the normalized singular values (Roy & Vetterli 2007). `[n, D] -> scalar`."""
    p = torch.linalg.svdvals(embeddings)
    p = p / p.sum()
    return torch.exp(-(p * p.clamp(min=1e-12).log()).sum())


def describe(rollouts, R, components):
    """What a batch of rollouts looks like: rewards and their spread, and the signs of a collapse."""
    lengths, first = rollouts.mask.sum(-1).float(), rollouts.embeddings[:, 0]  # [N, K]; one rollout a text [N, D]
    written = set(map(tuple, rollouts.ids.flatten(0, 1).tolist()))  # equal padding cannot make two alike: ends differ
    N = len(first)
    seen = {"reward": R.mean(), "reward_std": R.std(1).mean()}
    for name, x in components.items():  # the spread within a group is all that an advantage can see
        seen |= {name: x.mean(), f"{name}_std": x.std(1).mean()}
    return seen | {
        "length": lengths.mean(),
        "truncated": 1 - rollouts.finished.float().mean(),
        "distinct": len(written) / lengths.numel(),
        "effective_rank": effective_rank(first),
        "cosine": ((first @ first.T).sum() - N) / max(N * (N - 1), 1),  # between different texts
        "prompts_cut": rollouts.cut,
    }


def peak_memory_gb(device):
    """Peak memory so far: the GPU's, else the process's."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    import resource  # not on Windows, which has no CUDA-less path worth measuring here

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (2**20 if sys.platform != "darwin" else 2**30)


def show_rationales(history, texts):
    """rationales.md: what the policy writes about the same texts along the training (Table 6)."""
    lines = ["# Rationales along the training\n"]
    for i, text in enumerate(texts):
        lines += [f"**{text}**\n", "| step | rationale |", "| ---: | --- |"]
        lines += [f"| {step} | {written[i].replace('|', ' ').replace(chr(10), ' ')} |" for step, written in history] + [""]
    return "\n".join(lines)


def show_summary(summary):
    """Before, after, and after without rationales, as a table for the terminal."""
    names = list(summary["after"])
    lines = [f"{'':24}" + "".join(f"{name:>12}" for name in names)]
    for moment in ("before", "after", "after_without_rationale"):
        if found := summary.get(moment):
            values = (f"{found[name]:12.3f}" if name in found else f"{'':12}" for name in names)
            lines.append(f"{moment.replace('_', ' '):24}" + "".join(values))
    return "\n".join(lines)


def tensorboard(out):
    """A TensorBoard writer where that is installed, else None: metrics.jsonl has the same figures."""
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        return None
    return SummaryWriter(out)
