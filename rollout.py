"""Rollouts: sampling rationales, and scoring given ones for the update (Eq. 9 to 12, 20).

One idea carries this file: every token is read as few times as possible. The instruction is read once
a batch and a prompt once for its K rollouts, when sampling and again, with gradients, in the update. The
decoding loop yields everything that a rollout is: its token ids, their log-probabilities at the
temperature they were drawn at, and the pooled embedding of text and rationale. Ids are never turned
into text and back, and the model is never run a second time to look at what it has just written.

`generate()` does not feed the last sampled token, so that token has no hidden state there. Eq. 11
counts it, so the loop here feeds every token it samples, the end token included.

Shapes: N prompts, P prompt positions, K rollouts a prompt, T new tokens (right-padded), D hidden size,
V vocabulary.
"""

import dataclasses
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint

from guard import finite
from pool import fold, length_mask, unit

LOGITS = 2**25  # logits held at a time when scoring: 134 MB in float32


@dataclass
class Rollouts:
    """K rationales of each of N prompts, and what the decoding loop learned on the way."""

    prompt_ids: torch.Tensor  # [N, P]
    prompt_mask: torch.Tensor  # [N, P]
    counted: torch.Tensor  # [N, P]
    ids: torch.Tensor  # [N, K, T]
    mask: torch.Tensor  # [N, K, T]
    logprobs: torch.Tensor  # [N, K, T], 0 where masked
    embeddings: torch.Tensor  # [N, K, D], unit length
    finished: torch.Tensor  # [N, K], ended by an end token
    shared: int = 0  # the prompts' first positions that are the same in every row
    cut: int = 0  # prompts over the limit

    def __getitem__(self, groups):
        """Some of the groups (a slice or indices), without the padding that none of them needs."""
        part = {name: getattr(self, name)[groups] for name in self.TENSORS}
        used, T = part["prompt_mask"].any(0), int(part["mask"].sum(-1).max())
        for name in ("prompt_ids", "prompt_mask", "counted"):
            part[name] = part[name][:, used]
        for name in ("ids", "mask", "logprobs"):
            part[name] = part[name][:, :, :T]
        return Rollouts(**part, shared=self.shared)

    def __len__(self):
        return len(self.ids)

    def written(self):
        """The rationales as lists of ids, without padding: `[N][K]`."""
        return [[row[:n] for row, n in zip(*group)] for group in zip(self.ids.tolist(), self.mask.sum(-1).tolist())]


Rollouts.TENSORS = [f.name for f in dataclasses.fields(Rollouts) if f.type is torch.Tensor]


# ---------------------------------------------------------------- sampling


def tempered(logits, temperature):
    """Log-probabilities `[..., V]` at a temperature; greedy decoding, temperature 0, is scored at 1."""
    return torch.log_softmax(logits if temperature in (0, 1) else logits / temperature, -1)


def draw(logits, temperature, generator=None):
    """One token a row and its log-probability. `[N, V] -> [N], [N]`.

    No top-p and no top-k: what is sampled from must be what is scored. Inverse transform sampling needs one
    random number a row, where `torch.multinomial` draws V of them and, on a GPU, has the host wait for it.
    """
    probabilities = tempered(logits, temperature).exp()
    if temperature == 0:
        token = logits.argmax(-1, keepdim=True)
    else:
        below = probabilities.cumsum(-1)
        at = torch.rand(len(logits), 1, generator=generator, device=logits.device, dtype=logits.dtype) * below[:, -1:]
        token = torch.searchsorted(below, at, right=True).clamp(max=logits.shape[1] - 1)
    return token[:, 0], probabilities.gather(1, token)[:, 0].log()


@torch.no_grad()
def sample(policy, prompts, K=1, temperature=1.0, generator=None):
    """K rationales of each prompt: one prefill a prompt, then one token at a time (Eq. 9 to 12). `-> Rollouts`."""
    N, how = len(prompts.ids), policy.reading.pooling
    hidden, to_pool, cache = policy.prefill(prompts.ids, prompts.mask, prompts.shared)
    state = fold(None, to_pool, prompts.counted[:, prompts.shared :], how).repeat_interleave(K, 0)  # [N*K, D]
    finite("what the policy computes from a prompt", hidden[:, -1])  # nothing could be drawn from that
    last = hidden[:, -1].repeat_interleave(K, 0)  # every prompt ends at -1
    decoder = policy.decoder(cache, prompts.mask, K)
    ids, logprobs, lengths, finished, state = write(policy, decoder, last, state, K, temperature, generator)
    T = int(lengths.max())
    mask = length_mask(lengths, T)
    return Rollouts(
        prompts.ids,
        prompts.mask,
        prompts.counted,
        ids[:, :T].masked_fill(~mask, 0).view(N, K, T),
        mask.long().view(N, K, T),
        logprobs[:, :T].masked_fill(~mask, 0).view(N, K, T),
        unit(state).view(N, K, -1),
        finished.view(N, K),
        prompts.shared,
        prompts.cut,
    )


def write(policy, decoder, last, state, K, temperature, generator=None):
    """The decoding loop: each row's rationale, a token at a time, from the state before its first token.

    decoder  `.step(token [n])` feeds a token a row and returns its hidden states, for the head and to pool, `[n, 1, D]`
    last     `[n, D]` what predicts the first token; rows stand in groups of K, one group a prompt
    state    `[n, D]` the prompt's tokens, folded; each token that is fed is folded in, the end token too
    Returns ids and logprobs `[n, T]`, of which the first `lengths [n]` count, finished `[n]` and the state `[n, D]`.

    A row that draws an end token is fed that token and pooled; what it writes after that counts for nothing, until
    enough rows have ended for the batch to be packed. A row still writing after `max_new_tokens` stops there, not
    finished.
    """
    n, T, how, device = len(last), policy.reading.max_new_tokens, policy.reading.pooling, last.device
    ids = torch.zeros(n, T, dtype=torch.long, device=device)
    logprobs = torch.zeros(n, T, device=device, dtype=state.dtype)
    lengths = torch.zeros(n, dtype=torch.long, device=device)
    finished = torch.zeros(n, dtype=torch.bool, device=device)
    pooled = torch.empty_like(state)
    rows = torch.arange(n, device=device)  # where the rows of the batch belong
    writing = torch.ones(n, dtype=torch.bool, device=device)  # which of them have not ended
    for t in range(T):
        token, logprob = draw(policy.logits(last), temperature, generator)
        ids[rows, t], logprobs[rows, t] = token, logprob
        hidden, to_pool = decoder.step(token)
        state = fold(state, to_pool, writing[:, None], how)
        lengths[rows] += writing
        last = hidden[:, -1]
        writing = writing & ~torch.isin(token, policy.end_ids)
        if (t + 1) % decoder.look_every == 0:
            keep, groups = pack(writing.view(-1, K))
            if len(keep) <= decoder.pack_below * len(rows):
                pooled[rows], finished[rows] = state, ~writing
                if len(keep) == 0:
                    break
                decoder.keep(keep, groups)
                rows, state, last, writing = (x[keep] for x in (rows, state, last, writing))
                K = len(keep) // len(groups)
    pooled[rows], finished[rows] = state, ~writing
    return ids, logprobs, lengths, finished, pooled


def pack(writing):
    """Which rows go on: groups with a row still writing, as many rows of each as the busiest needs.

    `[N, K] bool -> [N' * K'], [N']`: indices of rows, those still writing first in each group, and of groups.
    """
    N, K = writing.shape
    busiest = int(writing.sum(1).max())
    groups = writing.any(1).nonzero()[:, 0]
    order = writing[groups].sort(dim=1, descending=True, stable=True).indices[:, :busiest]  # [N', K']
    return (groups[:, None] * K + order).flatten(), groups


def sample_in_parts(policy, prompts, K, temperature, generator, budget):
    """`sample`, a few prompts at a time: no more than `budget` tokens in the key-value cache (at least a prompt)."""
    P, T = prompts.ids.shape[1], policy.reading.max_new_tokens
    rows = max(1, budget // (P + K * T if policy.keeps_once else K * (P + T)))
    parts = [sample(policy, prompts[i : i + rows], K, temperature, generator) for i in range(0, len(prompts.ids), rows)]
    if len(parts) == 1:
        return parts[0]
    T, joined = max(part.ids.shape[2] for part in parts), {}
    for name in Rollouts.TENSORS:
        tensors = [getattr(part, name) for part in parts]
        if name in ("ids", "mask", "logprobs"):  # [N, K, T]: to the longest part's T
            tensors = [F.pad(x, (0, T - x.shape[2])) for x in tensors]
        joined[name] = torch.cat(tensors)
    return Rollouts(**joined, shared=prompts.shared, cut=prompts.cut)


# ---------------------------------------------------------------- scoring, with gradients


def token_logprobs(policy, hidden, ids, temperature=1.0, chunk=None):
    """log pi(id | hidden) of n tokens. `[n, D], [n] -> [n]`.

    The head is applied to `chunk` tokens at a time, and again in the backward pass, so no `[n, V]` tensor is ever
    held: at V = 152,000, 4,096 tokens would take 2.5 GB a copy. By default a chunk has about `LOGITS` logits,
    whatever V is.
    """
    chunk = chunk or max(1, LOGITS // policy.head.weight.shape[0])

    def one(hidden, ids):
        return tempered(policy.logits(hidden), temperature).gather(1, ids[:, None])[:, 0]

    if len(ids) == 0:
        return hidden.new_zeros(0)
    parts = zip(hidden.split(chunk), ids.split(chunk))
    return torch.cat([checkpoint(one, h, i, use_reentrant=False) for h, i in parts])


def text_logprobs(policy, hidden, ids, counted):
    """Mean log-probability of a prompt's own tokens, from a prefill's states. `[N, L, D], [N, L] x 2 -> [N]`.

    Of the tokens that count, text and template, each but the first: what comes before it may have been read elsewhere.
    """
    known = (counted[:, :-1] * counted[:, 1:]).bool()  # states that count, of the token before one that counts
    found = token_logprobs(policy, hidden[:, :-1][known], ids[:, 1:][known])
    return found.new_zeros(known.shape).masked_scatter(known, found).sum(1) / known.sum(1).clamp(min=1)


def score(policy, rollouts, temperature=1.0, text=False):
    """Log-probabilities `[N, K, T]` and embeddings `[N, K, D]` of given rationales, with gradients.

    The update's forward pass. As in `sample`, a prompt is read once and its cache repeated K times;
    the gradients of the K copies add up in that one prefill. With `text`, a third value: `text_logprobs`.
    """
    N, K, T = rollouts.ids.shape
    how = policy.reading.pooling
    ids, mask = rollouts.ids.view(N * K, T), rollouts.mask.view(N * K, T)
    hidden, to_pool, cache = policy.prefill(rollouts.prompt_ids, rollouts.prompt_mask, rollouts.shared)
    counted = rollouts.counted[:, rollouts.shared :]
    state = fold(None, to_pool, counted, how).repeat_interleave(K, 0)  # [N*K, D]
    said = text_logprobs(policy, hidden, rollouts.prompt_ids[:, rollouts.shared :], counted) if text else None
    last = hidden[:, -1:].repeat_interleave(K, 0)
    cache.batch_repeat_interleave(K)
    positions = rollouts.prompt_mask.sum(1).repeat_interleave(K)[:, None] + torch.arange(T, device=ids.device)
    full_mask = torch.cat([rollouts.prompt_mask.repeat_interleave(K, 0), mask], 1)
    hidden, to_pool, _ = policy.forward(ids, full_mask, positions, cache)
    embeddings = unit(fold(state, to_pool, mask, how))
    before = torch.cat([last, hidden[:, :-1]], 1)  # token t is predicted by the state before it
    keep = mask.bool()
    found = token_logprobs(policy, before[keep], ids[keep], temperature)
    logprobs = found.new_zeros(N * K, T).masked_scatter(keep, found)
    scored = logprobs.view(N, K, T), embeddings.view(N, K, -1)
    return (*scored, said) if text else scored


# ---------------------------------------------------------------- texts in, vectors out


def batches(texts, tokens_per_batch, policy):
    """Indices of the texts, longest first, in batches that fit the token budget, a rationale each.

    A text's tokens are estimated, at three bytes each, so that no text is tokenized twice.
    """
    size = [len(text.encode("utf-8", "surrogatepass")) for text in texts]
    order = sorted(range(len(texts)), key=lambda i: -size[i])
    overhead = len(policy.prefix) // 4 + policy.reading.max_new_tokens
    limit, part = policy.reading.max_prompt_tokens, []
    for i in order:
        longest = min(limit, size[part[0] if part else i] // 3) + overhead
        if part and (len(part) + 1) * longest > tokens_per_batch:
            yield part
            part = []
        part.append(i)
    if part:
        yield part


def embed_prompts(policy, prompts):
    """The embedding without a rationale: P(x) alone, pooled (the paper's Base). `-> [N, D]`."""
    with torch.no_grad():
        _, to_pool, _ = policy.prefill(prompts.ids, prompts.mask, prompts.shared)
        return unit(fold(None, to_pool, prompts.counted[:, prompts.shared :], policy.reading.pooling))


@dataclass
class Encoded:
    """Texts and what became of them, one entry each."""

    vectors: np.ndarray  # [n, D] float32, unit length
    rationales: list  # of str; empty where none was written
    cut: np.ndarray  # [n] bool, lost its end to the prompt limit
    finished: np.ndarray  # [n] bool, the rationale came to an end token

    def __getitem__(self, index):
        return Encoded(self.vectors[index], [self.rationales[i] for i in index], self.cut[index], self.finished[index])


@torch.inference_mode()
def encode_batch(policy, texts, temperature=0.0, generator=None, rationale=True):
    """One batch of texts, greedy or sampled, or the prompts alone. `-> Encoded`.

    An empty text is allowed: its prompt still has tokens that count.
    """
    x = policy.prompts(texts)
    if not rationale:
        vectors, written, finished = embed_prompts(policy, x), [""] * len(texts), np.ones(len(texts), bool)
    else:
        r = sample(policy, x, 1, temperature, generator)
        vectors, finished = r.embeddings[:, 0], r.finished[:, 0].cpu().numpy()
        ids = [group[0] for group in r.written()]
        written = [text.strip() for text in policy.tokenizer.batch_decode(ids, skip_special_tokens=True)]
    return Encoded(vectors.float().cpu().numpy(), written, x.cut_rows.cpu().numpy(), finished)


def encode(policy, texts, rationale=True, tokens_per_batch=8192):
    """Any number of texts, greedily; equal ones are read once. `-> Encoded`."""
    distinct, read, order = list(dict.fromkeys(texts)), [], []
    for part in batches(distinct, tokens_per_batch, policy):
        read.append(encode_batch(policy, [distinct[i] for i in part], rationale=rationale))
        order += part
    place = {distinct[i]: n for n, i in enumerate(order)}
    whole = Encoded(
        np.concatenate([e.vectors for e in read]),
        [w for e in read for w in e.rationales],
        np.concatenate([e.cut for e in read]),
        np.concatenate([e.finished for e in read]),
    )
    return whole[[place[text] for text in texts]]


@torch.no_grad()
def text_loss(policy, texts, tokens_per_batch=8192):
    """How well the policy still models language: its loss, nats a token, on the texts' own tokens.

    The texts stand where they stand in P(x). What training takes from the model shows here.
    """
    nats, count = 0.0, 0
    for part in batches(texts, tokens_per_batch, policy):
        x = policy.prompts([texts[i] for i in part], share=False)  # the first token is predicted by the instruction's last
        hidden, _, _ = policy.prefill(x.ids, x.mask, 0)
        keep = x.text[:, 1:].bool()
        nats -= float(token_logprobs(policy, hidden[:, :-1][keep], x.ids[:, 1:][keep]).sum())
        count += int(keep.sum())
    return nats / count
