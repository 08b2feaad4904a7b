"""The small worlds: texts whose meaning is known, generated without end, from which a tiny policy can be taught.

make.py writes a world out as ordinary files. Every world offers it the same; a meaning is whatever the world says it is.

    instruction, words             the system message, and every word that its texts and answers are made of
    warm_up, max_prompt_tokens, max_new_tokens      steps of the warm start, and how a text is read
    meanings(rng, held_out)        meanings without end; a held-out one never occurs in training
    tell(meaning, rng)             a text with that meaning
    triplet(meaning, rng)          a query, its positive, and a hard negative
    graded_pair(meaning, rng)      two texts, and how much of their meaning they share
    chat(meaning, rng, progress)   an instruction, a text and an answer, when this share of the warm start has passed
    named(written, text)           what an answer names of its text: (recall, precision)
    well_formed(written)           whether an answer has the form that the warm start taught

The town also has held-out files of rising difficulty (`ladder`), a second instruction that no reward touches (`other_chats`),
and measures of whether an answer thinks (`thinks`, `true_steps`).
"""

from worlds.events import EVENTS
from worlds.town import TOWN

WORLDS = {"town": TOWN, "events": EVENTS}
