"""What a backbone is made from: windows of plain texts, and chats about groups and pairs of texts (backbone.py).

    Say it in other words.     a text of a group -> another of its texts
    Say it shorter.            a triplet's query -> its positive, where that is shorter
    List the main words.       a text of a group -> the content words that several of its texts share
    Repeat.                    a text -> itself

Shapes: B rows, L tokens.
"""

import gzip
import random
import re
from collections import Counter

import torch
from captions import FUNCTION_WORDS, read_groups, read_rows, stem  # puts the repository on the path

from plumbing.errors import GraceError

INSTRUCTIONS = {  # a kind of chat: what asks for it, and its share of the chats
    "other words": ("Say it in other words.", 0.6),
    "shorter": ("Say it shorter.", 0.2),
    "main words": ("List the main words.", 0.12),
    "repeat": ("Repeat.", 0.08),
}
L = 128  # tokens of a plain text's window


def read_text(path):
    """A .txt or .txt.gz file as one string. Raises GraceError for another name."""
    if not path.endswith((".txt", ".txt.gz")):
        raise GraceError(f"{path}: plain texts are .txt or .txt.gz files")
    with (gzip.open if path.endswith(".gz") else open)(path, "rt", encoding="utf-8", errors="replace") as file:
        return re.sub(r"(\s*<\|endoftext\|>\s*)+", "\n\n", file.read())


def main_words(group, most=6):
    """The content words that at least two texts of a group share, the most frequent first; each as it was first written."""
    count, form = Counter(), {}
    for text in group:
        own = {stem(word): word for word in reversed(re.findall(r"[a-z]+", text.lower())) if word not in FUNCTION_WORDS}
        count.update(own.keys())
        form = own | form
    return " ".join(form[word] for word, n in count.most_common(most) if n > 1)


class Data:
    """Plain texts, groups, and pairs of a text and a shorter one; of each a fiftieth, at most 200 rows, is held out."""

    def __init__(self, texts, groups, triplets, seed=0):
        texts = [read_text(path) for path in texts]
        groups = [group for path in groups for group in read_groups(path)]
        both = [(row["query"], row["positive"]) for path in triplets for row in read_rows(path)]
        pairs = [(text, shorter) for text, shorter in both if len(shorter) < len(text)]
        self.kinds = [kind for kind in INSTRUCTIONS if (pairs if kind == "shorter" else groups)]
        if not self.kinds or min(map(len, texts), default=0) < 100 * L:
            raise GraceError(f"give --texts of at least {100 * L} characters each, and --groups or --triplets for the chats")
        for rows in (groups, pairs):
            random.Random(seed).shuffle(rows)
        self.parts = {True: {}, False: {}}  # by whether they are held out
        for name, rows in (("groups", groups), ("pairs", pairs)):
            n = min(200, -(-len(rows) // 50))
            self.parts[True][name], self.parts[False][name] = rows[:n], rows[n:]
        ends = [len(text) - max(6 * L, len(text) // 50) for text in texts]
        self.parts[True]["plain"] = [text[at:] for text, at in zip(texts, ends)]
        self.parts[False]["plain"] = [text[:at] for text, at in zip(texts, ends)]

    def window(self, rng, held_out=False):
        """About L tokens of a plain text, from a random place on; a text is drawn by the square root of its length."""
        texts = self.parts[held_out]["plain"]
        text = rng.choices(texts, [len(text) ** 0.5 for text in texts])[0]
        at = rng.randrange(max(1, len(text) - 6 * L))
        return text[at : at + 6 * L].partition(" ")[2]

    def chat(self, rng, kind, held_out=False):
        """A text and the answer to a kind's instruction. `-> (str, str)`."""
        if kind == "shorter":
            return rng.choice(self.parts[held_out]["pairs"])
        group = rng.choice(self.parts[held_out]["groups"])
        text, other = rng.sample(group, 2)
        shared = main_words(group) or main_words([text] * 2) or text
        return text, {"other words": other, "main words": shared, "repeat": text}[kind]

    def batch(self, rng, tokenizer, rows, plain, kinds=None, held_out=False):
        """One batch: a share of windows (a quarter as many, since they are longer), the rest chats. `-> [B, L] x 2`."""
        kinds, n = kinds or self.kinds, round(plain * rows)
        windows = [(self.window(rng, held_out), None) for _ in range(-(-n // 4))]
        drawn = rng.choices(kinds, [INSTRUCTIONS[kind][1] for kind in kinds], k=rows - n)
        return collate([*windows, *((self.chat(rng, kind, held_out), kind) for kind in drawn)], tokenizer)


def collate(rows, tokenizer):
    """Windows `(text, None)` and chats `((text, answer), kind)` to ids and labels `[B, L]`, padded on the right.

    ids       <system> Repeat. <user> A dog. <assistant> A dog. <end> <pad>
    labels       -100  -100 -100   -100 -100 -100    -100    A dog. <end> -100
    """
    encode, ids, labels = lambda text: tokenizer(text, add_special_tokens=False)["input_ids"], [], []
    for content, kind in rows:
        if kind is None:
            prompt, answer = [], encode(content)[:L]
        else:
            messages = [{"role": "system", "content": INSTRUCTIONS[kind][0]}, {"role": "user", "content": content[0]}]
            prompt = encode(tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True))[-3 * L :]
            answer = [*encode(content[1])[: L - 1], tokenizer.eos_token_id]
        ids.append(prompt + answer)
        labels.append([-100] * len(prompt) + answer)
    longest = max(map(len, ids))
    pad = lambda rows, value: torch.tensor([row + [value] * (longest - len(row)) for row in rows])
    return pad(ids, tokenizer.pad_token_id), pad(labels, -100)
