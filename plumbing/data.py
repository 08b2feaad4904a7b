"""Reading triplets, sentences and graded pairs, checked row by row as they come in.

A dataset is a .jsonl, .csv, .parquet or .txt file, a folder that `datasets.load_dataset` opens, or
a hub id (`id` or `id:config`). Supervised rows hold a query, a positive and, optionally, negatives
(a string or a list); unsupervised rows hold a text; graded pairs hold two sentences and a score.
The names that other public sets use for the same thing are understood (`COLUMNS`).

jsonl, csv and txt are read here, so that a broken row is named by its line; parquet, folders and the hub
by `datasets`, by the row. Files are UTF-8, with or without a byte order mark, and lines end in LF or CRLF.
A row that cannot be used stops the reading, or is listed in `skipped` where the caller brings such a list.
A row that is there twice stays there twice: instances that share a text are no negatives of each other.
"""

import csv
import json
import math
import os
import random
import reprlib
import tempfile

from plumbing.errors import GraceError, first_line

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


def library():
    """`datasets`, without its progress bars. Imported here, so that who reads jsonl, csv or txt need not have it."""
    import datasets

    datasets.disable_progress_bars()
    return datasets


def load_folder(path, config=None, **options):
    """`datasets.load_dataset` of a local folder, past its cache.

    That cache knows a folder by its name alone and serves the rows of an earlier one, wherever it stood
    and whatever this one holds by now. So each call gets a cache of its own, and the rows in memory.
    """
    with tempfile.TemporaryDirectory() as cache:
        return library().load_dataset(path, config, cache_dir=cache, keep_in_memory=True, **options)


def open_dataset(source, split="train"):
    """Any source to a `datasets.Dataset`. Raises GraceError if it is not there or cannot be read."""
    load_dataset, source = library().load_dataset, str(source)
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
    except Exception as error:  # pyarrow and datasets each have their own for a broken file; to a user they mean the same
        raise GraceError(
            f"{source}: cannot be read as a dataset ({first_line(error.__cause__ or error)}). "
            "A hub id needs a network; offline, give a local file or folder."
        ) from error


# ---------------------------------------------------------------- lines to rows


class _BadRow(GraceError):
    """What is wrong with one row; whoever catches it knows which row that is."""


def _lines(path):
    """`(number, line)` of a UTF-8 file. A byte that is not UTF-8 becomes a lone surrogate, which `_text` refuses."""
    with open(path, "rb") as file:
        start = file.read(3)
        if start[:2] in (b"\xff\xfe", b"\xfe\xff"):
            raise GraceError(f"{path}: is UTF-16; convert it to UTF-8 (iconv -f UTF-16 -t UTF-8)")
        file.seek(3 if start == b"\xef\xbb\xbf" else 0)
        for number, line in enumerate(file, 1):
            yield number, line.decode("utf-8", "surrogateescape")


def _json(text):
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise _BadRow(f"cannot be read as JSON ({first_line(error)})") from None


def _read_jsonl(path):
    """An object a line; blank lines are passed over. A .json file may be one array of objects instead."""
    lines = list(_lines(path))
    if path.lower().endswith(".json") and lines and lines[0][1].lstrip().startswith("["):
        try:
            for number, row in enumerate(_json("".join(line for _, line in lines)), 1):
                yield f"row {number}", row
            return
        except _BadRow as error:
            raise GraceError(f"{path}: {error}") from None
    for number, line in lines:
        if line.strip():
            try:
                yield f"line {number}", _json(line)
            except _BadRow as error:
                yield f"line {number}", error


def _read_txt(path):
    """A text a line; blank lines separate paragraphs and are passed over."""
    for number, line in _lines(path):
        if line.strip():
            yield f"line {number}", {"text": line.rstrip("\r\n")}


def _read_csv(path):
    """Comma-separated, with a header. A row is named by the line it starts in: a quoted field may hold line ends."""
    csv.field_size_limit(2**31 - 1)
    reader, names, row = csv.reader((line for _, line in _lines(path)), strict=True), None, []
    while row is not None:
        where = f"line {reader.line_num + 1}"
        try:
            row = next(reader, None)
        except csv.Error as error:
            if names is None or "end of data" in str(error):  # a quote that is never closed swallows all rows after it
                raise GraceError(f"{path}, {where}: cannot be read as csv ({error})") from None
            yield where, _BadRow(f"cannot be read as csv ({error})")
            continue
        if row and names is None:
            names = row
            if len(set(names)) < len(names):
                raise GraceError(f"{path}, {where}: two columns have one name ({', '.join(names)})")
        elif row:
            wrong = len(row) != len(names)
            yield where, _BadRow(f"has {len(row)} fields, the header {len(names)}") if wrong else dict(zip(names, row))


READERS = {".jsonl": _read_jsonl, ".json": _read_jsonl, ".csv": _read_csv, ".txt": _read_txt}


def _raw_rows(source, split):
    """`(column names, [(where, row)])`: where is "line 3" or "row 3", a row a dict, or the _BadRow that it is."""
    source = str(source)
    reader = READERS.get(os.path.splitext(source)[1].lower())
    if not (reader and os.path.isfile(source)):
        dataset = open_dataset(source, split)
        return dataset.column_names, ((f"row {i}", row) for i, row in enumerate(dataset, 1))
    try:
        rows = list(reader(source))
    except OSError as error:
        raise GraceError(f"{source}: cannot be read ({error.strerror})") from error
    if not rows:
        raise GraceError(f"{source}: no rows, the file is empty")
    names = dict.fromkeys(name for _, row in rows if isinstance(row, dict) for name in row)
    return list(names), rows


def _rows(source, split, make, required, optional=(), skipped=None):
    """Every row of a source as `make` has it, from a dict by our names, None where a value is missing.

    Raises GraceError, with file and line, at the first row that `make` refuses; or, given a list `skipped`, adds
    `{"file", "where", "why"}` to it and goes on.
    """
    names, raw_rows = _raw_rows(source, split)
    columns = {name: next((c for c in COLUMNS[name] if c in names), None) for name in (*required, *optional)}
    first_bad, rows, bad = None, [], 0
    for where, raw in raw_rows:
        try:
            if isinstance(raw, _BadRow):
                raise raw
            if not isinstance(raw, dict):
                raise _BadRow(f"is {reprlib.repr(raw)}, not an object with names")
            if missing := next((name for name in required if columns[name] is None), None):
                also = ", ".join(COLUMNS[missing][1:]) or "nothing else"
                raise GraceError(f"{source}: no column {missing!r} (also looked for: {also}); it has {', '.join(names)}")
            rows.append(make({name: raw.get(column) for name, column in columns.items()}))
        except _BadRow as error:
            if skipped is None:
                raise GraceError(f"{source}, {where}: {error}") from None
            first_bad, bad = first_bad or f"{where}: {error}", bad + 1
            skipped.append({"file": str(source), "where": where, "why": str(error)})
    if not rows:
        raise GraceError(f"{source}: no rows" + (f" are left, all {bad} were skipped; {first_bad}" if bad else ""))
    return rows


def _text(value, name):
    """A text that can be tokenized and written back, or _BadRow."""
    if not isinstance(value, str) or not value.strip():
        raise _BadRow(f"{name} is {'empty' if value in ('', None) else reprlib.repr(value)}, not a text")
    if "\0" in value:
        raise _BadRow(f"{name} holds a NUL character: is this a text file?")
    try:
        value.encode()
    except UnicodeEncodeError as error:
        raise _BadRow(f"{name} is not UTF-8, from its character {error.start + 1} on") from None
    return value


# ---------------------------------------------------------------- what is read


def read_triplets(source, negatives=None, split="train", skipped=None):
    """Supervised rows as `[{"query": str, "positive": str, "negative": [str] * M}]`.

    M is the same for all rows: `negatives` if given, else the most that every row has (so 0 where
    one row has none). Raises GraceError for a missing column, an empty field, too few negatives,
    or a negative that equals its own query or positive; `skipped`: see `_rows`.
    """

    def make(raw):
        row = {name: _text(raw[name], name) for name in ("query", "positive")}
        given = [] if raw["negative"] is None else raw["negative"]  # a missing value is no negative; an empty text is an error
        row["negative"] = [_text(x, "negative") for x in (given if isinstance(given, list) else [given])]
        if {row["query"], row["positive"]} & set(row["negative"]):
            raise _BadRow("a negative equals the row's own query or positive")
        if negatives is not None and len(row["negative"]) < negatives:
            raise _BadRow(f"has {len(row['negative'])} negatives, --negatives asks for {negatives}")
        return row

    needed = ("query", "positive", "negative") if negatives else ("query", "positive")
    rows = _rows(source, split, make, needed, ("negative",), skipped)
    M = min(len(row["negative"]) for row in rows) if negatives is None else negatives
    if negatives is None and (more := sum(len(row["negative"]) > M for row in rows)):
        print(
            f"{source}: {more} of {len(rows)} rows have more than {M} negatives, but every row must have as many: {M} each are "
            f"used. --negatives {M + 1} --on-bad-row skip leaves out the rows with fewer."
        )
    return [{**row, "negative": row["negative"][:M]} for row in rows]


def read_texts(source, split="train", skipped=None):
    """Unsupervised rows as `[{"text": str}]`. Raises GraceError for a missing column or an empty text; `skipped`: see `_rows`.

    Blank lines of a .txt file separate paragraphs and are passed over.
    """
    return _rows(source, split, lambda raw: {"text": _text(raw["text"], "text")}, ("text",), skipped=skipped)


def read_pairs(source, split="test", skipped=None):
    """Graded pairs as `(sentences1, sentences2, scores)`. Raises GraceError as `read_texts` does."""

    def make(raw):
        one, two = (_text(raw[name], name) for name in ("sentence1", "sentence2"))
        try:
            score = float(raw["score"])
        except (TypeError, ValueError, OverflowError):
            score = math.nan
        if not math.isfinite(score):
            raise _BadRow(f"score is {reprlib.repr(raw['score'])}, not a finite number")
        return one, two, score

    return tuple(map(list, zip(*_rows(source, split, make, ("sentence1", "sentence2", "score"), skipped=skipped))))


def load_rows(config, skipped=None):
    """What a run reads: training rows, held-out rows, graded pairs (or None); `skipped`: see `_rows`.

    Without --heldout one row in ten is held out, at most 256. No training row shares a text, a query or
    a positive with a held-out one. Raises GraceError if fewer rows than a batch remain.
    """
    graded = read_pairs(config.graded, "train", skipped) if config.graded else None
    heldout = read_triplets(config.heldout, skipped=skipped) if config.heldout else []
    if config.mode == "unsupervised":
        rows = read_texts(config.data, skipped=skipped)
    else:
        rows = read_triplets(config.data, skipped=skipped)
    if not heldout:
        rows = random.Random(config.seed).sample(rows, len(rows))
        size = min(256, len(rows) // 10)
        heldout, rows = rows[:size], rows[size:]
    roles = "text", "query", "positive"
    held_out = {row[role] for row in heldout for role in roles if role in row}
    rows = [row for row in rows if held_out.isdisjoint(row[role] for role in roles if role in row)]
    if len(rows) < config.batch:
        raise GraceError(f"{config.data}: its {len(rows)} training rows are fewer than --batch {config.batch}")
    return rows, heldout, graded
