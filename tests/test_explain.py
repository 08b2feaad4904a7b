"""Which words carry a cosine: shares that are exact for every network and pooling, words over tokens, and the command."""

import json
import re
import shutil
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
import torch
from chromium import BROWSER, WHY, Chromium
from conftest import ARCHITECTURES, TEXTS, build, command

import grace
from evaluation.encoder import encode_texts
from evaluation.explain import WORD, compare, load_newest, model_folder, nearest, show, split, spread, subtotals, token_parts
from plumbing.errors import GraceError
from policy import Policy
from pool import POOLS
from prompt import Reading
from rollout import sample
from worlds.make import CHAT_TEMPLATE, SPECIAL_TOKENS

A, B = TEXTS[0], "near the woods the furious physician purchased the lamp around noon ."


@pytest.mark.parametrize("pooling", POOLS)
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_shares_sum_to_the_cosine(make_policy, architecture, pooling):
    policy = make_policy(architecture, pooling=pooling)
    texts = [*TEXTS, "", B]
    vectors = encode_texts(policy, texts).vectors
    for by_token in (False, True):
        splits = split(policy, texts, by_token)
        for one, vector in zip(splits, vectors):
            assert np.abs(one.embedding - vector).max() < 1e-5  # the encoder's embedding, a sum of the words'
        found = compare(splits[0], splits[1])
        assert found["cosine"] == pytest.approx(float(vectors[0] @ vectors[1]), abs=1e-5)
        for name in "ab":
            shares = [s["share"] for s in found[name]]
            assert sum(shares) == pytest.approx(found["cosine"], abs=1e-9)
            assert sum(subtotals(found[name]).values()) == pytest.approx(found["cosine"], abs=1e-9)
            assert sum(abs(x) > 1e-6 for x in shares) == 1 if pooling == "eos" else len(set(shares)) > 5


def test_a_share_is_what_the_formula_says(make_policy):
    """By hand, for one text at a time and without a cache: h_t . b / |sum h|."""
    policy = make_policy("Llama")
    hidden, embeddings = [], []
    for text in (A, B):
        prompts = policy.prompts([text], share=False)
        rationale = sample(policy, prompts).rationales()[0][0]
        ids = torch.cat([prompts.ids[0], torch.tensor(rationale)])[None]
        with torch.no_grad():
            states = policy.model(input_ids=ids, output_hidden_states=True).hidden_states[-1][0].double()
        hidden.append(states[int((1 - prompts.counted[0]).sum()) :])
        embeddings.append(hidden[-1].sum(0) / hidden[-1].sum(0).norm())
    expected = (hidden[0] @ embeddings[1] / hidden[0].sum(0).norm()).numpy()
    found = compare(*split(policy, [A, B], by_token=True))
    assert np.abs(np.array([s["share"] for s in found["a"]]) - expected).max() < 1e-5 and np.ptp(expected) > 1e-3
    parts = [s["part"] for s in found["a"]]
    n = len(A.split())  # the toy's tokens are words
    assert parts[: n + 1] == ["text"] * n + ["template"] and set(parts[n + 1 :]) == {"rationale"}
    assert " ".join(s["text"] for s in found["a"][:n]) == A and found["a"][n]["text"] == "<assistant>"


def test_parts_of_each_pooling():
    hidden = torch.tensor([[3.0, 0.0], [1.0, 4.0], [2.0, 2.0]])
    assert torch.allclose(token_parts(hidden, "mean"), hidden.double() / 72**0.5)
    # Each channel belongs to one token: the first has the first channel, the second has the second.
    assert torch.allclose(token_parts(hidden, "max"), torch.tensor([[0.6, 0.0], [0.0, 0.8], [0.0, 0.0]]).double())
    assert torch.allclose(token_parts(hidden, "eos"), torch.tensor([[0.0, 0.0], [0.0, 0.0], [0.5, 0.5]]).double() * 2**0.5)


@pytest.fixture(scope="module")
def byte_policy():
    """A network over a byte-level BPE tokenizer, as most models have one: words are several tokens, an emoji is four."""
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
    return Policy(model, tokenizer, Reading("explain", max_prompt_tokens=128, max_new_tokens=24))


def test_words_over_tokens(byte_policy):
    text = "The  doctor's  naïve café, 42\nτέλος 🙂 东京!"
    whole, pieces = (split(byte_policy, [text, A], by_token) for by_token in (False, True))
    words = [word for word, part in whole[0].words if part == "text"]
    assert words == ["The", "doctor's", "naïve", "café", ",", "42", "τέλος", "🙂", "东", "京", "!"] == WORD.findall(text)
    assert len(pieces[0].words) > 2 * len(whole[0].words)
    by_word, by_token = compare(*whole), compare(*pieces)
    assert by_word["cosine"] == pytest.approx(by_token["cosine"], abs=1e-12)
    for part, total in subtotals(by_token["a"]).items():
        assert subtotals(by_word["a"])[part] == pytest.approx(total, abs=1e-12)
    # The tokens of the first word, added up, are the first word.
    first = [s["share"] for s in by_token["a"]]
    n = next(n for n in range(1, 9) if "".join(s["text"] for s in by_token["a"][:n]) == "The")
    assert sum(first[:n]) == pytest.approx(by_word["a"][0]["share"], abs=1e-12)
    # The words of a rationale are, in order, what its ids decode to: no id is lost, not even one inside a character.
    for one in whole:
        ids = sample(byte_policy, byte_policy.prompts([one.text])).rationales()[0][0]
        decoded = byte_policy.tokenizer.decode(ids, clean_up_tokenization_spaces=False)
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


def test_batches_do_not_matter(make_policy):
    policy = make_policy()
    together, alone = split(policy, [*TEXTS, B]), [split(policy, [text])[0] for text in (*TEXTS, B)]
    for one, other in zip(together, alone):
        assert one.words == other.words and np.abs(one.vectors - other.vectors).max() < 1e-6
    tiny = split(policy, [*TEXTS, B], tokens_per_batch=1)
    assert [one.text for one in tiny] == [*TEXTS, B]


def test_nearest_and_spread(make_policy):
    policy = make_policy()
    texts = [A, *TEXTS[1:], B, "somebody"]
    vectors = encode_texts(policy, texts).vectors
    assert nearest(policy, texts, 2) == sorted(texts[1:], key=lambda t: -(vectors[texts.index(t)] @ vectors[0]))[:2]
    drawn = spread(policy, [A, B], 6, temperature=1.0)
    assert drawn["worst"][0] < drawn["mean"] < drawn["best"][0] and 0 < drawn["std"] < drawn["best"][0] - drawn["worst"][0]
    assert drawn == spread(policy, [A, B], 6, temperature=1.0) != spread(policy, [A, B], 6, temperature=1.0, seed=1)


# ---------------------------------------------------------------- the command


@pytest.fixture
def model(make_policy, tmp_path):
    make_policy().save(tmp_path / "model")
    return str(tmp_path / "model")


def test_json_has_exactly_these_keys(model, capsys):
    capsys.readouterr()
    grace.main(["explain", "--model", model, "--json", A, B])
    found = json.loads(capsys.readouterr().out)
    assert list(found) == ["cosine", "a", "b"]
    for name in "ab":
        assert all(list(s) == ["text", "part", "share"] for s in found[name])
        assert sum(s["share"] for s in found[name]) == pytest.approx(found["cosine"], abs=1e-5)


def test_what_it_prints(model, capsys, tmp_path):
    grace.main(["explain", "--model", model, A, B, "--samples", "3", "--html", str(tmp_path / "page.html")])
    printed = capsys.readouterr().out
    for expected in ("cosine ", "  a  text ", "template ", "rationale ", "3 sampled rationales", "best", "worst", A):
        assert expected in printed or expected in re.sub(r"\s+", " ", printed), expected
    assert "\x1b" not in printed  # not a terminal
    page = (tmp_path / "page.html").read_text()
    assert page.count("data-share") > 20 and "<script" not in page
    others = tmp_path / "others.txt"
    others.write_text("\n".join(TEXTS))
    grace.main(["explain", "--model", model, A, "--among", str(others), "--nearest", "1"])
    printed = capsys.readouterr().out
    assert "The 1 nearest of 2 texts" in printed and printed.count("cosine") == 1


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["only one"], "give two or more"),
        (["a", "b", "c", "--json"], "two texts"),
        (["a", "b", "--json", "--samples", "4"], "two texts"),
        (["a", "b", "--samples", "1"], "2 or more"),
        (["a", "b", "--samples", "4", "--temperature", "0"], "above 0"),
        (["a", "b", "c", "--nearest", "0"], "1 or more"),
        (["a", "b", "--dtype", "bfloat16", "--device", "cpu"], "for CUDA"),
    ],
)
def test_what_cannot_be_done_is_said(model, arguments, message):
    with pytest.raises(SystemExit, match=message):
        grace.main(["explain", "--model", model, *arguments])


def test_a_terminal_is_not_obeyed(make_policy):
    """Colours are ours; what a text holds is shown, and moves no cursor."""
    shares = [{"text": "a\x1b[2Jb", "part": "text", "share": 0.5}, {"text": "no", "part": "rationale", "share": -0.5}]
    one = {"cosine": 0.0, "a": shares, "b": shares}
    coloured = show([one], None, None, 2, colour=True)
    assert "\x1b[2J" not in coloured and "\x1b[48;2;" in coloured
    assert "\x1b" not in show([one], None, None, 2, colour=False)


# ---------------------------------------------------------------- while a run trains


def test_which_model_a_run_folder_is(finished_run, two_checkpoints, tmp_path, capsys):
    assert model_folder("some/hub-id") == "some/hub-id" and model_folder(str(finished_run)) == str(finished_run)
    assert model_folder(str(two_checkpoints)) == str(two_checkpoints)  # its final model is newer than its checkpoints
    (two_checkpoints / "model.safetensors").unlink()
    newest = two_checkpoints / "checkpoints" / "00000004"
    assert model_folder(str(two_checkpoints)) == str(newest)
    load_newest(str(two_checkpoints))
    assert "not finished; this is its checkpoint 00000004" in capsys.readouterr().err
    (newest / "model.safetensors").write_bytes(b"half")
    assert model_folder(str(two_checkpoints)).endswith("00000003")
    captured = capsys.readouterr()
    assert captured.out == "" and "is damaged" in captured.err  # stdout may be JSON
    shutil.rmtree(two_checkpoints / "checkpoints")
    with pytest.raises(GraceError, match="has not saved a model yet"):
        model_folder(str(two_checkpoints))


def test_beside_a_run_that_is_training(tiny_world, tmp_path, capsys):
    """explain and status, again and again, beside a run that saves and deletes checkpoints all the time."""
    out = tmp_path / "out"
    arguments = command(tiny_world, out, "--steps 100000 --eval-every 0", heldout=False)
    run = subprocess.Popen([sys.executable, grace.__file__, *arguments], stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    try:
        while not list(out.glob("checkpoints/*[0-9]/manifest.json")):
            assert run.poll() is None, run.stdout.read().decode()
            time.sleep(0.1)
        steps = set()
        while len(steps) < 2 and run.poll() is None:
            capsys.readouterr()
            grace.main(["explain", "--model", str(out), "--json", A, B])
            captured = capsys.readouterr()
            assert json.loads(captured.out)["cosine"]
            steps.add(re.search("checkpoint (0+[0-9]+)", captured.err)[1])
            grace.main(["status", str(out)])
            assert "of 100000" in capsys.readouterr().out
        assert len(steps) == 2 and run.poll() is None
        run.send_signal(signal.SIGTERM)
        assert run.wait(60) == 128 + signal.SIGTERM
    finally:
        run.kill()
        run.stdout.close()
    lines = [json.loads(line)["step"] for line in (out / "metrics.jsonl").read_text().splitlines()]
    assert lines == [*range(1, len(lines) + 1)]


# ---------------------------------------------------------------- in a browser


@pytest.mark.skipif(not BROWSER, reason=WHY)
def test_the_page_in_a_browser(model, tmp_path):
    page = tmp_path / "page.html"
    hostile = "<script>document.title='run'</script> <img src=http://127.0.0.1:9/x> & \"quoted\""
    grace.main(["explain", "--model", model, A, hostile, B, "--html", str(page)])
    with Chromium(tmp_path / "profile") as browser:
        for width, dark in ((400, False), (1600, True)):
            browser.open(page, width, dark)
            assert browser.complaints == [] and browser.requests == []
            assert browser.evaluate("document.title") == "Which words carry a cosine · GRACE"
            assert browser.evaluate("document.documentElement.scrollWidth") == width
            assert browser.evaluate("document.body.innerText").count("<script>") == 1
