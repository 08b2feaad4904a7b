"""The encoder: texts in any company get the same vectors, nothing is read twice or lost, and errors say what to do."""

import json
import os
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
import torch
from conftest import TEXTS

import eval_mteb_subset
from evaluation import encoder as encoder_module
from evaluation.encoder import (
    Encoded,
    GraceEncoder,
    MeanEncoder,
    embed_prompts,
    encode_batch,
    encode_texts,
    fingerprint,
    text_loss,
    token_batches,
)
from plumbing.errors import GraceError
from policy import Policy
from pool import unit

# ---------------------------------------------------------------- in batches


def test_company_does_not_matter(make_policy):
    """Greedy or sampled: alone, in a batch, in another order, repeated: the same embedding and rationale."""
    policy = make_policy()
    for temperature in (0.0, 1.0):
        whole = encode_texts(policy, TEXTS, temperature=temperature)
        for i, text in enumerate(TEXTS):
            alone = encode_texts(policy, [text], temperature=temperature)
            np.testing.assert_allclose(alone.vectors[0], whole.vectors[i], rtol=1e-5, atol=1e-5)
            assert alone.rationales[0] == whole.rationales[i]
        order = [2, 0, 1, 0]
        texts = [TEXTS[i] for i in order]
        shuffled = encode_texts(policy, texts, temperature=temperature, tokens_per_batch=1)
        np.testing.assert_allclose(shuffled.vectors, whole.vectors[order], rtol=1e-5, atol=1e-5)


def test_token_batches(make_policy):
    """Every text once, within the budget."""
    texts = [TEXTS[i % 3] + " x" * i for i in range(40)]
    parts = list(token_batches(texts, 300, make_policy()))
    assert sorted(i for part in parts for i in part) == list(range(40)) and len(parts) > 3


def test_empty_text_has_an_embedding(make_policy):
    vectors = encode_texts(make_policy(), ["", TEXTS[0]]).vectors
    assert abs((vectors**2).sum(1) - 1).max() < 1e-5


def test_without_rationale(make_policy):
    """The prompt alone, pooled."""
    policy = make_policy()
    x = policy.prompts(TEXTS[:1])
    with torch.no_grad():
        states = policy.model.base_model(input_ids=x.ids).last_hidden_state[0][x.counted[0].bool()]
    torch.testing.assert_close(embed_prompts(policy, x)[0], unit(states.mean(0)), rtol=1e-5, atol=1e-5)
    assert encode_texts(policy, TEXTS[:1], rationale=False).rationales == [""]
    encoder = GraceEncoder(policy, rationale=False)
    assert encoder.rationales(TEXTS) == [""] * 3 and encoder.counts["unfinished"] == 0


def test_text_loss(make_policy):
    """The mean over all tokens of the texts, one text at a time."""
    policy = make_policy()
    nats, count = 0.0, 0
    for text in TEXTS:
        x = policy.prompts([text])
        logprobs = torch.log_softmax(policy.model(input_ids=x.ids).logits, -1)[0]
        for at in x.text[0].nonzero()[:, 0].tolist():
            nats -= logprobs[at - 1, x.ids[0, at]].item()
            count += 1
    assert count == sum(len(t.split()) for t in TEXTS)
    assert text_loss(policy, TEXTS) == pytest.approx(nats / count, rel=1e-5)


# ---------------------------------------------------------------- with a memory on disk


@pytest.fixture
def read(monkeypatch):
    """The texts that the policy really read, in order."""
    texts_read = []

    def counting(policy, texts, *more):
        texts_read.extend(texts)
        return encode_batch(policy, texts, *more)

    monkeypatch.setattr(encoder_module, "encode_batch", counting)
    return texts_read


def test_encoder_is_encode_texts(make_policy):
    policy = make_policy()
    expected = encode_texts(policy, TEXTS)
    encoder = GraceEncoder(policy)
    np.testing.assert_allclose(encoder.encode(TEXTS), expected.vectors, atol=1e-6)
    assert encoder.rationales(TEXTS) == expected.rationales
    assert encoder.encode(TEXTS).dtype == np.float32


def test_bfloat16_is_the_type_of_the_weights(tiny_world, read):
    """An encoder never changes its weights, so in bfloat16 it reads half as many bytes; the vectors nearly stay."""
    exact, rounded = (GraceEncoder(str(tiny_world / "model"), device="cpu", dtype=dtype) for dtype in ("float32", "bfloat16"))
    assert {p.dtype for p in rounded.policy.model.parameters()} == {torch.bfloat16}
    assert rounded.settings != exact.settings  # another memory
    texts = [TEXTS[0], TEXTS[2]]
    vectors = rounded.encode(texts)
    assert vectors.dtype == np.float32 and abs(np.linalg.norm(vectors, axis=1) - 1).max() < 1e-5
    bare = [GraceEncoder(x.policy, rationale=False).encode(texts) for x in (exact, rounded)]
    assert (bare[0] * bare[1]).sum(1).min() > 0.99


def test_no_text_is_read_twice(make_policy, read, tmp_path):
    policy = make_policy()
    first = GraceEncoder(policy, cache=tmp_path)
    many = first.encode([TEXTS[0], TEXTS[1], TEXTS[0], ""])
    assert sorted(read) == sorted([TEXTS[0], TEXTS[1], ""]) and (many[0] == many[2]).all()
    assert first.counts["empty"] == 1 and np.isfinite(many).all()
    again = GraceEncoder(policy, cache=tmp_path)  # as another process would
    assert (again.encode([TEXTS[1], TEXTS[0]]) == many[[1, 0]]).all() and len(read) == 3
    assert again.counts["read"] == 0 and again.counts["remembered"] == 2


def test_flags_are_remembered_too(make_policy, tmp_path):
    """A resumed evaluation reports what it cut and what did not finish, read now or remembered."""
    policy = make_policy(max_new_tokens=2)
    policy.reading.max_prompt_tokens = 12
    counts = []
    for _ in range(2):
        encoder = GraceEncoder(policy, cache=tmp_path)
        encoder.encode([*TEXTS, ""])
        counts.append({k: v for k, v in encoder.counts.items() if k not in ("read", "remembered")})
    assert counts[0] == counts[1] and counts[0]["cut"] == 2 and counts[0]["empty"] == 1 and counts[0]["unfinished"] > 0


def test_a_policy_brings_its_own_reading(make_policy, tmp_path):
    with pytest.raises(GraceError, match="brings its own reading"):
        GraceEncoder(make_policy(), max_new_tokens=3)
    (tmp_path / "file").write_text("")
    with pytest.raises(GraceError, match="cannot be a cache folder"):
        GraceEncoder(make_policy(), cache=tmp_path / "file")


def test_another_reading_is_another_memory(make_policy, read, tmp_path):
    policies = [make_policy(), make_policy(seed=1), make_policy(max_new_tokens=3), make_policy(pooling="eos")]
    assert len({fingerprint(p.model) for p in policies[:2]}) == 2
    for policy in policies:
        GraceEncoder(policy, cache=tmp_path).encode(TEXTS[:1])
    for more in ({"rationale": False}, {"temperature": 1.0}, {"temperature": 1.0, "seed": 1}):
        GraceEncoder(policies[0], cache=tmp_path, **more).encode(TEXTS[:1])
    assert len(read) == 7 and len(os.listdir(tmp_path)) == 7


def test_models_with_other_settings_have_another_fingerprint(make_policy, tmp_path):
    """The same weights under another configuration embed otherwise; saved and loaded they are the same model."""
    policy = make_policy()
    policy.save(tmp_path)
    first = fingerprint(policy.model)
    assert fingerprint(Policy.load(str(tmp_path)).model) == first == fingerprint(policy.frozen_copy().model)
    about = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(about | {"rms_norm_eps": 0.1}))
    assert fingerprint(Policy.load(str(tmp_path)).model) != first


def test_sampling_repeats_by_seed(make_policy):
    policy = make_policy()
    one, same, other = (GraceEncoder(policy, temperature=1.0, seed=s).encode(TEXTS) for s in (0, 0, 1))
    assert (one == same).all() and abs(one - other).max() > 0.01
    both = MeanEncoder([GraceEncoder(policy, temperature=1.0, seed=s) for s in (0, 1)]).encode(TEXTS)
    mean = (one + other) / 2
    np.testing.assert_allclose(both, mean / np.linalg.norm(mean, axis=1, keepdims=True), atol=1e-6)


def test_bad_texts_vectors_and_files(make_policy, tmp_path, monkeypatch):
    policy = make_policy()
    with pytest.raises(GraceError, match="text 1 is 3, not a string"):
        GraceEncoder(policy).encode(["a", 3])
    with pytest.raises(GraceError, match="no texts to encode"):
        GraceEncoder(policy).encode([])
    encoder = GraceEncoder(policy, cache=tmp_path)
    encoder.memory.close()
    with open(encoder.path, "r+b") as file:
        file.write(b"garbage" * 20)
    with pytest.raises(GraceError, match="damaged cache .*Delete the file"):
        GraceEncoder(policy, cache=tmp_path).encode(TEXTS)
    encoder = GraceEncoder(policy, cache=tmp_path / "full")
    encoder.memory.execute("PRAGMA query_only = ON")
    with pytest.raises(GraceError, match="sqlite: cannot be written .attempt to write a readonly database.; make room"):
        encoder.encode(TEXTS)
    flags = np.zeros(1, bool)
    broken = lambda policy, texts, *more: Encoded(np.full((1, 4), np.nan, np.float32), [""], flags, flags)
    monkeypatch.setattr(encoder_module, "encode_batch", broken)
    with pytest.raises(GraceError, match="'somebody sold the boat' is not finite"):
        GraceEncoder(policy).encode([TEXTS[1]])


def test_memory_survives_a_kill(tiny_world, tmp_path):
    """SIGKILL while reading; what was read stays, the rest is read, and the result is the one never interrupted."""
    texts = [f"the old doctor sold the boat near the inn around noon . {'the ' * (i % 17)}w{i}" for i in range(1000)]
    program = (
        "import sys, json; from evaluation.encoder import GraceEncoder; "
        f"GraceEncoder({str(tiny_world / 'model')!r}, cache={str(tmp_path)!r}, tokens_per_batch=600)"
        ".encode(json.load(sys.stdin))"
    )
    process = subprocess.Popen([sys.executable, "-c", program], stdin=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    process.stdin.write(json.dumps(texts))
    process.stdin.close()
    for _ in range(6000):  # at most two minutes
        time.sleep(0.02)
        if any(name.endswith(".sqlite") and os.path.getsize(tmp_path / name) > 100_000 for name in os.listdir(tmp_path)):
            break
        assert process.poll() is None, process.stderr.read()
    process.send_signal(signal.SIGKILL)
    process.wait()
    again = GraceEncoder(f"{tiny_world}/model", cache=tmp_path)
    vectors = again.encode(texts)
    assert 0 < again.counts["remembered"] < 1000 and again.counts["remembered"] + again.counts["read"] == 1000
    np.testing.assert_allclose(vectors, GraceEncoder(again.policy).encode(texts), atol=1e-5)


# ---------------------------------------------------------------- the command line


def test_the_command_line(tiny_world, tmp_path, capsys):
    given = ["--model", f"{tiny_world}/model", "--data-dir", f"{tiny_world}/tasks", "--cache", str(tmp_path / "cache")]
    eval_mteb_subset.main([*given, "--tasks", "ToyRetrieval", "ToyPairs", "--out", str(tmp_path / "out" / "r.json")])
    printed = capsys.readouterr().out
    assert "ToyPairs" in printed and "mean: retrieval" in printed and ", 0 remembered" in printed
    with open(tmp_path / "out" / "r.json") as file:
        record = json.load(file)
    assert record["settings"]["instruction"] == "name what happened" and record["settings"]["fingerprint"]
    assert record["texts"]["read"] > 0 and {"torch", "transformers", "numpy"} <= record["versions"].keys()
    eval_mteb_subset.main([*given, "--tasks", "ToyPairs", "--temperature", "1", "--samples", "2", "--device", "cpu"])
    assert "+-" in capsys.readouterr().out


@pytest.mark.parametrize(
    "flags, message",
    [
        ("--tasks STS99", "unknown task"),
        ("--tasks STS12", "no such folder"),
        ("--tasks ToyPairs --samples 3", "needs --temperature above 0"),
        ("--tasks ToyPairs --temperature -1", "give 0 for greedy"),
        ("--tasks ToyPairs --model no/such/model", "cannot be loaded"),
    ],
)
def test_bad_flags(tiny_world, tmp_path, flags, message):
    given = f"--model {tiny_world}/model --data-dir {tiny_world}/tasks --cache {tmp_path} {flags}"
    with pytest.raises(SystemExit) as stop:
        eval_mteb_subset.main(given.split())
    assert message in str(stop.value)
