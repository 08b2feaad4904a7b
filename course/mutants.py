"""Tries the tests that grade on wrong solutions, and on right ones that are written otherwise.

    python course/mutants.py                       all of them, a line each; fails at the first wrong verdict
    python course/mutants.py task1 --one-in 10     only a task's, and of its mutants only every tenth

Each mutant is the reference with one mistake that a student might make, and has to fail its own task's tests.
The alternatives are other right solutions of tasks 1 and 2, and have to pass them. All other tasks' functions are empty
meanwhile: a task's tests need no other task's code.
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
from make_starter import TASKS, body, build, put, read, take

MUTANTS = [  # function, what is wrong, what stands there, what a student wrote (None: the whole body)
    ("fold", "zeros everywhere", None, "return torch.zeros(len(hidden), hidden.shape[2])"),
    ("fold", "mask from what the states hold", "mask = mask.bool()", "mask = (hidden != 0).any(-1)"),
    ("fold", "the mask is edited in place", "mask = mask.bool()", "mask[mask > 0] = 2; mask = mask.bool()"),
    ("fold", "padding is multiplied by 0, and NaN stays", "torch.where(mask[..., None], hidden, 0).sum(1)", "(hidden * mask[..., None]).sum(1)"),
    ("fold", "each block divided by its own count", "torch.where(mask[..., None], hidden, 0).sum(1)", "torch.where(mask[..., None], hidden, 0).sum(1) / mask.sum(1, keepdim=True).clamp(min=1)"),
    ("fold", "the last position as the end token", "last = (mask * torch.arange(mask.shape[1], device=mask.device)).argmax(1)", "last = torch.full((len(mask),), mask.shape[1] - 1)"),
    ("fold", "padding counts as 0 in the maximum", "-torch.inf", "0.0"),
    ("fold", "summed in the states' own precision", "hidden = hidden.to(torch.promote_types(hidden.dtype, torch.float32))", ""),
    ("fold", "the state is edited in place", "new if state is None else state + new", "new if state is None else state.add_(new)"),
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
    ("sample", "the next token predicted from the states to pool", "last, to_pool = decoder.step(token, writing)", "_, to_pool = decoder.step(token, writing); last = to_pool.nan_to_num()"),
    ("sample", "the loop continues when all have ended", "if decoder.all_ended(writing):", "if False:"),
    ("sample", "the loop stops before the last end token is fed", "last, to_pool = decoder.step(token, writing)", "if not (writing & (token[:, None] != policy.end_ids).all(1)).any():\n            writing = writing & False\n            break\n        last, to_pool = decoder.step(token, writing)"),
    ("sample", "numbers of the rollouts in another order", "uniform.flatten(0, 1)", "uniform.transpose(0, 1).flatten(0, 1)"),
    ("sample", "rollouts and their prompts in another order", "x.repeat_interleave(K, 0)", "x.repeat(K, 1)"),
    ("sample", "the text is not pooled", "decoder = policy.decoder", "state = torch.zeros_like(state)\n    decoder = policy.decoder"),
    ("sample", "the instruction is pooled", "prompts.counted[:, prompts.n_shared :]", "prompts.mask[:, prompts.n_shared :]"),
    ("sample", "padding behind the longest rationale", "x[:, :T]", "x"),
    ("sample", "log-probabilities of what is drawn after the end", "logprobs.where(mask, 0)", "logprobs"),
    ("contrastive", "zeros everywhere", None, "return torch.zeros(positive.shape[:2], dtype=positive.dtype)"),
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
    ("forward_in_tiles", "mean of exponentials, not of cosines", "for here, _, mean, nearest, own, other in blocks_of_rows(rows, columns, excluded):", "for here, s, mean, nearest, own, other in blocks_of_rows(rows, columns, excluded):\n        mean = (s / temperature).logsumexp(0) * temperature - temperature * torch.tensor(float(len(s))).log()"),
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
    ("judge", "the paper's reward is never used", 'if config.reward == "paper":', "if False:"),
    ("judge", "same_text not passed on", ", same_text)", ", None)"),
    ("judge", "the penalty is always relative", ', relative=config.reward != "paper")', ", True)"),
    ("judge", "negatives keep their own shape", "x.flatten(0, -3)", "x"),
    ("Trainer.objective", "the KL is rewarded", "value - config.kl", "value + config.kl"),
    ("Trainer.objective", "k2 is never used", 'config.kl_estimator == "k2"', "False"),
    ("Trainer.objective", "the pathwise term has no weight", "config.pathwise * pathwise", "pathwise"),
    ("Trainer.objective", "the prompt's pathwise term is left out", "if g_prompt is not None:", "if False:"),
    ("Trainer.objective", "one number for the whole batch", "return value", "return value.mean()"),
    ("forward_kernel", "own group left among the others", "log_sum_exp(mean * inverse_t, other)", "log_sum_exp(mean * inverse_t, own | other)"),
    ("forward_kernel", "temperature forgotten", "mean * inverse_t", "mean"),
    ("forward_kernel", "a sum of exponentials without the maximum", "log_sum_exp(nearest * inverse_t, other)", "tl.log(tl.sum(tl.where(other, tl.exp(nearest * inverse_t), 0.0), 1))"),
    ("forward_kernel", "every tile at the place of the first", "at, step = out + tile * N + n", "at, step = out + n"),
]  # fmt: skip
ALTERNATIVES = {  # right solutions, written otherwise: function, its body
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
        kept = prompts.ids, prompts.mask, prompts.counted, prompts.text, prompts.cut
        return Rollouts(*kept, ids, mask, logprobs, embeddings, finished, unit(of_prompt), prompts.n_shared)
    """,
}


def mutant(name, old, new):
    """The file of a function, and its source with that function changed."""
    file = next(file for file, names in TASKS.values() if name in names)
    source = read(".", file)
    if old is None:
        text = textwrap.indent(textwrap.dedent(new).strip("\n"), " " * body(source, name)[2])
    else:
        text = "\n".join(take(source, name))
        if old not in text:
            raise ValueError(f"{name}: a mutant's text is no longer there: {old!r}")
        text = text.replace(old, new)
    return file, put(source, name, text.splitlines())


@contextlib.contextmanager
def exchanged(name, old, new):
    """A function with another body, under every name that it was imported by, until the block ends."""
    file, source = mutant(name, old, new)
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


class Verdict:
    """A pytest plugin that records how many tests passed, the first that failed, and with what."""

    passed, failed, why = 0, None, ""

    def pytest_runtest_logreport(self, report):
        if report.failed:
            self.failed, self.why = re.sub(r"\[.*", "", report.nodeid.split("::")[-1]), str(report.longrepr)
        self.passed += report.when == "call" and report.passed


def graded(task):
    """Run one task's tests in this process, up to the first that fails. Returns a `Verdict`."""
    verdict = Verdict()
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        off = [f"-pno:{plugin}" for plugin in ("cacheprovider", "warnings", "unraisableexception")]  # the last collects garbage
        pytest.main([f"tests/test_{task}.py", "-x", *off], plugins=[verdict])
    return verdict


@contextlib.contextmanager
def alone(task):
    """All functions of the other tasks without their bodies, until the block ends."""
    with contextlib.ExitStack() as stack:
        for other, (_, names) in TASKS.items():
            for name in names if other not in (task, "bonus") else ():
                stack.enter_context(exchanged(name, None, "raise NotImplementedError"))
        yield


def verdicts(task, one_in):
    """Try a task's mutants and alternatives. Yields a line for each; AssertionError: a wrong verdict."""
    reference, names = graded(task), TASKS[task][1]
    if task == "bonus" and not reference.passed and not reference.failed:
        yield "bonus: triton is not installed"
        return
    assert reference.passed and not reference.failed, f"{task}: the reference fails: {reference.why}"
    for name, what, old, new in [m for m in MUTANTS if m[0] in names][::one_in]:
        with exchanged(name, old, new):
            tried = graded(task)
        assert tried.failed, f"{task}: {what!r} in {name} is not caught"
        assert "SyntaxError" not in tried.why and "NameError" not in tried.why, f"{name}: {what!r} cannot run: {tried.why}"
        yield f"{task}: {name}: {what}: caught by {tried.failed}"
    others = [name for name in names if name in ALTERNATIVES]
    if not others:
        return
    with contextlib.ExitStack() as stack:
        for name in others:
            stack.enter_context(exchanged(name, None, ALTERNATIVES[name]))
        tried = graded(task)
    assert tried.passed and not tried.failed, f"{task}: another right solution fails: {tried.why}"
    yield f"{task}: another right solution passes"


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("tasks", nargs="*", help="task1 to task6 and bonus; all by default")
    parser.add_argument("--one-in", type=int, default=1, metavar="N", help="try only every Nth mutant of a task")
    args = parser.parse_args()
    os.environ["TRITON_INTERPRET"] = "1"  # the bonus runs on a CPU; triton reads this when it is imported
    folder = os.path.dirname(os.path.abspath(__file__))
    with tempfile.TemporaryDirectory() as scratch:
        build(scratch, tasks=())
        os.chdir(scratch)
        sys.path[:] = [scratch, *(p for p in sys.path if os.path.abspath(p or ".") not in (folder, os.path.dirname(folder)))]
        for name, _, old, new in MUTANTS:  # all of them, so that a sample, too, notices one that no longer fits
            compile(mutant(name, old, new)[1], name, "exec")
        for task in args.tasks or TASKS:
            with alone(task):
                for line in verdicts(task, args.one_in):
                    print(line, flush=True)
        os.chdir(folder)


if __name__ == "__main__":
    main()
