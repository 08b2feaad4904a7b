"""The in-batch similarity: every row against every group of columns, first in six plain lines, then in tiles.

The rewards need three things of a row x and B groups of K columns: how near it is to its own group, a
softmax over the other groups, and how near the nearest member of each other group is (Eq. 13, 15, and
InfoNCE). All three come from one table of N x B*K cosines, s = x . c:

    own      mean of s over the own group's K members
    mean     log sum over the other groups of exp(mean of s over the group / t)
    nearest  log sum over the other groups of exp(max of s over the group / t)
    hard     mean over the other groups of the max of s over the group                          (Eq. 15)

`plain_similarity` is this definition. It holds the table, and autograd holds several copies of it, the largest tensors
of the reward: at N = B*K = 4,096 a copy takes 67 MB. But each of the four is a sum over groups, so the table can
be visited tile by tile, each tile folded into four numbers per row and forgotten, as flash attention does:

                     groups of K columns, a tile of them at a time
                  ┌────────┬────────┬────────┬────────┐
       rows,      │ tile 0 │ tile 1 │ tile 2 │  ...   │     a tile is a product [rows, D] @ [D, columns] that
       a block    │   ->   │   ->   │   ->   │        │     is reduced to (own, mean, nearest, hard) on the spot
       at a time  ├────────┼────────┼────────┼────────┤
                  │  ...   │        │        │        │
                  └────────┴────────┴────────┴────────┘

`group_similarity` does that. Its backward pass recomputes each tile. With w the gradients of the four numbers,
p = exp(mean/t - lse) and p' = exp(max/t - lse') the softmax weights of a group, a member's cosine has the gradient

    ds = 1/K [ w_own 1(own group) + w_mean p/t 1(other) ] + 1(is the max) [ w_nearest p'/t + w_hard/count ] 1(other)

(shared evenly where several members tie), and then dx += ds c and dc += ds' x, again tile by tile.

There are two implementations of `forward_in_tiles` and `backward_in_tiles`: here in torch, a block of rows at a time (any
device, any precision), and in Triton (speed/similarity_triton.py), for CUDA, a program per tile. docs/benchmarks.md says
what each costs.

Shapes: N rows in B blocks of N/B (block i's own group is group i), K columns per group, D hidden size.
"""

import functools
from typing import NamedTuple

import torch
from torch.autograd.function import once_differentiable

from speed import runs

TABLE = 2**21  # about this many cosines are held at a time, 8 MB in float32


class Similarity(NamedTuple):
    """Four numbers per row, `[N]` each; see the top of this file."""

    own: torch.Tensor
    mean: torch.Tensor
    nearest: torch.Tensor
    hard: torch.Tensor


def plain_similarity(rows, columns, temperature, excluded):
    """The definition. `[N, D], [B, K, D], t, [B, B] -> Similarity` of `[N]`.

    excluded: True where two groups are not other groups of each other: a group and itself, and groups that share a text.
    """
    mine = torch.arange(len(columns), device=rows.device).repeat_interleave(len(rows) // len(columns))  # [N]
    s = torch.einsum("nd,bkd->nbk", rows, columns)
    mean, nearest, other = s.mean(2), s.amax(2), ~excluded[mine]  # [N, B]
    own = mean.gather(1, mine[:, None])[:, 0]
    log_sum = lambda x: (x / temperature).masked_fill(~other, -torch.inf).logsumexp(1)
    hard = torch.where(other, nearest, 0).sum(1) / other.sum(1).clamp(min=1)
    return Similarity(own, log_sum(mean), log_sum(nearest), hard)


def group_similarity(rows, columns, temperature, same_text=None, use_triton=None):
    """`plain_similarity` in tiles, of which few are held at a time. `[N, D], [B, K, D] -> Similarity` of `[N]`.

    rows         unit length; N is a multiple of B, and row n belongs to group n // (N / B)
    columns      unit length; any B, K, D
    temperature  t of the two log-sum-exps
    same_text    `[B, B]` bool or None: True where two groups share a text; they do not count as other groups
    use_triton   None: on CUDA, where it is installed; True on a CPU needs TRITON_INTERPRET=1
    A row without any other group (B = 1) has mean = nearest = -inf and hard = 0. Computed in at least float32;
    gradients flow to rows and columns. Raises ValueError for shapes that do not fit together.
    """
    B = len(columns)
    if rows.shape[1] != columns.shape[2] or len(rows) % B:
        shapes = f"rows {tuple(rows.shape)}, columns {tuple(columns.shape)}"
        raise ValueError(f"{shapes}: they need the same D, and a multiple of B rows")
    excluded = torch.eye(B, dtype=torch.bool, device=rows.device)
    excluded = excluded if same_text is None else excluded | same_text
    if use_triton is None:
        use_triton = rows.is_cuda and rows.dtype != torch.float64 and _triton_runs(rows.device)
    if not use_triton:  # the kernel widens what it loads
        rows, columns = (x.to(torch.promote_types(x.dtype, torch.float32)) for x in (rows, columns))
    return Similarity(*_GroupSimilarity.apply(rows, columns, excluded, temperature, use_triton))


@functools.cache
def _triton_runs(device):
    """Whether the kernel runs on a device; tried once, on two rows."""
    ones, excluded = torch.ones(2, 1, 16, device=device), torch.eye(2, dtype=torch.bool, device=device)
    return runs("the in-batch similarity", lambda: _tiles(True)[0](ones[:, 0], ones, excluded, 1.0))


def _tiles(use_triton):
    """The two functions over tiles, in Triton or in torch."""
    if not use_triton:
        return forward_in_tiles, backward_in_tiles
    from speed import similarity_triton

    return similarity_triton.forward_in_tiles, similarity_triton.backward_in_tiles


class _GroupSimilarity(torch.autograd.Function):
    """Forward and backward of `group_similarity`, both in tiles; kept between them: the inputs and four numbers per row."""

    @staticmethod
    def forward(ctx, rows, columns, excluded, temperature, use_triton):
        forward, ctx.backward_in_tiles = _tiles(use_triton)
        numbers = forward(rows, columns, excluded, temperature)
        ctx.save_for_backward(rows, columns, excluded, *numbers)
        ctx.temperature = temperature
        return numbers

    @staticmethod
    @once_differentiable
    def backward(ctx, *weights):
        rows, columns, excluded, _, mean, nearest, _ = ctx.saved_tensors
        count = (~excluded).sum(1).clamp(min=1).repeat_interleave(len(rows) // len(excluded))
        weights = (*weights[:3], weights[3] / count)
        d_rows, d_columns = ctx.backward_in_tiles(rows, columns, excluded, ctx.temperature, mean, nearest, *weights)
        return d_rows.to(rows.dtype), d_columns.to(columns.dtype), None, None, None


# ---------------------------------------------------------------- tiles in torch


def blocks_of_rows(rows, columns, excluded):
    """The table, a block of n rows at a time, so that no more than about `TABLE` cosines exist at once.

    Yields each block's slice and its cosines `[K, n, B]`, member by member: what is summed or compared over a group's
    members then lies in contiguous memory, and columns need no copy. And, `[n, B]` each: their means and maxima over a
    group's members, which groups are own, which are other.
    """
    B, K, _ = columns.shape
    groups = torch.arange(B, device=rows.device)
    mine = groups.repeat_interleave(len(rows) // B)
    size = min(len(rows), max(1, TABLE // (B * K)))
    table = rows.new_empty(K, size, B)
    for start in range(0, len(rows), size):
        here = slice(start, min(start + size, len(rows)))
        s = table[:, : here.stop - start]
        for k in range(K):
            torch.mm(rows[here], columns[:, k].T, out=s[k])
        yield here, s, s.mean(0), s.amax(0), mine[here, None] == groups, ~excluded[mine[here]]


def forward_in_tiles(rows, columns, excluded, temperature):
    """The four numbers of each row, `[N]` each. excluded `[B, B]`: see `plain_similarity`."""
    numbers = rows.new_empty(4, len(rows))
    for here, _, mean, nearest, own, other in blocks_of_rows(rows, columns, excluded):
        numbers[0, here] = torch.where(own, mean, 0).sum(1)
        numbers[1, here] = (mean / temperature).masked_fill(~other, -torch.inf).logsumexp(1)
        numbers[2, here] = (nearest / temperature).masked_fill(~other, -torch.inf).logsumexp(1)
        numbers[3, here] = torch.where(other, nearest, 0).sum(1) / other.sum(1).clamp(min=1)
    return tuple(numbers)


def backward_in_tiles(rows, columns, excluded, temperature, *saved):
    """The gradients at rows and columns. saved `[N]` each: both log-sum-exps, and the gradients of the four numbers,
    that of `hard` divided by how many other groups there are.
    """
    d_rows, d_columns = torch.zeros_like(rows), torch.zeros_like(columns)
    for here, s, mean, nearest, own, other in blocks_of_rows(rows, columns, excluded):
        lse_mean, lse_nearest, w_own, w_mean, w_nearest, w_hard = (x[here, None] for x in saved)
        p = torch.where(other, (mean / temperature - lse_mean).exp(), 0)
        q = torch.where(other, (nearest / temperature - lse_nearest).exp(), 0)
        to_each = (own * w_own + p * w_mean / temperature) / len(s)  # [n, B], to each member of a group
        to_nearest = q * w_nearest / temperature + other * w_hard  # [n, B]
        is_nearest = torch.eq(s, nearest, out=s)  # 1.0 or 0.0
        ds = is_nearest.mul_(to_nearest / is_nearest.sum(0)).add_(to_each)
        for k in range(len(s)):
            d_rows[here].addmm_(ds[k], columns[:, k])
            d_columns[:, k].addmm_(ds[k].T, rows[here])
    return d_rows, d_columns
