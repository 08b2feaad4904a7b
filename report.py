"""What a run shows: the figures of a step, the signs of a collapse, rationales along the training, before and after."""

import json
import os
import sys

import torch


def effective_rank(embeddings):
    """exp of the entropy of the normalized singular values (Roy & Vetterli 2007). `[n, D] -> scalar`."""
    p = torch.linalg.svdvals(embeddings)
    p = p / p.sum()
    return torch.exp(-(p * p.clamp(min=1e-12).log()).sum())


def describe(rollouts, R, components):
    """What a batch of rollouts looks like: rewards and their spread, and the signs of a collapse.

    Four counts are of what can teach little or nothing, as shares of the groups (of the rollouts: `empty`):

    no_spread      every rollout got the same reward: its advantages are 0. Only the pathwise and KL terms move it.
    all_identical  every rollout is the same: what little advantages rounding may give it sum to 0 over one
                   and the same gradient, so the score-function term is 0 here too.
    all_truncated  no rollout came to an end token. Where gamma is subtracted all lose the same, and the group
                   teaches by the rest of its rewards; where -gamma takes their place (Eq. 28) it has no spread.
    empty          the end token and nothing before it: a rollout like any other, its embedding the text's.
    """
    lengths, first = rollouts.mask.sum(-1).float(), rollouts.embeddings[:, 0]  # [N, K]; one rollout a text [N, D]
    written = set(map(tuple, rollouts.ids.flatten(0, 1).tolist()))  # equal padding cannot make two alike: ends differ
    N = len(first)
    seen = {"reward": R.mean(), "reward_std": R.std(1).mean()}
    for name, x in components.items():  # the spread within a group is all that an advantage can see
        seen |= {name: x.mean(), f"{name}_std": x.std(1).mean()}
    return (
        seen
        | {
            "length": lengths.mean(),
            "truncated": 1 - rollouts.finished.float().mean(),
            "distinct": len(written) / lengths.numel(),
            "effective_rank": effective_rank(first),
            "cosine": ((first @ first.T).sum() - N) / max(N * (N - 1), 1),  # between different texts
            "prompts_cut": rollouts.cut,
            "no_spread": (R.amax(1) - R.amin(1) < 1e-6).float().mean(),
            "all_identical": (rollouts.ids == rollouts.ids[:, :1]).all(2).all(1).float().mean(),
            "all_truncated": (~rollouts.finished).all(1).float().mean(),
            "empty": ((lengths == 1) & rollouts.finished).float().mean(),
        }
    )


def peak_memory_gb(device):
    """Peak memory so far: the GPU's, else the process's."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    import resource  # not on Windows, which has no CUDA-less path worth measuring here

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (2**20 if sys.platform != "darwin" else 2**30)


def read_metrics(path):
    """The lines of a metrics.jsonl as `[(line, its dict)]`. What was torn by a stop, or is none of ours, is passed over."""
    found = []
    if os.path.isfile(path):
        with open(path, errors="replace") as file:
            for line in file:
                try:
                    metrics = json.loads(line)
                except ValueError:
                    continue
                if isinstance(metrics, dict) and "step" in metrics:
                    found.append((line, metrics))
    return found


def show_rationales(history, texts):
    """rationales.md: what the policy writes about the same texts along the training (Table 6)."""
    lines = ["# Rationales along the training\n"]
    for i, text in enumerate(texts):
        lines += [f"**{text}**\n", "| step | rationale |", "| ---: | --- |"]
        lines += [f"| {step} | {written[i].replace('|', ' ').replace(chr(10), ' ')} |" for step, written in history] + [""]
    return "\n".join(lines)


def show_skipped(skipped, out):
    """Rows of the data that are not used, for the terminal: a few of them."""
    lines = [f"skipped: {bad['file']}, {bad['where']}: {bad['why']}" for bad in skipped[:5]]
    lines += [f"{len(skipped)} rows skipped; {out}/skipped_rows.json lists them all"]
    return "\n".join(lines).encode("ascii", "backslashreplace").decode()  # what is wrong with a row may be its characters


def show_summary(summary):
    """Before, after, and after without rationales, as a table for the terminal."""
    names = list(summary["after"])
    lines = [f"{'':24}" + "".join(f"{name:>12}" for name in names)]
    for moment in ("before", "after", "after_without_rationale"):
        if found := summary.get(moment):
            values = (f"{found[name]:12.3f}" if name in found else f"{'':12}" for name in names)
            lines.append(f"{moment.replace('_', ' '):24}" + "".join(values))
    return "\n".join(lines)


def tensorboard(out, step):
    """A TensorBoard writer where that is installed, else None: metrics.jsonl has the same figures. What an earlier
    run, killed since, wrote beyond `step` goes."""
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        return None
    return SummaryWriter(out, purge_step=step + 1)
