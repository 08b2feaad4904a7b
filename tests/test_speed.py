"""speed/: decoding with prompts kept once, and without the rows that have ended, gives the numbers of the plain way."""

import copy

import pytest
import torch
from conftest import TEXTS, interpreted, needs_triton

from rollout import sample, uniforms
from speed import bfloat16, decode


@pytest.mark.parametrize("architecture", ["Qwen3", "GPT2"])
def test_packing_changes_nothing(make_policy, monkeypatch, architecture):
    """Prompts once or K times, rows left out at each token or rarely: what a PlainDecoder writes that never leaves any out."""
    policy = make_policy(architecture, double=True, max_new_tokens=14)
    assert policy.shares_prompts
    sizes = []

    def written(make, look_every, leave_out_at):
        def decoder(*args):
            made = make(policy, *args)
            made.look_every, made.leave_out_at, feed = look_every, leave_out_at, made.feed
            made.feed = lambda token: sizes.append(len(token)) or feed(token)
            return made

        monkeypatch.setattr(policy, "decoder", decoder)
        return sample(policy, policy.template(TEXTS), 6, 1.0, uniforms(2, 3, 6, 14))

    plain = written(decode.PlainDecoder, 10**6, 1)
    assert set(sizes) == {18} and plain.mask.sum(2).unique().numel() > 2  # they end at different times
    near = 1e-12 if architecture == "GPT2" else 1e-5  # the others normalize in float32, whatever the weights
    for make in (decode.PlainDecoder, decode.SharedDecoder):
        for look_every, leave_out_at in ((1, 0.1), (1, 0.5), (4, 0.1)):
            sizes.clear()
            packed = written(make, look_every, leave_out_at)
            assert sizes[0] == 18 and min(sizes) <= 9
            assert leave_out_at > 0.1 or any(size % 3 for size in sizes)  # groups are left out, too: three texts are not left
            assert torch.equal(packed.ids, plain.ids) and torch.equal(packed.finished, plain.finished)
            torch.testing.assert_close(packed.embeddings, plain.embeddings, rtol=0, atol=near)
            torch.testing.assert_close(packed.logprobs, plain.logprobs, rtol=near, atol=near)


# ---------------------------------------------------------------- bfloat16


def test_a_gradient_that_does_not_fit_is_gone(monkeypatch):
    """Where the memory ends while a gradient is handed over, a step that is made again does not find it."""
    weight, low = torch.nn.Parameter(torch.ones(3)), torch.nn.Parameter(torch.ones(3, dtype=torch.bfloat16))
    low.grad = torch.ones_like(low)

    def full(*args):
        raise torch.OutOfMemoryError

    with monkeypatch.context() as short, pytest.raises(torch.OutOfMemoryError):
        short.setattr(torch.Tensor, "float", full)
        bfloat16._deliver(weight, low)
    assert weight.grad is None and low.grad is None


def test_gradients_in_bfloat16_arrive_at_float32_weights(make_policy):
    """Two passes of a network in bfloat16 as torch makes it; their gradients are added in float32."""
    policy = make_policy("Llama", dtype="bfloat16", tie_word_embeddings=True)
    plain, expected = copy.deepcopy(policy.model), {}
    for p in plain.parameters():
        p.data = p.data.bfloat16()
    for ids in torch.randint(6, 150, (2, 1, 9), generator=torch.Generator().manual_seed(0)):
        for network in (policy.network, plain):
            network(input_ids=ids).logits.float().logsumexp(-1).sum().backward()
        for name, p in plain.named_parameters():
            expected[name] = expected.get(name, 0) + p.grad.float()
        plain.zero_grad()
    for name, p in policy.model.named_parameters():
        assert p.grad.dtype == torch.float32 and torch.equal(p.grad, expected[name])
    assert all(p.grad is None for p in policy.network.parameters())


def test_bfloat16_where_it_pays(make_policy, monkeypatch):
    """On a CPU that multiplies in it, and for a model that is not small."""
    policy = make_policy()
    for known, least, pays in (({"amx_bf16": True}, 1, True), ({"avx2": True}, 1, False), ({"amx_bf16": True}, 10**9, False)):
        monkeypatch.setattr(torch.cpu, "get_capabilities", lambda known=known: known, raising=False)
        monkeypatch.setattr(bfloat16, "LARGE", least)
        assert bfloat16.pays(policy.model) == pays


# ---------------------------------------------------------------- the attention in Triton

INTERPRETED = """
from types import SimpleNamespace

import torch
from speed import decode

for N, K, heads, G, d, P, T, at in ((2, 3, 2, 3, 20, 70, 80, 66), (3, 1, 1, 1, 64, 9, 5, 0), (1, 4, 2, 17, 16, 64, 64, 63)):
    generator = torch.Generator().manual_seed(0)
    draw = lambda *shape: torch.randn(*shape, generator=generator)
    layer = SimpleNamespace(prompt_keys=draw(N, heads, P, d), prompt_values=draw(N, heads, P, d))
    mask = torch.arange(P) >= torch.tensor([0, P - 1, P // 2])[:N, None]  # padding on the left, whole blocks of it
    query, keys, values = draw(N * K, heads * G, 1, d), *draw(2, N * K, heads, T, d)
    results = []
    for fused in (False, True):
        decoder = SimpleNamespace(cache=SimpleNamespace(layers=[layer]), fused=fused, at=torch.tensor([at]), t=at)
        results.append(decode.attend(SimpleNamespace(layer_idx=0), query, keys, values, mask[:, None, None], None, decoder)[0])
    torch.testing.assert_close(*results, rtol=1e-5, atol=1e-6)
    print("equal")
assert decode.can_fuse(6, 2, 20, torch.float32, "cpu") and not decode.can_fuse(6, 2, 20, torch.float64, "cpu")
print("fits")
"""


@needs_triton
def test_the_fused_attention_in_the_interpreter():
    """It is the plain one."""
    assert interpreted(INTERPRETED).split() == ["equal"] * 3 + ["fits"]


@needs_triton
def test_where_triton_cannot_run_it_says_so():
    """Here: outside its interpreter, on a CPU."""
    with pytest.warns(UserWarning, match="attention is done in torch, which is slower"):
        assert not decode.can_fuse(4, 2, 16, torch.float32, "cpu")
