"""Which words carry a cosine: an embedding as the sum of its words, and the command `explain`.

An embedding is a sum over tokens, scaled to unit length. So a cosine is a sum over tokens, too. With h_t the hidden
states of a's counted tokens (Eq. 11), and a^, b^ the embeddings of a and b,

    a^ = sum_t h_t / |sum_s h_s|                  a part per token: `token_parts`
    cos(a, b) = a^ . b^ = sum_t (part_t . b^)     a share per token: `compare`

Nothing is approximated: there is no gradient, no second model, and no text is read with words left out. A word's part is
the sum of its tokens' parts. A share says where the vector comes from. It does not say what would happen without the
word: the hidden state of each token depends on all tokens before it.

Shapes: L tokens that count, n words, D hidden size, N samples.
"""

import argparse
import bisect
import contextlib
import itertools
import json
import os
import re
import shutil
import sys
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F

from evaluation.encoder import encode_texts, token_batches
from evaluation.render import render
from plumbing.data import read_texts
from plumbing.errors import GraceError
from plumbing.run import checkpoints, newest_checkpoint, write_atomically
from policy import Policy
from rollout import sample, uniforms

PARTS = ("text", "template", "rationale")
NOTES = {  # what a share means where the embedding is not a mean
    "max": "Maximum pooling: each channel of the embedding belongs to the one token that has its largest value.",
    "eos": "End-token pooling: the embedding is the last token's state, so that token has the whole cosine.",
}
# A word: letters and digits with what joins them, one character of a script without spaces, or punctuation.
UNSPACED = "\u0e00-\u0eff\u3040-\u30ff\u3400-\u9fff"
WORD = re.compile(rf"[{UNSPACED}]|(?:(?![{UNSPACED}])\w)+(?:['’-]\w+)*|[^\w\s]+")

# ---------------------------------------------------------------- an embedding as a sum


def token_parts(hidden, pooling):
    """Each counted token's part of the unit embedding: they sum to it. `[L, D] -> [L, D]`, float64."""
    hidden = hidden.double()
    if pooling == "max":
        hidden = hidden * F.one_hot(hidden.argmax(0), len(hidden)).T
    if pooling == "eos":
        hidden = hidden * (torch.arange(len(hidden)) == len(hidden) - 1)[:, None]
    return hidden / hidden.sum(0).norm()


@dataclass
class Split:
    """A text's embedding as the sum of its words'."""

    text: str
    rationale: str
    words: list  # [n] of (word, part), in order
    vectors: np.ndarray  # [n, D] float64

    @property
    def embedding(self):
        """`[D]`, unit length."""
        return self.vectors.sum(0)


def split(policy, texts, by_token=False, tokens_per_batch=8192):
    """Each text's embedding, with its greedy rationale, as a sum over words. `-> [Split]`.

    by_token: over tokens. A text is read twice: once by the sampler, once with all hidden states kept.
    """
    splits = {}
    for indices in token_batches(texts, tokens_per_batch, policy):
        for i, one in zip(indices, _split_batch(policy, [texts[i] for i in indices], by_token)):
            splits[i] = one
    return [splits[i] for i in range(len(texts))]


@torch.inference_mode()
def _split_batch(policy, texts, by_token):
    prompts, tokenizer = policy.template(texts), policy.tokenizer
    rollouts = sample(policy, prompts)
    ids, mask, counted = (
        torch.cat(x, 1)
        for x in (
            (prompts.ids, rollouts.ids[:, 0]),
            (prompts.mask, rollouts.mask[:, 0]),
            (prompts.counted, rollouts.mask[:, 0]),
        )
    )
    _, to_pool, _ = policy.prefill(ids, mask, prompts.n_shared)
    counted = counted[:, prompts.n_shared :].bool()
    sizes = zip(*(x.sum(1).tolist() for x in (prompts.mask, prompts.counted, prompts.text)))
    for i, (text, size, (rationale,)) in enumerate(zip(texts, sizes, rollouts.rationales())):
        words = [*_prompt_words(policy.template, text, *size, by_token), *_rationale_words(tokenizer, rationale, by_token)]
        parts = token_parts(to_pool[i][counted[i]].cpu(), policy.reading.pooling)
        lengths = [n for _, _, n in words]
        vectors = torch.stack([part.sum(0) for part in parts.split(lengths)]).numpy()
        shown = tokenizer.decode(rationale, skip_special_tokens=True).strip()
        yield Split(text, shown, [word[:2] for word in words], vectors)


def _prompt_words(prompts, text, n_kept, n_counted, n_text, by_token):
    """`(word, part, number of tokens)` of a prompt's counted tokens. The three numbers are the prompt's, in tokens."""
    string, n_after = prompts.render(text), n_counted - n_text
    offsets = prompts.tokenizer(string, add_special_tokens=False, return_offsets_mapping=True)["offset_mapping"]
    offsets = offsets[: n_kept - n_after] + offsets[len(offsets) - n_after :]  # a long text has lost its end
    offsets = offsets[n_kept - n_counted :]
    first, last = len(prompts.prefix), len(string) - len(prompts.suffix)
    in_text = [(max(start, first), min(end, last)) for start, end in offsets[:n_text]]  # a token may straddle a boundary
    yield from _words(string, in_text, "text", by_token)
    yield from _words(string, offsets[n_text:], "template", by_token)


def _rationale_words(tokenizer, ids, by_token):
    """`(word, part, number of tokens)` of a rationale. Where each token ends is read off the decoded beginnings."""
    beginnings = [tokenizer.decode(ids[:n], clean_up_tokenization_spaces=False) for n in range(1, len(ids) + 1)]
    # A token may end inside a character, which is then decoded as a replacement character until the next token completes it.
    ends = [*(len(string.rstrip("\ufffd")) for string in beginnings[:-1]), len(beginnings[-1])]
    ends = list(itertools.accumulate(ends, max))
    yield from _words(beginnings[-1], list(zip([0, *ends], ends)), "rationale", by_token)


def _words(string, spans, part, by_token):
    """Consecutive tokens, by their spans of the string, to `(word, part, number of tokens)`."""
    ends = [match.end() for match in WORD.finditer(string)]
    # A token belongs to the word that its first character is in, or, in a gap, to the next word.
    place = [n if by_token else bisect.bisect_right(ends, start) for n, (start, _) in enumerate(spans)]
    for _, members in itertools.groupby(range(len(spans)), key=place.__getitem__):
        members = list(members)
        piece = string[spans[members[0]][0] : spans[members[-1]][1]]
        yield piece.strip() or piece, part, len(members)


# ---------------------------------------------------------------- a cosine as a sum


def compare(a, b):
    """Two `Split`s to their cosine and each word's share of it: `{"cosine", "a": [{"text", "part", "share"}], "b": ...}`.

    The shares of a sum to the cosine, and so do those of b.
    """

    def shares(one, other):
        values = one.vectors @ other.embedding
        return [{"text": word, "part": part, "share": float(x)} for (word, part), x in zip(one.words, values)]

    return {"cosine": float(a.embedding @ b.embedding), "a": shares(a, b), "b": shares(b, a)}


def subtotals(shares):
    """The shares by part: `{"text": x, "template": x, "rationale": x}`."""
    return {part: sum(s["share"] for s in shares if s["part"] == part) for part in PARTS}


def spread(policy, texts, n, temperature, seed=0):
    """How far the cosine of two texts spreads over n sampled rationales of each: all n x n pairs.

    Returns mean, standard deviation, and the worst and the best pair as `(cosine, rationale of a, rationale of b)`.
    """
    uniform = uniforms(seed, 2, n, policy.reading.max_new_tokens, device=policy.device)
    rollouts = sample(policy, policy.template(texts), n, temperature, uniform)
    one, two = rollouts.embeddings.double().cpu()
    cosines = one @ two.T  # [N, N]
    a, b = (policy.tokenizer.batch_decode(group, skip_special_tokens=True) for group in rollouts.rationales())
    pair = lambda at: (float(cosines.flatten()[at]), a[at // n].strip(), b[at % n].strip())
    worst, best = pair(int(cosines.argmin())), pair(int(cosines.argmax()))
    mean, std = float(cosines.mean()), float(cosines.std(correction=0))
    return {"n": n, "temperature": temperature, "mean": mean, "std": std, "worst": worst, "best": best}


# ---------------------------------------------------------------- which model


def model_folder(source):
    """What to load for --model: the folder or hub id itself, or, while a run is training there, its newest whole checkpoint."""
    if not os.path.isdir(source) or os.path.isfile(os.path.join(source, "summary.json")):
        return source
    weights = [os.path.join(source, name) for name in os.listdir(source) if name.endswith(".safetensors")]
    newest = max(map(os.path.getmtime, weights), default=0)
    if any(os.path.getmtime(folder) > newest for folder in checkpoints(source)):
        with contextlib.redirect_stdout(sys.stderr):  # it names damaged checkpoints; stdout may be JSON
            return newest_checkpoint(source)
    if not weights and os.path.isfile(os.path.join(source, "metrics.jsonl")):
        raise GraceError(f"{source}: the run has not saved a model yet; --save-every or --save-minutes say when it does")
    return source


def load_newest(source, device=None, dtype="float32", **reading):
    """The policy of a folder or hub id, or of the run that is training in that folder; says which on stderr."""
    if dtype == "bfloat16" and not (device or ("cuda" if torch.cuda.is_available() else "cpu")).startswith("cuda"):
        raise GraceError("--dtype bfloat16 is a compute type for CUDA; use float32 here")
    for attempt in range(3):
        try:
            folder = model_folder(source)
            training = folder != source
            # A run in training keeps the GPU to itself: what is taken from its memory there could stop it.
            best = "cuda" if torch.cuda.is_available() and (dtype == "bfloat16" or not training) else "cpu"
            if training:
                print(f"{source}: not finished; this is its checkpoint {os.path.basename(folder)}", file=sys.stderr)
            return Policy.load(folder, device or best, dtype, **reading)
        except (GraceError, OSError):
            # A run keeps two checkpoints. One that was deleted while it was being read has a successor by now.
            if attempt == 2 or not checkpoints(source):
                raise


# ---------------------------------------------------------------- the command


def explain(arguments):
    """Which words carry the cosine of two texts; of more texts, which are nearest to the first, and why."""
    parser = argparse.ArgumentParser("grace.py explain", description=explain.__doc__)
    parser.add_argument("--model", required=True, help="checkpoint folder, hub id, or the --out of a run in training")
    parser.add_argument("texts", nargs="+", help="two texts, or one and those that it is compared with")
    parser.add_argument("--among", help="a file of further texts, one per line, or jsonl or csv with a column `text`")
    parser.add_argument("--nearest", type=int, default=3, help="how many neighbours of the first text to show [3]")
    parser.add_argument("--json", action="store_true", help="the shares as JSON: cosine, a, b")
    parser.add_argument("--html", metavar="FILE", help="write a page that shows the same")
    parser.add_argument("--tokens", action="store_true", help="a share per token instead of per word")
    parser.add_argument("--samples", type=int, default=0, metavar="N", help="the cosine over N sampled rationales of each text")
    parser.add_argument("--temperature", type=float, default=0.7, help="of the samples [0.7]")
    parser.add_argument("--seed", type=int, default=0, help="of the samples [0]")
    parser.add_argument("--max-new-tokens", type=int, help="the longest rationale")
    parser.add_argument("--device", help="cpu, cuda, ...")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32", help="compute type [float32]")
    args = parser.parse_args(arguments)
    among = [row["text"] for row in read_texts(args.among) if row["text"] != args.texts[0]] if args.among else []
    texts = [args.texts[0], *dict.fromkeys([*args.texts[1:], *among])]
    pair = len(texts) == 2
    if len(texts) < 2:
        raise GraceError("explain compares texts: give two or more, or --among FILE")
    if args.json and (args.samples or args.html or not pair):
        raise GraceError("--json is for the shares of two texts, without --samples and --html")
    if args.samples and (not pair or args.samples < 2 or args.temperature <= 0):
        raise GraceError("--samples draws 2 or more rationales of each of two texts, at a --temperature above 0")
    if args.nearest < 1:
        raise GraceError("--nearest: give 1 or more")
    policy = load_newest(args.model, args.device, args.dtype, max_new_tokens=args.max_new_tokens)
    others = texts[1:] if pair else nearest(policy, texts, args.nearest)
    first, *rest = split(policy, [texts[0], *others], args.tokens)
    compared = [{**compare(first, other), "one": first, "two": other} for other in rest]
    if args.json:
        print(json.dumps({name: compared[0][name] for name in ("cosine", "a", "b")}, indent=1))
        return
    drawn = spread(policy, texts, args.samples, args.temperature, args.seed) if args.samples else None
    values = dict(compared=compared, drawn=drawn, note=NOTES.get(policy.reading.pooling), n_texts=len(texts))
    if args.html:
        write_atomically(args.html, render("explain.html", model=args.model, subtotals=subtotals, **values))
        print(f"{args.html} shows it")
    print(show(**values, colour=sys.stdout.isatty() and "NO_COLOR" not in os.environ))


def nearest(policy, texts, n):
    """The n texts that are nearest to the first, nearest first."""
    vectors = encode_texts(policy, texts).vectors
    order = np.argsort(-(vectors[1:] @ vectors[0]), kind="stable")[:n]
    return [texts[1 + i] for i in order]


def show(compared, drawn, note, n_texts, colour):
    """The comparisons for a terminal. colour: each word is shaded by its share."""
    lines = [note, ""] if note else []
    if n_texts > 2:
        lines += [f"The {len(compared)} nearest of {n_texts - 1} texts:", ""]
    for one in compared:
        lines.append(f"cosine {one['cosine']:.3f}")
        most = max(abs(s["share"]) for s in one["a"] + one["b"]) or 1
        for name in "ab":
            totals = subtotals(one[name])
            for part in PARTS:
                words = [s for s in one[name] if s["part"] == part]
                if words:
                    shaded = [(_visible(s["text"]), s["share"] / most if colour else 0) for s in words]
                    lines.append(f"  {name if part == 'text' else ' '}  {part:<10}{totals[part]:7.3f}  {_wrapped(shaded, 24)}")
            best = sorted((s for s in one[name] if s["part"] != "template"), key=lambda s: -s["share"])[:5]
            lines.append(f"     {'most':<19}" + ", ".join(f"{_visible(s['text'])} {s['share']:.3f}" for s in best))
        lines.append("")
    if drawn:
        lines.append(
            f"{drawn['n']} sampled rationales of each text, all pairs: cosine {drawn['mean']:.3f} +- {drawn['std']:.3f}, "
            f"from {drawn['worst'][0]:.3f} to {drawn['best'][0]:.3f}"
        )
        for name in ("best", "worst"):
            cosine, a, b = drawn[name]
            lines += [f"  {name:<6}{cosine:6.3f}  a  {_visible(a) or '(nothing)'}", f"{'':14}  b  {_visible(b) or '(nothing)'}"]
    return "\n".join(lines).rstrip()


def _visible(word):
    """A word on one line and without control characters: a terminal would obey them."""
    return re.sub(r"[\x00-\x1f\x7f-\x9f]", "\N{OPEN BOX}", word.replace("\n", "\N{DOWNWARDS ARROW WITH CORNER LEFTWARDS}"))


def _wrapped(words, indent):
    """`(word, strength)` in lines of the terminal's width, the second and later ones indented."""
    width, column, lines = shutil.get_terminal_size((100, 24)).columns - indent, 0, [[]]
    for word, strength in words:
        if column and column + len(word) > width:
            lines.append([])
            column = 0
        lines[-1].append(_shade(word, strength))
        column += len(word) + 1
    return ("\n" + " " * indent).join(" ".join(line) for line in lines)


def _shade(word, strength):
    """A word on green, or on red where its share is negative; strength in [-1, 1]."""
    if abs(strength) < 0.05:
        return word
    level = round(60 + 140 * abs(strength))
    red, green = (level // 4, level) if strength > 0 else (level, level // 4)
    ink = 16 if strength > 0.6 else 231  # black on bright, white on dark
    return f"\x1b[48;2;{red};{green};{level // 3}m\x1b[38;5;{ink}m{word}\x1b[0m"
