"""The in-batch similarity in tiles, and by its definition.

    python bench/similarity.py [--rows 4096] [--group 8] [--dim 896]

Time and memory of a forward and a backward pass in float32, for N rows and N columns in groups of K. The definition makes
the table of all cosines at once, as loss libraries do.
"""

import argparse

import torch
import torch.nn.functional as F
from common import show, show_machine, take_turns

import similarity

T = 0.05  # the softmax temperature


def tiles(rows, columns):
    return sum(x.sum() for x in similarity.group_similarity(rows, columns, T))


def definition(rows, columns):
    own = torch.eye(len(columns), dtype=torch.bool, device=rows.device)
    return sum(x.sum() for x in similarity.plain_similarity(rows, columns, T, own))


def peak_bytes(function, device):
    """The most memory that a call holds at a time, without what was allocated before it and what it returns."""
    if device.startswith("cuda"):
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        kept = sum(x.nbytes for x in function())
        return torch.cuda.max_memory_allocated() - before - kept
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as trace:
        kept = sum(x.nbytes for x in function())
    held = most = 0
    for event in trace.profiler.kineto_results.events():  # every allocation and release, in order
        held += event.nbytes() if event.name() == "[memory]" else 0
        most = max(most, held)
    return most - kept


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=4096, help="N, and as many columns [4096]")
    parser.add_argument("--group", type=int, default=8, help="K [8]")
    parser.add_argument("--dim", type=int, default=896, help="D [896]")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    args = parser.parse_args()
    torch.manual_seed(0)
    rows, columns = torch.randn(2, args.rows, args.dim, device=args.device)
    inputs = [F.normalize(x, dim=-1).requires_grad_() for x in (rows, columns.view(-1, args.group, args.dim))]
    sides = {  # each gives the gradients at rows and columns
        "tiles (similarity.py)": lambda: torch.autograd.grad(tiles(*inputs), inputs),
        "its definition": lambda: torch.autograd.grad(definition(*inputs), inputs),
    }
    times = take_turns(sides, args.device, args.repeats)
    ours, plain = (function() for function in sides.values())
    apart = max(float((a - b).abs().max()) for a, b in zip(ours, plain))
    show_machine(args.device)
    print(f"N = {args.rows}, K = {args.group}, D = {args.dim}")
    print(f"largest difference of gradients, tiles and definition: {apart:.1e}")
    show(times, args.rows, "rows")
    for name, function in sides.items():
        print(f"{name:24}{peak_bytes(function, args.device) / 1e6:10.1f} MB beyond inputs and gradients")


if __name__ == "__main__":
    main()
