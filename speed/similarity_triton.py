"""The kernels of similarity.py in Triton: a program owns one tile of the table, and holds it in registers.

A tile is ROWS rows against GROUPS groups of columns, each group padded from K to MEMBERS, the next power of
two, because a tile's shape must be one; K = 5 computes 8 and ignores 3. The product is accumulated in float32
over D, `DEPTH` numbers at a time, by tensor cores: each float32 is split into two numbers of ten bits and three
products are summed ("tf32x3"), which is nearly as exact as float32; one product alone would blur cosines in the third
digit. bfloat16 inputs are widened as they are loaded.

    rows     ROWS x D  ──┐                              group 0      group 1
                         ├── dot ──>  s  [ROWS, GROUPS * MEMBERS]  =  | m m m m m . . . | m m m m m . . . | ...
    columns  .. x D    ──┘                              reshaped to [ROWS, GROUPS, MEMBERS], "." being padding

forward     a program turns its tile into four numbers per row. `forward_in_tiles` adds those of a row's tiles, or, for the two
            log-sum-exps, takes the log-sum-exp of them: tiles x N numbers are all that leaves the chip.
backward    a program makes its tile again, turns it into ds, and writes that down, for a band of rows at a time, so
            small that it stays in the GPU's cache. Two library products give dx = ds @ columns and dc += ds' @ rows.

No two programs add to the same number, so the result is the same each time. Every kernel is tested on the CPU by Triton's
interpreter (TRITON_INTERPRET=1), whose products are plain float32.
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
def kinds(excluded, n, first, has_n, B, R, GROUPS: tl.constexpr):
    """Which groups of a tile are a row's own, and which are others to it, `[ROWS, GROUPS]`; R rows per group."""
    group, mine = first + tl.arange(0, GROUPS), n // R
    here = has_n[:, None] & (group < B)[None, :]
    own = here & (mine[:, None] == group[None, :])
    bar = tl.load(excluded + mine[:, None] * B + group[None, :], mask=here, other=1)
    return own, here & (bar == 0)


@triton.jit
def by_group(s, exists, K, ROWS: tl.constexpr, GROUPS: tl.constexpr, MEMBERS: tl.constexpr):
    """A tile by group `[ROWS, GROUPS, MEMBERS]` (padding at -inf), and each group's mean and maximum."""
    s = tl.where(exists[None, :], s, float("-inf"))
    s = tl.reshape(s, (ROWS, GROUPS, MEMBERS))
    mean = tl.sum(tl.where(s == float("-inf"), 0.0, s), 2) / K
    return s, mean, tl.max(s, 2)


@triton.jit
def log_sum_exp(x, valid):
    """Over a tile's groups, `[ROWS, GROUPS] -> [ROWS]`; -inf where none is valid."""
    x = tl.where(valid, x, float("-inf"))
    peak = tl.max(x, 1)
    base = tl.where(peak == float("-inf"), 0.0, peak)  # -inf - -inf would be NaN
    return base + tl.log(tl.sum(tl.exp(x - base[:, None]), 1))


@triton.jit
def forward_kernel(
    rows, columns, excluded, out, N, B, K, D, R, inverse_t,
    ROWS: tl.constexpr, GROUPS: tl.constexpr, MEMBERS: tl.constexpr, DEPTH: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """What one tile adds to the four numbers of its rows, into out `[4, tiles, N]`; excluded `[B, B]` uint8; R = N / B."""
    tile, tiles = tl.program_id(1), tl.num_programs(1)
    n, first = tl.program_id(0) * ROWS + tl.arange(0, ROWS), tile * GROUPS
    has_n = n < N
    c, has_c = members(first, B, K, GROUPS, MEMBERS)
    s = cosines(rows, columns, n, c, has_n, has_c, D, ROWS, GROUPS * MEMBERS, DEPTH, PRECISION)
    own, other = kinds(excluded, n, first, has_n, B, R, GROUPS)
    _, mean, nearest = by_group(s, has_c, K, ROWS, GROUPS, MEMBERS)
    at, step = out + tile * N + n, tiles * N
    tl.store(at, tl.sum(tl.where(own, mean, 0.0), 1), mask=has_n)
    tl.store(at + step, log_sum_exp(mean * inverse_t, other), mask=has_n)
    tl.store(at + 2 * step, log_sum_exp(nearest * inverse_t, other), mask=has_n)
    tl.store(at + 3 * step, tl.sum(tl.where(other, nearest, 0.0), 1), mask=has_n)


@triton.jit(do_not_specialize=["start", "end"])
def backward_kernel(
    rows, columns, excluded, saved, ds_band, start, end, N, B, K, D, R, inverse_t,
    ROWS: tl.constexpr, GROUPS: tl.constexpr, MEMBERS: tl.constexpr, DEPTH: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """One tile of ds, into ds_band `[end - start, B * K]`. saved `[6, N]`: both log-sum-exps, then the four gradients."""
    n, first = start + tl.program_id(0) * ROWS + tl.arange(0, ROWS), tl.program_id(1) * GROUPS
    has_n = n < end
    c, has_c = members(first, B, K, GROUPS, MEMBERS)
    s = cosines(rows, columns, n, c, has_n, has_c, D, ROWS, GROUPS * MEMBERS, DEPTH, PRECISION)
    own, other = kinds(excluded, n, first, has_n, B, R, GROUPS)
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
    ds = tl.reshape(ds, (ROWS, GROUPS * MEMBERS))
    tl.store(ds_band + (n - start)[:, None] * (B * K) + c[None, :], ds, mask=has_n[:, None] & has_c[None, :])


# ---------------------------------------------------------------- what similarity.py calls

tile = 64, 128  # rows and columns of a program
BAND, LEAST = 2**22, 512  # so many numbers of ds are held at a time, 16 MB, a third of a large GPU's cache; but so many rows


def _padded(K):
    """MEMBERS and GROUPS of a tile, for groups of K."""
    members = triton.next_power_of_2(K)
    return members, max(1, tile[1] // members)


def _launch(kernel, n, rows, columns, tensors, temperature):
    """One program per tile; the tiles cover n rows and all columns."""
    (N, D), (B, K, _) = rows.shape, columns.shape
    MEMBERS, GROUPS = _padded(K)
    sizes = dict(ROWS=tile[0], GROUPS=GROUPS, MEMBERS=MEMBERS, DEPTH=32, PRECISION="tf32x3", num_warps=4)
    grid = triton.cdiv(n, tile[0]), triton.cdiv(B, GROUPS)
    kernel[grid](rows, columns, *tensors, N, B, K, D, N // B, 1 / temperature, **sizes)


def forward_in_tiles(rows, columns, excluded, temperature):
    """The four numbers of each row, `[N]` float32 each."""
    rows, columns, byte = rows.contiguous(), columns.contiguous(), excluded.to(torch.uint8)
    N, (B, K, _) = len(rows), columns.shape
    out = torch.empty(4, triton.cdiv(B, _padded(K)[1]), N, dtype=torch.float32, device=rows.device)
    _launch(forward_kernel, N, rows, columns, (byte, out), temperature)
    own, mean, nearest, hard = out
    others = (~excluded).sum(1).clamp(min=1).repeat_interleave(N // B)
    return own.sum(0), mean.logsumexp(0), nearest.logsumexp(0), hard.sum(0) / others


def backward_in_tiles(rows, columns, excluded, temperature, *saved):
    """The gradients at rows and columns, float32. saved `[N]` each: see similarity.py."""
    rows, columns, excluded = rows.contiguous(), columns.contiguous(), excluded.to(torch.uint8)
    saved = torch.stack([x.float() for x in saved])
    wide_rows, wide_columns = rows.float(), columns.flatten(0, 1).float()  # [N, D], [B * K, D]
    d_rows, d_columns = torch.empty_like(wide_rows), torch.zeros_like(wide_columns)
    size = max(LEAST, BAND // len(wide_columns))
    ds = rows.new_empty(min(size, len(rows)), len(wide_columns), dtype=torch.float32)
    for start in range(0, len(rows), size):
        end = min(start + size, len(rows))
        _launch(backward_kernel, end - start, rows, columns, (excluded, saved, ds, start, end), temperature)
        band = ds[: end - start]
        torch.mm(band, wide_columns, out=d_rows[start:end])
        d_columns.addmm_(band.T, wide_rows[start:end])
    return d_rows, d_columns.view(columns.shape)
