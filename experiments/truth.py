"""What a policy that was trained on captions is measured by: tasks, what its rationales say, what it can still do.

A record gets (`add_captions`): the tasks' scores in both ways, one task's also by the kind of its texts, and how often a text
is nearer its positive than a hard negative, of triplets that stand beside the held-out rows, if any; of the rationales the
share of content words that are true; of the other instructions that the backbone was taught how well they are still followed;
and, where the run asks for it, retrieval by the mean of several sampled rationales (`averaged`) and scores by how much the
rationale weighs (`shares`). A page of samples is written
beside the worlds. The data's licence forbids handing the texts on, so no record holds any, but only the rationales of four
texts of our own (`said`).
"""

import functools
import os

import numpy as np
import torch
from captions import FUNCTION_WORDS, content_words, read_rows
from chats import INSTRUCTIONS
from record import answers_logprob, reading_otherwise
from scores import GENRES, TASKS

from evaluation.encoder import GraceEncoder, MeanEncoder, encode_texts, token_batches
from evaluation.metrics import cosine, ndcg, normalize, spearman
from evaluation.tasks import columns, evaluate_tasks, load, search
from pool import fold
from rollout import write

SHOWN = (  # our own, so a record may hold them
    "Two small dogs chase a yellow ball across the wet grass.",
    "A man in a red hat is selling fish at a crowded market.",
    "Three children build a sand castle while their mother reads under an umbrella.",
    "A boy throws a ball to a girl in a blue dress.",
)
OTHERS = {  # instructions that no reward touched: does an answer to a text do what it says, as a share
    "shorter": lambda text, answer: len(answer.split()) < len(text.split()),
    "main words": lambda text, answer: not FUNCTION_WORDS & set(answer.lower().split()),
    "repeat": lambda text, answer: np.mean([word in answer.lower().split() for word in text.lower().split()]),
}


def add_captions(record, start, policy, place):
    """Add to a record whatever this file measures."""
    rows = read_rows(place.heldout)
    beside = os.path.join(os.path.dirname(place.heldout), "triplets.jsonl")
    triplets = read_rows(beside) if os.path.isfile(beside) else []
    texts, support = [row["query"] for row in rows], {row["query"]: row.get("support", []) for row in rows}
    run = record["run"]
    tasks = ["STSBenchmark", "STS17"] if place.quick else TASKS
    for way, rationale in (("after", True), ("after_without_rationale", False)):
        encode = GraceEncoder(policy, rationale=rationale).encode
        scores = {name: result["main_score"] for name, result in evaluate_tasks(encode, tasks, place.data_dir).items()}
        mean = float(np.mean(list(scores.values())))
        record[way] = record[way] | scores | {"mean of tasks": mean} | by_genre(encode, place.data_dir)
        if triplets:
            record[way]["told_apart"] = told_apart(encode, triplets)
    rationales = encode_texts(policy, texts).rationales
    record["after"] |= truth(rationales, texts, support)
    for moment, reader in (("before", start), ("after", policy)):
        record[moment] |= follow_others(start, reader, texts[:256])
    if run.get("averaged"):
        record["averaged"] = averaged(policy, rows[:256], record["config"]["temperature"])
    if run.get("shares"):
        record["shares"] = by_share(policy, place)
    record["said"] = dict(zip(SHOWN, encode_texts(policy, SHOWN).rationales))
    before = encode_texts(start, texts[:40]).rationales
    path = os.path.join(place.worlds, "samples", f"{place.key(run)}.md")
    os.makedirs(os.path.dirname(path), exist_ok=True)
    with open(path, "w", encoding="utf-8") as file:
        file.write(f"{run}\n\n| text | before | after |\n| --- | --- | --- |\n")
        file.writelines(f"| {' | '.join(cells)} |\n" for cells in zip(texts, before, rationales))


def told_apart(encode, triplets):
    """The share of triplets whose query is nearer its positive than its hard negative."""
    query, positive, negative = (encode([row[role] for row in triplets]) for role in ("query", "positive", "negative"))
    return float(np.mean((query * positive).sum(1) > (query * negative).sum(1)))


def by_genre(encode, data_dir):
    """STSBenchmark's Spearman by the kind of its pairs. `-> {kind: score}`, empty where the rows do not name their kind."""
    rows = load("STSBenchmark", data_dir)
    if "genre" not in rows.column_names:
        return {}
    one, two, scores, genres = columns(rows, "STSBenchmark", "sentence1", "sentence2", "score", "genre")
    near, scores = cosine(encode(one), encode(two)), np.array(scores)
    kinds = {kind: np.array(genres) == f"main-{kind}" for kind in GENRES}
    return {kind: spearman(near[pairs], scores[pairs]) for kind, pairs in kinds.items()}


def truth(rationales, texts, support):
    """What share of the rationales' content words others support. support: `{text: texts of the same meaning}`.

    true: the text or another of its group has the word; copied: the text itself has it; by_chance: the *next* text or
    its group has it, which is what words that are common everywhere get.
    """
    own = [set(content_words(text)) for text in texts]
    known = [words.union(*(content_words(other) for other in support[text])) for words, text in zip(own, texts)]
    counts = np.zeros(4)
    for i, rationale in enumerate(rationales):
        for word in content_words(rationale):
            counts += [1, word in known[i], word in own[i], word in known[(i + 1) % len(texts)]]
    return dict(zip(("true", "copied", "by_chance"), (counts[1:] / max(counts[0], 1)).tolist()))


def follow_others(start, policy, texts):
    """The other instructions: nats per token of the start's own answers, drawn, and how far the policy's greedy ones obey.

    The mean over all in OTHERS but the one that the policy was trained with.
    """
    losses, right = [], []
    others = {kind: obeys for kind, obeys in OTHERS.items() if INSTRUCTIONS[kind][0] != policy.reading.instruction}
    for kind, obeys in others.items():
        writer, reader = (reading_otherwise(x, instruction=INSTRUCTIONS[kind][0]) for x in (start, policy))
        losses.append(-answers_logprob(writer, reader, texts, 1.0))
        right += [obeys(*pair) for pair in zip(texts, encode_texts(reader, texts).rationales)]
    return {"other_loss": float(np.mean(losses)), "other_right": float(np.mean(right))}


def retrieval(encode, documents, asked, relevant):
    """nDCG@10 where each query has one right document; arguments as those of `search`."""
    return float(np.mean([ndcg(gains, [1]) for gains in search(encode, documents, asked, relevant).values()]))


def among(encode, rows):
    """nDCG@10 where a row's query finds its positive among those of all rows."""
    queries, positives = ({row[role]: row[role] for row in rows} for role in ("query", "positive"))
    return retrieval(encode, positives, queries, {row["query"]: {row["positive"]: 1} for row in rows})


def longer(encode, rows, numbers=(1, 2, 4)):
    """Retrieval by the number of captions, of different pictures, that make up a text. `-> {number: nDCG@10}`.

    A text finds the one made of other captions of the same pictures, among as many for every number.
    """
    n, scores = len(rows) // max(numbers), {}
    for size in numbers:
        groups = [rows[i : i + size] for i in range(0, n * size, size)]
        joined = lambda role: {str(i): " ".join(row[role] for row in group) for i, group in enumerate(groups)}  # noqa: B023
        asked = joined("query")
        scores[str(size)] = retrieval(encode, joined("positive"), asked, {i: {i: 1} for i in asked})
    return scores


def averaged(policy, rows, temperature, numbers=(1, 2, 4, 8)):
    """Retrieval by the mean embedding of so many sampled rationales; 0 is the greedy one. `-> {number: nDCG@10}`."""
    greedy = GraceEncoder(policy)
    drawn = [GraceEncoder(policy, temperature=temperature, seed=seed) for seed in range(max(numbers))]
    encoders = {0: greedy} | {n: MeanEncoder(drawn[:n]) for n in numbers}
    return {str(n): among(encoder.encode, rows) for n, encoder in encoders.items()}


# ---------------------------------------------------------------- how much the rationale weighs

SHARES = (0.0, 0.25, 0.5, 0.75, 0.9, 1.0)
BY_TOKENS = "by tokens"  # Eq. 11: a token of the prompt weighs as much as one of the rationale


def by_share(policy, place):
    """Scores by w, the prompt's share: the embedding is w times the mean of its states and 1 - w times that of the rationale's.

    "searched" is by the rows held back from training, search.jsonl beside the held-out ones, so that w can be chosen by it.
    `-> {w: {"searched", "ndcg_at_10", "mean of tasks"}}`
    """
    beside = os.path.join(os.path.dirname(place.heldout), "search.jsonl")
    searched, heldout = read_rows(beside), read_rows(place.heldout)
    tasks, known, scores = ["STSBenchmark", "STS17"] if place.quick else TASKS, {}, {}

    def encode(texts, w):
        known.update(halves(policy, [text for text in dict.fromkeys(texts) if text not in known]))
        prompt, rationale, n, m = (np.array(column) for column in zip(*(known[text] for text in texts)))
        if w == BY_TOKENS:
            return normalize(prompt + rationale)
        return normalize(w * prompt / n[:, None] + (1 - w) * rationale / m[:, None])

    for w in (BY_TOKENS, *SHARES):
        by_w = functools.partial(encode, w=w)
        results = evaluate_tasks(by_w, tasks, place.data_dir).values()
        rows = {"searched": among(by_w, searched), "ndcg_at_10": among(by_w, heldout)}
        scores[str(w)] = rows | {"mean of tasks": float(np.mean([result["main_score"] for result in results]))}
    return scores


@torch.inference_mode()
def halves(policy, texts):
    """The sum of states over a text's prompt, that over its greedy rationale, and of how many. `-> {text: ([D], [D], n, m)}`"""
    found, pooling = {}, policy.reading.pooling
    for part in token_batches(texts, 8192, policy):
        prompts = policy.prompts([texts[i] for i in part])
        hidden, to_pool, cache = policy.prefill(prompts.ids, prompts.mask, prompts.n_shared)
        prompt = fold(None, to_pool, prompts.counted[:, prompts.n_shared :], pooling)
        decoder = policy.decoder(cache, prompts.mask, 1)
        _, _, lengths, _, whole = write(policy, decoder, hidden[:, -1], prompt, 0.0)
        sums = (x.cpu().numpy() for x in (prompt, whole - prompt, prompts.counted.sum(1), lengths))
        found |= {texts[i]: row for i, *row in zip(part, *sums)}
    return found
