"""The town's tables: the paper's once more, in the world where only a policy that thinks knows what a text means.

tables.py has those of the worlds in which naming is enough. Here the questions are others: what finds out that thinking pays,
what makes the embedding say what was found, and what either costs. Settings are `train.sh`'s. They were chosen on seeds 0 and 1 of
earlier warm starts; seeds 2 to 4 were run once.
"""

import functools

import pictures
from page import Claim, Experiment, along, budget_lines, discovery_lines, ladder_lines, search_lines

IN_TOWN = dict(world="town", batch=32, rollouts=4, lr=1e-3, lr_decay=True, infonce_temperature=0.05, eval_every=20)
WALKING = IN_TOWN | dict(trainer="GRACE", recipe="full", pathwise=2.0, kl=0.75, kl_estimator="k2", lr=5e-4, steps=160)
PAPER = IN_TOWN | dict(trainer="GRACE", recipe="paper", lr=5e-4, steps=100, eval_every=50)
LOSS = IN_TOWN | dict(trainer="contrastive", batch=64, steps=150, text_weight=0.0, eval_every=0)
START = dict(trainer="none", world="town")
BRIEF = dict(steps=60, eval_every=15)
LADDER = dict(probe="ladder")

FULL, PAPERS, LOSSES = "GRACE, full", "GRACE, the paper's recipe", "contrastive with the text term"
NO_GRPO, NO_PATHWISE = "the same without GRPO", "the same without the pathwise term"
ROWS = {
    "Base": START | LADDER,
    "Base with reasoning": START | LADDER,
    "contrastive fine-tuning": LOSS,
    LOSSES: LOSS | LADDER | dict(text_weight=1.0),
    "contrastive over forced walks": LOSS | dict(trainer="forced", batch=32, text_weight=1.0),
    PAPERS: PAPER,
    FULL: WALKING | LADDER,
    NO_GRPO: WALKING | dict(trainer="pathwise", eval_every=40),
    NO_PATHWISE: WALKING | dict(pathwise=0.0, eval_every=40),
}
UNLABELLED = dict(mode="unsupervised")
SIMCSE, VIEWS = "SimCSE", "full: two rationales as two views"
UNSUPERVISED = {
    "Base": START | LADDER,
    "Base with reasoning": START | LADDER,
    SIMCSE: LOSS | UNLABELLED | dict(trainer="simcse"),
    PAPERS: PAPER | UNLABELLED,
    VIEWS: WALKING | UNLABELLED | dict(eval_every=40),
}
CURVES = {
    "GRACE": (FULL, "after"),
    "GRACE, without rationale": (FULL, "after_without_rationale"),
    "InfoNCE as a loss": (LOSSES, "after"),
    "before training": ("Base with reasoning", "after"),
}
RIVALS = ("GRACE", "GRPO", "Dr. GRPO", "DAPO", "REINFORCE++", "ReMax")
ALGORITHMS = {name: WALKING | BRIEF | dict(trainer=name, pathwise=0.0) for name in RIVALS}
DISCOVERY = {
    **{f"K = {k}": WALKING | BRIEF | dict(rollouts=k) for k in (2, 4, 8)},
    **{f"temperature {t:g}": WALKING | BRIEF | dict(temperature=t) for t in (0.4, 1.0)},
    **{f"{share} % of the start's answers think": WALKING | BRIEF | dict(world=f"town-{share}") for share in (1, 5, 20)},
    "5 %, at K = 8 and temperature 1": WALKING | BRIEF | dict(world="town-5", rollouts=8, temperature=1.0),
}
TRIED = {
    **{f"the loss: rate {rate:g}": LOSS | dict(text_weight=1.0, lr=rate) for rate in (3e-4, 1e-3, 3e-3)},
    "the loss: rate 0.001, softmax temperature 0.2": LOSS | dict(text_weight=1.0, infonce_temperature=0.2),
    "the loss: rate 0.001, without the text term": LOSS,
    "the loss: rate 0.001, 400 steps": LOSS | dict(text_weight=1.0, steps=400),
    **{f"the paper's recipe: rate {rate:g}": PAPER | dict(lr=rate) for rate in (5e-4, 1e-3)},
    "the paper's recipe: rate 0.0005, not falling": PAPER | dict(lr_decay=False),
    "the paper's recipe: rate 0.0005, KL 0.1": PAPER | dict(kl=0.1),
    "the paper's recipe: rate 0.0005, temperature 0.7": PAPER | dict(temperature=0.7),
    "the paper's recipe: rate 0.0005, K = 8": PAPER | dict(rollouts=8),
}


def some(*labels):
    """The rows with these labels."""
    return {label: ROWS[label] for label in labels}


TABLES = {
    "town_table1": Experiment(
        "Table 1 in the town: supervised", "On every backbone: base < base with reasoning < contrastive fine-tuning < GRACE.",
        ROWS, ("ndcg_at_10", "spearman", "text loss", "recall", "thinks", "true_steps", "words", "forced", "seconds"),
        (
            Claim("GRACE by the full recipe is above contrastive fine-tuning by 0.8", [(FULL, "contrastive fine-tuning"), (FULL, LOSSES)], by=0.8),
            Claim("GRACE by the paper's recipe is above contrastive fine-tuning", [(PAPERS, "contrastive fine-tuning"), (PAPERS, LOSSES)]),
            Claim("the pathwise term alone does not think", [(FULL, NO_GRPO)], "thinks", by=0.5),
            Claim("without the pathwise term the policy thinks all the same", [(NO_PATHWISE, "Base with reasoning")], "thinks", by=0.5),
            Claim("but its embedding says less of it", [(FULL, NO_PATHWISE)]),
        ),
        figure=functools.partial(pictures.courses, labels=[PAPERS, NO_GRPO, NO_PATHWISE, FULL]),
        note="*thinks*: the share of answers that write more than where the walks end; *true steps*: of the steps in a text, the share that such "
        "answers write down truly. *forced walks*: the embedding is read over the text and a walk that the start wrote, the longest of eight. "
        "Given those, the loss learns; by itself it writes none or, with the text term, mostly untrue ones, and stays at chance. So it is not the words alone, but who finds them. The "
        "loss was tried at three settings of rate and temperature before; the paper's recipe runs at the settings of its other tables.",
    ),
    "ladder": Experiment(
        "The ladder: how many steps a walk has", "(Ours.) One pass of the network is lost at the first step; writing goes on.",
        some("Base with reasoning", LOSSES, FULL), ("ndcg_at_10", "spearman", "text loss", "true_steps", "other_right"), lines=ladder_lines, figure=functools.partial(pictures.ladder, curves=CURVES), seeds=(0, 1, 2, 3, 4),
        note="Held-out walks, 128 queries for each number of steps; rewarded were walks of one to four steps. On longer ones the policy still "
        "thinks, and mostly closes after the fourth step: the place that is an end whenever it is reached in training. It is the pathwise "
        "term that makes it so, by moving the states of such places towards those of ends: 25 steps without it leave the ends of five-step "
        "walks rightly named in 0.82 of cases, with it in 0.40, and with it but without the text term in 0.38 (seed 1, an earlier warm start, "
        "rate 5e-4). Where a third of the training texts had two walks of unequal length, more of it was kept (0.48 instead of 0.06 at step 50), "
        "but retrieval learned more slowly (0.62 instead of 0.87). These trials have no records.",
    ),
    "town_table2": Experiment(
        "Table 2 in the town: unsupervised", "On every backbone: base < base with reasoning < SimCSE < GRACE.",
        UNSUPERVISED, ("ndcg_at_10", "spearman", "text loss", "recall", "thinks", "true_steps", "words", "seconds"),
        (
            Claim("SimCSE is above the base with reasoning", [(SIMCSE, "Base with reasoning")]),
            Claim("GRACE by the full recipe is above SimCSE", [(VIEWS, SIMCSE)]),
            Claim("without labels the policy finds that thinking pays", [(VIEWS, "Base with reasoning")], "thinks", by=0.5),
        ),
        note="Two rationales that name the same ends are alike, so thinking is found without a label. But a text's own rationales also share the "
        "walk, and nothing says that another text with the same ends means the same: retrieval, which asks for that, stays low.",
    ),
    "town_table4": Experiment(
        "Table 4 in the town: which algorithm finds thinking first", "GRPO 55.9, DAPO 55.8, REINFORCE++ 54.6, ReMax 53.4 (its GRPO is mean-centred).",
        ALGORITHMS, ("ndcg_at_10", "spearman", "text loss", "thinks", "true_steps", "words", "seconds"),
        (
            Claim("no division by the standard deviation is better than division (Eq. 18 against 7)", [("GRACE", "GRPO")]),
            Claim("the same, by how many answers think", [("GRACE", "GRPO")], "thinks"),
        ),
        lines=discovery_lines, note="The full recipe without its pathwise term, 60 steps: by reward alone. All find thinking by the first "
        "evaluation but two. The others sum over tokens. Dr. GRPO divides that sum by the limit, 40, and DAPO by the mean length, so beside the "
        "text and KL terms, which keep their weights, theirs is a fortieth and a tenth to a twenty-fifth.",
    ),
    "town_table5": Experiment(
        "Table 5 in the town: does generation survive", "Contrastive fine-tuning takes general abilities to 0, GRACE keeps them (± 0.4).",
        some("Base with reasoning", "contrastive fine-tuning", LOSSES, PAPERS, NO_PATHWISE, FULL),
        ("other_right", "other loss", "text loss", "answers loss", "well_formed", "finished"),
        (
            Claim("the full recipe keeps the other instruction within 0.05", [(FULL, "Base with reasoning")], "other_right", within=0.05),
            Claim("contrastive fine-tuning does not", [("Base with reasoning", "contrastive fine-tuning")], "other_right", by=0.5),
        ),
        note="The other instruction asks where the walkers start; one chat of ten in the warm start answers it, and no reward and no term "
        "touches it. The start's own answers are mostly guesses: a policy that thinks has given these up, and the loss on them says so.",
    ),
    "town_table6": Experiment(
        "Table 6 in the town: rationales along the training", "Rationales grow from loose remarks to structured readings of the text.",
        some(PAPERS, NO_GRPO, FULL), (), lines=along,
    ),
    "town_figure4": Experiment(
        "Figure 4 in the town: latency, and quality against the length allowed", "Quality rises with the number of new tokens up to a knee (256 tokens there).",
        {FULL: WALKING | dict(probe="budgets")}, (), lines=budget_lines, figure=pictures.budgets,
    ),
    "town_figure5": Experiment(
        "Figure 5 in the town: score and length along the training", "The score rises and responses grow, from 480 to 1,050 tokens in 1,000 steps.",
        some("Base with reasoning", PAPERS, NO_PATHWISE, FULL), ("ndcg_at_10", "words"),
        (
            Claim("the full recipe's score rises", [(FULL, "Base with reasoning")]),
            Claim("the full recipe's rationales grow", [(FULL, "Base with reasoning")], "words"),
            Claim("rationales grow by reward alone", [(NO_PATHWISE, "Base with reasoning")], "words"),
            Claim("the paper's recipe's rationales grow", [(PAPERS, "Base with reasoning")], "words"),
        ),
        figure=functools.partial(pictures.score_and_length, labels=[PAPERS, NO_PATHWISE, FULL]),
    ),
    "town_figure7": Experiment(
        "Figure 7 in the town: what discovery needs", "Monotone gains over K = 2, 4, 8.",
        DISCOVERY, ("ndcg_at_10", "spearman", "thinks", "true_steps", "words"),
        (
            Claim("K = 8 is better than K = 2", [("K = 8", "K = 2")]),
            Claim("rollouts at temperature 0.7 serve as well as at 1", [("K = 4", "temperature 1")]),
            Claim("where one answer in a hundred thinks, thinking is found", [("1 % of the start's answers think", "K = 4")], "thinks", within=0.1),
        ),
        lines=discovery_lines, seeds=(0,), note="60 steps, one seed. K = 4 at temperature 0.7 from a start of which 35 % of answers think, but for what is "
        "named. Drawn at temperature 0.7, the four starts (1, 5, 20, 35 %) think in 0, 2, 12 and 26 % of answers, and truly; at temperature 1 in 1, 5, "
        "19 and 32 % (seed 0, without a record). So a start of 5 % does draw walks, with eight rollouts at temperature 1 in one group of three, and "
        "still does not find thinking. A walk pays in company: it brings a text nearer to its pair only if the pair's rollouts walk, too, "
        "so what it gains falls with the share of the others that do. More than 60 steps were not tried.",
    ),
    "town_search": Experiment(
        "Settings in the town: what was tried for the loss and for the paper's recipe", "One set of settings for everything.",
        TRIED, (), lines=search_lines, seeds=(5,),
        note="Everything is at chance: a right guess is one of hundreds. On the walks that GRACE learns in 20 steps neither a higher rate nor "
        "another temperature nor more steps make a loss, or the paper's reward, find anything.",
    ),
}  # fmt: skip
