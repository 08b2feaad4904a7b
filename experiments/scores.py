"""The figures of a record by name, and the two ways in which a text is embedded: with the rationale, and by the prompt alone.

A record has both for every policy. Whoever compares two policies by one way that suits only one of them has shown
nothing: so tables show both, and claims compare each row's better one.
"""

import numpy as np

WAYS = {"after": "with rationale", "after_without_rationale": "prompt alone"}  # a moment of a record, and its name
TASKS = ("STSBenchmark", "STS12", "STS13", "STS17")  # real ones, of the captions
GENRES = ("captions", "news", "forums")  # the kinds of pairs in STSBenchmark
SCORES = ("ndcg_at_10", "spearman", "told_apart", *TASKS, "mean of tasks", *GENRES)  # what is measured in both ways
RISES = {  # by how much a loss rose from the start to the end: its name in a table, and the loss in a record
    "text loss": "text_loss", "answers loss": "answers_loss", "other loss": "other_loss", "plain loss": "plain_loss",
    "bare loss": "bare_loss",
}  # fmt: skip


def ways(label):
    """The ways of a row. Before training each way has a row of its own, as in the paper; trained rows have both."""
    if label.startswith("Base with reasoning"):
        return ["after"]
    return ["after_without_rationale"] if label.startswith("Base") else list(WAYS)


def value(record, name, way="after"):
    """One figure of a record, or None where it was not measured."""
    if name in RISES:
        before, after = (record[moment].get(RISES[name]) for moment in ("before", "after"))
        return None if None in (before, after) else after - before
    if name == "seconds":
        return record["train_seconds"]
    return record[way].get(name)


def better_way(records, label, name):
    """The way by which a row's claims are judged: the one with the higher mean over the seeds that have it."""
    if name not in SCORES:
        return "after"
    means = {}
    for way in ways(label):
        values = [x for record in records if (x := value(record, name, way)) is not None]
        means[way] = np.mean(values) if values else -np.inf
    return max(means, key=means.get)
