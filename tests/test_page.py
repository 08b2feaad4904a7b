"""The page of a run: what it is made from, every state of a folder, and a browser that really opens it."""

import json
import re
import shutil
import sys

import numpy as np
import pytest
from chromium import BROWSER, WHY, Chromium
from plumbing.report import show_rationales

import grace
from evaluation.encoder import encode_texts
from evaluation.page import build_page, changes, finish_page, rationales, write_page
from evaluation.probe import probe, record, two_components
from plumbing.data import read_triplets
from plumbing.errors import GraceError
from policy import Policy

SCRIPT = "<script>document.title = 'a text ran'</script>"
HEADINGS = (
    "What it learned", "What it writes", "What queries find, and why", "A map of embeddings",
    "Held-out scores along the training", "Reward", "Length and language", "Signs of trouble", "Every setting",
)  # fmt: skip


@pytest.fixture(scope="session")
def whole_run(finished_run, tiny_world, tmp_path_factory):
    """A finished run with all that a page can show. Not to be written to."""
    out = tmp_path_factory.mktemp("whole") / "run"
    shutil.copytree(finished_run, out)
    heldout = read_triplets(f"{tiny_world}/data/heldout.jsonl")
    record(out, 0, Policy.load(f"{tiny_world}/model"), heldout)
    record(out, 4, Policy.load(str(out)), heldout)
    return out


@pytest.fixture
def folder(whole_run, tmp_path):
    """A copy of it, to be damaged."""
    return shutil.copytree(whole_run, tmp_path / "run")


def headings(page):
    return re.findall(r"<h2>(.*?)</h2>", page)


def notes(page):
    return re.findall(r'<p class="notes">(.*?)</p>', page)


# ---------------------------------------------------------------- what is recorded


def test_probe_is_what_the_encoder_finds(make_policy, tiny_world):
    policy = make_policy()
    rows = read_triplets(f"{tiny_world}/data/heldout.jsonl")[:10]
    recorded = probe(policy, rows)
    documents = list(dict.fromkeys(text for row in rows for text in (row["positive"], row["negative"][0])))
    assert recorded["documents"] == len(documents) and len(recorded["points"]) == 20
    vectors = encode_texts(policy, documents).vectors
    ranks = []
    for row, query in zip(rows, recorded["queries"]):
        scores = vectors @ encode_texts(policy, [row["query"]]).vectors[0]
        best = int(scores.argmax())
        assert query["text"] == row["query"] and query["answers"][0]["text"] == documents[best]
        assert query["cosine"] == pytest.approx(float(scores[best]), abs=1e-5)
        assert query["answers"][0]["right"] == (documents[best] == row["positive"])
        ranks.append(1 + int((scores > scores[documents.index(row["positive"])] + 1e-6).sum()))
        assert query["rank"] == ranks[-1]
        for side in "ab":
            assert sum(s["share"] for s in query[side]) == pytest.approx(query["cosine"], abs=1e-5)
    assert len(set(ranks)) > 1


def test_probe_without_labels(make_policy):
    texts = ["the doctor bought the lamp", "somebody sold the boat", "the child found the sofa"]
    recorded = probe(make_policy(), [{"text": text} for text in texts])
    for query in recorded["queries"]:
        assert [a["right"] for a in query["answers"]] == [None, None] and query["rank"] is None
        assert query["text"] not in [a["text"] for a in query["answers"]]


def test_what_has_nothing_to_find_is_not_recorded(make_policy, tmp_path):
    """A positive that is the query itself, and a single text; the other rows are shown all the same."""
    same, other = "the doctor bought the lamp", "somebody sold the boat"
    row = lambda query, positive: {"query": query, "positive": positive, "negative": []}
    for rows in ([{"text": same}], [{"text": same}] * 2, [row(same, same)]):
        record(tmp_path, 0, make_policy(), rows)
        assert not (tmp_path / "probe.json").exists()
    record(tmp_path, 0, make_policy(), [row(same, same), row(same, other)])
    (query,) = json.loads((tmp_path / "probe.json").read_text())["before"]["queries"]
    assert (query["text"], query["rank"], query["answers"][0]["text"]) == (same, 1, other)


def test_the_start_stays_recorded(make_policy, tmp_path):
    rows = [{"text": "the doctor bought the lamp"}, {"text": "somebody sold the boat"}]
    record(tmp_path, 0, make_policy(), rows)
    first = json.loads((tmp_path / "probe.json").read_text())
    record(tmp_path, 5, make_policy(seed=1), rows)
    later = json.loads((tmp_path / "probe.json").read_text())
    assert list(first) == ["before"] and later["before"] == first["before"] and later["after"]["step"] == 5
    record(tmp_path, 0, make_policy(), rows)  # another run in the same folder
    assert list(json.loads((tmp_path / "probe.json").read_text())) == ["before"]
    (tmp_path / "probe.json").write_text("{half")
    record(tmp_path, 5, make_policy(), rows)
    assert list(json.loads((tmp_path / "probe.json").read_text())) == ["after"]


def test_two_components_keep_a_flat_cloud():
    flat = np.random.default_rng(0).normal(size=(12, 2))
    turned = np.linalg.qr(np.random.default_rng(1).normal(size=(9, 9)))[0][:2]
    places, variance = two_components(flat @ turned + 5)
    apart = lambda x: np.linalg.norm(x[:, None] - x[None], axis=-1)
    assert np.allclose(apart(places), apart(flat)) and variance == pytest.approx(1)
    assert two_components(np.random.default_rng(0).normal(size=(50, 9)))[1] < 0.6


def test_a_rationale_stays_in_its_row(folder):
    """Whatever separates lines somewhere, in what a model wrote, is a space in rationales.md."""
    history = [(0, ["one\rtwo\u2028three\n\nfour | five\x0bsix"]), (5, ["seven"])]
    (folder / "rationales.md").write_text(show_rationales(history, ["a text"]))
    (shown,) = rationales({"out": str(folder)})
    assert [(step, [word for word, _ in words]) for step, words in shown["rows"]] == [
        (0, ["one", "two", "three", "four", "five", "six"]), (5, ["seven"]),
    ]  # fmt: skip
    assert len((folder / "rationales.md").read_text().splitlines()) == 8


def test_changed_words():
    assert [word for word, new in changes("a b c d", "a x c d e") if new] == ["x", "e"]
    assert not any(new for _, new in changes(None, "a b")) and changes("a", "") == []


# ---------------------------------------------------------------- the page


def test_a_finished_run(whole_run, capsys):
    path = write_page(whole_run)
    page = open(path).read()
    assert tuple(headings(page)) == HEADINGS and notes(page) == []
    summary = json.loads((whole_run / "summary.json").read_text())
    for moment in ("before", "after", "after_without_rationale"):
        assert f">{summary[moment]['ndcg_at_10']:.3f}</td>" in page
    assert "Finished after 4 steps" in page and page.count("<svg ") > 15
    assert page.count('<svg role="img" aria-label="') == page.count("<svg ")
    ids = re.findall(r'\bid="([^"]+)"', page)
    assert len(ids) == len(set(ids)) > 0
    assert set(re.findall(r'(?:href|src)="([^"#]*)', page)) <= {"data:,", ""} and "@import" not in page
    assert "font-family" not in page  # the pictures have the page's font
    assert build_page(whole_run) == page  # the same folder, the same page
    grace.main(["report", str(whole_run), "--out", str(whole_run.parent / "elsewhere.html")])
    assert "elsewhere.html shows the run" in capsys.readouterr().out


def test_signs_of_trouble_are_those_of_status(folder):
    line = json.loads((folder / "metrics.jsonl").read_text().splitlines()[-1])
    lines = [{**line, "step": i + 1, "distinct_texts": 0.9 if i < 50 else 0.2, "cosine": 0.5} for i in range(100)]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(x) + "\n" for x in lines))
    verdict = {}
    for card in re.findall(r'<section class="card">.*?</section>', build_page(folder), re.S):
        if '<span class="verdict' in card:
            verdict[re.search("<h3>(.*?)</h3>", card)[1]] = re.search(r"<strong>Now: (.*?)</strong>", card)
    assert verdict["cosine between texts"] is None
    assert verdict["distinct between texts"][1].startswith("falling: the policy writes the same about everything")


def test_in_training(folder):
    """Two steps done, nothing evaluated since the start, and a line that is being written right now."""
    (folder / "summary.json").unlink()
    moments = json.loads((folder / "probe.json").read_text())
    (folder / "probe.json").write_text(json.dumps({"before": moments["before"]}))
    lines = (folder / "metrics.jsonl").read_text().splitlines(keepends=True)
    (folder / "metrics.jsonl").write_text("".join(lines[:2]) + lines[2][:30])
    page = build_page(folder)
    assert notes(page) == [] and "Not finished: 2 of 4 steps" in page
    assert "without rationale</th>" not in page and set(headings(page)) == set(HEADINGS) - {
        "Held-out scores along the training"
    }
    (folder / "metrics.jsonl").write_text("")
    assert notes(build_page(folder)) == ["metrics.jsonl holds no step yet"]


DAMAGE = {  # a file, what becomes of it, the headings that are then missing, and words of the note
    "no run.json": ("run.json", None, (), ""),
    "no summary": ("summary.json", None, (), ""),
    "torn summary": ("summary.json", b'{"before": {', (), "summary.json cannot be read"),
    "a list": ("summary.json", b"[]", (), "summary.json holds no JSON object"),
    "other types": (
        "summary.json",
        b'{"config": 3, "versions": [1], "before": "x", "after": [2], "seconds": "y"}',
        (),
        "damaged",
    ),
    "binary run.json": ("run.json", bytes(range(256)), (), "run.json cannot be read"),
    "binary metrics": ("metrics.jsonl", bytes(range(256)), HEADINGS[5:8], "holds no step"),
    "words for numbers": ("metrics.jsonl", b'{"step": 1, "reward": "x"}\n{"step": 2, "reward": null}', HEADINGS[5:8], ""),
    "not finite": ("metrics.jsonl", b'{"step": 1, "reward": NaN}\n{"step": 2, "reward": Infinity}', HEADINGS[5:8], ""),
    "no probe": ("probe.json", None, HEADINGS[2:4], ""),
    "torn probe": ("probe.json", b'{"before": {"step": 0', HEADINGS[2:4], "probe.json cannot be read"),
    "another probe": ("probe.json", b'{"before": [1], "after": {"queries": [{}]}}', HEADINGS[2:4], "probe.json is damaged"),
    "binary rationales": ("rationales.md", bytes(range(256)), HEADINGS[1:2], "rationales.md is damaged"),
    "no rationales": ("rationales.md", None, HEADINGS[1:2], ""),
}


@pytest.mark.parametrize("name", DAMAGE)
def test_a_damaged_file_costs_its_section(folder, name):
    file, content, missing, note = DAMAGE[name]
    (folder / file).unlink()
    if content is not None:
        (folder / file).write_bytes(content)
    page = build_page(folder)
    assert set(missing).isdisjoint(headings(page)) and len(headings(page)) >= 5
    assert (note in " ".join(notes(page)) and notes(page)) if note else notes(page) == []


def test_no_run(tmp_path):
    for content in (None, "{half", "[]"):
        if content:
            (tmp_path / "run.json").write_text(content)
        with pytest.raises(SystemExit, match="no run is here") as error:
            grace.main(["report", str(tmp_path)])
        assert "\n" not in str(error.value)
    with pytest.raises(SystemExit, match="no run is here"):
        grace.main(["report", str(tmp_path / "nowhere")])


def test_without_matplotlib(whole_run, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(GraceError, match="needs matplotlib, which is not installed"):
        build_page(whole_run)
    capsys.readouterr()
    finish_page(whole_run)  # at the end of a run: said, and no error
    assert capsys.readouterr().out.startswith("no page of this run: the page needs matplotlib")


def test_reread(finished_run, tmp_path):
    """A run that has no record gets one: from the model that it started from, and its newest; on the CPU, wherever it ran."""
    out = shutil.copytree(finished_run, tmp_path / "run")
    for name in ("run.json", "summary.json"):
        about = json.loads((out / name).read_text())
        about["config"] |= {"device": "cuda", "dtype": "bfloat16"}
        (out / name).write_text(json.dumps(about))
    (out / "probe.json").unlink(missing_ok=True)
    grace.main(["report", str(out), "--reread"])
    moments = json.loads((out / "probe.json").read_text())
    assert moments["before"]["step"] == 0 and moments["after"]["step"] == 4
    assert HEADINGS[2] in headings((out / "report.html").read_text())


# ---------------------------------------------------------------- in a browser


@pytest.fixture
def hostile_run(folder):
    """A run whose texts, settings and rationales hold a script, and words that are longer than a line."""
    long_word = "x" * 300
    for name in ("probe.json", "rationales.md", "run.json", "summary.json"):
        content = (folder / name).read_text()
        text = SCRIPT.replace("|", " ")
        for word in ("doctor", "physician", "medic", "thief", "robber", "burglar", "full", "supervised"):
            content = re.sub(rf"\b{word}\b", text, content)
        (folder / name).write_text(content.replace("around", long_word))
    return folder


CUT_OFF = """
(() => {
  for (const d of document.querySelectorAll('details')) d.open = true;
  const width = document.documentElement.clientWidth, cut = [];
  for (const e of document.querySelectorAll('body *')) {
    const box = e.getBoundingClientRect();
    if (box.width && (box.left < -0.5 || box.right > width + 0.5)) cut.push(e.tagName + ' ' + e.textContent.slice(0, 40));
    if (!e.closest('svg') && e.scrollWidth > e.clientWidth + 1 && getComputedStyle(e).display !== 'inline' && e.clientWidth)
      cut.push('inside ' + e.tagName + ' ' + e.textContent.slice(0, 40));
  }
  for (const t of document.querySelectorAll('svg text')) {
    const text = t.getBoundingClientRect(), picture = t.closest('svg').getBoundingClientRect();
    if (['left', 'top'].some(s => text[s] < picture[s] - 1) || ['right', 'bottom'].some(s => text[s] > picture[s] + 1))
      cut.push('text ' + t.textContent);
  }
  return cut;
})()
"""
SUMS = """
[...document.querySelectorAll('[data-cosine]')].flatMap(f => [...f.querySelectorAll('[data-side]')].map(side =>
  [...side.querySelectorAll('[data-share]')].reduce((sum, w) => sum + Number(w.dataset.share), 0) - Number(f.dataset.cosine)))
"""
CONTRAST = """
(() => {
  const channels = c => c.match(/[\\d.]+/g).slice(0, 3).map(Number);
  const light = c => channels(c).map(v => (v /= 255) <= .04045 ? v / 12.92 : ((v + .055) / 1.055) ** 2.4)
    .reduce((sum, v, i) => sum + v * [.2126, .7152, .0722][i], 0);
  const paper = light(getComputedStyle(document.body).backgroundColor);
  return [...document.querySelectorAll('p, h1, h2, h3, td, th, dt, dd, summary, figcaption, svg text')].map(e => {
    const style = getComputedStyle(e), ink = light(e.closest('svg') ? style.fill : style.color);
    return (Math.max(ink, paper) + .05) / (Math.min(ink, paper) + .05);
  }).reduce((a, b) => Math.min(a, b));
})()
"""


@pytest.mark.skipif(not BROWSER, reason=WHY)
@pytest.mark.parametrize("kind", ["whole_run", "hostile_run"])
def test_in_a_browser(kind, request, tmp_path):
    page = write_page(request.getfixturevalue(kind), str(tmp_path / "page.html"))
    with Chromium(tmp_path / "profile") as browser:
        papers = set()
        for width in (400, 1600):
            for dark in (False, True):
                browser.open(page, width, dark)
                assert browser.complaints == [] and browser.requests == []
                assert browser.evaluate("document.title") == "run · GRACE"  # no text ran
                assert browser.evaluate("document.scripts.length") == 0
                assert browser.evaluate(CUT_OFF) == []
                assert browser.evaluate("document.documentElement.scrollWidth") == width
                assert browser.evaluate(CONTRAST) >= 4.5
                sums = browser.evaluate(SUMS)
                assert len(sums) > 20 and max(map(abs, sums)) < 1e-4
                papers.add(browser.evaluate("getComputedStyle(document.body).backgroundColor"))
                bare = "[...document.querySelectorAll('svg, img')].filter(e => !(e.getAttribute('aria-label') || e.alt)).length"
                assert browser.evaluate(bare) == 0
        assert len(papers) == 2  # light and dark
        if kind == "hostile_run":
            assert browser.evaluate("document.body.innerText").count("<script>") > 5
