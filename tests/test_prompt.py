"""The prompt P(x): what counts is exact to the token, under any template, and a text never becomes a control token."""

import pytest
import torch
from conftest import TEXTS, build, by_full_forward, rolled

from evaluation.encoder import encode_texts
from plumbing.errors import GraceError
from policy import Policy
from prompt import PromptTemplate, Reading
from rollout import sample, score, token_logprobs
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
    assert decoded(policy, part, part.text) == [TEXTS[2], TEXTS[0]] and part.n_shared == 5


# ---------------------------------------------------------------- a byte-level tokenizer, and other templates


BYTES = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content | trim }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
NO_SYSTEM = (
    "{% for m in messages %}{% if m.role == 'system' %}{{ raise_exception('no system role') }}{% endif %}"
    "<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}<|im_start|>model\n"
)


@pytest.fixture
def byte_tokenizer():
    """A byte-level tokenizer with merges that straddle the boundary between template and text."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    symbols = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {s: i for i, s in enumerate([*symbols, "ĊĊ", "th", "the", ".ĊĊ"])}
    core = Tokenizer(models.BPE(vocab=vocab, merges=[("Ċ", "Ċ"), ("t", "h"), ("th", "e"), (".", "ĊĊ")]))
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


@pytest.mark.parametrize("kind", ["byte_tokenizer", "tokenizer"])
def test_a_text_is_data(kind, request):
    """Whatever its characters spell, a text holds no control token, and prompt and template around it stay as they are."""
    tokenizer = request.getfixturevalue(kind)
    tokenizer.chat_template = BYTES if kind == "byte_tokenizer" else tokenizer.chat_template
    template = PromptTemplate(tokenizer, Reading("say it"), "cpu", True)

    def around(x):  # the ids before the text, and those after it
        counted, text = x.counted[0].bool(), x.text[0].bool()
        return x.ids[0][~counted].tolist(), x.ids[0][counted & ~text].tolist()

    expected = around(template(["the doctor"]))
    spelled = sorted({*tokenizer.all_special_tokens, *map(str, tokenizer.added_tokens_decoder.values())})
    control = set(tokenizer.convert_tokens_to_ids(spelled)) - {tokenizer.unk_token_id}
    assert len(control) >= 2
    every = " ".join(spelled)
    for text in (*spelled, every.replace(" ", ""), f"the doctor {every} bought", f"{spelled[0]}the doctor{spelled[-1]}\n"):
        x = template([text])
        assert control.isdisjoint(x.ids[0][x.text[0].bool()].tolist()) and around(x) == expected, text
        if kind == "byte_tokenizer":  # and loses nothing; the other has one token per word
            assert tokenizer.decode(x.ids[0][x.text[0].bool()]) == text.strip()
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


def test_a_text_read_twice(byte_tokenizer):
    """A full pass over the string as written by hand, and the mean of its last states: 5 of the second text, 13 behind it."""
    policy = byte_policy(byte_tokenizer, twice=True)
    string = "<|im_start|>system\nSay what it means.<|im_end|>\n<|im_start|>user\nthe cat\n\nthe cat<|im_end|>\n"
    ids = torch.tensor([byte_tokenizer(string + "<|im_start|>assistant\n", add_special_tokens=False)["input_ids"]])
    hidden = policy.model.base_model(input_ids=ids).last_hidden_state[0].detach()
    state, logprobs = hidden[-18:].mean(0), token_logprobs(policy, hidden[:-1], ids[0, 1:])
    for text in ("the cat", " the cat\n"):
        vectors = encode_texts(policy, [text, "a longer text"], rationale=False).vectors
        torch.testing.assert_close(torch.from_numpy(vectors[0]), state / state.norm(), rtol=1e-5, atol=1e-5)
    x = policy.template(["the cat", ""])
    assert decoded(policy, x, x.text) == ["the cat", ""] and decoded(policy, x, x.mask)[0] == string + "<|im_start|>assistant\n"
    written, given = encode_texts(policy, ["the cat"]), sample(policy, x[:1])
    torch.testing.assert_close(torch.from_numpy(written.vectors[0]), by_full_forward(policy, given, 0, 0)[1].detach())
    both = torch.cat([logprobs[-23:-19], logprobs[-17:]]).mean()  # of either reading all but its first token, and the template
    torch.testing.assert_close(score(policy, given).text_logprobs[0], both)


def test_a_text_over_the_limit_that_is_read_twice(byte_tokenizer):
    """Both readings lose as much of their ends."""
    policy = byte_policy(byte_tokenizer, twice=True)
    for long in ("a" + 30 * "b", "a" + 80 * "b", "a" + 300 * "b"):
        x = policy.template([long, "the cat"])
        whole, text, counted = (decoded(policy, x, mask)[0] for mask in (x.mask, x.text, x.counted))
        second, rest = counted.split("<|im_end|>")
        assert x.cut.tolist() == [True, False] and x.mask[0].sum() in (99, 100)
        assert text == second == "a" + (len(text) - 1) * "b" and f"user\n{text}\n\n{text}<|im_end|>{rest}" in whole
    x = policy.template(["a" + 80 * "b" + "."])  # its full stop and the blank line are one token, which stays
    text, second = decoded(policy, x, x.text)[0], decoded(policy, x, x.counted)[0].split("<|im_end|>")[0]
    assert text == second[:-1] + ".\n\n" and f"user\n{text}{second}<|im_end|>" in decoded(policy, x, x.mask)[0]
    full = int(policy.template([""]).mask.sum())
    with pytest.raises(GraceError, match="leaves no room for a text"):
        byte_policy(byte_tokenizer, twice=True, max_prompt_tokens=full).template(["a" + 80 * "b"])


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


def test_what_is_refused(byte_tokenizer):
    """A template without the instruction, one that is broken, a text that is not Unicode, tokens of unknown extent."""
    from transformers import ByT5Tokenizer

    with pytest.raises(GraceError, match="system prefix"):
        byte_policy(byte_tokenizer, "{% for m in messages %}{{ m.content | length }}{% endfor %}")
    with pytest.raises(GraceError, match="the chat template cannot be used"):
        byte_policy(byte_tokenizer, "{% for m in messages %}")
    with pytest.raises(GraceError, match="a lone surrogate"):
        byte_policy(byte_tokenizer).template(["the cat", "a \ud83d b"])
    with pytest.raises(GraceError, match="ByT5Tokenizer does not say which characters"):
        PromptTemplate(ByT5Tokenizer(), Reading(), "cpu", True)
