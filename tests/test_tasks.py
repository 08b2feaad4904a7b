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
from evaluation.tasks import FAMILIES, SUBSET, TASKS, choose_tasks, evaluate_heldout, evaluate_tasks
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


def test_where_a_language_is(tmp_path):
    """In a configuration that the README names, in a sub-folder, or in a column.

    `datasets` remembers a folder by its name: another of the same name must not be served from memory.
    """
    for layout, expected in (("README", 1.0), ("sub-folder", -1.0), ("column", 1.0)):
        folder = tmp_path / layout / "STS17"
        data = [{"sentence1": "a", "sentence2": t, "score": expected * s} for t, s in (("a", 3), ("a b", 2), ("c", 1))]
        languages = {
            "en-en": [{**row, "lang": "en-en"} for row in data],
            "de-de": [{**row, "lang": "de-de", "score": -row["score"]} for row in data],
        }
        if layout == "column":
            rows(folder / "test.jsonl", sum(languages.values(), []))
        else:
            for language, part in languages.items():
                rows(folder / language / "test.jsonl", part)
        if layout == "README":
            readme(folder, {language: {"test": f"{language}/test.jsonl"} for language in languages})
        result = evaluate_tasks(one_hot, ["STS17"], str(tmp_path / layout))["STS17"]
        assert result["main_score"] == pytest.approx(expected), layout


# ---------------------------------------------------------------- bad input


def test_missing_folder_column_split_and_hub(tmp_path):
    with pytest.raises(GraceError, match="no such folder; --data-dir holds one folder per task"):
        evaluate_tasks(one_hot, ["STS12"], str(tmp_path))
    rows(tmp_path / "STSBenchmark" / "test.jsonl", [{"sentence1": "a", "sentence2": "b"}])
    with pytest.raises(GraceError, match="no column 'score'; it has sentence1, sentence2"):
        evaluate_tasks(one_hot, ["STSBenchmark"], str(tmp_path))
    rows(tmp_path / "SciFact" / "corpus" / "test.jsonl", [{"_id": "1", "text": "a"}])
    with pytest.raises(GraceError, match="no queries or query: a configuration or sub-folder"):
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


def test_a_vector_that_is_not_finite(tmp_path):
    data = [{"sentence1": "a", "sentence2": t, "score": s} for t, s in zip("ab", (2.0, 1.0))]
    rows(tmp_path / "STSBenchmark" / "test.jsonl", data)
    with pytest.raises(GraceError, match="the vector of 'b' is not finite"):
        evaluate_tasks(lambda x: np.where(np.array(x) == "b", np.nan, 1.0)[:, None], ["STSBenchmark"], str(tmp_path))


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
