"""bench/: each benchmark runs on this code and says what is read from it; the stopwatch is fair."""

import re
import runpy

import pytest

from policy import Policy

SMALL = "--batch 4 --max-new-tokens 4 --prompt-tokens 20 --device cpu"


@pytest.fixture
def bench(monkeypatch, tmp_path, capsys):
    """`bench(name, flags)` runs a benchmark and returns what it prints; `bench.common` is bench/common.py."""
    monkeypatch.syspath_prepend("bench")
    import common

    def run(name, flags):
        if name != "similarity.py":
            flags = f"--model {common.write_model('tiny', str(tmp_path / 'model'))} {SMALL} {flags}"
        monkeypatch.setattr("sys.argv", [name, *flags.split()])
        runpy.run_path(f"bench/{name}", run_name="__main__")
        return capsys.readouterr().out

    run.common = common
    return run


@pytest.mark.parametrize("flags", ["--train-roles positive", "--mode unsupervised --recipe paper --minibatches 2"])
def test_a_step_ends_with_its_seconds(bench, flags):
    *_, last = bench("step.py", f"{flags} --rollouts 2 --steps 1").splitlines()
    assert re.fullmatch(r"step_s \d+\.\d+", last) and float(last.split()[1]) > 0


def test_the_loss_computes_less(bench):
    out = bench("step.py", "--rollouts 2 --train-roles query,positive --steps 1 --peer loss")
    ours, loss = (float(x) for x in re.findall(r"([\d.]+) Gflop", out))
    assert 0 < loss < ours


def test_prompts_are_as_long_as_asked(bench, tmp_path):
    policy = Policy.load(bench.common.write_model("tiny", str(tmp_path / "model")))
    lengths = policy.template(bench.common.make_texts(8, policy, 60)).mask.sum(1)
    assert 54 <= lengths.min() < lengths.max() <= 60
    with pytest.raises(SystemExit, match="--prompt-tokens 5"):
        bench.common.make_texts(8, policy, 5)


def test_rollouts_have_two_peers(bench):
    names = re.findall(r"^(\S.*?) +[\d.]+ s ", bench("rollout.py", "--rollouts 2 --repeats 1"), flags=re.M)
    assert names == ["rollout.py", "generate()", "generate() + forward"]


def test_the_encoder_s_vectors_are_the_library_s(bench):
    out = bench("encode.py", "--n 6 --repeats 1")
    assert float(re.search(r"difference of embeddings (\S+)", out)[1]) < 1e-5


def test_the_tiles_have_the_definition_s_gradients_in_less_memory(bench):
    out = bench("similarity.py", "--rows 2048 --dim 16 --repeats 1 --device cpu")
    assert float(re.search(r"tiles and definition: (\S+)", out)[1]) < 1e-4
    tiles, definition = map(float, re.findall(r"([\d.]+) MB", out))
    assert 0 < tiles < definition / 2


def test_sides_take_turns_after_a_warm_up(bench):
    calls = []
    times = bench.common.take_turns({"a": lambda: calls.append("a"), "b": lambda: calls.append("b")}, "cpu", 2)
    assert calls == ["a", "b"] * 3 and [len(x) for x in times.values()] == [2, 2]


def test_the_ratio_is_the_median_over_rounds(bench, capsys):
    bench.common.show({"a": [1.0, 1.0, 4.0], "b": [2.0, 3.0, 4.0]}, 6, "texts")  # the ratios are 2, 3 and 1
    assert re.search(r"^b +3\.0000 s +2\.00 texts/s +2\.00 x$", capsys.readouterr().out, flags=re.M)
