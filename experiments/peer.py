"""Trains a peer of GRACE, with the flags of grace.py: the InfoNCE loss, SimCSE, another algorithm of Table 4.

python experiments/peer.py contrastive --model DIR --data FILE --out DIR [flags of grace.py]
"""

import os
import sys

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))

import grace
from experiments.records import TRAINERS

if __name__ == "__main__":
    name, *flags = sys.argv[1:] or ["?"]
    if name not in TRAINERS:
        sys.exit(f"peer.py: {name!r} is none of {', '.join(TRAINERS)}")
    grace.main(flags, TRAINERS[name])
