"""A world in which thinking pays: two walkers in a town, and the places where they end.

    ann leaves the mill : two north five west nine east . bob leaves the school : one south four south ten west .

From every place four one-way streets lead to four other places. Which ones is the town's map: drawn once, the same in every
text, told in none, and learned in the warm start. A text says where two walkers start, and in which direction each goes at
which hours. Its meaning is where they end. A query and its positive share the two ends and neither starts nor ways; the
hard negative is the query with one direction changed, so whoever compares words prefers it.

Why thinking pays. One look-up in the map is easy. Three in a row, each of the last one's result, are more than a network of
three layers does while it reads: its guesses are as good as chance, however long it trains. Written down place by place,
each step is one look-up again. So the warm start's answers are of two kinds, and both end in the two ends, each named by
the place and two words that belong to that place alone:

    guess   so market stalls fish well water rope
    think   ann mill two north forest five west bridge nine east market bob school ... well so market stalls fish well ...

Guesses are mostly wrong, thinking is mostly right, and the policy mostly guesses. Two words that belong to an end alone tell
it from a place on the way, in the mean over a rationale's hidden states that the embedding is.

The hours are all different, and are what makes walks longer than any in training possible: which direction comes next is
found by its hour, not by counting.
"""

import random
import re

PLACES = {  # a place, and the two words that belong to it alone
    name: (name, *own.split())
    for name, own in (
        ("market", "stalls fish"), ("well", "water rope"), ("mill", "flour wheel"), ("tower", "bells stairs"),
        ("library", "books silence"), ("forest", "trees moss"), ("harbour", "ships gulls"), ("bakery", "bread oven"),
        ("school", "pupils chalk"), ("castle", "walls knights"), ("bridge", "river arches"), ("garden", "roses bees"),
        ("stable", "horses hay"), ("smithy", "anvil sparks"), ("theatre", "actors curtain"), ("prison", "bars guards"),
        ("museum", "statues paintings"), ("station", "trains tickets"), ("hospital", "nurses beds"), ("bank", "coins vault"),
        ("orchard", "apples ladders"), ("tavern", "beer songs"), ("farm", "cows barn"), ("post", "letters stamps"),
    )
}  # fmt: skip
DIRECTIONS = ("north", "south", "east", "west")
HOURS = tuple("one two three four five six seven eight nine ten eleven twelve".split())
WALKERS = ("ann", "bob")
FORMS = (
    "{walker} leaves the {start} : {way} .",
    "from the {start} goes {walker} : {way} .",
    "{walker} , at the {start} : {way} .",
)


class Town:
    """Places, one-way streets, and walks through them. A meaning is a pair of places: where ann ends, and where bob does.

    lengths  how many steps a walk of the warm start may have
    steps    how many a walk of the training and held-out texts may have
    """

    instruction = "say where they end"
    warm_up, max_prompt_tokens, max_new_tokens = 700, 64, 56

    def __init__(self, lengths=(1, 2, 3, 4), steps=(3, 4)):
        self.lengths, self.steps, self.names = lengths, steps, tuple(PLACES)
        self.map = self.streets(random.Random(0))
        self.back = {way: {there: here for here, there in street.items()} for way, street in self.map.items()}
        plain = " ".join((*FORMS, *DIRECTIONS, *HOURS, *WALKERS, "so", self.instruction)).split()
        self.words = {w for w in plain if "{" not in w} | {w for own in PLACES.values() for w in own}

    def streets(self, rng):
        """`{direction: {place: place}}`: permutations that never stay, nor lead from anywhere to where another one leads."""
        streets = {}
        for way in DIRECTIONS:
            while True:  # one draw in fifty or more is good
                street = dict(zip(self.names, rng.sample(self.names, len(self.names))))
                if all(there != here and all(there != s[here] for s in streets.values()) for here, there in street.items()):
                    break
            streets[way] = street
        return streets

    # ------------------------------------------------------------ meanings

    def meanings(self, rng, held_out=False):
        """Pairs of ends without end, all held out or none. Held-out ones come in shuffled rounds, each once in a round."""
        pairs = [(a, b) for a in self.names for b in self.names if self.held_out((a, b)) == held_out]
        while True:
            yield from rng.sample(pairs, len(pairs))

    def held_out(self, ends):
        """Whether a pair of ends is kept from training: four in nine are, by the two places alone."""
        a, b = (self.names.index(end) for end in ends)
        return (a + 5 * b) % 9 < 4

    # ------------------------------------------------------------ texts

    def walk(self, start, way):
        """The places of a walk, the first and the last among them."""
        places = [start]
        for direction in way:
            places.append(self.map[direction][places[-1]])
        return places

    def plan(self, ends, rng, n):
        """Two walks of n steps to given ends, drawn from the end backwards. `-> {walker: (start, hours, way)}`."""
        hours = rng.sample(range(len(HOURS)), 2 * n)
        walks = {}
        for walker, end, at in zip(WALKERS, ends, (hours[:n], hours[n:])):
            way, place = rng.choices(DIRECTIONS, k=n), end
            for direction in reversed(way):
                place = self.back[direction][place]
            walks[walker] = (place, [HOURS[h] for h in sorted(at)], way)
        return walks

    def told(self, walks, rng):
        """Walks as a text: a sentence each, in either order."""
        sentences = []
        for walker, (start, hours, way) in rng.sample(sorted(walks.items()), len(walks)):
            steps = " ".join(f"{hour} {direction}" for hour, direction in zip(hours, way))
            sentences.append(rng.choice(FORMS).format(walker=walker, start=start, way=steps))
        return " ".join(sentences)

    def read(self, text):
        """The walks that a text tells of. `-> {walker: (start, hours, way)}`, in the order of WALKERS."""
        walks = {}
        for sentence in text.split("."):
            words = sentence.split()
            pick = lambda known: [w for w in words if w in known]  # noqa: B023
            walks.update({walker: (pick(PLACES)[0], pick(HOURS), pick(DIRECTIONS)) for walker in pick(WALKERS)})
        return {walker: walks[walker] for walker in WALKERS}

    def ends(self, walks):
        """Where walks end. `-> (place, place)`."""
        return tuple(self.walk(start, way)[-1] for start, _, way in walks.values())

    def tell(self, ends, rng, n=None):
        """A text about two walks to these ends."""
        return self.told(self.plan(ends, rng, n or rng.choice(self.steps)), rng)

    def triplet(self, ends, rng, n=None):
        """A query, its positive by other ways, and a negative that is the query with one direction changed.

        The negative of a held-out meaning has none that is held out: what a query asks for, only its positive answers.
        """
        walks = self.plan(ends, rng, n or rng.choice(self.steps))
        while True:
            walker, changed = rng.choice(WALKERS), dict(walks)
            start, hours, way = walks[walker]
            at = rng.randrange(len(way))
            other = rng.choice([direction for direction in DIRECTIONS if direction != way[at]])
            changed[walker] = (start, hours, [*way[:at], other, *way[at + 1 :]])
            if not self.held_out(self.ends(changed)):
                break
        return {"query": self.told(walks, rng), "positive": self.tell(ends, rng, n), "negative": self.told(changed, rng)}

    def graded_pair(self, ends, rng):
        """Two texts that share none, one or both of the ends; the score is how many."""
        shared = rng.sample(range(2), rng.randint(0, 2))
        other = tuple(end if i in shared else rng.choice([p for p in self.names if p != end]) for i, end in enumerate(ends))
        return {"sentence1": self.tell(ends, rng), "sentence2": self.tell(other, rng), "score": float(len(shared))}

    def ladder(self, n, rng):
        """Held-out triplets by the number of steps of every walk in them. `-> {"heldout-steps-1": n rows, ...}`."""
        rungs = {}
        for steps in range(1, len(HOURS) // 2 + 1):
            held_out = self.meanings(rng, True)
            rungs[f"heldout-steps-{steps}"] = [self.triplet(next(held_out), rng, steps) for _ in range(n)]
        return rungs

    # ------------------------------------------------------------ answers

    def rationale(self, walks, think=True, slip=None):
        """The answer about some walks. slip: a function of a place; what it returns is written instead, and walked on from."""
        said, ends = [], []
        for walker, (start, hours, way) in walks.items():
            place = start
            said += [walker, start]
            for hour, direction in zip(hours, way):
                place = self.map[direction][place]
                place = slip(place) if slip else place
                said += [hour, direction, place]
            ends += PLACES[place]
        return " ".join([*(said if think else []), "so", *ends])

    def chat(self, ends, rng, progress):
        """A text and its answer for the warm start. Thinking is common at first, then rare and not always right."""
        early = progress <= 0.6
        walks = self.plan(ends, rng, rng.choice(self.lengths))
        think = rng.random() < (0.7 if early else 0.4)
        slip = lambda place: rng.choice(self.names) if rng.random() < 0.05 else place
        return self.told(walks, rng), self.rationale(walks, think, slip if think and not early else None)

    def thinks(self, written):
        """Whether an answer says more than where they end."""
        return any(w in WALKERS for w in written.split("so ")[0].split())

    def true_steps(self, written, text):
        """The share of a walk's steps that an answer writes down, in their order and truly; 1 if nothing else is there.

        A start counts as a step, what is left out or too much as an untrue one.
        """
        claimed, steps = written.partition("so ")[0].split(), []
        for word in claimed:  # each step ends with a place
            if not steps or steps[-1][-1] in PLACES:
                steps.append([])
            steps[-1].append(word)
        truth = []
        for walker, (start, hours, way) in self.read(text).items():
            truth += [[walker, start], *map(list, zip(hours, way, self.walk(start, way)[1:]))]
        return sum(a == b for a, b in zip(steps, truth)) / max(len(steps), len(truth))

    def named(self, written, text):
        """How many of the two ends an answer names, each for its walker: `(recall, precision)`."""
        claims = [w for w in written.rpartition("so ")[2].split() if w in PLACES]
        right = sum(a == b for a, b in zip(claims, self.ends(self.read(text))))
        return right / 2, right / max(len(claims), 1)

    def well_formed(self, written):
        """Whether an answer has the form of the warm start's: a guess, or thinking and then the same."""
        thought, _, end = written.rpartition("so ")
        kinds = {**dict.fromkeys(WALKERS, "w"), **dict.fromkeys(HOURS, "h"), **dict.fromkeys(DIRECTIONS, "d")}
        kinds |= dict.fromkeys(PLACES, "p")
        shape = "".join(kinds.get(word, "?") for word in thought.split())
        walkers = [word for word in thought.split() if word in WALKERS]
        named = [word for word in end.split() if word in PLACES]
        fits = re.fullmatch("(wp(hdp)+wp(hdp)+)?", shape) and walkers in ([], list(WALKERS)) and len(named) == 2
        return bool(fits) and end.split() == [word for place in named for word in PLACES[place]]


TOWN = Town()
