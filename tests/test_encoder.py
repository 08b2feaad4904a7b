"""The encoder: texts in any company get the same vectors, nothing is read twice or lost, and errors say what to do."""

import json
import os

import numpy as np
import pytest
import torch
from conftest import TEXTS

import eval_mteb_subset
from evaluation import encoder as encoder_module
from evaluation.encoder import Encoded, GraceEncoder, encode_batch, encode_texts, fingerprint, text_loss, token_batches
from plumbing.errors import GraceError
from policy import Policy
from pool import unit

# ---------------------------------------------------------------- in batches


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_company_does_not_matter(make_policy, temperature):
    """Alone, in a batch, in another order, repeated: the same embedding and rationale."""
    policy = make_policy()
    whole = encode_texts(policy, TEXTS, temperature=temperature)
    for i, text in enumerate(TEXTS):
        alone = encode_texts(policy, [text], temperature=temperature)
        np.testing.assert_allclose(alone.vectors[0], whole.vectors[i], rtol=1e-5, atol=1e-5)
        assert alone.rationales[0] == whole.rationales[i]
    order = [2, 0, 1, 0]
    shuffled = encode_texts(policy, [TEXTS[i] for i in order], temperature=temperature, tokens_per_batch=1)
    np.testing.assert_allclose(shuffled.vectors, whole.vectors[order], rtol=1e-5, atol=1e-5)
    another = encode_texts(policy, TEXTS, temperature=temperature, seed=1)
    assert (abs(another.vectors - whole.vectors).max() > 0.01) == (temperature > 0)


def test_token_batches(make_policy):
    """Every text once, within the budget."""
    texts = [TEXTS[i % 3] + " x" * i for i in range(40)]
    parts = list(token_batches(texts, 300, make_policy()))
    assert sorted(i for part in parts for i in part) == list(range(40)) and len(parts) > 3


def test_too_little_memory(make_policy, monkeypatch, capsys):
    """A batch that is too large is read in halves, and every text gets the vector that it gets with memory enough."""
    policy, texts, sizes = make_policy(), [f"text number {i}" for i in range(7)], []
    expected = encode_texts(policy, texts).vectors

    def small(policy, batch, *args, most=2):
        sizes.append(len(batch))
        if len(batch) > most:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return encode_batch(policy, batch, *args)

    monkeypatch.setattr(encoder_module, "encode_batch", small)
    assert abs(encode_texts(policy, texts).vectors - expected).max() < 1e-5
    assert sizes == [7, 3, 1, 2, 4, 2, 2] and "reading 7 texts: reading them in halves" in capsys.readouterr().out
    monkeypatch.setattr(encoder_module, "encode_batch", lambda *args: small(*args, most=0))
    with pytest.raises(GraceError, match="out of memory with one text: lower --max-new-tokens"):
        encode_texts(policy, texts)


def test_without_rationale(make_policy):
    """The prompt alone, pooled."""
    policy = make_policy()
    x = policy.template(TEXTS[:1])
    with torch.no_grad():
        states = policy.model.base_model(input_ids=x.ids).last_hidden_state[0][x.counted[0].bool()]
    encoder = GraceEncoder(policy, rationale=False)
    np.testing.assert_allclose(encoder.encode(TEXTS[:1])[0], unit(states.mean(0)), rtol=1e-5, atol=1e-5)
    assert encoder.rationales(TEXTS) == [""] * 3 and encoder.counts["unfinished"] == 0


def test_text_loss(make_policy):
    """The mean over all tokens of the texts, one text at a time."""
    policy = make_policy()
    nats, count = 0.0, 0
    for text in TEXTS:
        x = policy.template([text])
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
    expected, encoder = encode_texts(policy, TEXTS), GraceEncoder(policy)
    vectors = encoder.encode(TEXTS)
    np.testing.assert_allclose(vectors, expected.vectors, atol=1e-6)
    assert encoder.rationales(TEXTS) == expected.rationales and vectors.dtype == np.float32
    assert (encoder.encode(TEXTS[0]) == vectors[0]).all() and encoder.rationales(TEXTS[0]) == expected.rationales[0]


def test_bfloat16_is_the_type_of_the_weights(tiny_world):
    """An encoder never changes its weights, so in bfloat16 it reads half as many bytes; the vectors nearly stay."""
    exact, rounded = (GraceEncoder(str(tiny_world / "model"), device="cpu", dtype=dtype) for dtype in ("float32", "bfloat16"))
    assert {p.dtype for p in rounded.policy.model.parameters()} == {torch.bfloat16}
    assert rounded.settings != exact.settings  # another memory
    bare = [GraceEncoder(x.policy, rationale=False).encode(TEXTS) for x in (exact, rounded)]
    assert bare[1].dtype == np.float32 and (bare[0] * bare[1]).sum(1).min() > 0.99


def test_no_text_is_read_twice(make_policy, read, tmp_path):
    """Not in another process either, and what was cut or did not finish is counted there too."""
    policy = make_policy(max_new_tokens=2)
    policy.reading.max_prompt_tokens = 12
    first, again = (GraceEncoder(policy, cache=tmp_path) for _ in range(2))
    many = first.encode([TEXTS[0], TEXTS[1], TEXTS[0], ""])
    assert sorted(read) == sorted([TEXTS[0], TEXTS[1], ""]) and (many[0] == many[2]).all() and np.isfinite(many).all()
    assert (again.encode([TEXTS[1], "", TEXTS[0]]) == many[[1, 3, 0]]).all() and len(read) == 3
    assert again.counts["read"] == 0 and again.counts["remembered"] == 3
    for name in ("distinct", "empty", "cut", "unfinished"):
        assert first.counts[name] == again.counts[name] > 0


def test_another_reading_is_another_memory(make_policy, read, tmp_path):
    policies = [make_policy(), make_policy(seed=1), make_policy(max_new_tokens=3), make_policy(pooling="eos")]
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


def test_what_cannot_be_encoded(make_policy, monkeypatch):
    policy, flags = make_policy(), np.zeros(1, bool)
    with pytest.raises(GraceError, match="text 1 is 3, not a string"):
        GraceEncoder(policy).encode(["a", 3])
    with pytest.raises(GraceError, match="brings its own reading"):
        GraceEncoder(policy, max_new_tokens=3)
    for value in (np.nan, 0):
        vector = np.full((1, 4), value, np.float32)
        monkeypatch.setattr(encoder_module, "encode_batch", lambda *args: Encoded(vector, [""], flags, flags))  # noqa: B023
        with pytest.raises(GraceError, match="'somebody sold the boat' is zero or not finite"):
            GraceEncoder(policy).encode([TEXTS[1]])


def test_a_cache_that_cannot_be_used(make_policy, tmp_path):
    policy = make_policy()
    (tmp_path / "file").write_text("")
    with pytest.raises(GraceError, match="this cache cannot be used .*delete the file, or give another cache folder"):
        GraceEncoder(policy, cache=tmp_path / "file")
    encoder = GraceEncoder(policy, cache=tmp_path)
    encoder.memory.execute("PRAGMA query_only = ON")
    with pytest.raises(GraceError, match="attempt to write a readonly database"):
        encoder.encode(TEXTS)
    encoder.memory.close()
    with open(encoder.path, "r+b") as file:
        file.write(b"garbage" * 20)
    with pytest.raises(GraceError, match="sqlite: this cache cannot be used"):
        GraceEncoder(policy, cache=tmp_path).encode(TEXTS)


def test_an_interrupted_evaluation_goes_on(make_policy, read, tmp_path, monkeypatch):
    """Each batch that was read stays on the disk, and the result is the one never interrupted."""
    texts, counting = [f"{'the ' * i}boat" for i in range(20)], encoder_module.encode_batch

    def interrupted(*args):
        if len(read) > 10:
            raise KeyboardInterrupt
        return counting(*args)

    monkeypatch.setattr(encoder_module, "encode_batch", interrupted)
    with pytest.raises(KeyboardInterrupt):
        GraceEncoder(make_policy(), cache=tmp_path, tokens_per_batch=60).encode(texts)
    monkeypatch.setattr(encoder_module, "encode_batch", counting)
    again = GraceEncoder(make_policy(), cache=tmp_path)
    vectors = again.encode(texts)
    assert again.counts["remembered"] > 10 and sorted(read) == sorted(texts)
    np.testing.assert_allclose(vectors, encode_texts(make_policy(), texts).vectors, atol=1e-5)


# ---------------------------------------------------------------- the command line


def test_the_command_line(tiny_world, tmp_path, capsys):
    given = ["--model", f"{tiny_world}/model", "--data-dir", f"{tiny_world}/tasks", "--cache", str(tmp_path / "cache")]
    eval_mteb_subset.main([*given, "--tasks", "ToyRetrieval", "ToyPairs", "--out", str(tmp_path / "out" / "r.json")])
    printed = capsys.readouterr().out
    assert "ToyPairs" in printed and "mean: retrieval" in printed and ", 0 remembered" in printed and "paper" not in printed
    with open(tmp_path / "out" / "r.json") as file:
        record = json.load(file)
    assert record["settings"]["instruction"] == "name what happened" and record["settings"]["fingerprint"]
    assert record["texts"]["read"] > 0 and {"torch", "transformers", "numpy"} <= record["versions"].keys()


def test_the_papers_mean_stands_beside_all_sixteen_alone():
    results = {name: {"main_score": 0.5, "seconds": 1.0} for name in eval_mteb_subset.SUBSET}
    assert "55.89 in the paper" in eval_mteb_subset.table(results)
    del results["STS17"]
    assert "paper" not in eval_mteb_subset.table(results) and "all 16" not in eval_mteb_subset.table(results)


@pytest.mark.parametrize(
    "flags, message",
    [
        ("--tasks STS99", "unknown task"),
        ("--tasks STS12", "no such folder"),
        ("--tasks ToyPairs --temperature -1", "give 0 for greedy"),
        ("--tasks ToyPairs --model no/such/model", "no such folder"),
        ("--tasks ToyPairs --model no/such/model --out /proc/x/r.json", "--out /proc/x/r.json: cannot be written"),
        ("--tasks ToyPairs --model no/such/model --out /tmp", "--out /tmp: cannot be written"),
    ],
)
def test_bad_flags(tiny_world, tmp_path, flags, message):
    """The last two are told before the model is loaded: an evaluation takes hours."""
    given = f"--model {tiny_world}/model --data-dir {tiny_world}/tasks --cache {tmp_path} {flags}"
    with pytest.raises(SystemExit) as stop:
        eval_mteb_subset.main(given.split())
    assert message in str(stop.value)


def test_ctrl_c(monkeypatch, capsys):
    def interrupted(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr(eval_mteb_subset, "GraceEncoder", interrupted)
    with pytest.raises(SystemExit, match="130"):
        eval_mteb_subset.main(["--model", "x"])
    assert capsys.readouterr().err.strip().startswith("stopped; the vectors read so far are in --cache")
