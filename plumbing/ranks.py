"""Several processes as one run: what the ranks that `torchrun` starts tell one another. With one process, nothing.

    torchrun --standalone --nproc-per-node N grace.py …the same flags…

Every rank runs the whole program and knows the whole batch; only the work is shared out. So there is no master and no
worker, and all that the ranks have to say is here: `exchange` (everybody's objects), `sum_gradients`, and what is made
of the first of them:

    together(compute)     each rank's result on every rank; what fails on one fails on all, before any of them waits for it
    each(function, xs)    one rank computes one item, the next rank the next item; every rank gets all results, in order
    by_first(function)    the first rank alone does it, and how it ends is how it ends on all: all writing is of this kind

A rank that is gone shows as a broken connection when the others next exchange something, and ends them with one sentence.
Control goes over gloo, on the CPU, whatever the device; gradients take the device's own way, NCCL on CUDA.
"""

import atexit
import contextlib
import datetime
import functools
import io
import itertools
import os
import sys
import warnings

import torch
import torch.distributed as dist
from torch.distributed.tensor import DTensor, distribute_tensor

from plumbing.errors import GraceError, first_line

BUCKET = 2**25  # gradients are summed so many numbers at a time: 134 MB in float32
LOST = "another rank has ended; the same command with --resume continues from the newest checkpoint"

_rank, _size, _store = 0, 1, None
_alone = False  # in what the first rank does alone, or after a rank is lost: nothing is exchanged


def start():
    """Take this process's place among the ranks that torchrun started. Without torchrun, or with one rank: nothing to do."""
    global _rank, _size, _store
    if _store or int(os.environ.get("WORLD_SIZE", 1)) == 1:
        return
    try:
        _store, _rank, _size = next(dist.rendezvous("env://"))
        if torch.cuda.is_available():  # from here on "cuda" is this rank's own device
            torch.cuda.set_device(local_rank() % torch.cuda.device_count())
        backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
        # Long enough for the slowest disk that the others wait for. A rank that is gone shows at once, in another way.
        patience = datetime.timedelta(hours=2)
        dist.init_process_group(backend, store=_store, rank=_rank, world_size=_size, timeout=patience)
        atexit.register(end)
    except (ValueError, RuntimeError) as error:
        raise GraceError(f"the ranks cannot find one another ({first_line(error)}): start them by torchrun") from error
    if not first():  # all say the same: one of them says it
        sys.stdout = open(os.devnull, "w")
        warnings.simplefilter("ignore")


def end():
    """Close the connections while Python still runs: gloo's threads, left to its shutdown, now and then abort the process."""
    if not _alone:  # of a rank that is lost there is nothing to be waited for
        dist.destroy_process_group()


def size():
    """How many ranks there are."""
    return _size


def first():
    """Whether this is the rank that writes and prints."""
    return _rank == 0


def local_rank():
    """This rank's number on its machine, which is that of its GPU."""
    return int(os.environ.get("LOCAL_RANK", 0)) if _size > 1 else 0


def mine():
    """This rank's share of a list or of a tensor's first dimension, as a slice: dealt out like cards."""
    return shares()[_rank]


def shares():
    """Every rank's share, as slices."""
    return [slice(rank, None, _size) for rank in range(_size)]


# ---------------------------------------------------------------- what ranks tell one another


@contextlib.contextmanager
def _connected():
    """In here a collective that fails, because a rank is gone, becomes a GraceError; then each rank ends by itself."""
    global _alone
    try:
        yield
    except RuntimeError as error:
        _alone = True
        raise GraceError(LOST) from error


def exchange(x):
    """`[every rank's x]`, in order. Tensors arrive on this rank's device of their kind."""
    if _size == 1 or _alone:
        return [x] * _size
    file, everyone = io.BytesIO(), [None] * _size
    torch.save(x, file)
    with _connected():
        dist.all_gather_object(everyone, file.getvalue())
    here = lambda storage, device: storage.cuda() if device.startswith("cuda") else storage
    load = lambda content: torch.load(io.BytesIO(content), map_location=here, weights_only=False)
    return [x if rank == _rank else load(content) for rank, content in enumerate(everyone)]


def together(compute, meets=False):
    """`compute()` on every rank, `[each rank's result]`. An error on one rank is raised on all of them.

    meets: the ranks meet inside compute as well (FSDP). Then one that fails there cannot tell the others, who are in the
    middle of it: they end because it does. Only a GraceError, which compute raises when it is done, is raised on all.
    """
    if _size == 1:
        return [compute()]
    result, problem = None, None
    try:
        result = compute()
    except Exception as error:
        problem = error
        if meets and not isinstance(error, GraceError):
            leave()
            problem = GraceError(LOST) if isinstance(error, dist.DistError) or "gloo" in str(error) else error
    told = problem
    if problem and not isinstance(problem, GraceError):
        told = GraceError(f"rank {_rank} failed: {type(problem).__name__}: {first_line(problem)}")
    outcomes = exchange((result, told))
    if problem:
        raise problem
    for _, error in outcomes:
        if error:
            raise error
    return [result for result, _ in outcomes]


def each(function, items):
    """`function(item)` for every item, in order, each computed by one rank. A generator; every rank gets all of them."""
    items = iter(items)
    while turn := list(itertools.islice(items, _size)):
        compute = lambda: function(turn[_rank]) if _rank < len(turn) else None  # noqa: B023
        yield from together(compute)[: len(turn)]


def by_first(function):
    """The function, done by the first rank alone: what it returns, or the error it raises, every rank gets."""

    @functools.wraps(function)
    def done_once(*args, **kwargs):
        global _alone
        if _size == 1 or (_alone and first()):
            return function(*args, **kwargs)

        def alone():
            global _alone
            _alone = True  # functions of this kind call one another
            try:
                return function(*args, **kwargs)
            finally:
                _alone = False

        return together(lambda: alone() if first() else None)[0]

    return done_once


def leave():
    """This rank has failed where the others cannot be told: what is still to be done, it does alone."""
    global _alone
    _alone = True


def last_word(message):
    """What a process that failed says and exits with: the first rank to fail has the message; the others exit with 1."""
    with contextlib.suppress(RuntimeError):  # torchrun, which keeps the store, may have ended as well
        if _store and _store.add("failed", 1) > 1:
            return 1
    return message


# ---------------------------------------------------------------- gradients


def sum_gradients(parameters):
    """Add up every parameter's gradient over all ranks, in place. Of sharded parameters FSDP has taken the mean over ranks."""
    if _size == 1:
        return
    parameters = list(parameters)
    used = set().union(*exchange({i for i, p in enumerate(parameters) if p.grad is not None}))
    whole, n = [], 0
    for i in sorted(used):
        p = parameters[i]
        p.grad = torch.zeros_like(p) if p.grad is None else p.grad
        if is_sharded(p):
            p.grad *= _size
            continue
        if whole and n + p.numel() > BUCKET:
            _sum(whole)
            whole, n = [], 0
        whole.append(p.grad)
        n += p.numel()
    if whole:
        _sum(whole)


def _sum(tensors):
    flat = torch.cat([x.flatten() for x in tensors])
    with _connected():
        dist.all_reduce(flat)
    torch._foreach_copy_(tensors, [x.view_as(to) for x, to in zip(flat.split([to.numel() for to in tensors]), tensors)])


# ---------------------------------------------------------------- tensors of which each rank holds a part (--shard)


def is_sharded(x):
    """Whether each rank holds only a part of this tensor."""
    return isinstance(x, DTensor)


def whole(x):
    """The tensor itself, put together from all ranks if it is sharded. Every rank has to ask for it."""
    if not is_sharded(x):
        return x
    if _alone:
        raise GraceError(LOST)
    with _connected():
        return x.full_tensor()


def gathered(x):
    """Nested dicts of tensors with the sharded ones whole, one after the other, on the first rank's CPU; elsewhere None."""
    if isinstance(x, dict):
        distinct = {id(value): value for value in x.values()}  # tied weights stay one tensor
        made = {key: gathered(value) for key, value in distinct.items()}
        return {name: made[id(value)] for name, value in x.items()}
    if not is_sharded(x):
        return x
    x = whole(x.detach())
    return x.cpu() if first() else None


def scattered(state, parameters):
    """An optimizer's state with whole tensors as one for these parameters: sharded where they are."""
    state = {**state, "state": {i: dict(values) for i, values in state["state"].items()}}
    for i, p in enumerate(parameters):
        for name, x in state["state"].get(i, {}).items():
            if is_sharded(p) and x.shape == p.shape:
                state["state"][i][name] = distribute_tensor(x.to(p.device), p.device_mesh, p.placements, src_data_rank=None)
    return state
