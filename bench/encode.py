"""Texts per second: the encoder against `generate()` and a second forward pass, in one run.

    python bench/encode.py --model runs/events-world-0/model [--texts texts.jsonl] [--n 2000]
    python bench/encode.py --shape qwen2.5-0.5b --prompt-tokens 128 --max-new-tokens 256 --n 512      made-up texts

Both sides decode greedily, with the same prompts and limits, and pool the same tokens. The encoder saves
the second pass, the reading of the instruction for every text, the finished rows that `generate()` still
computes, and repeated texts (not counted here: all texts differ). Peak memory is that of a process of its
own; on CUDA it is the encoder's on the device.
"""

import argparse
import resource
import statistics
import subprocess
import sys

import numpy as np
import torch
from common import add_model_flags, clock, goal, load_policy, machine, make_texts  # puts the repository on the path

from evaluation.encoder import GraceEncoder
from plumbing.data import read_texts
from plumbing.report import peak_memory_gb
from policy import Policy
from pool import mean_pool


@torch.no_grad()
def by_generate(policy, texts, batch):
    """The usual way: `generate()`, then the model once more over prompt and rationale. `-> [n, D]`."""
    vectors = []
    for start in range(0, len(texts), batch):
        x = policy.prompts(texts[start : start + batch], share=False)  # plain left padding
        P, end = x.ids.shape[1], policy.end_ids
        ids = policy.model.generate(
            input_ids=x.ids, attention_mask=x.mask, do_sample=False, max_new_tokens=policy.reading.max_new_tokens,
            eos_token_id=end.tolist(), pad_token_id=int(end[0]),
        )  # fmt: skip
        new = ids[:, P:]
        ended = torch.isin(new, end).long()
        rationale = ((ended.cumsum(1) - ended) == 0).long()  # up to the first end token, which counts
        mask = torch.cat([x.mask, rationale], 1)
        hidden = policy.base(
            input_ids=ids, attention_mask=mask, position_ids=(mask.cumsum(1) - 1).clamp(min=0)
        ).last_hidden_state
        vectors.append(mean_pool(hidden, torch.cat([x.counted, rationale], 1)).cpu().numpy())
    return np.concatenate(vectors)


def peak_mb(model, texts_file, n):
    """The peak memory of a process that encodes n texts."""
    command = [sys.executable, __file__, "--model", model, "--texts", texts_file, "--n", str(n), "--only-encode"]
    return float(subprocess.run(command, capture_output=True, text=True, check=True).stdout.split()[-1])


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_model_flags(parser)
    parser.set_defaults(shape=None, max_new_tokens=None)  # as the checkpoint says
    parser.add_argument("--texts", default="runs/events-world-0/data/texts.jsonl")
    parser.add_argument("--n", type=int, default=2000)
    parser.add_argument(
        "--batch", type=int, default=32, help="of the generate() side; 32 is the default of mteb and sentence-transformers"
    )
    parser.add_argument("--tokens-per-batch", type=int, default=8192, help="of the encoder; more on a large GPU [8192]")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--only-encode", action="store_true", help="encode once and print the peak memory in MB")
    args = parser.parse_args()
    if args.shape:
        policy = load_policy(args)
        texts = make_texts(args.n, policy, args.prompt_tokens)
    else:
        args.model = args.model or "runs/events-world-0/model"
        policy = Policy.load(args.model, args.device, args.dtype or "float32", max_new_tokens=args.max_new_tokens)
        texts = [row["text"] for row in read_texts(args.texts)]
        texts = list(dict.fromkeys(texts))[: args.n]
    if policy.dtype == "bfloat16":
        policy = policy.frozen_copy(torch.bfloat16)
    options = {"tokens_per_batch": args.tokens_per_batch}
    if args.only_encode:
        GraceEncoder(policy, **options).encode(texts)
        print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024)
        return
    ours, theirs, peak = [], [], None
    for _ in range(args.repeats):  # in turn: these machines drift
        start = clock(policy.device)
        a = GraceEncoder(policy, **options).encode(texts)
        ours.append(clock(policy.device) - start)
        peak = peak or peak_memory_gb(policy.device)  # before the other side has run
        start = clock(policy.device)
        b = by_generate(policy, texts, args.batch)
        theirs.append(clock(policy.device) - start)
    ratios = [t / o for o, t in zip(ours, theirs)]
    print(machine(policy.device))
    print(f"{len(texts)} texts; largest difference of embeddings {abs(a - b).max():.1e}")
    print(f"encoder              {statistics.median(ours):6.2f} s   {len(texts) / statistics.median(ours):6.0f} texts/s")
    print(f"generate + forward   {statistics.median(theirs):6.2f} s   {len(texts) / statistics.median(theirs):6.0f} texts/s")
    print(f"ratio, pair by pair  {min(ratios):.2f} to {max(ratios):.2f}, median {statistics.median(ratios):.2f}")
    if args.shape:
        goal("the encoder against `generate()` and a second pass", "-", f"{statistics.median(ratios):.1f} times")
        print(f"peak memory of the first encoding: {peak:.2f} GB")
    else:
        for n in (len(texts) // 4, len(texts)):
            print(f"peak memory, {n:5d} texts: {peak_mb(args.model, args.texts, n):.0f} MB")


if __name__ == "__main__":
    main()
