"""experiments/backbone.py on tiny data made in place: what is learned, a resumed run, the tokenizer, the folder."""

import copy
import functools
import gzip
import json
import random

import backbone
import pytest
import torch
from backbone import SIZES, Batches, build_model, build_tokenizer, loss_of
from chats import INSTRUCTIONS, Data, collate, main_words

from plumbing.errors import GraceError
from policy import Policy

train = functools.partial(backbone.train, B=8)
ANIMALS, PLACES = ("dog", "cat", "horse", "bird"), ("house", "river", "tree", "road")


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """A gzipped text, groups and triplets of one small world."""
    folder = tmp_path_factory.mktemp("backbone")
    rng = random.Random(0)
    tell = lambda: f"A {rng.choice(ANIMALS)} runs to the {rng.choice(PLACES)}. "
    with gzip.open(folder / "plain.txt.gz", "wt") as file:
        file.write("\n<|endoftext|>\n".join("".join(tell() for _ in range(20)) for _ in range(40)))
    scenes = [(a, p) for a in ANIMALS for p in PLACES]
    groups = [
        {"id": i, "captions": [f"A {a} at the {p}.", f"The {p} and one {a}.", f"{a}s of the {p}"]}
        for i, (a, p) in enumerate(scenes)
    ]
    triplets = [{"query": f"A {a} runs to the {p}.", "positive": f"A {a} runs.", "negative": "No."} for a, p in scenes]
    for name, rows in (("groups", groups), ("triplets", triplets)):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    paths = ([str(folder / name)] for name in ("plain.txt.gz", "groups.jsonl", "triplets.jsonl"))
    return Data(*paths)


@pytest.fixture(scope="module")
def tokenizer(data):
    return build_tokenizer(data, 400, windows=200)


@pytest.fixture(autouse=True)
def tiny(monkeypatch):
    """A network that learns nothing, at once."""
    monkeypatch.setitem(SIZES, "4m", (400, 16, 2, 2, 32))
    monkeypatch.setattr(backbone, "build_tokenizer", functools.partial(build_tokenizer, windows=200))


def test_only_the_answer_is_learned(tokenizer):
    """The learned tokens of a chat decode to the answer and the end token; of a window, to all of it."""
    ids, labels = collate([("A dog runs.", None), (("A cat sits.", "One cat."), "shorter"), (("x", "y"), "repeat")], tokenizer)
    learned = [tokenizer.decode(row[row != -100]) for row in labels]
    assert learned == ["A dog runs.", "One cat.<end>", "y<end>"]
    assert torch.equal(ids[labels != -100], labels[labels != -100])
    chat = tokenizer.decode(ids[1]).replace("<pad>", "")
    assert chat == f"<system>{INSTRUCTIONS['shorter'][0]}<user>A cat sits.<assistant>One cat.<end>"


def test_the_loss_is_that_of_the_answers_tokens_row_by_row(data, tokenizer):
    """Against each row by itself, without padding, through the model's own forward pass."""
    model = build_model(tokenizer, "4m")
    ids, labels = data.batch(random.Random(1), tokenizer, 8, plain=0.5)
    nats = count = 0
    for row, wanted in zip(ids, labels):
        n = int((wanted != -100).nonzero().max()) + 1
        logprobs = model(input_ids=row[None, :n]).logits[0].log_softmax(-1)
        for t in range(1, n):
            if wanted[t] != -100:
                nats, count = nats - float(logprobs[t - 1, row[t]].detach()), count + 1
    assert count < sum(len(row) for row in ids) / 2
    assert float(loss_of(model, ids, labels, "float32").detach()) == pytest.approx(nats / count, rel=1e-5)


def test_chats_ask_for_what_the_groups_hold(data):
    rng = random.Random(0)
    for _ in range(50):
        text, answer = data.chat(rng, "other words")
        assert text != answer and any({text, answer} <= set(group) for group in data.parts[False]["groups"])
        text, answer = data.chat(rng, "repeat")
        assert text == answer
        text, answer = data.chat(rng, "shorter")
        assert len(answer) < len(text)
    assert main_words(["Two dogs are running.", "A dog runs on grass.", "Dog, grass!"]) in (
        "dogs running grass",
        "dog runs grass",
    )
    assert main_words(["A cat.", "The sea."]) == ""


def test_nothing_held_out_is_drawn_for_training(data):
    rng = random.Random(0)
    held_out = [set(group) for group in data.parts[True]["groups"]]
    assert held_out and not any(set(group) in held_out for group in data.parts[False]["groups"])
    drawn = {data.chat(rng, "repeat")[0] for _ in range(300)}
    assert len(drawn) == sum(map(len, data.parts[False]["groups"])) and not drawn & set().union(*held_out)
    assert data.chat(rng, "repeat", held_out=True)[0] in set().union(*held_out)


def test_the_tokenizer_gives_back_what_it_got(tokenizer):
    for text in ("A dog runs to the house.", "  two  spaces\nand a line", "Ünïcode, 図, 🙂", ""):
        assert tokenizer.decode(tokenizer(text, add_special_tokens=False)["input_ids"]) == text
    assert len(tokenizer("A dog runs.", add_special_tokens=False)["input_ids"]) <= 4
    assert len(tokenizer("<user><end>", add_special_tokens=False)["input_ids"]) == 2


def test_batches_made_ahead_are_the_batches(data, tokenizer):
    """By processes of their own, as for a GPU, from any step on: what a step reads is a function of seed and step."""
    batches = Batches(data, tokenizer, 4, 9, seed=3)
    ahead, here = list(batches.after(5, "cuda")), [batches[step] for step in range(9)]
    assert len(ahead) == 4 and not torch.equal(here[0][0], here[5][0])
    assert all(torch.equal(x, y) for one, two in zip(ahead, here[5:]) for x, y in zip(one, two))


def weights(folder):
    return Policy.load(str(folder)).model.state_dict()


def test_a_resumed_run_is_the_run_never_stopped(data, tmp_path, monkeypatch):
    whole = train(data, "4m", str(tmp_path / "whole"), steps=8, evaluations=4)
    evaluate, calls = backbone.evaluate, []

    def dies(*args):
        calls.append(1)
        if len(calls) == 3:
            raise KeyboardInterrupt  # after the third evaluation's step, before its state is kept
        evaluate(*args)

    monkeypatch.setattr(backbone, "evaluate", dies)
    with pytest.raises(KeyboardInterrupt):
        train(data, "4m", str(tmp_path / "parts"), steps=8, evaluations=4)
    monkeypatch.setattr(backbone, "evaluate", evaluate)
    with pytest.raises(GraceError, match="--resume"):
        train(data, "4m", str(tmp_path / "parts"), steps=8)
    with pytest.raises(GraceError, match="--batch 8 --seed 0"):
        train(data, "4m", str(tmp_path / "parts"), steps=8, seed=1, resume=True)
    fewer = copy.copy(data)
    fewer.kinds = data.kinds[:1]
    with pytest.raises(GraceError, match="is of other texts, groups or triplets"):
        train(fewer, "4m", str(tmp_path / "parts"), steps=8, resume=True)
    assert train(data, "4m", str(tmp_path / "parts"), steps=8, evaluations=4, resume=True) == whole
    one, two = weights(tmp_path / "whole"), weights(tmp_path / "parts")
    assert all(torch.equal(one[name], two[name]) for name in one)


def test_the_folder_opens_and_asks_for_what_was_taught(data, tmp_path):
    best = train(data, "4m", str(tmp_path), steps=5, evaluations=5)
    policy = Policy.load(str(tmp_path))
    assert policy.reading.instruction == INSTRUCTIONS["other words"][0] and policy.reading.max_new_tokens == 32
    assert policy.prompts.render("A dog.") == f"<system>{INSTRUCTIONS['other words'][0]}<user>A dog.<assistant>"
    log = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    assert [line["step"] for line in log] == [1, 2, 3, 4, 5]
    assert all(line[kind] > 0 for line in log for kind in ("plain", *INSTRUCTIONS))
    assert best["score"] == pytest.approx(sum(best[kind] for kind in INSTRUCTIONS) / 4)
    assert best["step"] > 2 and (tmp_path / "samples.md").read_text().count("→") == 16


def test_a_run_stops_where_held_out_chats_get_worse(data, tmp_path, monkeypatch):
    scores = iter([9, 9, 9, 5, 4, 6, 7, 8, 1])
    losses = lambda *_: dict.fromkeys(("plain", *data.kinds), next(scores))
    monkeypatch.setattr(backbone, "heldout_losses", losses)
    best = train(data, "4m", str(tmp_path), steps=9, evaluations=9)
    assert (best["step"], best["score"]) == (5, 4)
    assert len((tmp_path / "log.jsonl").read_text().splitlines()) == 8


@pytest.mark.parametrize("size, millions", [("1m", 1.3), ("4m", 4.2), ("16m", 16), ("60m", 60), ("120m", 120)])
def test_sizes_are_what_they_are_called(size, millions, monkeypatch):
    monkeypatch.undo()
    V, D, *_ = SIZES[size]
    named = type("Tokenizer", (), {"__len__": lambda self: V, "eos_token_id": 4, "pad_token_id": 0})()
    with torch.device("meta"):
        model = build_model(named, size)
    assert sum(p.numel() for p in model.parameters()) == pytest.approx(millions * 1e6, rel=0.05)


def test_bad_input_gets_one_sentence(data, tmp_path):
    with pytest.raises(GraceError, match=".txt or .txt.gz"):
        Data([str(tmp_path / "a.csv")], [], [])
    (tmp_path / "short.txt").write_text("Too short.")
    with pytest.raises(GraceError, match="at least 12800 characters"):
        Data([str(tmp_path / "short.txt")], [], [])
