"""HTML for the page of a run: one style, words shaded by their share of a cosine, and curves.

A page is one file that opens without a network and runs no script. Whatever comes from a text, a setting or a model
passes through `escape`.
"""

import itertools
from html import escape

import numpy as np

STYLE = """
:root { --paper: #fcfcfa; --ink: #1d2327; --muted: #5f6b73; --line: #e4e6e4; --accent: #0f766e; }
* { box-sizing: border-box; }
body {
  margin: 0 auto; padding: 3rem clamp(1rem, 4vw, 3rem) 6rem; max-width: 76rem; background: var(--paper); color: var(--ink);
  font: 16px/1.6 system-ui, -apple-system, "Segoe UI", Roboto, "Noto Sans", sans-serif; overflow-wrap: anywhere;
}
h1 { font-size: clamp(1.7rem, 4vw, 2.4rem); line-height: 1.2; font-weight: 650; margin: 0 0 .5rem; }
h2 { font-size: 1.35rem; font-weight: 620; margin: 4rem 0 .3rem; }
h3 { font-size: 1rem; font-weight: 620; margin: 0 0 .4rem; }
p { margin: .4rem 0; }
.lead { max-width: 46rem; margin-bottom: 1.3rem; }
.lead, .label, .what, figcaption, thead th { color: var(--muted); }
.label, .what, .facts, .steps table, figcaption, thead th { font-size: .86rem; line-height: 1.5; }
.kicker { color: var(--accent); font-size: .82rem; font-weight: 620; letter-spacing: .08em; text-transform: uppercase; }
.card { background: #fff; border: 1px solid var(--line); border-radius: 12px; padding: 1.1rem 1.25rem; min-width: 0; }
.card + .card { margin-top: 1.1rem; }
.grid, .two { display: grid; gap: 1.1rem; grid-template-columns: repeat(auto-fill, minmax(min(100%, 19rem), 1fr)); }
.two { gap: 1rem 1.5rem; grid-template-columns: repeat(auto-fit, minmax(min(100%, 24rem), 1fr)); }
.grid > .card, .two > .card { margin: 0; }
table { border-collapse: collapse; width: 100%; font-variant-numeric: tabular-nums; }
th, td { text-align: left; vertical-align: top; padding: .5rem .8rem .5rem 0; border-bottom: 1px solid var(--line); }
thead th, tbody th { font-weight: 500; }
tbody tr:last-child > * { border-bottom: 0; }
.good { color: var(--accent); font-weight: 650; }
.what { display: block; font-weight: 400; }
.facts { display: flex; flex-wrap: wrap; gap: .1rem 1.4rem; color: var(--muted); }
.facts b, h3 b { color: var(--ink); font-weight: 600; }
.numbers td, .numbers th + th { text-align: right; overflow-wrap: normal; }
.steps th:first-child { white-space: nowrap; width: 1%; padding-right: 1rem; color: var(--muted); }
h3 .label { float: right; font-weight: 400; }
mark { background: #cbe3df; color: inherit; border-radius: 4px; padding: 0 .15em; }
.two .label { margin: .6rem 0 0; }
.words { line-height: 1.9; margin: 0 0 .6rem; }
.w { border-radius: 4px; padding: .1em .2em; }
.neg { border-bottom: 1px dotted var(--muted); border-radius: 0; }
summary { cursor: pointer; color: var(--accent); }
figure { margin: 0; }
svg { display: block; width: 100%; font-size: 11px; fill: var(--muted); }
polyline { fill: none; stroke: var(--accent); stroke-width: 2; stroke-linejoin: round; }
polyline.raw { stroke-width: 1; opacity: .3; }
svg line { stroke: var(--line); }
"""


def document(title, body):
    """A whole page. title: a text; body: HTML."""
    return f"""<!doctype html>
<html lang="en">
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{escape(title)} · GRACE</title>
<style>{STYLE}</style>
<p class="kicker">GRACE · one run</p>
<h1>{escape(title)}</h1>
{body}
</html>
"""


def comparison(compared, headings):
    """What `explain.compare` returns, as two columns of words. The stronger the shade, the larger the share."""
    most = max(abs(s["share"]) for s in compared["a"] + compared["b"]) or 1
    sides = (f"<div><h3>{heading}</h3>{_side(compared[name], most)}</div>" for name, heading in zip("ab", headings))
    return f'<div class="two">{"".join(sides)}</div>'


def _side(shares, most):
    """One text's words by part: text, template, rationale, each with its sum."""
    lines = []
    for part, members in itertools.groupby(shares, key=lambda s: s["part"]):
        members = list(members)
        words = " ".join(_word(s, s["share"] / most) for s in members)
        lines += [f'<p class="label">{part} {sum(s["share"] for s in members):.3f}</p>', f'<p class="words">{words}</p>']
    return "\n".join(lines)


def _word(share, strength):
    kinds = "w" + " neg" * (strength < -0.1)
    shade = f"background:rgba(15,118,110,{0.42 * max(strength, 0):.2f})"
    text = escape(share["text"].replace("\n", "↵"))
    return f'<span class="{kinds}" style="{shade}" title="{share["share"]:.3f}">{text}</span>'


def curve(steps, values, label):
    """One figure along the training as SVG: as it was measured in pale, and its running mean. `label` is read aloud."""
    points = np.array([(s, v) for s, v in zip(steps, values) if np.isfinite(v)], float)
    points = np.array([part.mean(0) for part in np.array_split(points, min(len(points), 300))])  # [n, 2], a small file
    width = len(points) // 20
    smooth = [(s, points[max(0, i - width) : i + width + 1, 1].mean()) for i, (s, _) in enumerate(points)]
    first, last = points[0, 0], points[-1, 0]
    low, high = points[:, 1].min(), points[:, 1].max()
    if high - low < 1e-6 * max(abs(high), 1e-6):  # a constant, and what rounding makes of it
        low, high = low - 0.5, high + 0.5
    x = lambda step: 44 + 270 * (step - first) / ((last - first) or 1)
    y = lambda value: 118 - 108 * (value - low) / (high - low)

    def line(points, kind=""):
        return f'<polyline class="{kind}" points="{" ".join(f"{x(s):.1f},{y(v):.1f}" for s, v in points)}"/>'

    grid = "".join(
        f'<line x1="44" x2="314" y1="{at}" y2="{at}"/><text x="38" y="{at + 4}" text-anchor="end">{value:.3g}</text>'
        for at, value in ((10, high), (64, (low + high) / 2), (118, low))
    )
    axis = f'<text x="44" y="136">{steps[0]:.0f}</text><text x="314" y="136" text-anchor="end">step {steps[-1]:.0f}</text>'
    curves = line(points, "raw") * (width > 0) + line(smooth)
    return f'<svg viewBox="0 0 320 142" role="img" aria-label="{escape(label)}">{grid}{axis}{curves}</svg>'
