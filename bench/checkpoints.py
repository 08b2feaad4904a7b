"""What checkpoints cost: steps of the embedded default with one every 50 steps, and without, in turn.

bash train.sh                        # makes the world
python bench/checkpoints.py --repeats 5
"""

import argparse
import os
import statistics
import sys
import tempfile
import time

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))

import torch  # noqa: E402

from checkpoint import save_checkpoint  # noqa: E402
from config import Config  # noqa: E402
from data import read_triplets  # noqa: E402
from grace import Trainer  # noqa: E402
from policy import Policy  # noqa: E402


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--world", default="runs/toy-world-0", help="what toy.py wrote")
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
                start = time.perf_counter()
                for _ in range(50):
                    trainer.step()
                before = time.perf_counter()
                if kind:
                    save_checkpoint(trainer, out, history=[])
                    saves.append(time.perf_counter() - before)
                blocks[kind].append((time.perf_counter() - start) / 50)
        size = sum(os.path.getsize(os.path.join(at, name)) for at, _, names in os.walk(out) for name in names) / 2
    without, each = statistics.median(blocks[False]), statistics.median(saves)
    print(f"{torch.get_num_threads()} threads; a step, median of {args.repeats} blocks of 50, in turn:")
    for kind, name in ((False, "without"), (True, "with")):
        low, middle, high = (1e3 * f(blocks[kind]) for f in (min, statistics.median, max))
        print(f"{name:<8} {middle:.1f} ms ({low:.1f} to {high:.1f})")
    print(f"a save: {each * 1e3:.1f} ms, {size / 1e6:.1f} MB; over 50 steps {100 * each / (50 * without):.2f} % of a step")


if __name__ == "__main__":
    main()
