"""The pictures of a run's page, as SVG that takes its colours and its font from the page. The only file that needs matplotlib.

Each picture is drawn at the size at which a narrow screen shows it, so that its words stay readable.
"""

import io
import re
import warnings

import numpy as np

from plumbing.errors import GraceError

# Stand-ins that the drawn file is searched for; the page says what they look like in light and in dark.
COLOURS = {"#010101": "var(--accent)", "#020202": "var(--ink)", "#030303": "var(--muted)", "#040404": "var(--line)"}
ACCENT, INK, MUTED, LINE = COLOURS
WIDTH, HEIGHT, POINTS = 340, 190, 300  # in CSS pixels; and the most points of a curve
SETTINGS = {"svg.fonttype": "none", "svg.hashsalt": "grace", "font.size": 11, "axes.unicode_minus": False}


def _figure(height):
    """An empty picture and its axes: no frame, and quiet ticks."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(WIDTH / 72, height / 72))
    axes = figure.add_axes((0, 0, 1, 1))
    for side in ("top", "right", "left", "bottom"):
        axes.spines[side].set_visible(False)
    axes.tick_params(length=0, labelcolor=MUTED, labelsize=11)
    return figure, axes


def _svg(figure, name, alt):
    """The picture as a part of a page, with a text for those who cannot see it."""
    file = io.StringIO()
    figure.savefig(file, format="svg", transparent=True, metadata={"Date": None, "Creator": None})
    svg = file.getvalue()
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.S)
    svg = re.sub(r' (?:width|height)="[\d.]+pt"', "", svg, count=2)
    svg = re.sub(r"font-family: [^;\"]*;", "", svg)  # the font is the page's
    svg = re.sub(r'(id="|url\(#|href="#)', rf"\g<1>{re.sub('[^a-z0-9]', '-', name)}-", svg)  # several pictures share a page
    for stand_in, colour in COLOURS.items():
        svg = svg.replace(stand_in, colour)
    return svg.replace("<svg ", f'<svg role="img" aria-label="{_attribute(alt)}" ', 1)


def _attribute(text):
    return text.replace("&", "&amp;").replace('"', "&quot;").replace("<", "&lt;")


def _pictures(draw):
    """A drawing function with matplotlib's settings as they are needed here; GraceError where there is no matplotlib."""

    def drawing(name, *arguments, **more):
        try:
            import matplotlib
        except ImportError as error:
            raise GraceError("the page needs matplotlib, which is not installed: pip install matplotlib") from error
        with matplotlib.rc_context(SETTINGS), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of glyphs that matplotlib's own font lacks: the page's font is used
            return _svg(*draw(name, *arguments, **more))

    return drawing


def _bins(x, n):
    """Means of consecutive parts of `[m]`, at most n of them: a long run's file stays small."""
    return np.array([part.mean() for part in np.array_split(x, min(n, len(x)))])


@_pictures
def curve(name, title, steps, values, around=None, dots=False):
    """One figure along the training. around: half the width of a band; dots: few values, each of them marked."""
    figure, axes = _figure(HEIGHT)
    steps, values = np.asarray(steps, float), np.asarray(values, float)
    alt = f"{title}: {values[0]:.3g} at step {steps[0]:.0f}, {values[-1]:.3g} at step {steps[-1]:.0f}"
    alt += f"; lowest {values.min():.3g}, highest {values.max():.3g}"
    x, y = _bins(steps, POINTS), _bins(values, POINTS)
    if dots or len(y) < 10:
        axes.plot(x, y, color=ACCENT, linewidth=2, marker="o", markersize=5, clip_on=False)
    else:
        width = max(len(y) // 40, 2)
        smooth = np.array([y[max(0, i - width) : i + width + 1].mean() for i in range(len(y))])
        if around is not None:
            band = _bins(np.asarray(around, float), POINTS)
            axes.fill_between(x, smooth - band, smooth + band, color=ACCENT, alpha=0.14, linewidth=0)
        axes.plot(x, y, color=ACCENT, linewidth=1, alpha=0.35)
        axes.plot(x, smooth, color=ACCENT, linewidth=2)
    axes.margins(x=0.02, y=0.12)
    if np.ptp(values) <= 1e-6 * abs(values).max():  # a constant: its own axis would show rounding
        axes.set_ylim(min(0, 2 * values[0]), max(0, 2 * values[0]) or 1)
    axes.locator_params(axis="y", nbins=4)
    axes.locator_params(axis="x", nbins=5, integer=True)
    axes.ticklabel_format(axis="y", useOffset=False, scilimits=(-3, 5))
    axes.yaxis.get_offset_text().set_color(MUTED)
    axes.grid(axis="y", color=LINE, linewidth=1)
    axes.set_axisbelow(True)
    axes.set_position((0.145, 0.13, 0.825, 0.80))
    return figure, name, alt


@_pictures
def embedding_map(name, title, points):
    """Embeddings on two components: a filled dot per query, a ring per positive, a line between those that belong together."""
    figure, axes = _figure(WIDTH)
    pairs, apart = {}, []
    for point in points:
        pairs.setdefault(point["row"], []).append((point["x"], point["y"]))
    for places in pairs.values():
        if len(places) == 2:
            (a, b), (c, d) = places
            axes.plot([a, c], [b, d], color=MUTED, linewidth=1, alpha=0.6, zorder=1)
            apart.append(np.hypot(a - c, b - d))
    x, y = (np.array([point[axis] for point in points]) for axis in "xy")
    ring = np.array([point["role"] == "positive" for point in points])
    axes.scatter(x[~ring], y[~ring], s=34, color=ACCENT, linewidth=0, zorder=3)
    axes.scatter(x[ring], y[ring], s=52, facecolor="none", edgecolor=INK, linewidth=1.3, zorder=2)
    axes.set_aspect("equal", "datalim")
    axes.margins(0.06)
    axes.set_xticks([])
    axes.set_yticks([])
    axes.set_position((0.01, 0.01, 0.98, 0.98))
    alt = f"{title}: {len(points)} embeddings"
    if apart:
        size = np.hypot(np.ptp(x), np.ptp(y)) or 1
        alt += f"; a query and its positive are {np.mean(apart) / size:.0%} of the picture's diagonal apart, on average"
    return figure, name, alt
