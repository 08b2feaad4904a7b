"""What a run leaves on the disk: checkpoints that are whole or not there, and a result that nothing overwrites.

    OUT/checkpoints/00000050/     the policy as a model folder; trainer.pt: optimizer, step, settings, progress;
                                  manifest.json: each file's size and SHA-256
    OUT/summary.json              written last of all: where it is, the run is finished

A folder is written beside its place, flushed to the disk, and renamed, so that a kill or a power cut leaves the
old one or the new one. What a disk damages later shows against the manifest when it is read, and the checkpoint
before is used. No file is ever unpickled: weights are safetensors, trainer.pt is read with `weights_only=True`.

Neither data nor sampling needs a cursor: a step's batch and what it draws are functions of seed and step.
"""

import contextlib
import dataclasses
import hashlib
import json
import os
import random
import shutil

import numpy as np
import torch

from plumbing import ranks
from plumbing.errors import GraceError, first_line
from plumbing.report import read_metrics

RESUME = "; then --resume continues: the earlier checkpoints are intact"

# ---------------------------------------------------------------- writing


def _flush(path):
    """Wait until a file, or the list of names in a folder, is on the disk and not only on its way."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


@contextlib.contextmanager
def _writing(path, beside=None, then=""):
    """Any failure in here becomes a GraceError of one sentence, and `beside`, the half that was written, is removed."""
    try:
        yield
    except Exception as error:  # safetensors, torch and tokenizers each have their own for a full disk
        if beside and os.path.isdir(beside):
            shutil.rmtree(beside)
        elif beside and os.path.lexists(beside):
            os.remove(beside)
        why = getattr(error, "strerror", None) or first_line(error)
        raise GraceError(f"{path}: cannot be written ({why}); make room, or give the right to write there{then}") from error


@ranks.by_first
def write_atomically(path, text):
    """A reader of `path` sees the old file or the new one, never half of one. Raises GraceError where it cannot be written."""
    beside = f"{path}.tmp"
    with _writing(path, beside):
        with open(beside, "w") as file:
            file.write(text)
        _flush(beside)
        os.replace(beside, path)


@ranks.by_first
def append(path, text):
    """Add to the end of a file. Raises GraceError where that fails; a resumed run drops a torn line."""
    with _writing(path, then=RESUME), open(path, "a") as file:
        file.write(text)


def _flush_folder(folder):
    for inside, _, names in os.walk(folder):
        for name in names:
            _flush(os.path.join(inside, name))
        _flush(inside)


def sha256(path):
    """The digest of a file's content, in hexadecimal."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _empty(folder):
    """A new, empty folder."""
    shutil.rmtree(folder, ignore_errors=True)
    os.makedirs(folder)


def save_checkpoint(trainer, out, **progress):
    """Everything a resumed run needs, whole or not at all; the last two stay. Raises GraceError where it cannot be written."""
    state = {"step": trainer.step_number, "config": dataclasses.asdict(trainer.config), "progress": progress}
    state |= {"optimizer": ranks.gathered(trainer.optimizer.state_dict()), "random": _random_states()}
    _write_checkpoint(state, trainer.policy, ranks.gathered(trainer.policy.model.state_dict(keep_vars=True)), out)


@ranks.by_first
def _write_checkpoint(state, policy, weights, out):
    folder = os.path.join(out, "checkpoints", f"{state['step']:08d}")
    beside, metrics = f"{folder}.tmp", os.path.join(out, "metrics.jsonl")
    with _writing(folder, beside, RESUME):
        _empty(beside)
        policy.save(beside, weights)
        torch.save(state, os.path.join(beside, "trainer.pt"))
        files = sorted(os.path.join(inside, name) for inside, _, names in os.walk(beside) for name in names)
        manifest = {os.path.relpath(f, beside): {"size": os.path.getsize(f), "sha256": sha256(f)} for f in files}
        with open(os.path.join(beside, "manifest.json"), "w") as file:
            json.dump(manifest, file, indent=1)
        _flush_folder(beside)
        if os.path.isfile(metrics):
            _flush(metrics)  # its lines up to this step belong to the checkpoint
        shutil.rmtree(folder, ignore_errors=True)  # a damaged one of the same step
        os.replace(beside, folder)
        for names in (os.path.dirname(folder), out):
            _flush(names)
    for old in checkpoints(out)[:-2]:
        shutil.rmtree(old)


def save_model(policy, out):
    """The trained model into --out, each file of it whole; adapters, if it has any, into --out/adapter.

    That all are there is what summary.json says, written later.
    """
    _write_model(policy, ranks.gathered(policy.model.state_dict(keep_vars=True)), out)


@ranks.by_first
def _write_model(policy, weights, out):
    beside = os.path.join(out, "final.tmp")
    with _writing(out, beside, RESUME):
        _empty(beside)
        policy.save_result(beside, weights)
        _flush_folder(beside)
        for name in sorted(os.listdir(beside)):
            if os.path.isdir(os.path.join(out, name)):  # a folder replaces only an empty one
                shutil.rmtree(os.path.join(out, name))
            os.replace(os.path.join(beside, name), os.path.join(out, name))
        os.rmdir(beside)
        _flush(out)


# ---------------------------------------------------------------- reading


def checkpoints(out):
    """The checkpoint folders of a run, oldest first."""
    folder = os.path.join(out, "checkpoints")
    names = sorted(n for n in os.listdir(folder) if n.isdigit()) if os.path.isdir(folder) else []
    return [os.path.join(folder, n) for n in names]


def damage(folder):
    """What is wrong with a checkpoint, by its manifest, or None."""
    try:
        with open(os.path.join(folder, "manifest.json")) as file:
            manifest = json.load(file)
        for name, was in manifest.items():
            path = os.path.join(folder, name)
            if not os.path.isfile(path):
                return f"{name}: missing"
            if os.path.getsize(path) != was["size"]:
                return f"{name}: {os.path.getsize(path)} bytes instead of {was['size']}"
            if sha256(path) != was["sha256"]:
                return f"{name}: wrong checksum"
    except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
        return f"manifest.json: {getattr(error, 'strerror', None) or 'not a list of files'}"
    return None


def newest_whole(out):
    """The newest checkpoint that passes its manifest, or None where there is none at all. Prints a line per damaged one.

    Raises GraceError if there are checkpoints and all of them are damaged: to start anew is for the user to decide.
    """
    folders = checkpoints(out)
    for folder in reversed(folders):
        if (problem := damage(folder)) is None:
            return folder
        print(f"{folder} is damaged ({problem}): using the one before")
    if folders:
        raise GraceError(f"{out}: none of its {len(folders)} checkpoints is whole; --overwrite starts the run anew")
    return None


def read_state(folder, config, rows):
    """The trainer's state in a checkpoint. Raises GraceError if it is of a run with other settings or other training rows."""
    state = torch.load(os.path.join(folder, "trainer.pt"), map_location="cpu", weights_only=True)
    config.must_match(state["config"], folder)
    if "data" not in config.changeable and state["progress"]["rows"] != digest(rows):
        raise GraceError(
            f"{folder} is of a run on other rows than {config.data} has now: "
            "give those rows, or let them change: --may-change data"
        )
    return state


def restore(trainer, state, metrics_file):
    """Put a trainer back where a checkpoint left it, and metrics.jsonl too. Returns the run's progress."""
    trainer.optimizer.load_state_dict(ranks.scattered(state["optimizer"], trainer.policy.model.parameters()))
    for group in trainer.optimizer.param_groups:  # as --may-change may have them
        group |= {"lr": trainer.config.lr, "weight_decay": trainer.config.weight_decay}
    trainer.step_number = state["step"]
    _set_random_states(state["random"])
    kept = [line for line, metrics in read_metrics(metrics_file) if metrics["step"] <= state["step"]]
    if len(kept) < state["step"]:
        print(f"{metrics_file} has lost lines: {len(kept)} of {state['step']} are there")
    write_atomically(metrics_file, "".join(kept))
    return state["progress"]


# ---------------------------------------------------------------- random states, and the data


def _random_states():
    """The global generators, in types that `torch.load(weights_only=True)` reads.

    A training step draws from none of them: its data and its sampling are functions of seed and step. They are
    saved for whatever a model, or an experiment, draws by itself.
    """
    name, keys, *more = np.random.get_state()
    return {
        "python": random.getstate(),
        "numpy": (name, keys.tolist(), *more),
        "torch": torch.get_rng_state(),
        "cuda": [torch.cuda.get_rng_state()] if torch.cuda.is_available() else [],  # of the device that this process uses
    }


def _set_random_states(states):
    random.setstate(states["python"])
    name, keys, *more = states["numpy"]
    np.random.set_state((name, np.array(keys, dtype=np.uint32), *more))
    torch.set_rng_state(states["torch"])
    if states["cuda"] and torch.cuda.is_available():
        torch.cuda.set_rng_state(states["cuda"][0])


def digest(rows):
    """A fingerprint of the training rows: a file can change under its name."""
    hasher = hashlib.sha256()
    for row in rows:
        hasher.update(json.dumps(row, sort_keys=True).encode())
    return hasher.hexdigest()[:16]
