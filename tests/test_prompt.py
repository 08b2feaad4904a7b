"""The prompt P(x): what counts is exact to the token, under any template; a text that cannot be located is refused."""

import pytest
import torch
from conftest import TEXTS, build, by_full_forward, rolled

from plumbing.errors import GraceError
from policy import Policy
from prompt import Reading
from worlds.make import INSTRUCTION


def decoded(policy, prompts, mask):
    return [policy.tokenizer.decode(ids[m.bool()]) for ids, m in zip(prompts.ids, mask)]


def test_what_counts_starts_with_the_text(make_policy):
    policy = make_policy()
    x = policy.template(TEXTS)
    assert decoded(policy, x, x.mask - x.counted) == [f"<system> {INSTRUCTION} <user>"] * 3
    assert decoded(policy, x, x.text) == TEXTS
    assert decoded(policy, x, x.counted) == [f"{text} <assistant>" for text in TEXTS]
    assert x.n_shared == 5 and x.mask[:, :5].all() and (x.mask[:, 5:].diff(dim=1) >= 0).all()
    apart = policy.template(TEXTS, share=False)
    assert apart.n_shared == 0 and (apart.mask.diff(dim=1) >= 0).all()  # left-padded
    for one, two in zip(*(p.ids[p.mask.bool()].split(p.mask.sum(1).tolist()) for p in (x, apart))):
        assert torch.equal(one, two)
    part = x[torch.tensor([2, 0])]
    for name in ("ids", "mask", "counted", "text", "cut"):
        assert torch.equal(getattr(part, name), getattr(x, name)[[2, 0]])
    assert part.n_shared == 5


# ---------------------------------------------------------------- a byte-level tokenizer, and other templates


BYTES = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content | trim }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


@pytest.fixture
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
    return PreTrainedTokenizerFast(tokenizer_object=core, eos_token="<|im_end|>", pad_token="<|im_end|>")


def byte_policy(tokenizer, template=BYTES, **reading):
    reading = {"instruction": "Say what it means.", "max_prompt_tokens": 100, "max_new_tokens": 4, **reading}
    tokenizer.chat_template = template
    return Policy(build("Qwen2", len(tokenizer), eos_token_id=None), tokenizer, Reading(**reading))


def test_byte_level_prompt(byte_tokenizer):
    """It equals the library's, and counts exactly."""
    policy = byte_policy(byte_tokenizer)
    for text in ("the cat", "naïve — 猫", "ends in <|im_end|> itself", ""):
        x = policy.template([text])
        messages = [{"role": "system", "content": "Say what it means."}, {"role": "user", "content": text}]
        expected = byte_tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)
        assert x.ids[0].tolist() == expected
        assert decoded(policy, x, x.mask - x.counted)[0].endswith("<|im_start|>user\n")
        assert decoded(policy, x, x.counted)[0] == f"{text}<|im_end|>\n<|im_start|>assistant\n"


def test_pad_equal_to_end_token(byte_tokenizer):
    """Masks come from lengths: an end token inside the prompt and at the rationale's end counts."""
    policy = byte_policy(byte_tokenizer)
    rollouts = rolled(policy, ["the cat sat", "a"])
    end = byte_tokenizer.eos_token_id
    assert int((rollouts.prompt_ids[0][rollouts.counted[0].bool()] == end).sum()) == 1
    with torch.no_grad():
        for n in range(2):
            _, h = by_full_forward(policy, rollouts, n, 0)
            torch.testing.assert_close(rollouts.embeddings[n, 0], h, rtol=1e-5, atol=1e-5)


def test_long_text_is_cut(byte_tokenizer):
    """It loses its own end, not the template's, and is counted."""
    policy = byte_policy(byte_tokenizer, max_prompt_tokens=70)
    x = policy.template(["b" * 200, "the cat"])
    assert x.cut.tolist() == [True, False] and x.ids.shape[1] == 70
    shortened = decoded(policy, x, x.counted)[0]
    assert shortened.endswith("<|im_end|>\n<|im_start|>assistant\n") and set(shortened.split("<|im_end|>")[0]) == {"b"}
    with pytest.raises(GraceError, match="leaves no room for a text"):
        byte_policy(byte_tokenizer, max_prompt_tokens=20).template(["the cat sat on the mat"])


NO_SYSTEM = (
    "{% for m in messages %}{% if m.role == 'system' %}{{ raise_exception('no system role') }}{% endif %}"
    "<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}<|im_start|>model\n"
)


@pytest.mark.parametrize(
    "template, before, after",
    [
        (NO_SYSTEM, "<|im_start|>user\nSay what it means.\n\n", "<|im_end|>\n<|im_start|>model"),
        (None, "Say what it means.\n\nText: ", "\n\nRationale:"),
    ],
    ids=["without a system role", "no template"],
)
def test_other_templates(byte_tokenizer, template, before, after):
    policy = byte_policy(byte_tokenizer, template)
    x = policy.template(["the cat"])
    assert decoded(policy, x, x.mask) == [f"{before}the cat{after}"]
    assert decoded(policy, x, x.text) == ["the cat"] and decoded(policy, x, x.counted) == [f"the cat{after}"]


def test_templates_that_are_refused(byte_tokenizer):
    """One without the instruction, and one that writes something else around some texts: where these start is unknown."""
    with pytest.raises(GraceError, match="system prefix"):
        byte_policy(byte_tokenizer, "{% for m in messages %}{% if m.role == 'user' %}{{ m.content }}{% endif %}{% endfor %}")
    policy = byte_policy(byte_tokenizer, BYTES.replace("<|im_end|>\n", "<|im_end|>{{ '!' if 'cat' in m.content else '\n' }}"))
    policy.template(["the dog"])
    with pytest.raises(GraceError, match="rewrites this text, so where it starts is unknown: 'the cat'"):
        policy.template(["the dog", "the cat"])


def test_tokenizer_without_offsets(make_policy):
    from transformers import ByT5Tokenizer

    tokenizer = ByT5Tokenizer()
    tokenizer.chat_template = BYTES
    with pytest.raises(GraceError, match="ByT5Tokenizer does not say which characters"):
        Policy(make_policy().model, tokenizer, Reading("Say what it means.", 100, 4))
