"""Rollouts against `generate()` and a second forward pass, and the update against full rows, in one run.

    python bench/rollout.py [--model DIR | --shape qwen2.5-0.5b] [--batch 8] [--rollouts 8]

Both sides do the same work: K sampled rationales of each prompt, the log-probabilities of their tokens and the
embeddings; then the gradient of a sum of both. First both sides' results for the same rationales are compared.
The decoding stands beside two floors: the bytes that have to be read for each token (all weights, each prompt's keys and
values once, those of the rationales) at the memory's measured rate, and the operations of the matrix products at theirs.
"""

import argparse
import statistics

import torch
from common import add_model_flags, clock, copy_rate, goal, load_policy, machine, make_texts, matmul_rate

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
    return Scores(logprobs.view(N, K, T), mean_pool(hidden, counted).view(N, K, -1), None)


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


def floors(policy, rollouts):
    """What the decoding has to do at least: bytes to read, each once per token, and operations of matrix products."""
    N, K, T = rollouts.ids.shape
    config = policy.model.config.get_text_config()
    size = next(policy.model.parameters()).element_size()
    weights = sum(p.nbytes for p in policy.model.parameters())
    head = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    per_token = 2 * config.num_hidden_layers * config.num_key_value_heads * head * size
    keys = sum(N * rollouts.prompt_ids.shape[1] * per_token + N * K * t * per_token for t in range(T))
    operations = 2 * N * K * T * sum(p.numel() for p in policy.model.parameters())
    operations += 4 * N * K * T * (rollouts.prompt_ids.shape[1] + T / 2) * config.num_hidden_layers * config.hidden_size
    return T * weights + keys, operations


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_model_flags(parser)
    parser.add_argument("--batch", type=int, default=8, help="prompts, N [8]")
    parser.add_argument("--rollouts", type=int, default=8, help="K [8]")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--skip-update", action="store_true", help="rollouts only: full rows may not fit")
    args = parser.parse_args()
    policy = load_policy(args)
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
    def twice():  # generate(), then the model once more over its rationales, a group at a time: all logits would not fit
        by_generate(sampler, theirs, args.rollouts)
        for n in range(args.batch):
            full_rows(sampler, rollouts[n : n + 1])

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
    bytes_read, operations = floors(sampler, rollouts)
    precision = "bfloat16" if policy.dtype == "bfloat16" else "float32"
    by_memory, by_products = bytes_read / copy_rate(args.device), operations / matmul_rate(args.device, precision)
    print(f"floors of the decoding: {by_memory:.4f} s to read {bytes_read / 1e9:.1f} GB")
    print(f"                        {by_products:.4f} s for {operations / 1e12:.2f} Tflop in {precision}")
    goal("rollouts, prefill included: share of the memory floor", "40 %", f"{by_memory / median[first]:.0%}")
    goal("the same: share of both floors in turn", "-", f"{(by_memory + by_products) / median[first]:.0%}")
    goal("rollouts against `generate()`", "5 times", f"{median['generate()'] / median[first]:.1f} times")


if __name__ == "__main__":
    main()
