"""Groups of texts of one meaning to rows to train on, and what a rationale of such a text can be held to.

    python experiments/captions.py --groups train.jsonl coco.jsonl --triplets triplets.jsonl \\
        --heldout heldout.jsonl --out runs/captions

A group is a jsonl row with one list of texts of one meaning, whatever its name: the captions of a picture, a sentence's
paraphrases. Written are, under --out:

    train.jsonl     two texts of each group as query and positive, and a hard negative: of 32 texts of other groups, drawn at
                    random, the one that shares most content words with the query; then the triplets
    search.jsonl    two texts of each of 256 groups that are not in train.jsonl: settings are chosen by these
    heldout.jsonl   the first two texts of each --heldout group, and the group as "support": for the tables alone

In search.jsonl and heldout.jsonl a query finds its positive among all positives.
"""

import argparse
import json
import os
import random
import re
import sys

import numpy as np

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))

from plumbing.errors import GraceError  # noqa: E402

FUNCTION_WORDS = frozenset(
    """a about above across after against all along also am an and another any are around as at away back be because been before
    behind being below beside between both but by can could did do does doing down during each every for from get gets getting
    had has have having he her here him his how i if in inside into is it its itself just like many more most near next no not
    of off on onto or other others out outside over own s she so some something such t than that the their them then there
    these they this those through to too towards toward under up upon very was we were what when where which while who whose
    why will with within without would you your""".split()
)


def content_words(text):
    """The words of a text that carry meaning, without their endings, in order. `str -> list`.

    Endings go by rule, the same for every text ("rides", "riding" and "ride" are one), so that words can be compared.
    """
    return [stem(word) for word in re.findall(r"[a-z]+", text.lower()) if word not in FUNCTION_WORDS]


def stem(word):
    """A word without plural, -ing, -ed or a last e, and with a doubled last letter single: what is left need be no word."""
    if len(word) > 3:
        word = re.sub(r"(?<=..)(ing|ed|es|s|e)$", "", word)
        word = re.sub(r"(.)\1$", r"\1", word)
    return word


# ---------------------------------------------------------------- rows


def read_groups(path):
    """The groups of a jsonl file: lists of at least two different texts. Raises GraceError for a row without one list."""
    groups = []
    with open(path, encoding="utf-8") as file:
        for number, line in enumerate(file, 1):
            lists = [x for x in json.loads(line).values() if isinstance(x, list)]
            if len(lists) != 1:
                raise GraceError(f"{path}: line {number}: {len(lists)} lists in a row; a group is one list of texts")
            group = list(dict.fromkeys(text.strip() for text in lists[0] if text.strip()))
            if len(group) > 1:
                groups.append(group)
    return groups


def pairs(groups, rng, candidates=32):
    """Two texts of each group, and a hard negative out of some candidates of other groups. `-> rows`."""
    rows = []
    for i, group in enumerate(groups):
        query, positive = rng.sample(group, 2)
        others = (rng.choice(groups[(i + rng.randrange(1, len(groups))) % len(groups)]) for _ in range(candidates))
        words = set(content_words(query))
        negative = max((x for x in others if x not in group), key=lambda x: len(words & set(content_words(x))))
        rows.append({"query": query, "positive": positive, "negative": negative})
    return rows


def write_rows(path, rows):
    """Rows as jsonl."""
    os.makedirs(os.path.dirname(path) or ".", exist_ok=True)
    with open(path, "w", encoding="utf-8") as file:
        file.writelines(json.dumps(row) + "\n" for row in rows)


def build(groups, triplets, heldout, out, search=256, seed=0):
    """Write the three files under `out`; arguments are lists of paths but for `heldout`, a path. Returns rows by file."""
    rng = random.Random(seed)
    known = [group for path in groups for group in read_groups(path)]
    rng.shuffle(known)
    if len(known) <= search + 1:
        raise GraceError(f"{len(known)} groups: too few to hold {search} of them back; lower --search")
    negatives = []
    for path in triplets:
        with open(path, encoding="utf-8") as file:
            negatives += [{k: row[k] for k in ("query", "positive", "negative")} for row in map(json.loads, file)]
    # A triplet that says what a row to search by says would give its answer away.
    two = [rng.sample(group, 2) for group in known[:search]]
    held_out = {text for pair in two for text in pair}
    files = {
        "train": [row for row in pairs(known[search:], rng) + negatives if held_out.isdisjoint(row.values())],
        "search": [{"query": query, "positive": positive} for query, positive in two],
        "heldout": [{"query": x[0], "positive": x[1], "support": x} for x in read_groups(heldout)] if heldout else [],
    }
    for name, rows in files.items():
        write_rows(os.path.join(out, f"{name}.jsonl"), rows)
    return {name: len(rows) for name, rows in files.items()}


# ---------------------------------------------------------------- what is true of a rationale


def truth(rationales, texts, support):
    """What share of the rationales' content words others support. support: `{text: texts of the same meaning}`.

    `true`: the text or another of its group has the word; `copied`: the text itself has it; `by_chance`: the text and the
    group of the *next* text have it, which is what words that are common everywhere would get.
    """
    counts = np.zeros(4)
    words = {text: set(content_words(text)) for group in support.values() for text in group} | {
        text: set(content_words(text)) for text in texts
    }
    known = [words[text].union(*(words[x] for x in support[text])) for text in texts]
    for i, (rationale, text) in enumerate(zip(rationales, texts)):
        for word in content_words(rationale):
            counts += [1, word in known[i], word in words[text], word in known[(i + 1) % len(texts)]]
    shares = counts[1:] / max(counts[0], 1)
    return {"true": float(shares[0]), "copied": float(shares[1]), "by_chance": float(shares[2])}


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--groups", nargs="+", required=True, metavar="FILE", help="jsonl: a list of texts of one meaning per row")
    parser.add_argument("--triplets", nargs="*", default=[], metavar="FILE", help="jsonl: query, positive, hard negative")
    parser.add_argument("--heldout", metavar="FILE", help="groups for the tables alone")
    parser.add_argument("--search", type=int, default=256, help="groups held back to choose settings by [256]")
    parser.add_argument("--seed", type=int, default=0, help="of all that is drawn [0]")
    parser.add_argument("--out", required=True, help="folder to write into")
    args = parser.parse_args()
    try:
        print(build(args.groups, args.triplets, args.heldout, args.out, args.search, args.seed))
    except (GraceError, OSError) as error:
        sys.exit(f"captions.py: {error}")


if __name__ == "__main__":
    main()
