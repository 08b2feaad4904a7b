"""Several processes as one run: data parallel training under torchrun. With one process, nothing here does anything.

    torchrun --standalone --nproc-per-node N grace.py …the same flags…

Every rank runs the whole program and knows the whole batch; only two things are shared out, and both are in sight where
they happen: each rank samples its share of the prompts (`mine`, then `gather`, in rollout.py), and reads its share of the
update's rollouts (`micro_batches`, then `sum_gradients`, in grace.py). So N ranks take the step that one process takes.

The first rank writes files and prints. Where a rank fails, torchrun ends the others, and --resume continues from the newest
checkpoint.
"""

import atexit
import io
import os
import sys
import warnings

import torch
import torch.distributed as dist

rank, size = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))


def start():
    """Meet the other ranks that torchrun started. Objects go over gloo, on the CPU; gradients over NCCL on CUDA."""
    if size == 1 or dist.is_initialized():
        return
    if torch.cuda.is_available():  # from here on "cuda" is this rank's own device
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    dist.init_process_group("cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo")
    atexit.register(dist.destroy_process_group)
    if not first():  # all say the same: one of them says it
        sys.stdout = open(os.devnull, "w")
        warnings.simplefilter("ignore")


def first():
    """Whether this is the rank that writes and prints."""
    return rank == 0


def mine(n):
    """This rank's share of n items, as a slice; at least one item where there are as many as ranks."""
    return slice(n * rank // size, n * (rank + 1) // size)


def gather(x):
    """`[every rank's x]`, in order; tensors inside arrive on this rank's own device."""
    if size == 1:
        return [x]
    file, everyone = io.BytesIO(), [None] * size
    torch.save(x, file)
    dist.all_gather_object(everyone, file.getvalue())
    here = lambda storage, device: storage.cuda() if device.startswith("cuda") else storage
    return [torch.load(io.BytesIO(content), map_location=here, weights_only=False) for content in everyone]


def sum_gradients(parameters):
    """Add up every parameter's gradient over all ranks, in place."""
    if size == 1:
        return
    for p in parameters:
        if p.requires_grad:
            p.grad = torch.zeros_like(p) if p.grad is None else p.grad  # a rank without a share has none
            dist.all_reduce(p.grad)
