"""A run's folder: what it holds and what it refuses, and that a run stopped in any way ends as one that was never stopped."""

import errno
import itertools
import json
import os
import random
import shutil
import signal
import sys
import time
from types import SimpleNamespace

import pytest
import torch
from conftest import command, same
from forked import before, ended, fork, send
from test_policy import Evil

import grace
from plumbing.errors import GraceError
from plumbing.run import Signals, checkpoints
from policy import Policy

MODEL = {"model.safetensors", "config.json", "generation_config.json", "grace_config.json"}
MODEL |= {"tokenizer.json", "tokenizer_config.json", "chat_template.jinja"}
UNFINISHED = {"run.json", "metrics.jsonl", "rationales.md", "checkpoints"}


@pytest.fixture(scope="module")
def six_steps(tiny_world, no_page, tmp_path_factory):
    """A run of six steps that was never stopped. Not to be written to."""
    out = tmp_path_factory.mktemp("six")
    grace.main(command(tiny_world, out, "--steps 6"))
    return out


def saved(out):
    """The steps of a run's checkpoints."""
    return [int(os.path.basename(folder)) for folder in checkpoints(out)]


def names(folder):
    """What a folder holds, TensorBoard's files aside."""
    return {name for name in os.listdir(folder) if not name.startswith("events.")}


def nth(n):
    """A condition that is true once: the nth time that it is asked."""
    calls = itertools.count(1)
    return lambda *_: next(calls) == n


def read(path):
    with open(path) as file:
        return json.load(file)


# ---------------------------------------------------------------- what --out holds


def test_what_a_run_leaves(finished_run):
    """Its last two checkpoints until it is finished."""
    unfinished = finished_run.parent / "unfinished"
    assert names(unfinished) == MODEL | UNFINISHED and saved(unfinished) == [3, 4]
    assert names(finished_run) == MODEL | UNFINISHED - {"checkpoints"} | {"summary.json"}
    assert all(names(folder) == MODEL | {"trainer.pt"} for folder in checkpoints(unfinished))
    summary = read(finished_run / "summary.json")
    assert summary.keys() >= {"before", "after", "after_without_rationale", "seconds", "config"}
    assert read(finished_run / "run.json")["config"] == summary["config"] and summary["config"]["steps"] == 4


def test_refusals(tiny_world, finished_run, two_checkpoints, tmp_path):
    """One sentence each, and nothing is touched."""

    def refused(sentence, out, *flags):
        files = sorted(out.rglob("*"))
        with pytest.raises(SystemExit, match=f"grace.py: .*{sentence}"):
            grace.main(command(tiny_world, out, "--steps 6", *flags))
        assert sorted(out.rglob("*")) == files

    refused("holds a run: --resume continues it, --overwrite starts anew, or give", finished_run)
    refused("holds a finished run of 4 steps: for more steps start another run from it, with --model", finished_run, "--resume")
    refused(r"is of another run \(lr was 0.001\)", finished_run, "--resume --lr 0.5")
    refused("holds a run: --resume continues it, --overwrite starts anew", two_checkpoints)
    refused("give one of them", two_checkpoints, "--resume --overwrite")
    refused(r"is of another run \(clip_eps was 0.2, lr was 0.001\)", two_checkpoints, "--resume --lr 0.5 --clip-eps 0.1")
    shutil.copytree(tiny_world, tmp_path / "world")
    shutil.copytree(tiny_world / "model", tmp_path / "foreign")
    for flags in ((), ("--resume",)):
        refused("holds model.safetensors, which is of no run: give another folder", tmp_path / "foreign", *flags)
    refused("--steps 1: the run under .* has made 4 already", two_checkpoints, "--resume --steps 1")
    model = tmp_path / "world" / "model"
    for out in (model, model / "checkpoints" / ".."):
        refused("is where --model is: give another folder", out, f"--model {model} --overwrite")
    refused("is where --model is", two_checkpoints, f"--model {checkpoints(two_checkpoints)[0]} --overwrite")
    (tmp_path / "file").write_text("")
    refused("cannot be written .File exists", tmp_path / "file")
    with pytest.raises(SystemExit, match="grace.py: --out is missing"):
        grace.main(f"--model {tiny_world}/model --data {tiny_world}/data/train.jsonl".split())


def test_overwrite_deletes_nothing_before_the_first_evaluation(tiny_world, two_checkpoints, monkeypatch):
    """Then all that is of the earlier run. Here the new one is stopped in its last evaluation."""
    arguments = command(tiny_world, two_checkpoints, "--steps 1 --overwrite --seed 1")
    (two_checkpoints / "not_finite_step_7.json").write_text("[]")
    (two_checkpoints / "model-00001-of-00002.safetensors").write_text("")
    files = sorted(two_checkpoints.rglob("*"))
    with pytest.raises(SystemExit, match="--max-prompt-tokens|max_prompt_tokens"):
        grace.main([*arguments, "--max-prompt-tokens", "3"])
    assert sorted(two_checkpoints.rglob("*")) == files
    monkeypatch.setattr(grace, "evaluate_heldout", before(grace.evaluate_heldout, nth(2), lambda: send(signal.SIGINT)))
    with pytest.raises(SystemExit):
        grace.main(arguments)
    assert names(two_checkpoints) == MODEL | UNFINISHED and saved(two_checkpoints) == [1]
    assert len((two_checkpoints / "metrics.jsonl").read_text().splitlines()) == 1


def test_a_finished_run_is_recognised(tiny_world, finished_run, capsys):
    for steps in (3, 4):
        grace.main(command(tiny_world, finished_run, f"--steps {steps} --resume"))
        assert f"{finished_run}: finished, after 4 steps" in capsys.readouterr().out


def test_each_step_goes_to_a_tracker(tiny_world, finished_run, tmp_path, monkeypatch):
    """What metrics.jsonl has, and only if it is asked for; a resumed run continues there."""
    told, note = [], lambda call: lambda *args, **more: told.append((call, args, more))
    stub = SimpleNamespace(init=note("init"), log=note("log"), finish=note("finish"))
    monkeypatch.setitem(sys.modules, "trackio", stub)
    arguments = command(tiny_world, tmp_path / "mine", "--steps 4 --log-to trackio")
    with monkeypatch.context() as patched, pytest.raises(SystemExit):
        patched.setattr(grace.Trainer, "update", before(grace.Trainer.update, nth(2), lambda: send(signal.SIGINT)))
        grace.main(arguments)
    grace.main([*arguments, "--resume"])
    same(finished_run, tmp_path / "mine")
    assert [name for name, *_ in told] == ["init", "log", "log", "init", "log", "log", "finish"]
    assert [told[i][2]["resume"] for i in (0, 3)] == ["never", "allow"]
    assert {told[i][2]["name"] for i in (0, 3)} == {"mine"} and told[0][2]["config"]["steps"] == 4
    lines = [json.loads(line) for line in (tmp_path / "mine" / "metrics.jsonl").open()]
    assert [{**more, **args[0]} for name, args, more in told if name == "log"] == lines
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(SystemExit, match="--log-to wandb: pip install wandb"):
        grace.main(command(tiny_world, tmp_path / "other", "--log-to wandb"))


# ---------------------------------------------------------------- stopped and resumed


@pytest.mark.parametrize("more", ["--lr-decay --minibatches 2 --lora 2", "--recipe paper --mode unsupervised"])
def test_resumed_is_never_stopped(tiny_world, tmp_path, monkeypatch, more):
    """By an evaluation that fails, where a batch crosses into the next pass over the data."""
    name = "texts" if "unsupervised" in more else "train"
    lines = (tiny_world / "data" / f"{name}.jsonl").read_text().splitlines(True)
    (tmp_path / "ten.jsonl").write_text("".join(lines[:10]))  # in batches of 4
    arguments = lambda out, *x: command(tiny_world, out, f"--steps 5 --eval-every 3 --data {tmp_path}/ten.jsonl", more, *x)
    grace.main(arguments(tmp_path / "straight"))
    out = tmp_path / "stopped"

    def fail():
        raise GraceError("no memory left")

    with monkeypatch.context() as patched, pytest.raises(SystemExit, match="grace.py: no memory left"):
        patched.setattr(grace, "evaluate_heldout", before(grace.evaluate_heldout, nth(2), fail))
        grace.main(arguments(out))
    assert saved(out) == [1, 2]
    assert os.path.exists(f"{checkpoints(out)[-1]}/model.safetensors") == ("lora" not in more)  # adapters alone
    with open(out / "metrics.jsonl", "a") as file:
        file.write('{"step": 3}\n{"step": 4, "rew')  # lines of no checkpoint, one of them torn
    torch.rand(3), random.random()  # nothing may depend on what else was drawn
    grace.main(arguments(out, "--resume"))
    same(tmp_path / "straight", out)
    one, two = (read(folder / "run.json") for folder in (tmp_path / "straight", out))
    assert all(one[name] == two[name] for name in ("before", "history", "found_before", "found"))
    assert [step for step, _ in one["history"]] == [0, 3, 5] and one["found_before"] != one["found"]


@pytest.mark.parametrize(
    "module, name, path, newest",
    [
        (torch, "save", "00000005.tmp/trainer.pt", 4),
        (shutil, "rmtree", "00000003", 5),
        (shutil, "rmtree", "checkpoints", 6),  # after the summary is written
    ],
)
def test_killed_while_writing(tiny_world, six_steps, two_checkpoints, module, name, path, newest):
    """By a run of four steps that gets two more."""
    seconds = torch.load(f"{checkpoints(two_checkpoints)[-1]}/trainer.pt")["progress"]["seconds"]
    arguments = command(tiny_world, two_checkpoints, "--steps 6 --resume")

    def program():
        writes_it = lambda *args: any(str(x).endswith(path) for x in args)
        setattr(module, name, before(getattr(module, name), writes_it, lambda: send(signal.SIGKILL)))
        grace.main(arguments)

    assert ended(fork(program)) == -signal.SIGKILL and saved(two_checkpoints)[-1] == newest
    grace.main(arguments)
    same(six_steps, two_checkpoints)
    assert read(two_checkpoints / "summary.json")["seconds"] > seconds > 0  # the clock went on
    assert read(two_checkpoints / "run.json")["config"]["steps"] == 6


def test_killed_at_random_moments(tiny_world, finished_run, tmp_path):
    arguments, rng = command(tiny_world, tmp_path, "--steps 4 --resume"), random.Random(0)
    for _ in range(5):
        pid = fork(lambda: grace.main(arguments))
        time.sleep(rng.uniform(0.05, 0.8))
        os.kill(pid, signal.SIGKILL)
        assert ended(pid) in (0, -signal.SIGKILL)
    grace.main(arguments)
    same(finished_run, tmp_path)


@pytest.mark.parametrize(
    "number, place, name, n, step",
    [
        (signal.SIGTERM, grace.Trainer, "update", 2, 2),
        (signal.SIGINT, grace, "evaluate_heldout", 2, 5),
        (signal.SIGINT, grace, "evaluate_heldout", 3, 6),  # after the training: it ends the run at once, and all is saved
    ],
)
def test_a_signal_saves_and_stops(tiny_world, six_steps, tmp_path, monkeypatch, capfd, number, place, name, n, step):
    """After the step, or the evaluation, in which it comes; also without --save-every."""
    arguments, handler = command(tiny_world, tmp_path, "--steps 6 --save-every 0"), signal.getsignal(number)
    with monkeypatch.context() as patched, pytest.raises(SystemExit) as stop:
        patched.setattr(place, name, before(getattr(place, name), nth(n), lambda: send(number)))
        grace.main(arguments)
    assert stop.value.code == 128 + number and signal.getsignal(number) is handler and saved(tmp_path) == [step]
    printed, told = capfd.readouterr(), step < 6
    assert (f"{number.name}: finishing this step, then saving. Again: end at once." in printed.err) == told
    assert (f"stopped after step {step}, with a checkpoint: the same command with --resume" in printed.out) == told
    grace.main([*arguments, "--resume"])
    same(six_steps, tmp_path)


def test_a_second_signal_ends_at_once():
    def program():
        with Signals() as signals:
            send(signal.SIGTERM)
            assert signals.received == signal.SIGTERM
            send(signal.SIGINT)
            time.sleep(60)

    assert ended(fork(program)) == -signal.SIGINT


# ---------------------------------------------------------------- a disk that is full, a file that is not what it was


@pytest.mark.parametrize("place, name", [(torch, "save"), (Policy, "save_result")])
def test_a_full_disk(tiny_world, six_steps, two_checkpoints, monkeypatch, place, name):
    """It ends the run with one sentence, and with more room the run continues."""
    arguments = command(tiny_world, two_checkpoints, "--steps 6 --resume")

    def full(*_, **__):
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patched, pytest.raises(SystemExit) as stop:
        patched.setattr(place, name, full)
        grace.main(arguments)
    assert "cannot be written (No space left on device); make room, or give the right" in stop.value.code
    assert stop.value.code.startswith("grace.py: ") and "\n" not in stop.value.code
    assert not list(two_checkpoints.rglob("*.tmp"))
    grace.main(arguments)
    same(six_steps, two_checkpoints)


def test_no_file_is_unpickled(tiny_world, two_checkpoints, tmp_path):
    """A trainer.pt that would run code."""
    torch.save({"step": Evil(str(tmp_path / "was-here"))}, os.path.join(checkpoints(two_checkpoints)[-1], "trainer.pt"))
    with pytest.raises(SystemExit, match="cannot be read .Weights only .*: delete it, and resume again"):
        grace.main(command(tiny_world, two_checkpoints, "--steps 6 --resume"))
    assert not (tmp_path / "was-here").exists()
