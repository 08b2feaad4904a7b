"""What protects a run: from a folder in use, a signal, a number that is not finite, too little memory.

* A result is never overwritten without --overwrite, nor resumed under other settings (`claim`, `finished_summary`).
* SIGTERM and Ctrl-C take effect between two steps, so that a run ends with a checkpoint (`Signals`).
* A reward, loss or gradient that is not finite stops the run before the optimizer uses it (`errors.finite`),
  and the batch is written where a person can read it (`inspected`).
* Where the device runs out of memory, the same work is done again in smaller parts (`within_memory`).

A full disk and a damaged checkpoint are checkpoint.py's; a broken row of data is data.py's.
"""

import contextlib
import itertools
import json
import math
import os
import shutil
import signal
import threading

import torch

from plumbing import ranks
from plumbing.checkpoint import checkpoints, newest_whole, write_atomically
from plumbing.errors import GraceError, NotFinite, first_line


class Signals(contextlib.AbstractContextManager):
    """The stop signal received so far (SIGTERM, or SIGINT by Ctrl-C) or 0; a second one ends the process at once.

    Outside the main thread, where Python delivers no signals, `received` stays 0.
    """

    def __init__(self):
        self.received, self.handlers = 0, {}

    def __enter__(self):
        if threading.current_thread() is threading.main_thread():
            self.handlers = {n: signal.signal(n, self._receive) for n in (signal.SIGTERM, signal.SIGINT)}
        return self

    def __exit__(self, *_):
        for number, handler in self.handlers.items():
            signal.signal(number, handler)

    def _receive(self, number, _):
        self.received = number
        for n in self.handlers:
            signal.signal(n, signal.SIG_DFL)
        if ranks.first():  # not by print: the signal may have come in the middle of one
            os.write(2, f"\n{signal.Signals(number).name}: finishing this step, then saving. Again: end at once.\n".encode())


def within_memory(compute, budget, least, where):
    """`compute(budget)`, with half the token budget while the device runs out of memory. Returns (result, budget used).

    compute  does its work from the start each time and drops what a failed attempt left behind
    least    the budget that means one group at a time: below it nothing gets smaller
    where    what the message names: the step and the flag

    Raises GraceError where one group alone is too much.
    """
    while True:
        try:
            return compute(budget), budget
        except torch.OutOfMemoryError:
            pass  # handled below: inside this block the exception still keeps the tensors alive
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        if budget <= least:
            raise GraceError(
                f"{where} {budget}: out of memory with one group at a time; "
                "lower --rollouts, --max-new-tokens or --max-prompt-tokens"
            )
        budget = max(budget // 2, least)
        print(f"\nout of memory; continuing with {where} {budget}")


def on_every_rank(compute, budget, least, where, meets=False):
    """`within_memory` on every rank. Returns (each rank's result, the smallest budget that one of them used).

    meets: compute itself meets the other ranks, so none of them can do it again alone. Out of memory then ends the run.
    """

    def attempt():
        if not meets:
            return within_memory(compute, budget, least, where)
        try:
            return compute(budget), budget
        except torch.OutOfMemoryError as error:
            ranks.leave()
            raise GraceError(f"{where} {budget}: out of memory; lower it, and --resume continues") from error

    results, budgets = zip(*ranks.together(attempt, meets))
    return results, min(budgets)


@contextlib.contextmanager
def inspected(step, out, save):
    """NotFinite in here becomes a GraceError that names the step and, where there is an --out, the file that shows the batch.

    save: `(path)` writes the batch where a person can read it.
    """
    try:
        yield
    except NotFinite as error:
        shown = ""
        if out:
            path = os.path.join(out, f"not_finite_step_{step}.json")
            save(path)
            shown = f"; {path} shows the batch"
        raise GraceError(f"step {step}: {error}: lower --lr, or inspect the data{shown}") from error


def save_batch(path, texts, rationales, finished, figures):
    """Write a batch as JSON for a person to read: each text with its rationales, and each rationale's figures.

    texts       `[(role, text)] * N`
    rationales  `[N][K]` strings
    finished    `[N, K]` bool
    figures     `{name: [N, K]}`; a number that is not finite is written as a word
    """
    groups = []
    for i, (role, text) in enumerate(texts):
        rollouts = []
        for k, rationale in enumerate(rationales[i]):
            numbers = {name: float(x[i, k]) for name, x in figures.items()}
            numbers = {name: x if math.isfinite(x) else str(x) for name, x in numbers.items()}
            rollouts.append({"rationale": rationale, "finished": bool(finished[i, k]), **numbers})
        groups.append({"role": role, "text": text, "rollouts": rollouts})
    write_atomically(path, json.dumps(groups, indent=1))


# ---------------------------------------------------------------- what --out already holds


def finished_summary(config):
    """The summary of a run that --resume finds finished, else None. Raises GraceError if it had other settings."""
    path = os.path.join(config.out or "", "summary.json")
    if not (config.resume and os.path.isfile(path)):
        return None
    try:
        with open(path) as file:
            summary = json.load(file)
        settings = summary["config"]
        done = settings["steps"] >= config.steps
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise GraceError(f"{path}: cannot be read ({first_line(error)}); delete it to finish the run again") from error
    config.must_match(settings, config.out)
    return summary if done else None


@ranks.by_first
def claim(config):
    """Check, before anything is loaded, that --out may be used. Returns the checkpoint to resume from, or None.

    Raises GraceError if --out holds a result or checkpoints, and neither --resume nor --overwrite says what becomes of them.
    """
    out = config.out
    try:
        os.makedirs(out, exist_ok=True)
        weights = any(name.endswith(".safetensors") or name == "adapter" for name in os.listdir(out))
    except OSError as error:
        raise GraceError(f"--out {out}: cannot be written to ({error.strerror})") from error
    model = os.path.realpath(config.model)
    inside = [os.path.realpath(os.path.join(out, name)) for name in ("", "adapter", "checkpoints")]
    if model in inside or os.path.dirname(model) == inside[-1]:
        raise GraceError(f"--out {out} is where --model is: give another folder")
    result = "a finished run" if os.path.isfile(os.path.join(out, "summary.json")) else "a model" if weights else None
    if (result or checkpoints(out)) and not (config.resume or config.overwrite):
        content = result or "the checkpoints of a run"
        raise GraceError(f"--out {out} holds {content}: --resume continues it, --overwrite starts anew, or give another folder")
    if not config.resume:
        return None
    checkpoint = newest_whole(out)
    if result and not checkpoint:
        raise GraceError(f"--out {out} holds {result} and no checkpoint to resume from: --overwrite starts anew")
    return checkpoint


@ranks.by_first
def delete_stale(out, checkpoint=None, keep_metrics=True):
    """Delete stale files: the mark of a finished run, and what a kill left half written.

    checkpoint: the one being resumed; newer ones are damaged and deleted. None: everything of an earlier run is deleted,
    but for its metrics.jsonl, which with `keep_metrics` is renamed to metrics.1.jsonl (or .2, .3, ...).
    """
    folder = os.path.join(out, "checkpoints")
    for name in os.listdir(out):
        earlier = ".safetensors" in name or name.startswith("not_finite_step_")
        earlier |= name in ("skipped_rows.json", "probe.json", "report.html")
        if name == "summary.json" or (earlier and not checkpoint):
            os.remove(os.path.join(out, name))
    for name in ["final.tmp"] if checkpoint else ["final.tmp", "adapter"]:
        shutil.rmtree(os.path.join(out, name), ignore_errors=True)
    for name in os.listdir(folder) if os.path.isdir(folder) else []:
        if not checkpoint or name > os.path.basename(checkpoint):
            shutil.rmtree(os.path.join(folder, name))
    if not checkpoint:
        metrics = os.path.join(out, "metrics.jsonl")
        if keep_metrics and os.path.isfile(metrics) and os.path.getsize(metrics):
            n = next(n for n in itertools.count(1) if not os.path.exists(os.path.join(out, f"metrics.{n}.jsonl")))
            os.rename(metrics, os.path.join(out, f"metrics.{n}.jsonl"))
        write_atomically(metrics, "")
