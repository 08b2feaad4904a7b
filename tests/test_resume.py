"""A resumed run is the run never stopped; what --out already holds is neither overwritten nor mixed with other settings."""

import json
import os
import random
import shutil
from types import SimpleNamespace

import pytest
import torch
from conftest import command, same, same_weights
from plumbing.checkpoint import checkpoints

import grace
from plumbing.errors import GraceError

# ---------------------------------------------------------------- the run never stopped


@pytest.fixture
def ten_rows(tiny_world, tmp_path):
    """Training files of ten rows, so that a batch of 4 crosses into the next pass over the data in its third step."""
    for name in ("train", "texts"):
        lines = (tiny_world / "data" / f"{name}.jsonl").read_text().splitlines(True)
        (tmp_path / f"{name}.jsonl").write_text("".join(lines[:10]))
    return tmp_path


@pytest.mark.parametrize("more", ["--lr-decay --minibatches 2 --epochs 2", "--mode unsupervised", "--recipe paper"])
def test_resumed_is_never_stopped(tiny_world, ten_rows, tmp_path, monkeypatch, more):
    """Stopped inside a pass over the data, and right after a batch that crosses into the next pass."""
    data = ten_rows / ("texts.jsonl" if "unsupervised" in more else "train.jsonl")
    arguments = lambda out, *x: command(tiny_world, out, f"--steps 5 --data {data}", more, *x)
    grace.main(arguments(tmp_path / "straight"))
    step = grace.Trainer.step
    for stop in (2, 3):
        out = tmp_path / f"stopped-{stop}"

        def stopped(trainer, stop=stop):
            if trainer.step_number == stop:
                raise KeyboardInterrupt
            return step(trainer)

        with monkeypatch.context() as patched, pytest.raises(SystemExit):
            patched.setattr(grace.Trainer, "step", stopped)
            grace.main(arguments(out))
        with open(out / "metrics.jsonl", "a") as file:
            file.write('{"step": 9.0}\n{"step": 4.0, "rew')  # lines of no checkpoint, one of them torn
        torch.rand(3), random.random()  # nothing may depend on what else was drawn
        grace.main(arguments(out, "--resume"))
        same(tmp_path / "straight", out)


@pytest.mark.parametrize("more, saved", [("", ["00000002"]), ("--minibatches 2", [])])
def test_error_leaves_a_checkpoint(tiny_world, tmp_path, monkeypatch, capsys, more, saved):
    """Of the last whole step; not where some of the failed step's updates may have been made."""
    grace.main(command(tiny_world, tmp_path / "straight", more, "--save-every 0"))
    judge = grace.judge

    def failing(*args):
        failing.calls += 1
        if failing.calls == 3:
            raise GraceError("no reward today")
        return judge(*args)

    failing.calls = 0
    with monkeypatch.context() as patched:
        patched.setattr(grace, "judge", failing)
        with pytest.raises(SystemExit, match="no reward today"):
            grace.main(command(tiny_world, tmp_path / "failed", more, "--save-every 0"))
    assert [os.path.basename(x) for x in checkpoints(tmp_path / "failed")] == saved
    assert ("step 2 was the last whole one and is saved" in capsys.readouterr().out) == bool(saved)
    grace.main(command(tiny_world, tmp_path / "failed", more, "--save-every 0 --resume"))
    same(tmp_path / "straight", tmp_path / "failed")


@pytest.mark.parametrize(
    "minutes, saved", [(0, []), (1, ["00000002", "00000003"]), (2, ["00000002", "00000003"]), (5, ["00000003"])]
)
def test_save_minutes(tiny_world, tmp_path, monkeypatch, minutes, saved):
    """With a clock by which a step takes a minute."""
    clock, step = [0.0], grace.Trainer.step

    def a_minute_later(trainer):
        clock[0] += 61.0
        return step(trainer)

    monkeypatch.setattr(grace.Trainer, "step", a_minute_later)
    monkeypatch.setattr("plumbing.run.time", SimpleNamespace(time=lambda: clock[0]))
    grace.main(command(tiny_world, tmp_path, f"--save-every 0 --save-minutes {minutes}"))
    assert [os.path.basename(x) for x in checkpoints(tmp_path)] == saved


@pytest.mark.parametrize("failing, steps", [(2, 1), (3, 2)], ids=["during the training", "after the last step"])
def test_an_evaluation_that_fails_loses_no_step(tiny_world, tmp_path, monkeypatch, failing, steps):
    evaluate, calls = grace.evaluate_heldout, []

    def fails(*args, **options):
        calls.append(1)
        if len(calls) == failing:
            raise GraceError("no memory left")
        return evaluate(*args, **options)

    flags = "--steps 2 --eval-every 1 --save-every 0"
    with monkeypatch.context() as patched:
        patched.setattr(grace, "evaluate_heldout", fails)
        with pytest.raises(SystemExit, match="no memory left"):
            grace.main(command(tiny_world, tmp_path, flags))
    assert (tmp_path / "metrics.jsonl").read_text().count("\n") == steps
    assert [os.path.basename(x) for x in checkpoints(tmp_path)] == [f"{steps:08d}"]
    grace.main(command(tiny_world, tmp_path, flags, "--resume"))
    assert (tmp_path / "metrics.jsonl").read_text().count("\n") == 2 and (tmp_path / "summary.json").exists()


def test_damaged_checkpoint_resumed(tiny_world, finished_run, two_checkpoints, capsys):
    """From the checkpoint before it, to the same end."""
    newest = checkpoints(two_checkpoints)[-1]
    with open(os.path.join(newest, "trainer.pt"), "r+b") as file:
        file.truncate(1000)
    grace.main(command(tiny_world, two_checkpoints, "--steps 4 --resume"))
    assert "trainer.pt: 1000 bytes instead of" in capsys.readouterr().out
    same(finished_run, two_checkpoints)


def test_no_whole_checkpoint(tiny_world, two_checkpoints):
    """An error and not a new start."""
    for folder in checkpoints(two_checkpoints):
        os.remove(os.path.join(folder, "model.safetensors"))
    with pytest.raises(SystemExit, match="none of its 2 checkpoints is whole; --overwrite starts the run anew"):
        grace.main(command(tiny_world, two_checkpoints, "--steps 6 --resume"))
    assert (two_checkpoints / "metrics.jsonl").read_text().count("\n") == 4  # nothing was touched


def test_lost_metrics_are_named(tiny_world, two_checkpoints, capsys):
    lines = (two_checkpoints / "metrics.jsonl").read_text().splitlines(True)
    (two_checkpoints / "metrics.jsonl").write_text(lines[0] + "\0\0\0\n" + "".join(lines[2:]))
    grace.main(command(tiny_world, two_checkpoints, "--steps 4 --resume"))
    assert "metrics.jsonl has lost lines: 3 of 4 are there" in capsys.readouterr().out


# ---------------------------------------------------------------- what --out already holds


def test_results_are_not_overwritten(tiny_world, finished_run, two_checkpoints):
    with pytest.raises(SystemExit, match="holds a finished run: --resume .*, --overwrite starts anew"):
        grace.main(command(tiny_world, finished_run, "--steps 4"))
    with pytest.raises(SystemExit, match="holds a model: --resume"):
        grace.main(command(tiny_world, two_checkpoints, "--steps 4"))
    (two_checkpoints / "model.safetensors").unlink()
    with pytest.raises(SystemExit, match="holds the checkpoints of a run: --resume"):
        grace.main(command(tiny_world, two_checkpoints, "--steps 4"))
    with pytest.raises(SystemExit, match="give one of them"):
        grace.main(command(tiny_world, two_checkpoints, "--resume --overwrite"))
    with pytest.raises(SystemExit, match="is where --model is: give another folder"):
        grace.main(command(tiny_world, tiny_world / "model", "--overwrite"))
    assert (tiny_world / "model" / "model.safetensors").exists()
    grace.main(command(tiny_world, two_checkpoints, "--steps 1 --overwrite --save-every 0 --save-minutes 0"))
    assert not checkpoints(two_checkpoints) and (two_checkpoints / "metrics.jsonl").read_text().count("\n") == 1


@pytest.mark.parametrize("again, kept", [("", True), ("--resume", True), ("--overwrite", False)])
def test_metrics_of_an_earlier_run_are_kept(tiny_world, tmp_path, again, kept):
    """Of a run that left neither model nor checkpoint; --overwrite replaces them."""
    (tmp_path / "metrics.jsonl").write_text('{"step": 1.0, "reward": 7.0}\n')
    (tmp_path / "metrics.1.jsonl").write_text("the first one\n")
    grace.main(command(tiny_world, tmp_path, "--steps 1 --eval-every 0", again))
    lines = (tmp_path / "metrics.jsonl").read_text().splitlines()
    assert len(lines) == 1 and json.loads(lines[0])["reward"] != 7.0
    assert (tmp_path / "metrics.2.jsonl").exists() == kept and (tmp_path / "metrics.1.jsonl").read_text() == "the first one\n"
    assert not kept or (tmp_path / "metrics.2.jsonl").read_text() == '{"step": 1.0, "reward": 7.0}\n'


def test_finished_run_resumed(tiny_world, finished_run, tmp_path, capsys):
    """It says that it is finished; with more --steps it continues, if there is a checkpoint."""
    out = tmp_path / "out"
    shutil.copytree(finished_run, out)
    capsys.readouterr()
    grace.main(command(tiny_world, out, "--steps 4 --resume"))
    assert f"{out}: finished, after 4 steps" in capsys.readouterr().out
    grace.main(command(tiny_world, out, "--steps 6 --resume"))
    assert "resumed from" in capsys.readouterr().out
    grace.main(command(tiny_world, tmp_path / "straight", "--steps 6"))
    same_weights(out, tmp_path / "straight")
    shutil.rmtree(out / "checkpoints")
    with pytest.raises(SystemExit, match="holds a finished run and no checkpoint"):
        grace.main(command(tiny_world, out, "--steps 8 --resume"))


def test_other_settings_are_refused(tiny_world, two_checkpoints):
    """Unless --may-change names them."""
    with pytest.raises(SystemExit, match=r"is of another run \(clip_eps was 0.2, lr was 0.001\): .*--may-change clip_eps,lr"):
        grace.main(command(tiny_world, two_checkpoints, "--steps 6 --resume --lr 0.5 --clip-eps 0.1"))
    with pytest.raises(SystemExit, match=r"\(lr was 0.001\)"):
        grace.main(command(tiny_world, two_checkpoints, "--steps 6 --resume --lr 0.5 --clip-eps 0.1 --may-change clip-eps"))
    with pytest.raises(SystemExit, match="--may-change speed: there is no such setting"):
        grace.main(command(tiny_world, two_checkpoints, "--resume --may-change lr,speed"))
    grace.main(command(tiny_world, two_checkpoints, "--steps 6 --resume --lr 0.5 --may-change lr"))
    lines = [json.loads(line) for line in open(two_checkpoints / "metrics.jsonl")]
    assert [line["lr"] for line in lines] == [1e-3] * 4 + [0.5] * 2  # the optimizer's own state has the old one


def test_other_rows_are_refused(tiny_world, two_checkpoints, tmp_path):
    """The file has kept its name and not its rows."""
    shutil.copytree(tiny_world, tmp_path / "world")
    grace.main(command(tmp_path / "world", two_checkpoints, "--steps 5 --overwrite"))
    train = tmp_path / "world" / "data" / "train.jsonl"
    train.write_text(train.read_text().replace("doctor", "physician"))
    with pytest.raises(SystemExit, match="is of a run on other rows than .*train.jsonl has now.*--may-change data"):
        grace.main(command(tmp_path / "world", two_checkpoints, "--steps 6 --resume"))
    grace.main(command(tmp_path / "world", two_checkpoints, "--steps 6 --resume --may-change data"))
