"""TRL's GRPOTrainer on the work of bench/step.py: the same model, prompts, K and lengths, and a reward by embeddings.

    python bench/trl_peer.py --shape qwen2.5-0.5b --batch 64 --rollouts 8 --prompt-tokens 128 --max-new-tokens 256

First bench/step.py runs in a process of its own, with B instances of which query and positive are trained; then TRL with
as many prompts. Its reward is a function that runs the model once more over prompt and completion, pools, and takes a
cosine. Neither side has a KL or a text term. Needs trl and datasets; without them it says so and ends well.
"""

import argparse
import importlib.util
import os
import statistics
import subprocess
import sys
import tempfile

import torch
from common import add_model_flags, clock, goal, load_policy, machine, make_texts
from transformers import TrainerCallback

from pool import pool

STEP = os.path.join(os.path.dirname(os.path.abspath(__file__)), "step.py")


class Stopwatch(TrainerCallback):
    """Seconds per optimizer step, generation included."""

    def __init__(self, device):
        self.device, self.steps = device, []

    def on_step_begin(self, *args, **kwargs):
        self.start = clock(self.device)

    def on_step_end(self, *args, **kwargs):
        self.steps.append(clock(self.device) - self.start)


def by_cosine(policy):
    """A reward function for TRL: how near each completion's embedding is to its neighbour's."""

    @torch.no_grad()
    def reward(prompts, completions, **_):
        texts, vectors = [a + " " + b for a, b in zip(prompts, completions)], []
        for start in range(0, len(texts), 64):
            x = policy.tokenizer(texts[start : start + 64], return_tensors="pt", padding=True).to(policy.device)
            positions = (x.attention_mask.cumsum(1) - 1).clamp(min=0)
            hidden, _, _ = policy.forward(x.input_ids, x.attention_mask, positions)
            vectors.append(pool(hidden, x.attention_mask))
        vectors = torch.cat(vectors)
        return (vectors * vectors.roll(1, 0)).sum(1).tolist()

    return reward


def step_here(args):
    """Seconds per step of bench/step.py at these sizes, in micro-batches of as many rationales."""
    size = args.prompt_tokens + args.rollouts * args.max_new_tokens
    budget = max(args.micro_batch // args.rollouts, 1) * size
    flags = {"--batch": args.batch, "--rollouts": args.rollouts, "--steps": args.steps, "--tokens-per-batch": budget}
    flags |= {"--max-new-tokens": args.max_new_tokens, "--prompt-tokens": args.prompt_tokens, "--shape": args.shape}
    flags |= {"--device": args.device, "--train-roles": "query,positive", "--kl": 0, "--text-weight": 0}
    command = [sys.executable, STEP] + [str(x) for pair in flags.items() for x in pair]
    out = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    print(out)
    return float(out.split()[-1])


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_model_flags(parser)
    parser.add_argument("--batch", type=int, default=8, help="instances per step, of two prompts each [8]")
    parser.add_argument("--rollouts", type=int, default=8)
    parser.add_argument("--micro-batch", type=int, default=8, help="completions per forward and backward pass [8]")
    parser.add_argument("--steps", type=int, default=2, help="after one to warm up [2]")
    args = parser.parse_args()
    if missing := [name for name in ("trl", "accelerate", "datasets") if importlib.util.find_spec(name) is None]:
        return print(f"Not measured: {', '.join(missing)} is not installed here.")
    import datasets
    import trl

    ours = step_here(args)
    policy, cuda = load_policy(args), args.device.startswith("cuda")
    texts = make_texts(2 * args.batch * (args.steps + 1), policy, args.prompt_tokens)
    prompts = [policy.tokenizer.decode(policy.prompts([text]).ids[0]) for text in texts]
    watch = Stopwatch(args.device)
    completions = 2 * args.batch * args.rollouts
    with tempfile.TemporaryDirectory() as out:
        config = trl.GRPOConfig(
            out, per_device_train_batch_size=args.micro_batch, gradient_accumulation_steps=completions // args.micro_batch,
            num_generations=args.rollouts, max_completion_length=args.max_new_tokens, max_steps=args.steps + 1, beta=0.0,
            temperature=1.0, learning_rate=1e-6, bf16=cuda, use_cpu=not cuda, gradient_checkpointing=False,
            report_to="none", save_strategy="no", logging_strategy="no", disable_tqdm=True,
        )  # fmt: skip
        trainer = trl.GRPOTrainer(
            policy.model, reward_funcs=by_cosine(policy), args=config, callbacks=[watch], processing_class=policy.tokenizer,
            train_dataset=datasets.Dataset.from_list([{"prompt": prompt} for prompt in prompts]),
        )  # fmt: skip
        trainer.train()
    print(f"{machine(args.device)}, TRL {trl.__version__}")
    print(f"{completions} completions per step, seconds: {', '.join(f'{x:.2f}' for x in watch.steps[1:])}")
    if cuda:
        print(f"peak memory {torch.cuda.max_memory_allocated() / 2**30:.1f} GB")
    theirs = statistics.median(watch.steps[1:])
    goal("a step against TRL's GRPOTrainer", "3.5 times", f"{theirs / ours:.1f} times")


if __name__ == "__main__":
    main()
