"""What the decoding loop captures, against a full forward pass without padding and without a cache."""

import pytest
import torch
from conftest import ARCHITECTURES, SMALL, TEXTS, build

import toy
from plumbing.errors import GraceError
from policy import Policy, Reading
from pool import POOLS, unit
from rollout import batches, draw, embed_prompts, encode, pack, sample, sample_in_parts, score, text_loss, token_logprobs
from speed import decode
from speed.recompute import recompute_layers


def by_full_forward(policy, rollouts, n, k, temperature=1.0):
    """One rollout through the library's own model: no padding, no cache, no sharing. `[T'], [D]`."""
    prompt = rollouts.prompt_ids[n][rollouts.prompt_mask[n].bool()]
    written = rollouts.ids[n, k][rollouts.mask[n, k].bool()]
    out = policy.model(input_ids=torch.cat([prompt, written])[None], output_hidden_states=True, use_cache=False)
    logprobs = torch.log_softmax(out.logits[0, len(prompt) - 1 : -1] / temperature, -1)
    counted = torch.cat([rollouts.counted[n][rollouts.prompt_mask[n].bool()], torch.ones_like(written)]).bool()
    states = out.hidden_states[-2 if policy.reading.pooling == "penultimate" else -1][0][counted]
    how = {"max": lambda h: h.max(0).values, "eos": lambda h: h[-1]}.get(policy.reading.pooling, lambda h: h.mean(0))
    return logprobs.gather(1, written[:, None])[:, 0], unit(how(states))


def rolled(policy, texts=TEXTS, K=3, temperature=1.0, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return sample(policy, policy.prompts(texts), K, temperature, generator)


@pytest.mark.parametrize("architecture", SMALL)
def test_captured_equals_full_forward(make_policy, architecture):
    policy = make_policy(architecture)
    rollouts = rolled(policy, temperature=0.7)
    assert (rollouts.shared == 0) == (architecture == "Gemma2")  # its sliding windows forbid it
    assert rollouts.prompt_mask.sum(1).unique().numel() > 1  # unequal lengths: padding is at work
    assert rollouts.mask.sum(-1).unique().numel() > 1  # rows have left the batch at different steps
    with torch.no_grad():
        for n in range(len(TEXTS)):
            for k in range(3):
                logprobs, h = by_full_forward(policy, rollouts, n, k, 0.7)
                found = rollouts.logprobs[n, k][rollouts.mask[n, k].bool()]
                torch.testing.assert_close(found, logprobs, rtol=1e-5, atol=1e-5)
                torch.testing.assert_close(rollouts.embeddings[n, k], h, rtol=1e-5, atol=1e-5)


def test_sampling_in_parts_is_sampling(make_policy):
    """Greedy, so that the order of draws cannot matter: the same rollouts, with less in the cache at a time."""
    policy = make_policy()
    prompts = policy.prompts(TEXTS)
    whole, parts = (sample_in_parts(policy, prompts, 2, 0.0, None, budget) for budget in (10**6, 1))
    for name in whole.TENSORS:
        torch.testing.assert_close(getattr(parts, name), getattr(whole, name), rtol=1e-5, atol=1e-5)
    assert parts.shared == whole.shared == 5


def test_positions_counted_in_the_mask_forbid_sharing(tokenizer):
    """MPT takes ALiBi distances from places in the row, and no notice of position_ids."""
    from transformers import MptConfig, MptForCausalLM

    torch.manual_seed(0)
    model = MptForCausalLM(MptConfig(d_model=32, n_heads=4, n_layers=2, vocab_size=len(tokenizer), max_seq_len=128))
    policy = Policy(model, tokenizer, Reading(toy.INSTRUCTION, 64, 6))
    assert not policy.can_share
    rollouts = rolled(policy)
    with torch.no_grad():
        for n in range(3):
            _, h = by_full_forward(policy, rollouts, n, 0)
            torch.testing.assert_close(rollouts.embeddings[n, 0], h, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("pooling", POOLS)
def test_every_pooling_is_captured(make_policy, pooling):
    policy = make_policy(pooling=pooling)
    rollouts = rolled(policy)
    with torch.no_grad():
        _, h = score(policy, rollouts)
        for n in range(len(TEXTS)):
            _, expected = by_full_forward(policy, rollouts, n, 1)
            torch.testing.assert_close(rollouts.embeddings[n, 1], expected, rtol=1e-5, atol=1e-5)
            torch.testing.assert_close(h[n, 1], expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_score_and_its_gradient_equal_full_rows(make_policy, architecture):
    """One prefill a prompt, its cache repeated: the same numbers and the same gradients as full rows."""
    policy = make_policy(architecture, double=True)
    rollouts = rolled(policy, K=2)
    weight = torch.randn(2, 3, 2, 16, dtype=torch.float64, generator=torch.Generator().manual_seed(1))

    def gradient(value):
        policy.model.zero_grad()
        value.backward()
        return torch.cat([p.grad.flatten() for p in policy.model.parameters()])

    logprobs, h, text = score(policy, rollouts, text=True)
    T, D = logprobs.shape[2], 16
    shared = gradient(
        (logprobs * weight[0, :, :, :T]).sum() + (h[..., :D] * weight[1]).sum() + (text * weight[0, :, 0, 0]).sum()
    )
    total = 0
    for n in range(3):
        at = rollouts.counted[n].nonzero()[1:, 0]  # tokens whose predecessor counts too
        ids = rollouts.prompt_ids[n][rollouts.prompt_mask[n].bool()]
        at = at - (rollouts.prompt_mask[n] == 0).sum()
        said = torch.log_softmax(policy.model(input_ids=ids[None]).logits[0], -1)[at - 1, ids[at]].mean()
        torch.testing.assert_close(text[n], said, rtol=1e-6, atol=1e-6)
        total = total + said * weight[0, n, 0, 0]
        for k in range(2):
            lp, e = by_full_forward(policy, rollouts, n, k)
            torch.testing.assert_close(logprobs[n, k, : len(lp)], lp, rtol=1e-9, atol=1e-9)
            total = total + (lp * weight[0, n, k, : len(lp)]).sum() + (e[:D] * weight[1, n, k]).sum()
    full = gradient(total)
    assert (shared - full).norm() < 1e-6 * full.norm()  # some architectures normalize in float32, whatever the weights


def test_the_ratio_starts_at_one(make_policy):
    policy = make_policy("Qwen2")
    rollouts = rolled(policy, K=4, temperature=0.6)
    with torch.no_grad():
        logprobs, _ = score(policy, rollouts, temperature=0.6)
        other, _ = score(policy, rollouts, temperature=1.0)
    assert ((logprobs - rollouts.logprobs).exp() * rollouts.mask - rollouts.mask).abs().max() < 1e-5
    assert (other - rollouts.logprobs).abs().max() > 0.01  # a temperature forgotten would be seen


def test_embeddings_do_not_depend_on_the_company(make_policy):
    """Greedy: alone, in a batch, in another order, repeated: the same embedding and rationale."""
    policy = make_policy()
    whole = encode(policy, TEXTS)
    together, written = whole.vectors, whole.rationales
    for i, text in enumerate(TEXTS):
        alone = encode(policy, [text])
        torch.testing.assert_close(torch.tensor(alone.vectors[0]), torch.tensor(together[i]), rtol=1e-5, atol=1e-5)
        assert alone.rationales[0] == written[i]
    order = [2, 0, 1, 0]
    shuffled = encode(policy, [TEXTS[i] for i in order], tokens_per_batch=1).vectors
    torch.testing.assert_close(torch.tensor(shuffled), torch.tensor(together[order]), rtol=1e-5, atol=1e-5)


def test_selecting_groups_drops_padding_and_changes_nothing(make_policy):
    policy = make_policy()
    rollouts = rolled(policy)
    part = rollouts[torch.tensor([1])]  # the shortest text
    assert part.prompt_ids.shape[1] == int(rollouts.prompt_mask[1].sum()) < rollouts.prompt_ids.shape[1]
    with torch.no_grad():
        whole, h = score(policy, rollouts)
        logprobs, e = score(policy, part)
    torch.testing.assert_close(logprobs[0], whole[1, :, : logprobs.shape[2]], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(e[0], h[1], rtol=1e-5, atol=1e-5)


def test_rows_end_at_any_configured_end_token(make_policy):
    policy = make_policy(max_new_tokens=6)
    assert len(policy.end_ids) > 20
    rollouts = rolled(policy, K=8)
    assert rollouts.finished.any() and not rollouts.finished.all()
    for ids, mask, finished in zip(rollouts.ids.flatten(0, 1), rollouts.mask.flatten(0, 1), rollouts.finished.flatten()):
        ends = torch.isin(ids[mask.bool()], policy.end_ids)
        assert not ends[:-1].any() and bool(ends[-1]) == bool(finished)  # the end token is kept, and is last
        assert finished or int(mask.sum()) == 6


def test_sampling_follows_the_softmax():
    logits = torch.tensor([[1.0, 0.0, -1.0, 2.0]])
    generator = torch.Generator().manual_seed(0)
    token, logprob = draw(logits.expand(20_000, 4), 0.5, generator)
    expected = torch.softmax(logits[0] / 0.5, -1)
    assert (torch.bincount(token) / 20_000 - expected).abs().max() < 0.01
    torch.testing.assert_close(logprob, expected.log()[token])
    token, logprob = draw(logits, 0.0)
    assert token.item() == 3 and logprob.item() == pytest.approx(float(torch.log_softmax(logits[0], -1)[3]))


def test_seeds_repeat_and_differ(make_policy):
    policy = make_policy()
    assert torch.equal(rolled(policy, seed=3).ids, rolled(policy, seed=3).ids)
    assert not torch.equal(rolled(policy, seed=3).ids, rolled(policy, seed=4).ids)


def test_chunked_logprobs_equal_the_whole_with_gradient(make_policy):
    policy = make_policy("Gemma2")  # soft-capped logits
    hidden = torch.randn(11, 32, requires_grad=True)
    ids = torch.randint(0, 100, (11,))
    whole = torch.log_softmax(policy.logits(hidden), -1).gather(1, ids[:, None])[:, 0]
    chunked = token_logprobs(policy, hidden, ids, chunk=4)
    torch.testing.assert_close(chunked, whole)
    one, two = (torch.autograd.grad(x.square().sum(), hidden)[0] for x in (whole, chunked))
    torch.testing.assert_close(one, two)


def test_text_loss_is_the_mean_over_text_tokens(make_policy):
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


def test_batches_cover_all_texts_once_within_the_budget(make_policy):
    policy = make_policy()
    many = [TEXTS[i % 3] + " x" * i for i in range(40)]
    parts = list(batches(many, 300, policy))
    assert sorted(i for part in parts for i in part) == list(range(40)) and len(parts) > 3


def test_an_empty_text_has_an_embedding(make_policy):
    vectors = encode(make_policy(), ["", TEXTS[0]]).vectors
    assert abs((vectors**2).sum(1) - 1).max() < 1e-5


# ---------------------------------------------------------------- P(x)


def decoded(policy, prompts, mask):
    return [policy.tokenizer.decode(ids[m.bool()]) for ids, m in zip(prompts.ids, mask)]


def test_what_counts_starts_with_the_text(make_policy):
    policy = make_policy()
    x = policy.prompts(TEXTS)
    assert decoded(policy, x, x.mask - x.counted) == [f"<system> {toy.INSTRUCTION} <user>"] * 3
    assert decoded(policy, x, x.text) == TEXTS
    assert decoded(policy, x, x.counted) == [f"{text} <assistant>" for text in TEXTS]
    assert x.shared == 5 and x.mask[:, :5].all() and (x.mask[:, 5:].diff(dim=1) >= 0).all()
    apart = policy.prompts(TEXTS, share=False)
    assert apart.shared == 0 and (apart.mask.diff(dim=1) >= 0).all()  # left-padded
    for one, two in zip(*(p.ids[p.mask.bool()].split(p.mask.sum(1).tolist()) for p in (x, apart))):
        assert torch.equal(one, two)


BYTES = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content | trim }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


@pytest.fixture(scope="module")
def byte_tokenizer():
    """A byte-level tokenizer with merges that straddle the boundary between template and text."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    symbols = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {s: i for i, s in enumerate([*symbols, "ĊĊ", "th", "the"])}
    core = Tokenizer(models.BPE(vocab=vocab, merges=[("Ċ", "Ċ"), ("t", "h"), ("th", "e")]))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    core.decoder = decoders.ByteLevel()
    core.add_special_tokens([AddedToken("<|im_start|>", special=True), AddedToken("<|im_end|>", special=True)])
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=core, eos_token="<|im_end|>", pad_token="<|im_end|>")
    tokenizer.chat_template = BYTES
    return tokenizer


def byte_policy(tokenizer, template=BYTES, **reading):
    reading = {"instruction": "Say what it means.", "max_prompt_tokens": 100, "max_new_tokens": 4, **reading}
    tokenizer.chat_template = template
    return Policy(build("Qwen2", len(tokenizer), eos_token_id=None), tokenizer, Reading(**reading))


def test_byte_level_prompt_equals_the_library_and_counts_exactly(byte_tokenizer):
    policy = byte_policy(byte_tokenizer)
    for text in ("the cat", "naïve — 猫", "ends in <|im_end|> itself", ""):
        x = policy.prompts([text])
        messages = [{"role": "system", "content": "Say what it means."}, {"role": "user", "content": text}]
        expected = byte_tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)
        assert x.ids[0].tolist() == expected
        assert decoded(policy, x, x.mask - x.counted)[0].endswith("<|im_start|>user\n")
        assert decoded(policy, x, x.counted)[0] == f"{text}<|im_end|>\n<|im_start|>assistant\n"


def test_pad_equal_to_end_token_changes_nothing(byte_tokenizer):
    """Masks come from lengths: an end token inside the prompt and at the rationale's end still counts."""
    policy = byte_policy(byte_tokenizer)
    rollouts = rolled(policy, ["the cat sat", "a"])
    end = byte_tokenizer.eos_token_id
    assert int((rollouts.prompt_ids[0][rollouts.counted[0].bool()] == end).sum()) == 1
    with torch.no_grad():
        for n in range(2):
            _, h = by_full_forward(policy, rollouts, n, 0)
            torch.testing.assert_close(rollouts.embeddings[n, 0], h, rtol=1e-5, atol=1e-5)


def test_long_text_is_cut_on_the_right_and_counted(byte_tokenizer):
    policy = byte_policy(byte_tokenizer, max_prompt_tokens=70)
    x = policy.prompts(["b" * 200, "the cat"])
    assert x.cut == 1 and x.ids.shape[1] == 70
    cut = decoded(policy, x, x.counted)[0]
    assert cut.endswith("<|im_end|>\n<|im_start|>assistant\n") and set(cut.split("<|im_end|>")[0]) == {"b"}


def test_limit_below_the_template_is_an_error(byte_tokenizer):
    with pytest.raises(GraceError, match="leaves no room for a text"):
        byte_policy(byte_tokenizer, max_prompt_tokens=20).prompts(["the cat sat on the mat"])


def test_template_without_a_system_role(byte_tokenizer):
    template = (
        "{% for m in messages %}{% if m.role == 'system' %}{{ raise_exception('no system role') }}{% endif %}"
        "<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}<|im_start|>model\n"
    )
    policy = byte_policy(byte_tokenizer, template)
    x = policy.prompts(["the cat"])
    assert decoded(policy, x, x.mask - x.counted)[0] == "<|im_start|>user\nSay what it means.\n\n"
    assert decoded(policy, x, x.text)[0] == "the cat"


def test_no_template_at_all(byte_tokenizer):
    policy = byte_policy(byte_tokenizer, None)
    x = policy.prompts(["the cat"])
    assert decoded(policy, x, x.mask)[0] == "Say what it means.\n\nText: the cat\n\nRationale:"
    assert decoded(policy, x, x.text)[0] == "the cat"


def test_template_that_drops_the_instruction_is_an_error(byte_tokenizer):
    template = "{% for m in messages %}{% if m.role == 'user' %}{{ m.content }}{% endif %}{% endfor %}"
    with pytest.raises(GraceError, match="system prefix"):
        byte_policy(byte_tokenizer, template)


def test_no_end_token_is_an_error(byte_tokenizer, monkeypatch):
    monkeypatch.setattr(byte_tokenizer, "_special_tokens_map", {**byte_tokenizer._special_tokens_map, "eos_token": None})
    with pytest.raises(GraceError, match="no end token"):
        byte_policy(byte_tokenizer)


def test_rationale_as_long_as_the_context_is_an_error(tokenizer):
    with pytest.raises(GraceError, match="fills the model's context"):
        Policy(build("GPT2", len(tokenizer)), tokenizer, Reading(toy.INSTRUCTION, max_new_tokens=128))


def test_prompt_limit_gives_way_to_the_context(tokenizer):
    with pytest.warns(UserWarning, match="limited to 120 tokens"):
        policy = Policy(build("GPT2", len(tokenizer)), tokenizer, Reading(toy.INSTRUCTION, max_new_tokens=8))
    assert policy.reading.max_prompt_tokens == 120


def test_a_model_that_does_more_than_its_head_is_refused(tokenizer):
    model = build("Llama", len(tokenizer))
    forward = model.forward

    def bent(*args, **kwargs):
        out = forward(*args, **kwargs)
        out.logits = out.logits * 1.5 + 1
        return out

    model.forward = bent
    with pytest.raises(GraceError, match="not its output head"):
        Policy(model, tokenizer, Reading(toy.INSTRUCTION, 64, 4))


def test_saved_and_opened_again_it_reads_the_same(make_policy, tmp_path):
    policy = make_policy(pooling="max")
    policy.save(tmp_path)
    again = Policy.load(str(tmp_path))
    assert again.reading == policy.reading
    assert (encode(again, TEXTS).vectors == encode(policy, TEXTS).vectors).all()
    assert Policy.load(str(tmp_path), max_new_tokens=3).reading.max_new_tokens == 3


def test_without_rationale_it_is_the_prompt_pooled(make_policy):
    policy = make_policy()
    x = policy.prompts(TEXTS[:1])
    with torch.no_grad():
        states = policy.model.base_model(input_ids=x.ids).last_hidden_state[0][x.counted[0].bool()]
    torch.testing.assert_close(embed_prompts(policy, x)[0], unit(states.mean(0)), rtol=1e-5, atol=1e-5)
    assert encode(policy, TEXTS[:1], rationale=False).rationales == [""]


# ---------------------------------------------------------------- decoding, made cheap


@pytest.mark.parametrize("architecture", [a for a in SMALL if a != "Gemma2"])
def test_a_prompt_kept_once_decodes_as_the_library_s_cache_does(make_policy, architecture, monkeypatch):
    """Token by token, rows and prompts left out on the way; as it is, and by the bucket as a captured step reads."""
    monkeypatch.setattr(decode, "BUCKET", 2)
    policy = make_policy(architecture, double=True)
    assert policy.keeps_once
    x, K = policy.prompts(TEXTS), 3
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(6, 150, (6, 9), generator=generator)
    keep, groups = torch.tensor([3, 5, 8, 6]), torch.tensor([1, 2])  # two rows of the second prompt, two of the third
    seen = []
    for make in (decode.PlainDecoder, decode.SharedDecoder, lambda *a: decode.SharedDecoder(*a, fixed=True)):
        with torch.no_grad():
            decoder = make(policy, policy.prefill(x.ids, x.mask, x.shared)[2], x.mask, K)
            steps = [decoder.step(tokens[t])[0].clone() for t in range(3)]
            decoder.keep(keep, groups)
            steps += [decoder.step(tokens[t][keep])[0].clone() for t in range(3, 6)]
        seen.append(steps)
    for plain, shared, fixed in zip(*seen):
        torch.testing.assert_close(shared, plain, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(fixed, shared, rtol=1e-9, atol=1e-9)


def test_attention_that_does_not_come_apart_uses_the_library_s_cache(make_policy):
    policy = make_policy("Gemma2")  # soft-capped scores, sliding windows
    assert not policy.keeps_once and isinstance(policy.decoder(*cache_of(policy), 2), decode.PlainDecoder)


def cache_of(policy):
    x = policy.prompts(TEXTS)
    with torch.no_grad():
        return policy.prefill(x.ids, x.mask, x.shared)[2], x.mask


def test_when_ended_rows_leave_does_not_matter(make_policy, monkeypatch):
    """Greedy rationales, log-probabilities and embeddings, whether the batch is packed each token, rarely or never."""
    policy, found = make_policy(max_new_tokens=14, eos_token_id=list(range(5, 150, 12))), []
    texts = [f"{a} {b}" for a in TEXTS for b in ("somebody sold the boat", "the lamp", "around noon .")]
    for every, share in ((1, 1.0), (1, 0.5), (4, 0.9), (100, 1.0)):
        monkeypatch.setattr(decode.SharedDecoder, "look_every", every)
        monkeypatch.setattr(decode.SharedDecoder, "pack_below", share)
        found.append(sample(policy, policy.prompts(texts), 1, temperature=0.0))
    assert found[0].mask.sum(2).unique().numel() > 2  # they end at different times
    for other in found[1:]:
        assert torch.equal(other.ids, found[0].ids) and torch.equal(other.finished, found[0].finished)
        torch.testing.assert_close(other.logprobs, found[0].logprobs, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(other.embeddings, found[0].embeddings, rtol=1e-4, atol=1e-5)


def test_pack():
    writing = torch.tensor([[0, 1, 0], [0, 0, 0], [1, 0, 1]], dtype=torch.bool)
    rows, groups = pack(writing)
    assert groups.tolist() == [0, 2]
    assert rows.tolist() == [1, 0, 6, 8]  # as many rows a group as the busiest needs; those still writing first
    rows, groups = pack(torch.zeros(2, 3, dtype=torch.bool))
    assert len(rows) == len(groups) == 0


def test_draw_follows_the_probabilities():
    logits = torch.tensor([[0.0, 1.0, 2.0, -torch.inf, 0.5]]).expand(200_000, 5)
    token, logprob = draw(logits, 0.7, torch.Generator().manual_seed(0))
    p = torch.softmax(logits[0].double() / 0.7, 0)
    share = torch.bincount(token, minlength=5) / len(token)
    assert share[3] == 0
    assert (share - p).abs().max() < 4 * (0.25 / len(token)) ** 0.5
    torch.testing.assert_close(logprob.double(), p[token].log(), rtol=1e-5, atol=1e-6)


# ---------------------------------------------------------------- memory and types


@pytest.mark.parametrize("architecture", ["Qwen2", "Qwen3", "Llama", "Gemma", "Cohere"])
def test_recomputed_layers_give_the_same_gradient_and_keep_less(make_policy, architecture):
    found = []
    for recompute in (False, True):
        policy = make_policy(architecture, double=True)
        rollouts = rolled(policy, K=3)
        if recompute:
            recompute_layers(policy)
        kept = {}
        keep = lambda x: (kept.setdefault(x.data_ptr(), x.numel()), x)[1]  # noqa: B023
        with torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x):
            logprobs, h = score(policy, rollouts)
        (logprobs.sum() + h[..., :5].sum()).backward()
        found.append((torch.cat([p.grad.flatten() for p in policy.model.parameters()]), sum(kept.values())))
    (plain, kept_plain), (recomputed, kept_less) = found
    torch.testing.assert_close(recomputed, plain, rtol=1e-9, atol=1e-9 * float(plain.abs().max()))
    assert kept_less < 0.7 * kept_plain


@pytest.mark.parametrize("architecture", ["Gemma2", "GPT2"])
def test_layers_that_cannot_be_recomputed_are_refused(make_policy, architecture):
    with pytest.raises(GraceError, match="leave out --recompute"):
        recompute_layers(make_policy(architecture))


def test_a_bfloat16_twin_samples_and_the_masters_stay(make_policy):
    policy = make_policy("Qwen2", tie_word_embeddings=True)
    before = [p.clone() for p in policy.model.parameters()]
    twin = policy.twin()
    rollouts = rolled(twin, K=4)
    assert {p.dtype for p in twin.model.parameters()} == {torch.bfloat16}
    assert twin.head.weight is twin.base.embed_tokens.weight  # tied still
    assert all(torch.equal(p, q) and p.dtype == torch.float32 for p, q in zip(policy.model.parameters(), before))
    assert rollouts.embeddings.dtype == rollouts.logprobs.dtype == torch.float32
    with torch.no_grad():
        logprobs, h = score(policy, rollouts)
    gap = ((logprobs - rollouts.logprobs) * rollouts.mask).abs()
    assert 0 < gap.max() < 0.5 and gap.mean() < 0.05  # near, and not the same: the probability ratio accounts for it
    assert (h * rollouts.embeddings).sum(-1).min() > 0.99
    with torch.no_grad():
        for p in policy.model.parameters():
            p.add_(0.1)
    twin.follow(policy)
    assert torch.equal(next(twin.model.parameters()), next(policy.model.parameters()).bfloat16())
