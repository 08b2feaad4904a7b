"""Reading triplets, sentences and graded pairs. The first row that cannot be used stops the reading, with its file and line.

A source is a .jsonl, .json, .csv, .txt or .parquet file, a folder that `datasets.load_dataset` opens, or a hub id (`id` or
`id:config`). Supervised rows hold a query, a positive and, optionally, negatives (a string or a list); unsupervised rows hold
a text; graded pairs hold two sentences and a score. `COLUMNS` has the names that public data sets use for these.

jsonl, csv and txt are read here, so that a wrong row is named by its line, and a csv field is a text whatever it looks like.
All else is read by `datasets`. Files are UTF-8, with or without a byte order mark; lines end in LF or CRLF. A row that occurs
twice stays there twice, since instances that share a text are never negatives of each other.
"""

import csv
import json
import math
import os
import random
import re
import reprlib
import tempfile

from datasets import disable_progress_bars, load_dataset

from plumbing.errors import GraceError, first_line

disable_progress_bars()
COLUMNS = {  # what a file may call it. Of the negatives all such columns are read, of anything else the first.
    "query": "query|anchor|sent0",
    "positive": "positive|pos|sent1",
    "negative": r"(hard_)?neg(ative)?s?(_\d+)?",  # negative, hard_negatives, negative_1, negative_2, ...
    "text": "text|sentence|sentences",
    "sentence1": "sentence1",
    "sentence2": "sentence2",
    "score": "score",
}


# ---------------------------------------------------------------- what `datasets` reads


def load_folder(path, config=None, **options):
    """`datasets.load_dataset` of a local folder, past its cache.

    That cache knows a folder by its last name alone, and serves the rows of an earlier folder of that name. So each call gets
    a cache of its own, and the rows are kept in memory.
    """
    with tempfile.TemporaryDirectory() as cache:
        return load_dataset(path, config, cache_dir=cache, keep_in_memory=True, **options)


def _open_dataset(source, suffix):
    """A .json or .parquet file, a folder, or a hub id as a `datasets.Dataset`. Raises GraceError if it cannot be read."""
    formats = ".json", ".parquet", *READERS
    if os.path.isfile(source) and suffix not in formats:
        raise GraceError(f"{source}: unknown format {suffix!r}; use one of {', '.join(formats)}")
    if not os.path.exists(source) and (suffix in formats or source.startswith((".", "/"))):
        raise GraceError(f"{source}: no such file or folder")
    try:
        if os.path.isfile(source):
            return load_dataset(suffix[1:], data_files=source, split="train")
        if os.path.isdir(source):
            return load_folder(source, split="train")
        name, _, config = source.partition(":")
        return load_dataset(name, config or None, split="train")
    except Exception as error:  # pyarrow and datasets each have their own for a broken file; to a user they mean the same
        raise GraceError(
            f"{source}: cannot be read as a dataset ({first_line(error.__cause__ or error)}). "
            "A hub id needs a network; offline, give a local file or folder."
        ) from error


# ---------------------------------------------------------------- what is read here: rows as (where, {column: value})


def _lines(path):
    """Yield `(where, line)` of a UTF-8 file. A byte that is not UTF-8 becomes a lone surrogate, which `_text` refuses."""
    with open(path, encoding="utf-8-sig", errors="surrogateescape", newline="\n") as file:
        for number, line in enumerate(file, 1):
            yield f"{path}, line {number}", line


def _read_jsonl(path):
    """One object per line."""
    for where, line in _lines(path):
        if line.strip():
            try:
                row = json.loads(line)
            except ValueError as error:
                raise GraceError(f"{where}: cannot be read as JSON ({first_line(error)})") from None
            if not isinstance(row, dict):
                raise GraceError(f"{where}: is {reprlib.repr(row)}, not an object with names")
            yield where, row


def _read_csv(path):
    """Comma-separated, with a header. A quoted field may hold line ends, so a row is named by the line that it ends in."""
    csv.field_size_limit(2**31 - 1)
    reader, names, end = csv.reader((line for _, line in _lines(path)), strict=True), None, 0
    try:
        for row in filter(None, reader):  # without blank lines
            end = reader.line_num
            if names is None and (twice := [name for name in row if name and row.count(name) > 1]):
                raise GraceError(f"{path}, line {end}: {twice[0]!r} stands twice in the header: rename one of them")
            names = names or row
            if len(row) != len(names):
                raise GraceError(f"{path}, line {end}: has {len(row)} fields, the header {len(names)}")
            if row is not names:
                yield f"{path}, line {end}", dict(zip(names, row))
    except csv.Error as error:
        raise GraceError(f"{path}, line {end + 1}: cannot be read as csv ({error})") from None


def _read_txt(path):
    """One text per line; blank lines separate paragraphs."""
    return ((where, {"text": line.rstrip("\r\n")}) for where, line in _lines(path) if line.strip())


READERS = {".jsonl": _read_jsonl, ".csv": _read_csv, ".txt": _read_txt}


# ---------------------------------------------------------------- rows by our names


def _read(source, roles):
    """Yield `(where, {role: value})` for every row; None for a missing value, and a list for the negatives.

    where: the file and the line, for messages.
    """
    source = str(source)
    suffix = os.path.splitext(source)[1].lower()
    if suffix in READERS and os.path.isfile(source):
        rows = list(READERS[suffix](source))
        names = list(dict.fromkeys(name for _, row in rows for name in row))
    else:
        dataset = _open_dataset(source, suffix)
        rows = ((f"{source}, row {number}", row) for number, row in enumerate(dataset, 1))
        names = dataset.column_names if len(dataset) else []
    if not names:
        raise GraceError(f"{source}: no rows, the file is empty")
    columns = {}
    for role in roles:
        columns[role] = [name for name in names if re.fullmatch(COLUMNS[role], name)]
        if not columns[role] and role != "negative":
            raise GraceError(f"{source}: no column {role!r} (looked for: {COLUMNS[role]}); it has {', '.join(names)}")
    unused = [name for name in names if not any(name in chosen for chosen in columns.values())]
    if unused and "score" not in roles:
        print(f"{source}: columns that are not used: {', '.join(unused)}")
    for where, row in rows:
        values = {role: [row.get(name) for name in columns[role]] for role in roles}
        yield where, {role: _flat(cells) if role == "negative" else cells[0] for role, cells in values.items()}


def _flat(cells):
    """Strings and lists of strings as one list, without the empty ones: in a csv file an empty cell is a missing value."""
    values = [x for cell in cells for x in (cell if isinstance(cell, list) else [cell])]
    return [x for x in values if x not in ("", None)]


def _text(value, what):
    """The value, if it is a text that can be tokenized and written back. Raises GraceError, which begins with `what`."""
    if not isinstance(value, str) or not value.strip():
        raise GraceError(f"{what} is {'empty' if value in ('', None) else reprlib.repr(value)}, not a text")
    try:
        value.encode()
    except UnicodeEncodeError as error:
        raise GraceError(f"{what} is not UTF-8, from its character {error.start + 1} on") from None
    return value


def read_triplets(source):
    """Supervised rows as `[{"query": str, "positive": str, "negative": [str] * M}]`.

    M is as many negatives as every row has, so 0 if one row has none; where others have more, that is printed.
    Raises GraceError for a missing column, an empty text, or a negative that equals its own query or positive.
    """
    rows, counts = [], {}  # counts: {number of negatives: the first row that has as many}
    for where, raw in _read(source, ("query", "positive", "negative")):
        row = {role: _text(raw[role], f"{where}: {role}") for role in ("query", "positive")}
        row["negative"] = [_text(x, f"{where}: negative") for x in raw["negative"]]
        if {row["query"].strip(), row["positive"].strip()} & {x.strip() for x in row["negative"]}:
            raise GraceError(f"{where}: a negative equals the row's own query or positive")
        rows.append(row)
        counts.setdefault(len(row["negative"]), where)
    M = min(counts)
    if len(counts) > 1:
        print(f"{counts[M]}: has {M} negatives, others have more; {M} of each row are used")
    return [{**row, "negative": row["negative"][:M]} for row in rows]


def read_texts(source):
    """Unsupervised rows as `[{"text": str}]`. Raises GraceError for a missing column or an empty text."""
    return [{"text": _text(row["text"], f"{where}: text")} for where, row in _read(source, ("text",))]


def read_pairs(source):
    """Graded pairs as `(sentences1, sentences2, scores)`. Raises GraceError as `read_texts` does, and for a score."""
    pairs = []
    for where, row in _read(source, ("sentence1", "sentence2", "score")):
        try:
            score = float(row["score"])
        except (TypeError, ValueError):
            score = math.nan
        if not math.isfinite(score):
            raise GraceError(f"{where}: score is {reprlib.repr(row['score'])}, not a finite number")
        pairs.append((*(_text(row[name], f"{where}: {name}") for name in ("sentence1", "sentence2")), score))
    return tuple(map(list, zip(*pairs)))


# ---------------------------------------------------------------- what a run reads


def load_rows(config):
    """Training rows, held-out rows, and graded pairs or None.

    Without --heldout one row in ten is held out, at most 256. No training row shares a text, a query or a positive with a
    held-out one, spaces around it aside. Raises GraceError if fewer rows than a batch remain.
    """
    graded = read_pairs(config.graded) if config.graded else None
    heldout = read_triplets(config.heldout) if config.heldout else []
    rows = (read_texts if config.mode == "unsupervised" else read_triplets)(config.data)
    if not heldout:
        rows = random.Random(config.seed).sample(rows, len(rows))
        size = min(256, len(rows) // 10)
        heldout, rows = rows[:size], rows[size:]
    texts = lambda row: {row[role].strip() for role in ("text", "query", "positive") if role in row}
    held_out = set().union(*map(texts, heldout))
    kept = [row for row in rows if held_out.isdisjoint(texts(row))]
    if len(kept) < len(rows):
        lost = len(rows) - len(kept)
        print(f"{config.data}: {lost} training rows are left out, because they share a text with a held-out row")
    if len(kept) < config.batch:
        raise GraceError(f"{config.data}: {len(kept)} training rows are fewer than --batch {config.batch}")
    return kept, heldout, graded
