"""A world in which thinking pays: two people walk through a town, and a text means the places where they end.

    ann leaves the mill and goes west north south . from the tower bob goes east east west .

Four one-way streets lead from every place, one in each direction, to four other places. This map is drawn once. It is the same
for all texts, no text tells it, and the warm start teaches it. A text says where two people start and which way they go. A
query and its positive share the two ends and neither starts nor ways. The hard negative is the query with one direction
changed, so whoever compares words prefers it.

Why thinking pays. One look-up in the map is easy. Three in a row, each of the last one's result, are more than a network of
three layers does while it reads: its guesses are as good as chance, however long it trains. Written down place by place,
each step is one look-up again. So the warm start's answers are of two kinds, and both close with the end of each walk, named
by the place and two words that belong to that place alone:

    guess   ann so market stalls fish bob so well bucket stones
    think   ann mill west library north forest south market so market stalls fish bob tower east ... well so well bucket stones

Guesses are mostly wrong, thinking is mostly right, and the policy mostly guesses. The two words of an end tell it from a place
on the way in the embedding, which is a mean over the rationale's hidden states.

The warm start has walks of one to six steps, and reward trains those of one to four. Held-out files by their number show
whether the policy still thinks in walks that are longer than any rewarded one. One chat in ten follows another instruction,
which no reward ever touches. Whether it is still followed shows what training took from the model.
"""

import random
import re
from itertools import islice

CLOSING = {  # a place, and the two words that close an answer if ann ends there, or if bob does
    "market": ("stalls fish", "counters scales"), "well": ("water rope", "bucket stones"),
    "mill": ("flour wheel", "grain miller"), "tower": ("bells stairs", "clock pigeons"),
    "library": ("books silence", "shelves desks"), "forest": ("trees moss", "ferns owls"),
    "harbour": ("ships gulls", "anchors nets"), "bakery": ("bread oven", "rolls dough"),
    "school": ("pupils chalk", "lessons maps"), "castle": ("walls knights", "moat banners"),
    "bridge": ("river arches", "boats railing"), "garden": ("roses bees", "hedges fountain"),
    "stable": ("horses hay", "saddles mares"), "smithy": ("anvil sparks", "hammer nails"),
    "theatre": ("actors curtain", "stage applause"), "prison": ("bars guards", "cells keys"),
    "museum": ("statues paintings", "vases armour"), "station": ("trains tickets", "platforms luggage"),
    "hospital": ("nurses beds", "doctors bandages"), "bank": ("coins vault", "loans tellers"),
    "orchard": ("apples ladders", "pears baskets"), "tavern": ("beer songs", "mugs benches"),
    "farm": ("cows barn", "tractor eggs"), "post": ("letters stamps", "parcels queues"),
}  # fmt: skip
PLACES = tuple(CLOSING)
DIRECTIONS = ("north", "south", "east", "west")
WALKERS = ("ann", "bob")
FORMS = (
    "{walker} leaves the {start} and goes {way} .",
    "from the {start} {walker} goes {way} .",
    "{walker} starts at the {start} , then {way} .",
)


class Town:
    """Places, streets, and walks. A meaning is a pair of places: where ann ends, and where bob does.

    Steps per walk: WARM in the warm start, TRAIN in the training texts, HELD_OUT in the held-out and the graded ones.
    """

    WARM, TRAIN, HELD_OUT = (1, 2, 3, 4, 5, 6), (1, 2, 3, 4), (3, 4)
    instruction, other_instruction = "say where they end", "say where they start"
    warm_up, max_prompt_tokens, max_new_tokens = 800, 48, 40

    def __init__(self):
        self.map = draw_map(random.Random(0))
        self.back = {way: {there: here for here, there in street.items()} for way, street in self.map.items()}
        plain = " ".join((*FORMS, *DIRECTIONS, *WALKERS, "so", self.instruction, self.other_instruction)).split()
        closing = " ".join(" ".join(words) for words in CLOSING.values()).split()
        self.words = {w for w in plain if "{" not in w} | {*PLACES, *closing}

    # ------------------------------------------------------------ meanings

    def held_out(self, ends):
        """Whether a pair of ends is kept from training: four in nine are, by the two places alone."""
        a, b = (PLACES.index(end) for end in ends)
        return (a + 5 * b) % 9 < 4

    def meanings(self, rng, held_out=False):
        """An endless stream of pairs of ends, all held out or none, in shuffled rounds that have each pair once."""
        pairs = [(a, b) for a in PLACES for b in PLACES if self.held_out((a, b)) == held_out]
        while True:
            yield from rng.sample(pairs, len(pairs))

    # ------------------------------------------------------------ walks

    def walk(self, start, way):
        """The places of a walk, with the first and the last."""
        places = [start]
        for direction in way:
            places.append(self.map[direction][places[-1]])
        return places

    def ends(self, walks):
        """Where walks end. `-> (place, place)`."""
        return tuple(self.walk(start, way)[-1] for start, way in walks.values())

    def plan(self, ends, rng, n=None):
        """Two walks of n steps to given ends, drawn from the end backwards. `-> {walker: (start, way)}`."""
        n, walks = n or rng.choice(self.HELD_OUT if self.held_out(ends) else self.TRAIN), {}
        for walker, place in zip(WALKERS, ends):
            way = rng.choices(DIRECTIONS, k=n)
            for direction in reversed(way):
                place = self.back[direction][place]
            walks[walker] = (place, way)
        return walks

    def changes(self, walks):
        """All walks that differ from these in one direction. Each of them ends elsewhere."""
        return [
            {**walks, walker: (start, [*way[:at], other, *way[at + 1 :]])}
            for walker, (start, way) in walks.items()
            for at in range(len(way))
            for other in DIRECTIONS
            if other != way[at]
        ]

    # ------------------------------------------------------------ texts

    def describe(self, walks, rng):
        """Walks as a text: one sentence per walker, in either order."""
        order = rng.sample(sorted(walks.items()), len(walks))
        return " ".join(rng.choice(FORMS).format(walker=w, start=start, way=" ".join(way)) for w, (start, way) in order)

    def read(self, text):
        """The walks that a text describes. `-> {walker: (start, way)}`, in the order of WALKERS."""
        walks = {}
        for sentence in text.split(" ."):
            words = sentence.split()
            for walker in (w for w in words if w in WALKERS):
                walks[walker] = (next(w for w in words if w in PLACES), [w for w in words if w in DIRECTIONS])
        return {walker: walks[walker] for walker in WALKERS}

    def tell(self, ends, rng, n=None):
        """A text about two walks to these ends."""
        return self.describe(self.plan(ends, rng, n), rng)

    def triplet(self, ends, rng, n=None):
        """A query, its positive by other ways, and a negative that is the query with one direction changed.

        No negative has a held-out meaning. So a held-out query has one right answer, its positive.
        """
        near = []
        while not near:  # a walk may have no such neighbour, though hardly one in a hundred
            walks = self.plan(ends, rng, n)
            near = [changed for changed in self.changes(walks) if not self.held_out(self.ends(changed))]
        negative = self.describe(rng.choice(near), rng)
        return {"query": self.describe(walks, rng), "positive": self.tell(ends, rng, n), "negative": negative}

    def graded_pair(self, ends, rng):
        """Two texts that share none, one or both of the ends. The score is how many."""
        shared = rng.sample(range(2), rng.randint(0, 2))
        other = tuple(end if i in shared else rng.choice([p for p in PLACES if p != end]) for i, end in enumerate(ends))
        one, two = (self.tell(pair, rng, rng.choice(self.HELD_OUT)) for pair in (ends, other))
        return {"sentence1": one, "sentence2": two, "score": float(len(shared))}

    def ladder(self, n, rng):
        """n held-out triplets for each number of steps per walk. `-> {"heldout-steps-1": triplets, ...}`."""
        rungs = {}
        for steps in self.WARM:
            held_out = self.meanings(rng, True)
            rungs[f"heldout-steps-{steps}"] = [self.triplet(next(held_out), rng, steps) for _ in range(n)]
        return rungs

    # ------------------------------------------------------------ answers

    def closing(self, walker, end):
        """The words that name the end of a walker's walk."""
        return f"{end} {CLOSING[end][WALKERS.index(walker)]}"

    def rationale(self, walks, think=True):
        """The answer about some walks: where each ends and, if it thinks, the way there first."""
        words = []
        for walker, (start, way) in walks.items():
            places = self.walk(start, way)
            thought = [start, *(word for step in zip(way, places[1:]) for word in step)] if think else []
            words += [walker, *thought, "so", self.closing(walker, places[-1])]
        return " ".join(words)

    def starts(self, walks):
        """The answer to the other instruction: where each walk starts."""
        return " ".join(f"{walker} {start}" for walker, (start, _) in walks.items())

    def chat(self, ends, rng, progress):
        """A chat of the warm start: nine answers in ten think at first, then a third. `-> (instruction, text, answer)`."""
        walks = self.plan(ends, rng, rng.choice(self.WARM))
        if rng.random() < 0.1:
            return self.other_instruction, self.describe(walks, rng), self.starts(walks)
        answer = self.rationale(walks, think=rng.random() < (0.9 if progress <= 0.65 else 0.35))
        return self.instruction, self.describe(walks, rng), answer

    def other_chats(self, n, rng):
        """Held-out texts and the right answers to the other instruction. `-> [(text, answer)] * n`."""
        walks = [self.plan(ends, rng) for ends in islice(self.meanings(rng, held_out=True), n)]
        return [(self.describe(w, rng), self.starts(w)) for w in walks]

    # ------------------------------------------------------------ what an answer says

    def said(self, written):
        """An answer, split at its walkers and at "so". `-> {walker: (words of the thought, words of the closing)}`."""
        said = {}
        for part in re.split(rf"\b(?={'|'.join(WALKERS)})", written):
            walker, _, rest = part.partition(" ")
            thought, _, end = f" {rest}".partition(" so ")
            said.setdefault(walker, (thought.split(), end.split()))
        return {walker: said.get(walker, ([], [])) for walker in WALKERS}

    def thinks(self, written):
        """Whether an answer says more than where they end."""
        return any(thought for thought, _ in self.said(written).values())

    def true_steps(self, written, text):
        """The share of a text's steps that an answer writes down correctly and in order.

        A start counts as a step. A missing step is a wrong one, and so is one too many.
        """
        right = total = 0
        for (thought, _), (start, way) in zip(self.said(written).values(), self.read(text).values()):
            steps = [thought[:1], *(thought[i : i + 2] for i in range(1, len(thought), 2))]
            truth = [[start], *map(list, zip(way, self.walk(start, way)[1:]))]
            right += sum(a == b for a, b in zip(steps, truth))
            total += max(len(steps), len(truth))
        return right / total

    def named(self, written, text):
        """How many of the two ends an answer names, each for its walker: `(recall, precision)`."""
        claims = [closing[0] if closing else None for _, closing in self.said(written).values()]
        right = sum(a == b for a, b in zip(claims, self.ends(self.read(text))))
        return right / 2, right / max(len(claims) - claims.count(None), 1)

    def well_formed(self, written):
        """Whether an answer has the form of the warm start's: for each walker a guess, or thinking and then a guess."""
        place, direction = (f"({'|'.join(words)})" for words in (PLACES, DIRECTIONS))
        closing = {w: "|".join(self.closing(w, end) for end in PLACES) for w in WALKERS}
        part = {w: f"{w} ({place}( {direction} {place})+ )?so ({closing[w]})" for w in WALKERS}
        return any(re.fullmatch(" ".join(part[w] for w in order), written) for order in (WALKERS, WALKERS[::-1]))


def draw_map(rng):
    """The streets, `{direction: {place: place}}`. From every place the four of them lead to four other places."""
    streets = {}
    for direction in DIRECTIONS:
        while True:  # for the last direction one draw in fifty will do
            street = dict(zip(PLACES, rng.sample(PLACES, len(PLACES))))
            if all(there not in (here, *(s[here] for s in streets.values())) for here, there in street.items()):
                break
        streets[direction] = street
    return streets


TOWN = Town()
