"""The policy: which models are refused and why, loading without running anyone's code, saving."""

import json
import os
import shutil

import pytest
import torch
from conftest import build, weights
from safetensors.torch import load_file, save_file

from plumbing.errors import GraceError
from policy import Policy
from prompt import Reading
from worlds.make import INSTRUCTION, build_tokenizer

# ---------------------------------------------------------------- models that are refused, and limits


def test_model_that_does_more_than_its_head(tokenizer):
    model = build("Llama", len(tokenizer))
    model.register_forward_hook(lambda model, given, out: out | {"logits": out.logits * 1.5 + 1})
    with pytest.raises(GraceError, match="not its output head"):
        Policy(model, tokenizer, Reading(INSTRUCTION, 64, 4))


def test_damaged_weights(tokenizer):
    model = build("Llama", len(tokenizer))
    model.model.layers[1].mlp.down_proj.weight.data[3] = torch.nan
    with pytest.raises(GraceError, match="its logits are not finite, so its weights are damaged"):
        Policy(model, tokenizer, Reading(INSTRUCTION, 64, 4))


def test_no_end_token(monkeypatch):
    tokenizer = build_tokenizer()
    monkeypatch.setattr(tokenizer, "_special_tokens_map", {**tokenizer._special_tokens_map, "eos_token": None})
    with pytest.raises(GraceError, match="no end token"):
        Policy(build("Qwen2", len(tokenizer), eos_token_id=None), tokenizer, Reading(INSTRUCTION, 64, 4))


def test_limits_and_the_context(tokenizer):
    """A prompt's limit gives way; a rationale as long as the context is refused."""
    make = lambda T: Policy(build("GPT2", len(tokenizer)), tokenizer, Reading(INSTRUCTION, max_new_tokens=T))
    with pytest.warns(UserWarning, match="limited to 120 tokens"):
        assert make(8).reading.max_prompt_tokens == 120
    with pytest.raises(GraceError, match="fills the model's context"):
        make(128)


# ---------------------------------------------------------------- folders


def test_saved_and_loaded(make_policy, tmp_path):
    """Weights and reading; a setting that is given overrides the folder's, and one that is unknown is refused."""
    policy = make_policy(pooling="max")
    policy.save(tmp_path)
    again = Policy.load(str(tmp_path))
    assert again.reading == policy.reading and torch.equal(weights(again), weights(policy))
    assert Policy.load(str(tmp_path), max_new_tokens=3).reading.max_new_tokens == 3
    (tmp_path / "grace_config.json").write_text('{"instruction": "x", "speed": 3}')
    with pytest.raises(GraceError, match="unknown setting speed"):
        Policy.load(str(tmp_path))
    with pytest.raises(GraceError, match="dtype 'float16': give float32 or bfloat16"):
        make_policy(dtype="float16")


class Evil:
    """What unpickles as a call of os.mkdir."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (self.path,)


@pytest.fixture
def folder(tiny_world, tmp_path):
    """A checkpoint folder to be damaged; beside it, nothing may appear when it is loaded."""
    yield shutil.copytree(tiny_world / "model", tmp_path / "model")
    assert os.listdir(tmp_path) == ["model"]


def test_missing_weights(folder):
    """They would be random: of a model saved without its head, or of a file that lost a layer."""
    weights = load_file(folder / "model.safetensors")
    del weights["model.layers.1.mlp.down_proj.weight"]
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(GraceError, match="has no weights for model.layers.1.mlp.down_proj.weight: give a whole"):
        Policy.load(str(folder))


def test_no_pickle_is_read(folder):
    os.remove(folder / "model.safetensors")
    torch.save({"x": Evil(str(folder.parent / "was-here"))}, folder / "pytorch_model.bin")
    with pytest.raises(GraceError, match="pickles, which can run code, and are not read.*convert it once"):
        Policy.load(str(folder))


def test_no_code_is_run(folder):
    settings = json.loads((folder / "config.json").read_text())
    settings |= {"model_type": "mine", "auto_map": {"AutoConfig": "mine.Mine", "AutoModelForCausalLM": "mine.Mine"}}
    (folder / "config.json").write_text(json.dumps(settings))
    (folder / "mine.py").write_text(f"import os; os.mkdir({str(folder.parent / 'was-here')!r})")
    with pytest.raises(GraceError, match="Code that comes with a model is not run here"):
        Policy.load(str(folder))
