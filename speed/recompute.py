"""Activation checkpointing, a layer at a time, for an update that reads prompts through a key-value cache.

What a backward pass needs most memory for is what happens inside a layer: a dozen tensors a token, the widest of
them in the MLP. `recompute_layers` keeps only what goes into each layer and runs the layer again when its turn in
the backward pass comes (Chen et al. 2016): a fourth forward pass beside three, for a fraction of the memory.

The library's own switch turns the cache off, because running a layer twice would append its keys twice. Here a
layer becomes a pure function, earlier keys and values in, all keys and values out, which may run as often as it
likes; so a prompt is still read once for its K rationales.
"""

import torch
from torch.utils.checkpoint import checkpoint

from plumbing.errors import GraceError

REFUSED = "its layers cannot be recomputed or sharded; leave out --recompute and --shard, and lower --tokens-per-batch"


class _Passing:
    """Stands in for the cache inside one layer: joins new keys and values to the earlier ones, and hands them out."""

    def __init__(self, keys, values):
        self.keys, self.values = keys, values

    def update(self, keys, values, *args, **kwargs):
        if self.keys is not None:
            keys, values = torch.cat([self.keys, keys], 2), torch.cat([self.values, values], 2)
        self.keys, self.values = keys, values
        return keys, values


def _pure(layer, index, again):
    """The layer's forward as a function from hidden states and earlier keys and values to new ones, all three returned.

    again: whether its inside is recomputed in the backward pass. Without gradients the forward is as it was.
    """
    inner = layer.forward

    def forward(hidden, *args, **kwargs):
        if not torch.is_grad_enabled():
            return inner(hidden, *args, **kwargs)
        if (cache := kwargs.pop("past_key_values", None)) is None:
            raise GraceError(f"{type(layer).__name__}: {REFUSED}")
        store = cache.layers[index]

        def run(hidden, keys, values):
            passing = _Passing(keys, values)
            return inner(hidden, *args, past_key_values=passing, **kwargs), passing.keys, passing.values

        earlier = (store.keys, store.values) if store.is_initialized else (None, None)
        if not again:
            return run(hidden, *earlier)
        return checkpoint(run, hidden, *earlier, use_reentrant=False, preserve_rng_state=False)

    def keep(layer, args, kwargs, out):
        """What the layer's caller gets of the three; keys and values go into the cache."""
        if not torch.is_grad_enabled():
            return out
        (out, keys, values), store = out, kwargs["past_key_values"].layers[index]
        if not store.is_initialized:
            store.lazy_initialization(keys, values)
        store.keys, store.values = keys, values
        return out

    return forward, keep


def pure_layers(policy, again, prepare=lambda layer: None):
    """Make a policy's layers pure functions, from now on. Raises GraceError where that cannot be.

    It can where layers are handed their cache by name and keep all of it: not with sliding windows.
    again: whether they are recomputed in backward passes; prepare: `(layer)`, what else is to see all that a layer returns.
    """
    stacks = [m for m in policy.base.modules() if isinstance(m, torch.nn.ModuleList)]
    stacks = [m for m in stacks if len(m) == policy.model.config.get_text_config().num_hidden_layers]
    if not stacks or not policy.can_share:
        raise GraceError(f"{type(policy.model).__name__}: {REFUSED}")
    for index, layer in enumerate(stacks[0]):
        layer.forward, keep = _pure(layer, index, again)
        prepare(layer)
        layer.register_forward_hook(keep, with_kwargs=True)


def recompute_layers(policy):
    """Have a policy's layers recomputed in backward passes, from now on. Raises GraceError where `pure_layers` does."""
    pure_layers(policy, again=True)
    one = torch.ones(1, 1, dtype=torch.long, device=policy.device)
    policy.prefill(one, one, 0)  # says now, not in the middle of a run, if it cannot be
