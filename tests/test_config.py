"""The configuration: impossible settings end in one sentence, before anything is loaded where that can be."""

import pytest
import torch
from conftest import command

import grace
from config import Config, parse
from plumbing.errors import GraceError

CUDA = torch.cuda.is_available()


@pytest.mark.parametrize(
    "flags, message",
    [
        ("--rollouts 1", "a group of one has no advantage"),
        ("--batch 1", "InfoNCE tells an instance from others"),
        ("--train-roles query,answer", "one or more of query,positive,negative"),
        ("--train-roles ,", "one or more of query,positive,negative"),
        ("--reward paper --train-roles query,positive", "use --train-roles positive"),
        ("--batch 2 --minibatches 5", "has only 4 groups"),
        ("--temperature 0", "--temperature 0.0: must be above 0"),
        ("--lr inf", "--lr inf: give a finite number"),
        ("--pathwise nan", "give a finite number"),
        ("--negatives -1", "must be at least 0"),
        ("--mode unsupervised --prompt-weight 1", "without labels a text's prompt has no pair"),
        ("--seed -1", "must be at least 0"),
        pytest.param("--device cuda", "finds no CUDA device", marks=pytest.mark.skipif(CUDA, reason="there is one here")),
        ("--train-roles query,query", "names a role twice"),
        ("--steps 0", "--steps 0: must be at least 1"),
        ("--dtype bfloat16 --device cpu", "compute type for CUDA"),
        ("--batch 100", "fewer than --batch 100"),
        ("--model no/such/model", "no/such/model: cannot be loaded"),
        ("--data no-such-file.jsonl", "no-such-file.jsonl: no such file"),
        ("--negatives 2", "has 1 negatives, --negatives asks for 2"),
        ("--max-prompt-tokens 4", "leaves no room for a text"),
        ("--max-new-tokens 400", "fills the model's context"),
        ("--lora 0", "--lora 0: must be at least 1"),
        ("--lora 96", "--lora 96: adapters are smaller than the layers: give a rank below the model's width, 96"),
        ("--train-roles positive,negative --negatives 0", "the rows have no negatives"),
        ("--out /dev/null/x", "--out /dev/null/x: cannot be written to"),
    ],
)
def test_bad_settings(tiny_world, tmp_path, flags, message):
    with pytest.raises(SystemExit) as stop:
        grace.main(command(tiny_world, tmp_path, flags))
    assert message in str(stop.value) and str(stop.value).startswith("grace.py: ")


@pytest.mark.parametrize("flags", ["--mode semi", "--recipe best", "--batch many", "--pooling median", "--unknown 1"])
def test_unknown_flags_and_values(flags, capsys):
    with pytest.raises(SystemExit):
        parse(flags.split(), "")
    assert "error" in capsys.readouterr().err


def test_groups_are_counted_with_the_negatives_that_there_are(monkeypatch):
    """4 instances with 2 negatives are 16 groups, which 3 ranks cannot share out; with one they are 12."""
    monkeypatch.setattr("plumbing.ranks.size", lambda: 3)
    config = Config(batch=4, shard=True, train_roles="query,positive,negative")
    config.check_groups(1)
    with pytest.raises(GraceError, match="must divide 16 groups"):
        config.check_groups(2)


def test_config_made_in_python():
    with pytest.raises(GraceError, match="--mode semi: choose one of supervised, unsupervised"):
        Config(mode="semi")


def test_help_shows_defaults(capsys):
    """Also where a recipe sets them, or the reading of a checkpoint."""
    with pytest.raises(SystemExit):
        parse(["--help"], "")
    printed = " ".join(capsys.readouterr().out.split())
    assert "--pathwise PATHWISE" in printed and "[full: 0.3, paper: 0.0]" in printed
    assert "--pooling {mean,penultimate,eos,max}" in printed and "[mean]" in printed
    assert "--batch BATCH instances per step, B [64]" in printed


def test_micro_batches_are_larger_on_a_gpu_unless_given(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    given = dict(model="m", data="d", out="o")
    budget = lambda **more: Config(**given, **more).tokens_per_batch
    assert budget() == budget(device="cuda:1") == 16384 and budget(device="cpu") == 4096
    assert budget(tokens_per_batch=7) == 7
    with pytest.raises(GraceError, match="--tokens-per-batch 0: must be at least 1"):
        budget(tokens_per_batch=0)
