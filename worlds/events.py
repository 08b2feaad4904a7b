"""Worlds in which naming is enough: something happened, told in many words, and a rationale names what is in each slot.

An event has six slots (who did what to which thing, where and when). A slot has one of eight concepts, and a concept three
synonyms: "the angry physician purchased the lantern ..." and "... the furious doctor bought the lamp" are the same event. A
query and its positive tell one event in different sentence forms and mostly different words. The hard negative changes one
slot and copies all other words of the query, so whoever compares words prefers it.

The answers of the warm start name the slots, one word each, in a fixed order. At first they are complete. Then they are
noisy: a slot is named with probability 0.5 and named wrongly with 0.2, and 15 % of the answers are empty talk. So the policy
that GRACE starts from writes poor and varied rationales, and has learned enough to do better.

None of these worlds needs a rationale: what it names is in the text, where a contrastive loss finds it too. (town.py has a
world that does.) `PARCELS` is a second world of this kind, for which no setting was chosen: does a claim hold there?
"""


class SlotWorld:
    """Slots, words for their concepts, and sentence forms. A meaning is an event, `{slot: number of its concept}`.

    slots    {slot: concepts}; a concept is its synonyms, as in "old elderly|young youthful"
    forms    sentences with every slot in them
    phrases  {slot: how a rationale names it}, in the rationale's order
    talk     answers that name nothing
    """

    warm_up, max_prompt_tokens, max_new_tokens = 800, 64, 20

    def __init__(self, instruction, slots, forms, phrases, talk):
        self.instruction, self.forms, self.phrases, self.talk = instruction, forms, phrases, talk
        self.slots = {slot: [c.split() for c in concepts.split("|")] for slot, concepts in slots.items()}
        self.concept = {w: (s, i) for s, concepts in self.slots.items() for i, words in enumerate(concepts) for w in words}
        plain = " ".join((*forms, *phrases.values(), *talk, instruction)).split()
        self.words = {w for w in plain if "{" not in w} | set(self.concept)

    # ------------------------------------------------------------ meanings

    def held_out(self, event):
        """Whether an event is kept from training: one in eight is, by its slots alone."""
        return sum(c * 3**i for i, c in enumerate(event.values())) % 8 == 0

    def meanings(self, rng, held_out=False):
        """An endless stream of events, all held out or none."""
        while True:
            event = {slot: rng.randrange(len(concepts)) for slot, concepts in self.slots.items()}
            if self.held_out(event) == held_out:
                yield event

    def changed(self, event, slot, rng):
        """The event with another concept in one slot."""
        return {**event, slot: rng.choice([c for c in range(len(self.slots[slot])) if c != event[slot]])}

    # ------------------------------------------------------------ texts

    def word(self, event, slot, rng):
        """Any word for what is in a slot."""
        return rng.choice(self.slots[slot][event[slot]])

    def words_for(self, event, rng, avoid=()):
        """A word for every slot. Words in `avoid` are passed over with probability 0.7. `-> {slot: word}`."""
        words = {}
        for slot, concept in event.items():
            fresh = [w for w in self.slots[slot][concept] if w not in avoid]
            words[slot] = rng.choice(fresh if rng.random() < 0.7 else self.slots[slot][concept])
        return words

    def tell(self, event, rng):
        """An event as a sentence."""
        words = self.words_for(event, rng)
        return rng.choice(self.forms).format(**words)

    def triplet(self, event, rng):
        """A query, its positive, and a negative that copies the query's words except in one slot."""
        form, other = rng.sample(self.forms, 2)
        words = self.words_for(event, rng)
        positive = other.format(**self.words_for(event, rng, avoid=set(words.values())))
        slot = rng.choice(list(self.slots))
        wrong = self.word(self.changed(event, slot, rng), slot, rng)
        negative = rng.choice([f for f in self.forms if f != form]).format(**{**words, slot: wrong})
        return {"query": form.format(**words), "positive": positive, "negative": negative}

    def graded_pair(self, event, rng):
        """Two sentences that agree in none, some or all of the slots. The score is how many."""
        S = len(self.slots)
        differ, other = rng.sample(list(self.slots), rng.randint(0, S)), dict(event)
        for slot in differ:
            other = self.changed(other, slot, rng)
        return {"sentence1": self.tell(event, rng), "sentence2": self.tell(other, rng), "score": float(S - len(differ))}

    # ------------------------------------------------------------ answers

    def rationale(self, event, rng, keep=1.0, wrong=0.0):
        """The slots of an event, one phrase each, in order. A slot may be left out or wrong."""
        parts = []
        for slot, phrase in self.phrases.items():
            luck = rng.random()
            if luck < keep:
                parts.append(phrase.format(self.word(event, slot, rng)))
            elif luck < keep + wrong:
                parts.append(phrase.format(self.word(self.changed(event, slot, rng), slot, rng)))
        return " ".join(parts)

    def chat(self, event, rng, progress):
        """A chat of the warm start: complete answers in the first half, then poor ones. `-> (instruction, text, answer)`."""
        if progress <= 0.5:
            answer = self.rationale(event, rng)
        elif rng.random() < 0.15:
            answer = rng.choice(self.talk)
        else:
            answer = self.rationale(event, rng, keep=0.5, wrong=0.2)
        return self.instruction, self.tell(event, rng), answer

    # ------------------------------------------------------------ what an answer says

    def named(self, written, text):
        """How much of a text an answer names: `(recall over the slots, precision of what is named)`."""
        told, claims = ({self.concept[w] for w in part.split() if w in self.concept} for part in (text, written))
        return len(told & claims) / len(told), len(told & claims) / max(len(claims), 1)

    def well_formed(self, written):
        """Whether an answer has the form of the warm start's: phrases in order, each slot at most once."""
        named = {self.concept[w][0]: w for w in written.split() if w in self.concept}
        phrases = [phrase.format(named[slot]) for slot, phrase in self.phrases.items() if slot in named]
        return phrases != [] and written == " ".join(phrases)


EVENTS = SlotWorld(
    "name what happened",
    {  # six slots of eight concepts of three synonyms
        "attribute": "old elderly aged|young youthful juvenile|tall lanky towering|rich wealthy affluent|"
        "happy cheerful merry|angry furious irate|quiet silent hushed|clever smart bright",
        "agent": "doctor physician medic|child kid youngster|thief robber burglar|teacher instructor tutor|"
        "soldier trooper warrior|farmer grower rancher|sailor seaman mariner|singer vocalist crooner",
        "act": "bought purchased acquired|sold traded vended|wrecked smashed shattered|mended repaired fixed|"
        "buried concealed stashed|found discovered located|painted coloured decorated|carried hauled lugged",
        "object": "car automobile vehicle|boat ship vessel|coat jacket parka|lamp lantern torch|"
        "knife blade dagger|bicycle bike cycle|sofa couch settee|picture portrait canvas",
        "place": "forest woods woodland|street road avenue|shop store boutique|church chapel cathedral|"
        "beach shore coast|prison jail dungeon|school academy college|inn hotel hostel",
        "time": "morning daybreak sunrise|noon midday lunchtime|afternoon teatime siesta|evening dusk sunset|"
        "night midnight nighttime|winter wintertime snowtime|summer summertime midsummer|autumn fall harvest",
    },
    (
        "the {attribute} {agent} {act} the {object} near the {place} around {time} .",
        "around {time} , near the {place} , the {attribute} {agent} {act} the {object} .",
        "it was near the {place} that the {attribute} {agent} {act} the {object} around {time} .",
        "around {time} the {object} was {act} by the {attribute} {agent} near the {place} .",
        "somebody {act} the {object} near the {place} around {time} : the {attribute} {agent} .",
        "near the {place} the {agent} , who was {attribute} , {act} the {object} around {time} .",
    ),
    {slot: "{}" for slot in ("attribute", "agent", "act", "object", "place", "time")},
    ("something happened somewhere", "it was the usual", "somebody was there"),
)
PARCELS = SlotWorld(  # five slots of nine concepts of two synonyms, and rationales with small words
    "report the parcel",
    {
        "cargo": "letter message|crate chest|violin fiddle|carpet rug|clock timepiece|mirror glass|stove oven|"
        "basket hamper|ladder steps",
        "mishap": "lost mislaid|soaked drenched|burnt scorched|stolen pinched|delayed postponed|crushed squashed|"
        "opened unsealed|swapped switched|dented bent",
        "carrier": "postman courier|trucker driver|cyclist rider|skipper captain|porter bearer|drone robot|"
        "trader merchant|scout ranger|clerk officer",
        "origin": "harbour port|mine quarry|palace mansion|village hamlet|mountain summit|island isle|desert dunes|"
        "swamp marsh|valley glen",
        "target": "hospital clinic|library archive|museum gallery|stadium arena|factory plant|airport airfield|"
        "embassy consulate|theatre playhouse|bakery patisserie",
    },
    (
        "from the {origin} to the {target} a {carrier} brought one {cargo} , which got {mishap} on the way .",
        "the {cargo} got {mishap} , says the {carrier} , somewhere past the {origin} and before the {target} .",
        "no {cargo} reached the {target} intact : {mishap} after the {origin} , while our {carrier} slept .",
        "one more {cargo} {mishap} ! the {carrier} left the {origin} early and found the {target} shut .",
        "which {carrier} had the {cargo} for the {target} ? it came from the {origin} and was {mishap} .",
    ),
    {"cargo": "the {}", "mishap": "was {}", "carrier": "by {}", "origin": "out of {}", "target": "bound for {}"},
    ("things went astray", "another day at work", "who can tell"),
)
