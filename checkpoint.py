"""Checkpoints to resume from: written beside, then renamed, so that one is there whole or not at all."""

import dataclasses
import itertools
import os
import shutil

import torch

from data import GraceError


def write_atomically(path, text):
    """A reader of `path` sees the old file or the new one, never half of one."""
    with open(f"{path}.tmp", "w") as file:
        file.write(text)
    os.replace(f"{path}.tmp", path)


def save_checkpoint(trainer, out, **progress):
    """Everything a resumed run needs, in a new folder that appears whole or not at all; the last two stay."""
    folder = os.path.join(out, "checkpoints", f"{trainer.step_number:08d}")
    shutil.rmtree(f"{folder}.tmp", ignore_errors=True)
    trainer.policy.save(f"{folder}.tmp")
    state = {"step": trainer.step_number, "config": dataclasses.asdict(trainer.config), "progress": progress}
    state |= {"optimizer": trainer.optimizer.state_dict(), "generator": trainer.generator.get_state()}
    torch.save(state, os.path.join(f"{folder}.tmp", "trainer.pt"))
    shutil.rmtree(folder, ignore_errors=True)
    os.replace(f"{folder}.tmp", folder)
    for old in checkpoints(out)[:-2]:
        shutil.rmtree(old)


def checkpoints(out):
    """The checkpoint folders of a run, oldest first."""
    folder = os.path.join(out, "checkpoints")
    names = sorted(n for n in os.listdir(folder) if n.isdigit()) if os.path.isdir(folder) else []
    return [os.path.join(folder, n) for n in names]


def read_state(folder, config):
    """The trainer's state in a checkpoint. Raises GraceError if it is of a run with other settings."""
    state = torch.load(os.path.join(folder, "trainer.pt"), weights_only=True)
    if changed := config.differs(state["config"]):
        was = ", ".join(f"{name} was {state['config'].get(name)}" for name in changed)
        raise GraceError(f"{folder} is of another run ({was}): give its settings, or another --out, or no --resume")
    return state


def restore(trainer, state, metrics_file):
    """Put a trainer back where a checkpoint left it, and metrics.jsonl too. Returns the run's progress."""
    trainer.optimizer.load_state_dict(state["optimizer"])
    trainer.generator.set_state(state["generator"])
    trainer.step_number = state["step"]
    kept = []
    if os.path.isfile(metrics_file):
        with open(metrics_file) as file:
            kept = list(itertools.islice(file, state["step"]))  # a line a step; what follows was not saved, or is torn
    write_atomically(metrics_file, "".join(kept))
    return state["progress"]
