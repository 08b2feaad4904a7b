"""Functions in forked processes: runs that are to be killed, and the ranks of one run.

A forked process has everything imported and starts at once. The threads of its parent are missing in it, and it would wait
for them forever: so whoever imports this file computes with one thread.
"""

import functools
import os
import signal
import sys
import time

import torch
import torch.distributed as dist

from plumbing import ranks

torch.set_num_threads(1)


def fork(function, output=os.devnull):
    """Start `function()` in a process of its own, with what it prints in a file. Returns the id of the process."""
    if pid := os.fork():
        return pid
    code = 1
    try:
        file = os.open(output, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(file, 1), os.dup2(file, 2)
        sys.stdout = sys.stderr = os.fdopen(1, "w", buffering=1)
        torch.cuda.is_available = lambda: False  # CUDA does not survive a fork
        function()
        code = 0
    except SystemExit as stop:
        code = stop.code
        if not isinstance(code, int):
            code = print(stop.code, file=sys.stderr) or 1
    except BaseException:
        sys.excepthook(*sys.exc_info())
    finally:
        os._exit(code)


def before(function, when, act):
    """The function, with `act()` done before it where `when(*its arguments)`."""

    def acting(*args, **options):
        if when(*args):
            act()
        return function(*args, **options)

    return acting


def send(number):
    """Send this process itself a signal."""
    os.kill(os.getpid(), number)


def ended(pid):
    """Wait for a forked process: its exit code, or minus the signal that killed it."""
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def fork_ranks(function, folder, n=2):
    """`function()` in n ranks, which are ended as soon as one of them fails, as torchrun does it.

    Returns `[(exit code, what was printed)]`.
    """
    store = dist.TCPStore("localhost", 0, is_master=True, wait_for_workers=False)

    def one(rank):
        place = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": n, "MASTER_ADDR": "localhost", "MASTER_PORT": store.port}
        os.environ |= {name: str(x) for name, x in place.items()} | {"TORCHELASTIC_USE_AGENT_STORE": "True"}
        ranks.rank, ranks.size = rank, n
        ranks.start()
        function()

    printed = [f"{folder}/rank-{rank}.txt" for rank in range(n)]
    pids, codes = [fork(functools.partial(one, rank), printed[rank]) for rank in range(n)], {}
    while len(codes) < n:
        pid, status = os.wait()
        codes[pid] = os.waitstatus_to_exitcode(status)
        if codes[pid]:
            time.sleep(0.1)
            for other in set(pids) - set(codes):
                os.kill(other, signal.SIGTERM)
    return [(codes[pid], open(path).read()) for pid, path in zip(pids, printed)]
