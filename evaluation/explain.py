"""Which words carry a cosine: an embedding as the sum of its words, and the command `explain`.

An embedding is a sum over tokens, scaled to unit length. So a cosine is a sum over tokens, too. With h_t the hidden
states of a's counted tokens (Eq. 11), and a^, b^ the embeddings of a and b,

    a^ = sum_t h_t / |sum_s h_s|                  a part per token: `token_parts`
    cos(a, b) = a^ . b^ = sum_t (part_t . b^)     a share per token: `compare`

Nothing is approximated: there is no gradient, no second model, and no text is read with words left out. A word's part is
the sum of its tokens' parts. A share says where the vector comes from. It does not say what would happen without the
word: the hidden state of each token depends on all tokens before it.

Shapes: L tokens that count, n words, D hidden size.
"""

import argparse
import bisect
import itertools
import json
import os
import re
import sys
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F

from evaluation.encoder import token_batches
from plumbing.models import pick_device
from policy import Policy
from rollout import sample

WORD = re.compile(r"\w+(?:['’-]\w+)*|[^\w\s]+")  # letters and digits with what joins them, or punctuation

# ---------------------------------------------------------------- an embedding as a sum


def token_parts(hidden, pooling, n_prompt):
    """Each counted token's part of the unit embedding: they sum to it. `[L, D] -> [L, D]`, float64.

    n_prompt: how many tokens, the first, are the prompt's; in halves each half has the same weight. Under maximum pooling each
    channel belongs to the one token that has its largest value; under end-token pooling everything belongs to the last token.
    """
    hidden = hidden.double()
    if pooling == "max":
        hidden = hidden * F.one_hot(hidden.argmax(0), len(hidden)).T
    if pooling == "eos":
        hidden = hidden * (torch.arange(len(hidden)) == len(hidden) - 1)[:, None]
    if pooling == "halves":
        hidden = torch.cat([half / half.sum(0).norm() for half in hidden.split([n_prompt, len(hidden) - n_prompt])])
    return hidden / hidden.sum(0).norm()


@dataclass
class Split:
    """A text's embedding as the sum of its words'."""

    text: str
    rationale: str
    words: list  # [n] of (word, part), in order; the parts are text, template and rationale
    vectors: np.ndarray  # [n, D] float64

    @property
    def embedding(self):
        """`[D]`, unit length."""
        return self.vectors.sum(0)


def split(policy, texts, tokens_per_batch=8192):
    """Each text's embedding, with its greedy rationale, as a sum over words. `-> [Split]`.

    A text is read twice: once by the sampler, once with all hidden states kept.
    """
    splits = {}
    for batch in token_batches(texts, tokens_per_batch, policy):
        splits |= zip(batch, _split_batch(policy, batch))
    return [splits[text] for text in texts]


@torch.inference_mode()
def _split_batch(policy, texts):
    prompts, tokenizer = policy.template(texts), policy.tokenizer
    rollouts = sample(policy, prompts)
    ids = torch.cat([prompts.ids, rollouts.ids[:, 0]], 1)
    mask = torch.cat([prompts.mask, rollouts.mask[:, 0]], 1)
    counted = torch.cat([prompts.counted, rollouts.mask[:, 0]], 1)[:, prompts.n_shared :].bool()
    _, to_pool, _ = policy.prefill(ids, mask, prompts.n_shared)
    for i, (text, n, (rationale,)) in enumerate(zip(texts, prompts.counted.sum(1).tolist(), rollouts.rationales())):
        words = [*_prompt_words(policy.template, text, n), *_rationale_words(tokenizer, rationale)]
        parts = token_parts(to_pool[i][counted[i]].cpu(), policy.reading.pooling, n)
        vectors = torch.stack([part.sum(0) for part in parts.split([n for *_, n in words])]).numpy()
        shown = tokenizer.decode(rationale, skip_special_tokens=True).strip()
        yield Split(text, shown, [word[:2] for word in words], vectors)


def _prompt_words(template, text, n_counted):
    """`(word, part, number of tokens)` of a prompt's counted tokens, of which there are n_counted."""
    string = template.render(text)
    ((_, offsets),) = template.encode([text])
    *_, (first, last) = template.readings(text)
    offsets = [(start, end) for start, end in offsets if end > first]
    lost, inside = len(offsets) - n_counted, sum(end <= last for _, end in offsets)
    offsets = offsets[: inside - lost] + offsets[inside:]  # a long text has lost its end, but for a token that straddles it
    in_text = [(max(start, first), min(end, last)) for start, end in offsets if start < last]
    yield from _words(string, in_text, "text")
    yield from _words(string, [(start, end) for start, end in offsets if start >= last], "template")


def _rationale_words(tokenizer, ids):
    """`(word, part, number of tokens)` of a rationale. Where each token ends is read off the decoded beginnings."""
    beginnings = [tokenizer.decode(ids[:n], clean_up_tokenization_spaces=False) for n in range(1, len(ids) + 1)]
    # A token may end inside a character, which is then decoded as a replacement character until the next token completes it.
    ends = [*(len(string.rstrip("\ufffd")) for string in beginnings[:-1]), len(beginnings[-1])]
    yield from _words(beginnings[-1], list(zip([0, *ends], ends)), "rationale")


def _words(string, spans, part):
    """Consecutive tokens, by their spans of the string, to `(word, part, number of tokens)`."""
    ends = [match.end() for match in WORD.finditer(string)]
    # A token belongs to the word that its first character is in, or, in a gap, to the next word.
    for _, members in itertools.groupby(spans, key=lambda span: bisect.bisect_right(ends, span[0])):
        members = list(members)
        piece = string[members[0][0] : members[-1][1]]
        yield piece.strip() or piece, part, len(members)


def compare(a, b):
    """Two `Split`s to their cosine and each word's share of it: `{"cosine", "a": [{"text", "part", "share"}], "b": ...}`.

    The shares of a sum to the cosine, and so do those of b.
    """

    def shares(one, other):
        values = one.vectors @ other.embedding
        return [{"text": word, "part": part, "share": float(x)} for (word, part), x in zip(one.words, values)]

    return {"cosine": float(a.embedding @ b.embedding), "a": shares(a, b), "b": shares(b, a)}


# ---------------------------------------------------------------- the command


def explain(arguments):
    """Which words carry the cosine of two texts."""
    parser = argparse.ArgumentParser("grace.py explain", description=explain.__doc__)
    parser.add_argument("--model", required=True, help="checkpoint folder or hub id")
    parser.add_argument("texts", nargs=2, metavar="TEXT")
    parser.add_argument("--json", action="store_true", help="the shares as JSON: cosine, a, b")
    parser.add_argument("--device", help="default: cuda, mps or cpu, the first that there is")
    args = parser.parse_args(arguments)
    compared = compare(*split(Policy.load(args.model, pick_device(args.device)), args.texts))
    colour = sys.stdout.isatty() and "NO_COLOR" not in os.environ
    print(json.dumps(compared, indent=1) if args.json else show(compared, colour))


def show(compared, colour):
    """A comparison for a terminal. colour: each word is shaded by its share."""
    lines, most = [f"cosine {compared['cosine']:.3f}"], max(abs(s["share"]) for s in compared["a"] + compared["b"]) or 1
    for name in "ab":
        for part, members in itertools.groupby(compared[name], key=lambda s: s["part"]):
            members = list(members)
            words = " ".join(_shade(_visible(s["text"]), s["share"] / most if colour else 0) for s in members)
            lines.append(f"  {name}  {part:<10}{sum(s['share'] for s in members):7.3f}  {words}")
        best = sorted((s for s in compared[name] if s["part"] != "template"), key=lambda s: -s["share"])[:5]
        lines.append(f"     {'most':<19}" + ", ".join(f"{_visible(s['text'])} {s['share']:.3f}" for s in best))
    return "\n".join(lines)


def _visible(word):
    """A word on one line and without control characters: a terminal would obey them."""
    return re.sub(r"[\x00-\x1f\x7f-\x9f]", "\N{OPEN BOX}", word)


def _shade(word, strength):
    """A word on green, or on red where its share is negative; strength in [-1, 1]."""
    if abs(strength) < 0.05:
        return word
    level = round(40 + 100 * abs(strength))
    red, green = (0, level) if strength > 0 else (level, 0)
    return f"\x1b[48;2;{red};{green};0m\x1b[38;5;231m{word}\x1b[0m"
