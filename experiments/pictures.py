"""The figures, as PNGs that can be read on a projector and in black and white: markers and line styles, not colour alone.

Each function takes `found`, {label: [a record a seed]}, and the path to write. Error bars run from the lowest seed to
the highest.
"""

import numpy as np

STYLES = [  # colour, line, marker
    ("tab:blue", "-", "D"), ("tab:red", ":", "o"), ("tab:orange", "--", "s"), ("tab:gray", "-.", "^"),
    ("tab:green", (0, (5, 1)), "v"), ("tab:purple", (0, (1, 1)), "P"), ("tab:brown", (0, (3, 1, 1, 1)), "X"),
    ("black", (0, (7, 2, 1, 2)), "*"),
]  # fmt: skip


def axes(columns=1, width=8.0, height=4.8):
    """A figure with so many axes side by side, and matplotlib's module, without a display."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    plt.rcParams.update({"font.size": 13, "axes.spines.top": False, "axes.spines.right": False, "axes.grid": True})
    plt.rcParams.update({"grid.alpha": 0.3, "lines.linewidth": 2, "lines.markersize": 7, "legend.frameon": False})
    figure, found = plt.subplots(1, columns, figsize=(width, height), squeeze=False)
    return figure, list(found[0])


def save(figure, path, legend=None, rows=1, columns=2):
    """Write the figure; `legend`: the axes whose labels stand below all of them, in so many rows."""
    if legend:
        handles, labels = legend.get_legend_handles_labels()
        figure.legend(handles, labels, loc="lower center", ncol=columns)
    figure.tight_layout(rect=(0, 0.07 * rows if legend else 0, 1, 1))
    figure.savefig(path, dpi=130)
    import matplotlib.pyplot as plt

    plt.close(figure)


def spread(values):
    """Mean, and how far the lowest and highest lie from it. `[seeds, n] -> [n], [2, n]`."""
    values = np.array(values, dtype=float)
    mean = values.mean(0)
    return mean, np.stack([mean - values.min(0), values.max(0) - mean])


def line(axis, x, values, style, label=None):
    """A mean over seeds with its error bars."""
    colour, dashes, marker = STYLES[style % len(STYLES)]
    mean, bars = spread(values)
    axis.errorbar(x, mean, bars, color=colour, ls=dashes, marker=marker, capsize=3, elinewidth=1, label=label)


def course(record, name):
    """Steps and held-out figures along a run, before and after included."""
    last = record["config"]["steps"]
    return zip(*[(0, record["before"][name]), *((c["step"], c[name]) for c in record["curve"]), (last, record["after"][name])])


def courses(found, path, labels):
    """Held-out nDCG@10 along the training: the picture of the README."""
    figure, (axis,) = axes(height=5.4)
    for label, style in zip(labels, (1, 2, 3, 4, 0)):
        steps, values = zip(*(course(r, "ndcg_at_10") for r in found[label]))
        line(axis, steps[0], values, style, label)
    axis.set(xlabel="training step", ylabel="held-out nDCG@10, greedy rationales", ylim=(-0.02, 1.03))
    save(figure, path, axis, rows=3)


def score_and_length(found, path, labels):
    """Figure 5."""
    figure, pair = axes(2, 11)
    for axis, name, title in zip(pair, ("ndcg_at_10", "words"), ("held-out nDCG@10", "words in a rationale")):
        for label, style in zip(labels, (1, 2, 0)):
            steps, values = zip(*(course(r, name) for r in found[label]))
            line(axis, steps[0], values, style, label)
        axis.set(xlabel="training step", ylabel=title)
        axis.set_ylim(bottom=0)
    save(figure, path, pair[0], rows=2)


def grid(found, path):
    """Figure 3: one panel a reward, a line a consistency weight."""
    figure, pair = axes(2, 11)
    weights = sorted({float(label.split()[1]) for label in found})
    for axis, name, title in zip(pair, ("paper", "infonce"), ("the paper's reward", "InfoNCE, the full recipe")):
        for style, a in enumerate(weights):
            rows = [found[f"{name} {a:g} {b:g}"] for b in weights]
            line(
                axis, weights, [[r[i]["after"]["ndcg_at_10"] for r in rows] for i in range(len(rows[0]))], style, f"λ1 = {a:g}"
            )
        axis.set(xlabel="λ2, weight of the hard component", ylabel="held-out nDCG@10", title=title)
    save(figure, path, pair[0], columns=len(weights))


def budgets(found, path):
    """Figure 4: quality and latency against the longest rationale allowed, and the phases of a training step."""
    figure, (left, middle, right) = axes(3, 14)
    (records,) = found.values()
    limits = [row["limit"] for row in records[0]["budgets"]]
    for axis, name, title in ((left, "ndcg_at_10", "held-out nDCG@10"), (middle, "ms", "milliseconds a text, encoding")):
        line(axis, limits, [[row[name] for row in r["budgets"]] for r in records], 0)
        axis.set(xlabel="longest rationale allowed, tokens", ylabel=title)
        axis.set_ylim(0, 1.03 if name == "ndcg_at_10" else None)
    sampling = [np.mean([m["sample_s"] for m in r["trace"]]) for r in records]
    rest = [np.mean([m["step_s"] - m["sample_s"] for m in r["trace"]]) for r in records]
    for x, (values, hatch) in enumerate(((sampling, "//"), (rest, ".."))):
        mean, bars = spread([[v] for v in values])
        right.bar([x], mean, yerr=bars, color="lightgray", edgecolor="black", hatch=hatch, capsize=4)
    right.set_xticks([0, 1], ["sampling", "reward\nand update"])
    right.set(ylabel="seconds of a training step")
    save(figure, path)


def bars(found, path):
    """A bar a row, with the spread over seeds."""
    figure, (axis,) = axes()
    for x, (records, hatch) in enumerate(zip(found.values(), ("", "//", "..", "xx", "\\\\", "oo"))):
        mean, ends = spread([[r["after"]["ndcg_at_10"]] for r in records])
        axis.bar([x], mean, yerr=ends, color="lightgray", edgecolor="black", hatch=hatch, capsize=4)
    axis.set_xticks(range(len(found)), list(found))
    axis.set(ylabel="held-out nDCG@10", ylim=(0, 1.03))
    save(figure, path)


def sizes(found, path):
    """Figure 7: one panel for the batch, one for the rollouts."""
    figure, pair = axes(2, 11)
    for axis, letter, title in zip(pair, "BK", ("batch size B (K = 4)", "rollouts a text K (B = 16)")):
        for style, name in ((0, "full"), (2, "by reward alone")):
            labels = [label for label in found if label.startswith(letter) and label.endswith(name)]
            x = [int(label.split()[2].strip(",")) for label in labels]
            line(axis, x, np.transpose([[r["after"]["ndcg_at_10"] for r in found[label]] for label in labels]), style, name)
        axis.set_xscale("log", base=2)
        axis.set_xticks(x, [str(n) for n in x])
        axis.set(xlabel=title, ylabel="held-out nDCG@10", ylim=(0, 1.03))
    save(figure, path, pair[0])


def collapse(found, path, labels):
    """What a group's rewards spread over, and what becomes of the rationales, along the training."""
    figure, panels = axes(3, 14)
    for label, style in zip(labels, (1, 0)):
        traces = [r["trace"] for r in found[label]]
        steps = [m["step"] for m in traces[0]]
        for axis, name in zip(panels, ("contrastive_std", "cosine")):
            line(axis, steps, [[m[name] for m in trace] for trace in traces], style, label)
        at, values = zip(*(course(r, "ndcg_at_10") for r in found[label]))
        line(panels[2], at[0], values, style, label)
    for axis, title in zip(panels, ("std of the contrastive reward in a group", "cosine between texts", "held-out nDCG@10")):
        axis.set(xlabel="training step", ylabel=title)
    panels[0].set_yscale("log")
    save(figure, path, panels[0])


def frontier(found, path, knobs):
    """Each knob a line through its settings: how much text loss rose, how well it orders pairs, how much it names."""
    figure, pair = axes(2, 13, 6.2)
    for axis, name, title in zip(pair, ("spearman", "recall"), ("Spearman, graded pairs", "share of slots rightly named")):
        for style, (knob, labels) in enumerate(knobs.items()):
            rise, value = [], []
            for label in (label for label in labels if label in found):
                records = found[label]
                moment = "after_without_rationale" if knob == "InfoNCE as a loss" and name == "spearman" else "after"
                rise.append([r["after"]["text_loss"] - r["before"]["text_loss"] for r in records])
                value.append([r[moment][name] for r in records])
            (x, dx), (y, dy) = spread(np.transpose(rise)), spread(np.transpose(value))
            colour, dashes, marker = STYLES[style]
            axis.errorbar(x, y, dy, dx, color=colour, ls=dashes, marker=marker, capsize=2, elinewidth=0.8, label=knob)
            for label, *point in zip([label for label in labels if label in found], x, y):
                value = label.removeprefix(knob).removeprefix("contrastive")
                axis.annotate(value, point, textcoords="offset points", xytext=(6, -12), fontsize=9)
        axis.set_xscale("symlog", linthresh=0.01)  # most settings take nearly nothing
        axis.set(xlabel="rise of held-out text loss, nats a token", ylabel=title, ylim=(0.5, 1.03), xlim=(-0.004, 2))
    save(figure, path, pair[0], rows=2, columns=4)
