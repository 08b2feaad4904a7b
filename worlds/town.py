"""A world in which thinking pays: two people walk through a town, and a text means the places where they end.

    ann leaves the mill and goes west north south . from the tower bob goes east east west .

From every place four one-way streets, one in each direction, lead to four other places. Which ones is the town's map: drawn
once, the same in every text, told in none, and learned in the warm start. A text says where two people start and which way
they go, and its meaning is where they end. A query and its positive share the two ends and neither starts nor ways; the
hard negative is the query with one direction changed, so whoever compares words prefers it.

Why thinking pays. One look-up in the map is easy. Three in a row, each of the last one's result, are more than a network of
three layers does while it reads: its guesses are as good as chance, however long it trains. Written down place by place,
each step is one look-up again. So the warm start's answers are of two kinds, and both close with the end of each walk, named
by the place and two words that belong to that place alone:

    guess   ann so market stalls fish bob so well bucket stones
    think   ann mill west library north forest south market so market stalls fish bob tower east ... well so well bucket stones

Guesses are mostly wrong, thinking is mostly right, and the policy mostly guesses. Two words that belong to an end alone tell
it from a place on the way, in the mean over a rationale's hidden states that the embedding is.

The warm start has walks of one to six steps, and so the language for them; what is trained by reward has one to four.
Held-out files by the number of steps show whether thinking, once discovered, goes on in longer walks than any rewarded.
One chat in ten follows another instruction, which no reward ever touches: whether it is still followed shows what training
took from the model.
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

    thinking: the share of the warm start's later answers that think.
    Steps per walk: WARM in the warm start, TRAIN in the training texts, HELD_OUT in the held-out and the graded ones.
    """

    WARM, TRAIN, HELD_OUT = (1, 2, 3, 4, 5, 6), (1, 2, 3, 4), (3, 4)
    instruction, other_instruction = "say where they end", "say where they start"
    warm_up, max_prompt_tokens, max_new_tokens = 800, 48, 40

    def __init__(self, thinking=0.35):
        self.thinking = thinking
        self.map = self.streets(random.Random(0))
        self.back = {way: {there: here for here, there in street.items()} for way, street in self.map.items()}
        plain = " ".join((*FORMS, *DIRECTIONS, *WALKERS, "so", self.instruction, self.other_instruction)).split()
        closing = " ".join(" ".join(words) for words in CLOSING.values()).split()
        self.words = {w for w in plain if "{" not in w} | {*PLACES, *closing}

    def streets(self, rng):
        """`{direction: {place: place}}`: permutations that never stay, nor lead from anywhere to where another one leads."""
        streets = {}
        for direction in DIRECTIONS:
            while True:  # one draw in fifty is good enough for the last
                street = dict(zip(PLACES, rng.sample(PLACES, len(PLACES))))
                if all(there not in (here, *(s[here] for s in streets.values())) for here, there in street.items()):
                    break
            streets[direction] = street
        return streets

    # ------------------------------------------------------------ meanings

    def meanings(self, rng, held_out=False):
        """An endless stream of pairs of ends, all held out or none. They come in shuffled rounds, each once in a round."""
        pairs = [(a, b) for a in PLACES for b in PLACES if self.held_out((a, b)) == held_out]
        while True:
            yield from rng.sample(pairs, len(pairs))

    def held_out(self, ends):
        """Whether a pair of ends is kept from training: four in nine are, by the two places alone."""
        a, b = (PLACES.index(end) for end in ends)
        return (a + 5 * b) % 9 < 4

    # ------------------------------------------------------------ texts

    def walk(self, start, way):
        """The places of a walk, the first and the last among them."""
        places = [start]
        for direction in way:
            places.append(self.map[direction][places[-1]])
        return places

    def plan(self, ends, rng, n=None):
        """Two walks to given ends, drawn from the end backwards. n: steps per walk. `-> {walker: (start, way)}`."""
        n, walks = n or rng.choice(self.HELD_OUT if self.held_out(ends) else self.TRAIN), {}
        for walker, place in zip(WALKERS, ends):
            way = rng.choices(DIRECTIONS, k=n)
            for direction in reversed(way):
                place = self.back[direction][place]
            walks[walker] = (place, way)
        return walks

    def told(self, walks, rng):
        """Walks as a text: a sentence each, in either order."""
        order = rng.sample(sorted(walks.items()), len(walks))
        return " ".join(rng.choice(FORMS).format(walker=w, start=start, way=" ".join(way)) for w, (start, way) in order)

    def read(self, text):
        """The walks that a text tells of. `-> {walker: (start, way)}`, in the order of WALKERS."""
        walks = {}
        for sentence in text.split(" ."):
            words = sentence.split()
            for walker in (w for w in words if w in WALKERS):
                walks[walker] = (next(w for w in words if w in PLACES), [w for w in words if w in DIRECTIONS])
        return {walker: walks[walker] for walker in WALKERS}

    def ends(self, walks):
        """Where walks end. `-> (place, place)`."""
        return tuple(self.walk(start, way)[-1] for start, way in walks.values())

    def tell(self, ends, rng, n=None):
        """A text about two walks to these ends."""
        return self.told(self.plan(ends, rng, n), rng)

    def changes(self, walks):
        """All that differ from these walks in one direction; each of them ends elsewhere."""
        return [
            {**walks, walker: (start, [*way[:at], other, *way[at + 1 :]])}
            for walker, (start, way) in walks.items()
            for at in range(len(way))
            for other in DIRECTIONS
            if other != way[at]
        ]

    def triplet(self, ends, rng, n=None):
        """A query, its positive by other ways, and a negative that is the query with one direction changed.

        No negative has a held-out meaning: what a held-out query asks for, only its positive answers.
        """
        near = []
        while not near:  # a walk may have no such neighbour, though hardly one in a hundred
            walks = self.plan(ends, rng, n)
            near = [changed for changed in self.changes(walks) if not self.held_out(self.ends(changed))]
        negative = self.told(rng.choice(near), rng)
        return {"query": self.told(walks, rng), "positive": self.tell(ends, rng, n), "negative": negative}

    def graded_pair(self, ends, rng):
        """Two texts that share none, one or both of the ends; the score is how many."""
        shared = rng.sample(range(2), rng.randint(0, 2))
        other = tuple(end if i in shared else rng.choice([p for p in PLACES if p != end]) for i, end in enumerate(ends))
        one, two = (self.tell(pair, rng, rng.choice(self.HELD_OUT)) for pair in (ends, other))
        return {"sentence1": one, "sentence2": two, "score": float(len(shared))}

    def ladder(self, n, rng):
        """Held-out triplets by the number of steps of every walk in them. `-> {"heldout-steps-1": n rows, ...}`."""
        rungs = {}
        for steps in self.WARM:
            held_out = self.meanings(rng, True)
            rungs[f"heldout-steps-{steps}"] = [self.triplet(next(held_out), rng, steps) for _ in range(n)]
        return rungs

    # ------------------------------------------------------------ answers

    def rationale(self, walks, think=True):
        """The answer about some walks: where each ends, and before that, if it thinks, the way there."""
        words = []
        for walker, (start, way) in walks.items():
            places = self.walk(start, way)
            thought = [start, *(word for step in zip(way, places[1:]) for word in step)] if think else []
            words += [walker, *thought, "so", self.closing(walker, places[-1])]
        return " ".join(words)

    def closing(self, walker, end):
        """The words that name the end of a walker's walk."""
        return f"{end} {CLOSING[end][WALKERS.index(walker)]}"

    def chat(self, ends, rng, progress):
        """A chat of the warm start. Thinking is common at first, then rare. `-> (instruction, text, answer)`."""
        walks = self.plan(ends, rng, rng.choice(self.WARM))
        if rng.random() < 0.1:
            return self.other_instruction, self.told(walks, rng), self.starts(walks)
        answer = self.rationale(walks, think=rng.random() < (0.9 if progress <= 0.65 else self.thinking))
        return self.instruction, self.told(walks, rng), answer

    def starts(self, walks):
        """The answer to the other instruction: where each walk starts."""
        return " ".join(f"{walker} {start}" for walker, (start, _) in walks.items())

    def other_chats(self, n, rng, held_out=True):
        """Texts and the right answers to the other instruction. `-> [(text, answer)] * n`."""
        walks = [self.plan(ends, rng) for ends in islice(self.meanings(rng, held_out), n)]
        return [(self.told(w, rng), self.starts(w)) for w in walks]

    # ------------------------------------------------------------ what an answer says

    def said(self, written):
        """What an answer says of each walker: the words up to "so", and those after it. `-> {walker: (words, words)}`."""
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
        """The share of a text's steps that an answer writes down truly and in their order.

        A start counts as a step; what is left out counts as an untrue one, and so does what is too much.
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
        """Whether an answer has the form of the warm start's: for each walker a guess, or thinking and then the same."""
        kinds = {**dict.fromkeys(WALKERS, "w"), **dict.fromkeys(DIRECTIONS, "d"), **dict.fromkeys(PLACES, "p"), "so": "s"}
        shape = "".join(kinds.get(word, "?") for word in written.split())
        if not re.fullmatch(r"(w(p(dp)+)?sp\?\?){2}", shape):
            return False
        ends = {walker: closing for walker, (_, closing) in self.said(written).items()}
        return all(end and " ".join(end) == self.closing(walker, end[0]) for walker, end in ends.items())


TOWN = Town()
