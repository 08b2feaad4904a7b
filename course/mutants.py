"""Grades wrong solutions, and right ones that are written otherwise.

    python course/mutants.py                      all of them, a line each; fails at the first wrong verdict
    python course/mutants.py task1 --one-in 10    only a task's, and only every tenth of its mutants

Each mutant is the reference with one mistake that a student might make, and has to lose points in its own task. The
reference itself, and other right solutions, have to get all of them. (The bonus needs triton.)
"""

import argparse
import os
import re
import tempfile
import textwrap
from multiprocessing.pool import ThreadPool

from grade import graded
from make_starter import ROOT, TASKS, body, put, read, take

MUTANTS = [  # function, what is wrong, what stands there, what a student wrote (None: the whole body)
    ("fold", "mask from what the states hold", "mask = mask.bool()", "mask = (hidden != 0).any(-1)"),
    ("fold", "the mask is edited in place", "mask = mask.bool()", "mask[mask > 0] = 2; mask = mask.bool()"),
    ("fold", "padding is multiplied by 0, and NaN stays", "torch.where(mask[..., None], hidden, 0).sum(1)", "(hidden * mask[..., None]).sum(1)"),
    ("fold", "each block divided by its own count", "torch.where(mask[..., None], hidden, 0).sum(1)", "torch.where(mask[..., None], hidden, 0).sum(1) / mask.sum(1, keepdim=True).clamp(min=1)"),
    ("fold", "the last position as the end token", "last = (mask * torch.arange(mask.shape[1], device=mask.device)).argmax(1)", "last = torch.full((len(mask),), mask.shape[1] - 1)"),
    ("fold", "padding counts as 0 in the maximum", "-torch.inf", "0.0"),
    ("fold", "summed in the states' own precision", "hidden = hidden.to(torch.promote_types(hidden.dtype, torch.float32))", ""),
    ("fold", "the state is edited in place", "new if state is None else state + new", "new if state is None else state.add_(new)"),
    ("fold", "halves forgotten", ', "halves"', ""),
    ("pool", "the sum, not scaled to length one", "unit(fold(", "(fold("),
    ("pool", "a row without a token is not noticed", "if empty:", "if False:"),
    ("draw", "temperature forgotten in the score", "return token[:, 0], logprobs.gather", "return token[:, 0], torch.log_softmax(logits, -1).gather"),
    ("draw", "temperature forgotten in the draw", "logprobs.exp(), uniform", "torch.softmax(logits, -1), uniform"),
    ("draw", "drawn from torch's own generator", "logprobs.exp(), uniform", "logprobs.exp(), torch.rand_like(uniform)"),
    ("draw", "an impossible token where the number is 0", None, "p = tempered(logits, temperature).exp()\ntoken = p.argmax(1, keepdim=True) if temperature == 0 else torch.searchsorted(p.cumsum(1), uniform[:, None].to(p.dtype)).clamp(max=p.shape[1] - 1)\nreturn token[:, 0], p.gather(1, token)[:, 0].log()"),
    ("draw", "a token behind the last where the sum is rounded down", None, "p = tempered(logits, temperature).exp()\ntoken = p.argmax(1, keepdim=True) if temperature == 0 else torch.searchsorted(p.cumsum(1), uniform[:, None].to(p.dtype), right=True)\nreturn token[:, 0], p.gather(1, token)[:, 0].log()"),
    ("draw", "the twenty likeliest alone", "logprobs.exp(), uniform", "torch.where(logprobs < logprobs.topk(min(20, logits.shape[1])).values[:, -1:], 0, logprobs.exp()), uniform"),
    ("sample", "the end token is not counted", "logprob, writing)", "logprob, writing & (token[:, None] != policy.end_ids).all(1))"),
    ("sample", "the mask from `ids == pad`", "by_group = lambda", "mask = ids != 0\n    by_group = lambda"),
    ("sample", "only one of the end tokens ends", "(token[:, None] != policy.end_ids).all(1)", "(token != policy.end_ids[0])"),
    ("sample", "a truncated rationale counts as finished", "by_group(~writing)", "by_group(torch.ones_like(writing))"),
    ("sample", "what is drawn after the end is pooled", "writing[:, None], pooling", "torch.ones_like(writing)[:, None], pooling"),
    ("sample", "a rollout ends before its end token is fed", "decoder.step(token, writing)", "decoder.step(token, writing & (token[:, None] != policy.end_ids).all(1))"),
    ("sample", "the state before a token is pooled for it", "last, to_pool = decoder.step(token, writing)", "to_pool = last; last, _ = decoder.step(token, writing)"),
    ("sample", "always the mean", "policy.reading.pooling", '"mean"'),
    ("sample", "halves forgotten", "with_rationale(state, prompt.repeat_interleave(K, 0), pooling)", "unit(state)"),
    ("sample", "the next token predicted from the states to pool", "last, to_pool = decoder.step(token, writing)", "_, to_pool = decoder.step(token, writing); last = to_pool.nan_to_num()"),
    ("sample", "the loop continues when all have ended", "if decoder.all_ended(writing):", "if False:"),
    ("sample", "rollouts and their prompts in another order", "x.repeat_interleave(K, 0)", "x.repeat(K, 1)"),
    ("sample", "the instruction is pooled", "prompts.counted[:, prompts.n_shared :]", "prompts.mask[:, prompts.n_shared :]"),
    ("sample", "padding behind the longest rationale", "x[:, :T]", "x"),
    ("sample", "log-probabilities of what is drawn after the end", "logprobs.where(mask, 0)", "logprobs"),
    ("contrastive", "negatives averaged, not summed", '"bd,bmd->b", query, negative)', '"bd,bmd->b", query, negative) / max(negative.shape[1], 1)'),
    ("consistency", "a rollout counts itself among the others", "others = rollouts.sum(1, keepdim=True) - rollouts", "others = rollouts.sum(1, keepdim=True)"),
    ("consistency", "a group of one gives NaN", "if K == 1:", "if False:"),
    ("hard_negative", "the sign of the hard term", "return -", "return "),
    ("hard_negative", "own group left among the negatives", None, "return -torch.einsum('id,jkd->ijk', query, positive).amax(2).mean(1)"),
    ("self_similarity", "the rollouts are detached", "anchor, rollouts)", "anchor, rollouts.detach())"),
    ("hard_negative", "instances of one text count as negatives", ", same_text)", ")"),
    ("confidence", "own pair left out of the candidates", "torch.stack([own / temperature, others], 2)", "others[..., None]"),
    ("confidence", "temperature forgotten on the hard negatives", "near / temperature", "near"),
    ("confidence", "a loss, not a reward: the sign", "return own / temperature - candidates.logsumexp(2)", "return candidates.logsumexp(2) - own / temperature"),
    ("confidence", "exponentials that overflow", "candidates.logsumexp(2)", "candidates.exp().sum(2).log()"),
    ("total", "weights exchanged", None, 'return components["contrastive"] + lambda_hard * components["consistency"] + lambda_consistency * components["hard"]'),
    ("scaled", "times tau", "/ tau", "* tau"),
    ("length_penalty", "Eq. 28 whatever `relative` says", "reward - gamma if relative else ", ""),
    ("forward_in_tiles", "own group left among the others", "masked_fill(~other, -torch.inf).logsumexp(1)", "logsumexp(1)"),
    ("forward_in_tiles", "divided by B, not by the others", "other.sum(1).clamp(min=1)", "other.shape[1]"),
    ("backward_in_tiles", "1/K forgotten in the gradient", ") / len(s)", ")"),
    ("backward_in_tiles", "one of equal members takes all", "is_nearest = torch.eq(s, nearest, out=s)", "is_nearest = torch.nn.functional.one_hot(s.argmax(0), len(s)).permute(2, 0, 1).to(s.dtype)"),
    ("backward_in_tiles", "only the last block's columns", "        for k in range(len(s)):", "        d_columns.zero_()\n        for k in range(len(s)):"),
    ("backward_in_tiles", "infinity times 0 where there is no other group", "torch.where(other, (mean / temperature - lse_mean).exp(), 0)", "(mean / temperature - lse_mean).exp() * other"),
    ("forward_in_tiles", "the plain definition in place of tiles", None, "return tuple(plain_similarity(rows, columns, temperature, excluded))"),
    ("clipped_objective", "zeros everywhere", None, "return logprobs.sum(-1) * 0"),
    ("advantages", "equal rewards give NaN", " + 1e-6", ""),
    ("advantages", "the batch's mean in place of the group's", "rewards.mean(1, keepdim=True)", "rewards.mean()"),
    ("advantages", "the rewards are edited in place", "centred = rewards - rewards.mean(1, keepdim=True)", "centred = rewards.sub_(rewards.mean(1, keepdim=True))"),
    ("clipped_objective", "ratio without clipping", "torch.minimum(ratio * A, ratio.clamp(1 - clip_eps, 1 + (clip_high or clip_eps)) * A)", "ratio * A"),
    ("clipped_objective", "clipped without the minimum", "torch.minimum(ratio * A, ratio.clamp(1 - clip_eps, 1 + (clip_high or clip_eps)) * A)", "ratio.clamp(1 - clip_eps, 1 + (clip_high or clip_eps)) * A"),
    ("clipped_objective", "clipping on the wrong side", "torch.minimum", "torch.maximum"),
    ("clipped_objective", "old over new", "logprobs - old_logprobs", "old_logprobs - logprobs"),
    ("clipped_objective", "the ratio detached", "(logprobs - old_logprobs).exp()", "(logprobs - old_logprobs).exp().detach()"),
    ("masked_mean", "padding counts in the mean's denominator", "/ mask.sum(-1)", "/ mask.shape[-1]"),
    ("clipped_objective", "padding is summed too", "(token * mask)", "token"),
    ("clipped_objective", "the mean whatever `length_normalize` says", " if length_normalize else (token * mask).sum(-1)", ""),
    ("clipped_objective", "clip_high forgotten", "clip_high or clip_eps", "clip_eps"),
    ("kl_k3", "the other KL", "reference - logprobs", "logprobs - reference"),
    ("kl_k3", "padding counts in the KL", "masked_mean(log_ratio.exp() - 1 - log_ratio, mask)", "(log_ratio.exp() - 1 - log_ratio).mean(-1)"),
    ("kl_k3", "a KL without a gradient", "log_ratio = reference - logprobs", "log_ratio = reference - logprobs.detach()"),
    ("pathwise", "detached pathwise term", "g * h", "g * h.detach()"),
    ("judge", "the gradient of the mean reward", "R.sum()", "R.mean()"),
    ("judge", "each role's own reward alone", "g = torch.autograd.grad(R.sum(), [leaves[role] for role in config.roles])", "sizes = [len(components['hard']) // len(config.roles)] * len(config.roles)\n    g = [torch.autograd.grad(r.sum(), leaves[role], retain_graph=True)[0] for r, role in zip(R.split(sizes), config.roles)]"),
    ("judge", "roles in another order", "[leaves[role] for role in config.roles]", "[leaves[role] for role in sorted(config.roles)]"),
    ("judge", "the caller's embeddings are made leaves", "x.detach().requires_grad_(role in config.roles)", "x.requires_grad_(role in config.roles)"),
    ("judge", "the reward keeps its graph", "return R.detach()", "return R"),
    ("judge", "the penalty is always relative", ', relative=config.reward != "paper")', ", True)"),
    ("Trainer.objective", "the KL is rewarded", "value - config.kl", "value + config.kl"),
    ("Trainer.objective", "k2 is never used", 'config.kl_estimator == "k2"', "False"),
    ("Trainer.objective", "the pathwise term has no weight", "config.pathwise * pathwise", "pathwise"),
    ("Trainer.objective", "the prompt's pathwise term is left out", "if g_prompt is not None:", "if False:"),
    ("forward_kernel", "own group left among the others", "log_sum_exp(mean * inverse_t, other)", "log_sum_exp(mean * inverse_t, own | other)"),
    ("forward_kernel", "a sum of exponentials without the maximum", "log_sum_exp(nearest * inverse_t, other)", "tl.log(tl.sum(tl.where(other, tl.exp(nearest * inverse_t), 0.0), 1))"),
    ("forward_kernel", "every tile at the place of the first", "at, step = out + tile * N + n", "at, step = out + n"),
]  # fmt: skip
RIGHT = [  # the same, of right solutions; None: the whole body
    ("fold", "row by row", None, """
        if how not in POOLS:
            raise ValueError(how)
        rows = [row[kept > 0] for row, kept in zip(hidden.to(torch.promote_types(hidden.dtype, torch.float32)), mask)]
        if how not in ('max', 'eos'):
            return torch.stack([row.sum(0) for row in rows]) + (0 if state is None else state)
        if state is not None:
            rows = [torch.cat([old[None], row]) for old, row in zip(state, rows)]
        return torch.stack([row.amax(0) if how == 'max' else row[-1] for row in rows])
    """),
    ("draw", "along the running sum, the likeliest first", None, """
        sorted, order = tempered(logits, temperature).sort(1, descending=True)
        below = sorted.exp().cumsum(1)
        place = torch.zeros(len(logits), 1).long() if temperature == 0 else (below <= uniform[:, None] * below[:, -1:]).sum(1, keepdim=True)
        return order.gather(1, place)[:, 0], sorted.gather(1, place)[:, 0]
    """),
    ("sample", "ends when all have ended, without asking the decoder", "if decoder.all_ended(writing):", "if not writing.any():"),
    ("sample", "end tokens by isin", "(token[:, None] != policy.end_ids).all(1)", "~torch.isin(token, policy.end_ids)"),
    ("hard_negative", "a plain product", None, """
        others = ~(torch.eye(len(query)).bool() if same_text is None else same_text)
        nearest = torch.einsum('id,jkd->ijk', query, positive).amax(2)
        return -(nearest * others).sum(1) / others.sum(1).clamp(min=1)
    """),
]  # fmt: skip


def changed(name, old, new):
    """The source of a function's file with that function changed."""
    task = next(task for task, (_, _, names) in TASKS.items() if name in names)
    source = read(ROOT, TASKS[task][1])
    if old is None:
        text = textwrap.indent(textwrap.dedent(new).strip(), " " * body(source, name)[2])
    else:
        text = "\n".join(take(source, name))
        if old not in text:
            raise ValueError(f"{name}: a mutant's text is no longer there: {old!r}")
        text = text.replace(old, new)
    return put(source, name, text.splitlines())


def trials():
    """Of every task: what is tried, whether it is right, and the source to grade."""
    for task, (_, file, names) in TASKS.items():
        yield task, "the reference", True, read(ROOT, file)
        for right, table in ((True, RIGHT), (False, MUTANTS)):
            for name, what, old, new in table:
                if name in names:
                    yield task, f"{name}: {what}", right, changed(name, old, new)


def tried(trial):
    """Grade a trial as a submission. Returns a line about it; AssertionError: the verdict is wrong."""
    task, what, right, source = trial
    with tempfile.NamedTemporaryFile("w", suffix=".py", encoding="utf-8") as file:
        file.write(source)
        file.flush()
        points, failed = graded(task, file.name, limit=600)
    verdict = f"{task}: {what}: {points:g} of {TASKS[task][0]}"
    report = "\n".join([verdict, *failed])
    assert right == (points == TASKS[task][0]), report
    assert not re.search("NameError|SyntaxError|not done", report), report  # caught, but not by what a test asserts
    return verdict


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("tasks", nargs="*", default=list(TASKS), help="task1 to task6 and bonus; all by default")
    parser.add_argument("--one-in", type=int, default=1, metavar="N", help="try only every Nth mutant")
    args = parser.parse_args()
    every = [trial for trial in trials() if trial[0] in args.tasks]
    right, wrong = ([trial for trial in every if trial[2] is verdict] for verdict in (True, False))
    os.environ["OMP_NUM_THREADS"] = "1"  # one process per core, each with one thread
    with ThreadPool(os.cpu_count()) as pool:
        for line in pool.imap(tried, right + wrong[:: args.one_in]):
            print(line, flush=True)


if __name__ == "__main__":
    main()
