"""Every format and name a dataset comes in, and every way a row can be wrong."""

import json
import sys

import pytest
from conftest import command, config
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from test_layout import ROOT, imported

import grace
from plumbing.data import load_rows, open_dataset, read_pairs, read_texts, read_triplets
from plumbing.errors import GraceError
from rollout import make_batch


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


def test_lines_need_no_library(tmp_path, monkeypatch):
    """jsonl, csv and txt are read here: a machine without `datasets` trains on them."""
    monkeypatch.setitem(sys.modules, "datasets", None)
    (tmp_path / "x.txt").write_text("a\nb\n")
    assert read_triplets(write(tmp_path / "x.jsonl", GOOD)) == READ
    assert read_texts(str(tmp_path / "x.txt")) == [{"text": "a"}, {"text": "b"}]
    assert "datasets" not in imported(ROOT / "grace.py") | imported(ROOT / "bench" / "encode.py")


@pytest.mark.parametrize("names", [("anchor", "positive", "negative"), ("sent0", "sent1", "hard_neg"), ("query", "pos", "neg")])
def test_names(tmp_path, names):
    rows = [dict(zip(names, row.values())) for row in GOOD]
    assert read_triplets(write(tmp_path / "x.jsonl", rows)) == READ


def test_number_of_negatives(tmp_path, capsys):
    rows = [
        {"query": "a", "positive": "b", "negative": ["c", "d", "e"]},
        {"query": "f", "positive": "g", "negative": ["h", "i"]},
    ]
    path = write(tmp_path / "x.jsonl", rows)
    assert [row["negative"] for row in read_triplets(path)] == [["c", "d"], ["h", "i"]]
    assert "1 of 2 rows have more than 2 negatives" in (printed := capsys.readouterr().out) and "--negatives 3" in printed
    assert [row["negative"] for row in read_triplets(path, 1)] == [["c"], ["h"]]
    assert [row["negative"] for row in read_triplets(path, 0)] == [[], []]
    assert capsys.readouterr().out == ""
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
def test_missing_sources(source):
    with pytest.raises(GraceError, match="no such file|cannot be read"):
        read_triplets(source)


def test_unknown_format(tmp_path):
    (tmp_path / "x.xlsx").write_text("x")
    with pytest.raises(GraceError, match="unknown format '.xlsx'"):
        read_texts(str(tmp_path / "x.xlsx"))


def test_words_that_mean_missing_in_csv(tmp_path):
    path = tmp_path / "x.csv"
    path.write_text("text\nNA\nNone\nnull\n")
    assert [row["text"] for row in read_texts(str(path))] == ["NA", "None", "null"]


def test_one_text_per_line(tmp_path):
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


def test_held_out_rows_share_no_text(tmp_path):
    """With a training row: neither labelled rows nor texts that are there twice."""
    rows = [{"query": f"q{i // 2}", "positive": f"p{i}", "negative": "n"} for i in range(40)]
    train, heldout, _ = load_rows(config(data=write(tmp_path / "x.jsonl", rows), batch=2))
    assert len(heldout) == 4 and not {r["query"] for r in train} & {r["query"] for r in heldout}
    assert len(train) + len(heldout) < 40  # the other row of a held-out query is in neither
    path = write(tmp_path / "y.jsonl", [{"text": f"t{i // 2}"} for i in range(40)])
    train, heldout, _ = load_rows(config(data=path, mode="unsupervised", batch=2))
    assert (
        len(heldout) == 4 and not {r["text"] for r in train} & {r["text"] for r in heldout} and len(train) + len(heldout) < 40
    )


# ---------------------------------------------------------------- lines that are not what they should be


LINE = json.dumps(GOOD[0]).encode() + b"\n"


@pytest.mark.parametrize(
    "name, content, message",
    [
        ("x.jsonl", LINE + b'{"query": "a", "positive": \n', "line 2: cannot be read as JSON"),
        ("x.jsonl", LINE + b'["a", "b"]\n', r"line 2: is \['a', 'b'\], not an object"),
        ("x.jsonl", LINE + b"[" * 100_000 + b"\n", "line 2: cannot be read as JSON"),
        (
            "x.jsonl",
            LINE + LINE + b'{"query": "caf\xe9", "positive": "b"}\n',
            "line 3: query is not UTF-8, from its character 4",
        ),
        ("x.jsonl", LINE + b'{"query": "\\ud800", "positive": "b"}\n', "line 2: query is not UTF-8"),
        ("x.jsonl", LINE + b'{"query": "a\\u0000", "positive": "b"}\n', "line 2: query holds a NUL"),
        ("x.jsonl", LINE + b'{"query": ["a"], "positive": "b"}\n', r"line 2: query is \['a'\], not a text"),
        ("x.jsonl", LINE + b'{"query": "a", "positive": "b", "negative": 3}\n', "line 2: negative is 3, not a text"),
        ("x.jsonl", LINE + b'{"query": "a", "positive": "b", "negative": {"c": "d"}}\n', "line 2: negative is {'c': 'd'}"),
        ("x.jsonl", LINE + b'{"query": "a", "positive": "b", "negative": [["c"]]}\n', r"line 2: negative is \['c'\]"),
        ("x.jsonl", LINE + b'{"query": "a", "positive": "b", "negative": [null]}\n', "line 2: negative is empty"),
        ("x.jsonl", LINE.decode().encode("utf-16"), "is UTF-16; convert it to UTF-8"),
        ("x.json", b"[" + LINE + b", 3]", "row 2: is 3, not an object"),
        ("x.json", b"[" + LINE, "cannot be read as JSON"),
        ("x.csv", b"query,positive\na,b\n\na,b,c\n", "line 4: has 3 fields, the header 2"),
        ("x.csv", b'query,positive\na,"b\nb"\na,\n', "line 4: positive is empty"),
        ("x.csv", b'query,positive\na,"b\nc,d\ne,f\n', "line 2: cannot be read as csv"),
        ("x.csv", b'query,positive\n"a"b,c\nd,e\n', "line 2: cannot be read as csv"),
        ("x.csv", b"query,query\na,b\n", "line 1: two columns have one name"),
        ("x.csv", b"query,positive\ncaf\xe9,b\n", "line 2: query is not UTF-8"),
    ],
)
def test_broken_lines_are_named(tmp_path, name, content, message):
    path = tmp_path / name
    path.write_bytes(content)
    with pytest.raises(GraceError, match=f"{name}(, |: ){message}"):
        read_triplets(str(path))


@pytest.mark.parametrize("start", [b"", b"\xef\xbb\xbf"], ids=["", "BOM"])
@pytest.mark.parametrize("end", [b"\n", b"\r\n"], ids=["LF", "CRLF"])
def test_line_ends_and_byte_order_marks(tmp_path, start, end):
    text = "caf\u00e9 \u2028 \x0c x".encode()  # characters that some readers end a line at
    (tmp_path / "x.jsonl").write_bytes(
        start + end.join([b'{"text": "%s"}' % text.replace(b"\x0c", b"\\f"), b"", b'{"text": "b"}'])
    )
    (tmp_path / "x.csv").write_bytes(start + end.join([b"text", text, b'"b"', b""]))
    (tmp_path / "x.txt").write_bytes(start + end.join([text, b"", b"b"]))
    for name in ("x.jsonl", "x.csv", "x.txt"):
        assert [row["text"] for row in read_texts(str(tmp_path / name))] == [text.decode(), "b"], name


def test_an_array_in_a_json_file(tmp_path):
    (tmp_path / "x.json").write_text(json.dumps(GOOD, indent=2))
    assert read_triplets(str(tmp_path / "x.json")) == READ


def test_enormous_lines_and_mixed_types(tmp_path):
    long = "word " * 2_000_000  # 10 MB
    rows = [{"text": long, "id": 1}, {"text": "b", "id": "x"}, {"text": "c", "more": {"deep": [1, None]}}]
    assert [len(row["text"]) for row in read_texts(write(tmp_path / "x.jsonl", rows))] == [len(long), 1, 1]
    (tmp_path / "x.csv").write_text(f'text,id\n"{long}",1\nb,2\n')
    assert len(read_texts(str(tmp_path / "x.csv"))[0]["text"]) == len(long)


def test_rows_that_are_there_twice(tmp_path):
    rows = read_triplets(write(tmp_path / "x.jsonl", [GOOD[0], GOOD[1], GOOD[0]]))
    assert len(rows) == 3
    twins = make_batch(rows).twins
    assert twins[0, 2] and twins[2, 0] and twins.sum() == 5


def test_bad_rows_are_skipped_and_listed(tmp_path):
    path = tmp_path / "x.jsonl"
    path.write_bytes(
        LINE + b"{half\n" + LINE + b'{"query": "caf\xe9", "positive": "b"}\n' + b'{"query": "", "positive": "b"}\n'
    )
    skipped = []
    assert read_triplets(str(path), skipped=skipped) == READ[:1] * 2
    assert [bad["where"] for bad in skipped] == ["line 2", "line 4", "line 5"]
    assert skipped[2]["why"] == "query is empty, not a text"
    assert {bad["file"] for bad in skipped} == {str(path)} and json.dumps(skipped)
    path.write_bytes(b"{half\n" * 3)
    with pytest.raises(GraceError, match="no rows are left, all 3 were skipped; line 1: cannot be read as JSON"):
        read_triplets(str(path), skipped=[])


def test_run_lists_what_it_skipped(tiny_world, tmp_path, capsys):
    data, out = tmp_path / "data.jsonl", tmp_path / "out"
    lines = (tiny_world / "data" / "train.jsonl").read_bytes()
    data.write_bytes(lines + b'{"query": "caf\xe9", "positive": "b"}\n' * 7)
    arguments = command(tiny_world, out, f"--data {data} --steps 1 --eval-every 0")
    with pytest.raises(SystemExit, match="data.jsonl, line 65: query is not UTF-8"):
        grace.main(arguments)
    grace.main([*arguments, "--on-bad-row", "skip"])
    printed = capsys.readouterr().out
    assert printed.count("skipped: ") == 5 and f"7 rows skipped; {out}/skipped_rows.json lists them all" in printed
    skipped = json.loads((out / "skipped_rows.json").read_text())
    assert [bad["where"] for bad in skipped] == [f"line {i}" for i in range(65, 72)]


def test_damaged_parquet_file(tmp_path):
    import pandas

    path = tmp_path / "x.parquet"
    pandas.DataFrame(GOOD * 50).to_parquet(path)
    raw = path.read_bytes()
    for harm in (b"", raw[:100], raw[:-9] + bytes(9), bytes(reversed(raw))):
        path.write_bytes(harm)
        with pytest.raises(GraceError, match="x.parquet: (cannot be read|no rows)"):
            open_dataset(str(path))
    pandas.DataFrame([{"query": "a", "positive": "b"}, {"query": "a", "positive": None}]).to_parquet(path)
    with pytest.raises(GraceError, match="x.parquet, row 2: positive is empty"):
        read_triplets(str(path))


# ---------------------------------------------------------------- a thousand inputs that nobody thought of

WORDS = ["query", "positive", "negative", "text", "sentence1", "sentence2", "score"]
NAMES = st.sampled_from(WORDS)
values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8) | st.just("x"),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(NAMES | st.text(max_size=3), inner, max_size=3),
    max_leaves=6,
)
objects = st.dictionaries(NAMES, values | st.sampled_from("abc"), min_size=1).map(lambda x: json.dumps(x).encode())
fields = st.lists(NAMES | st.text(max_size=6) | st.sampled_from(['"', '""', 'a"b', "\r", "\x00", "3"]), max_size=4)
lines = objects | fields.map(lambda x: ",".join(x).encode("utf-8", "surrogatepass")) | st.binary(max_size=12)
files = st.tuples(
    st.sampled_from([b"", b"\xef\xbb\xbf", b"\xff\xfe", b"query,positive\n", b"text\n", b"sentence1,sentence2,score\n", b"["]),
    st.lists(lines, max_size=5),
    st.sampled_from([b"\n", b"\r\n", b"\r", b"\n\n", b",\n"]),
    st.sampled_from([b"", b"\n", b"]", b'"', b"\x00"]),
).map(lambda x: x[0] + x[2].join(x[1]) + x[3])


@settings(max_examples=1000, deadline=None, derandomize=True, database=None, suppress_health_check=list(HealthCheck))
@given(content=files, suffix=st.sampled_from([".jsonl", ".json", ".csv", ".txt"]), skip=st.booleans())
@example(content=b'{"query": "a", "positive": "b", "negative": 1e999}', suffix=".jsonl", skip=False)
@example(content=b'{"sentence1": "a", "sentence2": "b", "score": ' + b"9" * 400 + b"}", suffix=".jsonl", skip=False)
@example(content=b'{"query": ' * 5000, suffix=".jsonl", skip=True)
def test_a_thousand_malformed_files(tmp_path_factory, content, suffix, skip):
    """They end in rows, which are what the docstrings promise, or in a GraceError of one line."""
    path = tmp_path_factory.getbasetemp() / f"fuzz{suffix}"
    path.write_bytes(content)
    for read in (read_triplets, read_texts, read_pairs):
        skipped = [] if skip else None
        try:
            rows = read(str(path), skipped=skipped)
        except GraceError as error:
            assert str(path) in str(error) and "\n" not in str(error)
            continue
        texts = rows[0] + rows[1] if read is read_pairs else [x for row in rows for x in row.values()]
        texts = [text for x in texts for text in (x if isinstance(x, list) else [x])]
        assert texts and all(isinstance(text, str) and text.strip() and text.encode() for text in texts)
        assert not skipped or json.dumps(skipped)
