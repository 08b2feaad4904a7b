"""How seconds and peak memory of a training step grow as one size does, the others held.

    python bench/memory.py [--only B] [--shape 0.4m]

Each point is one run of bench/step.py in a process of its own. Memory is the peak less what the process held
before its first step: sampling, reward, update and AdamW's state. The exponent is the slope of log cost over log
size between two neighbouring sizes: 1 is linear, 0 means that the size does not matter. Further flags replace what
is held: `--only B --shape qwen2.5-0.5b --max-new-tokens 256`.
"""

import argparse
import math
import os
import re
import subprocess
import sys

from common import DEVICE, machine

STEP = os.path.join(os.path.dirname(os.path.abspath(__file__)), "step.py")
HELD = {"--batch": 16, "--rollouts": 4, "--max-new-tokens": 32, "--prompt-tokens": 32, "--shape": "0.4m"}
GROWS = {  # what grows: its flag, and the sizes
    "B": ("--batch", (8, 32, 128, 512)),
    "K": ("--rollouts", (2, 4, 8, 16)),
    "T": ("--max-new-tokens", (32, 128, 512, 1024)),
    "prompt": ("--prompt-tokens", (32, 128, 512, 1024)),
    "D": ("--hidden", (96, 192, 384, 768)),
    "V": ("--vocab", (1000, 4000, 16000, 64000)),
}


def point(settings):
    """Seconds per step, and gigabytes beyond the start."""
    command = [sys.executable, STEP, "--steps", "2", "--kl", "0"] + [str(x) for pair in settings.items() for x in pair]
    out = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    peak, before = re.search(r"peak memory ([\d.]+) GB, before the first step ([\d.]+)", out).groups()
    return float(out.split()[-1]), float(peak) - float(before)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", choices=GROWS, help="one size")
    parser.add_argument("--points", type=int, default=4, help="so many of its sizes [4]")
    parser.add_argument("--shape", default="0.4m")
    args, rest = parser.parse_known_args()
    held = HELD | {"--shape": args.shape} | dict(zip(rest[::2], rest[1::2]))
    print(f"{machine(held.get('--device', DEVICE))}; held: {', '.join(f'{k[2:]} {v}' for k, v in held.items())}")
    print("| grows  | size | seconds per step | exponent | GB beyond the start | exponent |\n| --- " + "| ---: " * 5 + "|")
    for name in [args.only] if args.only else GROWS:
        flag, sizes = GROWS[name]
        before = None
        for size in sizes[: args.points]:
            costs, slopes = point(held | {flag: size}), ["", ""]
            if before:
                grown = math.log(size / before[0])
                slopes = [f"{math.log(now / max(was, 1e-9)) / grown:.2f}" for now, was in zip(costs, before[1])]
            print(f"| {name:6} | {size} | {costs[0]:.3f} | {slopes[0]} | {costs[1]:.3f} | {slopes[1]} |", flush=True)
            before = (size, costs)


if __name__ == "__main__":
    main()
