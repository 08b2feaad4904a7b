"""What only a GPU can show: captured graphs, mixed precision, and that no token waits for the host. Run by bench/gpu.sh."""

import copy

import pytest
import torch
from conftest import ROWS, TEXTS, config, weights

import grace
from policy import Policy
from rollout import draw, sample, uniforms
from speed import decode

pytestmark = [pytest.mark.cuda, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]
DEVICE = "cuda"


def there(policy, dtype="float32"):
    """The same policy on the GPU."""
    return Policy(copy.deepcopy(policy.model).to(DEVICE), policy.tokenizer, policy.reading, dtype)


def decoder_of(policy, make, K):
    """A decoder for K rationales of each text."""
    x = policy.template(TEXTS)
    with torch.no_grad():
        return make(policy, policy.prefill(x.ids, x.mask, x.n_shared)[2], x.mask, K)


@pytest.mark.parametrize("architecture", ["Qwen2", "Llama", "GPT2"])
def test_a_captured_step_is_the_step(make_policy, architecture):
    """Token by token, before rows have left and after, a replay gives what the library's cache gives."""
    policy = there(make_policy(architecture, max_new_tokens=9))
    tokens = torch.randint(6, 150, (9, 9), generator=torch.Generator().manual_seed(0)).to(DEVICE)
    writing = torch.ones(9, 9, dtype=torch.bool, device=DEVICE)
    writing[5:] = torch.tensor([0, 0, 0, 1, 0, 1, 1, 0, 1], dtype=torch.bool)
    states = []
    for make in (decode.PlainDecoder, decode.SharedDecoder):
        decoder = decoder_of(policy, make, 3)
        decoder.look_every = 5
        with torch.no_grad():
            states.append(torch.cat([decoder.step(tokens[t], writing[t])[0][writing[t]] for t in range(9)]))
        assert len(decoder.rows) == 4
    assert decoder.replay  # it did not fall back to the step as it is
    torch.testing.assert_close(states[1], states[0], rtol=1e-4, atol=1e-4)


def test_the_gpu_writes_what_the_cpu_writes(make_policy):
    """Greedy, and sampled with the same numbers: ids, log-probabilities, embeddings. Float noise may turn a draw, not many."""
    policy = make_policy("Qwen2", max_new_tokens=20, eos_token_id=list(range(5, 150, 12)))
    other = there(policy)
    for temperature in (0.0, 1.0):
        uniform = uniforms(0, len(TEXTS), 16, 20) if temperature else None
        here = sample(policy, policy.template(TEXTS), 16, temperature, uniform)
        away = sample(other, other.template(TEXTS), 16, temperature, uniform if uniform is None else uniform.to(DEVICE))
        T = min(here.ids.shape[2], away.ids.shape[2])
        equal = (here.ids[..., :T] == away.ids[..., :T].cpu()).all(-1)
        assert equal.float().mean() > 0.9
        close = dict(rtol=1e-3, atol=1e-3)
        torch.testing.assert_close(away.embeddings.cpu()[equal], here.embeddings[equal], **close)
        torch.testing.assert_close(away.logprobs.cpu()[equal][:, :T], here.logprobs[equal][:, :T], **close)


def test_no_token_waits_for_the_host(make_policy):
    """Between two looks at which rows have ended the loop only launches: anything that would wait for the GPU raises here."""
    policy = there(make_policy("Qwen2", max_new_tokens=12))
    uniform, writing = uniforms(0, 9, 12).to(DEVICE), torch.ones(9, dtype=torch.bool, device=DEVICE)
    decoder, last = decoder_of(policy, decode.SharedDecoder, 3), torch.randn(9, 32, device=DEVICE)
    with torch.no_grad():
        torch.cuda.set_sync_debug_mode("error")
        try:
            for t in range(12):
                token, _ = draw(policy.logits(last), 1.0, uniform[:, t])
                last, _ = decoder.step(token, writing)
                writing = writing & (token[:, None] != policy.end_ids).all(1)
                assert not decoder.all_ended(writing)
        finally:
            torch.cuda.set_sync_debug_mode("default")
    assert torch.isfinite(last).all() and decoder.t == 12


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_steps(make_policy, dtype):
    """Two steps: every number finite, weights float32 and moved, the first ratio as near to 1 as the compute type allows."""
    policy = there(make_policy("Qwen2"), dtype)
    before = weights(policy)
    settings = config(device=DEVICE, dtype=dtype, kl=0.01, lr=1e-4)
    trainer = grace.Trainer(policy, there(make_policy("Qwen2"), dtype), ROWS, settings)
    for _ in range(2):
        metrics = trainer.step()
        assert metrics["first_ratio_off"] < (1e-3 if dtype == "float32" else 0.5)
    after = weights(policy)
    assert after.dtype == torch.float32 and torch.isfinite(after).all() and (after != before).float().mean() > 0.9
