"""Which words carry a cosine: shares that are exact for every network and pooling, words over tokens, and the command."""

import json
import re

import numpy as np
import pytest
import torch
from conftest import TEXTS, build

import grace
from evaluation.encoder import encode_texts
from evaluation.explain import WORD, compare, show, split, token_parts
from policy import Policy
from pool import POOLS
from prompt import Reading
from rollout import sample
from worlds.make import CHAT_TEMPLATE, SPECIAL_TOKENS

A, B = TEXTS[0], "near the woods the furious physician purchased the lamp around noon ."


@pytest.mark.parametrize("architecture, pooling", [("Qwen3", "mean"), ("GPT2", "mean"), *(("Llama", how) for how in POOLS)])
def test_shares_sum_to_the_cosine(make_policy, architecture, pooling):
    policy = make_policy(architecture, pooling=pooling)
    texts = [*TEXTS, "", B]
    vectors = encode_texts(policy, texts).vectors
    splits = split(policy, texts)
    for one, vector in zip(splits, vectors):
        assert np.abs(one.embedding - vector).max() < 1e-5  # the encoder's embedding, a sum of the words'
    compared = compare(splits[0], splits[1])
    assert compared["cosine"] == pytest.approx(float(vectors[0] @ vectors[1]), abs=1e-5)
    for name in "ab":
        shares = [s["share"] for s in compared[name]]
        assert sum(shares) == pytest.approx(compared["cosine"], abs=1e-9)
        assert sum(abs(x) > 1e-6 for x in shares) == 1 if pooling == "eos" else len(set(shares)) > 5


def test_a_share_is_what_the_formula_says(make_policy):
    """By hand, for one text at a time and without a cache: h_t . b / |sum h|. The toy's tokens are words."""
    policy = make_policy("Llama")
    hidden, embeddings = [], []
    for text in (A, B):
        prompts = policy.template([text], share=False)
        rationale = sample(policy, prompts).rationales()[0][0]
        ids = torch.cat([prompts.ids[0], torch.tensor(rationale)])[None]
        with torch.no_grad():
            states = policy.model(input_ids=ids, output_hidden_states=True).hidden_states[-1][0].double()
        hidden.append(states[int((1 - prompts.counted[0]).sum()) :])
        embeddings.append(hidden[-1].sum(0) / hidden[-1].sum(0).norm())
    expected = (hidden[0] @ embeddings[1] / hidden[0].sum(0).norm()).numpy()
    compared = compare(*split(policy, [A, B]))["a"]
    assert np.abs(np.array([s["share"] for s in compared]) - expected).max() < 1e-5 and np.ptp(expected) > 1e-3
    parts, n = [s["part"] for s in compared], len(A.split())
    assert parts[: n + 1] == ["text"] * n + ["template"] and set(parts[n + 1 :]) == {"rationale"}
    assert " ".join(s["text"] for s in compared[:n]) == A and compared[n]["text"] == "<assistant>"


def test_parts_of_each_pooling():
    hidden = torch.tensor([[3.0, 0.0], [1.0, 4.0], [2.0, 2.0]])
    assert torch.allclose(token_parts(hidden, "mean", 2), hidden.double() / 72**0.5)
    # Each channel belongs to one token: the first has the first channel, the second has the second.
    assert torch.allclose(token_parts(hidden, "max", 2), torch.tensor([[0.6, 0.0], [0.0, 0.8], [0.0, 0.0]]).double())
    assert torch.allclose(token_parts(hidden, "eos", 2), torch.tensor([[0.0, 0.0], [0.0, 0.0], [0.5, 0.5]]).double() * 2**0.5)
    halves = torch.tensor([[3.0, 0.0], [1.0, 4.0]]).double() / 32**0.5, torch.tensor([[2.0, 2.0]]).double() / 8**0.5
    assert torch.allclose(token_parts(hidden, "halves", 2), torch.cat(halves) / 2)  # they point the same way


def test_words_over_tokens():
    """Over a byte-level BPE tokenizer, as most models have one: words are several tokens, an emoji is four."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    core = Tokenizer(models.BPE())
    core.pre_tokenizer, core.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=290, special_tokens=list(SPECIAL_TOKENS), initial_alphabet=alphabet)
    core.train_from_iterator(TEXTS * 3, trainer)
    marks = dict(unk_token="<unk>", pad_token="<pad>", eos_token="<end>", additional_special_tokens=["<user>", "<assistant>"])
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=core, **marks)
    tokenizer.chat_template = CHAT_TEMPLATE
    model = build("Llama", len(tokenizer), max_position_embeddings=256, eos_token_id=5)
    policy = Policy(model, tokenizer, Reading("explain", max_prompt_tokens=128, max_new_tokens=24))

    (one,) = split(policy, ["The  doctor's  naïve café, 42\nτέλος 🙂!"])
    words = [word for word, part in one.words if part == "text"]
    assert words == ["The", "doctor's", "naïve", "café", ",", "42", "τέλος", "🙂!"] == WORD.findall(one.text)
    # The words of a rationale are, in order, what its ids decode to: no id is lost, not even one inside a character.
    ids = sample(policy, policy.template([one.text])).rationales()[0][0]
    decoded = tokenizer.decode(ids, clean_up_tokenization_spaces=False)
    written = "".join(word for word, part in one.words if part == "rationale")
    assert re.sub(r"\s", "", written) == re.sub(r"\s", "", decoded) != ""


def test_a_long_text_has_lost_its_end(make_policy):
    policy = make_policy()
    policy.reading.max_prompt_tokens = 12
    one, other = split(policy, [A, B])
    words = [word for word, part in one.words if part == "text"]
    assert 0 < len(words) < len(A.split()) and words == A.split()[: len(words)]
    assert [word for word, part in one.words if part == "template"] == ["<assistant>"]
    assert sum(s["share"] for s in compare(one, other)["a"]) == pytest.approx(one.embedding @ other.embedding)


# ---------------------------------------------------------------- the command


def test_the_command(make_policy, tmp_path, capsys):
    make_policy().save(tmp_path)
    given = ["explain", "--model", str(tmp_path), A, B]
    grace.main([*given, "--json"])
    printed = json.loads(capsys.readouterr().out)
    assert printed == compare(*split(Policy.load(tmp_path), [A, B])) and list(printed) == ["cosine", "a", "b"]
    assert all(list(s) == ["text", "part", "share"] for name in "ab" for s in printed[name])
    grace.main(given)
    shown = capsys.readouterr().out
    assert f"cosine {printed['cosine']:.3f}" in shown and "rationale" in shown and "\x1b" not in shown  # not a terminal


def test_a_terminal_is_not_obeyed():
    """Colours are ours; what a text holds is shown, and moves no cursor."""
    shares = [{"text": "a\x1b[2Jb", "part": "text", "share": 0.5}, {"text": "no", "part": "rationale", "share": -0.5}]
    one = {"cosine": 0.0, "a": shares, "b": shares}
    assert "\x1b[2J" not in show(one, colour=True) and "\x1b[48;2;" in show(one, colour=True)
    assert "\x1b" not in show(one, colour=False)
