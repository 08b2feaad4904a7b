"""Worlds of slots: something happened, told in many words; a rationale names what is in each slot.

An event has six slots (who did what to which thing, where and when), a slot one of eight concepts, a concept three
synonyms: "the angry physician purchased the lantern ..." and "... the furious doctor bought the lamp" are the same
event. A query and its positive tell one event in different sentence forms and mostly different words; the hard negative
changes one slot and copies all its other words, so whoever compares words prefers it.

The warm start's answers name the slots, one word each, in a fixed order. First they are complete; then they are noisy: a
slot named with probability 0.5, wrong with 0.2, any synonym at random, and 15 % empty talk. So the policy that GRACE
starts from writes poor and varied rationales, and has learned enough to do better.

`EVENTS` is the one to start with; `MEALS` and `PARCELS` are two more of other builds, to see whether a claim holds there.
None of them needs a rationale: what the rationale names stands in the text, and a loss finds it there (see town.py for a
world in which it does not).
"""


class SlotWorld:
    """Slots, the words for their concepts, and the sentence forms they are told in. A meaning is an event.

    slots    {slot: concepts}, a concept its synonyms, as in "old elderly|young youthful"
    forms    sentences with every slot in them
    phrases  {slot: how a rationale names it}, in the rationale's order
    talk     what an answer says that names nothing
    """

    warm_up, max_prompt_tokens, max_new_tokens = 800, 64, 20

    def __init__(self, instruction, slots, forms, phrases, talk):
        self.instruction, self.forms, self.phrases, self.talk = instruction, forms, phrases, talk
        self.slots = {slot: [c.split() for c in concepts.split("|")] for slot, concepts in slots.items()}
        self.concept = {w: (s, i) for s, concepts in self.slots.items() for i, words in enumerate(concepts) for w in words}
        plain = " ".join((*forms, *phrases.values(), *talk, instruction)).split()
        self.words = {w for w in plain if "{" not in w} | set(self.concept)

    # ------------------------------------------------------------ meanings

    def event(self, rng):
        """A concept for every slot, by number."""
        return {slot: rng.randrange(len(concepts)) for slot, concepts in self.slots.items()}

    def held_out(self, event):
        """Whether an event is kept from training: one in eight is, by its slots alone."""
        return sum(c * 3**i for i, c in enumerate(event.values())) % 8 == 0

    def meanings(self, rng, held_out=False):
        """Events without end, all held out or none."""
        while True:
            event = self.event(rng)
            if self.held_out(event) == held_out:
                yield event

    def changed(self, event, slot, rng):
        """The event with another concept in one slot."""
        return {**event, slot: rng.choice([c for c in range(len(self.slots[slot])) if c != event[slot]])}

    # ------------------------------------------------------------ texts

    def worded(self, event, rng, avoid=()):
        """A word for every slot. Words in `avoid` are passed over with probability 0.7. `-> {slot: word}`."""
        words = {}
        for slot, concept in event.items():
            fresh = [w for w in self.slots[slot][concept] if w not in avoid]
            words[slot] = rng.choice(fresh if rng.random() < 0.7 else self.slots[slot][concept])
        return words

    def tell(self, event, rng):
        """An event as a sentence."""
        words = self.worded(event, rng)
        return rng.choice(self.forms).format(**words)

    def triplet(self, event, rng):
        """A query, its positive, and a negative that copies the query's words but for one slot."""
        form, other = rng.sample(self.forms, 2)
        words = self.worded(event, rng)
        positive = other.format(**self.worded(event, rng, avoid=set(words.values())))
        slot = rng.choice(list(self.slots))
        wrong = rng.choice(self.slots[slot][self.changed(event, slot, rng)[slot]])
        negative = rng.choice([f for f in self.forms if f != form]).format(**{**words, slot: wrong})
        return {"query": form.format(**words), "positive": positive, "negative": negative}

    def graded_pair(self, event, rng):
        """Two sentences that agree in none, some or all of the slots; the score is how many."""
        S = len(self.slots)
        differ, other = rng.sample(list(self.slots), rng.randint(0, S)), dict(event)
        for slot in differ:
            other = self.changed(other, slot, rng)
        return {"sentence1": self.tell(event, rng), "sentence2": self.tell(other, rng), "score": float(S - len(differ))}

    def ladder(self, n, rng):
        """No text of these worlds is harder than another: there are no files by difficulty."""
        return {}

    # ------------------------------------------------------------ answers

    def rationale(self, event, rng, keep=1.0, wrong=0.0):
        """The slots of an event, one phrase each, in order; a slot may be left out or wrong."""
        said = []
        for slot, phrase in self.phrases.items():
            luck = rng.random()
            if luck < keep:
                said.append(phrase.format(rng.choice(self.slots[slot][event[slot]])))
            elif luck < keep + wrong:
                said.append(phrase.format(rng.choice(self.slots[slot][self.changed(event, slot, rng)[slot]])))
        return " ".join(said)

    def chat(self, event, rng, progress):
        """A text and its answer for the warm start: complete in the first half, then poor. `-> (instruction, text, answer)`."""
        if progress <= 0.5:
            answer = self.rationale(event, rng)
        elif rng.random() < 0.15:
            answer = rng.choice(self.talk)
        else:
            answer = self.rationale(event, rng, keep=0.5, wrong=0.2)
        return self.instruction, self.tell(event, rng), answer

    def named(self, written, text):
        """How much of a text its rationale names: `(recall over the slots, precision of what is named)`."""
        told = {self.concept[w] for w in text.split() if w in self.concept}
        claims = {self.concept[w] for w in written.split() if w in self.concept}
        return len(told & claims) / len(told), len(told & claims) / max(len(claims), 1)

    def well_formed(self, written):
        """Whether a rationale is what the warm start was taught to write: phrases in order, each slot at most once."""
        named = [w for w in written.split() if w in self.concept]
        slots = [self.concept[w][0] for w in named]
        in_order = [slot for slot in self.phrases if slot in slots]
        return slots == in_order != [] and written == " ".join(self.phrases[s].format(w) for s, w in zip(slots, named))


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
MEALS = SlotWorld(  # another build: seven slots, six concepts, two synonyms, and rationales with small words
    "say who had what",
    {
        "weather": "rain drizzle|snow sleet|fog mist|storm gale|heat swelter|frost ice",
        "mood": "calm serene|nervous anxious|proud haughty|tired weary|curious inquisitive|grumpy sullen",
        "guest": "nurse caregiver|lawyer attorney|painter artist|pilot aviator|monk friar|clown jester",
        "deed": "ordered requested|tasted sampled|spilled dropped|praised lauded|cooked prepared|refused declined",
        "dish": "soup broth|cake tart|bread loaf|fish trout|stew casserole|salad greens",
        "drink": "coffee espresso|tea infusion|wine claret|beer ale|juice nectar|milk cream",
        "venue": "kitchen galley|garden orchard|tavern pub|train railcar|balcony terrace|cellar basement",
    },
    (
        "in the {venue} , despite {weather} , a {mood} {guest} {deed} some {dish} with {drink} .",
        "{dish} and {drink} were {deed} by one {guest} , rather {mood} , in our {venue} during {weather} .",
        "they say a {guest} {deed} {dish} , {drink} beside it , while {weather} ruled outside the {venue} ; how {mood} !",
        "{weather} again : {mood} as ever , the {guest} of the {venue} {deed} her {drink} and her {dish} .",
        "was it {dish} or {drink} that the {guest} {deed} , {mood} about the {weather} , back at the {venue} ?",
    ),
    {
        "guest": "{}",
        "deed": "who {}",
        "dish": "some {}",
        "drink": "with {}",
        "venue": "at the {}",
        "weather": "in {}",
        "mood": "and felt {}",
    },
    ("nothing worth noting", "people were busy", "such is life"),
)
PARCELS = SlotWorld(  # a third, on which nothing was ever chosen: five slots of nine concepts, what went where and how it fared
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
