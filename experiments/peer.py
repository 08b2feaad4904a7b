"""Trains a peer of GRACE by hand, with the flags of grace.py: the InfoNCE loss, SimCSE, another algorithm of Table 4.

python experiments/peer.py contrastive --model DIR --data FILE --out DIR [flags of grace.py]
"""

import sys

from record import TRAINERS, UNREWARDED

import grace
from plumbing import ranks

if __name__ == "__main__":
    name, *flags = sys.argv[1:] or ["?"]
    if name not in TRAINERS:
        sys.exit(f"peer.py: {name!r} is none of {', '.join(TRAINERS)}")
    if name in UNREWARDED and ranks.size() > 1:
        sys.exit(f"peer.py: {name} reads its whole batch at once, in one process: leave out torchrun")
    grace.main(flags, TRAINERS[name])
