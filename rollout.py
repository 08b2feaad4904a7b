"""Rollouts: sampling rationales, and scoring given ones for the update (Eq. 9 to 12, 20).

One idea carries this file: every token is read as few times as possible. The instruction is read once
per batch and a prompt once for its K rollouts, when sampling and again, with gradients, in the update. The
decoding loop yields everything that makes up a rollout: its token ids, their log-probabilities at the
temperature at which they were drawn, and the pooled embedding of text and rationale. Ids are never
turned into text and back, and the model is never run a second time over what it has just written.

The library's `generate()` does not feed the last sampled token, so that token has no hidden state there. Eq. 11
counts it, so the loop here feeds every token it samples, the end token included.

Shapes: N prompts (one group of rollouts each), P prompt positions, K rollouts per prompt, T new tokens
(right-padded), D hidden size, V vocabulary; B instances, M hard negatives per instance.
"""

from dataclasses import dataclass, fields
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint

from plumbing import ranks
from pool import fold, unit, with_rationale

LOGITS = 2**25  # logits held at a time when scoring: 134 MB in float32; four times as many on CUDA
NO_GRADIENTS = 8  # sampling may hold so many times the tokens of an update's micro-batch
WRITERS = "query", "text", "anchor"  # roles that write whatever `Reading.documents` says
ANCHOR_TEMPERATURE = {"paper": 0.5, "infonce": 1.0}  # of the roles that are not trained; the first as in the released code


@dataclass
class Rollouts:
    """K rationales of each of N prompts, and what the decoding loop recorded with them.

    Two rationales of one prompt, the first ended by the end token 5, the second cut off after T = 4 tokens:

        ids    [[[12, 31,  5,  0], [12, 44, 17, 20]]]       finished  [[True, False]]
        mask   [[[ 1,  1,  1,  0], [ 1,  1,  1,  1]]]
    """

    prompt_ids: torch.Tensor  # [N, P]
    prompt_mask: torch.Tensor  # [N, P]
    counted: torch.Tensor  # [N, P], the prompt's tokens that count in the embedding
    text: torch.Tensor  # [N, P], the text's tokens (prompt.py)
    cut: torch.Tensor  # [N] bool, the prompt's text was over the limit
    ids: torch.Tensor  # [N, K, T]
    mask: torch.Tensor  # [N, K, T]
    logprobs: torch.Tensor  # [N, K, T], 0 where masked
    embeddings: torch.Tensor  # [N, K, D], unit length
    finished: torch.Tensor  # [N, K], ended by an end token
    prompt_embeddings: torch.Tensor  # [N, D], unit length: the prompts alone, without a rationale
    n_shared: int = 0  # the prompts' first positions that are the same in every row

    def __getitem__(self, groups):
        """Some of the groups (a slice or indices), without the padding that none of them needs."""
        part = Rollouts(*(getattr(self, f.name)[groups] for f in fields(self)[:-1]), self.n_shared)
        used, T = part.prompt_mask.any(0), max(1, int(part.mask.sum(-1).max()))
        for name in ("prompt_ids", "prompt_mask", "counted", "text"):
            setattr(part, name, getattr(part, name)[:, used])
        for name in ("ids", "mask", "logprobs"):
            setattr(part, name, getattr(part, name)[:, :, :T])
        return part

    def __len__(self):
        return len(self.ids)

    def rationales(self):
        """The rationales as lists of ids, without padding: `[N][K]`."""
        return [[row[:n] for row, n in zip(*group)] for group in zip(self.ids.tolist(), self.mask.sum(-1).tolist())]


def join(parts):
    """The rollouts of several parts of a batch as one, padded to the longest rationale."""
    T = max(part.ids.shape[2] for part in parts)

    def joined(name):
        tensors = [getattr(part, name) for part in parts]
        return torch.cat([F.pad(x, (0, T - x.shape[2])) if name in ("ids", "mask", "logprobs") else x for x in tensors])

    return Rollouts(*(joined(f.name) for f in fields(Rollouts)[:-1]), parts[0].n_shared)


# ---------------------------------------------------------------- sampling


def tempered(logits, temperature):
    """Log-probabilities `[..., V]` at a temperature; greedy decoding, temperature 0, is scored at 1."""
    return torch.log_softmax(logits if temperature in (0, 1) else logits / temperature, -1)


def draw(logits, temperature, uniform=None):
    """One token per row and its log-probability. `[R, V], t, [R] -> [R], [R]`.

    uniform: numbers in [0, 1), one per row; None where the temperature is 0. No top-p and no top-k: what is sampled
    from must be what is scored.
    """
    logprobs = tempered(logits, temperature)
    token = logprobs.argmax(-1, keepdim=True) if temperature == 0 else gumbel_max(logprobs.exp(), uniform)
    return token[:, 0], logprobs.gather(1, token)[:, 0]


def gumbel_max(weights, uniform):
    """An index per row, drawn in proportion to its weight. `[R, V], [R] -> [R, 1]`. Never one of weight 0.

    The largest of log w + Gumbel noise is such a draw. It is taken in three levels, first among n = ceil(cbrt(V)) blocks of
    n * n weights, then among the n parts of that block, then inside the part, so that 3 n numbers of noise are enough.

    So a token depends on `uniform` alone, not on how the batch is split, which only rounds the weights in another way. That
    changes a draw where two candidates are equal but for rounding: at V = 49,152, with logits changed by 1e-6, none of 100,000
    draws. The inverse of the running sum of the weights has V boundaries to fall over: 102 of the same draws changed.
    """
    R, V = weights.shape
    n = next(n for n in range(round(V ** (1 / 3)), V + 1) if n**3 >= V)
    noise = -(-hashed(uniform, 3 * n).log()).log().view(R, 3, n)
    tree, rows = F.pad(weights, (0, n**3 - V)).view(R, n, n, n), torch.arange(R, device=weights.device)
    block = (tree.sum((2, 3)).log() + noise[:, 0]).argmax(1)
    tree = tree[rows, block]  # [R, n, n]
    part = (tree.sum(2).log() + noise[:, 1]).argmax(1)
    last = (tree[rows, part].log() + noise[:, 2]).argmax(1)
    return ((block * n + part) * n + last)[:, None]


def hashed(uniform, n):
    """n numbers in (0, 1) from each given number, by a hash (MurmurHash3's last step). `[R] -> [R, n]`, float32."""
    x = (uniform * 2**24).long()[:, None] * n + torch.arange(n, device=uniform.device)
    for shift, factor in ((16, 0x85EBCA6B), (13, 0xC2B2AE35)):
        x = ((x ^ (x >> shift)) * factor) & 0xFFFFFFFF
    return (((x ^ (x >> 16)) >> 9) + 0.5) / 2**23  # 23 bits: a float32 next to 1 has no more


def uniforms(seed, *shape, device=None):
    """Numbers in [0, 1), `[*shape]` float32, from a seed of one or more integers: the same on every device.

    All randomness of a batch is drawn here, before the first token: one number per text, rollout and position. So what
    is sampled depends on these alone, not on how the work is split, packed or repeated.
    """
    return torch.from_numpy(np.random.default_rng(seed).random(shape, dtype=np.float32)).to(device)


@torch.no_grad()
def sample(policy, prompts, K=1, temperature=0.0, uniform=None, writes=None):
    """K rationales of each prompt, a token at a time, and the embeddings that come with them (Eq. 9 to 12). `-> Rollouts`.

    uniform: `uniforms(seed, N, K, max_new_tokens)`; None where the temperature is 0. A rollout that is still being written
    after `max_new_tokens` stops there, not finished. writes: `[N]` bool; where it is False the rationale is empty
    and finished from the start. T is the length of the longest rationale, at least 1.
    """
    N, pooling = len(prompts.ids), policy.reading.pooling
    hidden, to_pool, cache = policy.prefill(prompts.ids, prompts.mask, prompts.n_shared)  # each prompt is read once
    prompt = fold(None, to_pool, prompts.counted[:, prompts.n_shared :], pooling)  # [N, D]
    last, state = (x.repeat_interleave(K, 0) for x in (hidden[:, -1], prompt))  # [N*K, D]; every prompt ends at -1
    decoder = policy.decoder(cache, prompts.mask, K)
    writing = torch.ones(N * K, dtype=torch.bool, device=last.device)
    writing = writing if writes is None else writes.repeat_interleave(K)
    written = []
    for t in range(policy.reading.max_new_tokens):
        token, logprob = draw(policy.logits(last), temperature, None if uniform is None else uniform.flatten(0, 1)[:, t])
        written.append((token, logprob, writing))
        last, to_pool = decoder.step(token, writing)  # the end token is fed, too: Eq. 11 counts it
        state = fold(state, to_pool[:, None], writing[:, None], pooling)
        writing = writing & (token[:, None] != policy.end_ids).all(1)
        if decoder.all_ended(writing):
            break
    ids, logprobs, mask = (torch.stack(x, 1) for x in zip(*written))  # [N*K, T]
    T = max(1, int(mask.sum(1).max()))
    by_group = lambda x: x.view(N, K, *x.shape[1:])
    ids, logprobs, mask = (by_group(x[:, :T]) for x in (ids, logprobs, mask))
    embeddings = with_rationale(state, prompt.repeat_interleave(K, 0), pooling)
    return Rollouts(
        prompts.ids, prompts.mask, prompts.counted, prompts.text, prompts.cut, ids * mask, mask.long(), logprobs.where(mask, 0),
        by_group(embeddings), by_group(~writing), unit(prompt), prompts.n_shared,
    )  # fmt: skip


# ---------------------------------------------------------------- a batch's texts by role


@dataclass
class Batch:
    """What one step knows about its B instances, filled in phase by phase."""

    texts: dict  # {role: list of texts}; negatives instance by instance, M each
    same_text: torch.Tensor  # [B, B] bool, True where two instances share a text
    rollouts: Rollouts = None  # of the trained roles, N groups in the order of `config.roles`
    embeddings: dict = None  # {role: [B, K or 1, D]}, negatives [B, M, K or 1, D]
    prompt_embeddings: dict = None  # the same of the prompts alone, without a rationale: [B, 1, D], [B, M, 1, D]


def make_batch(rows, anchored=False, device=None):
    """Rows as a `Batch`. anchored: an unsupervised text also plays the anchor (Eq. 20)."""
    if "text" in rows[0]:
        texts = {"text": [row["text"] for row in rows]}
        if anchored:
            texts["anchor"] = texts["text"]
    else:
        texts = {role: [row[role] for row in rows] for role in ("query", "positive")}
        texts["negative"] = [text for row in rows for text in row["negative"]]
    members = [{row[role] for role in row if role != "negative"} for row in rows]  # the texts that stand for an instance
    return Batch(texts, torch.tensor([[bool(a & b) for b in members] for a in members], device=device))


def texts_of(texts, roles):
    """The roles' texts in one list, role after role: one group of rollouts each."""
    return [text for role in roles for text in texts[role]]


def split_by_role(x, texts, roles):
    """Split `[N, ...]`, one entry per text of `texts_of`, into `{role: [B, ...]}`; negatives `[B, M, ...]`."""
    parts = dict(zip(roles, x.split([len(texts[role]) for role in roles])))
    if "negative" in parts:
        B = len(texts["query"])
        parts["negative"] = parts["negative"].view(B, len(texts["negative"]) // B, *x.shape[1:])
    return parts


def roll_out(policy, texts, config, step):
    """Phase 2: K rationales per text of a trained role, one per text of the others, as anchors (Eq. 12, 20).

    Returns the trained roles' `Rollouts`, every role's embeddings and those of its prompts alone, both as `Batch` has them.
    What is drawn is a function of `config.seed` and `step`.
    """
    embeddings, alone = {}, {}
    anchors = [role for role in texts if role not in config.roles and texts[role]]
    anchored = anchors, 1, ANCHOR_TEMPERATURE[config.reward], 2
    trained = config.roles, config.rollouts, config.temperature, 1
    for roles, K, temperature, stream in [anchored, trained] if anchors else [trained]:
        seed = [config.seed, step, stream]
        writes = [role in WRITERS or policy.reading.documents == "rationale" for role in roles for _ in texts[role]]
        rollouts = sample_texts(policy, texts_of(texts, roles), K, temperature, seed, config.tokens_per_batch, writes)
        embeddings |= split_by_role(rollouts.embeddings, texts, roles)
        alone |= split_by_role(rollouts.prompt_embeddings[:, None], texts, roles)
    if not texts.get("negative", True):  # M = 0: a sum over no negatives
        B, D = len(texts["query"]), rollouts.embeddings.shape[-1]
        embeddings["negative"] = alone["negative"] = rollouts.embeddings.new_zeros(B, 0, 1, D)
    return rollouts, embeddings, alone


def sample_texts(policy, texts, K, temperature, seed, budget, writes=None):
    """`sample` for any number of texts, a few at a time. writes: a bool per text, by default True. `-> Rollouts`.

    budget: the token budget of an update's micro-batch; without gradients, `NO_GRADIENTS` times as many tokens are held. If
    there are several ranks, each samples its share, and all get everything.
    """
    prompts = policy.template(texts)
    N, P, T = *prompts.ids.shape, policy.reading.max_new_tokens
    uniform, writes = uniforms(seed, N, K, T, device=policy.device), torch.tensor(writes or [True] * N, device=policy.device)
    n = max(1, NO_GRADIENTS * budget // (P + K * T if policy.shares_prompts else K * (P + T)))
    mine = range(N)[ranks.mine(N)]
    parts = []
    for first in mine[::n]:
        at = slice(first, min(first + n, mine.stop))
        parts.append(sample(policy, prompts[at], K, temperature, uniform[at], writes[at]))
    return join(ranks.gather(join(parts)))


# ---------------------------------------------------------------- scoring, with gradients


class Scores(NamedTuple):
    """What the update's forward pass gives, all with gradients."""

    logprobs: torch.Tensor  # [N, K, T], 0 where masked
    embeddings: torch.Tensor  # [N, K, D], unit length
    prompt_embeddings: torch.Tensor  # [N, D], unit length
    text_logprobs: torch.Tensor = None  # [N], of the prompts' own tokens, where they were asked for


def token_logprobs(policy, hidden, ids, temperature=1.0, chunk=None):
    """log pi(id | hidden) of n tokens. `[n, D], [n] -> [n]`.

    The head is applied to `chunk` tokens at a time, and again in the backward pass, so no `[n, V]` tensor is ever
    held: at V = 152,000, 4,096 tokens would take 2.5 GB per copy. By default a chunk has about `LOGITS` logits,
    whatever V is; four times as many on CUDA, where small products wait for their launch.
    """
    chunk = chunk or max(1, LOGITS * (4 if hidden.is_cuda else 1) // policy.head.weight.shape[0])

    def one(hidden, ids):
        return tempered(policy.logits(hidden), temperature).gather(1, ids[:, None])[:, 0]

    if len(ids) == 0:
        return hidden.new_zeros(0)
    parts = zip(hidden.split(chunk), ids.split(chunk))
    return torch.cat([checkpoint(one, h, i, use_reentrant=False, preserve_rng_state=False) for h, i in parts])


def text_logprobs(policy, hidden, ids, counted, text):
    """Mean log-probability of a prompt's own tokens, from a prefill's states. `[N, L, D], [N, L] x 3 -> [N]`.

    Covers text and template except the first token: it is predicted by the instruction, which may have been read
    elsewhere. Of a text that is read twice both readings: by the second alone it would teach to copy.
    """
    own = (counted | text).bool()
    known = own[:, :-1] & own[:, 1:]  # the token that predicts, and the one predicted
    logprobs = token_logprobs(policy, hidden[:, :-1][known], ids[:, 1:][known])
    return logprobs.new_zeros(known.shape).masked_scatter(known, logprobs).sum(1) / known.sum(1).clamp(min=1)


def score(policy, rollouts, temperature=1.0, text=True):
    """Log-probabilities and embeddings of given rationales, with gradients: the update's forward pass. `-> Scores`.

    As in `sample`, a prompt is read once and its cache repeated K times; the gradients of the K copies add up in
    that one prefill. text: also `text_logprobs`, from the states that the prefill has anyway.
    """
    N, K, T = rollouts.ids.shape
    S, pooling = rollouts.n_shared, policy.reading.pooling
    ids, mask = rollouts.ids.view(N * K, T), rollouts.mask.view(N * K, T)
    hidden, to_pool, cache = policy.prefill(rollouts.prompt_ids, rollouts.prompt_mask, S)
    counted = rollouts.counted[:, S:]
    of_text = text_logprobs(policy, hidden, rollouts.prompt_ids[:, S:], counted, rollouts.text[:, S:]) if text else None
    of_prompt = fold(None, to_pool, counted, pooling)  # [N, D]
    last = hidden[:, -1:].repeat_interleave(K, 0)
    cache.batch_repeat_interleave(K)
    positions = rollouts.prompt_mask.sum(1).repeat_interleave(K)[:, None] + torch.arange(T, device=ids.device)
    full_mask = torch.cat([rollouts.prompt_mask.repeat_interleave(K, 0), mask], 1)
    hidden, to_pool, _ = policy.forward(ids, full_mask, positions, cache)
    before = of_prompt.repeat_interleave(K, 0)
    embeddings = with_rationale(fold(before, to_pool, mask, pooling), before, pooling)
    before = torch.cat([last, hidden[:, :-1]], 1)  # token t is predicted by the state before it
    keep = mask.bool()
    logprobs = token_logprobs(policy, before[keep], ids[keep], temperature)
    logprobs = logprobs.new_zeros(N * K, T).masked_scatter(keep, logprobs)
    return Scores(logprobs.view(N, K, T), embeddings.view(N, K, -1), unit(of_prompt), of_text)
