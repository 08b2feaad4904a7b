"""From hidden states to one unit vector per text: Eq. 11, and the alternatives of Sec. 5.4.

The embedding of a text is the mean of the hidden states of its tokens, of the few that the chat
template puts behind them, and of its rationale's tokens, scaled to unit length so that a dot product
is a cosine. What does not count: padding, and everything before the text (the instruction, which is
the same for every text).

Two ideas carry this file:

1. Masks come from lengths or positions, never from `ids == pad_token_id`. Many tokenizers pad with
   the end token, and such a mask would drop the end token that Eq. 11 counts.
2. Pooling is a *fold*: hidden states may arrive one block at a time, first the prompt's, then each
   sampled token's, and only a `[N, D]` tensor is carried along. So the embedding falls out of the
   decoding loop, and no `[N, L, D]` tensor is kept for it. The mean's denominator drops out when
   the result is scaled to unit length, so the running state of the mean is just a sum.

Shapes: N rows, L positions, D hidden size.
"""

import torch
import torch.nn.functional as F

# penultimate: the mean, one layer below the last. halves, not in the paper: the prompt and the rationale have one vote each,
# however many tokens either has. In a plain mean a one-word rationale of three tokens drowns in a prompt of thirty.
POOLS = ("mean", "penultimate", "eos", "max", "halves")


def fold(state, hidden, mask, how="mean"):
    """Fold one more block of hidden states into the running state.

    state   `[N, D]` from earlier blocks, or None for the first
    hidden  `[N, L, D]`; positions where the mask is 0 may hold anything, NaN included
    mask    `[N, L]`, 1 where the token counts
    how     one of `POOLS`
    Returns the new state `[N, D]`, in at least float32. Differentiable; nothing is edited in place. A row's first
    block must have a token that counts. Raises ValueError for an unknown `how`.
    """
    hidden = hidden.to(torch.promote_types(hidden.dtype, torch.float32))
    mask = mask.bool()
    if how in ("mean", "penultimate", "halves"):
        new = torch.where(mask[..., None], hidden, 0).sum(1)  # [N, D]
        return new if state is None else state + new
    if how == "max":
        new = hidden.masked_fill(~mask[..., None], -torch.inf).amax(1)  # [N, D]
        return new if state is None else torch.maximum(state, new)
    if how == "eos":
        last = (mask * torch.arange(mask.shape[1], device=mask.device)).argmax(1)  # [N]
        new = hidden[torch.arange(len(hidden), device=hidden.device), last]  # [N, D]
        return new if state is None else torch.where(mask.any(1)[:, None], new, state)
    raise ValueError(f"unknown pooling {how!r}: choose one of {', '.join(POOLS)}")


def unit(state):
    """Scale each vector of `[..., D]` to length one; the end of every fold over one block (of prompt and rationale: below)."""
    return F.normalize(state, dim=-1)


def with_rationale(state, prompt, how):
    """The end of a fold over prompt and rationale. `[..., D]` twice, `prompt` the state before the rationale; `-> [..., D]`.

    halves: the mean of both halves, each at unit length; where no rationale was written, the prompt alone.
    """
    if how != "halves":
        return unit(state)
    written = state - prompt
    # Of a vector of zeros the direction has a slope of 1e12, in whose rounding the gradient of the rest would be lost.
    written = torch.where((written != 0).any(-1, keepdim=True), written, prompt)
    return unit(unit(prompt) + unit(written))


def pool(hidden, mask, how="mean"):
    """Pool hidden states `[N, L, D]`, by a mask of what counts `[N, L]`, into unit vectors `[N, D]`, in one block.

    Raises ValueError, naming the rows, where no token counts, because there is no embedding.
    """
    empty = (~mask.bool().any(1)).nonzero().flatten().tolist()
    if empty:
        raise ValueError(f"no token counts in row(s) {empty}: a row needs at least one to have a mean")
    return unit(fold(None, hidden, mask, how))


def mean_pool(hidden, mask):
    """Eq. 11: the mean over the tokens that count, at unit length. `[N, L, D], [N, L] -> [N, D]`.

    Two rows of three positions, D = 2; the second row's last position is padding:

    >>> hidden = torch.tensor([[[3.0, 0.0], [0.0, 4.0], [3.0, 4.0]],
    ...                        [[0.0, 1.0], [0.0, 3.0], [9.0, 9.0]]])
    >>> mean_pool(hidden, torch.tensor([[1, 1, 1], [1, 1, 0]]))
    tensor([[0.6000, 0.8000],
            [0.0000, 1.0000]])
    """
    return pool(hidden, mask, "mean")
