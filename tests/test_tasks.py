"""The protocols: worked examples, the traps of MTEB's layouts, and bad input. tests/test_mteb.py compares with mteb."""

import itertools
import math

import numpy as np
import pytest
import synthetic_tasks
from conftest import TEXTS
from synthetic_tasks import readme, rows

from evaluation.encoder import GraceEncoder, encode_texts
from evaluation.metrics import spearman
from evaluation.tasks import FAMILIES, SUBSET, TASKS, choose_tasks, evaluate_heldout, evaluate_tasks, search
from plumbing.data import read_pairs, read_triplets
from plumbing.errors import GraceError

MTEBS = {  # what mteb 2.26.24 gives for the vectors of `synthetic_tasks.encode`; test_mteb.py asks it again, where installed
    "ArguAna": 0.14337, "NFCorpus": 0.03566, "SciFact": 0.21288, "SciDocsRR": 0.38103, "STS17": 0.273268,
    "STSBenchmark": 0.160434, "SprintDuplicateQuestions": 0.691294, "SummEval": 0.306249,
    "TwentyNewsgroupsClustering": 0.693947, "Banking77Classification": 0.901, "EmotionClassification": 0.946,
    "MassiveIntentClassification": 0.908,
}  # fmt: skip


def one_hot(texts):
    """Each word a fixed direction: cosine is a plain overlap count."""
    words = "a b c d e f g h".split()
    return np.array([[t.split().count(w) for w in words] for t in texts], np.float32) + 1e-3


def test_the_sixteen():
    assert len(SUBSET) == 16 and {TASKS[name].family for name in SUBSET} == set(FAMILIES)
    assert choose_tasks("subset") == list(SUBSET)
    assert choose_tasks("sts") == ["STS17", "SICK-R", "STSBenchmark"]
    assert choose_tasks("STS12, sts ,SICK-R") == ["STS12", "STS17", "SICK-R", "STSBenchmark"]
    with pytest.raises(GraceError, match="unknown task 'STS99'"):
        choose_tasks(["STS99"])


def test_every_protocol(tmp_path):
    """Every score is mteb's. A k-means or a logistic regression may end elsewhere with other libraries and processors."""
    pytest.importorskip("sklearn", reason="scikit-learn is not installed")
    names = synthetic_tasks.write_all(tmp_path)
    results = evaluate_tasks(synthetic_tasks.encode, names, str(tmp_path))
    assert names == sorted(MTEBS) and results["SummEval"]["rows_skipped"] == 2
    for name, score in MTEBS.items():
        loose = TASKS[name].family in ("classification", "clustering")
        assert results[name]["main_score"] == pytest.approx(score, abs=2e-2 if loose else 1e-5), name


def test_retrieval_by_hand(tmp_path):
    """Titles come before texts, unjudged queries are dropped, queries judged 0 stay, ids tie downwards."""
    folder = tmp_path / "SciFact"
    corpus = [
        {"_id": "1", "title": "a", "text": "b "},
        {"_id": "2", "title": "", "text": " c "},
        {"_id": "10", "title": None, "text": "c"},
    ]
    queries = [{"_id": "x", "text": "a b"}, {"_id": "y", "text": "c"}, {"_id": "z", "text": "d"}, {"_id": "w", "text": "a"}]
    judged = [("x", "1", 1), ("y", "10", 1), ("w", "2", 0)]
    rows(folder / "corpus" / "test.jsonl", corpus)
    rows(folder / "queries" / "test.jsonl", queries)
    rows(folder / "qrels" / "test.jsonl", [{"query-id": q, "corpus-id": d, "score": s} for q, d, s in judged])
    encoded = []
    encode = lambda texts: encoded.extend(texts) or one_hot(texts)
    score = evaluate_tasks(encode, ["SciFact"], str(tmp_path))["SciFact"]["main_score"]
    assert "a b" in encoded and "c" in encoded and "d" not in encoded  # stripped; the unjudged query is not even read
    # x finds 1 at once; y ties 2 and 10, and "2" > "10" as a string, so 10 is second; w counts 0
    assert score == pytest.approx(round((1 + 1 / np.log2(3) + 0) / 3, 5))


def test_a_query_that_is_its_own_document():
    corpus, queries, qrels = {"p": "a", "q": "b", "r": "a b"}, {"p": "a"}, {"p": {"r": 1}}
    assert search(one_hot, corpus, queries, qrels)["p"] == [0, 1, 0]
    assert search(one_hot, corpus, queries, qrels, not_itself=True)["p"] == [1, 0]


def test_only_the_best_thousand_count():
    corpus = {str(i): "a " * (i % 7) + "b " * (i // 7) for i in range(1500)}
    ranked = search(one_hot, corpus, {"q": "a"}, {"q": dict.fromkeys(corpus, 1)})
    assert len(ranked["q"]) == 1000


def test_local_folders_are_read_afresh(tmp_path):
    """`datasets` remembers a folder by its name: another of the same name must not be served from memory."""
    for place, scores in (("one", [1.0, 2.0, 3.0]), ("two", [3.0, 2.0, 1.0])):
        folder = tmp_path / place / "STS17"
        data = [{"sentence1": "a", "sentence2": t, "score": s} for t, s in zip(("a", "a b", "c"), scores)]
        rows(folder / "en-en" / "test.jsonl", data)
        readme(folder, {"en-en": {"test": "en-en/test.jsonl"}})
        result = evaluate_tasks(one_hot, ["STS17"], str(tmp_path / place))["STS17"]
        assert result["main_score"] == pytest.approx(1.0 if place == "two" else -1.0)


@pytest.mark.parametrize("layout", ["folder", "file", "column"])
def test_where_a_language_is(tmp_path, layout):
    data = [{"sentence1": "a", "sentence2": t, "score": s, "lang": "en-en"} for t, s in zip(("a", "a b", "c"), (3, 2, 1))]
    other = [{**row, "score": -row["score"], "lang": "de-de"} for row in data]
    if layout == "column":
        rows(tmp_path / "STS17" / "test.jsonl", data + other)
    for name, part in (("en-en", data), ("de-de", other)) if layout != "column" else ():
        rows(tmp_path / "STS17" / (f"{name}/test.jsonl" if layout == "folder" else f"{name}.jsonl"), part)
    assert evaluate_tasks(one_hot, ["STS17"], str(tmp_path))["STS17"]["main_score"] == pytest.approx(1.0)


def test_pairs_may_come_a_row_each(tmp_path):
    data = [{"sentence1": "a", "sentence2": t, "labels": y} for t, y in (("a", 1), ("b", 0), ("a b", 1), ("c", 0))]
    rows(tmp_path / "SprintDuplicateQuestions" / "test.jsonl", data)
    result = evaluate_tasks(one_hot, ["SprintDuplicateQuestions"], str(tmp_path))["SprintDuplicateQuestions"]
    assert result["main_score"] == 1.0


def test_summarization_skips_constant_rows(tmp_path):
    row = {"human_summaries": ["a"], "machine_summaries": ["a", "a b", "c"], "relevance": [3.0, 2.0, 1.0]}
    rows(tmp_path / "SummEval" / "test.jsonl", [row, {**row, "relevance": [1.0, 1.0, 1.0]}])
    result = evaluate_tasks(one_hot, ["SummEval"], str(tmp_path))["SummEval"]
    assert result["cosine_spearman_v2"] == 1.0 and result["main_score"] == 0.5 and result["rows_skipped"] == 1


# ---------------------------------------------------------------- bad input


def sts(tmp_path, data):
    rows(tmp_path / "STSBenchmark" / "test.jsonl", data)
    return str(tmp_path)


GOOD = [{"sentence1": "a", "sentence2": t, "score": s} for t, s in (("a", 2.0), ("b", 1.0))]


def test_missing_folder_column_split_and_hub(tmp_path):
    with pytest.raises(GraceError, match="no such folder; --data-dir holds one folder per task"):
        evaluate_tasks(one_hot, ["STS12"], str(tmp_path))
    with pytest.raises(GraceError, match="no column 'score'; it has sentence1, sentence2"):
        evaluate_tasks(one_hot, ["STSBenchmark"], sts(tmp_path, [{"sentence1": "a", "sentence2": "b"}]))
    rows(tmp_path / "SICK-R" / "train.jsonl", GOOD)
    rows(tmp_path / "SICK-R" / "validation.jsonl", GOOD)
    with pytest.raises(GraceError, match="no split 'test'; it has"):
        evaluate_tasks(one_hot, ["SICK-R"], str(tmp_path))
    rows(tmp_path / "SciFact" / "corpus" / "test.jsonl", [{"_id": "1", "text": "a"}])
    with pytest.raises(GraceError, match="no queries or query: a configuration, sub-folder or file"):
        evaluate_tasks(one_hot, ["SciFact"], str(tmp_path))
    with pytest.raises(GraceError, match="not on the hub: give --data-dir"):
        evaluate_tasks(one_hot, ["ToyPairs"])
    with pytest.raises(GraceError, match="without a network give --data-dir"):
        evaluate_tasks(one_hot, ["STSBenchmark"])


def test_a_split_is_not_replaced_by_another(tmp_path):
    """Trained and tested on the same rows, a classifier looks splendid."""
    data = [{"text": w, "label": i % 2} for i, w in enumerate("abcdefgh")]
    rows(tmp_path / "Banking77Classification" / "train.jsonl", data)
    with pytest.raises(GraceError, match="no split 'test'; it has train"):
        evaluate_tasks(one_hot, ["Banking77Classification"], str(tmp_path))


def test_what_the_encoder_must_not_do(tmp_path):
    folder = sts(tmp_path, GOOD)
    with pytest.raises(GraceError, match="the vector of 'b' is not finite"):
        evaluate_tasks(lambda x: np.where(np.array(x) == "b", np.nan, 1.0)[:, None], ["STSBenchmark"], folder)
    with pytest.raises(GraceError, match=r"gave shape \(3, 2\) for 4 texts"):
        evaluate_tasks(lambda x: np.ones((3, 2)), ["STSBenchmark"], folder)


# ---------------------------------------------------------------- held-out rows, and real tasks


def test_world_scores_as_in_training(tiny_world):
    """grace.py's held-out evaluation and the two toy tasks are one evaluation."""
    encoder = GraceEncoder(f"{tiny_world}/model")
    results = evaluate_tasks(encoder.encode, ["ToyRetrieval", "ToyPairs"], f"{tiny_world}/tasks")
    heldout = read_triplets(f"{tiny_world}/data/heldout.jsonl")
    graded = read_pairs(f"{tiny_world}/data/graded.jsonl")
    scores = evaluate_heldout(encoder.policy, heldout, graded)
    assert results["ToyRetrieval"]["main_score"] == pytest.approx(scores["ndcg_at_10"], abs=2e-2)  # ids differ, so ties do
    assert results["ToyPairs"]["main_score"] == pytest.approx(scores["spearman"], abs=1e-6)


def test_held_out_texts(make_policy):
    """A text finds itself by another rationale: by loops over single texts; ties count against it, equal texts once."""
    policy, texts = make_policy(), [*TEXTS, "", *(f"the boat w{i}" for i in range(9))]
    graded = (TEXTS, [TEXTS[1], TEXTS[0], TEXTS[2]], [3, 1, 2])
    scores = evaluate_heldout(policy, [{"text": text} for text in [*texts, texts[0]]], graded, temperature=2.0)
    embed = lambda text, **more: encode_texts(policy, [text], **more).vectors[0].astype(float)
    one, two = ([embed(text, temperature=2.0, seed=seed) for text in texts] for seed in (0, 1))
    gains = []
    for i, h in enumerate(one):
        rank = sum(h @ other >= h @ two[i] - 1e-7 for other in two)
        gains.append(1 / math.log2(rank + 1) if rank <= 10 else 0)
    assert 0.1 < scores["self_ndcg_at_10"] < 0.99 and scores["self_ndcg_at_10"] == pytest.approx(np.mean(gains), abs=1e-5)
    squared = [((a - b) ** 2).sum() for a, b in zip(one, two)]
    assert scores["alignment"] == pytest.approx(np.mean(squared), abs=1e-5)
    greedy = [embed(text) for text in texts]
    pairs = [math.exp(-2 * ((a - b) ** 2).sum()) for a, b in itertools.permutations(greedy, 2)]
    assert scores["uniformity"] == pytest.approx(math.log(np.mean(pairs)), abs=1e-4)
    assert scores["spearman"] == pytest.approx(spearman([embed(a) @ embed(b) for a, b in zip(*graded[:2])], graded[2]))
    assert {"text_loss", "finished", "words"} <= scores.keys()
    alone = evaluate_heldout(policy, [{"text": text} for text in texts], graded, rationale=False)
    assert alone.keys() == {"uniformity", "spearman"} and alone["uniformity"] != pytest.approx(scores["uniformity"], abs=1e-3)
