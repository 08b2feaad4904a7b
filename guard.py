"""What stands between a run and a mishap: a folder in use, a signal, a number that is not finite, too little memory.

* A result is not overwritten unless asked, and a run not resumed as another (`claim`, `finished`).
* SIGTERM and Ctrl-C are heard between two steps, so that a run ends with a checkpoint (`Signals`).
* A reward, loss or gradient that is not finite stops the run before the optimizer has seen it (`finite`),
  and the batch it came from is written where it can be read by eye (`inspected`).
* Where the device's memory is too small, the same work is done again in smaller parts (`within_memory`).

A full disk and a damaged checkpoint are checkpoint.py's; a broken row of data is data.py's.
"""

import contextlib
import dataclasses
import json
import math
import os
import shutil
import signal
import threading

import torch

from checkpoint import checkpoints, newest_whole, write_atomically
from data import GraceError, first_line


class NotFinite(GraceError):
    """A number that no update may be made of."""


def finite(what, *tensors):
    """Raise NotFinite, naming it, unless every number in the tensors is finite."""
    if not all(bool(torch.isfinite(x).all()) for x in tensors):
        raise NotFinite(f"{what} is not finite")


class Signals(contextlib.AbstractContextManager):
    """SIGTERM and SIGINT (Ctrl-C) as a number to look at, `asked`; the second one ends the process at once.

    Outside the main thread, where Python lets nobody hear signals, `asked` stays 0.
    """

    def __init__(self):
        self.asked, self.before = 0, {}

    def __enter__(self):
        if threading.current_thread() is threading.main_thread():
            self.before = {n: signal.signal(n, self._hear) for n in (signal.SIGTERM, signal.SIGINT)}
        return self

    def __exit__(self, *_):
        for number, handler in self.before.items():
            signal.signal(number, handler)

    def _hear(self, number, _):
        self.asked = number
        for n in self.before:
            signal.signal(n, signal.SIG_DFL)
        # Not print: the signal may have come in the middle of one.
        os.write(2, f"\n{signal.Signals(number).name}: finishing this step, then saving. Again: end at once.\n".encode())


def within_memory(trainer, setting, least, compute, *work):
    """`compute(*work)`, and again with half of the token budget `setting` for as long as the device's memory does not do.

    compute  does its work from the start each time: what a failed attempt left behind, it drops first
    least    the budget that means one group at a time: below it nothing gets smaller

    The smaller budget is printed and kept. Raises GraceError where one group alone is too much.
    """
    while True:
        try:
            return compute(*work)
        except torch.OutOfMemoryError:
            pass  # gone on with below: in here the exception still holds on to the tensors
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        budget, flag = getattr(trainer.config, setting), "--" + setting.replace("_", "-")
        if budget <= least:
            raise GraceError(
                f"step {trainer.step_number + 1}: out of memory with one group at a time ({flag} {budget}); "
                "lower --rollouts, --max-new-tokens or --max-prompt-tokens"
            )
        trainer.config = dataclasses.replace(trainer.config, **{setting: max(budget // 2, least)})
        print(f"\nstep {trainer.step_number + 1}: out of memory; going on with {flag} {max(budget // 2, least)}")


@contextlib.contextmanager
def inspected(trainer, texts, rollouts, **figures):
    """NotFinite in here becomes a GraceError that names the step and where the batch was saved. figures: `[N, K]` each."""
    try:
        yield
    except NotFinite as error:
        step, out = trainer.step_number + 1, trainer.config.out
        where = f"; {save_batch(out, step, trainer, texts, rollouts, figures)} shows the batch" if out else ""
        raise GraceError(f"step {step}: {error}: lower --lr, or look at the data{where}") from error


def save_batch(out, step, trainer, texts, rollouts, figures):
    """A batch for the eye: each trained text with its rationales as text, and each rationale's figures. Returns the path.

    Plain JSON, in which a number that is not finite is a word.
    """
    roles = [(role, text) for role in trainer.config.roles for text in texts[role]]
    groups = []
    for i, ((role, text), ids) in enumerate(zip(roles, rollouts.written())):
        seen = []
        for k, rationale in enumerate(trainer.policy.tokenizer.batch_decode(ids)):
            numbers = {name: float(x[i, k]) for name, x in figures.items()}
            numbers = {name: x if math.isfinite(x) else str(x) for name, x in numbers.items()}
            seen.append({"rationale": rationale, "tokens": len(ids[k]), "finished": bool(rollouts.finished[i, k]), **numbers})
        groups.append({"role": role, "text": text, "rollouts": seen})
    path = os.path.join(out, f"not_finite_step_{step}.json")
    write_atomically(path, json.dumps(groups, indent=1))
    return path


# ---------------------------------------------------------------- what --out holds already


def finished(config):
    """The summary of a run that --resume finds finished, else None. Raises GraceError if it had other settings."""
    path = os.path.join(config.out, "summary.json")
    if not (config.resume and os.path.isfile(path)):
        return None
    try:
        with open(path) as file:
            summary = json.load(file)
        was = summary["config"]
        done = was["steps"] >= config.steps
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise GraceError(f"{path}: cannot be read ({first_line(error)}); delete it to finish the run again") from error
    config.must_match(was, config.out)
    return summary if done else None


def claim(config):
    """May --out be used? Asked before anything is loaded. Returns the checkpoint to go on from; None: from the start.

    Raises GraceError if --out holds a result or checkpoints, and neither --resume nor --overwrite says what becomes of them.
    """
    out = config.out
    try:
        os.makedirs(out, exist_ok=True)
        weights = any(name.endswith(".safetensors") for name in os.listdir(out))
    except OSError as error:
        raise GraceError(f"--out {out}: cannot be written to ({error.strerror})") from error
    model = os.path.realpath(config.model)
    if model == os.path.realpath(out) or os.path.dirname(model) == os.path.realpath(os.path.join(out, "checkpoints")):
        raise GraceError(f"--out {out} is where --model is: give another folder")
    result = "a finished run" if os.path.isfile(os.path.join(out, "summary.json")) else "a model" if weights else None
    if (result or checkpoints(out)) and not (config.resume or config.overwrite):
        held = result or "the checkpoints of a run"
        raise GraceError(f"--out {out} holds {held}: --resume goes on, --overwrite starts anew, or give another folder")
    if not config.resume:
        return None
    found = newest_whole(out)
    if result and not found:
        raise GraceError(f"--out {out} holds {result} and no checkpoint to go on from: --overwrite starts anew")
    return found


def clear(out, resumed=None):
    """Take away what is not true any more: the mark of a finished run, and halves that a kill left.

    resumed: the checkpoint that is gone on from; newer ones are damaged, and go. None: all that an earlier run left goes.
    """
    folder = os.path.join(out, "checkpoints")
    for name in os.listdir(out):
        earlier = ".safetensors" in name or name == "skipped_rows.json" or name.startswith("not_finite_step_")
        if name == "summary.json" or (earlier and not resumed):
            os.remove(os.path.join(out, name))
    shutil.rmtree(os.path.join(out, "final.tmp"), ignore_errors=True)
    for name in os.listdir(folder) if os.path.isdir(folder) else []:
        if not resumed or name > os.path.basename(resumed):
            shutil.rmtree(os.path.join(folder, name))
    if not resumed:
        write_atomically(os.path.join(out, "metrics.jsonl"), "")
