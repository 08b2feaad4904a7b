"""The small worlds: what each promises about its texts and answers, and that a seed always writes the same files."""

import random
from itertools import islice

import pytest

from worlds import EVENTS, TOWN, WORLDS
from worlds.events import CONCEPT, FORMS, SLOTS, TALK
from worlds.make import build_world
from worlds.town import CLOSING, DIRECTIONS, PLACES, WALKERS

every_world = pytest.mark.parametrize("world", WORLDS.values(), ids=WORLDS)

# ---------------------------------------------------------------- every world


@every_world
def test_held_out_meanings_are_never_trained_on(world):
    rng = random.Random(0)
    trained, held_out = (list(islice(world.meanings(rng, held), 300)) for held in (False, True))
    assert not any(map(world.held_out, trained)) and all(map(world.held_out, held_out))


@every_world
def test_the_words_of_a_world_are_all_that_it_writes(world):
    rng, texts = random.Random(0), [world.instruction]
    for meaning in islice(world.meanings(rng), 200):
        texts += [*world.triplet(meaning, rng).values(), *world.chat(meaning, rng, 0.1), *world.chat(meaning, rng, 0.9)]
        texts += [text for text in world.graded_pair(meaning, rng).values() if isinstance(text, str)]
    assert {word for text in texts for word in text.split()} == world.words


@every_world
def test_first_answers_of_the_warm_start_are_right_and_well_formed(world):
    rng = random.Random(0)
    for meaning in islice(world.meanings(rng), 100):
        instruction, text, answer = world.chat(meaning, rng, 0.1)
        if instruction == world.instruction:
            assert world.well_formed(answer) and world.named(answer, text) == (1, 1)


@every_world
def test_the_same_seed_writes_the_same_files(tmp_path, world):
    for folder in ("one", "two"):
        build_world(str(tmp_path / folder), seed=3, train=16, heldout=8, steps=2, world=world)
    one, two = ({p.relative_to(tmp_path / x): p.read_bytes() for p in (tmp_path / x).rglob("*.*")} for x in ("one", "two"))
    assert one == two and len(one) > 10


# ---------------------------------------------------------------- the town


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
        query, positive, negative = (TOWN.read(text) for text in TOWN.triplet(ends, rng).values())
        assert TOWN.ends(query) == TOWN.ends(positive) == ends
        assert not TOWN.held_out(TOWN.ends(negative))  # so that no other query has it for an answer
        assert all(query[walker][0] == negative[walker][0] for walker in WALKERS)
        assert sum(a != b for walker in WALKERS for a, b in zip(query[walker][1], negative[walker][1], strict=True)) == 1


def test_graded_pairs_count_the_ends_they_share():
    rng, scores = random.Random(0), set()
    for ends in islice(TOWN.meanings(rng, True), 60):
        one, two, score = TOWN.graded_pair(ends, rng).values()
        assert score == sum(a == b for a, b in zip(TOWN.ends(TOWN.read(one)), TOWN.ends(TOWN.read(two))))
        scores.add(score)
    assert scores == {0, 1, 2}


def test_a_held_out_file_for_every_number_of_steps():
    for n, rows in zip(TOWN.WARM, TOWN.ladder(20, random.Random(0)).values(), strict=True):
        assert {len(way) for row in rows for text in row.values() for _, way in TOWN.read(text).values()} == {n}
        ends = [TOWN.ends(TOWN.read(row["query"])) for row in rows]
        assert all(map(TOWN.held_out, ends)) and len(set(ends)) == 20


def test_the_longest_text_and_the_longest_answer_fit():
    rng = random.Random(0)
    walks = TOWN.plan(next(TOWN.meanings(rng)), rng, max(TOWN.WARM))
    assert len(TOWN.describe(walks, rng).split()) < TOWN.max_prompt_tokens
    assert len(TOWN.rationale(walks).split()) < TOWN.max_new_tokens  # and an end token


def test_what_the_town_makes_of_an_answer():
    text = "bob starts at the mill , then north . from the well ann goes east south ."
    ann, bob = TOWN.walk("well", ("east", "south")), TOWN.walk("mill", ("north",))
    closing = [f"so {place} {CLOSING[place][i]}" for i, place in enumerate((ann[-1], bob[-1]))]
    thought = f"ann well east {ann[1]} south {ann[2]} {closing[0]} bob mill north {bob[1]} {closing[1]}"
    guess = f"ann {closing[0]} bob {closing[1]}"
    assert thought == TOWN.rationale(TOWN.read(text)) and guess == TOWN.rationale(TOWN.read(text), think=False)
    for answer, thinks in ((thought, True), (guess, False)):
        assert TOWN.named(answer, text) == (1, 1) and TOWN.well_formed(answer) and TOWN.thinks(answer) == thinks
    assert TOWN.named(f"bob {closing[1]}", text) == (0.5, 1)
    swapped = f"ann so {TOWN.closing('ann', bob[-1])} bob so {TOWN.closing('bob', ann[-1])}"
    assert TOWN.named(swapped, text) == (0, 0) and TOWN.well_formed(swapped)
    assert TOWN.true_steps(thought, text) == 1 and TOWN.true_steps(guess, text) == 0
    assert TOWN.true_steps(thought.replace("bob mill", "bob well"), text) == 4 / 5
    assert TOWN.true_steps(thought.replace("bob mill", "bob mill east well"), text) == 4 / 6  # one too many
    for broken in ("", "so", f"ann {closing[0]}", thought.replace("south", ""), thought.replace("bob", "ann"), f"well {guess}"):
        assert not TOWN.well_formed(broken), broken


def test_one_chat_in_ten_asks_where_the_walks_start_and_a_third_of_the_others_think():
    rng = random.Random(0)
    chats = [TOWN.chat(ends, rng, 0.9) for ends in islice(TOWN.meanings(rng), 1000)]
    others = [(text, answer) for instruction, text, answer in chats if instruction == TOWN.other_instruction]
    assert 70 < len(others) < 130
    answers = [answer for instruction, _, answer in chats if instruction == TOWN.instruction]
    assert sum(map(TOWN.thinks, answers)) / len(answers) == pytest.approx(0.35, abs=0.04)
    for text, answer in others + TOWN.other_chats(10, rng):
        walks = TOWN.read(text)
        assert answer == f"ann {walks['ann'][0]} bob {walks['bob'][0]}"


# ---------------------------------------------------------------- the events


def slots_of(text):
    """`{slot: (concept, word)}` of a text."""
    return {CONCEPT[w][0]: (CONCEPT[w][1], w) for w in text.split() if w in CONCEPT}


def test_a_word_names_one_concept_and_a_form_every_slot():
    words = [w for concepts in SLOTS.values() for c in concepts for w in c]
    assert len(words) == len(set(words)) == 6 * 8 * 3
    assert not set(words) & {w for text in (*FORMS, *TALK) for w in text.split()}
    assert all(form.count("{" + slot + "}") == 1 for form in FORMS for slot in SLOTS)


def test_a_negative_changes_one_slot_and_copies_more_words_than_the_positive():
    rng, shared = random.Random(0), 0
    for event in islice(EVENTS.meanings(rng), 300):
        query, positive, negative = map(slots_of, EVENTS.triplet(event, rng).values())
        assert all(query[s][0] == positive[s][0] for s in SLOTS)
        assert sum(query[s][0] != negative[s][0] for s in SLOTS) == sum(query[s] != negative[s] for s in SLOTS) == 1
        shared += sum(query[s] == positive[s] for s in SLOTS)
    assert shared < 0.25 * 300 * len(SLOTS)


def test_graded_pairs_count_the_slots_they_share():
    rng, scores = random.Random(0), set()
    for event in islice(EVENTS.meanings(rng), 100):
        one, two, score = EVENTS.graded_pair(event, rng).values()
        a, b = slots_of(one), slots_of(two)
        assert score == sum(a[s][0] == b[s][0] for s in SLOTS)
        scores.add(score)
    assert scores == set(range(7))


def test_what_events_makes_of_an_answer():
    text = "the angry doctor bought the lamp near the forest around noon ."
    assert EVENTS.named("furious physician", text) == (2 / 6, 1.0)
    assert EVENTS.named("angry angry child", text) == (1 / 6, 0.5)
    assert EVENTS.named("", text) == (0.0, 0.0)
    assert EVENTS.well_formed("furious physician noon")
    for wrong in ("", "physician furious", "furious furious", "the furious physician", "somebody was there"):
        assert not EVENTS.well_formed(wrong), wrong
