"""Killed, stopped, starved or damaged: a run loses nothing, and says what to do.

python tests/test_survival.py --kills 100        the long form of the kill tests; prints the figures of docs/reliability.md
"""

import argparse
import contextlib
import copy
import errno
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time

os.environ.setdefault("HF_HUB_OFFLINE", "1")
sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))

import pytest  # noqa: E402
import torch  # noqa: E402
from safetensors.torch import load_file  # noqa: E402

import grace  # noqa: E402
import toy  # noqa: E402
from config import Config  # noqa: E402
from plumbing import checkpoint  # noqa: E402
from plumbing import run as training  # noqa: E402
from plumbing import status as look  # noqa: E402
from plumbing.checkpoint import checkpoints, damage, newest_whole  # noqa: E402
from plumbing.errors import GraceError  # noqa: E402
from plumbing.guard import Signals, within_memory  # noqa: E402
from policy import Policy  # noqa: E402

# ---------------------------------------------------------------- runs, and what must be equal


def command(world, out, *more, data="train", heldout="heldout"):
    given = f"--model {world}/model --data {world}/data/{data}.jsonl --heldout {world}/data/{heldout}.jsonl --out {out}"
    return f"{given} --batch 4 --rollouts 2 --lr 1e-3 --save-every 1 --eval-every 5 {' '.join(more)}".split()


def same(one, two):
    """Two finished runs: weights, metrics and rationales, to the bit. Times and memory aside."""
    a, b = (load_file(os.path.join(out, "model.safetensors")) for out in (one, two))
    assert a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)
    timeless = lambda line: {k: v for k, v in json.loads(line).items() if not k.endswith(("_s", "_gb"))}
    a, b = ([timeless(line) for line in open(os.path.join(out, "metrics.jsonl"))] for out in (one, two))
    assert a == b and [line["step"] for line in a] == list(range(1, len(a) + 1))
    a, b = (open(os.path.join(out, "rationales.md")).read() for out in (one, two))
    assert a == b
    a, b = (json.load(open(os.path.join(out, "summary.json"))) for out in (one, two))
    assert all(a[moment] == b[moment] for moment in ("before", "after", "after_without_rationale"))


# ---------------------------------------------------------------- kills, in children of a process that has all imported


def child(arguments, prepare=None):
    """A training run in a forked process. Returns its id."""
    if pid := os.fork():
        return pid
    code = 1
    try:
        quiet = os.open(os.devnull, os.O_WRONLY)
        os.dup2(quiet, 1), os.dup2(quiet, 2)
        if prepare:
            prepare()
        grace.main(arguments)
        code = 0
    except SystemExit as stop:
        code = stop.code if isinstance(stop.code, int) else 2
    finally:
        os._exit(code)


def outcome(pid):
    """How a child ended: its exit code, or minus the signal that killed it."""
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def where_it_died(out):
    """What a killed run was doing, by what it left."""
    folder = os.path.join(out, "checkpoints")
    if os.path.isdir(os.path.join(out, "final.tmp")):
        return "saving the result"
    if os.path.isdir(folder) and any(name.endswith(".tmp") for name in os.listdir(folder)):
        return "saving a checkpoint"
    return "in a step or evaluation" if os.path.isdir(folder) else "before the first checkpoint"


def random_kills(world, folder, kills, number, steps, seed=0):
    """Runs that get a signal at random moments, each resumed until it is finished, against one never interrupted."""
    straight, rng, seen = os.path.join(folder, "straight"), random.Random(seed), {}
    start = time.time()
    assert outcome(child(command(world, straight, f"--steps {steps}"))) == 0
    span, runs, left = 0.15 * (time.time() - start), 0, kills
    while left:
        out, done = os.path.join(folder, f"run-{runs}"), None
        while done != 0:
            pid = child(command(world, out, f"--steps {steps} --resume"))
            if left:
                time.sleep(rng.uniform(0, span))
                os.kill(pid, number)
            done = outcome(pid)
            assert done in (0, -number, 128 + number), f"exit code {done}"
            if done != 0:
                left -= 1
                place = "stopped with a checkpoint" if done == 128 + number else where_it_died(out)
                if number == signal.SIGTERM and done == -number:
                    place = "ended at once: opening, or evaluating the end"
                seen[place] = seen.get(place, 0) + 1
        same(straight, out)
        runs += 1
    return {"signal": signal.Signals(number).name, "kills": kills, "runs": runs, "steps": steps, **seen}


def kill_at_call(n):
    """Kill this process at its n-th call of anything that changes what is on the disk."""
    calls = 0

    def counted(function):
        def call(*args, **kwargs):
            nonlocal calls
            calls += 1
            if calls == n:
                os.kill(os.getpid(), signal.SIGKILL)
            return function(*args, **kwargs)

        return call

    for module, name in [(os, n) for n in ("fsync", "replace", "makedirs", "rmdir", "remove")] + [(shutil, "rmtree")]:
        setattr(module, name, counted(getattr(module, name)))
    Policy.save, torch.save = counted(Policy.save), counted(torch.save)


def kills_at_every_call(world, folder, stride):
    """SIGKILL right before each `stride`-th change of the disk, from a resume to the end of a run; then resumed."""
    straight, started, out = (os.path.join(folder, name) for name in ("whole", "started", "killed"))
    assert outcome(child(command(world, straight, "--steps 4"))) == 0
    assert outcome(child(command(world, started, "--steps 2 --eval-every 5"))) == 0
    n, kills, seen = 1, 0, {}
    while True:
        shutil.rmtree(out, ignore_errors=True)
        shutil.copytree(started, out)
        if outcome(child(command(world, out, "--steps 4 --resume"), lambda: kill_at_call(n))) == 0:  # noqa: B023
            break
        place = where_it_died(out)
        seen[place], kills, n = seen.get(place, 0) + 1, kills + 1, n + stride
        assert outcome(child(command(world, out, "--steps 4 --resume"))) == 0
        a, b = (load_file(os.path.join(x, "model.safetensors")) for x in (straight, out))
        assert all(torch.equal(a[name], b[name]) for name in a)
    return {"signal": "SIGKILL, by call", "kills": kills, **seen}


def main(arguments=None):
    """Everything is imported once, in one thread; the runs are forked from here."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=100, help="of SIGKILL, and as many of SIGTERM")
    parser.add_argument("--stride", type=int, default=1, help="kill at every so-many-th change of the disk")
    parser.add_argument("--steps", type=int, default=40, help="steps of a run")
    parser.add_argument("--world", help="an embedded world (default: a new one)")
    args = parser.parse_args(arguments)
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        world = args.world or os.path.join(folder, "world")
        with contextlib.redirect_stdout(sys.stderr):
            if not args.world:
                toy.build(world, seed=0, train=64, heldout=16, steps=30)
            grace.main(command(world, os.path.join(folder, "warm"), "--steps 1"))  # what is imported late
        for number in (signal.SIGKILL, signal.SIGTERM):
            start = time.time()
            part = os.path.join(folder, number.name)
            found = random_kills(world, part, args.kills, number, args.steps)
            print(json.dumps(found | {"seconds": round(time.time() - start, 1)}), flush=True)
        start = time.time()
        found = kills_at_every_call(world, os.path.join(folder, "calls"), args.stride)
        print(json.dumps(found | {"seconds": round(time.time() - start, 1)}), flush=True)


def test_killed_at_any_moment_a_run_ends_where_it_would_have(tiny_world):
    """Twenty SIGKILLs and twenty SIGTERMs at random moments, and SIGKILLs right before changes of the disk."""
    run = subprocess.run(
        [sys.executable, __file__, "--kills", "20", "--stride", "13", "--steps", "24", "--world", str(tiny_world)],
        env={**os.environ, "OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"},
        capture_output=True,
        text=True,
    )
    assert run.returncode == 0, run.stderr[-3000:]
    killed, stopped, by_call = map(json.loads, run.stdout.splitlines())
    assert killed["kills"] == stopped["kills"] == 20
    assert killed.get("in a step or evaluation", 0) + killed.get("saving a checkpoint", 0) > 5  # they hit what they are for
    assert stopped["stopped with a checkpoint"] > 5
    assert by_call["saving a checkpoint"] >= 1 and by_call["saving the result"] >= 1


# ---------------------------------------------------------------- exactness


@pytest.fixture(scope="module")
def ten_rows(tiny_world):
    """Ten rows, so that a batch of 4 crosses a pass over the data in its third step."""
    for name in ("train", "texts"):
        with open(tiny_world / "data" / f"{name}.jsonl") as file, open(tiny_world / "data" / f"{name}-10.jsonl", "w") as few:
            few.writelines(line for line, _ in zip(file, range(10)))
    return tiny_world


@pytest.mark.parametrize("more", ["--lr-decay --minibatches 2 --epochs 2", "--mode unsupervised", "--recipe paper"])
@pytest.mark.parametrize("stop", [2, 3])  # inside a pass, and right after a batch that crosses into the next
def test_a_resumed_run_is_the_run_never_stopped(ten_rows, tmp_path, monkeypatch, more, stop):
    data = "texts-10" if "unsupervised" in more else "train-10"
    given = lambda out, *x: command(ten_rows, out, "--steps 5", more, *x, data=data)
    grace.main(given(tmp_path / "straight"))
    step = grace.Trainer.step

    def stopped(trainer):
        if trainer.step_number == stop:
            raise KeyboardInterrupt
        return step(trainer)

    monkeypatch.setattr(grace.Trainer, "step", stopped)
    with pytest.raises(SystemExit):
        grace.main(given(tmp_path / "stopped"))
    monkeypatch.undo()
    with open(tmp_path / "stopped" / "metrics.jsonl", "a") as file:
        file.write('{"step": 9.0}\n{"step": 4.0, "rew')  # lines of no checkpoint, one of them torn
    torch.rand(3), random.random()  # nothing may depend on what else was drawn
    grace.main(given(tmp_path / "stopped", "--resume"))
    if "unsupervised" in more:  # without held-out labels the summary has less to compare
        for out in ("straight", "stopped"):
            with open(tmp_path / out / "summary.json") as file:
                summary = json.load(file)
            (tmp_path / out / "summary.json").write_text(json.dumps({"after_without_rationale": None, **summary}))
    same(tmp_path / "straight", tmp_path / "stopped")


def test_every_random_state_is_restored(tiny_world, make_policy, tmp_path):
    import numpy as np

    rows = [{"text": f"w{i}"} for i in range(8)]
    given = Config(batch=2, rollouts=2, mode="unsupervised", out=str(tmp_path), lr=1e-3)
    trainer = grace.Trainer(make_policy(), None, rows, given)
    draw = lambda: (
        torch.rand(2, generator=trainer.generator).tolist(), torch.rand(2).tolist(), random.random(), np.random.rand(),
    )  # fmt: skip
    draw()
    checkpoint.save_checkpoint(trainer, tmp_path, rows=checkpoint.digest(rows))
    expected = draw()
    assert draw() != expected
    state = checkpoint.read_state(checkpoints(tmp_path)[0], given, rows)
    checkpoint.restore(trainer, state, str(tmp_path / "metrics.jsonl"))
    assert draw() == expected


# ---------------------------------------------------------------- a disk that is full, or damages what it holds


@pytest.fixture(scope="module")
def finished_run(tiny_world, tmp_path_factory):
    out = tmp_path_factory.mktemp("finished")
    grace.main(command(tiny_world, out, "--steps 4"))
    return out


@pytest.fixture
def two_checkpoints(finished_run, tmp_path):
    """A run of 4 steps that has been killed in its final evaluation."""
    out = tmp_path / "out"
    shutil.copytree(finished_run, out)
    (out / "summary.json").unlink()
    return out


FILES = [
    "model.safetensors", "trainer.pt", "config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json",
    "chat_template.jinja", "grace_config.json", "manifest.json",
]  # fmt: skip


def test_a_checkpoint_holds_these_files(finished_run):
    for folder in checkpoints(finished_run):
        assert sorted(os.listdir(folder)) == sorted(FILES)
        assert json.load(open(os.path.join(folder, "manifest.json"))).keys() == set(FILES) - {"manifest.json"}


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("fault", ["no space left", "a folder in its place"])
def test_a_write_that_fails_ends_the_run_with_older_checkpoints_whole(tiny_world, two_checkpoints, monkeypatch, name, fault):
    """The kernel's own errors: the file is a link to a device that is always full, or cannot be opened for writing.

    safetensors writes beside and renames, which a link would not stop: there, a limit of the process on a file's size does.
    """
    resource = pytest.importorskip("resource")
    if fault == "no space left" and not os.path.exists("/dev/full"):
        pytest.skip("no /dev/full here")
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    at = "_sha256" if name == "manifest.json" else "_empty"  # its own turn comes when the other files are there
    usual = getattr(checkpoint, at)

    def sabotaged(where):
        found = usual(where)
        path = os.path.join(where if at == "_empty" else os.path.dirname(where), name)
        if os.path.lexists(path):
            return found
        if fault == "a folder in its place":
            os.mkdir(path)
        elif name == "model.safetensors":
            resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, limits[1]))
        else:
            os.symlink("/dev/full", path)
        return found

    monkeypatch.setattr(checkpoint, at, sabotaged)
    try:
        with pytest.raises(SystemExit, match="cannot be written .*make room, .*; then --resume goes on"):
            grace.main(command(tiny_world, two_checkpoints, "--steps 6 --resume"))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert [os.path.basename(x) for x in checkpoints(two_checkpoints)] == ["00000003", "00000004"]
    assert not any(damage(folder) for folder in checkpoints(two_checkpoints))
    assert not [n for n in os.listdir(two_checkpoints / "checkpoints") if n.endswith(".tmp")]


def test_no_right_to_rename_no_room_for_a_line(tiny_world, two_checkpoints, monkeypatch):
    def forbidden(*_):
        raise PermissionError(errno.EACCES, "Permission denied")

    with monkeypatch.context() as patched:
        patched.setattr(os, "replace", forbidden)
        with pytest.raises(GraceError, match="cannot be written .Permission denied"):
            checkpoint.write_atomically(str(two_checkpoints / "x"), "x")
    assert not (two_checkpoints / "x.tmp").exists()
    with pytest.raises(GraceError, match="cannot be written .No space left on device"):
        checkpoint.append("/dev/full", "a line")


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("harm", ["truncated", "one bit", "missing"])
def test_a_damaged_checkpoint_is_seen_and_the_one_before_used(two_checkpoints, capsys, name, harm):
    newest = checkpoints(two_checkpoints)[-1]
    path = os.path.join(newest, name)
    raw = bytearray(open(path, "rb").read())
    if harm == "missing":
        os.remove(path)
    else:
        at = raw.index(b"sha256") + 10 if name == "manifest.json" else len(raw) // 2  # in a checksum, not in a space
        raw = raw[:at] if harm == "truncated" else raw[:at] + bytes([raw[at] ^ 1]) + raw[at + 1 :]
        open(path, "wb").write(raw)
    assert newest_whole(two_checkpoints) == checkpoints(two_checkpoints)[0]
    printed = capsys.readouterr().out
    assert f"{newest} is damaged (" in printed and printed.count("\n") == 1
    if name != "manifest.json":
        assert {"truncated": "bytes instead of", "one bit": "wrong checksum", "missing": "missing"}[harm] in printed


def test_a_damaged_checkpoint_changes_nothing_in_the_end(tiny_world, finished_run, two_checkpoints, capsys):
    newest = checkpoints(two_checkpoints)[-1]
    with open(os.path.join(newest, "trainer.pt"), "r+b") as file:
        file.truncate(1000)
    grace.main(command(tiny_world, two_checkpoints, "--steps 4 --resume"))
    assert "trainer.pt: 1000 bytes instead of" in capsys.readouterr().out
    same(finished_run, two_checkpoints)


def test_no_whole_checkpoint_is_an_error_and_not_a_new_start(tiny_world, two_checkpoints):
    for folder in checkpoints(two_checkpoints):
        os.remove(os.path.join(folder, "model.safetensors"))
    with pytest.raises(SystemExit, match="none of its 2 checkpoints is whole; --overwrite starts the run anew"):
        grace.main(command(tiny_world, two_checkpoints, "--steps 6 --resume"))
    assert (two_checkpoints / "metrics.jsonl").read_text().count("\n") == 4  # nothing was touched


def test_metrics_that_lost_lines_are_named(tiny_world, two_checkpoints, capsys):
    lines = (two_checkpoints / "metrics.jsonl").read_text().splitlines(True)
    (two_checkpoints / "metrics.jsonl").write_text(lines[0] + "\0\0\0\n" + "".join(lines[2:]))
    grace.main(command(tiny_world, two_checkpoints, "--steps 4 --resume"))
    assert "metrics.jsonl has lost lines: 3 of 4 are there" in capsys.readouterr().out


# ---------------------------------------------------------------- signals


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_finishes_the_step_saves_and_says_how_to_go_on(
    tiny_world, finished_run, tmp_path, monkeypatch, capsys, number
):
    """Without --save-every, too."""
    update, out = grace.Trainer.update, tmp_path / "out"

    def interrupted(trainer, *args):
        if trainer.step_number == 1:
            os.kill(os.getpid(), number)
        return update(trainer, *args)

    before = signal.getsignal(number)
    with monkeypatch.context() as patched:
        patched.setattr(grace.Trainer, "update", interrupted)
        with pytest.raises(SystemExit) as stop:
            grace.main(command(tiny_world, out, "--steps 4 --save-every 0"))
    assert stop.value.code == 128 + number and signal.getsignal(number) is before
    assert "stopped after step 2, with a checkpoint: the same command with --resume goes on" in capsys.readouterr().out
    assert [os.path.basename(x) for x in checkpoints(out)] == ["00000002"]
    grace.main(command(tiny_world, out, "--steps 4 --save-every 0 --resume"))
    same(finished_run, out)


def test_a_second_signal_ends_at_once():
    program = (
        "import os, signal, sys, time; sys.path.insert(0, '.'); from guard import Signals\n"
        "with Signals() as signals:\n"
        "    os.kill(os.getpid(), signal.SIGTERM); assert signals.asked == signal.SIGTERM; print('here', flush=True)\n"
        "    os.kill(os.getpid(), signal.SIGINT); time.sleep(60); print('and here', flush=True)"
    )
    run = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=50)
    assert run.returncode == -signal.SIGINT and run.stdout == "here\n" and "SIGTERM: finishing this step" in run.stderr


def test_outside_the_main_thread_nothing_is_heard_and_nothing_breaks():
    heard = []

    def work():
        with Signals() as signals:
            heard.append(signals.asked)

    before = signal.getsignal(signal.SIGTERM)
    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert heard == [0] and signal.getsignal(signal.SIGTERM) is before


# ---------------------------------------------------------------- numbers that are not finite


ROWS = [{"query": f"the old doctor w{i}", "positive": f"somebody sold w{i}", "negative": ["the lamp"]} for i in range(4)]


def a_trainer(policy, out=None, **more):
    given = {**dict(batch=4, rollouts=3, lr=1e-2, max_grad_norm=1e9, out=str(out) if out else None), **more}
    trainer = grace.Trainer(policy, copy.deepcopy(policy), ROWS, Config(**given))
    trainer.optimizer = torch.optim.SGD(policy.model.parameters(), lr=1e-2)  # Adam would hide a wrong scale
    return trainer


def weights(trainer):
    return torch.cat([p.detach().flatten() for p in trainer.policy.model.parameters()])


@pytest.mark.parametrize(
    "what, message", [("reward", "a reward or its gradient"), ("loss", "the loss"), ("gradient", "the gradient")]
)
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_what_is_not_finite_stops_the_run_before_the_optimizer(make_policy, tmp_path, monkeypatch, what, message, value):
    trainer = a_trainer(make_policy(), tmp_path)
    judge, objective = grace.judge, grace.Trainer.objective

    def judged(*args):
        R, components, g = judge(*args)
        R[1, 2] = value
        return R, components, g

    def bad_loss(self, *args):
        found, seen = objective(self, *args)
        return found * value, seen

    def bad_gradient(self, *args):  # a finite value whose gradient is not
        found, seen = objective(self, *args)
        return found + (found - found.detach()).abs().sqrt(), seen  # + 0, whose slope is 0 / 0

    if what == "reward":
        monkeypatch.setattr(grace, "judge", judged)
    else:
        monkeypatch.setattr(grace.Trainer, "objective", bad_loss if what == "loss" else bad_gradient)
    before = weights(trainer)
    with pytest.raises(GraceError, match=f"step 1: {message} is not finite: .*not_finite_step_1.json shows the batch"):
        trainer.step()
    assert torch.equal(weights(trainer), before) and trainer.step_number == 0
    groups = json.loads((tmp_path / "not_finite_step_1.json").read_text())
    assert [(g["role"], g["text"]) for g in groups] == [(r, row[r]) for r in ("query", "positive") for row in trainer.batch()]
    shown = groups[1]["rollouts"][2]
    assert {"rationale", "tokens", "finished", "reward", "advantage", "contrastive", "consistency", "hard"} == shown.keys()
    if what == "reward":
        assert shown["reward"] == str(value) and isinstance(groups[0]["rollouts"][0]["reward"], float)


def test_a_policy_that_computes_nan_is_named_before_it_draws(make_policy):
    trainer = a_trainer(make_policy())
    with torch.no_grad():
        next(trainer.policy.model.parameters()).fill_(float("nan"))
    with pytest.raises(GraceError, match="what the policy computes from a prompt is not finite"):
        trainer.step()


# ---------------------------------------------------------------- too little memory


@pytest.mark.parametrize("at", [1, 2, 3])
@pytest.mark.parametrize("where", ["forward", "backward"])
def test_out_of_memory_gives_the_same_update_in_smaller_parts(make_policy, monkeypatch, capsys, at, where):
    """Simulated at the first micro-batches, in double precision, without Adam: the weights are those of memory enough."""
    ends, losses = [], []
    objective, backward, calls = grace.Trainer.objective, torch.Tensor.backward, 0

    def fail():
        nonlocal calls
        calls += 1
        if calls == at:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")

    def small_objective(self, *args):
        if where == "forward":
            fail()
        return objective(self, *args)

    def small_backward(self, *args):
        backward(self, *args)  # the gradient is there, and has to go
        if where == "backward":
            fail()

    for starved in (False, True):
        trainer = a_trainer(make_policy("GPT2", double=True), tokens_per_batch=70)
        before = weights(trainer)
        if starved:
            monkeypatch.setattr(grace.Trainer, "objective", small_objective)
            monkeypatch.setattr(torch.Tensor, "backward", small_backward)
        losses.append(trainer.step()["loss"])
        ends.append(weights(trainer) - before)
    assert calls > at
    assert (ends[1] - ends[0]).norm() < 1e-9 * ends[0].norm() and losses[1] == pytest.approx(losses[0], rel=1e-9)
    assert trainer.config.tokens_per_batch == 35
    assert "step 1: out of memory; going on with --tokens-per-batch 35" in capsys.readouterr().out


def test_out_of_memory_in_sampling_draws_again_from_the_same_state(make_policy, monkeypatch, capsys):
    found, sample = [], grace.sample_in_parts
    for starved in (False, True):
        trainer, calls = a_trainer(make_policy(), sample_tokens=60), []

        def small(policy, prompts, K, temperature, generator, budget, calls=calls, starved=starved):
            calls.append(budget)
            rollouts = sample(policy, prompts, K, temperature, generator, 30)  # as the halved budget would split it
            if starved and len(calls) < 3:  # at the first call, and at the second one of the second attempt
                raise torch.OutOfMemoryError("CUDA out of memory")
            return rollouts

        monkeypatch.setattr(grace, "sample_in_parts", small)
        found.append(trainer.step()["reward"])
    assert found[0] == found[1] and calls[:2] == [60, 30] and trainer.config.sample_tokens == 18
    assert "going on with --sample-tokens 30" in capsys.readouterr().out


def test_where_one_group_is_too_much_the_message_says_what_to_lower(make_policy):
    trainer = a_trainer(make_policy(), tokens_per_batch=100)

    def never():
        raise torch.OutOfMemoryError("CUDA out of memory")

    with pytest.raises(GraceError, match=r"one group at a time \(--tokens-per-batch 60\); lower --rollouts, --max-new-tokens"):
        within_memory(trainer, "tokens_per_batch", 60, never)


def test_out_of_memory_elsewhere_is_one_sentence(tiny_world, tmp_path, monkeypatch):
    def never(*_, **__):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(training, "evaluate_triplets", never)
    with pytest.raises(SystemExit, match="grace.py: out of memory beside the update and the sampler .CUDA out of memory"):
        grace.main(command(tiny_world, tmp_path, "--steps 1"))


# ---------------------------------------------------------------- groups that teach little or nothing


def test_groups_that_cannot_teach_are_counted(make_policy):
    from plumbing.report import describe
    from rollout import sample

    policy = make_policy()
    rollouts = sample(policy, policy.prompts([row["query"] for row in ROWS]), 3, 1.0, torch.Generator().manual_seed(0))
    N, K, T = rollouts.ids.shape
    rollouts.ids[0], rollouts.mask[0] = rollouts.ids[0, :1], rollouts.mask[0, :1]  # all identical
    rollouts.finished[:] = True
    rollouts.finished[1] = False  # all truncated
    rollouts.finished[2, 0] = False  # only one of them
    rollouts.mask[2:] = 1
    rollouts.ids[3] = torch.arange(K)[:, None] + 7
    rollouts.mask[3, 1, 1:] = 0  # the end token alone
    rollouts.mask[0] = 1
    R = torch.rand(N, K)
    R[3] = 0.25
    seen = {name: float(x) for name, x in describe(rollouts, R, {}).items()}
    assert (seen["all_identical"], seen["all_truncated"], seen["no_spread"]) == (1 / 4, 1 / 4, 1 / 4)
    assert seen["empty"] == pytest.approx(1 / 12)


def gradient(trainer, rollouts, A, g):
    value, _ = trainer.objective(rollouts, A, g)
    trainer.policy.model.zero_grad()
    value.sum().backward()
    return torch.cat([p.grad.flatten() for p in trainer.policy.model.parameters() if p.grad is not None])


@pytest.mark.parametrize("normalize", [False, True])
def test_identical_rollouts_teach_nothing_by_score_whatever_rounding_does_to_their_rewards(make_policy, normalize):
    trainer = a_trainer(make_policy("GPT2", double=True), pathwise=0.0, kl=0.0, text_weight=0.0)
    texts, _ = grace.batch_roles(ROWS)
    rollouts, _ = grace.roll_out(trainer.policy, texts, trainer.config, trainer.generator)
    usual = gradient(trainer, rollouts[[0]], torch.tensor([[1.0, -1.0, 0.0]]).double(), None).norm()
    alike = rollouts[[0]]
    for name in ("ids", "mask", "logprobs"):
        setattr(alike, name, getattr(alike, name)[:, :1].expand(-1, 3, -1).contiguous())
    A = grace.advantages(torch.tensor([[0.5, 0.5 + 1e-6, 0.5 - 2e-6]]).double(), normalize)
    assert not normalize or A.abs().max() > 0.4  # the division blows rounding up ...
    assert gradient(trainer, alike, A, None).norm() < 1e-9 * usual  # ... and yet nothing comes of it


def test_a_group_that_is_all_truncated_teaches_by_its_other_rewards_or_not_at_all(make_policy):
    torch.manual_seed(0)
    h = torch.nn.functional.normalize(torch.randn(8, 3, 8, dtype=torch.float64), dim=-1)
    roles = {"query": h[:4], "positive": h[4:], "negative": h[:4, None, :1]}
    twins, none, every = torch.eye(4, dtype=torch.bool), torch.zeros(8, 3, dtype=torch.bool), torch.ones(8, 3, dtype=torch.bool)
    given = Config(batch=4, rollouts=3)
    A = grace.advantages(grace.judge(roles, none, twins, given)[0])
    torch.testing.assert_close(A, grace.advantages(grace.judge(roles, every, twins, given)[0]))
    assert A.abs().max() > 0.1
    paper = Config(batch=4, rollouts=3, recipe="paper")
    roles["query"] = h[:4, :1]
    R, _, g = grace.judge(roles, none[:4], twins, paper)
    assert grace.advantages(R).abs().max() == 0 and g.abs().max() == 0


# ---------------------------------------------------------------- what --out holds already


def test_a_finished_run_is_not_overwritten_unless_asked(tiny_world, finished_run, two_checkpoints, tmp_path, capsys):
    with pytest.raises(SystemExit, match="holds a finished run: --resume goes on, --overwrite starts anew"):
        grace.main(command(tiny_world, finished_run, "--steps 4"))
    with pytest.raises(SystemExit, match="holds a model: --resume goes on"):
        grace.main(command(tiny_world, two_checkpoints, "--steps 4"))
    (two_checkpoints / "model.safetensors").unlink()
    with pytest.raises(SystemExit, match="holds the checkpoints of a run: --resume goes on"):
        grace.main(command(tiny_world, two_checkpoints, "--steps 4"))
    with pytest.raises(SystemExit, match="give one of them"):
        grace.main(command(tiny_world, two_checkpoints, "--resume --overwrite"))
    with pytest.raises(SystemExit, match="is where --model is: give another folder"):
        grace.main(command(tiny_world, tiny_world / "model", "--overwrite"))
    assert (tiny_world / "model" / "model.safetensors").exists()
    grace.main(command(tiny_world, two_checkpoints, "--steps 1 --overwrite --save-every 0"))
    assert not checkpoints(two_checkpoints) and (two_checkpoints / "metrics.jsonl").read_text().count("\n") == 1


def test_a_finished_run_resumed_says_so_or_goes_on_where_steps_grew(tiny_world, finished_run, tmp_path, capsys):
    out = tmp_path / "out"
    shutil.copytree(finished_run, out)
    capsys.readouterr()
    grace.main(command(tiny_world, out, "--steps 4 --resume"))
    assert f"{out}: finished, after 4 steps" in capsys.readouterr().out
    grace.main(command(tiny_world, out, "--steps 6 --resume"))
    assert "resumed from" in capsys.readouterr().out
    grace.main(command(tiny_world, tmp_path / "straight", "--steps 6"))
    a, b = (load_file(x / "model.safetensors") for x in (out, tmp_path / "straight"))
    assert all(torch.equal(a[name], b[name]) for name in a)
    shutil.rmtree(out / "checkpoints")
    with pytest.raises(SystemExit, match="holds a finished run and no checkpoint to go on from"):
        grace.main(command(tiny_world, out, "--steps 8 --resume"))


def test_a_run_is_not_resumed_under_other_settings_unless_they_are_named(tiny_world, two_checkpoints, tmp_path):
    with pytest.raises(SystemExit, match=r"is of another run \(clip_eps was 0.2, lr was 0.001\): .*--may-change clip_eps,lr"):
        grace.main(command(tiny_world, two_checkpoints, "--steps 6 --resume --lr 0.5 --clip-eps 0.1"))
    with pytest.raises(SystemExit, match=r"\(lr was 0.001\)"):
        grace.main(command(tiny_world, two_checkpoints, "--steps 6 --resume --lr 0.5 --clip-eps 0.1 --may-change clip-eps"))
    with pytest.raises(SystemExit, match="--may-change speed: there is no such setting"):
        grace.main(command(tiny_world, two_checkpoints, "--resume --may-change lr,speed"))
    grace.main(command(tiny_world, two_checkpoints, "--steps 6 --resume --lr 0.5 --may-change lr"))
    lines = [json.loads(line) for line in open(two_checkpoints / "metrics.jsonl")]
    assert [line["lr"] for line in lines] == [1e-3] * 4 + [0.5] * 2  # the optimizer's own state has the old one


def test_a_run_is_not_resumed_on_other_rows(tiny_world, two_checkpoints, tmp_path, capsys):
    """The file has kept its name and not its rows."""
    shutil.copytree(tiny_world, tmp_path / "world")
    grace.main(command(tmp_path / "world", two_checkpoints, "--steps 5 --overwrite"))
    train = tmp_path / "world" / "data" / "train.jsonl"
    train.write_text(train.read_text().replace("doctor", "physician"))
    with pytest.raises(SystemExit, match="is of a run on other rows than .*train.jsonl has now.*--may-change data"):
        grace.main(command(tmp_path / "world", two_checkpoints, "--steps 6 --resume"))
    grace.main(command(tmp_path / "world", two_checkpoints, "--steps 6 --resume --may-change data"))


# ---------------------------------------------------------------- models that would run code


class Evil:
    def __reduce__(self):
        return os.mkdir, (self.path,)


def test_no_pickle_is_read_and_no_code_is_run(tiny_world, tmp_path):
    shutil.copytree(tiny_world / "model", tmp_path / "pickle")
    os.remove(tmp_path / "pickle" / "model.safetensors")
    evil = Evil()
    evil.path = str(tmp_path / "was-here")
    torch.save({"x": evil}, tmp_path / "pickle" / "pytorch_model.bin")
    with pytest.raises(GraceError, match="pickles, which can run code, and are not read.*convert it once"):
        Policy.load(str(tmp_path / "pickle"))
    shutil.copytree(tiny_world / "model", tmp_path / "code")
    config = json.loads((tmp_path / "code" / "config.json").read_text())
    config |= {"model_type": "mine", "auto_map": {"AutoConfig": "mine.Mine", "AutoModelForCausalLM": "mine.Mine"}}
    (tmp_path / "code" / "config.json").write_text(json.dumps(config))
    (tmp_path / "code" / "mine.py").write_text(f"import os; os.mkdir({evil.path!r})")
    with pytest.raises(GraceError, match="Code that comes with a model is not run here"):
        Policy.load(str(tmp_path / "code"))
    shutil.copytree(tiny_world / "model", tmp_path / "state")
    torch.save({"x": evil}, tmp_path / "state" / "trainer.pt")
    with pytest.raises(Exception, match="[Ww]eights.only"):
        checkpoint.read_state(str(tmp_path / "state"), Config(), ROWS)
    assert not os.path.exists(evil.path)


# ---------------------------------------------------------------- status


def test_status_of_a_run_in_every_state(tiny_world, finished_run, two_checkpoints, tmp_path, capsys):
    capsys.readouterr()
    grace.main(["status", str(finished_run)])
    printed = capsys.readouterr().out
    assert "finished, after 4 steps" in printed and "after without rationale" in printed and "too few steps" in printed
    grace.main(["status", str(two_checkpoints)])
    assert "step 4 of 4" in (printed := capsys.readouterr().out) and "newest checkpoint: 00000004" in printed
    with open(two_checkpoints / "metrics.jsonl", "a") as file:
        file.write('{"step": 5')  # being written right now
    grace.main(["status", str(two_checkpoints)])
    with pytest.raises(SystemExit, match="no run is here"):
        grace.main(["status", str(tmp_path / "nowhere")])


HEALTHY = dict(
    step=1, reward=-1.0, reward_std=0.3, no_spread=0.0, distinct=1.0, cosine=0.6, effective_rank=20.0, length=6.0,
    truncated=0.0, empty=0.0, kl_start=0.2, approx_kl=0.0, clip_fraction=0.0, first_ratio_off=1e-6, step_s=0.1,
)  # fmt: skip


@pytest.mark.parametrize(
    "metric, end, sign",
    [
        ("reward", -2.0, "reward"), ("reward_std", 0.03, "spread within groups"), ("no_spread", 0.5, "groups without spread"),
        ("distinct", 0.4, "distinct rationales"), ("cosine", 0.85, "cosine between texts"),
        ("effective_rank", 5.0, "effective rank"), ("length", 16.0, "length"), ("truncated", 0.5, "truncated"),
        ("empty", 0.9, "empty rationales"), ("kl_start", 2.0, "KL to the start"), ("approx_kl", 0.2, "KL of one batch"),
        ("clip_fraction", 0.6, "clipped"), ("first_ratio_off", 1.5, "first ratio off 1"),
        ("heldout_ndcg_at_10", 0.3, "held-out nDCG@10"), (None, None, None),
    ],
)  # fmt: skip
def test_each_sign_of_a_collapse_is_seen_and_only_that_one(metric, end, sign):
    steps = []
    for i in range(100):
        steps.append({**HEALTHY, "step": i + 1, "reward": -1 + i / 200, "heldout_ndcg_at_10": 0.1 + 0.8 * min(1, i / 50)})
        if metric and i >= 60:
            steps[-1][metric] = end
    lines = look.health(steps, {"max_new_tokens": 20, "before": {"ndcg_at_10": 0.1}})[1:]
    assert len(lines) == 14
    assert [line for line in lines if not line.endswith("ok")] == [
        line for line in lines if sign and line.startswith(sign + " ")
    ]
    assert sign is None or any(line.startswith(sign + " ") for line in lines)


if __name__ == "__main__":
    main()
