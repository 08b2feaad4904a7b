"""The figures, as pictures that can be read on a projector and in black and white: markers and line styles, not colour alone.

Each function takes `rows`, {label: [a record per seed]}, and returns a matplotlib figure. Error bars run from the lowest
seed to the highest. Hollow markers are scores by the prompt alone, full ones are scores with the rationale.
"""

import numpy as np

from experiments.page import WAYS, course, value
from experiments.runs import FULL, NO_GRPO, NO_PATHWISE, PAPERS, REASONING, TEXT

# Of a line: colour, dashes, marker.
STYLES = ("tab:blue", "-", "D"), ("tab:red", ":", "o"), ("tab:orange", "--", "s"), ("dimgray", "-.", "^")


# ---------------------------------------------------------------- canvas, lines, legends


def canvas(columns=1, width=8.0, height=4.8):
    """A figure and its axes, side by side."""
    import matplotlib
    from matplotlib.figure import Figure

    matplotlib.rcParams.update({"font.size": 13, "axes.spines.top": False, "axes.spines.right": False, "axes.grid": True})
    matplotlib.rcParams.update({"grid.alpha": 0.3, "lines.linewidth": 2, "lines.markersize": 7, "legend.frameon": False})
    figure = Figure(figsize=(width, height), dpi=130, layout="constrained")
    figure.get_layout_engine().set(w_pad=0.1, h_pad=0.1)
    return figure, list(figure.subplots(1, columns, squeeze=False).flat)


def add_legend(figure, axis):
    """The labels of one of the axes below all of them."""
    figure.legend(*axis.get_legend_handles_labels(), loc="outside lower center", ncol=2)


def spread(values):
    """Mean, and how far the lowest and highest lie from it. `[seeds, n] -> [n], [2, n]`."""
    values = np.array(values, dtype=float)
    mean = values.mean(0)
    return mean, np.stack([mean - values.min(0), values.max(0) - mean]).clip(0)  # the mean of equal values may be off a bit


def line(axis, x, values, style, label=None, **options):
    """A mean over seeds with its error bars. `values [seeds, n]`."""
    colour, dashes, marker = STYLES[style]
    mean, bars = spread(values)
    look = dict(color=colour, ls=dashes, marker=marker, capsize=3, elinewidth=1, label=label)
    axis.errorbar(x, mean, bars, **look | options)


def course_line(axis, records, name, style, label):
    """A held-out figure along the runs of one row."""
    steps, values = zip(*(course(record, name) for record in records))
    line(axis, steps[0], values, style, label)


# ---------------------------------------------------------------- the figures


def courses(rows):
    """Figure 5: score and length along the training."""
    figure, pair = canvas(2, width=11, height=5.6)
    for axis, name, title in zip(pair, ("ndcg_at_10", "words"), ("held-out nDCG@10, with rationale", "words in a rationale")):
        for style, label in enumerate((FULL, PAPERS, NO_PATHWISE, NO_GRPO)):
            course_line(axis, rows[label], name, style, label)
        axis.set(xlabel="training step", ylabel=title)
        axis.set_ylim(bottom=0)
    add_legend(figure, pair[0])
    return figure


def budgets(rows):
    """Figure 4: quality and latency against the longest rationale allowed, and the phases of a training step."""
    figure, (left, middle, right) = canvas(3, width=14)
    (records,) = rows.values()
    limits = [row["limit"] for row in records[0]["budgets"]]
    for axis, name, title in ((left, "ndcg_at_10", "held-out nDCG@10"), (middle, "ms", "encoding, milliseconds per text")):
        line(axis, limits, [[row[name] for row in record["budgets"]] for record in records], 0)
        axis.set(xlabel="longest rationale allowed, tokens", ylabel=title)
        axis.set_ylim(0, 1.03 if name == "ndcg_at_10" else None)
    sampling, whole = ([np.mean([m[name] for m in record["trace"]]) for record in records] for name in ("sample_s", "step_s"))
    mean, ends = spread([[s, w - s] for s, w in zip(sampling, whole)])
    right.bar(["sampling", "reward\nand update"], mean, yerr=ends, color="lightgray", edgecolor="black", capsize=4)
    right.set(ylabel="seconds per training step")
    return figure


def sizes(rows):
    """Figure 7: one panel for the batch, one for the rollouts."""
    figure, pair = canvas(2, width=11, height=5.4)
    for axis, letter, title in zip(pair, "BK", ("batch size B (K = 4)", "rollouts per text, K (B = 16)")):
        for style, recipe in ((0, "full"), (2, "by reward alone")):
            labels = [label for label in rows if label.startswith(letter) and label.endswith(recipe)]
            x = [int(label.split()[2].strip(",")) for label in labels]
            for way, look in zip(WAYS, ({}, dict(markerfacecolor="white", lw=1))):
                of_seeds = zip(*(rows[label] for label in labels))
                values = [[value(record, "ndcg_at_10", way) for record in of_seed] for of_seed in of_seeds]
                line(axis, x, values, style, f"{recipe}, {WAYS[way]}", **look)
        axis.set_xscale("log", base=2)
        axis.set_xticks(x, [str(n) for n in x])
        axis.set(xlabel=title, ylabel="held-out nDCG@10", ylim=(-0.03, 1.03))
    add_legend(figure, pair[0])
    return figure


def collapse(rows):
    """What a group's rewards spread over, and what becomes of the rationales, along the training."""
    figure, panels = canvas(3, width=14, height=5)
    for (label, records), style in zip(rows.items(), (1, 0)):
        traces = [record["trace"] for record in records]
        steps = [m["step"] for m in traces[0]]
        for axis, name in zip(panels, ("contrastive_std", "cosine")):
            line(axis, steps, [[m[name] for m in trace] for trace in traces], style, label)
        course_line(panels[2], records, "ndcg_at_10", style, label)
    titles = "std within a group, contrastive reward", "cosine between texts", "held-out nDCG@10, with rationale"
    for axis, title in zip(panels, titles):
        axis.set(xlabel="training step", ylabel=title)
    panels[0].set_yscale("log")
    add_legend(figure, panels[0])
    return figure


def ladder(rows):
    """The ladder of several seeds, from records."""
    curves = {
        "GRACE": (FULL, "after"),
        "GRACE, without rationale": (FULL, "after_without_rationale"),
        "InfoNCE as a loss": (TEXT, "after"),
        "before training": (REASONING, "after"),
    }
    return draw_ladder({name: [record["ladder"][way] for record in rows[label]] for name, (label, way) in curves.items()})


def draw_ladder(curves):
    """Held-out retrieval in the town by the number of steps in a walk: the picture of the README.

    curves: `{name: [{steps: nDCG@10} per run]}`, at most four.
    """
    figure, (axis,) = canvas(height=4.4)
    for style, (name, runs) in zip((0, 2, 1, 3), curves.items()):
        line(axis, [int(n) for n in runs[0]], [list(run.values()) for run in runs], style, name)
    axis.axvspan(4.5, 6.3, color="gray", alpha=0.12, linewidth=0)
    axis.text(5.4, 1.02, "longer than any rewarded", ha="center", va="top", fontsize=11)
    axis.set(xlabel="steps in each walk", ylabel="held-out nDCG@10", ylim=(-0.02, 1.05), xlim=(0.7, 6.3), xticks=range(1, 7))
    add_legend(figure, axis)
    return figure


PICTURES = {
    "ladder": ladder,
    "figure4": budgets,
    "figure5": courses,
    "figure7": sizes,
    "collapse": collapse,
}
