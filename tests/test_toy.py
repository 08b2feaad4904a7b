"""The embedded worlds: what each promises about its texts, and that a folder is the same by seed."""

import json
import random
from itertools import islice

import pytest

from worlds import EVENTS, TOWN, WORLDS
from worlds.make import build_world
from worlds.town import CLOSING, DIRECTIONS, PLACES, WALKERS

SLOT_WORLDS = {name: world for name, world in WORLDS.items() if not name.startswith("town")}


# ---------------------------------------------------------------- every world


@pytest.mark.parametrize("world", WORLDS.values(), ids=WORLDS)
def test_held_out_meanings_are_never_trained_on(world):
    rng = random.Random(0)
    trained, held_out = (list(islice(world.meanings(rng, held), 300)) for held in (False, True))
    assert not any(map(world.held_out, trained)) and all(map(world.held_out, held_out))


@pytest.mark.parametrize("world", WORLDS.values(), ids=WORLDS)
def test_the_words_of_a_world_are_all_that_it_writes(world):
    rng, written = random.Random(0), [world.instruction]
    for meaning in islice(world.meanings(rng), 200):
        written += [*world.triplet(meaning, rng).values(), *world.chat(meaning, rng, 0.1), *world.chat(meaning, rng, 0.9)]
        written += [text for text in world.graded_pair(meaning, rng).values() if isinstance(text, str)]
    assert {word for text in written for word in text.split()} == world.words


@pytest.mark.parametrize("world", WORLDS.values(), ids=WORLDS)
def test_first_answers_of_the_warm_start_are_well_formed(world):
    rng = random.Random(0)
    for meaning in islice(world.meanings(rng), 100):
        instruction, text, answer = world.chat(meaning, rng, 0.1)
        if instruction == world.instruction:
            assert world.well_formed(answer) and world.named(answer, text) == (1, 1)


def test_the_same_seed_writes_the_same_files(tiny_world, tmp_path):
    build_world(str(tmp_path), seed=0, train=64, heldout=16, steps=30)
    for name in ("model/model.safetensors", "model/tokenizer.json", "data/train.jsonl", "data/graded.jsonl"):
        assert (tmp_path / name).read_bytes() == (tiny_world / name).read_bytes(), name


# ---------------------------------------------------------------- the town


def rows_of(path):
    return [json.loads(line) for line in open(path)]


@pytest.fixture(scope="module")
def town(tmp_path_factory):
    """The town's folder, its policy as good as random."""
    folder = tmp_path_factory.mktemp("town")
    build_world(str(folder), seed=0, train=64, heldout=32, steps=1, world=TOWN)
    return folder


def test_four_streets_lead_from_every_place_to_four_others():
    for here in PLACES:
        assert len({here, *(TOWN.map[direction][here] for direction in DIRECTIONS)}) == 5
    assert all(sorted(street.values()) == sorted(PLACES) for street in TOWN.map.values())


def test_no_two_places_share_a_word():
    words = [*PLACES, *(word for pair in CLOSING.values() for words in pair for word in words.split())]
    assert len(words) == len(set(words)) == 5 * len(PLACES)


def test_a_positive_ends_where_its_query_ends_and_the_negative_does_not():
    rng = random.Random(0)
    for ends in islice(TOWN.meanings(rng, True), 300):
        row = {role: TOWN.read(text) for role, text in TOWN.triplet(ends, rng).items()}
        assert TOWN.ends(row["query"]) == TOWN.ends(row["positive"]) == ends
        assert not TOWN.held_out(TOWN.ends(row["negative"]))  # so that no other query has it for an answer
        ways = [[step for _, way in row[role].values() for step in way] for role in ("query", "negative")]
        assert sum(a != b for a, b in zip(*ways, strict=True)) == 1
        for walker in WALKERS:
            assert row["query"][walker][0] == row["negative"][walker][0]


def test_graded_pairs_count_the_ends_they_share():
    rng, scores = random.Random(0), set()
    for ends in islice(TOWN.meanings(rng, True), 60):
        row = TOWN.graded_pair(ends, rng)
        one, two = (TOWN.ends(TOWN.read(row[part])) for part in ("sentence1", "sentence2"))
        assert row["score"] == sum(a == b for a, b in zip(one, two))
        scores.add(row["score"])
    assert scores == {0, 1, 2}


def test_a_folder_has_a_file_for_every_number_of_steps(town):
    trained = {TOWN.ends(TOWN.read(row["query"])) for row in rows_of(town / "data" / "train.jsonl")}
    for n in TOWN.WARM:
        rows = rows_of(town / "data" / f"heldout-steps-{n}.jsonl")
        assert len({TOWN.ends(TOWN.read(row["query"])) for row in rows}) == len(rows) == 32  # each meaning once
        for row in rows:
            assert {len(way) for text in row.values() for _, way in TOWN.read(text).values()} == {n}
            assert TOWN.ends(TOWN.read(row["query"])) not in trained
    assert max(TOWN.TRAIN) + 2 == max(TOWN.WARM)  # the last two are longer than any that is rewarded


def test_the_longest_answer_fits(town):
    rng, reading = random.Random(0), json.loads((town / "model" / "grace_config.json").read_text())
    walks = TOWN.plan(next(TOWN.meanings(rng)), rng, max(TOWN.WARM))
    assert len(TOWN.told(walks, rng).split()) < reading["max_prompt_tokens"]
    assert len(TOWN.rationale(walks).split()) < reading["max_new_tokens"]  # and an end token


def test_what_the_town_makes_of_an_answer():
    text = "bob starts at the mill , then north . from the well ann goes east south ."
    ann, bob = TOWN.walk("well", ("east", "south")), TOWN.walk("mill", ("north",))
    closing = [f"so {place} {CLOSING[place][i]}" for i, place in enumerate((ann[-1], bob[-1]))]
    right = f"ann well east {ann[1]} south {ann[2]} {closing[0]} bob mill north {bob[1]} {closing[1]}"
    so = f"ann {closing[0]} bob {closing[1]}"
    assert right == TOWN.rationale(TOWN.read(text)) and so == TOWN.rationale(TOWN.read(text), think=False)
    for answer, thinks in ((right, True), (so, False)):
        assert TOWN.named(answer, text) == (1, 1) and TOWN.well_formed(answer) and TOWN.thinks(answer) == thinks
    assert TOWN.true_steps(right, text) == 1 and TOWN.true_steps(so, text) == 0
    assert TOWN.true_steps(right.replace("south", "west"), text) == 4 / 5
    assert TOWN.true_steps(right.replace("bob mill", "bob well"), text) == 4 / 5
    assert TOWN.true_steps(right.replace("bob mill", "bob mill east well"), text) == 4 / 6  # one too much
    assert TOWN.true_steps(f"ann well {so}", text) == 1 / 5
    other = next(place for place in PLACES if place not in (ann[-1], bob[-1]))
    wrong = f"ann so {TOWN.closing('ann', other)} bob {closing[1]}"
    assert TOWN.named(wrong, text) == (0.5, 0.5) and TOWN.well_formed(wrong)
    assert TOWN.named(f"bob {closing[1]}", text) == (0.5, 1)
    swapped = f"ann so {bob[-1]} {CLOSING[bob[-1]][0]} bob so {ann[-1]} {CLOSING[ann[-1]][1]}"
    assert TOWN.named(swapped, text) == (0, 0) and TOWN.well_formed(swapped)
    for broken in (
        "",
        "so",
        f"ann so {other}",
        f"ann {closing[0]}",
        right.replace("south", ""),
        right.replace("bob", "ann"),
        f"well {so}",
    ):
        assert not TOWN.well_formed(broken), broken


def test_the_other_instruction_is_in_one_chat_of_ten_and_asks_for_what_stands_in_the_text():
    rng = random.Random(0)
    chats = [TOWN.chat(ends, rng, 0.5) for ends in islice(TOWN.meanings(rng), 1000)]
    others = [(text, answer) for instruction, text, answer in chats if instruction == TOWN.other_instruction]
    assert 70 < len(others) < 130
    for text, answer in others + TOWN.other_chats(10, rng):
        starts = {walker: start for walker, (start, _) in TOWN.read(text).items()}
        assert answer == f"ann {starts['ann']} bob {starts['bob']}"


# ---------------------------------------------------------------- events, meals, parcels


def slots_of(text, world=EVENTS):
    return {world.concept[w][0]: (world.concept[w][1], w) for w in text.split() if w in world.concept}


@pytest.mark.parametrize("world", SLOT_WORLDS.values(), ids=SLOT_WORLDS)
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


@pytest.mark.parametrize("world", SLOT_WORLDS.values(), ids=SLOT_WORLDS)
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
    assert EVENTS.well_formed("furious physician noon") and meals.well_formed("nurse some soup in fog")
    for wrong in ("", "physician furious", "furious furious", "the furious physician", "somebody was there"):
        assert not EVENTS.well_formed(wrong), wrong
    assert not meals.well_formed("nurse soup") and not meals.well_formed("nurse some")


def test_no_event_is_in_both_train_and_heldout(tiny_world):
    events = {}
    for name in ("train", "heldout"):
        rows = rows_of(tiny_world / "data" / f"{name}.jsonl")
        events[name] = {tuple(sorted((s, c) for s, (c, _) in slots_of(row["query"]).items())) for row in rows}
    assert events["train"] and events["heldout"] and not events["train"] & events["heldout"]
