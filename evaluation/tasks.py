"""The 16 tasks of the paper's MTEB subset: where their data is and by which protocol they are scored.

Scores are those of mteb's v1 tasks for the same vectors, ties, rounding and quirks included. Where a score is
*defined* by a library's function (scikit-learn's average precision, MiniBatchKMeans, v-measure and LogisticRegression,
scipy's p-value), that function is used.
`evaluate_tasks` takes any function from texts to vectors.
"""

import functools
import os
import time
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from datasets import get_dataset_config_names, load_dataset

from evaluation.encoder import encode_texts, text_loss
from evaluation.metrics import cosine, ndcg, ranked_average_precision, ranking, row_norms, spearman
from plumbing.data import load_folder
from plumbing.errors import GraceError, first_line

# ---------------------------------------------------------------- the tasks


@dataclass(frozen=True)
class Task:
    """Where a task's data is, and by which protocol it is scored."""

    family: str
    path: str | None  # on the hub; None: local only
    revision: str | None
    language: str | None = None  # a configuration of the dataset, or the value of its `lang` column
    samples_per_label: int = 8  # classification
    not_itself: bool = False  # retrieval: a query's own document does not count as an answer


TASKS = {
    "SciFact": Task("retrieval", "mteb/scifact", "d56462d0e63a25450459c4f213e49ffdb866f7f9"),
    "ArguAna": Task("retrieval", "mteb/arguana", "c22ab2a51041ffd869aaddef7af8d8215647e41a", not_itself=True),
    "NFCorpus": Task("retrieval", "mteb/nfcorpus", "ec0fa4fe99da2ff19ca1214b7966684033a58814"),
    "StackOverflowDupQuestions": Task("reranking", "mteb/StackOverflowDupQuestions", "5debda000fe8e27ebb5c123d38081f92e1847a59"),
    "SciDocsRR": Task("reranking", "mteb/SciDocsRR", "39b8377811871075eed9de3b8a7e21aaa6acb3d8"),
    "BiorxivClusteringS2S": Task("clustering", "mteb/biorxiv-clustering-s2s", "258694dd0231531bc1fd9de6ceb52a0853c6d908"),
    "MedrxivClusteringS2S": Task("clustering", "mteb/medrxiv-clustering-s2s", "35191c8c0dca72d8ff3efcd72aa802307d469663"),
    "TwentyNewsgroupsClustering": Task("clustering", "mteb/twentynewsgroups-clustering", "6125ec4e24fa026cec8a478383ee943acfbd5449"),
    "SprintDuplicateQuestions": Task("pair", "mteb/sprintduplicatequestions-pairclassification", "d66bd1f72af766a5cc4b0ca5e00c162f89e8cc46"),
    "Banking77Classification": Task("classification", "mteb/banking77", "0fd18e25b25c072e09e0d92ab615fda904d66300"),
    "EmotionClassification": Task("classification", "mteb/emotion", "4f58c6b202a23cf9a4da393831edf4f9183cad37", None, 16),
    "MassiveIntentClassification": Task("classification", "mteb/amazon_massive_intent", "4672e20407010da34463acc759c162ca9734bca6", "en"),
    "STS17": Task("sts", "mteb/sts17-crosslingual-sts", "faeb762787bd10488a50c8b5be4a3b82e411949c", "en-en"),
    "SICK-R": Task("sts", "mteb/sickr-sts", "20a6d6f312dd54037fe07a32d58e5e168867909d"),
    "STSBenchmark": Task("sts", "mteb/stsbenchmark-sts", "b0fddb56ed78048fa8b90373c8a3cfc37b684831"),
    "SummEval": Task("summarization", "mteb/summeval", "cda12ad7615edc362dbf25a00fdd61d3b1eaf93c"),
}  # fmt: skip
SUBSET = tuple(TASKS)
TASKS |= {  # not among the sixteen: two more similarity tasks, and the embedded world's held-out sets
    "STS12": Task("sts", "mteb/sts12-sts", "a0d554a64d88156834ff5ae9920b964011b16384"),
    "STS13": Task("sts", "mteb/sts13-sts", "7e90230a92c190f1bf69ae9002b8cea547a64cca"),
    "ToyRetrieval": Task("retrieval", None, None),
    "ToyPairs": Task("sts", None, None),
}
FAMILIES = tuple(dict.fromkeys(task.family for task in TASKS.values()))


def choose_tasks(names):
    """Task names, families or `subset`, comma-separated or listed, to task names in order, each once."""
    chosen = []
    for name in names.split(",") if isinstance(names, str) else names:
        name = name.strip()
        family = [task for task, spec in TASKS.items() if spec.family == name and task in SUBSET]
        matches = list(SUBSET) if name == "subset" else family or ([name] if name in TASKS else [])
        if not matches:
            raise GraceError(
                f"unknown task {name!r}: give subset, a family ({', '.join(FAMILIES)}) or any of {', '.join(TASKS)}"
            )
        chosen += [task for task in matches if task not in chosen]
    return chosen


def load(name, data_dir, *configs, split="test"):
    """One split of a task's data, as a `datasets.Dataset`: from the hub, or from the folder `data_dir/NAME`.

    configs: names that the wanted configuration may have; the first that exists is taken. Without any it is that of the
    task's language, if there is one, or the whole source. A local folder names its configurations in a README, or holds
    a sub-folder for each. Raises GraceError for what is missing.
    """
    task = TASKS[name]
    source = os.path.join(data_dir, name) if data_dir else task.path
    if data_dir and not os.path.isdir(source):
        raise GraceError(f"{source}: no such folder; --data-dir holds one folder per task, named as the task")
    if source is None:
        raise GraceError(f"{name} is not on the hub: give --data-dir")
    try:
        if not data_dir:
            read = functools.partial(load_dataset, revision=task.revision)
            known = get_dataset_config_names(source, revision=task.revision)
        elif os.path.isfile(os.path.join(source, "README.md")):
            read, known = load_folder, get_dataset_config_names(source)
        else:
            read, known = (lambda source, config: load_folder(os.path.join(source, config or ""))), os.listdir(source)
        config = next((config for config in configs or [task.language] if config in known), None)
        if configs and not config:
            raise GraceError(f"no {' or '.join(configs)}: a configuration or sub-folder")
        splits = read(source, config)
    except Exception as error:  # datasets raises whatever its readers raise; all of it means the same to a user
        advice = "" if data_dir else "; without a network give --data-dir"
        raise GraceError(f"{name}: {source} cannot be read ({first_line(error)}){advice}") from error
    if configs and len(splits) == 1:  # a corpus has one split, whatever its name
        split = next(iter(splits))
    if split not in splits:
        raise GraceError(f"{name}: {source} has no split {split!r}; it has {', '.join(splits)}")
    rows = splits[split]
    if task.language and "lang" in rows.column_names:
        rows = rows.filter(lambda row: row["lang"] == task.language)
    return rows


def columns(rows, name, *wanted):
    """Columns as lists; each wanted one may have alternatives, `sentence1|sent1`. Raises GraceError."""
    lists = []
    for column in wanted:
        present = next((c for c in column.split("|") if c in rows.column_names), None)
        if present is None:
            raise GraceError(f"{name}: no column {column!r}; it has {', '.join(rows.column_names)}")
        lists.append(list(rows[present]))
    return lists


# ---------------------------------------------------------------- the protocols


def sts(encode, name, data_dir):
    """Spearman of cosine and human score."""
    one, two, scores = columns(load(name, data_dir), name, "sentence1", "sentence2", "score")
    vectors = encode(one + two)
    return {"main_score": spearman(cosine(vectors[: len(one)], vectors[len(one) :]), scores)}


def search(encode, corpus, queries, qrels, not_itself=False):
    """Rank documents for each judged query. `{id: text}, {id: text}, {query: {document: gain}}`.

    encode: texts to vectors, queries by default; with `documents=True` the texts of the corpus.
    Returns, per query, the gains in ranked order, at most 1,000 of them. A query without judgements is dropped; one whose
    judgements are all 0 stays.
    """
    judged, documents = [q for q in queries if q in qrels], list(corpus)
    if not judged:
        raise GraceError("no query has a relevance judgement: are the ids of queries and qrels the same?")
    both = encode([queries[q] for q in judged]), encode(list(corpus.values()), documents=True)
    vectors = F.normalize(torch.from_numpy(np.concatenate(both)))
    scores = vectors[: len(judged)] @ vectors[len(judged) :].T  # in one product [Q, D], so that ties fall as in mteb
    ranked = {}
    for q, near in zip(judged, scores):
        order = [documents[i] for i in ranking(near.numpy(), documents)]
        ranked[q] = [qrels[q].get(d, 0) for d in order if not (not_itself and d == q)]
    return ranked


def _lookup(texts, vectors, documents=None):
    """A function from texts to vectors, of texts whose vectors are known. documents: the vectors `{text: vector}` of these."""
    as_query = dict(zip(texts, vectors))
    as_document = documents or as_query
    return lambda texts, documents=False: np.stack([(as_document if documents else as_query)[text] for text in texts])


def _retrieval_data(name, data_dir):
    """Corpus and queries `{id: text}`, qrels `{query: {document: gain}}`. Titles come before texts."""
    rows = load(name, data_dir, "corpus")
    ids, texts = columns(rows, name, "_id|id", "text")
    titles = list(rows["title"]) if "title" in rows.column_names else [""] * len(ids)  # some have none
    corpus = {str(i): f"{title} {text}".strip() if title else text.strip() for i, title, text in zip(ids, titles, texts)}
    ids, texts = columns(load(name, data_dir, "queries", "query"), name, "_id|id", "text")
    queries, qrels = {str(i): text for i, text in zip(ids, texts)}, {}
    for q, d, gain in zip(*columns(load(name, data_dir, "default", "qrels"), name, "query-id", "corpus-id", "score")):
        qrels.setdefault(str(q), {})[str(d)] = int(gain)
    return corpus, queries, qrels


def retrieval(encode, name, data_dir):
    """nDCG@10."""
    corpus, queries, qrels = _retrieval_data(name, data_dir)
    ranked = search(encode, corpus, queries, qrels, TASKS[name].not_itself)
    return {"main_score": round(float(np.mean([ndcg(gains, list(qrels[q].values())) for q, gains in ranked.items()])), 5)}


def reranking(encode, name, data_dir):
    """MAP over each query's candidates (mteb 2: layout of a retrieval task, plus `top_ranked`)."""
    corpus, queries, qrels = _retrieval_data(name, data_dir)
    rows = zip(*columns(load(name, data_dir, "top_ranked"), name, "query-id", "corpus-ids"))
    candidates = {str(q): {str(d): corpus[str(d)] for d in documents} for q, documents in rows if str(q) in qrels}
    asked = list(dict.fromkeys(queries[q] for q in candidates))
    found = list(dict.fromkeys(text for among in candidates.values() for text in among.values()))
    encode, scores = _lookup(asked, encode(asked), dict(zip(found, encode(found, documents=True)))), []
    for q, among in candidates.items():
        relevant = [gain > 0 for gain in search(encode, among, {q: queries[q]}, qrels)[q]]
        scores.append(ranked_average_precision(relevant, sum(gain > 0 for gain in qrels[q].values())))
    return {"main_score": round(float(np.mean(scores)), 5)}


def pair(encode, name, data_dir):
    """The best average precision over cosine, dot product, and negated Euclidean and Manhattan distance.

    mteb takes the cosine in two ways (from a distance, and from a product), which differ where similarities tie.
    """
    from sklearn.metrics import average_precision_score

    rows = load(name, data_dir)
    (one,), (two,), (labels,) = columns(rows, name, "sentence1|sent1", "sentence2|sent2", "labels")  # one row of lists
    texts = list(dict.fromkeys(one + two))
    encode = _lookup(texts, encode(texts))
    scores = {"cosine": [], "similarity": [], "dot": [], "euclidean": [], "manhattan": []}
    for start in range(0, len(one), 4096):  # 101,000 pairs of 8,932 texts: the pairs are never all laid out
        a, b = (encode(side[start : start + 4096]) for side in (one, two))
        scores["cosine"].append(cosine(a, b))
        scores["similarity"].append((F.normalize(torch.from_numpy(a)) * F.normalize(torch.from_numpy(b))).sum(1).numpy())
        scores["dot"].append(np.array([x @ y for x, y in zip(a, b)]))
        scores["euclidean"].append(-row_norms(a - b))
        scores["manhattan"].append(-np.abs(a - b).sum(1))
    scores = {f"{kind}_ap": float(average_precision_score(labels, np.concatenate(x))) for kind, x in scores.items()}
    return {"main_score": max(scores.values()), **scores}


def clustering(encode, name, data_dir):
    """Mean v-measure over the sets, each clustered by mini-batch k-means with as many clusters as labels."""
    from sklearn.cluster import MiniBatchKMeans
    from sklearn.metrics import v_measure_score

    scores = []
    for sentences, labels in zip(*columns(load(name, data_dir), name, "sentences", "labels")):
        k_means = MiniBatchKMeans(n_clusters=len(set(labels)), batch_size=500, n_init="auto", random_state=42)
        scores.append(v_measure_score(labels, k_means.fit(encode(sentences)).labels_))
    return {"main_score": float(np.mean(scores)), "std": float(np.std(scores))}


def classification(encode, name, data_dir):
    """Mean accuracy of ten logistic regressions, each fitted to a few shots per label.

    The order of the training rows is shuffled in place before each: the shuffles add up, as in mteb.
    """
    from sklearn.linear_model import LogisticRegression

    texts, labels = columns(load(name, data_dir, split="train"), name, "text", "label")
    test_texts, test_labels = columns(load(name, data_dir), name, "text", "label")
    order, experiments = list(range(len(texts))), []
    for _ in range(10):
        np.random.RandomState(42).shuffle(order)
        count, shots = dict.fromkeys(labels, 0), []
        for i in order:
            if count[labels[i]] < TASKS[name].samples_per_label:
                count[labels[i]] += 1
                shots.append(i)
        experiments.append(shots)
    known = list(dict.fromkeys([texts[i] for shots in experiments for i in shots] + test_texts))
    encode, accuracies = _lookup(known, encode(known)), []
    test = encode(test_texts)
    for shots in experiments:
        model = LogisticRegression(max_iter=100, random_state=42)
        model.fit(encode([texts[i] for i in shots]), [labels[i] for i in shots])
        accuracies.append(float(np.mean(model.predict(test) == np.array(test_labels))))
    return {"main_score": float(np.mean(accuracies)), "std": float(np.std(accuracies))}


def summarization(encode, name, data_dir):
    """Spearman, per row, of the human judgement and the largest cosine to a human summary.

    The v1 task averages (rho + p-value) / 2: a bug that mteb keeps so that scores stay comparable, and
    that the paper's figures contain. `cosine_spearman_v2` is the mean rho. A row in which either side is
    constant is skipped.
    """
    from scipy.stats import spearmanr

    rows = load(name, data_dir)
    human, machine, relevance = columns(rows, name, "human_summaries", "machine_summaries", "relevance")
    vectors = F.normalize(torch.from_numpy(encode([t for h, m in zip(human, machine) for t in h + m])))
    rhos, mixed, at = [], [], 0
    for h, m, gold in zip(human, machine, relevance):
        mine, at = vectors[at : at + len(h) + len(m)], at + len(h) + len(m)
        scores = [(one[None] @ mine[: len(h)].T).max().item() for one in mine[len(h) :]]
        if len(set(gold)) > 1 and len(set(scores)) > 1:
            rhos.append(spearman(scores, gold))
            mixed.append((rhos[-1] + spearmanr(scores, gold).pvalue) / 2)
    skipped = len(human) - len(rhos)
    return {"main_score": float(np.mean(mixed)), "cosine_spearman_v2": float(np.mean(rhos)), "rows_skipped": skipped}


PROTOCOLS = {f.__name__: f for f in (retrieval, reranking, clustering, pair, classification, sts, summarization)}


def evaluate_tasks(encode, tasks, data_dir=None, encode_document=None):
    """Score any encoder. `encode: list[str] -> [n, D]`; returns `{task: {"main_score": float, ...}}`.

    tasks: names, families or "subset". encode_document: for the texts that are searched, where they are encoded in another
    way. Raises GraceError for an unknown task, missing data, or a vector that is not finite
    (naming the text).
    """

    def checked(texts, documents=False):
        vectors = np.asarray((documents and encode_document or encode)(texts), dtype=np.float32)
        bad = np.flatnonzero(~np.isfinite(vectors).all(1))
        if len(bad):
            raise GraceError(f"the vector of {texts[bad[0]][:80]!r} is not finite")
        return vectors

    results = {}
    for name in choose_tasks(tasks):
        start = time.time()
        results[name] = PROTOCOLS[TASKS[name].family](checked, name, data_dir)
        results[name]["seconds"] = time.time() - start
    return results


# ---------------------------------------------------------------- held-out rows of a training run


def evaluate_heldout(policy, heldout, graded=None, rationale=True, temperature=1.0):
    """Held-out rows and graded pairs to scores by name: `evaluate_triplets` or `evaluate_texts`, as the rows are."""
    if heldout and "text" in heldout[0]:
        return evaluate_texts(policy, [row["text"] for row in heldout], graded, rationale, temperature)
    return evaluate_triplets(policy, heldout, graded, rationale)


def evaluate_triplets(policy, heldout, graded=None, rationale=True):
    """Held-out triplets, greedy: does a query find its positive among all positives and hard negatives?

    Returns nDCG@10, top-1 accuracy, with `graded` the Spearman correlation of cosine and score, and what
    `describe_rationales` says.
    """
    relevant = {}
    for row in heldout:
        relevant.setdefault(row["query"], {})[row["positive"]] = 1
    documents = list(dict.fromkeys([r["positive"] for r in heldout] + [n for r in heldout for n in r["negative"]]))
    one, two, _ = graded or ([], [], [])
    think = policy.reading.documents == "rationale"
    texts = list(dict.fromkeys([*relevant, *(documents if think else []), *one, *two]))
    encoded = encode_texts(policy, texts, rationale=rationale)
    bare = None if think else dict(zip(documents, encode_texts(policy, documents, rationale=False).vectors))
    encode = _lookup(texts, encoded.vectors, bare)
    ranked = search(encode, {d: d for d in documents}, {q: q for q in relevant}, relevant)
    result = {
        "ndcg_at_10": float(np.mean([ndcg(gains, list(relevant[q].values())) for q, gains in ranked.items()])),
        "top1": float(np.mean([gains[0] for gains in ranked.values()])),
    }
    if graded:
        result["spearman"] = graded_spearman(encode, graded)
    return result | (describe_rationales(policy, [*relevant, *documents], encoded) if rationale else {})


def evaluate_texts(policy, texts, graded=None, rationale=True, temperature=1.0):
    """Held-out texts without labels: does a text find itself by another rationale, among all the others?

    Returns nDCG@10 of one sampled rationale's embedding against a second one's of every text (`self_ndcg_at_10`), and
    their alignment, the mean squared distance of the two; of greedy embeddings the uniformity, log mean exp(-2 squared
    distance) over different texts (both Wang & Isola 2020; lower is better), with `graded` the Spearman correlation,
    and what `describe_rationales` says. Without rationales a text has one embedding: uniformity and correlation alone.
    """
    texts, result = list(dict.fromkeys(texts)), {}
    read = functools.partial(encode_texts, policy, rationale=rationale)
    greedy = read(texts)
    if rationale:
        one, two = (read(texts, temperature=temperature, seed=seed).vectors for seed in (0, 1))
        scores = one @ two.T
        rank = (scores >= scores.diagonal()[:, None]).sum(1)  # 1 is best; a tie counts against the text
        result["self_ndcg_at_10"] = float(np.where(rank <= 10, 1 / np.log2(rank + 1), 0).mean())
        result["alignment"] = float(((one - two) ** 2).sum(1).mean())
    if len(texts) > 1:
        apart = (2 - 2 * greedy.vectors @ greedy.vectors.T)[~np.eye(len(texts), dtype=bool)]
        result["uniformity"] = float(np.log(np.exp(-2 * apart).mean()))
    if graded:
        result["spearman"] = graded_spearman(lambda texts: read(texts).vectors, graded)
    return result | (describe_rationales(policy, texts, greedy) if rationale else {})


def graded_spearman(encode, graded):
    """Spearman's correlation of cosine and score over `(sentences1, sentences2, scores)`."""
    one, two, scores = graded
    return spearman(cosine(encode(one), encode(two)), scores)


def describe_rationales(policy, texts, encoded):
    """The language-model loss on the texts (nats per token), the share of rationales that ended, their mean words."""
    words = float(np.mean([len(rationale.split()) for rationale in encoded.rationales]))
    return {"text_loss": text_loss(policy, texts), "finished": float(encoded.finished.mean()), "words": words}
