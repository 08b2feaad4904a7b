"""Where the time of a training step goes.

    python bench/step.py --model DIR --batch 8 --rollouts 8 --max-new-tokens 48 --train-roles positive --steps 5
    python bench/step.py --shape qwen2.5-0.5b --batch 64 --prompt-tokens 128 --max-new-tokens 256

Runs real steps of grace.py and prints, for each phase, the median seconds and tokens per second, then the peak
memory; the last line is `step_s X`, the median step after one to warm up. Training text comes from --data, else
it is made up. `--profile` adds a table of what a further step spends its time on. Any other flag is passed to
grace.py: `--kl 0`, `--recipe paper`, `--lora 8`.
"""

import argparse
import statistics

import torch
from common import add_model_flags, clock, goal, load_policy, machine, make_texts

import grace
from config import parse
from plumbing.data import load_rows
from plumbing.report import peak_memory_gb

PHASES = ("prefill", "decode", "reward", "update")


def watch(owner, name, seconds, phase, device):
    """Replace `owner.name` by one that adds the time it takes to seconds[phase]."""
    inner = getattr(owner, name)

    def timed(*args, **kwargs):
        start = clock(device)
        result = inner(*args, **kwargs)
        seconds[phase] = seconds.get(phase, 0.0) + clock(device) - start
        return result

    setattr(owner, name, timed)


def make_trainer(args, rest):
    """A trainer as grace.py would build it, over --data or made-up texts."""
    policy = load_policy(args)
    flags = ["--batch", args.batch, "--rollouts", args.rollouts, "--train-roles", args.train_roles, "--mode", args.mode]
    flags += ["--device", args.device, "--dtype", policy.dtype, "--data", args.data or "", *rest]
    config = parse([str(flag) for flag in flags], __doc__)
    if args.data:
        rows = load_rows(config)[0]
    else:
        texts = make_texts(3 * 4 * args.batch, policy, args.prompt_tokens)
        rows = [{"query": q, "positive": p, "negative": [n]} for q, p, n in zip(*[iter(texts)] * 3)]
        rows = rows if args.mode == "supervised" else [{"text": text} for text in texts]
    if config.lora:
        policy.adapt(config.lora, config.seed)
    reference = None if not config.kl else policy.start() if config.lora else load_policy(args)
    return grace.Trainer(policy, reference, rows, config)


def profile(step, cuda, rows=16):
    """What one step spends its time on: the operations that take longest, and how often the host waits for the GPU."""
    with torch.profiler.profile() as trace:
        step()
    events = trace.key_averages()
    print(
        events.table(
            sort_by="self_device_time_total" if cuda else "self_cpu_time_total", row_limit=rows, max_name_column_width=60
        )
    )
    for name in ("cudaLaunchKernel", "cudaGraphLaunch", "cudaStreamSynchronize"):
        if found := [event for event in events if event.key == name]:
            print(f"{name}: {found[0].count} times, {found[0].self_cpu_time_total / 1e6:.3f} s on the host")


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_model_flags(parser)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--rollouts", type=int, default=8)
    parser.add_argument("--train-roles", default="positive")
    parser.add_argument("--mode", default="supervised")
    parser.add_argument("--data", help="training rows (default: made-up texts)")
    parser.add_argument("--steps", type=int, default=5)
    parser.add_argument("--under", type=float, metavar="GB", help="the goal for the peak memory, for bench/gpu.sh")
    parser.add_argument("--profile", action="store_true", help="print what a further step spends its time on")
    args, rest = parser.parse_known_args()
    trainer, seconds, table = make_trainer(args, rest), {}, []
    watch(grace, "roll_out", seconds, "decode", args.device)
    watch(grace, "judge", seconds, "reward", args.device)
    watch(trainer, "update", seconds, "update", args.device)
    watch(trainer.sampler, "prefill", seconds, "prefill", args.device)  # called in two phases: see update_alone
    update = trainer.update

    def update_alone(*inputs):  # the update's prefill is the update's
        sampled = seconds["prefill"]
        stats = update(*inputs)
        seconds["prefill"] = sampled
        return stats

    trainer.update = update_alone
    before = peak_memory_gb(trainer.policy.device)
    for step in range(args.steps + 1):
        seconds.clear()
        start = clock(args.device)
        metrics = trainer.step()
        total = clock(args.device) - start
        seconds["decode"] -= seconds["prefill"]
        if step:
            table.append({**seconds, "step": total, "length": metrics["length"], "ratio_off": metrics["first_ratio_off"]})
    median = {name: statistics.median(row[name] for row in table) for name in table[0]}
    config = trainer.config
    tokens = median["length"] * config.rollouts * config.batch * len(config.roles)
    print(f"{machine(args.device)}; {sum(p.numel() for p in trainer.policy.model.parameters()) / 1e6:.1f} M parameters")
    print(f"B = {config.batch}, K = {config.rollouts}, roles {','.join(config.roles)}, {tokens:.0f} trained tokens per step")
    print(f"{'phase':10}{'seconds':>10}{'share':>8}{'trained tokens/s':>18}")
    for phase in PHASES:
        print(f"{phase:10}{median[phase]:10.4f}{median[phase] / median['step']:8.0%}{tokens / median[phase]:18.0f}")
    peak = peak_memory_gb(trainer.policy.device)
    print(f"peak memory {peak:.3f} GB, before the first step {before:.3f} GB")
    print(f"the first ratio is off 1 by at most {max(row['ratio_off'] for row in table):.2g}")
    if args.under:
        goal(f"peak memory of a step, --tokens-per-batch {config.tokens_per_batch}", f"{args.under:g} GB", f"{peak:.1f} GB")
    if args.profile:
        profile(trainer.step, args.device.startswith("cuda"))
    print(f"step_s {median['step']:.4f}")


if __name__ == "__main__":
    main()
