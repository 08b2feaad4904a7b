"""Groups of texts of one meaning, such as captions of a picture, to rows to train on and to evaluate on.

    python experiments/captions.py --groups train.jsonl coco.jsonl --triplets triplets.jsonl \\
        --heldout heldout.jsonl --plain stories.txt --out runs/captions

A group is a jsonl row with one list of texts of one meaning, whatever its name: the captions of a picture, a sentence's
paraphrases. Written are, under --out:

    train.jsonl     two texts of each group as query and positive, and a hard negative: of 32 texts of other groups, drawn at
                    random, the one that shares most content words with the query; then the triplets
    triplets.jsonl  of the triplets every twentieth, none of whose texts is in train.jsonl: for the tables
    search.jsonl    two texts of each of 256 groups that are not in train.jsonl: settings are chosen by these
    heldout.jsonl   the first two texts of each --heldout group, and the group as "support": for the tables alone
    texts.jsonl     the queries and positives of train.jsonl by themselves, for training without labels
    plain.txt       512 paragraphs of --plain: another kind of texts, which nothing here trains on

In search.jsonl and heldout.jsonl a query finds its positive among all positives.
"""

import argparse
import os
import random
import re
import sys

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))

from plumbing.data import READERS  # noqa: E402
from plumbing.errors import GraceError  # noqa: E402
from worlds.make import write_rows  # noqa: E402

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


def read_rows(path):
    """The rows of a jsonl file; empty lines are none. Raises GraceError for a line that is no JSON object."""
    return [row for _, row in numbered(path)]


def numbered(path):
    """The rows of a jsonl file, each with where it stands: `("line 3", row)`."""
    for where, row in READERS[".jsonl"](str(path)):
        if not isinstance(row, dict):
            why = f"not JSON ({row})" if isinstance(row, GraceError) else "no JSON object"
            raise GraceError(f"{path}: {where} is {why}")
        yield where, row


def read_groups(path):
    """The groups of a jsonl file: lists of at least two different texts. Raises GraceError for a row without one list."""
    groups = []
    for where, row in numbered(path):
        lists = [x for x in row.values() if isinstance(x, list)]
        if len(lists) != 1:
            raise GraceError(f"{path}: {where}: {len(lists)} lists in a row; a group is one list of texts")
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


def paragraphs(path, rng, n=512):
    """Up to n paragraphs of 6 to 40 words, drawn at random, each on one line."""
    with open(path, encoding="utf-8") as file:
        found = [" ".join(block.split()) for block in file.read().split("\n\n")]
    fitting = [text for text in dict.fromkeys(found) if 6 <= len(text.split()) <= 40]
    return rng.sample(fitting, min(n, len(fitting)))


def build(groups, triplets, heldout, plain, out, search=256, seed=0):
    """Write the files under `out`. groups, triplets: lists of paths; heldout, plain: a path or None. `-> {file: rows}`."""
    rng = random.Random(seed)
    known = [group for path in groups for group in read_groups(path)]
    rng.shuffle(known)
    if len(known) <= search + 1:
        raise GraceError(f"{len(known)} groups: too few to hold {search} of them back; lower --search")
    negatives = [{k: row[k] for k in ("query", "positive", "negative")} for path in triplets for row in read_rows(path)]
    # A row of the training that says what a row held back says would give its answer away.
    two = [rng.sample(group, 2) for group in known[:search]]
    held_out = {text for pair in two for text in pair} | {text for row in negatives[::20] for text in row.values()}
    files = {
        "train": [row for row in pairs(known[search:], rng) + negatives if held_out.isdisjoint(row.values())],
        "triplets": negatives[::20],
        "search": [{"query": query, "positive": positive} for query, positive in two],
        "heldout": [{"query": x[0], "positive": x[1], "support": x} for x in read_groups(heldout)] if heldout else [],
    }
    files["texts"] = [{"text": text} for text in dict.fromkeys(row[k] for row in files["train"] for k in ("query", "positive"))]
    for name, rows in files.items():
        write_rows(os.path.join(out, f"{name}.jsonl"), rows)
    if plain:
        with open(os.path.join(out, "plain.txt"), "w", encoding="utf-8") as file:
            file.writelines(text + "\n" for text in paragraphs(plain, rng))
    return {name: len(rows) for name, rows in files.items()}


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--groups", nargs="+", required=True, metavar="FILE", help="jsonl, a list of texts per row")
    parser.add_argument("--triplets", nargs="*", default=[], metavar="FILE", help="jsonl: query, positive, hard negative")
    parser.add_argument("--heldout", metavar="FILE", help="groups for the tables alone")
    parser.add_argument("--plain", metavar="FILE", help="a .txt of another kind of texts, blank lines between paragraphs")
    parser.add_argument("--search", type=int, default=256, help="groups held back to choose settings by [256]")
    parser.add_argument("--seed", type=int, default=0, help="of all that is drawn [0]")
    parser.add_argument("--out", required=True, help="folder to write into")
    args = parser.parse_args()
    try:
        print(build(args.groups, args.triplets, args.heldout, args.plain, args.out, args.search, args.seed))
    except (GraceError, OSError) as error:
        sys.exit(f"captions.py: {error}")


if __name__ == "__main__":
    main()
