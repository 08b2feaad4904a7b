"""The decoding step: what `rollout.sample` needs from the network once per token, made cheap.

Decoding moves memory, it hardly computes: for one new token per row, all weights and all keys and values
are read once. So it is fast to keep less, and to move it fewer times:

1. A prompt's keys and values are kept once, not once for each of its K rollouts. Attention over
   [prompt | rationale so far] is a softmax over two stretches of scores; for the first, the queries of
   all K rollouts stand side by side and meet the same keys in one product (Hydragen, Juravsky et al. 2024):

                      prompt's P positions             rationale's t positions
       rollout 1   q1 ┌─────────────────────┐          q1 · own keys 1
       rollout 2   q2 │  [K, d] @ [d, P]    │          q2 · own keys 2        softmax over both,
          ...         │  one product        │            ...                  side by side: [K, P + t]
       rollout K   qK └─────────────────────┘          qK · own keys K

2. The rationales' keys and values go into a buffer made once, instead of a longer copy for each token.
3. Rollouts that have ended leave the batch.
4. On CUDA, hundreds of small kernels per token cost more to launch than to run: the step is captured as
   a graph and replayed. Where Triton is installed, the whole attention is one kernel instead of sixteen
   (decode_triton.py). There every rollout reads its prompt's keys for itself, but from the GPU's cache.

A model whose attention cannot be taken apart like this (sliding windows, soft-capped scores, position
biases) gets `PlainDecoder`, the library's own cache repeated K times: `can_share_prompts` tries which one fits.

Shapes: N prompts of P positions, K rollouts each, R = N * K rows, T new tokens, H heads in G queries per
key-value head, d channels per head.
"""

import functools
import warnings

import torch
import torch.nn.functional as F
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.cache_utils import Cache, DynamicLayer
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from plumbing.models import near
from speed import runs

SCORES = 2**25  # attention scores that `grouped` may hold: 134 MB in float32


def attend(module, query, key, value, attention_mask, scaling=None, decoder=None, **kwargs):
    """Attention over a prompt kept once and the rationales' own keys. Called by the model's layers.

    query           `[R, H, 1, d]`; key, value `[R, H/G, T, d]`: the buffer of the rationales' own
    attention_mask  `[N, 1, 1, P]`, True where the prompt has a token
    decoder         the `SharedDecoder`; where there is none, this is the library's own attention, or on a CPU `grouped`
    Returns `[R, 1, H, d]`, and None in the place of attention weights. Raises NotImplementedError, a RuntimeError, where a
    layer asks for more than this: `can_share_prompts` sees it, and the library's cache is used.
    """
    unknown = [name for name in ("softcap", "sliding_window", "position_bias", "s_aux") if kwargs.get(name) is not None]
    if decoder is None:
        small = query.device.type == "cpu" and query[..., 0].numel() * key.shape[2] < SCORES
        if small and attention_mask is not None and not unknown:
            return grouped(query, key, value, attention_mask, scaling), None
        return sdpa_attention_forward(module, query, key, value, attention_mask, scaling=scaling, **kwargs)
    if unknown:
        raise NotImplementedError(f"attention with {', '.join(unknown)}")
    layer = decoder.cache.layers[module.layer_idx]
    (N, heads, P, d), R = layer.prompt_keys.shape, len(query)
    K, G = R // N, query.shape[1] // heads
    scaling = scaling if scaling is not None else d**-0.5
    if decoder.fused:
        prompt = layer.prompt_keys, layer.prompt_values, attention_mask
        return in_triton(query, *prompt, key, value, decoder.at, scaling), None
    query, t = (query * scaling).view(N, K, heads, G, d), decoder.t + 1
    # A prompt's keys meet the queries of all its K rollouts in one product.
    on_prompt = torch.einsum("nkhgd,nhpd->nkhgp", query, layer.prompt_keys)
    on_prompt = on_prompt.masked_fill(~attention_mask[:, None], -torch.inf).reshape(R, heads, G, P)
    on_own = query.view(R, heads, G, d) @ key[:, :, :t].transpose(2, 3)  # [R, heads, G, t]
    # One softmax over both stretches; in float32, as the library's attention does it.
    precise = torch.promote_types(query.dtype, torch.float32)
    weights = torch.cat([on_prompt, on_own], 3).softmax(3, dtype=precise).to(query.dtype)
    from_prompt, from_own = weights.split([P, t], 3)
    mixed = torch.einsum("nkhgp,nhpd->nkhgd", from_prompt.view(N, K, heads, G, P), layer.prompt_values)
    return (mixed.reshape(R, heads, G, -1) + from_own @ value[:, :, :t]).reshape(R, 1, heads * G, -1), None


def grouped(query, key, value, mask, scaling=None):
    """Attention where the queries that share a key stand side by side. `[R, H, L, d], [R, H/G, S, d] x 2 -> [R, L, H, d]`.

    On a CPU, for the short stretches here, forward 2.6 and forward and backward 6 times as fast as torch's attention in
    bfloat16, 1.3 and 1.5 times in float32 (60 rows, L = 24, S = 60, 9 heads, 3 of them with keys of their own).
    """
    (R, H, L, d), heads = query.shape, key.shape[1]
    query = (query * (scaling if scaling is not None else d**-0.5)).reshape(R, heads, H // heads * L, d)
    scores = (query @ key.transpose(2, 3)).view(R, heads, H // heads, L, -1)
    scores = scores.masked_fill(~mask[:, :, None], torch.finfo(scores.dtype).min)  # finite: padding sees nothing at all
    weights = scores.softmax(-1, dtype=torch.promote_types(query.dtype, torch.float32)).to(query.dtype)
    mixed = weights.view(R, heads, H // heads * L, -1) @ value
    return mixed.view(R, H, L, d).transpose(1, 2).contiguous()


def in_triton(*tensors):
    """`decode_triton.attend`, imported at its first use, because Triton is not installed everywhere."""
    from speed import decode_triton

    return decode_triton.attend(*tensors)


AttentionInterface.register("grace", attend)
AttentionMaskInterface.register("grace", sdpa_mask)


class SharedLayer(DynamicLayer):
    """One layer's keys and values: the N prompts' once, and a buffer for T tokens of each of their K rationales."""

    def __init__(self, layer, K, T, at):
        super().__init__()
        self.prompt_keys, self.prompt_values = layer.keys, layer.values  # [N, H/G, P, d]
        N, heads, _, d = layer.keys.shape
        self.keys, self.values = layer.keys.new_zeros(2, N * K, heads, T, d)
        self.at, self.is_initialized = at, True

    def update(self, keys, values, *args, **kwargs):
        """Put one more token's keys and values at their place, and return the whole buffer."""
        self.keys.index_copy_(2, self.at, keys.to(self.keys.dtype))
        self.values.index_copy_(2, self.at, values.to(self.values.dtype))
        return self.keys, self.values

    def keep(self, rows, groups):
        """Leave out all but these rows and these prompts."""
        self.prompt_keys, self.prompt_values = self.prompt_keys[groups], self.prompt_values[groups]
        self.keys, self.values = self.keys[rows], self.values[rows]


# ---------------------------------------------------------------- one token for every row


class Decoder:
    """One more token for each of N * K rollouts. Rollouts that have ended are left out of the work, out of sight.

    Looking for them costs a host sync on CUDA, and leaving them out a new capture, so that happens rarely there.
    """

    def __init__(self, policy, mask, K):
        self.policy, self.K, self.t = policy, K, 0  # t: tokens fed so far
        self.rows = torch.arange(len(mask) * K, device=mask.device)  # the rollouts still in the batch
        self.position = mask.sum(1).repeat_interleave(K)[:, None]  # [R, 1]
        self.look_every, self.leave_out_at = (16, 0.5) if mask.is_cuda else (1, 0.1)  # so many tokens; share of the batch

    def step(self, token, writing):
        """Feed each rollout's token. `[n], [n] bool -> [n, D], [n, D]`: states for the head, and states to pool.

        writing: which rollouts have not ended. What is returned for the others means nothing.
        """
        if self.t and self.t % self.look_every == 0:
            self._leave_out(writing)
        states = [x[:, 0] for x in self.feed(token[self.rows])]
        self.t += 1
        self.position += 1  # in place, because a captured step reads this very tensor again
        if len(self.rows) < len(token):
            states = [x.new_zeros(len(token), x.shape[1]).index_copy_(0, self.rows, x) for x in states]
        return states

    def all_ended(self, writing):
        """Whether no rollout is being written any more. On CUDA a late answer: it is looked for every 16 tokens."""
        return self.t % self.look_every == 0 and not writing.any()

    def _leave_out(self, writing):
        """Continue without the rollouts that have ended, where that makes the batch smaller by enough."""
        keep, groups = pack(writing[self.rows].view(-1, self.K))
        if len(keep) <= (1 - self.leave_out_at) * len(self.rows):
            self.rows, self.K = self.rows[keep], len(keep) // len(groups)
            self.position = self.position[keep]
            self.keep(keep, groups)


def pack(writing):
    """Which rows stay: groups with a row still writing, as many rows of each as the busiest group needs.

    `[N, K] bool -> [N' * K'], [N']`: indices of rows, those still writing first in each group, and of groups.
    """
    N, K = writing.shape
    busiest = int(writing.sum(1).max())
    groups = writing.any(1).nonzero()[:, 0]
    order = writing[groups].sort(dim=1, descending=True, stable=True).indices[:, :busiest]  # [N', K']
    return (groups[:, None] * K + order).flatten(), groups


class PlainDecoder(Decoder):
    """The library's cache, repeated K times. Any attention-only model."""

    def __init__(self, policy, cache, mask, K):
        super().__init__(policy, mask, K)
        cache.batch_repeat_interleave(K)
        self.cache, self.mask = cache, mask.repeat_interleave(K, 0)  # [R, P + t]

    def feed(self, token):
        """One token per row of the batch. `[R] -> [R, 1, D]` twice: states for the head, and states to pool."""
        self.mask = F.pad(self.mask, (0, 1), value=1)
        return self.policy.forward(token[:, None], self.mask, self.position, self.cache)[:2]

    def keep(self, rows, groups):
        """Continue with these rows of the batch alone, K' for each of these prompts."""
        self.cache.batch_select_indices(rows)
        self.mask = self.mask[rows]


@functools.cache
def can_fuse(H, heads, d, dtype, device):
    """Whether Triton's attention runs for H query heads and so many key-value heads of d channels; tried once."""
    if dtype == torch.float64:
        return False
    zeros = lambda *shape: torch.zeros(shape, dtype=dtype, device=device)
    own, mask, at = zeros(1, heads, 1, d), torch.ones(1, 1, 1, 1, dtype=torch.bool, device=device), zeros(1).long()
    return runs("the decoding's attention", lambda: in_triton(zeros(1, H, 1, d), own, own, mask, own, own, at, 1.0))


@functools.cache
def side_stream(device):
    """The one stream of a device that all steps are captured on: each keeps some 32 MB of workspace for cuBLAS, for good."""
    return torch.cuda.Stream(device)


class SharedDecoder(Decoder):
    """Prompts once, rationales in a buffer; on CUDA a captured graph. Gives what PlainDecoder gives.

    The attention is Triton's where that runs. Only then is the step captured, because that attention reads on the device
    how many tokens there are. A step that cannot be captured is run as it is, with one warning. capture: False to not try.
    """

    def __init__(self, policy, cache, mask, K, capture=True):
        super().__init__(policy, mask, K)
        self.at = torch.zeros(1, dtype=torch.long, device=mask.device)  # where the next token's keys go: t, on the device
        layers = [SharedLayer(layer, K, policy.reading.max_new_tokens, self.at) for layer in cache.layers]
        self.cache, self.mask = Cache(layers=layers), mask.bool()[:, None, None]  # [N, 1, 1, P]
        keys, H = layers[0].keys, policy.model.config.get_text_config().num_attention_heads
        self.fused = mask.is_cuda and can_fuse(H, keys.shape[1], keys.shape[3], keys.dtype, mask.device)
        self.capture, self.replay = capture and self.fused and policy.captures, None

    def feed(self, token):
        """As PlainDecoder.feed. What it returns is overwritten by the next call."""
        if self.capture and self.replay is None:
            self.replay = self._captured(token)
        states = (self.replay or self._forward)(token)
        self.at += 1  # in place, as the positions
        return states

    def _forward(self, token):
        """The step itself. Nothing in it depends on a Python number that changes, if the attention is Triton's."""
        return self.policy.forward(token[:, None], self.mask, self.position, self.cache, decoder=self)[:2]

    def _captured(self, token):
        """The step as a CUDA graph: a function that replays it for other tokens. None where that fails."""
        token, graph = token.clone(), torch.cuda.CUDAGraph()
        here, side = torch.cuda.current_stream(), side_stream(token.device)
        side.wait_stream(here)
        try:
            with torch.cuda.stream(side):
                self._forward(token)  # libraries set themselves up on the first call; the replay writes the same again
            here.wait_stream(side)
            with torch.cuda.graph(graph, stream=side):
                states = self._forward(token)
        except torch.OutOfMemoryError:  # a RuntimeError, too, but of another kind: the training loop makes the batch smaller
            raise
        except RuntimeError as error:
            warnings.warn(f"the decoding step cannot be captured as a CUDA graph, so it is slower ({error})", stacklevel=2)
            torch.cuda.set_stream(here)  # a capture that fails may leave the other one current
            self.capture = self.policy.captures = False
            return None

        def replay(new):
            token.copy_(new)
            graph.replay()
            return states

        return replay

    def keep(self, rows, groups):
        """As PlainDecoder.keep."""
        for layer in self.cache.layers:
            layer.keep(rows, groups)
        self.mask, self.replay = self.mask[groups], None


@torch.no_grad()
def can_share_prompts(policy):
    """Whether a step over prompts kept once gives what the library's cache gives; if so, the model attends by `attend`."""
    if policy.model.config._attn_implementation not in ("sdpa", "grace"):  # grace: as another policy left it
        return False
    policy.model.set_attn_implementation("grace")
    ids = (torch.arange(4, device=policy.device) % policy.head.weight.shape[0]).view(2, 2)
    prompt, token, mask = ids[:1], ids[1], torch.ones_like(ids[:1])
    writing = torch.ones_like(token, dtype=torch.bool)
    prefill = lambda: policy.prefill(prompt, mask, 0)[2]
    plain, _ = PlainDecoder(policy, prefill(), mask, 2).step(token, writing)
    try:
        shared, _ = SharedDecoder(policy, prefill(), mask, 2, capture=False).step(token, writing)
        same = near(shared, plain)
    except (AttributeError, TypeError, RuntimeError):
        # Its layers have no number, its body takes no further argument or does not hand it on (shapes clash then),
        # or its attention asks for more than `attend` does.
        same = False
    if not same:
        policy.model.set_attn_implementation("sdpa")
    return same
