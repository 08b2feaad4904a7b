"""decode.attend in Triton: one program reads a row's keys and values once, prompt first, and keeps everything else on the chip.

    prompt's P positions           rationale's positions so far        one program: rollout r, key-value head h
   ┌──────┬──────┬──────┐         ┌──────┬──────┬──────┐
   │ ---> │ ---> │ ---> │  --->   │ ---> │ ---> │ ---> │             carries, for the G queries of its head, the
   └──────┴──────┴──────┘         └──────┴──────┴──────┘             running maximum, sum and mixture of values
     shared by K rollouts            its own

The softmax over both stretches is taken block by block: when a block has a higher score than all before it, what was summed
so far is scaled down (online softmax, Milakov & Gimelshein 2018; flash attention, Dao et al. 2022). In plain torch the same
takes sixteen kernels a layer, and tables of scores in memory. How many tokens a rationale has is read on the device, so one
captured graph serves every length. Products of float32 are IEEE; tested on the CPU by Triton's interpreter.
"""

import torch
import triton
import triton.language as tl


@triton.jit
def one_block(q, keys, values, place, exists, d, scale, peak, total, mixed, CHANNELS: tl.constexpr):
    """Take the positions `place` into a softmax that stands at (peak, total `[G]`, mixed `[G, d]`)."""
    c = tl.arange(0, CHANNELS)
    at, known = place[:, None] * d + c[None, :], exists[:, None] & (c < d)[None, :]
    k, v = tl.load(keys + at, mask=known, other=0.0), tl.load(values + at, mask=known, other=0.0)
    s = tl.dot(q, tl.trans(k), input_precision="ieee") * scale
    s = tl.where(exists[None, :], s, float("-inf"))
    higher = tl.maximum(peak, tl.max(s, 1))
    base = tl.where(higher == float("-inf"), 0.0, higher)  # nothing but padding yet: -inf - -inf would be NaN
    kept, p = tl.exp(peak - base), tl.exp(s - base[:, None])
    mixed = mixed * kept[:, None] + tl.dot(p.to(v.dtype), v, input_precision="ieee")
    return higher, total * kept + tl.sum(p, 1), mixed


@triton.jit(do_not_specialize=["K", "P", "T"])  # they change while texts are written: compile once
def attend_kernel(
    query, prompt_keys, prompt_values, mask, keys, values, at, out, K, P, T, d, G, scale,
    QUERIES: tl.constexpr, CHANNELS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Rows r and heads h: query and out `[R, H/G, G, d]`; prompt `[N, H/G, P, d]`, mask `[N, P]`; own `[R, H/G, T, d]`."""
    r, h, heads = tl.program_id(0), tl.program_id(1), tl.num_programs(1)
    n = r // K
    g, c, i = tl.arange(0, QUERIES), tl.arange(0, CHANNELS), tl.arange(0, BLOCK)
    places, real = ((r * heads + h) * G + g)[:, None] * d + c[None, :], (g < G)[:, None] & (c < d)[None, :]
    q = tl.load(query + places, mask=real, other=0.0)
    peak, total = tl.zeros((QUERIES,), tl.float32) - float("inf"), tl.zeros((QUERIES,), tl.float32)
    mixed = tl.zeros((QUERIES, CHANNELS), tl.float32)
    first = (n * heads + h).to(tl.int64) * P * d
    for start in range(0, P, BLOCK):
        exists = tl.load(mask + n * P + start + i, mask=start + i < P, other=0) != 0
        peak, total, mixed = one_block(
            q, prompt_keys + first, prompt_values + first, start + i, exists, d, scale, peak, total, mixed, CHANNELS
        )  # fmt: skip
    first = (r * heads + h).to(tl.int64) * T * d
    filled = tl.load(at) + 1  # the token that is being read has its keys there already
    for start in range(0, filled, BLOCK):
        exists = start + i < filled
        peak, total, mixed = one_block(
            q, keys + first, values + first, start + i, exists, d, scale, peak, total, mixed, CHANNELS
        )  # fmt: skip
    tl.store(out + places, mixed / total[:, None], mask=real)


def attend(query, prompt_keys, prompt_values, mask, keys, values, at, scale):
    """What `decode.attend` gives, `[R, 1, H, d]`. query `[R, H, 1, d]`, own keys and values `[R, H/G, T, d]`.

    prompt_keys, prompt_values `[N, H/G, P, d]`, mask `[N, 1, 1, P]` bool; at `[1]`: where among its own keys a row's newest is.
    """
    (N, heads, P, d), (R, H, _, _) = prompt_keys.shape, query.shape
    query, G = query.contiguous(), H // heads
    prompt_keys, prompt_values, mask = (x.contiguous() for x in (prompt_keys, prompt_values, mask))
    out = torch.empty(R, 1, H, d, dtype=query.dtype, device=query.device)
    sizes = dict(QUERIES=max(16, triton.next_power_of_2(G)), CHANNELS=max(16, triton.next_power_of_2(d)))
    wide = d * query.element_size()  # blocks that are read ahead have to fit on the chip, 99 KB on small ones
    sizes |= dict(BLOCK=64 if wide <= 512 else 32, num_stages=3 if wide <= 256 else 2)
    prompt = prompt_keys, prompt_values, mask.view(torch.uint8)
    attend_kernel[(R, heads)](query, *prompt, keys, values, at, out, R // N, P, keys.shape[2], d, G, scale, **sizes)
    return out
