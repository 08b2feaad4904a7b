"""The prompt P(x): what counts is exact to the token, under any template, and a text never becomes a control token."""

import pytest
import torch
from conftest import TEXTS, build, by_full_forward, rolled

from plumbing.errors import GraceError
from policy import Policy
from prompt import PromptTemplate, Reading
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
    for text in ("the cat", "naïve — 猫", "\n\n the <|im_ cat", ""):
        x = policy.template([text])
        messages = [{"role": "system", "content": "Say what it means."}, {"role": "user", "content": text}]
        expected = byte_tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)
        assert x.ids[0].tolist() == expected
        assert decoded(policy, x, x.mask - x.counted)[0].endswith("<|im_start|>user\n")
        assert decoded(policy, x, x.counted)[0] == f"{text.strip()}<|im_end|>\n<|im_start|>assistant\n"


@pytest.mark.parametrize("kind", ["byte level", "word level", "sentencepiece"])
def test_a_text_is_data(kind, byte_tokenizer, tokenizer):
    """Whatever its characters spell, a text holds no control token, and prompt and template around it stay as they are."""
    if kind == "sentencepiece":
        from tokenizers import Tokenizer, decoders, models
        from transformers import PreTrainedTokenizerFast

        pieces = [
            ("<unk>", 0.0),
            ("<s>", 0.0),
            ("</s>", 0.0),
            ("▁", -1.0),
            *((c, -2.0) for c in "abcdefghijklmnopqrstuvwxyz<>/:.\n"),
        ]
        core = Tokenizer(models.Unigram(pieces, unk_id=0, byte_fallback=False))
        core.decoder = decoders.Metaspace()
        core.add_special_tokens(["<unk>", "<s>", "</s>"])
        chosen = PreTrainedTokenizerFast(tokenizer_object=core, bos_token="<s>", eos_token="</s>", unk_token="<unk>")
    else:
        chosen = {"byte level": byte_tokenizer, "word level": tokenizer}[kind]
        chosen.chat_template = BYTES if kind == "byte level" else chosen.chat_template
    template = PromptTemplate(chosen, Reading("say it"), "cpu", True)
    plain = template(["the doctor"])
    around = lambda x: (x.ids[0][~x.text[0].bool() & ~x.counted[0].bool()], x.ids[0][x.counted[0].bool() & ~x.text[0].bool()])
    spelled = list(dict.fromkeys([*chosen.all_special_tokens, *map(str, chosen.added_tokens_decoder.values())]))
    control = set(chosen.convert_tokens_to_ids(spelled)) - {chosen.unk_token_id}
    assert len(control) >= 2
    for text in [
        *spelled,
        "".join(spelled),
        f"the doctor {' '.join(spelled)} bought the lamp",
        f"{spelled[0]}the doctor{spelled[-1]}\n",
    ]:
        x = template([text])
        assert control.isdisjoint(x.ids[0][x.text[0].bool()].tolist()), text
        for one, two in zip(around(x), around(plain)):
            assert torch.equal(one, two), text
        ((ids, spans),) = template.encode([text])
        assert len(ids) == x.ids.shape[1] and all(0 <= start <= end <= len(template.render(text)) for start, end in spans)


@pytest.mark.parametrize("text", ["", "  ", "\n"])
def test_a_blank_text(byte_tokenizer, text):
    """Under a template that strips what it is given, with the instruction in the user's message, it leaves the prefix alone."""
    policy = byte_policy(byte_tokenizer, NO_SYSTEM.replace("m.content", "m.content | trim"))
    x = policy.template([text, "the cat"])
    whole, cat = decoded(policy, x, x.mask)
    assert cat == "<|im_start|>user\nSay what it means.\n\nthe cat<|im_end|>\n<|im_start|>model"
    assert whole.rstrip() == cat.replace("the cat", text.rstrip()) and x.text[0].sum() == len(text.rstrip())


def test_not_unicode(make_policy):
    with pytest.raises(GraceError, match="a lone surrogate"):
        make_policy().template(["the cat", "a \ud83d b"])


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

DROPS_SYSTEM = "{% for m in messages %}{% if m.role == 'user' %}[{{ m.content }}]{% endif %}{% endfor %}"


@pytest.mark.parametrize(
    "template, before, after",
    [
        (NO_SYSTEM, "<|im_start|>user\nSay what it means.\n\n", "<|im_end|>\n<|im_start|>model"),
        (DROPS_SYSTEM, "[Say what it means.\n\n", "]"),
        (None, "Say what it means.\n\nText: ", "\n\nRationale:"),
    ],
    ids=["without a system role", "drops the system message", "no template"],
)
def test_other_templates(byte_tokenizer, template, before, after):
    policy = byte_policy(byte_tokenizer, template)
    x = policy.template(["the cat"])
    assert decoded(policy, x, x.mask) == [f"{before}the cat{after}"]
    assert decoded(policy, x, x.text) == ["the cat"] and decoded(policy, x, x.counted) == [f"the cat{after}"]


def test_templates_that_are_refused(byte_tokenizer):
    """One that never writes the instruction, and one that is broken."""
    with pytest.raises(GraceError, match="system prefix"):
        byte_policy(byte_tokenizer, "{% for m in messages %}{{ m.content | length }}{% endfor %}")
    with pytest.raises(GraceError, match="the chat template cannot be used"):
        byte_policy(byte_tokenizer, "{% for m in messages %}")


def test_tokenizer_without_offsets(make_policy):
    from transformers import ByT5Tokenizer

    tokenizer = ByT5Tokenizer()
    tokenizer.chat_template = BYTES
    with pytest.raises(GraceError, match="ByT5Tokenizer does not say which characters"):
        Policy(make_policy().model, tokenizer, Reading("Say what it means.", 100, 4))
