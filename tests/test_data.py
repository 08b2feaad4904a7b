"""Every format and name a dataset comes in, and every way a row can be wrong."""

import json

import pytest
import torch  # noqa: F401  (before datasets, as everywhere)

from config import Config
from data import GraceError, load_rows, read_pairs, read_texts, read_triplets


def write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return str(path)


GOOD = [{"query": "a", "positive": "b", "negative": "c"}, {"query": "d", "positive": "e", "negative": "f"}]
READ = [{**row, "negative": [row["negative"]]} for row in GOOD]


def test_formats(tmp_path):
    import pandas

    frame = pandas.DataFrame(GOOD)
    frame.to_csv(tmp_path / "x.csv", index=False)
    frame.to_parquet(tmp_path / "x.parquet")
    write(tmp_path / "x.jsonl", GOOD)
    for name in ("x.csv", "x.parquet", "x.jsonl"):
        assert read_triplets(str(tmp_path / name)) == READ
    folder = tmp_path / "folder"
    folder.mkdir()
    write(folder / "train.jsonl", GOOD)
    assert read_triplets(str(folder)) == READ


@pytest.mark.parametrize("names", [("anchor", "positive", "negative"), ("sent0", "sent1", "hard_neg"), ("query", "pos", "neg")])
def test_names(tmp_path, names):
    rows = [dict(zip(names, row.values())) for row in GOOD]
    assert read_triplets(write(tmp_path / "x.jsonl", rows)) == READ


def test_number_of_negatives(tmp_path):
    rows = [
        {"query": "a", "positive": "b", "negative": ["c", "d", "e"]},
        {"query": "f", "positive": "g", "negative": ["h", "i"]},
    ]
    path = write(tmp_path / "x.jsonl", rows)
    assert [row["negative"] for row in read_triplets(path)] == [["c", "d"], ["h", "i"]]
    assert [row["negative"] for row in read_triplets(path, 1)] == [["c"], ["h"]]
    assert [row["negative"] for row in read_triplets(path, 0)] == [[], []]
    with pytest.raises(GraceError, match="line 2: has 2 negatives, --negatives asks for 3"):
        read_triplets(path, 3)
    none = write(tmp_path / "y.jsonl", [{"query": "a", "positive": "b"}])
    assert read_triplets(none)[0]["negative"] == []
    with pytest.raises(GraceError, match="no column 'negative'"):
        read_triplets(none, 1)


@pytest.mark.parametrize(
    "row, message",
    [
        ({"query": "", "positive": "b", "negative": "c"}, "line 2: query is empty"),
        ({"query": "  ", "positive": "b", "negative": "c"}, "line 2: query is '  '"),
        ({"query": "a", "positive": None, "negative": "c"}, "line 2: positive is empty"),
        ({"query": "a", "positive": "b", "negative": ""}, "line 2: negative is empty"),
        ({"query": "a", "positive": "b", "negative": "b"}, "a negative equals the row's own"),
        ({"query": "a", "positive": "b", "negative": "a"}, "a negative equals the row's own"),
    ],
)
def test_bad_rows_are_named(tmp_path, row, message):
    with pytest.raises(GraceError, match=message):
        read_triplets(write(tmp_path / "x.jsonl", [GOOD[0], row]))


def test_numbers_are_no_texts(tmp_path):
    with pytest.raises(GraceError, match="line 1: text is 3, not a text"):
        read_texts(write(tmp_path / "x.jsonl", [{"text": 3}]))


@pytest.mark.parametrize(
    "content, message",
    [
        ("", "no rows, the file is empty"),
        ("\n\n", "cannot be read|no rows"),
        ('{"query": "a"}\n', "no column 'positive'"),
        ("{half", "cannot be read"),
    ],
)
def test_broken_files(tmp_path, content, message):
    path = tmp_path / "x.jsonl"
    path.write_text(content)
    with pytest.raises(GraceError, match=message):
        read_triplets(str(path))


@pytest.mark.parametrize("source", ["missing.jsonl", "./missing", "/missing/folder", "someone/some-dataset-on-the-hub"])
def test_what_is_not_there(source):
    with pytest.raises(GraceError, match="no such file|cannot be read"):
        read_triplets(source)


def test_unknown_format(tmp_path):
    (tmp_path / "x.xlsx").write_text("x")
    with pytest.raises(GraceError, match="unknown format '.xlsx'"):
        read_texts(str(tmp_path / "x.xlsx"))


def test_words_that_csv_readers_take_for_missing(tmp_path):
    path = tmp_path / "x.csv"
    path.write_text("text\nNA\nNone\nnull\n")
    assert [row["text"] for row in read_texts(str(path))] == ["NA", "None", "null"]


def test_texts_a_line_each(tmp_path):
    path = tmp_path / "x.txt"
    path.write_text("one\n\ntwo é\n", encoding="utf-8")
    assert read_texts(str(path)) == [{"text": "one"}, {"text": "two é"}]


def test_graded_pairs(tmp_path):
    path = write(tmp_path / "x.jsonl", [{"sentence1": "a", "sentence2": "b", "score": 3}])
    assert read_pairs(path) == (["a"], ["b"], [3.0])


@pytest.mark.parametrize("row", [{"score": None}, {"score": "x"}, {"sentence1": None}, {"score": float("nan")}])
def test_bad_pairs_are_named(tmp_path, row):
    good = {"sentence1": "a", "sentence2": "b", "score": "3"}
    with pytest.raises(GraceError, match="line 2: (score|sentence1) is"):
        read_pairs(write(tmp_path / "x.jsonl", [good, {**good, **{k: str(v) if v == v and v else v for k, v in row.items()}}]))


def test_no_training_row_shares_a_text_with_a_held_out_one(tmp_path):
    rows = [{"query": f"q{i // 2}", "positive": f"p{i}", "negative": "n"} for i in range(40)]
    train, heldout, _ = load_rows(Config(data=write(tmp_path / "x.jsonl", rows), batch=2))
    assert len(heldout) == 4 and not {r["query"] for r in train} & {r["query"] for r in heldout}
    assert len(train) + len(heldout) < 40  # the other row of a held-out query is in neither
