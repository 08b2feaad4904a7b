"""The embedded world: what it promises about its texts, and that it is the same by seed."""

import json
import random

import pytest

import toy
from toy import EVENTS, WORLDS


def slots_of(text, world=EVENTS):
    return {world.concept[w][0]: (world.concept[w][1], w) for w in text.split() if w in world.concept}


@pytest.mark.parametrize("world", WORLDS.values(), ids=WORLDS)
def test_words_are_unique_and_forms_name_every_slot(world):
    words = [w for concepts in world.slots.values() for c in concepts for w in c]
    assert len(words) == len(set(words))
    assert not set(words) & {w for said in (*world.forms, *world.phrases.values(), *world.talk) for w in said.split()}
    assert all(form.count("{" + slot + "}") == 1 for form in world.forms for slot in world.slots)
    assert set(world.phrases) == set(world.slots)


@pytest.mark.parametrize("name, most_shared", [("events", 0.2), ("meals", 0.25), ("parcels", 0.25)])
def test_triplets(name, most_shared):
    world = WORLDS[name]
    rng, shared, copied, slots = random.Random(0), 0, 0, len(world.slots)
    for _ in range(300):
        row = world.triplet(world.event(rng), rng)
        q, p, n = (slots_of(row[role], world) for role in ("query", "positive", "negative"))
        assert {s: c for s, (c, _) in q.items()} == {s: c for s, (c, _) in p.items()}
        assert sum(q[s][0] != n[s][0] for s in q) == 1
        shared += sum(q[s] == p[s] for s in q)
        copied += sum(q[s] == n[s] for s in q)
    assert copied == 300 * (slots - 1) and shared < most_shared * 300 * slots  # whoever compares words prefers the negative


@pytest.mark.parametrize("world", WORLDS.values(), ids=WORLDS)
def test_graded_pairs_count_the_slots_they_share(world):
    rng, scores = random.Random(0), set()
    for _ in range(100):
        row = world.graded_pair(world.event(rng), rng)
        a, b = slots_of(row["sentence1"], world), slots_of(row["sentence2"], world)
        assert row["score"] == sum(a[s][0] == b[s][0] for s in a)
        scores.add(row["score"])
    assert scores == set(range(len(world.slots) + 1))


def test_naming():
    text = "the angry doctor bought the lamp near the forest around noon ."
    assert EVENTS.named("furious physician", text) == (2 / 6, 1.0)
    assert EVENTS.named("angry angry child", text) == (1 / 6, 0.5)
    assert EVENTS.named("", text) == (0.0, 0.0)


def test_well_formed():
    meals = WORLDS["meals"]
    assert all(world.well_formed(world.rationale(world.event(random.Random(0)), random.Random(0))) for world in WORLDS.values())
    assert EVENTS.well_formed("furious physician noon") and meals.well_formed("nurse some soup in fog")
    for wrong in ("", "physician furious", "furious furious", "the furious physician", "somebody was there"):
        assert not EVENTS.well_formed(wrong), wrong
    assert not meals.well_formed("nurse soup") and not meals.well_formed("nurse some")


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
