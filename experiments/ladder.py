"""The ladder: held-out retrieval in the town against the number of steps of a walk, for GRACE and for the loss.

    python experiments/ladder.py --world runs/town-world-0 --grace runs/toy --loss runs/toy-loss --out runs/toy/ladder.png
    python experiments/ladder.py --join runs/*/ladder.json --out docs/ladder.png          several runs in one picture

One pass of the network ends where the loss's curve falls, and writing begins where GRACE's goes on. Of GRACE there are
two curves: with the rationale, and the same checkpoint with nothing written.
"""

import argparse
import glob
import json
import os
import re

from record import ROOT  # noqa: F401 (puts the repository on the path)

from evaluation.tasks import evaluate_triplets
from plumbing.checkpoint import write_atomically
from plumbing.data import read_triplets
from policy import Policy

CURVES = {  # what it is called: which checkpoint, whether it writes a rationale, and how it is drawn
    "GRACE": ("grace", True, "#c0392b", "o"),
    "GRACE, nothing written": ("grace", False, "#e59866", "s"),
    "InfoNCE as a loss": ("loss", False, "#2c3e50", "^"),
}


def climb(folder, rungs, rationale):
    """nDCG@10 of one checkpoint on every rung. `{steps: rows} -> {steps: score}`."""
    policy = Policy.load(folder)
    return {n: evaluate_triplets(policy, rows, rationale=rationale)["ndcg_at_10"] for n, rows in rungs.items()}


def show(ladder):
    """The ladder as text: a row per curve, a column per number of steps."""
    steps = next(iter(ladder.values()))
    lines = [f"{'steps in each walk':24}" + "".join(f"{n:>8}" for n in steps)]
    return "\n".join(lines + [f"{name:24}" + "".join(f"{x:8.3f}" for x in curve.values()) for name, curve in ladder.items()])


def draw(ladders, path):
    """The ladder as a picture: means over runs, with the range between the lowest and the highest. Needs matplotlib."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(7.5, 3.6), layout="constrained")
    for name, (_, _, color, marker) in CURVES.items():
        curves = [ladder[name] for ladder in ladders if name in ladder]
        if curves:
            steps = [int(n) for n in curves[0]]
            scores = [[curve[n] for curve in curves] for n in curves[0]]  # per number of steps, one per run
            axes.plot(steps, [sum(s) / len(s) for s in scores], color=color, marker=marker, linewidth=2, label=name)
            axes.fill_between(steps, [min(s) for s in scores], [max(s) for s in scores], color=color, alpha=0.15, linewidth=0)
    axes.axvspan(4.5, 6.3, color="#7f8c8d", alpha=0.12, linewidth=0)
    axes.text(5.4, 1.02, "longer than any rewarded", ha="center", va="top", fontsize=9, color="#555555")
    axes.set(xlabel="steps in each walk", ylabel="nDCG@10, held out", ylim=(-0.02, 1.05), xlim=(0.7, 6.3), xticks=range(1, 7))
    axes.spines[["top", "right"]].set_visible(False)
    figure.legend(loc="outside upper center", ncols=3, frameon=False)
    figure.savefig(path, dpi=150)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--world", help="the town's folder, as toy.py writes it")
    parser.add_argument("--grace", help="a checkpoint that GRACE trained")
    parser.add_argument("--loss", help="a checkpoint that the loss trained")
    parser.add_argument("--rows", type=int, default=128, help="queries per number of steps [128]")
    parser.add_argument("--join", nargs="+", metavar="JSON", help="draw the ladders of earlier calls instead of a new one")
    parser.add_argument("--out", help="write a picture here, and a new ladder's figures beside it as .json")
    args = parser.parse_args()
    if args.join:
        ladders = []
        for path in args.join:
            with open(path) as file:
                ladders.append(json.load(file))
    elif args.world and args.grace:
        files = sorted(glob.glob(os.path.join(args.world, "data", "heldout-steps-*.jsonl")))
        if not files:
            parser.error(f"{args.world}/data has no heldout-steps-*.jsonl: python toy.py --world town writes them")
        rungs = {re.search(r"(\d+)\.jsonl$", file)[1]: read_triplets(file)[: args.rows] for file in files}
        folders = {"grace": args.grace, "loss": args.loss}
        ladders = [
            {name: climb(folders[which], rungs, rationale) for name, (which, rationale, *_) in CURVES.items() if folders[which]}
        ]
        print(show(ladders[0]))
        if args.out:
            write_atomically(os.path.splitext(args.out)[0] + ".json", json.dumps(ladders[0], indent=1))
    else:
        parser.error("give --world and --grace, or --join")
    if args.out:
        try:
            draw(ladders, args.out)
        except ImportError:
            print("no picture: matplotlib is not installed")


if __name__ == "__main__":
    main()
