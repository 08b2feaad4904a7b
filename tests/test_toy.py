"""The embedded world: what it promises about its texts, and that it is the same by seed."""

import json
import random

import toy


def slots_of(text):
    return {toy.CONCEPT[w][0]: (toy.CONCEPT[w][1], w) for w in text.split() if w in toy.CONCEPT}


def test_words_are_unique_and_forms_name_every_slot():
    words = [w for concepts in toy.SLOTS.values() for c in concepts for w in c]
    assert len(words) == len(set(words)) == 6 * 8 * 3
    assert not set(words) & {w for form in toy.FORMS for w in form.split()}
    assert all("{" + slot + "}" in form for form in toy.FORMS for slot in toy.SLOTS)


def test_triplets():
    rng, shared, copied = random.Random(0), 0, 0
    for _ in range(300):
        row = toy.triplet({slot: rng.randrange(8) for slot in toy.SLOTS}, rng)
        q, p, n = (slots_of(row[role]) for role in ("query", "positive", "negative"))
        assert {s: c for s, (c, _) in q.items()} == {s: c for s, (c, _) in p.items()}
        assert sum(q[s][0] != n[s][0] for s in q) == 1
        shared += sum(q[s] == p[s] for s in q)
        copied += sum(q[s] == n[s] for s in q)
    assert copied == 300 * 5 and shared < 0.2 * 300 * 6  # whoever compares words prefers the negative


def test_graded_pairs_count_the_slots_they_share():
    rng = random.Random(0)
    for _ in range(100):
        row = toy.graded_pair({slot: rng.randrange(8) for slot in toy.SLOTS}, rng)
        a, b = slots_of(row["sentence1"]), slots_of(row["sentence2"])
        assert row["score"] == sum(a[s][0] == b[s][0] for s in a)


def test_naming():
    text = "the angry doctor bought the lamp near the forest around noon ."
    assert toy.named("furious physician", text) == (2 / 6, 1.0)
    assert toy.named("angry angry child", text) == (1 / 6, 0.5)
    assert toy.named("", text) == (0.0, 0.0)


def test_no_event_is_in_both_train_and_heldout(tiny_world):
    events = {}
    for name in ("train", "heldout"):
        rows = [json.loads(line) for line in open(tiny_world / "data" / f"{name}.jsonl")]
        events[name] = {tuple(sorted((s, c) for s, (c, _) in slots_of(row["query"]).items())) for row in rows}
    assert events["train"] and events["heldout"] and not events["train"] & events["heldout"]


def test_the_same_seed_writes_the_same_files(tiny_world, tmp_path):
    toy.build(str(tmp_path), seed=0, train=64, heldout=16, steps=30)
    for name in ("model/model.safetensors", "model/tokenizer.json", "data/train.jsonl", "data/graded.jsonl"):
        assert (tmp_path / name).read_bytes() == (tiny_world / name).read_bytes(), name
