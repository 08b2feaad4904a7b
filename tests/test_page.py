"""The page and the card of a run: what is recorded, what is shown, and that texts are shown and not obeyed."""

import importlib.util
import json
import re
import shutil

import numpy as np
import pytest
import torch
from huggingface_hub import ModelCard
from test_status import shown

import grace
from evaluation.card import quoted
from evaluation.encoder import GraceEncoder, encode_texts
from evaluation.page import build_page, changes, curve, curves, finish_page
from evaluation.probe import probe
from plumbing.data import read_triplets

HEADINGS = ["What it learned", "What it writes", "What queries find, and why", "Along the training"]
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
    rationales, found = probe(policy, rows)
    documents = list(dict.fromkeys(text for row in rows for text in (row["positive"], row["negative"][0])))
    assert list(rationales) == [row["query"] for row in rows[:6]]
    vectors, ranks = encode_texts(policy, documents).vectors, set()
    for row, query in zip(rows, found, strict=True):
        encoded = encode_texts(policy, [row["query"]])
        scores = vectors @ encoded.vectors[0]
        best = int(scores.argmax())
        assert query["text"] == row["query"] and query["found"] == documents[best]
        assert query["right"] == (documents[best] == row["positive"])
        assert rationales.get(row["query"], encoded.rationales[0]) == encoded.rationales[0]
        assert query["rank"] == 1 + int((scores > scores[documents.index(row["positive"])] + 1e-6).sum())
        for side in "ab":
            assert sum(s["share"] for s in query[side]) == pytest.approx(float(scores[best]), abs=1e-5)
        ranks.add(query["rank"])
    assert len(ranks) > 1


def test_probe_without_labels(make_policy):
    for query in probe(make_policy(), UNLABELLED)[1]:
        assert query["right"] is None and query["rank"] is None and query["found"] != query["text"]


def test_where_there_is_nothing_to_choose_from(make_policy):
    """One text among equal ones; and a query that is its own positive finds itself."""
    same = "the doctor bought the lamp"
    row = {"query": same, "positive": same, "negative": []}
    for rows in ([{"text": same}] * 2, [row]):
        rationales, found = probe(make_policy(), rows)
        assert list(rationales) == [same] and found == []
    _, (query,) = probe(make_policy(), [row, {**row, "positive": "somebody sold the boat"}])
    assert query["found"] == same and query["rank"] == 1


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
    """Two steps done, nothing evaluated since the start, and a line that is being written right now. There is no card."""
    (folder / "summary.json").unlink()
    lines = (folder / "metrics.jsonl").read_text().splitlines(keepends=True)
    (folder / "metrics.jsonl").write_text("".join(lines[:2]) + lines[2][:30])
    finish_page(folder)
    page = (folder / "report.html").read_text()
    assert not (folder / "README.md").exists()
    assert "Not finished: 2 of 4 steps" in page and headings(page) == HEADINGS
    (folder / "metrics.jsonl").unlink()
    assert headings(build_page(folder)) == HEADINGS[:3]


def test_signs_of_trouble_are_those_of_status(folder, capsys):
    line = json.loads((folder / "metrics.jsonl").read_text().splitlines()[-1])
    lines = [{**line, "step": i + 1, "distinct_texts": 0.9 if i < 50 else 0.2, "cosine": 0.5} for i in range(100)]
    lines[50]["heldout_ndcg_at_10"] = 1.0  # the finished run is below its best
    (folder / "metrics.jsonl").write_text("".join(json.dumps(x) + "\n" for x in lines))
    page, printed = build_page(folder), shown(folder, capsys)
    cards = {re.search("<h3>(.*?)<", card)[1]: card for card in re.findall("<figure.*?</figure>", page, re.S)}
    assert "Look here" not in cards["cosine between texts"]
    for name, trouble in (("distinct between texts", "falling: the policy writes"), ("nDCG@10", "retrieval is down")):
        assert f"Look here: {trouble}" in cards[name] and re.search(f"{name} .*   {trouble}", printed)


def test_texts_are_shown_and_not_obeyed(folder):
    """Every text, rationale, word and setting of the run becomes markup: none of it may be markup in the page."""
    hostile = "<script>alert('1')</script> & \"2\" "

    def spoilt(x, name=None):
        if isinstance(x, dict):
            return {k: spoilt(v, k) for k, v in x.items()}
        if isinstance(x, list):
            return [spoilt(v) for v in x]
        return hostile + x if isinstance(x, str) and name != "part" else x

    for name in ("run.json", "summary.json"):
        (folder / name).write_text(json.dumps(spoilt(json.loads((folder / name).read_text()))))
    page = build_page(folder)
    assert headings(page) == HEADINGS and page.count("&lt;script&gt;") > 200
    assert "<script" not in page and "alert('" not in page and '"2"' not in page
    assert not re.search(r"&(?!(amp|lt|gt|#34|#39);)", page)


def test_changed_words():
    assert changes("a b c d", "a x c d <e>") == [("a", False), ("x", True), ("c", False), ("d", False), ("<e>", True)]
    assert not any(changed for _, changed in changes("a b", "a b")) and changes("a", "") == []


def test_a_curve():
    """Its points are where the axes say; what is not finite is left out; long runs stay small; a constant is a line."""
    points = lambda values: [tuple(map(float, p.split(","))) for p in curve(list(enumerate(values)))["smooth"].split()]
    assert points([1.0, 3.0, 2.0]) == [(44, 118), (179, 10), (314, 64)]
    assert len(points(np.sin(np.arange(5000)))) == 300
    assert {y for _, y in points([0.7, 0.7])} == {64}
    lines = {step: {"reward": value} for step, value in enumerate([1.0, float("nan"), 2.0, float("inf")])}
    (drawn,) = curves({"reward": ("reward", "")}, lines, {})
    assert (drawn["first"], drawn["last"]) == (0, 2) and len(drawn["raw"].split()) == 2


# ---------------------------------------------------------------- the card


def test_the_card_of_a_finished_run(folder):
    """The hub reads its metadata; it shows the scores and three texts; nothing in it tells a path of this machine."""
    finish_page(folder)
    card, summary = ModelCard.load(folder / "README.md"), json.loads((folder / "summary.json").read_text())
    assert card.data.library_name == "sentence-transformers" and "grace" in card.data.tags
    assert card.data.base_model is None and card.data.datasets is None and card.data.license is None
    cells = [f"{summary[moment]['ndcg_at_10']:.3f}" for moment in ("before", "after", "after_without_rationale")]
    assert f"| `ndcg_at_10` | {' | '.join(cells)} |" in card.text
    _, last = json.loads((folder / "run.json").read_text())["history"][-1]
    for text, rationale in list(last.items())[:3]:
        assert f"{quoted(text)}\n>\n> *writes:* {quoted(rationale)[2:]}" in card.text
    assert card.text.count("*writes:*") == 3 and "`--steps 4`" in card.text and "`--no-length-normalize`" in card.text
    assert "--out" not in card.text and card.text.count(str(folder.parent)) == 1  # where the command to share it stands


def test_a_card_names_what_is_on_the_hub(folder):
    summary = json.loads((folder / "summary.json").read_text())
    summary["config"] |= {"model": "Qwen/Qwen2.5-0.5B-Instruct", "data": "sentence-transformers/all-nli:triplet"}
    (folder / "summary.json").write_text(json.dumps(summary))
    finish_page(folder)
    card = ModelCard.load(folder / "README.md")
    assert card.data.base_model == "Qwen/Qwen2.5-0.5B-Instruct" and card.data.datasets == ["sentence-transformers/all-nli"]


def test_a_finished_folder_reads_itself(folder):
    """The file that modules.json names gives the embeddings of this repository."""
    finish_page(folder)
    (entry,) = json.loads((folder / "modules.json").read_text())
    file, name = entry["type"].split(".")
    spec = importlib.util.spec_from_file_location(file, folder / f"{file}.py")
    spec.loader.exec_module(copy := importlib.util.module_from_spec(spec))
    reader, texts = getattr(copy, name).load(str(folder)), [row["text"] for row in UNLABELLED]
    with torch.no_grad():
        vectors = reader(reader.preprocess(texts))["sentence_embedding"]
    np.testing.assert_allclose(vectors, GraceEncoder(str(folder), device="cpu").encode(texts), atol=1e-5)


def test_a_folder_that_only_this_code_reads_says_so(folder):
    summary = json.loads((folder / "summary.json").read_text())
    summary["reading"]["twice"] = True
    (folder / "summary.json").write_text(json.dumps(summary))
    finish_page(folder)
    assert "from grace import GraceEncoder" in (folder / "README.md").read_text() and not (folder / "modules.json").exists()


def test_quoted():
    assert quoted("a\n# b | <i> *c*") == r"> a \# b \| \<i\> \*c\*"
    assert quoted("ab " * 200).endswith(" …") and len(quoted("ab " * 200)) < 310
