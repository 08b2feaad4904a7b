"""The configuration: impossible settings end in one sentence, before anything is loaded where that can be."""

import dataclasses

import pytest
import torch
from conftest import command

import grace
from config import Config, parse
from plumbing import ranks
from plumbing.errors import GraceError
from plumbing.models import pick_device

without_cuda = pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device here")


@pytest.mark.parametrize(
    "flags, message",
    [
        ("--documents prompt --train-roles positive", "has to have query"),
        ("--rollouts 1", "a group of one has no advantage"),
        ("--batch 1", "InfoNCE tells an instance from others"),
        ("--train-roles query,answer", "one or more of query,positive,negative"),
        ("--train-roles query,query", "names a role twice"),
        ("--reward paper --train-roles query,positive", "use --train-roles positive"),
        ("--batch 2 --minibatches 5", "a batch of 4 groups cannot be shared out to --minibatches 5"),
        ("--temperature 0", "--temperature 0.0: must be above 0"),
        ("--lr inf", "--lr inf: give a finite number"),
        ("--tokens-per-batch 0", "--tokens-per-batch 0: must be at least 1"),
        ("--mode unsupervised --prompt-weight 1", "without labels a text's prompt has no pair"),
        pytest.param("--device cuda", "--device cuda: torch cannot use it here", marks=without_cuda),
        ("--device foo", "--device foo: torch cannot use it here"),
        ("--batch 100", "fewer than --batch 100"),
        ("--model no/such/model", "no/such/model: no such folder"),
        ("--data no-such-file.jsonl", "no-such-file.jsonl: no such file"),
        ("--out /dev/null/x", "--out /dev/null/x: cannot be written"),
    ],
)
def test_bad_settings(tiny_world, tmp_path, flags, message):
    with pytest.raises(SystemExit) as stop:
        grace.main(command(tiny_world, tmp_path, flags))
    assert message in str(stop.value) and str(stop.value).startswith("grace.py: ")


def test_groups_are_counted_with_the_negatives_that_there_are(monkeypatch):
    """4 instances with one negative are 12 groups, with two 16; and every rank needs an instance."""
    config = Config(batch=4, minibatches=12, train_roles="query,positive,negative")
    config.minibatches = 13
    config.check_groups(2)
    with pytest.raises(GraceError, match="a batch of 12 groups"):
        config.check_groups(1)
    with pytest.raises(GraceError, match="the rows have no negatives"):
        config.check_groups(0)
    monkeypatch.setattr(ranks, "size", 5)
    with pytest.raises(GraceError, match="5 ranks"):
        config.check_groups(2)


def test_config_made_in_python():
    """A recipe only sets defaults; choices are checked here, too."""
    assert (Config(recipe="paper").pathwise, Config().pathwise, Config(recipe="paper", pathwise=0.5).pathwise) == (0, 0.3, 0.5)
    with pytest.raises(GraceError, match="--mode semi: choose one of supervised, unsupervised"):
        Config(mode="semi")


def test_what_a_resumed_run_may_change():
    """How long it goes on, unless the rate depends on it, and how it fits the memory."""
    was = lambda **settings: dataclasses.asdict(Config(steps=4, **settings))
    Config(steps=6, tokens_per_batch=99, resume=True).must_match(was())
    with pytest.raises(GraceError, match=r"is of another run \(steps was 4\)"):
        Config(steps=6, lr_decay=True).must_match(was(lr_decay=True))


def test_help_shows_defaults(capsys):
    """Also where a recipe sets them, or the reading of a checkpoint."""
    with pytest.raises(SystemExit):
        parse(["--help"], "")
    printed = " ".join(capsys.readouterr().out.split())
    assert "[full: 0.3, paper: 0.0]" in printed and "[mean]" in printed and "instances per step, B [64]" in printed


def test_the_default_device(monkeypatch):
    """cuda, else mps, else cpu. (Where there is no such device, that it was chosen shows in the refusal.)"""

    def chosen(cuda, mps):
        monkeypatch.setattr(torch.cuda, "is_available", lambda: cuda)
        monkeypatch.setattr(torch.backends.mps, "is_available", lambda: mps)
        try:
            return pick_device()
        except GraceError as error:
            return str(error).split()[1].rstrip(":")

    assert [chosen(*there) for there in ((True, True), (False, True), (False, False))] == ["cuda", "mps", "cpu"]
