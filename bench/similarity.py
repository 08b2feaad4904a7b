"""The in-batch similarity against the plain table of cosines, and against a reward in Python loops.

    python bench/similarity.py [--rows 4096] [--group 8] [--dim 896]

Peak memory is what a direction allocates beyond inputs and gradients, measured in a process of its own. Times stand
beside the floor of their counted operations. On CUDA the kernel is also timed with other tiles and products.
"""

import argparse
import statistics
import subprocess
import sys
import time

import torch
import torch.nn.functional as F
from common import DEVICE, goal, machine, matmul_rate, seconds

import reward
import similarity


def example(N, K, D, device="cpu"):
    """Unit rows `[N, D]` and columns `[N/K, K, D]` that want gradients."""
    torch.manual_seed(0)
    unit = lambda *shape: F.normalize(torch.randn(*shape, device=device), dim=-1).requires_grad_()
    return unit(N, D), unit(N // K, K, D)


def plain(rows, columns, t):
    """The definition: the whole table, and autograd."""
    barred = torch.eye(len(columns), dtype=torch.bool, device=rows.device)
    return similarity.plain_similarity(rows, columns, t, barred)


def both_ways(function, rows, columns):
    """The gradients, by one forward and one backward pass."""
    numbers = function(rows, columns, 0.05)
    return torch.autograd.grad(sum(x.sum() for x in numbers), (rows, columns))


def peak(how, args):
    """The most bytes that are allocated at a time, inputs and gradients aside, in a fresh process."""
    command = [sys.executable, __file__, "--peak", how, "--rows", args.rows, "--group", args.group, "--dim", args.dim]
    command += ["--device", args.device]
    return int(subprocess.run([str(x) for x in command], capture_output=True, text=True, check=True).stdout)


def measure_peak(function, args):
    rows, columns = example(*sizes(args))
    if args.device.startswith("cuda"):
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        gradients = both_ways(function, rows, columns)
        return torch.cuda.max_memory_allocated() - before - sum(x.nbytes for x in gradients)
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as trace:
        gradients = both_ways(function, rows, columns)
    held = worst = 0
    for event in trace.profiler.kineto_results.events():  # every allocation and release, in order
        if event.name() == "[memory]":
            held += event.nbytes()
            worst = max(worst, held)
    return worst - sum(x.nbytes for x in gradients)


def loops(query, positive):
    """Eq. 13 to 15 as loops over the batch, one similarity at a time, as the released reward has them."""
    B, K, _ = positive.shape
    cosine = lambda a, b: float(F.cosine_similarity(a, b, dim=0))
    for i in range(B):
        for k in range(K):
            cosine(query[i], positive[i, k])
            sum(cosine(positive[i, k], positive[i, j]) for j in range(K) if j != k) / (K - 1)
        sum(max(cosine(query[i], positive[j, l]) for l in range(K)) for j in range(B) if j != i) / (B - 1)


def fused(query, positive):
    """The same three components."""
    reward.contrastive(query, positive, query[:, None][:, :0])
    reward.consistency(positive)
    reward.hard_negative(query, positive)


def variants(args):
    """The kernel with other products, tiles and warps: a table, and a goal per kind of product."""
    from speed import similarity_triton as kernel

    print(f"{'products':10}{'inputs':10}{'tile':>9}{'warps':>7}{'forward, ms':>13}{'both, ms':>10}{'of the floor':>14}")
    before = kernel.precision, kernel.tile, kernel.warps
    for precision, dtype in (("ieee", "float32"), ("tf32x3", "float32"), ("tf32", "float32"), ("tf32", "bfloat16")):
        rows, columns = (x.detach().to(getattr(torch, dtype)).requires_grad_() for x in example(*sizes(args)))
        least, best = floor(args, precision), 0
        for tile, warps in (((64, 64), 4), ((64, 128), 4), ((64, 128), 8)):
            kernel.precision, kernel.tile, kernel.warps = precision, tile, warps
            try:
                forward = seconds(lambda: similarity.group_similarity(rows, columns, 0.05), args.device)  # noqa: B023
                both = seconds(lambda: both_ways(similarity.group_similarity, rows, columns), args.device)  # noqa: B023
            except Exception as error:  # a tile can be more than a multiprocessor holds; the others are still measured
                print(f"{precision:10}{dtype:10}{tile[0]:>5}x{tile[1]:<3}{warps:7}  {type(error).__name__}")
                continue
            print(f"{precision:10}{dtype:10}{tile[0]:>5}x{tile[1]:<3}{warps:7}{forward * 1e3:13.3f}", end="")
            print(f"{both * 1e3:10.3f}{least / both:14.0%}")
            best = max(best, least / both)
        goal(f"the kernel, {precision} on {dtype}, best tile: share of its arithmetic floor", "50 %", f"{best:.0%}")
    kernel.precision, kernel.tile, kernel.warps = before


def sizes(args):
    return args.rows, args.group, args.dim, args.device


def products(args):
    """The operations of one matrix product, rows by columns."""
    return 2 * args.rows**2 * args.dim


def floor(args, precision):
    """Seconds that the four products take at least: the table, twice, in this precision; a library's at rows and columns."""
    count = 3 if precision == "tf32x3" else 1  # products of tensor cores for one of float32
    of_tiles = matmul_rate(args.device, "float32" if precision == "ieee" else "tf32") / count
    return 2 * products(args) * (1 / of_tiles + 1 / matmul_rate(args.device))


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=4096, help="N, and as many columns [4096]")
    parser.add_argument("--group", type=int, default=8, help="K [8]")
    parser.add_argument("--dim", type=int, default=896, help="D [896]")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--device", default=DEVICE)
    parser.add_argument("--peak", choices=["fused", "plain"], help="print one peak and stop")
    args = parser.parse_args()
    forms = {"fused": similarity.group_similarity, "plain": plain}
    if args.peak:
        print(measure_peak(forms[args.peak], args))
        return
    rows, columns = example(*sizes(args))
    difference = max(
        float((a - b).abs().max()) for a, b in zip(*(both_ways(form, rows, columns) for form in forms.values()))
    )  # fmt: skip
    print(f"{machine(args.device)}; N = {args.rows}, K = {args.group}, D = {args.dim}")
    how = "Triton" if similarity.use_kernel(rows) else "torch in blocks"
    print(f"implementation: {how}; gradients differ by {difference:.1e}")
    times = {name: [] for name in forms}
    for _ in range(args.repeats):  # in turn
        for name, form in forms.items():
            times[name].append(seconds(lambda form=form: both_ways(form, rows, columns), args.device, 1))
    times = {name: statistics.median(x) for name, x in times.items()}
    peaks = {name: peak(name, args) for name in forms}
    print(f"{'':8}{'forward + backward, s':>24}{'peak beyond inputs and gradients, MB':>40}")
    for name in forms:
        print(f"{name:8}{times[name]:24.4f}{peaks[name] / 2**20:40.1f}")
    print(f"ratio   {times['fused'] / times['plain']:24.2f}{peaks['fused'] / peaks['plain']:40.3f}")
    rate, least = 4 * products(args) / times["fused"], floor(args, "tf32x3" if how == "Triton" else "ieee")
    print(f"{products(args) / 1e9:.1f} Gflop per product, four of them: {rate / 1e9:.0f} Gflop/s, floor {least:.4f} s")
    goal("the kernel as it is, against the plain form", "no slower", f"{times['plain'] / times['fused']:.2f} times as fast")
    goal("the same: share of its arithmetic floor", "50 %", f"{least / times['fused']:.0%}")
    if how == "Triton":
        variants(args)
    if args.device == "cpu":
        threads = torch.get_num_threads()
        torch.set_num_threads(1)
        query, positive = (x.detach() for x in example(512, 8, 1536))
        query = query[:64].contiguous()
        start = time.perf_counter()
        loops(query, positive)
        slow = time.perf_counter() - start
        quick = seconds(lambda: fused(query, positive), "cpu", 20)
        torch.set_num_threads(threads)
        print("Eq. 13 to 15 at B = 64, K = 8, D = 1536, one thread:", end=" ")
        print(f"loops {slow:.2f} s, here {quick * 1e3:.2f} ms, {slow / quick:.0f} times faster")


if __name__ == "__main__":
    main()
