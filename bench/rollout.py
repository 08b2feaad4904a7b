"""Rollouts against `generate()` and a second forward pass, and the update against full rows, in one run.

    python bench/rollout.py [--model DIR | --shape qwen2.5-0.5b] [--batch 8] [--rollouts 8]

Both sides do the same work: K sampled rationales of each prompt, the log-probabilities of their tokens and the
embeddings; then the gradient of a sum of both. First both sides' results for the same rationales are compared.
On CUDA the decoding rate stands beside its floor: the bytes that have to be read for each token (all weights,
each prompt's keys and values once, those of the rationales) at --bandwidth.
"""

import argparse
import statistics

import torch
from common import add_model_flags, clock, load_policy, machine, make_texts

from pool import mean_pool
from rollout import Scores, sample, score, tempered, uniforms


def full_rows(policy, rollouts):
    """`rollout.score` with every rationale in a row of its own, behind its prompt. `-> Scores`."""
    N, K, T = rollouts.ids.shape
    ids = torch.cat([rollouts.prompt_ids.repeat_interleave(K, 0), rollouts.ids.view(N * K, T)], 1)
    mask = torch.cat([rollouts.prompt_mask.repeat_interleave(K, 0), rollouts.mask.view(N * K, T)], 1)
    counted = torch.cat([rollouts.counted.repeat_interleave(K, 0), rollouts.mask.view(N * K, T)], 1)
    hidden, _, _ = policy.forward(ids, mask, (mask.cumsum(1) - 1).clamp(min=0))
    logits = policy.logits(hidden[:, -T - 1 : -1])
    logprobs = tempered(logits, 1.0).gather(2, ids[:, -T:, None])[..., 0] * mask[:, -T:]
    return Scores(logprobs.view(N, K, T), mean_pool(hidden, counted).view(N, K, -1))


def by_generate(policy, prompts, K):
    """`generate()` alone: the ids, `[N*K, P + T]`."""
    return policy.model.generate(
        input_ids=prompts.ids, attention_mask=prompts.mask, do_sample=True, temperature=1.0, top_k=0, top_p=1.0,
        num_return_sequences=K, max_new_tokens=policy.reading.max_new_tokens,
        eos_token_id=policy.end_ids.tolist(), pad_token_id=int(policy.end_ids[0]),
    )  # fmt: skip


def backward(policy, scores, weights):
    """The gradient of a fixed sum of log-probabilities and embeddings."""
    policy.model.zero_grad(set_to_none=True)
    (scores.logprobs.sum() + (scores.embeddings * weights).sum()).backward()
    return torch.cat([p.grad.flatten() for p in policy.model.parameters() if p.grad is not None])


def floor(policy, rollouts, bandwidth):
    """The seconds it takes to read every needed byte once per token, at `bandwidth` bytes per second."""
    N, K, T = rollouts.ids.shape
    config = policy.model.config.get_text_config()
    size = next(policy.model.parameters()).element_size()
    weights = sum(p.nbytes for p in policy.model.parameters())
    head = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    per_token = 2 * config.num_hidden_layers * config.num_key_value_heads * head * size
    keys = sum(N * rollouts.prompt_ids.shape[1] * per_token + N * K * t * per_token for t in range(T))
    return (T * weights + keys) / bandwidth


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_model_flags(parser)
    parser.add_argument("--batch", type=int, default=8, help="prompts, N [8]")
    parser.add_argument("--rollouts", type=int, default=8, help="K [8]")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--bandwidth", type=float, default=4.8e12, help="bytes per second of the GPU's memory [H200: 4.8e12]")
    parser.add_argument("--skip-update", action="store_true", help="rollouts only: full rows may not fit")
    args = parser.parse_args()
    policy, cuda = load_policy(args), args.device.startswith("cuda")
    sampler = policy.frozen_copy(torch.bfloat16) if policy.dtype == "bfloat16" else policy
    texts = make_texts(args.batch, policy, args.prompt_tokens)
    ours, theirs = policy.prompts(texts), policy.prompts(texts, share=False)  # plain left padding for generate()
    uniform = uniforms(0, args.batch, args.rollouts, args.max_new_tokens, device=args.device)
    rollouts = sample(sampler, ours, args.rollouts, 1.0, uniform)
    tokens = int(rollouts.mask.sum())
    print(f"{machine(args.device)}; {sum(p.numel() for p in policy.model.parameters()) / 1e6:.1f} M parameters")
    print(f"{args.batch} prompts of {ours.ids.shape[1]} tokens, K = {args.rollouts}, {tokens} tokens sampled")
    weights = torch.randn(rollouts.embeddings.shape, device=args.device)
    if not args.skip_update:
        shared, full = (f(policy, rollouts) for f in (score, full_rows))
        a, b = (backward(policy, scores, weights) for scores in (shared, full))
        for name in ("logprobs", "embeddings"):
            apart = (getattr(rollouts, name) - getattr(full, name).detach()).abs().max()
            print(f"captured {name} against full rows: largest difference {float(apart):.1e}")
        print(f"gradient, shared prefill against full rows: {float((a - b).norm() / b.norm()):.1e} of its norm")
        del shared, full, a, b

    @torch.no_grad()
    def twice():  # generate(), then the model once more over its rationales
        by_generate(sampler, theirs, args.rollouts)
        full_rows(sampler, rollouts)

    sides = {
        "rollouts: prefill once, capture": lambda: sample(sampler, ours, args.rollouts, 1.0, uniform),
        "generate()": lambda: by_generate(sampler, theirs, args.rollouts),
        "generate() + forward": twice,
    }
    if not args.skip_update:
        sides["update: prompt once"] = lambda: backward(policy, score(policy, rollouts), weights)
        sides["update: full rows"] = lambda: backward(policy, full_rows(policy, rollouts), weights)
    times = {name: [] for name in sides}
    for repeat in range(args.repeats + 1):  # in turn: machines drift; the first round warms up
        for name, run in sides.items():
            start = clock(args.device)
            run()
            if repeat:
                times[name].append(clock(args.device) - start)
    median = {name: statistics.median(x) for name, x in times.items()}
    first, update = list(sides)[0], "update: prompt once"
    for name, seconds in median.items():
        base = update if name.startswith("update") else first
        ratio = statistics.median(x / y for x, y in zip(times[name], times[base]))
        print(f"{name:34}{seconds:9.4f} s{tokens / seconds:10.0f} tokens/s{ratio:8.2f} x")
    if cuda:
        least = floor(sampler, rollouts, args.bandwidth)
        print(f"bandwidth floor of the decoding: {least:.3f} s; reached {least / median[first]:.0%} (prefill included)")


if __name__ == "__main__":
    main()
