"""The ladder of one run: held-out retrieval in the town by the number of steps in a walk, for GRACE and for the loss.

    python experiments/ladder.py --world runs/town-world-0 --grace runs/toy --loss runs/toy-loss --out runs/toy/ladder.png

Where the loss's curve falls, one pass of the network no longer suffices; where GRACE's stays up, the written walk does the
work. Of GRACE there are two curves: with the rationale, and the same checkpoint without it. (`run.py ladder` draws five seeds.)
"""

import argparse
import os
import sys

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))

from experiments import pictures
from experiments.measure import ladder
from policy import Policy


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--world", required=True, help="the town's folder")
    parser.add_argument("--grace", required=True, help="a checkpoint that GRACE trained")
    parser.add_argument("--loss", required=True, help="a checkpoint that the loss trained")
    parser.add_argument("--out", help="write a picture here")
    args = parser.parse_args()
    grace, loss = Policy.load(args.grace), Policy.load(args.loss)
    curves = {
        "GRACE": ladder(grace, args.world),
        "GRACE, without rationale": ladder(grace, args.world, rationale=False),
        "InfoNCE as a loss": ladder(loss, args.world),
    }
    print(f"{'steps in each walk':24}" + "".join(f"{n:>8}" for n in curves["GRACE"]))
    for name, curve in curves.items():
        print(f"{name:24}" + "".join(f"{x:8.3f}" for x in curve.values()))
    if args.out:
        try:
            pictures.draw_ladder({name: [curve] for name, curve in curves.items()}).savefig(args.out)
        except ImportError:
            print("no picture: matplotlib is not installed")


if __name__ == "__main__":
    main()
