"""Adapters against the same network with W + (alpha / R) B A in its weights; what is trained and saved, and what is refused.

That a step with adapters has ratio 1, and the gradient that it should have, is in test_grace.py.
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
from conftest import ROWS, TEXTS, adapted, command, config, rolled, same, weights
from plumbing.checkpoint import checkpoints
from safetensors.torch import load_file, save_file
from test_policy import Evil

import grace
from evaluation.encoder import GraceEncoder
from plumbing.errors import GraceError
from policy import Policy
from rollout import score
from speed.lora import ALPHA

pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")  # peft asks transformers for it
KINDS = {"Llama": {}, "Qwen2": dict(tie_word_embeddings=True), "GPT2": {}}  # GPT2's layers hold their weights transposed
each_kind = pytest.mark.parametrize("kind", KINDS)


@pytest.fixture
def pair(make_policy, kind):
    """A float64 policy with adapters of rank 2, and the same without."""
    make = lambda **more: make_policy(kind, double=True, **KINDS[kind], **more)
    return make(lora=2), make()


def trained_names(policy):
    return {name for name, p in policy.model.named_parameters() if p.requires_grad}


def by_hand(plain, folder, rank=2):
    """A copy of a policy with W + (alpha / R) B A in its weights, from the file of adapters."""
    other, file = copy.deepcopy(plain), load_file(os.path.join(folder, "adapter_model.safetensors"))
    layers = {name.removeprefix("base_model.model.").rsplit(".lora_", 1)[0] for name in file}
    for name in layers:
        A, B = (file[f"base_model.model.{name}.lora_{x}.weight"] for x in "AB")
        weight = other.model.get_submodule(name).weight
        change = ALPHA / rank * B @ A
        with torch.no_grad():
            weight += change if weight.shape == change.shape and not name.startswith("transformer") else change.T
    return other, layers


def scores(policy, rollouts):
    with torch.no_grad():
        x = score(policy, rollouts, text=True)
    return torch.cat([x.logprobs.flatten(), x.embeddings.flatten(), x.text_logprobs])


# ---------------------------------------------------------------- what adapters compute


@each_kind
def test_adapters_are_what_their_file_says(pair, tmp_path):
    """While training, merged, in the bfloat16 copy, and where peft itself reads the file."""
    policy, plain = pair
    policy.save(tmp_path / "adapter")
    expected, layers = by_hand(plain, tmp_path / "adapter")
    linear = {n for n, m in plain.base.named_modules() if isinstance(m, (torch.nn.Linear, transformers.pytorch_utils.Conv1D))}
    assert layers == {f"{plain.model.base_model_prefix}.{name}" for name in linear}  # all of the body, and not the head
    rollouts = rolled(plain)
    torch.testing.assert_close(scores(policy, rollouts), scores(expected, rollouts), rtol=0, atol=1e-12)
    assert (scores(plain, rollouts) - scores(expected, rollouts)).abs().max() > 0.1  # it matters
    ids = torch.tensor([[3, 4, 5]])
    by_peft = peft.PeftModel.from_pretrained(copy.deepcopy(plain.model), tmp_path / "adapter", autocast_adapter_dtype=False)
    torch.testing.assert_close(by_peft(input_ids=ids).logits, expected.model(input_ids=ids).logits, rtol=0, atol=1e-10)

    sampler = policy.frozen_copy(torch.bfloat16)
    with torch.no_grad():
        for name in trained_names(policy):
            policy.model.get_parameter(name).mul_(1.5)  # as if trained on
    sampler.copy_weights(policy)
    assert sampler.adapters is None and {p.dtype for p in sampler.model.parameters()} == {torch.bfloat16}
    assert (sampler.head.weight is sampler.model.get_input_embeddings().weight) == plain.model.config.tie_word_embeddings
    policy.save_result(tmp_path / "out")
    expected, _ = by_hand(plain, tmp_path / "out" / "adapter")
    merged, told = load_file(tmp_path / "out" / "model.safetensors"), dict(expected.model.named_parameters())
    assert merged.keys() == told.keys()
    for name, x in merged.items():
        torch.testing.assert_close(x, told[name], rtol=0, atol=1e-12)
    torch.testing.assert_close(weights(sampler), weights(expected).bfloat16(), rtol=1e-2, atol=1e-6)
    torch.testing.assert_close(
        scores(policy, rollouts), scores(expected, rollouts), rtol=0, atol=1e-12
    )  # and goes on as it was


@each_kind
def test_start_is_exact(make_policy, kind):
    """New adapters change nothing; switched off, trained ones do not either, to the bit. Outside of that they are on again."""
    policy, plain = make_policy(kind, **KINDS[kind]), make_policy(kind, **KINDS[kind])
    rollouts = rolled(plain)
    before = scores(plain, rollouts)
    policy.adapt(3, seed=0)
    assert torch.equal(scores(policy, rollouts), before)
    trainer = grace.Trainer(policy, policy.start(), ROWS, config(lr=0.05))
    first, second = trainer.step(), trainer.step()
    assert first["kl_start"] == 0 < 0.01 < second["kl_start"] and first["grad_norm"] > 0
    assert torch.equal(scores(trainer.reference, rollouts), before)
    assert (scores(policy, rollouts) - before).abs().max() > 0.01


@each_kind
def test_only_adapters_learn(make_policy, kind):
    """The base weights do not move, and have neither gradients nor moments."""
    policy, plain = make_policy(kind, **KINDS[kind]), make_policy(kind, **KINDS[kind])
    policy.adapt(2, seed=0)
    trainer = grace.Trainer(policy, policy.start(), ROWS, config(lr=0.05, weight_decay=0.1))
    before = {name: p.clone() for name, p in policy.model.named_parameters()}
    for _ in range(2):
        trainer.step()
    moved = {name for name, p in policy.model.named_parameters() if not torch.equal(p, before[name])}
    with_moments = {name for name, p in policy.model.named_parameters() if p in trainer.optimizer.state}
    assert moved == with_moments == trained_names(policy) and all("lora_" in name for name in moved)
    assert sum(p.numel() for p in trainer.optimizer.state) < 0.25 * weights(plain).numel()
    policy.adapters.unload()  # peft takes its layers out and leaves the base
    assert torch.equal(weights(policy), weights(plain))


def test_new_adapters_depend_on_the_seed_alone(make_policy):
    def drawn(seed, elsewhere):
        policy = make_policy()
        torch.manual_seed(elsewhere)
        policy.adapt(2, seed)
        assert torch.rand(1) == torch.rand(1, generator=torch.Generator().manual_seed(elsewhere))  # nothing was taken from it
        return torch.cat([policy.model.get_parameter(name).flatten() for name in sorted(trained_names(policy))])

    assert torch.equal(drawn(0, 1), drawn(0, 2)) and not torch.equal(drawn(0, 1), drawn(1, 1))


def test_recomputed_layers(make_policy):
    """With the KL term, whose reference switches adapters off between the forward pass and the backward pass."""
    gradients = []
    for recompute in (False, True):
        policy = make_policy("Qwen2", double=True, lora=2)
        trainer = grace.Trainer(policy, policy.start(), ROWS, config(recompute=recompute, kl=0.5))
        rollouts, *_ = trainer.sample(grace.make_batch(trainer.next_rows()).texts)
        A = torch.linspace(-1, 1, rollouts.mask[..., 0].numel()).double().view(len(rollouts), -1)
        trainer.backward(torch.arange(len(A)), rollouts, A, rollouts.embeddings, 10**6)
        gradients.append(torch.cat([p.grad.flatten() for p in policy.model.parameters() if p.requires_grad]))
    torch.testing.assert_close(gradients[1], gradients[0], rtol=1e-9, atol=1e-9)
    assert gradients[0].abs().max() > 1e-3


# ---------------------------------------------------------------- whole runs


@pytest.fixture(scope="module")
def lora_run(tiny_world, no_page, tmp_path_factory):
    """A run of four steps with adapters, whose model was named relative to the folder it ran in. Not to be written to."""
    out = tmp_path_factory.mktemp("lora")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(tiny_world)
        grace.main(command(tiny_world, out, "--model model --steps 4 --lora 2 --lr 0.02"))
    return out


def test_resumed_is_never_stopped(tiny_world, lora_run, tmp_path, monkeypatch):
    step = grace.Trainer.step

    def stopped(trainer):
        if trainer.step_number == 2:
            raise KeyboardInterrupt
        return step(trainer)

    arguments = lambda *x: command(tiny_world, tmp_path, "--steps 4 --lora 2 --lr 0.02", *x)
    with monkeypatch.context() as patched, pytest.raises(SystemExit):
        patched.setattr(grace.Trainer, "step", stopped)
        grace.main(arguments())
    with pytest.raises(SystemExit, match=r"is of another run \(lora was 2\)"):
        grace.main(arguments("--lora 3 --resume"))
    grace.main(arguments("--resume"))
    same(lora_run, tmp_path)
    one, two = (load_file(out / "adapter" / "adapter_model.safetensors") for out in (lora_run, tmp_path))
    assert one.keys() == two.keys() and all(torch.equal(one[name], two[name]) for name in one)


def test_checkpoints_hold_adapters_alone(tiny_world, lora_run):
    newest = checkpoints(lora_run)[-1]
    assert not os.path.exists(os.path.join(newest, "model.safetensors"))
    file = load_file(os.path.join(newest, "adapter_model.safetensors"))
    state = torch.load(os.path.join(newest, "trainer.pt"), weights_only=True)["optimizer"]["state"]
    numbers = sum(x.numel() for x in file.values())
    assert all(".lora_" in name for name in file) and sum(x["exp_avg"].numel() for x in state.values()) == numbers
    size = lambda folder: sum(os.path.getsize(os.path.join(folder, name)) for name in os.listdir(folder))
    assert size(newest) < size(tiny_world / "model")


def test_what_a_run_leaves(tiny_world, lora_run, tmp_path, monkeypatch, capsys):
    """An ordinary folder, the adapters beside it, and both are the same encoder, from any folder."""
    monkeypatch.chdir(tmp_path)
    base, out = (transformers.AutoModelForCausalLM.from_pretrained(x) for x in (tiny_world / "model", lora_run))
    ids = torch.tensor([[3, 4, 5]])
    by_peft = peft.PeftModel.from_pretrained(base, lora_run / "adapter")
    torch.testing.assert_close(by_peft(input_ids=ids).logits, out(input_ids=ids).logits, rtol=1e-5, atol=1e-4)
    folders = [tiny_world / "model", lora_run, lora_run / "adapter", checkpoints(lora_run)[-1]]
    start, merged, *adapters = (GraceEncoder(str(folder)).encode(TEXTS) for folder in folders)
    assert all((vectors == merged).all() for vectors in adapters) and abs(start - merged).max() > 1e-3
    printed = []
    for folder in (lora_run, lora_run / "adapter"):
        grace.main(["explain", "--model", str(folder), "--json", *TEXTS[:2]])
        printed.append(json.loads(capsys.readouterr().out))
    assert printed[0] == printed[1]


def test_on_from_adapters(lora_run, tmp_path):
    """A folder of adapters is a model to start from: they are merged, every weight can learn, and new adapters stack."""
    merged, policy = Policy.load(str(lora_run)), Policy.load(str(lora_run / "adapter"))
    assert torch.equal(weights(policy), weights(merged)) and all(p.requires_grad for p in policy.model.parameters())
    adapted(policy, 2).save_result(tmp_path / "out")
    again = weights(Policy.load(str(tmp_path / "out" / "adapter")))
    assert torch.equal(again, weights(Policy.load(str(tmp_path / "out")))) and not torch.equal(again, weights(merged))


def test_an_earlier_result(tiny_world, lora_run, tmp_path, monkeypatch):
    """Adapters are a result like any other, and go with it."""
    shutil.copytree(lora_run, tmp_path / "out")
    out = tmp_path / "out"
    with pytest.raises(SystemExit, match="is where --model is: give another folder"):
        grace.main(command(tiny_world, out, f"--model {out}/adapter --overwrite"))
    monkeypatch.chdir(tiny_world)
    grace.main(
        command(tiny_world, out, "--model model --steps 5 --lora 2 --lr 0.02 --resume")
    )  # over the adapters that are there
    assert (out / "adapter" / "adapter_model.safetensors").exists()
    shutil.rmtree(out / "checkpoints")
    (out / "model.safetensors").unlink()
    (out / "summary.json").unlink()
    with pytest.raises(SystemExit, match="holds a model: --resume"):
        grace.main(command(tiny_world, out, "--steps 1"))

    def stopped(trainer):
        raise KeyboardInterrupt

    monkeypatch.setattr(grace.Trainer, "step", stopped)
    with pytest.raises(SystemExit):
        grace.main(command(tiny_world, out, "--steps 1 --overwrite"))
    assert not (out / "adapter").exists()  # from the start


# ---------------------------------------------------------------- what is refused


def test_without_peft(tiny_world, lora_run, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "peft", None)
    with pytest.raises(SystemExit, match="grace.py: adapters need peft .*: pip install peft"):
        grace.main(command(tiny_world, tmp_path, "--lora 2"))
    with pytest.raises(GraceError, match="pip install peft"):
        Policy.load(str(lora_run / "adapter"))
    Policy.load(str(lora_run))  # the merged folder needs nothing


def test_adapters_that_do_not_fit(tiny_world, lora_run, tmp_path, make_policy):
    """Of another shape, of other layers, of a base that is not there."""
    make_policy().save(tmp_path / "base")
    make_policy("GPT2").save(tmp_path / "other")
    for name, message in (("base", "do not fit .*base:"), ("other", "do not fit .*other:"), ("gone", "be loaded .*gone")):
        folder = shutil.copytree(lora_run / "adapter", tmp_path / f"of-{name}")
        settings = json.loads((folder / "adapter_config.json").read_text())
        settings["base_model_name_or_path"] = str(tmp_path / name)
        (folder / "adapter_config.json").write_text(json.dumps(settings))
        with pytest.raises(GraceError, match=f"{folder}: .*{message}"):
            Policy.load(str(folder))
    folder = shutil.copytree(lora_run / "adapter", tmp_path / "layers")
    file = load_file(folder / "adapter_model.safetensors")
    save_file({name: x for name, x in file.items() if ".0.mlp" not in name}, folder / "adapter_model.safetensors")
    with pytest.raises(GraceError, match="do not fit"):
        Policy.load(str(folder))


def test_no_pickled_adapter_runs_code(lora_run, tmp_path):
    folder = shutil.copytree(lora_run / "adapter", tmp_path / "adapter")
    os.remove(folder / "adapter_model.safetensors")
    torch.save({"x": Evil(str(tmp_path / "was-here"))}, folder / "adapter_model.bin")
    with pytest.raises(GraceError, match="cannot be loaded"):
        Policy.load(str(folder))
    assert not (tmp_path / "was-here").exists()


@pytest.mark.parametrize("rank", [32, 1000])
def test_rank_of_the_layers_own_size(make_policy, rank):
    with pytest.raises(GraceError, match=f"--lora {rank}: .* below the model's width, 32"):
        make_policy().adapt(rank, seed=0)
