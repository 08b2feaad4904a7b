"""The figures, as pictures that can be read on a projector and in black and white: markers and line styles, not colour alone.

Each function takes `by_label`, {row's label: [a record per seed]}, and returns a matplotlib figure. Error bars run from
the lowest seed to the highest. Hollow markers and empty bars are scores by the prompt alone, full ones are scores with
the rationale.
"""

import itertools
import math

import numpy as np
from scores import WAYS, better_way, value

STYLES = [  # colour, line, marker
    ("tab:blue", "-", "D"), ("tab:red", ":", "o"), ("tab:orange", "--", "s"), ("dimgray", "-.", "^"),
    ("tab:green", (0, (5, 1)), "v"), ("tab:purple", (0, (1, 1)), "P"), ("tab:brown", (0, (3, 1, 1, 1)), "X"),
    ("black", (0, (7, 2, 1, 2)), "*"),
]  # fmt: skip


# ---------------------------------------------------------------- canvas, lines, legends


def canvas(columns=1, rows=1, width=8.0, height=4.8):
    """A figure and its axes, row by row. The layout makes room for whatever stands beside the axes."""
    import matplotlib
    from matplotlib.figure import Figure

    matplotlib.rcParams.update({"font.size": 13, "axes.spines.top": False, "axes.spines.right": False, "axes.grid": True})
    matplotlib.rcParams.update({"grid.alpha": 0.3, "lines.linewidth": 2, "lines.markersize": 7, "legend.frameon": False})
    figure = Figure(figsize=(width, height), dpi=130, layout="constrained")
    figure.get_layout_engine().set(w_pad=0.1, h_pad=0.1)
    return figure, list(figure.subplots(rows, columns, squeeze=False).flat)


def add_legend(figure, axis):
    """The labels of one of the axes below all of them, in as few rows as the figure's width allows."""
    handles, labels = axis.get_legend_handles_labels()
    for rows in range(1, len(labels) + 1):
        legend = figure.legend(handles, labels, loc="outside lower center", ncol=math.ceil(len(labels) / rows))
        if legend.get_window_extent().width < 0.98 * figure.bbox.width or rows == len(labels):
            return
        legend.remove()


def spread(values):
    """Mean, and how far the lowest and highest lie from it. `[seeds, n] -> [n], [2, n]`."""
    values = np.array(values, dtype=float)
    mean = values.mean(0)
    return mean, np.stack([mean - values.min(0), values.max(0) - mean]).clip(0)  # the mean of equal values may be off a bit


def scores(groups, name, way="after"):
    """A figure of several rows, each a list of a record per seed. `-> [seeds, rows]`."""
    return [[value(record, name, way) for record in of_seed] for of_seed in zip(*groups)]


def line(axis, x, values, style, label=None, **options):
    """A mean over seeds with its error bars. `values [seeds, n]`."""
    colour, dashes, marker = STYLES[style % len(STYLES)]
    mean, bars = spread(values)
    options = dict(color=colour, ls=dashes, marker=marker, capsize=3, elinewidth=1, label=label) | options
    axis.errorbar(x, mean, bars, **options)


def course(record, name):
    """Steps and held-out figures along a run, before and after included."""
    last = record["config"]["steps"]
    return zip(*[(0, record["before"][name]), *((c["step"], c[name]) for c in record["curve"]), (last, record["after"][name])])


def course_line(axis, records, name, style, label):
    """A held-out figure along the runs of one row."""
    steps, values = zip(*(course(record, name) for record in records))
    line(axis, steps[0], values, style, label)


# ---------------------------------------------------------------- the figures


def courses(by_label, labels):
    """Held-out nDCG@10 along the training: the picture of the README."""
    figure, (axis,) = canvas(height=5.8)
    for label, style in zip(labels, (1, 2, 3, 4, 0)):
        course_line(axis, by_label[label], "ndcg_at_10", style, label)
    axis.set(xlabel="training step", ylabel="held-out nDCG@10, with rationale", ylim=(-0.02, 1.03))
    add_legend(figure, axis)
    return figure


def score_and_length(by_label, labels):
    """Figure 5."""
    figure, pair = canvas(2, width=11, height=5.2)
    titles = "held-out nDCG@10, with rationale", "words in a rationale"
    for axis, name, title in zip(pair, ("ndcg_at_10", "words"), titles):
        for label, style in zip(labels, (1, 2, 0)):
            course_line(axis, by_label[label], name, style, label)
        axis.set(xlabel="training step", ylabel=title)
        axis.set_ylim(bottom=0)
    add_legend(figure, pair[0])
    return figure


def grid(by_label):
    """Figure 3: one panel per reward, a line per consistency weight."""
    figure, pair = canvas(2, width=11)
    weights = sorted({float(label.split()[1]) for label in by_label})
    for axis, name, title in zip(pair, ("paper", "infonce"), ("the paper's reward", "InfoNCE, the full recipe")):
        for style, a in enumerate(weights):
            groups = [by_label[f"{name} {a:g} {b:g}"] for b in weights]
            line(axis, weights, scores(groups, "ndcg_at_10"), style, f"λ1 = {a:g}")
        axis.set(xlabel="λ2, weight of the hard component", ylabel="held-out nDCG@10, with rationale", title=title)
    add_legend(figure, pair[0])
    return figure


def budgets(by_label):
    """Figure 4: quality and latency against the longest rationale allowed, and the phases of a training step."""
    figure, (left, middle, right) = canvas(3, width=14)
    (records,) = by_label.values()
    limits = [row["limit"] for row in records[0]["budgets"]]
    for axis, name, title in ((left, "ndcg_at_10", "held-out nDCG@10"), (middle, "ms", "encoding, milliseconds per text")):
        line(axis, limits, [[row[name] for row in record["budgets"]] for record in records], 0)
        axis.set(xlabel="longest rationale allowed, tokens", ylabel=title)
        axis.set_ylim(0, 1.03 if name == "ndcg_at_10" else None)
    sampling = [np.mean([m["sample_s"] for m in record["trace"]]) for record in records]
    rest = [np.mean([m["step_s"] - m["sample_s"] for m in record["trace"]]) for record in records]
    for x, (values, hatch) in enumerate(((sampling, "//"), (rest, ".."))):
        mean, ends = spread([[value] for value in values])
        right.bar([x], mean, yerr=ends, color="lightgray", edgecolor="black", hatch=hatch, capsize=4)
    right.set_xticks([0, 1], ["sampling", "reward\nand update"])
    right.set(ylabel="seconds per training step")
    return figure


def bars(by_label):
    """Figure 6: two bars per row."""
    figure, (axis,) = canvas(height=5.2)
    looks = dict(color="lightgray", hatch="//"), dict(color="white")
    for offset, way, look in zip((-0.2, 0.2), WAYS, looks):
        mean, ends = spread(scores(by_label.values(), "ndcg_at_10", way))
        x = np.arange(len(by_label)) + offset
        axis.bar(x, mean, 0.36, yerr=ends, edgecolor="black", capsize=4, label=WAYS[way], **look)
    axis.set_xticks(range(len(by_label)), list(by_label))
    axis.set(ylabel="held-out nDCG@10", ylim=(0, 1.03))
    add_legend(figure, axis)
    return figure


def sizes(by_label):
    """Figure 7: one panel for the batch, one for the rollouts."""
    figure, pair = canvas(2, width=11, height=5.4)
    for axis, letter, title in zip(pair, "BK", ("batch size B (K = 4)", "rollouts per text, K (B = 16)")):
        for style, recipe in ((0, "full"), (2, "by reward alone")):
            labels = [label for label in by_label if label.startswith(letter) and label.endswith(recipe)]
            x = [int(label.split()[2].strip(",")) for label in labels]
            for way, look in zip(WAYS, ({}, dict(markerfacecolor="white", lw=1))):
                values = scores([by_label[label] for label in labels], "ndcg_at_10", way)
                line(axis, x, values, style, f"{recipe}, {WAYS[way]}", **look)
        axis.set_xscale("log", base=2)
        axis.set_xticks(x, [str(n) for n in x])
        axis.set(xlabel=title, ylabel="held-out nDCG@10", ylim=(-0.03, 1.03))
    add_legend(figure, pair[0])
    return figure


def collapse(by_label, labels):
    """What a group's rewards spread over, and what becomes of the rationales, along the training."""
    figure, panels = canvas(3, width=14, height=5)
    for label, style in zip(labels, (1, 0)):
        traces = [record["trace"] for record in by_label[label]]
        steps = [m["step"] for m in traces[0]]
        for axis, name in zip(panels, ("contrastive_std", "cosine")):
            line(axis, steps, [[m[name] for m in trace] for trace in traces], style, label)
        course_line(panels[2], by_label[label], "ndcg_at_10", style, label)
    titles = "std within a group, contrastive reward", "cosine between texts", "held-out nDCG@10, with rationale"
    for axis, title in zip(panels, titles):
        axis.set(xlabel="training step", ylabel=title)
    panels[0].set_yscale("log")
    add_legend(figure, panels[0])
    return figure


def ladder(by_label, curves):
    """The ladder, from records. curves: `{name: (row's label, way)}`."""
    return draw_ladder({name: [record["ladder"][way] for record in by_label[label]] for name, (label, way) in curves.items()})


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


# ---------------------------------------------------------------- the frontier


def frontier(by_label, knobs):
    """How much the loss on the training kind of texts rose, against how well pairs are ordered and how much is named.

    knobs: {name: labels of its settings}, two per column of panels, the settings of all others in gray behind them. Both
    axes are logarithmic in the distance from the best there could be: no rise, and a score of 1.
    """
    columns = [list(knobs)[i : i + 2] for i in range(0, len(knobs), 2)]
    figure, panels = canvas(len(columns), 2, width=4 * len(columns), height=8.4)
    notes = []
    for row, (score, title) in enumerate((("spearman", "Spearman, graded pairs"), ("recall", "share of facts rightly named"))):
        points = {label: frontier_point(records, label, score) for label, records in by_label.items()}
        for column, names in enumerate(columns):
            axis = panels[row * len(columns) + column]
            axis.scatter(*np.mean(list(points.values()), 2).T, s=14, color="silver", zorder=1)
            beside = []
            for name in names:
                labels = [label for label in knobs[name] if label in points]
                rise, short = np.transpose([points[label] for label in labels], (1, 2, 0))  # [seeds, settings] x 2
                (x, dx), (y, dy) = spread(rise), spread(short)
                colour, dashes, marker = STYLES[list(knobs).index(name)]
                look = dict(color=colour, ls=dashes, marker=marker, capsize=2, elinewidth=0.7, lw=1.2, label=name)
                axis.errorbar(x, y, dy, dx, **look)
                settings = (label.removeprefix(name).strip() for label in labels)
                beside += [(*place, setting, colour) for *place, setting in zip(x, y, settings)]
            axis.set_xscale("symlog", linthresh=0.01, linscale=2)
            axis.set_yscale("symlog", linthresh=0.02, linscale=0.5)
            axis.set(xlim=(-0.002, 5), ylim=(0.6, 0.02 if score == "spearman" else -0.005))
            axis.set_xticks([0, 0.005, 0.01, 0.1, 1], ["0", "0.005", "0.01", "0.1", "1"])
            ticks = [x for x in (0, 0.02, 0.05, 0.1, 0.2, 0.4) if x or score == "recall"]
            axis.set_yticks(ticks, [f"{1 - x:g}" for x in ticks])
            axis.minorticks_off()
            if row == 0:
                axis.legend(loc="lower center", bbox_to_anchor=(0.5, 1.0), fontsize=12)
            else:
                axis.set_xlabel("rise of the loss, training kind of texts", fontsize=12)
            if column == 0:
                axis.set_ylabel(title)
            notes.append((axis, beside))
    figure.draw_without_rendering()  # from here on the layout is final, and places are pixels
    for axis, beside in notes:
        label_points(axis, beside)
    return figure


CAPTION_SCORES = {"ndcg_at_10": "caption retrieval, nDCG@10", "mean of tasks": "mean of four tasks"}


def by_size(by_label, rows, sizes):
    """Two scores of each row, by its better way, against the size of the backbone.

    rows: labels, which `by_label` has with a size behind them, as in "Base, 1.3 M"; sizes: `{"1.3 M": 1.3}`. A row that
    has not been measured at every size is left out.
    """
    figure, axes = canvas(2, width=11)
    for axis, (score, title) in zip(axes, CAPTION_SCORES.items()):
        for style, row in enumerate(rows):
            groups = [by_label.get(f"{row}, {size}") for size in sizes]
            if all(groups):
                way = better_way([record for group in groups for record in group], row, score)
                hollow = dict(mfc="white") if way != "after" else {}
                line(axis, list(sizes.values()), scores(groups, score, way), style, row, **hollow)
        axis.set(xlabel="parameters of the backbone, millions", ylabel=title, xscale="log", xticks=list(sizes.values()))
        axis.set(xticklabels=list(sizes), xlim=(min(sizes.values()) / 1.3, max(sizes.values()) * 1.3))
        axis.minorticks_off()
    add_legend(figure, axes[0])
    return figure


def retention(by_label):
    """Two scores of each row, by its better way, against the rise of the loss on plain text that nothing trained on."""
    figure, axes = canvas(2, width=11)
    for axis, (score, title) in zip(axes, CAPTION_SCORES.items()):
        for (label, records), (colour, _, marker) in zip(by_label.items(), itertools.cycle(STYLES)):
            way = better_way(records, label, score)
            (x, dx), (y, dy) = (
                spread([[value(record, *what)] for record in records]) for what in (["plain loss"], [score, way])
            )
            full = colour if way == "after" else "white"
            axis.errorbar(x, y, dy, dx, color=colour, marker=marker, mfc=full, ls="", capsize=3, label=label)
        axis.set(xlabel="rise of the loss on plain text, nats per token", ylabel=title)
    add_legend(figure, axes[0])
    return figure


def frontier_point(records, label, score):
    """A row's rise of that loss and what its score falls short of 1, per seed: `[2][seeds]`."""
    way = better_way(records, label, score)
    return [value(record, "text loss") for record in records], [1 - value(record, score, way) for record in records]


def label_points(axis, labels):
    """Write labels `[(x, y, text, colour)]`, each as near its point as it can stand without covering anything that is drawn."""
    from matplotlib.text import Text

    inside = axis.get_window_extent()
    points = [axis.transData.transform((x, y)) for x, y, _, _ in labels]
    taken = [(*(point - 8), *(point + 8)) for point in points]  # boxes: left, bottom, right, top
    for one, other in drawn_segments(axis):
        n = int(np.hypot(*(other - one)) / 5) + 1
        taken += [(*(at - 2), *(at + 2)) for at in np.linspace(one, other, n + 1)]
    for (px, py), (x, y, text, colour) in zip(points, labels):
        note = axis.annotate(
            text, (x, y), (0, 0), textcoords="offset pixels", ha="center", va="center", fontsize=11, color=colour,
            arrowprops=dict(arrowstyle="-", color=colour, lw=0.7, shrinkA=0, shrinkB=4), in_layout=False,
        )  # fmt: skip
        size = Text.get_window_extent(note)
        w, h = size.width / 2 + 2, size.height / 2 + 1
        for radius, turn in itertools.product(range(20, 240, 8), range(24)):
            dx, dy = radius * math.cos(turn * math.pi / 12), radius * math.sin(turn * math.pi / 12)
            box = (px + dx - w, py + dy - h, px + dx + w, py + dy + h)
            clear = all(box[2] < b[0] or b[2] < box[0] or box[3] < b[1] or b[3] < box[1] for b in taken)
            if clear and box[0] > inside.x0 and box[2] < inside.x1 and box[1] > inside.y0 and box[3] < inside.y1:
                break
        note.xyann = (dx, dy)
        taken.append(box)


def drawn_segments(axis):
    """The straight pieces of all lines and error bars of the axes, in pixels: `[(end, end)]`."""
    bars = [segment for bars in axis.collections if hasattr(bars, "get_segments") for segment in bars.get_segments()]
    lines = [line.get_xydata()[i : i + 2] for line in axis.lines for i in range(len(line.get_xydata()) - 1)]
    return [axis.transData.transform(segment) for segment in bars + lines]
