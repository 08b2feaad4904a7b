"""Texts per second: the encoder against `generate()` and a second forward pass, in one run.

    python bench/encode.py --model runs/toy-world-0/model [--texts texts.jsonl] [--n 2000]

Both sides decode greedily, with the same prompts and limits, and pool the same tokens. The encoder saves
the second pass, the reading of the instruction for every text, the finished rows that `generate()` still
computes, and repeated texts (not counted here: all texts differ). Peak memory is that of a process of its
own.
"""

import argparse
import resource
import statistics
import subprocess
import sys

import datasets
import numpy as np
import torch
from common import clock, machine  # puts the repository on the path

from evaluation.encoder import GraceEncoder
from plumbing.data import read_texts
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
    parser.add_argument("--model", default="runs/toy-world-0/model")
    parser.add_argument("--texts", default="runs/toy-world-0/data/texts.jsonl")
    parser.add_argument("--n", type=int, default=2000)
    parser.add_argument(
        "--batch", type=int, default=32, help="of the generate() side; 32 is the default of mteb and sentence-transformers"
    )
    parser.add_argument("--max-new-tokens", type=int, help="the longest rationale (default: as the checkpoint says)")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--only-encode", action="store_true", help="encode once and print the peak memory in MB")
    args = parser.parse_args()
    datasets.disable_progress_bars()
    texts = [row["text"] for row in read_texts(args.texts)]
    texts = list(dict.fromkeys(texts))[: args.n]
    policy = Policy.load(args.model, max_new_tokens=args.max_new_tokens)
    if args.only_encode:
        GraceEncoder(policy).encode(texts)
        print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024)
        return
    ours, theirs = [], []
    for _ in range(args.repeats):  # in turn: these machines drift
        start = clock(policy.device)
        a = GraceEncoder(policy).encode(texts)
        ours.append(clock(policy.device) - start)
        start = clock(policy.device)
        b = by_generate(policy, texts, args.batch)
        theirs.append(clock(policy.device) - start)
    ratios = [t / o for o, t in zip(ours, theirs)]
    print(machine(policy.device))
    print(f"{len(texts)} texts; largest difference of embeddings {abs(a - b).max():.1e}")
    print(f"encoder              {statistics.median(ours):6.2f} s   {len(texts) / statistics.median(ours):6.0f} texts/s")
    print(f"generate + forward   {statistics.median(theirs):6.2f} s   {len(texts) / statistics.median(theirs):6.0f} texts/s")
    print(f"ratio, pair by pair  {min(ratios):.2f} to {max(ratios):.2f}, median {statistics.median(ratios):.2f}")
    for n in (len(texts) // 4, len(texts)):
        print(f"peak memory, {n:5d} texts: {peak_mb(args.model, args.texts, n):.0f} MB")


if __name__ == "__main__":
    main()
