"""Which runs every table and figure has, and what is shown of them.

A run is a plain dict: `world`, `trainer` ("none" is the start as it is), the settings of config.py that are not at
their defaults, `seed`, which `Table.runs` adds, and `budgets` where Figure 4's figures are measured too. Its record is
found by this very dict. So rows of two tables that are written alike share their runs.
"""

from dataclasses import dataclass

SCORES = "ndcg_at_10", "spearman"


@dataclass
class Table:
    """A table, or a figure with the table behind it.

    rows     {label: run}
    columns  names of `page.COLUMNS`; without any, the form that `page.FORMS` has for it, or its picture alone
    """

    rows: dict
    columns: tuple = ()
    seeds: tuple = (0, 1, 2)

    def runs(self):
        """All runs, `[(label, run)]`, one per row and seed."""
        return [(label, {**run, "seed": seed}) for label, run in self.rows.items() for seed in self.seeds]


def some(rows, *labels):
    """The rows with these labels."""
    return {label: rows[label] for label in labels}


def by(rows, family):
    """The rows with their labels behind the name of their family."""
    return {f"{family}: {label}": run for label, run in rows.items()}


# ---------------------------------------------------------------- the town, where thinking pays; settings are train.sh's

TOWN = dict(world="town", batch=32, rollouts=4, lr_decay=True, infonce_temperature=0.05)
TOWN_START = dict(world="town", trainer="none")
WALK = TOWN | dict(trainer="GRACE", recipe="full", pathwise=2.0, kl=0.75, kl_estimator="k2", lr=5e-4, steps=160, eval_every=20)
WALK_PAPER = TOWN | dict(trainer="GRACE", recipe="paper", lr=5e-4, steps=100, eval_every=50)
WALK_LOSS = TOWN | dict(trainer="contrastive", text_weight=0.0, batch=64, lr=1e-3, steps=150, eval_every=0)
WALK_TEXT = WALK_LOSS | dict(text_weight=1.0)
UNLABELLED = dict(mode="unsupervised")

BASE, REASONING, PAPERS = "Base", "Base with reasoning", "GRACE, the paper's recipe"
FULL, LOSS, TEXT = "GRACE, full", "contrastive fine-tuning", "contrastive with the text term"
NO_GRPO, NO_PATHWISE, VIEWS = "the same without GRPO", "the same without the pathwise term", "full: two rationales as two views"

IN_TOWN = {
    BASE: TOWN_START,
    REASONING: TOWN_START,
    LOSS: WALK_LOSS,
    TEXT: WALK_TEXT,
    "contrastive over forced walks": WALK_TEXT | dict(trainer="forced", batch=32),
    PAPERS: WALK_PAPER,
    FULL: WALK,
    NO_GRPO: WALK | dict(trainer="pathwise", eval_every=40),
    NO_PATHWISE: WALK | dict(pathwise=0.0, eval_every=40),
}
IN_TOWN_UNLABELLED = {
    BASE: TOWN_START,
    REASONING: TOWN_START,
    "SimCSE": WALK_LOSS | UNLABELLED | dict(trainer="simcse"),
    PAPERS: WALK_PAPER | UNLABELLED,
    VIEWS: WALK | UNLABELLED | dict(eval_every=40),
}
RIVALS = "GRACE", "GRPO", "DAPO", "REINFORCE++", "ReMax"

# ---------------------------------------------------------------- the events, where naming is enough

EVENTS = dict(world="events", batch=32, rollouts=4, lr=5e-4, lr_decay=True, infonce_temperature=0.2)
LONG, SHORT = dict(steps=250, eval_every=50), dict(steps=100, eval_every=0)
START = dict(world="events", trainer="none")
NAME = EVENTS | LONG | dict(trainer="GRACE", recipe="full")
NAME_SHORT = NAME | SHORT
NAME_PAPER = EVENTS | LONG | dict(trainer="GRACE", recipe="paper", lr_decay=False)
CONTRAST = EVENTS | dict(trainer="contrastive", text_weight=0.0, batch=64, lr=1e-3, steps=200, infonce_temperature=0.05)
NAME_LOSS, NAME_TEXT = CONTRAST | dict(eval_every=50), CONTRAST | dict(eval_every=50, text_weight=1.0)
TRIED_LOSS = CONTRAST | dict(eval_every=0)
# What suits the InfoNCE reward without the pathwise term.
NAME_REWARD = NAME_SHORT | dict(
    pathwise=0.0, temperature=1.0, length_normalize=True, infonce_temperature=0.05, rollouts=8, kl=0.02, lr=1e-3
)

BEST, REWARD_ALONE = "GRACE, full (rollouts at temperature 0.7)", "by reward alone, at settings of its own"
HOT = NAME | dict(temperature=1.0)
SUPERVISED = {
    BASE: START,
    REASONING: START,
    LOSS: NAME_LOSS,
    TEXT: NAME_TEXT,
    f"{LOSS}, at its best settings": TRIED_LOSS | dict(lr=3e-3),
    f"{TEXT}, at its best settings": TRIED_LOSS | dict(text_weight=1.0, steps=400),
    f"{PAPERS}, at its best settings": NAME_PAPER | dict(lr=1e-3, kl=0.03, steps=100),
    f"{PAPERS}, at its second best": NAME_PAPER | dict(lr=1e-3, temperature=0.7, steps=50, eval_every=0),
    # From the paper's recipe to the full one, a step at a time.
    PAPERS: NAME_PAPER,
    "the same, rate falling to 0": NAME_PAPER | dict(lr_decay=True),
    "+ InfoNCE as the reward, sums over tokens": HOT | dict(text_weight=0.0, kl=0.0, pathwise=0.0, train_roles="positive"),
    "+ queries trained too": HOT | dict(text_weight=0.0, kl=0.0, pathwise=0.0),
    "+ the pathwise term": HOT | dict(text_weight=0.0, kl=0.0),
    "+ the text term": HOT | dict(kl=0.0),
    "+ a light KL term": HOT,
    BEST: NAME,
    # Each half of the gradient alone.
    NO_GRPO: NAME | dict(trainer="pathwise"),
    REWARD_ALONE: NAME_REWARD | dict(eval_every=50),
    "the same by the paper's reward": NAME_REWARD | dict(eval_every=50, recipe="paper", text_weight=1.0),
}
UNSUPERVISED = {
    BASE: START,
    REASONING: START,
    "SimCSE": CONTRAST | UNLABELLED | dict(trainer="simcse", eval_every=0),
    PAPERS: NAME_PAPER | UNLABELLED | SHORT,
    "full, without the pathwise term": NAME_SHORT | UNLABELLED | dict(pathwise=0.0),
    VIEWS: NAME_SHORT | UNLABELLED,
}

WEIGHTS = 0.0, 0.5, 1.0
GRID = {
    f"{name} {a:g} {b:g}": run | dict(eval_every=0, lambda_consistency=a, lambda_hard=b)
    for name, run in (("paper", NAME_PAPER | dict(lr_decay=True, steps=40)), ("infonce", NAME | dict(steps=15)))
    for a in WEIGHTS
    for b in WEIGHTS
}
POOLINGS = {"mean": NAME_SHORT} | {how: NAME_SHORT | dict(pooling=how) for how in ("penultimate", "eos", "max")}
SIZES = {
    label + name: run | size
    for name, run in ((", full", NAME_SHORT), (", by reward alone", NAME_REWARD))
    for label, size in (
        *((f"B = {B}", dict(batch=B, rollouts=4)) for B in (4, 8, 16, 32)),
        *((f"K = {K}", dict(batch=16, rollouts=K)) for K in (2, 4, 8)),
    )
}

# ---------------------------------------------------------------- what was tried, on a seed that no other table has

TOWN_TRIED = by({
    **{f"rate {rate:g}": WALK_TEXT | dict(lr=rate) for rate in (3e-4, 1e-3, 3e-3)},
    "rate 0.001, softmax temperature 0.2": WALK_TEXT | dict(infonce_temperature=0.2),
    "rate 0.001, without the text term": WALK_LOSS,
    "rate 0.001, 400 steps": WALK_TEXT | dict(steps=400),
}, "town, the loss") | by({
    **{f"rate {rate:g}": WALK_PAPER | dict(lr=rate) for rate in (5e-4, 1e-3)},
    "rate 0.0005, not falling": WALK_PAPER | dict(lr_decay=False),
    "rate 0.0005, KL 0.1": WALK_PAPER | dict(kl=0.1),
    "rate 0.0005, temperature 0.7": WALK_PAPER | dict(temperature=0.7),
    "rate 0.0005, K = 8": WALK_PAPER | dict(rollouts=8),
}, "town, the paper's recipe")  # fmt: skip
GENTLE = NAME_PAPER | dict(steps=150, eval_every=25)
STEEP = NAME_PAPER | dict(lr=1e-3, steps=100)
LONGER, FALLING = STEEP | dict(kl=0.03, steps=200), dict(lr_decay=True)
EVENTS_TRIED = by({
    **{f"rate {rate:g}": GENTLE | dict(lr=rate) for rate in (1e-4, 3e-4, 5e-4, 1e-3)},
    "rate 0.0005, falling to 0": GENTLE | FALLING | dict(eval_every=50),
    "rate 0.001, falling to 0": STEEP | FALLING,
    **{f"rate 0.001, KL {x:g}": STEEP | dict(kl=x) for x in (0.01, 0.03, 0.1)},
    "rate 0.001, temperature 0.7": STEEP | dict(temperature=0.7),
    "rate 0.001, K = 8": STEEP | dict(rollouts=8),
    "rate 0.001, KL 0.03, longer": LONGER,
    "rate 0.001, falling to 0, KL 0.03": LONGER | FALLING,
    "rate 0.001, KL 0.03, temperature 0.7": LONGER | dict(temperature=0.7),
    "rate 0.001, falling to 0, KL 0.03, temperature 0.7": LONGER | FALLING | dict(temperature=0.7),
    "rate 0.0005, falling to 0, KL 0.03, temperature 0.7": LONGER | FALLING | dict(lr=5e-4, temperature=0.7),
}, "events, the paper's recipe") | by({
    **{f"rate {rate:g}": TRIED_LOSS | dict(lr=rate) for rate in (3e-4, 1e-3, 3e-3)},
    **{f"rate 0.001, softmax temperature {t:g}": TRIED_LOSS | dict(infonce_temperature=t) for t in (0.1, 0.2)},
    "rate 0.003, text term": TRIED_LOSS | dict(lr=3e-3, text_weight=1.0),
    "rate 0.001, text term, longer": TRIED_LOSS | dict(text_weight=1.0, steps=400),
}, "events, the loss")  # fmt: skip

# ---------------------------------------------------------------- the tables

NAMED = "text loss", "recall", "precision"
TABLES = {
    "ladder": Table(some(IN_TOWN, REASONING, TEXT, FULL), ("ndcg_at_10", "true_steps", "other_right"), (0, 1, 2, 3, 4)),
    "town_table1": Table(IN_TOWN, (*SCORES, "text loss", "recall", "thinks", "true_steps", "words", "forced", "seconds")),
    "town_table2": Table(IN_TOWN_UNLABELLED, (*SCORES, "text loss", "recall", "thinks", "true_steps", "words")),
    "town_table4": Table(
        {name: WALK | dict(trainer=name, pathwise=0.0, steps=60, eval_every=15) for name in RIVALS},
        (*SCORES, "thinks", "words", "grown at"),
    ),
    "town_table5": Table(
        some(IN_TOWN, REASONING, LOSS, TEXT, PAPERS, NO_PATHWISE, FULL),
        ("other_right", "other loss", "text loss", "answers loss", "well_formed", "finished"),
    ),
    "town_table6": Table(some(IN_TOWN, PAPERS, NO_GRPO, FULL), seeds=(0,)),
    "figure4": Table({FULL: WALK | dict(budgets=True)}),
    "figure5": Table(some(IN_TOWN, PAPERS, NO_GRPO, NO_PATHWISE, FULL)),
    "table1": Table(SUPERVISED, (*SCORES, *NAMED, "distinct", "seconds")),
    "table2": Table(UNSUPERVISED, (*SCORES, *NAMED, "distinct")),
    "table4": Table(
        {name: NAME_SHORT | dict(trainer=name, pathwise=0.0, length_normalize=True, minibatches=4) for name in RIVALS},
        (*SCORES, *NAMED, "distinct", "words"),
    ),
    "figure3": Table(GRID),
    "figure6": Table(POOLINGS, (*SCORES, "text loss", "recall")),
    "figure7": Table(SIZES),
    "collapse": Table(some(SUPERVISED, PAPERS, BEST)),
    "yardstick": Table(
        some(SUPERVISED, REASONING, LOSS, TEXT, BEST, REWARD_ALONE),
        (*SCORES, *NAMED, "well_formed", "seconds"),
        (0, 1, 2, 3, 4),
    ),
    "search": Table(TOWN_TRIED | EVENTS_TRIED, seeds=(5,)),
}
