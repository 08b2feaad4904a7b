"""The page of a run: what is recorded, what is shown, and that texts are shown and not obeyed."""

import json
import re
import shutil

import numpy as np
import pytest
from test_status import shown

import grace
from evaluation.encoder import encode_texts
from evaluation.page import build_page, changes
from evaluation.probe import probe, record
from evaluation.render import curve
from plumbing.data import read_triplets

HEADINGS = ["What it learned", "What it writes", "What queries find, and why", "Held-out scores", "Training"]
UNLABELLED = [{"text": text} for text in ("the doctor bought the lamp", "somebody sold the boat", "the child found the sofa")]


@pytest.fixture
def folder(finished_run, tmp_path):
    """A finished run, to be damaged."""
    return shutil.copytree(finished_run, tmp_path / "run")


def headings(page):
    return re.findall(r"<h2>(.*?)</h2>", page)


# ---------------------------------------------------------------- what is recorded


def test_probe_is_what_the_encoder_finds(make_policy, tiny_world):
    policy = make_policy()
    rows = read_triplets(f"{tiny_world}/data/heldout.jsonl")[:10]
    moment, rationales = probe(policy, rows)
    documents = list(dict.fromkeys(text for row in rows for text in (row["positive"], row["negative"][0])))
    assert moment["documents"] == len(documents) and list(rationales) == [row["query"] for row in rows]
    vectors, ranks = encode_texts(policy, documents).vectors, set()
    for row, query in zip(rows, moment["queries"]):
        encoded = encode_texts(policy, [row["query"]])
        scores = vectors @ encoded.vectors[0]
        best = int(scores.argmax())
        assert query["text"] == row["query"] and query["found"] == documents[best]
        assert query["right"] == (documents[best] == row["positive"]) and rationales[row["query"]] == encoded.rationales[0]
        assert query["rank"] == 1 + int((scores > scores[documents.index(row["positive"])] + 1e-6).sum())
        for side in "ab":
            assert sum(s["share"] for s in query[side]) == pytest.approx(float(scores[best]), abs=1e-5)
        ranks.add(query["rank"])
    assert len(ranks) > 1


def test_probe_without_labels(make_policy):
    for query in probe(make_policy(), UNLABELLED)[0]["queries"]:
        assert query["right"] is None and query["rank"] is None and query["found"] != query["text"]


def test_what_has_nothing_to_find_is_not_recorded(make_policy, tmp_path):
    same = "the doctor bought the lamp"
    row = {"query": same, "positive": same, "negative": []}
    for rows in ([{"text": same}] * 2, [row], []):
        record(tmp_path, 0, make_policy(), rows)
        assert not (tmp_path / "probe.json").exists()
    record(tmp_path, 0, make_policy(), [row, {**row, "positive": "somebody sold the boat"}])
    assert json.loads((tmp_path / "probe.json").read_text())["before"]["queries"][0]["rank"] == 1


def test_the_record_along_a_training(make_policy, tmp_path):
    """The start stays, a resumed run replaces what it does again, a new run in the folder starts anew."""
    read = lambda: json.loads((tmp_path / "probe.json").read_text())
    record(tmp_path, 0, make_policy(), UNLABELLED)
    start = read()
    for step, seed in ((5, 1), (10, 2), (10, 3)):
        record(tmp_path, step, make_policy(seed=seed), UNLABELLED)
    assert read()["before"] == start["before"] and [step for step, _ in read()["history"]] == [0, 5, 10]
    moment, rationales = probe(make_policy(seed=3), UNLABELLED)
    assert read()["history"][-1][1] == list(rationales.values()) and read()["after"] == moment
    record(tmp_path, 0, make_policy(), UNLABELLED)
    assert read() == start


# ---------------------------------------------------------------- the page


def test_a_finished_run(folder, capsys):
    with pytest.raises(SystemExit, match="no run is here"):
        grace.main(["report", str(folder / "nowhere")])
    grace.main(["report", str(folder)])
    assert "report.html shows this run" in capsys.readouterr().out
    page = (folder / "report.html").read_text()
    assert headings(page) == HEADINGS and "Finished after 4 steps" in page
    summary = json.loads((folder / "summary.json").read_text())
    for moment in ("before", "after", "after_without_rationale"):
        assert f"{summary[moment]['ndcg_at_10']:.3f}<" in page
    assert page.count("<svg ") > 10 and "<script" not in page
    assert not re.search(r"href|src=|url\(|@import", page)  # it fetches nothing


def test_in_training(folder):
    """Two steps done, nothing evaluated since the start, and a line that is being written right now."""
    (folder / "summary.json").unlink()
    lines = (folder / "metrics.jsonl").read_text().splitlines(keepends=True)
    (folder / "metrics.jsonl").write_text("".join(lines[:2]) + lines[2][:30])
    page = build_page(folder)
    assert "Not finished: 2 of 4 steps" in page and headings(page) == [h for h in HEADINGS if h != "Held-out scores"]
    for name in ("metrics.jsonl", "probe.json"):
        (folder / name).unlink()
    assert headings(build_page(folder)) == HEADINGS[:1]


def test_signs_of_trouble_are_those_of_status(folder, capsys):
    line = json.loads((folder / "metrics.jsonl").read_text().splitlines()[-1])
    lines = [{**line, "step": i + 1, "distinct_texts": 0.9 if i < 50 else 0.2, "cosine": 0.5} for i in range(100)]
    lines[50]["heldout_ndcg_at_10"] = 1.0  # the finished run is below its best
    (folder / "metrics.jsonl").write_text("".join(json.dumps(x) + "\n" for x in lines))
    page, printed = build_page(folder), shown(folder, capsys)
    cards = {re.search("<h3>(.*?)<", card)[1]: card for card in re.findall("<figure.*?</figure>", page, re.S)}
    assert ">ok<" in cards["cosine between texts"] and "Now:" not in cards["cosine between texts"]
    for name, trouble in (("distinct between texts", "falling: the policy writes"), ("nDCG@10", "retrieval is down")):
        assert f"Now: {trouble}" in cards[name] and re.search(f"{name} .*   {trouble}", printed)


def test_texts_are_shown_and_not_obeyed(folder):
    """Every text, rationale, word and setting of the run becomes markup: none of it may be markup in the page."""
    hostile = "<script>alert('1')</script> & \"2\" "

    def spoilt(x, name=None):
        if isinstance(x, dict):
            return {k: spoilt(v, k) for k, v in x.items()}
        if isinstance(x, list):
            return [spoilt(v) for v in x]
        return hostile + x if isinstance(x, str) and name != "part" else x

    for name in ("probe.json", "run.json", "summary.json"):
        (folder / name).write_text(json.dumps(spoilt(json.loads((folder / name).read_text()))))
    page = build_page(folder)
    assert headings(page) == HEADINGS and page.count("&lt;script&gt;") > 200
    assert "<script" not in page and "alert('" not in page and '"2"' not in page
    assert not re.search(r"&(?!(amp|lt|gt|quot|#x27);)", page)


def test_changed_words():
    assert changes("a b c d", "a x c d <e>") == "a <mark>x</mark> c d <mark>&lt;e&gt;</mark>"
    assert changes("a b", "a b") == "a b" and changes("a", "") == "(nothing)"


def test_a_curve():
    """Its points are where the axes say; what is not finite is left out; long runs stay small; a constant is a line."""
    points = lambda svg: [tuple(map(float, p.split(","))) for p in re.findall(r'points="([^"]*)"', svg)[-1].split()]
    assert points(curve([0, 5, 10], [1.0, 3.0, 2.0], "x")) == [(44, 118), (179, 10), (314, 64)]
    assert len(points(curve([0, 1, 2, 3], [1.0, float("nan"), 2.0, float("inf")], "x"))) == 2
    assert len(points(curve(range(5000), np.sin(np.arange(5000)), "x"))) == 300
    assert {y for _, y in points(curve([1, 2], [0.7, 0.7], "x"))} == {64}
    assert 'aria-label="&lt;x&gt;"' in curve([0, 1], [0, 1], "<x>")
