"""Tables 1, 2 and 5 and the frontier on real text: captions of pictures, and a small chat model that can say them otherwise.

    python experiments/captions.py …                                          rows to train on, to choose settings by, to evaluate on
    python experiments/run.py captions_search --model DIR --data ROWS/train.jsonl --heldout ROWS/search.jsonl
    python experiments/run.py captions captions_retention --model DIR --data ROWS/train.jsonl --heldout ROWS/heldout.jsonl \\
        --plain FILE --data-dir FOLDER

Settings are chosen by the first command's records alone: rows held back from the training groups, one seed that no table
has, at most six short runs for each row of a table, in the order in which they stand in `TRIED`. No task is looked at.
"""

from page import Claim, Experiment

# ---------------------------------------------------------------- the rows of the tables

SHARED = dict(
    backbone="given", batch=32, rollouts=4, max_new_tokens=24, lr_decay=True, infonce_temperature=0.05, eval_every=0
)
START = SHARED | dict(trainer="none")
LOSS = SHARED | dict(trainer="contrastive", text_weight=0.0)
FULL = SHARED | dict(trainer="GRACE", recipe="full")
BASE, REASONING = "Base", "Base with reasoning"
CONTRASTIVE, TEXT_TERM = "contrastive fine-tuning", "contrastive with the text term"
PAPERS, BEST = "GRACE, the paper's recipe", "GRACE, full"
NO_GRPO, ALONE = "the same without GRPO", "by reward alone"
KINDS = {  # what a row is, before any setting is chosen
    CONTRASTIVE: LOSS,
    TEXT_TERM: LOSS | dict(text_weight=1.0),
    PAPERS: SHARED | dict(trainer="GRACE", recipe="paper"),
    BEST: FULL | dict(pathwise=1.0),
    NO_GRPO: FULL | dict(trainer="pathwise", pathwise=1.0),
    # Without the pathwise term: what suited it in the embedded worlds (tables.py), but for the rate.
    ALONE: FULL | dict(pathwise=0.0, temperature=1.0, length_normalize=True, kl=0.02),
}
SHORT = {label: dict(steps=60 if kind["trainer"] == "contrastive" else 20) for label, kind in KINDS.items()}
LONG = {label: dict(steps=200 if kind["trainer"] == "contrastive" else 60) for label, kind in KINDS.items()}
RATES = [dict(lr=rate) for rate in (1e-4, 3e-4, 1e-3)]
TRIED = {  # each row's short runs: rates first, then, at the best of them, what else matters to this row
    CONTRASTIVE: RATES,
    TEXT_TERM: RATES,
    PAPERS: RATES,
    BEST: RATES,
    NO_GRPO: RATES,
    ALONE: RATES,
}
CHOSEN = {label: dict(lr=3e-4) for label in KINDS}


def words(changes):
    """Settings as a table names them."""
    return ", ".join(f"{name} {value:g}" for name, value in changes.items())


TABLE = {
    BASE: START | dict(probe="captions"),
    REASONING: START | dict(probe="captions"),
    **{label: kind | LONG[label] | CHOSEN[label] | dict(probe="captions") for label, kind in KINDS.items()},
}
TABLE[BEST] |= dict(averaged=True)
SEARCH = {
    f"{label}: {words(changes)}": kind | SHORT[label] | changes | dict(probe="search")
    for label, kind in KINDS.items()
    for changes in TRIED[label]
}
EXPERIMENTS = {
    "captions_search": Experiment(
        "Real text: how settings were chosen", "One set of settings for everything.",
        SEARCH, ("ndcg_at_10", "text loss"), seeds=(10,),
    ),
    "captions": Experiment(
        "Real text: Table 1 on captions", "On every backbone: base < base with reasoning < contrastive fine-tuning < GRACE.",
        TABLE, ("ndcg_at_10",),
    ),
}
