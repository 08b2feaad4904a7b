"""What is measured of a policy beside retrieval: what its rationales say, what it can still do, what it costs.

`start` is the policy as it was before training, `world` one of worlds/.
"""

import os
import random
import re
import time

import numpy as np
import torch

from evaluation.encoder import encode_texts
from evaluation.tasks import evaluate_tasks, evaluate_triplets
from experiments.baselines import longest
from plumbing.data import read_triplets
from plumbing.run import read_metrics
from rollout import Rollouts, sample, score, uniforms
from worlds.town import Town


def measure(policy, start, texts, world):
    """What the policy's greedy rationales about some texts are like, and what it can still do. `-> {name: number}`.

    recall: of a text's facts, the share that its rationale names; precision: of the facts named, the share that the
    text has; thinks, where a world has it: the share of rationales that think; true_steps: of a text's steps, the share
    that these name truly, None where no rationale thinks.
    """
    rationales = encode_texts(policy, texts).rationales
    recall, precision = np.mean([world.named(rationale, text) for rationale, text in zip(rationales, texts)], 0)
    stats = {"recall": recall, "precision": precision, "distinct": len(set(rationales)) / len(set(texts))}
    stats["well_formed"] = np.mean([world.well_formed(rationale) for rationale in rationales])
    stats["answers_loss"] = answers_loss(start, policy, texts)
    if hasattr(world, "thinks"):
        thinking = [pair for pair in zip(rationales, texts) if world.thinks(pair[0])]
        stats["thinks"] = len(thinking) / len(texts)
        stats["true_steps"] = np.mean([world.true_steps(*pair) for pair in thinking]) if thinking else None
    if hasattr(world, "other_chats"):
        stats |= follow_other(policy, world, len(texts))
    return {name: x if x is None else float(x) for name, x in stats.items()}


@torch.no_grad()
def answers_loss(start, policy, texts):
    """Nats per token of the start's own answers, drawn at temperature 1, under the policy; the same draws each time.

    By how much it exceeds the start's own figure is KL(start || policy) per token: what was forgotten.
    """
    total = count = 0
    for i in range(0, len(texts), 64):
        prompts = start.template(texts[i : i + 64])
        chance = uniforms([0, i], len(prompts.ids), 1, start.reading.max_new_tokens, device=start.device)
        rollouts = sample(start, prompts, 1, 1.0, chance)
        total -= float((score(policy, rollouts).logprobs * rollouts.mask).sum())
        count += int(rollouts.mask.sum())
    return total / count


def answered(policy, texts, answers):
    """Given answers to texts, each with an end token, as `score` takes them: `Rollouts` without what only sampling records."""
    rows = [policy.tokenizer(answer, add_special_tokens=False)["input_ids"] + [int(policy.end_ids[0])] for answer in answers]
    lengths = torch.tensor([len(row) for row in rows], device=policy.device)
    ids = torch.tensor([row + [0] * (int(lengths.max()) - len(row)) for row in rows], device=policy.device)
    mask = (torch.arange(ids.shape[1], device=ids.device) < lengths[:, None]).long()
    x = policy.template(texts)
    return Rollouts(x.ids, x.mask, x.counted, x.text, x.cut, ids[:, None], mask[:, None], None, None, None, None, x.n_shared)


@torch.no_grad()
def follow_other(policy, world, n):
    """How well the policy follows an instruction of its warm start that no reward touched. `-> {name: number}`.

    other_loss: nats per token of the right answers, end tokens included; other_right: the share of greedy answers that
    equal them.
    """
    other, tokenizer = policy.reads(instruction=world.other_instruction), policy.tokenizer
    texts, answers = zip(*world.other_chats(n, random.Random(0)))
    greedy = sample(other, other.template(list(texts)))
    written = [tokenizer.decode(group[0], skip_special_tokens=True).strip() for group in greedy.rationales()]
    right = answered(other, list(texts), answers)
    loss = -score(other, right).logprobs.sum() / right.mask.sum()
    return {"other_loss": float(loss), "other_right": float(np.mean([a == b for a, b in zip(written, answers)]))}


def budgets(policy, heldout, limits):
    """Figure 4: held-out retrieval and milliseconds per text, by the longest rationale allowed. 0: none is written."""
    texts, rows = list({row["query"] for row in heldout}), []
    for limit in limits:
        short = policy.reads(max_new_tokens=limit or 1)
        scores = evaluate_triplets(short, heldout, rationale=limit > 0)
        start = time.perf_counter()
        encode_texts(short, texts, rationale=limit > 0)
        ms = 1000 * (time.perf_counter() - start) / len(texts)
        rows.append({"limit": limit, "ndcg_at_10": scores["ndcg_at_10"], "finished": scores.get("finished"), "ms": ms})
    return rows


def ladder(policy, folder, rationale=True, rows=128):
    """nDCG@10 by the number of steps in a walk, on a town's held-out files. `-> {steps: score}`."""
    rungs = {str(n): read_triplets(os.path.join(folder, "data", f"heldout-steps-{n}.jsonl"))[:rows] for n in Town.WARM}
    return {n: evaluate_triplets(policy, triplets, rationale=rationale)["ndcg_at_10"] for n, triplets in rungs.items()}


@torch.no_grad()
def forced(policy, start, folder):
    """nDCG@10 of held-out retrieval where the policy reads, behind each text, the longest of eight answers of the start."""

    def encode(texts):
        parts = (longest(start, texts[i : i + 128], [0, i]) for i in range(0, len(texts), 128))
        return torch.cat([score(policy, part).embeddings[:, 0] for part in parts]).cpu().numpy()

    return evaluate_tasks(encode, ["ToyRetrieval"], os.path.join(folder, "tasks"))["ToyRetrieval"]["main_score"]


TRACED = "step", "contrastive_std", "hard_std", "cosine", "sample_s", "step_s"


def course(folder):
    """From a run's folder: held-out figures along the training, a dozen lines of its metrics, and one text's rationales."""
    metrics = read_metrics(os.path.join(folder, "metrics.jsonl"))
    every = max(1, len(metrics) // 12)
    curve = [{k.removeprefix("heldout_"): v for k, v in m.items() if k == "step" or k.startswith("heldout_")} for m in metrics]
    trace = [{k: m[k] for k in TRACED if k in m} for m in metrics if m["step"] == 1 or m["step"] % every == 0]
    with open(os.path.join(folder, "rationales.md")) as file:
        text, _, table = file.read().split("\n**")[1].partition("**\n")
    rows = re.findall(r"^\| (\d+) \|(.*)\|$", table, re.MULTILINE)
    written = [[int(step), rationale.strip()] for step, rationale in rows]
    return {"curve": [c for c in curve if len(c) > 1], "trace": trace, "rationales": [{"text": text, "written": written}]}
