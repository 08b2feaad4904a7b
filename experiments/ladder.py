"""The ladder of one run: held-out retrieval in the town by the number of steps in a walk, for GRACE and for the loss.

    python experiments/ladder.py --world runs/town-world-0 --grace runs/toy --loss runs/toy-loss --out runs/toy/ladder.png

Where the loss's curve falls, one pass of the network no longer suffices; where GRACE's stays up, the written walk does the
work. Of GRACE there are two curves: with the rationale, and the same checkpoint without it. (`run.py ladder` draws
five seeds in one picture.)
"""

import argparse
import json
import os

import pictures
from record import ladder

from plumbing.checkpoint import write_atomically
from policy import Policy

CURVES = {  # its name: which checkpoint, and whether it writes a rationale
    "GRACE": ("grace", True),
    "GRACE, without rationale": ("grace", False),
    "InfoNCE as a loss": ("loss", True),
}


def show(curves):
    """The ladder as text: a row per curve, a column per number of steps."""
    steps = next(iter(curves.values()))
    lines = [f"{'steps in each walk':24}" + "".join(f"{n:>8}" for n in steps)]
    return "\n".join(lines + [f"{name:24}" + "".join(f"{x:8.3f}" for x in curve.values()) for name, curve in curves.items()])


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--world", required=True, help="the town's folder, as worlds/make.py writes it")
    parser.add_argument("--grace", required=True, help="a checkpoint that GRACE trained")
    parser.add_argument("--loss", help="a checkpoint that the loss trained")
    parser.add_argument("--rows", type=int, default=128, help="queries per number of steps [128]")
    parser.add_argument("--out", help="write a picture here, and the figures beside it as .json")
    args = parser.parse_args()
    if not os.path.isfile(os.path.join(args.world, "data", "heldout-steps-1.jsonl")):
        parser.error(f"{args.world}/data has no heldout-steps-*.jsonl: python -m worlds.make --world town writes them")
    policies = {which: Policy.load(folder) for which in ("grace", "loss") if (folder := getattr(args, which))}
    curves = {
        name: ladder(policies[which], args.world, rationale, args.rows)
        for name, (which, rationale) in CURVES.items()
        if which in policies
    }
    print(show(curves))
    if args.out:
        write_atomically(os.path.splitext(args.out)[0] + ".json", json.dumps(curves, indent=1))
        try:
            pictures.draw_ladder({name: [curve] for name, curve in curves.items()}).savefig(args.out)
        except ImportError:
            print("no picture: matplotlib is not installed")


if __name__ == "__main__":
    main()
