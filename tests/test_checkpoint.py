"""Checkpoints are whole or not there: a full disk, missing rights, damaged files; and what a checkpoint restores."""

import errno
import json
import os
import random

import numpy as np
import pytest
import torch
from conftest import ROWS, command, config
from plumbing.checkpoint import checkpoints, damage, newest_whole

import grace
from grace import Trainer
from plumbing import checkpoint
from plumbing.errors import GraceError

FILES = [
    "model.safetensors", "trainer.pt", "config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json",
    "chat_template.jinja", "grace_config.json", "manifest.json",
]  # fmt: skip


def test_files(finished_run):
    for folder in checkpoints(finished_run):
        assert sorted(os.listdir(folder)) == sorted(FILES)
        with open(os.path.join(folder, "manifest.json")) as file:
            assert json.load(file).keys() == set(FILES) - {"manifest.json"}


def test_a_tokenizer_with_several_templates(make_policy, tmp_path):
    """They are saved as a folder in the folder; its files are in the manifest, and a second result replaces the first."""
    policy = make_policy()
    template = policy.tokenizer.chat_template
    policy.tokenizer.chat_template = {"default": template, "tool_use": template + " "}
    trainer = Trainer(policy, None, ROWS, config())
    for step in (1, 2):
        trainer.step_number = step
        checkpoint.save_checkpoint(trainer, str(tmp_path))
        checkpoint.save_model(policy, str(tmp_path))
    (folder, newest), inside = checkpoints(tmp_path), "additional_chat_templates/tool_use.jinja"
    assert damage(folder) is None and (tmp_path / inside).read_text() == template + " "
    os.remove(os.path.join(newest, inside))
    assert damage(newest) == f"{inside}: missing"


def test_random_states_are_restored(make_policy, tmp_path):
    """The global generators; what a step draws itself is a function of seed and step."""
    rows = [{"text": f"w{i}"} for i in range(8)]
    settings = config(mode="unsupervised", out=str(tmp_path))
    trainer = grace.Trainer(make_policy(), None, rows, settings)
    draw = lambda: (torch.rand(2).tolist(), random.random(), np.random.rand())
    draw()
    checkpoint.save_checkpoint(trainer, tmp_path, rows=checkpoint.digest(rows))
    expected = draw()
    assert all(x != y for x, y in zip(draw(), expected))
    state = checkpoint.read_state(checkpoints(tmp_path)[0], settings, rows)
    checkpoint.restore(trainer, state, str(tmp_path / "metrics.jsonl"))
    assert draw() == expected


def test_trainer_state_is_not_unpickled(tmp_path):
    class Evil:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "was-here"),)

    torch.save({"x": Evil()}, tmp_path / "trainer.pt")
    with pytest.raises(Exception, match="[Ww]eights.only"):
        checkpoint.read_state(str(tmp_path), config(), ROWS)
    assert not (tmp_path / "was-here").exists()


# ---------------------------------------------------------------- a disk that is full

needs_dev_full = pytest.mark.skipif(not os.path.exists("/dev/full"), reason="no /dev/full here")


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("fault", [pytest.param("no space left", marks=needs_dev_full), "a folder in its place"])
def test_failed_write(make_policy, tmp_path, monkeypatch, name, fault):
    """It ends in one sentence, and the older checkpoints stay whole.

    The kernel's own errors: the file is a link to a device that is always full, or cannot be opened for writing.
    safetensors writes beside and renames, which a link would not stop: there, a limit of the process on a file's size does.
    """
    resource = pytest.importorskip("resource")
    trainer = grace.Trainer(make_policy(), None, ROWS, config(out=str(tmp_path)))
    for step in (3, 4):
        trainer.step_number = step
        checkpoint.save_checkpoint(trainer, tmp_path)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    at = "sha256" if name == "manifest.json" else "_empty"  # the manifest's turn comes when the other files are there
    usual = getattr(checkpoint, at)

    def sabotaged(where):
        result = usual(where)
        path = os.path.join(where if at == "_empty" else os.path.dirname(where), name)
        if os.path.lexists(path):
            return result
        if fault == "a folder in its place":
            os.mkdir(path)
        elif name == "model.safetensors":
            resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, limits[1]))
        else:
            os.symlink("/dev/full", path)
        return result

    monkeypatch.setattr(checkpoint, at, sabotaged)
    trainer.step_number = 5
    try:
        with pytest.raises(GraceError, match="cannot be written .*make room, .*; then --resume"):
            checkpoint.save_checkpoint(trainer, tmp_path)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert sorted(os.listdir(tmp_path / "checkpoints")) == ["00000003", "00000004"]
    assert not any(damage(folder) for folder in checkpoints(tmp_path))


@needs_dev_full
def test_full_disk_ends_a_run(tiny_world, two_checkpoints, monkeypatch):
    usual = checkpoint._empty

    def sabotaged(folder):
        usual(folder)
        os.symlink("/dev/full", os.path.join(folder, "trainer.pt"))

    monkeypatch.setattr(checkpoint, "_empty", sabotaged)
    with pytest.raises(SystemExit, match="grace.py: .*cannot be written .*make room, .*; then --resume"):
        grace.main(command(tiny_world, two_checkpoints, "--steps 6 --resume"))
    assert [os.path.basename(x) for x in checkpoints(two_checkpoints)] == ["00000003", "00000004"]


@needs_dev_full
def test_no_right_and_no_room(tmp_path, monkeypatch):
    def forbidden(*_):
        raise PermissionError(errno.EACCES, "Permission denied")

    with monkeypatch.context() as patched:
        patched.setattr(os, "replace", forbidden)
        with pytest.raises(GraceError, match="cannot be written .Permission denied"):
            checkpoint.write_atomically(str(tmp_path / "x"), "x")
    assert not os.listdir(tmp_path)
    with pytest.raises(GraceError, match="cannot be written .No space left on device"):
        checkpoint.append("/dev/full", "a line")


# ---------------------------------------------------------------- a disk that damages what it holds


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("harm", ["truncated", "one bit", "missing"])
def test_damage_is_noticed(two_checkpoints, capsys, name, harm):
    """And the checkpoint before is used."""
    newest = checkpoints(two_checkpoints)[-1]
    path = os.path.join(newest, name)
    with open(path, "rb") as file:
        raw = bytearray(file.read())
    if harm == "missing":
        os.remove(path)
    else:
        at = raw.index(b"sha256") + 10 if name == "manifest.json" else len(raw) // 2  # in a checksum, not in a space
        raw = raw[:at] if harm == "truncated" else raw[:at] + bytes([raw[at] ^ 1]) + raw[at + 1 :]
        with open(path, "wb") as file:
            file.write(raw)
    assert newest_whole(two_checkpoints) == checkpoints(two_checkpoints)[0]
    printed = capsys.readouterr().out
    assert f"{newest} is damaged (" in printed and printed.count("\n") == 1
    if name != "manifest.json":
        assert {"truncated": "bytes instead of", "one bit": "wrong checksum", "missing": "missing"}[harm] in printed
