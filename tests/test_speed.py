"""speed/: decoding with prompts kept once, and recomputed layers, give the same numbers as the plain ways."""

import importlib.util
import os
import subprocess
import sys
from contextlib import nullcontext
from types import SimpleNamespace
from unittest.mock import Mock

import pytest
import torch
from conftest import SMALL, TEXTS, gradient, rolled
from speed.recompute import recompute_layers

from plumbing.errors import GraceError
from rollout import sample, score
from speed import decode

# ---------------------------------------------------------------- decoding


def cache_of(policy):
    """The prompts' key-value cache and mask."""
    x = policy.prompts(TEXTS)
    with torch.no_grad():
        return policy.prefill(x.ids, x.mask, x.n_shared)[2], x.mask


@pytest.mark.parametrize("architecture", [a for a in SMALL if a != "Gemma2"])
def test_prompts_once(make_policy, architecture, monkeypatch):
    """Token by token it decodes as the library's cache does; as it is, and by the bucket as a captured step reads.

    On the way finished rows leave: three prompts of three rollouts become two prompts of two.
    """
    monkeypatch.setattr(decode, "BUCKET", 2)
    policy = make_policy(architecture, double=True)
    assert policy.prompts_once
    tokens = torch.randint(6, 150, (6, 9), generator=torch.Generator().manual_seed(0))
    writing = torch.tensor([0, 0, 0, 1, 0, 1, 1, 0, 1], dtype=torch.bool)
    states = []
    for make in (decode.PlainDecoder, decode.SharedDecoder, lambda *a: decode.SharedDecoder(*a, fixed=True)):
        with torch.no_grad():
            decoder = make(policy, *cache_of(policy), 3)
            steps = [decoder.step(tokens[t])[0].clone() for t in range(3)]
            decoder.drop_finished(writing)
            assert decoder.rows.tolist() == [3, 5, 6, 8]
            steps += [decoder.step(tokens[t][decoder.rows])[0].clone() for t in range(3, 6)]
        states.append(steps)
    for plain, shared, fixed in zip(*states):
        torch.testing.assert_close(shared, plain, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(fixed, shared, rtol=1e-9, atol=1e-9)


INTERPRETED = """
from types import SimpleNamespace

import torch
from speed import decode, decode_triton

for N, K, heads, G, d, P, T, at in ((2, 3, 2, 3, 20, 70, 80, 66), (3, 1, 1, 1, 64, 9, 5, 0), (1, 4, 2, 17, 16, 64, 64, 63)):
    generator = torch.Generator().manual_seed(0)
    draw = lambda *shape: torch.randn(*shape, generator=generator)
    layer = SimpleNamespace(prompt_keys=draw(N, heads, P, d), prompt_values=draw(N, heads, P, d))
    mask = torch.arange(P) >= torch.tensor([0, P - 1, P // 2])[:N, None]  # padding on the left, whole blocks of it
    query, keys, values = draw(N * K, heads * G, 1, d), *draw(2, N * K, heads, T, d)
    results = []
    for fused in (False, True):
        cache = SimpleNamespace(layers=[layer], fused=fused, at=torch.tensor([at]), filled=torch.arange(T) <= at)
        results.append(decode.attend(SimpleNamespace(layer_idx=0), query, keys, values, mask[:, None, None], None, cache)[0])
    torch.testing.assert_close(*results, rtol=1e-5, atol=1e-6)
    print("equal")
assert decode.can_fuse(6, 2, 20, torch.float32, "cpu") and not decode.can_fuse(6, 2, 20, torch.float64, "cpu")
print("fits")
"""


@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="triton is not installed")
def test_the_fused_attention_in_the_interpreter():
    """It is the plain one. In a process of its own, because Triton reads TRITON_INTERPRET when it is imported."""
    environment = {**os.environ, "TRITON_INTERPRET": "1", "PYTHONPATH": "."}
    result = subprocess.run([sys.executable, "-c", INTERPRETED], env=environment, capture_output=True, text=True)
    assert result.stdout.count("equal") == 3 and "fits" in result.stdout, result.stderr


@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="triton is not installed")
def test_where_triton_cannot_run_it_says_so():
    """Here: outside its interpreter, on a CPU."""
    with pytest.warns(UserWarning, match="attention is done in torch, which is slower"):
        assert not decode.can_fuse(4, 2, 16, torch.float32, "cpu")


def test_attention_that_does_not_come_apart(make_policy):
    """It uses the library's cache."""
    policy = make_policy("Gemma2")  # soft-capped scores, sliding windows
    assert not policy.prompts_once and isinstance(policy.decoder(*cache_of(policy), 2), decode.PlainDecoder)


def test_decoder_rows(make_policy, monkeypatch):
    """Which rollouts are in the batch: those still writing, and as many beside them as the busiest group needs."""
    policy = make_policy()
    for make in (decode.PlainDecoder, decode.SharedDecoder):
        decoder = make(policy, *cache_of(policy), 3)
        assert decoder.rows.tolist() == [*range(9)] and decoder.K == 3
        writing = torch.ones(9, dtype=torch.bool)
        writing[4] = False
        decoder.drop_finished(writing)  # the second group is as large as the others: nothing can go
        assert decoder.rows.tolist() == [*range(9)]
        writing[[0, 1, 2, 3]] = False
        decoder.drop_finished(writing)
        assert decoder.rows.tolist() == [5, 3, 4, 6, 7, 8] and decoder.K == 3
        writing[[6, 7]] = False
        monkeypatch.setattr(decode.Decoder, "drop_below", 0.3)
        decoder.drop_finished(writing)  # two of six rows are more than 0.3 of them
        assert len(decoder.rows) == 6
        monkeypatch.undo()
        decoder.drop_finished(writing)
        assert decoder.rows.tolist() == [5, 8] and decoder.K == 1  # places among all nine, not in the batch before


def test_when_finished_rows_leave(make_policy, monkeypatch):
    """Greedy rationales, log-probabilities and embeddings: rows dropped at each token, rarely or never."""
    policy, results = make_policy(max_new_tokens=14, eos_token_id=list(range(5, 150, 12))), []
    texts = [f"{a} {b}" for a in TEXTS for b in ("somebody sold the boat", "the lamp", "around noon .")]
    for every, share in ((1, 1.0), (1, 0.5), (4, 0.9), (100, 1.0)):
        monkeypatch.setattr(decode.Decoder, "look_every", every)
        monkeypatch.setattr(decode.Decoder, "drop_below", share)
        results.append(sample(policy, policy.prompts(texts), 1, temperature=0.0))
    first = results[0]
    assert first.mask.sum(2).unique().numel() > 2  # they end at different times
    for other in results[1:]:
        assert torch.equal(other.ids, first.ids) and torch.equal(other.finished, first.finished)
        torch.testing.assert_close(other.logprobs, first.logprobs, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(other.embeddings, first.embeddings, rtol=1e-4, atol=1e-5)


def test_a_capture_that_fails(make_policy, monkeypatch):
    """Too little memory is the caller's to handle; after any other failure the step runs as it is, and says so."""
    stream = SimpleNamespace(wait_stream=lambda other: None)
    fakes = {"Stream": lambda: stream, "current_stream": lambda: stream, "CUDAGraph": object}
    fakes |= {"stream": lambda s: nullcontext(), "graph": lambda g, stream: nullcontext()}
    for name, fake in fakes.items():
        monkeypatch.setattr(torch.cuda, name, fake)
    decode.side_stream.cache_clear()
    policy = make_policy(double=True)
    token = torch.arange(6, 15)
    plain = decode.PlainDecoder(policy, *cache_of(policy), 3)
    decoder = decode.SharedDecoder(policy, *cache_of(policy), 3, capture=True)
    forward = decoder._forward
    for error in (torch.OutOfMemoryError("too little"), RuntimeError("operation not permitted when stream is capturing")):
        failing = Mock(side_effect=[error])
        monkeypatch.setattr(decoder, "_forward", failing)
        if isinstance(error, torch.OutOfMemoryError):
            with pytest.raises(torch.OutOfMemoryError):
                decoder._captured()
        else:
            with pytest.warns(UserWarning, match="so it is slower"):
                assert decoder._captured() is failing
    monkeypatch.setattr(decoder, "_forward", forward)
    with torch.no_grad():
        torch.testing.assert_close(decoder.step(token)[0], plain.step(token)[0], rtol=1e-9, atol=1e-9)
    decode.side_stream.cache_clear()


def test_pack():
    writing = torch.tensor([[0, 1, 0], [0, 0, 0], [1, 0, 1]], dtype=torch.bool)
    rows, groups = decode.pack(writing)
    assert groups.tolist() == [0, 2]
    assert rows.tolist() == [1, 0, 6, 8]  # as many rows per group as the busiest needs; those still writing first
    rows, groups = decode.pack(torch.zeros(2, 3, dtype=torch.bool))
    assert len(rows) == len(groups) == 0


# ---------------------------------------------------------------- recomputed layers


@pytest.mark.parametrize("architecture", ["Qwen2", "Qwen3", "Llama", "Gemma", "Cohere"])
def test_recomputed_layers(make_policy, architecture):
    """The same gradient, and less kept for it."""
    results = []
    for recompute in (False, True):
        policy = make_policy(architecture, double=True)
        rollouts = rolled(policy, K=3)
        if recompute:
            recompute_layers(policy)
        kept = {}
        keep = lambda x: (kept.setdefault(x.data_ptr(), x.numel()), x)[1]  # noqa: B023
        with torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x):
            scores = score(policy, rollouts)
        value = scores.logprobs.sum() + scores.embeddings[..., :5].sum()
        results.append((gradient(policy, value), sum(kept.values())))
    (plain, kept_plain), (recomputed, kept_less) = results
    torch.testing.assert_close(recomputed, plain, rtol=1e-9, atol=1e-9 * float(plain.abs().max()))
    assert kept_less < 0.7 * kept_plain


@pytest.mark.parametrize("architecture", ["Gemma2", "GPT2"])
def test_layers_that_cannot_be_recomputed(make_policy, architecture):
    with pytest.raises(GraceError, match="leave out --recompute"):
        recompute_layers(make_policy(architecture))
