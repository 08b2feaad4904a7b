"""The embedded worlds: texts whose meaning is known, made without end, from which a tiny policy can be taught.

Every world offers the same to make.py, which writes it out as ordinary files. A meaning is whatever the world says it is.

    instruction, words             the system message, and every word that its texts and answers are made of
    warm_up, max_prompt_tokens, max_new_tokens      steps of the warm start, and how a text is read
    meanings(rng, held_out)        meanings without end; a held-out one never occurs in training
    tell(meaning, rng)             a text with that meaning
    triplet(meaning, rng)          a query, its positive, and a hard negative
    graded_pair(meaning, rng)      two texts, and how much of their meaning they share
    ladder(n, rng)                 {name: n triplets}, files of rising difficulty, where a world has them
    chat(meaning, rng, progress)   an instruction, a text and an answer for the warm start, of which this share has passed
    other_instruction              where a world has one: an instruction that the warm start teaches and no reward touches
    other_chats(n, rng, held_out)  n texts and the right answers to it

and to whoever measures what a policy writes about a text:

    named(written, text)           what it names: (recall, precision)
    well_formed(written)           whether it has the form that the warm start taught
"""

from worlds.events import EVENTS, MEALS, PARCELS
from worlds.town import TOWN, Town

WORLDS = {"town": TOWN, "events": EVENTS, "meals": MEALS, "parcels": PARCELS}
WORLDS |= {f"town-{percent}": Town(percent / 100) for percent in (1, 5, 20)}  # of whose start's answers fewer think
