"""The kernels of similarity.py in Triton: the same four lines, with the tile in registers.

A tile is ROWS rows against GROUPS groups of columns, each group padded from K to MEMBERS, the next power of
two, because a tile's shape must be one; K = 5 computes 8 and ignores 3. The product is accumulated in float32
over D, `DEPTH` numbers at a time. Products are IEEE float32, not TF32, whose ten bits of mantissa would
blur cosines in the third digit (`precision`); bfloat16 inputs are widened as they are loaded.

    rows     ROWS x D  ──┐                              group 0      group 1
                         ├── dot ──>  s  [ROWS, GROUPS * MEMBERS]  =  | m m m m m . . . | m m m m m . . . | ...
    columns  .. x D    ──┘                              reshaped to [ROWS, GROUPS, MEMBERS], "." being padding

forward     a program owns ROWS rows and walks over all tiles of columns, carrying running sums and, for the two
            log-sum-exps, a running maximum (online softmax, Milakov & Gimelshein 2018).
backward    the same walk makes each tile again, turns it into ds, and adds ds @ columns to its own rows of dx;
            a second kernel owns a tile of columns, walks over the rows and adds ds' @ rows to its own part of dc.
            dx and dc are too wide for registers (D = 896 and more), so they are added to in memory; a program
            touches only its own, so no atomics are needed and the sums always run in the same order.

Every kernel is tested on the CPU by Triton's interpreter (TRITON_INTERPRET=1).
"""

import torch
import triton
import triton.language as tl


@triton.jit
def cosines(
    rows, columns, n, c, has_n, has_c, D,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, DEPTH: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """One tile of the table: rows `n` against columns `c`, `[ROWS, COLUMNS]` in float32."""
    s = tl.zeros((ROWS, COLUMNS), tl.float32)
    for start in range(0, D, DEPTH):
        d = start + tl.arange(0, DEPTH)
        x = tl.load(rows + n[:, None] * D + d[None, :], mask=has_n[:, None] & (d < D)[None, :], other=0.0)
        y = tl.load(columns + c[:, None] * D + d[None, :], mask=has_c[:, None] & (d < D)[None, :], other=0.0)
        s = tl.dot(x.to(tl.float32), tl.trans(y.to(tl.float32)), s, input_precision=PRECISION)
    return s


@triton.jit
def members(first, B, K, GROUPS: tl.constexpr, MEMBERS: tl.constexpr):
    """The columns of groups first, first + 1, ...: their numbers, and which exist. Padding is none's member."""
    i = tl.arange(0, GROUPS * MEMBERS)
    group, member = first + i // MEMBERS, i % MEMBERS
    return group * K + member, (group < B) & (member < K)


@triton.jit
def kinds(barred, n, first, has_n, B, R, GROUPS: tl.constexpr):
    """Which groups of a tile are a row's own, and which are others to it, `[ROWS, GROUPS]`; R rows per group."""
    group, mine = first + tl.arange(0, GROUPS), n // R
    here = has_n[:, None] & (group < B)[None, :]
    own = here & (mine[:, None] == group[None, :])
    bar = tl.load(barred + mine[:, None] * B + group[None, :], mask=here, other=1)
    return own, here & (bar == 0)


@triton.jit
def by_group(s, exists, K, ROWS: tl.constexpr, GROUPS: tl.constexpr, MEMBERS: tl.constexpr):
    """A tile by group `[ROWS, GROUPS, MEMBERS]` (padding at -inf), and each group's mean and maximum."""
    s = tl.where(exists[None, :], s, float("-inf"))
    s = tl.reshape(s, (ROWS, GROUPS, MEMBERS))
    mean = tl.sum(tl.where(s == float("-inf"), 0.0, s), 2) / K
    return s, mean, tl.max(s, 2)


@triton.jit
def online(peak, total, x, valid):
    """Take more numbers `x [ROWS, GROUPS]` into a log-sum-exp that stands at peak + log(total) `[ROWS]`."""
    x = tl.where(valid, x, float("-inf"))
    higher = tl.maximum(peak, tl.max(x, 1))
    base = tl.where(higher == float("-inf"), 0.0, higher)  # nothing yet: -inf - -inf would be NaN
    return higher, total * tl.exp(peak - base) + tl.sum(tl.exp(x - base[:, None]), 1)


@triton.jit
def forward_kernel(
    rows, columns, barred, out, N, B, K, D, R, inverse_t,
    ROWS: tl.constexpr, GROUPS: tl.constexpr, MEMBERS: tl.constexpr, DEPTH: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """The four numbers of ROWS rows, into out `[4, N]`; barred `[B, B]` uint8; R = N / B rows a group."""
    n = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    has_n = n < N
    own_sum = tl.zeros((ROWS,), tl.float32)
    hard_sum, count = own_sum, own_sum
    mean_peak, near_peak = own_sum - float("inf"), own_sum - float("inf")
    mean_total, near_total = own_sum, own_sum
    for first in range(0, B, GROUPS):
        c, has_c = members(first, B, K, GROUPS, MEMBERS)
        s = cosines(rows, columns, n, c, has_n, has_c, D, ROWS, GROUPS * MEMBERS, DEPTH, PRECISION)
        own, other = kinds(barred, n, first, has_n, B, R, GROUPS)
        _, mean, nearest = by_group(s, has_c, K, ROWS, GROUPS, MEMBERS)
        own_sum += tl.sum(tl.where(own, mean, 0.0), 1)
        hard_sum += tl.sum(tl.where(other, nearest, 0.0), 1)
        count += tl.sum(tl.where(other, 1.0, 0.0), 1)
        mean_peak, mean_total = online(mean_peak, mean_total, mean * inverse_t, other)
        near_peak, near_total = online(near_peak, near_total, nearest * inverse_t, other)
    tl.store(out + n, own_sum, mask=has_n)
    tl.store(out + N + n, mean_peak + tl.log(mean_total), mask=has_n)
    tl.store(out + 2 * N + n, near_peak + tl.log(near_total), mask=has_n)
    tl.store(out + 3 * N + n, hard_sum / tl.maximum(count, 1.0), mask=has_n)


@triton.jit
def tile_gradient(
    rows, columns, barred, saved, n, first, N, B, K, D, R, inverse_t,
    ROWS: tl.constexpr, GROUPS: tl.constexpr, MEMBERS: tl.constexpr, DEPTH: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """ds of one tile, `[ROWS, GROUPS * MEMBERS]`. saved `[6, N]`: both log-sum-exps, then the four weights."""
    has_n = n < N
    c, has_c = members(first, B, K, GROUPS, MEMBERS)
    s = cosines(rows, columns, n, c, has_n, has_c, D, ROWS, GROUPS * MEMBERS, DEPTH, PRECISION)
    own, other = kinds(barred, n, first, has_n, B, R, GROUPS)
    s, mean, nearest = by_group(s, has_c, K, ROWS, GROUPS, MEMBERS)
    lse_mean = tl.load(saved + n, mask=has_n, other=0.0)[:, None]
    lse_near = tl.load(saved + N + n, mask=has_n, other=0.0)[:, None]
    w_own = tl.load(saved + 2 * N + n, mask=has_n, other=0.0)[:, None]
    w_mean = tl.load(saved + 3 * N + n, mask=has_n, other=0.0)[:, None]
    w_near = tl.load(saved + 4 * N + n, mask=has_n, other=0.0)[:, None]
    w_hard = tl.load(saved + 5 * N + n, mask=has_n, other=0.0)[:, None]
    p = tl.exp(tl.where(other, mean * inverse_t - lse_mean, float("-inf")))
    q = tl.exp(tl.where(other, nearest * inverse_t - lse_near, float("-inf")))
    share = (tl.where(own, w_own, 0.0) + p * w_mean * inverse_t) / K
    most = q * w_near * inverse_t + tl.where(other, w_hard, 0.0)
    top = tl.where((s == nearest[:, :, None]) & (s > float("-inf")), 1.0, 0.0)
    ds = share[:, :, None] + top * (most / tl.maximum(tl.sum(top, 2), 1.0))[:, :, None]
    ds = tl.where(s == float("-inf"), 0.0, ds)
    return tl.reshape(ds, (ROWS, GROUPS * MEMBERS))


@triton.jit
def add_product(into, mine, has_mine, weights, others, theirs, has_theirs, D, DEPTH: tl.constexpr, PRECISION: tl.constexpr):
    """into[mine] += weights @ others[theirs], `DEPTH` of its D columns at a time."""
    for start in range(0, D, DEPTH):
        d = start + tl.arange(0, DEPTH)
        y = tl.load(others + theirs[:, None] * D + d[None, :], mask=has_theirs[:, None] & (d < D)[None, :], other=0.0)
        at, valid = into + mine[:, None] * D + d[None, :], has_mine[:, None] & (d < D)[None, :]
        tl.store(at, tl.load(at, mask=valid) + tl.dot(weights, y.to(tl.float32), input_precision=PRECISION), mask=valid)
    tl.debug_barrier()  # the next tile adds to the same place


@triton.jit
def rows_kernel(
    rows, columns, barred, saved, d_rows, N, B, K, D, R, inverse_t,
    ROWS: tl.constexpr, GROUPS: tl.constexpr, MEMBERS: tl.constexpr, DEPTH: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    n = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    for first in range(0, B, GROUPS):
        ds = tile_gradient(
            rows, columns, barred, saved, n, first, N, B, K, D, R, inverse_t, ROWS, GROUPS, MEMBERS, DEPTH, PRECISION
        )  # fmt: skip
        c, has_c = members(first, B, K, GROUPS, MEMBERS)
        add_product(d_rows, n, n < N, ds, columns, c, has_c, D, DEPTH, PRECISION)


@triton.jit
def columns_kernel(
    rows, columns, barred, saved, d_columns, N, B, K, D, R, inverse_t,
    ROWS: tl.constexpr, GROUPS: tl.constexpr, MEMBERS: tl.constexpr, DEPTH: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    first = tl.program_id(0) * GROUPS
    c, has_c = members(first, B, K, GROUPS, MEMBERS)
    for start in range(0, N, ROWS):
        n = start + tl.arange(0, ROWS)
        ds = tile_gradient(
            rows, columns, barred, saved, n, first, N, B, K, D, R, inverse_t, ROWS, GROUPS, MEMBERS, DEPTH, PRECISION
        )  # fmt: skip
        add_product(d_columns, c, has_c, tl.trans(ds), rows, n, n < N, D, DEPTH, PRECISION)


# ---------------------------------------------------------------- what similarity.py calls

# What bench/similarity.py tries on a GPU. Products of float32 are "ieee", "tf32", or "tf32x3": three of tensor cores for one.
precision = "ieee"
tile, warps = (32, 64), 4  # the block that a program owns times the block that it walks over


def _launch(kernel, rows, columns, tensors, temperature, owns_rows):
    """One program for each block of rows, or of columns. The block a program owns is the smaller side of its tile.

    32 rows make 128 programs of N = 4,096, about one for each of a large GPU's multiprocessors; tiles of 32 x 64
    still do 10 operations for each byte they read from the cache.
    """
    (N, D), (B, K, _) = rows.shape, columns.shape
    ROWS, COLUMNS = tile if owns_rows else tile[::-1]
    MEMBERS = triton.next_power_of_2(K)
    GROUPS = max(1, COLUMNS // MEMBERS)
    blocks = triton.cdiv(N, ROWS) if owns_rows else triton.cdiv(B, GROUPS)
    sizes = dict(ROWS=ROWS, GROUPS=GROUPS, MEMBERS=MEMBERS, DEPTH=32, PRECISION=precision, num_warps=warps)
    kernel[(blocks,)](rows, columns, *tensors, N, B, K, D, N // B, 1 / temperature, **sizes)


def forward(rows, columns, barred, temperature):
    """The four numbers of each row, `[N]` float32 each."""
    rows, columns, barred = rows.contiguous(), columns.contiguous(), barred.to(torch.uint8)
    out = torch.empty(4, len(rows), dtype=torch.float32, device=rows.device)
    _launch(forward_kernel, rows, columns, (barred, out), temperature, owns_rows=True)
    return tuple(out)


def backward(rows, columns, barred, temperature, lse_mean, lse_nearest, w_own, w_mean, w_nearest, w_hard):
    """The gradients at rows and columns, float32, given those of the four numbers."""
    rows, columns, barred = rows.contiguous(), columns.contiguous(), barred.to(torch.uint8)
    saved = torch.stack([x.float() for x in (lse_mean, lse_nearest, w_own, w_mean, w_nearest, w_hard)])
    d_rows, d_columns = (torch.zeros(x.shape, dtype=torch.float32, device=x.device) for x in (rows, columns))
    _launch(rows_kernel, rows, columns, (barred, saved, d_rows), temperature, owns_rows=True)
    _launch(columns_kernel, rows, columns, (barred, saved, d_columns), temperature, owns_rows=False)
    return d_rows, d_columns
