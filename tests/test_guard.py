"""What protects a run: stop signals, numbers that are not finite, too little memory."""

import json
import os
import signal
import subprocess
import sys
import threading

import pytest
import torch
from conftest import ROWS, command, descent, same, weights
from plumbing.checkpoint import checkpoints
from plumbing.guard import Signals, within_memory

import grace
import rollout
from evaluation import encoder
from plumbing.errors import GraceError

# ---------------------------------------------------------------- signals


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_signal(tiny_world, finished_run, tmp_path, monkeypatch, capsys, number):
    """It takes effect after the step, with a checkpoint (without --save-every, too), and the message says how to resume."""
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
    assert "stopped after step 2, with a checkpoint: the same command with --resume" in capsys.readouterr().out
    assert [os.path.basename(x) for x in checkpoints(out)] == ["00000002"]
    grace.main(command(tiny_world, out, "--steps 4 --save-every 0 --resume"))
    same(finished_run, out)


def test_second_signal_ends_at_once():
    program = (
        "import os, signal, time; from plumbing.guard import Signals\n"
        "with Signals() as signals:\n"
        "    os.kill(os.getpid(), signal.SIGTERM); assert signals.received == signal.SIGTERM; print('here', flush=True)\n"
        "    os.kill(os.getpid(), signal.SIGINT); time.sleep(60); print('and here', flush=True)"
    )
    run = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=50)
    assert run.returncode == -signal.SIGINT and run.stdout == "here\n" and "SIGTERM: finishing this step" in run.stderr


def test_signals_outside_the_main_thread():
    """Nothing arrives there, and nothing breaks."""
    received = []

    def work():
        with Signals() as signals:
            received.append(signals.received)

    before = signal.getsignal(signal.SIGTERM)
    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert received == [0] and signal.getsignal(signal.SIGTERM) is before


# ---------------------------------------------------------------- numbers that are not finite


@pytest.mark.parametrize(
    "what, message", [("reward", "a reward or its gradient"), ("loss", "the loss"), ("gradient", "the gradient")]
)
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_not_finite(make_policy, tmp_path, monkeypatch, what, message, value):
    """It stops the run before the optimizer, and the batch is written where a person can read it."""
    trainer = descent(make_policy(), out=str(tmp_path))
    judge, objective = grace.judge, grace.Trainer.objective

    def bad_reward(*args):
        R, components, g = judge(*args)
        R[1, 2] = value
        return R, components, g

    def bad_loss(self, *args):
        objectives, stats = objective(self, *args)
        return objectives * value, stats

    def bad_gradient(self, *args):  # a finite value whose gradient is not
        objectives, stats = objective(self, *args)
        return objectives + (objectives - objectives.detach()).abs().sqrt(), stats  # + 0, whose slope is 0 / 0

    if what == "reward":
        monkeypatch.setattr(grace, "judge", bad_reward)
    else:
        monkeypatch.setattr(grace.Trainer, "objective", bad_loss if what == "loss" else bad_gradient)
    before = weights(trainer.policy)
    with pytest.raises(GraceError, match=f"step 1: {message} is not finite: .*not_finite_step_1.json shows the batch"):
        trainer.step()
    assert torch.equal(weights(trainer.policy), before) and trainer.step_number == 0
    groups = json.loads((tmp_path / "not_finite_step_1.json").read_text())
    texts = [(role, row[role]) for role in ("query", "positive") for row in trainer.next_rows()]
    assert [(group["role"], group["text"]) for group in groups] == texts
    rollout = groups[1]["rollouts"][2]
    assert {"rationale", "tokens", "finished", "reward", "advantage", "contrastive", "consistency", "hard"} == rollout.keys()
    if what == "reward":
        assert rollout["reward"] == str(value) and isinstance(groups[0]["rollouts"][0]["reward"], float)


def test_policy_that_computes_nan(make_policy):
    """It is named before anything is drawn from it."""
    trainer = descent(make_policy())
    with torch.no_grad():
        next(trainer.policy.model.parameters()).fill_(float("nan"))
    with pytest.raises(GraceError, match="what the policy computes from a prompt is not finite"):
        trainer.step()


# ---------------------------------------------------------------- too little memory


@pytest.mark.parametrize("at", [1, 2, 3])
@pytest.mark.parametrize("where", ["forward", "backward"])
def test_memory_for_the_update(make_policy, monkeypatch, capsys, at, where):
    """Simulated at the first micro-batches, in double precision: the update is that of memory enough."""
    updates, losses = [], []
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
        backward(self, *args)  # its gradient exists by now, and must not stay
        if where == "backward":
            fail()

    for starved in (False, True):
        trainer = descent(make_policy("GPT2", double=True), tokens_per_batch=70)
        before = weights(trainer.policy)
        if starved:
            monkeypatch.setattr(grace.Trainer, "objective", small_objective)
            monkeypatch.setattr(torch.Tensor, "backward", small_backward)
        losses.append(trainer.step()["loss"])
        updates.append(weights(trainer.policy) - before)
    assert calls > at
    assert (updates[1] - updates[0]).norm() < 1e-9 * updates[0].norm() and losses[1] == pytest.approx(losses[0], rel=1e-9)
    assert trainer.tokens_per_batch == 35 and trainer.config.tokens_per_batch == 70
    assert "continuing with step 1: --tokens-per-batch 35" in capsys.readouterr().out


def test_memory_for_sampling(make_policy, monkeypatch, capsys):
    """A second attempt draws what the first one would have drawn."""
    rewards, sample_in_parts = [], rollout.sample_in_parts
    for starved in (False, True):
        trainer, budgets = descent(make_policy(), sample_tokens=60), []

        def small(*args, budgets=budgets, starved=starved):
            budgets.append(args[-1])
            result = sample_in_parts(*args)
            if starved and len(budgets) < 3:  # in the first two attempts
                raise torch.OutOfMemoryError("CUDA out of memory")
            return result

        monkeypatch.setattr(rollout, "sample_in_parts", small)
        rewards.append(trainer.step()["reward"])
    assert rewards[0] == pytest.approx(rewards[1], rel=1e-5) and budgets == [60, 30, 18, 18] and trainer.sample_tokens == 18
    assert "continuing with step 1: --sample-tokens 30" in capsys.readouterr().out


def test_memory_for_one_group():
    """Where even that is too much, the message says what to lower."""

    def never(budget):
        raise torch.OutOfMemoryError("CUDA out of memory")

    with pytest.raises(GraceError, match="--tokens-per-batch 60: out of memory with one group at a time; lower --rollouts, "):
        within_memory(never, 100, 60, "--tokens-per-batch")


def test_memory_for_reading(make_policy, monkeypatch, capsys):
    """A batch that is too large is read in halves, and every text gets the vector of memory enough."""
    policy, texts = make_policy(), [f"text number {i}" for i in range(7)]
    read, sizes = encoder.encode_batch, []
    expected = encoder.encode_texts(policy, texts).vectors

    def small(policy, batch, *args, most=2):
        sizes.append(len(batch))
        if len(batch) > most:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return read(policy, batch, *args)

    monkeypatch.setattr(encoder, "encode_batch", small)
    assert abs(encoder.encode_texts(policy, texts).vectors - expected).max() < 1e-5
    assert sizes == [7, 3, 1, 2, 4, 2, 2] and "reading 7 texts: reading them in halves" in capsys.readouterr().out
    monkeypatch.setattr(encoder, "encode_batch", lambda *args: small(*args, most=0))
    with pytest.raises(GraceError, match="out of memory with one text: lower --max-new-tokens"):
        encoder.encode_texts(policy, texts)


def test_memory_elsewhere(tiny_world, tmp_path, monkeypatch):
    """One sentence."""

    def never(*_, **__):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(grace, "evaluate_heldout", never)
    with pytest.raises(SystemExit, match="grace.py: out of memory outside the update and the sampler .CUDA out of memory"):
        grace.main(command(tiny_world, tmp_path, "--steps 1"))


def test_rows_have_unequal_costs(make_policy):
    """What the memory tests above rest on: a budget of 70 splits the batch, one of 35 splits it further."""
    trainer = descent(make_policy("GPT2", double=True))
    rollouts, *_ = trainer.sample(grace.make_batch(ROWS).texts)
    parts = [len(list(trainer.micro_batches(torch.arange(8), rollouts, budget))) for budget in (70, 35)]
    assert 1 < parts[0] < parts[1]
