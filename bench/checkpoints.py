"""What checkpoints cost: steps of the embedded default with one every 50 steps, and without, in turn.

    bash train.sh                        # makes the world
    python bench/checkpoints.py --repeats 5

Steps are timed in blocks of 50; every second block ends with a checkpoint.
"""

import argparse
import os
import statistics
import tempfile

from common import clock, machine  # puts the repository on the path

from config import Config
from grace import Trainer
from plumbing.checkpoint import save_checkpoint
from plumbing.data import read_triplets
from policy import Policy


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--world", default="runs/toy-world-0", help="the output folder of worlds/make.py")
    parser.add_argument("--repeats", type=int, default=5, help="blocks of 50 steps of each kind")
    args = parser.parse_args()
    config = Config(batch=16, rollouts=8, lr=5e-4)
    rows, policy = read_triplets(f"{args.world}/data/train.jsonl"), Policy.load(f"{args.world}/model")
    trainer = Trainer(policy, Policy.load(f"{args.world}/model"), rows, config)
    for _ in range(5):
        trainer.step()
    blocks, saves = {False: [], True: []}, []
    with tempfile.TemporaryDirectory(dir=".") as out:
        for _ in range(args.repeats):
            for kind in (False, True):
                start = clock(policy.device)
                for _ in range(50):
                    trainer.step()
                before = clock(policy.device)
                if kind:
                    save_checkpoint(trainer, out, history=[])
                    saves.append(clock(policy.device) - before)
                blocks[kind].append((clock(policy.device) - start) / 50)
        size = sum(os.path.getsize(os.path.join(at, name)) for at, _, names in os.walk(out) for name in names) / 2
    without, save = statistics.median(blocks[False]), statistics.median(saves)
    print(machine(policy.device))
    print(f"a step, median of {args.repeats} blocks of 50, in turn:")
    for kind, name in ((False, "without"), (True, "with")):
        low, middle, high = (1e3 * f(blocks[kind]) for f in (min, statistics.median, max))
        print(f"{name:<8} {middle:.1f} ms ({low:.1f} to {high:.1f})")
    print(f"a save: {save * 1e3:.1f} ms, {size / 1e6:.1f} MB; over 50 steps {100 * save / (50 * without):.2f} % of a step")


if __name__ == "__main__":
    main()
