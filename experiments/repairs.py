"""What each repair of the paper's recipe is worth, on the embedded world, three seeds each.

    python experiments/repairs.py            # about 25 minutes on one core; writes docs/repairs.md
    python experiments/repairs.py --quick    # a smoke run, written to --out only

Four rungs, each adding one thing to the one before; world, warm start and training are reseeded together.
Every figure comes from a run's own summary.json and metrics.jsonl; nothing here is typed by hand.
"""

import argparse
import json
import os
import subprocess
import sys
import time

import numpy as np

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
sys.path.insert(0, ROOT)

import grace  # noqa: E402
import toy  # noqa: E402
from config import Config  # noqa: E402
from data import read_triplets  # noqa: E402
from policy import Policy  # noqa: E402
from rollout import encode  # noqa: E402

RUNGS = {  # name: its folder, and its settings beside the common ones
    "paper (constant rate, as published)": ("paper", dict(recipe="paper", lr_decay=False)),
    "paper, rate falling to 0": ("paper-falling", dict(recipe="paper")),
    "+ InfoNCE reward, relative penalty, KL 0.02": ("infonce", dict(train_roles="positive", pathwise=0.0)),
    "+ query trained": ("query", dict(pathwise=0.0)),
    "+ pathwise term (= full)": ("full", dict()),
}
PAPER, FULL = list(RUNGS)[0], list(RUNGS)[-1]
COMMON = dict(batch=16, rollouts=8, lr=5e-4, lr_decay=True)


def what_it_names(model, world):
    """Of the held-out queries' slots: the share named, the share of named ones that is right; distinct rationales."""
    queries = [row["query"] for row in read_triplets(f"{world}/data/heldout.jsonl")]
    written = encode(Policy.load(model), queries).rationales
    recall, precision = np.mean([toy.named(w, q) for w, q in zip(written, queries)], 0)
    return {"recall": float(recall), "precision": float(precision), "distinct": len(set(written)) / len(set(queries))}


def finished(out, steps):
    """Whether this run is already there, with this many steps."""
    path = os.path.join(out, "summary.json")
    if not os.path.isfile(path):
        return False
    with open(path) as file:
        return json.load(file)["config"]["steps"] == steps


def one_run(rung, seed, folder, steps, world_size):
    """Build the seed's world if need be, train one rung on it, and collect what it has to say."""
    world = os.path.join(folder, f"world-{seed}")
    if not os.path.isdir(os.path.join(world, "model")):
        toy.build(world, seed, **world_size)
    name, settings = RUNGS[rung]
    out = os.path.join(folder, f"{name}-{seed}")
    if not finished(out, steps):
        files = dict(
            data=f"{world}/data/train.jsonl", heldout=f"{world}/data/heldout.jsonl", graded=f"{world}/data/graded.jsonl"
        )
        given = {**COMMON, **settings, **files, "eval_every": max(1, steps // 4), "overwrite": True}
        grace.train(Config(model=f"{world}/model", out=out, seed=seed, steps=steps, **given))
    with open(os.path.join(out, "summary.json")) as file:
        summary = json.load(file)
    with open(os.path.join(out, "metrics.jsonl")) as file:
        steps_seen = [json.loads(line) for line in file]
    curve = [[0, summary["before"]["ndcg_at_10"]]]
    curve += [[m["step"], m["heldout_ndcg_at_10"]] for m in steps_seen if "heldout_ndcg_at_10" in m]
    return {
        "rung": rung,
        "curve": curve + [[steps_seen[-1]["step"], summary["after"]["ndcg_at_10"]]],
        "seed": seed,
        **{name: summary[name] for name in ("before", "after", "after_without_rationale", "seconds")},
        "named": {moment: what_it_names(folder, world) for moment, folder in (("before", f"{world}/model"), ("after", out))},
        "trace": [m for m in steps_seen if m["step"] == 1 or m["step"] % max(1, steps // 12) == 0],
    }


def document(results, steps):
    """The results as docs/repairs.md."""
    settings = f"B = 16, K = 8, {steps} steps, learning rate 5e-4 (falling to 0 unless said), greedy decoding, seeds "
    seeds = sorted({r["seed"] for r in results})
    lines = [
        "# What each repair is worth\n",
        "Made by `python experiments/repairs.py`; the embedded world, 256 held-out queries over 512 texts; "
        + settings
        + ", ".join(map(str, seeds))
        + ". One figure a seed. *Without* is the same checkpoint embedding the prompt alone.\n",
        "| policy | nDCG@10 | without rationale | Spearman | text loss | slots named | of those right | distinct rationales |",
        "| --- " * 8 + "|",
    ]

    def row(name, group, moment, without=True):
        cells = [
            [r[moment]["ndcg_at_10"] for r in group],
            [r["after_without_rationale"]["ndcg_at_10"] for r in group] if without else [],
            *([r[moment][key] for r in group] for key in ("spearman", "text_loss")),
            *([r["named"][moment][key] for r in group] for key in ("recall", "precision", "distinct")),
        ]
        lines.append(f"| {name} | " + " | ".join(" / ".join(f"{x:.2f}" for x in cell) for cell in cells) + " |")

    row("warm start: the control", [r for r in results if r["rung"] == PAPER], "before", without=False)
    for rung in RUNGS:
        row(rung, [r for r in results if r["rung"] == rung], "after")
    lines += [
        "\n## Along the training, first seed\n",
        "*std* is the mean standard deviation within a group, all that an advantage can see. Under the paper's "
        "reward the hard component's is exactly zero, and so is the negatives' share of the contrastive one "
        "(`tests/test_grace.py` moves every negative and sees no advantage change).\n",
    ]
    columns = {
        "step": "step", "reward": "reward", "contrastive_std": "contrastive std", "consistency_std": "consistency std",
        "hard_std": "hard std", "distinct": "distinct", "cosine": "cosine between texts",
        "effective_rank": "effective rank", "length": "length",
    }  # fmt: skip
    for rung in (PAPER, FULL):
        lines += [f"**{rung}**\n", "| " + " | ".join(columns.values()) + " |", "| ---: " * len(columns) + "|"]
        for m in next(r for r in results if r["rung"] == rung and r["seed"] == seeds[0])["trace"]:
            lines.append("| " + " | ".join(f"{m[c]:.4f}" if c.endswith("_std") else f"{m[c]:.4g}" for c in columns) + " |")
        lines.append("")
    return "\n".join(lines)


def draw(results, path):
    """Held-out nDCG@10 along the training, a line a run: the picture of the README."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    styles = {  # told apart without colour too
        PAPER: ("tab:red", ":", "o", "the paper's recipe"),
        "+ InfoNCE reward, relative penalty, KL 0.02": ("tab:orange", "--", "s", "+ InfoNCE as the reward"),
        "+ query trained": ("tab:gray", "-.", "^", "+ queries trained too"),
        FULL: ("tab:blue", "-", "D", "+ the other half of the gradient"),
    }
    figure, axes = plt.subplots(figsize=(8, 5))
    for rung, (colour, line, marker, label) in styles.items():
        for i, r in enumerate(r for r in results if r["rung"] == rung):
            axes.plot(*zip(*r["curve"]), line, color=colour, marker=marker, markersize=5, lw=1.8, label=None if i else label)
    axes.set(xlabel="training step", ylabel="held-out nDCG@10, greedy rationales", ylim=(-0.02, 1.02))
    axes.grid(alpha=0.3)
    axes.legend(loc="upper center", bbox_to_anchor=(0.5, -0.13), ncol=2, frameon=False)
    axes.spines[["top", "right"]].set_visible(False)
    figure.tight_layout()
    figure.savefig(path, dpi=150)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--out", default=os.path.join(ROOT, "runs", "repairs"), help="folder of the runs; finished ones are kept"
    )
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--steps", type=int, default=240)
    parser.add_argument("--quick", action="store_true", help="one seed, four steps, a short warm start")
    args = parser.parse_args()
    quick = [0], 4, dict(train=64, heldout=16, steps=20)
    seeds, steps, world_size = quick if args.quick else (args.seeds, args.steps, {})
    args.out = os.path.join(args.out, "quick") if args.quick else args.out
    start = time.time()
    results = [one_run(rung, seed, args.out, steps, world_size) for seed in seeds for rung in RUNGS]
    revision = subprocess.run(["git", "rev-parse", "HEAD"], cwd=ROOT, capture_output=True, text=True).stdout.strip()
    page, record = document(results, steps), {"revision": revision, "seconds": time.time() - start, "results": results}
    folder = args.out if args.quick else os.path.join(ROOT, "docs")
    with open(os.path.join(folder, "repairs.md"), "w") as file:
        file.write(page)
    with open(os.path.join(args.out if args.quick else os.path.join(ROOT, "experiments"), "repairs.json"), "w") as file:
        json.dump(record, file, indent=1)
    draw(results, os.path.join(folder, "repairs.png"))
    print(page)


if __name__ == "__main__":
    main()
