"""Adapters against the same network with W + (alpha / R) B A in its weights; what is trained and saved, and what is refused.

That a step with adapters has ratio 1, and the gradient that it should have, is in test_grace.py; that a run with them is
resumed exactly, in test_run.py.
"""

import copy
import json
import os
import shutil
import sys

import peft
import pytest
import torch
import transformers
from conftest import ROWS, adapted, command, config, rolled, weights
from safetensors.torch import load_file, save_file
from test_policy import Evil

import grace
from plumbing.errors import GraceError
from policy import Policy
from rollout import score
from speed.lora import ALPHA


def trained_names(policy):
    return {name for name, p in policy.model.named_parameters() if p.requires_grad}


def scores(policy, rollouts):
    with torch.no_grad():
        x = score(policy, rollouts)
    return torch.cat([x.logprobs.flatten(), x.embeddings.flatten(), x.text_logprobs])


# ---------------------------------------------------------------- what adapters compute


@pytest.mark.parametrize("kind", ["Llama", "tied Qwen2", "GPT2"])  # GPT2's layers hold their weights transposed
def test_adapters_are_what_their_file_says(make_policy, kind, tmp_path):
    """While training, merged, and where peft itself reads the file."""
    settings = dict(tie_word_embeddings=True) if kind == "tied Qwen2" else {}
    policy, plain = (make_policy(kind.split()[-1], double=True, lora=lora, **settings) for lora in (2, None))
    rollouts = rolled(plain)
    with torch.no_grad():
        for name in trained_names(policy):
            policy.model.get_parameter(name).mul_(1.5)  # as if trained on
    policy.save_result(tmp_path)

    expected, file = copy.deepcopy(plain), load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    layers = {name.removeprefix("base_model.model.").rsplit(".lora_", 1)[0] for name in file}
    for name in layers:
        A, B = (file[f"base_model.model.{name}.lora_{x}.weight"] for x in "AB")
        with torch.no_grad():
            expected.model.get_submodule(name).weight += ALPHA / 2 * (B @ A if kind != "GPT2" else (B @ A).T)
    linear = {n for n, m in plain.base.named_modules() if isinstance(m, (torch.nn.Linear, transformers.pytorch_utils.Conv1D))}
    assert layers == {f"{plain.model.base_model_prefix}.{name}" for name in linear}  # all of the body, and not the head
    torch.testing.assert_close(scores(policy, rollouts), scores(expected, rollouts), rtol=0, atol=1e-12)
    assert (scores(plain, rollouts) - scores(expected, rollouts)).abs().max() > 0.1  # it matters

    merged, parameters = load_file(tmp_path / "model.safetensors"), dict(expected.model.named_parameters())
    assert merged.keys() == parameters.keys()
    for name, x in merged.items():
        torch.testing.assert_close(x, parameters[name], rtol=0, atol=1e-12)
    ids = torch.tensor([[3, 4, 5]])
    by_peft = peft.PeftModel.from_pretrained(copy.deepcopy(plain.model), tmp_path / "adapter", autocast_adapter_dtype=False)
    torch.testing.assert_close(by_peft(input_ids=ids).logits, expected.model(input_ids=ids).logits, rtol=0, atol=1e-10)


def test_start_is_exact_and_only_adapters_learn(make_policy):
    """New adapters change nothing; switched off, trained ones do not either, to the bit. Nothing else has moments or moves."""
    policy, plain = make_policy("Qwen2"), make_policy("Qwen2")
    rollouts = rolled(plain)
    before = scores(plain, rollouts)
    policy.adapt(3, seed=0)
    assert torch.equal(scores(policy, rollouts), before)
    trainer = grace.Trainer(policy, policy.start(), ROWS, config(lr=0.05))
    first, second = trainer.step(), trainer.step()
    assert first["kl_start"] == 0 < 0.01 < second["kl_start"] and first["grad_norm"] > 0
    assert torch.equal(scores(trainer.reference, rollouts), before)
    assert (scores(policy, rollouts) - before).abs().max() > 0.01
    with_moments = {name for name, p in policy.model.named_parameters() if p in trainer.optimizer.state}
    assert with_moments == trained_names(policy) and all("lora_" in name for name in with_moments)
    policy.adapters.unload()  # peft takes its layers out and leaves the base
    assert torch.equal(weights(policy), weights(plain))


# ---------------------------------------------------------------- whole runs


@pytest.fixture(scope="module")
def lora_run(tiny_world, no_page, tmp_path_factory):
    """A run of three steps with adapters, whose model was named relative to the folder it ran in. Not to be written to."""
    out = tmp_path_factory.mktemp("lora")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(tiny_world)
        grace.main(command(tiny_world, out, "--model model --lora 2 --lr 0.02"))
    return out


def test_what_a_run_leaves(tiny_world, lora_run, tmp_path, monkeypatch):
    """An ordinary folder, the adapters beside it, and both are the same model, from any folder; also to start from."""
    monkeypatch.chdir(tmp_path)
    before, merged, policy = (Policy.load(str(folder)) for folder in (tiny_world / "model", lora_run, lora_run / "adapter"))
    assert torch.equal(weights(policy), weights(merged))
    assert (weights(merged) - weights(before)).abs().max() > 1e-3
    assert all(p.requires_grad for p in policy.model.parameters())  # merged: every weight can learn, and new adapters stack
    adapted(policy, 2).save_result(tmp_path / "out")
    again = weights(Policy.load(str(tmp_path / "out" / "adapter")))
    assert torch.equal(again, weights(Policy.load(str(tmp_path / "out")))) and not torch.equal(again, weights(merged))


def test_without_peft(tiny_world, lora_run, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "peft", None)
    with pytest.raises(SystemExit, match="grace.py: adapters need peft .*: pip install peft"):
        grace.main(command(tiny_world, tmp_path, "--lora 2"))
    Policy.load(str(lora_run))  # the merged folder needs nothing


def test_adapters_that_do_not_fit(lora_run, tmp_path, make_policy):
    """Of another shape, of some of the layers alone, or pickled."""
    folder = shutil.copytree(lora_run / "adapter", tmp_path / "adapter")
    settings, file = folder / "adapter_config.json", folder / "adapter_model.safetensors"
    given, tensors = json.loads(settings.read_text()), load_file(file)

    def refused(message):
        with pytest.raises(GraceError, match=message):
            Policy.load(str(folder))

    make_policy().save(tmp_path / "other")
    settings.write_text(json.dumps({**given, "base_model_name_or_path": str(tmp_path / "other")}))
    refused("do not fit .*other:")
    settings.write_text(json.dumps(given))
    save_file({name: x for name, x in tensors.items() if ".0.mlp" not in name}, file)
    refused("do not fit")  # not: the rest stays random
    os.remove(file)
    torch.save({"x": Evil(str(tmp_path / "was-here"))}, folder / "adapter_model.bin")
    refused("cannot be loaded")
    assert not (tmp_path / "was-here").exists()
