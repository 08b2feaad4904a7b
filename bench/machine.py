"""What the machine is and what it can do at most: the two rates that every floor on the page is made from.

python bench/machine.py [--device cuda]
"""

import argparse
import datetime

import torch
from common import DEVICE, copy_rate, machine, matmul_rate


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default=DEVICE)
    args = parser.parse_args()
    cuda = args.device.startswith("cuda")
    print(f"{machine(args.device)}; {datetime.date.today()}")
    if cuda:
        card = torch.cuda.get_device_properties(args.device)
        print(f"{card.total_memory / 2**30:.0f} GiB, {card.multi_processor_count} multiprocessors, CUDA {torch.version.cuda}")
    print(f"memory, by a copy        {copy_rate(args.device) / 1e9:8.0f} GB/s")
    for precision in ("float32", "tf32", "bfloat16") if cuda else ("float32",):
        print(f"products, {precision:14} {matmul_rate(args.device, precision) / 1e12:8.3f} Tflop/s")


if __name__ == "__main__":
    main()
