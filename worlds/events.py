"""A world in which naming is enough: something happened, told in many words, and a rationale names what is in each slot.

An event has six slots (who did what to which thing, where and when). A slot has one of eight concepts, and a concept three
synonyms: "the angry physician purchased the lantern ..." and "... the furious doctor bought the lamp" are the same event. A
query and its positive tell one event in different sentence forms and mostly different words. The hard negative changes one
slot and copies all other words of the query, so whoever compares words prefers it.

The answers of the warm start name the slots, one word each, in a fixed order. At first they are complete. Then they are
noisy: a slot is named with probability 0.5 and named wrongly with 0.2, and 15 % of the answers are empty talk. So the policy
that GRACE starts from writes poor and varied rationales, and has learned enough to do better.

This world needs no rationale: what it names is in the text, where a contrastive loss finds it too. (town.py has one that does.)
"""

SYNONYMS = {  # slot: its concepts, each as its synonyms; in the order of a rationale
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
}
SLOTS = {slot: [concept.split() for concept in concepts.split("|")] for slot, concepts in SYNONYMS.items()}
CONCEPT = {word: (slot, i) for slot, concepts in SLOTS.items() for i, words in enumerate(concepts) for word in words}
FORMS = (
    "the {attribute} {agent} {act} the {object} near the {place} around {time} .",
    "around {time} , near the {place} , the {attribute} {agent} {act} the {object} .",
    "it was near the {place} that the {attribute} {agent} {act} the {object} around {time} .",
    "around {time} the {object} was {act} by the {attribute} {agent} near the {place} .",
    "somebody {act} the {object} near the {place} around {time} : the {attribute} {agent} .",
    "near the {place} the {agent} , who was {attribute} , {act} the {object} around {time} .",
)
TALK = ("something happened somewhere", "it was the usual", "somebody was there")  # answers that name nothing


class Events:
    """A meaning is an event, `{slot: number of its concept}`."""

    instruction = "name what happened"
    warm_up, max_prompt_tokens, max_new_tokens = 800, 64, 20
    words = {w for w in " ".join((*FORMS, *TALK, instruction)).split() if "{" not in w} | set(CONCEPT)

    # ------------------------------------------------------------ meanings

    def held_out(self, event):
        """Whether an event is kept from training: one in eight is, by its slots alone."""
        return sum(c * 3**i for i, c in enumerate(event.values())) % 8 == 0

    def meanings(self, rng, held_out=False):
        """An endless stream of events, all held out or none."""
        while True:
            event = {slot: rng.randrange(len(concepts)) for slot, concepts in SLOTS.items()}
            if self.held_out(event) == held_out:
                yield event

    def changed(self, event, slot, rng):
        """The event with another concept in one slot."""
        return {**event, slot: rng.choice([c for c in range(len(SLOTS[slot])) if c != event[slot]])}

    # ------------------------------------------------------------ texts

    def word(self, event, slot, rng):
        """Any word for what is in a slot."""
        return rng.choice(SLOTS[slot][event[slot]])

    def words_for(self, event, rng, avoid=()):
        """A word for every slot. Words in `avoid` are passed over with probability 0.7. `-> {slot: word}`."""
        words = {}
        for slot, concept in event.items():
            fresh = [w for w in SLOTS[slot][concept] if w not in avoid]
            words[slot] = rng.choice(fresh if rng.random() < 0.7 else SLOTS[slot][concept])
        return words

    def tell(self, event, rng):
        """An event as a sentence."""
        words = self.words_for(event, rng)
        return rng.choice(FORMS).format(**words)

    def triplet(self, event, rng):
        """A query, its positive, and a negative that copies the query's words except in one slot."""
        form, other = rng.sample(FORMS, 2)
        words = self.words_for(event, rng)
        positive = other.format(**self.words_for(event, rng, avoid=set(words.values())))
        slot = rng.choice(list(SLOTS))
        wrong = self.word(self.changed(event, slot, rng), slot, rng)
        negative = rng.choice([f for f in FORMS if f != form]).format(**{**words, slot: wrong})
        return {"query": form.format(**words), "positive": positive, "negative": negative}

    def graded_pair(self, event, rng):
        """Two sentences that agree in none, some or all of the slots. The score is how many."""
        S = len(SLOTS)
        differ, other = rng.sample(list(SLOTS), rng.randint(0, S)), dict(event)
        for slot in differ:
            other = self.changed(other, slot, rng)
        return {"sentence1": self.tell(event, rng), "sentence2": self.tell(other, rng), "score": float(S - len(differ))}

    # ------------------------------------------------------------ answers

    def rationale(self, event, rng, keep=1.0, wrong=0.0):
        """A word for each slot of an event, in order. A slot may be left out or wrong."""
        parts = []
        for slot in SLOTS:
            luck = rng.random()
            if luck < keep:
                parts.append(self.word(event, slot, rng))
            elif luck < keep + wrong:
                parts.append(self.word(self.changed(event, slot, rng), slot, rng))
        return " ".join(parts)

    def chat(self, event, rng, progress):
        """A chat of the warm start: complete answers in the first half, then poor ones. `-> (instruction, text, answer)`."""
        if progress <= 0.5:
            answer = self.rationale(event, rng)
        elif rng.random() < 0.15:
            answer = rng.choice(TALK)
        else:
            answer = self.rationale(event, rng, keep=0.5, wrong=0.2)
        return self.instruction, self.tell(event, rng), answer

    # ------------------------------------------------------------ what an answer says

    def named(self, written, text):
        """How much of a text an answer names: `(recall over the slots, precision of what is named)`."""
        told, claims = ({CONCEPT[w] for w in part.split() if w in CONCEPT} for part in (text, written))
        return len(told & claims) / len(told), len(told & claims) / max(len(claims), 1)

    def well_formed(self, written):
        """Whether an answer has the form of the warm start's: slots in order, each at most once, and nothing else."""
        order = [list(SLOTS).index(CONCEPT[w][0]) if w in CONCEPT else -1 for w in written.split()]
        return order != [] and -1 not in order and order == sorted(set(order))


EVENTS = Events()
