"""Every format and name that a dataset comes in, and every way in which a row can be wrong."""

import json
import re

import pandas
import pytest
from conftest import config

from plumbing.data import load_rows, read_pairs, read_texts, read_triplets
from plumbing.errors import GraceError

GOOD = [{"query": "a", "positive": "b", "negative": "c"}, {"query": "d", "positive": "e", "negative": "f"}]
READ = [{**row, "negative": [row["negative"]]} for row in GOOD]
LINE = json.dumps(GOOD[0]).encode() + b"\n"


def write(path, rows):
    """Rows as jsonl, or a text as it is. `-> the path`."""
    path.write_text(rows if isinstance(rows, str) else "".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return str(path)


# ---------------------------------------------------------------- formats


def test_every_format_reads_as_the_same_rows(tmp_path):
    """A row that occurs twice stays there twice."""
    rows = [*GOOD, GOOD[0]]
    pandas.DataFrame(rows).to_csv(tmp_path / "x.csv", index=False)
    pandas.DataFrame(rows).to_parquet(tmp_path / "x.parquet")
    write(tmp_path / "x.jsonl", rows)
    write(tmp_path / "x.json", json.dumps(rows, indent=2))
    (tmp_path / "folder").mkdir()
    write(tmp_path / "folder" / "train.jsonl", rows)
    for name in ("x.csv", "x.parquet", "x.jsonl", "x.json", "folder"):
        assert read_triplets(tmp_path / name) == [*READ, READ[0]], name


@pytest.mark.parametrize("start", ["", "\ufeff"], ids=["", "BOM"])
@pytest.mark.parametrize("end", ["\n", "\r\n"], ids=["LF", "CRLF"])
def test_line_ends_and_byte_order_marks(tmp_path, start, end):
    text = "caf\u00e9 \u2028 \x0c x"  # characters that some readers end a line at
    as_json = json.dumps({"text": text}, ensure_ascii=False)
    lines = {"x.jsonl": [as_json, "", '{"text": "b"}'], "x.txt": [text, "", "b"], "x.csv": ["text", text, "", '"b"', ""]}
    for name, parts in lines.items():
        (tmp_path / name).write_bytes((start + end.join(parts)).encode())
        assert [row["text"] for row in read_texts(tmp_path / name)] == [text, "b"], name


def test_every_field_of_a_csv_file_is_a_text(tmp_path):
    path = write(tmp_path / "x.csv", 'text\nNA\nnull\n3\n"Hello, world"\n"two\nlines"\n')
    assert [row["text"] for row in read_texts(path)] == ["NA", "null", "3", "Hello, world", "two\nlines"]


def test_long_lines_and_mixed_types(tmp_path):
    long = "word " * 200_000
    rows = [{"text": long, "id": 1}, {"text": "b", "id": "x"}, {"text": "c", "more": {"deep": [1, None]}}]
    assert [len(row["text"]) for row in read_texts(write(tmp_path / "x.jsonl", rows))] == [len(long), 1, 1]
    assert len(read_texts(write(tmp_path / "x.csv", f'text,id\n"{long}",1\nb,x\n'))[0]["text"]) == len(long)


# ---------------------------------------------------------------- columns


@pytest.mark.parametrize("names", ["anchor positive negatives", "sent0 sent1 hard_neg", "query pos neg"])
def test_names_of_other_data_sets(tmp_path, names):
    rows = [dict(zip(names.split(), row.values())) for row in GOOD]
    assert read_triplets(write(tmp_path / "x.jsonl", rows)) == READ


def test_negatives_come_from_every_column_that_holds_some(tmp_path):
    row = {"query": "a", "negative_1": "c", "positive": "b", "negative_2": "d", "hard_negatives": ["e", "f"], "neg": "g"}
    assert read_triplets(write(tmp_path / "x.jsonl", [row]))[0]["negative"] == ["c", "d", "e", "f", "g"]


@pytest.mark.parametrize("nothing", [{}, {"negative": None}, {"negative": ""}, {"negative": []}, {"negative_2": ""}])
def test_a_missing_negative_is_none(tmp_path, nothing):
    rows = [{"query": "a", "positive": "b", **nothing}]
    assert read_triplets(write(tmp_path / "x.jsonl", rows))[0]["negative"] == []


def test_every_row_has_as_many_negatives(tmp_path, capsys):
    path = write(tmp_path / "x.csv", "query,positive,negative_1,negative_2\na,b,c,d\ne,f,g,\n")
    assert [row["negative"] for row in read_triplets(path)] == [["c"], ["g"]]
    assert capsys.readouterr().out == f"{path}, line 3: has 1 negatives, others have more; 1 of each row are used\n"


def test_columns_that_are_not_used_are_named(tmp_path, capsys):
    path = write(tmp_path / "x.jsonl", [{"id": 3, "query": "a", "positive": "b", "easy_negative": "c"}])
    assert read_triplets(path)[0]["negative"] == []
    assert capsys.readouterr().out == f"{path}: columns that are not used: id, easy_negative\n"


def test_a_missing_column_is_told_with_those_that_exist(tmp_path):
    with pytest.raises(GraceError, match=re.escape("no column 'positive' (looked for: positive|pos|sent1); it has query, id")):
        read_triplets(write(tmp_path / "x.jsonl", [{"query": "a", "id": 1}]))


def test_graded_pairs(tmp_path):
    rows = [{"sentence1": "a", "sentence2": "b", "score": score} for score in (3, "4.5")]
    assert read_pairs(write(tmp_path / "x.jsonl", rows)) == (["a", "a"], ["b", "b"], [3.0, 4.5])
    for score in (None, "x", float("nan")):
        rows[1]["score"] = score
        with pytest.raises(GraceError, match="line 2: score is .*, not a finite number"):
            read_pairs(write(tmp_path / "x.jsonl", rows))


# ---------------------------------------------------------------- what is held out


def supervised(tmp_path, rows, **more):
    return config(data=write(tmp_path / "x.jsonl", rows), batch=2, **more)


def test_one_row_in_ten_is_held_out(tmp_path):
    train, heldout, graded = load_rows(supervised(tmp_path, [{"query": f"q{i}", "positive": f"p{i}"} for i in range(40)]))
    assert len(heldout) == 4 and len(train) == 36 and graded is None
    assert {row["query"] for row in train + heldout} == {f"q{i}" for i in range(40)}


def test_no_training_row_shares_a_text_with_a_held_out_one(tmp_path, capsys):
    """Neither a query nor a positive nor, without labels, a text; spaces around it do not matter."""
    heldout = write(tmp_path / "heldout.jsonl", [{"query": "a", "positive": " b "}])
    pairs = [{"query": "a ", "positive": "x"}, {"query": "y", "positive": "b"}, {"query": " b", "positive": "z"}]
    others = [{"query": f"q{i}", "positive": f"p{i}"} for i in range(2)]
    rows, _, _ = load_rows(supervised(tmp_path, pairs + others, heldout=heldout))
    assert [row["query"] for row in rows] == ["q0", "q1"]
    assert "3 training rows are left out, because they share a text with a held-out row" in capsys.readouterr().out
    with pytest.raises(GraceError, match="1 training rows are fewer than --batch 2"):
        load_rows(supervised(tmp_path, pairs + others[:1], heldout=heldout))
    texts = [{"text": text} for text in ("\ta", "b", "c", "d")]
    rows, _, _ = load_rows(supervised(tmp_path, texts, heldout=heldout, mode="unsupervised"))
    assert rows == texts[2:]


# ---------------------------------------------------------------- what cannot be used


@pytest.mark.parametrize("source", ["missing.jsonl", "missing.parquet", "./missing", "/missing/folder", "someone/on-the-hub"])
def test_missing_sources(source):
    with pytest.raises(GraceError, match="cannot be read" if source == "someone/on-the-hub" else "no such file"):
        read_triplets(source)


@pytest.mark.parametrize(
    "row, message",
    [
        ({"query": "", "positive": "b"}, "query is empty"),
        ({"query": "  ", "positive": "b"}, "query is '  '"),
        ({"query": "a", "positive": None}, "positive is empty"),
        ({"query": ["a"], "positive": "b"}, r"query is \['a'\], not a text"),
        ({"query": "\ud800", "positive": "b"}, "query is not UTF-8"),
        ({"query": "a", "positive": "b", "negative": " "}, "negative is ' '"),
        ({"query": "a", "positive": "b", "negative": 3}, "negative is 3, not a text"),
        ({"query": "a", "positive": "b", "negative": {"c": "d"}}, "negative is {'c': 'd'}"),
        ({"query": "a", "positive": "b", "negative": [["c"]]}, r"negative is \['c'\]"),
        ({"query": "a", "positive": "b", "negative": "b "}, "a negative equals the row's own query or positive"),
        ({"query": "a", "positive": "b", "negative": ["c", "a"]}, "a negative equals the row's own query or positive"),
    ],
)
def test_a_wrong_row_is_named_by_its_line(tmp_path, row, message):
    with pytest.raises(GraceError, match=f"x.jsonl, line 2: {message}"):
        read_triplets(write(tmp_path / "x.jsonl", [GOOD[0], row]))


@pytest.mark.parametrize(
    "name, content, message",
    [
        ("x.jsonl", LINE + b'{"query": "a", "positive": \n', ", line 2: cannot be read as JSON"),
        ("x.jsonl", LINE + b'["a", "b"]\n', r", line 2: is \['a', 'b'\], not an object"),
        ("x.jsonl", LINE + b'\n{"query": "caf\xe9", "positive": "b"}\n', ", line 3: query is not UTF-8, from its character 4"),
        ("x.json", b"[" + LINE, ": cannot be read"),
        ("x.csv", b"query,positive\na,b\n\na,b,c\n", ", line 4: has 3 fields, the header 2"),
        ("x.csv", b"query,positive,positive\na,b,c\n", ", line 1: 'positive' stands twice in the header"),
        ("x.csv", b'query,positive\na,"b\nb"\na,\n', ", line 4: positive is empty"),
        ("x.csv", b'query,positive\na,"b\nc,d\ne,f\n', ", line 2: cannot be read as csv"),
        ("x.csv", b'query,positive\n"a"b,c\nd,e\n', ", line 2: cannot be read as csv"),
        ("x.csv", b"query,positive\ncaf\xe9,b\n", ", line 2: query is not UTF-8"),
        ("x.xlsx", b"x", ": unknown format '.xlsx'"),
        *((f"x.{kind}", b"\n\n", ": no rows, the file is empty") for kind in ("jsonl", "csv", "txt")),
    ],
)
def test_a_broken_line_is_named(tmp_path, name, content, message):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(GraceError, match=name + message):
        read_triplets(tmp_path / name)


def test_a_damaged_parquet_file(tmp_path):
    path = tmp_path / "x.parquet"
    pandas.DataFrame([GOOD[0], {"query": "a", "positive": None}]).to_parquet(path)
    with pytest.raises(GraceError, match="x.parquet, row 2: positive is empty"):
        read_triplets(path)
    path.write_bytes(path.read_bytes()[:-9])
    with pytest.raises(GraceError, match="x.parquet: cannot be read"):
        read_triplets(path)
