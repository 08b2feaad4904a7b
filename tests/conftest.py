"""What many tests share, built in place: tiny models, a tokenizer, a run. No test needs a network, a GPU or a download."""

import copy
import importlib.util
import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")
signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell that starts the tests in the background has it ignored

import pytest  # noqa: E402
import torch  # noqa: E402
import transformers  # noqa: E402
from safetensors.torch import load_file  # noqa: E402

import grace  # noqa: E402
from config import Config  # noqa: E402
from course.tests.conftest import generator, rand, units  # noqa: E402, F401 (fixtures)
from plumbing.run import Run  # noqa: E402
from policy import Policy  # noqa: E402
from pool import unit  # noqa: E402
from prompt import Reading  # noqa: E402
from rollout import sample, uniforms  # noqa: E402
from worlds.make import INSTRUCTION, build_tokenizer, build_world  # noqa: E402

TEXTS = [
    "the angry doctor bought the lamp near the forest around noon .",
    "somebody sold the boat",
    "around winter , near the street , the tall child found the sofa .",
]
ROWS = [
    {
        "query": f"the {a} doctor bought the lamp",
        "positive": f"somebody {b} the boat around noon .",
        "negative": [f"the {c} child"],
    }
    for a, b, c in zip("old young tall rich".split(), "sold found fixed hid".split(), "quiet smart happy angry".split())
]

# ---------------------------------------------------------------- networks

COMMON = dict(
    hidden_size=32, intermediate_size=48, num_hidden_layers=3, num_attention_heads=4, num_key_value_heads=2, head_dim=8,
    max_position_embeddings=128, bos_token_id=None, pad_token_id=0,
    eos_token_id=list(range(5, 150, 5)),  # many end tokens, so that random networks end at unequal lengths
)  # fmt: skip
SMALL = {  # architecture: what its configuration needs beyond COMMON
    "Qwen2": {},
    "Qwen3": {},
    "Llama": {},
    "Gemma": {},
    "Gemma2": dict(final_logit_softcapping=2.0, attn_logit_softcapping=5.0, sliding_window=8),
    "Granite": dict(logits_scaling=3.0, embedding_multiplier=2.0),
    "Cohere": dict(logit_scale=0.3),
    "GPT2": dict(n_embd=32, n_layer=3, n_head=4, n_positions=128),
    "Mpt": dict(d_model=32, n_layers=3, n_heads=4, max_seq_len=128),  # takes ALiBi distances from places in the row
}


def build(architecture, vocab_size, seed=0, **overrides):
    """A random network of a named architecture, with weights large enough for distinct predictions."""
    settings = COMMON if architecture not in ("GPT2", "Mpt") else {k: v for k, v in COMMON.items() if "token_id" in k}
    settings = getattr(transformers, architecture + "Config")(
        vocab_size=vocab_size, initializer_range=0.3, **{**settings, **SMALL[architecture], **overrides}
    )
    torch.manual_seed(seed)
    suffix = "LMHeadModel" if architecture == "GPT2" else "ForCausalLM"
    return getattr(transformers, architecture + suffix)(settings)


@pytest.fixture(scope="session")
def tokenizer():
    return build_tokenizer()


@pytest.fixture
def make_policy(tokenizer):
    """A policy over a random network: `make_policy("Qwen2", pooling="max", double=True)`."""

    def make(
        architecture="Llama", seed=0, double=False, max_new_tokens=6, pooling="mean", documents="rationale", lora=None,
        dtype="float32", **overrides,
    ):  # fmt: skip
        model = build(architecture, len(tokenizer), seed, **overrides)
        reading = Reading(INSTRUCTION, 64, max_new_tokens, pooling, documents)
        policy = Policy(model.double() if double else model, tokenizer, reading, dtype)
        return adapted(policy, lora) if lora else policy

    return make


def adapted(policy, rank):
    """The policy with adapters, away from where they start: there B is 0, and A has no gradient."""
    policy.adapt(rank, seed=0)
    draws = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for p in policy.model.parameters():
            if p.requires_grad:
                p.copy_(torch.randn(p.shape, generator=draws) * 0.05)
    policy.follow()
    return policy


def start(policy):
    """A reference for the policy: a copy of it, or, where it has adapters, itself without them."""
    return policy.start() if policy.adapters else copy.deepcopy(policy)


def rolled(policy, texts=TEXTS, K=3, temperature=1.0, seed=0):
    """K sampled rationales per text."""
    uniform = uniforms(seed, len(texts), K, policy.reading.max_new_tokens)
    return sample(policy, policy.template(texts), K, temperature, uniform)


def by_full_forward(policy, rollouts, n, k, temperature=1.0):
    """One rollout's log-probabilities and embedding by the library's own model: no padding, no cache. `[T'], [D]`.

    k: None for the prompt alone.
    """
    prompt = rollouts.prompt_ids[n][rollouts.prompt_mask[n].bool()]
    rationale = prompt[:0] if k is None else rollouts.ids[n, k][rollouts.mask[n, k].bool()]
    out = policy.model(input_ids=torch.cat([prompt, rationale])[None], output_hidden_states=True, use_cache=False)
    logprobs = torch.log_softmax(out.logits[0, len(prompt) - 1 : -1] / temperature, -1)
    counted = torch.cat([rollouts.counted[n][rollouts.prompt_mask[n].bool()], torch.ones_like(rationale)]).bool()
    states = out.hidden_states[-2 if policy.reading.pooling == "penultimate" else -1][0][counted]
    how = {"max": lambda h: h.max(0).values, "eos": lambda h: h[-1]}.get(policy.reading.pooling, lambda h: h.mean(0))
    embedding = unit(how(states))
    if policy.reading.pooling == "halves" and len(rationale):
        embedding = unit(unit(states[: -len(rationale)].mean(0)) + unit(states[-len(rationale) :].mean(0)))
    return logprobs.gather(1, rationale[:, None])[:, 0], embedding


def embedded(policy, text):
    """A text, read alone: the mean of the states that count, and the log-probability of its tokens, of both readings if two."""
    x = policy.template([text])
    out, counted, own = policy.model(input_ids=x.ids, output_hidden_states=True), x.counted[0].bool(), x.counted[0] | x.text[0]
    h = out.hidden_states[-1][0][counted].mean(0)
    at = 1 + (own[1:] & own[:-1]).nonzero()[:, 0]
    logprob = torch.log_softmax(out.logits[0].double(), -1)[at - 1, x.ids[0, at]].mean()
    return h / h.norm(), logprob


def infonce_terms(q, p, n, t):
    """The log-softmax of each query's positive among all positives and its own hard negative, and of each positive's query."""
    terms = []
    for i in range(len(q)):
        forth = torch.stack([q[i] @ x for x in p] + [q[i] @ n[i]]) / t
        back = torch.stack([p[i] @ x for x in q]) / t
        terms += [forth[i] - forth.exp().sum().log(), back[i] - back.exp().sum().log()]
    return torch.stack(terms)


def gradient(policy, value):
    """The gradient of a value at all that the policy learns, its weights or its adapters, as one vector."""
    policy.model.zero_grad()
    value.backward()
    return torch.cat([p.grad.flatten() for p in policy.model.parameters() if p.grad is not None])


def weights(policy, network=None):
    """A copy of all of the policy's weights, or of another network's, as one vector."""
    return torch.cat([p.detach().flatten() for p in (network or policy.model).parameters()])


def interpreted(script):
    """What a script prints in Triton's interpreter: in a process of its own, because Triton reads the variable at import."""
    environment = {**os.environ, "TRITON_INTERPRET": "1", "PYTHONPATH": "tests"}
    ran = subprocess.run([sys.executable, "-W", "ignore", "-c", script], env=environment, capture_output=True, text=True)
    assert ran.returncode == 0, ran.stderr
    return ran.stdout


needs_triton = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="triton is not installed")

# ---------------------------------------------------------------- training


def config(**settings):
    """The settings of a small batch."""
    return Config(**{**dict(batch=4, rollouts=3, steps=2, lr=1e-3), **settings})


def descent(policy, **settings):
    """A Trainer of `ROWS` by gradient descent: Adam would hide a gradient of a wrong scale."""
    trainer = grace.Trainer(policy, start(policy), ROWS, config(**settings))
    trainer.optimizer = torch.optim.SGD(policy.model.parameters(), lr=1e-2)
    return trainer


@pytest.fixture(scope="session")
def tiny_world(tmp_path_factory):
    """The embedded default after a warm start of a few steps: a real folder, a poor policy. Not to be written to."""
    folder = tmp_path_factory.mktemp("world")
    build_world(str(folder), seed=0, train=64, heldout=16, steps=30)
    return folder


def command(world, out, *more, heldout=True):
    """The arguments of a small training run in a world. `more`: further flags, which override these."""
    given = f"--model {world}/model --data {world}/data/train.jsonl --out {out} --batch 4 --rollouts 2 --steps 3 --lr 1e-3"
    given += f" --heldout {world}/data/heldout.jsonl" if heldout else ""
    return f"{given} --save-every 1 --eval-every 5 {' '.join(more)}".split()


@pytest.fixture(scope="session", autouse=True)
def no_page():
    """Runs end without drawing their page, which takes longer than all else in a run of a few steps."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(grace, "finish_page", lambda out: None)
        yield


@pytest.fixture(scope="session")
def finished_run(tiny_world, no_page, tmp_path_factory):
    """A run of four steps; beside it, in `unfinished`, what a kill in its final evaluation leaves. Not to be written to."""
    out, finish = tmp_path_factory.mktemp("finished") / "out", Run.finish

    def copied(run, *scores):
        shutil.copytree(out, out.parent / "unfinished")
        return finish(run, *scores)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Run, "finish", copied)
        grace.main(command(tiny_world, out, "--steps 4"))
    return out


@pytest.fixture
def two_checkpoints(finished_run, tmp_path):
    """A run of four steps that was killed in its final evaluation: its checkpoints are of steps 3 and 4."""
    return shutil.copytree(finished_run.parent / "unfinished", tmp_path / "out")


def same(one, two):
    """Assert that two finished runs are equal to the bit: weights, metrics, rationales and scores; times and memory aside."""

    def left(out):
        lines = [json.loads(line) for line in (Path(out) / "metrics.jsonl").open()]
        assert [line["step"] for line in lines] == [*range(1, len(lines) + 1)]
        metrics = [{name: x for name, x in line.items() if not name.endswith(("_s", "_gb"))} for line in lines]
        summary = json.loads((Path(out) / "summary.json").read_text())
        scores = {name: summary[name] for name in ("before", "after", "after_without_rationale")}
        return metrics, scores, (Path(out) / "rationales.md").read_text()

    assert left(one) == left(two)
    a, b = (load_file(Path(out) / "model.safetensors") for out in (one, two))
    assert a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)
