"""Tries the tests that grade on wrong solutions, and on right ones that are written otherwise.

    python course/mutants.py                       all of them, a line each; fails at the first wrong verdict
    python course/mutants.py task1 --one-in 10     only a task's, and of its mutants only every tenth

Each mutant is the reference with one mistake that a student might make, and has to fail its own task's tests.
Each alternative is another right solution, and has to pass them. All other tasks' functions are empty meanwhile: a
task's tests need no other task's code.
"""

import argparse
import contextlib
import importlib
import io
import linecache
import os
import re
import sys
import tempfile
import textwrap

import pytest
from make_starter import TASKS, body, build, put

MUTANTS = [  # task, what is wrong, function, what stands there, what a student wrote (None: the whole body)
    ("task1", "zeros everywhere", "fold", None, "return torch.zeros(len(hidden), hidden.shape[2])"),
    ("task1", "mask from what the states hold", "fold", "mask = mask.bool()", "mask = (hidden != 0).any(-1)"),
    ("task1", "the mask is edited in place", "fold", "mask = mask.bool()", "mask[:, 0] = mask[:, 0].clamp(min=0) * 1; mask[:, 1:] *= mask[:, 1:]; mask[mask > 0] = 2; mask = mask.bool()"),
    ("task1", "padding is multiplied by 0, and NaN stays", "fold", "torch.where(mask[..., None], hidden, 0).sum(1)", "(hidden * mask[..., None]).sum(1)"),
    ("task1", "the mean over all positions", "fold", "torch.where(mask[..., None], hidden, 0).sum(1)", "hidden.mean(1)"),
    ("task1", "each block divided by its own count", "fold", "torch.where(mask[..., None], hidden, 0).sum(1)", "torch.where(mask[..., None], hidden, 0).sum(1) / mask.sum(1, keepdim=True).clamp(min=1)"),
    ("task1", "the last position as the end token", "fold", "last = (mask * torch.arange(mask.shape[1], device=mask.device)).argmax(1)", "last = torch.full((len(mask),), mask.shape[1] - 1)"),
    ("task1", "padding counts as 0 in the maximum", "fold", "-torch.inf", "0.0"),
    ("task1", "summed in the states' own precision", "fold", "hidden = hidden.to(torch.promote_types(hidden.dtype, torch.float32))", ""),
    ("task1", "the state is edited in place", "fold", "new if state is None else state + new", "new if state is None else state.add_(new)"),
    ("task1", "NaN made 0, infinity kept", "fold", "torch.where(mask[..., None], hidden, 0).sum(1)", "(hidden.nan_to_num(posinf=torch.inf) * mask[..., None]).sum(1)"),
    ("task1", "the sum, not scaled to length one", "pool", "unit(fold(", "(fold("),
    ("task1", "a row without a token is not noticed", "pool", "if empty:", "if False:"),
    ("task1", "only the first row is looked at", "pool", ".any(1))", ".any(1))[:1]"),
    ("task2", "temperature forgotten in the score", "draw", "return token[:, 0], probabilities.gather(1, token)[:, 0].log()", "return token[:, 0], torch.log_softmax(logits, -1).gather(1, token)[:, 0]"),
    ("task2", "temperature forgotten in the draw", "draw", "tempered(logits, temperature)", "tempered(logits, 1.0)"),
    ("task2", "always greedy", "draw", "if temperature == 0:", "if True:"),
    ("task2", "drawn from torch's own generator", "draw", "uniform[:, None]", "torch.rand_like(uniform)[:, None]"),
    ("task2", "one number for all rows", "draw", "uniform[:, None]", "uniform[:1, None]"),
    ("task2", "an impossible token where the number is 0", "draw", None, "p = tempered(logits, temperature).exp()\ntoken = p.argmax(1, keepdim=True) if temperature == 0 else torch.searchsorted(p.cumsum(1), uniform[:, None].to(p.dtype)).clamp(max=p.shape[1] - 1)\nreturn token[:, 0], p.gather(1, token)[:, 0].log()"),
    ("task2", "a token behind the last where the sum is rounded down", "draw", None, "p = tempered(logits, temperature).exp()\ntoken = p.argmax(1, keepdim=True) if temperature == 0 else torch.searchsorted(p.cumsum(1), uniform[:, None].to(p.dtype), right=True)\nreturn token[:, 0], p.gather(1, token)[:, 0].log()"),
    ("task2", "the twenty likeliest alone", "draw", "probabilities = tempered(logits, temperature).exp()", "probabilities = tempered(logits, temperature).exp()\n    probabilities = torch.where(probabilities < probabilities.topk(min(20, logits.shape[1])).values[:, -1:], 0, probabilities)"),
    ("task2", "the end token is not counted", "sample", "logprob, writing)", "logprob, writing & (token[:, None] != policy.end_ids).all(1))"),
    ("task2", "the mask from `ids == pad`", "sample", "by_group = lambda", "mask = ids != 0\n    by_group = lambda"),
    ("task2", "only one of the end tokens ends", "sample", "(token[:, None] != policy.end_ids).all(1)", "(token != policy.end_ids[0])"),
    ("task2", "a truncated rationale counts as finished", "sample", "by_group(~writing)", "by_group(torch.ones_like(writing))"),
    ("task2", "what is drawn after the end is pooled", "sample", "writing[:, None], pooling", "torch.ones_like(writing)[:, None], pooling"),
    ("task2", "the end token is not pooled", "sample", "writing[:, None], pooling", "(writing & (token[:, None] != policy.end_ids).all(1))[:, None], pooling"),
    ("task2", "a rollout ends before its end token is fed", "sample", "decoder.step(token, writing)", "decoder.step(token, writing & (token[:, None] != policy.end_ids).all(1))"),
    ("task2", "the state before a token is pooled for it", "sample", "last, to_pool = decoder.step(token, writing)", "to_pool = last; last, _ = decoder.step(token, writing)"),
    ("task2", "always the mean", "sample", "policy.reading.pooling", '"mean"'),
    ("task2", "the next token predicted from the states to pool", "sample", "last, to_pool = decoder.step(token, writing)", "_, to_pool = decoder.step(token, writing); last = to_pool.nan_to_num()"),
    ("task2", "the loop continues when all have ended", "sample", "if decoder.all_ended(writing):", "if False:"),
    ("task2", "the loop stops before the last end token is fed", "sample", "last, to_pool = decoder.step(token, writing)", "if not (writing & (token[:, None] != policy.end_ids).all(1)).any():\n            writing = writing & False\n            break\n        last, to_pool = decoder.step(token, writing)"),
    ("task2", "the first position's number at every position", "sample", "flatten(0, 1)[:, t]", "flatten(0, 1)[:, 0]"),
    ("task2", "numbers of the rollouts in another order", "sample", "uniform.flatten(0, 1)", "uniform.transpose(0, 1).flatten(0, 1)"),
    ("task2", "rollouts and their prompts in another order", "sample", "x.repeat_interleave(K, 0)", "x.repeat(K, 1)"),
    ("task2", "the text is not pooled", "sample", "decoder = policy.decoder", "state = torch.zeros_like(state)\n    decoder = policy.decoder"),
    ("task2", "the instruction is pooled", "sample", "prompts.counted[:, prompts.n_shared :]", "prompts.mask[:, prompts.n_shared :]"),
    ("task2", "a prompt's embedding is not of unit length", "sample", "unit(prompt)", "prompt"),
    ("task2", "padding behind the longest rationale", "sample", "x[:, :T]", "x"),
    ("task2", "log-probabilities of what is drawn after the end", "sample", "logprobs.where(mask, 0)", "logprobs"),
    ("task3", "zeros everywhere", "contrastive", None, "return torch.zeros(positive.shape[:2], dtype=positive.dtype)"),
    ("task3", "negatives averaged, not summed", "contrastive", '"bd,bmd->b", query, negative)', '"bd,bmd->b", query, negative) / max(negative.shape[1], 1)'),
    ("task3", "a rollout counts itself among the others", "consistency", "others = rollouts.sum(1, keepdim=True) - rollouts", "others = rollouts.sum(1, keepdim=True)"),
    ("task3", "divided by K", "consistency", "/ (K - 1)", "/ K"),
    ("task3", "a group of one gives NaN", "consistency", "if K == 1:", "if False:"),
    ("task3", "the sign of the hard term", "hard_negative", "return -", "return "),
    ("task3", "the farthest rollout, not the nearest", "hard_negative", None, "s = torch.einsum('id,jkd->ijk', query, positive).amin(2)\nother = ~torch.eye(len(s), dtype=torch.bool) if same_text is None else ~same_text & ~torch.eye(len(s), dtype=torch.bool)\nreturn -(s * other).sum(1) / other.sum(1).clamp(min=1)"),
    ("task3", "own group left among the negatives", "hard_negative", None, "return -torch.einsum('id,jkd->ijk', query, positive).amax(2).mean(1)"),
    ("task3", "the rollouts are detached", "self_similarity", "anchor, rollouts)", "anchor, rollouts.detach())"),
    ("task3", "instances of one text count as negatives", "hard_negative", ", same_text)", ")"),
    ("task3", "own pair left out of the candidates", "confidence", "torch.stack([own / temperature, others], 2)", "others[..., None]"),
    ("task3", "temperature forgotten on the hard negatives", "confidence", "near / temperature", "near"),
    ("task3", "a loss, not a reward: the sign", "confidence", "return own / temperature - candidates.logsumexp(2)", "return candidates.logsumexp(2) - own / temperature"),
    ("task3", "exponentials that overflow", "confidence", "candidates.logsumexp(2)", "candidates.exp().sum(2).log()"),
    ("task3", "weights exchanged", "total", None, 'return components["contrastive"] + lambda_hard * components["consistency"] + lambda_consistency * components["hard"]'),
    ("task3", "times tau", "scaled", "/ tau", "* tau"),
    ("task3", "finished rollouts pay the penalty", "length_penalty", "torch.where(finished,", "torch.where(~finished,"),
    ("task3", "Eq. 28 whatever `relative` says", "length_penalty", "reward - gamma if relative else ", ""),
    ("task4", "own group left among the others", "forward_in_tiles", "masked_fill(~other, -torch.inf).logsumexp(1)", "logsumexp(1)"),
    ("task4", "mean of exponentials, not of cosines", "forward_in_tiles", "for here, _, mean, nearest, own, other in blocks_of_rows(rows, columns, excluded):", "for here, s, mean, nearest, own, other in blocks_of_rows(rows, columns, excluded):\n        mean = (s / temperature).logsumexp(0) * temperature - temperature * torch.tensor(float(len(s))).log()"),
    ("task4", "divided by B, not by the others", "forward_in_tiles", "other.sum(1).clamp(min=1)", "other.shape[1]"),
    ("task4", "zeros for the gradient", "backward_in_tiles", None, "return torch.zeros_like(rows), torch.zeros_like(columns)"),
    ("task4", "1/t forgotten in the gradient", "backward_in_tiles", "p * w_mean / temperature", "p * w_mean"),
    ("task4", "1/K forgotten in the gradient", "backward_in_tiles", ") / len(s)", ")"),
    ("task4", "one of equal members takes all", "backward_in_tiles", "is_nearest = torch.eq(s, nearest, out=s)", "is_nearest = torch.nn.functional.one_hot(s.argmax(0), len(s)).permute(2, 0, 1).to(s.dtype)"),
    ("task4", "the nearest member's gradient divided by K", "backward_in_tiles", "to_nearest / is_nearest.sum(0)", "to_nearest / len(s)"),
    ("task4", "only the last block's columns", "backward_in_tiles", "        for k in range(len(s)):", "        d_columns.zero_()\n        for k in range(len(s)):"),
    ("task4", "equal members each take all", "backward_in_tiles", "to_nearest / is_nearest.sum(0)", "to_nearest"),
    ("task4", "infinity times 0 where there is no other group", "backward_in_tiles", "torch.where(other, (mean / temperature - lse_mean).exp(), 0)", "(mean / temperature - lse_mean).exp() * other"),
    ("task4", "the whole table at once", "forward_in_tiles", "for here, _,", "rows @ columns.flatten(0, 1).T\n    for here, _,"),
    ("task4", "the plain definition in place of tiles", "forward_in_tiles", None, "return tuple(plain_similarity(rows, columns, temperature, excluded))"),
    ("task4", "autograd through the plain definition", "backward_in_tiles", None, "with torch.enable_grad():\n    r, c = rows.detach().requires_grad_(), columns.detach().requires_grad_()\n    own, mean, nearest, hard = plain_similarity(r, c, temperature, excluded)\n    count = (~excluded).sum(1).clamp(min=1).repeat_interleave(len(rows) // len(columns))\n    numbers = (own, mean.nan_to_num(neginf=0.0), nearest.nan_to_num(neginf=0.0), hard * count)\n    return tuple(x.nan_to_num() for x in torch.autograd.grad(numbers, (r, c), saved[2:]))"),
    ("task5", "zeros everywhere", "clipped_objective", None, "return logprobs.sum(-1) * 0"),
    ("task5", "standard deviation in the advantage", "advantages", "if normalize:", "if True:"),
    ("task5", "equal rewards give NaN", "advantages", " + 1e-6", ""),
    ("task5", "the batch's mean in place of the group's", "advantages", "rewards.mean(1, keepdim=True)", "rewards.mean()"),
    ("task5", "the rewards are edited in place", "advantages", "centred = rewards - rewards.mean(1, keepdim=True)", "centred = rewards.sub_(rewards.mean(1, keepdim=True))"),
    ("task5", "ratio without clipping", "clipped_objective", "torch.minimum(ratio * A, ratio.clamp(1 - clip_eps, 1 + (clip_high or clip_eps)) * A)", "ratio * A"),
    ("task5", "clipped without the minimum", "clipped_objective", "torch.minimum(ratio * A, ratio.clamp(1 - clip_eps, 1 + (clip_high or clip_eps)) * A)", "ratio.clamp(1 - clip_eps, 1 + (clip_high or clip_eps)) * A"),
    ("task5", "clipping on the wrong side", "clipped_objective", "torch.minimum", "torch.maximum"),
    ("task5", "old over new", "clipped_objective", "logprobs - old_logprobs", "old_logprobs - logprobs"),
    ("task5", "the ratio detached", "clipped_objective", "(logprobs - old_logprobs).exp()", "(logprobs - old_logprobs).exp().detach()"),
    ("task5", "one number of tokens for all rollouts", "masked_mean", "/ mask.sum(-1)", "/ (mask.sum() / mask.shape[0] / mask.shape[1])"),
    ("task5", "padding counts in the mean's denominator", "masked_mean", "/ mask.sum(-1)", "/ mask.shape[-1]"),
    ("task5", "padding counts in the mean", "masked_mean", "(x * mask)", "x"),
    ("task5", "padding is summed too", "clipped_objective", "(token * mask)", "token"),
    ("task5", "the mean whatever `length_normalize` says", "clipped_objective", " if length_normalize else (token * mask).sum(-1)", ""),
    ("task5", "clip_high forgotten", "clipped_objective", "clip_high or clip_eps", "clip_eps"),
    ("task5", "the other KL", "kl_k3", "reference - logprobs", "logprobs - reference"),
    ("task5", "the plain estimator, which can be negative", "kl_k3", "log_ratio.exp() - 1 - log_ratio", "-log_ratio"),
    ("task5", "padding counts in the KL", "kl_k3", "masked_mean(log_ratio.exp() - 1 - log_ratio, mask)", "(log_ratio.exp() - 1 - log_ratio).mean(-1)"),
    ("task5", "a KL without a gradient", "kl_k3", "log_ratio = reference - logprobs", "log_ratio = reference - logprobs.detach()"),
    ("task6", "detached pathwise term", "pathwise", "g * h", "g * h.detach()"),
    ("task6", "zeros everywhere", "pathwise", None, "return torch.zeros(h.shape[:2], dtype=h.dtype) * h.sum(-1)"),
    ("task6", "to be minimised", "pathwise", "(g * h)", "-(g * h)"),
    ("task6", "the gradient of the mean reward", "judge", "R.sum()", "R.mean()"),
    ("task6", "each role's own reward alone", "judge", "g = torch.autograd.grad(R.sum(), [leaves[role] for role in config.roles])", "sizes = [len(components['hard']) // len(config.roles)] * len(config.roles)\n    g = [torch.autograd.grad(r.sum(), leaves[role], retain_graph=True)[0] for r, role in zip(R.split(sizes), config.roles)]"),
    ("task6", "roles in another order", "judge", "[leaves[role] for role in config.roles]", "[leaves[role] for role in sorted(config.roles)]"),
    ("task6", "the caller's embeddings are made leaves", "judge", "x.detach().requires_grad_(role in config.roles)", "x.requires_grad_(role in config.roles)"),
    ("task6", "the penalty forgotten", "judge", 'length_penalty(R, finished, config.gamma, relative=config.reward != "paper")', "R"),
    ("task6", "tau forgotten", "judge", ", config.tau)", ", 1.0)"),
    ("task6", "the reward keeps its graph", "judge", "return R.detach()", "return R"),
    ("task6", "the paper's reward is never used", "judge", 'if config.reward == "paper":', "if False:"),
    ("task6", "same_text not passed on", "judge", ", same_text)", ", None)"),
    ("task6", "the penalty is always relative", "judge", ', relative=config.reward != "paper")', ", True)"),
    ("task6", "negatives keep their own shape", "judge", "x.flatten(0, -3)", "x"),
    ("task6", "the KL is rewarded", "Trainer.objective", "value - config.kl", "value + config.kl"),
    ("task6", "k2 is never used", "Trainer.objective", 'config.kl_estimator == "k2"', "False"),
    ("task6", "the pathwise term has no weight", "Trainer.objective", "config.pathwise * pathwise", "pathwise"),
    ("task6", "the text term is minimised", "Trainer.objective", "value + config.text_weight", "value - config.text_weight"),
    ("task6", "the prompt's pathwise term is left out", "Trainer.objective", "if g_prompt is not None:", "if False:"),
    ("task6", "one number for the whole batch", "Trainer.objective", "return value", "return value.mean()"),
    ("bonus", "own group left among the others", "forward_kernel", "log_sum_exp(mean * inverse_t, other)", "log_sum_exp(mean * inverse_t, own | other)"),
    ("bonus", "temperature forgotten", "forward_kernel", "mean * inverse_t", "mean"),
    ("bonus", "a sum of exponentials without the maximum", "forward_kernel", "log_sum_exp(nearest * inverse_t, other)", "tl.log(tl.sum(tl.where(other, tl.exp(nearest * inverse_t), 0.0), 1))"),
    ("bonus", "every block of rows is the first", "forward_kernel", "tl.program_id(0) * ROWS + tl.arange(0, ROWS)", "tl.arange(0, ROWS)"),
    ("bonus", "every tile at the place of the first", "forward_kernel", "at, step = out + tile * N + n", "at, step = out + n"),
]  # fmt: skip
ALTERNATIVES = [  # task, how it is written, {function: body}
    (
        "task1", "row by row", {
            "fold": """
                if how not in ("mean", "penultimate", "max", "eos"):
                    raise ValueError(how)
                mask, out = mask > 0, []
                for n, row in enumerate(hidden if hidden.dtype == torch.float64 else hidden.float()):
                    kept = row[mask[n]]
                    if state is not None and how in ("max", "eos"):
                        kept = torch.cat([state[n : n + 1], kept])
                    before = 0 if state is None or how in ("max", "eos") else state[n]
                    out.append(kept.amax(0) if how == "max" else kept[-1] if how == "eos" else kept.sum(0) + before)
                return torch.stack(out)
            """,
            "pool": """
                for n, row in enumerate(mask):
                    if not row.any():
                        raise ValueError(f"row {n} is empty")
                state = fold(None, hidden, mask, how)
                return state / state.norm(dim=1, keepdim=True)
            """,
        },
    ),
    (
        "task2", "the likeliest token comes first in the sum, and masks come from lengths", {
            "draw": """
                logprobs = tempered(logits, temperature)
                sorted_logprobs, order = logprobs.sort(dim=1, descending=True)
                below = sorted_logprobs.exp().cumsum(1)
                place = torch.zeros(len(logits), dtype=torch.long) if temperature == 0 else (below <= uniform[:, None] * below[:, -1:]).sum(1)
                token = order.gather(1, place[:, None])
                return token[:, 0], logprobs.gather(1, token)[:, 0]
            """,
            "sample": """
                N, how = len(prompts.ids), policy.reading.pooling
                hidden, to_pool, cache = policy.prefill(prompts.ids, prompts.mask, prompts.n_shared)
                of_prompt = fold(None, to_pool, prompts.counted[:, prompts.n_shared :], how)
                state, last, decoder = of_prompt.repeat_interleave(K, 0), hidden[:, -1].repeat_interleave(K, 0), policy.decoder(cache, prompts.mask, K)
                lengths, ended, ids, logprobs = torch.zeros(N * K).long(), torch.zeros(N * K).bool(), [], []
                while len(ids) < policy.reading.max_new_tokens and not ended.all():
                    token, logprob = draw(policy.logits(last), temperature, uniform.reshape(N * K, -1)[:, len(ids)] if temperature else None)
                    ids.append(token)
                    logprobs.append(logprob)
                    last, to_pool = decoder.step(token, ~ended)
                    state, lengths = fold(state, to_pool[:, None], ~ended[:, None], how), lengths + ~ended
                    ended = ended | torch.isin(token, policy.end_ids)
                T = int(lengths.max())
                mask = (torch.arange(T) < lengths[:, None]).view(N, K, T).long()
                ids, logprobs = (torch.stack(x[:T], 1).view(N, K, T).masked_fill(mask == 0, 0) for x in (ids, logprobs))
                embeddings, finished = unit(state).view(N, K, -1), ended.view(N, K)
                kept = prompts.ids, prompts.mask, prompts.counted, prompts.cut
                return Rollouts(*kept, ids, mask, logprobs, embeddings, finished, unit(of_prompt), prompts.n_shared)
            """,
        },
    ),
    (
        "task3", "plain products instead of the fused similarity", {
            "hard_negative": """
                s = torch.einsum("id,jkd->ijk", query, positive).amax(2)
                out = torch.eye(len(s), dtype=torch.bool) if same_text is None else same_text | torch.eye(len(s), dtype=torch.bool)
                return -s.masked_fill(out, 0).sum(1) / (~out).sum(1).clamp(min=1)
            """,
            "consistency": """
                s = rollouts @ rollouts.transpose(1, 2)
                K = s.shape[1]
                return (s.sum(2) - s.diagonal(dim1=1, dim2=2)) / max(K - 1, 1)
            """,
            "confidence": """
                candidates = [own / temperature, others, *(near / temperature).unbind(2)]
                return torch.log_softmax(torch.stack(candidates), 0)[0]
            """,
        },
    ),
    (
        "task4", "einsum, without in-place edits", {
            "backward_in_tiles": """
                d_rows, d_columns = torch.zeros_like(rows), torch.zeros_like(columns)
                for here, s, mean, nearest, own, other in blocks_of_rows(rows, columns, excluded):
                    lse_mean, lse_nearest, w_own, w_mean, w_nearest, w_hard = (x[here, None] for x in saved)
                    p = (mean / temperature - lse_mean).exp().nan_to_num() * other
                    q = (nearest / temperature - lse_nearest).exp().nan_to_num() * other
                    near = (s == nearest).to(s.dtype)
                    ds = (own * w_own + p * w_mean.nan_to_num() / temperature) / len(s)
                    ds = ds + near / near.sum(0) * (q * w_nearest / temperature + other * w_hard)
                    d_rows[here] = torch.einsum("knb,bkd->nd", ds, columns)
                    d_columns = d_columns + torch.einsum("knb,nd->bkd", ds, rows[here])
                return d_rows, d_columns
            """,
        },
    ),
    (
        "task5", "`where` in place of `minimum`", {
            "masked_mean": "return torch.where(mask.bool(), x, 0).sum(2) / mask.sum(2)",
            "advantages": """
                A = rewards - rewards.sum(1, keepdim=True) / rewards.shape[1]
                return A / (rewards.std(1, keepdim=True, correction=0) + 1e-8) if normalize else A
            """,
            "clipped_objective": """
                ratio, A = torch.exp(logprobs - old_logprobs), advantage.unsqueeze(2)
                low, high = 1 - clip_eps, 1 + (clip_eps if clip_high is None else clip_high)
                cut = ((A > 0) & (ratio > high)) | ((A < 0) & (ratio < low))
                value = torch.where(mask.bool(), torch.where(cut, ratio.clamp(low, high), ratio) * A, 0).sum(2)
                return value / mask.sum(2) if length_normalize else value
            """,
        },
    ),
    (
        "task6", "by backward() instead of autograd.grad", {
            "judge": """
                free = {role: x.detach().clone().requires_grad_(role in config.roles) for role, x in embeddings.items()}
                if config.reward == "paper":
                    by_role = [paper_components(free, same_text)]
                else:
                    by_role = [infonce_components(free, r, config.infonce_temperature, same_text) for r in config.roles]
                parts = {name: torch.cat([c[name] for c in by_role]) for name in ("contrastive", "consistency", "hard")}
                R = scaled(total(parts, config.lambda_consistency, config.lambda_hard), config.tau)
                R = length_penalty(R, finished, config.gamma, relative=config.reward != "paper")
                R.sum().backward()
                g = torch.cat([free[role].grad.flatten(0, -3) for role in config.roles])
                return R.detach(), {name: x.detach() for name, x in parts.items()}, g
            """,
            "pathwise": "return torch.einsum('nkd,nkd->nk', g, h)",
            "Trainer.objective": """
                c, prompt = self.config, 0
                if g_prompt is not None:
                    prompt = pathwise(g_prompt.unsqueeze(1), now.prompt_embeddings.unsqueeze(1))
                far = (kl_k2 if c.kl_estimator == "k2" else kl_k3)(now.logprobs, start.logprobs, part.mask) if c.kl else 0
                text = now.text_logprobs.unsqueeze(1) if c.text_weight else 0
                reader = c.pathwise * pathwise(g, now.embeddings) + c.prompt_weight * prompt
                return self.surrogate(now.logprobs, part, A) + reader + c.text_weight * text - c.kl * far
            """,
        },
    ),
]  # fmt: skip


def indented(text, indent):
    """A body as lines at an indentation."""
    return textwrap.indent(textwrap.dedent(text).strip("\n"), " " * indent).splitlines()


def mutated(source, name, old, new):
    """The source of a file with one function changed."""
    first, last, indent = body(source, name)
    if old is None:
        return put(source, name, indented(new, indent))
    text = "\n".join(source.splitlines()[first:last])
    if old not in text:
        raise ValueError(f"{name}: a mutant's text is no longer there: {old!r}")
    return put(source, name, text.replace(old, new).splitlines())


@contextlib.contextmanager
def exchanged(task, name, old, new):
    """One of a task's functions with another body, under every name that it was imported by, until the block ends."""
    file, names = TASKS[task]
    if name not in names:
        raise ValueError(f"{name} is not one of {task}'s functions")
    with open(file) as f:
        source = mutated(f.read(), name, old, new)
    label = f"{file}:mutant"
    linecache.cache[label] = (len(source), None, source.splitlines(True), label)  # triton reads a kernel's source
    module, scope = importlib.import_module(file.removesuffix(".py").replace("/", ".")), {}
    exec(compile(source, label, "exec"), vars(module), scope)  # what it defines sees the module as it is
    owner, _, last = name.rpartition(".")
    with pytest.MonkeyPatch.context() as patch:
        if owner:
            patch.setattr(getattr(module, owner), last, vars(scope[owner])[last])
        else:
            original = getattr(module, last)
            for place in [m for m in list(sys.modules.values()) if getattr(m, "__file__", None)]:
                for alias in [alias for alias, value in vars(place).items() if value is original]:
                    patch.setattr(place, alias, scope[last])
        yield


class Verdicts:
    """A pytest plugin that records which tests failed, and with what."""

    def __init__(self):
        self.failed, self.passed = {}, []

    def pytest_runtest_logreport(self, report):
        name = re.sub(r"\[.*", "", report.nodeid.split("::")[-1])
        if report.failed:
            self.failed.setdefault(name, str(report.longrepr))
        elif report.when == "call" and report.passed:
            self.passed.append(name)

    @property
    def good(self):
        return bool(self.passed) and not self.failed


def graded(task):
    """Run one task's tests in this process, up to the first that fails. Returns `Verdicts`."""
    verdicts = Verdicts()
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        off = [f"-pno:{plugin}" for plugin in ("cacheprovider", "warnings", "unraisableexception")]  # the last collects garbage
        pytest.main([f"tests/test_{task}.py", "-x", *off], plugins=[verdicts])
    return verdicts


@contextlib.contextmanager
def alone(task):
    """All functions of the other tasks without their bodies, until the block ends."""
    with contextlib.ExitStack() as stack:
        for other, (_, names) in TASKS.items():
            for name in names if other not in (task, "bonus") else ():
                stack.enter_context(exchanged(other, name, None, "raise NotImplementedError"))
        yield


def verdicts_of(task, one_in):
    """Try a task's mutants and alternatives. Yields a line for each; AssertionError: a wrong verdict."""
    reference = graded(task)
    if task == "bonus" and not reference.passed and not reference.failed:
        yield "bonus: triton is not installed"
        return
    assert reference.good, f"{task}: the reference fails {reference.failed}"
    for _, what, name, old, new in [mutant for mutant in MUTANTS if mutant[0] == task][::one_in]:
        with exchanged(task, name, old, new):
            verdicts = graded(task)
        assert verdicts.failed, f"{task}: {what!r} in {name} is not caught"
        broken = [x for x in verdicts.failed.values() if "SyntaxError" in x or "NameError" in x]
        assert not broken, f"{task}: {what!r} does not fail by what it computes: {broken[0]}"
        yield f"{task}: {name}: {what}: caught by {next(iter(verdicts.failed))}"
    for _, what, bodies in [alternative for alternative in ALTERNATIVES if alternative[0] == task]:
        with contextlib.ExitStack() as stack:
            for name, text in bodies.items():
                stack.enter_context(exchanged(task, name, None, text))
            verdicts = graded(task)
        assert verdicts.good, f"{task}: {what!r} is right, and fails {verdicts.failed}"
        yield f"{task}: right, written otherwise: {what}: passes"


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("tasks", nargs="*", help="task1 to task6 and bonus; all by default")
    parser.add_argument("--one-in", type=int, default=1, help="try only every n-th mutant of a task")
    args = parser.parse_args()
    os.environ["TRITON_INTERPRET"] = "1"  # the bonus runs on a CPU; triton looks when it is imported
    folder = os.path.dirname(os.path.abspath(__file__))
    with tempfile.TemporaryDirectory() as scratch:
        build(scratch, tasks=())
        os.chdir(scratch)
        sys.path[:] = [scratch, *(p for p in sys.path if os.path.abspath(p or ".") not in (folder, os.path.dirname(folder)))]
        for task in args.tasks or TASKS:
            with alone(task):
                for line in verdicts_of(task, args.one_in):
                    print(line, flush=True)
        os.chdir(folder)


if __name__ == "__main__":
    main()
