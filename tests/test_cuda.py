"""What only a GPU can show: captured graphs, mixed precision, and that no token waits for the host. Run by bench/gpu.sh."""

import copy

import pytest
import torch
from conftest import ROWS, TEXTS, config, weights

import grace
from evaluation.encoder import GraceEncoder
from policy import Policy
from rollout import invert, sample, uniforms, write
from speed import decode

pytestmark = [pytest.mark.cuda, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]
DEVICE = "cuda"


def there(policy, dtype="float32"):
    """The same policy on the GPU."""
    return Policy(copy.deepcopy(policy.model).to(DEVICE), policy.tokenizer, policy.reading, dtype)


@pytest.mark.parametrize("kernel", ["auto", "off"])
@pytest.mark.parametrize("architecture", ["Qwen2", "Llama", "GPT2"])
def test_a_captured_step_is_the_step(make_policy, architecture, kernel, monkeypatch):
    """Token by token, over buckets that grow and after rows have left, a replay gives what the library's cache gives."""
    monkeypatch.setattr(decode, "BUCKET", 3)
    monkeypatch.setattr(decode, "kernel", kernel)
    policy = there(make_policy(architecture, max_new_tokens=9))
    prompts = policy.prompts(TEXTS)
    tokens = torch.randint(6, 150, (9, 9), generator=torch.Generator().manual_seed(0)).to(DEVICE)
    writing = torch.tensor([0, 0, 0, 1, 0, 1, 1, 0, 1], dtype=torch.bool, device=DEVICE)
    states = []
    for make in (decode.PlainDecoder, decode.SharedDecoder):
        with torch.no_grad():
            decoder = make(policy, policy.prefill(prompts.ids, prompts.mask, prompts.n_shared)[2], prompts.mask, 3)
            steps = [decoder.step(tokens[t])[0].clone() for t in range(5)]
            decoder.drop_finished(writing)
            assert len(decoder.rows) == 4
            steps += [decoder.step(tokens[t][decoder.rows])[0].clone() for t in range(5, 9)]
        states.append(steps)
    assert decoder.capture or DEVICE == "cpu"  # it did not fall back to the step as it is
    for plain, captured in zip(*states):
        torch.testing.assert_close(captured, plain, rtol=1e-4, atol=1e-4)


def test_the_gpu_writes_what_the_cpu_writes(make_policy):
    """Greedy, and sampled with the same numbers: ids, log-probabilities, embeddings. Float noise may turn a draw, not many."""
    policy = make_policy("Qwen2", max_new_tokens=20, eos_token_id=list(range(5, 150, 12)))
    other = there(policy)
    for temperature in (0.0, 1.0):
        uniform = uniforms(0, len(TEXTS), 16, 20) if temperature else None
        here = sample(policy, policy.prompts(TEXTS), 16, temperature, uniform)
        away = sample(other, other.prompts(TEXTS), 16, temperature, uniform if uniform is None else uniform.to(DEVICE))
        T = min(here.ids.shape[2], away.ids.shape[2])
        equal = (here.ids[..., :T] == away.ids[..., :T].cpu()).all(-1)
        assert equal.float().mean() > 0.9
        close = dict(rtol=1e-3, atol=1e-3)
        torch.testing.assert_close(away.embeddings.cpu()[equal], here.embeddings[equal], **close)
        torch.testing.assert_close(away.logprobs.cpu()[equal][:, :T], here.logprobs[equal][:, :T], **close)


def test_no_token_waits_for_the_host(make_policy):
    """From the first token to the last the loop only launches: anything that would wait for the GPU raises here."""
    policy = there(make_policy("Qwen2", max_new_tokens=12))
    prompts, uniform = policy.prompts(TEXTS), uniforms(0, 9, 12).to(DEVICE)
    with torch.no_grad():
        hidden, _, cache = policy.prefill(prompts.ids, prompts.mask, prompts.n_shared)
        decoder = policy.decoder(cache, prompts.mask, 3)
        last, state = hidden[:, -1].repeat_interleave(3, 0), torch.zeros(9, 32, device=DEVICE)
        torch.cuda.set_sync_debug_mode("error")
        try:
            *_, state = write(policy, decoder, last, state, 1.0, uniform)
        finally:
            torch.cuda.set_sync_debug_mode("default")
    assert torch.isfinite(state).all() and decoder.t == 12


def test_a_draw_from_a_large_vocabulary():
    torch.manual_seed(0)
    p = torch.softmax(3 * torch.randn(64, 151_936), -1)
    u = uniforms(0, 64)[:, None]
    below = p.double().cumsum(-1)
    near = [torch.searchsorted(below, (u + e) * below[:, -1:], right=True).clamp(max=151_935) for e in (-2e-6, 2e-6)]
    place = invert(p.to(DEVICE), u.to(DEVICE)).cpu()
    assert ((near[0] <= place) & (place <= near[1])).all() and (p.gather(1, place) > 0).all()


@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_steps(make_policy, dtype, recompute):
    """Two steps: every number finite, weights float32 and moved, the first ratio as near to 1 as the compute type allows."""
    policy = there(make_policy("Qwen2"), dtype)
    before = weights(policy)
    settings = config(device=DEVICE, dtype=dtype, recompute=recompute, kl=0.01, lr=1e-4)
    trainer = grace.Trainer(policy, there(make_policy("Qwen2"), dtype), ROWS, settings)
    for _ in range(2):
        metrics = trainer.step()
        assert metrics["first_ratio_off"] < (1e-3 if dtype == "float32" else 0.5)
    after = weights(policy)
    assert after.dtype == torch.float32 and torch.isfinite(after).all() and (after != before).float().mean() > 0.9


def test_the_encoder(make_policy):
    """The vectors that the CPU gives, and in bfloat16 nearly the same: none of these rationales turns on rounding."""
    policy = make_policy("Qwen2", max_new_tokens=1)
    here = GraceEncoder(policy).encode(TEXTS)
    assert abs(here - GraceEncoder(there(policy)).encode(TEXTS)).max() < 1e-3
    assert (here * GraceEncoder(there(policy, "bfloat16")).encode(TEXTS)).sum(1).min() > 0.97
