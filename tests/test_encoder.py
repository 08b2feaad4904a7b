"""The encoder: texts in any company get the same vectors, nothing is read twice or lost, and errors say what to do."""

import copy
import json
import math
import os
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
from conftest import TEXTS, embedded

import eval_mteb_subset
from evaluation import encoder as encoder_module
from evaluation.encoder import GraceEncoder, encode_batch, encode_texts, fingerprint, text_loss, token_batches
from evaluation.tasks import evaluate_triplets
from plumbing.errors import GraceError
from policy import Policy

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
    """Every text once, in batches whose padded tokens are near the budget: a text's tokens are an estimate."""
    texts, policy = [TEXTS[i % 3] + " x" * i for i in range(40)], make_policy()
    batches = list(token_batches(texts, 300, policy))
    assert sorted(sum(batches, [])) == sorted(texts) and len(batches) > 3
    for batch in batches:
        prompts = policy.template(batch, share=False)
        assert len(batch) == 1 or len(batch) * (prompts.ids.shape[1] + policy.reading.max_new_tokens) <= 2 * 300


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
    bare = GraceEncoder(policy, rationale=False)
    np.testing.assert_allclose(bare.encode(TEXTS[:1])[0], embedded(policy, TEXTS[0])[0].detach(), rtol=1e-5, atol=1e-5)
    assert bare.rationales(TEXTS) == [""] * 3 and bare.counts["unfinished"] == 0
    assert encoder.encode([]).shape == encoder.encode_document([]).shape == (0, vectors.shape[1])
    with ThreadPoolExecutor(1) as pool:  # as a web demo calls it
        assert (pool.submit(encoder.encode, TEXTS).result() == vectors).all()
    for wrong in (dict(temperature=math.nan), dict(temperature=1.0, seed=-1)):
        with pytest.raises(GraceError, match="give 0 for greedy decoding"):
            GraceEncoder(policy, **wrong)


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
    for name in ("distinct", "cut", "unfinished"):
        assert first.counts[name] == again.counts[name] > 0


def test_documents_may_be_read_alone(make_policy):
    """As queries do, they write, unless the checkpoint's reading says that their prompt is enough."""
    policy = make_policy(documents="prompt")
    encoder, bare = GraceEncoder(policy), GraceEncoder(policy, rationale=False).encode(TEXTS)
    assert (encoder.encode_document(TEXTS) == bare).all() and not np.allclose(encoder.encode_query(TEXTS), bare, atol=1e-3)
    writes = GraceEncoder(make_policy())
    assert (writes.encode_document(TEXTS) == writes.encode(TEXTS)).all()
    positives = TEXTS[1:] + TEXTS[:1]
    right = (encoder.encode_query(TEXTS) @ encoder.encode_document(positives).T).argmax(1) == np.arange(3)
    rows = [{"query": one, "positive": two, "negative": []} for one, two in zip(TEXTS, positives)]
    assert evaluate_triplets(policy, rows)["top1"] == right.mean()


def test_another_reading_is_another_memory(make_policy, read, tmp_path):
    policies = [make_policy(), make_policy(seed=1), make_policy(max_new_tokens=3), make_policy(pooling="eos")]
    for policy in [*policies, policies[0].reads(twice=True)]:
        GraceEncoder(policy, cache=tmp_path).encode(TEXTS[:1])
    for more in ({"rationale": False}, {"temperature": 1.0}, {"temperature": 0.5}, {"temperature": 1.0, "seed": 1}):
        GraceEncoder(policies[0], cache=tmp_path, **more).encode(TEXTS[:1])
    assert len(read) == 9 and len(os.listdir(tmp_path)) == 9


def test_models_with_other_settings_have_another_fingerprint(make_policy, tmp_path):
    """The same weights under another configuration embed otherwise; saved and loaded they are the same model."""
    policy = make_policy()
    policy.save(tmp_path)
    first = fingerprint(policy.model)
    assert fingerprint(Policy.load(str(tmp_path)).model) == first == fingerprint(copy.deepcopy(policy).model)
    about = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(about | {"rms_norm_eps": 0.1}))
    assert fingerprint(Policy.load(str(tmp_path)).model) != first


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
    given += ["--tasks", "ToyRetrieval", "ToyPairs", "--out", str(tmp_path / "out" / "r.json")]
    eval_mteb_subset.main(given)
    printed = capsys.readouterr().out
    assert "ToyPairs" in printed and "mean: retrieval" in printed and "remembered 0," in printed and "paper" not in printed
    record = json.loads((tmp_path / "out" / "r.json").read_text())
    assert record["settings"]["instruction"] == "name what happened" and record["settings"]["fingerprint"]
    assert record["texts"]["read"] > 0 and {"torch", "transformers", "numpy"} <= record["versions"].keys()
    (memory,) = (tmp_path / "cache").iterdir()
    memory.write_bytes(b"garbage" * 20)
    with pytest.raises(SystemExit, match="cannot be used .*: make room, delete the file if it is damaged"):
        eval_mteb_subset.main(given)
    with pytest.raises(SystemExit, match="unknown task 'STS99'"):
        eval_mteb_subset.main([*given, "--tasks", "STS99"])
    with pytest.raises(SystemExit, match="has no folder STS12; of the tasks it has ToyRetrieval, ToyPairs"):
        eval_mteb_subset.main([*given, "--tasks", "ToyPairs,STS12,STS13", "--out", str(tmp_path / "none.json")])
    assert not (tmp_path / "none.json").exists()


def test_the_papers_mean_stands_beside_all_sixteen():
    results = {name: {"main_score": 0.5, "seconds": 1.0} for name in eval_mteb_subset.SUBSET}
    assert "50.00  (55.89 in the paper" in eval_mteb_subset.table(results)
