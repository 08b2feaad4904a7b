"""Reading triplets, sentences and graded pairs, checked row by row as they come in.

A dataset is a .jsonl, .csv, .parquet or .txt file, a folder that `datasets.load_dataset` opens, or
a hub id (`id` or `id:config`). Supervised rows hold a query, a positive and, optionally, negatives
(a string or a list); unsupervised rows hold a text; graded pairs hold two sentences and a score.
The names that other public sets use for the same thing are understood (`COLUMNS`).
"""

import math
import os
import random
import tempfile

COLUMNS = {  # what we call it: what it may be called in a file, first match wins
    "query": ("query", "anchor", "sent0"),
    "positive": ("positive", "pos", "sent1"),
    "negative": ("negative", "negatives", "neg", "hard_neg"),
    "text": ("text", "sentence", "sentences"),
    "sentence1": ("sentence1",),
    "sentence2": ("sentence2",),
    "score": ("score",),
}
FORMATS = {".jsonl": "json", ".json": "json", ".csv": "csv", ".parquet": "parquet", ".txt": "text"}


class GraceError(ValueError):
    """Something the user can put right: the message says what and how. Shown without a traceback."""


def first_line(error):
    """What a library says went wrong, without its advice to developers."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]


def load_folder(path, config=None, **options):
    """`datasets.load_dataset` of a local folder, past its cache.

    That cache knows a folder by its name alone and serves the rows of an earlier one, wherever it stood
    and whatever this one holds by now. So each call gets a cache of its own, and the rows in memory.
    """
    from datasets import load_dataset

    with tempfile.TemporaryDirectory() as cache:
        return load_dataset(path, config, cache_dir=cache, keep_in_memory=True, **options)


def open_dataset(source, split="train"):
    """Any source to a `datasets.Dataset`. Raises GraceError if it is not there or cannot be read."""
    from datasets import load_dataset
    from datasets.exceptions import DatasetGenerationError

    source = str(source)
    suffix = os.path.splitext(source)[1].lower()
    try:
        if os.path.isfile(source):
            if suffix not in FORMATS:
                raise GraceError(f"{source}: unknown format {suffix!r}; use one of {', '.join(FORMATS)}")
            if not os.path.getsize(source):
                raise GraceError(f"{source}: no rows, the file is empty")
            options = {"keep_default_na": False} if suffix == ".csv" else {}  # "NA" and "None" are texts
            return load_dataset(FORMATS[suffix], data_files=source, split="train", **options)
        if os.path.isdir(source):
            return load_folder(source, split=split)
        if suffix in FORMATS or source.startswith((".", "/")):
            raise GraceError(f"{source}: no such file or folder")
        name, _, config = source.partition(":")
        return load_dataset(name, config or None, split=split)
    except GraceError:
        raise
    except (DatasetGenerationError, ValueError, OSError) as error:
        raise GraceError(
            f"{source}: cannot be read as a dataset ({first_line(error.__cause__ or error)}). "
            "A hub id needs a network; offline, give a local file or folder."
        ) from error


def _column(dataset, name, source, required=True):
    found = next((c for c in COLUMNS[name] if c in dataset.column_names), None)
    if found is None and required:
        raise GraceError(
            f"{source}: no column {name!r} (also looked for: {', '.join(COLUMNS[name][1:]) or 'nothing else'}); "
            f"it has {', '.join(dataset.column_names)}"
        )
    return found


def _text(value, source, row, name):
    if not isinstance(value, str) or not value.strip():
        raise GraceError(f"{source}, row {row}: {name} is {'empty' if value in ('', None) else repr(value)[:60]}, not a text")
    return value


def read_triplets(source, negatives=None, split="train"):
    """Supervised rows as `[{"query": str, "positive": str, "negative": [str] * M}]`.

    M is the same for all rows: `negatives` if given, else the most that every row has (so 0 where
    one row has none). Raises GraceError for a missing column, an empty field, too few negatives,
    or a negative that equals its own query or positive; rows are counted from 1.
    """
    dataset = open_dataset(source, split)
    q, p = (_column(dataset, name, source) for name in ("query", "positive"))
    n = _column(dataset, "negative", source, required=bool(negatives))
    rows = []
    for i, raw in enumerate(dataset, 1):
        row = {"query": _text(raw[q], source, i, "query"), "positive": _text(raw[p], source, i, "positive")}
        given = (raw[n] if n else None) or []  # a missing value is no negative; an empty text is an error
        given = [given] if isinstance(given, str) else given
        row["negative"] = [_text(x, source, i, "negative") for x in given]
        if n and raw[n] == "":
            raise GraceError(f"{source}, row {i}: negative is empty, not a text")
        if {row["query"], row["positive"]} & set(row["negative"]):
            raise GraceError(f"{source}, row {i}: a negative equals the row's own query or positive")
        if negatives is not None and len(row["negative"]) < negatives:
            raise GraceError(f"{source}, row {i}: has {len(row['negative'])} negatives, --negatives asks for {negatives}")
        rows.append(row)
    if not rows:
        raise GraceError(f"{source}: no rows")
    M = min(len(row["negative"]) for row in rows) if negatives is None else negatives
    return [{**row, "negative": row["negative"][:M]} for row in rows]


def read_texts(source, split="train"):
    """Unsupervised rows as `[{"text": str}]`. Raises GraceError for a missing column or an empty text.

    Blank lines of a .txt file separate paragraphs and are passed over.
    """
    dataset = open_dataset(source, split)
    column = _column(dataset, "text", source)
    lines = str(source).lower().endswith(".txt")
    rows = [
        {"text": _text(raw[column], source, i, "text")}
        for i, raw in enumerate(dataset, 1)
        if not (lines and not raw[column].strip())
    ]
    if not rows:
        raise GraceError(f"{source}: no rows")
    return rows


def read_pairs(source, split="test"):
    """Graded pairs as `(sentences1, sentences2, scores)`. Raises GraceError as `read_texts` does."""
    dataset = open_dataset(source, split)
    names = [_column(dataset, name, source) for name in ("sentence1", "sentence2", "score")]
    if not len(dataset):
        raise GraceError(f"{source}: no rows")
    one, two, scores = [], [], []
    for i, raw in enumerate(dataset, 1):
        one.append(_text(raw[names[0]], source, i, "sentence1"))
        two.append(_text(raw[names[1]], source, i, "sentence2"))
        try:
            scores.append(float(raw[names[2]]))
        except (TypeError, ValueError):
            scores.append(math.nan)
        if not math.isfinite(scores[-1]):
            raise GraceError(f"{source}, row {i}: score is {raw[names[2]]!r:.40}, not a finite number")
    return one, two, scores


def load_rows(config):
    """What a run reads: training rows, held-out triplets (or none), graded pairs (or None).

    Without --heldout one supervised row in ten is held out, at most 256. No training row shares a
    query or positive with a held-out one. Raises GraceError if fewer rows than a batch remain.
    """
    graded = read_pairs(config.graded, split="train") if config.graded else None
    heldout = read_triplets(config.heldout) if config.heldout else []
    if config.mode == "unsupervised":
        rows = read_texts(config.data)
    else:
        rows = read_triplets(config.data, config.negatives)
        if not heldout:
            rows = random.Random(config.seed).sample(rows, len(rows))
            size = min(256, len(rows) // 10)
            heldout, rows = rows[:size], rows[size:]
        seen = {row[role] for row in heldout for role in ("query", "positive")}
        rows = [row for row in rows if row["query"] not in seen and row["positive"] not in seen]
    if len(rows) < config.batch:
        raise GraceError(f"{config.data}: its {len(rows)} training rows are fewer than --batch {config.batch}")
    return rows, heldout, graded
